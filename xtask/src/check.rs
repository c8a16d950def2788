//! `cargo xtask check`: everything that can be said without running the tests.

use anyhow::Result;

use crate::{
    build_ebpf, layers,
    workspace::{cargo, run as run_command},
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
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
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
