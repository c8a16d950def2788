//! `blackhole`: everything vanishes.

use super::prelude::*;

fault! {
    /// Everything vanishes silently, SYN included.
    Blackhole: packet("blackhole", "everything vanishes silently, SYN included: connects time out").listed(30);
}

impl Definition for Blackhole {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::DROP, []).per_wire_packet(false))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
