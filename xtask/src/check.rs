//! `cargo xtask check`: everything that can be said without running the tests.

use std::process::Command;

use anyhow::Result;

use crate::{
    build_ebpf, layers, names, words,
    workspace::{cargo, root, run as run_command},
};

/// Format, lints, documentation and the eBPF object: all that CI looks at before the tests.
#[derive(clap::Args)]
pub struct Arguments {}

/// Runs the subcommand.
///
/// # Errors
/// Fails at the first check that does.
pub fn run(_: &Arguments) -> Result<()> {
    layers::check()?;
    names::check()?;
    words::check()?;
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
    format_of_faults()?;
    run_command(cargo().args([
        "clippy",
        "--locked",
        "--all-targets",
        "--",
        "--deny=warnings",
    ]))?;
    build_ebpf::clippy()?;
    build_ebpf::check(None)?;
    run_command(
        cargo()
            .args(["doc", "--locked", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "--deny=warnings"),
    )
}

/// Folders whose files build.rs lists, so that `cargo fmt` does not find them.
const LISTED: [&str; 2] = ["fault-user/src/rule/faults", "fault-user/src/relay/stage"];

/// Checks the format of what `cargo fmt` does not find.
fn format_of_faults() -> Result<()> {
    let mut files = Vec::new();
    for folder in LISTED {
        for entry in root().join(folder).read_dir()? {
            files.push(entry?.path());
        }
    }
    run_command(
        Command::new("rustfmt")
            .args(["--edition", "2024", "--check"])
            .args(files),
    )
}
