//! Divides a super-packet into the wire packets that it stands for, so that each of them is judged by itself: what
//! the network would have lost, and nothing else, is lost.
//!
//! First they are judged without anything being done ([`all_pass`]): a super-packet to none of whose wire packets
//! anything is going to happen goes on as it is. Any other is redirected once, as a whole, to a device that takes no
//! super-packets, where the kernel's stack divides it ([`divide`]). The packets that come out at the far end go back to
//! where the super-packet was met ([`send_back`]), and are judged there like any other. They say themselves where that is
//! (`skb`).

use aya_ebpf::bindings::__sk_buff;
use fault_common::abi::{
    Control, Counter, FLOW_SLOTS, Flow, FlowRule, MATCHES_MAX, RuleEntry, RuleState, modifier,
    rule_flag, step,
};
use fault_common::decide::{Counting, Sample, in_window, judge};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP};

use crate::counting::{Alone, Fetch, InKernel, NoFetch, add};
use crate::maps::{
    FLOWS, FORESEES, MATCHES, RULE_STATES, RULE_STATS, RULES, SCRATCH, Scratch, WORDS, count,
};
use crate::skb::{Any, NEXT, Skb};
use crate::{flows, trace};

/// The most segments that are judged ahead; a super-packet of more is divided.
const SEGMENTS_MAX: u32 = 64;
/// As many of them are judged by one call of [`fault_foresee_run`].
const SEGMENTS_RUN: u32 = 8;

/// A super-packet that has been met passes whole.
pub const PASSES: u32 = 1;
/// It is divided: see [`divide`].
pub const DIVIDES: u32 = 2;
/// It is judged like any packet.
const IS_JUDGED: u32 = 0;

/// What becomes of the super-packet in the scratch, which rules match: [`PASSES`], [`DIVIDES`], or it is judged as a
/// whole. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_meet_super(skb: *mut __sk_buff, ingress: u32) -> u32 {
    meet::<InKernel<Fetch>>(Skb::of(skb), ingress)
}

/// [`fault_meet_super`] for kernels before 5.12.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_meet_super_old(skb: *mut __sk_buff, ingress: u32) -> u32 {
    meet::<InKernel<NoFetch>>(Skb::of(skb), ingress)
}

#[inline(always)]
fn meet<C: Counting>(skb: Any, ingress: u32) -> u32 {
    let Some(shared) = SCRATCH.get_ptr_mut(0) else {
        return IS_JUDGED;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *shared };
    if !C::uses(modifier::PER_SEGMENT) || skb.is_part(ingress == 0) || !is_wanted(scratch) {
        return IS_JUDGED;
    }
    let key = &scratch.key;
    let Some(flow) = FLOWS.get_ptr_mut(key) else {
        // Policy: its connection has just been forgotten, because there are too many: it is treated as one packet.
        return IS_JUDGED;
    };
    if all_pass::<C>(shared, flow, skb.gso_size()) {
        // Policy: no fault fired, for none of the wire packets.
        skb.set_judged_at(ingress == 0);
        return PASSES;
    }
    DIVIDES
}

/// Whether a rule that the super-packet matches asks for its wire packets one by one.
#[inline(never)]
fn is_wanted(scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    if packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP {
        return false;
    }
    if scratch.matches.overflow != 0 {
        // Nobody looks at what is beyond the list. A rule that does not ask does the same to each of them.
        return true;
    }
    !each_match(|index| match rule_at(scratch, index) {
        Some((rule, _)) if rule.flags & rule_flag::PER_SEGMENT != 0 => {
            u32::from(!in_window(rule, scratch.sight.since_ns))
        }
        _ => 1,
    })
}

/// Judges the wire packets of a super-packet on copies of what the rules remember of the connection. Where nothing
/// happens to any of them, their ordinals are taken, the packets are counted, and the answer is true: the whole may pass.
/// Else nothing has changed; so it is when another CPU has taken ordinals of that direction meanwhile.
#[inline(never)]
fn all_pass<C: Counting>(scratch: *mut Scratch, flow: *mut Flow, size: u32) -> bool {
    // SAFETY: see `Scratch`; no reference lives across a call of `fault_foresee`.
    let (segments, overflow) = unsafe { ((*scratch).sight.segments, (*scratch).matches.overflow) };
    if FORESEES.load() == 0 || segments > SEGMENTS_MAX || overflow != 0 {
        return false;
    }
    // SAFETY: as above.
    unsafe {
        (*scratch).verdict.holding = 0;
        (*scratch).taken = 0;
    }
    if !each_match(|index| copy_memory::<C>(unsafe { &mut *scratch }, flow, index)) {
        return false;
    }
    for run in 0..SEGMENTS_MAX / SEGMENTS_RUN {
        let first = run * SEGMENTS_RUN;
        if first >= segments {
            break;
        }
        if fault_foresee_run(first, size) != 0 {
            return false;
        }
    }
    if !each_match(|index| take_ordinals::<C>(unsafe { &mut *scratch }, flow, index)) {
        each_match(|index| give_back::<C>(unsafe { &mut *scratch }, flow, index));
        return false;
    }
    // SAFETY: as above; the reference lives no longer than this.
    trace::packet(unsafe { &mut *scratch }, step::LISTED);
    each_match(|index| keep_memory(unsafe { &mut *scratch }, flow, index))
}

