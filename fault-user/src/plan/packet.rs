//! Compiles a rule of the packet layer into what the kernel programs take.

use anyhow::{Result, bail};
use fault_common::abi::{RuleEntry, direction, fault, reject, rule_flag, rule_uid};
use fault_common::decide::KEEP_ORDER;
use fault_common::delay::distribution;
use fault_common::packet::kind;
use fault_common::random::{ALWAYS, rule_key, threshold_from_ppm};

use crate::plan::shapers::{Rate, Slots};
use crate::plan::tables::{Network, PacketRule, Protocol, Scope, Shaper};
use crate::rule::{
    CorruptMode, CountScope, Direction, Distribution, Fault, LossModel, MixArm, Modifiers,
    Protocol as Named, RejectWith, ResolvedRule, ResolvedTarget,
};

/// The key of a mix's draw is not that of its arms' faults.
const MIX_SALT: u64 = 0x6d69_7800;

/// What the kernel needs of a fault.
struct Action {
    fault: u8,
    arguments: [u64; 5],
}

/// Compiles one rule: into one entry, or one for each arm of a mix.
///
/// `ordinal` is the rule's place in the list, from 0: its randomness depends on it. `first_state` is
/// the first free index of rule states.
///
/// # Errors
/// A fault that the packet layer can't do.
pub fn compile(
    rule: &ResolvedRule,
    seed: u64,
    ordinal: u32,
    first_state: u32,
    scope: Option<&Scope>,
) -> Result<Vec<PacketRule>> {
    let key = rule_key(seed, ordinal);
    let whole = [MixArm {
        probability: 1_000_000,
        fault: rule.fault.clone(),
    }];
    let (arms, is_mix): (&[MixArm], bool) = match &rule.fault {
        Fault::Mix(arms) => (arms, true),
        _ => (&whole, false),
    };
    let mut compiled = Vec::with_capacity(arms.len());
    let mut mix_from = 0;
    for (index, arm) in (0_u32..).zip(arms) {
        let mix_to = mix_from + threshold_from_ppm(arm.probability);
        let mut entry = entry_of(&rule.modifiers, &action_of(&arm.fault)?);
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
        if is_per_segment(&entry) {
            entry.flags |= rule_flag::PER_SEGMENT;
        }
        mix_from = mix_to;
        compiled.push(PacketRule {
            shaper: shaper_of(&arm.fault, entry.key),
            ..aimed(&rule.target, entry, scope)
        });
    }
    Ok(compiled)
}

/// What gives the datagrams of a stream rule to relay `number`, while the rule is in its window.
#[must_use]
pub fn to_relay(
    rule: &ResolvedRule,
    number: usize,
    state: u32,
    scope: Option<&Scope>,
) -> PacketRule {
    let modifiers = Modifiers {
        at_ns: rule.modifiers.at_ns,
        for_ns: rule.modifiers.for_ns,
        period_ns: rule.modifiers.period_ns,
        duty: rule.modifiers.duty,
        ..Modifiers::default()
    };
    let action = Action {
        fault: fault::RELAY,
        arguments: [number as u64, 0, 0, 0, 0],
    };
    let mut entry = entry_of(&modifiers, &action);
    entry.state = state;
    entry.uid = rule_uid(1, state);
    PacketRule {
        protocols: vec![Protocol::Udp],
        ..aimed(&rule.target, entry, scope)
    }
}

fn aimed(target: &ResolvedTarget, entry: RuleEntry, scope: Option<&Scope>) -> PacketRule {
    let ports = target.ports.iter();
    let hosts = target.hosts.iter();
    PacketRule {
        protocols: protocols(target),
        ports: ports.map(|range| (range.first, range.last)).collect(),
        portless: portless(target),
        hosts: hosts
            .map(|host| Network::new(host.address(), host.prefix()))
            .collect(),
        scope: scope.cloned(),
        shaper: None,
        entry,
    }
}

fn protocols(target: &ResolvedTarget) -> Vec<Protocol> {
    match target.protocol {
        Named::Tcp => vec![Protocol::Tcp],
        Named::Udp => vec![Protocol::Udp],
        Named::Icmp => vec![Protocol::Icmp],
        // A port is one of TCP or of UDP.
        Named::Any if !target.ports.is_empty() && target.portless.is_empty() => {
            vec![Protocol::Tcp, Protocol::Udp]
        }
        Named::Any => vec![
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Icmp,
            Protocol::Other,
        ],
    }
}

fn portless(target: &ResolvedTarget) -> Vec<Protocol> {
    let of = |named: &Named| match named {
        Named::Tcp => Protocol::Tcp,
        Named::Udp => Protocol::Udp,
        Named::Icmp => Protocol::Icmp,
        Named::Any => Protocol::Other,
    };
    target.portless.iter().map(of).collect()
}

