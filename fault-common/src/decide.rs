//! What one rule does to one packet.
//!
//! The order is that of the documentation: window, then filters (direction, kind, size, connection,
//! mix), then the count, then the trigger, then `p=`, then the fault's own chance. Only packets that
//! passed window and filters are counted.

use crate::abi::{
    CORRUPT_BITS_MAX, DecisionKey, FlowRule, Followed, RuleEntry, RuleState, action, fault,
    modifier, reject, rule_flag,
};
use crate::delay::{correlated, delay_ns, distribution, table_index, uniform};
use crate::packet::{PROTOCOL_TCP, Packet, TCP_ACK, TCP_RST, TCP_SYN, kind};
use crate::random::{ALWAYS, Lane, Ordinals, below, chance, draw, mix};

/// One packet, as a rule sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Time since the rule set's epoch.
    pub now_ns: u64,
    /// Bytes of the largest wire packet in it, IP header included.
    pub size: u32,
    /// See [`crate::abi::direction`].
    pub direction: u8,
}

/// What is done to a packet after all its rules have been asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What ends the packet's way: a value of [`action`], 0 for nothing.
    pub end: u8,
    /// Whether a copy is sent.
    pub duplicate: bool,
    /// Whether it is marked CE.
    pub mark_ce: bool,
    /// ICMP code of a refusal: a value of [`reject`], or the MTU for [`REJECT_TOO_BIG`].
    pub reject: u64,
    /// Bits to flip; 0 for none.
    pub corrupt_bits: u32,
    /// Key of the draws that say which bits.
    pub corrupt_key: u64,
    /// How long the packet is held.
    pub delay_ns: u64,
    /// What must keep its order while it is held: see [`Hold::flow`](crate::abi::Hold::flow).
    pub flow: u64,
    /// Rule state of the rate that holds it, and 1.
    pub rate: u16,
    /// Rule state of the slots that hold it, and 1.
    pub slot: u16,
    /// Number of the relay that it is given to, and 1.
    pub relay: u16,
    /// Whether and how it is held: bits of [`holding`].
    pub holding: u8,
}

/// Bits of [`Verdict::holding`].
pub mod holding {
    /// It is held.
    pub const HOLD: u8 = 1;
    /// It was picked to overtake those that are held.
    pub const OVERTAKE: u8 = 2;
    /// It is one of those that others are to overtake.
    pub const OVERTAKEN: u8 = 4;
    /// The rule of its rate, slots or relay sees it come from the service.
    pub const TO_CLIENT: u8 = 8;
    /// It is not held for that, but read for the addresses of names.
    pub const LEARN: u8 = 16;
}

/// How long packets are held that a `reorder` lets others overtake, where no `delay` holds them.
pub const OVERTAKEN_NS: u64 = 10_000_000;

impl Verdict {
    /// How long the packet is to be held; nothing when it is not.
    #[must_use]
    #[inline(always)]
    pub const fn held_ns(&self) -> Option<u64> {
        let shaped = self.rate != 0 || self.slot != 0 || self.relay != 0;
        if self.holding & holding::OVERTAKE != 0 {
            return if shaped { Some(0) } else { None };
        }
        if self.holding & holding::HOLD != 0 {
            Some(self.delay_ns)
        } else if self.holding & holding::OVERTAKEN != 0 {
            Some(OVERTAKEN_NS)
        } else {
            None
        }
    }
}

/// Added to an MTU in [`Verdict::reject`]: "packet too big" with that MTU.
pub const REJECT_TOO_BIG: u64 = 1 << 32;

/// How a counter that other CPUs may add to is advanced.
pub trait Counting {
    /// Adds one and gives the new value.
    fn next(counter: &mut u64) -> u64;
    /// Adds `value`.
    fn add(counter: &mut u64, value: u64);
    /// Makes `to` of the counter if it is `from`; says whether it was.
    fn swap(counter: &mut u64, from: u64, to: u64) -> bool;
    /// Whether decisions are repeated instead of made.
    fn replays() -> bool;
    /// The ordinal by which a packet's decision was made that is to be repeated; nothing where there is none.
    fn recall(key: &DecisionKey) -> Option<u64>;
    /// An entry of the tables of distributions: see [`crate::delay::table_index`].
    fn spread(index: u32) -> i64;
    /// Whether any rule has this [`fault`]. What no rule asks for need not be there at all.
    #[must_use]
    #[inline(always)]
    fn may(_fault: u8) -> bool {
        true
    }
    /// Whether any rule has this [`modifier`].
    #[must_use]
    #[inline(always)]
    fn uses(_modifier: u32) -> bool {
        true
    }
}

