//! `fault replay`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use fault_common::abi::MATCHES_MAX;

use super::options::TrafficOptions;
use super::rules::RuleArgs;
use crate::report::file::{RunReport, decisions};
use crate::report::record::Recorded;
use crate::session::outcome::{Failure, Outcome};
use crate::session::run::{self, RunOptions};
use crate::tell::tell;

/// What follows the options in `fault replay --help`.
const AFTER: &str = "\
Exit codes:
  CMD's own  CMD failed, or it succeeded and everything fired
  2          an argument or the report is wrong; nothing was started
  120        CMD succeeded, but a rule never fired (--allow-unfired accepts that)
  125        fault itself failed
  126, 127   CMD can't be started, or was not found

Examples:
  fault run --report out -r 'tcp:5432 loss=5%' -- pytest
  fault replay out -- pytest
  fault replay out --report again -- pytest -k one_test";

/// The arguments of `fault replay`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct ReplayArgs {
    /// The folder that `fault run --report` wrote.
    report: PathBuf,
    #[command(flatten)]
    traffic: TrafficOptions,
    /// Run the command as this user (NAME or UID, :GROUP); default: the one who called sudo.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Succeed even if a rule never fired. Implied if the earlier run had it.
    #[arg(long)]
    allow_unfired: bool,
    /// Write a report of the replay into this folder.
    #[arg(long = "report", value_name = "DIR", id = "new_report")]
    new_report: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl ReplayArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// The report can't be read; otherwise as `fault run`.
    pub fn execute(self) -> Outcome {
        let report = RunReport::read(&self.report).map_err(Failure::usage)?;
        let decisions = decisions(&self.report).map_err(Failure::usage)?;
        tell!("fault: replaying {} decisions", decisions.len());
        let (mut packets, mut streams) = (Vec::new(), Vec::new());
        for decision in decisions {
            match decision {
                Recorded::Packet(decision) => packets.push(decision.key()),
                Recorded::Stream(decision) => streams.push(decision),
            }
        }
        let replay = run::ReplayedDecisions {
            packets: packets.into(),
            streams: Arc::new(streams.into_iter().collect()),
            connections: report.rules.iter().map(|rule| rule.seen.packets).collect(),
        };
        if report.decisions_lost != 0 {
            tell!(
                "fault: warning: {} decisions came too fast to be recorded: their packets and connections are let through",
                report.decisions_lost
            );
        }
        if report.rules.len() > MATCHES_MAX {
            tell!(
                "fault: warning: with more than {MATCHES_MAX} rules (here {}) each rule is loaded only around its \
                 windows: a packet is found again only if it arrives in the same window",
                report.rules.len()
            );
        }
        let mut drawn = report.rules.iter().rev();
        let drawn = drawn
            .position(|rule| rule.drawn_from.is_none())
            .unwrap_or(report.rules.len());
        let texts = report.rules.into_iter().map(|rule| rule.rule).collect();
        let targets = report
            .targets
            .into_iter()
            .map(|(name, target)| format!("{name}={target}"))
            .collect();
        let rules = RuleArgs::again(texts, targets, drawn, report.seed).parse()?;
        let run = RunOptions {
            options: self.traffic.read(0)?,
            host: report.host,
            user: self.user,
            allow_unfired: self.allow_unfired || report.allow_unfired,
            events: None,
            report: self.new_report,
            replay: Some(replay),
            command: self.command,
        };
        run.execute(rules)
    }
}
