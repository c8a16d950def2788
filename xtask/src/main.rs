//! Builds, checks, tests and packages fault: one file per subcommand, this one only dispatches.

mod bench;
mod build_ebpf;
mod check;
mod dist;
mod fuzz;
mod layers;
mod names;
mod run;
mod setup;
mod skip;
mod stack;
mod test;
mod vm;
mod watchdog;
mod words;
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
    Setup(setup::Arguments),
    BuildEbpf(build_ebpf::Arguments),
    Run(run::Arguments),
    Check(check::Arguments),
    Test(test::Arguments),
    Bench(bench::Arguments),
    Vm(vm::Arguments),
    Fuzz(fuzz::Arguments),
    Dist(dist::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup(arguments) => setup::run(&arguments),
        Task::BuildEbpf(arguments) => build_ebpf::run(&arguments),
        Task::Run(arguments) => run::run(&arguments),
        Task::Check(arguments) => check::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Vm(arguments) => vm::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Dist(arguments) => dist::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
