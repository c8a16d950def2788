//! What the kernel programs cost: a packet by `BPF_PROG_TEST_RUN`, a veth pair's throughput, a run's start.
//!
//! Prints one JSON object a line, as `cargo xtask bench` reads them. Runs as root, in network namespaces of
//! its own.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fault_user::inject::connections;
use fault_user::inject::injection::{InjectionOptions, PreparedInjection};
use fault_user::inject::preparation::prepare;
use fault_user::plan::tables::compile;
use fault_user::sys::clock::monotonic_ns;
use fault_user::sys::net::clsact::TcHook;
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use nix::sched::{CloneFlags, unshare};
use support::dns::answer;
use support::{dns_response, injector, ip, load, measure, plan, segment};

/// Runs of a program for one figure.
const REPEAT: u32 = 1_000_000;
/// How often a figure is taken; the smallest counts, because everything else that runs here only adds.
const ROUNDS: usize = 5;

/// Nanoseconds that the egress program takes for a segment to port 5432 under these rules.
fn nanoseconds(rules: &[String]) -> f64 {
    let mut injector = injector(&plan(rules), connections::capacity());
    let frame = segment(0, 5432);
    let program = injector.program(TcHook::Egress, true).expect("the program");
    let rounds = (0..ROUNDS).map(|_| support::nanoseconds(program, &frame, REPEAT));
    rounds.fold(f64::INFINITY, f64::min)
}

fn packets() {
    let one = nanoseconds(&["tcp:6000 loss=30%".to_owned()]);
    measure(
        "packet that no rule concerns, 1 rule",
        one,
        "ns",
        None,
        "at most 60",
        one <= 60.0,
    );
    let many: Vec<String> = (0..1024)
        .map(|n| format!("tcp:{} loss=30%", 10_000 + n))
        .collect();
    let many = nanoseconds(&many);
    measure(
        "the same with 1,024 rules",
        many,
        "ns",
        Some(one),
        "ratio at most 1.3",
        many / one <= 1.3,
    );
    let matched = nanoseconds(&["tcp:5432 loss=30%".to_owned()]);
    measure(
        "matched loss",
        matched,
        "ns",
        None,
        "at most 90",
        matched <= 90.0,
    );
    let corrupted = nanoseconds(&["tcp:5432 corrupt=100%".to_owned()]);
    measure(
        "corrupt visible",
        corrupted,
        "ns",
        None,
        "at most 170",
        corrupted <= 170.0,
    );
}

/// Rules that are aimed at host names.
fn names() {
    let none = nanoseconds(&["tcp:6000 loss=30%".to_owned()]);
    let unmatched = nanoseconds(&["tcp:a.invalid:6000 loss=30%".to_owned()]);
    measure(
        "packet that no rule concerns, 1 rule for a host name",
        unmatched,
        "ns",
        Some(none),
        "ratio at most 1.15",
        unmatched / none <= 1.15,
    );
    let rules = ["tcp:a.invalid:5432 loss=30%".to_owned()];
    let mut injector = injector(&plan(&rules), connections::capacity());
    // The segment goes to the first address.
    let learned = |first: u32, count: u32| {
        let addresses = (first..first + count).map(|n| Ipv4Addr::from(0x0a02_0002 + n).to_string());
        let addresses: Vec<_> = addresses.collect();
        let answers = addresses
            .iter()
            .map(|address| ("a.invalid", address.as_str()));
        dns_response(&answer("a.invalid", &answers.collect::<Vec<_>>()))
    };
    let mut run = |frame: &[u8], side, repeat| {
        let program = injector.program(side, true).expect("the program");
        let rounds = (0..ROUNDS).map(|_| support::nanoseconds(program, frame, repeat));
        rounds.fold(f64::INFINITY, f64::min)
    };
    let response = run(&learned(0, 4), TcHook::Ingress, REPEAT);
    measure(
        "DNS response with 4 addresses",
        response,
        "ns",
        None,
        "at most 2,000",
        response <= 2000.0,
    );
    let frame = segment(0, 5432);
    let few = run(&frame, TcHook::Egress, REPEAT);
    for first in (4..4096).step_by(62) {
        run(&learned(first, 62), TcHook::Ingress, 1);
    }
    let many = run(&frame, TcHook::Egress, REPEAT);
    measure(
        "matched loss by host name, 4,096 addresses",
        many,
        "ns",
        Some(few),
        "ratio at most 1.1",
        many / few <= 1.1,
    );
}

