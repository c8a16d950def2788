//! Headless Chromium under rules.

use std::process::{Command, Stdio};

use super::{python, story};
use crate::support::place::{enter_fresh, fault, ip};
use crate::support::servers::Server;

/// Whether Chromium and the example's library are there; otherwise prints what is missing.
fn has_browser() -> bool {
    let works = |command: &mut Command| {
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let is_there = works(Command::new("chromium").arg("--version"))
        && works(python("browser").args(["-c", "import aiohttp"]));
    if !is_there {
        eprintln!("skipped: needs chromium and python3-aiohttp (cargo xtask setup --for test)");
    }
    is_there
}

/// What the example's page measures under a rule.
fn measure(rule: &str) -> serde_json::Value {
    let output = fault()
        .args(["run", "-r", rule, "--", "/usr/bin/python3", "browser.py"])
        .current_dir(story("browser"))
        .output()
        .expect("fault runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).expect("what the page has measured")
}

#[test]
fn a_page_is_as_slow_as_its_profile() {
    if !has_browser() {
        return;
    }
    enter_fresh();
    // Never faster than slow 3G, 200 ms each way and 400 kbit/s; a busy machine makes some pages slower.
    let mut all = Vec::new();
    while all.len() < 5 {
        let measured = measure("tcp:8080 profile=slow-3g");
        let number = |name: &str| {
            let number = measured[name].as_f64();
            number.unwrap_or_else(|| panic!("{name}: {measured}"))
        };
        let round_trips = [number("http_ms"), number("websocket_ms")];
        let rate = number("download_kbit_s");
        let is_slow = round_trips.iter().all(|&ms| ms >= 400.0) && rate <= 400.0;
        assert!(is_slow, "{measured}");
        if round_trips.iter().all(|&ms| ms < 600.0) && rate >= 100.0 {
            return;
        }
        all.push(measured);
    }
    panic!("{all:?}");
}

#[test]
fn chromium_is_selected_by_the_name_in_its_post_quantum_greeting() {
    if !has_browser() {
        return;
    }
    enter_fresh();
    // As on a network: the greeting has two segments.
    ip("link set lo mtu 1500");
    let _server = Server::https(8443);
    let profile = tempfile::tempdir().expect("a folder");
    for (name, is_selected) in [("api", true), ("www", false)] {
        let output = fault()
            .args(["run", "--allow-unfired", "-r"])
            .args(["tcp:8443 reset_peer sni=api.example.com", "--", "chromium"])
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args(["--ignore-certificate-errors", "--dump-dom"])
            .arg("--host-resolver-rules=MAP *.example.com 127.0.0.1")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(format!("https://{name}.example.com:8443/"))
            .output()
            .expect("fault runs");
        let page = String::from_utf8_lossy(&output.stdout);
        assert_eq!(page.contains(">well<"), !is_selected, "{name}: {output:?}");
    }
}
