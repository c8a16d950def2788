//! `timeout`: silence, then the end of the connection.

use super::prelude::*;

fault! {
    /// Data is thrown away, then the connection is closed.
    Timeout: stream("timeout", "data is discarded, then the connection is closed").listed(170);

    /// After how long, in nanoseconds; 0 hangs until the rule is removed.
    timeout_ns: u64 = 0 => first(
        "timeout",
        ValueKind::Duration,
        "after how long; absent or 0: hangs until the rule is removed",
    );
}

impl Definition for Timeout {
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
