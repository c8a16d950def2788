//! `slow_close`: the FIN is held back.

use super::prelude::*;

fault! {
    /// The FIN is held back.
    SlowClose: stream("slow_close", "the FIN is held back").listed(160).acting(Acts::OneWay);

    /// For how long, in nanoseconds.
    delay_ns: u64 => first("delay", ValueKind::Duration, "for how long");
}

impl Definition for SlowClose {
    fn complaint(&self) -> Option<Complaint> {
        if self.delay_ns == 0 {
            return complain("delay", "a delay of 0 does nothing", "more than 0");
        }
        longer("delay", self.delay_ns, MAX_TIME_NS)
    }

    fn held_ns(&self) -> u64 {
        self.delay_ns
    }
}