/// Does something for each of the packet's rules, as long as it can be done.
#[inline(always)]
fn each_match(mut act: impl FnMut(u32) -> u32) -> bool {
    for index in 0..MATCHES_MAX as u32 {
        if index >= MATCHES.load() {
            break;
        }
        if act(index) == 0 {
            return false;
        }
    }
    true
}

/// The rule of a packet at `index` of its list; nothing behind the last one.
#[inline(always)]
pub fn rule_at(scratch: &Scratch, index: u32) -> Option<(&'static RuleEntry, u8)> {
    if index >= scratch.matches.count {
        return None;
    }
    let found = scratch.matches.items[index as usize % MATCHES_MAX];
    let at = scratch.sight.generation * WORDS.load() * 64 + u32::from(found.rule);
    Some((RULES.get(at)?, found.direction as u8))
}

/// Copies what the rule at `index` remembers of the connection; 0 when it can't be foreseen.
#[inline(never)]
fn copy_memory<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, index: u32) -> u32 {
    let Some((rule, direction)) = rule_at(scratch, index) else {
        return 1;
    };
    let Some(state) = RULE_STATES.get_ptr_mut(rule.state) else {
        return 0;
    };
    // What is counted over all connections changes under our hands.
    if rule.flags & rule_flag::COUNT_PER_RULE != 0
        || !flows::find_slot::<C>(scratch, flow, rule, state)
    {
        return 0;
    }
    // Volatile: see `classify::judge_by`.
    // SAFETY: a valid reference.
    let slot = unsafe { core::ptr::read_volatile(&raw const scratch.slot) };
    let (at, slot) = (index as usize % MATCHES_MAX, slot as usize % FLOW_SLOTS);
    // SAFETY: a map value lives until the program ends.
    let copy = unsafe { (*flow).rules[slot] };
    scratch.foreseen_packets[at] = copy.packets[usize::from(direction & 1)];
    scratch.foreseen_slots[at] = slot as u32;
    // What is added to it is what is to be added.
    scratch.foreseen[at] = FlowRule { outside: 0, ..copy };
    // A connection without an ordinal is just being entered by another CPU.
    u32::from(copy.connection != 0)
}

/// Where the rule at `index` remembers the connection, and its place among the copies.
#[inline(always)]
fn remembered(scratch: &Scratch, flow: *mut Flow, index: u32) -> (&'static mut FlowRule, usize) {
    let at = index as usize % MATCHES_MAX;
    let slot = scratch.foreseen_slots[at] as usize % FLOW_SLOTS;
    // SAFETY: a map value lives until the program ends.
    (unsafe { &mut (*flow).rules[slot] }, at)
}

/// Takes the ordinals that the wire packets have by the rule at `index`, in one step; 0 when they have gone to others.
#[inline(never)]
fn take_ordinals<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, index: u32) -> u32 {
    let Some((_, direction)) = rule_at(scratch, index) else {
        return 1;
    };
    let (memory, at) = remembered(scratch, flow, index);
    let side = usize::from(direction & 1);
    let (from, to) = (
        scratch.foreseen_packets[at],
        scratch.foreseen[at].packets[side],
    );
    if !C::swap(&mut memory.packets[side], from, to) {
        return 0;
    }
    scratch.taken = index + 1;
    1
}

/// Gives ordinals back that [`take_ordinals`] has taken.
#[inline(never)]
fn give_back<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, index: u32) -> u32 {
    let Some((_, direction)) = rule_at(scratch, index) else {
        return 0;
    };
    if index >= scratch.taken {
        return 0;
    }
    let (memory, at) = remembered(scratch, flow, index);
    let side = usize::from(direction & 1);
    let (from, to) = (
        scratch.foreseen_packets[at],
        scratch.foreseen[at].packets[side],
    );
    if !C::swap(&mut memory.packets[side], to, from) {
        // Policy: no packet has these ordinals any more.
        count(Counter::Contended);
    }
    1
}

