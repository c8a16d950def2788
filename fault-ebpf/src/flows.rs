//! What is remembered of connections.

use core::ptr::NonNull;

use fault_common::abi::{Counter, FLOW_SLOTS, Flow, FlowRule, RuleEntry, RuleState, SetHeader};
use fault_common::decide::{Counting, open};
use fault_common::flow::{FlowKey, Side};
use fault_common::matching::server_side;
use fault_common::packet::{PROTOCOL_TCP, Packet, TCP_ACK, TCP_SYN};

use crate::maps::{FLOW_RULES, FLOWS, FlowRuleKey, Scratch, count};
use crate::scope;
use crate::skb::Skb;

const BPF_NOEXIST: u64 = 1;

/// The connection of a packet, entered when it is new, begun anew when its ports are used again.
#[inline(always)]
pub fn enter<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    header: &SetHeader,
    scratch: &mut Scratch,
    side: Side,
) -> Option<NonNull<Flow>> {
    let Some(found) = FLOWS.get_ptr_mut(&scratch.key) else {
        return insert(skb, header, scratch, side);
    };
    let (packet, generation) = (&scratch.packet, scratch.sight.generation);
    // SAFETY: a map value lives until the program ends; other CPUs may write to it, which at worst
    // costs an ordinal.
    let flow = unsafe { &mut *found };
    if is_initial(packet) {
        if flow.has_initial == 1 && flow.initial_sequence != packet.sequence {
            begin(flow, packet, side);
            set_scopes(flow, skb, packet, header, generation);
        }
        flow.has_initial = 1;
        flow.initial_sequence = packet.sequence;
    }
    if flow.scope_version != header.scope_version {
        set_scopes(flow, skb, packet, header, generation);
    }
    NonNull::new(found)
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
fn set_scopes<const EGRESS: bool, const LINK: u32>(
    flow: &mut Flow,
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    header: &SetHeader,
    generation: u32,
) {
    flow.scope_version = header.scope_version;
    if header.has_scopes != 0 {
        [flow.scope, flow.peer_scope] = scope::find(skb, packet, header, generation);
    }
}

#[inline(always)]
fn insert<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    header: &SetHeader,
    scratch: &mut Scratch,
    side: Side,
) -> Option<NonNull<Flow>> {
    let (flow, packet, key) = (&mut scratch.flow, &scratch.packet, &scratch.key);
    let generation = scratch.sight.generation;
    flow.scope = 0;
    flow.peer_scope = 0;
    begin(flow, packet, side);
    set_scopes(flow, skb, packet, header, generation);
    // Another CPU may have been faster: then its entry is as good.
    if FLOWS.insert(key, &*flow, BPF_NOEXIST).is_err() && FLOWS.get_ptr(key).is_none() {
        return None;
    }
    NonNull::new(FLOWS.get_ptr_mut(key)?)
}

/// What `rule` remembers of the connection: a slot of its entry, or an entry of its own where the slots
/// are taken.
#[inline(always)]
pub fn memory<C: Counting>(
    flow: &mut Flow,
    key: &FlowKey,
    rule: &RuleEntry,
    state: &mut RuleState,
) -> Option<NonNull<FlowRule>> {
    for index in 0..FLOW_SLOTS {
        let slot = &mut flow.rules[index];
        if slot.uid == rule.uid {
            return Some(NonNull::from(slot));
        }
        if slot.uid == 0 {
            open::<C>(rule, state, slot);
            return Some(NonNull::from(slot));
        }
    }
    let key = FlowRuleKey {
        flow: *key,
        rule: rule.uid,
    };
    if let Some(found) = FLOW_RULES.get_ptr_mut(&key) {
        return NonNull::new(found);
    }
    let mut fresh = FlowRule::default();
    open::<C>(rule, state, &mut fresh);
    if FLOW_RULES.insert(&key, &fresh, BPF_NOEXIST).is_err() {
        count(Counter::FlowTableFull);
        return None;
    }
    NonNull::new(FLOW_RULES.get_ptr_mut(&key)?)
}
