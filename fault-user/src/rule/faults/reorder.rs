//! `reorder`: picked packets overtake the others.

use super::prelude::*;

fault! {
    /// Picked packets overtake the others.
    Reorder: either("reorder", "picked packets overtake those that are held; without a `delay` on the same packets the others are held for 10 ms").listed(80);

    /// The chance of a candidate, in parts per million.
    probability: u32 => first("probability", ValueKind::Probability, "chance of a candidate");
    /// Every gap-th packet is a candidate.
    gap: u32 = 1 => first("gap", ValueKind::Count, "every gap-th packet is a candidate; 1 when absent");
}

impl Definition for Reorder {
    fn complaint(&self) -> Option<Complaint> {
        if self.gap > 0 {
            return None;
        }
        complain("gap", "a gap of 0 has no packets", "1 or more")
    }

    fn packet(&self) -> Option<PacketAction> {
        let arguments = [threshold_from_ppm(self.probability), self.gap.into()];
        Some(PacketAction::new(fault::REORDER, arguments))
    }
}
