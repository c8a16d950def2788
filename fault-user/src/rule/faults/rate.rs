//! `rate`: shaping at the rate of the wire.

use super::prelude::*;

fault! {
    /// Shaping at a rate of the wire.
    Rate: packet("rate", "shaping at the wire rate, counting wire bytes").listed(100);

    /// The rate in bits per second.
    bits_per_second: u64 => first("rate", ValueKind::Rate, "the rate of the wire");
    /// How much may pass at once after a pause; the plan chooses where it was not given.
    burst_bytes: Option<u64> = None => short(
        "burst",
        named("burst_bytes", ValueKind::Size, "how much may pass at once after a pause"),
    );
    /// Bytes that the link adds to each packet (negative: headers that are not counted).
    overhead_bytes: i32 = 0 => short(
        "overhead",
        named("overhead_bytes", ValueKind::Signed, "bytes that the link adds to each packet"),
    );
    /// The cell size of a link such as ATM; 0 for none.
    cell_bytes: u32 = 0 => short(
        "cell",
        named("cell_bytes", ValueKind::Count, "size of a link cell; 0 for none"),
    );
    /// Bytes that each cell adds.
    cell_overhead_bytes: i32 = 0 => short(
        "cell-overhead",
        named("cell_overhead_bytes", ValueKind::Signed, "bytes that each cell adds"),
    );
    /// The most packets that wait; more are lost and counted.
    limit_packets: Option<u32> = None => LIMIT;
}

impl Definition for Rate {
    fn complaint(&self) -> Option<Complaint> {
        if let Some(complaint) = bad_rate(self.bits_per_second, "more, or `blackhole`")
            .or_else(|| no_queue(self.limit_packets))
        {
            return Some(complaint);
        }
        if self.burst_bytes == Some(0) {
            return complain(
                "burst_bytes",
                "a burst of 0 bytes lets nothing pass",
                "1500 or more",
            );
        }
        if self.cell_bytes == 0 && self.cell_overhead_bytes != 0 {
            return complain(
                "cell_overhead_bytes",
                "there is no cell size to add this to",
                "cell:N as well",
            );
        }
        None
    }

    fn packet(&self) -> Option<PacketAction> {
        // Bits of a super-packet in a millisecond. One that is shorter on the wire is held whole, and charged for all
        // of its wire packets: nobody sees when each of them was sent.
        const WHOLE_FROM: u64 = 65_536 * 8 * 1000;
        Some(
            PacketAction::new(fault::RATE, [])
                .per_wire_packet(self.bits_per_second < WHOLE_FROM)
                .shaped(PacketShaper::Rate(self.clone())),
        )
    }

    fn overlap(&self) -> Overlap {
        Overlap::FirstCounts
    }
}
