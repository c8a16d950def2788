//! Expectations of scenarios, judged on real connections.

use std::io::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Output;

use crate::support::echo::{tcp_echo, udp_echo};
use crate::support::place::{Peer, enter_fresh, fault};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;
use serde_json::{Value, json};

/// A server on port 7000 that answers each line with itself.
fn echo() {
    for host in ["127.0.0.1", "::1"] {
        tcp_echo(TcpListener::bind((host, 7000)).unwrap());
    }
}

/// One exchange in bash; fails when it can't be had.
const EXCHANGE: &str =
    "exchange() { exec 3<>/dev/tcp/127.0.0.1/7000 && echo hi >&3 && read -r x <&3; } 2>/dev/null; ";

/// Runs a scenario with a script of bash.
fn run(rules: &Value, expect: &Value, script: &str) -> Output {
    run_by(&[], rules, expect, script)
}

/// The same with options.
fn run_by(options: &[&str], rules: &Value, expect: &Value, script: &str) -> Output {
    let targets = json!({ "svc": "tcp:7000", "dns": "udp:7000" });
    let scenario = json!({ "seed": 1, "targets": targets, "rules": rules, "expect": expect });
    let mut file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
    file.write_all(scenario.to_string().as_bytes()).unwrap();
    fault()
        .args(["run", "--allow-unfired"])
        .args(options)
        .arg("-f")
        .arg(file.path())
        .args(["--", "bash", "-c", &format!("{EXCHANGE}{script}")])
        .output()
        .unwrap()
}

/// What it wrote for people, after the exit code that it must have had.
fn stderr_text(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

#[track_caller]
fn assert_stderr_has(text: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(text.contains(wanted), "`{wanted}` is not in: {text}");
    }
}

/// Tries until it succeeds.
const STUBBORN: &str = "until exchange; do sleep 0.1; done";

#[test]
fn retries_are_counted_and_recovery_is_timed() {
    enter_fresh();
    echo();
    let rules = json!(["svc down for=1s"]);
    let generous = json!({
        "exit": 0, "fired": ["svc"], "max_connects": { "svc": 12 }, "connect_rate": { "svc": "12/s" },
        "recovers_within": { "svc": "800ms" }, "max_open": { "svc": 1 },
    });
    let text = stderr_text(&run(&rules, &generous, STUBBORN), 0);
    assert_stderr_has(
        &text,
        &[
            "ok: expect at most 12 connects to svc: ",
            "ok: expect svc to recover within 800ms: first answer ",
        ],
    );
    let strict = json!({
        "max_connects": { "svc": 3 }, "connect_rate": { "svc": "2/500ms" }, "recovers_within": { "svc": "1us" },
    });
    let text = stderr_text(&run(&rules, &strict, STUBBORN), 121);
    assert_eq!(text.matches("FAILED: ").count(), 3, "{text}");
    let closed = json!({ "max_open": { "svc": 0 } });
    let text = stderr_text(&run(&rules, &closed, STUBBORN), 121);
    assert_stderr_has(
        &text,
        &[
            "FAILED: expect at most 0 open connections to svc: 1",
            "fault: exit code 121: the command succeeded, but an expectation failed",
        ],
    );
}

#[test]
fn a_missing_recovery_is_reported() {
    enter_fresh();
    echo();
    let expect = json!({ "recovers_within": { "svc": "1s" } });
    let text = stderr_text(
        &run(
            &json!(["svc down for=300ms"]),
            &expect,
            "exchange; sleep 0.5",
        ),
        121,
    );
    assert_stderr_has(&text, &["no answer after the fault"]);
    let text = stderr_text(
        &run(&json!(["svc down for=1h"]), &expect, "exchange; true"),
        121,
    );
    assert_stderr_has(&text, &["lasted until the command had ended"]);
}

