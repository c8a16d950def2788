//! Turns rules into a validated plan: the mechanism of each rule, and the entries for the kernel.
//!
//! Planning does not change the machine.

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
use crate::plan::tables::{CgroupScope, PacketRule, Shaper};
use crate::relay::{Queries, Transport};
use crate::rule::{Layer, Protocol, ResolvedRule, ResolvedTarget, Rule, TargetRef};
use mechanism::HoldingQdiscs;
use mechanism::Mechanism;
use shapers::Shapers;
use stream::RelayRule;

/// The port of SSH.
const SSH_PORT: u16 = 22;
/// The default port of the control API.
const API_PORT: u16 = 8474;

/// A rule with its mechanism.
#[derive(Clone, Debug)]
pub struct PlannedRule {
    /// The rule.
    pub rule: Rule,
    /// The same as it is printed.
    pub text: String,
    /// The target's name or text.
    pub target: String,
    /// The resolved target.
    pub resolved: ResolvedTarget,
    /// Its entries for the kernel; more than one for a mix, or one that gives datagrams to the relay.
    pub entries: Vec<PacketRule>,
    /// The rule for the relay, if it has a stream fault.
    pub stream: Option<RelayRule>,
    /// What the relay does for it over TCP, if it answers DNS queries.
    pub over_tcp: Option<RelayRule>,
    /// Whether the relay replaces a mechanism that holds packets, because none is available.
    pub stands_in: bool,
    /// The mechanism that holds its packets, if it holds any.
    pub held_by: Mechanism,
}

impl PlannedRule {
    /// Whether it is a stream rule that gets the packets of datagrams.
    #[must_use]
    pub fn takes_datagrams(&self) -> bool {
        let stream = self.stream.as_ref();
        stream.is_some_and(|stream| stream.acts_on(Transport::Udp))
    }

    /// The DNS queries over TCP that it answers, if it does.
    #[must_use]
    pub fn queries(&self) -> Option<&Queries> {
        self.over_tcp.as_ref().and_then(RelayRule::queries)
    }

