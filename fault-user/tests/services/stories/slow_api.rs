//! A slow third party, and the patterns that bear it.

use std::net::TcpStream;

use super::{Killed, python, story};
use crate::support::place::{enter_fresh, fault, wait_for};

/// Runs a scenario with these words after `fault run -f FILE --`; the exit code and what was told.
fn play(scenario: &str, command: &[&str]) -> (Option<i32>, String) {
    let output = fault()
        .args(["run", "-f", &format!("{scenario}.yaml"), "--"])
        .args(command)
        .current_dir(story("slow-api"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let stderr_text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), stderr_text)
}

/// With its pattern the shop keeps its promise, and without it does not.
fn decides(scenario: &str, broken: &[&str]) {
    enter_fresh();
    let third_party = python("slow-api").args(["payments.py", "9000"]).spawn();
    let _third_party = Killed(third_party.expect("python3"));
    wait_for(
        || TcpStream::connect(("127.0.0.1", 9000)).is_ok(),
        "the third party",
    );
    let shop = ["/usr/bin/python3", "shop.py", scenario];
    let (code, stderr_text) = play(scenario, &shop);
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(stderr_text.contains("fault: ok: "), "{stderr_text}");
    let without: Vec<_> = shop.into_iter().chain(["without"]).collect();
    let (code, stderr_text) = play(scenario, &without);
    assert_eq!(code, Some(1), "{stderr_text}");
    for broken in broken {
        assert!(stderr_text.contains(broken), "{broken}: {stderr_text}");
    }
}

#[test]
fn timeouts_bear_a_slow_third_party() {
    decides("timeouts", &["shop: 200 after 4."]);
}

#[test]
fn a_circuit_breaker_bears_one_that_hangs() {
    decides("breaker", &["shop: 20 customers waited "]);
}

#[test]
fn a_bulkhead_keeps_it_from_the_rest() {
    let open = "FAILED: expect at most 4 open connections to payments: 8";
    decides("bulkhead", &["shop: the catalog took ", open]);
}

#[test]
fn a_scenario_that_hits_nothing_fails() {
    enter_fresh();
    let (code, stderr_text) = play("timeouts", &["true"]);
    assert_eq!(code, Some(121), "{stderr_text}");
}
