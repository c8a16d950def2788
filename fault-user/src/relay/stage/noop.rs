//! `noop`: nothing happens.

use crate::relay::fault::{Help, StreamFault, attributes};

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
