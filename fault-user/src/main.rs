//! The `fault` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    fault_user::cli::main()
}
