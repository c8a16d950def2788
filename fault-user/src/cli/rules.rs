//! The rules of a command line and of a scenario file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use clap::Args;
use fault_common::abi::RULES_MAX;
use serde_json::json;

use crate::rule::scenario::{Format, Random, Scenario};
use crate::rule::{
    Profiles, ResolvedRule, Rule, RuleError, SystemResolver, Targets, conflict, named_target,
};
use crate::session::outcome::Failure;
use crate::session::rules::{RuleSet, draw_seed};

/// Where rules come from.
#[derive(Clone, Debug, Args)]
pub struct RuleArgs {
    /// A rule: TARGET FAULT[=ARGS] [MODIFIER…], e.g. 'tcp:5432 loss=30%'. Repeatable; rules apply in order.
    #[arg(short = 'r', long = "rule", value_name = "RULE")]
    texts: Vec<String>,
    /// A scenario file (.json, .yaml, .toml); its rules come before those of --rule.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    file: Option<PathBuf>,
    /// A name for a target, e.g. mysql=tcp:3306. Repeatable.
    #[arg(long = "target", value_name = "NAME=TARGET")]
    targets: Vec<String>,
    /// Draw faults from the rules of -r at random within these limits. Limits are length and total (required), quiet,
    /// `at_a_time` and connections, e.g. length=2s..10s,quiet=20s,total=1h. A rule that is given twice is drawn twice
    /// as often.
    #[arg(long, value_name = "LIMITS", requires = "texts")]
    random: Option<String>,
    /// The random seed; default: drawn and printed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The rules come from a report; drawn ones are included.
    #[arg(skip)]
    recorded: bool,
    /// The number of recorded rules that were drawn; they are the last ones.
    #[arg(skip)]
    recorded_drawn: usize,
    /// The seed that was drawn for want of one: it stays when the file is read again.
    #[arg(skip)]
    own_seed: Arc<OnceLock<u64>>,
}

impl RuleArgs {
    /// Rules of a report, the last `drawn` of which were drawn.
    #[must_use]
    pub fn again(texts: Vec<String>, targets: Vec<String>, drawn: usize, seed: u64) -> Self {
        Self {
            texts,
            file: None,
            targets,
            random: None,
            seed: Some(seed),
            recorded: true,
            recorded_drawn: drawn,
            own_seed: Arc::default(),
        }
    }

    /// The scenario file.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Reads all rules.
    ///
    /// # Errors
    /// The first mistake, with a caret under it or its position in the file.
    pub fn parse(&self) -> Result<RuleSet, Failure> {
        self.parse_with(self.file.as_ref())
    }

    /// Reads all rules, with those of `file` first.
    ///
    /// # Errors
    /// As [`RuleArgs::parse`].
    pub fn parse_with(&self, file: Option<&PathBuf>) -> Result<RuleSet, Failure> {
        let scenario = match file {
            Some(path) => Scenario::load(path).map_err(Failure::usage)?,
            None => Scenario::default(),
        };
        let mut targets = scenario.targets.clone();
        self.add_targets(&mut targets)?;
        let mut rules = Vec::with_capacity(scenario.rules.len() + self.texts.len());
        let profiles = scenario.profiles;
        for rule in scenario.rules {
            resolve(&rule, (&profiles, &targets), &mut rules)?;
        }
        let mut typed = vec![None; rules.len()];
        let mut random = scenario.random;
        if let Some(limits) = &self.random {
            if random.is_some() {
                return Err(Failure::usage(anyhow!(
                    "the scenario file has `random`: leave --random out"
                )));
            }
            random = Some(self.choices(limits, &targets)?);
        } else {
            for text in &self.texts {
                let rule: Rule = text.parse().map_err(Failure::usage)?;
                resolve(&rule, (&profiles, &targets), &mut rules)?;
                typed.resize(rules.len(), Some(text.as_str()));
            }
        }
        let length_ns = scenario.length.map(|length| length.0);
        self.refuse_conflict((&rules, &typed), &targets, length_ns)?;
        let mut seed = self.seed.or(scenario.seed);
        let first = rules.len();
        if let Some(random) = random {
            let from = seed.map_or_else(|| self.own_seed(), Ok)?;
            seed = Some(from);
            for rule in drawn(&random, from, first)? {
                resolve(&rule, (&profiles, &targets), &mut rules)?;
            }
        }
        let drawn = first.saturating_sub(self.recorded_drawn)..rules.len();
        if rules.iter().any(|(rule, _)| rule.modifiers.hosts.is_some()) {
            let from = seed.map_or_else(|| self.own_seed(), Ok)?;
            seed = Some(from);
            rules = sampled(rules, from)?;
        }
        if rules.is_empty() {
            return Err(Failure::usage(anyhow!(
                "no rule: give at least one, such as -r 'tcp:5432 loss=30%', or a file with -f"
            )));
        }
        Ok(RuleSet {
            rules,
            targets,
            seed,
            expect: scenario.expect,
            length_ns,
            file: file.cloned(),
            drawn,
        })
    }

