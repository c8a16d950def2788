//! `cargo xtask test`: all tests, those that need root included, and which of them were skipped.

use std::{
    ffi::OsString,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Read, Write},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::{
    setup::{self, Need},
    skip::{Line, Reader, SHOW_OUTPUT, Skip},
    watchdog::{SignOfLife, Watchdog},
    workspace::{cargo, find_program, output, shown},
};

/// No test that does not hang is silent for so long; building may be.
const SILENCE_LIMIT: Duration = Duration::from_mins(10);

/// Run all tests, those that need root included.
#[derive(clap::Args)]
pub struct Arguments {
    /// What to pass to `cargo test`, such as `-p fault-common` or part of a test's name
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when something is missing that the tests need, or when a test fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    setup::require(&[Need::Test])?;
    if arguments.arguments.is_empty() {
        eprintln!("test: building and running all tests takes up to an hour on two cores");
    }
    let mut command = cargo();
    command
        .args(["test", "--locked", "--no-fail-fast"])
        .args(&arguments.arguments);
    if !arguments.arguments.iter().any(|argument| argument == "--") {
        command.arg("--");
    }
    command.arg(SHOW_OUTPUT);
    if !Uid::effective().is_root() {
        run_tests_by_sudo(&mut command)?;
    }
    if io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start `{}`", shown(&command)))?;
    let watchdog = Watchdog::new(child.id(), SILENCE_LIMIT);
    let signs = watchdog.sign_of_life();
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    let signs_on_stderr = signs.clone();
    let errors = thread::spawn(move || pass_on(stderr, io::stderr(), &signs_on_stderr));
    let mut skips = pass_on(stdout, io::stdout(), &signs)?;
    match errors.join() {
        Ok(more) => skips.extend(more?),
        Err(_) => bail!("reading what the tests print went wrong"),
    }
    let status = child.wait()?;
    drop(watchdog);
    summarise(&skips);
    if !status.success() {
        bail!("`{}` failed: {status}", shown(&command));
    }
    Ok(())
}

/// Has cargo start every test program by sudo.
fn run_tests_by_sudo(command: &mut Command) -> Result<()> {
    if find_program("sudo").is_none() {
        bail!("most tests need root: run this as root, or install sudo");
    }
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not name its host")?;
    let name = host.to_uppercase().replace('-', "_");
    command.env(format!("CARGO_TARGET_{name}_RUNNER"), "sudo --preserve-env");
    Ok(())
}

/// Writes the lines on as they come, but for what passing tests wrote, and returns the skips.
fn pass_on(from: impl Read, mut to: impl Write, signs: &SignOfLife) -> Result<Vec<Skip>> {
    let mut from = BufReader::new(from);
    let mut reader = Reader::default();
    let mut skips = Vec::new();
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        signs.give();
        match reader.read(&String::from_utf8_lossy(&line)) {
            Line::Skip(skip) => skips.push(skip),
            Line::OfPassing => {}
            Line::Other => {
                to.write_all(&line)?;
                to.flush()?;
            }
        }
        line.clear();
    }
    Ok(skips)
}

fn summarise(skips: &[Skip]) {
    if skips.is_empty() {
        eprintln!("no test was skipped");
        return;
    }
    eprintln!("{} skipped:", skips.len());
    for skip in skips {
        eprintln!("  {}: {}", skip.test, skip.reason);
    }
}
