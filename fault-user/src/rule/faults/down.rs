//! `down`: nobody is there.

use fault_common::abi::fault;

use super::{Definition, Overlap};
use crate::rule::catalog::{Layer, Spec, datagram};
use crate::rule::fields::fault;
use crate::rule::packet::PacketAction;

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