/// [`Counting`] for a single thread: tests and user space.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Counting for Plain {
    fn next(counter: &mut u64) -> u64 {
        *counter += 1;
        *counter
    }

    fn add(counter: &mut u64, value: u64) {
        *counter += value;
    }

    fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
        let is_equal = *counter == from;
        if is_equal {
            *counter = to;
        }
        is_equal
    }

    fn replays() -> bool {
        false
    }

    fn recall(_key: &DecisionKey) -> Option<u64> {
        None
    }

    /// There are no tables here: every value is the middle.
    fn spread(_index: u32) -> i64 {
        0
    }
}

/// Begins a connection for a rule: gives it the rule's next ordinal.
#[inline(always)]
pub fn open<C: Counting>(rule: &RuleEntry, state: &mut RuleState, flow: &mut FlowRule) {
    let connection = C::next(&mut state.connections);
    *flow = FlowRule {
        uid: rule.uid,
        #[expect(
            clippy::cast_possible_truncation,
            reason = "wraps after 4 billion connections"
        )]
        connection: connection as u32,
        ..FlowRule::default()
    };
}

/// Whether the rule is in its window at `now_ns` since the epoch.
#[must_use]
#[inline(always)]
pub const fn in_window(rule: &RuleEntry, now_ns: u64) -> bool {
    if now_ns < rule.at_ns {
        return false;
    }
    let since = now_ns - rule.at_ns;
    if rule.length_ns != 0 && since >= rule.length_ns {
        return false;
    }
    rule.period_ns == 0 || since % rule.period_ns < rule.active_ns
}

#[inline(always)]
fn passes_filters<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    connection: u32,
) -> bool {
    let is_kind = !C::uses(modifier::KINDS) || is_kind(rule, packet.kinds);
    let has_size = !C::uses(modifier::SIZE) || has_size(rule, sample.size);
    let is_connection = !C::uses(modifier::CONNECTION) || is_connection(rule, connection);
    let is_alternative = !C::uses(modifier::MIX) || in_mix(rule, connection);
    let is_type = !C::uses(modifier::QUERY_TYPE) || is_query_type(rule, packet.query_type);
    is_kind && has_size && is_connection && is_alternative && is_type
}

/// Whether `match=` selects packets of these [`kind`]s.
#[must_use]
#[inline(always)]
pub const fn is_kind(rule: &RuleEntry, kinds: u8) -> bool {
    rule.kinds == 0 || rule.kinds & kinds != 0
}

/// Whether `size=` selects packets of `size` bytes.
#[must_use]
#[inline(always)]
pub const fn has_size(rule: &RuleEntry, size: u32) -> bool {
    size >= rule.size_min && size <= rule.size_max
}

/// Whether `conn=` selects the connection.
#[must_use]
#[inline(always)]
pub const fn is_connection(rule: &RuleEntry, connection: u32) -> bool {
    connection >= rule.connection_from && connection <= rule.connection_to
}

/// Whether `type=` selects queries for this type.
#[must_use]
#[inline(always)]
pub const fn is_query_type(rule: &RuleEntry, query_type: u16) -> bool {
    rule.query_type == 0 || rule.query_type == query_type
}

/// Whether a connection's one draw falls to this alternative of a `mix`; a rule without one has all.
#[must_use]
#[inline(always)]
pub const fn in_mix(rule: &RuleEntry, connection: u32) -> bool {
    if rule.flags & rule_flag::MIX == 0 {
        return true;
    }
    let once = Ordinals {
        connection,
        packet: 0,
        direction: 0,
        fragment: 0,
    };
    let drawn = draw(rule.mix_key, once, Lane::Mix as u64) >> 32;
    drawn >= rule.mix_from && drawn < rule.mix_to
}

