//! The parsed and resolved rules of a run.

use std::io::Read as _;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::windows::Windows;
use crate::rule::scenario::{Expect, ProbeCheck};
use crate::rule::{ResolvedRule, ResolvedTarget, Rule, SystemResolver, Targets};

/// Parsed and resolved rules.
#[derive(Debug)]
pub struct RuleSet {
    /// Each rule as written and as resolved.
    pub rules: Vec<(Rule, ResolvedRule)>,
    /// The named targets.
    pub targets: Targets,
    /// The seed that was given.
    pub seed: Option<u64>,
    /// The expectations of the scenario.
    pub expect: Expect,
    /// The length of the scenario in nanoseconds.
    pub length_ns: Option<u64>,
    /// The scenario file.
    pub file: Option<PathBuf>,
    /// The range of randomly drawn rules.
    pub drawn: Range<usize>,
}

impl RuleSet {
    /// Rules as text, without named targets.
    ///
    /// # Errors
    /// One of them has a mistake, or names an unknown host.
    pub fn of(texts: &[String]) -> Result<Self> {
        let rules = texts.iter().map(|text| {
            let rule: Rule = text.parse()?;
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver)?;
            Ok((rule, resolved))
        });
        Ok(Self {
            rules: rules.collect::<Result<_>>()?,
            targets: Targets::new(),
            seed: None,
            expect: Expect::default(),
            length_ns: None,
            file: None,
            drawn: 0..0,
        })
    }

    /// Whether a probe runs a command.
    #[must_use]
    pub fn has_command_probes(&self) -> bool {
        let mut probes = self.expect.probe.iter();
        probes.any(|probe| matches!(probe.check, ProbeCheck::Command { .. }))
    }

    /// The windows of the rules, counted from `started`.
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

    /// Whether the rule was randomly drawn.
    #[must_use]
    pub fn is_drawn(&self, text: &str) -> bool {
        let mut drawn = self.rules[self.drawn.clone()].iter();
        drawn.any(|(rule, _)| rule.to_string() == text)
    }

    /// The given seed, or a new one that is short enough to type.
    ///
    /// # Errors
    /// The kernel's random source can't be read.
    pub fn seed(&self) -> Result<u64> {
        self.seed.map_or_else(draw_seed, Ok)
    }
}

/// Draws a seed that is short enough to type.
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
