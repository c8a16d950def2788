//! What the delay line is told of rates and slots.

use std::collections::HashMap;

/// A rate, as a rule gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second of the wire.
    pub bits_per_second: u64,
    /// Bytes that may go at once after a pause.
    pub burst_bytes: u64,
    /// Bytes that the link adds to each packet, or leaves out.
    pub overhead_bytes: i32,
    /// Cell size of the link; 0 for none.
    pub cell_bytes: u32,
    /// Bytes that each cell adds.
    pub cell_overhead_bytes: i32,
    /// Wire packets that may wait.
    pub limit_packets: u32,
}

/// Slots, as a rule gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Key of the draws of their lengths.
    pub key: u64,
    /// The shortest.
    pub min_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Wire packets that go in one.
    pub packets: u64,
    /// Bytes that go in one.
    pub bytes: u64,
}

/// What the rules that hold packets need to know, by the state of the rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shapers {
    /// Rates.
    pub rates: HashMap<u16, Rate>,
    /// Slots.
    pub slots: HashMap<u16, Slots>,
}

impl Shapers {
    /// Adds those of other rules.
    pub fn extend(&mut self, others: Self) {
        self.rates.extend(others.rates);
        self.slots.extend(others.slots);
    }
}
