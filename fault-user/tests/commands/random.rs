//! Faults that are drawn, on real traffic.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::place::{AppliedRules, enter_fresh, fault, wait_for};
use crate::support::servers::{Redis, Server};
use crate::support::watched::Watched;

/// More faults than the kernel judges rules for one packet.
const MANY: &str = "length=900ms..1s,quiet=500ms..600ms,total=15s";

/// How exactly a test sees when a window opens and closes: on a busy machine `fault` may be late to apply drawn rules.
const BLUR: Duration = Duration::from_millis(300);

/// How much earlier than the test the rules may begin, on a busy machine.
const HEAD_START_MS: u64 = 3_000;

/// How often the server is tried.
const PACE: Duration = Duration::from_millis(10);

fn stderr_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn check(arguments: &[&str]) -> Output {
    fault().arg("check").args(arguments).output().unwrap()
}

/// The windows that a summary tells of, in milliseconds.
fn windows(stderr_text: &str) -> Vec<(Duration, Duration)> {
    let milliseconds = |text: &str| {
        let text = text.trim_end_matches('`');
        let (number, unit) = text.split_at(text.find(|c: char| c.is_alphabetic()).unwrap());
        let number: f64 = number.parse().unwrap();
        let seconds = match unit {
            "s" => number,
            "ms" => number / 1e3,
            "us" | "µs" => number / 1e6,
            "ns" => number / 1e9,
            _ => panic!("{text}"),
        };
        Duration::from_secs_f64(seconds)
    };
    let drawn = stderr_text
        .lines()
        .filter_map(|line| line.strip_prefix("fault: begins: "));
    drawn
        .map(|rule| {
            let word = |key: &str| {
                let mut words = rule.split(' ');
                words.find_map(|word| word.strip_prefix(key)).expect(key)
            };
            let at = milliseconds(word("at="));
            (at, at + milliseconds(word("for=")))
        })
        .collect()
}

#[test]
fn drawn_faults_act_only_in_their_windows() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let mut old = Redis::connect("127.0.0.1", server.port).unwrap();
    let applied = AppliedRules::begin(
        &["tcp:6379 reject match=syn", "tcp:6379 reset match=syn"],
        &format!("--scope host --seed 7 --random {MANY}"),
    );
    let start = Instant::now();
    let mut probes = Vec::new();
    while start.elapsed() < Duration::from_secs(15) {
        let before = start.elapsed();
        let fine = Redis::connect("127.0.0.1", server.port).is_ok();
        probes.push((before, start.elapsed(), fine));
        old.ping()
            .expect("no packet of the old connection is a SYN");
        // As many as there could be would use up the ports.
        std::thread::sleep(PACE);
    }
    let summary = applied.end();
    let windows = windows(&summary);
    assert!(windows.len() > 8, "{summary}");
    // The rules' clock began somewhat before the test's: by as much as agrees with all probes.
    let agrees = |head_start: u64| {
        let shift = Duration::from_millis(head_start);
        let mut tried = 0;
        let are_hit = windows.iter().all(|(from, to)| {
            let mut inside = probes
                .iter()
                .filter(|(before, after, _)| {
                    *from + BLUR < *before + shift && *after + shift + BLUR < *to
                })
                .peekable();
            tried += usize::from(inside.peek().is_some());
            inside.all(|(_, _, fine)| !fine)
        });
        let others_pass = probes.iter().all(|(before, after, fine)| {
            let is_near = |(from, to): &(Duration, Duration)| {
                *from < *after + shift + BLUR && *before + shift < *to + BLUR
            };
            *fine || windows.iter().any(is_near)
        });
        // A busy machine may sleep through most of them.
        are_hit && others_pass && tried > 2
    };
    assert!(
        (0..HEAD_START_MS).step_by(10).any(agrees),
        "{summary}\n{probes:?}"
    );
    let over = summary
        .lines()
        .filter(|line| line.starts_with("fault: ends: "));
    assert_eq!(over.count(), windows.len(), "each is logged: {summary}");
}

