//! Divides a super-packet into the wire packets that it stands for, so that each of them is judged by itself: what
//! the network would have lost, and nothing else, is lost.
//!
//! First they are judged without anything being done ([`all_pass`]): a super-packet to none of whose wire packets
//! anything is going to happen goes on as it is. Of any other
//! the whole is sent onward once for each segment, and every copy, when it comes by here again, is cut down to its
//! own part before it is judged. Which part that is, it carries beside the instances that have
//! judged it (`skb`). A copy of another instance of `fault` is cut in the same way.

use aya_ebpf::bindings::__sk_buff;
use fault_common::abi::{
    Counter, FLOW_SLOTS, Flow, FlowRule, MATCHES_MAX, RuleEntry, RuleState, modifier, rule_flag,
    step,
};
use fault_common::decide::{Counting, Sample, in_window, judge};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet, Part};

use crate::counting::{Alone, Fetch, InKernel, NoFetch, add};
use crate::maps::{
    FLOWS, FORESEES, MATCHES, PIECE, RULE_STATES, RULE_STATS, RULES, SCRATCH, Scratch, WORDS,
    count, count_many,
};
use crate::skb::{Any, Skb};
use crate::{classify, flows, trace};

/// The most segments that are told apart; a super-packet of more is judged as one.
const SEGMENTS_MAX: u32 = 64;
/// The largest segment that a copy can be cut down to: what the kernel lets programs make of a packet is limited
/// (`BPF_SKB_MAX_LEN`, less than 16 KiB). Loopback's super-packets have larger ones.
const SEGMENT_BYTES_MAX: u32 = 12 << 10;
/// Bytes moved at a time.
const PIECE_BYTES: u32 = 2048;
/// Pieces of the largest segment.
const PIECES_MAX: u32 = SEGMENT_BYTES_MAX / PIECE_BYTES + 1;

/// A super-packet that has been met passes whole.
pub const PASSES: u32 = 1;
/// It vanishes: its parts go on in its stead, or it can't become one.
pub const VANISHES: u32 = 2;
/// It is judged like any packet.
const IS_JUDGED: u32 = 0;

/// What becomes of the super-packet in the scratch, which rules match: [`PASSES`], [`VANISHES`], or it is to be judged,
/// as a whole or as the part that it has become. A global function: see `fault_collect`.
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
    if let Some(segment) = skb.part(ingress == 0) {
        if cut(skb, scratch, segment).is_err() {
            // Policy: a copy that can't be cut is not let pass, since the others carry its bytes too.
            count(Counter::ActionFailed);
            return VANISHES;
        }
        classify::measure(skb, scratch);
        return IS_JUDGED;
    }
    if !C::uses(modifier::PER_SEGMENT) || !is_wanted(scratch) {
        return IS_JUDGED;
    }
    let key = &scratch.key;
    let Some(flow) = FLOWS.get_ptr_mut(key) else {
        // Policy: its connection has just been forgotten, because there are too many: it is judged as one.
        return IS_JUDGED;
    };
    if all_pass::<C>(shared, flow, skb.gso_size()) {
        // Policy: no fault fired, for none of the wire packets.
        skb.set_judged_at(ingress == 0);
        return PASSES;
    }
    if divide(skb, shared, ingress) {
        VANISHES
    } else {
        IS_JUDGED
    }
}

