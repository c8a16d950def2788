//! `cargo xtask fuzz`: coverage-guided fuzzing with LLVM's libFuzzer, on stable Rust.
//!
//! A target is a binary of the crate in `fault-user/fuzz`. cargo-fuzz is not needed, nor a nightly
//! compiler: coverage comes from LLVM's own pass, and no sanitizer is wanted, since what is fuzzed
//! has no unsafe code and asserts what must hold.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    setup::{self, Need},
    workspace::{STATIC_TARGET, build_executables, cargo, root},
};

/// What makes LLVM report coverage and comparisons to libFuzzer.
const RUSTC_FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Fuzz the parsers that read what others wrote.
#[derive(clap::Args)]
pub struct Arguments {
    /// How long, shared by the targets
    #[arg(long = "seconds", value_name = "SECONDS", default_value_t = 60)]
    duration_s: u64,
    /// Where libFuzzer's random numbers begin, so that a run can be repeated; 0: somewhere else each time
    #[arg(long, default_value_t = 0)]
    seed: u32,
    /// Only these targets, by the names of their files in fault-user/fuzz/src/bin
    targets: Vec<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when a target finds an input that breaks what it asserts; the input is kept and named.
pub fn run(arguments: &Arguments) -> Result<()> {
    setup::require(&[Need::Fuzz])?;
    let mut build = cargo();
    build
        .args([
            "build",
            "--release",
            "--locked",
            "--package=fault-fuzz",
            "--bins",
        ])
        // With a target named, the flags below are not for build scripts.
        .args(["--target", STATIC_TARGET])
        .arg("--target-dir")
        .arg(root().join("target/fuzz"))
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTC_FLAGS.join("\u{1f}"))
        // It is built longer than it runs.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
    let mut targets = build_executables(&mut build)?;
    let names: Vec<_> = targets.iter().map(|target| target.name.clone()).collect();
    if let Some(unknown) = arguments.targets.iter().find(|name| !names.contains(name)) {
        bail!(
            "no fuzz target `{unknown}`; there are: {}",
            names.join(", ")
        );
    }
    if !arguments.targets.is_empty() {
        targets.retain(|target| arguments.targets.contains(&target.name));
    }
    let count = u64::try_from(targets.len())
        .context("no end of targets")?
        .max(1);
    let share_s = (arguments.duration_s / count).max(1);
    let mut broken = Vec::new();
    for target in targets {
        let folder = root().join("target/fuzz/runs").join(&target.name);
        let corpus = folder.join("corpus");
        fs::create_dir_all(&corpus)
            .with_context(|| format!("can't create {}", corpus.display()))?;
        println!("fuzzing {} for {share_s} s", target.name);
        let status = Command::new(&target.path)
            .arg(format!("-max_total_time={share_s}"))
            .arg(format!("-seed={}", arguments.seed))
            .args(["-timeout=10", "-print_final_stats=1", "-verbosity=1"])
            .arg(format!("-artifact_prefix={}/", folder.display()))
            .arg(&corpus)
            .status()
            .with_context(|| format!("can't start {}", target.path.display()))?;
        if !status.success() {
            broken.push(target.name);
        }
    }
    if !broken.is_empty() {
        bail!(
            "broken by an input that is named above: {}",
            broken.join(", ")
        );
    }
    Ok(())
}
