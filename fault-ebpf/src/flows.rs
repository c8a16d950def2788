//! What is remembered of connections.

use core::ptr::NonNull;

use fault_common::abi::{Flow, RuleEntry, RuleState, SetHeader, direction, state_of};
use fault_common::decide::{Counting, open};
use fault_common::flow::{Side, flow_into};
use fault_common::matching::{Connection, server_side};
use fault_common::packet::{PROTOCOL_TCP, Packet, TCP_ACK, TCP_SYN};

use crate::frame::Frame;
use crate::maps::{FLOWS, RULE_STATES, Scratch};

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
    let flow = unsafe { entry.as_ref() };
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
    for rule in &mut flow.rules {
        rule.uid = 0;
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
    if FLOWS.insert(key, fresh, BPF_NOEXIST).is_err() && FLOWS.get_ptr(key).is_none() {
        return None;
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
        if slot.uid == 0 {
            open::<C>(rule, state, slot);
        }
        if slot.uid == rule.uid {
            scratch.slot = index;
            return true;
        }
    }
    reclaim::<C>(scratch, flow, rule, state)
}

/// Takes over the slot of a rule that is in force no more.
#[inline(never)]
fn reclaim<C: Counting>(
    scratch: &mut Scratch,
    flow: &mut Flow,
    rule: &RuleEntry,
    state: &mut RuleState,
) -> bool {
    for (index, slot) in (0..).zip(flow.rules.iter_mut()) {
        let lives = RULE_STATES
            .get(state_of(slot.uid))
            .is_some_and(|owner| owner.uid == slot.uid);
        if !lives {
            open::<C>(rule, state, slot);
            scratch.slot = index;
            return true;
        }
    }
    false
}
