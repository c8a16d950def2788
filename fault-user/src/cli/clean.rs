//! `fault clean`.

use clap::Args;

use super::{Outcome, exit, print_json};
use crate::tell;
use crate::undo::{
    leftover::Fate,
    leftovers::{LeftoverPlaces, clean},
};

/// What follows the options in `fault clean --help`.
const AFTER: &str = "\
Exit codes:
  0    nothing is left behind
  1    something could not be removed; its line says why
  125  the places where leftovers may be could not be read

Examples:
  sudo fault clean
  sudo fault clean --json";

/// The arguments of `fault clean`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct CleanArgs {
    /// Print what was found as JSON.
    #[arg(long)]
    json: bool,
}

impl CleanArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// A place where leftovers may be can't be read.
    pub fn execute(self) -> Outcome {
        let found = clean(&LeftoverPlaces::of_this_machine())?;
        if self.json {
            print_json(&found)?;
        } else if found.is_empty() {
            tell::data("nothing to clean up\n")?;
        } else {
            for leftover in &found {
                tell::data(&format!("{leftover}\n"))?;
            }
        }
        let kept = found
            .iter()
            .any(|leftover| matches!(leftover.fate, Fate::Kept(_)));
        Ok(if kept { exit::FAILURE } else { exit::SUCCESS })
    }
}
