//! Rules become a validated plan: which mechanism carries which rule, and what the kernel is told.
//!
//! Nothing is changed on the machine here.

pub mod live;
pub mod mechanism;
pub mod needs;
pub mod packet;
pub mod shapers;
pub mod stream;
pub mod tables;

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use fault_common::abi::{LEAVES, RuleEntry, action};

use crate::plan::needs::Needs;
use crate::plan::tables::{PacketRule, Scope, Shaper};
use crate::rule::{Layer, Protocol, ResolvedRule, ResolvedTarget, Rule, TargetRef};
use mechanism::HoldingQdiscs;
use mechanism::Mechanism;
use shapers::Shapers;

/// The way into a host.
const SSH_PORT: u16 = 22;
/// Where the control API listens, unless told otherwise.
const API_PORT: u16 = 8474;

/// One rule and what carries it.
#[derive(Clone, Debug)]
pub struct PlannedRule {
    /// The rule as it is printed.
    pub text: String,
    /// The target's name or text.
    pub target: String,
    /// What that stands for.
    pub resolved: ResolvedTarget,
    /// Its entries for the kernel; more than one for a mix, or one that gives datagrams to the relay.
    pub entries: Vec<PacketRule>,
    /// What the relay does, when it is a stream fault.
    pub stream: Option<ResolvedRule>,
    /// Whether the relay stands in for what holds packets, for want of anything that does.
    pub stands_in: bool,
    /// What holds its packets, if it holds any.
    pub held_by: Mechanism,
}

impl PlannedRule {
    /// Whether it is a stream rule to which the packets of datagrams are given.
    #[must_use]
    pub fn takes_datagrams(&self) -> bool {
        self.stream.as_ref().is_some_and(stream::takes_datagrams)
    }

    /// What carries it, where packets reach the programs by `hooks` (nothing where that is not known yet).
    #[must_use]
    pub fn mechanism(&self, hooks: Option<String>) -> String {
        let tc = hooks.unwrap_or_else(|| "tc".to_owned());
        if self.stands_in {
            return "relay (connect hook), as there is no tap device, fq or netem".to_owned();
        }
        if let Some(stream) = &self.stream {
            let by = match (stream::takes_streams(stream), self.takes_datagrams()) {
                (true, true) => "connect hook, delay-line",
                (_, false) => "connect hook",
                (false, true) => "delay-line",
            };
            return format!("relay ({by})");
        }
        let held = self
            .entries
            .iter()
            .filter_map(|part| self.held_by.of(&part.entry));
        let held: BTreeSet<_> = held.collect();
        held.into_iter()
            .fold(tc, |all, one| format!("{all}, {one}"))
    }

    /// Whether it holds packets, so that a delay line is needed.
    #[must_use]
    pub fn holds(&self) -> bool {
        Needs::of(&self.entries).actions & (1 << action::HOLD) != 0
    }
}

/// All rules of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where all randomness comes from.
    pub seed: u64,
    /// The rules in their order.
    pub rules: Vec<PlannedRule>,
    /// What reads DNS responses, when rules are aimed at names whose addresses are learned. It comes after all rules.
    pub learner: Option<PacketRule>,
    /// What holds packets, as far as it can.
    pub held_by: Mechanism,
}

