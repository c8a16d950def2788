//! What several benchmarks need.
#![allow(dead_code, reason = "each benchmark uses a part of it")]

#[path = "../../tests/support/dns.rs"]
pub mod dns;

use std::process::Command;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use fault_common::dns::DockerPorts;
use fault_user::inject::injector::{Capacity, Clock, Injector, Options};
use fault_user::plan::Plan;
use fault_user::plan::needs::Needs;
use fault_user::plan::tables::{Tables, compile};
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::sys::clock::monotonic_ns;
use fault_user::undo::instance::Marks;

/// Prints one figure.
pub fn measure(name: &str, value: f64, unit: &str, reference: Option<f64>, goal: &str, ok: bool) {
    let ratio = reference.map(|reference| value / reference);
    println!(
        "{}",
        serde_json::json!({
            "name": name, "value": value, "unit": unit, "reference": reference, "ratio": ratio,
            "goal": goal, "ok": ok,
        })
    );
}

/// A plan of these rules.
pub fn plan(rules: &[String]) -> Plan {
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

/// The programs for a plan, not attached, with its rules applied and room for this many connections.
pub fn injector(plan: &Plan, connections: u32) -> Injector {
    let tables = compile(&plan.entries(), None).expect("tables");
    let mut injector = load(plan, &tables, connections);
    injector.install(&tables, monotonic_ns()).expect("rules");
    injector
}

/// The same without rules.
pub fn load(plan: &Plan, tables: &Tables, connections: u32) -> Injector {
    Injector::load(&Options {
        capacity: Capacity {
            connections,
            ..Capacity::of(tables).expect("a capacity")
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
        divider: None,
        replay: None,
        xdp: false,
        docker_ports: DockerPorts::default(),
        clock: Clock::Tick,
        number: 0,
        marks: Marks::NONE,
    })
    .expect("the maps (run as root)")
}

/// A TCP segment with 100 bytes of payload, from connection `number` to `port`.
pub fn segment(number: u32, port: u16) -> Vec<u8> {
    let [_, a, b, _] = number.to_be_bytes();
    let from = 40_000 + u16::from(number.to_be_bytes()[3]);
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([
        0x45, 0, 0, 140, 0, 1, 0, 0, 64, 6, 0, 0, 10, 1, a, b, 10, 2, 0, 2,
    ]);
    frame.extend(from.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend([0x55; 100]);
    frame
}

/// A datagram with a message from a server of DNS.
pub fn dns_response(message: &[u8]) -> Vec<u8> {
    let length = |header: usize| {
        let length = u16::try_from(header + message.len()).expect("short");
        length.to_be_bytes()
    };
    let [ip, udp] = [length(28), length(8)];
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, ip[0], ip[1], 0, 1, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 2, 0, 53, 10, 1, 0, 0]);
    frame.extend([0, 53, 0x9c, 0x40, udp[0], udp[1], 0, 0]);
    frame.extend(message);
    frame
}

/// Nanoseconds that a program takes for a frame, on average over `repeat` runs.
pub fn nanoseconds(program: &mut SchedClassifier, frame: &[u8], repeat: u32) -> f64 {
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.repeat = repeat;
    let run = program.test_run(options).expect("a test run");
    run.duration.as_secs_f64() * 1e9
}

/// Runs `ip`.
pub fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status();
    assert!(done.expect("ip runs").success(), "ip {words}");
}
