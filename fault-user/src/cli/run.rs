//! `fault run`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::options::TrafficOptions;
use super::rules::RuleArgs;
use crate::session::outcome::Outcome;
use crate::session::run;

/// What follows the options in `fault run --help`.
const AFTER: &str = "\
Exit codes:
  CMD's own  CMD failed, or it succeeded and everything fired
  2          an argument, a rule or a file is wrong; nothing was started
  120        CMD succeeded, but a rule never fired (--allow-unfired accepts that)
  121        CMD succeeded, but an expectation failed
  125        fault itself failed
  126, 127   CMD can't be started, or was not found

Examples:
  fault run -r 'tcp:5432 latency=200ms' -- pytest
  fault run -r 'tcp:5432 loss=30% dir=to-client' -r 'udp:53 drop first=1' -- ./service
  fault run --seed 7 --report out -r 'tcp:443 reset=64KiB p=10%' -- npm test
  fault run -f scenario.yaml -- make check

`fault help rules` explains the rules.";

/// The arguments of `fault run`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct RunArgs {
    #[command(flatten)]
    rules: RuleArgs,
    /// The traffic that rules apply to: the command's, or the whole host's.
    #[arg(long, value_name = "WHOSE", default_value = "command")]
    scope: ScopeKind,
    #[command(flatten)]
    traffic: TrafficOptions,
    /// Run the command as this user (NAME or UID, :GROUP); default: the one who called sudo.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Succeed even if a rule never fired.
    #[arg(long)]
    allow_unfired: bool,
    /// Write every decision that fired to this file, one JSON object per line.
    #[arg(long, value_name = "FILE", conflicts_with = "report")]
    events: Option<PathBuf>,
    /// Write report.json, junit.xml, report.html and the decisions that fired into this folder.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// The values of `--scope`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScopeKind {
    /// The command's process tree.
    Command,
    /// The whole host.
    Host,
}

impl RunArgs {
    /// Runs the subcommand. `verbose` is the number of `-v`.
    ///
    /// # Errors
    /// Wrong arguments, or the rules can't be applied; then nothing is changed.
    pub fn execute(self, verbose: u8) -> Outcome {
        let rules = self.rules.parse()?;
        let run = run::RunOptions {
            options: self.traffic.read(verbose)?,
            host: self.scope == ScopeKind::Host,
            user: self.user,
            allow_unfired: self.allow_unfired,
            events: self.events,
            report: self.report,
            replay: None,
            command: self.command,
        };
        run.execute(rules)
    }
}
