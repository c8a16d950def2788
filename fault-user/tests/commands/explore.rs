//! `fault explore` on small services with a classic mistake each, and on their fixed twins.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::support::echo::tcp_echo;
use crate::support::place::{
    Peer, enter_fresh, fault, has_bash, has_tcx, hide_run, hierarchy, wait_for,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/explore")
}

/// A process of services; killed when this is dropped.
struct Services(Child);

impl Services {
    /// Starts them in this thread's network namespace.
    fn start() -> Self {
        Self::of("server")
    }

    /// Starts one of the examples, and waits until it is ready.
    fn of(name: &str) -> Self {
        Self::by(Command::new("python3"), name)
    }

    /// The same in a network namespace.
    fn inside(namespace: &Peer, name: &str) -> Self {
        let mut enter = Command::new("ip");
        enter.args(["netns", "exec", &namespace.name, "python3"]);
        Self::by(enter, name)
    }

    fn by(mut python: Command, name: &str) -> Self {
        let mut server = python
            .arg(examples().join(format!("{name}.py")))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 runs");
        let mut line = String::new();
        let mut output = BufReader::new(server.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(server)
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        ended.expect("the services end");
    }
}

/// Whether the examples can run here, in a fresh network namespace then.
fn services() -> Option<Services> {
    hierarchy()?;
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("skipped: there is no python3");
        return None;
    }
    enter_fresh();
    Some(Services::start())
}

/// Explores an example; gives its report, and what it printed.
fn explore(name: &str, options: &[&str]) -> (Value, Output) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let output = fault()
        .args(["explore", "--seed", "1", "--report"])
        .arg(folder)
        .args(options)
        .args(["--", "python3"])
        .arg(examples().join(format!("{name}.py")))
        .current_dir(examples())
        .output()
        .unwrap();
    let text = std::fs::read(folder.join("report.json"));
    let text = text.unwrap_or_else(|_| panic!("no report: {}", stderr_text(&output)));
    (serde_json::from_slice(&text).unwrap(), output)
}

fn stderr_text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{out}\n{err}")
}

/// An example has the mistake that a fault shows, with this verdict, and its twin survives all faults. Most of the twins'
/// time is waiting, so several run at once.
fn finds(name: &str, options: &[&str], fault: &str, verdict: &str) {
    finds_by("4", name, options, fault, verdict);
}

/// The same where runs change what others see: `jobs` is `1`.
fn finds_by(jobs: &str, name: &str, options: &[&str], fault: &str, verdict: &str) {
    let Some(_services) = services() else {
        return;
    };
    let wrong = ["--runs", "1", "--no-shrink", "--faults", fault];
    // What recovers from an outage is waited for as long as without it.
    let limit: &[&str] = if verdict == "no-recovery" {
        &[]
    } else {
        &TIMEOUT[..]
    };
    let (report, output) = explore(name, &[&wrong, limit, options].concat());
    assert_eq!(output.status.code(), Some(121), "{}", stderr_text(&output));
    let cells = report["cells"].as_array().unwrap();
    let found = cells
        .iter()
        .any(|cell| cell["verdict"] == verdict && cell["is_failure"] == true);
    assert!(found, "{}", stderr_text(&output));
    let right = ["--runs", "1", "--no-shrink", "--jobs", jobs];
    let (_, output) = explore(&format!("{name}_fixed"), &[&right, options].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
}

/// Long enough for a start of python on a busy machine: what hangs is waited for twice. A twin has all the time that it
/// needs.
const TIMEOUT: [&str; 2] = ["--timeout", "8s"];

#[test]
fn no_timeout() {
    finds("no_timeout", &[], "silent-later", "hung");
}

#[test]
fn endless_retries() {
    finds("endless_retries", &[], "refused", "hung");
}

#[test]
fn dead_pool() {
    finds("dead_pool", &[], "outage", "no-recovery");
}

#[test]
fn gives_up() {
    finds("gives_up", &[], "outage", "no-recovery");
}

#[test]
fn partial() {
    finds("partial", &[], "cut", "failed");
}

#[test]
fn double_write() {
    let invariant = [
        "--before",
        "python3 orders.py reset",
        "--check",
        "python3 orders.py check",
    ];
    finds_by("1", "double_write", &invariant, "silent-later", "broken");
}

#[test]
fn error_response() {
    finds("error_response", &[], "error", "failed");
}

#[test]
fn fallback() {
    finds("fallback", &[], "silent", "hung");
}

#[test]
fn resolved_once() {
    let begin_anew = ["--before", "python3 orders.py reset"];
    finds_by("1", "resolved_once", &begin_anew, "refused", "failed");
}

#[test]
fn lock_held() {
    finds("lock_held", &[], "silent-later", "failed");
}

#[test]
fn required_optional() {
    finds("required_optional", &[], "refused", "failed");
}

#[test]
fn cached_error() {
    finds("cached_error", &[], "outage", "no-recovery");
}

#[test]
fn the_smallest_delay_is_found() {
    let Some(_services) = services() else {
        return;
    };
    let script = "import socket\n\
        s = socket.create_connection(('127.0.0.1', 7002), timeout=0.7)\n\
        s.sendall(b'PING\\n')\n\
        s.recv(100)";
    let folder = tempfile::tempdir().unwrap();
    let output = fault()
        .args(["explore", "--faults", "slow", "--report"])
        .arg(folder.path())
        .args(["--", "python3", "-c", script])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(121), "{}", stderr_text(&output));
    let report = std::fs::read(folder.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let smallest = &report["cells"][0]["smallest"];
    let from_ms = smallest["from_ms"].as_u64().unwrap();
    assert!((630..=770).contains(&from_ms), "{}", stderr_text(&output));
    let rule = smallest["rules"][0].as_str().unwrap();
    assert!(rule.starts_with("tcp:7002 delay="), "{rule}");
}

/// A command in bash that explore is given, with options before it.
fn bash(options: &[&str], script: &str) -> Output {
    fault()
        .arg("explore")
        .args(options)
        .args(["--", "bash", "-c", script])
        .output()
        .unwrap()
}

const EXCHANGE: &str = "exec 3<>/dev/tcp/127.0.0.1/7000 && echo hi >&3 && read -r x <&3";

#[test]
fn what_can_not_be_explored_is_told_in_one_line() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let cases: [(&[&str], &str, i32, &str); 8] = [
        (&[], "echo no; exit 3", 125, "ends with exit code 3"),
        (&[], "true", 125, "opened no connection"),
        (
            &["--timeout", "500ms"],
            "sleep 60",
            125,
            "does not end in time (--timeout)",
        ),
        (
            &["--faults", "refusd"],
            EXCHANGE,
            2,
            "did you mean `refused`?",
        ),
        (
            &["--only", "redis"],
            EXCHANGE,
            2,
            "--only: `redis` is part of no dependency",
        ),
        (
            &["--before", "echo full; false"],
            EXCHANGE,
            125,
            "--before failed: exit code 1: full",
        ),
        (
            &["--check", "false"],
            EXCHANGE,
            125,
            "--check fails without faults",
        ),
        (&["--timeout", "5"], EXCHANGE, 2, "--timeout: "),
    ];
    for (options, script, code, part) in cases {
        let output = bash(options, script);
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        let errors = text.lines().filter(|line| line.contains("fault: error: "));
        let errors: Vec<_> = errors.collect();
        assert!(
            errors.len() == 1 && errors[0].contains(part),
            "`{part}` is not in: {text}"
        );
    }
}

