//! `fault check`.

use std::path::PathBuf;

use clap::Args;

use super::rules::Rules;
use super::{Failure, Outcome, exit};
use crate::plan::Plan;
use crate::report::expectations;
use crate::rule::timeline;
use crate::tell;

/// Columns of the picture where the terminal does not tell.
const WIDTH: usize = 100;

/// Check a scenario file or rules without applying them: prints the timeline, and the mechanism that each
/// rule would get here.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    rules: Rules,
    /// The scenario file (.json, .yaml, .toml).
    #[arg(value_name = "FILE", conflicts_with = "file")]
    scenario: Option<PathBuf>,
}

impl Check {
    /// Does it.
    ///
    /// # Errors
    /// The first mistake.
    pub fn execute(self) -> Outcome {
        let parsed = match &self.scenario {
            Some(path) => self.rules.parse_with(Some(path))?,
            None => self.rules.parse()?,
        };
        expectations::targets(&parsed.expect, &parsed.rules, &parsed.targets)
            .map_err(Failure::usage)?;
        let seed = parsed.seed.unwrap_or(0);
        let plan =
            Plan::new(&parsed.rules, seed, None, parsed.length_ns).map_err(Failure::usage)?;
        let rules: Vec<_> = parsed.rules.iter().map(|(rule, _)| rule.clone()).collect();
        let horizon = parsed
            .length_ns
            .unwrap_or_else(|| timeline::horizon_ns(&rules));
        tell::data(&format!(
            "{}\n",
            timeline::picture(&rules, horizon, width())
        ))?;
        for rule in &plan.rules {
            tell::data(&format!("{}  by {}\n", rule.text, rule.mechanism(None)))?;
        }
        Ok(exit::SUCCESS)
    }
}

fn width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .unwrap_or(WIDTH)
}
