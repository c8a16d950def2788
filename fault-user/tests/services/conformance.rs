//! The network tests of `CPython` and Go, under rules that change nothing but time: what passes without `fault` passes
//! with it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::place::{enter_fresh, fault};

/// Rules under which every program works as ever.
const NEUTRAL: [&str; 6] = [
    "tcp:1-65535 latency=1ms",
    "tcp:1-65535 bandwidth=100MB/s",
    "tcp:1-65535 coalesce=4KiB,1ms",
    "udp:1-65535 latency=1ms",
    "udp:1-65535 bandwidth=100MB/s",
    "* delay=1ms",
];

/// A test that fails under a rule is run again so often, alone: a busy machine is not the rule's doing.
const AGAIN: usize = 3;
/// When more fail than this, none is run again: it would take hours.
const SUSPECTS_MAX: usize = 20;
/// How long a suite may take, in seconds.
const LIMIT_S: &str = "400";

/// A test suite, and how it is run.
struct Suite {
    name: String,
    command: Vec<String>,
    /// Words behind the command that limit it to one test.
    only: fn(&str) -> Vec<String>,
    folder: PathBuf,
    /// A line that tells what became of a test, as its name and whether it passed.
    outcome: fn(&str) -> Option<(String, bool)>,
    /// How many of its tests pass at least without a rule.
    least: usize,
    /// Tests that do not pass under a rule, and why: those that measure time, or the server's view of its client's address.
    exceptions: &'static [(&'static str, &'static str)],
}

impl Suite {
    /// What became of each test: in a network namespace of its own, under a rule if there is one.
    fn run(&self, rule: Option<&str>, only: Option<&str>) -> BTreeMap<String, bool> {
        let output = std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                enter_fresh();
                let mut command = match rule {
                    Some(rule) => {
                        let mut command = fault();
                        command.args(["run", "--allow-unfired", "-r", rule, "--", "timeout"]);
                        command
                    }
                    None => Command::new("timeout"),
                };
                command.arg(LIMIT_S).args(&self.command);
                command.args(only.map_or_else(Vec::new, self.only));
                command.current_dir(&self.folder).stdin(Stdio::null());
                command.output().expect("the suite runs")
            });
            run.join().expect("the suite's thread")
        });
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        let outcomes: BTreeMap<_, _> = text.lines().filter_map(self.outcome).collect();
        assert!(!outcomes.is_empty(), "{} {rule:?}: {text}", self.name);
        outcomes
    }

    /// The tests that pass without a rule and fail under it, each time.
    fn failures(&self, plain: &BTreeMap<String, bool>, rule: &str) -> Vec<String> {
        let under_rule = self.run(Some(rule), None);
        let passes =
            |outcomes: &BTreeMap<String, bool>, name: &str| outcomes.get(name) == Some(&true);
        let is_known = |name: &str| self.exceptions.iter().any(|(known, _)| *known == name);
        let mut suspects: Vec<_> = plain.keys().cloned().collect();
        suspects
            .retain(|name| passes(plain, name) && !passes(&under_rule, name) && !is_known(name));
        if suspects.len() <= SUSPECTS_MAX {
            suspects.retain(|name| {
                (0..AGAIN).all(|_| !passes(&self.run(Some(rule), Some(name)), name))
            });
        }
        suspects
    }

    fn check(&self) {
        let plain = self.run(None, None);
        let passed = plain.values().filter(|passed| **passed).count();
        assert!(passed >= self.least, "{}: {plain:?}", self.name);
        std::thread::scope(|scope| {
            let runs = NEUTRAL.map(|rule| (rule, scope.spawn(|| self.failures(&plain, rule))));
            for (rule, run) in runs {
                let failures = run.join().expect("a rule's thread");
                assert!(
                    failures.is_empty(),
                    "{} under {rule}: {failures:?}",
                    self.name
                );
            }
        });
    }
}

