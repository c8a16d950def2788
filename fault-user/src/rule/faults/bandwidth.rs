//! `bandwidth`: a stream is slowed.

use super::prelude::*;

fault! {
    /// A stream is slowed.
    Bandwidth: datagram("bandwidth", "the stream is slowed, each connection or with `shared` all together").listed(150);

    /// The rate in bits per second.
    bits_per_second: u64 => first("rate", ValueKind::Rate, "the rate");
    /// One rate for the whole relay, not one for each connection.
    shared: bool = false => SHARED;
}

impl Definition for Bandwidth {
    fn complaint(&self) -> Option<Complaint> {
        bad_rate(self.bits_per_second, "more, or `stall`")
    }

    fn overlap(&self) -> Overlap {
        Overlap::OneValue
    }
}
