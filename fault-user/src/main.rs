//! The `fault` binary.

use std::process::ExitCode;

use clap::Parser as _;
use fault_user::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::arguments());
    cli::start_log();
    let verbose = cli.verbose;
    match cli.run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_reader_gone() => ExitCode::SUCCESS,
        Err(failure) => {
            if verbose {
                eprintln!("fault: {:?}", failure.error);
            } else {
                eprintln!("fault: {failure}");
            }
            ExitCode::from(failure.code)
        }
    }
}
