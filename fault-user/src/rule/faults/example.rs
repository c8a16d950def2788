//! `example`: packets above a size are dropped. The fault that CONTRIBUTING.md adds; only unit tests have it.

use super::prelude::*;

fault! {
    /// Packets above a size are dropped.
    Example: packet("example", "packets above a size are dropped");

    /// The largest packet that passes, in bytes.
    bytes: u32 = 1500 => first("bytes", ValueKind::Size, "the largest packet that passes; 1500 when absent");
}

impl Definition for Example {
    fn complaint(&self) -> Option<Complaint> {
        if self.bytes > 0 {
            return None;
        }
        complain("bytes", "no packet has 0 bytes", "1 or more")
    }

    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::new(fault::MTU, [self.bytes.into()]))
    }
}
