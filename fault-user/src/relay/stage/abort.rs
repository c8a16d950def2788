//! `abort`: a break between a request and its answer.

use super::prelude::*;
use crate::relay::handling::{Handling, RequestRule};
use crate::relay::protocol::Wording;

attributes! {
    /// Breaks the connection after a request has reached the server and before its answer is seen.
    Abort {
        /// Whose language says where a request ends.
        protocol: ErrorProtocol,
        /// What the client gets; unset means a reset.
        #[serde(skip_serializing_if = "Option::is_none", alias = "how")]
        mode: Option<CloseMode>,
    }
}

impl StreamFault for Abort {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`protocol`, `mode` (default `rst`)",
            tcp: Some(
                "the first request reaches the server, the client gets a reset instead of its answer",
            ),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        Ok(matches!(rule, rule::Fault::Abort(_)).then(Self::default))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        (name == "how").then_some("mode")
    }

    fn handling(&self) -> Option<Handling> {
        Some(Handling {
            fault: "abort",
            rule: RequestRule::Abort(self.mode.unwrap_or(CloseMode::Rst)),
            protocol: self.protocol,
            wording: Wording::default(),
            query: None,
            queries: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_request_passes_and_then_the_connection_breaks() {
        let mut bench = Bench::new("abort", &json!({ "protocol": "redis" }));
        bench.push(0, "PING\r\n");
        assert_eq!(bench.pop(0), "PING\r\n +abort-rst");
        bench.push(0, "PING\r\n");
        assert_eq!(bench.pop(0), "", "nothing more goes to the server");
        assert_eq!(bench.hits(), 1);
    }
}
