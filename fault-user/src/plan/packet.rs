//! Compiles a packet rule for the kernel programs.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use fault_common::abi::{RuleEntry, direction, fault, rule_flag, rule_uid};
use fault_common::dns;
use fault_common::packet::kind;
use fault_common::random::{ALWAYS, rule_key, threshold_from_ppm};

use crate::plan::shapers::{RateShaper, Slots};
use crate::plan::tables::{CgroupScope, Network, PacketRule, ProtocolClass, Shaper};
use crate::rule::{
    self, CountScope, Direction, Fault, MixArm, Modifiers, PacketAction, Protocol, QueryType,
    ResolvedRule, ResolvedTarget,
};

/// Distinguishes the key of a mix's draw from those of its arms.
const MIX_SALT: u64 = 0x6d69_7800;

/// Compiles one rule into an entry, or into one per arm of a mix.
///
/// `ordinal` is the rule's place in the list, from 0: its randomness depends on it. `first_state` is
/// the first free index of rule states.
///
/// # Errors
/// The fault is not a packet fault.
pub fn compile(
    rule: &ResolvedRule,
    seed: u64,
    ordinal: u32,
    first_state: u32,
    scope: Option<&CgroupScope>,
) -> Result<Vec<PacketRule>> {
    let key = rule_key(seed, ordinal);
    let whole = [MixArm {
        probability: 1_000_000,
        fault: rule.fault.clone(),
    }];
    let (arms, is_mix): (&[MixArm], bool) = match &rule.fault {
        Fault::Mix(mix) => (&mix.arms, true),
        _ => (&whole, false),
    };
    let mut compiled = Vec::with_capacity(arms.len());
    let mut mix_from = 0;
    for (index, arm) in (0_u32..).zip(arms) {
        let mix_to = mix_from + threshold_from_ppm(arm.probability);
        let action = action_of(&arm.fault)?;
        let mut entry = entry_of(&rule.modifiers, &action);
        entry.key = if index == 0 {
            key
        } else {
            rule_key(key, index)
        };
        entry.mix_key = rule_key(key ^ MIX_SALT, 0);
        entry.state = first_state + index;
        entry.uid = rule_uid(1, entry.state);
        if is_mix {
            entry.flags |= rule_flag::MIX;
            entry.mix_from = mix_from;
            entry.mix_to = mix_to.min(ALWAYS);
        }
        mix_from = mix_to;
        compiled.push(PacketRule {
            shaper: action.shaper.map(|shaper| shaper_of(&shaper, entry.key)),
            ..aimed(&rule.target, entry, scope)
        });
    }
    Ok(compiled)
}

/// The entry that passes datagrams of a stream rule to relay `number`, inside the rule's windows.
#[must_use]
pub fn to_relay(
    rule: &ResolvedRule,
    number: usize,
    state: u32,
    scope: Option<&CgroupScope>,
) -> PacketRule {
    let modifiers = times(&rule.modifiers);
    let action = PacketAction::new(fault::RELAY, [number as u64]).per_wire_packet(false);
    let mut entry = entry_of(&modifiers, &action);
    entry.state = state;
    entry.uid = rule_uid(1, state);
    PacketRule {
        protocols: vec![ProtocolClass::Udp],
        ..aimed(&rule.target, entry, scope)
    }
}

/// The modifiers that say when a rule is applied.
#[must_use]
pub fn times(modifiers: &Modifiers) -> Modifiers {
    Modifiers {
        at_ns: modifiers.at_ns,
        for_ns: modifiers.for_ns,
        period_ns: modifiers.period_ns,
        duty: modifiers.duty,
        ..Modifiers::default()
    }
}

/// What reads DNS responses for the addresses of the names that rules are aimed at, if there are any, and counts
/// connections to DNS servers over TCP.
#[must_use]
pub fn learner(state: u32, scope: Option<&CgroupScope>, has_names: bool) -> PacketRule {
    let modifiers = Modifiers {
        direction: Direction::ToClient,
        ..Modifiers::default()
    };
    let action = PacketAction::new(fault::LEARN, []).per_wire_packet(false);
    let mut entry = entry_of(&modifiers, &action);
    entry.state = state;
    entry.uid = rule_uid(1, state);
    let mut protocols = vec![ProtocolClass::Tcp];
    if has_names {
        protocols.push(ProtocolClass::Udp);
    }
    PacketRule {
        protocols,
        ports: vec![(dns::PORT, dns::PORT)],
        portless: Vec::new(),
        hosts: Vec::new(),
        name: None,
        learned: BTreeSet::new(),
        question: None,
        scope: scope.cloned(),
        shaper: None,
        entry,
    }
}

