//! `lifetime`: a connection ends when its time is over.

use serde::{Deserialize, Serialize};

use super::prelude::*;

words! {
    /// From when `lifetime` is counted.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    LifetimeFrom {
        /// From the connection's start.
        #[default]
        Connect = "connect",
        /// From its first byte of data, in either direction.
        #[serde(alias = "first_data")]
        FirstData = "first-data",
    }
}

fault! {
    /// A connection ends when its time is over.
    Lifetime: stream("lifetime", "the connection ends when its time is over, idle or not").listed(280);

    /// The middle of its time, in nanoseconds.
    time_ns: u64 => spread("time", ValueKind::Duration, "jitter", "middle of the time");
    /// How far it spreads to both sides, in nanoseconds; at most the time.
    jitter_ns: u64 = 0 => named(
        "jitter",
        ValueKind::Duration,
        "how far it spreads to both sides, at most the time",
    );
    /// From when it is counted.
    from: LifetimeFrom = LifetimeFrom::default() => named(
        "from",
        ValueKind::Word(LifetimeFrom::WORDS),
        "from when it counts; `connect` when absent",
    );
}

impl Definition for Lifetime {
    fn complaint(&self) -> Option<Complaint> {
        jittered("time", self.time_ns, self.jitter_ns, MAX_TIME_NS)
    }
}
