//! A run is written down, and done again exactly.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Output;

use crate::support::echo::tcp_echo;
use crate::support::place::{PATIENCE, enter_fresh, fault};
use serde_json::Value;

/// Sixty messages over one connection and twenty over as many.
const SCRIPT: &str = "exec 3>/dev/udp/127.0.0.1/7000; \
    for n in $(seq 60); do echo \"a $n\" >&3; done; \
    for n in $(seq 20); do echo \"b $n\" >/dev/udp/127.0.0.1/7000; done; exit 3";

/// What comes until nothing is left: everything that is sent waits in the socket before the command has ended.
fn came(receiver: &UdpSocket) -> Vec<String> {
    let mut messages = Vec::new();
    let mut bytes = [0; 64];
    while let Ok(length) = receiver.recv(&mut bytes) {
        messages.push(String::from_utf8_lossy(&bytes[..length]).trim().to_owned());
    }
    messages
}

fn stderr_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs `fault` with these words and the script behind them.
fn go(words: &[&str], folder: &Path) -> Output {
    let mut command = fault();
    for word in words {
        if *word == "REPORT" {
            command.arg(folder);
        } else {
            command.arg(word);
        }
    }
    command.args(["--", "bash", "-c", SCRIPT]).output().unwrap()
}

#[test]
fn replay_hits_the_same_packets_at_any_time() {
    enter_fresh();
    // So few that ports are used again, by other sockets in each run: still each socket is a connection of its own.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40007").unwrap();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    for rule in [
        "udp:7000 loss=30%",
        "udp:7000 loss=ge(20%,40%)",
        "udp:7000 drop p=40% after=3",
        // Without the windows of the first run the draws alone would drop other packets.
        "udp:7000 drop p=50% at=10us period=100us duty=50%",
    ] {
        let first = go(&["run", "-r", rule, "--report", "REPORT"], &report);
        assert_eq!(first.status.code(), Some(3), "{}", stderr_text(&first));
        let expected = came(&receiver);
        let lost = 80 - expected.len();
        let written = fs::read_to_string(report.join("decisions.jsonl")).unwrap();
        assert_eq!(written.lines().count(), lost, "{rule}");
        assert!(lost > 0, "{rule}: {}", stderr_text(&first));
        for _ in 0..2 {
            let again = go(&["replay", "REPORT"], &report);
            assert_eq!(again.status.code(), Some(3), "{}", stderr_text(&again));
            assert_eq!(came(&receiver), expected, "{rule}");
        }
    }
}

/// As many connections as the first argument says, one after the other, of each a line: what came back of a message, which
/// is sent in parts of as many bytes as the second argument says, with pauses of as long as the third.
const CONNECTIONS: &str = r#"
    message=$(printf '%0600d' 7)
    for n in $(seq "$1"); do
        if ! exec 3<>/dev/tcp/127.0.0.1/7000; then echo "$n refused"; continue; fi
        for ((sent = 0; sent < 600; sent += $2)); do
            printf %s "${message:$sent:$2}" >&3 2>/dev/null || break
            sleep "$3"
        done
        came=
        IFS= read -r -N 600 came <&3
        echo "$n ${#came} $came"
        exec 3>&-
    done
    true"#;

/// A service that sends back what it gets, and the folder for reports.
fn echo_at_7000() -> tempfile::TempDir {
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    tempfile::tempdir().unwrap()
}

/// Runs `fault` with these words and [`CONNECTIONS`] with these arguments. What the client has printed, and what `fault`.
fn connect(words: &[&str], client: [&str; 3]) -> [String; 2] {
    let mut command = fault();
    command.args(words).args(["--", "bash", "-c", CONNECTIONS]);
    let output = command.arg("client").args(client).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    [printed, stderr_text(&output)]
}

/// The decisions of a report, without their times.
fn decisions(report: &Path) -> Vec<Value> {
    let text = fs::read_to_string(report.join("decisions.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut decision: Value = serde_json::from_str(line).unwrap();
        decision.as_object_mut().unwrap().remove("time_ns");
        decision
    });
    lines.collect()
}