#[test]
fn a_plan_runs_nothing_under_faults() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let ran = tempfile::NamedTempFile::new().unwrap();
    let script = format!("echo x >> {}; {EXCHANGE}", ran.path().display());
    let output = bash(&["--plan", "--faults", "silent,refused"], &script);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
    let plan = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        plan,
        "  tcp:7000 refused: tcp:7000 reject\n  tcp:7000 silent: tcp:7000 blackhole\n"
    );
    assert_eq!(std::fs::read_to_string(ran.path()).unwrap(), "x\nx\n");
}

#[test]
fn processes_that_are_left_behind_are_killed_and_told_of() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let script = format!("sleep 1000 & {EXCHANGE}");
    let output = bash(&["--plan"], &script);
    let text = stderr_text(&output);
    assert!(text.contains("leaves processes behind (1)"), "{text}");
}

#[test]
fn what_cannot_be_restored_is_told_and_does_not_replace_the_outcome() {
    let Some(hierarchy) = hierarchy().filter(|_| has_bash()) else {
        return;
    };
    enter_fresh();
    hide_run();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let mounted = hierarchy.path().display();
    let remount = |how: &str| format!("mount -o remount,bind,{how} {mounted}");
    // In our own mount namespace: from then on no cgroup can be removed there.
    let script = format!("{EXCHANGE} && {}", remount("ro"));
    let output = bash(&["--plan", "--runs", "1"], &script);
    let writable = remount("rw");
    let mut shell = std::process::Command::new("sh");
    assert!(shell.args(["-c", &writable]).status().unwrap().success());
    assert!(fault().arg("clean").status().unwrap().success());
    let text = stderr_text(&output);
    assert!(
        text.contains("warning: not everything was restored: "),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(0), "{text}");
}

/// Explores with a file of accepted failures: `refused` fails.
fn accepting(file: &Path, script: &str) -> Output {
    let file = file.to_str().unwrap();
    let options = [
        "--runs",
        "1",
        "--no-shrink",
        "--faults",
        "refused",
        "--accept",
        file,
    ];
    bash(&options, script)
}

#[test]
fn accepted_failures_do_not_fail_again_and_worse_ones_do() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::canonicalize(folder.path())
        .unwrap()
        .join("accept.toml");
    let told = |output: &Output, code: i32, part: &str| {
        let text = stderr_text(output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "`{part}` is not in: {text}");
    };
    told(&accepting(&file, EXCHANGE), 0, "0 failures, 1 accepted");
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.contains("verdict = \"failed\""), "{written}");
    told(
        &accepting(&file, EXCHANGE),
        0,
        "accepted failures without a reason: 1",
    );
    let survives = format!("({EXCHANGE}) || true");
    told(&accepting(&file, &survives), 0, "(better than accepted)");
    let hangs = format!("({EXCHANGE}) || sleep 1000");
    let file_name = file.to_str().unwrap();
    let worse = [
        "--timeout",
        "3s",
        "--no-shrink",
        "--faults",
        "refused",
        "--accept",
        file_name,
    ];
    told(&bash(&worse, &hangs), 121, "(worse than accepted)");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);

    let other = written.replace("tcp:7000", "tcp:7777");
    std::fs::write(&file, other).unwrap();
    told(
        &accepting(&file, EXCHANGE),
        2,
        "does not talk to `tcp:7777`",
    );
    std::fs::write(&file, "accepted = 1").unwrap();
    told(&accepting(&file, EXCHANGE), 2, "accept.toml:1: ");
    let nowhere = folder.path().join("none/accept.toml");
    told(&accepting(&nowhere, EXCHANGE), 2, "No such file");
}

/// A service that answers each request as Redis answers PING.
fn redis(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                while let Ok(1..) = stream.read(&mut [0; 100]) {
                    stream.write_all(b"+PONG\r\n").unwrap();
                }
            });
        }
    });
}

