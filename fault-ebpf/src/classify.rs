//! The way of a packet through a tc program.

use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::maps::lpm_trie::Key;
use fault_common::abi::{
    Control, Counter, Event, FLOW_SLOTS, Flow, FlowRule, Known, MATCHES_MAX, NAMES_MAX,
    PortClasses, RuleEntry, RuleState, RuleStats, ScopeKey, SetHeader, WORDS_MAX, clock, datagram,
    protocol, step,
};
use fault_common::decide::{Counting, Sample, Verdict, judge};
use fault_common::dns::DockerPorts;
use fault_common::flow::Address;
use fault_common::fragment::Place;
use fault_common::matching::{Match, Ports, Tables, join, ports, query};
use fault_common::packet::{
    Bytes as _, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP, PROTOCOL_UDP, Unparsed,
    parse_extensions, parse_network, parse_plain_ipv4, parse_plain_ipv6, parse_transport,
};

use crate::counting::{Fetch, InKernel, Judging, NoFetch};
use crate::flows::expose;
use crate::fragments::{self, fault_keep_fragment, fault_meet_fragment};
use crate::frame::{Frame, Losing};
use crate::maps::{
    BRIDGE_PORTS, CLASSES, CLOCK, CONTROL, DOCKER_PORTS, EVENTS, FLOWS, HOSTS, HostKey, LEARNED,
    MATCHES, NAME_CLASSES, NAME_COUNT, PORTS, RULE_STATES, RULE_STATS, RULES, SCOPES, SCRATCH,
    SETS, SUMMARIES, Scratch, Sight, VECTORS, WORDS, concerns, count,
};
use crate::skb::{NEXT, Skb};
use crate::{act, dns, flows, hold, split, trace};

/// Judges one packet and returns what tc is to do with it.
#[inline(always)]
pub fn handle<C: Judging, const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> i32 {
    match try_handle::<C, EGRESS, LINK>(skb) {
        Ok(action) => action,
        // Policy: what can't be read or looked up passes, and is counted.
        Err(counter) => {
            count(counter);
            trace::left(counter);
            NEXT
        }
    }
}

