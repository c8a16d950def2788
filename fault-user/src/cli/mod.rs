//! The command line: one type for all arguments, one file for each subcommand.
//!
//! Arguments are parsed and validated first; only then is anything changed.

pub mod aim;
pub mod check;
pub mod clean;
pub mod demo;
pub mod doctor;
pub mod generate;
pub mod inject;
pub mod rules;
pub mod run;

use std::fmt;

use clap::{Parser, Subcommand};

use crate::process::command::StartError;

/// Exit codes: those of the documentation.
pub mod exit {
    /// Everything went well.
    pub const SUCCESS: u8 = 0;
    pub const FAILURE: u8 = 1;
    /// The arguments, a rule or a file are wrong.
    pub const USAGE: u8 = 2;
    /// CMD succeeded, but a rule never fired.
    pub const UNFIRED: u8 = 120;
    /// CMD succeeded, but an expectation failed.
    pub const EXPECTATION: u8 = 121;
    /// `fault` could not set up what was asked for.
    pub const SETUP: u8 = 125;
}

/// Why a subcommand ended without doing what was asked.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// One line, or a rule with a caret under what is wrong with it.
    pub error: anyhow::Error,
}

impl Failure {
    /// The arguments are wrong.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: exit::USAGE,
            error: error.into(),
        }
    }
}

/// Whatever is not said otherwise went wrong while setting up; a command that can't be started has
/// exit codes of its own.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let code = error
            .downcast_ref()
            .map_or(exit::SETUP, StartError::exit_code);
        Self { code, error }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

/// What a subcommand gives: an exit code.
pub type Outcome = Result<u8, Failure>;

/// Hurts the network of one command, service or host, in the kernel, and heals it again.
#[derive(Debug, Parser)]
#[command(
    name = "fault",
    version,
    max_term_width = 100,
    propagate_version = true
)]
pub struct Cli {
    /// Tell more: the chain of causes of an error, the verifier's log.
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply rules while a command runs; heal when it ends, however it ends.
    Run(run::Run),
    /// Apply rules until Ctrl-C, SIGTERM or --for.
    Inject(inject::Inject),
    /// Check rules without applying them.
    Check(check::Check),
    /// Tell what this machine can do.
    Doctor(doctor::Doctor),

    /// Remove everything that a killed instance may have left.
    Clean(clean::Clean),
    /// Show it: a client and a server before, during and after faults.
    Demo(demo::Demo),
    /// Print a shell's completions.
    Completions(generate::Completions),
    /// Print the manual page.
    Man,
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// [`Failure`] says what went wrong and with which exit code to end.
    pub fn run(self) -> Outcome {
        match self.command {
            Command::Run(run) => run.execute(),
            Command::Inject(inject) => inject.execute(),
            Command::Check(check) => check.execute(),
            Command::Doctor(doctor) => doctor.execute(),
            Command::Clean(clean) => clean.execute(),
            Command::Demo(demo) => demo.execute(),
            Command::Completions(completions) => completions.execute(),
            Command::Man => generate::man(),
        }
    }
}