#[test]
fn an_open_circuit_breaker_sends_nothing() {
    enter_fresh();
    echo();
    let rules = json!(["svc down for=1s"]);
    let expect = json!({ "no_traffic_while": { "svc": "200ms" } });
    let patient = "exchange; sleep 1.1; exchange";
    assert_stderr_has(
        &stderr_text(&run(&rules, &expect, patient), 0),
        &["there was none"],
    );
    assert_stderr_has(
        &stderr_text(&run(&rules, &expect, STUBBORN), 121),
        &["there was some after "],
    );
    // Data on a connection that is open is traffic too; what TCP sends again is not.
    let rules = json!(["svc blackhole at=200ms for=1s"]);
    let once = "exchange; sleep 0.3; echo lost >&3; sleep 1.5";
    let expect = json!({ "no_traffic_while": { "svc": "400ms" } });
    stderr_text(&run(&rules, &expect, once), 0);
    let late = "exchange; sleep 0.8; echo lost >&3; sleep 1";
    stderr_text(&run(&rules, &expect, late), 121);
}

#[test]
fn slow_connects_are_felt() {
    enter_fresh();
    echo();
    let rules = json!(["svc delay=100ms"]);
    let limit = |time: &str| json!({ "p99_connect": { "svc": time } });
    stderr_text(&run(&rules, &limit("2s"), "exchange"), 0);
    let text = stderr_text(&run(&rules, &limit("150ms"), "exchange"), 121);
    assert_stderr_has(
        &text,
        &["99 of 100 connects to svc to be answered within 150ms"],
    );
    let text = stderr_text(&run(&rules, &limit("2s"), "true"), 121);
    assert_stderr_has(&text, &["there was no connection attempt"]);
}

