//! What the kernel programs cost: a packet by `BPF_PROG_TEST_RUN`, a veth pair's throughput, a run's start.
//!
//! Prints one JSON object a line, as `cargo xtask bench` reads them. Runs as root, in network namespaces of
//! its own.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aya::programs::{TestRun as _, TestRunOptions};
use fault_user::inject::injection::{InjectionOptions, PreparedInjection};
use fault_user::inject::injector::{Capacity, Clock, Injector, Options, Side};
use fault_user::inject::preparation::prepare;
use fault_user::plan::Plan;
use fault_user::plan::needs::Needs;
use fault_user::plan::tables::compile;
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::sys::clock::monotonic_ns;
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::undo::instance::Marks;
use nix::sched::{CloneFlags, unshare};

/// Runs of a program for one figure.
const REPEAT: u32 = 1_000_000;
/// How often a figure is taken; the smallest counts, because everything else that runs here only adds.
const ROUNDS: usize = 5;

/// Prints one figure.
fn measure(name: &str, value: f64, unit: &str, reference: Option<f64>, goal: &str, ok: bool) {
    let ratio = reference.map(|reference| value / reference);
    println!(
        "{}",
        serde_json::json!({
            "name": name, "value": value, "unit": unit, "reference": reference, "ratio": ratio,
            "goal": goal, "ok": ok,
        })
    );
}

fn plan(rules: &[String]) -> Plan {
    let rules: Vec<_> = rules
        .iter()
        .map(|text| {
            let rule: Rule = text.parse().expect("a valid rule");
            let resolved = rule
                .resolve(&Targets::new(), &mut SystemResolver)
                .expect("a target");
            (rule, resolved)
        })
        .collect();
    Plan::new(&rules, 1, None, None).expect("a plan")
}

/// A TCP segment with 100 bytes of payload, to port 5432.
fn segment() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([
        0x45, 0, 0, 140, 0, 1, 0, 0, 64, 6, 0, 0, 10, 1, 0, 1, 10, 1, 0, 2,
    ]);
    frame.extend([
        0x9c, 0x40, 0x15, 0x38, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    frame.extend([0x55; 100]);
    frame
}

/// Nanoseconds that the egress program takes for the segment under these rules.
fn nanoseconds(rules: &[String]) -> f64 {
    let plan = plan(rules);
    let tables = compile(&plan.entries()).expect("tables");
    let mut injector = Injector::load(&Options {
        capacity: Capacity::of(&tables).expect("a capacity"),
        events: false,
        trace: false,
        attachment: None,
        needs: Needs::of(&plan.entries()),
        scoped: false,
        matches: plan.entries().len(),
        tap: None,
        holder: 0,
        detour: None,
        places: 0,
        replay: None,
        xdp: false,
        clock: Clock::Tick,
        number: 0,
        marks: Marks::NONE,
    })
    .expect("the maps (run as root)");
    injector.install(&tables, monotonic_ns()).expect("rules");
    let frame = segment();
    let program = injector.program(Side::Egress, true).expect("the program");
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        options.repeat = REPEAT;
        let run = program.test_run(options).expect("a test run");
        best = best.min(run.duration.as_secs_f64() * 1e9);
    }
    best
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
        "at most 120",
        matched <= 120.0,
    );
    let corrupted = nanoseconds(&["tcp:5432 corrupt=100%".to_owned()]);
    measure(
        "corrupt visible",
        corrupted,
        "ns",
        None,
        "at most 250",
        corrupted <= 250.0,
    );
}

fn installing() {
    let rules: Vec<String> = (0..4096)
        .map(|n| format!("tcp:{} loss=30%", 10_000 + n))
        .collect();
    let plan = plan(&rules);
    let mut injector = Injector::load(&Options {
        capacity: Capacity {
            rules: 4096,
            classes: 8192,
            hosts: 1,
            names: 0,
            scopes: 1,
            connections: 1,
        },
        events: false,
        trace: false,
        attachment: None,
        needs: Needs::of(&plan.entries()),
        scoped: false,
        matches: plan.entries().len(),
        tap: None,
        holder: 0,
        detour: None,
        places: 0,
        replay: None,
        xdp: false,
        clock: Clock::Tick,
        number: 0,
        marks: Marks::NONE,
    })
    .expect("the maps");
    let start = Instant::now();
    let tables = compile(&plan.entries()).expect("tables");
    injector.install(&tables, monotonic_ns()).expect("rules");
    let took = start.elapsed().as_secs_f64() * 1e3;
    measure(
        "putting 4,096 rules in force",
        took,
        "ms",
        None,
        "at most 100",
        took <= 100.0,
    );
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status();
    assert!(done.expect("ip runs").success(), "ip {words}");
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
    command.stdin(Stdio::null()).stdout(Stdio::null());
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

fn starting() {
    let plain = milliseconds(Command::new("true"));
    let mut run = Command::new(env!("CARGO_BIN_EXE_fault"));
    run.args([
        "run",
        "--allow-unfired",
        "-r",
        "tcp:5432 loss=30%",
        "--",
        "true",
    ]);
    let over = milliseconds(run) - plain;
    measure(
        "`fault run -- true` over plain `true`",
        over,
        "ms",
        None,
        "at most 80",
        over <= 80.0,
    );
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    ip("link set lo up");
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let groups: [(&str, fn()); 4] = [
        ("packets", packets),
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