#[test]
fn a_service_answers_with_errors_of_its_own() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    redis(TcpListener::bind("127.0.0.1:6379").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    // It knows what to do when Redis is loading, and not that a replica takes no writes.
    let script = "exec 3<>/dev/tcp/127.0.0.1/6379; printf '*1\\r\\n$4\\r\\nPING\\r\\n' >&3; read -r x <&3; \
        echo \"$x\"; [[ $x = +PONG* || $x = -LOADING* ]]";
    let options = [
        "--runs",
        "1",
        "--no-shrink",
        "--faults",
        "busy,conflict,read-only",
    ];
    let report = ["--report", dir.to_str().unwrap()];
    let output = bash(&[&options[..], &report].concat(), script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    let report = std::fs::read(dir.join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let cells = report["cells"].as_array().unwrap().iter();
    let cells: Vec<_> = cells
        .map(|cell| ["fault", "verdict"].map(|name| cell[name].as_str().unwrap()))
        .collect();
    assert_eq!(
        cells,
        [["busy", "survived"], ["read-only", "failed"]],
        "{text}"
    );
    assert!(text.contains("output: -READONLY "), "{text}");
}

#[test]
fn an_interrupted_exploration_goes_on() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let dir = dir.to_str().unwrap();
    let ran = tempfile::NamedTempFile::new().unwrap();
    let script = format!("echo x >> {}; {EXCHANGE}; true", ran.path().display());
    let options = [
        "--runs",
        "1",
        "--no-shrink",
        "--faults",
        "refused,refused-later,cut",
    ];
    // Two of three, as if it had been interrupted.
    let first = bash(
        &[&options[..], &["--seed", "5", "--report", dir]].concat(),
        &script,
    );
    assert_eq!(first.status.code(), Some(0), "{}", stderr_text(&first));
    let report = Path::new(dir).join("report.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    json["cells"].as_array_mut().unwrap().remove(1);
    std::fs::write(&report, json.to_string()).unwrap();
    std::fs::write(ran.path(), "").unwrap();
    let resume = [&options[..], &["--resume", dir]].concat();
    let second = bash(&resume, &script);
    let text = stderr_text(&second);
    assert_eq!(second.status.code(), Some(0), "{text}");
    assert!(text.contains("fault: seed 5"), "{text}");
    assert!(
        text.contains("the report already has the results of 2 experiments"),
        "{text}"
    );
    assert!(text.contains("3 experiments: 0 failures"), "{text}");
    assert_eq!(std::fs::read_to_string(ran.path()).unwrap(), "x\nx\n");
    let json: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(json["cells"].as_array().unwrap().len(), 3);

    let cases: [(&[&str], &str); 3] = [
        (
            &["--resume", "/none"],
            "--resume: can't read /none/report.json",
        ),
        (&["--resume", dir], "is about another command"),
        (&["--resume", dir, "--report", dir], "cannot be used with"),
    ];
    for (options, part) in cases {
        let output = bash(options, "true");
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn jobs_run_beside_each_other() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    // It can't run beside itself.
    let alone = "exec 9>/dev/tcp/127.0.0.1/7000; mkdir LOCK || exit 7; sleep 3; rmdir LOCK";
    let alone = alone.replace("LOCK", &format!("{dir}/lock"));
    let options = ["--runs", "1", "--jobs", "2", "--faults", "cut,corrupt"];
    let output = bash(&options, &alone);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(
        text.contains("2 at once (--jobs) the command ends with exit code 7"),
        "{text}"
    );
}

/// The cgroups that `fault` of this number has made.
fn cgroups(pid: u32) -> usize {
    let root = hierarchy().unwrap();
    let own = root.of(Pid::this()).unwrap();
    let prefix = format!("fault-{pid}-");
    let folders = [own.path(), root.path()].map(|folder| std::fs::read_dir(folder).unwrap());
    let names = folders
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with(&prefix))
        .count()
}

/// Whether something is connecting to 127.0.0.1:7000.
fn hangs() -> bool {
    let list = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    list.contains("0100007F:1B58 02")
}

/// Starts a long exploration, and waits until a fault acts.
fn hanging(ran: &Path) -> Child {
    let script = format!("{EXCHANGE}; echo x >> {}", ran.display());
    let child = fault()
        .args([
            "explore",
            "--runs",
            "1",
            "--faults",
            "silent",
            "--timeout",
            "60s",
        ])
        .args(["--", "bash", "-c", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let has_run = || std::fs::read_to_string(ran).is_ok_and(|text| text == "x\n");
    wait_for(has_run, "the run without faults");
    wait_for(hangs, "the run under the fault");
    child
}

#[test]
fn ctrl_c_tells_what_is_done_and_a_kill_leaves_no_fault() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let ran = tempfile::NamedTempFile::new().unwrap();
    let child = hanging(ran.path());
    let pid = child.id();
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("0 experiments: 0 failures, 1 not run"),
        "{text}"
    );
    assert_eq!(cgroups(pid), 0);

    std::fs::write(ran.path(), "").unwrap();
    let mut child = hanging(ran.path());
    child.kill().unwrap();
    child.wait().unwrap();
    if has_tcx() {
        // The retransmitted SYN gets through, and the command ends.
        let has_ended = || std::fs::read_to_string(ran.path()).is_ok_and(|text| text == "x\nx\n");
        wait_for(has_ended, "the command, which goes on without faults");
    }
    let cleaned = fault().arg("clean").output().unwrap();
    assert!(cleaned.status.success(), "{}", stderr_text(&cleaned));
    assert_eq!(cgroups(child.id()), 0);
}

/// The cells of a report.
fn cells(report: &Path) -> Vec<Value> {
    let text = std::fs::read(report).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    json["cells"].as_array().unwrap().clone()
}

/// Starts an exploration that survives `refused` and hangs with `silent`, and waits until it hangs.
fn hangs_at_last(dir: &str, options: &[&str], script: &str) -> Child {
    let child = fault()
        .args(["explore", "--runs", "1", "--faults", "refused,silent"])
        .args(options)
        .args(["--timeout", "60s", "--report", dir])
        .args(["--", "bash", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(hangs, "the run under the fault");
    child
}

#[test]
fn a_kill_keeps_the_experiments_that_are_done() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let script = format!("({EXCHANGE}) || true");
    let mut child = hangs_at_last(dir.to_str().unwrap(), &["--seed", "6"], &script);
    child.kill().unwrap();
    child.wait().unwrap();
    let report = dir.join("report.json");
    let faults = |report: &Path| -> Vec<Value> {
        let cells = cells(report).into_iter();
        cells.map(|cell| cell["fault"].clone()).collect()
    };
    assert_eq!(faults(&report), ["refused"]);
    let cleaned = fault().arg("clean").output().unwrap();
    assert!(cleaned.status.success(), "{}", stderr_text(&cleaned));
    let options = [
        "--runs",
        "1",
        "--faults",
        "refused,silent",
        "--timeout",
        "2s",
    ];
    let resume = ["--no-shrink", "--resume", dir.to_str().unwrap()];
    let output = bash(&[&options[..], &resume].concat(), &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    assert!(text.contains("fault: seed 6"), "{text}");
    assert!(
        text.contains("the report already has the results of 1 experiment"),
        "{text}"
    );
    assert_eq!(faults(&report), ["refused", "silent"]);
}

#[test]
fn ctrl_c_while_a_fault_is_made_smaller_stops() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let ran = dir.join("ran");
    // The third run under a fault is a smaller one, and takes its time.
    let script = format!(
        "echo x >> {ran}; {EXCHANGE} && exit; [ $(wc -l < {ran}) -lt 4 ] || sleep 1000; exit 3",
        ran = ran.display()
    );
    let child = fault()
        .args(["explore", "--runs", "1", "--faults", "refused,cut"])
        .args(["--timeout", "60s", "--report", dir.to_str().unwrap()])
        .args(["--", "bash", "-c", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let shrinks = || std::fs::read_to_string(&ran).is_ok_and(|text| text.lines().count() == 4);
    wait_for(shrinks, "a smaller fault");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("1 experiment: 1 failure, 1 not run"),
        "{text}"
    );
    let cells = cells(&dir.join("report.json"));
    assert_eq!(
        (cells.len(), &cells[0]["unfinished"]),
        (1, &Value::Bool(true))
    );
}

#[test]
fn a_full_disk_is_told_in_one_line_and_loses_nothing() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(
        none,
        &dir,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=256k"),
    )
    .unwrap();
    let script = format!("({EXCHANGE}); true");
    let explored = |faults, place: [&str; 2]| {
        let options = ["--runs", "1", "--no-shrink", "--faults", faults];
        bash(&[&options[..], &place].concat(), &script)
    };
    let path = dir.to_str().unwrap();
    let output = explored("refused", ["--report", path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
    let report = dir.join("report.json");
    let before = std::fs::read_to_string(&report).unwrap();
    let mut filler = std::fs::File::create(dir.join("filler")).unwrap();
    while filler.write_all(&[0; 512]).is_ok() {}
    let output = explored("refused,refused-later,cut", ["--resume", path]);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    let errors: Vec<_> = text
        .lines()
        .filter(|line| line.contains("No space"))
        .collect();
    assert_eq!(errors.len(), 1, "{text}");
    let told = [
        "fault: error: can't write",
        "the report has what was done before; continue with --resume",
    ];
    assert!(told.iter().all(|part| errors[0].contains(part)), "{text}");
    assert!(
        text.contains("2 experiments: 0 failures, 1 not run"),
        "{text}"
    );
    assert_eq!(std::fs::read_to_string(&report).unwrap(), before);
    drop(filler);
    std::fs::remove_file(dir.join("filler")).unwrap();
    let output = explored("refused,refused-later,cut", ["--resume", path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
    assert_eq!(cells(&report).len(), 3);
    let left = std::fs::read_dir(&dir).unwrap().count();

    // The third experiment fills the disk, and what it wrote no longer fits.
    let ran = tempfile::NamedTempFile::new().unwrap();
    let fills = format!(
        "({EXCHANGE}); printf '%9000s\\n' x; echo x >> {ran}; [ $(wc -l < {ran}) != 4 ] || dd if=/dev/zero of={path}/filler bs=512; true",
        ran = ran.path().display()
    );
    let options = ["--runs", "1", "--no-shrink", "--faults"];
    let faults = ["refused,refused-later,cut", "--report", path];
    let output = bash(&[&options[..], &faults].concat(), &fills);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("3 experiments: 0 failures\n"), "{text}");
    assert!(text.contains("continue with --resume"), "{text}");
    let kept = cells(&report);
    std::fs::remove_file(dir.join("filler")).unwrap();
    let parts = std::fs::read_dir(&dir).unwrap().count();
    nix::mount::umount(&dir).unwrap();
    assert_eq!((kept.len(), parts), (2, 3), "{text}");
    assert_eq!(left, 3, "report.json, junit.xml and report.html");
}

/// A folder in which `fault` is the binary under test, and `sudo` runs a command as it is told.
fn tools() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_fault"), folder.path().join("fault")).unwrap();
    let sudo = folder.path().join("sudo");
    let text = "#!/bin/sh\n[ \"$1\" != -u ] || { who=$2; shift 2; exec setpriv --reuid \"$who\" --clear-groups \"$@\"; }\n\
        exec \"$@\"\n";
    std::fs::write(&sudo, text).unwrap();
    std::fs::set_permissions(&sudo, std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn the_printed_line_does_it_again() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let dir = folder.path().display();
    // It tells by its exit code that everything is as it was: who runs it, which job it is, and what was done before it.
    let script = format!(
        "{EXCHANGE} && exit; [ \"$(id -un) $FAULT_JOB $(cat {dir}/$FAULT_JOB)\" = 'nobody 1 ready' ] && exit 37; exit 38"
    );
    let before = format!("id -un > {dir}/who; echo ready > {dir}/$FAULT_JOB");
    let options = [
        "--runs", "1", "--jobs", "2", "--faults", "refused", "--user", "nobody", "--before",
        &before,
    ];
    let report = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(report.path()).unwrap();
    let output = bash(
        &[&options[..], &["--report", path.to_str().unwrap()]].concat(),
        &script,
    );
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    let cell = cells(&path.join("report.json")).remove(0);
    let line = cell["reproduce"].as_str().unwrap();
    assert!(text.contains(line), "`{line}` is not in {text}");
    std::fs::remove_file(folder.path().join("1")).unwrap();
    let tools = tools();
    let search = format!(
        "{}:{}",
        tools.path().display(),
        std::env::var("PATH").unwrap()
    );
    let again = Command::new("sh")
        .args(["-c", line])
        .env("PATH", search)
        .output()
        .unwrap();
    assert_eq!(
        again.status.code(),
        Some(37),
        "{line}: {}",
        stderr_text(&again)
    );
    let who = std::fs::read_to_string(folder.path().join("who")).unwrap();
    assert_eq!(who, "nobody\n");
}

#[test]
fn names_that_the_command_looks_up_fail_in_each_way() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    let server = "127.0.0.1:53".parse().unwrap();
    crate::support::dns::serve(server);
    // Somebody else looks up another name all the time.
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    other.connect(server).unwrap();
    std::thread::spawn(move || {
        loop {
            crate::support::dns::look_up(&other, "127-0-0-9.other");
        }
    });
    let query = "\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\x09127-0-0-1\\x07example\\0\\0\\1\\0\\1";
    let script = format!(
        "exec 3<>/dev/udp/127.0.0.1/53; printf '{query}' >&3; \
        code=$(timeout 1 head -c 12 <&3 | od -An -tu1 | awk '{{print $4 % 16}}'); echo \"code $code\"; [ \"$code\" = 0 ]"
    );
    let report = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(report.path()).unwrap();
    let options = [
        "--runs",
        "1",
        "--only",
        "dns:",
        "--report",
        path.to_str().unwrap(),
    ];
    let output = bash(&options, &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    assert!(!text.contains("other"), "{text}");
    let cells = cells(&path.join("report.json"));
    let told = cells.iter().map(|cell| {
        ["target", "fault", "verdict", "output"].map(|name| cell[name].as_str().unwrap())
    });
    let name = "dns:127-0-0-1.example";
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            [name, "nxdomain", "failed", "code 3\n"],
            [name, "servfail", "failed", "code 2\n"],
            [name, "timeout", "failed", "code \n"],
        ],
        "{text}"
    );
}

#[test]
fn connections_to_the_later_addresses_of_a_name_are_watched() {
    let Some(_services) = services() else {
        return;
    };
    // Two services on one port, each with two addresses: rules name them by their hosts.
    tcp_echo(TcpListener::bind("0.0.0.0:7100").unwrap());
    let server = UdpSocket::bind("127.0.0.1:53").unwrap();
    std::thread::spawn(move || {
        let (mut buffer, mut lookups) = ([0; 512], 0);
        while let Ok((length, client)) = server.recv_from(&mut buffer) {
            let is_ours = buffer.starts_with(&[0, 7]);
            if !is_ours {
                continue;
            }
            lookups += 1;
            let (name, host) = match &buffer[12..length] {
                [5, b'a', ..] => ("alpha.example", 2),
                _ => ("beta.example", 4),
            };
            // In the run without faults each is looked up once.
            let subnet = u8::from(lookups > 2);
            let addresses = [host, host + 1].map(|host| format!("127.0.{subnet}.{host}"));
            let records = addresses.each_ref().map(|address| (name, address.as_str()));
            let response = crate::support::dns::answer(name, &records);
            server.send_to(&response, client).unwrap();
        }
    });
    let script = "import socket\n\
        dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        dns.connect(('127.0.0.1', 53))\n\
        for host in (b'alpha', b'beta'):\n    \
            name = bytes([len(host)]) + host + b'\\7example\\0'\n    \
            dns.send(b'\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + name + b'\\0\\1\\0\\1')\n    \
            answer = dns.recv(512)\n    \
            for record in (answer[-20:-16], answer[-4:]):\n        \
                try:\n            \
                    s = socket.create_connection((socket.inet_ntoa(record), 7100))\n            \
                    s.sendall(b'x')\n            \
                    s.recv(1)\n        \
                except OSError:\n            \
                    pass\n";
    let folder = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(folder.path()).unwrap();
    let output = fault()
        .args(["explore", "--runs", "1", "--faults", "refused"])
        .args(["--only", "tcp:", "--report"])
        .arg(&path)
        .args(["--", "python3", "-c", script])
        .output()
        .unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(!text.contains("warning"), "{text}");
    let cells = cells(&path.join("report.json"));
    let targets = ["tcp:alpha.example:7100", "tcp:beta.example:7100"];
    for (cell, target) in cells.iter().zip(targets) {
        assert_eq!(cell["target"], target, "{text}");
        let timelines = cell["timeline"].as_array().unwrap();
        let place = timelines.iter().position(|one| one["target"] == target);
        let place = place.unwrap();
        assert_eq!(cell["connects"][place], 2, "{cell:#}");
        let connects = timelines[place]["connects"].as_array().unwrap();
        let refused = connects
            .iter()
            .filter(|one| one["established_us"].is_null());
        assert_eq!(refused.count(), 2, "{cell:#}");
        assert_eq!(cell["others"].as_array().unwrap().len(), 0, "{cell:#}");
    }
    assert_eq!(cells.len(), 2, "{text}");
}

/// Explores a running service; gives its report, and what was printed.
fn explore_service(options: &[&str]) -> (Value, Output) {
    explore_service_by(options, &[])
}

/// The same where the probe is begun by another command.
fn explore_service_by(options: &[&str], enter: &[&str]) -> (Value, Output) {
    let folder = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(folder.path()).unwrap();
    let output = fault()
        .args([
            "explore",
            "--runs",
            "1",
            "--seed",
            "1",
            "--no-shrink",
            "--report",
        ])
        .arg(&path)
        .args(options)
        .arg("--")
        .args(enter)
        .args(["python3", "probe.py"])
        .current_dir(examples())
        .output()
        .unwrap();
    let text = std::fs::read(path.join("report.json"));
    let text = text.unwrap_or_else(|_| panic!("no report: {}", stderr_text(&output)));
    (serde_json::from_slice(&text).unwrap(), output)
}

#[test]
fn a_running_service_is_explored() {
    let Some(_services) = services() else {
        return;
    };
    let service = Services::of("service");
    let pid = service.0.id().to_string();
    let options = [
        "--pid",
        &pid,
        "--faults",
        "refused-later,silent",
        "--recovery",
        "3s",
    ];
    let (report, output) = explore_service(&options);
    let text = stderr_text(&output);
    // The dead connection stays: the service has to be started again before anything else can be found out.
    assert_eq!(output.status.code(), Some(125), "{text}");
    let told = "the service has not recovered from the last fault";
    assert!(text.contains(told) && text.contains("--resume"), "{text}");
    let cells = report["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 1, "{text}");
    assert_eq!(cells[0]["target"], "tcp:7002", "{text}");
    assert_eq!(cells[0]["verdict"], "no-recovery", "{text}");
    assert_eq!(cells[0]["unfinished"], false);
    let line = cells[0]["reproduce"].as_str().unwrap();
    let start = format!("sudo fault run --seed 1 --pid {pid} -r 'tcp:7002 reset ");
    assert!(line.starts_with(&start), "{line}");
    assert!(
        line.ends_with("-- python3 probe.py; sh -c 'python3 probe.py'"),
        "{line}"
    );
}

#[test]
fn a_service_in_another_network_namespace_is_explored() {
    let Some(_services) = services() else {
        return;
    };
    let namespace = Peer::fresh();
    let _dependencies = Services::inside(&namespace, "server");
    let enter = ["ip", "netns", "exec", &namespace.name];
    let explored = |name: &str, faults: &str| {
        let service = Services::inside(&namespace, name);
        let pid = service.0.id().to_string();
        explore_service_by(
            &["--pid", &pid, "--faults", faults, "--recovery", "3s"],
            &enter,
        )
    };
    let (report, output) = explored("service_fixed", "refused,silent-later,cut");
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for (cell, fault) in
        report["cells"]
            .as_array()
            .unwrap()
            .iter()
            .zip(["refused", "silent-later", "cut"])
    {
        assert_eq!(
            (&cell["target"], &cell["fault"]),
            (&"tcp:7002".into(), &fault.into())
        );
        if fault != "refused" {
            assert!(cell["hits"].as_u64().unwrap() > 0, "{fault}: {text}");
        }
    }
    let (report, output) = explored("service", "refused-later");
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert_eq!(report["cells"][0]["verdict"], "no-recovery", "{text}");
}

#[test]
fn a_service_that_is_right_survives_all() {
    let Some(_services) = services() else {
        return;
    };
    let hierarchy = hierarchy().unwrap();
    let home = hierarchy.of(Pid::this()).unwrap();
    let service = Services::of("service_fixed");
    // As systemd and container runtimes have it.
    let folder = hierarchy
        .path()
        .join(format!("explored-{}", service.0.id()));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("cgroup.procs"), service.0.id().to_string()).unwrap();
    let (report, output) = explore_service(&["--cgroup", folder.to_str().unwrap()]);
    std::fs::write(home.path().join("cgroup.procs"), service.0.id().to_string()).unwrap();
    std::fs::remove_dir(&folder).unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let cells = report["cells"].as_array().unwrap();
    let reached = cells.iter().filter(|cell| cell["verdict"] != "not-reached");
    assert!(reached.count() >= 8, "{text}");
    let cut = cells.iter().find(|cell| cell["fault"] == "cut").unwrap();
    assert!(
        cut["hits"].as_u64().unwrap() > 0,
        "the open connection was reset: {text}"
    );
}

#[test]
fn mistakes_with_a_running_service_are_told() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let mut service = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = service.id().to_string();
    let cases: [(&[&str], i32, &str); 5] = [
        (
            &["--pid", &pid, "--jobs", "2"],
            2,
            "--jobs: there is one service",
        ),
        (&["--recovery", "3s"], 2, "required"),
        (&["--pid", &pid, "--cgroup", "/x"], 2, "cannot be used with"),
        (
            &["--pid", "999999999"],
            125,
            "there is no process 999999999",
        ),
        (
            &["--pid", &pid],
            125,
            "the service opened no connection that was answered",
        ),
    ];
    let outputs = cases.map(|(options, code, part)| {
        let output = bash(&[&["--runs", "1"][..], options].concat(), EXCHANGE);
        (output, code, part)
    });
    service.kill().unwrap();
    service.wait().unwrap();
    for (output, code, part) in outputs {
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
}

#[test]
fn a_file_adds_experiments() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let [file, accept] = ["own.toml", "accept.toml"].map(|name| dir.join(name));
    std::fs::write(
        &file,
        "rules = ['tcp:7000 drop first=9 dir=to-client', 'tcp:7000 duplicate=9%']",
    )
    .unwrap();
    let [file, accept, path] = [&file, &accept, &dir].map(|path| path.to_str().unwrap());
    let options = [
        "--runs",
        "1",
        "--timeout",
        "3s",
        "--faults",
        "error",
        "-f",
        file,
        "--report",
        path,
    ];
    let output = bash(&options, EXCHANGE);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    assert!(
        text.contains("  H tcp:7000 drop first=9 dir=to-client\n"),
        "{text}"
    );
    let found = cells(&dir.join("report.json"));
    let told = found
        .iter()
        .map(|cell| ["target", "fault"].map(|name| cell[name].as_str().unwrap()));
    let expected = [
        ["tcp:7000", "drop first=9 dir=to-client"],
        ["tcp:7000", "duplicate=9%"],
    ];
    assert_eq!(told.collect::<Vec<_>>(), expected, "{text}");
    // They are accepted by name as others are.
    let accepting = [&options[..], &["--accept", accept]].concat();
    for _ in 0..2 {
        let output = bash(&accepting, EXCHANGE);
        assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
    }
    let resume = [
        "--runs", "1", "--faults", "error", "-f", file, "--resume", path,
    ];
    let text = stderr_text(&bash(&resume, EXCHANGE));
    assert!(
        text.contains("the report already has the results of 2 experiments"),
        "{text}"
    );

    std::fs::write(file, "rules = ['tcp:7777 loss=5%']").unwrap();
    let output = bash(&options, EXCHANGE);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("`tcp:7777 loss=5%` concerns nothing"),
        "{text}"
    );
}

#[test]
fn what_makes_verdicts_doubtful_is_told() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    tcp_echo(TcpListener::bind("127.0.0.1:7001").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let seen = folder.path().join("seen");
    let other = EXCHANGE.replace("7000", "7001");
    let script = format!(
        "if [ -e {seen} ]; then {EXCHANGE}; else touch {seen}; {other}; fi",
        seen = seen.display()
    );
    let output = bash(&["--plan"], &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in [
        "7001 (localhost) was used only in the first run",
        "7000 (localhost) was used only in a later run",
    ] {
        let lines = text.lines().filter(|line| line.contains(part));
        let lines: Vec<_> = lines.collect();
        assert!(
            lines.len() == 1 && lines[0].contains("verdicts are doubtful"),
            "{text}"
        );
    }
    let output = bash(&[], "[ -t 0 ] || { echo 'not a terminal'; exit 1; }");
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    let told = "must succeed (it has no terminal, and its standard input is empty). It wrote: not a terminal";
    let errors = text.lines().filter(|line| line.contains("fault: error"));
    assert!(errors.count() == 1 && text.contains(told), "{text}");
}

#[test]
fn pairs_reach_what_the_command_turns_to_under_a_fault() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    tcp_echo(TcpListener::bind("127.0.0.1:7001").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let [accept, path] = [&dir.join("accept.toml"), &dir].map(|path| path.display().to_string());
    let fallback = EXCHANGE.replace("7000", "7001");
    let script = format!("({EXCHANGE}) || ({fallback})");
    let options = [
        "--runs",
        "1",
        "--depth",
        "2",
        "--faults",
        "refused,cut",
        "--report",
        &path,
    ];
    let output = bash(&options, &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    let report = dir.join("report.json");
    let told = |cells: Vec<Value>| -> Vec<[String; 3]> {
        let cells = cells.into_iter();
        cells
            .map(|cell| {
                ["target", "fault", "verdict"].map(|name| cell[name].as_str().unwrap().to_owned())
            })
            .collect()
    };
    let pairs = [
        ["tcp:7000", "refused", "survived"],
        ["tcp:7000", "cut", "survived"],
        ["tcp:7001", "refused with tcp:7000 refused", "failed"],
        ["tcp:7001", "cut with tcp:7000 refused", "failed"],
        ["tcp:7001", "refused with tcp:7000 cut", "failed"],
        ["tcp:7001", "cut with tcp:7000 cut", "failed"],
    ];
    assert_eq!(told(cells(&report)), pairs, "{text}");
    let found = &cells(&report)[..3];
    assert_eq!(found[0]["others"][0], "tcp:127.0.0.1:7001", "{text}");
    let line = found[2]["reproduce"].as_str().unwrap();
    let rules = "-r 'tcp:7000 reject conn=1 first=1' -r 'tcp:7001 reject conn=1 first=1'";
    assert!(line.contains(rules), "{line}");
    assert!(text.contains("pairs of faults: 0 of 4 survived"), "{text}");
    let enough = "connection 1 is enough, one packet is enough";
    let told = format!("; tcp:7000 refused: {enough}; tcp:7001 refused: {enough}\n");
    assert!(text.contains(&told), "{text}");
    assert!(
        text.contains("; it also connected to tcp:127.0.0.1:7001\n"),
        "{text}"
    );
    assert!(
        text.contains("  F tcp:7001 refused with tcp:7000 refused\n"),
        "{text}"
    );

    // They are done already, and are accepted by name as others are.
    let options = ["--runs", "1", "--depth", "2", "--faults", "refused,cut"];
    let resume = ["--no-shrink", "--resume", &path, "--accept", &accept];
    for _ in 0..2 {
        let output = bash(&[&options[..], &resume].concat(), &script);
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(
            text.contains("the report already has the results of 4 experiments"),
            "{text}"
        );
        assert!(text.contains("0 failures, 4 accepted"), "{text}");
    }
    let output = bash(&[&options[..], &["--plan"]].concat(), &script);
    assert_eq!(output.stdout, b"  tcp:7000 refused: tcp:7000 reject\n  tcp:7000 cut: tcp:7000 limit_data=1 dir=to-client\n");
}

/// A command with one dependency that it does without, and one that it replaces by a third, all of them echo services.
/// `then` comes after the third was used.
fn with_fallback(then: &str) -> String {
    for port in 7000..7003 {
        tcp_echo(TcpListener::bind(("127.0.0.1", port)).unwrap());
    }
    let [fallback, other] = ["7001", "7002"].map(|port| EXCHANGE.replace("7000", port));
    format!("({other}); ({EXCHANGE}) || {{ ({fallback}) && {then}; }}")
}

const PAIRS: [&str; 7] = [
    "--runs",
    "1",
    "--no-shrink",
    "--depth",
    "2",
    "--faults",
    "refused",
];

#[test]
fn a_report_of_pairs_and_of_own_rules_is_gone_on_from() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    let script = with_fallback("true");
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    // A target of another text than that of the dependencies.
    let file = dir.join("own.toml");
    std::fs::write(&file, "rules = ['127.0.0.0/8:7000 duplicate=1%']").unwrap();
    let [file, path] = [&file, &dir].map(|path| path.to_str().unwrap());
    let options = [&PAIRS[..], &["-f", file]].concat();
    for (option, known) in [("--report", 0), ("--resume", 3)] {
        let output = bash(&[&options[..], &[option, path]].concat(), &script);
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(121), "{text}");
        assert!(text.contains("5 experiments: 1 failure"), "{text}");
        let told = format!("already has the results of {known} experiments");
        assert_eq!(text.contains(&told), known != 0, "{text}");
    }
}

#[test]
fn what_is_used_under_a_fault_is_looked_for_within_the_budget() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    let ran = tempfile::NamedTempFile::new().unwrap();
    // The budget is over while the fault is survived.
    let script = with_fallback("sleep 4");
    let script = format!("echo x >> {}; {script}", ran.path().display());
    let options = [&PAIRS[..], &["--budget", "3s", "--skip", "7002"]].concat();
    let output = bash(&options, &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(std::fs::read_to_string(ran.path()).unwrap(), "x\nx\n");
    assert!(text.contains("1 experiment: 0 failures\n"), "{text}");
}

#[test]
fn ctrl_c_in_front_of_the_pairs_tells_how_many_are_not_run() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let ran = folder.path().join("ran");
    // Without faults and under the first one it ends.
    let then = format!(
        "echo x >> {ran} && [ $(wc -l < {ran}) = 1 ] || sleep 1000",
        ran = ran.display()
    );
    let script = with_fallback(&format!("{{ {then}; }}"));
    let child = fault()
        .arg("explore")
        .args(PAIRS)
        .args(["--timeout", "60s", "--", "bash", "-c", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let hangs = || std::fs::read_to_string(&ran).is_ok_and(|text| text.lines().count() == 2);
    wait_for(hangs, "the run that shows what else is used");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("2 experiments: 0 failures, 1 not run"),
        "{text}"
    );
}

#[test]
fn ctrl_c_after_resume_keeps_the_pairs_that_are_done() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let ran = dir.join("ran");
    let then = format!(
        "{{ echo x >> {}; [ ! -e {}/hang ] || sleep 1000; }}",
        ran.display(),
        dir.display()
    );
    let script = with_fallback(&then);
    let explored = |option: &str| {
        let mut command = fault();
        command.arg("explore").args(PAIRS).arg(option).arg(&dir);
        command.args(["--timeout", "60s", "--", "bash", "-c", &script]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let output = explored("--report").wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(121), "{}", stderr_text(&output));
    let before = cells(&dir.join("report.json"));
    assert_eq!(before.len(), 4);
    std::fs::write(&ran, "").unwrap();
    std::fs::write(dir.join("hang"), "").unwrap();
    let child = explored("--resume");
    let hangs = || std::fs::read_to_string(&ran).is_ok_and(|text| text == "x\n");
    wait_for(hangs, "the run that shows what else is used");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr_text(&output));
    assert_eq!(cells(&dir.join("report.json")).len(), before.len());
}

#[test]
fn a_service_is_awaited_after_the_run_that_shows_what_else_it_uses() {
    let Some(_services) = services() else {
        return;
    };
    for port in [7100, 7101] {
        tcp_echo(TcpListener::bind(("127.0.0.1", port)).unwrap());
    }
    let script = "import socket\n\
        s = socket.create_server(('127.0.0.1', 7500))\n\
        print('ready', flush=True)\n\
        while True:\n    \
            c, _ = s.accept()\n    \
            answer = b'no'\n    \
            for port in (7100, 7101):\n        \
                try:\n            \
                    d = socket.create_connection(('127.0.0.1', port))\n            \
                    d.sendall(b'x')\n            \
                    d.recv(1)\n            \
                    answer = b'ok'\n            \
                    break\n        \
                except OSError:\n            \
                    pass\n    \
            c.sendall(answer)\n    \
            c.close()\n";
    let mut server = Command::new("python3")
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(server.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    let service = Services(server);
    let ran = tempfile::NamedTempFile::new().unwrap();
    let probe = format!(
        "echo x >> {}; exec 3<>/dev/tcp/127.0.0.1/7500; read -rn 2 answer <&3; [ \"$answer\" = ok ]",
        ran.path().display()
    );
    let pid = service.0.id().to_string();
    let output = bash(&[&PAIRS[..], &["--pid", &pid]].concat(), &probe);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    assert!(
        text.contains("F tcp:7101 refused with tcp:7100 refused\n"),
        "{text}"
    );
    // Without faults; under each fault, and after it; the failure twice.
    let runs = std::fs::read_to_string(ran.path()).unwrap().lines().count();
    assert_eq!(runs, 1 + 2 + 2 + 2 * 2, "{text}");
}

#[test]
fn a_report_whose_folder_is_gone_is_told_as_such() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap().join("report");
    let path = dir.to_str().unwrap();
    // The third run, under the second fault, removes it.
    let ran = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "({EXCHANGE}); echo x >> {ran}; [ $(wc -l < {ran}) != 3 ] || rm -r {path}; true",
        ran = ran.path().display()
    );
    let options = ["--runs", "1", "--no-shrink", "--faults", "refused,cut"];
    let output = bash(&[&options[..], &["--report", path]].concat(), &script);
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    let error = format!("fault: error: can't write {path}/report.json: No such file or directory");
    assert!(text.contains(&format!("{error}\n")), "{text}");
    assert!(text.contains("2 experiments: 0 failures\n"), "{text}");
}

