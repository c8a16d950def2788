//! Published Toxiproxy clients, installed from their registries and unchanged, drive a real proxy.
//!
//! They are kept in the build's temporary folder, so that only the first run installs them. Where the tool of a
//! language is missing its test says so and is skipped; where a registry can't be reached it fails.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::daemon::Daemon;
use crate::support::echo::echo_server;
use crate::support::packages::{folder, has, packages, pip, run};

const DRIVERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");

#[test]
fn toxiproxy_node_client() {
    if !has("node") || !has("npm") {
        return;
    }
    let mut install = Command::new("npm");
    install.args(["install", "--no-audit", "--no-fund"]);
    install.arg("toxiproxy-node-client@4.1.0");
    let there = "node_modules/toxiproxy-node-client";
    let folder = packages("node", there, &mut install);
    let daemon = Daemon::start();
    let mut driver = Command::new("node");
    driver
        .arg(format!("{DRIVERS}/driver.mjs"))
        .arg(format!("http://{}", daemon.api))
        .arg(echo_server().to_string());
    assert!(run(driver.current_dir(&folder)).starts_with("driven"));
}

#[test]
fn toxiproxy_python() {
    if !has("python3") || !has("pip") {
        return;
    }
    let mut install = pip(&["toxiproxy-python==0.1.1"]);
    let folder = packages("python", "toxiproxy", &mut install);
    let daemon = Daemon::start();
    let mut driver = Command::new("python3");
    driver
        .arg(format!("{DRIVERS}/driver.py"))
        .arg(daemon.api.ip().to_string())
        .arg(daemon.api.port().to_string());
    assert!(
        run(driver
            .arg(echo_server().to_string())
            .env("PYTHONPATH", &folder))
        .starts_with("driven")
    );
}

#[test]
fn chaostoolkit_toxiproxy() {
    if !has("python3") || !has("pip") {
        return;
    }
    let mut install = pip(&["chaostoolkit-toxiproxy==0.3.1", "chaostoolkit-lib==1.44.0"]);
    let folder = packages("chaostoolkit", "chaostoxi", &mut install);
    let daemon = Daemon::start();
    let upstream = echo_server();
    let mut driver = Command::new("python3");
    driver
        .arg(format!("{DRIVERS}/chaostoolkit.py"))
        .arg(format!("http://{}", daemon.api))
        .arg(upstream.ip().to_string())
        .arg(upstream.port().to_string());
    assert_eq!(run(driver.env("PYTHONPATH", &folder)), "driven\n");
}

/// A project with the published Rust client and our driver of it; its folder.
fn rust_project() -> PathBuf {
    let folder = folder("rust");
    let manifest = "[package]\nname = \"driver\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[[bin]]\nname = \"driver\"\npath = \"driver.rs\"\n\n\
         [dependencies]\ntoxiproxy_rust = \"=0.1.6\"\n\n[workspace]\n";
    std::fs::write(folder.join("Cargo.toml"), manifest).expect("write");
    std::fs::copy(format!("{DRIVERS}/driver.rs"), folder.join("driver.rs")).expect("copy");
    folder
}

/// Has cargo work in that project.
fn cargo(command: &mut Command, folder: &Path) -> String {
    let target = folder.join("target");
    run(command.current_dir(folder).env("CARGO_TARGET_DIR", target))
}

#[test]
fn toxiproxy_rust() {
    let folder = rust_project();
    let mut build = Command::new(env!("CARGO"));
    cargo(build.args(["build", "--quiet"]), &folder);
    let daemon = Daemon::start();
    let mut driver = Command::new(folder.join("target/debug/driver"));
    assert_eq!(
        run(driver
            .arg(daemon.api.to_string())
            .arg(echo_server().to_string())),
        "driven\n"
    );
}

#[test]
fn the_rust_clients_own_tests_pass() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root may make a network namespace");
        return;
    }
    let folder = rust_project();
    let own = ["--package", "toxiproxy_rust", "--test", "toxiproxy_rust"];
    let mut build = Command::new(env!("CARGO"));
    cargo(build.args(["test", "--no-run"]).args(own), &folder);
    let daemon = Daemon::alone();
    let mut tests = Command::new("nsenter");
    tests
        .arg(format!("--net=/proc/{}/ns/net", daemon.child.id()))
        .args([env!("CARGO"), "test", "--offline"])
        .args(own)
        // They share one proxy.
        .args(["--", "--test-threads=1"]);
    let said = cargo(&mut tests, &folder);
    assert!(said.contains("test result: ok. 11 passed"), "{said}");
}

#[test]
fn libraries_understand_injected_errors_as_their_servers() {
    if !has("python3") || !has("pip") {
        return;
    }
    let mut install = pip(&["redis==5.2.1", "pymemcache==4.0.0", "PyMySQL==1.1.1"]);
    let folder = packages("errors", "pymysql", &mut install);
    let daemon = Daemon::start();
    let mut driver = Command::new("python3");
    driver
        .arg(format!("{DRIVERS}/errors.py"))
        .arg(daemon.api.ip().to_string())
        .arg(daemon.api.port().to_string());
    assert!(run(driver.env("PYTHONPATH", &folder)).starts_with("understood"));
}
