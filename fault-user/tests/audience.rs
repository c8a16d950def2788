//! Whoever reads what `fault` says may go away, a terminal may be closed, and `nohup` may keep it going all the same.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStderr, Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

/// A network namespace of this thread's own.
fn enter_fresh() -> bool {
    if !Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return false;
    }
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.expect("ip").success());
    true
}

fn fault(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fault"));
    command
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .env_remove("SUDO_UID")
        .env_remove("GITHUB_STEP_SUMMARY");
    command
}

/// Starts it and waits until it says this.
fn start(command: &mut Command, text: &str) -> (Child, BufReader<ChildStderr>) {
    let mut child = command.spawn().expect("it starts");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut told = String::new();
    while !told.contains(text) {
        assert_ne!(lines.read_line(&mut told).expect("text"), 0, "{told}");
    }
    (child, lines)
}

fn send(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).expect("a number");
    kill(Pid::from_raw(pid), signal).expect("sent");
}

/// The command's exit code and the report are what a run is for; nobody need be there to read the summary.
#[test]
fn a_closed_standard_error_costs_neither_exit_code_nor_report() {
    if !enter_fresh() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let report = folder.path().join("report");
    let name = report.display().to_string();
    let words = [
        "run",
        "--report",
        &name,
        "-r",
        "tcp:1 loss=1%",
        "--",
        "sh",
        "-c",
        "read line; exit 7",
    ];
    let mut command = fault(&words);
    let (mut child, lines) = start(command.stdin(Stdio::piped()), "seed");
    drop(lines);
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(7));
    assert!(report.join("report.json").exists());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    for words in [
        &["man"][..],
        &["completions", "bash"],
        &["check", "-r", "tcp:1 loss=1%"],
    ] {
        let mut child = fault(words).stdout(Stdio::piped()).spawn().expect("fault");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(0), "{words:?}: {output:?}");
        assert_eq!(output.stderr, b"", "{words:?}");
    }
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("a device");
    let output = fault(&["man"]).stdout(full).output().expect("fault");
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        told.contains("can't write to the standard output"),
        "{told}"
    );
}

#[test]
fn a_closed_terminal_heals_unless_nohup_says_otherwise() {
    if !enter_fresh() {
        return;
    }
    let words = ["inject", "-r", "tcp:1 loss=1%"];
    let (mut child, mut lines) = start(&mut fault(&words), "in force");
    send(&child, Signal::SIGHUP);
    let mut told = String::new();
    lines.read_to_string(&mut told).expect("text");
    assert!(told.contains("healed"), "{told}");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));

    let program = env!("CARGO_BIN_EXE_fault");
    let mut command = Command::new("nohup");
    command
        .arg(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let (mut child, mut lines) = start(&mut command, "in force");
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let status = status.expect("it runs");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.expect("a line").trim(), 16).expect("a set");
    assert_eq!(ignored & 1, 1, "it would end with its terminal: {status}");
    send(&child, Signal::SIGTERM);
    let mut told = String::new();
    lines.read_to_string(&mut told).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "{told}");
}

#[test]
fn a_daemon_whose_terminal_is_closed_takes_its_socket_away() {
    if !enter_fresh() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("api");
    let words = ["daemon", "--socket", &socket.display().to_string()];
    let (mut child, _lines) = start(&mut fault(&words), "API on");
    assert!(socket.exists());
    send(&child, Signal::SIGHUP);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(!socket.exists());
}