#[inline(always)]
fn try_handle<C: Judging, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
) -> Result<i32, Counter> {
    if hold::departs(skb) {
        // Policy: it goes where it is held.
        return Err(Counter::Own);
    }
    if skb.is_judged() {
        // Policy: a packet is judged once, at the first of our hooks that it passes. This comes before
        // anything is written: a clone passes here while the packet that it was made of is still at it.
        return Err(Counter::Own);
    }
    if skb.complete().is_err() {
        // Policy: what was looped back passes when it can't be given the header that all others have.
        return Err(Counter::ActionFailed);
    }
    let control = CONTROL.get(0).ok_or(Counter::Internal)?;
    let generation = control.generation & 1;
    let header = SETS.get(generation).ok_or(Counter::Internal)?;
    let Some(ports) = glance(skb, header, generation) else {
        if trace::is_on() {
            trace_other_way(skb, header, generation);
        }
        // Policy: no rule can concern this packet. Nearly all packets end here.
        return Ok(NEXT);
    };
    let shared = SCRATCH.get_ptr_mut(0).ok_or(Counter::Internal)?;
    // SAFETY: see `Scratch`.
    let scratch = unsafe { &mut *shared };
    scratch.ports = ports;
    let mut passes = read(skb, header, scratch, generation);
    if passes == FRAGMENT {
        passes = read_fragment(header, shared, generation);
    }
    if passes == NO_RULE {
        if trace::is_on() {
            trace_other_way(skb, header, generation);
        }
        // Policy: no rule can concern it.
        return Ok(NEXT);
    }
    if passes != 0 {
        // Policy: what can't be read passes and is counted.
        return Err(reason(passes));
    }
    // Policy: without a living daemon nothing is touched.
    let now_ns = leased_ns(control).ok_or(Counter::LeaseExpired)?;
    // SAFETY: as above; a fresh reference, since `read_fragment` writes through another one.
    let scratch = unsafe { &mut *shared };
    see(skb, header, scratch, now_ns, generation);
    let Some(flow) = flows::enter(skb, header, scratch) else {
        // SAFETY: as above; a fresh reference, since `enter` has its socket asked through another one.
        let scratch = unsafe { &mut *shared };
        if flows::is_nobodys(header, scratch) {
            // Policy: it belongs to nobody whom the rules are limited to.
            trace::packet(scratch, step::NOBODY);
            return Ok(NEXT);
        }
        return Err(Counter::FlowTableFull);
    };
    if NAME_COUNT.load() != 0 && header.has_questions != 0 && dns::may_ask(&scratch.packet) {
        dns::fault_read_query(skb.raw());
    }
    // SAFETY: as above; a fresh reference, since the function above writes through another one.
    let scratch = unsafe { &mut *shared };
    let any = if WORDS.load() == 1 {
        list_one_word(header, scratch)
    } else {
        list_rules(header, shared)
    };
    if !any {
        // SAFETY: as above; a fresh reference, since the list was written through another one.
        trace::packet(unsafe { &mut *shared }, step::LISTED);
        // Policy: the port is a rule's, the host or the scope is not.
        keep_fragment(shared, datagram::UNCONCERNED);
        return Ok(NEXT);
    }
    if EGRESS && is_between_ports(skb) {
        // Policy: it is judged where it leaves the bridge.
        return Ok(NEXT);
    }
    // SAFETY: as above; a fresh reference, since the list was written through another one.
    let scratch = unsafe { &mut *shared };
    if scratch.sight.segments > 1 {
        let ingress = u32::from(!EGRESS);
        match C::meet_super(skb.raw(), ingress) {
            split::PASSES => return Ok(NEXT),
            split::DIVIDES => {
                // SAFETY: as above.
                let scratch = unsafe { &mut *shared };
                if let Ok(action) = split::divide(skb, control, scratch) {
                    return Ok(action);
                }
            }
            _ => {}
        }
    }
    // SAFETY: as above.
    let scratch = unsafe { &mut *shared };
    trace::packet(scratch, step::LISTED);
    skb.set_judged();
    if scratch.packet.is_fragment {
        scratch.sight.bytes += scratch.datagram.early_bytes;
    }
    let fired = judge_rules::<C>(shared, flow.as_ptr(), control.events);
    keep_fragment(shared, datagram::JUDGED);
    if !fired {
        // Policy: no fault fired.
        return Ok(NEXT);
    }
    // SAFETY: as above.
    let scratch = unsafe { &mut *shared };
    if act::is_drop(&scratch.verdict) {
        return Ok(Skb::<EGRESS, LINK>::vanish());
    }
    if act::may_only_drop() {
        // Policy: there is nothing else to be done; for the verifier alone.
        return Ok(NEXT);
    }
    if DOCKER_PORTS.load() != 0 {
        DockerPorts::unpacked(DOCKER_PORTS.load()).translate(&mut scratch.packet);
    }
    Ok(act::carry_out::<C, EGRESS, LINK>(skb, scratch))
}

/// Tells of a packet that no rule concerns by the direction that it goes in. A function of its own for the sake of the stack.
#[inline(never)]
fn trace_other_way<F: Frame>(frame: F, header: &SetHeader, generation: u32) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: see `Scratch`; the caller does not use what it has written there any more.
    let scratch = unsafe { &mut *scratch };
    let mut code = read_plain(frame, scratch);
    if code == NOT_PLAIN {
        code = read_any(frame, scratch);
    }
    if code == 0 {
        trace::other_way(&Maps { header, generation }, header, scratch);
    }
}

/// Whether the packet goes from one port of a bridge to another, and is at the bridge's own device only because
/// `br_netfilter` asks for the neighbour's address there. Its connection tracking is not done with it yet.
#[inline(always)]
fn is_between_ports<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> bool {
    let from = skb.ingress_ifindex();
    // SAFETY: the value is only compared.
    from != 0 && unsafe { BRIDGE_PORTS.get(from) } == Some(&skb.ifindex())
}

