//! The command line: one type for all arguments, one file per subcommand.
//!
//! Arguments are parsed and validated before anything is changed.

pub mod check;
pub mod clean;
pub mod client;
pub mod daemon;
pub mod demo;
pub mod doctor;
pub mod explore;
pub mod generate;
pub mod help;
pub mod inject;
pub mod mistakes;
pub mod options;
pub mod profiles;
pub mod replay;
pub mod rules;
pub mod run;
pub mod top;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::rule::units::parse_duration;
use crate::session::outcome::{Failure, Outcome, exit};
use crate::tell;

/// Injects network faults into one command, service or host, in the Linux kernel, and removes them again.
#[derive(Debug, Parser)]
#[command(
    name = "fault",
    version,
    max_term_width = 100,
    propagate_version = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// Print more: the causes of an error, the verifier's log, how long each step of the
    /// start and the end takes. `-vv` with `run` and `inject`
    /// prints a line for each packet that reaches a rule's port: what each rule did with it, and why.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply rules while a command runs; remove them when it ends, however it ends.
    ///
    /// Rules apply only to traffic of the command and its descendants. The exit code is the command's own; 120 when it
    /// succeeded but a rule never fired; 125 when fault itself failed; 126 and 127 as in env(1).
    Run(run::RunArgs),
    /// Find what makes a command fail: one fault on one of its dependencies at a time.
    ///
    /// The command runs without faults first, to see what it talks to. Then it runs once with each kind of fault on
    /// each of these dependencies. A run that fails is repeated with the same seed, and the fault is made smaller as
    /// long as the command fails. The exit code is 0 when the command survived all faults, 121 when it did not, 125 when it fails
    /// without faults. With --container, --pid or --cgroup the faults apply to the traffic of a running service. The
    /// command exercises it under each fault, and again when the fault is over.
    Explore(explore::ExploreArgs),
    /// Repeat the decisions of an earlier run, from its report.
    ///
    /// A packet is identified by its position in its connection, and a connection by its order: the same sequence of
    /// requests gets the same faults, whatever its timing. A warning says what did not come again.
    Replay(replay::ReplayArgs),
    /// Apply rules until Ctrl-C, SIGTERM or --for.
    ///
    /// Rules apply to the whole host, unless --container, --pid, --cgroup or --netns limits them. Rules on a container
    /// are removed when it ends, unless --follow is given.
    Inject(inject::InjectArgs),
    /// Check a scenario file or rules without applying them.
    ///
    /// Prints the timeline, and the mechanism of each rule on this machine. Nothing is changed, and no privileges are
    /// needed. Drawn faults (`random`) have one line for each rule that they are drawn from; --json lists all of them.
    Check(check::CheckArgs),
    /// List the link profiles (`profile=NAME`) with their figures and sources.
    Profiles(profiles::ProfilesArgs),
    /// Show what this machine supports.
    ///
    /// The first line is the verdict. Below are the kernel's features and the capabilities of this process, each with
    /// what to do if it is missing, the mechanism of each group of faults, and what killed instances left behind. Every
    /// feature is tried, in a network namespace and a cgroup of its own. What could not be checked without more
    /// privileges is marked by `?`.
    Doctor(doctor::DoctorArgs),

    /// Remove everything that a killed instance may have left behind.
    ///
    /// This is safe at any time: what a running instance uses stays as it is. Programs, filters, qdiscs and cgroups are
    /// removed, and settings that the killed instance changed are restored.
    Clean(clean::CleanArgs),
    /// Demonstrate a fault: a client and a server before, during and after it.
    Demo(demo::DemoArgs),
    /// Run the control API (compatible with Toxiproxy) and its proxies until interrupted.
    ///
    /// It replaces toxiproxy-server: the same API on 127.0.0.1:8474, the same config file and options. As root it also
    /// offers transparent proxies, at the service's own address, and packet rules (`fault add rule`). Everything ends
    /// with the process.
    Daemon(daemon::DaemonArgs),
    /// List the daemon's proxies with their toxics, and its packet rules.
    List(client::ListArgs),
    /// Add a packet rule, a proxy or a toxic to the daemon.
    Add(client::AddArgs),
    /// Remove a packet rule, a proxy or a toxic from the daemon.
    Remove(client::RemoveArgs),
    /// Enable every proxy of the daemon, remove every toxic and every packet rule.
    Reset(client::ClientArgs),
    /// Show the traffic of the daemon's proxies and the hits of its toxics.
    Stats(client::StatsArgs),
    /// Print the daemon's events, one line each, until interrupted.
    Events(client::ClientArgs),
    /// Watch rules, hits, throughput and connections live; turn rules off and on.
    ///
    /// Shows every `fault run` and `fault inject` of this user in this network namespace, and the daemon if one
    /// answers. A rule that is turned off stays off until it is turned on again or its instance ends.
    Top(top::TopArgs),
    /// Print completions for a shell.
    Completions(generate::CompletionsArgs),
    /// Print a manual page, or write all of them to a folder.
    Man(generate::ManArgs),
    /// Print the help of a subcommand, or with `rules` the reference of the rule language.
    Help(help::HelpArgs),
}