fn installing() {
    let rules: Vec<String> = (0..4096)
        .map(|n| format!("tcp:{} loss=30%", 10_000 + n))
        .collect();
    let plan = plan(&rules);
    let mut injector = load(&plan, &compile(&plan.entries(), None).expect("tables"), 1);
    let start = Instant::now();
    let tables = compile(&plan.entries(), None).expect("tables");
    injector.install(&tables, monotonic_ns()).expect("rules");
    let took = start.elapsed().as_secs_f64() * 1e3;
    measure(
        "applying 4,096 rules",
        took,
        "ms",
        None,
        "at most 100",
        took <= 100.0,
    );
}

/// Bytes that went over the connection in a second.
fn throughput(stream: &mut TcpStream) -> f64 {
    let data = vec![0x55; 128 << 10];
    let (start, mut sent) = (Instant::now(), 0_u32);
    while start.elapsed() < Duration::from_secs(1) {
        stream.write_all(&data).expect("the peer reads");
        sent += 1;
    }
    f64::from(sent) * 131_072.0 / start.elapsed().as_secs_f64()
}

/// A veth pair with and without rules that do not match, in turns.
fn veth() {
    let name = format!("fault-bench-{}", std::process::id());
    ip(&format!("netns add {name}"));
    ip(&format!("link add va type veth peer name vb netns {name}"));
    for words in ["addr add 10.78.0.1/24 dev va", "link set va up"] {
        ip(words);
    }
    for words in ["addr add 10.78.0.2/24 dev vb", "link set vb up"] {
        ip(&format!("-n {name} {words}"));
    }
    let peer = NetworkNamespace::open(std::path::Path::new(&name)).expect("the peer");
    let listener = peer
        .enter(|| Ok(TcpListener::bind("10.78.0.2:7000")?))
        .expect("a listener");
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut bytes = vec![0; 256 << 10];
        while stream.read(&mut bytes).is_ok_and(|read| read > 0) {}
    });
    let mut stream = TcpStream::connect("10.78.0.2:7000").expect("a connection");
    let rules: Vec<String> = (0..100)
        .map(|n| format!("tcp:{} loss=30%", 10_000 + n))
        .collect();
    let plan = plan(&rules);
    let devices = select(
        &list().expect("devices"),
        &Selection::Names(vec!["va".to_owned()]),
    )
    .expect("va");
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(throughput(&mut stream));
        let injection = prepare(&plan, &devices, &InjectionOptions::default())
            .and_then(PreparedInjection::start)
            .expect("rules");
        with.push(throughput(&mut stream));
        injection.remove().expect("restored");
    }
    drop(stream);
    reader.join().expect("the reader ends");
    ip(&format!("netns del {name}"));
    let median = |figures: &mut Vec<f64>| {
        figures.sort_unstable_by(f64::total_cmp);
        figures[ROUNDS / 2] / 1e9 * 8.0
    };
    let (without, with) = (median(&mut without), median(&mut with));
    let ok = with / without >= 0.97;
    measure(
        "veth TCP with 100 rules that don't match",
        with,
        "Gbit/s",
        Some(without),
        "ratio at least 0.97",
        ok,
    );
}

/// Median milliseconds that a command takes.
fn milliseconds(mut command: Command) -> f64 {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut times: Vec<f64> = (0..21)
        .map(|_| {
            let start = Instant::now();
            assert!(command.status().expect("it runs").success());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[10]
}

/// The start and the end of a run, on loopback and one more interface.
fn starting() {
    ip("link add fault-near type veth peer name fault-far");
    ip("link set fault-near up");
    let plain = milliseconds(Command::new("true"));
    for (rule, goal) in [
        ("loss=30%", 35.0),
        ("delay=5ms", 60.0),
        ("latency=5ms", 60.0),
    ] {
        let mut run = Command::new(env!("CARGO_BIN_EXE_fault"));
        let rule = format!("tcp:5432 {rule}");
        run.args(["run", "--allow-unfired", "-r", &rule, "--", "true"]);
        let over = milliseconds(run) - plain;
        measure(
            &format!("`fault run -r '{rule}' -- true` over plain `true`"),
            over,
            "ms",
            None,
            &format!("at most {goal}"),
            over <= goal,
        );
    }
    ip("link del fault-near");
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    ip("link set lo up");
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let groups: [(&str, fn()); 5] = [
        ("packets", packets),
        ("names", names),
        ("installing", installing),
        ("veth", veth),
        ("starting", starting),
    ];
    for (name, run) in groups {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            run();
        }
    }
}