/// Whether a rule loses the packet, at a hook that can do no more than that; nothing when it is not judged there.
#[inline(always)]
pub fn is_lost<C: Judging, F: Losing>(frame: F) -> Option<bool> {
    let control = CONTROL.get(0)?;
    let generation = control.generation & 1;
    let header = SETS.get(generation)?;
    let ports = glance(frame, header, generation)?;
    let shared = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: see `Scratch`.
    let scratch = unsafe { &mut *shared };
    scratch.ports = ports;
    if read(frame, header, scratch, generation) != 0 || !frame.is_concerned(&scratch.packet) {
        return None;
    }
    let now_ns = leased_ns(control)?;
    see(frame, header, scratch, now_ns, generation);
    let flow = flows::enter(frame, header, scratch)?;
    let any = if WORDS.load() == 1 {
        list_one_word(header, scratch)
    } else {
        list_rules(header, shared)
    };
    // SAFETY: as above; a fresh reference, since the list was written through another one.
    let scratch = unsafe { &mut *shared };
    if !any {
        return None;
    }
    trace::packet(scratch, step::LISTED);
    if !frame.may_judge(scratch) {
        return None;
    }
    let is_hit = judge_rules::<C>(shared, flow.as_ptr(), control.events);
    // SAFETY: as above.
    Some(is_hit && act::is_drop(unsafe { &(*shared).verdict }))
}

/// The time, as long as the rules are in force.
#[inline(always)]
pub fn leased_ns(control: &Control) -> Option<u64> {
    if control.lease_until_ns == 0 {
        return None;
    }
    // SAFETY: the helpers have no preconditions.
    let now_ns = unsafe {
        match CLOCK.load() {
            clock::NONE => return Some(0),
            clock::TICK => bpf_ktime_get_coarse_ns(),
            _ => bpf_ktime_get_ns(),
        }
    };
    (now_ns <= control.lease_until_ns).then_some(now_ns)
}

/// Takes a glance at the ports: their classes, or nothing when no rule can concern the packet. A packet that is not plain
/// TCP or UDP has none, and is looked at in full.
#[inline(always)]
fn glance<F: Frame>(frame: F, header: &SetHeader, generation: u32) -> Option<Ports> {
    let not_plain = Some(Ports::default());
    let (protocol, from, to) = match frame.ethertype() {
        ETHERTYPE_IPV4 => {
            let Some(bytes) = frame.glance::<24>() else {
                return not_plain;
            };
            // No options, and no fragment.
            if bytes.byte::<0>() != 0x45 || bytes.half::<6>() & 0x3fff != 0 {
                return not_plain;
            }
            (bytes.byte::<9>(), bytes.half::<20>(), bytes.half::<22>())
        }
        ETHERTYPE_IPV6 => {
            let Some(bytes) = frame.glance::<44>() else {
                return not_plain;
            };
            (bytes.byte::<6>(), bytes.half::<40>(), bytes.half::<42>())
        }
        _ => return not_plain,
    };
    let index = match protocol {
        PROTOCOL_TCP if concerns(protocol::TCP) => 0,
        PROTOCOL_UDP if concerns(protocol::UDP) => 1,
        PROTOCOL_TCP | PROTOCOL_UDP => return None,
        _ => return not_plain,
    };
    if is_docker_port(to) {
        return not_plain;
    }
    let maps = Maps { header, generation };
    let (from, to) = (maps.port(from), maps.port(to));
    Ports::of(index, header, to, from)
}

/// Whether a port may be one that Docker's DNS server really has.
#[inline(always)]
fn is_docker_port(port: u16) -> bool {
    let ports = DockerPorts::unpacked(DOCKER_PORTS.load());
    DOCKER_PORTS.load() != 0 && (port == ports.udp || port == ports.tcp)
}

/// [`read`] found no rule that can concern the packet.
const NO_RULE: u32 = 1;
/// [`read`] found a fragment, which is left to [`read_fragment`].
const FRAGMENT: u32 = 9;
/// [`read_plain`] leaves the packet to [`read_any`].
const NOT_PLAIN: u32 = 8;

/// Reads the headers, and looks the ports up where the glance at them did not. 0 when rules may concern the packet,
/// else [`NO_RULE`] or a code for [`reason`].
#[inline(always)]
fn read<F: Frame>(frame: F, header: &SetHeader, scratch: &mut Scratch, generation: u32) -> u32 {
    let code = read_plain(frame, scratch);
    if code == 0 && scratch.ports != Ports::default() {
        return 0;
    }
    if code != NOT_PLAIN && code != 0 {
        return code;
    }
    read_rest(frame, header, scratch, generation)
}

