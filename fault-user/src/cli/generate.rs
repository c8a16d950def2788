//! `fault completions` and `fault man`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Outcome, exit};
use crate::tell;

/// Print completions for a shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn execute(self) -> Outcome {
        let mut buffer = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "fault", &mut buffer);
        tell::data(&String::from_utf8(buffer)?)?;
        Ok(exit::SUCCESS)
    }
}

/// Prints the manual pages of `fault` and of each subcommand.
///
/// # Errors
/// Standard output is closed.
pub fn man() -> Outcome {
    let mut buffer = Vec::new();
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut buffer)?;
    for sub in command.get_subcommands() {
        let name = format!("fault-{}", sub.get_name());
        clap_mangen::Man::new(sub.clone().name(name)).render(&mut buffer)?;
    }
    tell::data(&String::from_utf8(buffer)?)?;
    Ok(exit::SUCCESS)
}
