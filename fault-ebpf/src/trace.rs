//! Tells what is done with each packet that reaches a rule's port: `fault run -vv`.
//!
//! Facts are copied here, and nothing else: user space finds out which filter a packet failed, by the functions of
//! `fault_common` that decided it. Where the constant [`TRACE`] is 0 the verifier removes every call. These are no global
//! functions, which older kernels verify even where nobody calls them.

use fault_common::abi::{
    Counter, FLOW_SLOTS, Flow, FlowRule, MATCHES_MAX, RuleEntry, SetHeader, Trace, step, trace_flag,
};
use fault_common::matching::{Ports, Tables};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP};

use crate::maps::{FLOW_RULES, FLOWS, RULE_STATES, SCRATCH, Scratch, TRACE, TRACES, count};

/// Whether it is told at all.
#[inline(always)]
pub fn is_on() -> bool {
    TRACE.load() != 0
}

/// Tells of the packet in the scratch: `step` is a value of [`step`].
#[inline(always)]
pub fn packet(scratch: &mut Scratch, step: u8) {
    if is_on() {
        tell_packet(scratch, u32::from(step), 0);
    }
}

/// Tells that the packet in the scratch passes for a reason that is counted.
#[inline(always)]
pub fn passed(scratch: &mut Scratch, counter: Counter) {
    if is_on() {
        tell_packet(scratch, step::PASSED.into(), counter as u32);
    }
}

/// The same where a tc program is done with the packet, if it has looked at it: not of one that was judged before, for which
/// nothing may be written to the scratch.
#[inline(always)]
pub fn left(counter: Counter) {
    if is_on() {
        tell_left(counter as u32);
    }
}

#[inline(never)]
fn tell_left(counter: u32) {
    const TRUNCATED: u32 = Counter::Truncated as u32;
    const MALFORMED: u32 = Counter::Malformed as u32;
    const HEADERS: u32 = Counter::Headers as u32;
    const FRAGMENT: u32 = Counter::Fragment as u32;
    const LEASE_EXPIRED: u32 = Counter::LeaseExpired as u32;
    const FLOW_TABLE_FULL: u32 = Counter::FlowTableFull as u32;
    let is_read = match counter {
        TRUNCATED | MALFORMED | HEADERS => false,
        FRAGMENT | LEASE_EXPIRED | FLOW_TABLE_FULL => true,
        _ => return,
    };
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: see `Scratch`; the program is done with the packet.
    let scratch = unsafe { &mut *scratch };
    if is_read {
        tell_packet(scratch, step::PASSED.into(), counter);
    } else {
        scratch.trace.step = step::UNREAD;
        scratch.trace.counter = counter as u8;
        output(scratch);
    }
}

/// Tells of the packet in the scratch, which no rule concerns, when rules for its ports concern what goes the other way.
#[inline(always)]
pub fn other_way<T: Tables>(tables: &T, header: &SetHeader, scratch: &mut Scratch) {
    let packet = &scratch.packet;
    let index = match packet.protocol {
        PROTOCOL_TCP => 0,
        PROTOCOL_UDP => 1,
        _ => return,
    };
    let (to, from) = (packet.source_port, packet.destination_port);
    if Ports::of(index, header, tables.port(to), tables.port(from)).is_some() {
        scratch.matches.count = 0;
        tell_packet(scratch, step::OTHER_WAY.into(), 0);
    }
}