/// [`read`] for a packet that is not of the common kind.
#[inline(always)]
fn read_rest<F: Frame>(
    frame: F,
    header: &SetHeader,
    scratch: &mut Scratch,
    generation: u32,
) -> u32 {
    let code = read_any(frame, scratch);
    if code != 0 {
        return code;
    }
    let packet = &mut scratch.packet;
    if DOCKER_PORTS.load() != 0 {
        DockerPorts::unpacked(DOCKER_PORTS.load()).name(packet);
    }
    if packet.is_fragment {
        return FRAGMENT;
    }
    let Some(ports) = ports(&Maps { header, generation }, header, packet) else {
        return NO_RULE;
    };
    scratch.ports = ports;
    0
}

/// The rest of [`read`] for a fragment: a later one gets the ports of the first. The scratch comes as a plain pointer: see
/// [`list_rules`].
#[inline(never)]
fn read_fragment(header: &SetHeader, scratch: *mut Scratch, generation: u32) -> u32 {
    let place = fault_meet_fragment();
    if place == Place::Unconcerned as u32 {
        return NO_RULE;
    }
    // SAFETY: see `Scratch`; no reference lives across a call of a global function.
    let (packet, known) = unsafe { (&(*scratch).packet, &mut (*scratch).ports) };
    let orphan = place == Place::Orphan as u32;
    if let Some(ports) = ports(&Maps { header, generation }, header, packet) {
        *known = ports;
        if orphan {
            // Policy: rules without a port judge it by its hosts.
            count(Counter::Fragment);
        }
        return 0;
    }
    if orphan {
        fault_keep_fragment(datagram::EARLY.into());
        return 7;
    }
    fault_keep_fragment(datagram::UNCONCERNED.into());
    NO_RULE
}

/// Remembers what has become of a datagram when the packet in the scratch is a fragment whose first one is known.
#[inline(always)]
fn keep_fragment(scratch: *mut Scratch, state: u8) {
    // SAFETY: see `Scratch`; no reference lives across a call of a global function.
    if fragments::is_tracked(unsafe { &(*scratch).packet }) {
        fault_keep_fragment(state.into());
    }
}

/// Reads a packet of the common kind, whose headers lie in one piece, without a helper.
#[inline(always)]
fn read_plain<F: Frame>(frame: F, scratch: &mut Scratch) -> u32 {
    let (length, packet) = (frame.length(), &mut scratch.packet);
    let read = match frame.ethertype() {
        ETHERTYPE_IPV4 => frame
            .glance::<34>()
            .and_then(|bytes| parse_plain_ipv4(&bytes, &bytes.beyond(20), F::LINK, length, packet)),
        ETHERTYPE_IPV6 => frame
            .glance::<54>()
            .and_then(|bytes| parse_plain_ipv6(&bytes, &bytes.beyond(40), F::LINK, length, packet)),
        _ => None,
    };
    read.map_or(NOT_PLAIN, code)
}

/// Reads any packet, in steps, because all of them together need too much stack.
#[inline(always)]
fn read_any<F: Frame>(frame: F, scratch: &mut Scratch) -> u32 {
    let mut code = read_network(frame, scratch);
    if code == 0 {
        code = read_extensions(frame, scratch);
    }
    if code == 0 {
        code = read_transport(frame, scratch);
    }
    code
}

#[inline(never)]
fn read_extensions<F: Frame>(frame: F, scratch: &mut Scratch) -> u32 {
    code(parse_extensions(&frame, &mut scratch.packet))
}

#[inline(never)]
fn read_network<F: Frame>(frame: F, scratch: &mut Scratch) -> u32 {
    let packet = &mut scratch.packet;
    code(parse_network(
        &frame,
        frame.ethertype(),
        F::LINK,
        frame.length(),
        packet,
    ))
}

#[inline(never)]
fn read_transport<F: Frame>(frame: F, scratch: &mut Scratch) -> u32 {
    code(parse_transport(&frame, &mut scratch.packet))
}

