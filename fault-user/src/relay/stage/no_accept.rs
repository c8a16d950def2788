//! `no_accept`: handshakes complete, nobody serves. The relay carries it out: there is no connection yet.

use super::prelude::*;

attributes! {
    /// The whole proxy does not accept: handshakes complete, nobody serves.
    NoAccept {}
}

impl StreamFault for NoAccept {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some(
                "handshakes complete in the kernel, but connections are not served until it is removed. Acts on the whole proxy",
            ),
            udp: Some("new clients are ignored"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        Ok(matches!(rule, rule::Fault::NoAccept(_)).then_some(Self {}))
    }

    fn is_proxy_wide(&self) -> bool {
        true
    }
}
