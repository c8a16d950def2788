//! The program features that a rule set needs. They are constants of the programs, so that the verifier removes unused
//! code. Runs start faster, and packets are processed faster.

use fault_common::abi::{CORRUPT_BITS_MAX, RuleEntry, action, fault, modifier, rule_flag};
use fault_common::random::ALWAYS;

use crate::plan::tables::PacketRule;

/// The required features of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Possible actions: bits by [`fault_common::abi::action`].
    pub actions: u32,
    /// Bits by [`fault`].
    pub faults: u32,
    /// Bits of [`modifier`].
    pub modifiers: u32,
    /// The protocols that rules concern: bits by [`fault_common::abi::protocol`].
    pub protocols: u32,
    /// Maximum number of bits that are flipped in a packet.
    pub corrupt_bits: u32,
}

impl Needs {
    /// All features.
    pub const ALL: Self = Self {
        actions: u32::MAX,
        faults: u32::MAX,
        modifiers: u32::MAX,
        protocols: u32::MAX,
        corrupt_bits: CORRUPT_BITS_MAX,
    };

    /// The features that these rules need.
    #[must_use]
    pub fn of(rules: &[PacketRule]) -> Self {
        let nothing = Self {
            actions: 0,
            faults: 0,
            modifiers: 0,
            protocols: 0,
            corrupt_bits: 0,
        };
        rules.iter().fold(nothing, |all, rule| Self {
            actions: all.actions | actions(&rule.entry),
            faults: all.faults | 1 << rule.entry.fault,
            modifiers: all.modifiers | modifiers(&rule.entry),
            protocols: all.protocols | protocols(rule),
            corrupt_bits: all.corrupt_bits.max(corrupt_bits(&rule.entry)),
        })
    }

    /// Whether packets may be answered.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.actions & ANSWERS != 0
    }

    /// Whether super-packets may have to be divided.
    #[must_use]
    pub fn divides(&self) -> bool {
        self.modifiers & modifier::PER_SEGMENT != 0
    }
}

/// The actions by which a packet is answered instead of passed on.
const ANSWERS: u32 =
    1 << action::REJECT_RST | 1 << action::REJECT_ICMP | 1 << action::RESET | 1 << action::ANSWER;

/// The protocols that a rule concerns, as bits by [`fault_common::abi::protocol`].
fn protocols(rule: &PacketRule) -> u32 {
    rule.protocols
        .iter()
        .fold(0, |all, one| all | 1 << *one as u32)
}

/// The actions that a rule may take, as bits by [`fault_common::abi::action`].
fn actions(entry: &RuleEntry) -> u32 {
    fault::of(entry.fault).map_or(u32::MAX, |fault| fault.actions)
}

/// The number of bits that a rule flips in a packet.
fn corrupt_bits(entry: &RuleEntry) -> u32 {
    if entry.fault == fault::CORRUPT_VISIBLE {
        u32::try_from(entry.arguments[1])
            .map_or(CORRUPT_BITS_MAX, |bits| bits.min(CORRUPT_BITS_MAX))
    } else {
        0
    }
}

/// The modifiers of a rule, as bits of [`modifier`].
fn modifiers(entry: &RuleEntry) -> u32 {
    let has_window = (entry.at_ns, entry.length_ns, entry.period_ns) != (0, 0, 0);
    let has_trigger = (entry.count_from, entry.count_to, entry.count_step) != (1, u64::MAX, 1);
    let flag = |flag| entry.flags & flag != 0;
    [
        (modifier::WINDOW, has_window),
        (modifier::TRIGGER, has_trigger),
        (modifier::COUNT_PER_RULE, flag(rule_flag::COUNT_PER_RULE)),
        (modifier::PROBABILITY, entry.probability < ALWAYS),
        (modifier::KINDS, entry.kinds != 0),
        (
            modifier::SIZE,
            (entry.size_min, entry.size_max) != (0, u32::MAX),
        ),
        (
            modifier::CONNECTION,
            entry.connection_from > 1 || entry.connection_to != u32::MAX,
        ),
        (modifier::MIX, flag(rule_flag::MIX)),
        (modifier::QUERY_TYPE, entry.query_type != 0),
        (modifier::PER_SEGMENT, flag(rule_flag::PER_SEGMENT)),
    ]
    .into_iter()
    .filter(|(_, is_used)| *is_used)
    .fold(0, |all, (bit, _)| all | bit)
}