fn aimed(target: &ResolvedTarget, entry: RuleEntry, scope: Option<&CgroupScope>) -> PacketRule {
    let ports = target.ports.iter();
    let hosts = target.hosts.iter();
    PacketRule {
        protocols: protocols(target),
        ports: ports.map(|range| (range.first, range.last)).collect(),
        portless: portless(target),
        hosts: hosts
            .map(|host| Network::new(host.address(), host.prefix()))
            .collect(),
        name: target.name.clone(),
        learned: BTreeSet::new(),
        question: target.question.clone(),
        scope: scope.cloned(),
        shaper: None,
        entry,
    }
}

fn protocols(target: &ResolvedTarget) -> Vec<ProtocolClass> {
    match target.protocol {
        Protocol::Tcp => vec![ProtocolClass::Tcp],
        // Queries over UDP are what a target of DNS becomes.
        Protocol::Udp | Protocol::Dns => vec![ProtocolClass::Udp],
        Protocol::Icmp => vec![ProtocolClass::Icmp],
        // A port is one of TCP or of UDP.
        Protocol::Any if !target.ports.is_empty() && target.portless.is_empty() => {
            vec![ProtocolClass::Tcp, ProtocolClass::Udp]
        }
        Protocol::Any => vec![
            ProtocolClass::Tcp,
            ProtocolClass::Udp,
            ProtocolClass::Icmp,
            ProtocolClass::Other,
        ],
    }
}

fn portless(target: &ResolvedTarget) -> Vec<ProtocolClass> {
    let of = |named: &Protocol| match named {
        Protocol::Tcp => ProtocolClass::Tcp,
        Protocol::Udp | Protocol::Dns => ProtocolClass::Udp,
        Protocol::Icmp => ProtocolClass::Icmp,
        Protocol::Any => ProtocolClass::Other,
    };
    target.portless.iter().map(of).collect()
}

/// Converts a fault to the programs' format.
fn action_of(fault: &Fault) -> Result<PacketAction> {
    if let Some(why) = fault.unsupported() {
        bail!(why);
    }
    fault.packet().with_context(|| {
        format!(
            "`{}` is a stream fault: a `mix` takes faults of one kind",
            fault.name()
        )
    })
}

/// Default queue length of a rate in wire packets, as in tc-netem(8).
const QUEUE_PACKETS: u32 = 1000;

/// Converts a shaper to the delay line's format.
fn shaper_of(shaper: &rule::PacketShaper, key: u64) -> Shaper {
    match shaper {
        rule::PacketShaper::Rate(rate) => Shaper::Rate(RateShaper {
            bits_per_second: rate.bits_per_second,
            burst_bytes: rate.burst_bytes.unwrap_or(0),
            overhead_bytes: rate.overhead_bytes,
            cell_bytes: rate.cell_bytes,
            cell_overhead_bytes: rate.cell_overhead_bytes,
            limit_packets: rate.limit_packets.unwrap_or(QUEUE_PACKETS),
        }),
        rule::PacketShaper::Slot(slot) => Shaper::Slots(Slots {
            key,
            min_ns: slot.min_ns,
            max_ns: slot.max_ns,
            packets: slot.packets.map_or(u64::MAX, u64::from),
            bytes: slot.bytes.unwrap_or(u64::MAX),
        }),
    }
}

