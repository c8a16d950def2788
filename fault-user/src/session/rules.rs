//! The parsed and resolved rules of a run.

use std::io::Read as _;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::windows::Windows;
use crate::plan::Plan;
use crate::report::fold::{Folded, RuleName, fold};
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
        Windows::of(rules, started)
    }

    /// The targets of the rules, with their names.
    pub fn named_targets(&self) -> impl Iterator<Item = (&str, &ResolvedTarget)> {
        let rules = self.rules.iter();
        rules.map(|(_, rule)| (rule.name.as_str(), &rule.target))
    }

    /// The rule, without times, that the rule with this index was randomly drawn from; `None` for a written rule.
    #[must_use]
    pub fn drawn_from(&self, index: usize) -> Option<String> {
        if !self.drawn.contains(&index) {
            return None;
        }
        let mut rule = self.rules.get(index)?.0.clone();
        rule.modifiers.at_ns = 0;
        rule.modifiers.for_ns = None;
        Some(rule.to_string())
    }

    /// The rules of `plan`, which may be another one if they were replaced; drawn faults are folded.
    #[must_use]
    pub fn folded(&self, plan: &Plan) -> Vec<Folded> {
        let drawn: Vec<_> = (0..plan.rules.len())
            .map(|index| self.drawn_from(index))
            .collect();
        let names = plan.rules.iter().zip(&drawn);
        fold(names.map(|(rule, drawn)| match drawn {
            Some(drawn) => RuleName::Drawn(drawn),
            None => RuleName::Written(&rule.text),
        }))
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
