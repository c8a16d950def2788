//! `latency`: a stream is shifted in time.

use super::prelude::*;

/// The longest latency of a stream: an hour.
pub const MAX_LATENCY_NS: u64 = 3_600 * SECOND;

fault! {
    /// A stream is shifted in time.
    Latency: datagram("latency", "the stream is shifted in time, not slowed").listed(140);

    /// The middle of the latency in nanoseconds, at most an hour.
    latency_ns: u64 => spread("latency", ValueKind::Duration, "jitter", "middle of the latency, at most 1h");
    /// How far it spreads to both sides, in nanoseconds; at most the latency.
    jitter_ns: u64 = 0 => named(
        "jitter",
        ValueKind::Duration,
        "how far it spreads to both sides, at most the latency",
    );
}

impl Definition for Latency {
    fn complaint(&self) -> Option<Complaint> {
        jittered("latency", self.latency_ns, self.jitter_ns, MAX_LATENCY_NS)
    }

    fn held_ns(&self) -> u64 {
        self.latency_ns.saturating_add(self.jitter_ns)
    }

    fn overlap(&self) -> Overlap {
        Overlap::OneValue
    }
}