#[test]
fn cpythons_test_socket() {
    const PYTHON: &str = "/usr/bin/python3";
    // Prints a line for each test, which `-v` does not: it mixes them with what they print and document.
    const RUNNER: &str = "
import sys, unittest
class Result(unittest.TextTestResult):
    def tell(self, test, word): print(word, test.id(), flush=True)
    def addSuccess(self, test): super().addSuccess(test); self.tell(test, 'ok')
    def addError(self, test, error): super().addError(test, error); self.tell(test, 'failed')
    def addFailure(self, test, error): super().addFailure(test, error); self.tell(test, 'failed')
names = sys.argv[1:]
if not names:
    import test.test_socket as suite
    # A virtual machine's own sockets may hang: they are none of the network's.
    names = ['test.test_socket.' + name for name, it in vars(suite).items()
             if isinstance(it, type) and issubclass(it, unittest.TestCase) and 'VSOCK' not in name]
unittest.TextTestRunner(resultclass=Result).run(unittest.defaultTestLoader.loadTestsFromNames(names))
";
    let found = Command::new(PYTHON)
        .args(["-c", "import test.test_socket"])
        .output();
    if !found.is_ok_and(|found| found.status.success()) {
        eprintln!("skipped: no test.test_socket (cargo xtask setup --for test)");
        return;
    }
    let suite = Suite {
        name: "test_socket".to_owned(),
        command: [PYTHON, "-c", RUNNER].map(str::to_owned).to_vec(),
        only: |name| vec![name.to_owned()],
        folder: PathBuf::from("/"),
        outcome: |line| {
            let (word, name) = line.split_once(' ')?;
            let is_one = name.starts_with("test.test_socket.") && !name.contains(' ');
            (is_one && (word == "ok" || word == "failed")).then(|| (name.to_owned(), word == "ok"))
        },
        least: 550,
        exceptions: &[],
    };
    suite.check();
}

/// Runs the tests of one of Go's own packages, of which `least` pass at least; those with these beginnings are left out.
fn check_go(package: &str, left_out: &[&str], least: usize) {
    let folder = Path::new("/usr/lib/go/src").join(package);
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let binary = scratch.join(format!("go-{}.test", package.replace('/', "-")));
    let built = Command::new("/usr/bin/go")
        .args(["test", "-c", "-o"])
        .arg(&binary)
        .arg(package)
        .env("CGO_ENABLED", "0")
        .env("HOME", scratch)
        .output();
    match built {
        Ok(built) if built.status.success() => {}
        Ok(built) => panic!("{}", String::from_utf8_lossy(&built.stderr)),
        Err(_) => {
            eprintln!("skipped: no go (cargo xtask setup --for test)");
            return;
        }
    }
    let list = Command::new(&binary).arg("-test.list=.").output();
    let list = String::from_utf8(list.expect("the tests are listed").stdout).expect("names");
    let is_left_out = |name: &&str| left_out.iter().any(|start| name.starts_with(start));
    let names: Vec<_> = list.lines().filter(|name| !is_left_out(name)).collect();
    let only = format!("-test.run=^({})$", names.join("|"));
    let command = [binary.to_str().expect("a path in UTF-8"), "-test.v", &only];
    let suite = Suite {
        name: package.to_owned(),
        command: command.map(str::to_owned).to_vec(),
        only: |name| vec![format!("-test.run=^{name}$")],
        folder,
        outcome: |line| {
            let (word, rest) = line.strip_prefix("--- ")?.split_once(": ")?;
            let name = rest.split(' ').next()?;
            (word != "SKIP").then(|| (name.to_owned(), word == "PASS"))
        },
        least,
        exceptions: &[],
    };
    suite.check();
}

#[test]
fn gos_net() {
    // They ask the public servers of the domain name system, and wait for them.
    let public = ["TestLookupCNAME", "TestLookupGmail", "TestLookupGoogle"];
    check_go("net", &public, 200);
}

/// Its servers check their clients' ports.
#[test]
fn gos_tls() {
    check_go("crypto/tls", &[], 140);
}