/// Changes the seed of a report.
fn reseed(report: &Path) {
    let path = report.join("report.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["seed"] = (json["seed"].as_u64().unwrap() ^ 1).into();
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn replay_hits_the_same_connections_at_any_time_and_by_any_seed() {
    let folder = echo_at_7000();
    let (first, again) = (folder.path().join("first"), folder.path().join("again"));
    for rule in [
        "tcp:7000 reset_peer p=50%",
        "tcp:7000 limit_data=100 dir=to-client p=40% conn=3..",
        "tcp:7000 mix 30%:reset_peer 30%:limit_data=100",
    ] {
        let run = ["run", "-r", rule, "--report", first.to_str().unwrap()];
        let [expected, _] = connect(&run, ["40", "600", "0"]);
        let hit = expected.lines().filter(|line| !line.contains(" 600 "));
        let hit = hit.count();
        assert!((5..=35).contains(&hit), "{rule}: {expected}");
        let recorded = decisions(&first);
        let acts = recorded.iter().filter(|one| one.get("at").is_none());
        let acts: BTreeSet<_> = acts.map(|one| one["connection"].as_u64()).collect();
        assert_eq!(acts.len(), hit, "{rule}: {recorded:?}");
        // The record decides, not the seed.
        reseed(&first);
        let replay = ["replay", first.to_str().unwrap(), "--report"];
        let replay = [&replay[..], &[again.to_str().unwrap()]].concat();
        for client in [["40", "600", "0"], ["40", "600", "0.002"]] {
            let [printed, told] = connect(&replay, client);
            assert_eq!(printed, expected, "{rule}: {told}");
            assert!(!told.contains("not repeated"), "{told}");
            assert_eq!(decisions(&again), recorded, "{rule}");
        }
    }
}

#[test]
fn replay_draws_the_same_whatever_is_read_at_a_time() {
    let folder = echo_at_7000();
    let (first, again) = (folder.path().join("first"), folder.path().join("again"));
    let drawn = |report: &Path| {
        let mut drawn = decisions(report);
        // The end of a connection, which has 600 bytes each way, may come after that of the run.
        drawn.retain(|one| one.get("value").is_some() && one["at"] != 600);
        drawn.sort_by_key(|one| {
            let direction = one["direction"].to_string();
            (one["connection"].as_u64(), direction, one["at"].as_u64())
        });
        drawn
    };
    let values = |drawn: &[Value]| {
        let values = drawn.iter().map(|one| one["value"].as_u64().unwrap());
        values.collect::<BTreeSet<_>>().len()
    };
    // Where a message begins does not depend on when it comes; where the parts of one begin does.
    for (rule, parts, fewest) in [
        ("tcp:7000 latency=2ms~2ms", "600", 60),
        ("tcp:7000 slicer=50~30", "120", 10),
    ] {
        let run = ["run", "-r", rule, "--report", first.to_str().unwrap()];
        connect(&run, ["40", "600", "0"]);
        let expected = drawn(&first);
        assert!(values(&expected) >= fewest, "{rule}");
        let replay = ["replay", first.to_str().unwrap(), "--report"];
        connect(
            &[&replay[..], &[again.to_str().unwrap()]].concat(),
            ["40", parts, "0.001"],
        );
        assert!(drawn(&again) == expected, "{rule}: other draws");
    }
}

#[test]
fn replay_picks_the_same_datagrams_of_each_client() {
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_nonblocking(true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let rule = "udp:7000 corrupt_data=zero,offset:0 every=3 count=rule p=60%";
    let first = go(&["run", "-r", rule, "--report", "REPORT"], &report);
    assert_eq!(first.status.code(), Some(3), "{}", stderr_text(&first));
    // Of several clients any may be the first.
    let sorted = || {
        let mut all = came(&receiver);
        all.sort();
        all
    };
    let expected = sorted();
    let hit = expected.iter().filter(|one| one.starts_with('\0')).count();
    assert!(expected.len() == 80 && hit > 0, "{expected:?}");
    reseed(&report);
    let again = go(&["replay", "REPORT"], &report);
    assert_eq!(again.status.code(), Some(3), "{}", stderr_text(&again));
    assert_eq!(sorted(), expected, "{}", stderr_text(&again));
}

#[test]
fn what_a_replay_does_not_repeat_is_said() {
    let folder = echo_at_7000();
    let report = folder.path().join("report");
    let report = report.to_str().unwrap();
    let rule = "tcp:7000 limit_data=100 dir=to-client every=2";
    connect(&["run", "-r", rule, "--report", report], ["10", "600", "0"]);
    for (connections, expected) in [
        ("10", ""),
        (
            "5",
            "3 of 5 recorded decisions were not repeated, because their connections did not come",
        ),
        (
            "13",
            "13 connections came, 10 in the recorded run: the rule does not act on those beyond",
        ),
    ] {
        let [printed, told] = connect(&["replay", report], [connections, "600", "0"]);
        let hit = printed.lines().filter(|line| !line.contains(" 600 "));
        assert_eq!(
            hit.count(),
            if connections == "5" { 2 } else { 5 },
            "{told}"
        );
        if expected.is_empty() {
            assert!(!told.contains("warning"), "{told}");
        } else {
            assert!(told.contains(expected), "{told}");
        }
    }
}

#[test]
fn decisions_that_come_too_fast_are_missed_out_loud() {
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    // Twice as many as there is room for, while nobody reads them.
    let flood = "kill -STOP $PPID; exec 3<>/dev/udp/127.0.0.1/7000
        for ((n = 0; n < 40000; n++)); do printf x >&3; done; kill -CONT $PPID";
    let first = fault()
        .args(["run", "-r", "udp:7000 drop", "--report"])
        .arg(&report)
        .args(["--", "bash", "-c", flood])
        .output()
        .unwrap();
    assert!(first.status.success(), "{}", stderr_text(&first));
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(report.join("report.json")).unwrap()).unwrap();
    let lost = json["decisions_lost"].as_u64().unwrap();
    assert!(lost > 0, "{}", stderr_text(&first));
    assert!(stderr_text(&first).contains(&format!("{lost} events were lost")));
    let written = fs::read_to_string(report.join("decisions.jsonl")).unwrap();
    let hit = &json["rules"][0]["hit"]["packets"];
    assert_eq!(written.lines().count() as u64 + lost, *hit);
    let again = fault()
        .arg("replay")
        .arg(&report)
        .args(["--", "bash", "-c", "echo > /dev/udp/127.0.0.1/7000"])
        .output()
        .unwrap();
    let warning = format!("warning: {lost} decisions came too fast");
    assert!(
        stderr_text(&again).contains(&warning),
        "{}",
        stderr_text(&again)
    );
}

#[test]
fn a_report_tells_everything_in_every_form() {
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let (report, summary) = (
        folder.path().join("report"),
        folder.path().join("summary.md"),
    );
    let _receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    let scenario = folder.path().join("scenario.yaml");
    fs::write(
        &scenario,
        "targets: { service: \"udp:7000\" }\nrules: [\"service drop p=50%\", \"tcp:1 drop at=5ms\"]\nexpect: { exit: 0, fired: [service] }\n",
    )
    .unwrap();
    let output = fault()
        .args(["run", "--seed", "5", "-f"])
        .arg(&scenario)
        .arg("--report")
        .arg(&report)
        .args(["--", "bash", "-c", SCRIPT, "<&>\"'"])
        .env("GITHUB_STEP_SUMMARY", &summary)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr_text(&output));
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(report.join("report.json")).unwrap()).unwrap();
    assert_eq!(json["seed"], 5);
    assert_eq!(json["command_exit"], 3);
    assert_eq!(json["targets"]["service"], "udp:7000");
    assert_eq!(json["rules"][0]["seen"]["packets"], 80);
    assert_eq!(json["rules"][1]["fired"], false);
    assert_eq!(json["expectations"][0]["holds"], false);
    assert!(json["samples"].as_array().unwrap().len() >= 2);
    let junit = fs::read_to_string(report.join("junit.xml")).unwrap();
    assert!(junit.contains("tests=\"5\" failures=\"3\""), "{junit}");
    assert!(junit.contains("&lt;&amp;&gt;"), "{junit}");
    let html = fs::read_to_string(report.join("report.html")).unwrap();
    for part in [
        "<svg",
        "service drop p=50%",
        "never fired",
        "prefers-color-scheme",
        "&lt;&amp;&gt;",
    ] {
        assert!(html.contains(part), "{part} is not in {html}");
    }
    assert!(!html.contains("http"), "nothing is fetched");
    let summary = fs::read_to_string(&summary).unwrap();
    assert!(summary.contains("| `service drop p=50%` |"), "{summary}");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        printed.contains("::error::fault: the rule `tcp:1 drop at=5ms` never fired"),
        "{printed}"
    );
}

