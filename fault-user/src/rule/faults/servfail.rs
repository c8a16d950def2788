//! `servfail`: the server has failed.

use fault_common::dns::code;

use super::prelude::*;

fault! {
    /// The server has failed.
    Servfail: query("servfail", "DNS queries are answered: the server has failed (SERVFAIL)").listed(202);
}

impl Definition for Servfail {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(code::SERVER_FAILURE, None))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