#[test]
fn a_seed_is_all_that_matters() {
    let rules = [
        "-r",
        "tcp:1 down",
        "-r",
        "tcp:2 loss=5%",
        "-r",
        "tcp:1 down",
    ];
    let drawn = |seed: &str, limits: &str| {
        let mut words = vec!["--json", "--random", limits, "--seed", seed];
        words.extend(rules);
        let output = check(&words);
        assert!(output.status.success(), "{}", stderr_text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let limits = "length=1s..5s quiet=1s..5s total=5m at_a_time=2 connections=25%";
    let first = drawn("3", limits);
    assert_eq!(first, drawn("3", limits));
    assert_ne!(first, drawn("4", limits));
    assert!(first.contains("tcp:1 mix 25%:down at="), "{first}");
    let count = |target: &str| first.matches(&format!("\"rule\": \"{target} mix")).count();
    assert!(count("tcp:1") > count("tcp:2"), "twice the weight: {first}");
}

#[test]
fn a_check_of_drawn_faults_is_folded() {
    let rules = ["-r", "tcp:1 down", "-r", "tcp:2 loss=5%"];
    let limits = "length=1s..5s quiet=1s..5s total=4h";
    let words = [&["--random", limits, "--seed", "3"], &rules[..]].concat();
    let output = check(&words);
    assert!(output.status.success(), "{}", stderr_text(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    // A scale, a line of the picture for each rule, and what applies each rule.
    assert_eq!(text.lines().count(), 5, "{text}");
    let times = |rule: &str| -> usize {
        let found = text.split(&format!("\n{rule} (drawn ")).nth(1).expect(rule);
        found.split(' ').next().unwrap().parse().unwrap()
    };
    assert!(
        times("tcp:1 down") + times("tcp:2 loss=5%") > 1500,
        "{text}"
    );
}

#[test]
fn a_scenario_file_draws_too() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chaos.yaml");
    std::fs::write(
        &file,
        "seed: 5\ntargets: { redis: \"tcp:6379\" }\nrandom: { choices: [ \"redis reject\" ], length: 500ms, quiet: 50ms, total: 2s }\n",
    )
    .unwrap();
    let mut inject = Watched::inject(&["-f", file.to_str().unwrap(), "--for", "2s"]);
    wait_for(
        || Redis::connect("127.0.0.1", server.port).is_err(),
        "a drawn fault",
    );
    assert_eq!(inject.finish().0, Some(0));
    assert!(Redis::connect("127.0.0.1", server.port).is_ok(), "restored");
}

#[test]
fn a_run_with_drawn_faults_is_replayed() {
    enter_fresh();
    let _server = Server::redis(6379, None);
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let command = [
        "sh",
        "-c",
        "for i in $(seq 300); do redis-cli ping >/dev/null 2>&1; echo $?; done",
    ];
    let run = fault()
        .args(["run", "--seed", "9", "-r", "tcp:6379 reject"])
        .args([
            "--random",
            "length=100ms..200ms quiet=50ms..100ms total=700ms",
        ])
        .arg("--report")
        .arg(&report)
        .arg("--")
        .args(command)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", stderr_text(&run));
    let results = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(
        results.contains("0\n") && results.contains("1\n"),
        "{results}"
    );
    let summary = stderr_text(&run);
    let rows = summary.lines().filter(|line| line.contains("(drawn "));
    assert_eq!(rows.count(), 1, "one row for all of them: {summary}");
    let junit = std::fs::read_to_string(report.join("junit.xml")).unwrap();
    let test = "name=\"the rule fires: tcp:6379 reject (drawn)\"";
    assert_eq!(junit.matches(test).count(), 1, "{junit}");
    assert!(
        junit.contains("tests=\"2\" failures=\"0\" skipped=\"0\""),
        "{junit}"
    );
    let again = fault()
        .arg("replay")
        .arg(&report)
        .arg("--")
        .args(command)
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", stderr_text(&again));
    assert_eq!(results, String::from_utf8(again.stdout).unwrap());
}

#[test]
fn mistakes_in_limits_are_named() {
    for (limits, message) in [
        ("length=1s", "total"),
        ("length=1s total=1h quiet", "`quiet` is not a limit"),
        ("length=9s total=2s", "not even one fault fits"),
        ("length=1s total=1h lenght=2s", "lenght"),
        ("length=1ms total=1h", "at most 4096 rules"),
        (
            "length=1s total=1h connections=0%",
            "nothing would ever be touched",
        ),
    ] {
        let output = check(&["--random", limits, "-r", "tcp:1 down", "--seed", "1"]);
        let stderr_text = stderr_text(&output);
        assert_eq!(output.status.code(), Some(2), "{limits}: {stderr_text}");
        assert!(!stderr_text.contains('{'), "no JSON: {stderr_text}");
        assert!(stderr_text.contains(message), "{limits}: {stderr_text}");
    }
    let timed = check(&["--random", "length=1s total=1h", "-r", "tcp:1 down at=1s"]);
    assert!(
        stderr_text(&timed).contains("times of this rule are drawn"),
        "{timed:?}"
    );
    let alone = Command::new(env!("CARGO_BIN_EXE_fault"))
        .args(["check", "--random", "length=1s total=1h"])
        .output()
        .unwrap();
    assert_eq!(alone.status.code(), Some(2), "{alone:?}");
}