impl Cli {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// [`Failure`] holds the error and the exit code.
    pub fn run(self) -> Outcome {
        match self.command {
            Command::Run(run) => run.execute(self.verbose),
            Command::Explore(explore) => explore.execute(),
            Command::Replay(replay) => replay.execute(),
            Command::Inject(inject) => inject.execute(self.verbose),
            Command::Check(check) => check.execute(),
            Command::Profiles(profiles) => profiles.execute(),
            Command::Doctor(doctor) => doctor.execute(),
            Command::Clean(clean) => clean.execute(),
            Command::Demo(demo) => demo.execute(),
            Command::Daemon(args) => Ok(daemon::run(&args).map(|()| exit::SUCCESS)?),
            Command::List(args) => Ok(client::list(&args).map(|()| exit::SUCCESS)?),
            Command::Add(args) => client::add(&args).map(|()| exit::SUCCESS),
            Command::Remove(args) => Ok(client::remove(&args).map(|()| exit::SUCCESS)?),
            Command::Reset(target) => Ok(client::reset(&target).map(|()| exit::SUCCESS)?),
            Command::Stats(args) => Ok(client::stats(&args).map(|()| exit::SUCCESS)?),
            Command::Events(target) => Ok(client::events(&target).map(|()| exit::SUCCESS)?),
            Command::Top(top) => top.execute(),
            Command::Completions(completions) => completions.execute(),
            Command::Man(man) => man.execute(),
            Command::Help(help) => help.execute(),
        }
    }
}

/// Parses the time given to an option.
fn parse_time(option: &str, text: &str) -> Result<Duration, Failure> {
    parse_duration(text)
        .map(Duration::from_nanos)
        .map_err(|error| Failure::usage(anyhow::anyhow!("{option}: {}", error.one_line())))
}

/// Writes a value to the standard output as JSON.
///
/// # Errors
/// The standard output can't be written to.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    tell::data(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// The process's arguments. Toxiproxy's server accepts its options with one dash. Scripts that use them also work with
/// `fault daemon`, and with `fault` under the name `toxiproxy-server`.
#[must_use]
pub fn arguments() -> Vec<OsString> {
    let is_secured = std::env::var_os("FAULT_TOKEN").is_some_and(|token| !token.is_empty());
    ours(std::env::args_os(), is_secured)
}

/// Converts Toxiproxy's arguments to those of `fault`. Toxiproxy's server is open to everyone, unless a token is set.
fn ours(arguments: impl IntoIterator<Item = OsString>, is_secured: bool) -> Vec<OsString> {
    const SERVER: [&str; 2] = ["toxiproxy-server", "toxiproxy"];
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let name = arguments
        .first()
        .and_then(|path| Path::new(path).file_name());
    let is_server = name.is_some_and(|name| SERVER.iter().any(|server| name == *server));
    if is_server {
        let open = (!is_secured).then_some("--open");
        let daemon = ["fault", "daemon"].into_iter().chain(open);
        arguments.splice(..1, daemon.map(OsString::from));
    }
    if arguments.get(1).is_some_and(|command| command == "daemon") {
        for argument in &mut arguments[2..] {
            let text = argument.to_string_lossy();
            let is_go = text.starts_with('-') && text[1..].starts_with(|c: char| c.is_alphabetic());
            let dashed = if is_go && text.len() > 2 {
                format!("-{text}")
            } else {
                text.into_owned()
            };
            *argument = if is_server && dashed.starts_with("--version") {
                dashed
                    .replacen("--version", "--toxiproxy-version", 1)
                    .into()
            } else {
                dashed.into()
            };
        }
    }
    arguments
}

