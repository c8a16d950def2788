//! `fault doctor`.

use clap::Args;

use super::{Outcome, exit, print_json};
use crate::doctor::DoctorReport;
use crate::tell;

/// What follows the options in `fault doctor --help`.
const AFTER: &str = "\
Exit codes:
  0    packet faults work here, perhaps with limits; the first line names them
  1    they do not work here, or that could not be checked without more privileges
  125  the machine could not be examined

Examples:
  fault doctor
  sudo fault doctor
  fault doctor --json";

/// The arguments of `fault doctor`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct DoctorArgs {
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    /// Runs the subcommand. The exit code is 1 when nothing works here.
    ///
    /// # Errors
    /// The machine can't be examined.
    pub fn execute(self) -> Outcome {
        let report = DoctorReport::gather()?;
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
