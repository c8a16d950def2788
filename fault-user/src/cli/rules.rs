//! The rules of a command line and of a scenario file.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;

use super::Failure;
use crate::rule::scenario::{Expect, ProbeCheck, Scenario};
use crate::rule::{ResolvedRule, Rule, SystemResolver, Targets, named_target};

/// Where rules come from.
#[derive(Debug, Args)]
pub struct Rules {
    /// A rule: TARGET FAULT[=ARGS] [MODIFIER…], e.g. 'tcp:5432 loss=30%'. Repeatable; rules apply in order.
    #[arg(short = 'r', long = "rule", value_name = "RULE")]
    texts: Vec<String>,
    /// A scenario file (.json, .yaml, .toml); its rules come before those of --rule.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    file: Option<PathBuf>,
    /// A name for a target, e.g. mysql=tcp:3306. Repeatable.
    #[arg(long = "target", value_name = "NAME=TARGET")]
    targets: Vec<String>,
    /// Where all randomness comes from; drawn and printed when it is not given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// The rules, read and looked up.
#[derive(Debug)]
pub struct Parsed {
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
}

impl Rules {
    /// Rules that were written down before.
    #[must_use]
    pub fn again(texts: Vec<String>, targets: Vec<String>, seed: u64) -> Self {
        Self {
            texts,
            file: None,
            targets,
            seed: Some(seed),
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
    /// The first mistake, with a caret under it, or with its place in the file.
    pub fn parse(&self) -> Result<Parsed, Failure> {
        self.parse_with(self.file.as_ref())
    }

    /// Reads all rules, with those of `file` first.
    ///
    /// # Errors
    /// As [`Rules::parse`].
    pub fn parse_with(&self, file: Option<&PathBuf>) -> Result<Parsed, Failure> {
        let scenario = match file {
            Some(path) => Scenario::load(path).map_err(Failure::usage)?,
            None => Scenario::default(),
        };
        if scenario.random.is_some() {
            return Err(Failure::usage(anyhow!(
                "`random` in a scenario can't be carried out by this version of fault: write the rules out"
            )));
        }
        let mut targets = scenario.targets.clone();
        self.add_targets(&mut targets)?;
        let mut rules = Vec::with_capacity(scenario.rules.len() + self.texts.len());
        for rule in scenario.rules {
            rules.push(resolve(rule, &targets)?);
        }
        for text in &self.texts {
            let rule: Rule = text.parse().map_err(Failure::usage)?;
            rules.push(resolve(rule, &targets)?);
        }
        if rules.is_empty() {
            return Err(Failure::usage(anyhow!(
                "no rule: give at least one, such as -r 'tcp:5432 loss=30%', or a file with -f"
            )));
        }
        Ok(Parsed {
            rules,
            targets,
            seed: self.seed.or(scenario.seed),
            expect: scenario.expect,
            length_ns: scenario.length.map(|length| length.0),
        })
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

fn resolve(rule: Rule, targets: &Targets) -> Result<(Rule, ResolvedRule), Failure> {
    let resolved = rule
        .resolve(targets, &mut SystemResolver)
        .map_err(Failure::usage)?;
    Ok((rule, resolved))
}

impl Parsed {
    /// Whether a probe runs a command.
    #[must_use]
    pub fn has_command_probes(&self) -> bool {
        let mut probes = self.expect.probe.iter();
        probes.any(|probe| matches!(probe.check, ProbeCheck::Command { .. }))
    }

    /// The seed that was given, or a fresh one; short enough to be typed again.
    ///
    /// # Errors
    /// The kernel's random source can't be read.
    pub fn seed(&self) -> Result<u64> {
        if let Some(seed) = self.seed {
            return Ok(seed);
        }
        let mut bytes = [0; 4];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut bytes))
            .context("drawing a seed from /dev/urandom (give --seed)")?;
        Ok(u64::from(u32::from_ne_bytes(bytes)))
    }
}
