//! `fault inject`.

use clap::Args;

use super::options::TrafficOptions;
use super::parse_time;
use super::rules::Rules;
use crate::session::inject::{self, Watched};
use crate::session::outcome::Outcome;

/// Apply rules until Ctrl-C, SIGTERM or --for.
///
/// The whole host is touched, unless --container, --pid, --cgroup or --netns says whose traffic is. Rules on a container end
/// with it, unless --follow is given.
#[derive(Debug, Args)]
pub struct Inject {
    #[command(flatten)]
    rules: Rules,
    #[command(flatten)]
    traffic: TrafficOptions,
    /// Heal after this time, e.g. 30s.
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<String>,
    /// Put the rules of the file in force anew whenever it changes, while traffic flows. Rules that hold packets (delay,
    /// rate, …) can come where the first ones held some too; stream faults can't be exchanged.
    #[arg(long, requires = "file", conflicts_with = "follow")]
    watch: bool,
}

impl Inject {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        let length = self.length.as_deref();
        let length = length.map(|text| parse_time("--for", text)).transpose()?;
        // Before it is read: what is written from here on is a change.
        let watched = self.rules.file().filter(|_| self.watch).map(|path| {
            let rules = self.rules.clone();
            Watched::new(path, Box::new(move || rules.parse()))
        });
        let rules = self.rules.parse()?;
        let inject = inject::Inject {
            options: self.traffic.read()?,
            length,
            watched,
        };
        inject.execute(rules)
    }
}
