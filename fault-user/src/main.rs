//! The `fault` binary.

use std::process::ExitCode;

use clap::Parser as _;
use fault_user::cli::{self, Cli, mistakes};
use fault_user::session::outcome::exit;
use fault_user::sys::process::{cgroup, open_files};
use fault_user::tell;

fn main() -> ExitCode {
    let arguments = cli::arguments();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        // The user asked for help or the version.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            let words = arguments
                .iter()
                .map(|word| word.to_string_lossy().into_owned());
            let words: Vec<_> = words.collect();
            tell::line(format_args!("{}", mistakes::message(&error, &words)));
            return ExitCode::from(exit::USAGE);
        }
    };
    cli::start_log();
    open_files::raise();
    let verbose = cli.verbose;
    if verbose > 0 {
        tell::show_steps();
    }
    if let Err(error) = cgroup::mount_if_hidden() {
        // What needs it says that there is none.
        log::debug!("{error:#}");
    }
    match cli.run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_reader_gone() => ExitCode::SUCCESS,
        Err(failure) => {
            if verbose > 0 {
                tell::line(format_args!("fault: error: {:?}", failure.error));
            } else {
                tell::line(format_args!("fault: error: {failure}"));
            }
            ExitCode::from(failure.code)
        }
    }
}