fn entry_of(modifiers: &Modifiers, action: &PacketAction) -> RuleEntry {
    let schedule = modifiers.schedule();
    let counts = modifiers.triggers.bounds();
    let connections = modifiers.connections;
    let size = modifiers.size;
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let (length_ns, period_ns, active_ns) = match (schedule.period_ns, schedule.on_ns) {
        (Some(period), on) => {
            let length = schedule.end_ns.map_or(0, |end| end - schedule.start_ns);
            (length, period, on.unwrap_or(period))
        }
        (None, on) => (on.unwrap_or(0), 0, 0),
    };
    let mut entry = RuleEntry {
        key: 0,
        mix_key: 0,
        mix_from: 0,
        mix_to: 0,
        at_ns: schedule.start_ns,
        length_ns,
        period_ns,
        active_ns,
        count_from: counts.first,
        count_to: counts.last,
        count_step: modifiers.triggers.step(),
        probability: threshold_from_ppm(modifiers.probability),
        arguments: action.arguments,
        connection_from: connections.map_or(0, |bounds| narrow(bounds.first)),
        connection_to: connections.map_or(u32::MAX, |bounds| narrow(bounds.last)),
        size_min: size.map_or(0, |bounds| narrow(bounds.first)),
        size_max: size.map_or(u32::MAX, |bounds| narrow(bounds.last)),
        state: 0,
        uid: 0,
        fault: action.fault,
        kinds: modifiers.packets.bits(),
        directions: match modifiers.direction {
            Direction::ToServer => direction::BIT_TO_SERVER,
            Direction::ToClient => direction::BIT_TO_CLIENT,
            Direction::Both => direction::BIT_TO_SERVER | direction::BIT_TO_CLIENT,
        },
        flags: match modifiers.count {
            CountScope::PerRule => rule_flag::COUNT_PER_RULE,
            CountScope::PerConnection => 0,
        },
        query_type: modifiers.query_type.map_or(0, QueryType::number),
        padding: 0,
    };
    if action.is_per_wire_packet || picks_wire_packets(&entry) {
        entry.flags |= rule_flag::PER_SEGMENT;
    }
    entry
}

/// Whether a rule may select only some wire packets of a super-packet: because it draws, counts, or checks a property
/// that they may differ in.
fn picks_wire_packets(entry: &RuleEntry) -> bool {
    entry.probability < ALWAYS
        || (entry.count_from, entry.count_to, entry.count_step) != (1, u64::MAX, 1)
        || (entry.size_min, entry.size_max) != (0, u32::MAX)
        || entry.kinds & kind::FIN != 0
}

/// Ends a rule at `end_ns` after the start, if it does not end before.
pub fn end_at(entry: &mut RuleEntry, end_ns: u64) {
    let left = end_ns.saturating_sub(entry.at_ns);
    if left == 0 {
        // A length of 0 would mean no end at all.
        entry.count_to = 0;
    } else if entry.length_ns == 0 || entry.length_ns > left {
        entry.length_ns = left;
    }
}

#[cfg(test)]
mod tests {
    use fault_common::abi::action;

    use super::*;
    use crate::plan::needs::Needs;
    use crate::rule::{Rule, SystemResolver, Targets};

    #[test]
    fn a_fast_rate_holds_super_packets_whole() {
        for (rule, divides) in [
            ("tcp:80 rate=100mbit", true),
            ("tcp:80 rate=1gbit", false),
            ("tcp:80 rate=20gbit", false),
            ("tcp:80 rate=1gbit p=50%", true),
        ] {
            let rule: Rule = rule.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            let compiled = compile(&resolved, 1, 0, 0, None).unwrap();
            let flags = compiled[0].entry.flags;
            assert_eq!(flags & rule_flag::PER_SEGMENT != 0, divides, "{rule}");
        }
    }

    #[test]
    fn what_a_fault_says_of_itself_is_what_the_programs_are_told() {
        let rule: Rule = "tcp:80 example=9000".parse().unwrap();
        let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
        let compiled = compile(&resolved, 1, 0, 0, None).unwrap();
        let [rule] = compiled.as_slice() else {
            panic!("one entry");
        };
        assert_eq!(rule.entry.fault, fault::MTU);
        assert_eq!(rule.entry.arguments, [9000, 0, 0, 0, 0]);
        assert_ne!(rule.entry.flags & rule_flag::PER_SEGMENT, 0);
        let drops = (1 << action::DROP) | (1 << action::REJECT_ICMP);
        assert_eq!(Needs::of(&compiled).actions, drops);
    }
}
