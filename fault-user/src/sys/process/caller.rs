//! The environment of whoever called sudo.
//!
//! sudo replaces PATH and drops most variables, but its own process still has those that it was started with.
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IsTerminal as _};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

/// Variables that sudo sets to root's values; the caller's are used instead.
const REPLACED: [&str; 6] = ["PATH", "HOME", "SHELL", "USER", "LOGNAME", "MAIL"];

/// The variables that sudo changed: those of the caller that this process does not have, and those that sudo replaces.
/// Empty without sudo above this process, or if its environment can't be read.
#[must_use]
pub fn environment() -> Vec<(OsString, OsString)> {
    let Some(bytes) = sudo_above(std::process::id()).and_then(environment_of) else {
        return Vec::new();
    };
    let is_sudos = |name: &OsStr| name.to_string_lossy().starts_with("SUDO_");
    let is_kept = |name: &OsStr| std::env::var_os(name).is_some();
    variables(&bytes)
        .filter(|(name, _)| !is_sudos(name))
        .filter(|(name, _)| REPLACED.iter().any(|one| name == one) || !is_kept(name))
        .collect()
}

/// The outermost of the sudo processes right above: with a terminal of its own sudo runs as two.
fn sudo_above(pid: u32) -> Option<u32> {
    let mut found = None;
    let mut pid = parent_of(pid)?;
    while fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sudo") {
        found = Some(pid);
        pid = parent_of(pid)?;
    }
    found
}

/// The process's parent. The name in front of the number may have brackets and spaces in it.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

/// Replaces this process by `fault` under sudo, with the same arguments. Returns if that is impossible: there is no
/// sudo, or it would ask for a password without a terminal.
pub fn go_through_sudo() {
    let (Ok(program), stdin) = (std::env::current_exe(), io::stdin()) else {
        return;
    };
    let quiet = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let Ok(quiet) = quiet else {
        return;
    };
    let is_attended = stdin.is_terminal() && io::stderr().is_terminal();
    if !quiet.success() && !is_attended {
        return;
    }
    let error = Command::new("sudo")
        .arg("--")
        .arg(program)
        .args(std::env::args_os().skip(1))
        .exec();
    log::warn!("sudo can't be started: {error}");
}

fn environment_of(pid: u32) -> Option<Vec<u8>> {
    fs::read(format!("/proc/{pid}/environ")).ok()
}

/// `NAME=VALUE` strings that end with a zero byte each.
fn variables(bytes: &[u8]) -> impl Iterator<Item = (OsString, OsString)> + use<> {
    let entries: Vec<_> = bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    entries.into_iter().filter_map(|mut entry| {
        let at = entry
            .iter()
            .position(|byte| *byte == b'=')
            .filter(|at| *at > 0)?;
        let value = entry.split_off(at + 1);
        entry.pop();
        Some((OsString::from_vec(entry), OsString::from_vec(value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_as_the_kernel_shows_them() {
        let read: Vec<_> = variables(b"A=1=2\0=x\0B=\0junk\0").collect();
        let expected = [("A", "1=2"), ("B", "")].map(|(a, b)| (a.into(), b.into()));
        assert_eq!(read, expected);
    }

    #[test]
    fn without_sudo_there_is_nothing_to_take() {
        assert!(sudo_above(1).is_none());
    }
}
