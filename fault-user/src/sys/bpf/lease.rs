//! Keeps the programs acting for as long as this process lives.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fault_common::abi::Control;

use crate::sys::bpf::mapped::MappedArray;
use crate::sys::clock::monotonic_ns;
use crate::sys::process::rights::be_helper;
use crate::tell::tell;

/// How long the programs go on acting after this process has stopped renewing.
pub const LEASE: Duration = Duration::from_secs(3);
/// How often it is renewed.
pub const RENEWAL: Duration = Duration::from_millis(500);

/// The control entry, and the thread that pushes its deadline forward where programs outlive this process.
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
    /// The kernel takes the programs away with this process.
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
    /// Takes the control entry over. The programs pass everything until [`Lease::update`]. Where they are `linked` to this
    /// process there is nothing to renew: they act however long it is stopped.
    ///
    /// # Errors
    /// There can be no thread for it.
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

    /// Changes what the programs are told, and renews.
    pub fn update(&self, change: impl FnOnce(&mut Control)) {
        let mut state = self.shared.lock();
        change(&mut state.control);
        state.renew();
    }

    /// Lets every packet pass, until the next [`Lease::update`].
    pub fn end(&self) {
        let mut state = self.shared.lock();
        state.control.lease_until_ns = 0;
        state.write();
    }

    /// Which rule set is in force.
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

/// Until when what is renewed now lasts.
#[must_use]
pub fn deadline_ns() -> u64 {
    monotonic_ns() + u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX)
}

/// Says that a deadline was missed, if it was, and for how long.
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
        // A lease that has never been taken stays so.
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