    /// The rules of the command line as a list to draw from, within the limits of `--random`.
    fn choices(&self, limits: &str, targets: &Targets) -> Result<Random, Failure> {
        // Through the types of scenario files, so that the same mistakes are found.
        let mut random = serde_json::Map::new();
        let separators = |c: char| c == ',' || c.is_whitespace();
        for limit in limits.split(separators).filter(|limit| !limit.is_empty()) {
            let (name, value) = limit.split_once('=').ok_or_else(|| {
                Failure::usage(anyhow!(
                    "--random: `{limit}` is not a limit: expected NAME=VALUE, such as total=1h"
                ))
            })?;
            let number = value.parse::<u32>().ok().filter(|_| name == "at_a_time");
            let value = number.map_or_else(|| json!(value), |number| json!(number));
            random.insert(name.to_owned(), value);
        }
        random.insert("choices".to_owned(), json!(self.texts));
        let text = json!({"targets": targets, "random": random}).to_string();
        let scenario = Scenario::read(&text, Format::Json, "--random").map_err(|mut error| {
            // Nobody has written this text.
            error.place = None;
            if error.error.input == text {
                error.error.input.clear();
            }
            Failure::usage(error)
        })?;
        scenario
            .random
            .ok_or_else(|| Failure::usage(anyhow!("--random: no limits")))
    }

    /// Rejects a rule of the command line that conflicts with an earlier one. (Rules of the file are already checked.)
    fn refuse_conflict(
        &self,
        (rules, typed): (&[(Rule, ResolvedRule)], &[Option<&str>]),
        targets: &Targets,
        length_ns: Option<u64>,
    ) -> Result<(), Failure> {
        if self.recorded {
            return Ok(());
        }
        let written: Vec<&Rule> = rules.iter().map(|(rule, _)| rule).collect();
        let Some(found) = conflict::find(&written, targets, length_ns) else {
            return Ok(());
        };
        let (first, second) = (written[found.first], written[found.second]);
        let input = typed[found.second].map_or_else(|| second.to_string(), str::to_owned);
        Err(Failure::usage(RuleError::of_fault(
            input,
            &format!("`{first}` {}", found.why),
        )))
    }

    /// A seed that is drawn once.
    fn own_seed(&self) -> Result<u64> {
        let drawn = match self.own_seed.get() {
            Some(seed) => *seed,
            None => draw_seed()?,
        };
        Ok(*self.own_seed.get_or_init(|| drawn))
    }

    fn add_targets(&self, targets: &mut Targets) -> Result<(), Failure> {
        for text in &self.targets {
            let (name, target) = named_target(text).map_err(Failure::usage)?;
            if targets.insert(name.clone(), target).is_some() {
                return Err(Failure::usage(anyhow!(
                    "the target `{name}` is defined twice: give each name once"
                )));
            }
        }
        Ok(())
    }
}

/// Draws the faults of a seed; `others` is the number of further rules.
fn drawn(random: &Random, seed: u64, others: usize) -> Result<Vec<Rule>, Failure> {
    let drawn = random.draw(seed);
    let most = RULES_MAX as usize;
    if drawn.is_empty() {
        return Err(Failure::usage(anyhow!(
            "`random` draws no fault with seed {seed}: make `total` longer or `quiet` shorter"
        )));
    }
    if others + drawn.len() > most {
        return Err(Failure::usage(anyhow!(
            "`random` draws {} faults, but at most {most} rules are possible: make `total` shorter or `quiet` longer",
            drawn.len()
        )));
    }
    Ok(drawn)
}

/// The rules, each with its share of hosts.
fn sampled(
    rules: Vec<(Rule, ResolvedRule)>,
    seed: u64,
) -> Result<Vec<(Rule, ResolvedRule)>, Failure> {
    let rules = rules.into_iter();
    let sampled = rules.map(|(rule, resolved)| {
        let resolved = resolved.sampled(&rule, seed).map_err(Failure::usage)?;
        Ok((rule, resolved))
    });
    sampled.collect()
}

/// Looks up what a rule, or each that its profile stands for, is aimed at.
fn resolve(
    rule: &Rule,
    (profiles, targets): (&Profiles, &Targets),
    rules: &mut Vec<(Rule, ResolvedRule)>,
) -> Result<(), Failure> {
    for rule in rule.expanded(profiles).map_err(Failure::usage)? {
        let resolved = rule
            .resolve(targets, &mut SystemResolver)
            .map_err(Failure::usage)?;
        rules.push((rule, resolved));
    }
    Ok(())
}
