//! Counters that several CPUs advance. The target has no atomics that core knows of, so they are
//! written out.

use core::arch::asm;

use fault_common::abi::DecisionKey;
use fault_common::decide::Counting;

use crate::maps::{DECISIONS, REPLAY, SPREADS};

/// One instruction that adds and fetches: no two packets get the same ordinal. Linux 5.12.
pub struct Fetch;

impl Counting for Fetch {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        let mut value = 1_u64;
        // SAFETY: `counter` points to eight aligned bytes.
        unsafe {
            asm!(
                "{value} = atomic_fetch_add((u64 *)({at} + 0), {value})",
                at = in(reg) core::ptr::from_mut(counter),
                value = inout(reg) value,
            );
        }
        value + 1
    }

    #[inline(always)]
    fn replays() -> bool {
        REPLAY.load() == 1
    }

    #[inline(always)]
    fn recall(key: &DecisionKey) -> Option<u64> {
        recalled(key)
    }

    #[inline(always)]
    fn spread(index: u32) -> i64 {
        tabled(index)
    }
}

/// For older kernels: the addition is atomic, but two CPUs may, rarely, read the same value before it.
pub struct NoFetch;

impl Counting for NoFetch {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        let before = *counter;
        // SAFETY: as above.
        unsafe {
            asm!(
                "lock *(u64 *)({at} + 0) += {value}",
                at = in(reg) core::ptr::from_mut(counter),
                value = in(reg) 1_u64,
            );
        }
        before + 1
    }

    #[inline(always)]
    fn replays() -> bool {
        REPLAY.load() == 1
    }

    #[inline(always)]
    fn recall(key: &DecisionKey) -> Option<u64> {
        recalled(key)
    }

    #[inline(always)]
    fn spread(index: u32) -> i64 {
        tabled(index)
    }
}

/// For copies of counters, which nobody else advances.
pub struct Foreseen;

impl Counting for Foreseen {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        *counter += 1;
        *counter
    }

    #[inline(always)]
    fn replays() -> bool {
        REPLAY.load() == 1
    }

    #[inline(always)]
    fn recall(key: &DecisionKey) -> Option<u64> {
        recalled(key)
    }

    #[inline(always)]
    fn spread(index: u32) -> i64 {
        tabled(index)
    }
}

/// Adds to a counter.
#[inline(always)]
pub fn add(counter: &mut u64, value: u64) {
    // SAFETY: as above.
    unsafe {
        asm!(
            "lock *(u64 *)({at} + 0) += {value}",
            at = in(reg) core::ptr::from_mut(counter),
            value = in(reg) value,
        );
    }
}

#[inline(always)]
fn recalled(key: &DecisionKey) -> Option<u64> {
    // SAFETY: the map is written before the programs run, and not again.
    unsafe { DECISIONS.get(key) }.copied()
}

#[inline(always)]
fn tabled(index: u32) -> i64 {
    SPREADS.get(index).copied().unwrap_or(0)
}
