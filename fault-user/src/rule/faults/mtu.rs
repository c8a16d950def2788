//! `mtu`: larger packets are dropped.

use super::prelude::*;

fault! {
    /// Larger packets are dropped.
    Mtu: packet("mtu", "larger packets are dropped: a path-MTU black hole").listed(110);

    /// The largest IP packet that passes, 68 to 65,535 bytes.
    bytes: u32 => first("bytes", ValueKind::Size, "the largest IP packet that passes, 68 to 65535");
    /// With ICMP "too big" instead of silence.
    icmp: bool = false => named("icmp", ValueKind::Flag, "answer with ICMP \"too big\" instead of silence");
}

impl Definition for Mtu {
    fn complaint(&self) -> Option<Complaint> {
        if (68..=65_535).contains(&self.bytes) {
            return None;
        }
        complain(
            "bytes",
            format!("{} bytes are no MTU", self.bytes),
            "68 to 65535 (68 is IPv4's smallest)",
        )
    }

    fn packet(&self) -> Option<PacketAction> {
        let arguments = [self.bytes.into(), self.icmp.into()];
        Some(PacketAction::new(fault::MTU, arguments))
    }

    fn overlap(&self) -> Overlap {
        Overlap::OneValue
    }

    fn waits_for(&self) -> Option<String> {
        Some(format!(
            "no packet was larger than {} bytes: name a smaller MTU, or send more at once (a packet has at most its \
             interface's MTU)",
            self.bytes
        ))
    }
}
