//! What is remembered of connections.

use core::ptr::NonNull;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_ktime_get_ns;

use fault_common::abi::{
    Counter, Flow, FlowRule, FlowRuleKey, NAMED_WORDS, RuleEntry, RuleState, SetHeader, direction,
    named_at,
};
use fault_common::decide::Counting;
use fault_common::flow::{FlowKey, Side, Told, end, flow_into};
use fault_common::matching::{Connection, Hints, Service, service};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet, TCP_FIN, TCP_RST};

use crate::counting::{Advance as _, NoFetch};
use crate::frame::{Frame, Sockets};
use crate::maps::{
    BIRTHS, FLOW_RULES, FLOWS, MATCHES, NAMED, ROUND, SCOPED, SCRATCH, SETS, Scratch, count, is_tcp,
};
use crate::scope;

const BPF_NOEXIST: u64 = 1;

/// The connection of a packet, entered when it is new, begun anew when its ports are used again. Nothing where there is no
/// room for it, or where [`is_nobodys`]. A function of its own: what it leaves on the stack ends with it, and the verifier
/// goes on once.
#[inline(never)]
pub fn enter<F: Frame>(
    frame: F,
    header: &SetHeader,
    scratch: &mut Scratch,
) -> Option<NonNull<Flow>> {
    let side = flow_into(&scratch.packet, &mut scratch.key);
    frame.single_out(&mut scratch.key);
    scratch.side = side as u32;
    if is_scoped(header) && !is_tcp(&scratch.packet) {
        ask(frame, scratch, frame.ends());
        if is_nobodys(header, scratch) {
            return None;
        }
    }
    // A reference: a copy would not fit the stack.
    let key = &scratch.key;
    let entry = if let Some(found) = FLOWS.get_ptr_mut(key) {
        // SAFETY: a map value lives until the program ends; other CPUs may write to it, which at worst
        // costs an ordinal.
        if is_stale(frame, header, scratch, unsafe { &*found }) {
            expose(scratch);
            frame.renew();
        }
        NonNull::new(found)
    } else {
        expose(scratch);
        frame.insert();
        FLOWS.get_ptr_mut(&scratch.key).and_then(NonNull::new)
    }?;
    // SAFETY: as above.
    let flow = unsafe { &mut *entry.as_ptr() };
    touch(flow, &scratch.packet, side);
    scratch.connection = Connection {
        direction: if flow.server_side == side as u8 {
            direction::TO_CLIENT
        } else {
            direction::TO_SERVER
        },
        is_certain: flow.is_certain != 0,
        scopes: [
            flow.scopes[side as usize & 1],
            flow.scopes[side.other() as usize & 1],
        ],
        questions: 0,
    };
    Some(entry)
}

/// Whether a packet whose sockets have been asked belongs to nobody whom the rules are limited to.
#[inline(always)]
pub fn is_nobodys(header: &SetHeader, scratch: &Scratch) -> bool {
    is_scoped(header)
        && !is_tcp(&scratch.packet)
        && header.any_scope == 0
        && scratch.packet.tells_sockets()
        && !scratch.told.has_scope()
}

/// Notes when the connection's last packet came, and whether it has ended: what its removal from the table depends on.
#[inline(always)]
fn touch(flow: &mut Flow, packet: &Packet, side: Side) {
    if let Some(round) = ROUND.get(0)
        && flow.touched != *round
    {
        flow.touched = *round;
    }
    if is_tcp(packet) && packet.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
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

/// Whether it matters whose a packet is.
#[inline(always)]
fn is_scoped(header: &SetHeader) -> bool {
    SCOPED.load() != 0 && header.has_scopes != 0
}

/// Asks the sockets at a packet's ends whose it is. The answer is left in the scratch, which comes as a plain pointer
/// because a global function writes it: see `classify::list_rules`.
#[inline(always)]
fn ask<S: Sockets>(sockets: S, scratch: *mut Scratch, ends: u32) {
    // SAFETY: see `Scratch`.
    unsafe { (*scratch).told = Told::default() };
    expose(scratch);
    sockets.ask(scratch, ends);
}

/// Whether a packet tells something of its connection that is not remembered.
#[inline(always)]
fn is_stale<F: Frame>(frame: F, header: &SetHeader, scratch: &Scratch, flow: &Flow) -> bool {
    let packet = &scratch.packet;
    if packet.is_initial() || flow.scope_version != header.scope_version {
        return true;
    }
    if !is_scoped(header) {
        return false;
    }
    let sender = side(scratch);
    if is_tcp(packet) {
        flow.unresolved(sender, frame.ends()) != 0
    } else {
        !flow.knows(&scratch.told, sender)
    }
}

/// What the sockets at the ends of a socket buffer tell.
#[derive(Clone, Copy)]
struct Buffer {
    skb: *mut __sk_buff,
    ends: u32,
}

impl Sockets for Buffer {
    #[inline(always)]
    fn ends(&self) -> u32 {
        self.ends
    }

    #[inline(always)]
    fn ask(&self, _scratch: *mut Scratch, ends: u32) {
        scope::fault_ask(self.skb, ends);
    }

    #[inline(always)]
    fn find_service(&self) {
        fault_find_service(self.skb, self.ends);
    }
}

/// [`renew`] for a socket buffer with these [`Sockets::ends`]. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_renew(skb: *mut __sk_buff, ends: u32) -> u32 {
    renew(Buffer { skb, ends });
    0
}

