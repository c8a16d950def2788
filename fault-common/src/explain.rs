//! Why a rule did to a packet what it did: found out again from what a program told of it, by the functions that decided it.

use crate::abi::{RuleEntry, Trace, fault, rule_flag, step, trace_flag};
use crate::decide::{has_size, in_mix, is_connection, is_kind, is_query_type, is_triggered};
use crate::packet::{PROTOCOL_TCP, Packet, TCP_RST, TCP_SYN, kind};
use crate::random::{ALWAYS, Lane, Ordinals, draw};

/// The filter of a rule that a packet failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// `match=`.
    Kind,
    /// `size=`.
    Size,
    /// `conn=`.
    Connection,
    /// The connection drew another alternative of a `mix`.
    Mix,
    /// `type=`.
    QueryType,
    /// `at=`, `for=`, `period=`: it came outside the rule's windows.
    Window,
}

/// Why a fault has no effect on a packet that its rule picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsuited {
    /// The packet has no payload that could be changed.
    NoPayload,
    /// It is not marked as one of a sender that knows ECN.
    NotEct,
    /// It is no larger than the `mtu`.
    Fits,
    /// The payload in its direction does not come to the size of a `reset` yet.
    TooEarly {
        /// How many bytes there were, this packet included.
        bytes: u32,
    },
    /// It opens a connection.
    Opens,
    /// It tells of a refusal itself.
    Refusal,
    /// It is not one of every gap-th packets, which alone may overtake others.
    Gap,
    /// It is not TCP, or a fragment of it.
    NoReset,
    /// None of the above.
    Other,
}

/// Why a rule did to a packet what it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It failed a filter.
    Filter(Filter),
    /// The trigger did not select this count.
    Trigger {
        /// The packet's count in its connection and direction; with `count=rule` that of the whole rule. Another packet may
        /// have been counted since.
        count: u64,
    },
    /// `p=` did not pick it.
    Probability,
    /// It is a later fragment of a datagram that the rule did not pick.
    Datagram,
    /// The fault's own chance did not pick it.
    Chance,
    /// The fault has no effect on such a packet.
    Unsuited(Unsuited),
    /// The fault was applied.
    Fired,
}

/// What is found out about one packet and one of its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Why.
    pub cause: Cause,
    /// The packet's ordinal in its connection and direction, from 1; nothing where it was not counted.
    pub packet: Option<u64>,
    /// What was drawn for `p=`, of 2^32.
    pub probability: Option<u32>,
    /// What was drawn for the fault's own chance, of 2^32.
    pub chance: Option<u32>,
}

/// Explains what a record of [`step::JUDGED`] or [`step::FORESEEN`] tells of `rule`, which is the one that it names. Decisions
/// that are repeated (`fault replay`) are not explained by it.
#[must_use]
pub fn explain(rule: &RuleEntry, trace: &Trace) -> Explanation {
    let nothing = Explanation {
        cause: Cause::Fired,
        packet: None,
        probability: None,
        chance: None,
    };
    let follows = trace.flags & trace_flag::FOLLOWS != 0;
    if follows && trace.packet == 0 {
        return Explanation {
            cause: Cause::Datagram,
            ..nothing
        };
    }
    if trace.seen == 0 {
        return Explanation {
            cause: Cause::Filter(failed_filter(rule, trace)),
            ..nothing
        };
    }
    let is_picked = trace.packet != 0;
    let packet = if is_picked {
        trace.packet
    } else {
        u64::from(trace.seen.wrapping_sub(trace.outside))
    };
    let counted = Explanation {
        packet: Some(packet),
        ..nothing
    };
    if trace.step == step::FORESEEN {
        return Explanation {
            cause: Cause::Chance,
            ..counted
        };
    }
    let ordinals = Ordinals {
        connection: trace.connection,
        packet,
        direction: trace.direction,
        fragment: 0,
    };
    let count = if rule.flags & rule_flag::COUNT_PER_RULE != 0 {
        trace.rule_packets
    } else {
        packet
    };
    // Where the packet was picked, another one may have been counted since.
    if !is_picked && !is_triggered(rule, count) {
        return Explanation {
            cause: Cause::Trigger { count },
            ..counted
        };
    }
    let probability = (rule.probability < ALWAYS)
        .then(|| upper(draw(rule.key, ordinals, Lane::Probability as u64)));
    if !is_picked {
        return Explanation {
            cause: Cause::Probability,
            probability,
            ..counted
        };
    }
    let unsuited = unsuited(rule, trace);
    let has_chance = unsuited.is_none() && draws(rule.fault);
    let own = Ordinals {
        fragment: own_fragment(rule.fault, trace.fragment),
        ..ordinals
    };
    Explanation {
        cause: match unsuited {
            _ if trace.action != 0 => Cause::Fired,
            Some(why) => Cause::Unsuited(why),
            None if has_chance => Cause::Chance,
            None => Cause::Unsuited(Unsuited::Other),
        },
        probability,
        chance: has_chance.then(|| upper(draw(rule.key, own, Lane::Fault as u64))),
        ..counted
    }
}

