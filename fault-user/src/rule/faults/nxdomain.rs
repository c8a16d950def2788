//! `nxdomain`: the name does not exist.

use fault_common::dns::code;

use super::prelude::*;

fault! {
    /// The name does not exist.
    Nxdomain: query("nxdomain", "DNS queries are answered: the name does not exist").listed(200);
}

impl Definition for Nxdomain {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(code::NO_NAME, None))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