/// [`insert`] for a socket buffer with these [`Sockets::ends`]. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_insert(skb: *mut __sk_buff, ends: u32) -> u32 {
    insert(Buffer { skb, ends });
    0
}

/// Brings the known connection of the packet in the scratch up to date: begins it anew when its ports are used again, and
/// looks up what depends on rules when these have changed.
#[inline(never)]
pub fn renew<S: Sockets>(sockets: S) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let key = &scratch.key;
    let (Some(header), Some(flow)) = (
        SETS.get(scratch.sight.generation & 1),
        FLOWS.get_ptr_mut(key),
    ) else {
        return;
    };
    // SAFETY: a map value lives until the program ends; other CPUs may write to it, which at worst costs an ordinal.
    let flow = unsafe { &mut *flow };
    let sender = side(scratch);
    let is_tcp = is_tcp(&scratch.packet);
    let is_new = if is_tcp {
        flow.is_begun_anew(&scratch.packet)
    } else {
        is_scoped(header)
            && scratch.packet.tells_sockets()
            && flow.is_taken_over(&scratch.told, sender)
    };
    let changed = flow.scope_version != header.scope_version;
    if is_new || (changed && flow.is_certain == 0) {
        expose(scratch);
        sockets.find_service();
        if is_new {
            fault_begin(1);
        } else {
            flow.serve(found_service(scratch));
        }
    }
    if changed {
        flow.scope_version = header.scope_version;
        flow.forget_owners();
    }
    if !is_scoped(header) {
        return;
    }
    if is_tcp {
        let ends = flow.unresolved(sender, sockets.ends());
        ask(sockets, scratch, ends);
        flow.resolve(&scratch.told, sender);
    } else {
        flow.remember(&scratch.told, sender);
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

/// Finds out which end of the connection of the packet in the scratch the service is, and leaves the answer there. What is
/// asked on the way goes through the scratch as well: the verifier then goes on once, and not once for each combination
/// of answers. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_find_service(skb: *mut __sk_buff, ends: u32) -> u32 {
    find_service(|_, end| ends & end != 0 && scope::fault_listens(skb, end) != 0)
}

/// See [`fault_find_service`]; `listens` says whether a socket of this host listens at an end of the packet.
#[inline(always)]
pub fn find_service(listens: impl Fn(&Packet, u32) -> bool) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let (generation, packet) = (scratch.sight.generation, &scratch.packet);
    let (protocol, from, to) = (packet.protocol, packet.source_port, packet.destination_port);
    let asks = protocol == PROTOCOL_TCP && !packet.is_handshake();
    note(&mut scratch.hints[0], is_named(protocol, from, generation));
    note(&mut scratch.hints[1], is_named(protocol, to, generation));
    let sends = asks && listens(&scratch.packet, end::SENDER);
    note(&mut scratch.hints[2], sends);
    let receives = asks && listens(&scratch.packet, end::RECEIVER);
    note(&mut scratch.hints[3], receives);
    let hints = Hints {
        named: [noted(&scratch.hints[0]), noted(&scratch.hints[1])],
        listens: [noted(&scratch.hints[2]), noted(&scratch.hints[3])],
    };
    let service = service(&scratch.packet, side(scratch), hints);
    note(&mut scratch.service[0], service.side == Side::High);
    note(&mut scratch.service[1], service.is_certain);
    0
}

/// The answer of [`find_service`].
#[inline(always)]
fn found_service(scratch: &Scratch) -> Service {
    Service {
        side: if noted(&scratch.service[0]) {
            Side::High
        } else {
            Side::Low
        },
        is_certain: noted(&scratch.service[1]),
    }
}

/// Leaves an answer in the scratch. Volatile, so that it is not kept in a register.
#[inline(always)]
fn note(at: &mut u8, answer: bool) {
    // SAFETY: a valid reference.
    unsafe { core::ptr::write_volatile(at, u8::from(answer)) }
}

/// An answer that [`note`] has left.
#[inline(always)]
fn noted(at: &u8) -> bool {
    // SAFETY: a valid reference.
    unsafe { core::ptr::read_volatile(at) & 1 != 0 }
}

/// Whether a rule gives a port by itself.
#[inline(never)]
fn is_named(protocol: u8, port: u16, generation: u32) -> bool {
    let protocol = match protocol {
        PROTOCOL_TCP => 0,
        PROTOCOL_UDP => 1,
        _ => return false,
    };
    let (word, bit) = named_at(protocol, port);
    let word = NAMED.get(generation * NAMED_WORDS + word);
    word.is_some_and(|word| word >> bit & 1 != 0)
}

