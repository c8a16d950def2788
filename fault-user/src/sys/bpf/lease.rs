//! The lease: programs act only as long as this process renews it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fault_common::abi::Control;

use crate::sys::bpf::mapped::MappedArray;
use crate::sys::clock::monotonic_ns;
use crate::sys::process::rights::be_helper;
use crate::tell::tell;

/// The programs act for this time after the last renewal.
pub const LEASE: Duration = Duration::from_secs(3);
/// Interval of renewals.
pub const RENEWAL: Duration = Duration::from_millis(500);

/// The control entry, and the thread that extends its deadline if programs may outlive this process.
pub struct Lease {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: Condvar,
}

struct State {
    map: MappedArray<Control>,
    control: Control,
    /// The kernel removes the programs when this process ends.
    linked: bool,
    stopped: bool,
}

impl State {
    fn write(&mut self) {
        self.map.set(0, self.control);
    }

    fn renew(&mut self) {
        self.control.lease_until_ns = if self.linked { u64::MAX } else { deadline_ns() };
        self.write();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Takes over the control entry. The programs let everything through until [`Lease::update`]. If they are `linked`
    /// to this process nothing is renewed: they act however long the process is stopped.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(map: MappedArray<Control>, linked: bool) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                map,
                control: Control::default(),
                linked,
                stopped: false,
            }),
            stop: Condvar::new(),
        });
        if linked {
            let thread = None;
            return Ok(Self { shared, thread });
        }
        let renewed = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || {
                be_helper(&[]);
                renew(&renewed);
            })
            .context("starting the thread that renews the lease")?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Changes the control entry and renews the lease.
    pub fn update(&self, change: impl FnOnce(&mut Control)) {
        let mut state = self.shared.lock();
        change(&mut state.control);
        state.renew();
    }

    /// Changes the control entry. A lease that has ended stays ended.
    pub fn amend(&self, change: impl FnOnce(&mut Control)) {
        let mut state = self.shared.lock();
        change(&mut state.control);
        state.write();
    }

    /// Lets every packet through until the next [`Lease::update`].
    pub fn end(&self) {
        let mut state = self.shared.lock();
        state.control.lease_until_ns = 0;
        state.write();
    }

    /// The active rule set.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.shared.lock().control.generation
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.stopped = true;
            state.control.lease_until_ns = 0;
            state.write();
        }
        self.shared.stop.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tell!(
                "fault: warning: the thread that renews the lease panicked: the rules no longer apply"
            );
        }
    }
}

/// The deadline of a renewal at this time.
#[must_use]
pub fn deadline_ns() -> u64 {
    monotonic_ns() + u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX)
}

/// Warns if a deadline was missed, with the duration.
pub fn tell_lapse(until_ns: u64, what: &str) {
    let late_ns = monotonic_ns().saturating_sub(until_ns);
    if until_ns != 0 && late_ns != 0 {
        let lapse = Duration::from_nanos(late_ns).as_secs_f64();
        tell!(
            "fault: warning: {what} for {lapse:.1} s: fault was stopped, or got no processor time"
        );
    }
}

fn renew(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stopped {
        // A lease that was never taken is not renewed.
        if state.control.lease_until_ns != 0 {
            tell_lapse(state.control.lease_until_ns, "the rules were not applied");
            state.renew();
        }
        state = shared
            .stop
            .wait_timeout(state, RENEWAL)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}
