//! Where things are, and running other programs: what every subcommand needs.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// The folder that holds the workspace's Cargo.toml.
///
/// Taken from the environment that `cargo run` sets rather than from the build, since a target
/// folder may be shared by several checkouts.
pub fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    match manifest.parent() {
        Some(parent) => parent.to_owned(),
        None => manifest,
    }
}

/// The `cargo` that started this program, or the one on the path.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // These describe the package xtask, and build scripts of other packages would read them.
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") {
            command.env_remove(name);
        }
    }
    command
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_MANIFEST_PATH");
    command
}

/// What static programs are built for. glibc's, since rustup's musl is seldom installed.
pub const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// A cargo command that builds static programs, which run on any kernel without a library.
pub fn build_static(subcommand: &str) -> Command {
    let mut command = cargo();
    command
        .args([
            subcommand,
            "--profile",
            "vm",
            "--locked",
            "--target",
            STATIC_TARGET,
        ])
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-Ctarget-feature=+crt-static",
        );
    command
}

/// Where cargo keeps the sources of other crates.
///
/// # Errors
/// Fails for a user without a home folder who has not set `CARGO_HOME`.
pub fn cargo_home() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("CARGO_HOME") {
        return Ok(folder.into());
    }
    Ok(env::home_dir()
        .context("no home folder; set CARGO_HOME")?
        .join(".cargo"))
}

/// The command as one would type it, for messages.
pub fn shown(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    words.join(" ")
}

/// A program that cargo built.
pub struct Executable {
    /// The target's name: of a library, a binary, or a file under `tests`.
    pub name: String,
    /// Whether it is a program of tests, and not what users run.
    pub is_test: bool,
    /// Where it lies.
    pub path: PathBuf,
}

/// Runs a cargo command that builds, and returns the programs that it made.
///
/// # Errors
/// Fails when cargo does, whose messages the user sees.
pub fn build_executables(command: &mut Command) -> Result<Vec<Executable>> {
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", shown(command), output.status);
    }
    let mut built = Vec::new();
    for line in output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let message: Message =
            serde_json::from_slice(line).context("can't read what cargo says")?;
        if let (Some(path), Some(target)) = (message.executable, message.target) {
            let is_test = message.profile.is_some_and(|profile| profile.test);
            built.push(Executable {
                name: target.name,
                is_test,
                path,
            });
        }
    }
    Ok(built)
}

/// What we read of a line of `cargo build --message-format=json`.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Runs a command whose output the user sees.
///
/// # Errors
/// Fails when the program can't be started or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote to its standard output, without the space around it.
///
/// # Errors
/// Fails, with what the command wrote to its standard error, when it can't be started or does not
/// succeed.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("can't start `{}`", shown(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}: {}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` did not print UTF-8", shown(command)))?;
    Ok(text.trim().to_owned())
}

/// The first folder of `PATH` that holds this program, as a path to it.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    // Debian keeps root's tools where an ordinary user's PATH does not look.
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Where a tool that `setup` installs into the project is, or would be installed.
///
/// A git worktree uses what the main worktree has installed, so that each need not build its own.
pub fn tool(name: &str) -> PathBuf {
    let own = root().join(".tools/bin").join(name);
    if own.is_file() {
        return own;
    }
    let common = output(Command::new("git").current_dir(root()).args([
        "rev-parse",
        "--path-format=absolute",
        "--git-common-dir",
    ]));
    // Not a git checkout at all is an ordinary case: there is no other place to look, then.
    match common {
        Ok(folder) => {
            let shared = Path::new(&folder).with_file_name(".tools/bin").join(name);
            if shared.is_file() { shared } else { own }
        }
        Err(_) => own,
    }
}