/// Runs `fault` with these words and a command; its output, its report's folder and its summary for GitHub.
fn report_of(words: &[&str], folder: &Path) -> (Output, serde_json::Value, [String; 3]) {
    let (report, summary) = (folder.join("report"), folder.join("summary.md"));
    let output = fault()
        .args(words)
        .arg("--report")
        .arg(&report)
        .args(["--", "true"])
        .env("GITHUB_STEP_SUMMARY", &summary)
        .output()
        .unwrap();
    let json = serde_json::from_slice(&fs::read(report.join("report.json")).unwrap()).unwrap();
    let texts = [
        report.join("junit.xml"),
        report.join("report.html"),
        summary,
    ];
    (
        output,
        json,
        texts.map(|path| fs::read_to_string(path).unwrap()),
    )
}

#[test]
fn unfired_rules_are_accepted_in_every_form() {
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let rule = ["-r", "tcp:1 drop"];
    let strict = [&["run"], &rule[..]].concat();
    let (output, json, [junit, html, summary]) = report_of(&strict, folder.path());
    assert_eq!(output.status.code(), Some(120), "{}", stderr_text(&output));
    assert_eq!(json["rules"][0]["accepted"], false);
    assert!(junit.contains("failures=\"1\" skipped=\"0\""), "{junit}");
    assert!(html.contains("<tr class=\"failed\">"), "{html}");
    assert!(summary.contains("❌"), "{summary}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("::error::"));
    let accepting = [&["run", "--allow-unfired"], &rule[..]].concat();
    let replaying = [
        "replay",
        folder.path().join("first/report").to_str().unwrap(),
    ]
    .map(str::to_owned);
    for words in [accepting, replaying.iter().map(String::as_str).collect()] {
        let name = if words[0] == "run" { "first" } else { "again" };
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        let (output, json, [junit, html, summary]) = report_of(&words, &folder);
        assert_eq!(output.status.code(), Some(0), "{}", stderr_text(&output));
        let text = stderr_text(&output);
        assert!(text.contains("never fired (accepted)"), "{text}");
        let rule = &json["rules"][0];
        assert_eq!(
            (&rule["fired"], &rule["accepted"]),
            (&false.into(), &true.into())
        );
        assert_eq!(json["allow_unfired"], true);
        assert!(junit.contains("failures=\"0\" skipped=\"1\""), "{junit}");
        assert!(!html.contains("<tr class=\"failed\">"), "{html}");
        assert!(!summary.contains("❌"), "{summary}");
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(!printed.contains("::error::"), "{printed}");
    }
    // An injection has no exit code for it, but says the same.
    let output = fault()
        .args([
            "inject",
            "-r",
            "tcp:1 drop",
            "--for",
            "10ms",
            "--allow-unfired",
        ])
        .output()
        .unwrap();
    let text = stderr_text(&output);
    assert!(text.contains("never fired (accepted)"), "{text}");
}

#[test]
fn what_is_no_report_is_said() {
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    let output = go(&["replay", "REPORT"], folder.path());
    assert_eq!(output.status.code(), Some(2), "{}", stderr_text(&output));
    assert!(
        stderr_text(&output).contains("report.json"),
        "{}",
        stderr_text(&output)
    );
    fs::write(folder.path().join("report.json"), "{\"version\": 1}").unwrap();
    let output = go(&["replay", "REPORT"], folder.path());
    assert_eq!(output.status.code(), Some(2), "{}", stderr_text(&output));
    assert!(
        stderr_text(&output).contains("is a report of format 1"),
        "{}",
        stderr_text(&output)
    );
    fs::write(folder.path().join("report.json"), "{}").unwrap();
    let output = go(&["replay", "REPORT"], folder.path());
    assert_eq!(output.status.code(), Some(2), "{}", stderr_text(&output));
    assert!(
        stderr_text(&output).contains("not a report"),
        "{}",
        stderr_text(&output)
    );
}