#[test]
fn connections_that_no_experiment_reached_are_told() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let script = format!("for n in 1 2 3; do ({EXCHANGE}) || exit 1; done");
    let output = bash(
        &["--runs", "1", "--no-shrink", "--faults", "refused"],
        &script,
    );
    let text = stderr_text(&output);
    let told = "no experiment reached 2 connections, from 2 to 3, of 3 to tcp:7000: under faults the command made at most \
        1 connection\n";
    assert!(text.contains(told), "{text}");
    let output = bash(
        &["--runs", "1", "--no-shrink", "--faults", "refused,cut"],
        &script.replace("exit 1", "true"),
    );
    let text = stderr_text(&output);
    assert!(!text.contains("no experiment reached"), "{text}");
}

#[test]
fn retries_without_backoff_are_told_where_the_command_survives() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(folder.path()).unwrap();
    let path = dir.to_str().unwrap();
    let options = ["--runs", "1", "--faults", "refused", "--report", path];
    for (pauses, is_told) in [
        (".02 .02 .02 .02 .02 .02 .02", true),
        (".01 .02 .04 .08 .16 .32 .64", false),
    ] {
        let script =
            format!("for pause in {pauses}; do ({EXCHANGE}) && exit; sleep $pause; done; true");
        let output = bash(&options, &script);
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(0), "{text}");
        let cell = cells(&dir.join("report.json")).remove(0);
        assert_eq!(cell["connects"][0], 7, "{text}");
        assert_eq!(
            cell["retries"],
            if is_told { 6.into() } else { Value::Null }
        );
        assert_eq!(cell["symbol"] == "!", is_told, "{text}");
        let told = text.contains("; 6 retries without growing back-off\n");
        assert_eq!(told, is_told, "{text}");
    }
}

