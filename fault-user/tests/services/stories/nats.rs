//! The broker goes away for longer than a client's default reconnect budget.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::{Killed, story};
use crate::support::place::{AppliedRules, PATIENCE, enter_fresh, wait_for};

const BROKER: &str = "127.0.0.1:4222";
const URL: &str = "nats://127.0.0.1:4222";

/// The budget is 60 attempts, each up to 2.1 s after the one before.
const BUDGET: Duration = Duration::from_mins(3);

/// The service, and what it says.
struct Service {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Service {
    fn start(program: &Path, limits: Option<&str>) -> Self {
        let mut child = Command::new(program)
            .arg(URL)
            .args(limits)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the service");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let service = Self {
            input: child.stdin.take().unwrap(),
            child,
            lines,
        };
        service.says("connected", PATIENCE);
        service
    }

    /// Waits until it says just this next.
    fn says(&self, what: &str, patience: Duration) {
        let line = self
            .lines
            .recv_timeout(patience)
            .unwrap_or_else(|_| panic!("waited in vain for {what:?}"));
        assert_eq!(line, what);
    }

    fn order(&mut self, order: &str) {
        writeln!(self.input, "{order}").unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended with an error already.
        let _ended = self.child.kill();
        self.child.wait().expect("it is our child");
    }
}

/// Another service, which is there for the orders.
struct Subscriber(BufReader<TcpStream>);

impl Subscriber {
    fn new() -> Self {
        let stream = TcpStream::connect(BROKER).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut subscriber = Self(BufReader::new(stream));
        subscriber.next("INFO");
        let mut stream = subscriber.0.get_ref();
        stream
            .write_all(b"CONNECT {\"verbose\":false}\r\nSUB orders 1\r\nPING\r\n")
            .unwrap();
        subscriber.next("PONG");
        subscriber
    }

    fn next(&mut self, beginning: &str) {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the broker");
        assert!(line.starts_with(beginning), "{line}");
    }

    fn gets(&mut self, order: &str) {
        self.next("MSG orders 1 ");
        self.next(order);
    }
}

fn compiled(folder: &Path) -> std::path::PathBuf {
    let program = folder.join("service");
    let done = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(story("nats").join("service.c"))
        .arg("-lnats")
        .status();
    assert!(done.expect("cc").success(), "libnats-dev is missing?");
    program
}

fn broker() -> Killed {
    let child = Command::new("nats-server")
        .args(["-a", "127.0.0.1", "-p", "4222"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nats-server (cargo xtask setup --for test)");
    wait_for(|| TcpStream::connect(BROKER).is_ok(), "the broker");
    Killed(child)
}

#[test]
fn a_nats_service_recovers_from_a_long_outage_only_with_proper_settings() {
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let program = compiled(folder.path());
    let _broker = broker();
    let mut default = Service::start(&program, None);
    let mut proper = Service::start(&program, Some("forever"));
    let mut subscriber = Subscriber::new();
    for service in [&mut default, &mut proper] {
        service.order("before");
        service.says("published before", PATIENCE);
        subscriber.gets("before");
    }

    let applied = AppliedRules::begin(&["tcp:4222 down"], "--scope host");
    let start = Instant::now();
    // What is open is reset. Which of both is told first is the library's affair, and what it says of the order too: it
    // drops the requests to flush that are open when the connection breaks, and calls them done.
    for service in [&mut default, &mut proper] {
        service.order("during");
        let mut lines = [(); 2].map(|()| service.lines.recv_timeout(PATIENCE).expect("a line"));
        lines.sort();
        assert_eq!(lines[0], "disconnected");
        assert!(lines[1].contains("ed during"), "{lines:?}");
    }
    drop(subscriber);
    default.says("closed", BUDGET);
    let outage = start.elapsed();
    assert!(outage > Duration::from_mins(1), "{outage:?} is no budget");
    applied.end();

    proper.says("reconnected", PATIENCE);
    // What the library kept during the outage is with the broker when this is.
    proper.order("first");
    proper.says("published first", PATIENCE);
    let mut subscriber = Subscriber::new();
    proper.order("after");
    proper.says("published after", PATIENCE);
    subscriber.gets("after");
    default.order("after");
    default.says("failed after: Connection Closed", PATIENCE);
}
