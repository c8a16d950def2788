//! `down`: nobody is there. The relay carries it out: there is nothing to do to a connection.

use super::prelude::*;

attributes! {
    /// The whole proxy is down: connections are refused, open ones closed.
    Down {}
}

impl StreamFault for Down {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some(
                "as `enabled: false`: refused, open connections closed. Acts on the whole proxy, whatever the toxicity",
            ),
            udp: Some("the socket is closed"),
        }
    }

    fn is_proxy_wide(&self) -> bool {
        true
    }
}