fn action_of(wanted: &Fault) -> Result<Action> {
    let threshold = |ppm: &u32| threshold_from_ppm(*ppm);
    let (fault, arguments): (u8, &[u64]) = match wanted {
        Fault::Loss(model) => return Ok(loss(model)),
        Fault::Drop | Fault::Blackhole => (fault::DROP, &[]),
        Fault::Reject { with } => (fault::REJECT, &[reject_with(*with)]),
        Fault::Reset { bytes } => (fault::RESET, &[bytes.unwrap_or(0).into()]),
        Fault::Down => (fault::DOWN, &[]),
        Fault::Corrupt {
            probability,
            bits,
            mode,
        } => {
            let kind = match mode {
                CorruptMode::Visible => fault::CORRUPT_VISIBLE,
                CorruptMode::Link => fault::CORRUPT_LINK,
            };
            (kind, &[threshold(probability), u64::from(*bits)])
        }
        Fault::Duplicate { probability } => (fault::DUPLICATE, &[threshold(probability)]),
        Fault::Ecn { probability } => (fault::ECN, &[threshold(probability)]),
        Fault::Mtu { bytes, icmp } => (fault::MTU, &[u64::from(*bytes), u64::from(*icmp)]),
        Fault::Delay {
            delay_ns,
            jitter_ns,
            distribution,
            correlation,
            keep_order,
            limit_packets,
        } => {
            if limit_packets.is_some() {
                bail!(
                    "`limit` of a delay can't be carried out: the delay line holds up to 256 MiB and counts what is lost \
                     beyond; leave it out, or give it to a `rate`"
                );
            }
            let order = if *keep_order { KEEP_ORDER } else { 0 };
            let form = form_of(*distribution) | order;
            (
                fault::DELAY,
                &[*delay_ns, *jitter_ns, form, threshold(correlation)],
            )
        }
        Fault::Rate { .. } => (fault::RATE, &[]),
        Fault::Slot { .. } => (fault::SLOT, &[]),
        Fault::Reorder { probability, gap } => {
            (fault::REORDER, &[threshold(probability), u64::from(*gap)])
        }
        other => bail!(
            "`{}` works on streams, not on packets: a `mix` takes faults of one kind",
            other.name()
        ),
    };
    let mut padded = [0; 5];
    padded[..arguments.len()].copy_from_slice(arguments);
    Ok(Action {
        fault,
        arguments: padded,
    })
}

fn form_of(wanted: Distribution) -> u64 {
    match wanted {
        Distribution::Uniform => distribution::UNIFORM,
        Distribution::Normal => distribution::NORMAL,
        Distribution::Pareto => distribution::PARETO,
        Distribution::ParetoNormal => distribution::PARETO_NORMAL,
    }
}

/// Wire packets that wait for a rate where the rule does not say, as of tc-netem(8).
const QUEUE_PACKETS: u32 = 1000;

/// What the delay line is told of a fault.
fn shaper_of(wanted: &Fault, key: u64) -> Option<Shaper> {
    match *wanted {
        Fault::Rate {
            bits_per_second,
            burst_bytes,
            overhead_bytes,
            cell_bytes,
            cell_overhead_bytes,
            limit_packets,
        } => Some(Shaper::Rate(Rate {
            bits_per_second,
            burst_bytes: burst_bytes.unwrap_or(0),
            overhead_bytes,
            cell_bytes,
            cell_overhead_bytes,
            limit_packets: limit_packets.unwrap_or(QUEUE_PACKETS),
        })),
        Fault::Slot {
            min_ns,
            max_ns,
            packets,
            bytes,
        } => Some(Shaper::Slots(Slots {
            key,
            min_ns,
            max_ns,
            packets: packets.map_or(u64::MAX, u64::from),
            bytes: bytes.unwrap_or(u64::MAX),
        })),
        _ => None,
    }
}

fn loss(model: &LossModel) -> Action {
    let (fault, ppm) = match *model {
        LossModel::Random(ppm) => (fault::LOSS, [ppm, 0, 0, 0, 0]),
        LossModel::GilbertElliott {
            p,
            r,
            one_minus_h,
            one_minus_k,
        } => (
            fault::LOSS_GILBERT_ELLIOTT,
            [p, r, one_minus_h, one_minus_k, 0],
        ),
        LossModel::State {
            p13,
            p31,
            p32,
            p23,
            p14,
        } => (fault::LOSS_STATE, [p13, p31, p32, p23, p14]),
    };
    Action {
        fault,
        arguments: ppm.map(threshold_from_ppm),
    }
}

fn reject_with(with: Option<RejectWith>) -> u64 {
    match with {
        None => reject::BY_PROTOCOL,
        Some(RejectWith::Rst) => reject::RST,
        Some(RejectWith::IcmpPort) => reject::ICMP_PORT,
        Some(RejectWith::IcmpHost) => reject::ICMP_HOST,
        Some(RejectWith::IcmpAdmin) => reject::ICMP_ADMIN,
    }
}

fn entry_of(modifiers: &Modifiers, action: &Action) -> RuleEntry {
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
    RuleEntry {
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
        padding: 0,
    }
}

/// Whether a rule may decide differently about the wire packets of one super-packet: where it draws, counts, or asks
/// for what only some of them have.
fn is_per_segment(entry: &RuleEntry) -> bool {
    let draws = match entry.fault {
        fault::LOSS | fault::CORRUPT_LINK | fault::DUPLICATE | fault::ECN => {
            entry.arguments[0] < ALWAYS
        }
        fault::RESET => entry.arguments[0] != 0,
        fault::DELAY => entry.arguments[1] != 0,
        fault::DROP | fault::REJECT | fault::DOWN | fault::RELAY => false,
        _ => true,
    };
    draws
        || entry.probability < ALWAYS
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
