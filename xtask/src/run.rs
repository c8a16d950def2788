//! `cargo xtask run -- ARGS`: builds `fault` and runs it, as root.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::workspace::{build_executables, cargo, find_program, shown};

/// Build `fault` and run it, with sudo when this is not root.
#[derive(clap::Args)]
pub struct Arguments {
    /// What to pass to `fault`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs the subcommand; on success `fault` takes the place of this process.
///
/// # Errors
/// Fails when the build fails or the program can't be started.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--locked",
        "--package=fault-user",
        "--bin=fault",
    ]);
    let programs = build_executables(&mut build)?;
    let fault = programs.iter().find(|program| program.name == "fault");
    let fault = &fault.context("cargo built no program named fault")?.path;
    let mut command = if Uid::effective().is_root() {
        Command::new(fault)
    } else if find_program("sudo").is_some() {
        let mut sudo = Command::new("sudo");
        sudo.arg(fault);
        sudo
    } else {
        bail!("fault needs root here: run this as root, or install sudo");
    };
    command.args(&arguments.arguments);
    // Only returns when it fails.
    let error = command.exec();
    Err(error).with_context(|| format!("can't start `{}`", shown(&command)))
}
