//! Chooses the mechanism that holds packets.

use std::collections::BTreeSet;

use anyhow::Result;
use clap::ValueEnum;
use fault_common::abi::{Held, LEAVES, RuleEntry, fault, holder};
use fault_common::decide::KEEP_ORDER;

use super::stream;
use crate::rule::{Fault, Modifiers, PacketAction, Protocol, ResolvedRule, Rule};

/// The features of the machine; only checked if they matter.
pub trait Machine {
    /// Whether a tap device can be created.
    fn has_tap(&self) -> bool;
    /// Whether the kernel has all of these qdiscs.
    fn has_qdiscs(&self, kinds: &[&str]) -> bool;
    /// Whether there is a cgroup2 hierarchy.
    fn has_cgroups(&self) -> bool;
}

/// The values of `--mechanism`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mechanism {
    /// A thread of fault behind a tap device; works on every kernel and with any qdisc.
    #[default]
    DelayLine,
    /// fq qdiscs hold delayed and reordered packets; the delay line those with a rate or slots.
    Fq,
    /// netem qdiscs hold packets with a constant delay; the delay line the others.
    Netem,
}

impl std::fmt::Display for Mechanism {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DelayLine => "delay-line",
            Self::Fq => "fq",
            Self::Netem => "netem",
        })
    }
}

impl Mechanism {
    /// The value for the programs: see [`holder`].
    #[must_use]
    pub fn holder(self) -> u32 {
        match self {
            Self::DelayLine => holder::DELAY_LINE,
            Self::Fq => holder::FQ,
            Self::Netem => holder::NETEM,
        }
    }

    /// The mechanism for one rule; `None` if it holds no packets.
    #[must_use]
    pub fn of(self, entry: &RuleEntry) -> Option<&'static str> {
        match (self, held_by(entry.fault)) {
            (_, Held::No) => None,
            (Self::Fq, Held::Timed) => Some("fq"),
            (Self::Netem, Held::Timed) if constant_ns(entry).is_some() => Some("netem"),
            _ => Some("delay-line"),
        }
    }
}

/// The qdiscs that hold packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldingQdiscs {
    /// fq.
    Fq,
    /// netem, for these delays in nanoseconds.
    Netem(Vec<u64>),
}

/// The mechanisms that can hold the packets of a fault.
fn held_by(number: u8) -> Held {
    fault::of(number).map_or(Held::No, |fault| fault.held)
}

/// The delay of a rule with a constant delay.
fn constant_ns(entry: &RuleEntry) -> Option<u64> {
    constant_delay_ns(entry.fault, &entry.arguments)
}

/// The same of an action.
fn constant_delay_ns(number: u8, arguments: &[u64; 5]) -> Option<u64> {
    let [delay_ns, jitter_ns, form, ..] = *arguments;
    let is_constant = number == fault::DELAY && jitter_ns == 0 && form & KEEP_ORDER == 0;
    is_constant.then_some(delay_ns)
}

/// The delays for netem: those of the rules, and their sums, because several rules may match a packet. `None` if there
/// are too many.
pub(super) fn netem_delays<'a>(entries: impl Iterator<Item = &'a RuleEntry>) -> Option<Vec<u64>> {
    let mut sums = BTreeSet::new();
    for delay_ns in entries.filter_map(constant_ns) {
        let more: Vec<u64> = sums.iter().map(|sum| sum + delay_ns).collect();
        sums.extend(more);
        sums.insert(delay_ns);
        if sums.len() > LEAVES as usize {
            return None;
        }
    }
    Some(sums.into_iter().collect())
}

/// The requested mechanism, or the delay line if a tap device is available. Without one, fq or netem if they support
/// all rules. As a last resort the rules become stream rules of the relay.
///
/// # Errors
/// None for supported rules; unsupported ones are rejected later, by the mechanism.
pub fn choose(
    requested: Option<Mechanism>,
    rules: &mut [(Rule, ResolvedRule)],
    machine: &dyn Machine,
) -> Result<Mechanism> {
    let holds = rules.iter().any(|(_, rule)| holds(&rule.fault));
    let Some(requested) = requested else {
        if !holds || machine.has_tap() {
            return Ok(Mechanism::DelayLine);
        }
        return Ok(without_tap(rules, machine));
    };
    Ok(requested)
}

fn without_tap(rules: &mut [(Rule, ResolvedRule)], machine: &dyn Machine) -> Mechanism {
    let held: Vec<PacketAction> = rules
        .iter()
        .flat_map(|(_, rule)| held_parts(&rule.fault))
        .collect();
    if held
        .iter()
        .all(|action| held_by(action.fault) == Held::Timed)
        && machine.has_qdiscs(&["fq"])
    {
        return Mechanism::Fq;
    }
    let is_constant =
        |action: &PacketAction| constant_delay_ns(action.fault, &action.arguments).is_some();
    if held.iter().all(is_constant) && machine.has_qdiscs(&["prio", "netem"]) {
        return Mechanism::Netem;
    }
    if !machine.has_cgroups() {
        // The relay is unavailable too; the missing feature is the tap device.
        return Mechanism::DelayLine;
    }
    let streams: Option<Vec<_>> = rules
        .iter()
        .map(|(_, rule)| {
            if holds(&rule.fault) {
                as_stream(rule)
            } else {
                Some(rule.clone())
            }
        })
        .collect();
    for ((_, rule), stream) in rules.iter_mut().zip(streams.unwrap_or_default()) {
        *rule = stream;
    }
    Mechanism::DelayLine
}

