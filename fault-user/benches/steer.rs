//! No fault, no cost: what a service carries before a stream rule, while one waits for its window, and after it; in between
//! the same through the relay. Everything is taken in turns, so that a machine which is busy is so for all of them. One
//! JSON object per line and figure.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use socket2::SockRef;

/// How long one figure is taken for: others on the machine leave a time as short as that alone now and then.
const TIME: Duration = Duration::from_millis(40);
/// How often each phase comes.
const TURNS: usize = 6;
/// How often each figure is taken in a phase.
const SLICES: usize = 8;
/// What is left of the figure without a rule, at least: its own spread on a machine with others is that large.
const GOAL: f64 = 0.9;

/// Prints one figure.
fn measure(name: &str, value: f64, unit: &str, reference: f64, goal: Option<f64>) {
    let ratio = value / reference;
    let stderr_text = goal.map(|goal| format!("at least {goal} of before"));
    println!(
        "{}",
        serde_json::json!({
            "name": name, "value": value, "unit": unit, "reference": reference, "ratio": ratio,
            "goal": stderr_text, "ok": goal.is_none_or(|goal| ratio >= goal),
        })
    );
}

/// Rules that are applied until this is dropped.
struct Rule(Child);

impl Rule {
    fn begin(text: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fault"))
            .args(["run", "--scope", "host", "--allow-unfired", "-r", text])
            .args(["--", "sh", "-c", "echo ready; cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cargo has built it");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("a line");
        assert_eq!(line, "ready\n", "{text} (run as root, with cgroup2)");
        Self(child)
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().expect("it is our child");
    }
}

/// A server that reads all that it gets.
fn sink() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            std::thread::spawn(move || {
                let mut bytes = vec![0; 256 << 10];
                while let Ok(1..) = stream.read(&mut bytes) {}
            });
        }
    });
    address
}

/// A server that resets everyone at once, which leaves no port behind that is taken for a minute.
fn door() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            SockRef::from(&stream.expect("accept"))
                .set_linger(Some(Duration::ZERO))
                .expect("an option");
        }
    });
    address
}

/// Gbit/s over a connection.
fn throughput(stream: &mut TcpStream) -> f64 {
    const BYTES: u32 = 256 << 10;
    let bytes = vec![0; BYTES as usize];
    let (start, mut sent) = (Instant::now(), 0.0);
    while start.elapsed() < TIME {
        stream.write_all(&bytes).expect("the sink reads");
        sent += 8.0 * f64::from(BYTES);
    }
    sent / start.elapsed().as_secs_f64() / 1e9
}

/// Connections per second, from connect(2) to the reset.
fn connections(address: SocketAddr) -> f64 {
    let (start, mut made) = (Instant::now(), 0.0);
    while start.elapsed() < TIME {
        // One after another: a queue that overflows would cost a second. connect(2) may find the reset already.
        let end = TcpStream::connect(address).and_then(|mut stream| stream.read(&mut [0]));
        assert_eq!(
            end.map_err(|error| error.kind()),
            Err(ErrorKind::ConnectionReset)
        );
        made += 1.0;
    }
    made / start.elapsed().as_secs_f64()
}

/// Throughput of a new connection and of one that was there before everything, and connections per second.
fn figures(sink: SocketAddr, door: SocketAddr, old: &mut TcpStream) -> [f64; 3] {
    let mut new = TcpStream::connect(sink).expect("it listens");
    [throughput(&mut new), throughput(old), connections(door)]
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.expect("ip runs").success());
    let (sink, door) = (sink(), door());
    let mut old = TcpStream::connect(sink).expect("it listens");
    let ports = format!("{},{}", sink.port(), door.port());
    let phases = [
        ("before a stream rule", None, None),
        ("a stream rule out of its window", Some("at=1h"), Some(GOAL)),
        ("through the relay, as it has to be", Some(""), None),
        ("after a stream rule", None, Some(GOAL)),
    ];
    let mut taken: Vec<Vec<[f64; 3]>> = vec![Vec::new(); phases.len()];
    figures(sink, door, &mut old);
    for _ in 0..TURNS {
        for ((_, window, _), taken) in phases.iter().zip(&mut taken) {
            let rule =
                window.map(|window| Rule::begin(&format!("tcp:{ports} lifetime=1h {window}")));
            taken.extend((0..SLICES).map(|_| figures(sink, door, &mut old)));
            drop(rule);
        }
    }
    let what = [
        ("throughput of a new connection", "Gbit/s"),
        ("throughput of an open connection", "Gbit/s"),
        ("connections", "1/s"),
    ];
    for (index, (figure, unit)) in what.into_iter().enumerate() {
        // The best of all turns: others on the machine can only take away from it.
        let best = |phase: usize| {
            let all = taken[phase].iter().map(|all| all[index]);
            all.fold(0.0, f64::max)
        };
        for (phase, (name, _, goal)) in phases.iter().enumerate() {
            measure(
                &format!("{figure}, {name}"),
                best(phase),
                unit,
                best(0),
                *goal,
            );
        }
    }
}
