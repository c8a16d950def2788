//! `down`: nobody is there.

use super::prelude::*;

fault! {
    /// New connections are refused, open ones reset.
    Down: Spec {
        layer: Layer::Either,
        ..datagram(
            "down",
            "new connections are refused, open ones reset; on UDP ICMP port unreachable",
        ).listed(210)
    };
}

impl Definition for Down {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::DOWN, []).per_wire_packet(false))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
