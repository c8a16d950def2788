//! Counters that several CPUs advance, and what rules may ask for. The target has no atomics that core knows of, so
//! they are written out.

use core::arch::asm;
use core::marker::PhantomData;

use aya_ebpf::bindings::__sk_buff;
use fault_common::abi::DecisionKey;
use fault_common::decide::Counting;

use crate::maps::{DECISIONS, FAULTS, MODIFIERS, REPLAY, SPREADS};
use crate::{classify, split};

/// How a counter is advanced.
pub trait Advance {
    /// Adds one and gives the new value.
    fn next(counter: &mut u64) -> u64;
    /// Makes `to` of the counter if it is `from`; says whether it was.
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool;
}

/// One instruction that adds and fetches: no two packets get the same ordinal. Linux 5.12.
pub struct Fetch;

impl Advance for Fetch {
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
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
        let mut found = from;
        // SAFETY: `counter` points to eight aligned bytes.
        unsafe {
            asm!(
                "r0 = cmpxchg_64({at} + 0, r0, {to})",
                at = in(reg) core::ptr::from_mut(counter),
                to = in(reg) to,
                inout("r0") found,
            );
        }
        found == from
    }
}

/// For older kernels: the addition is atomic, but two CPUs may, rarely, read the same value before it.
pub struct NoFetch;

impl Advance for NoFetch {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        let before = *counter;
        add(counter, 1);
        before + 1
    }

    #[inline(always)]
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
        swap_alone(counter, from, to)
    }
}

/// For copies of counters, which nobody else advances.
pub struct Alone;

impl Advance for Alone {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        *counter += 1;
        *counter
    }

    #[inline(always)]
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
        swap_alone(counter, from, to)
    }
}

#[inline(always)]
fn swap_alone(counter: &mut u64, from: u64, to: u64) -> bool {
    let is_equal = *counter == from;
    if is_equal {
        *counter = to;
    }
    is_equal
}

/// Decisions of the rules that the daemon has told of, by its maps and constants.
pub struct InKernel<A>(PhantomData<A>);

impl<A: Advance> Counting for InKernel<A> {
    #[inline(always)]
    fn next(counter: &mut u64) -> u64 {
        A::next(counter)
    }

    #[inline(always)]
    fn add(counter: &mut u64, value: u64) {
        add(counter, value);
    }

    #[inline(always)]
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
        A::swap(counter, from, to)
    }

    #[inline(always)]
    fn replays() -> bool {
        REPLAY.load() == 1
    }

    #[inline(always)]
    fn recall(key: &DecisionKey) -> Option<u64> {
        // SAFETY: the map is written before the programs run, and not again.
        unsafe { DECISIONS.get(key) }.copied()
    }

    #[inline(always)]
    fn spread(index: u32) -> i64 {
        SPREADS.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn may(fault: u8) -> bool {
        FAULTS.load() & (1 << fault) != 0
    }

    #[inline(always)]
    fn uses(modifier: u32) -> bool {
        MODIFIERS.load() & modifier != 0
    }
}

/// [`Counting`] of the programs that judge packets, with global functions of their own.
pub trait Judging: Counting {
    /// See [`split::fault_meet_super`].
    fn meet_super(skb: *mut __sk_buff, ingress: u32) -> u32;
    /// See [`classify::fault_judge`].
    fn judge(found: u32);
    /// See [`classify::fault_judge_word`].
    fn judge_word(index: u32) -> u32;
}

impl Judging for InKernel<Fetch> {
    #[inline(always)]
    fn meet_super(skb: *mut __sk_buff, ingress: u32) -> u32 {
        split::fault_meet_super(skb, ingress)
    }

    #[inline(always)]
    fn judge(found: u32) {
        classify::fault_judge(found);
    }

    #[inline(always)]
    fn judge_word(index: u32) -> u32 {
        classify::fault_judge_word(index)
    }
}

impl Judging for InKernel<NoFetch> {
    #[inline(always)]
    fn meet_super(skb: *mut __sk_buff, ingress: u32) -> u32 {
        split::fault_meet_super_old(skb, ingress)
    }

    #[inline(always)]
    fn judge(found: u32) {
        classify::fault_judge_old(found);
    }

    #[inline(always)]
    fn judge_word(index: u32) -> u32 {
        classify::fault_judge_word_old(index)
    }
}

/// Adds to a counter.
#[inline(always)]
pub fn add(counter: &mut u64, value: u64) {
    // SAFETY: `counter` points to eight aligned bytes.
    unsafe {
        asm!(
            "lock *(u64 *)({at} + 0) += {value}",
            at = in(reg) core::ptr::from_mut(counter),
            value = in(reg) value,
        );
    }
}
