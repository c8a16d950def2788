//! `transient`: some requests are answered with an error, then everything passes.

use super::error::Error;
use super::prelude::*;
use crate::relay::handling::{Handling, RequestRule};

attributes! {
    /// Answers the first requests with an error, then lets everything through.
    Transient {
        /// How many requests get an error.
        #[serde(alias = "errors", alias = "n")]
        count: i64,
        /// Whose language the error is in.
        protocol: ErrorProtocol,
        /// HTTP status codes to choose from; none means 500, 502, 503 and 504.
        #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_many")]
        status: Vec<u16>,
        /// The error in the protocol's own words, such as `LOADING try later` or `421 try later`; one line.
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// How many random bytes `random` answers with; none means 16 to 127.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// Only requests that this regular expression matches, in upper or lower case; none means all.
        #[serde(skip_serializing_if = "Option::is_none")]
        query: Option<String>,
        /// Each connection counts for itself instead of all together.
        #[serde(skip_serializing_if = "is_default")]
        per_connection: bool,
    }
}

impl Transient {
    /// The error without the count.
    fn error(&self) -> Error {
        Error {
            protocol: self.protocol,
            status: self.status.clone(),
            message: self.message.clone(),
            size: self.size,
            query: self.query.clone(),
        }
    }
}

impl StreamFault for Transient {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`count`, `protocol`, `status`, `message`, `size`, `query`, `per_connection`",
            tcp: Some(
                "the first `count` requests (of all connections together) are, then everything passes",
            ),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Transient(rule) = rule else {
            return Ok(None);
        };
        let error = match &rule.reply {
            Some(reply) => Error::of_reply(reply, rule.query.as_ref())?,
            None => Error {
                protocol: ErrorProtocol::None,
                ..Error::default()
            },
        };
        Ok(Some(Self {
            count: whole(rule.errors),
            protocol: error.protocol,
            status: error.status,
            message: error.message,
            size: error.size,
            query: error.query,
            per_connection: false,
        }))
    }

    fn check(&self) -> Result<(), String> {
        self.error().check()
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        matches!(name, "errors" | "n").then_some("count")
    }

    fn handling(&self) -> Option<Handling> {
        Some(Handling {
            fault: "transient",
            rule: RequestRule::First {
                count: self.count.max(0).unsigned_abs(),
                per_connection: self.per_connection,
            },
            protocol: self.protocol,
            wording: self.error().wording(),
            query: self.query.clone(),
            queries: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::decisions::tests::{noted, repeating};
    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_first_requests_are_answered_then_all_passes() {
        let attributes = json!({ "count": 1, "protocol": "redis", "message": "ERR once" });
        let mut bench = Bench::new("transient", &attributes);
        bench.push(0, "PING\r\n");
        bench.push(0, "PING\r\n");
        assert_eq!(bench.pop(0), "<-ERR once\r\n PING\r\n");
        assert_eq!(bench.hits(), 1);
    }

    #[test]
    fn the_requests_that_were_answered_are_answered_again() {
        let attributes = json!({ "count": 9, "protocol": "redis", "message": "ERR once" });
        let (notes, log) = repeating(&[1, 2]);
        let mut bench = Bench::noting("transient", &attributes, notes);
        for _ in 0..4 {
            bench.push(0, "PING\r\n");
        }
        let (answer, request) = ("<-ERR once\r\n", "PING\r\n");
        assert_eq!(bench.pop(0), [answer, answer, request, request].join(" "));
        assert_eq!(noted(&log), [(Some(1), None), (Some(2), None)]);
    }

    #[test]
    fn without_a_reply_the_connection_is_reset() {
        let mut bench = Bench::new("transient", &json!({ "count": 1, "protocol": "none" }));
        bench.push(0, "PING\r\n");
        assert_eq!(bench.pop(0), "+abort-rst");
    }
}
