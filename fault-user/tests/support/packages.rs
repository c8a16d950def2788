//! Packages from registries, and the programs that install and use them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether a program is installed; otherwise prints that the test is skipped.
pub fn has(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Runs a command, which must succeed, and returns what it prints.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// The folder `name` for packages, which is kept between runs.
pub fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("clients")
        .join(name);
    std::fs::create_dir_all(&folder).expect("the build folder is writable");
    folder
}

/// The folder `name` with packages. `install` runs in it unless it has the file or folder `there`.
pub fn packages(name: &str, there: &str, install: &mut Command) -> PathBuf {
    let folder = folder(name);
    if !folder.join(there).exists() {
        run(install.current_dir(&folder));
    }
    folder
}

/// `pip` that installs packages into its working directory.
pub fn pip(packages: &[&str]) -> Command {
    let mut command = Command::new("pip");
    command
        .args(["install", "--quiet", "--target", "."])
        .args(packages);
    command
}

/// The folder of one of our packages for test frameworks.
pub fn client(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("clients")
        .join(name)
}

/// Installs our own `pytest-fault` from its sources into a folder that has pytest and hatchling.
pub fn install_pytest_fault(folder: &Path) {
    let mut install = pip(&["--upgrade", "--no-deps", "--no-build-isolation"]);
    install
        .arg(client("pytest-fault"))
        .current_dir(folder)
        .env("PYTHONPATH", folder);
    run(&mut install);
}

/// `python3 -m pytest` with the packages of a folder, for tests with faults that may not be skipped.
pub fn pytest(folder: &Path) -> Command {
    let mut command = Command::new("python3");
    command
        .args(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"])
        .arg("--fault-required")
        .env("PYTHONPATH", folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("FAULT", env!("CARGO_BIN_EXE_fault"));
    command
}

/// What pytest and our package are made of.
pub const PYTEST: [&str; 3] = ["pytest==8.4.2", "pytest-xdist==3.8.0", "hatchling==1.27.0"];
