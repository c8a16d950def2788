//! Signals for `fault` that are meant for CMD, from processes and from a real terminal.
//!
//! Signals go to a whole process, so each case runs in a process of its own: this test program
//! again, as a stand-in for `fault run`, with [`WRAPPED`] as its command.
use fault_user::sys::process::command::CommandSpec;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Set for the stand-in: the shell script that it runs.
const WRAPPED: &str = "FAULT_TEST_WRAPPED";

/// Long enough for anything that works, short enough for a hang to be seen.
const LIMIT: Duration = Duration::from_secs(20);

/// Counts each signal it gets, and after the first one ends on a line from standard input, with that count. The
/// shell looks for signals between commands: one that comes in the instant before `read` blocks is not seen until there
/// is a line, hence the loop. A second signal makes `read` fail as the end of input does, so a few failures are
/// looked over.
fn script(signal: Signal) -> String {
    format!(
        "trap 'count=$((count + 1)); echo got $count' {}; echo ready; \
         until test $count; do sleep 0.01; done; \
         until read -r line || test $((tries += 1)) = 9; do :; done; echo line $line; exit $((count + 8))",
        signal.as_str().trim_start_matches("SIG")
    )
}

/// Not a test of its own: what the others start.
#[test]
fn stand_in() {
    let Ok(script) = std::env::var(WRAPPED) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let code = runtime.block_on(async {
        let words = ["sh", "-c", &script].map(Into::into).to_vec();
        let prepared = CommandSpec::new(words, None).unwrap().resolve().unwrap();
        let mut running = prepared.spawn(None).unwrap();
        println!("spawned");
        running.wait().await.unwrap().exit_code()
    });
    // The harness would turn it into 0 or 101.
    std::process::exit(code.into());
}

fn stand_in_command(script: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "signals::stand_in",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(WRAPPED, script);
    // Whoever runs the tests in the background of a script has SIGINT and SIGQUIT switched off for them, and nohup(1)
    // SIGHUP.
    // SAFETY: signal(2) alone.
    unsafe {
        command.pre_exec(|| {
            for signal in [nix::libc::SIGINT, nix::libc::SIGQUIT, nix::libc::SIGHUP] {
                nix::libc::signal(signal, nix::libc::SIG_DFL);
            }
            Ok(())
        });
    }
    command
}

fn wait_for(lines: &mut impl BufRead, wanted: &str) {
    let mut seen = String::new();
    while !seen.trim_end().ends_with(wanted) {
        seen.clear();
        let count = lines.read_line(&mut seen).unwrap();
        assert_ne!(count, 0, "it ended before it said `{wanted}`");
    }
}

/// A stand-in, leader of a process group, that a failing or hanging test doesn't leave behind. Its
/// command ends with its input.
struct StandIn {
    child: Child,
    /// Dropped with the rest, which ends the watchdog.
    _done: mpsc::Sender<()>,
}

impl StandIn {
    fn start(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        let group = Pid::from_raw(-child.id().cast_signed());
        let (done, watched) = mpsc::channel();
        std::thread::spawn(move || {
            if watched.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                kill(group, Signal::SIGKILL).expect("it hangs, so it is there");
            }
        });
        Self { child, _done: done }
    }
}

