//! What `fault` may still do once it has set up, and what its command may.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

/// Kept where the command's cgroup lies in one that root may not write without.
const DAC_OVERRIDE: u64 = 1 << 1;
const KILL: u64 = 1 << 5;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const PERFMON: u64 = 1 << 38;
const BPF: u64 = 1 << 39;

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

/// `fault`, ended when this is dropped.
struct Fault {
    child: Child,
    /// What it says at the end needs a reader.
    rest: Option<Box<dyn BufRead>>,
}

impl Fault {
    /// Starts it with these words, for the user 12345 who called sudo, and waits for this on its standard error or, from
    /// its command, on its standard output.
    fn start(words: &[&str], sudo: bool, text: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fault"));
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env_remove("SUDO_UID")
            .env_remove("SUDO_GID")
            .env_remove("GITHUB_STEP_SUMMARY");
        if sudo {
            command.env("SUDO_UID", "12345").env("SUDO_GID", "12345");
        }
        let mut child = command.spawn().expect("fault");
        let is_run = words[0] == "run";
        let mut lines: Box<dyn BufRead> = if is_run {
            Box::new(BufReader::new(child.stdout.take().expect("a pipe")))
        } else {
            Box::new(BufReader::new(child.stderr.take().expect("a pipe")))
        };
        let mut told = String::new();
        while !told.contains(text) {
            let read = lines.read_line(&mut told).expect("text");
            if read == 0 {
                let mut error = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    stderr.read_to_string(&mut error).expect("text");
                }
                panic!("{told}{error}");
            }
        }
        Self {
            child,
            rest: Some(lines),
        }
    }

    /// What each thread may do: name, permitted capabilities.
    fn threads(&self) -> BTreeMap<String, u64> {
        let folder = format!("/proc/{}/task", self.child.id());
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
    fn has_filters(&self) -> bool {
        let folder = format!("/proc/{}/task", self.child.id());
        let tasks = std::fs::read_dir(folder).expect("it runs").flatten();
        tasks.into_iter().all(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).expect("a status");
            status.lines().any(|line| line == "Seccomp:\t2")
        })
    }

    /// Waits until it has given up what it is going to give up: the set-up ends a moment after its last word.
    fn settled(&self, main: u64) -> BTreeMap<String, u64> {
        let start = std::time::Instant::now();
        loop {
            let status = format!("/proc/{}/status", self.child.id());
            let status = std::fs::read_to_string(status).expect("it runs");
            let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
            let permitted = u64::from_str_radix(line.expect("a line").trim(), 16).expect("a set");
            if permitted & !DAC_OVERRIDE == main && self.has_filters() {
                return self.threads();
            }
            assert!(
                start.elapsed().as_secs() < 20,
                "{permitted:x}, not {main:x}, or a thread without a filter: {status}"
            );
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Ends it, and gives its exit code.
    fn end(mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        let mut told = String::new();
        for mut stream in [
            self.rest.take(),
            self.child
                .stderr
                .take()
                .map(|one| Box::new(BufReader::new(one)) as Box<dyn BufRead>),
        ]
        .into_iter()
        .flatten()
        {
            stream.read_to_string(&mut told).expect("text");
        }
        eprintln!("{told}");
        self.child.wait().expect("it ends").code()
    }

    fn signal(&self, signal: Signal) {
        kill(
            Pid::from_raw(i32::try_from(self.child.id()).expect("a number")),
            signal,
        )
        .expect("sent");
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.signal(Signal::SIGTERM);
            if let Err(error) = self.child.wait() {
                eprintln!("waiting: {error}");
            }
        }
    }
}

/// Where TCX is, nothing is noted that would have to be undone.
fn has_tcx() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|one| one.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(6))
}

#[test]
fn rules_in_force_need_next_to_nothing() {
    if !enter_fresh() {
        return;
    }
    let first = if has_tcx() { BPF } else { BPF | NET_ADMIN };
    let fault = Fault::start(&["inject", "-r", "tcp:80 loss=1%"], false, "in force");
    let threads = fault.settled(first);
    assert_eq!(threads.get("lease"), Some(&0), "{threads:?}");
    assert_eq!(fault.end(), Some(0));
}

/// What must be undone takes the right to; the helpers have none.
#[test]
fn what_is_to_be_undone_can_be() {
    if !enter_fresh() {
        return;
    }
    let words = ["inject", "-r", "tcp:80 delay=1ms", "--attach", "clsact"];
    let fault = Fault::start(&words, false, "in force");
    let threads = fault.settled(BPF | NET_ADMIN);
    assert_eq!(threads.get("delay-line"), Some(&0), "{threads:?}");
    assert_eq!(setting(), "1");
    assert_eq!(fault.end(), Some(0));
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
    if !enter_fresh() {
        return;
    }
    let own = std::fs::read_to_string("/proc/self/status").expect("a status");
    let as_it_was = |name: &str| {
        let line = own.lines().find(|line| line.starts_with(name));
        line.expect("a line").to_owned()
    };
    let (bounding, filter) = (as_it_was("CapBnd"), as_it_was("Seccomp:"));
    let script = format!(
        "grep -q '^{bounding}' /proc/self/status && grep -q '^{filter}' /proc/self/status && grep -c 'Cap[IPEA].*:\t0*$' /proc/self/status && \
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
    let fault = Fault::start(&words, true, "4\n12345\n");
    let first = if has_tcx() {
        BPF | KILL
    } else {
        BPF | KILL | NET_ADMIN
    };
    fault.settled(first);
    assert_eq!(fault.end(), Some(7));
}

#[test]
fn the_relay_behind_rules_keeps_what_marks_its_sockets() {
    if !enter_fresh() {
        return;
    }
    let words = [
        "run",
        "--allow-unfired",
        "-r",
        "tcp:80 latency=1ms",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ];
    let fault = Fault::start(&words, false, "ready");
    let threads = fault.settled(BPF | NET_ADMIN);
    let relay = threads.get("relay-0").copied();
    assert_eq!(
        relay,
        Some(NET_ADMIN | NET_BIND_SERVICE | BPF),
        "{threads:?}"
    );
    assert_eq!(fault.end(), Some(143));
}

#[test]
fn a_daemon_may_listen_and_load_programs_and_nothing_else() {
    let kept = NET_BIND_SERVICE | BPF | PERFMON | NET_ADMIN;
    if !enter_fresh() {
        return;
    }
    let fault = Fault::start(&["daemon"], false, "API on");
    let threads = fault.settled(kept);
    let others: Vec<_> = threads.values().filter(|one| **one & !kept != 0).collect();
    assert_eq!(others, Vec::<&u64>::new(), "{threads:?}");
    assert_eq!(fault.end(), Some(0));
}
