//! The rule language: text, JSON, YAML and TOML <-> one set of types.
//!
//! `faults` has a file for each fault, `spec` says what a fault is in general, and `modifier` is the
//! table of modifiers; the parser (`text`, `args`, `fields`), the checks (`check`), the object form, the
//! schema and the errors all read them. Nothing here touches the kernel. See docs/rules.md for the language.

mod args;
mod asked;
pub mod catalog;
mod check;
mod complaint;
pub mod conflict;
mod dictionary;
mod error;
pub mod faults;
mod fields;
mod fuzz;
mod hints;
mod modifier;
mod object;
mod profile;
pub mod reference;
mod resolve;
mod sample;
pub mod scenario;
pub(crate) mod servers;
pub mod spec;
mod target;
mod text;
pub mod timeline;
pub mod units;
mod words;

pub use asked::{Asked, NamePattern, is_alpn};
pub use complaint::{MAX_RATE, MAX_TIME_NS};
pub use error::RuleError;
pub(crate) use error::nearest;
pub use faults::{
    CloseHow, CorruptAt, CorruptDataMode, CorruptMode, Distribution, ErrorReply, Fault,
    LifetimeFrom, MAX_CORRUPT_BITS, MAX_DELAY_NS, MAX_LATENCY_NS, Mix, MixArm, Overlap,
    PacketAction, PacketShaper, RejectWith,
};
pub use fuzz::fuzz;
pub use modifier::{
    Bounds, CountScope, Direction, MODIFIERS, ModifierSpec, Modifiers, PacketKinds, QueryType,
    Schedule, Triggers,
};
pub use profile::{LinkProfile, PROFILES, ProfileRule, Profiles};
pub use resolve::{ResolvedRule, ResolvedTarget, Resolver, SystemResolver};
pub use sample::HostShare;
pub use scenario::{Scenario, ScenarioError};
pub use spec::{Acts, Layer};
pub use target::{
    Cidr, Host, PortRange, Protocol, Target, TargetRef, Targets, is_name, named_target,
};
pub use text::MAX_RULE_BYTES;
pub use timeline::{horizon_ns, windows};

/// One rule: what it is aimed at, what it does, and what decides whether it fires.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What it is aimed at.
    pub target: TargetRef,
    /// What it does.
    pub fault: Fault,
    /// What decides whether it fires.
    pub modifiers: Modifiers,
}