    /// The mechanism of the rule. `hooks` names the attachment, if known.
    #[must_use]
    pub fn mechanism(&self, hooks: Option<String>) -> String {
        let tc = hooks.unwrap_or_else(|| "tc".to_owned());
        if self.stands_in {
            return "relay (connect hook), as there is no tap device, fq or netem".to_owned();
        }
        if let Some(stream) = &self.stream {
            let by = match (stream.acts_on(Transport::Tcp), self.takes_datagrams()) {
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
        let relayed = self.over_tcp.as_ref().map(|_| "relay (connect hook)");
        held.into_iter()
            .chain(relayed)
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
    /// The random seed.
    pub seed: u64,
    /// The rules in their order.
    pub rules: Vec<PlannedRule>,
    /// What reads DNS responses, when rules are aimed at names or at DNS queries. It comes after all rules.
    pub learner: Option<PacketRule>,
    /// The preferred mechanism to hold packets.
    pub held_by: Mechanism,
}

impl Plan {
    /// Plans `rules`, limited to `scope` if there is one. All rules end after `length_ns`.
    ///
    /// # Errors
    /// A fault is unsupported, or there are too many rules.
    pub fn new(
        rules: &[(Rule, ResolvedRule)],
        seed: u64,
        scope: Option<&CgroupScope>,
        length_ns: Option<u64>,
    ) -> Result<Self> {
        let mut planned = Vec::with_capacity(rules.len());
        let mut states = 0;
        for (ordinal, (rule, resolved)) in (0_u32..).zip(rules) {
            let (mut entries, mut stream) = (Vec::new(), None);
            if resolved.fault.layer() == Layer::Stream {
                let given = stream.insert(RelayRule::of_stream(ended(resolved, length_ns))?);
                if given.acts_on(Transport::Udp) {
                    let number = relay_number(&planned, &given.resolved.target);
                    entries.push(packet::to_relay(&given.resolved, number, states, scope));
                }
            } else {
                entries = packet::compile(resolved, seed, ordinal, states, scope)?;
                if let Some(length_ns) = length_ns {
                    for rule in &mut entries {
                        packet::end_at(&mut rule.entry, length_ns);
                    }
                }
            }
            states += u32::try_from(entries.len())?;
            planned.push(PlannedRule {
                rule: rule.clone(),
                text: rule.to_string(),
                target: resolved.name.clone(),
                resolved: resolved.target.clone(),
                over_tcp: RelayRule::of_queries(&ended(resolved, length_ns), &entries),
                entries,
                stands_in: stream.is_some() && rule.fault.layer() == Layer::Packet,
                stream,
                held_by: Mechanism::default(),
            });
        }
        let entries: Vec<_> = planned.iter().flat_map(|rule| &rule.entries).collect();
        let has_names = entries.iter().any(|rule| rule.name.is_some());
        let has_questions = entries.iter().any(|rule| rule.question.is_some());
        let streams = planned.iter().filter(|rule| rule.stream.is_some());
        let names: Vec<_> = streams
            .filter_map(|rule| rule.resolved.name.clone())
            .collect();
        let mut plan = Self {
            seed,
            learner: (has_names || has_questions)
                .then(|| packet::learner(states, scope, has_names)),
            rules: planned,
            held_by: Mechanism::default(),
        };
        plan.learn(names, scope);
        Ok(plan)
    }

    /// Has the addresses of further names learned, from the responses in `scope`: those that other programs match by.
    pub fn learn(&mut self, names: impl IntoIterator<Item = String>, scope: Option<&CgroupScope>) {
        let names: BTreeSet<_> = names.into_iter().collect();
        if names.is_empty() {
            return;
        }
        // Each entry has one.
        let states: usize = self.rules.iter().map(|rule| rule.entries.len()).sum();
        let state = u32::try_from(states).unwrap_or(u32::MAX);
        let learner = self
            .learner
            .get_or_insert_with(|| packet::learner(state, scope, true));
        if !learner.protocols.contains(&tables::ProtocolClass::Udp) {
            learner.protocols.push(tables::ProtocolClass::Udp);
        }
        learner.learned.extend(names);
    }

    /// Sets the mechanism that holds packets; default: the delay line.
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

    /// The qdiscs that hold packets.
    ///
    /// # Errors
    /// There are more different delays than netem supports.
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
                        "netem supports at most {LEAVES} different delays, sums of delays included: use --mechanism \
                         fq, or leave --mechanism out"
                    );
                };
                Some(HoldingQdiscs::Netem(delays_ns))
            }
            _ => None,
        })
    }

    /// Whether a rule needs the delay line.
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

    /// Whether super-packets may have to be divided.
    #[must_use]
    pub fn divides(&self) -> bool {
        Needs::of(&self.entries()).divides()
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

    /// The stream rules, each with its index among all rules.
    #[must_use]
    pub fn stream_rules(&self) -> Vec<(usize, &RelayRule)> {
        let rules = self.rules.iter().enumerate();
        rules
            .filter_map(|(index, rule)| Some((index, rule.stream.as_ref()?)))
            .collect()
    }

    /// The rules that the relay applies, each with its index among all rules: stream rules, then what packet rules do over
    /// TCP. Of several targets that a connection fits the first one gets it, which is that of a stream rule if there is one.
    #[must_use]
    pub fn relay_rules(&self) -> Vec<(usize, &RelayRule)> {
        let rules = self.rules.iter().enumerate();
        let over_tcp = rules.filter_map(|(index, rule)| Some((index, rule.over_tcp.as_ref()?)));
        self.stream_rules().into_iter().chain(over_tcp).collect()
    }

    /// Leaves DNS queries over TCP alone, where the relay can't be used for them.
    pub fn leave_tcp(&mut self) {
        for rule in &mut self.rules {
            rule.over_tcp = None;
        }
    }

    /// The DNS messages over TCP that the relay could not read.
    #[must_use]
    pub fn unread_over_tcp(&self) -> u64 {
        let queries = self.rules.iter().filter_map(PlannedRule::queries);
        // Rules read the same messages.
        queries.map(Queries::unread).max().unwrap_or(0)
    }

    /// Whether a rule would match queries or read answers of DNS over TCP, which only the relay does.
    #[must_use]
    pub fn misses_tcp(&self) -> bool {
        let learns = |rule: &PacketRule| rule.name.is_some() || !rule.learned.is_empty();
        let mut rules = self.rules.iter();
        self.entries().iter().any(learns)
            || rules.any(|rule| rule.resolved.question.is_some() && rule.over_tcp.is_none())
    }

    /// The rates and slots for the delay line, by the rules' states.
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

/// The relay's number for the datagrams of a target: the index of the first rule with datagrams.
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
    // With a period and no duty, `for` is the length of each window; such a rule ends with the command.
    if let Some(length_ns) = length_ns
        && (modifiers.period_ns.is_none() || modifiers.duty.is_some())
    {
        let left_ns = length_ns.saturating_sub(modifiers.at_ns);
        modifiers.for_ns = Some(modifiers.for_ns.map_or(left_ns, |ns| ns.min(left_ns)));
    }
    rule
}

/// Rejects rules for the whole host that would cut SSH or the control API on `api_port` (default: its usual port).
///
/// # Errors
/// The first such rule.
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
            "`{rule}` matches {} on the whole host: {help}, or give --force",
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

#[cfg(test)]
pub(crate) mod testing {
    use super::Plan;
    use crate::rule::{Rule, SystemResolver, Targets};

    /// A plan of these rules, with 1 as the seed.
    pub(crate) fn plan(texts: &[&str]) -> Plan {
        let rules: Vec<_> = texts
            .iter()
            .map(|text| {
                let rule: Rule = text.parse().unwrap();
                let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
                (rule, resolved)
            })
            .collect();
        Plan::new(&rules, 1, None, None).unwrap()
    }
}
