//! The programs' clock.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` gives it.
///
/// # Panics
/// Never: every Linux has this clock, and it does not run backwards from zero.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    let seconds = u64::try_from(now.tv_sec()).expect("CLOCK_MONOTONIC is positive");
    let nanoseconds = u64::try_from(now.tv_nsec()).expect("nanoseconds are positive");
    seconds * 1_000_000_000 + nanoseconds
}
