//! The `fault` binary.

use std::process::ExitCode;

use clap::Parser as _;
use fault_user::cli::{self, Cli};
use fault_user::process::open_files;
use fault_user::tell;

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::arguments());
    cli::start_log();
    open_files::raise();
    let verbose = cli.verbose;
    match cli.run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_reader_gone() => ExitCode::SUCCESS,
        Err(failure) => {
            if verbose {
                tell::line(format_args!("fault: {:?}", failure.error));
            } else {
                tell::line(format_args!("fault: {failure}"));
            }
            ExitCode::from(failure.code)
        }
    }
}
