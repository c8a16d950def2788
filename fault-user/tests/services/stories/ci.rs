//! The GitHub Action and the GitLab template, with releases on a server of the test's own.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use super::Killed;
use crate::support::place::{enter_fresh, has_bash, hierarchy, wait_for};

/// Releases on loopback.
const SERVER: &str = "127.0.0.1:8099";
/// The commit of the release.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The user whose job it is: nobody, who may use sudo for everything.
const USER: u32 = 65_534;
const SUDOERS: &str = "Defaults env_reset,secure_path=\"/usr/sbin:/usr/bin:/sbin:/bin\"\n\
                       root ALL=(ALL) ALL\n#65534 ALL=(ALL) NOPASSWD: ALL\n";
/// Runs the words behind it as [`USER`], with the file `$0` in the place of /etc/sudoers.
const AS_USER: &str = "mount --bind \"$0\" /etc/sudoers && \
                       exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn binary() -> String {
    format!("fault-linux-{}", std::env::consts::ARCH)
}

/// A job of a CI system: a checkout of the Action, releases, and the files that the runner gives to each step.
struct Job {
    folder: TempDir,
    _server: Killed,
}

impl Job {
    /// `None`, with the reason printed, where such a job can't run.
    fn start() -> Option<Self> {
        let has_sudo = Path::new("/etc/sudoers").exists();
        if !has_sudo {
            eprintln!("skipped: there is no sudo");
        }
        if !has_sudo || !has_bash() || hierarchy().is_none() {
            return None;
        }
        enter_fresh();
        let folder = tempfile::tempdir().unwrap();
        let server = Command::new("/usr/bin/python3")
            .args(["-m", "http.server", "--bind", "127.0.0.1", "8099"])
            .args(["--directory".as_ref(), folder.path().as_os_str()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3");
        let job = Self {
            folder,
            _server: Killed(server),
        };
        job.check_out();
        job.publish();
        job.write_tools();
        let done = Command::new("chown")
            .arg("-R")
            .arg(format!("{USER}:{USER}"))
            .args(["action", "work", "temp"].map(|name| job.path(name)))
            .status();
        assert!(done.unwrap().success());
        wait_for(|| TcpStream::connect(SERVER).is_ok(), "the server");
        Some(job)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The part of a checkout that the Action uses.
    fn check_out(&self) {
        for name in ["action/.github/action", "work", "temp", "tools"] {
            fs::create_dir_all(self.path(name)).unwrap();
        }
        fs::set_permissions(self.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in [
            "Cargo.toml",
            ".github/action/install.sh",
            ".github/action/run.sh",
        ] {
            fs::copy(repository().join(name), self.path("action").join(name)).unwrap();
        }
    }

    /// Makes a release of the version in the checkout.
    fn publish(&self) {
        fs::create_dir(self.release()).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_fault"), self.release().join(binary())).unwrap();
        let sums = Command::new("sha256sum")
            .arg(binary())
            .current_dir(self.release())
            .output()
            .unwrap();
        fs::write(self.release().join("SHA256SUMS"), sums.stdout).unwrap();
        fs::write(self.release().join("COMMIT"), format!("{COMMIT}\n")).unwrap();
    }

    fn release(&self) -> PathBuf {
        self.path(concat!("v", env!("CARGO_PKG_VERSION")))
    }

    /// What a step like setup-python puts into PATH, a `cargo` that is quick, and who may use sudo.
    fn write_tools(&self) {
        self.write("sudoers", SUDOERS, 0o440);
        let script = "#!/bin/sh\necho \"only-here as $(id -u) with $MARK\"\n";
        self.write("tools/only-here", script, 0o755);
        let script = format!(
            "#!/bin/sh\nmkdir -p target/release && cp {} target/release/fault\n",
            self.release().join(binary()).display()
        );
        self.write("tools/cargo", &script, 0o755);
    }

    /// Runs a program as the job's user, with these variables.
    fn step(&self, words: &[&str], variables: &[(&str, &str)]) -> Output {
        let path = format!(
            "{}:{}:/usr/bin:/bin",
            self.read("work/path").replace('\n', ":"),
            self.path("tools").display()
        );
        Command::new("unshare")
            .args(["--mount", "sh", "-c", AS_USER])
            .arg(self.path("sudoers"))
            .args(words)
            .current_dir(self.path("work"))
            .env_clear()
            .env("PATH", path)
            .env("MARK", "a variable of the job")
            .env("RUNNER_TEMP", self.path("temp"))
            .env("GITHUB_PATH", self.path("work/path"))
            .env("GITHUB_OUTPUT", self.path("work/outputs"))
            .env("GITHUB_STEP_SUMMARY", self.path("work/summary"))
            .env("FAULT_RELEASES", format!("http://{SERVER}"))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// The Action's first step, for a workflow that names this ref; its exit code and output.
    fn install(&self, reference: &str) -> (Option<i32>, String) {
        let script = self.path("action/.github/action/install.sh");
        told(&self.step(&[script.to_str().unwrap()], &[("ACTION_REF", reference)]))
    }

    /// The Action's second step; its exit code, output and the Action's outputs.
    fn run(&self, rules: &str, command: &str) -> (Option<i32>, String, String) {
        self.run_scenario("", rules, command)
    }

    /// The same with a scenario file, too.
    fn run_scenario(
        &self,
        scenario: &str,
        rules: &str,
        command: &str,
    ) -> (Option<i32>, String, String) {
        self.write("work/outputs", "", 0o666);
        let script = self.path("action/.github/action/run.sh");
        let variables = [
            ("RULES", rules),
            ("SCENARIO", scenario),
            ("SEED", "1"),
            ("REPORT", "report"),
            ("COMMAND", command),
        ];
        let (code, text) = told(&self.step(&[script.to_str().unwrap()], &variables));
        (code, text, self.read("work/outputs"))
    }
}

/// The exit code, and everything that was printed.
fn told(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn the_action_runs_a_release_for_its_caller() {
    let Some(job) = Job::start() else { return };
    let (code, text) = job.install("v1");
    assert_eq!(code, Some(0), "{text}");
    assert!(!text.contains("building"), "{text}");

    let send = "only-here\necho x > /dev/udp/127.0.0.1/7000";
    let (code, text, outputs) = job.run("udp:7000 drop\n\n", send);
    assert_eq!(code, Some(0), "{text}");
    let expected = format!("only-here as {USER} with a variable of the job\n");
    assert!(text.contains(&expected), "{text}");
    assert_eq!(outputs, "fired=true\nreport=report\nexit-code=0\n");
    for name in ["work/report", "work/report/report.json", "work/summary"] {
        assert_eq!(fs::metadata(job.path(name)).unwrap().uid(), USER, "{name}");
    }
    let summary = job.read("work/summary");
    assert!(summary.contains("| `udp:7000 drop` |"), "{summary}");

    let (code, text, outputs) = job.run("tcp:1 drop", "false | true\necho after");
    assert_eq!(code, Some(1), "{text}");
    assert!(!text.contains("after\n"), "{text}");
    assert!(text.contains("::error::fault: the rule"), "{text}");
    assert_eq!(outputs, "fired=false\nreport=report\nexit-code=1\n");

    let drawn = "random: {choices: [\"tcp:1 down\"], length: 1s..2s, quiet: 1s..2s, total: 10s}\n";
    job.write("work/drawn.yaml", drawn, 0o644);
    let (code, text, outputs) = job.run_scenario("drawn.yaml", "udp:7000 drop", send);
    assert_eq!(code, Some(0), "{text}");
    assert!(outputs.starts_with("fired=true\n"), "{outputs}{text}");

    let (code, text, outputs) = job.run("tcp:1 drpo", "true");
    assert_eq!(code, Some(2), "{text}");
    assert_eq!(outputs, "fired=false\nreport=report\nexit-code=2\n");
}

#[test]
fn the_action_verifies_what_it_downloads() {
    let Some(job) = Job::start() else { return };
    fs::write(job.release().join(binary()), "something else").unwrap();
    let (code, text) = job.install("v1");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("::error::fault: "), "{text}");
    assert!(text.contains("does not have the checksum"), "{text}");
    assert_eq!(job.read("work/path"), "", "nothing is installed");
}

#[test]
fn the_action_builds_where_its_ref_has_no_release() {
    let Some(job) = Job::start() else { return };
    let version = concat!("v", env!("CARGO_PKG_VERSION"));
    for released in [version, "v1", COMMIT] {
        let (code, text) = job.install(released);
        assert_eq!(code, Some(0), "{released}: {text}");
        assert!(!text.contains("building"), "{released}: {text}");
    }
    let other = COMMIT.replace('0', "f");
    for unreleased in ["main", "v9.9.9", &other, ""] {
        let (code, text) = job.install(unreleased);
        assert_eq!(code, Some(0), "{unreleased}: {text}");
        assert!(text.contains("building"), "{unreleased}: {text}");
    }
    fs::remove_file(job.release().join("SHA256SUMS")).unwrap();
    let (code, text) = job.install(version);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("building"), "{text}");
}

#[test]
fn the_gitlab_template_installs_a_release() {
    let Some(job) = Job::start() else { return };
    let text = fs::read_to_string(repository().join("docs/gitlab.yml")).unwrap();
    let template: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    let lines = template[".fault"]["before_script"].as_array().unwrap();
    let mut script: Vec<_> = lines.iter().map(|line| line.as_str().unwrap()).collect();
    script.push("fault --version");
    let script = script.join("\n");
    let url = format!("http://{SERVER}/v{}", env!("CARGO_PKG_VERSION"));
    let install = || told(&job.step(&["sh", "-ec", &script], &[("FAULT_RELEASE", &url)]));
    let (code, text) = install();
    assert_eq!(code, Some(0), "{text}");
    let expected = concat!("fault ", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(expected), "{text}");
    fs::write(job.release().join(binary()), "something else").unwrap();
    let (code, text) = install();
    assert_eq!(code, Some(1), "{text}");
}
