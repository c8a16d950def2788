//! `reset_peer`: a real RST.

use super::prelude::*;

fault! {
    /// A real RST.
    ResetPeer: stream("reset_peer", "the connection is reset, also if it is idle; a new one not before its first data").listed(180);

    /// How long after the connection's start, in nanoseconds; 0 at once.
    timeout_ns: u64 = 0 => first(
        "timeout",
        ValueKind::Duration,
        "how long after the connection's start; absent or 0: at once",
    );
}

impl Definition for ResetPeer {
    fn complaint(&self) -> Option<Complaint> {
        longer("timeout", self.timeout_ns, MAX_TIME_NS)
    }

    fn held_ns(&self) -> u64 {
        self.timeout_ns
    }

    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
