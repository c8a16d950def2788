//! `blackhole`: everything vanishes.

use fault_common::abi::fault;

use super::{Definition, Overlap};
use crate::rule::catalog::packet;
use crate::rule::fields::fault;
use crate::rule::packet::PacketAction;

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
