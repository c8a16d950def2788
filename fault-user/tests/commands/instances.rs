//! Several instances in one network namespace: none disturbs another, or whom no rule is about.

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::echo::{connected, tcp_echo, udp_client, udp_echo};
use crate::support::late::{echo, timed};
use crate::support::place::{
    AppliedRules, PATIENCE, enter_fresh, fault, has_tcx, hide_run, hierarchy, run, wait_for,
};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use socket2::{Domain, Socket, Type};

const SETTINGS: [&str; 2] = [
    "/proc/sys/net/ipv4/conf/lo/accept_local",
    "/proc/sys/net/ipv4/conf/lo/route_localnet",
];

fn settings() -> String {
    SETTINGS
        .map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned())
        .concat()
}

/// A round trip of one datagram.
fn round_trip(server: SocketAddr) -> Duration {
    let socket = connected(server);
    timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut [0; 1]).unwrap();
    })
}

/// `fault clean` where neither processes nor `/run` are those of here, as in another container of a pod.
fn clean_elsewhere() {
    let script = "mount -t tmpfs none /run && exec \"$0\" clean";
    let done = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--mount-proc",
            "--mount",
            "sh",
            "-c",
            script,
        ])
        .arg(env!("CARGO_BIN_EXE_fault"))
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn twelve_instances_judge_a_packet_once_each() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let all: Vec<_> = (0..12)
        .map(|_| AppliedRules::begin(&["udp:7000 delay=10ms"], "--scope host"))
        .collect();
    let took = round_trip(address);
    assert!(took >= Duration::from_millis(240), "{took:?}");
    for applied in all {
        let summary = applied.end();
        assert!(summary.contains("  2 pkts"), "each judges once: {summary}");
    }
    assert_eq!(settings(), "00");
}

/// Whoever starts undoes what killed ones have left, also in other network namespaces: at any time.
#[test]
fn what_a_killed_one_has_set_stays_for_who_has_begun_meanwhile() {
    enter_fresh();
    hide_run();
    let address = echo(None, "127.0.0.1");
    let begin = || AppliedRules::begin(&["udp:7000 delay=60ms"], "--scope host");
    let mut killed = begin();
    let journal = format!("/run/fault/{}.json", killed.pid());
    killed.kill();
    drop(killed);
    let somebody = std::fs::File::open(&journal).unwrap();
    let somebody = Flock::lock(somebody, FlockArg::LockExclusiveNonblock).expect("it is dead");
    let second = begin();
    drop(somebody);
    // The exit code says that something is left.
    fault().arg("clean").status().unwrap();
    assert!(round_trip(address) >= Duration::from_millis(120));
    second.end();
    assert!(fault().arg("clean").status().unwrap().success());
    assert_eq!(noted(), "");
}

#[test]
fn the_end_of_one_leaves_the_others_delays() {
    for attach in ["", "--attach clsact"] {
        enter_fresh();
        let address = echo(None, "127.0.0.1");
        let options = format!("--scope host {attach}");
        let rule = ["udp:7000 delay=60ms"];
        let begin = || AppliedRules::begin(&rule, &options);
        let [first, mut second, third] = [begin(), begin(), begin()];
        let is_late = |times: u64| {
            let took = round_trip(address);
            assert!(
                took >= Duration::from_millis(120 * times),
                "{times}: {took:?}"
            );
            assert_eq!(settings(), "11");
        };
        is_late(3);
        first.end();
        is_late(2);
        second.kill();
        drop(second);
        clean_elsewhere();
        is_late(1);
        // One that starts now knows what the settings were before all of them.
        let fourth = begin();
        third.end();
        is_late(1);
        assert!(fault().arg("clean").status().unwrap().success());
        is_late(1);
        fourth.end();
        assert_eq!(settings(), "00");
        let filters = Command::new("tc")
            .args(["filter", "show", "dev", "lo", "egress"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&filters.stdout), "");
    }
}

