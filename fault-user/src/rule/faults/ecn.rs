//! `ecn`: congestion is marked.

use super::prelude::*;

fault! {
    /// ECT packets are marked CE.
    Ecn: packet("ecn", "ECT packets are marked CE").listed(120);

    /// The share of the packets, in parts per million.
    probability: u32 => first("probability", ValueKind::Probability, "share of the ECT packets");
}

impl Definition for Ecn {
    fn packet(&self) -> Option<PacketAction> {
        let action = PacketAction::new(fault::ECN, [threshold_from_ppm(self.probability)]);
        Some(action.per_wire_packet(self.probability < PPM))
    }
}