/// The parts of a fault that hold packets.
fn held_parts(fault: &Fault) -> impl Iterator<Item = PacketAction> {
    let actions = fault.parts().filter_map(Fault::packet);
    actions.filter(|action| held_by(action.fault) != Held::No)
}

/// Whether a fault holds packets.
fn holds(fault: &Fault) -> bool {
    held_parts(fault).next().is_some()
}

/// The stream rule closest to a rule that holds packets; `None` if there is none.
fn as_stream(rule: &ResolvedRule) -> Option<ResolvedRule> {
    let modifiers = &rule.modifiers;
    let plain = Modifiers::default();
    let picks = (
        modifiers.probability,
        modifiers.triggers,
        modifiers.packets,
        modifiers.size,
    ) != (plain.probability, plain.triggers, plain.packets, plain.size);
    if picks || rule.target.protocol != Protocol::Tcp {
        return None;
    }
    let stream = ResolvedRule {
        fault: rule.fault.on_streams()?,
        // As packets, which say nothing of names.
        server: None,
        ..rule.clone()
    };
    stream::check(&stream).is_ok().then_some(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::relay::Transport;
    use crate::rule::{SystemResolver, Targets};

    fn resolved(texts: &[&str]) -> Vec<(Rule, ResolvedRule)> {
        let rules = texts.iter().map(|text| {
            let rule: Rule = text.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            (rule, resolved)
        });
        rules.collect()
    }

    fn by(mechanism: Mechanism, text: &str) -> String {
        let mut plan = Plan::new(&resolved(&[text]), 1, None, None).unwrap();
        plan.hold_by(mechanism);
        plan.rules[0].mechanism(None)
    }

    #[test]
    fn each_rule_is_held_by_what_can_hold_it() {
        for (text, fq, netem) in [
            ("tcp:1 delay=1ms", "tc, fq", "tc, netem"),
            ("tcp:1 delay=2ms~1ms", "tc, fq", "tc, delay-line"),
            ("tcp:1 reorder=5%", "tc, fq", "tc, delay-line"),
            ("tcp:1 rate=1mbit", "tc, delay-line", "tc, delay-line"),
            ("tcp:1 drop", "tc", "tc"),
        ] {
            assert_eq!(by(Mechanism::Fq, text), fq);
            assert_eq!(by(Mechanism::Netem, text), netem);
            assert_eq!(
                by(Mechanism::DelayLine, text).contains("line"),
                text != "tcp:1 drop"
            );
        }
    }

    #[test]
    fn queries_are_answered_by_the_relay_too_while_it_can_be_used() {
        let rules = [
            "dns:*.a nxdomain at=1s",
            "dns truncated",
            "dns delay=1ms",
            "tcp:53 latency=1ms",
        ];
        let mut plan = Plan::new(&resolved(&rules), 1, None, None).unwrap();
        let by = |plan: &Plan| -> Vec<_> {
            let rules = plan.rules.iter();
            rules.map(|rule| rule.mechanism(None)).collect()
        };
        let (relay, others) = (
            "relay (connect hook)",
            ["tc", "tc, delay-line", "relay (connect hook)"],
        );
        assert_eq!(by(&plan)[0], format!("tc, {relay}"));
        assert_eq!(by(&plan)[1..], others);
        let relayed = plan.relay_rules();
        let [(3, stream), (0, queries)] = relayed.as_slice() else {
            panic!("two rules");
        };
        // One relay serves both.
        assert_eq!(queries.resolved.target, stream.resolved.target);
        assert_eq!(queries.resolved.modifiers.at_ns, 1_000_000_000);
        assert!(queries.acts_on(Transport::Tcp) && !queries.acts_on(Transport::Udp));
        plan.leave_tcp();
        assert_eq!(by(&plan)[0], "tc");
        assert_eq!(plan.relay_rules().len(), 1);
        // What is missed over TCP.
        for (rule, expected) in [
            ("dns nxdomain", false),
            ("dns delay=1ms", true),
            ("tcp:a.example:1 drop", true),
            ("tcp:1 drop", false),
        ] {
            let plan = Plan::new(&resolved(&[rule]), 1, None, None).unwrap();
            assert_eq!(plan.misses_tcp(), expected, "{rule}");
        }
    }

    #[test]
    fn netem_has_a_leaf_for_each_sum() {
        let delays = |texts: &[&str]| {
            let plan = Plan::new(&resolved(texts), 1, None, None).unwrap();
            let entries = plan.entries();
            netem_delays(entries.iter().map(|rule| &rule.entry))
        };
        let ms = |all: &[u64]| Some(all.iter().map(|ms| ms * 1_000_000).collect());
        let two = ["tcp:1 delay=1ms", "tcp:2 delay=2ms", "tcp:1 delay=5ms~1ms"];
        assert_eq!(delays(&two), ms(&[1, 2, 3]));
        let many: Vec<_> = (0..5)
            .map(|n| format!("tcp:1 delay={}ms", 1 << n))
            .collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(delays(&many[..4]).map(|all| all.len()), Some(15));
        assert_eq!(delays(&many), None);
    }

    #[test]
    fn a_delay_of_streams_becomes_a_latency() {
        let latency = |text| as_stream(&resolved(&[text]).remove(0).1).map(|rule| rule.fault);
        let expected: Fault = "latency=5ms".parse().unwrap();
        assert_eq!(latency("tcp:1 delay=5ms"), Some(expected));
        for other in [
            "udp:1 delay=5ms",
            "tcp:1 delay=5ms p=5%",
            "tcp:1 delay=5us",
            "tcp:1 rate=1mbit",
        ] {
            assert_eq!(latency(other), None, "{other}");
        }
    }
}
