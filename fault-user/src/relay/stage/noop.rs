//! `noop`: nothing happens.

use super::prelude::*;

attributes! {
    /// No attributes.
    Noop {}
}

impl StreamFault for Noop {
    fn help(&self) -> Help {
        Help {
            attributes: "-",
            tcp: Some("nothing"),
            udp: Some("nothing"),
        }
    }
}
