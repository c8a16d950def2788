//! The rules of a run, read and looked up.

use std::io::Read as _;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::windows::Windows;
use crate::rule::scenario::{Expect, ProbeCheck};
use crate::rule::{ResolvedRule, ResolvedTarget, Rule, Targets};

/// The rules, read and looked up.
#[derive(Debug)]
pub struct RuleSet {
    /// Each as it was written and as it was resolved.
    pub rules: Vec<(Rule, ResolvedRule)>,
    /// What names in the rules stand for.
    pub targets: Targets,
    /// The seed that was given.
    pub seed: Option<u64>,
    /// What the scenario expects.
    pub expect: Expect,
    /// How long the scenario lasts, in nanoseconds.
    pub length_ns: Option<u64>,
    /// The scenario file.
    pub file: Option<PathBuf>,
    /// Which of the rules were drawn.
    pub drawn: Range<usize>,
}

impl RuleSet {
    /// Whether a probe runs a command.
    #[must_use]
    pub fn has_command_probes(&self) -> bool {
        let mut probes = self.expect.probe.iter();
        probes.any(|probe| matches!(probe.check, ProbeCheck::Command { .. }))
    }

    /// The rules that come and go, when all began at `started`.
    #[must_use]
    pub fn windows(&self, started: Instant) -> Windows {
        let rules = self.rules.iter();
        let rules = rules.map(|(rule, resolved)| (rule.to_string(), resolved));
        Windows::of(rules, &self.drawn, started)
    }

    /// The targets of the rules, with their names.
    pub fn named_targets(&self) -> impl Iterator<Item = (&str, &ResolvedTarget)> {
        let rules = self.rules.iter();
        rules.map(|(_, rule)| (rule.name.as_str(), &rule.target))
    }

    /// Whether the rule was drawn.
    #[must_use]
    pub fn is_drawn(&self, text: &str) -> bool {
        let mut drawn = self.rules[self.drawn.clone()].iter();
        drawn.any(|(rule, _)| rule.to_string() == text)
    }

    /// The seed that was given, or a fresh one; short enough to be typed again.
    ///
    /// # Errors
    /// The kernel's random source can't be read.
    pub fn seed(&self) -> Result<u64> {
        self.seed.map_or_else(draw_seed, Ok)
    }
}

/// A seed from the kernel, short enough to be typed again.
///
/// # Errors
/// The kernel's random source can't be read.
pub fn draw_seed() -> Result<u64> {
    let mut bytes = [0; 4];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context("drawing a seed from /dev/urandom (give --seed)")?;
    Ok(u64::from(u32::from_ne_bytes(bytes)))
}