/// Whether the trigger selects this count.
#[must_use]
#[inline(always)]
pub const fn is_triggered(rule: &RuleEntry, count: u64) -> bool {
    count >= rule.count_from
        && count <= rule.count_to
        && (rule.count_step <= 1 || count.is_multiple_of(rule.count_step))
}

/// A fault that fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fired {
    /// By which it was decided.
    pub ordinals: Ordinals,
    /// See [`DecisionKey::seen`].
    pub seen: u32,
    /// What is done: a value of [`action`].
    pub action: u8,
}

/// A packet that a rule picks.
struct Picked {
    /// The ordinal by which it is decided what happens to it.
    packet: u64,
    /// See [`DecisionKey::seen`].
    seen: u32,
}

/// Judges a packet by one rule: updates what the rule remembers and adds to the verdict. Says so when the fault fired.
///
/// Packets of one direction may be judged by several CPUs at once: each takes an ordinal of its own, and what is decided
/// depends on nothing else, except with faults that have a memory. Those are exact for packets that come one by one.
///
/// `followed` is what the rule makes of the packet. It matters to fragments alone: those that come after the first one
/// that the rule is asked about read it. They are not counted, filtered or picked by themselves. Only the fault's own chance
/// is drawn for each, but that of a delay or `reorder`, so that all of them are late or none.
#[inline(always)]
pub fn judge<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    followed: &mut Followed,
    flow: &mut FlowRule,
    state: &mut RuleState,
    verdict: &mut Verdict,
) -> Option<Fired> {
    if C::may(fault::LEARN) && rule.fault == fault::LEARN {
        // No fault: it is neither counted nor repeated.
        verdict.holding |= holding::LEARN;
        return None;
    }
    let picked = if packet.follows && followed.uid == rule.uid {
        follow::<C>(rule, sample, packet, followed, flow.connection)?
    } else {
        *followed = Followed {
            uid: rule.uid,
            ..Followed::NONE
        };
        pick::<C>(rule, sample, packet, followed, flow, state)?
    };
    let ordinals = Ordinals {
        connection: flow.connection,
        packet: picked.packet,
        direction: sample.direction,
        fragment: packet.fragment,
    };
    let held_ns = followed.delay_ns;
    let before_ns = verdict.delay_ns;
    let memory = &mut flow.memory[(sample.direction & 1) as usize];
    let action = fire::<C>(rule, sample, packet, ordinals, held_ns, memory, verdict);
    followed.delay_ns = verdict.delay_ns - before_ns;
    (action != 0).then_some(Fired {
        ordinals,
        seen: picked.seen,
        action,
    })
}

/// A later fragment, where the rule has picked its datagram.
#[inline(always)]
fn follow<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    followed: &Followed,
    connection: u32,
) -> Option<Picked> {
    let seen = followed.seen;
    let packet = if C::replays() {
        recall::<C>(rule, sample, packet, connection, seen)?
    } else {
        followed.packet
    };
    (packet != 0).then_some(Picked { packet, seen })
}

/// Counts a packet, and says whether the rule picks it.
#[inline(always)]
fn pick<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    followed: &mut Followed,
    flow: &mut FlowRule,
    state: &mut RuleState,
) -> Option<Picked> {
    if !passes_filters::<C>(rule, sample, packet, flow.connection) {
        return None;
    }
    let side = (sample.direction & 1) as usize;
    // The half of `FlowRule::outside` that counts this direction.
    let half = 32 * u32::from(sample.direction & 1);
    // What is repeated was in its window, whenever it comes now.
    if C::uses(modifier::WINDOW) && !C::replays() && !in_window(rule, sample.now_ns) {
        C::add(&mut flow.outside, 1 << half);
        return None;
    }
    let mut ordinals = Ordinals {
        connection: flow.connection,
        packet: C::next(&mut flow.packets[side]),
        direction: sample.direction,
        fragment: 0,
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "wraps after 4 billion packets"
    )]
    let seen = (ordinals.packet as u32).wrapping_add((flow.outside >> half) as u32);
    followed.seen = seen;
    if C::replays() {
        ordinals.packet = recall::<C>(rule, sample, packet, flow.connection, seen)?;
    } else if !is_picked::<C>(rule, ordinals, state) {
        return None;
    }
    followed.packet = ordinals.packet;
    Some(Picked {
        packet: ordinals.packet,
        seen,
    })
}

