//! Builds, checks, tests and packages fault: one file per subcommand, this one only dispatches.

mod build_ebpf;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, checks, tests and packages fault.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the eBPF object from source, or check that the committed one is current
    BuildEbpf(build_ebpf::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::BuildEbpf(arguments) => build_ebpf::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