impl Deref for StandIn {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for StandIn {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // Does nothing to one that was waited for.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn start(script: &str) -> (StandIn, BufReader<ChildStdout>) {
    let mut command = stand_in_command(script);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = StandIn::start(command.process_group(0));
    let mut said = BufReader::new(child.stdout.take().unwrap());
    wait_for(&mut said, "ready");
    (child, said)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

#[test]
fn signals_of_processes_are_passed_on_once() {
    let signals = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ];
    for signal in signals {
        let (mut child, mut said) = start(&script(signal));
        kill(pid(&child), signal).unwrap();
        wait_for(&mut said, "got 1");
        child.stdin.take().unwrap().write_all(b"end\n").unwrap();
        wait_for(&mut said, "line end");
        assert_eq!(child.wait().unwrap().code(), Some(9), "{signal}");
    }
}

#[test]
fn a_signal_that_kills_the_command_is_its_exit_code() {
    let (mut child, _said) = start("echo ready; read -r line");
    // Kept open: wait would close it, and so end the command's own way.
    let _input = child.stdin.take();
    kill(pid(&child), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn the_command_survives_a_killed_stand_in() {
    let (mut child, mut said) = start("echo ready; read -r line; echo line $line");
    let mut input = child.stdin.take().unwrap();
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    input.write_all(b"still here\n").unwrap();
    wait_for(&mut said, "line still here");
}

#[test]
fn what_nohup_switched_off_stays_off() {
    let mut command = stand_in_command(
        "grep SigIgn /proc/self/status; echo ready; read -r line; echo line $line; exit 4",
    );
    // SAFETY: signal(2) alone.
    unsafe {
        command.pre_exec(|| {
            nix::libc::signal(nix::libc::SIGHUP, nix::libc::SIG_IGN);
            Ok(())
        });
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = StandIn::start(command.process_group(0));
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut ignored = String::new();
    while !ignored.contains("SigIgn") {
        ignored.clear();
        assert_ne!(said.read_line(&mut ignored).unwrap(), 0);
    }
    let (_, mask) = ignored.trim().rsplit_once('\t').unwrap();
    let mask = u64::from_str_radix(mask, 16).unwrap();
    let is_ignored = |signal: Signal| mask >> (signal as i32 - 1) & 1 == 1;
    assert!(is_ignored(Signal::SIGHUP), "{ignored}");
    // Rust ignores it in every program of its own.
    assert!(!is_ignored(Signal::SIGPIPE), "{ignored}");
    wait_for(&mut said, "ready");
    kill(pid(&child), Signal::SIGHUP).unwrap();
    child.stdin.take().unwrap().write_all(b"on\n").unwrap();
    wait_for(&mut said, "line on");
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

/// The stand-in in a session of its own with a new terminal, in its foreground.
fn start_on_terminal(script: &str) -> (StandIn, File) {
    let pair = openpty(None, None).unwrap();
    let (terminal, slave) = (File::from(pair.master), File::from(pair.slave));
    let mut command = stand_in_command(script);
    command
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(Stdio::null());
    let slave_fd = slave.as_raw_fd();
    let terminal_fd = terminal.as_raw_fd();
    // SAFETY: system calls on descriptors that are open in the child.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            if nix::libc::ioctl(slave_fd, nix::libc::TIOCSCTTY, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            nix::libc::close(slave_fd);
            nix::libc::close(terminal_fd);
            Ok(())
        });
    }
    (StandIn::start(&mut command), terminal)
}

/// Waits until the command is ready and the stand-in knows that it has started it: a Ctrl-C in the
/// instant between the two is passed on rather than lost, and so may come twice.
fn wait_for_start(terminal: &mut File) {
    wait_for_all(terminal, &["ready", "spawned"]);
}

fn wait_on_terminal(terminal: &mut File, wanted: &str) -> String {
    wait_for_all(terminal, &[wanted])
}

/// Reads the terminal until it has shown all of `wanted`.
fn wait_for_all(terminal: &mut File, wanted: &[&str]) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 256];
    while !wanted.iter().all(|wanted| seen.contains(wanted)) {
        let count = terminal.read(&mut buffer).unwrap_or_else(|error| {
            panic!("{error} before {wanted:?}; seen: {seen}");
        });
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    seen
}

#[test]
fn ctrl_c_on_the_terminal_reaches_the_command_once() {
    let (mut child, mut terminal) = start_on_terminal(&script(Signal::SIGINT));
    wait_for_start(&mut terminal);
    terminal.write_all(b"\x03").unwrap();
    wait_on_terminal(&mut terminal, "got 1");
    // And it may read from the terminal.
    terminal.write_all(b"end\n").unwrap();
    wait_on_terminal(&mut terminal, "line end");
    assert_eq!(child.wait().unwrap().code(), Some(9), "8 and one Ctrl-C");
}

#[test]
fn ctrl_c_is_not_passed_on_to_a_command_that_left_the_terminals_group() {
    // In a session of its own the terminal's SIGINT can only come by way of the stand-in. SIGUSR1
    // is passed on, and the kernel delivers it after a SIGINT that is pending too. The loop: see `script`.
    let script = "exec setsid sh -c 'trap \"echo interrupted\" INT; trap \"echo usr; seen=1\" USR1; \
                  echo ready; until test $seen; do sleep 0.01; done; read -r line; exit 5'";
    let (mut child, mut terminal) = start_on_terminal(script);
    wait_for_start(&mut terminal);
    terminal.write_all(b"\x03").unwrap();
    // The terminal shows ^C once it has sent the signal.
    wait_on_terminal(&mut terminal, "^C");
    kill(pid(&child), Signal::SIGUSR1).unwrap();
    let seen = wait_on_terminal(&mut terminal, "usr");
    assert!(!seen.contains("interrupted"), "{seen}");
    terminal.write_all(b"end\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn ctrl_z_stops_both_and_both_go_on() {
    let (mut child, mut terminal) = start_on_terminal("echo ready; read -r line; exit 6");
    wait_for_start(&mut terminal);
    // A process group whose session has no other one is orphaned and would not be stopped by the
    // terminal, so this sends what the terminal would, as a signal that can't be ignored.
    kill(Pid::from_raw(-child.id().cast_signed()), Signal::SIGSTOP).unwrap();
    let flags = nix::sys::wait::WaitPidFlag::WUNTRACED;
    let stopped = nix::sys::wait::waitpid(pid(&child), Some(flags)).unwrap();
    assert!(
        matches!(stopped, nix::sys::wait::WaitStatus::Stopped(..)),
        "{stopped:?}"
    );
    kill(Pid::from_raw(-child.id().cast_signed()), Signal::SIGCONT).unwrap();
    terminal.write_all(b"end\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
}
