//! `fault explore`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::parse_time;
use crate::explore;
use crate::inject::reach::IngressMechanism;
use crate::session::options::SessionOptions;
use crate::session::outcome::{Failure, Outcome};
use crate::sys::net::interfaces::Selection;

/// How long a running service may take to recover.
const RECOVERY: Duration = Duration::from_secs(10);

/// What follows the options in `fault explore --help`.
const AFTER: &str = "\
Exit codes:
  0    CMD survived every fault, or every failure is accepted (--accept)
  121  CMD does not survive a fault
  125  CMD fails without faults or connects to nothing, or fault itself failed
  130  interrupted by Ctrl-C; the results so far are printed
  2    an argument or a file is wrong; nothing was started

Examples:
  fault explore -- pytest
  fault explore --plan -- pytest
  fault explore --container app -- ./probe
  fault explore --only redis --faults slow,refused -- npm test
  fault explore --jobs 4 --budget 10m --accept known.toml --report out -- make check";

/// The arguments of `fault explore`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER, group(ArgGroup::new("service").args(["container", "pid", "cgroup"])))]
pub struct ExploreArgs {
    /// Faults apply to this running container (Docker, Podman or containerd; by name or id).
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// Faults apply to this running process and its descendants.
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
    /// Faults apply to the processes in this cgroup (a directory of cgroup2).
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// After a fault the command must succeed within this time, for a running service. Default: 10s.
    #[arg(long, value_name = "TIME", requires = "service")]
    recovery: Option<String>,
    /// How often the command runs without faults first.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Only these kinds of faults, separated by commas, e.g. slow,refused; `--plan` shows all kinds.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    faults: Vec<String>,
    /// A scenario file (.json, .yaml, .toml): each of its rules is an experiment as well, and comes first.
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Only dependencies whose name or address contains this text, e.g. tcp:6379 or redis. Repeatable.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Not the dependencies whose name or address contains this text. Repeatable.
    #[arg(long, value_name = "TEXT")]
    skip: Vec<String>,
    /// Include servers that the command starts itself.
    #[arg(long)]
    internal: bool,
    /// Only list the experiments, as rules.
    #[arg(long)]
    plan: bool,
    /// With 2, also try pairs of the faults that the command survives alone. They reach what is used only after a failure.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=2))]
    depth: u8,
    /// How many runs take place at once. They must not disturb each other: each finds its number, from 1, in
    /// `FAULT_JOB`.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// How long a run may take, e.g. 30s; a longer one counts as hung. Default: 5 times as long as without faults, at
    /// least 10s.
    #[arg(long, value_name = "TIME")]
    timeout: Option<String>,
    /// Start no experiment after this time, e.g. 10m, and make no failure smaller. The most telling ones come first.
    #[arg(long, value_name = "TIME")]
    budget: Option<String>,
    /// Don't search for the smallest fault that fails, nor for the largest that the command survives.
    #[arg(long)]
    no_shrink: bool,
    /// A shell command that is run before each run, without faults.
    #[arg(long, value_name = "LINE")]
    before: Option<String>,
    /// A shell command that is run after each run, without faults.
    #[arg(long, value_name = "LINE")]
    after: Option<String>,
    /// A shell command that must succeed after each run, without faults: it checks what must hold in any case.
    #[arg(long, value_name = "LINE")]
    check: Option<String>,
    /// Accept the failures in this file; only new and worse ones count. The first run writes the file (TOML), with a
    /// reason to fill in for each failure.
    #[arg(long, value_name = "FILE")]
    accept: Option<PathBuf>,
    /// Write report.json, junit.xml and report.html into this folder.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Continue from the report in this folder, of an interrupted run with the same command and options.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["report", "seed", "plan"])]
    resume: Option<PathBuf>,
    /// The random seed; default: drawn and printed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run the command as this user (NAME or UID, :GROUP); default: the one who called sudo.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl ExploreArgs {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, a command that fails without faults, or what was asked for can't be set up.
    pub fn execute(self) -> Outcome {
        let time = |option, text: Option<String>| -> Result<_, Failure> {
            text.map(|text| parse_time(option, &text)).transpose()
        };
        let explore = explore::ExploreOptions {
            options: SessionOptions {
                pid: self.pid,
                cgroup: self.cgroup,
                container: self.container,
                follow: false,
                netns: None,
                selection: Selection::Default,
                attachment: None,
                front: IngressMechanism::Tc,
                mechanism: None,
                drain: None,
                force: false,
                trace: false,
            },
            user: self.user,
            runs: self.runs,
            seed: self.seed,
            faults: self.faults,
            file: self.file,
            only: self.only,
            skip: self.skip,
            internal: self.internal,
            plan: self.plan,
            depth: self.depth,
            jobs: self.jobs.into(),
            timeout: time("--timeout", self.timeout)?,
            budget: time("--budget", self.budget)?,
            recovery: time("--recovery", self.recovery)?.unwrap_or(RECOVERY),
            shrinks: !self.no_shrink,
            accept: self.accept,
            report: self.report,
            resume: self.resume,
            before: self.before,
            after: self.after,
            check: self.check,
            command: self.command,
        };
        explore.execute()
    }
}
