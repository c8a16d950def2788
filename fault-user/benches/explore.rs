//! What an experiment of `fault explore` costs on top of the command itself, and what two jobs gain. The command is this
//! program: it talks to ten services for 50 ms, whatever they do. One JSON object per line and figure.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Socket, Type};

/// How long the command takes.
const COMMAND: Duration = Duration::from_millis(50);
/// The command's services.
const PORTS: std::ops::Range<u16> = 7000..7010;
/// Ten kinds of faults on ten services: packets, streams, and what comes later.
const FAULTS: &str = "refused,refused-later,outage,silent,silent-later,slow,loss,cut,stall,corrupt";
const EXPERIMENTS: f64 = 100.0;

/// The command: it asks all services at once.
fn command() {
    let until = Instant::now() + COMMAND;
    let mut sockets: Vec<_> = PORTS
        .map(|port| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_nonblocking(true).expect("an option");
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // It is in progress, or refused.
            let _outcome = socket.connect(&address.into());
            (socket, false)
        })
        .collect();
    while Instant::now() < until {
        for (socket, has_asked) in &mut sockets {
            *has_asked |= socket.write(b"hello\n").is_ok();
            // Whatever comes back, or does not.
            let _answer = socket.read(&mut [0; 16]);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A service that says what it is told.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("accept");
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                match stream.write_all(&bytes[..length]) {
                    Err(error) if error.kind() != ErrorKind::BrokenPipe => return,
                    _ => {}
                }
            }
        });
    }
}

/// Explores with so many jobs; how long the experiments take, in seconds.
fn explore(jobs: &str) -> f64 {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(env!("CARGO_BIN_EXE_fault"))
        .args(["explore", "--no-shrink", "--seed", "1", "--timeout", "5s"])
        .args(["--jobs", jobs, "--faults", FAULTS, "--report"])
        .arg(folder.path())
        .arg("--")
        .arg(std::env::current_exe().expect("a program"))
        .env("EXPLORED", "1")
        .stdin(Stdio::null())
        .output()
        .expect("cargo has built it");
    let text = std::fs::read(folder.path().join("report.json")).unwrap_or_else(|_| {
        panic!("{}", String::from_utf8_lossy(&output.stderr));
    });
    let report: serde_json::Value = serde_json::from_slice(&text).expect("a report");
    let cells = report["cells"].as_array().map_or(0, Vec::len);
    assert_eq!(cells, 100, "{report}");
    report["experiments_ms"].as_f64().expect("a time") / 1000.0
}

fn measure(name: &str, value: f64, unit: &str, goal: &str, ok: bool) {
    println!(
        "{}",
        serde_json::json!({"name": name, "value": value, "unit": unit, "goal": goal, "ok": ok})
    );
}

fn main() {
    if std::env::var_os("EXPLORED").is_some() {
        command();
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.expect("ip runs").success());
    for port in PORTS {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("loopback");
        std::thread::spawn(move || serve(&listener));
    }
    let one = explore("1");
    let overhead_ms = (one / EXPERIMENTS - COMMAND.as_secs_f64()) * 1e3;
    measure(
        "explore, 100 experiments",
        one,
        "s",
        "at most 15",
        one <= 15.0,
    );
    let goal = "at most 30";
    measure(
        "explore, overhead",
        overhead_ms,
        "ms",
        goal,
        overhead_ms <= 30.0,
    );
    let gain = one / explore("2");
    measure(
        "explore, 2 jobs",
        gain,
        "times as fast",
        "at least 1.6",
        gain >= 1.6,
    );
}
