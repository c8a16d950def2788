//! `truncated`: the answer does not fit a datagram.

use fault_common::dns;

use super::prelude::*;

fault! {
    /// The answer does not fit a datagram.
    Truncated: query("truncated", "DNS queries are answered: the answer is truncated, and clients ask again over TCP").listed(204);
}

impl Definition for Truncated {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(dns::FLAG_TRUNCATED, None))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
