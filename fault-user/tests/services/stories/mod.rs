//! The stories of `fault-user/examples`, on real servers.

mod browser;
mod ci;
mod frameworks;
mod nats;
mod slow_api;
#[expect(
    clippy::needless_pass_by_value,
    reason = "cucumber hands a step what it has read"
)]
mod users;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::support::packages::client;
use crate::support::place::enter_fresh;
use crate::support::servers::Server;

/// The folder of a story.
fn story(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill();
        self.0.wait().expect("it is our child");
    }
}

/// Debian's Python, which has Debian's packages, in a story's folder.
fn python(name: &str) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command
        .current_dir(story(name))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("FAULT", env!("CARGO_BIN_EXE_fault"))
        .stdin(Stdio::null());
    command
}

#[test]
fn postgres_from_pytest() {
    enter_fresh();
    let _server = Server::postgres(5432);
    let output = python("postgres-pytest")
        .args(["-m", "pytest", "-p", "no:cacheprovider", "-q"])
        // Debian's pytest, whose plugin is not installed.
        .args(["-p", "pytest_fault.plugin", "--fault-required"])
        .env("PYTHONPATH", client("pytest-fault").join("src"))
        .output()
        .expect("python3-pytest (cargo xtask setup --for test)");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!stdout.contains("skipped"), "{stdout}");
}
