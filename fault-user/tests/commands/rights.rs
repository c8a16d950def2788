//! What `fault` may still do once it has set up, and what its command may.

use std::collections::BTreeMap;
use std::process::Command;

use crate::support::place::{enter_fresh, fault, has_tcx};
use crate::support::watched::Watched;

/// Kept where the command's cgroup lies in one that root may not write without.
const DAC_OVERRIDE: u64 = 1 << 1;
const KILL: u64 = 1 << 5;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;
const PERFMON: u64 = 1 << 38;
const BPF: u64 = 1 << 39;

/// Starts `fault`, and waits until it or its command says this.
fn start(words: &[&str], text: &str) -> Watched {
    Watched::start(fault().args(words), text)
}

/// Ends it, which must bring this exit code.
fn end(fault: Watched, expected: i32) {
    let (code, stderr_text) = fault.end();
    assert_eq!(code, Some(expected), "{stderr_text}");
}

/// What each thread may do: name, permitted capabilities.
fn threads(of: &Watched) -> BTreeMap<String, u64> {
    let folder = format!("/proc/{}/task", of.child.id());
    let mut found = BTreeMap::new();
    for task in std::fs::read_dir(folder).expect("it runs").flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).expect("a status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect(name).trim().to_owned()
        };
        let set = |name| u64::from_str_radix(&field(name), 16).expect("a number");
        let permitted = set("CapPrm:");
        assert_eq!(set("CapEff:"), permitted);
        assert_eq!((set("CapInh:"), set("CapAmb:")), (0, 0));
        found.insert(field("Name:"), permitted);
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
    }
    found
}

/// Whether each thread has a seccomp filter: the last thing that is set.
fn has_filters(of: &Watched) -> bool {
    let folder = format!("/proc/{}/task", of.child.id());
    let tasks = std::fs::read_dir(folder).expect("it runs").flatten();
    tasks.into_iter().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).expect("a status");
        status.lines().any(|line| line == "Seccomp:\t2")
    })
}

