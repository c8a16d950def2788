//! `duplicate`: the same packet twice.

use super::prelude::*;

fault! {
    /// The same packet twice.
    Duplicate: either("duplicate", "the same packet twice").listed(70);

    /// The share of the packets, in parts per million.
    probability: u32 => first("probability", ValueKind::Probability, "share of the packets");
}

impl Definition for Duplicate {
    fn packet(&self) -> Option<PacketAction> {
        let action = PacketAction::new(fault::DUPLICATE, [threshold_from_ppm(self.probability)]);
        Some(action.per_wire_packet(self.probability < PPM))
    }
}