#[test]
fn a_report_shows_each_connect() {
    enter_fresh();
    echo();
    let folder = tempfile::tempdir().unwrap();
    let output = fault()
        .args(["run", "-r", "tcp:7000 down for=300ms", "--report"])
        .arg(folder.path())
        .args(["--", "bash", "-c", &format!("{EXCHANGE}{STUBBORN}")])
        .output()
        .unwrap();
    stderr_text(&output, 0);
    let text = std::fs::read_to_string(folder.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let connects = report["connects"].as_array().unwrap();
    let (last, before) = connects.split_last().unwrap();
    assert!(!before.is_empty());
    assert!(
        before
            .iter()
            .all(|one| one["connected"] == false && one["connect_us"].is_u64())
    );
    assert_eq!(
        (&last["connected"], &last["target"]),
        (&json!(true), &json!("tcp:7000"))
    );
    let html = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    // One dot for each connect in either lane, in either size; dots that would lie on each other are one.
    let dots = html.matches("<circle").count();
    assert!(
        (4..=4 * connects.len()).contains(&dots),
        "{dots} of {}",
        connects.len()
    );
    for lane in [
        "bytes/s",
        "connects",
        "connect time",
        "time to first byte",
        "hits",
        "down for=300ms",
    ] {
        assert!(html.contains(lane), "{lane} is not drawn");
    }
    let carried = report["traffic"][0]["bytes"].as_array().unwrap();
    assert_eq!(carried.len(), report["samples"].as_array().unwrap().len());
    assert!(carried.last().unwrap().as_u64() > Some(100), "{carried:?}");
    assert_eq!(report["again"][2], "run");
}

#[test]
fn the_first_byte_is_timed_beside_the_connect() {
    enter_fresh();
    echo();
    let report = reported(&["-r", "tcp:7000 latency=100ms"], "exchange");
    let one = &report["connects"][0];
    let (connect, first_byte) = (one["connect_us"].as_u64(), one["first_byte_us"].as_u64());
    assert!(
        first_byte >= Some(200_000),
        "there and back, 100 ms each way: {one}"
    );
    assert!(connect < first_byte, "connecting takes no longer: {one}");
}

#[test]
fn a_report_says_when_an_expectation_broke() {
    enter_fresh();
    echo();
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let probe = json!({ "name": "health", "tcp": "127.0.0.1:7000", "during": "must-fail", "interval": "50ms" });
    let expect = json!({ "max_connects": { "svc": 1 }, "max_open": { "svc": 9 }, "probe": probe });
    let rules = json!(["svc down at=100ms for=300ms", "udp:53 drop"]);
    let options = ["--report", report.to_str().unwrap()];
    let output = run_by(
        &options,
        &rules,
        &expect,
        &format!("sleep 0.2; {STUBBORN}; exchange; sleep 0.3"),
    );
    stderr_text(&output, 121);
    let text = std::fs::read(report.join("report.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/report.schema.json");
    let schema: Value = serde_json::from_slice(&std::fs::read(schema).unwrap()).unwrap();
    jsonschema::validate(&schema, &json).unwrap();
    let [connects, open, probe] = [0, 1, 2].map(|index| &json["expectations"][index]);
    assert_eq!(connects["kind"], "max_connects");
    assert_eq!(connects["target"], "svc");
    assert_eq!(
        (&connects["limit"], &connects["holds"]),
        (&json!(1), &json!(false))
    );
    let second = json["connects"][1]["at_us"].as_u64().unwrap() / 1000;
    assert_eq!(connects["broke_ms"], json!(second), "the second connect");
    assert_eq!(
        (&open["holds"], &open["broke_ms"]),
        (&json!(true), &Value::Null)
    );
    // Nothing keeps the probe from its target: rules are limited to the command.
    assert_eq!(probe["kind"], "probe");
    let tries = json["probes"][0]["tries"].as_array().unwrap();
    assert!(tries.len() > 3);
    assert_eq!(
        probe["broke_ms"], tries[0]["at_ms"],
        "a rule is always open"
    );
    let html = std::fs::read_to_string(report.join("report.html")).unwrap();
    for part in [
        "probe health",
        "✗1",
        "class=\"broke\"",
        "udp:53 drop",
        "svg class=\"narrow\"",
    ] {
        assert!(html.contains(part), "{part} is not drawn");
    }
    let junit = std::fs::read_to_string(report.join("junit.xml")).unwrap();
    let name = "name=\"expect at most 1 connects to svc\"";
    assert!(junit.contains(name), "without figures: {junit}");
}

/// Runs a script of bash; the report.
fn reported(options: &[&str], script: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let output = fault()
        .arg("run")
        .args(options)
        .arg("--report")
        .arg(folder.path())
        .args(["--", "bash", "-c", &format!("{EXCHANGE}{script}")])
        .output()
        .unwrap();
    stderr_text(&output, 0);
    let text = std::fs::read(folder.path().join("report.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn an_open_connection_that_is_reset_is_reported() {
    enter_fresh();
    echo();
    let folder = tempfile::tempdir().unwrap();
    let script = "exchange; echo hi >&3; until ! read -r x <&3; do :; done; exchange; exec 3<&-";
    let output = fault()
        .args([
            "run",
            "-r",
            "tcp:7000 reset nth=5 dir=to-server conn=1",
            "--report",
        ])
        .arg(folder.path())
        .args(["--", "bash", "-c", &format!("{EXCHANGE}{script}")])
        .output()
        .unwrap();
    stderr_text(&output, 0);
    let text = std::fs::read_to_string(folder.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let resets: Vec<bool> = report["connects"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["reset_us"].is_u64())
        .collect();
    assert_eq!(resets, [true, false], "{text}");
}

#[test]
fn redirected_connections_count_under_the_dialled_address() {
    enter_fresh();
    echo();
    let rules = json!(["svc latency=10ms"]);
    // bash opens the second connection before it closes the first.
    let expect = json!({ "max_connects": { "svc": 2 }, "max_open": { "svc": 2 } });
    let text = stderr_text(&run(&rules, &expect, "exchange; exchange"), 0);
    assert_stderr_has(&text, &["at most 2 connects to svc: 2"]);
}

#[test]
fn probes_must_hold_before_and_after() {
    enter_fresh();
    echo();
    let rules = json!(["svc blackhole"]);
    let probe = |port: u16, during: &str| json!({ "probe": { "tcp": format!("127.0.0.1:{port}"), "during": during, "interval": "50ms" } });
    let text = stderr_text(&run(&rules, &probe(7000, "must-hold"), "sleep 0.3"), 0);
    assert_stderr_has(
        &text,
        &["ok: expect the probe `tcp 127.0.0.1:7000` to hold"],
    );
    let text = stderr_text(&run(&rules, &probe(7000, "must-fail"), "sleep 0.3"), 121);
    assert_stderr_has(&text, &["it also held during the fault"]);
    let output = run(&rules, &probe(9, "may-fail"), "echo started");
    assert_stderr_has(
        &stderr_text(&output, 125),
        &[
            ".json:1:",
            ": expect.probe[0]: the probe `tcp 127.0.0.1:9` fails without any fault, so the run was not started",
        ],
    );
    assert!(output.stdout.is_empty(), "the command is not started");
    // The command is what is probed, and there is time before the fault and after it.
    let rules = json!(["svc down at=300ms for=300ms"]);
    let command =
        json!({ "probe": { "command": ["test", "-e", "/proc/self"], "interval": "50ms" } });
    stderr_text(&run(&rules, &command, "sleep 1"), 0);
    let command = json!({ "probe": { "command": ["false"], "interval": "50ms" } });
    assert_stderr_has(
        &stderr_text(&run(&rules, &command, "sleep 1"), 121),
        &["not before the fault: false ended with"],
    );
}

/// A server of datagrams on port 7000 that answers each with itself.
/// One exchange of datagrams in bash; fails when nothing comes back.
const ASK: &str =
    "exec 3<>/dev/udp/127.0.0.1/7000; ask() { echo hi >&3 && read -r -t 0.2 x <&3; }; ";

#[test]
fn datagrams_are_traffic_too() {
    enter_fresh();
    udp_echo(UdpSocket::bind("127.0.0.1:7000").unwrap());
    let rules = json!(["dns drop at=300ms for=700ms"]);
    let within = |time: &str| json!({ "fired": ["dns"], "recovers_within": { "dns": time } });
    let stubborn = format!("{ASK} for n in $(seq 8); do ask || :; sleep 0.15; done");
    let text = stderr_text(&run(&rules, &within("2s"), &stubborn), 0);
    assert_stderr_has(
        &text,
        &["ok: expect dns to recover within 2s: first answer "],
    );
    stderr_text(&run(&rules, &within("1us"), &stubborn), 121);
    let given_up = format!("{ASK} ask; sleep 0.4; ask || sleep 1");
    let text = stderr_text(&run(&rules, &within("2s"), &given_up), 121);
    assert_stderr_has(&text, &["no answer after the fault"]);
    let quiet = json!({ "no_traffic_while": { "dns": "400ms" } });
    stderr_text(&run(&rules, &quiet, &given_up), 0);
    stderr_text(&run(&rules, &quiet, &stubborn), 121);
    let count = json!({ "max_connects": { "dns": 1 } });
    let text = stderr_text(&run(&rules, &count, "true"), 2);
    assert_stderr_has(&text, &["connections are counted for services of TCP"]);
}

#[test]
fn another_protocol_at_the_same_port_is_another_service() {
    enter_fresh();
    echo();
    udp_echo(UdpSocket::bind("127.0.0.1:7000").unwrap());
    let datagrams = format!("{ASK} for n in $(seq 8); do ask || :; sleep 0.15; done");
    let connections = "for n in $(seq 8); do exchange; sleep 0.15; done";
    for (quiet, script) in [("svc", datagrams.as_str()), ("dns", connections)] {
        let rules = json!([format!("{quiet} drop at=300ms for=700ms")]);
        stderr_text(
            &run(
                &rules,
                &json!({ "no_traffic_while": { quiet: "0s" } }),
                script,
            ),
            0,
        );
    }
}

#[test]
fn another_network_namespace_is_watched_alone() {
    if !version::at_least(5, 15) {
        eprintln!("skipped: sock_ops programs know network namespaces from Linux 5.15 on");
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    echo();
    NetworkNamespace::open(Path::new(&peer.name))
        .and_then(|there| {
            there.enter(|| {
                echo();
                Ok(())
            })
        })
        .unwrap();
    // One connection there, to be refused first, and two here that nobody asked about.
    let there = format!("{EXCHANGE}{STUBBORN}; sleep 0.1");
    let script = format!(
        "exchange; exchange; ip netns exec {} bash -c '{there}'",
        peer.name
    );
    let rules = json!(["svc down for=600ms"]);
    let expect =
        json!({ "fired": ["svc"], "max_open": { "svc": 1 }, "recovers_within": { "svc": "5s" } });
    let options = ["--netns", &peer.name];
    let text = stderr_text(&run_by(&options, &rules, &expect, &script), 0);
    assert_stderr_has(&text, &["open connections to svc: 1", "first answer "]);
    let here = json!({ "max_connects": { "svc": 0 } });
    stderr_text(&run_by(&options, &rules, &here, "exchange; exchange"), 0);
    stderr_text(&run_by(&options, &rules, &here, &script), 121);
    let datagrams = json!({ "no_traffic_while": { "dns": "1ms" } });
    let text = stderr_text(
        &run_by(&options, &json!(["dns drop for=1s"]), &datagrams, "true"),
        125,
    );
    assert_stderr_has(
        &text,
        &["does not report the network namespace of datagrams"],
    );
}

#[test]
fn what_cannot_be_judged_is_refused_before_anything_is_done() {
    enter_fresh();
    for (expect, complaint) in [
        (
            json!({ "max_connects": { "udp:53": 1 } }),
            "connections are counted for services of TCP",
        ),
        (
            json!({ "recovers_within": { "tcp:1234": "1s" } }),
            "no rule is aimed at `tcp:1234`",
        ),
        (
            json!({ "max_connects": { "dns:a.example": 1 } }),
            "`dns:a.example` is no service with a port",
        ),
    ] {
        let output = run(&json!(["svc loss=1%"]), &expect, "echo started");
        assert_stderr_has(&stderr_text(&output, 2), &[complaint]);
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn rules_that_contradict_each_other_are_pointed_at() {
    let check = |rules: &[&str]| {
        let rules = rules.iter().flat_map(|rule| ["-r", rule]);
        fault().arg("check").args(rules).output().unwrap()
    };
    let text = stderr_text(&check(&["tcp:80 blackhole", "tcp:80  loss=1% p=5%"]), 2);
    assert_stderr_has(
        &text,
        &[
            "`tcp:80 blackhole` leaves no packets for this rule",
            "  tcp:80  loss=1% p=5%\n          ^^^^^^^\nhelp: expected this rule before that one",
        ],
    );
    stderr_text(&check(&["tcp:80 loss=1% p=5%", "tcp:80 blackhole"]), 0);
}

#[test]
fn a_check_is_printed_as_json_too() {
    let output = fault()
        .args(["check", "--json", "-r", "tcp:80 down at=2s for=5s"])
        .output()
        .unwrap();
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        checked["rules"],
        json!([{
            "rule": "tcp:80 down at=2s for=5s", "target": "tcp:80", "mechanism": "tc", "windows_ms": [[2000, 7000]]
        }])
    );
    // Whoever reads may stop.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let status = fault()
        .args(["check", "-r", "tcp:80 down"])
        .stdout(writer)
        .status()
        .unwrap();
    assert!(status.success());
}
