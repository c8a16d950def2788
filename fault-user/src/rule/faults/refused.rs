//! `refused`: the server does not want to answer.

use fault_common::dns::code;

use super::prelude::*;

fault! {
    /// The server does not want to answer.
    Refused: query("refused", "DNS queries are answered: the server refuses (REFUSED)").listed(203);
}

impl Definition for Refused {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(code::REFUSED, None))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
