//! `fault run`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::options::TrafficOptions;
use super::rules::Rules;
use crate::session::outcome::Outcome;
use crate::session::run;

/// Apply rules while a command runs; heal when it ends, however it ends.
///
/// Only traffic of the command and of what it starts is touched. The exit code is the command's own; 120
/// when it succeeded but a rule never fired; 125 when fault could not set up; 126 and 127 as env(1).
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    rules: Rules,
    /// Whose traffic is touched: the command's, or everyone's.
    #[arg(long, value_name = "WHOSE", default_value = "command")]
    scope: ScopeKind,
    #[command(flatten)]
    traffic: TrafficOptions,
    /// Run the command as this user (NAME or UID, :GROUP); default: the one who called sudo.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Accept that a rule never fired.
    #[arg(long)]
    allow_unfired: bool,
    /// Write every decision that fired to this file, one JSON object a line.
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

impl Run {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        let rules = self.rules.parse()?;
        let run = run::Run {
            options: self.traffic.read()?,
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