#[inline(always)]
fn code(read: Result<(), Unparsed>) -> u32 {
    match read {
        Ok(()) => 0,
        Err(Unparsed::NotIp) => 2,
        Err(Unparsed::Truncated) => 3,
        Err(Unparsed::Malformed) => 4,
        Err(Unparsed::Headers) => 5,
        Err(Unparsed::Discovery) => 6,
    }
}

#[inline(always)]
fn reason(code: u32) -> Counter {
    match code {
        2 => Counter::NotIp,
        3 => Counter::Truncated,
        4 => Counter::Malformed,
        5 => Counter::Headers,
        6 => Counter::Discovery,
        _ => Counter::Fragment,
    }
}

/// Notes when the packet came and how large it is.
#[inline(always)]
pub fn see<F: Frame>(
    frame: F,
    header: &SetHeader,
    scratch: &mut Scratch,
    now_ns: u64,
    generation: u32,
) {
    scratch.sight = Sight {
        now_ns,
        since_ns: now_ns.saturating_sub(header.epoch_ns),
        segments: 0,
        size: 0,
        bytes: 0,
        generation,
    };
    measure(frame, scratch);
}

/// Notes how large the packet is.
#[inline(always)]
pub fn measure<F: Frame>(frame: F, scratch: &mut Scratch) {
    let (packet, sight) = (&scratch.packet, &mut scratch.sight);
    sight.segments = frame.segments(packet);
    sight.size = frame.segment_size(packet);
    sight.bytes = frame.length() + (sight.segments - 1) * packet.payload_offset;
}

/// Lists the packet's rules; says whether there are any. The scratch comes as a plain pointer, because
/// [`fault_collect`] writes to it behind the back of whoever calls it.
#[inline(never)]
pub fn list_rules(header: &SetHeader, scratch: *mut Scratch) -> bool {
    // SAFETY: see `Scratch`; no reference lives across a call of `fault_collect`.
    let mut left = begin_list(header, unsafe { &mut *scratch });
    for index in 0..WORDS_MAX {
        if index >= WORDS.load() || left == 0 {
            break;
        }
        if left & 1 != 0 {
            fault_collect(index);
        }
        left >>= 1;
    }
    // SAFETY: as above.
    unsafe { (*scratch).matches.count != 0 }
}

/// [`list_rules`] for a set that fits one word: there is nothing to skip, so no summary is asked. A function of its own,
/// for want of room on the stack.
#[inline(never)]
pub fn list_one_word(header: &SetHeader, scratch: &mut Scratch) -> bool {
    let maps = Maps {
        header,
        generation: scratch.sight.generation,
    };
    // Volatile: see `ask`.
    // SAFETY: a valid reference.
    let ports = unsafe { core::ptr::read_volatile(&raw const scratch.ports) };
    scratch.query = query(&maps, &scratch.packet, ports, &scratch.connection);
    // What is read from there is one unknown value to the verifier. In a register it would go on once for each combination.
    expose(scratch);
    if MATCHES.load() == 1 {
        // Then there is no other rule.
        let direction = scratch.query.only(&maps);
        scratch.matches.count = u32::from(direction.is_some());
        scratch.matches.items[0] = Match {
            rule: 0,
            direction: direction.unwrap_or(0),
        };
        return direction.is_some();
    }
    scratch.matches.count = 0;
    scratch.matches.overflow = 0;
    scratch.query.collect(&maps, 0, &mut scratch.matches);
    scratch.matches.count != 0
}

/// Looks the packet's classes up and gives the words in which there may be rules.
#[inline(never)]
fn begin_list(header: &SetHeader, scratch: &mut Scratch) -> u64 {
    let maps = Maps {
        header,
        generation: scratch.sight.generation,
    };
    scratch.query = query(&maps, &scratch.packet, scratch.ports, &scratch.connection);
    scratch.matches.count = 0;
    scratch.matches.overflow = 0;
    scratch.query.summary(&maps)
}

