//! `blackhole`: every packet is dropped.

use super::prelude::*;

fault! {
    /// Every packet is dropped silently, SYN included.
    Blackhole: packet("blackhole", "every packet is dropped silently, SYN included: connects time out").listed(30);
}

impl Definition for Blackhole {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::DROP, []).per_wire_packet(false))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
