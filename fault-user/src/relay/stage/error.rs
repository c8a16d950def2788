//! `error`: requests are answered with an error in the server's name.

use super::prelude::*;
use crate::relay::handling::{self, Handling, RequestRule};
use crate::relay::protocol::Wording;
use crate::rule::ErrorReply;
use crate::rule::servers::{MysqlError, PostgresError, redis_error};

attributes! {
    /// Answers requests with an error in the server's name; the server does not see them.
    Error {
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
    }
}

/// The longest text of an error reply, in bytes.
const MESSAGE_MAX: usize = 400;
/// The most random bytes of an error reply.
const REPLY_MAX: u64 = 1 << 20;

impl Error {
    /// The attributes for a rule's reply.
    pub(super) fn of_reply(reply: &ErrorReply, query: Option<&String>) -> Result<Self> {
        let (protocol, message) = match reply {
            ErrorReply::Http(_) => (ErrorProtocol::Http, &None),
            ErrorReply::Redis(text) => (ErrorProtocol::Redis, text),
            ErrorReply::Mysql(text) => (ErrorProtocol::Mysql, text),
            ErrorReply::Postgres(text) => (ErrorProtocol::Postgres, text),
            ErrorReply::Smtp(text) => (ErrorProtocol::Smtp, text),
            ErrorReply::Memcache(text) => (ErrorProtocol::Memcache, text),
            ErrorReply::Random(_) => (ErrorProtocol::Random, &None),
        };
        let mut error = Self {
            protocol,
            message: message.clone(),
            query: query.cloned(),
            ..Self::default()
        };
        match reply {
            ErrorReply::Http(statuses) => error.status.clone_from(statuses),
            ErrorReply::Random(bytes) => error.size = Some(*bytes),
            _ => {}
        }
        error.check().map_err(anyhow::Error::msg)?;
        Ok(error)
    }

    /// What it says.
    pub(super) fn wording(&self) -> Wording {
        Wording {
            status: self.status.clone(),
            message: self.message.clone(),
            size: self.size,
        }
    }
}

impl StreamFault for Error {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`protocol`, `status`, `message`, `size`, `query`",
            tcp: Some("each request is answered with an error, see below"),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Error(rule) = rule else {
            return Ok(None);
        };
        Self::of_reply(&rule.reply, rule.query.as_ref()).map(Some)
    }

    fn check(&self) -> Result<(), String> {
        let wrong = self.status.iter().find(|s| !(200..=599).contains(*s));
        if let Some(status) = wrong {
            return Err(format!("{status} is no HTTP status, expected 200 to 599"));
        }
        if let Some(message) = &self.message
            && (message.len() > MESSAGE_MAX || message.contains(['\r', '\n']) || message.is_empty())
        {
            return Err(format!(
                "the message of an error is one line of 1 to {MESSAGE_MAX} bytes"
            ));
        }
        if self
            .size
            .is_some_and(|size| !(1..=REPLY_MAX).contains(&size))
        {
            return Err(format!("an error has 1 to {REPLY_MAX} random bytes"));
        }
        if let Some(query) = &self.query {
            handling::selection(query).map_err(|error| error.to_string())?;
            if matches!(self.protocol, ErrorProtocol::Random | ErrorProtocol::None) {
                return Err("`query` reads requests: name their protocol".to_owned());
            }
        }
        let text = self.message.as_deref().unwrap_or_default();
        let unknown = match self.protocol {
            _ if text.is_empty() => None,
            ErrorProtocol::Redis => redis_error(text).err(),
            ErrorProtocol::Mysql => MysqlError::meant_by(text).err(),
            ErrorProtocol::Postgres => PostgresError::meant_by(text).err(),
            _ => None,
        };
        unknown.map_or(Ok(()), |unknown| Err(unknown.to_string()))
    }

    fn handling(&self) -> Option<Handling> {
        Some(Handling {
            fault: "error",
            rule: RequestRule::Always,
            protocol: self.protocol,
            wording: self.wording(),
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
    fn each_request_is_answered_and_the_server_sees_none() {
        let attributes = json!({ "protocol": "redis", "message": "LOADING later" });
        let mut bench = Bench::new("error", &attributes);
        bench.push(0, "PING\r\n");
        bench.push(0, "PING\r\n");
        assert_eq!(bench.pop(0), "<-LOADING later\r\n <-LOADING later\r\n");
        assert_eq!(bench.hits(), 2);
    }

    #[test]
    fn a_status_is_recorded_whatever_is_read_at_a_time() {
        let status: Vec<_> = (500..600).collect();
        let attributes = json!({ "protocol": "http", "status": status });
        let request = "GET / HTTP/1.1\r\n\r\n";
        let drawn = |read: usize| {
            let (notes, log) = repeating(&[]);
            let mut bench = Bench::noting("error", &attributes, notes);
            for at in (0..request.len()).step_by(read) {
                bench.push(0, &request[at..(at + read).min(request.len())]);
            }
            bench.push(0, request);
            noted(&log)
        };
        let whole = drawn(request.len());
        assert_eq!((whole.len(), whole[0].0), (2, Some(1)));
        assert_ne!(whole[0].1, whole[1].1);
        assert_eq!(drawn(3), whole);
    }

    #[test]
    fn what_is_drawn_depends_on_where_the_request_begins() {
        let attributes = json!({ "protocol": "random", "size": 8 });
        let last = |chunks: &[&str]| {
            let mut bench = Bench::new("error", &attributes);
            let replies = chunks.iter().map(|chunk| {
                bench.push(0, chunk);
                bench.pop(0)
            });
            replies.last()
        };
        let expected = last(&["abcdef", "g"]);
        assert_eq!(last(&["abc", "def", "g"]), expected);
        assert_ne!(last(&["abcde", "g"]), expected);
    }

    #[test]
    fn half_a_request_is_the_servers_to_judge() {
        let mut bench = Bench::new("error", &json!({ "protocol": "redis" }));
        bench.push(0, "PI");
        assert_eq!(bench.pop(1_000_000), "");
        bench.fin(0);
        assert_eq!(bench.pop(0), "PI +fin");
    }
}
