//! Timers with microsecond precision for the relay's worker threads.
//!
//! tokio's own timers have a granularity of one millisecond, which is as much as the whole error that a
//! `latency` may have, and a hundred times the delay that a `slicer` may ask for. Each worker therefore
//! has one timerfd and a queue of deadlines.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

/// A timerfd that can be registered with tokio's reactor.
struct Clock(TimerFd);

impl AsRawFd for Clock {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Clock {
    fn arm(&self, delay: Duration) -> nix::Result<()> {
        // A zero would disarm the timer.
        let delay = TimeSpec::from(delay.max(Duration::from_nanos(1)));
        self.0
            .set(Expiration::OneShot(delay), TimerSetTimeFlags::empty())
    }
}

#[derive(Default)]
struct Queue {
    clock: Option<Rc<AsyncFd<Clock>>>,
    next_id: u64,
    waiting: BTreeMap<(Instant, u64), Waker>,
    armed: Option<Instant>,
}

impl Queue {
    /// Arms the clock for the earliest deadline, if it is not yet.
    fn arm(&mut self) {
        let earliest = self.waiting.keys().next().map(|(at, _)| *at);
        let Some(at) = earliest.filter(|at| self.armed.is_none_or(|armed| *at < armed)) else {
            return;
        };
        if let Some(clock) = &self.clock {
            let delay = at.saturating_duration_since(Instant::now());
            clock
                .get_ref()
                .arm(delay)
                .expect("a timerfd accepts any positive delay");
            self.armed = Some(at);
        }
    }

    /// Takes the wakers of every deadline that has passed.
    fn due(&mut self) -> Vec<Waker> {
        self.armed = None;
        let now = Instant::now();
        let later = self.waiting.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut self.waiting, later);
        self.arm();
        due.into_values().collect()
    }
}

thread_local! {
    static QUEUE: RefCell<Queue> = RefCell::default();
}

/// Wakes the tasks of this thread whose deadline has come; never returns unless the clock fails.
///
/// # Errors
///
/// When the timerfd can't be made, registered or read.
pub(crate) async fn drive() -> io::Result<()> {
    let clock = TimerFd::new(
        ClockId::CLOCK_MONOTONIC,
        TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
    )?;
    // SAFETY: the descriptor is owned by the `Clock` inside, which gives out no other handle to it, and
    // is therefore open until the `AsyncFd` is dropped.
    let clock = unsafe { AsyncFd::register(Clock(clock)) }.map_err(io::Error::from)?;
    let clock = Rc::new(clock);
    QUEUE.with_borrow_mut(|queue| {
        queue.clock = Some(Rc::clone(&clock));
        queue.arm();
    });
    loop {
        let mut guard = clock.readable().await?;
        match guard.get_inner().0.wait() {
            Ok(()) | Err(nix::Error::EAGAIN) => guard.clear_ready(),
            Err(error) => return Err(error.into()),
        }
        for waker in QUEUE.with_borrow_mut(Queue::due) {
            waker.wake();
        }
    }
}

/// One task's deadline.
#[derive(Default)]
pub(crate) struct Timer {
    entry: Option<(Instant, u64)>,
}

impl Timer {
    /// Wakes the task at `deadline` (none: never), instead of at the deadline set before.
    pub(crate) fn set(&mut self, deadline: Option<Instant>, waker: &Waker) {
        if self.entry.map(|(at, _)| at) == deadline {
            // Once it has fired the entry is gone, and must be made anew.
            let pending = self
                .entry
                .is_none_or(|entry| QUEUE.with_borrow(|queue| queue.waiting.contains_key(&entry)));
            if pending {
                return;
            }
        }
        self.clear();
        if let Some(at) = deadline {
            self.entry = Some(QUEUE.with_borrow_mut(|queue| {
                queue.next_id += 1;
                let entry = (at, queue.next_id);
                queue.waiting.insert(entry, waker.clone());
                queue.arm();
                entry
            }));
        }
    }

    fn clear(&mut self) {
        if let Some(entry) = self.entry.take() {
            // At the thread's end its queue may be gone before its tasks: then there is nothing to remove.
            let removed = QUEUE.try_with(|queue| queue.borrow_mut().waiting.remove(&entry));
            drop(removed);
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Waits until `deadline`, to the precision of this module.
pub(crate) async fn sleep_until(deadline: Instant) {
    let mut timer = Timer::default();
    std::future::poll_fn(|context| {
        if Instant::now() >= deadline {
            return std::task::Poll::Ready(());
        }
        timer.set(Some(deadline), context.waker());
        std::task::Poll::Pending
    })
    .await;
}
