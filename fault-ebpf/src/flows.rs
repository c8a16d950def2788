//! What is remembered of connections.

use core::ptr::NonNull;

use fault_common::abi::{
    Counter, Flow, FlowRule, FlowRuleKey, MOVED, RuleEntry, RuleState, SetHeader, direction,
};
use fault_common::decide::Counting;
use fault_common::flow::{Side, flow_into};
use fault_common::matching::{Connection, server_side};
use fault_common::packet::{PROTOCOL_TCP, Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

use crate::counting::{Advance as _, NoFetch};
use crate::frame::Frame;
use crate::maps::{BIRTHS, CONTROL, FLOW_RULES, FLOWS, Scratch, count};

const BPF_NOEXIST: u64 = 1;

/// The connection of a packet, entered when it is new, begun anew when its ports are used again.
#[inline(always)]
pub fn enter<F: Frame>(
    frame: F,
    header: &SetHeader,
    scratch: &mut Scratch,
) -> Option<NonNull<Flow>> {
    let side = flow_into(&scratch.packet, &mut scratch.key);
    scratch.side = side as u32;
    // A reference: a copy would not fit the stack.
    let key = &scratch.key;
    let entry = match FLOWS.get_ptr_mut(key) {
        Some(found) => {
            // SAFETY: a map value lives until the program ends; other CPUs may write to it, which at worst
            // costs an ordinal.
            let flow = unsafe { &mut *found };
            if is_initial(&scratch.packet) || flow.scope_version != header.scope_version {
                renew(frame, header, scratch, flow);
            }
            NonNull::new(found)?
        }
        None => insert(frame, header, scratch)?,
    };
    // SAFETY: as above.
    let flow = unsafe { &mut *entry.as_ptr() };
    touch(flow, &scratch.packet, side);
    scratch.connection = Connection {
        direction: if flow.server_side == side as u8 {
            direction::TO_CLIENT
        } else {
            direction::TO_SERVER
        },
        scopes: [flow.scope, flow.peer_scope],
    };
    Some(entry)
}

/// Notes when the connection's last packet came, and whether it has ended: what its removal from the table depends on.
#[inline(always)]
fn touch(flow: &mut Flow, packet: &Packet, side: Side) {
    if let Some(control) = CONTROL.get(0)
        && flow.touched != control.round
    {
        flow.touched = control.round;
    }
    if packet.protocol == PROTOCOL_TCP && packet.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
        let other = u8::from(packet.tcp_flags & TCP_RST != 0);
        // A byte for each side: two CPUs write to different ones.
        let [low, high] = &mut flow.ended;
        let (own, peer) = match side {
            Side::Low => (low, high),
            Side::High => (high, low),
        };
        *own = 1;
        *peer |= other;
    }
}

/// Begins a known connection anew when its ports are used again, and looks its scopes up again when they have
/// changed.
#[inline(never)]
fn renew<F: Frame>(frame: F, header: &SetHeader, scratch: &Scratch, flow: &mut Flow) {
    let (packet, generation) = (&scratch.packet, scratch.sight.generation);
    if is_initial(packet) {
        if flow.has_initial == 1 && flow.initial_sequence != packet.sequence {
            begin(flow, packet, side(scratch));
            set_scopes(flow, frame, packet, header, generation);
        }
        flow.has_initial = 1;
        flow.initial_sequence = packet.sequence;
    }
    if flow.scope_version != header.scope_version {
        set_scopes(flow, frame, packet, header, generation);
    }
}

/// From which end of the flow in the scratch its packet comes.
#[inline(always)]
fn side(scratch: &Scratch) -> Side {
    if scratch.side == Side::Low as u32 {
        Side::Low
    } else {
        Side::High
    }
}

#[inline(always)]
fn is_initial(packet: &Packet) -> bool {
    packet.protocol == PROTOCOL_TCP && packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
}

#[inline(always)]
fn begin(flow: &mut Flow, packet: &Packet, side: Side) {
    flow.server_side = server_side(packet, side) as u8;
    flow.has_initial = u8::from(is_initial(packet));
    flow.initial_sequence = packet.sequence;
    flow.ended = [0, 0];
    flow.birth = BIRTHS
        .get_ptr_mut(0)
        // SAFETY: a map value lives until the program ends. Where two CPUs get the same number, two connections with one
        // name would have to begin at once for it to matter.
        .map_or(0, |births| NoFetch::next(unsafe { &mut *births }) as u32);
    for rule in &mut flow.rules {
        // Volatile: LLVM would make of plain stores a call of memset, which goes byte by byte here.
        // SAFETY: a valid reference.
        unsafe { core::ptr::write_volatile(rule, FlowRule::default()) };
    }
}

#[inline(always)]
fn set_scopes<F: Frame>(
    flow: &mut Flow,
    frame: F,
    packet: &Packet,
    header: &SetHeader,
    generation: u32,
) {
    flow.scope_version = header.scope_version;
    if header.has_scopes != 0 {
        [flow.scope, flow.peer_scope] = frame.scopes(packet, header, generation);
    }
}