impl Plan {
    /// Plans `rules`, limited to `scope`, or to nothing when there is none. All end after `length_ns`.
    ///
    /// # Errors
    /// A fault that can't be carried out, or too many rules.
    pub fn new(
        rules: &[(Rule, ResolvedRule)],
        seed: u64,
        scope: Option<&Scope>,
        length_ns: Option<u64>,
    ) -> Result<Self> {
        let mut planned = Vec::with_capacity(rules.len());
        let mut states = 0;
        for (ordinal, (rule, resolved)) in (0_u32..).zip(rules) {
            if resolved.fault.layer() == Layer::Stream {
                stream::check(resolved)?;
                let stream = ended(resolved, length_ns);
                let mut entries = Vec::new();
                if stream::takes_datagrams(&stream) {
                    let number = relay_number(&planned, &stream.target);
                    entries.push(packet::to_relay(&stream, number, states, scope));
                    states += 1;
                }
                planned.push(PlannedRule {
                    text: rule.to_string(),
                    target: resolved.name.clone(),
                    resolved: resolved.target.clone(),
                    entries,
                    stream: Some(stream),
                    stands_in: rule.fault.layer() == Layer::Packet,
                    held_by: Mechanism::default(),
                });
                continue;
            }
            let mut entries = packet::compile(resolved, seed, ordinal, states, scope)?;
            if let Some(length_ns) = length_ns {
                for rule in &mut entries {
                    packet::end_at(&mut rule.entry, length_ns);
                }
            }
            states += u32::try_from(entries.len())?;
            planned.push(PlannedRule {
                text: rule.to_string(),
                target: resolved.name.clone(),
                resolved: resolved.target.clone(),
                entries,
                stream: None,
                stands_in: false,
                held_by: Mechanism::default(),
            });
        }
        let mut entries = planned.iter().flat_map(|rule| &rule.entries);
        let learns = entries.any(|rule| rule.name.is_some());
        Ok(Self {
            seed,
            learner: learns.then(|| packet::learner(states, scope)),
            rules: planned,
            held_by: Mechanism::default(),
        })
    }

    /// Chooses what holds packets; the delay line otherwise.
    pub fn hold_by(&mut self, mechanism: Mechanism) {
        self.held_by = mechanism;
        for rule in &mut self.rules {
            rule.held_by = mechanism;
        }
    }

    fn kernel_entries(&self) -> impl Iterator<Item = &RuleEntry> {
        let parts = self.rules.iter().flat_map(|rule| &rule.entries);
        parts.map(|part| &part.entry)
    }

    /// The qdiscs that are to hold packets.
    ///
    /// # Errors
    /// More different delays than netem can have.
    pub fn qdiscs(&self) -> Result<Option<HoldingQdiscs>> {
        let is_held = |name| {
            self.kernel_entries()
                .any(|entry| self.held_by.of(entry) == Some(name))
        };
        Ok(match self.held_by {
            Mechanism::Fq if is_held("fq") => Some(HoldingQdiscs::Fq),
            Mechanism::Netem if is_held("netem") => {
                let Some(delays_ns) = mechanism::netem_delays(self.kernel_entries()) else {
                    bail!(
                        "netem can hold packets for {LEAVES} different delays at most, sums of delays included: use \
                         --mechanism fq, or leave it out for the delay line"
                    );
                };
                Some(HoldingQdiscs::Netem(delays_ns))
            }
            _ => None,
        })
    }

    /// Whether a rule holds packets that only the delay line can hold.
    #[must_use]
    pub fn needs_delay_line(&self) -> bool {
        self.kernel_entries()
            .any(|entry| self.held_by.of(entry) == Some("delay-line"))
    }

    /// All entries, in the order of the rules.
    #[must_use]
    pub fn entries(&self) -> Vec<PacketRule> {
        self.entries_without(&BTreeSet::new())
    }

    /// The same without those of the rules whose places are in `off`.
    #[must_use]
    pub fn entries_without(&self, off: &BTreeSet<usize>) -> Vec<PacketRule> {
        let rules = self.rules.iter().enumerate();
        rules
            .filter(|(index, _)| !off.contains(index))
            .flat_map(|(_, rule)| &rule.entries)
            .chain(&self.learner)
            .cloned()
            .collect()
    }

    /// The host names that have no address yet, patterns left out.
    #[must_use]
    pub fn unknown_names(&self) -> BTreeSet<&str> {
        let targets = self.rules.iter().map(|rule| &rule.resolved);
        targets
            .filter(|target| target.hosts.is_empty())
            .filter_map(|target| target.name.as_deref())
            .filter(|name| !name.starts_with("*."))
            .collect()
    }

