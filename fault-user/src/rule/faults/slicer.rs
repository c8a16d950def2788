//! `slicer`: data comes in small parts.

use super::MAX_LATENCY_NS;
use super::prelude::*;

fault! {
    /// Data comes in small parts.
    Slicer: stream("slicer", "data comes in small parts").listed(190).acting(Acts::OneWay);

    /// The average size of a part, at least 1.
    average_size_bytes: u64 => short(
        "average_size",
        spread("average_size_bytes", ValueKind::Size, "size_variation_bytes", "average size of a part"),
    );
    /// How far the size spreads; less than the average.
    size_variation_bytes: u64 = 0 => short(
        "size_variation",
        named(
            "size_variation_bytes",
            ValueKind::Size,
            "how far the size spreads, less than the average",
        ),
    );
    /// The pause after each part, in nanoseconds.
    delay_ns: u64 = 0 => named("delay", ValueKind::Duration, "pause after each part");
}

impl Definition for Slicer {
    fn complaint(&self) -> Option<Complaint> {
        if self.average_size_bytes == 0 {
            return complain(
                "average_size_bytes",
                "parts of 0 bytes carry nothing",
                "1 or more",
            );
        }
        if self.size_variation_bytes >= self.average_size_bytes {
            return complain(
                "size_variation_bytes",
                "the variation is not smaller than the average",
                "less than the average size",
            );
        }
        longer("delay", self.delay_ns, MAX_LATENCY_NS)
    }

    fn held_ns(&self) -> u64 {
        self.delay_ns
    }
}
