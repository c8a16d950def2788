//! `close`: connections that are open now are closed, once. The relay carries it out.

use super::prelude::*;

attributes! {
    /// Closes connections that are open now, once.
    Close {
        /// How many, the oldest first; 0 closes all.
        count: i64,
        /// `fin` or `rst`.
        #[serde(alias = "how")]
        mode: CloseMode,
    }
}

impl StreamFault for Close {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`count` (0: all), `mode`",
            tcp: Some("closes connections, the oldest first, once, when it is added"),
            udp: Some("forgets clients"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Close(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            count: whole(rule.count.unwrap_or(0)),
            mode: rule.how,
        }))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        (name == "how").then_some("mode")
    }

    fn is_proxy_wide(&self) -> bool {
        true
    }
}
