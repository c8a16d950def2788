//! `coalesce`: small parts are gathered into large ones.

use super::MAX_LATENCY_NS;
use super::prelude::*;

fault! {
    /// Small parts are gathered into large ones.
    Coalesce: stream("coalesce", "small parts are gathered into large ones").listed(290).acting(Acts::OneWay);

    /// What is waited for.
    min_bytes: u64 => short("min", first("min_bytes", ValueKind::Size, "how many bytes to collect"));
    /// For how long at most, in nanoseconds.
    max_wait_ns: u64 => short("wait", first("max_wait", ValueKind::Duration, "the longest time to collect them"));
}

impl Definition for Coalesce {
    fn complaint(&self) -> Option<Complaint> {
        if self.min_bytes < 2 {
            return complain("min_bytes", "every part is already that large", "2 or more");
        }
        if self.max_wait_ns == 0 {
            return complain("max_wait", "a wait of 0 gathers nothing", "more than 0");
        }
        longer("max_wait", self.max_wait_ns, MAX_LATENCY_NS)
    }

    fn held_ns(&self) -> u64 {
        self.max_wait_ns
    }
}