/// Keeps what the rule at `index` remembers of the direction after all wire packets, and counts them as if they had come
/// one by one.
#[inline(never)]
fn keep_memory(scratch: &mut Scratch, flow: *mut Flow, index: u32) -> u32 {
    let Some((rule, direction)) = rule_at(scratch, index) else {
        return 1;
    };
    let (memory, at) = remembered(scratch, flow, index);
    let side = usize::from(direction & 1);
    let copy = &scratch.foreseen[at];
    memory.memory[side] = copy.memory[side];
    if copy.outside != 0 {
        add(&mut memory.outside, copy.outside);
    }
    if let Some(stats) = RULE_STATS.get_ptr_mut(rule.state) {
        // SAFETY: the statistics are this CPU's own.
        unsafe {
            (*stats).seen_packets += u64::from(scratch.sight.segments);
            (*stats).seen_segments += u64::from(scratch.sight.segments);
            (*stats).seen_bytes += u64::from(scratch.sight.bytes);
        }
    }
    if trace::is_on() {
        trace::foreseen(scratch, flow, rule, index, direction.into());
    }
    1
}

/// Judges [`SEGMENTS_RUN`] wire packets of the super-packet at hand, as far as it has them; 0 when nothing is going to happen
/// to any. The verifier walks each turn of a loop: it sees these and their calls once each, and not every segment. A global
/// function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_foresee_run(first: u32, size: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 1;
    };
    for index in 0..SEGMENTS_RUN {
        let segment = first + index;
        // SAFETY: see `Scratch`; no reference lives across a call of a global function.
        if segment >= unsafe { (*scratch).sight.segments } {
            break;
        }
        if fault_foresee(segment, size) != 0 {
            return 1;
        }
    }
    0
}

/// Judges one wire packet of the super-packet at hand; 0 when nothing is going to happen to it. A global function: see
/// `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_foresee(segment: u32, size: u32) -> u32 {
    if FORESEES.load() == 0 {
        // The verifier looks at global functions also where nobody calls them.
        return 1;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let packet = &mut scratch.packet;
    let (end, tcp_flags, kinds, sequence) =
        (packet.end, packet.tcp_flags, packet.kinds, packet.sequence);
    let Some(part) = packet.part(segment, size) else {
        return 1;
    };
    packet.become_part(&part);
    let passes = each_match(|index| foresee_one(scratch, index));
    let packet = &mut scratch.packet;
    (packet.end, packet.tcp_flags, packet.kinds) = (end, tcp_flags, kinds);
    packet.sequence = sequence;
    u32::from(!passes)
}

/// Whether the rule at `index` lets the packet in the scratch be, by the copy of what it remembers.
#[inline(never)]
fn foresee_one(scratch: &mut Scratch, index: u32) -> u32 {
    let Some((rule, direction)) = rule_at(scratch, index) else {
        return 1;
    };
    let sample = Sample {
        now_ns: scratch.sight.since_ns,
        size: scratch.packet.length(),
        direction,
    };
    let memory = &mut scratch.foreseen[index as usize % MATCHES_MAX];
    let (packet, verdict) = (&scratch.packet, &mut scratch.verdict);
    let followed = &mut scratch.followed;
    let fired = judge::<InKernel<Alone>>(
        rule,
        &sample,
        packet,
        followed,
        memory,
        &mut RuleState::default(),
        verdict,
    );
    u32::from(fired.is_none() && verdict.holding == 0)
}

/// Sends the super-packet to where it is divided. An error where there is no such device, or nothing comes back from it:
/// then it is judged as a whole.
#[inline(always)]
pub fn divide<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    control: &Control,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    if control.divider == 0 || !skb.has_device(control.divider) {
        return Err(());
    }
    let undivided = scratch.undivided;
    scratch.undivided = undivided.wrapping_add(1);
    // The parts come back before the next packet of this processor, unless the device is down or about to disappear. Then
    // what is sent there is lost, so it is tried ever more rarely: the first time and after 1, 2, 4, 8, …
    if undivided & undivided.wrapping_sub(1) != 0 {
        // Policy: it is treated as one packet.
        count(Counter::Undivided);
        return Err(());
    }
    skb.push_link_header()?;
    skb.set_part();
    Ok(Skb::<EGRESS, LINK>::redirect(control.divider, 0))
}

/// Sends a wire packet of a super-packet that was divided back to where that was met.
#[inline(always)]
pub fn send_back(skb: Skb<true, 14>) -> i32 {
    let Some((interface, ingress)) = skb.origin() else {
        // Policy: what the stack itself sends this way is nobody's.
        return NEXT;
    };
    if let Some(scratch) = SCRATCH.get_ptr_mut(0) {
        // SAFETY: see `Scratch`.
        unsafe { (*scratch).undivided = 0 };
    }
    Skb::<true, 14>::redirect(interface, u64::from(ingress))
}