/// Whether the trigger and `p=` pick the packet.
#[inline(always)]
fn is_picked<C: Counting>(rule: &RuleEntry, ordinals: Ordinals, state: &mut RuleState) -> bool {
    let per_rule = C::uses(modifier::COUNT_PER_RULE) && rule.flags & rule_flag::COUNT_PER_RULE != 0;
    let count = if per_rule {
        C::next(&mut state.packets)
    } else {
        ordinals.packet
    };
    let triggered = !C::uses(modifier::TRIGGER) || is_triggered(rule, count);
    triggered
        && (!C::uses(modifier::PROBABILITY)
            || rule.probability == ALWAYS
            || chance(
                draw(rule.key, ordinals, Lane::Probability as u64),
                rule.probability,
            ))
}

/// The ordinal by which it was decided what is to be done again to this packet of the rule, if anything was done.
#[inline(always)]
fn recall<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    connection: u32,
    seen: u32,
) -> Option<u64> {
    C::recall(&DecisionKey {
        rule: rule.uid,
        connection,
        seen,
        direction: u16::from(sample.direction),
        fragment: packet.fragment,
    })
}

/// Whether the fault's own chance picks the packet; one whose decision is repeated was picked.
#[inline(always)]
fn lucky<C: Counting>(drawn: u64, threshold: u64) -> bool {
    C::replays() || chance(drawn, threshold)
}

/// What the fault itself decides; gives the [`action`] it adds to the verdict, 0 for none.
#[inline(always)]
fn fire<C: Counting>(
    rule: &RuleEntry,
    sample: &Sample,
    packet: &Packet,
    ordinals: Ordinals,
    held_ns: u64,
    memory: &mut u32,
    verdict: &mut Verdict,
) -> u8 {
    let drawn = draw(rule.key, ordinals, Lane::Fault as u64);
    let own = rule.arguments[0];
    match rule.fault {
        fault::LOSS if C::may(fault::LOSS) && lucky::<C>(drawn, own) => end(verdict, action::DROP),
        fault::LOSS_GILBERT_ELLIOTT
            if C::may(fault::LOSS_GILBERT_ELLIOTT)
                && (C::replays() || gilbert_elliott(rule, ordinals, drawn, memory)) =>
        {
            end(verdict, action::DROP)
        }
        fault::LOSS_STATE
            if C::may(fault::LOSS_STATE) && (C::replays() || four_state(rule, drawn, memory)) =>
        {
            end(verdict, action::DROP)
        }
        fault::DROP if C::may(fault::DROP) => end(verdict, action::DROP),
        fault::CORRUPT_LINK if C::may(fault::CORRUPT_LINK) && lucky::<C>(drawn, own) => {
            end(verdict, action::DROP_CHECKSUM)
        }
        fault::CORRUPT_VISIBLE
            if C::may(fault::CORRUPT_VISIBLE)
                && packet.payload_length() > 0
                // The checksum that has to be put right lies in the first fragment.
                && packet.fragment == 0
                && lucky::<C>(drawn, own) =>
        {
            corrupt(rule, ordinals, verdict)
        }
        fault::DUPLICATE if C::may(fault::DUPLICATE) && lucky::<C>(drawn, own) => {
            verdict.duplicate = true;
            action::DUPLICATE
        }
        fault::ECN
            if C::may(fault::ECN)
                && (packet.ecn == 1 || packet.ecn == 2)
                && lucky::<C>(drawn, own) =>
        {
            verdict.mark_ce = true;
            action::ECN
        }
        fault::MTU if C::may(fault::MTU) && u64::from(sample.size) > own => {
            too_big(rule, packet, verdict)
        }
        fault::ANSWER if C::may(fault::ANSWER) => end(verdict, action::ANSWER),
        fault::REJECT if C::may(fault::REJECT) => refuse(own, packet, verdict),
        // A connection that is still being opened is not live; who means it says `match=syn`.
        fault::RESET
            if C::may(fault::RESET)
                && (packet.tcp_flags & TCP_SYN == 0 || rule.kinds & kind::SYN != 0) =>
        {
            *memory = memory.saturating_add(packet.payload_length());
            if !C::replays() && u64::from(*memory) < own {
                return 0;
            }
            reset(packet, verdict)
        }
        fault::DOWN if C::may(fault::DOWN) => down(packet, verdict),
        fault::DELAY if C::may(fault::DELAY) => {
            verdict.delay_ns += if held_ns == Followed::UNDRAWN {
                delay::<C>(rule, drawn, memory)
            } else {
                held_ns
            };
            keep_order(rule, ordinals, verdict);
            hold(verdict)
        }
        fault::RATE if C::may(fault::RATE) => {
            verdict.rate = shaper(verdict.rate, rule);
            shaped_way(ordinals, verdict)
        }
        fault::SLOT if C::may(fault::SLOT) => {
            verdict.slot = shaper(verdict.slot, rule);
            shaped_way(ordinals, verdict)
        }
        fault::REORDER if C::may(fault::REORDER) => reorder::<C>(rule, ordinals, verdict),
        fault::RELAY if C::may(fault::RELAY) => {
            if verdict.relay == 0 {
                #[expect(clippy::cast_possible_truncation, reason = "below RULES_MAX")]
                let number = own as u16;
                verdict.relay = number + 1;
            }
            shaped_way(ordinals, verdict)
        }
        _ => 0,
    }
}

