//! `fault doctor`.

use clap::Args;

use super::{Outcome, exit, print_json};
use crate::doctor::Report;
use crate::tell;

/// Show what this machine supports: capabilities, kernel features, mechanisms; and leftovers of killed instances.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Runs the subcommand. The exit code is 1 when nothing works here.
    ///
    /// # Errors
    /// The machine can't be examined.
    pub fn execute(self) -> Outcome {
        let report = Report::gather()?;
        if self.json {
            print_json(&report)?;
        } else {
            tell::data(&report.to_string())?;
        }
        Ok(if report.works() {
            exit::SUCCESS
        } else {
            exit::FAILURE
        })
    }
}