#[inline(never)]
fn insert<F: Frame>(frame: F, header: &SetHeader, scratch: &mut Scratch) -> Option<NonNull<Flow>> {
    let side = side(scratch);
    let (flow, packet, key) = (&mut scratch.flow, &scratch.packet, &scratch.key);
    let generation = scratch.sight.generation;
    flow.scope = 0;
    flow.peer_scope = 0;
    begin(flow, packet, side);
    set_scopes(flow, frame, packet, header, generation);
    // Another CPU may have been faster: then its entry is as good.
    // A reference: a copy would not fit the stack.
    let fresh: &Flow = flow;
    if FLOWS.insert(key, fresh, BPF_NOEXIST).is_ok() {
        count(Counter::FlowEntered);
    }
    NonNull::new(FLOWS.get_ptr_mut(key)?)
}

/// Finds the slot in which `rule` remembers the connection, or begins one; says whether there is one.
/// The slot's index is left in the scratch.
#[inline(always)]
pub fn find_slot<C: Counting>(
    scratch: &mut Scratch,
    flow: *mut Flow,
    rule: &RuleEntry,
    state: *mut RuleState,
) -> bool {
    // SAFETY: map values live until the program ends.
    let (flow, state) = unsafe { (&mut *flow, &mut *state) };
    for (index, slot) in (0..).zip(flow.rules.iter_mut()) {
        let mut uid = uid_of(slot);
        if uid == 0 {
            claim::<C>(rule, state, slot);
            uid = uid_of(slot);
        }
        if uid == rule.uid {
            scratch.slot = index;
            return true;
        }
    }
    false
}

/// Whose slot it is. Volatile, because another CPU may be faster to claim it.
#[inline(always)]
fn uid_of(slot: &FlowRule) -> u32 {
    // SAFETY: a valid reference.
    unsafe { core::ptr::read_volatile(&raw const slot.uid) }
}

/// Claims a free slot for a rule, and gives the connection the rule's next ordinal. Of two CPUs one does.
#[inline(never)]
fn claim<C: Counting>(rule: &RuleEntry, state: &mut RuleState, slot: &mut FlowRule) -> bool {
    const { assert!(core::mem::offset_of!(FlowRule, connection) == 4) };
    // SAFETY: these are the first eight bytes of the slot, which begin with the identity; the rest are zero.
    let head = unsafe { &mut *core::ptr::from_mut(slot).cast::<u64>() };
    let is_ours = C::swap(head, 0, u64::from(rule.uid));
    if is_ours {
        let ordinal = C::next(&mut state.connections) as u32;
        // SAFETY: a valid reference; volatile, as others wait for it.
        unsafe { core::ptr::write_volatile(&raw mut slot.connection, ordinal) };
    }
    is_ours
}

/// Waits for the CPU that has claimed what a rule remembers to have told the connection's ordinal.
#[inline(always)]
pub fn settle(memory: &FlowRule) {
    const ATTEMPTS: u32 = 256;
    for _ in 0..ATTEMPTS {
        // SAFETY: a valid reference; volatile, as another CPU writes it.
        if unsafe { core::ptr::read_volatile(&raw const memory.connection) } != 0 {
            return;
        }
    }
    // Policy: the packet is judged as one of no known connection.
    count(Counter::Contended);
}

/// What `rule` remembers of the connection in the scratch, whose own entry has no slot for the rule.
#[inline(always)]
pub fn find_apart<C: Counting>(
    scratch: &mut Scratch,
    rule: &RuleEntry,
    state: *mut RuleState,
) -> Option<NonNull<FlowRule>> {
    let flow = FLOWS.get_ptr_mut(&scratch.key)?;
    // SAFETY: map values live until the program ends.
    let (flow, state) = unsafe { (&mut *flow, &mut *state) };
    scratch.apart = FlowRuleKey {
        flow: scratch.key,
        birth: flow.birth,
        uid: rule.uid,
    };
    if FLOW_RULES.get_ptr(&scratch.apart).is_none() {
        enter_apart::<C>(scratch, flow, rule, state);
    }
    NonNull::new(FLOW_RULES.get_ptr_mut(&scratch.apart)?)
}

/// Makes the entry, of what a slot of the connection's holds where the rule has had one.
#[inline(never)]
fn enter_apart<C: Counting>(
    scratch: &mut Scratch,
    flow: &mut Flow,
    rule: &RuleEntry,
    state: &mut RuleState,
) {
    // References: copies would not fit the stack.
    let (key, fresh) = (&scratch.apart, &mut scratch.entry);
    *fresh = FlowRule::default();
    for slot in &mut flow.rules {
        if uid_of(slot) == rule.uid {
            *fresh = *slot;
            slot.uid = MOVED;
        }
    }
    let is_new = fresh.uid == 0;
    fresh.uid = rule.uid;
    let fresh: &FlowRule = fresh;
    // Another CPU may have been faster: then its entry is as good.
    if FLOW_RULES.insert(key, fresh, BPF_NOEXIST).is_err() {
        return;
    }
    count(Counter::FlowRuleEntered);
    if is_new && let Some(entry) = FLOW_RULES.get_ptr_mut(key) {
        let ordinal = C::next(&mut state.connections) as u32;
        // SAFETY: a map value lives until the program ends; volatile, as others wait for it.
        unsafe { core::ptr::write_volatile(&raw mut (*entry).connection, ordinal) };
    }
}