#[inline(always)]
const fn hold(verdict: &mut Verdict) -> u8 {
    verdict.holding |= holding::HOLD;
    action::HOLD
}

/// Each direction has a wire of its own.
#[inline(always)]
const fn shaped_way(ordinals: Ordinals, verdict: &mut Verdict) -> u8 {
    if ordinals.direction != 0 {
        verdict.holding |= holding::TO_CLIENT;
    }
    hold(verdict)
}

/// Of several shapers the first one holds.
#[inline(always)]
const fn shaper(taken: u16, rule: &RuleEntry) -> u16 {
    if taken == 0 {
        #[expect(clippy::cast_possible_truncation, reason = "below twice RULES_MAX")]
        return (rule.state + 1) as u16;
    }
    taken
}

/// Set in `arguments[2]` of a delay that lets no packet of a connection overtake another.
pub const KEEP_ORDER: u64 = 0x100;

/// Draws how long a delay holds a packet, in nanoseconds.
#[inline(always)]
fn delay<C: Counting>(rule: &RuleEntry, drawn: u64, last: &mut u32) -> u64 {
    let [middle_ns, jitter_ns, form, correlation, _] = rule.arguments;
    let spread = if jitter_ns == 0 {
        0
    } else {
        let value = correlated((drawn >> 32) as u32, last, correlation);
        match form & 0xff {
            distribution::UNIFORM => uniform(value),
            tabled => C::spread(table_index(tabled, value)),
        }
    };
    delay_ns(middle_ns, jitter_ns, spread)
}

/// Names what must not be overtaken while it is held, where the delay asks for that.
#[inline(always)]
const fn keep_order(rule: &RuleEntry, ordinals: Ordinals, verdict: &mut Verdict) {
    if rule.arguments[2] & KEEP_ORDER != 0 {
        let connection = ((ordinals.connection as u64) << 1) | (ordinals.direction as u64 & 1);
        verdict.flow = mix(rule.key ^ connection) | 1;
    }
}

/// Every gap-th packet may be picked, as by tc-netem(8).
#[inline(always)]
fn reorder<C: Counting>(rule: &RuleEntry, ordinals: Ordinals, verdict: &mut Verdict) -> u8 {
    let gap = rule.arguments[1];
    let is_candidate = gap <= 1 || ordinals.packet.is_multiple_of(gap);
    // All fragments of a datagram overtake, or none.
    let whole = Ordinals {
        fragment: 0,
        ..ordinals
    };
    let drawn = draw(rule.key, whole, Lane::Fault as u64);
    if is_candidate && lucky::<C>(drawn, rule.arguments[0]) {
        verdict.holding |= holding::OVERTAKE;
        return action::OVERTAKE;
    }
    verdict.holding |= holding::OVERTAKEN;
    0
}

#[inline(always)]
const fn end(verdict: &mut Verdict, action: u8) -> u8 {
    verdict.end = action;
    action
}

