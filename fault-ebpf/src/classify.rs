//! The way of a packet through a tc program.

use core::ptr::NonNull;

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::maps::lpm_trie::Key;
use fault_common::abi::{
    Counter, Event, Flow, MATCHES_MAX, PortClasses, RuleEntry, RuleStats, ScopeKey, SetHeader,
    direction,
};
use fault_common::decide::{Counting, Sample, Verdict, judge};
use fault_common::flow::{Address, flow_of};
use fault_common::matching::{Connection, Ports, Tables, ports, select};
use fault_common::packet::{Unparsed, parse};
use fault_common::random::Ordinals;

use crate::maps::{
    CLASSES, CONTROL, EVENTS, HOSTS, HostKey, PORTS, RULE_STATES, RULE_STATS, RULES, SCOPES,
    SCRATCH, SETS, SUMMARIES, Scratch, Sight, VECTORS, WORDS, count,
};
use crate::skb::{NEXT, OWN_MARK, Skb};
use crate::{act, flows};

/// Judges one packet and returns what tc is to do with it.
#[inline(always)]
pub fn handle<C: Counting, const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> i32 {
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
fn try_handle<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
) -> Result<i32, Counter> {
    let control = CONTROL.get(0).ok_or(Counter::Internal)?;
    let generation = control.generation & 1;
    let header = SETS.get(generation).ok_or(Counter::Internal)?;
    let packet = parse(&skb, skb.ethertype(), LINK, skb.length()).map_err(unparsed)?;
    let Some(ports) = ports(&Maps { header, generation }, header, &packet) else {
        // Policy: no rule can concern this packet.
        if packet.is_fragment && !packet.has_transport {
            return Err(Counter::Fragment);
        }
        return Ok(NEXT);
    };
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Counter::Internal)?;
    // SAFETY: see `Scratch`.
    let scratch = unsafe { &mut *scratch };
    if skb.mark() == OWN_MARK {
        // Policy: a packet is judged once.
        skb.set_mark(if EGRESS { scratch.mark } else { 0 });
        return Err(Counter::Own);
    }
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if now_ns > control.lease_until_ns {
        // Policy: without a living daemon nothing is touched.
        return Err(Counter::LeaseExpired);
    }
    let segments = skb.segments(&packet);
    scratch.sight = Sight {
        now_ns,
        since_ns: now_ns.saturating_sub(header.epoch_ns),
        segments,
        size: skb.segment_size(&packet),
        bytes: skb.length() + (segments - 1) * packet.payload_offset,
        generation,
    };
    scratch.packet = packet;
    if let Some(flow) = find_rules(skb, header, scratch, ports)?
        && judge_rules::<C>(scratch, flow.as_ptr(), control.events)
    {
        return Ok(act::carry_out(skb, scratch));
    }
    Ok(NEXT)
}

#[inline(always)]
fn unparsed(reason: Unparsed) -> Counter {
    match reason {
        Unparsed::NotIp => Counter::NotIp,
        Unparsed::Truncated => Counter::Truncated,
        Unparsed::Malformed => Counter::Malformed,
        Unparsed::Headers => Counter::Headers,
        Unparsed::Discovery => Counter::Discovery,
    }
}

/// Enters the connection and lists the packet's rules; gives the connection when there are any.
#[inline(always)]
fn find_rules<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    header: &SetHeader,
    scratch: &mut Scratch,
    ports: Ports,
) -> Result<Option<NonNull<Flow>>, Counter> {
    let generation = scratch.sight.generation;
    let (key, side) = flow_of(&scratch.packet);
    scratch.key = key;
    let entry = flows::enter(skb, header, scratch, side).ok_or(Counter::FlowTableFull)?;
    // SAFETY: a map value lives until the program ends.
    let flow = unsafe { entry.as_ref() };
    let connection = Connection {
        direction: if flow.server_side == side as u8 {
            direction::TO_CLIENT
        } else {
            direction::TO_SERVER
        },
        scopes: [flow.scope, flow.peer_scope],
    };
    let maps = Maps { header, generation };
    let (packet, matches) = (&scratch.packet, &mut scratch.matches);
    select(&maps, packet, ports, &connection, WORDS.load(), matches);
    if matches.overflow != 0 {
        count(Counter::TooManyMatches);
    }
    // Policy when there are none: the port is a rule's, the host or the scope is not.
    Ok(if matches.count == 0 {
        None
    } else {
        Some(entry)
    })
}

/// Asks the rules in their order; the first one that ends the packet's way is the last. Says whether
/// there is anything to do.
#[inline(never)]
fn judge_rules<C: Counting>(scratch: &mut Scratch, flow: *mut Flow, events: u32) -> bool {
    scratch.verdict = Verdict::default();
    let mut hits = 0;
    for index in 0..MATCHES_MAX {
        if index >= scratch.matches.count as usize || scratch.verdict.end != 0 {
            break;
        }
        match judge_one::<C>(scratch, flow, index, events) {
            Some(hit) => hits += u32::from(hit),
            None => count(Counter::Internal),
        }
    }
    hits != 0
}

#[inline(always)]
fn judge_one<C: Counting>(
    scratch: &mut Scratch,
    flow: *mut Flow,
    index: usize,
    events: u32,
) -> Option<bool> {
    let found = scratch.matches.items[index];
    let at = scratch.sight.generation * WORDS.load() * 64 + u32::from(found.rule);
    let rule = RULES.get(at)?;
    let stats = RULE_STATS.get_ptr_mut(rule.state)?;
    let state = RULE_STATES.get_ptr_mut(rule.state)?;
    // SAFETY: map values live until the program ends; the statistics are this CPU's own.
    let (stats, state, flow) = unsafe { (&mut *stats, &mut *state, &mut *flow) };
    stats.seen_packets += 1;
    stats.seen_segments += u64::from(scratch.sight.segments);
    stats.seen_bytes += u64::from(scratch.sight.bytes);
    let sample = Sample {
        now_ns: scratch.sight.since_ns,
        size: scratch.sight.size,
        direction: found.direction as u8,
    };
    let mut memory = flows::memory::<C>(flow, &scratch.key, rule, state)?;
    // SAFETY: as above.
    let memory = unsafe { memory.as_mut() };
    let (packet, verdict) = (&scratch.packet, &mut scratch.verdict);
    let Some((ordinals, action)) = judge::<C>(rule, &sample, packet, memory, state, verdict) else {
        return Some(false);
    };
    hit(&scratch.sight, rule, stats, ordinals, action, events);
    Some(true)
}

#[inline(always)]
fn hit(
    sight: &Sight,
    rule: &RuleEntry,
    stats: &mut RuleStats,
    ordinals: Ordinals,
    action: u8,
    events: u32,
) {
    stats.hit_packets += 1;
    stats.hit_segments += u64::from(sight.segments);
    stats.hit_bytes += u64::from(sight.bytes);
    if events == 0 {
        return;
    }
    let event = Event {
        time_ns: sight.now_ns,
        packet: ordinals.packet,
        rule: rule.uid,
        connection: ordinals.connection,
        bytes: sight.bytes,
        segments: sight.segments as u16,
        direction: ordinals.direction,
        action,
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
        unsafe { SCOPES.get(&key) }.map(|class| *class as u16)
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