/// Lists the matching rules of one word. A global function, which the verifier looks at once and not
/// once for each word; it takes nothing but numbers, because before Linux 5.12 such functions do.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_collect(index: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let generation = scratch.sight.generation & 1;
    let Some(header) = SETS.get(generation) else {
        return 0;
    };
    let maps = Maps { header, generation };
    scratch.query.collect(&maps, index, &mut scratch.matches);
    1
}

/// The rules that are aimed at names, of one word, or with [`WORDS_MAX`] as a summary. A global function: see
/// [`fault_collect`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_join(names: u64, about: u32, word: u32) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; nothing is written.
    let generation = unsafe { (*scratch).sight.generation } & 1;
    let Some(header) = SETS.get(generation).filter(|_| NAME_COUNT.load() != 0) else {
        return 0;
    };
    let maps = Maps { header, generation };
    let word = (word < WORDS_MAX).then_some(word);
    join(&maps, names, about & 1, word)
}

/// Asks the rules in their order; the first one that ends the packet's way is the last. Says whether
/// there is anything to do. The scratch comes as a plain pointer: see [`list_rules`].
#[inline(always)]
pub fn judge_rules<C: Judging>(shared: *mut Scratch, flow: *mut Flow, events: u32) -> bool {
    // SAFETY: see `Scratch`; no reference lives across a call of a global function.
    let scratch = unsafe { &mut *shared };
    scratch.hits = 0;
    // Volatile: LLVM would make of plain stores a call of memset, which goes byte by byte here.
    // SAFETY: a valid reference.
    unsafe { core::ptr::write_volatile(&raw mut scratch.verdict, Verdict::default()) };
    if MATCHES.load() == 1 {
        let found = scratch.matches.items[0];
        if judge_by::<C>(scratch, flow, found, events).is_none() {
            count(Counter::Internal);
        }
    } else {
        judge_several::<C>(shared);
    }
    // SAFETY: as above.
    unsafe { (*shared).hits != 0 || (*shared).verdict.holding != 0 }
}

#[inline(always)]
fn judge_several<C: Judging>(shared: *mut Scratch) {
    for index in 0..MATCHES_MAX {
        // SAFETY: see `Scratch`; no reference lives across a call of a global function.
        let (matches, ended) = unsafe { (&(*shared).matches, (*shared).verdict.end != 0) };
        if ended || index >= matches.count as usize {
            return;
        }
        C::judge(packed(matches.items[index]));
    }
    // SAFETY: as above.
    let (overflow, ended) = unsafe { ((*shared).matches.overflow, (*shared).verdict.end != 0) };
    if MATCHES.load() > MATCHES_MAX as u32 && overflow != 0 && !ended {
        judge_beyond::<C>();
    }
}

/// Asks the rules that did not fit the list.
#[inline(always)]
fn judge_beyond<C: Judging>() {
    for index in 0..WORDS_MAX {
        if index >= WORDS.load() || C::judge_word(index) != 0 {
            break;
        }
    }
}

/// Asks the rules of one word that did not fit the list; not 0 when one of them ends the packet's way. A global function:
/// see [`fault_collect`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_judge_word(index: u32) -> u32 {
    judge_word::<InKernel<Fetch>>(index)
}

/// [`fault_judge_word`] for kernels before 5.12.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_judge_word_old(index: u32) -> u32 {
    judge_word::<InKernel<NoFetch>>(index)
}

#[inline(always)]
fn judge_word<C: Judging>(index: u32) -> u32 {
    let Some(shared) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    if MATCHES.load() <= MATCHES_MAX as u32 {
        // The verifier looks at global functions also where nobody calls them.
        return 0;
    }
    // SAFETY: see `Scratch`; no reference lives across a call of a global function.
    let scratch = unsafe { &*shared };
    let generation = scratch.sight.generation & 1;
    let Some(header) = SETS.get(generation) else {
        return 0;
    };
    let maps = Maps { header, generation };
    let mut word = scratch.query.beyond(&maps, index, &scratch.matches);
    for _ in 0..64 {
        let Some(found) = word.next() else {
            return 0;
        };
        C::judge(packed(found));
        // SAFETY: as above.
        if unsafe { (*shared).verdict.end } != 0 {
            return 1;
        }
    }
    0
}

/// A match as one number.
#[inline(always)]
fn packed(found: Match) -> u32 {
    u32::from(found.rule) | u32::from(found.direction) << 16
}