#[inline(always)]
const fn corrupt(rule: &RuleEntry, ordinals: Ordinals, verdict: &mut Verdict) -> u8 {
    verdict.corrupt_bits = (rule.arguments[1] & 0xffff_ffff) as u32;
    verdict.corrupt_key = draw(rule.key, ordinals, Lane::Bit as u64);
    action::CORRUPT
}

#[inline(always)]
fn too_big(rule: &RuleEntry, packet: &Packet, verdict: &mut Verdict) -> u8 {
    if rule.arguments[1] == 0 || !may_be_answered(packet) {
        return end(verdict, action::DROP);
    }
    verdict.reject = REJECT_TOO_BIG | rule.arguments[0];
    end(verdict, action::REJECT_ICMP)
}

/// ICMP errors are never sent about ICMP errors, nor about later fragments (RFC 1122, RFC 4443).
#[inline(always)]
const fn may_be_answered(packet: &Packet) -> bool {
    packet.has_transport && (!packet.is_icmp() || packet.is_echo_request())
}

#[inline(always)]
fn refuse(with: u64, packet: &Packet, verdict: &mut Verdict) -> u8 {
    if packet.is_refusal() {
        // Another instance's answer must reach the one whom it is for.
        return 0;
    }
    let tcp = packet.protocol == PROTOCOL_TCP && packet.has_transport;
    if tcp && (with == reject::BY_PROTOCOL || with == reject::RST) {
        return end(
            verdict,
            if packet.is_fragment {
                action::DROP
            } else {
                action::REJECT_RST
            },
        );
    }
    if !may_be_answered(packet) {
        return end(verdict, action::DROP);
    }
    verdict.reject = match with {
        // What has no ports is told that the host is not there.
        reject::BY_PROTOCOL if packet.is_icmp() => reject::ICMP_HOST,
        reject::BY_PROTOCOL | reject::RST => reject::ICMP_PORT,
        other => other,
    };
    end(verdict, action::REJECT_ICMP)
}

/// A connection that is being reset already needs no help, and what is not TCP can't be reset.
#[inline(always)]
const fn reset(packet: &Packet, verdict: &mut Verdict) -> u8 {
    if packet.protocol != PROTOCOL_TCP
        || !packet.has_transport
        || packet.is_fragment
        || packet.tcp_flags & TCP_RST != 0
    {
        return 0;
    }
    end(verdict, action::RESET)
}

#[inline(always)]
fn down(packet: &Packet, verdict: &mut Verdict) -> u8 {
    let is_new = packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
    if packet.protocol == PROTOCOL_TCP && !is_new && !packet.is_fragment {
        return reset(packet, verdict);
    }
    refuse(reject::BY_PROTOCOL, packet, verdict)
}

/// One step of the Gilbert-Elliott model: `arguments` are p (good to bad), r (bad to good), the loss in
/// the bad state (1-h) and in the good one (1-k). The state changes first, then the packet is lost or
/// not by the state it is in. Source: Elliott, "Estimates of error rates for codes on burst-noise
/// channels", 1963; parameters as in tc-netem(8).
#[inline(always)]
fn gilbert_elliott(rule: &RuleEntry, ordinals: Ordinals, drawn: u64, bad: &mut u32) -> bool {
    let transition = draw(rule.key, ordinals, Lane::Transition as u64);
    let leaves = chance(transition, rule.arguments[usize::from(*bad & 1 != 0)]);
    if leaves {
        *bad ^= 1;
    }
    let loss = if *bad & 1 == 0 {
        rule.arguments[3]
    } else {
        rule.arguments[2]
    };
    chance(drawn, loss)
}

/// One step of the four-state Markov model of tc-netem(8): 1 good, 2 good within a burst, 3 lost
/// within a burst, 4 lost on its own; `arguments` are p13, p31, p32, p23, p14. `state` holds the
/// state less one, so that a new connection is in state 1. Source: Salsano, Ludovici, Ordine,
/// "Definition of a general and intuitive loss model for packet networks", 2009.
#[inline(always)]
fn four_state(rule: &RuleEntry, drawn: u64, state: &mut u32) -> bool {
    let [p13, p31, p32, p23, p14] = rule.arguments;
    *state = match *state & 3 {
        0 if chance(drawn, p14) => 3,
        0 if chance(drawn, p14 + p13) => 2,
        1 if chance(drawn, p23) => 2,
        1 => 1,
        2 if chance(drawn, p32) => 1,
        2 if chance(drawn, p32 + p31) => 0,
        2 => 2,
        _ => 0,
    };
    *state >= 2
}

