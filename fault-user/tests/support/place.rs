//! A network namespace for a test, and the `fault` binary.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fault_user::sys::process::cgroup::Hierarchy;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Uid;

/// A test fails when something takes longer than this.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether this is an emulated machine, where everything takes longer.
pub fn is_emulated() -> bool {
    std::env::var_os("FAULT_VM_KERNEL").is_some()
}

/// Whether the programs are attached by TCX links, which end with the process.
pub fn has_tcx() -> bool {
    fault_user::sys::version::at_least(6, 6)
}

/// Runs `ip` with these words.
pub fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status();
    assert!(done.expect("ip runs").success(), "ip {words}");
}

/// Moves this thread, and everything it starts, into a new namespace with loopback up.
pub fn enter_fresh() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    ip("link set lo up");
}

/// An empty `/run` for this thread and what it starts: no other instance finds the journals in it, and undoes those of dead
/// ones when it starts.
pub fn hide_run() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
}

/// A second namespace, joined to this one by a veth pair: 10.77.0.1 and `fd77::1` here, .2 there.
pub struct Peer {
    pub name: String,
}

impl Peer {
    /// One that is not joined yet, with loopback up.
    pub fn fresh() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("fault-test-{}-{number}", std::process::id());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self { name }
    }

    pub fn joined() -> Self {
        Self::joined_by("10.77.0", "fd77:")
    }

    /// The same in other networks: /24 of IPv4 and /64 of IPv6, each without its last part.
    pub fn joined_by(ipv4: &str, ipv6: &str) -> Self {
        let peer = Self::fresh();
        ip("link add va type veth peer name vb");
        ip(&format!("link set vb netns {}", peer.name));
        let there = format!("-n {} ", peer.name);
        for (end, device, at) in [(1, "va", ""), (2, "vb", there.as_str())] {
            ip(&format!("{at}addr add {ipv4}.{end}/24 dev {device}"));
            ip(&format!(
                "{at}-6 addr add {ipv6}:{end}/64 dev {device} nodad"
            ));
            ip(&format!("{at}link set {device} up"));
        }
        peer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let done = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("the namespace {} was not removed", self.name);
        }
    }
}

/// Sets an option of a socket whose value is an int.
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: i32) {
    // SAFETY: the value is an int, as these options want it.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            4,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

/// Waits until something is so.
pub fn wait_for(mut is_so: impl FnMut() -> bool, what: &str) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// cgroup2, if this process may create cgroups; otherwise prints the reason.
pub fn hierarchy() -> Option<Hierarchy> {
    if !Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let found = Hierarchy::find().expect("a root test machine has cgroup2");
    if !found.is_writable() {
        eprintln!("skipped: cgroup2 is mounted read-only");
        return None;
    }
    Some(found)
}

/// The virtual machines have no bash.
pub fn has_bash() -> bool {
    let found = Path::new("/bin/bash").exists();
    if !found {
        eprintln!("skipped: there is no bash");
    }
    found
}

/// Whether stream faults can be for all processes.
pub fn can_lead_the_host() -> bool {
    let can = fault_user::sys::version::at_least(5, 14);
    if !can {
        eprintln!("skipped: stream faults on the whole host need Linux 5.14");
    }
    can
}

/// The binary under test. SIGINT ends it from its start on, also where a shell has started the tests in the background.
pub fn fault() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fault"));
    // SAFETY: one system call between fork and exec.
    unsafe { command.pre_exec(|| Ok(signal(Signal::SIGINT, SigHandler::SigDfl).map(drop)?)) };
    command
        .stdin(Stdio::null())
        .env_remove("SUDO_UID")
        .env_remove("SUDO_GID")
        .env_remove("GITHUB_STEP_SUMMARY");
    command
}

/// How many lines there are, apart from those by which a slow machine says that it is still setting up.
pub fn count_lines(stderr_text: &str) -> usize {
    let is_progress = |line: &&str| line.starts_with("fault: setting up");
    stderr_text
        .lines()
        .filter(|line| !is_progress(line))
        .count()
}

/// `fault` with these words, split at spaces; `RULE` words are given whole.
pub fn run(rules: &[&str], options: &str, command: &[&str]) -> Output {
    let mut words: Vec<&str> = vec!["run"];
    for rule in rules {
        words.extend(["-r", rule]);
    }
    words.extend(options.split(' ').filter(|word| !word.is_empty()));
    words.push("--");
    words.extend(command);
    fault().args(&words).output().expect("fault runs")
}

/// Rules that are applied until this is dropped.
pub struct AppliedRules {
    child: Child,
    input: Option<ChildStdin>,
}

impl AppliedRules {
    /// Applies rules with these options; CMD does nothing.
    pub fn begin(rules: &[&str], options: &str) -> Self {
        Self::begin_by(fault(), rules, options)
    }

    /// The same with `command` instead of `fault`.
    pub fn begin_by(mut command: Command, rules: &[&str], options: &str) -> Self {
        command.arg("run");
        for rule in rules {
            command.args(["-r", rule]);
        }
        command.args(options.split(' ').filter(|word| !word.is_empty()));
        command.args(["--allow-unfired", "--", "sh", "-c", "echo ready; cat"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line != "ready\n" {
            let mut error = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut error)
                .unwrap();
            panic!("{rules:?} {options}: {error}");
        }
        Self { child, input }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills `fault`, which then restores nothing by itself.
    pub fn kill(&mut self) {
        self.child.kill().expect("it runs");
    }

    /// Removes the rules and returns the summary.
    pub fn end(mut self) -> String {
        self.input = None;
        let mut summary = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut summary)
            .unwrap();
        assert!(self.child.wait().unwrap().success(), "{summary}");
        summary
    }
}

impl Drop for AppliedRules {
    fn drop(&mut self) {
        self.input = None;
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            // A test that failed; nothing must outlive it.
            if let Err(error) = self.child.kill() {
                eprintln!("killing fault: {error}");
            }
        }
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for fault: {error}");
        }
    }
}
