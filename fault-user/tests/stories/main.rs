//! The stories of `fault-user/examples`, on real servers.

#[path = "../end_to_end/place.rs"]
#[expect(dead_code, reason = "most of it is for the suite end_to_end")]
mod place;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use place::{Server, enter_fresh};

/// The folder of a story.
fn story(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
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
        .output()
        .expect("python3-pytest (cargo xtask setup --for test)");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!told.contains("skipped"), "{told}");
}
