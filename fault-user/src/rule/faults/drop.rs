//! `drop`: packets that the modifiers select are dropped.

use super::prelude::*;

fault! {
    /// The packets that the modifiers select are dropped silently.
    Drop: either("drop", "the packets that the modifiers select are dropped silently").listed(20);
}

impl Definition for Drop {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::DROP, []).per_wire_packet(false))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
