//! `noop`: nothing happens.

use super::prelude::*;

attributes! {
    /// No attributes.
    Noop {}
}

impl StreamFault for Noop {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some("nothing"),
            udp: Some("nothing"),
        }
    }
}
