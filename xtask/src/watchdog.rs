//! Ends test programs that hang, so that the rest still runs and the run ends by itself.

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Watches over cargo's test programs until it is dropped.
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Something has been printed since the watchdog last looked.
    has_spoken: AtomicBool,
    is_over: Mutex<bool>,
    over: Condvar,
}

/// Tells the watchdog that the tests go on.
#[derive(Clone)]
pub struct SignOfLife(Arc<Shared>);

impl SignOfLife {
    /// Something was printed.
    pub fn give(&self) {
        self.0.has_spoken.store(true, Ordering::Relaxed);
    }
}

impl Watchdog {
    /// Ends the test program that `cargo` runs when nothing was printed for `silence_limit` to twice that.
    pub fn new(cargo: u32, silence_limit: Duration) -> Self {
        let shared = Arc::new(Shared {
            has_spoken: AtomicBool::new(true),
            is_over: Mutex::new(false),
            over: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        let thread = thread::spawn(move || watch(&watched, cargo, silence_limit));
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// What has to be told of each line.
    pub fn sign_of_life(&self) -> SignOfLife {
        SignOfLife(Arc::clone(&self.shared))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self
            .shared
            .is_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.over.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("xtask: the watchdog over the tests had panicked");
        }
    }
}

fn watch(shared: &Shared, cargo: u32, silence_limit: Duration) {
    let mut is_over = shared
        .is_over
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    while !*is_over {
        let (guard, waited) = shared
            .over
            .wait_timeout(is_over, silence_limit)
            .unwrap_or_else(PoisonError::into_inner);
        is_over = guard;
        if waited.timed_out() && !shared.has_spoken.swap(false, Ordering::Relaxed) {
            for child in test_programs(cargo) {
                end(&child, silence_limit);
            }
        }
    }
}

/// A process that cargo has started for a test program: the program itself, or sudo in front of it.
struct TestProgram {
    pid: i32,
    name: String,
    is_behind_sudo: bool,
}

/// The test programs among the children of `cargo`: compilers are not cut off.
fn test_programs(cargo: u32) -> Vec<TestProgram> {
    let cargo = i32::try_from(cargo).unwrap_or_default();
    children(cargo)
        .into_iter()
        .filter_map(test_program)
        .collect()
}

/// The children of all threads of a process; none when it is gone.
fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .filter_map(Result::ok)
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The process and everything below it, which could keep the pipe open that its output comes through.
fn family(pid: i32) -> Vec<i32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(pid) = family.get(next) {
        family.extend(children(*pid));
        next += 1;
    }
    family
}

fn test_program(pid: i32) -> Option<TestProgram> {
    // A process that has ended meanwhile has no command line, and is none of ours to end.
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = words
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned());
    let first = words.next()?;
    let is_behind_sudo = first.ends_with("sudo");
    let program = if is_behind_sudo {
        words.find(|word| !word.starts_with('-'))?
    } else {
        first
    };
    let is_test = Path::new(&program)
        .parent()
        .is_some_and(|folder| folder.ends_with("deps"));
    is_test.then_some(TestProgram {
        pid,
        name: program,
        is_behind_sudo,
    })
}

fn end(program: &TestProgram, silence_limit: Duration) {
    eprintln!(
        "xtask: {} has printed nothing for {} s: it hangs, and is ended. Its threads:",
        program.name,
        silence_limit.as_secs()
    );
    for line in threads(program.pid) {
        eprintln!("  {line}");
    }
    // sudo passes a SIGTERM of ours on, and nothing else may reach what it runs.
    let (pids, signal) = if program.is_behind_sudo {
        (vec![program.pid], Signal::SIGTERM)
    } else {
        (family(program.pid), Signal::SIGKILL)
    };
    for pid in pids {
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => eprintln!("xtask: process {pid} can't be ended: {error}"),
        }
    }
}

/// The name of each thread (libtest names it after its test) and where in the kernel it waits.
fn threads(pid: i32) -> Vec<String> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return vec!["it is gone".to_owned()];
    };
    let text = |path: &Path| match fs::read_to_string(path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) => format!("({error})"),
    };
    tasks
        .filter_map(Result::ok)
        .map(|task| {
            let path = task.path();
            format!(
                "{}: {}",
                text(&path.join("comm")),
                text(&path.join("wchan"))
            )
        })
        .collect()
}