/// The half of a draw that is compared with a threshold.
const fn upper(drawn: u64) -> u32 {
    (drawn >> 32) as u32
}

/// All fragments of a datagram overtake, or none: of a `reorder` nothing is drawn for each.
const fn own_fragment(fault: u8, fragment: u16) -> u16 {
    if fault == fault::REORDER { 0 } else { fragment }
}

/// The first filter that the packet fails, in the order in which they are asked; the window comes last.
fn failed_filter(rule: &RuleEntry, trace: &Trace) -> Filter {
    if !is_kind(rule, trace.kinds) {
        Filter::Kind
    } else if !has_size(rule, trace.size) {
        Filter::Size
    } else if !is_connection(rule, trace.connection) {
        Filter::Connection
    } else if !in_mix(rule, trace.connection) {
        Filter::Mix
    } else if !is_query_type(rule, trace.query_type) {
        Filter::QueryType
    } else {
        Filter::Window
    }
}

/// Whether the fault draws for each packet whether it is applied.
const fn draws(number: u8) -> bool {
    matches!(
        number,
        fault::LOSS
            | fault::LOSS_GILBERT_ELLIOTT
            | fault::LOSS_STATE
            | fault::CORRUPT_VISIBLE
            | fault::CORRUPT_LINK
            | fault::DUPLICATE
            | fault::ECN
            | fault::REORDER
    )
}

/// Why the fault has no effect on such a packet whatever it draws; nothing where it has one.
fn unsuited(rule: &RuleEntry, trace: &Trace) -> Option<Unsuited> {
    if trace.action != 0 {
        return None;
    }
    let packet = packet_of(trace);
    let is_tcp = packet.protocol == PROTOCOL_TCP && packet.has_transport && !packet.is_fragment;
    match rule.fault {
        fault::CORRUPT_VISIBLE => {
            (trace.payload == 0 || trace.fragment != 0).then_some(Unsuited::NoPayload)
        }
        fault::ECN => (trace.ecn != 1 && trace.ecn != 2).then_some(Unsuited::NotEct),
        fault::MTU => Some(Unsuited::Fits),
        fault::REORDER
            if rule.arguments[1] > 1 && !trace.packet.is_multiple_of(rule.arguments[1]) =>
        {
            Some(Unsuited::Gap)
        }
        fault::RESET if trace.tcp_flags & TCP_SYN != 0 && rule.kinds & kind::SYN == 0 => {
            Some(Unsuited::Opens)
        }
        fault::RESET if u64::from(trace.memory) < rule.arguments[0] => Some(Unsuited::TooEarly {
            bytes: trace.memory,
        }),
        fault::REJECT | fault::DOWN if packet.is_refusal() => Some(Unsuited::Refusal),
        fault::RESET if trace.tcp_flags & TCP_RST != 0 => Some(Unsuited::Refusal),
        fault::RESET | fault::DOWN if !is_tcp => Some(Unsuited::NoReset),
        _ => None,
    }
}

