//! Rates and slots for the delay line.

use std::collections::HashMap;

/// The rate of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateShaper {
    /// Bits per second of the wire.
    pub bits_per_second: u64,
    /// Bytes that may be sent at once after a pause.
    pub burst_bytes: u64,
    /// Bytes that the link adds to each packet; negative if it removes bytes.
    pub overhead_bytes: i32,
    /// Cell size of the link; 0 for none.
    pub cell_bytes: u32,
    /// Bytes that each cell adds.
    pub cell_overhead_bytes: i32,
    /// Maximum number of waiting wire packets.
    pub limit_packets: u32,
}

/// The slots of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Key of the draws of their lengths.
    pub key: u64,
    /// Minimum length.
    pub min_ns: u64,
    /// Maximum length.
    pub max_ns: u64,
    /// Maximum number of wire packets per slot.
    pub packets: u64,
    /// Maximum number of bytes per slot.
    pub bytes: u64,
}

/// Rates and slots of rules that hold packets, by the rules' states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shapers {
    /// Rates.
    pub rates: HashMap<u16, RateShaper>,
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