/// Whether a rule that the super-packet matches asks for its wire packets one by one, and there are not too many.
#[inline(never)]
fn is_wanted(scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    if scratch.sight.segments > SEGMENTS_MAX
        || scratch.sight.size > SEGMENT_BYTES_MAX
        || (packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP)
    {
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
    if FORESEES.load() == 0 || overflow != 0 {
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
    for segment in 0..SEGMENTS_MAX {
        if segment >= segments {
            break;
        }
        if fault_foresee(segment, size) != 0 {
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
    let (at, slot) = (
        index as usize % MATCHES_MAX,
        scratch.slot as usize % FLOW_SLOTS,
    );
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

/// Sends the super-packet onward once for each segment. False when not even the first copy could be made: then the
/// packet is still whole. The scratch comes as a plain pointer, because the copies are judged meanwhile.
#[inline(never)]
fn divide(skb: Any, scratch: *mut Scratch, ingress: u32) -> bool {
    // SAFETY: see `Scratch`; no reference lives across the sending of a copy.
    let segments = unsafe { (*scratch).sight.segments };
    let mut lost = 0;
    for segment in 0..SEGMENTS_MAX {
        if segment >= segments {
            break;
        }
        let made = fault_send_part(skb.raw(), segment, ingress) != 0;
        if segment == 0 && !made {
            count(Counter::ActionFailed);
            return false;
        }
        lost += u64::from(!made);
    }
    count_many(Counter::ActionFailed, lost);
    true
}

/// Sends the super-packet onward once, for one segment; 0 when that fails. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_send_part(skb: *mut __sk_buff, segment: u32, ingress: u32) -> u32 {
    let skb: Any = Skb::of(skb);
    skb.set_part(segment, ingress == 0);
    u32::from(skb.clone_to_side(ingress).is_ok())
}

/// Cuts a copy of a super-packet down to one segment, and the packet in the scratch too.
///
/// Everything that segmentation offload would write is written: lengths, the IPv4 identification, the TCP sequence
/// number and flags. The checksum field of a super-packet holds the sum of its pseudo-header, of which only the length
/// changes. Source: `tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment` of Linux.
#[inline(never)]
fn cut(skb: Any, scratch: &mut Scratch, segment: u32) -> Result<(), ()> {
    let part = scratch.packet.part(segment, skb.gso_size()).ok_or(())?;
    cut_to(skb, &scratch.packet, segment, &part)?;
    scratch.packet.become_part(&part);
    Ok(())
}

#[inline(always)]
fn cut_to(skb: Any, packet: &Packet, segment: u32, part: &Part) -> Result<(), ()> {
    let (skipped, length) = (part.skipped, part.length);
    let payload = packet.payload_length();
    if segment != 0 {
        move_payload(skb, packet.payload_offset, skipped, length)?;
    }
    skb.resize(packet.payload_offset + length)?;
    let network = packet.network_offset;
    let shorter = payload - length;
    if packet.ipv6 {
        let total = packet.end - network - 40 - shorter;
        skb.store(network + 4, &(total as u16).to_be_bytes())?;
    } else {
        let total = (packet.length() - shorter) as u16;
        replace_ipv4(skb, network + 2, network + 10, |_| total)?;
        replace_ipv4(skb, network + 4, network + 10, |id| {
            id.wrapping_add(segment as u16)
        })?;
    }
    let at = packet.transport_offset;
    let before = (packet.end - at) as u16;
    let after = before - shorter as u16;
    if packet.protocol == PROTOCOL_UDP {
        skb.store(at + 4, &after.to_be_bytes())?;
        return skb.replace_pseudo_length(at + 6, before, after);
    }
    let sequence = packet.sequence.wrapping_add(skipped);
    skb.store(at + 4, &sequence.to_be_bytes())?;
    skb.store(at + 13, &[part.tcp_flags])?;
    skb.replace_pseudo_length(at + 16, before, after)
}

#[inline(always)]
fn replace_ipv4(skb: Any, at: u32, checksum: u32, change: impl Fn(u16) -> u16) -> Result<(), ()> {
    use fault_common::packet::Load as _;
    let before: [u8; 2] = skb.load(at).ok_or(())?;
    let after = change(u16::from_be_bytes(before)).to_be_bytes();
    skb.replace_l3_sum(
        checksum,
        u16::from_ne_bytes(before),
        u16::from_ne_bytes(after),
    )?;
    skb.store(at, &after)
}

/// Moves `length` bytes of payload to its start, from `skipped` bytes behind.
#[inline(never)]
fn move_payload(skb: Any, payload_offset: u32, skipped: u32, length: u32) -> Result<(), ()> {
    let piece = PIECE.get_ptr_mut(0).ok_or(())?.cast();
    for n in 0..PIECES_MAX {
        let done = n * PIECE_BYTES;
        if done >= length {
            return Ok(());
        }
        let to = payload_offset + done;
        let left = length - done;
        let most = if left > PIECE_BYTES {
            PIECE_BYTES
        } else {
            left
        };
        // The same again in a form that the verifier sees through: 1 to PIECE_BYTES.
        let bytes = ((most - 1) & (PIECE_BYTES - 1)) + 1;
        // SAFETY: the piece has PIECE_BYTES bytes.
        unsafe {
            skb.load_raw(to + skipped, piece, bytes)?;
            skb.store_raw(to, piece, bytes)?;
        }
    }
    Err(())
}
