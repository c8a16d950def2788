//! `fault inject`.

use clap::Args;

use super::options::TrafficOptions;
use super::parse_time;
use super::rules::Rules;
use crate::session::inject::{self, Watched};
use crate::session::outcome::Outcome;

/// Apply rules until Ctrl-C, SIGTERM or --for.
///
/// Rules apply to the whole host, unless --container, --pid, --cgroup or --netns limits them. Rules on a container are
/// removed when it ends, unless --follow is given.
#[derive(Debug, Args)]
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