/// Copies what is known of the packet, and tells of it.
#[inline(never)]
fn tell_packet(scratch: &mut Scratch, step: u32, counter: u32) {
    let (trace, packet, matches) = (&mut scratch.trace, &scratch.packet, &scratch.matches);
    trace.step = step as u8;
    trace.counter = counter as u8;
    trace.rule = 0;
    trace.since_ns = scratch.sight.since_ns;
    trace.size = scratch.sight.size;
    trace.segments = scratch.sight.segments;
    trace.scopes = scratch.connection.scopes;
    trace.direction = scratch.connection.direction;
    trace.source = packet.source;
    trace.destination = packet.destination;
    trace.source_port = packet.source_port;
    trace.destination_port = packet.destination_port;
    trace.payload = packet.payload_length();
    trace.fragment = packet.fragment;
    trace.query_type = packet.query_type;
    trace.protocol = packet.protocol;
    trace.kinds = packet.kinds;
    trace.tcp_flags = packet.tcp_flags;
    trace.icmp_type = packet.icmp_type;
    trace.ecn = packet.ecn;
    let flag = |is_set: bool, flag: u8| u8::from(is_set) * flag;
    trace.flags = flag(packet.has_transport, trace_flag::TRANSPORT)
        | flag(packet.is_fragment, trace_flag::FRAGMENT)
        | flag(packet.follows, trace_flag::FOLLOWS)
        | flag(scratch.connection.is_certain, trace_flag::CERTAIN);
    trace.match_count = matches.count as u16;
    trace.overflow = matches.overflow as u16;
    for index in 0..MATCHES_MAX {
        trace.matches[index] = matches.items[index].rule;
    }
    output(scratch);
}

/// Tells what `rule` made of the packet in the scratch, of which [`tell_packet`] has told. What the rule remembers is looked up
/// again: the callers' stacks have no room to keep it.
#[inline(never)]
pub fn judged(scratch: &mut Scratch, rule: &RuleEntry, direction: u32) {
    let (Some(memory), Some(state)) = (
        memory_of(scratch, rule.uid),
        RULE_STATES.get_ptr(rule.state),
    ) else {
        return;
    };
    // SAFETY: map values live until the program ends; other CPUs may write to them, which at worst makes a line of a log
    // tell of a later packet.
    let (memory, state) = unsafe { (&*memory, &*state) };
    let (trace, followed) = (&mut scratch.trace, &scratch.followed);
    let side = (direction & 1) as usize;
    trace.step = step::JUDGED;
    trace.rule = rule.uid;
    trace.direction = direction as u8;
    trace.action = scratch.fired as u8;
    trace.connection = memory.connection;
    trace.packet = followed.packet;
    trace.seen = followed.seen;
    trace.delay_ns = followed.delay_ns;
    trace.outside = (memory.outside >> (32 * (direction & 1))) as u32;
    trace.memory = memory.memory[side];
    trace.rule_packets = state.packets;
    output(scratch);
}

/// What a rule remembers of the connection of the packet in the scratch.
#[inline(always)]
fn memory_of(scratch: &Scratch, rule: u32) -> Option<*const FlowRule> {
    let flow = FLOWS.get_ptr(&scratch.key)?;
    // SAFETY: map values live until the program ends.
    let slot = unsafe { &raw const (*flow).rules[scratch.slot as usize % FLOW_SLOTS] };
    // SAFETY: as above.
    if unsafe { (*slot).uid } == rule {
        return Some(slot);
    }
    FLOW_RULES.get_ptr(&scratch.apart)
}

/// Tells that `rule` judged wire packets of the super-packet in the scratch ahead: by `copy`, `before` had been counted
/// in their direction, and the whole passes.
#[inline(never)]
pub fn foreseen(
    scratch: &mut Scratch,
    flow: *const Flow,
    rule: &RuleEntry,
    at: u32,
    direction: u32,
) {
    let (trace, at) = (&mut scratch.trace, at as usize % MATCHES_MAX);
    let side = (direction & 1) as usize;
    let copy = &scratch.foreseen[at];
    let slot = scratch.foreseen_slots[at] as usize % FLOW_SLOTS;
    // SAFETY: as in `judged`.
    let outside = unsafe { (*flow).rules[slot].outside };
    trace.step = step::FORESEEN;
    trace.rule = rule.uid;
    trace.direction = direction as u8;
    trace.action = 0;
    trace.connection = copy.connection;
    trace.packet = copy.packets[side];
    trace.seen = (copy.packets[side] - scratch.foreseen_packets[at]) as u32;
    trace.outside = (outside >> (32 * (direction & 1))) as u32;
    trace.memory = copy.memory[side];
    output(scratch);
}

/// Puts the record at hand into the ring buffer.
#[inline(always)]
fn output(scratch: &Scratch) {
    if TRACES.output::<Trace>(&scratch.trace, 0).is_err() {
        count(Counter::TraceLost);
    }
}
