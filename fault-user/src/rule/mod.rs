//! The rule language: text, JSON, YAML and TOML <-> one set of types.
//!
//! `catalog` is the table of faults and their arguments and `modifier` that of modifiers; the parser
//! (`text`, `args`, `build`), the checks (`check`), the object form, the schema and the errors all read
//! them. Nothing here touches the kernel. See docs/rules.md for the language.

mod args;
mod build;
pub mod catalog;
mod check;
pub mod conflict;
mod error;
mod fault;
mod fuzz;
mod hints;
mod modifier;
mod object;
mod resolve;
pub mod scenario;
mod target;
mod text;
pub mod timeline;
pub mod units;
mod words;

pub use check::{MAX_CORRUPT_BITS, MAX_DELAY_NS, MAX_LATENCY_NS, MAX_RATE, MAX_TIME_NS};
pub use error::RuleError;
pub(crate) use error::nearest;
pub use fault::{
    CloseHow, CorruptAt, CorruptDataMode, CorruptMode, Distribution, ErrorReply, Fault, Layer,
    LifetimeFrom, LossModel, MixArm, RejectWith, untouched,
};
pub use fuzz::fuzz;
pub use modifier::{
    Bounds, CountScope, Direction, MODIFIERS, ModifierSpec, Modifiers, PacketKinds, Schedule,
    Triggers,
};
pub use resolve::{ResolvedRule, ResolvedTarget, Resolver, SystemResolver};
pub use scenario::{Scenario, ScenarioError};
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