    /// The rules of the relay, each with its place among all.
    #[must_use]
    pub fn stream_rules(&self) -> Vec<(usize, &ResolvedRule)> {
        self.rules
            .iter()
            .enumerate()
            .filter_map(|(index, rule)| Some((index, rule.stream.as_ref()?)))
            .collect()
    }

    /// What the delay line needs to know, by the rules' states.
    #[must_use]
    pub fn shapers(&self) -> Shapers {
        let mut shapers = Shapers::default();
        for part in self.rules.iter().flat_map(|rule| &rule.entries) {
            // States are below twice RULES_MAX.
            let state = u16::try_from(part.entry.state).unwrap_or(u16::MAX);
            match part.shaper {
                Some(Shaper::Rate(rate)) => drop(shapers.rates.insert(state, rate)),
                Some(Shaper::Slots(slots)) => drop(shapers.slots.insert(state, slots)),
                None => {}
            }
        }
        shapers
    }

    /// Whether a rule holds packets.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.rules.iter().any(PlannedRule::holds)
    }
}

/// The number of the relay for the datagrams of a target: the place of the first rule that has it carry any.
fn relay_number(earlier: &[PlannedRule], target: &ResolvedTarget) -> usize {
    let known = earlier
        .iter()
        .position(|rule| rule.takes_datagrams() && rule.resolved == *target);
    known.unwrap_or(earlier.len())
}

/// A stream rule that ends with the scenario, if it does not end before.
fn ended(rule: &ResolvedRule, length_ns: Option<u64>) -> ResolvedRule {
    let mut rule = rule.clone();
    let modifiers = &mut rule.modifiers;
    // With a period and no duty `for` is the length of each window; such a rule ends with the command.
    if let Some(length_ns) = length_ns
        && (modifiers.period_ns.is_none() || modifiers.duty.is_some())
    {
        let left_ns = length_ns.saturating_sub(modifiers.at_ns);
        modifiers.for_ns = Some(modifiers.for_ns.map_or(left_ns, |ns| ns.min(left_ns)));
    }
    rule
}

/// Rejects rules for the whole host that would cut SSH or the control API, which listens on `api_port` (nothing: where it
/// usually does).
///
/// # Errors
/// The first rule that would.
pub fn guard_host(rules: &[(Rule, ResolvedRule)], api_port: Option<u16>) -> Result<()> {
    let guarded = [
        (SSH_PORT, "SSH"),
        (api_port.unwrap_or(API_PORT), "fault's own control API"),
    ];
    for (rule, resolved) in rules {
        let reached: Vec<_> = guarded
            .iter()
            .filter(|(port, _)| reaches(&resolved.target, *port))
            .collect();
        if reached.is_empty() {
            continue;
        }
        let named: Vec<_> = reached
            .iter()
            .map(|(port, what)| format!("port {port} ({what})"))
            .collect();
        let ports: Vec<_> = reached.iter().map(|(port, _)| *port).collect();
        let without = match &rule.target {
            TargetRef::Spec(target) => target.excluding(&ports),
            TargetRef::Name(_) => None,
        };
        let help = without.map_or_else(
            || "name other ports".to_owned(),
            |target| format!("write `{target}`"),
        );
        bail!(
            "`{rule}` reaches {} on the whole host: {help}, or give --force",
            named.join(" and ")
        );
    }
    Ok(())
}

/// Whether a target has a TCP port.
fn reaches(target: &ResolvedTarget, port: u16) -> bool {
    let is_tcp = matches!(target.protocol, Protocol::Any | Protocol::Tcp);
    let mut ranges = target.ports.iter();
    is_tcp
        && (target.ports.is_empty()
            || target.portless.contains(&Protocol::Tcp)
            || ranges.any(|range| range.first <= port && port <= range.last))
}
