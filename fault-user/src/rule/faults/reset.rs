//! `reset`: live connections get an RST at both ends.

use super::prelude::*;
use crate::rule::units::show_size;

fault! {
    /// Live connections get an RST at both ends on their next packet.
    Reset: packet(
        "reset",
        "live connections get an RST at both ends on their next packet; TCP only",
    ).listed(50).tcp_only();

    /// Only once so many bytes of payload have gone in the packet's direction since the rule began; nothing
    /// means with the next packet.
    bytes: Option<u32> = None => first(
        "bytes",
        ValueKind::Size,
        "on the packet that completes so much payload in its direction since the rule began; at once when absent",
    );
}

impl Definition for Reset {
    fn complaint(&self) -> Option<Complaint> {
        if self.bytes != Some(0) {
            return None;
        }
        complain(
            "bytes",
            "after 0 bytes means at once",
            "`reset` alone, or a size of 1 or more",
        )
    }

    fn packet(&self) -> Option<PacketAction> {
        let bytes = self.bytes.unwrap_or(0);
        Some(PacketAction::new(fault::RESET, [bytes.into()]).per_wire_packet(bytes != 0))
    }

    fn overlap(&self) -> Overlap {
        match self.bytes {
            None => Overlap::Decides,
            Some(_) => Overlap::Adds,
        }
    }

    fn waits_for(&self) -> Option<String> {
        let bytes = show_size(self.bytes?.into());
        Some(format!(
            "no connection sent {bytes} in one direction since the rule began: name a smaller size, or send more"
        ))
    }
}
