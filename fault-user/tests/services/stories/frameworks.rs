//! Our packages for test frameworks: their own tests, against this build of `fault`.

use std::process::Command;

use crate::support::packages::{
    PYTEST, client, has, install_pytest_fault, packages, pip, pytest, run,
};
use crate::support::place::enter_fresh;

/// Node.js, for tests with faults that may not be skipped.
fn node() -> Command {
    let mut command = Command::new("node");
    command
        .env("FAULT", env!("CARGO_BIN_EXE_fault"))
        .env("FAULT_REQUIRED", "1");
    command
}

#[test]
fn pytest_fault_passes_its_own_tests() {
    if !has("python3") || !has("pip") {
        return;
    }
    let folder = packages("pytest-fault", "xdist", &mut pip(&PYTEST));
    install_pytest_fault(&folder);
    enter_fresh();
    let printed = run(pytest(&folder).current_dir(client("pytest-fault")));
    assert!(!printed.contains("skipped"), "{printed}");
}

#[test]
fn fault_test_passes_its_own_tests() {
    if !has("node") {
        return;
    }
    enter_fresh();
    let printed = run(node().arg("--test").current_dir(client("fault-test")));
    assert!(printed.contains("skipped 0"), "{printed}");
}

#[test]
fn fault_test_works_in_jest_and_vitest() {
    if !has("node") || !has("npm") {
        return;
    }
    let npm = || {
        let mut command = Command::new("npm");
        command.args(["install", "--no-audit", "--no-fund"]);
        command
    };
    let runners = ["jest@30.2.0", "vitest@3.2.4"];
    let folder = packages("runners", "node_modules/vitest", npm().args(runners));
    // Anew each time, as it is published.
    run(npm()
        .args(["--install-links", "--no-save"])
        .arg(client("fault-test"))
        .current_dir(&folder));
    let tests = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/clients/runners.test.mjs"
    );
    std::fs::copy(tests, folder.join("runners.test.mjs")).expect("copied");
    let config = r#"{"testMatch": ["**/*.test.mjs"], "transform": {}}"#;
    std::fs::write(folder.join("jest.config.json"), config).expect("written");
    enter_fresh();
    run(node()
        .args(["--experimental-vm-modules", "node_modules/jest/bin/jest.js"])
        .args(["--config", "jest.config.json"])
        .current_dir(&folder));
    run(node()
        .args(["node_modules/vitest/vitest.mjs", "run", "--globals"])
        .current_dir(&folder));
}
