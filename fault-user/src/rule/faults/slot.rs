//! `slot`: bursty delivery.

use super::MAX_DELAY_NS;
use super::prelude::*;
use crate::rule::units::show_duration;

/// Bursty delivery, as on a shared medium.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Slot {
    /// The shortest time between two bursts, in nanoseconds.
    pub min_ns: u64,
    /// The longest time between two bursts, in nanoseconds; the shortest where it was not given.
    pub max_ns: u64,
    /// The most packets in one burst.
    pub packets: Option<u32>,
    /// The most bytes in one burst.
    pub bytes: Option<u64>,
}

const MIN: Param = first(
    "min",
    ValueKind::Duration,
    "shortest time between two bursts",
);
const MAX: Param = first(
    "max",
    ValueKind::Duration,
    "longest time between two bursts; the shortest when absent",
);
const PACKETS: Param = named("packets", ValueKind::Count, "the most packets in a burst");
const BYTES: Param = named("bytes", ValueKind::Size, "the most bytes in a burst");

impl Arguments for Slot {
    const SPEC: Spec = Spec {
        params: &[MIN, MAX, PACKETS, BYTES],
        ..packet("slot", "bursty delivery, as on a shared medium").listed(130)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        let min_ns = args.field(&MIN, [])?;
        Ok(Self {
            min_ns,
            max_ns: args.field(&MAX, [min_ns])?,
            packets: args.field(&PACKETS, [None])?,
            bytes: args.field(&BYTES, [None])?,
        })
    }

    fn given(&self) -> Given {
        let mut given = Given::new();
        give(&mut given, &MIN, &self.min_ns, &[]);
        give(&mut given, &MAX, &self.max_ns, &[self.min_ns]);
        give(&mut given, &PACKETS, &self.packets, &[]);
        give(&mut given, &BYTES, &self.bytes, &[]);
        given
    }
}

impl Definition for Slot {
    fn complaint(&self) -> Option<Complaint> {
        if self.max_ns == 0 {
            return complain("min", "a slot of 0 does nothing", "more than 0");
        }
        if self.max_ns < self.min_ns {
            let least = format!("at least {}", show_duration(self.min_ns));
            return complain(
                "max",
                "the longest time is shorter than the shortest",
                &least,
            );
        }
        longer("max", self.max_ns, MAX_DELAY_NS)
    }

    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::SLOT, []).shaped(PacketShaper::Slot(self.clone())))
    }

    fn overlap(&self) -> Overlap {
        Overlap::FirstCounts
    }
}