/// The packet, as far as the record tells of it.
#[must_use]
pub fn packet_of(trace: &Trace) -> Packet {
    let has = |flag| trace.flags & flag != 0;
    Packet {
        source: trace.source,
        destination: trace.destination,
        source_port: trace.source_port,
        destination_port: trace.destination_port,
        protocol: trace.protocol,
        has_transport: has(trace_flag::TRANSPORT),
        is_fragment: has(trace_flag::FRAGMENT),
        follows: has(trace_flag::FOLLOWS),
        fragment: trace.fragment,
        tcp_flags: trace.tcp_flags,
        icmp_type: trace.icmp_type,
        kinds: trace.kinds,
        query_type: trace.query_type,
        ecn: trace.ecn,
        ..Packet::default()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::abi::{FlowRule, Followed, RuleState};
    use crate::decide::{Plain, Sample, Verdict, in_window, judge, open};
    use crate::random::{chance, threshold_from_ppm};
    use proptest::prelude::*;

    prop_compose! {
        /// A rule with some of the modifiers.
        fn rules()(
            key: u64,
            fault in prop::sample::select(std::vec![
                fault::LOSS, fault::DROP, fault::DUPLICATE, fault::ECN, fault::MTU, fault::CORRUPT_VISIBLE,
                fault::RESET, fault::DELAY, fault::REORDER, fault::REJECT,
            ]),
            own in 0..200_u64,
            (at_ns, length_ns) in (0..3_u64, 0..3_u64),
            (count_from, count_step) in (1..4_u64, 1..4_u64),
            p in prop::sample::select(std::vec![500_000, 1_000_000]),
            kinds in prop::sample::select(std::vec![0, kind::DATA, kind::SYN]),
            size_min in prop::sample::select(std::vec![0, 100]),
            per_rule: bool,
            is_mix: bool,
        ) -> RuleEntry {
            let draws_own = draws(fault);
            RuleEntry {
                key,
                mix_key: key ^ 1,
                mix_from: 0,
                mix_to: ALWAYS / 2,
                at_ns,
                length_ns,
                period_ns: 0,
                active_ns: 0,
                count_from,
                count_to: u64::MAX,
                count_step,
                probability: threshold_from_ppm(p),
                arguments: [if draws_own { ALWAYS / 2 } else { own }, count_step, 0, 0, 0],
                connection_from: 0,
                connection_to: u32::MAX,
                size_min,
                size_max: u32::MAX,
                state: 0,
                uid: 1,
                fault,
                kinds,
                directions: 3,
                flags: u8::from(per_rule) * rule_flag::COUNT_PER_RULE + u8::from(is_mix) * rule_flag::MIX,
                query_type: 0,
                padding: 0,
            }
        }
    }

    /// A TCP segment with these flags and bytes of payload.
    fn segment(tcp_flags: u8, kinds: u8, payload: u32, ecn: u8) -> Packet {
        Packet {
            protocol: PROTOCOL_TCP,
            has_transport: true,
            tcp_flags,
            kinds,
            ecn,
            payload_offset: 40,
            end: 40 + payload,
            ..Packet::default()
        }
    }

    /// What the programs tell of a packet that has been judged.
    fn told(
        packet: &Packet,
        sample: &Sample,
        followed: &Followed,
        memory: &FlowRule,
        state: &RuleState,
        action: u8,
    ) -> Trace {
        Trace {
            since_ns: sample.now_ns,
            packet: followed.packet,
            rule_packets: state.packets,
            rule: 1,
            connection: memory.connection,
            seen: followed.seen,
            outside: (memory.outside & 0xffff_ffff) as u32,
            memory: memory.memory[0],
            size: sample.size,
            payload: packet.payload_length(),
            protocol: packet.protocol,
            kinds: packet.kinds,
            tcp_flags: packet.tcp_flags,
            ecn: packet.ecn,
            flags: trace_flag::TRANSPORT,
            action,
            step: step::JUDGED,
            ..Trace::default()
        }
    }

    /// Checks the explanation of one packet against what `judge` did with it.
    fn check(rule: &RuleEntry, trace: &Trace) -> Result<(), TestCaseError> {
        let said = explain(rule, trace);
        prop_assert_eq!(said.cause == Cause::Fired, trace.action != 0, "{:?}", said);
        match said.cause {
            Cause::Filter(Filter::Window) => prop_assert!(!in_window(rule, trace.since_ns)),
            Cause::Filter(Filter::Kind) => prop_assert!(!is_kind(rule, trace.kinds)),
            Cause::Filter(Filter::Size) => prop_assert!(trace.size < rule.size_min),
            Cause::Filter(Filter::Mix) => prop_assert!(!in_mix(rule, trace.connection)),
            Cause::Trigger { count } => {
                prop_assert!(count < rule.count_from || count % rule.count_step != 0);
            }
            Cause::Probability => {
                let drawn = u64::from(said.probability.unwrap());
                prop_assert!(drawn >= rule.probability);
            }
            Cause::Chance => {
                let drawn = u64::from(said.chance.unwrap());
                prop_assert!(!chance(drawn << 32, rule.arguments[0]));
            }
            Cause::Unsuited(why) => prop_assert_ne!(why, Unsuited::Other),
            Cause::Fired => {
                for (drawn, of) in [
                    (said.probability, rule.probability),
                    (said.chance, rule.arguments[0]),
                ] {
                    prop_assert!(drawn.is_none_or(|drawn| u64::from(drawn) < of));
                }
            }
            other => prop_assert!(false, "{:?}", other),
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn what_is_explained_is_what_was_decided(
            rule in rules(),
            packets in prop::collection::vec(
                (0..6_u64, 0..200_u32, prop::sample::select(std::vec![
                    (TCP_SYN, kind::SYN), (0, kind::DATA), (TCP_RST, kind::RST),
                ]), 0..4_u8),
                1..12,
            ),
        ) {
            let (mut state, mut memory) = (RuleState::default(), FlowRule::default());
            open::<Plain>(&rule, &mut state, &mut memory);
            for (now_ns, payload, (tcp_flags, kinds), ecn) in packets {
                let packet = segment(tcp_flags, kinds, payload, ecn);
                let sample = Sample { now_ns, size: 40 + payload, direction: 0 };
                let mut followed = Followed::NONE;
                let fired = judge::<Plain>(
                    &rule, &sample, &packet, &mut followed, &mut memory, &mut state, &mut Verdict::default(),
                );
                let action = fired.map_or(0, |fired| fired.action);
                check(&rule, &told(&packet, &sample, &followed, &memory, &state, action))?;
            }
        }
    }
}