#[test]
fn two_instances_that_refuse_the_same_refuse_it() {
    enter_fresh();
    let rules = ["tcp:9 reject", "udp:9 reject"];
    let begin = || AppliedRules::begin(&rules, "--scope host");
    let applied = [begin(), begin()];
    assert!(is_refused("127.0.0.1:9".parse().unwrap()));
    let socket = connected("127.0.0.1:9".parse().unwrap());
    socket.send(b"x").unwrap();
    let error = socket.recv(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    for one in applied {
        one.end();
    }
}

#[test]
fn an_empty_clsact_of_somebody_else_stays() {
    enter_fresh();
    let has_clsact = || {
        let shown = Command::new("tc")
            .args(["qdisc", "show", "dev", "lo"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("clsact")
    };
    let options = "--scope host --attach clsact --allow-unfired";
    run(&["udp:7000 loss=1%"], options, &["true"]);
    assert!(!has_clsact(), "its own goes");
    let done = Command::new("tc")
        .args(["qdisc", "add", "dev", "lo", "clsact"])
        .status();
    assert!(done.unwrap().success());
    run(&["udp:7000 loss=1%"], options, &["true"]);
    assert!(has_clsact());
    let mut killed = AppliedRules::begin(&["udp:7000 delay=1ms"], "--scope host --attach clsact");
    killed.kill();
    drop(killed);
    assert!(fault().arg("clean").status().unwrap().success());
    assert!(has_clsact());
}

/// Whether a connection is refused.
fn is_refused(server: SocketAddr) -> bool {
    match TcpStream::connect(server) {
        Ok(_) => false,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    }
}

#[test]
fn rules_beside_a_delay_act_while_fault_is_stopped() {
    enter_fresh();
    let server = tcp_echo(TcpListener::bind("127.0.0.1:7001").unwrap());
    let address = echo(None, "127.0.0.1");
    let rules = ["tcp:7001 reject", "udp:7000 delay=50ms"];
    let applied = AppliedRules::begin(&rules, "--scope host");
    if !has_tcx() {
        eprintln!("skipped: needs tcx");
        return;
    }
    let process = Pid::from_raw(applied.pid().cast_signed());
    kill(process, Signal::SIGSTOP).unwrap();
    // Nobody sends on what would be held: it passes, once that is known.
    let socket = connected(address);
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    wait_for(
        || {
            assert!(is_refused(server));
            socket.send(b"x").unwrap();
            socket.recv(&mut [0; 1]).is_ok()
        },
        "packets to pass",
    );
    kill(process, Signal::SIGCONT).unwrap();
    wait_for(
        || round_trip(address) >= Duration::from_millis(100),
        "packets to be held again",
    );
    assert!(is_refused(server));
    let summary = applied.end();
    assert!(
        summary.contains("warning: packets were not delayed for"),
        "{summary}"
    );
    assert!(
        summary.contains("packets were not delayed because"),
        "{summary}"
    );
}

#[test]
fn idle_connections_are_reset_when_the_service_goes_down() {
    enter_fresh();
    for host in ["127.0.0.1:7001", "[::1]:7001"] {
        let server = tcp_echo(TcpListener::bind(host).unwrap());
        let mut open: Vec<_> = (0..3)
            .map(|_| TcpStream::connect(server).unwrap())
            .collect();
        let applied = AppliedRules::begin(&["tcp:7001 down at=300ms"], "--scope host");
        for stream in &mut open {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let error = stream.read_exact(&mut [0; 1]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
        applied.end();
    }
}

/// Both ends of a terminal.
fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: two numbers to be written, which are descriptors of our own then.
    unsafe {
        let made = libc::openpty(
            &raw mut master,
            &raw mut slave,
            none,
            none.cast(),
            none.cast(),
        );
        assert_eq!(made, 0, "a terminal");
        let ends = [master, slave].map(|end| {
            libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC);
            OwnedFd::from_raw_fd(end)
        });
        ends.into()
    }
}

#[test]
fn a_closed_terminal_ends_the_run() {
    enter_fresh();
    let (master, slave) = terminal();
    let mut command = fault();
    command
        .args(["run", "--allow-unfired", "-r", "tcp:7001 loss=1%", "--"])
        .args(["sh", "-c", "echo ready; exec sleep 1000"])
        .stdin(slave.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(slave.try_clone().unwrap());
    // SAFETY: two system calls.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    drop((command, slave));
    let mut ready = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    drop(master);
    let mut ended = None;
    wait_for(
        || {
            ended = child.try_wait().unwrap();
            ended.is_some()
        },
        "fault to end with its terminal",
    );
    assert_eq!(ended.unwrap().code(), Some(128 + libc::SIGHUP));
}

#[test]
fn without_descriptors_nothing_is_left_and_nothing_panics() {
    enter_fresh();
    for limit in (8..60).step_by(3) {
        let mut command = fault();
        command.args([
            "run",
            "--allow-unfired",
            "-r",
            "tcp:7001 delay=1ms",
            "--",
            "true",
        ]);
        // SAFETY: one system call.
        unsafe {
            command.pre_exec(move || {
                let few = libc::rlimit {
                    rlim_cur: limit,
                    rlim_max: limit,
                };
                if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        fails_cleanly(&mut command, limit);
    }
}

/// It succeeds, or says why it can't and leaves no cgroup.
fn fails_cleanly(command: &mut Command, limit: u64) {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let program = child.id();
    let done = child.wait_with_output().unwrap();
    let stderr_text = String::from_utf8_lossy(&done.stderr);
    let code = done.status.code();
    assert!(
        matches!(code, Some(0 | 125)),
        "{limit}: {code:?} {stderr_text}"
    );
    assert_eq!(cgroups_of(program), "", "{limit}: {stderr_text}");
}

/// A cgroup that limits how many threads there are in it. Removed with this.
struct Few(PathBuf);

impl Few {
    /// Nothing where the controller is not to be had.
    fn new() -> Option<Self> {
        let version_1 = PathBuf::from("/sys/fs/cgroup/pids");
        let root = if version_1.exists() {
            version_1
        } else {
            let root = hierarchy()?.path().to_owned();
            std::fs::write(root.join("cgroup.subtree_control"), "+pids").ok()?;
            root
        };
        let folder = root.join(format!("few-threads-{}", std::process::id()));
        std::fs::create_dir(&folder).ok()?;
        Some(Self(folder))
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{} was not removed: {error}", self.0.display());
        }
    }
}

#[test]
fn without_threads_nothing_is_left_and_nothing_panics() {
    let Some(few) = Few::new() else {
        eprintln!("skipped: there is no controller of pids");
        return;
    };
    enter_fresh();
    for limit in 1..=10 {
        std::fs::write(few.0.join("pids.max"), limit.to_string()).unwrap();
        let procs = std::fs::OpenOptions::new()
            .write(true)
            .open(few.0.join("cgroup.procs"));
        let mut procs = procs.unwrap();
        let mut command = fault();
        command.args(["run", "--allow-unfired", "-r", "7000 delay=5ms"]);
        command.args(["-r", "tcp:7001 latency=5ms", "--", "true"]);
        // SAFETY: one system call.
        unsafe { command.pre_exec(move || procs.write_all(b"0")) };
        fails_cleanly(&mut command, limit);
    }
}

/// Datagrams and connections that no rule is about, until it is stopped; each is answered once.
struct Bystander {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Bystander {
    fn start() -> Self {
        let datagrams = udp_echo(UdpSocket::bind("127.0.0.1:7100").unwrap());
        let streams = tcp_echo(TcpListener::bind("127.0.0.1:7100").unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (first, second) = (Arc::clone(&stop), Arc::clone(&stop));
        let by_datagrams = std::thread::spawn(move || {
            let socket = udp_client(datagrams);
            let mut number = 0_u64;
            while !first.load(Ordering::Relaxed) {
                number += 1;
                socket.send_to(&number.to_ne_bytes(), datagrams).unwrap();
                let mut answer = [0; 8];
                socket.recv(&mut answer).expect("no datagram is lost");
                assert_eq!(u64::from_ne_bytes(answer), number, "each comes once");
            }
            number
        });
        let by_streams = std::thread::spawn(move || {
            let mut number = 0_u64;
            while !second.load(Ordering::Relaxed) {
                number += 1;
                let mut stream = TcpStream::connect(streams).expect("no connection is refused");
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&[7; 3000]).unwrap();
                stream
                    .read_exact(&mut [0; 3000])
                    .expect("no connection is reset");
            }
            number
        });
        Self {
            stop,
            threads: vec![by_datagrams, by_streams],
        }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let counts = self
            .threads
            .into_iter()
            .map(|one| one.join().expect("undisturbed"));
        counts.sum()
    }
}

/// Numbers that differ from run to run; the first is printed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % end
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// As in a shell script that starts it in the background, where SIGINT is switched off.
#[test]
fn an_injection_in_the_background_is_interrupted_before_it_is_set_up() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.yaml");
    mkfifo(&rules, Mode::S_IRWXU).unwrap();
    let mut command = fault();
    // SAFETY: one system call between fork and exec.
    unsafe { command.pre_exec(|| Ok(signal(Signal::SIGINT, SigHandler::SigIgn).map(drop)?)) };
    let mut injection = command.args(["inject", "-f"]).arg(&rules).spawn().unwrap();
    // Opened when there is who reads it.
    let _reading = std::fs::File::create(&rules).unwrap();
    kill(Pid::from_raw(injection.id().cast_signed()), Signal::SIGINT).unwrap();
    let ended = injection.wait().unwrap();
    assert_eq!(ended.signal(), Some(Signal::SIGINT as i32));
}

#[test]
fn twenty_random_instances_do_not_interfere() {
    /// Overlapping, and none about port 7100.
    const RULES: [&str; 10] = [
        "udp:7000 loss=50%",
        "udp:7000-7002 delay=5ms~3ms",
        "tcp:7000-7003 reject",
        "udp:7001 duplicate=50%",
        "udp:7000-7003 rate=1mbit",
        "tcp:7001 down",
        "7002 blackhole",
        "udp:7002 corrupt=50%",
        "tcp:7003 delay=20ms",
        "tcp:7002-7003 latency=5ms",
    ];
    let seconds = std::env::var("FAULT_CHAOS_SECONDS").map_or(20, |text| text.parse().unwrap());
    enter_fresh();
    hide_run();
    let servers: Vec<_> = (7000..7004)
        .map(|port| {
            tcp_echo(TcpListener::bind(("127.0.0.1", port)).unwrap());
            udp_echo(UdpSocket::bind(("127.0.0.1", port)).unwrap())
        })
        .collect();
    let seed = std::process::id().into();
    eprintln!("seed {seed}");
    let mut dice = Dice(seed);
    // Somebody else's, which stays: when the kernel adds or removes one it drops what is on its way out just then.
    let done = Command::new("tc")
        .args(["qdisc", "add", "dev", "lo", "clsact"])
        .status();
    assert!(done.unwrap().success());
    let bystander = Bystander::start();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut running: Vec<std::process::Child> = Vec::new();
    let mut begun = 0;
    let noise = UdpSocket::bind("127.0.0.1:0").unwrap();
    noise.set_nonblocking(true).unwrap();
    while Instant::now() < end {
        for server in &servers {
            // What the rules are about: whatever becomes of it.
            let _lost = noise.send_to(b"noise", server);
            let opened = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            opened.set_nonblocking(true).unwrap();
            let _refused = opened.connect(&(*server).into());
        }
        if running.len() < 20 {
            let mut command = fault();
            command.args(["inject", "--force"]);
            for _ in 0..=dice.below(2) {
                command.args(["-r", dice.pick(&RULES)]);
            }
            command.args(["--attach", dice.pick(&["clsact", "tcx"])]);
            command.stderr(Stdio::null());
            running.push(command.spawn().unwrap());
            begun += 1;
        }
        if dice.below(3) == 0 || running.len() == 20 {
            let index = usize::try_from(dice.below(running.len() as u64)).unwrap();
            let mut chosen = running.swap_remove(index);
            let pid = Pid::from_raw(chosen.id().cast_signed());
            let how = [Signal::SIGINT, Signal::SIGKILL, Signal::SIGTERM];
            kill(pid, how[usize::try_from(dice.below(3)).unwrap()]).unwrap();
            chosen.wait().unwrap();
        }
        if dice.below(10) == 0 {
            clean_elsewhere();
        }
    }
    for mut child in running {
        let pid = Pid::from_raw(child.id().cast_signed());
        kill(pid, Signal::SIGKILL).unwrap();
        child.wait().unwrap();
    }
    let exchanges = bystander.end();
    eprintln!("{begun} instances, {exchanges} exchanges beside them");
    assert!(fault().arg("clean").status().unwrap().success());
    assert_eq!(
        noted(),
        "clsact\n",
        "somebody else's stays, and nothing else"
    );
}

/// Starts a program, and kills it as one of its threads begins a system call, the `last` of all. Gives how many there were: fewer where it
/// has ended by itself.
fn kill_at(command: &mut Command, last: u64) -> (u32, u64) {
    const OPTIONS: i32 =
        libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    const SYSTEM_CALL: i32 = libc::SIGTRAP | 0x80;
    // SAFETY: one system call, which stops the program when it has begun.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let program = command.spawn().unwrap().id();
    let leader = program.cast_signed();
    let (mut calls, mut inside, mut is_known) = (0, HashSet::new(), false);
    loop {
        let mut status = 0;
        // SAFETY: the status is ours. Children of other tests' threads are left to them.
        let thread =
            unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        assert!(thread > 0, "{}", std::io::Error::last_os_error());
        if !libc::WIFSTOPPED(status) {
            if thread == leader {
                return (program, calls);
            }
            continue;
        }
        if !is_known {
            // SAFETY: it has stopped.
            let set = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, leader, 0, OPTIONS) };
            assert_eq!(set, 0);
            is_known = true;
        }
        let signal = libc::WSTOPSIG(status);
        if signal == SYSTEM_CALL && !inside.remove(&thread) {
            inside.insert(thread);
            calls += 1;
            if calls == last {
                kill(Pid::from_raw(leader), Signal::SIGKILL).unwrap();
            }
        }
        let is_ours = [SYSTEM_CALL, libc::SIGTRAP, libc::SIGSTOP].contains(&signal);
        let passed_on = if is_ours { 0 } else { signal };
        // SAFETY: it has stopped. One that has been killed meanwhile does not go on.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, thread, 0, passed_on) };
    }
}

fn said(words: &[&str]) -> String {
    let done = Command::new(words[0]).args(&words[1..]).output().unwrap();
    String::from_utf8(done.stdout).unwrap()
}

/// What is left of what instances note in journals, and the journals.
fn noted() -> String {
    let mut left = said(&["find", "/run/fault", "-type", "f"]);
    left += &said(&["tc", "filter", "show", "dev", "lo", "egress"]);
    left += &said(&["ip", "-o", "link", "show", "type", "tun"]);
    if said(&["tc", "qdisc", "show", "dev", "lo"]).contains("clsact") {
        left += "clsact\n";
    }
    if settings() != "00" {
        left += "settings\n";
    }
    left
}

/// The cgroups of a killed instance, which `fault clean` finds by their names.
fn cgroups_of(program: u32) -> String {
    let name = format!("fault-{program}-*");
    said(&["find", "/sys/fs/cgroup", "-name", &name])
}

/// `FAULT_KILLS` kills, or one at each system call where that is `all`. The next run removes what is noted, and `fault clean` all.
#[test]
fn a_kill_at_any_system_call_leaves_nothing_that_is_not_removed() {
    let kills = std::env::var("FAULT_KILLS").unwrap_or_else(|_| "20".to_owned());
    enter_fresh();
    hide_run();
    let killed_at = |last| {
        let mut command = fault();
        command.args(["run", "--allow-unfired", "--attach", "clsact"]);
        command.args(["-r", "udp:7000 delay=1ms", "--", "true"]);
        kill_at(command.stderr(Stdio::null()), last)
    };
    let (program, all) = killed_at(u64::MAX);
    assert_eq!(noted() + &cgroups_of(program), "");
    let kills = if kills == "all" {
        all
    } else {
        kills.parse().unwrap()
    };
    let stride = all.div_ceil(kills);
    let first = u64::from(std::process::id()) % stride;
    eprintln!("at every {stride}th of {all} system calls, from {first} on");
    let mut removed = 0;
    for (round, last) in (first.max(1)..all)
        .step_by(usize::try_from(stride).unwrap())
        .enumerate()
    {
        let (program, _) = killed_at(last);
        removed += u64::from(!noted().is_empty());
        if round % 2 == 1 {
            let rule = ["udp:7000 delay=1ms"];
            // The command may have been about to start, with files of the killed instance open.
            wait_for(
                || {
                    let done = run(&rule, "--allow-unfired", &["true"]);
                    assert!(done.status.success(), "{last}: {done:?}");
                    noted().is_empty()
                },
                &format!("the next run to remove what a kill at {last} has left"),
            );
        }
        wait_for(
            || {
                fault().arg("clean").output().unwrap().status.success()
                    && (noted() + &cgroups_of(program)).is_empty()
            },
            &format!("`fault clean` to remove what a kill at {last} has left"),
        );
    }
    assert!(removed > 0, "there was nothing to remove");
}
