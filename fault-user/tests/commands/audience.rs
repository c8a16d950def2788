//! Whoever reads what `fault` says may go away, a terminal may be closed, and `nohup` may keep it going all the same.

use std::process::{Command, Stdio};

use crate::support::place::{enter_fresh, fault};
use crate::support::watched::Watched;
use nix::sys::signal::{SigHandler, Signal, signal};

/// The command's exit code and the report are what a run is for; nobody need be there to read the summary.
#[test]
fn a_closed_standard_error_costs_neither_exit_code_nor_report() {
    enter_fresh();
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
    let mut run = Watched::start(fault().args(words).stdin(Stdio::piped()), "seed");
    run.stop_reading();
    drop(run.child.stdin.take());
    assert_eq!(run.finish().0, Some(7));
    assert!(report.join("report.json").exists());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    for words in [
        &["man"][..],
        &["help", "rules"],
        &["completions", "bash"],
        &["check", "-r", "tcp:1 loss=1%"],
    ] {
        let mut command = fault();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.args(words).spawn().expect("fault");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(0), "{words:?}: {output:?}");
        assert_eq!(output.stderr, b"", "{words:?}");
    }
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("a device");
    let output = fault().arg("man").stdout(full).output().expect("fault");
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr_text.contains("can't write to the standard output"),
        "{stderr_text}"
    );
}

/// Where these tests are run under nohup themselves, all that they start would go on.
fn hear_hangups() {
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl) }.expect("a signal that can be handled");
}

#[test]
fn a_closed_terminal_ends_fault_except_under_nohup() {
    hear_hangups();
    enter_fresh();
    let words = ["inject", "-r", "tcp:1 loss=1%"];
    let mut inject = Watched::start(fault().args(words), "press Ctrl-C");
    inject.signal(Signal::SIGHUP);
    let (code, stderr_text) = inject.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(stderr_text.contains("rules removed"), "{stderr_text}");

    let mut command = Command::new("nohup");
    command
        .arg(env!("CARGO_BIN_EXE_fault"))
        .args(words)
        .stdin(Stdio::null());
    let inject = Watched::start(&mut command, "press Ctrl-C");
    let status = std::fs::read_to_string(format!("/proc/{}/status", inject.child.id()));
    let status = status.expect("it runs");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.expect("a line").trim(), 16).expect("a set");
    assert_eq!(ignored & 1, 1, "it would end with its terminal: {status}");
    let (code, stderr_text) = inject.end();
    assert_eq!(code, Some(0), "{stderr_text}");
}

#[test]
fn a_daemon_whose_terminal_is_closed_takes_its_socket_away() {
    hear_hangups();
    enter_fresh();
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("api");
    let words = ["daemon", "--socket", &socket.display().to_string()];
    let mut daemon = Watched::start(fault().args(words), "API on");
    assert!(socket.exists());
    daemon.signal(Signal::SIGHUP);
    assert_eq!(daemon.finish().0, Some(0));
    assert!(!socket.exists());
}