/// Asks one of several rules. A global function: see [`fault_collect`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_judge(found: u32) -> u32 {
    judge_found::<InKernel<Fetch>>(found)
}

/// [`fault_judge`] for kernels before 5.12.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_judge_old(found: u32) -> u32 {
    judge_found::<InKernel<NoFetch>>(found)
}

#[inline(always)]
fn judge_found<C: Counting>(found: u32) -> u32 {
    if MATCHES.load() == 1 {
        // The verifier looks at global functions also where nobody calls them.
        return 0;
    }
    let (Some(shared), Some(control)) = (SCRATCH.get_ptr_mut(0), CONTROL.get(0)) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *shared };
    let found = Match {
        rule: found as u16,
        direction: (found >> 16) as u16,
    };
    // Looked up again, because before Linux 5.12 such a function takes no pointer.
    let judged = match FLOWS.get_ptr_mut(&scratch.key) {
        Some(flow) => judge_by::<C>(scratch, flow, found, control.events),
        None => None,
    };
    if judged.is_none() {
        count(Counter::Internal);
    }
    0
}

/// A rule of the set in force, with what it counts and remembers.
#[inline(always)]
pub fn rule_at(
    scratch: &Scratch,
    rule: u16,
) -> Option<(&'static RuleEntry, *mut RuleStats, *mut RuleState)> {
    let at = scratch.sight.generation * WORDS.load() * 64 + u32::from(rule);
    let rule = RULES.get(at)?;
    Some((
        rule,
        RULE_STATS.get_ptr_mut(rule.state)?,
        RULE_STATES.get_ptr_mut(rule.state)?,
    ))
}

/// Asks one rule. Nothing when a map lookup fails that can't.
#[inline(always)]
fn judge_by<C: Counting>(
    scratch: &mut Scratch,
    flow: *mut Flow,
    found: Match,
    events: u32,
) -> Option<()> {
    let (rule, counts, state) = rule_at(scratch, found.rule)?;
    let memory = if flows::find_slot::<C>(scratch, flow, rule, state) {
        // Volatile: else LLVM remembers in which of eight places it was found, and the verifier goes on eight times.
        // SAFETY: a valid reference.
        let slot = unsafe { core::ptr::read_volatile(&raw const scratch.slot) };
        // SAFETY: map values live until the program ends.
        unsafe { &raw mut (*flow).rules[slot as usize % FLOW_SLOTS] }
    } else if MATCHES.load() > MATCHES_MAX as u32
        && let Some(memory) = flows::find_apart::<C>(scratch, flow, rule, state)
    {
        memory.as_ptr()
    } else {
        // Policy: the rule does not act on this packet.
        trace::passed(scratch, Counter::FlowRuleTableFull);
        count(Counter::FlowRuleTableFull);
        return Some(());
    };
    ask::<C>(scratch, memory, rule, state, found.direction);
    if trace::is_on() {
        trace::judged(scratch, rule, found.direction.into());
    }
    conclude(scratch, rule, counts, found.rule, events);
    Some(())
}

/// Lets the rule decide.
#[inline(always)]
fn ask<C: Counting>(
    scratch: &mut Scratch,
    memory: *mut FlowRule,
    rule: &RuleEntry,
    state: *mut RuleState,
    direction: u16,
) {
    // SAFETY: map values live until the program ends.
    let (memory, state) = unsafe { (&mut *memory, &mut *state) };
    if memory.connection == 0 {
        flows::settle(memory);
    }
    let sample = Sample {
        now_ns: scratch.sight.since_ns,
        size: scratch.sight.size,
        direction: direction as u8,
    };
    scratch.fired = 0;
    let is_tracked = fragments::is_tracked(&scratch.packet);
    if is_tracked {
        fragments::recall(scratch, rule.uid);
    }
    let (packet, verdict) = (&scratch.packet, &mut scratch.verdict);
    let followed = &mut scratch.followed;
    if let Some(fired) = judge::<C>(rule, &sample, packet, followed, memory, state, verdict) {
        scratch.ordinals = fired.ordinals;
        scratch.seen = fired.seen;
        scratch.fired = u32::from(fired.action);
    }
    if is_tracked {
        fragments::remember(scratch);
    }
}