/// Begins a connection with the packet in the scratch: the one in the table, or the one in the scratch that is to be
/// entered. Its slots are free and empty. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_begin(is_known: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let service = found_service(scratch);
    let packet = &scratch.packet;
    if is_known == 0 {
        begin(&mut scratch.flow, packet, service);
    } else if let Some(flow) = FLOWS.get_ptr_mut(&scratch.key) {
        // SAFETY: a map value lives until the program ends; other CPUs may write to it, which at worst costs an ordinal.
        begin(unsafe { &mut *flow }, packet, service);
    }
    0
}

#[inline(always)]
fn begin(flow: &mut Flow, packet: &Packet, service: Service) {
    flow.begin(packet, service);
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

/// Tells the compiler that a global function, which is called next, may write to the scratch: to it the pointer would
/// otherwise be known to the caller alone.
#[inline(always)]
pub fn expose(scratch: *mut Scratch) {
    // SAFETY: the instruction does nothing.
    unsafe { core::arch::asm!("{0} = {0}", in(reg) scratch, options(nostack)) }
}

/// Enters the connection of the packet in the scratch into the table.
#[inline(never)]
pub fn insert<S: Sockets>(sockets: S) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let Some(header) = SETS.get(scratch.sight.generation & 1) else {
        return;
    };
    let is_tcp = is_tcp(&scratch.packet);
    if is_scoped(header) && is_tcp {
        ask(sockets, scratch, sockets.ends());
    }
    expose(scratch);
    sockets.find_service();
    fault_begin(0);
    let sender = side(scratch);
    let (flow, key) = (&mut scratch.flow, &scratch.key);
    flow.scope_version = header.scope_version;
    if is_scoped(header) {
        if is_tcp {
            flow.resolve(&scratch.told, sender);
        } else {
            flow.remember(&scratch.told, sender);
        }
    }
    store(key, flow);
}

/// Enters a connection into the table. A function of its own for the sake of the stack.
#[inline(never)]
fn store(key: &FlowKey, flow: &Flow) {
    // Another CPU may have been faster: then its entry is as good.
    if FLOWS.insert(key, flow, BPF_NOEXIST).is_ok() {
        count(Counter::FlowEntered);
    }
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
        if index >= MATCHES.load() {
            // As many rules there are, and no more take slots.
            break;
        }
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

/// Waits for the CPU that has claimed what a rule remembers to have told the connection's ordinal: for some hundreds of
/// nanoseconds. Few turns that take long, because the verifier walks each of them.
#[inline(always)]
pub fn settle(memory: &FlowRule) {
    const ATTEMPTS: u32 = 16;
    for _ in 0..ATTEMPTS {
        // SAFETY: a valid reference; volatile, as another CPU writes it. The helper has no preconditions.
        unsafe {
            if core::ptr::read_volatile(&raw const memory.connection) != 0 {
                return;
            }
            bpf_ktime_get_ns();
        }
    }
    // Policy: the packet is judged as one of no known connection.
    count(Counter::Contended);
}

/// What `rule` remembers of a connection whose own entry has no slot for the rule.
#[inline(always)]
pub fn find_apart<C: Counting>(
    scratch: &mut Scratch,
    flow: *mut Flow,
    rule: &RuleEntry,
    state: *mut RuleState,
) -> Option<NonNull<FlowRule>> {
    scratch.apart = FlowRuleKey {
        flow: scratch.key,
        // SAFETY: map values live until the program ends.
        birth: unsafe { (*flow).birth },
        uid: rule.uid,
    };
    if FLOW_RULES.get_ptr(&scratch.apart).is_none() {
        // SAFETY: as above.
        enter_apart::<C>(scratch, rule, unsafe { &mut *state });
    }
    NonNull::new(FLOW_RULES.get_ptr_mut(&scratch.apart)?)
}

#[inline(never)]
fn enter_apart<C: Counting>(scratch: &mut Scratch, rule: &RuleEntry, state: &mut RuleState) {
    // References: copies would not fit the stack.
    let (key, fresh) = (&scratch.apart, &mut scratch.entry);
    *fresh = FlowRule {
        uid: rule.uid,
        ..FlowRule::default()
    };
    let fresh: &FlowRule = fresh;
    // Another CPU may have been faster: then its entry is as good.
    if FLOW_RULES.insert(key, fresh, BPF_NOEXIST).is_err() {
        return;
    }
    count(Counter::FlowRuleEntered);
    if let Some(entry) = FLOW_RULES.get_ptr_mut(key) {
        let ordinal = C::next(&mut state.connections) as u32;
        // SAFETY: a map value lives until the program ends; volatile, as others wait for it.
        unsafe { core::ptr::write_volatile(&raw mut (*entry).connection, ordinal) };
    }
}
