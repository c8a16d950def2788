//! The rules of a command line.

use std::io::Read as _;

use anyhow::{Context as _, Result};
use clap::Args;

use super::Failure;
use crate::rule::{ResolvedRule, Rule, SystemResolver, Targets, named_target};

/// Where rules come from.
#[derive(Debug, Args)]
pub struct Rules {
    /// A rule: TARGET FAULT[=ARGS] [MODIFIER…], e.g. 'tcp:5432 loss=30%'. Repeatable; rules apply in order.
    #[arg(short = 'r', long = "rule", value_name = "RULE")]
    texts: Vec<String>,
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
    /// The seed that was given.
    pub seed: Option<u64>,
}

impl Rules {
    /// Reads all rules.
    ///
    /// # Errors
    /// The first mistake, with a caret under it.
    pub fn parse(&self) -> Result<Parsed, Failure> {
        let mut targets = Targets::new();
        for text in &self.targets {
            let (name, target) = named_target(text).map_err(Failure::usage)?;
            if targets.insert(name.clone(), target).is_some() {
                return Err(Failure::usage(anyhow::anyhow!(
                    "--target {name} is given twice"
                )));
            }
        }
        if self.texts.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "no rule: give at least one, such as -r 'tcp:5432 loss=30%'"
            )));
        }
        let mut rules = Vec::with_capacity(self.texts.len());
        for text in &self.texts {
            let rule: Rule = text.parse().map_err(Failure::usage)?;
            let resolved = rule
                .resolve(&targets, &mut SystemResolver)
                .map_err(Failure::usage)?;
            rules.push((rule, resolved));
        }
        Ok(Parsed {
            rules,
            seed: self.seed,
        })
    }
}

impl Parsed {
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