/// The n-th bit (from 0) of `bits` to flip in a payload of `payload_bits`: the payload is divided
/// into that many equal parts and one bit is drawn in each, so all are distinct.
#[must_use]
#[inline(always)]
pub const fn corrupt_position(key: u64, n: u32, bits: u32, payload_bits: u32) -> u32 {
    let part = payload_bits / bits;
    n * part + below(mix(key ^ ((n as u64 + 1) << 40)), part)
}

/// How many bits can be flipped in a payload: `wanted`, at most [`CORRUPT_BITS_MAX`] and what is there.
#[must_use]
#[inline(always)]
pub const fn corrupt_count(wanted: u32, payload_bits: u32) -> u32 {
    let most = if payload_bits < CORRUPT_BITS_MAX {
        payload_bits
    } else {
        CORRUPT_BITS_MAX
    };
    if wanted < most { wanted } else { most }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::format;

    use super::*;
    use crate::packet::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};
    use crate::random::threshold_from_ppm;

    /// How many packets a share is taken of.
    const PACKETS: u32 = 400_000;

    /// A rule for every packet, with these thresholds.
    fn rule(fault: u8, ppm: [u32; 5]) -> RuleEntry {
        RuleEntry {
            key: 7,
            mix_key: 0,
            mix_from: 0,
            mix_to: 0,
            at_ns: 0,
            length_ns: 0,
            period_ns: 0,
            active_ns: 0,
            count_from: 1,
            count_to: u64::MAX,
            count_step: 1,
            probability: ALWAYS,
            arguments: ppm.map(threshold_from_ppm),
            connection_from: 0,
            connection_to: u32::MAX,
            size_min: 0,
            size_max: u32::MAX,
            state: 0,
            uid: 1,
            fault,
            kinds: 0,
            directions: 3,
            flags: 0,
            query_type: 0,
            padding: 0,
        }
    }

    /// The verdicts on the packets of one connection, one after the other: whether each was lost.
    fn losses(fault: u8, ppm: [u32; 5]) -> impl Iterator<Item = bool> {
        let rule = rule(fault, ppm);
        let (mut state, mut flow) = (RuleState::default(), FlowRule::default());
        open::<Plain>(&rule, &mut state, &mut flow);
        (0..PACKETS).map(move |_| {
            let sample = Sample {
                now_ns: 0,
                size: 100,
                direction: 0,
            };
            let (packet, mut verdict) = (Packet::default(), Verdict::default());
            let mut followed = Followed::NONE;
            let fired = judge::<Plain>(
                &rule,
                &sample,
                &packet,
                &mut followed,
                &mut flow,
                &mut state,
                &mut verdict,
            );
            assert_eq!(fired.is_some(), verdict.end == action::DROP);
            fired.is_some()
        })
    }

    /// The share of lost packets, and the mean length of a run of them.
    fn figures(fault: u8, ppm: [u32; 5]) -> (f64, f64) {
        let (mut lost, mut runs, mut before) = (0_u32, 0_u32, false);
        for is_lost in losses(fault, ppm) {
            lost += u32::from(is_lost);
            runs += u32::from(is_lost && !before);
            before = is_lost;
        }
        let share = f64::from(lost) / f64::from(PACKETS);
        (share, f64::from(lost) / f64::from(runs.max(1)))
    }

    /// Parts per million as a share of one.
    fn share(ppm: u32) -> f64 {
        f64::from(ppm) / 1e6
    }

    fn assert_near(what: &str, measured: f64, expected: f64) {
        let off = (measured - expected).abs() / expected;
        assert!(off < 0.05, "{what}: {measured} instead of {expected}");
    }

    #[test]
    fn a_refusal_is_never_refused() {
        let tcp = |tcp_flags| Packet {
            protocol: PROTOCOL_TCP,
            tcp_flags,
            has_transport: true,
            ..Packet::default()
        };
        let icmp = |protocol, icmp_type| Packet {
            protocol,
            icmp_type,
            has_transport: true,
            ..Packet::default()
        };
        let ended = |packet: &Packet| {
            let mut verdict = Verdict::default();
            refuse(reject::BY_PROTOCOL, packet, &mut verdict);
            verdict.end
        };
        for passes in [
            tcp(TCP_RST),
            tcp(TCP_RST | TCP_ACK),
            icmp(PROTOCOL_ICMP, 3),
            icmp(PROTOCOL_ICMPV6, 1),
        ] {
            assert_eq!(ended(&passes), 0, "{passes:?}");
        }
        assert_eq!(ended(&tcp(TCP_SYN)), action::REJECT_RST);
        assert_eq!(ended(&icmp(PROTOCOL_ICMP, 8)), action::REJECT_ICMP);
        assert_eq!(ended(&icmp(PROTOCOL_ICMPV6, 129)), action::DROP);
    }

    #[test]
    fn random_loss_has_its_share_and_runs_by_chance() {
        let (lost, run) = figures(fault::LOSS, [300_000, 0, 0, 0, 0]);
        assert_near("share", lost, 0.3);
        assert_near("run", run, 1.0 / 0.7);
    }

    /// The chain is in the bad state for p / (p + r) of the packets; the share that is lost is
    /// p / (p + r) * (1 - h) + r / (p + r) * (1 - k) (Elliott 1963; tc-netem(8)).
    #[test]
    fn gilbert_elliott_loses_what_its_stationary_distribution_says() {
        for ppm in [
            [10_000, 100_000, 1_000_000, 0],
            [50_000, 300_000, 700_000, 20_000],
            [400_000, 200_000, 500_000, 100_000],
        ] {
            let [p, r, one_minus_h, one_minus_k] = ppm.map(share);
            let expected = p / (p + r) * one_minus_h + r / (p + r) * one_minus_k;
            let [p, r, h, k] = ppm;
            let (lost, _) = figures(fault::LOSS_GILBERT_ELLIOTT, [p, r, h, k, 0]);
            assert_near(&format!("{ppm:?}"), lost, expected);
        }
    }

    /// Where the bad state loses all and the good one nothing, a burst is as long as the bad state: 1 / r packets.
    #[test]
    fn a_burst_of_the_gilbert_model_has_its_length() {
        let (_, run) = figures(
            fault::LOSS_GILBERT_ELLIOTT,
            [20_000, 250_000, 1_000_000, 0, 0],
        );
        assert_near("run", run, 4.0);
    }

    /// The four-state chain is in balance where what enters a state is what leaves it (Salsano, Ludovici, Ordine 2009):
    /// 3 to 1 and back p13 * s1 = p31 * s3, 3 to 2 and back p32 * s3 = p23 * s2, 4 is left at once s4 = p14 * s1.
    /// Lost are 3 and 4.
    #[test]
    fn the_four_state_chain_loses_what_its_stationary_distribution_says() {
        for ppm in [
            [10_000, 100_000, 0, 1_000_000, 5_000],
            [20_000, 200_000, 300_000, 400_000, 0],
            [50_000, 150_000, 250_000, 600_000, 30_000],
        ] {
            let [p13, p31, p32, p23, p14] = ppm.map(share);
            let s3 = p13 / p31;
            let s2 = s3 * p32 / p23;
            let expected = (s3 + p14) / (1.0 + s2 + s3 + p14);
            let (lost, _) = figures(fault::LOSS_STATE, ppm);
            assert_near(&format!("{ppm:?}"), lost, expected);
        }
    }

    #[test]
    fn each_fault_of_the_programs_has_a_number_of_its_own() {
        for (index, known) in fault::ALL.iter().enumerate() {
            assert_eq!(fault::of(known.number), Some(known));
            assert!(known.number < 32, "a bit of a word stands for it");
            assert!(fault::ALL[..index].iter().all(|one| one.name != known.name));
        }
    }

    #[test]
    fn a_fault_only_loses_packets_if_it_has_no_other_action() {
        let losses = (1 << action::DROP) | (1 << action::DROP_CHECKSUM);
        for known in fault::ALL {
            let only_loses = rule(known.number, [1; 5]).only_loses();
            assert_eq!(only_loses, known.actions & !losses == 0, "{}", known.name);
        }
        assert!(
            rule(fault::MTU, [1, 0, 0, 0, 0]).only_loses(),
            "without ICMP"
        );
    }
}