/// Counts the packet for the rule at hand, and reports what it did.
#[inline(always)]
fn conclude(
    scratch: &mut Scratch,
    rule: &RuleEntry,
    stats: *mut RuleStats,
    index: u16,
    events: u32,
) {
    // SAFETY: map values live until the program ends; the statistics are this CPU's own.
    let stats = unsafe { &mut *stats };
    stats.seen_packets += 1;
    stats.seen_segments += u64::from(scratch.sight.segments);
    stats.seen_bytes += u64::from(scratch.sight.bytes);
    if scratch.fired != 0 {
        scratch.hit_rules[scratch.hits as usize % MATCHES_MAX] = index;
        hit(scratch, rule, stats, events);
    }
}

#[inline(always)]
fn hit(scratch: &mut Scratch, rule: &RuleEntry, stats: &mut RuleStats, events: u32) {
    scratch.hits += 1;
    let sight = &scratch.sight;
    stats.hit_packets += 1;
    stats.hit_segments += u64::from(sight.segments);
    stats.hit_bytes += u64::from(sight.bytes);
    if events == 0 {
        return;
    }
    let event = Event {
        time_ns: sight.now_ns,
        packet: scratch.ordinals.packet,
        rule: rule.uid,
        connection: scratch.ordinals.connection,
        seen: scratch.seen,
        bytes: sight.bytes,
        segments: sight.segments as u16,
        direction: scratch.ordinals.direction,
        action: scratch.fired as u8,
        fragment: scratch.ordinals.fragment,
        padding: 0,
    };
    if EVENTS.output::<Event>(&event, 0).is_err() {
        count(Counter::EventLost);
    }
}

/// The rule set in force, as maps.
struct Maps<'a> {
    header: &'a SetHeader,
    generation: u32,
}

impl Tables for Maps<'_> {
    #[inline(always)]
    fn header(&self) -> &SetHeader {
        self.header
    }

    #[inline(always)]
    fn port(&self, port: u16) -> PortClasses {
        PORTS
            .get((self.generation << 16) | u32::from(port))
            .copied()
            .unwrap_or_default()
    }

    #[inline(always)]
    fn host(&self, address: &Address) -> u16 {
        let key = Key::new(
            32 + 128,
            HostKey {
                generation: self.generation,
                address: *address,
            },
        );
        HOSTS
            .get(&key)
            .map_or(self.header.any_host, |class| *class as u16)
    }

    #[inline(always)]
    fn names(&self, address: &Address) -> u64 {
        // SAFETY: the value is copied at once; names are only added to it.
        unsafe { LEARNED.get(address) }.map_or(0, Known::mask)
    }

    #[inline(always)]
    fn name_count(&self) -> u32 {
        NAME_COUNT.load()
    }

    #[inline(always)]
    fn name_class(&self, name: u32, about: u32) -> u16 {
        let index = self.generation * NAMES_MAX as u32 + name;
        NAME_CLASSES
            .get(index)
            .map_or(0, |classes| (*classes >> (16 * about)) as u16)
    }

    #[inline(always)]
    fn joined(&self, names: u64, about: u32, word: Option<u32>) -> u64 {
        fault_join(names, about, word.unwrap_or(WORDS_MAX))
    }

    #[inline(always)]
    fn scope(&self, cgroup: u64) -> Option<u16> {
        if cgroup == 0 {
            return None;
        }
        let key = ScopeKey {
            cgroup,
            generation: self.generation,
            padding: 0,
        };
        // SAFETY: the value is copied at once; a stale one belongs to a set no longer in force.
        unsafe { SCOPES.get(key) }.map(|class| *class as u16)
    }

    #[inline(always)]
    fn summary(&self, class: u16) -> u64 {
        let index = self.generation * CLASSES.load() + u32::from(class);
        SUMMARIES.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn word(&self, class: u16, index: u32) -> u64 {
        let class = self.generation * CLASSES.load() + u32::from(class);
        VECTORS
            .get(class * WORDS.load() + index)
            .copied()
            .unwrap_or(0)
    }
}
