//! `fault check`.

use clap::Args;

use super::rules::Rules;
use super::{Failure, Outcome, exit};
use crate::plan::Plan;

/// Check rules without applying them.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    rules: Rules,
}

impl Check {
    /// Does it.
    ///
    /// # Errors
    /// The first mistake.
    pub fn execute(self) -> Outcome {
        let parsed = self.rules.parse()?;
        let plan =
            Plan::new(&parsed.rules, parsed.seed.unwrap_or(0), None).map_err(Failure::usage)?;
        for rule in &plan.rules {
            println!("{}  (by tc programs)", rule.text);
        }
        Ok(exit::SUCCESS)
    }
}
