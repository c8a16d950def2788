//! Prints a line for each packet that reaches a rule's port and each of its rules: `-vv`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::trace::{TracedRule, lines, traced};
use crate::inject::records::Traces;
use crate::plan::Plan;
use crate::sys::process::rights::be_helper;
use crate::tell::tell;

/// Interval in milliseconds at which the thread checks whether to end.
const PATIENCE_MS: u16 = 50;
/// How many lines are printed in a second at most.
const LINES_MAX: u64 = 1000;
const SECOND: Duration = Duration::from_secs(1);

/// The thread that prints. When it is dropped, it prints what the programs have told before, and ends.
pub(super) struct Tracer {
    stop: Arc<AtomicBool>,
    rules: Arc<Mutex<Vec<TracedRule>>>,
    thread: Option<JoinHandle<()>>,
}

impl Tracer {
    /// Starts printing about the rules of `plan`.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(super) fn start(traces: Traces, plan: &Plan) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let rules = Arc::new(Mutex::new(traced(plan, &BTreeSet::new())));
        let (stopped, applied) = (Arc::clone(&stop), Arc::clone(&rules));
        let thread = std::thread::Builder::new()
            .name("trace".to_owned())
            .spawn(move || {
                be_helper(&[]);
                if let Err(error) = print(traces, &applied, &stopped) {
                    tell!("fault: warning: no more lines about packets: {error:#}");
                }
            })
            .context("starting the thread that prints about packets")?;
        Ok(Self {
            stop,
            rules,
            thread: Some(thread),
        })
    }

    /// From now on the rules are those of `plan`, without those whose indexes are in `off`.
    pub(super) fn follow(&self, plan: &Plan, off: &BTreeSet<usize>) {
        let rules = traced(plan, off);
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A panic would only lose lines.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn print(mut traces: Traces, rules: &Mutex<Vec<TracedRule>>, stop: &AtomicBool) -> Result<()> {
    let (mut batch, mut limit) = (Vec::new(), Limit::new(Instant::now()));
    loop {
        // Checked first, so that records from before the end are still drained below.
        let last = stop.load(Ordering::Acquire);
        traces.drain(&mut batch);
        for trace in batch.drain(..) {
            let lines = lines(
                &rules.lock().unwrap_or_else(PoisonError::into_inner),
                &trace,
            );
            for line in lines {
                if limit.takes() {
                    tell!("fault: {line}");
                }
            }
        }
        let now = Instant::now();
        if let Some(left_out) = limit.report(if last { now + SECOND } else { now }) {
            tell!(
                "fault: {left_out} lines about packets were left out: at most {LINES_MAX} are printed in a second"
            );
        }
        if last {
            return Ok(());
        }
        let mut waiting = [PollFd::new(traces.fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::from(PATIENCE_MS))?;
    }
}

/// Limits the lines of each second.
struct Limit {
    begun: Instant,
    lines: u64,
    left_out: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self {
            begun: now,
            lines: 0,
            left_out: 0,
        }
    }

    /// Whether a line may be printed; otherwise it is left out.
    fn takes(&mut self) -> bool {
        if self.lines < LINES_MAX {
            self.lines += 1;
            return true;
        }
        self.left_out += 1;
        false
    }

    /// Begins the next second when it is time. Returns how many lines were left out in the last one, if any were.
    fn report(&mut self, now: Instant) -> Option<u64> {
        if now < self.begun + SECOND {
            return None;
        }
        let left_out = self.left_out;
        *self = Self::new(now);
        (left_out != 0).then_some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_those_of_a_second_are_counted() {
        let begun = Instant::now();
        let mut limit = Limit::new(begun);
        let printed = (0..LINES_MAX + 7).filter(|_| limit.takes()).count();
        assert_eq!(printed as u64, LINES_MAX);
        assert_eq!(limit.report(begun), None, "the second is not over");
        assert_eq!(limit.report(begun + SECOND), Some(7));
        assert!(limit.takes(), "a new second has begun");
        assert_eq!(limit.report(begun + 2 * SECOND), None);
    }
}
