//! The command line: one variant and one file per subcommand.

mod client;
mod daemon;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The exit code when `fault` itself could not set up.
pub const SETUP_FAILED: u8 = 125;

/// Kernel-level network fault injection for tests.
#[derive(Debug, Parser)]
#[command(name = "fault", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the control API (Toxiproxy's) and its proxies until it is told to stop
    Daemon(daemon::Args),
    /// Lists the daemon's proxies and their toxics
    List(client::ListArgs),
    /// Adds a proxy or a toxic to the daemon
    Add(client::AddArgs),
    /// Removes a proxy or a toxic from the daemon
    Remove(client::RemoveArgs),
    /// Enables every proxy of the daemon and removes every toxic
    Reset(client::Target),
    /// Shows what the daemon's proxies have carried and what its toxics have done
    Stats(client::StatsArgs),
    /// Shows what happens in the daemon, line by line, until interrupted
    Events(client::Target),
}

/// Toxiproxy's server takes its options with one dash; scripts that do so go on working.
fn with_two_dashes(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.get(1).is_some_and(|command| command == "daemon") {
        for argument in arguments.iter_mut().skip(2) {
            let text = argument.to_string_lossy().into_owned();
            if text.starts_with('-') && !text.starts_with("--") && text.len() > 2 {
                *argument = format!("-{text}").into();
            }
        }
    }
    arguments
}

/// Parses the arguments and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(with_two_dashes(std::env::args_os()));
    start_log();
    let done = match cli.command {
        Command::Daemon(args) => daemon::run(&args),
        Command::List(args) => client::list(&args),
        Command::Add(args) => client::add(&args),
        Command::Remove(args) => client::remove(&args),
        Command::Reset(target) => client::reset(&target),
        Command::Stats(args) => client::stats(&args),
        Command::Events(target) => client::events(&target),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fault: {error:#}");
            ExitCode::from(SETUP_FAILED)
        }
    }
}

/// `LOG_LEVEL` as Toxiproxy reads it: trace, debug, info, warn, error; fatal, panic and disabled are error.
fn start_log() {
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
    env_logger::Builder::new().filter_level(level).init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn toxiproxys_single_dashes_are_understood() {
        let arguments = ["fault", "daemon", "-port", "9000", "--seed=1", "-h"].map(OsString::from);
        assert_eq!(
            with_two_dashes(arguments)[2..],
            ["--port", "9000", "--seed=1", "-h"].map(OsString::from)
        );
        let others = ["fault", "list", "-url", "x"].map(OsString::from);
        assert_eq!(with_two_dashes(others.clone()), others);
    }
}
