//! `fault inject`.

use clap::Args;

use super::options::TrafficOptions;
use super::parse_time;
use super::rules::Rules;
use crate::session::inject::{self, Watched};
use crate::session::outcome::Outcome;
use crate::session::signals::EndSignals;

/// What follows the options in `fault inject --help`.
const AFTER: &str = "\
Exit codes:
  0    the rules were applied, and are removed again
  2    an argument, a rule or a file is wrong; nothing was changed
  125  the rules could not be applied; nothing was changed

Examples:
  fault inject -r 'tcp:5432 latency=200ms' --for 30s
  fault inject --container db -r 'tcp:5432 loss=5%'
  fault inject -f rules.yaml --watch
  fault inject --random length=2s..10s,quiet=20s,total=8h -r 'tcp:3306 down'

`fault help rules` explains the rules.";

/// The arguments of `fault inject`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct Inject {
    #[command(flatten)]
    rules: Rules,
    #[command(flatten)]
    traffic: TrafficOptions,
    /// Remove the rules after this time, e.g. 30s.
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<String>,
    /// Apply the rules of the file again whenever it changes, without interrupting traffic. Rules that hold packets
    /// (delay, rate, …) can be added only if the first rules held packets too; stream faults can't be replaced.
    #[arg(long, requires = "file", conflicts_with = "follow")]
    watch: bool,
    /// Accept that a rule never fires. The exit code is 0 either way; the summary says that it is accepted.
    #[arg(long)]
    allow_unfired: bool,
}

impl Inject {
    /// Runs the subcommand. `verbose` is the number of `-v`.
    ///
    /// # Errors
    /// Wrong arguments, or the rules can't be applied; then nothing is changed.
    pub fn execute(self, verbose: u8) -> Outcome {
        EndSignals::heed()?;
        let length = self.length.as_deref();
        let length = length.map(|text| parse_time("--for", text)).transpose()?;
        // Before it is read: what is written from here on is a change.
        let watched = self.rules.file().filter(|_| self.watch).map(|path| {
            let rules = self.rules.clone();
            Watched::new(path, Box::new(move || rules.parse()))
        });
        let rules = self.rules.parse()?;
        let inject = inject::Inject {
            options: self.traffic.read(verbose)?,
            length,
            watched,
            allow_unfired: self.allow_unfired,
        };
        inject.execute(rules)
    }
}
