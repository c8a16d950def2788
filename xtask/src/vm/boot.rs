//! One run of a virtual machine: its console is read as it speaks, and it is cut off when it hangs.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{cache, kernel::Kernel};
use crate::{
    skip::{Line, Reader, Skip},
    workspace::shown,
};

const MEMORY: &str = "2G";

/// What a machine said before it was gone.
#[derive(Default)]
pub struct Outcome {
    /// From the start of qemu to its end.
    pub duration: Duration,
    /// What the kernel can do, by the names in `init.sh`.
    pub features: Vec<String>,
    /// Tests that passed, those that skipped among them.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
    /// Tests that did not run.
    pub skips: Vec<Skip>,
    /// Everything that it printed.
    pub console: PathBuf,
    /// Suites that came to an end, with their exit codes.
    ended: Vec<(String, String)>,
    /// The suite that was started last.
    started: Option<String>,
    /// Things that must not be.
    faults: Vec<String>,
    is_done: bool,
    reader: Reader,
}

/// Boots a machine and reads its console until it is off, or until it is cut off.
///
/// # Errors
/// Fails when qemu can't be started; what goes wrong inside is in the [`Outcome`].
pub fn boot(
    kernel: &Kernel,
    initramfs: &Path,
    silence_limit: Duration,
    time_limit: Duration,
) -> Result<Outcome> {
    let console = cache().join("console").join(format!("{}.log", kernel.name));
    if let Some(folder) = console.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut log =
        fs::File::create(&console).with_context(|| format!("can't write {}", console.display()))?;
    let mut outcome = Outcome {
        console,
        ..Outcome::default()
    };
    let start = Instant::now();
    let mut machine = Machine(start_machine(kernel, initramfs)?);
    let output = machine.0.stdout.take().context("no standard output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            // The receiver is gone when the machine is being cut off: nobody wants the rest.
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        let left = time_limit.saturating_sub(start.elapsed());
        match lines.recv_timeout(silence_limit.min(left)) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                writeln!(log, "{line}")?;
                if outcome.read(&line) {
                    println!("{:>6} | {line}", kernel.name);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let why = if start.elapsed() >= time_limit {
                    format!("cut off after {} s", time_limit.as_secs())
                } else {
                    format!("cut off: it hung, silent for {} s", silence_limit.as_secs())
                };
                outcome.faults.push(why);
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    drop(machine);
    outcome.duration = start.elapsed();
    Ok(outcome)
}

fn start_machine(kernel: &Kernel, initramfs: &Path) -> Result<Child> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        // KVM is often missing where CI runs, and hangs in some nested machines.
        .args([
            // One thread for both CPUs: with two, code that the kernel patches while it runs (its static keys, as programs
            // are attached) is now and then run half patched by the emulation, and the kernel dies of it.
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            MEMORY,
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        // A panic ends the machine, since it may not start again.
        .args([
            "-append",
            "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
        .spawn()
        .with_context(|| format!("can't start `{}`", shown(&command)))
}

/// A running qemu, which does not outlive this.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // A machine that is off already has nothing to kill, and says so by an error.
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("vm: qemu did not end: {error}");
        }
    }
}

impl Outcome {
    /// Takes a line in, and says whether people want to see it.
    fn read(&mut self, line: &str) -> bool {
        // The kernel may write in the middle of a line, but not of one that is this short.
        if let Some((_, said)) = line.split_once("@@fault ") {
            self.read_init(said);
            // What a suite left open, by dying, is not for the next one.
            self.reader = Reader::default();
            return true;
        }
        if let Some((passed, failed)) = test_result(line) {
            self.passed += passed;
            self.failed += failed;
        }
        match self.reader.read(line) {
            Line::Skip(skip) => self.skips.push(skip),
            Line::OfPassing => {}
            Line::Other => return true,
        }
        false
    }

    /// Takes in what `init.sh` says to us.
    fn read_init(&mut self, said: &str) {
        let mut words = said.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("features"), Some(list), None) => {
                self.features = list.split(',').map(str::to_owned).collect();
            }
            (Some("start"), Some(suite), None) => self.started = Some(suite.to_owned()),
            (Some("end"), Some(suite), Some(code)) => {
                self.ended.push((suite.to_owned(), code.to_owned()));
            }
            (Some("broken"), Some(what), Some(which)) => {
                self.faults.push(format!("{what} {which} does not load"));
            }
            (Some("done"), None, None) => self.is_done = true,
            _ => {}
        }
    }

    /// Everything for which this run has failed, in words; nothing when it passed.
    pub fn problems(&self, expected: &BTreeSet<&str>) -> Vec<String> {
        let mut problems = self.faults.clone();
        if !self.is_done {
            let when = match &self.started {
                Some(suite) => format!("in {suite}"),
                None => "before the first suite".to_owned(),
            };
            problems.push(format!("the machine stopped {when}"));
        }
        for (suite, code) in self.ended.iter().filter(|(_, code)| code != "0") {
            problems.push(format!("{suite} ended with {code}"));
        }
        for suite in expected {
            if !self.ended.iter().any(|(ended, _)| ended == suite) {
                problems.push(format!("{suite} did not come to its end"));
            }
        }
        for skip in &self.skips {
            if let Some(feature) = skip
                .needs()
                .filter(|need| self.features.iter().any(|has| has == need))
            {
                problems.push(format!(
                    "{} skipped for want of {feature}, which is there",
                    skip.test
                ));
            }
        }
        problems
    }
}

/// How many tests passed and failed, from the line with which libtest closes.
fn test_result(line: &str) -> Option<(u32, u32)> {
    let (_, counts) = line.split_once("test result: ")?;
    let count = |what: &str| {
        let (before, _) = counts.split_once(what)?;
        before.split_whitespace().next_back()?.parse().ok()
    };
    Some((count(" passed;")?, count(" failed;")?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Outcome, test_result};

    fn outcome(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        for line in lines {
            outcome.read(line);
        }
        outcome
    }

    #[test]
    fn libtest_closes_with_its_counts() {
        let line = "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured";
        assert_eq!(test_result(line), Some((7, 2)));
        assert_eq!(test_result("test result: none"), None);
    }

    #[test]
    fn a_run_that_ends_well_has_no_problems() {
        let run = outcome(&[
            "@@fault features btf,fq",
            "@@fault start common",
            "skipped: needs tcx: kernel 5.10",
            "test result: ok. 3 passed; 0 failed; 0 ignored",
            "@@fault end common 0",
            "@@fault done",
        ]);
        assert_eq!(run.problems(&BTreeSet::from(["common"])), [""; 0]);
        assert_eq!((run.passed, run.failed, run.skips.len()), (3, 0, 1));
    }

    #[test]
    fn a_skip_of_what_the_kernel_can_do_is_a_problem() {
        let run = outcome(&[
            "@@fault features btf,fq",
            "successes:",
            "---- delay stdout ----",
            "skipped: needs fq",
            "@@fault end common 0",
            "@@fault done",
        ]);
        let problems = run.problems(&BTreeSet::from(["common"]));
        assert_eq!(problems, ["delay skipped for want of fq, which is there"]);
    }

    #[test]
    fn a_machine_that_dies_names_the_suite() {
        let run = outcome(&["@@fault start common", "Kernel panic - not syncing"]);
        let problems = run.problems(&BTreeSet::from(["common"]));
        assert_eq!(
            problems,
            [
                "the machine stopped in common",
                "common did not come to its end"
            ]
        );
    }
}