#[test]
fn the_packets_whose_loss_is_enough_are_found() {
    let Some(_services) = services() else {
        return;
    };
    // It waits for each of ten answers for too short a time to survive one that is sent again.
    let script = "import socket\n\
        s = socket.create_connection(('127.0.0.1', 7002), timeout=5)\n\
        s.settimeout(0.15)\n\
        for _ in range(10):\n    s.sendall(b'PING\\n')\n    s.recv(100)\n";
    let folder = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(folder.path()).unwrap();
    let output = fault()
        .args(["explore", "--runs", "1", "--seed", "3", "--faults", "loss"])
        .arg("--report")
        .arg(&path)
        .args(["--", "python3", "-c", script])
        .output()
        .unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    let cell = cells(&path.join("report.json")).remove(0);
    let smallest = &cell["smallest"];
    assert_eq!(smallest["packets"], 1, "{text}");
    let rule = smallest["rules"][0].as_str().unwrap();
    assert!(rule.starts_with("tcp:7002 drop range="), "{rule}");
    assert!(text.contains("one packet is enough"), "{text}");
}

#[test]
fn the_connections_that_are_enough_together_are_found() {
    let Some(_services) = services() else {
        return;
    };
    // It needs two answers of three.
    let script = "import socket, sys\n\
        good = 0\n\
        for _ in range(3):\n    \
            s = socket.create_connection(('127.0.0.1', 7002), timeout=5)\n    \
            s.sendall(b'PING\\n')\n    \
            good += s.makefile('rb').readline().endswith(b'\\n')\n\
        sys.exit(good < 2)\n";
    let folder = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(folder.path()).unwrap();
    let output = fault()
        .args(["explore", "--runs", "1", "--seed", "3", "--faults", "cut"])
        .arg("--report")
        .arg(&path)
        .args(["--", "python3", "-c", script])
        .output()
        .unwrap();
    let text = stderr_text(&output);
    assert_eq!(output.status.code(), Some(121), "{text}");
    let cell = cells(&path.join("report.json")).remove(0);
    let smallest = &cell["smallest"];
    assert_eq!(smallest["connections"], 2, "{text}");
    let rule = smallest["rules"][0].as_str().unwrap();
    assert!(rule.ends_with(" conn=1..2"), "{rule}");
    assert!(text.contains("2 connections are enough"), "{text}");
}

#[test]
fn what_fails_before_or_after_a_later_run_ends_it_and_keeps_what_is_done() {
    if hierarchy().is_none() || !has_bash() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let script = format!("({EXCHANGE}); true");
    for option in ["--before", "--after"] {
        let folder = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(folder.path()).unwrap();
        // The run without faults, one experiment, and then it fails.
        let ran = dir.join("ran");
        let line = format!(
            "echo x >> {ran}; [ $(wc -l < {ran}) -lt 3 ] || {{ echo no database; exit 9; }}",
            ran = ran.display()
        );
        let options = [
            "--runs",
            "1",
            "--faults",
            "refused,refused-later,cut",
            "--report",
            dir.to_str().unwrap(),
            option,
            &line,
        ];
        let output = bash(&options, &script);
        let text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(125), "{text}");
        let told = format!("fault: error: {option} failed: exit code 9: no database");
        assert_eq!(text.matches(&told).count(), 1, "{text}");
        assert!(
            text.contains("1 experiment: 0 failures, 2 not run"),
            "{text}"
        );
        assert_eq!(cells(&dir.join("report.json")).len(), 1, "{text}");
    }
}
