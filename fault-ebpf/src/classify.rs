//! The way of a packet through a tc program.

use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::maps::lpm_trie::Key;
use fault_common::abi::{
    Control, Counter, Event, FLOW_SLOTS, Flow, MATCHES_MAX, PortClasses, RuleEntry, RuleState,
    RuleStats, ScopeKey, SetHeader, WORDS_MAX, clock,
};
use fault_common::decide::{Counting, Sample, Verdict, judge};
use fault_common::flow::Address;
use fault_common::matching::{Match, Ports, Tables, ports, query};
use fault_common::packet::{
    Bytes as _, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP, PROTOCOL_UDP, Unparsed,
    parse_extensions, parse_network, parse_plain_ipv4, parse_plain_ipv6, parse_transport,
};

use crate::counting::Judging;
use crate::flows::Entered;
use crate::frame::{Frame, Losing};
use crate::maps::{
    CLASSES, CLOCK, CONTROL, EVENTS, HOSTS, HostKey, MATCHES, PORTS, RULE_STATES, RULE_STATS,
    RULES, SCOPES, SCRATCH, SETS, SUMMARIES, Scratch, Sight, VECTORS, WORDS, count,
};
use crate::skb::{NEXT, Skb};
use crate::{act, flows, hold, split};

/// Judges one packet and returns what tc is to do with it.
#[inline(always)]
pub fn handle<C: Judging, const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> i32 {
    match try_handle::<C, EGRESS, LINK>(skb) {
        Ok(action) => action,
        // Policy: what can't be read or looked up passes, and is counted.
        Err(counter) => {
            count(counter);
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
    let glance = glance(skb, header, generation);
    if matches!(glance, Glance::NoRule) {
        // Policy: no rule can concern this packet. Nearly all packets end here.
        return Ok(NEXT);
    }
    let shared = SCRATCH.get_ptr_mut(0).ok_or(Counter::Internal)?;
    // SAFETY: see `Scratch`.
    let scratch = unsafe { &mut *shared };
    let passes = read(skb, header, scratch, generation, glance);
    if passes != 0 {
        // Policy: what can't be read passes and is counted; so does what no rule can concern, uncounted.
        return if passes == NO_RULE {
            Ok(NEXT)
        } else {
            Err(reason(passes))
        };
    }
    // Policy: without a living daemon nothing is touched.
    let now_ns = leased_ns(control).ok_or(Counter::LeaseExpired)?;
    see(skb, header, scratch, now_ns, generation);
    let flow = match flows::enter(skb, header, scratch) {
        Entered::Flow(flow) => flow,
        // Policy: it belongs to nobody whom the rules are limited to.
        Entered::Nobody => return Ok(NEXT),
        Entered::Full => return Err(Counter::FlowTableFull),
    };
    let any = if WORDS.load() == 1 {
        list_one_word(header, scratch)
    } else {
        list_rules(header, shared)
    };
    if !any {
        // Policy: the port is a rule's, the host or the scope is not.
        return Ok(NEXT);
    }
    // SAFETY: as above; a fresh reference, since the list was written through another one.
    let scratch = unsafe { &mut *shared };
    if scratch.sight.segments > 1 {
        let ingress = u32::from(!EGRESS);
        match C::meet_super(skb.raw(), ingress) {
            split::PASSES => return Ok(NEXT),
            split::VANISHES => return Ok(Skb::<EGRESS, LINK>::vanish()),
            _ => {}
        }
    }
    // SAFETY: as above.
    let scratch = unsafe { &mut *shared };
    scratch.sight.judged = u32::from(skb.is_judged_by_another());
    skb.set_judged();
    if !judge_rules::<C>(scratch, flow.as_ptr(), control.events) {
        // Policy: no fault fired.
        return Ok(NEXT);
    }
    if act::is_drop(&scratch.verdict) {
        return Ok(Skb::<EGRESS, LINK>::vanish());
    }
    Ok(act::carry_out::<C, EGRESS, LINK>(skb, scratch))
}

/// Whether a rule loses the packet, at a hook that can do no more than that; nothing when it is not judged there.
#[inline(always)]
pub fn is_lost<C: Counting, F: Losing>(frame: F) -> Option<bool> {
    let control = CONTROL.get(0)?;
    let generation = control.generation & 1;
    let header = SETS.get(generation)?;
    let glance = glance(frame, header, generation);
    if matches!(glance, Glance::NoRule) {
        return None;
    }
    let shared = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: see `Scratch`.
    let scratch = unsafe { &mut *shared };
    if read(frame, header, scratch, generation, glance) != 0 || !frame.is_concerned(&scratch.packet)
    {
        return None;
    }
    let now_ns = leased_ns(control)?;
    see(frame, header, scratch, now_ns, generation);
    let Entered::Flow(flow) = flows::enter(frame, header, scratch) else {
        return None;
    };
    let any = if WORDS.load() == 1 {
        list_one_word(header, scratch)
    } else {
        list_rules(header, shared)
    };
    // SAFETY: as above; a fresh reference, since the list was written through another one.
    let scratch = unsafe { &mut *shared };
    if !any || !frame.may_judge(scratch) {
        return None;
    }
    Some(judge_rules::<C>(scratch, flow.as_ptr(), control.events) && act::is_drop(&scratch.verdict))
}

/// The time, as long as the rules are in force.
#[inline(always)]
pub fn leased_ns(control: &Control) -> Option<u64> {
    // SAFETY: the helpers have no preconditions.
    let now_ns = unsafe {
        match CLOCK.load() {
            clock::NONE => return (control.lease_until_ns != 0).then_some(0),
            clock::TICK => bpf_ktime_get_coarse_ns(),
            _ => bpf_ktime_get_ns(),
        }
    };
    (now_ns <= control.lease_until_ns).then_some(now_ns)
}

/// What a glance at a packet's ports tells.
#[derive(Clone, Copy)]
pub enum Glance {
    /// No rule can concern it.
    NoRule,
    /// It is not plain TCP or UDP, and is looked at in full.
    Unknown,
    /// These classes.
    Ports(Ports),
}

/// Takes a glance at the ports.
#[inline(always)]
pub fn glance<F: Frame>(frame: F, header: &SetHeader, generation: u32) -> Glance {
    let (protocol, from, to) = match frame.ethertype() {
        ETHERTYPE_IPV4 => {
            let Some(bytes) = frame.glance::<24>() else {
                return Glance::Unknown;
            };
            // No options, and no fragment.
            if bytes.byte::<0>() != 0x45 || bytes.half::<6>() & 0x3fff != 0 {
                return Glance::Unknown;
            }
            (bytes.byte::<9>(), bytes.half::<20>(), bytes.half::<22>())
        }
        ETHERTYPE_IPV6 => {
            let Some(bytes) = frame.glance::<44>() else {
                return Glance::Unknown;
            };
            (bytes.byte::<6>(), bytes.half::<40>(), bytes.half::<42>())
        }
        _ => return Glance::Unknown,
    };
    let index = match protocol {
        PROTOCOL_TCP => 0,
        PROTOCOL_UDP => 1,
        _ => return Glance::Unknown,
    };
    let maps = Maps { header, generation };
    let (from, to) = (maps.port(from), maps.port(to));
    Ports::of(index, header, to, from).map_or(Glance::NoRule, Glance::Ports)
}

/// [`read`] found no rule that can concern the packet.
const NO_RULE: u32 = 1;
/// [`read_plain`] leaves the packet to [`read_any`].
const NOT_PLAIN: u32 = 8;

/// Reads the headers, and looks the ports up where the glance at them did not. 0 when rules may concern the packet,
/// else [`NO_RULE`] or a code for [`reason`].
#[inline(always)]
pub fn read<F: Frame>(
    frame: F,
    header: &SetHeader,
    scratch: &mut Scratch,
    generation: u32,
    glance: Glance,
) -> u32 {
    let code = read_plain(frame, scratch);
    if code == 0
        && let Glance::Ports(ports) = glance
    {
        scratch.ports = ports;
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
    let packet = &scratch.packet;
    let Some(ports) = ports(&Maps { header, generation }, header, packet) else {
        let fragment = packet.is_fragment && !packet.has_transport;
        return if fragment { 7 } else { NO_RULE };
    };
    scratch.ports = ports;
    0
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
        judged: 0,
        reserved: 0,
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
    let matches = unsafe { &(*scratch).matches };
    if matches.overflow != 0 {
        count(Counter::TooManyMatches);
    }
    matches.count != 0
}

/// [`list_rules`] for a set that fits one word: there is nothing to skip, so no summary is asked.
#[inline(always)]
pub fn list_one_word(header: &SetHeader, scratch: &mut Scratch) -> bool {
    let maps = Maps {
        header,
        generation: scratch.sight.generation,
    };
    // Volatile: see `ask`.
    // SAFETY: a valid reference.
    let ports = unsafe { core::ptr::read_volatile(&raw const scratch.ports) };
    let query = query(&maps, &scratch.packet, ports, &scratch.connection);
    if MATCHES.load() == 1 {
        // Then there is no other rule.
        let direction = query.only(&maps);
        scratch.matches.count = u32::from(direction.is_some());
        scratch.matches.items[0] = Match {
            rule: 0,
            direction: direction.unwrap_or(0),
        };
        return direction.is_some();
    }
    scratch.matches.count = 0;
    scratch.matches.overflow = 0;
    query.collect(&maps, 0, &mut scratch.matches);
    if scratch.matches.overflow != 0 {
        count(Counter::TooManyMatches);
    }
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

/// Asks the rules in their order; the first one that ends the packet's way is the last. Says whether
/// there is anything to do.
#[inline(always)]
pub fn judge_rules<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, events: u32) -> bool {
    scratch.hits = 0;
    // Volatile: LLVM would make of plain stores a call of memset, which goes byte by byte here.
    // SAFETY: a valid reference.
    unsafe { core::ptr::write_volatile(&raw mut scratch.verdict, Verdict::default()) };
    if MATCHES.load() == 1 {
        scratch.index = 0;
        if !judge_indexed::<C>(scratch, flow, events) {
            count(Counter::Internal);
        }
    } else {
        judge_several::<C>(scratch, flow, events);
    }
    scratch.hits != 0 || scratch.verdict.holding != 0
}

#[inline(never)]
fn judge_several<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, events: u32) {
    for index in 0..MATCHES_MAX {
        if index >= MATCHES.load() as usize
            || index >= scratch.matches.count as usize
            || scratch.verdict.end != 0
        {
            break;
        }
        scratch.index = index as u32;
        if !judge_one::<C>(scratch, flow, events) {
            count(Counter::Internal);
        }
    }
}

/// [`judge_indexed`] as a function of its own: eight times its instructions would be too many.
#[inline(never)]
fn judge_one<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, events: u32) -> bool {
    judge_indexed::<C>(scratch, flow, events)
}

/// Asks the rule at hand; false when a map lookup failed that can't.
#[inline(always)]
fn judge_indexed<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, events: u32) -> bool {
    let found = scratch.matches.items[scratch.index as usize % MATCHES_MAX];
    let at = scratch.sight.generation * WORDS.load() * 64 + u32::from(found.rule);
    let Some(rule) = RULES.get(at) else {
        return false;
    };
    let Some(stats) = RULE_STATS.get_ptr_mut(rule.state) else {
        return false;
    };
    let Some(memory) = RULE_STATES.get_ptr_mut(rule.state) else {
        return false;
    };
    // SAFETY: map values live until the program ends; the statistics are this CPU's own.
    let stats = unsafe { &mut *stats };
    stats.seen_packets += 1;
    stats.seen_segments += u64::from(scratch.sight.segments);
    stats.seen_bytes += u64::from(scratch.sight.bytes);
    if !flows::find_slot::<C>(scratch, flow, rule, memory) {
        count(Counter::TooManyMatches);
        return true;
    }
    scratch.fired = 0;
    ask::<C>(scratch, flow, rule, memory, found.direction);
    if scratch.fired != 0 {
        hit(scratch, rule, stats, events);
    }
    true
}

/// Lets the rule decide.
#[inline(always)]
fn ask<C: Counting>(
    scratch: &mut Scratch,
    flow: *mut Flow,
    rule: &RuleEntry,
    state: *mut RuleState,
    direction: u16,
) {
    // SAFETY: map values live until the program ends.
    let (flow, state) = unsafe { (&mut *flow, &mut *state) };
    // Volatile: else LLVM remembers in which of eight places it was found, and the verifier goes on eight times.
    // SAFETY: a valid reference.
    let slot = unsafe { core::ptr::read_volatile(&raw const scratch.slot) };
    let memory = &mut flow.rules[slot as usize % FLOW_SLOTS];
    let sample = Sample {
        now_ns: scratch.sight.since_ns,
        size: scratch.sight.size,
        direction: direction as u8,
    };
    let (packet, verdict) = (&scratch.packet, &mut scratch.verdict);
    if let Some((ordinals, action)) = judge::<C>(rule, &sample, packet, memory, state, verdict) {
        scratch.ordinals = ordinals;
        scratch.seen = memory.seen[(ordinals.direction & 1) as usize];
        scratch.fired = u32::from(action);
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