/// Waits until it has given up what it is going to give up: the set-up ends a moment after its last word.
fn settled(fault: &Watched, main: u64) -> BTreeMap<String, u64> {
    let start = std::time::Instant::now();
    loop {
        let status = format!("/proc/{}/status", fault.child.id());
        let status = std::fs::read_to_string(status).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
        let permitted = u64::from_str_radix(line.expect("a line").trim(), 16).expect("a set");
        if permitted & !DAC_OVERRIDE == main && has_filters(fault) {
            return threads(fault);
        }
        assert!(
            start.elapsed().as_secs() < 20,
            "{permitted:x}, not {main:x}, or a thread without a filter: {status}"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn rules_in_force_need_next_to_nothing() {
    enter_fresh();
    // Where TCX is, nothing is noted that would have to be undone.
    let first = if has_tcx() { BPF } else { BPF | NET_ADMIN };
    let fault = start(&["inject", "-r", "tcp:80 loss=1%"], "press Ctrl-C");
    let threads = settled(&fault, first);
    // Links of TCX end with the process, and need no lease.
    let lease = if has_tcx() { None } else { Some(&0) };
    assert_eq!(threads.get("lease"), lease, "{threads:?}");
    // Rules go on to interfaces that appear later.
    let later_interfaces = threads.get("interfaces");
    assert_eq!(
        later_interfaces,
        Some(&(BPF | NET_ADMIN | PERFMON)),
        "{threads:?}"
    );
    end(fault, 0);
}

/// What must be undone takes the right to; the helpers have none.
#[test]
fn what_is_to_be_undone_can_be() {
    enter_fresh();
    let words = ["inject", "-r", "tcp:80 delay=1ms", "--attach", "clsact"];
    let fault = start(&words, "press Ctrl-C");
    let threads = settled(&fault, BPF | NET_ADMIN);
    assert_eq!(threads.get("delay-line"), Some(&0), "{threads:?}");
    assert_eq!(threads.get("lease"), Some(&0), "{threads:?}");
    assert_eq!(setting(), "1");
    end(fault, 0);
    assert_eq!(setting(), "0");
    let filters = Command::new("tc")
        .args(["filter", "show", "dev", "lo", "egress"])
        .output();
    assert_eq!(filters.expect("tc").stdout, b"");
}

/// A setting of loopback that a delay changes, in this thread's namespace.
fn setting() -> String {
    let path = "/proc/sys/net/ipv4/conf/lo/accept_local";
    std::fs::read_to_string(path)
        .expect("a setting")
        .trim()
        .to_owned()
}

/// The command is the calling user's, has no capability, and may use sudo: its bounding set is whole,
/// `no_new_privs` is not set and no filter is added. `fault` can still pass signals on to it.
#[test]
fn the_command_is_the_callers_and_signals_reach_it() {
    enter_fresh();
    let own = std::fs::read_to_string("/proc/self/status").expect("a status");
    let as_it_was = |name: &str| {
        let line = own.lines().find(|line| line.starts_with(name));
        line.expect("a line").to_owned()
    };
    let (bounding, filter) = (as_it_was("CapBnd"), as_it_was("Seccomp:"));
    let script = format!(
        "exec >&2; grep -q '^{bounding}' /proc/self/status && grep -q '^{filter}' /proc/self/status && grep -c 'Cap[IPEA].*:\t0*$' /proc/self/status && \
         grep -q 'NoNewPrivs:\t0' /proc/self/status && trap 'exit 7' TERM && id -u && \
         while :; do sleep 0.1; done"
    );
    let words = [
        "run",
        "--allow-unfired",
        "-r",
        "tcp:80 loss=1%",
        "--",
        "sh",
        "-c",
        &script,
    ];
    let mut command = fault();
    command.args(words);
    command.env("SUDO_UID", "12345").env("SUDO_GID", "12345");
    let fault = Watched::start(&mut command, "4\n12345\n");
    let first = if has_tcx() {
        BPF | KILL
    } else {
        BPF | KILL | NET_ADMIN
    };
    settled(&fault, first);
    end(fault, 7);
}

#[test]
fn the_relay_behind_rules_keeps_what_marks_its_sockets() {
    enter_fresh();
    let words = [
        "run",
        "--allow-unfired",
        "-r",
        "tcp:80 latency=1ms",
        "--",
        "sh",
        "-c",
        "echo ready >&2; exec sleep 1000",
    ];
    let fault = start(&words, "ready");
    let threads = settled(&fault, BPF | NET_ADMIN);
    let relay = threads.get("relay-0").copied();
    assert_eq!(
        relay,
        Some(NET_ADMIN | NET_BIND_SERVICE | BPF),
        "{threads:?}"
    );
    end(fault, 143);
}

#[test]
fn a_daemon_may_listen_and_load_programs_and_nothing_else() {
    let kept = NET_BIND_SERVICE | BPF | PERFMON | NET_ADMIN | NET_RAW;
    enter_fresh();
    let fault = start(&["daemon"], "API on");
    let threads = settled(&fault, kept);
    let others: Vec<_> = threads.values().filter(|one| **one & !kept != 0).collect();
    assert_eq!(others, Vec::<&u64>::new(), "{threads:?}");
    end(fault, 0);
}

/// `fault run` in this folder, called by nobody through sudo, with a command that plants a link.
fn run_by_sudo(folder: &std::path::Path, options: &[&str], script: &str) -> std::process::Output {
    let mut command = fault();
    command
        .args(["run", "--allow-unfired", "-r", "tcp:5 loss=1%"])
        .args(options)
        .args(["--", "sh", "-c", script])
        .current_dir(folder)
        .env("SUDO_UID", "65534")
        .env("SUDO_GID", "65534");
    command.output().expect("it runs")
}

#[test]
fn what_is_written_for_who_called_sudo_is_written_with_their_rights() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
    if crate::support::place::hierarchy().is_none() {
        return;
    }
    enter_fresh();
    let kept = tempfile::tempdir().expect("a folder");
    let root = std::fs::canonicalize(kept.path()).expect("a path");
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a mode");
    };
    mode(&root, 0o755);
    let secret = root.join("secret");
    std::fs::write(&secret, "root's").expect("write");
    mode(&secret, 0o600);
    let own = root.join("own");
    std::fs::create_dir(&own).expect("a folder");
    chown(&own, Some(65_534), Some(65_534)).expect("chown");

    let plant = "mv out moved && mkdir out && ln -s ../../secret out/report.json && ln -s ../../secret moved/junit.xml";
    let output = run_by_sudo(&own, &["--report", "out"], plant);
    let stderr_text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{stderr_text}");
    assert!(stderr_text.contains("symbolic link"), "{stderr_text}");
    let written = std::fs::metadata(own.join("moved/report.json")).expect("a report");
    assert_eq!(written.uid(), 65_534);

    let output = run_by_sudo(&own, &["--events", "events"], "true");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        std::fs::metadata(own.join("events")).expect("a file").uid(),
        65_534
    );
    symlink(&secret, own.join("link")).expect("a link");
    for options in [
        ["--events", "link"],
        ["--events", "../new"],
        ["--report", "../new"],
    ] {
        let output = run_by_sudo(&own, &options, "touch started");
        assert_eq!(output.status.code(), Some(125), "{options:?}: {output:?}");
        assert!(!own.join("started").exists(), "{options:?}");
    }
    assert_eq!(std::fs::read_to_string(&secret).expect("read"), "root's");
    assert!(!root.join("new").exists());
}