/// Initializes the log. `LOG_LEVEL` has Toxiproxy's values: trace, debug, info, warn, error, disabled.
pub fn start_log() {
    let level = match std::env::var("LOG_LEVEL")
        .unwrap_or_default()
        .to_ascii_lowercase()
        .as_str()
    {
        "trace" => log::LevelFilter::Trace,
        "debug" => log::LevelFilter::Debug,
        "info" => log::LevelFilter::Info,
        "error" | "fatal" | "panic" => log::LevelFilter::Error,
        "disabled" => log::LevelFilter::Off,
        _ => log::LevelFilter::Warn,
    };
    env_logger::Builder::new()
        .filter_level(level)
        // aya can't read the version of every kernel (`7.3-rc1`), says so each time that it looks, and takes it for an old
        // one. What depends on it we do ourselves: links, and looking at the version.
        .filter_module("aya::util", log::LevelFilter::Off)
        .format(|out, record| {
            let what = match record.level() {
                log::Level::Error => "error",
                log::Level::Warn => "warning",
                log::Level::Info => "info",
                log::Level::Debug => "debug",
                log::Level::Trace => "trace",
            };
            let text = format!("fault: {what}: {}", record.args());
            writeln!(
                out,
                "{}",
                tell::painted(&text, tell::has_color(&std::io::stderr()))
            )
        })
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_and_manual_say_the_same() {
        const DOCUMENTED: [&str; 9] = [
            "run", "explore", "replay", "inject", "check", "doctor", "clean", "daemon", "top",
        ];
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        for name in DOCUMENTED {
            let mut command = help::command(&[name.to_owned()]).unwrap();
            let help = command.render_long_help().to_string();
            let about = command.get_long_about().map(ToString::to_string);
            let about = about.unwrap_or_else(|| panic!("{name}: only one line says what it does"));
            let manual = generate::rendered(command).unwrap();
            // In a manual page `-` and `'` are escaped.
            let manual = String::from_utf8(manual).unwrap();
            let manual = words(&manual.replace("\\-", "-").replace("\\*(Aq", "'"));
            let how = about.split_once("\n\n").expect("what it does, then how").1;
            for part in ["Exit codes:", "Examples:", how] {
                let part = words(part);
                assert!(words(&help).contains(&part), "`{part}` is not in: {help}");
                assert!(manual.contains(&part), "`{part}` is not in: {manual}");
            }
            let usage = format!("fault {name}");
            let examples = help.split("Examples:").nth(1).unwrap_or_default();
            assert!(examples.contains(&usage), "{name}: {examples}");
        }
    }

    fn ours_of(arguments: &[&str]) -> Vec<OsString> {
        ours(arguments.iter().map(OsString::from), false)
    }

    #[test]
    fn toxiproxys_single_dashes_are_understood() {
        let arguments = [
            "fault",
            "daemon",
            "-port",
            "9000",
            "--seed=-15",
            "-15",
            "-h",
        ];
        let expected = ["--port", "9000", "--seed=-15", "-15", "-h"];
        assert_eq!(ours_of(&arguments)[2..], expected);
        let others = ["fault", "list", "-url", "x"];
        assert_eq!(ours_of(&others), others);
    }

    #[test]
    fn by_toxiproxys_name_it_is_toxiproxys_server() {
        let arguments = [
            "/usr/bin/toxiproxy-server",
            "-host=0.0.0.0",
            "-proxy-metrics=true",
        ];
        let expected = [
            "fault",
            "daemon",
            "--open",
            "--host=0.0.0.0",
            "--proxy-metrics=true",
        ];
        assert_eq!(ours_of(&arguments), expected);
        Cli::try_parse_from(ours_of(&arguments)).expect("all known");
        let version = ["toxiproxy", "-version"];
        assert_eq!(ours_of(&version)[3], "--toxiproxy-version");
        let all = "toxiproxy-server -host 0.0.0.0 -port 8475 -config /a.json -seed -5 -runtime-metrics -proxy-metrics=false";
        let all: Vec<_> = all.split(' ').collect();
        Cli::try_parse_from(ours_of(&all)).expect("all known");
        let secured = ours(["toxiproxy-server"].map(OsString::from), true);
        assert_eq!(secured, ["fault", "daemon"]);
    }
}
