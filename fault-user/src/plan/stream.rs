//! Checks that stream rules are supported, and computes which connections their counts select.

use anyhow::{Result, bail};
use fault_common::abi::RuleEntry;
use fault_common::dns;
use fault_common::random::rule_key;

use super::packet;
use super::tables::PacketRule;
use crate::relay::{Datagrams, GreetingFilter, Picked, Queries, RelayFault, Transport};
use crate::rule::{
    Acts, Bounds, CountScope, Direction, Fault, Modifiers, Protocol, ResolvedRule, ResolvedTarget,
    Triggers,
};

/// Distinguishes the keys of queries over TCP from those over UDP.
const TCP_SALT: u32 = 0x7463_7000;

/// Checks that a stream rule is supported.
///
/// # Errors
/// One line.
pub fn check(rule: &ResolvedRule) -> Result<()> {
    let name = rule.fault.name();
    match rule.target.protocol {
        Protocol::Icmp => bail!(
            "`{name}` does not support ICMP: use a packet fault such as `loss`, `delay` or `rate`"
        ),
        Protocol::Udp if !RelayFault::of_rule(&rule.fault)?.acts_on(Transport::Udp) => {
            bail!("`{name}` does not support UDP: `fault help rules` lists the faults that do")
        }
        _ => {}
    }
    if rule.target.ports.is_empty() && rule.target.protocol != Protocol::Udp {
        bail!("`{name}` needs the port of a service, such as tcp:5432");
    }
    if rule.target.question.is_some() {
        bail!(
            "`{}` works on streams and datagrams, not on the queries of DNS alone",
            rule.fault.name()
        );
    }
    RelayFault::of_rule(&rule.fault)?;
    if rule.modifiers.size.is_some() {
        bail!("`size` selects packets, but `{name}` is a stream fault: leave `size` out");
    }
    modifiers(&rule.fault, &rule.modifiers)
}

/// A modifier is applied or rejected, never ignored.
fn modifiers(fault: &Fault, modifiers: &Modifiers) -> Result<()> {
    let plain = Modifiers::default();
    let name = fault.name();
    if fault.part_that(Acts::OnService).is_some() {
        let picking = [
            ("p", modifiers.probability != plain.probability),
            ("conn", modifiers.connections.is_some()),
            (
                modifiers.asked.key().unwrap_or_default(),
                !modifiers.asked.is_empty(),
            ),
            ("a count", !modifiers.triggers.is_empty()),
            ("dir", modifiers.direction != plain.direction),
        ];
        if let Some((key, _)) = picking.iter().find(|(_, given)| *given) {
            bail!(
                "`{name}` applies to the whole service and can't be limited by {key}: leave it out"
            );
        }
    }
    if modifiers.direction != Direction::Both
        && let Some(part) = fault.part_that(Acts::OnRequests)
    {
        let name = part.name();
        bail!("`{name}` applies to requests together with their answers: leave `dir` out");
    }
    Ok(())
}

/// A rule that the relay applies.
#[derive(Clone, Debug)]
pub struct RelayRule {
    /// The rule with its names looked up.
    pub resolved: ResolvedRule,
    /// What the relay does for it.
    pub fault: RelayFault,
}

impl RelayRule {
    /// A stream rule.
    ///
    /// # Errors
    /// As [`check`].
    pub fn of_stream(rule: ResolvedRule) -> Result<Self> {
        check(&rule)?;
        Ok(Self {
            fault: RelayFault::of_rule(&rule.fault)?,
            resolved: rule,
        })
    }

    /// What the relay does for a packet rule with these entries: it answers the DNS queries over TCP that the programs
    /// would answer over UDP. `None` if there are none.
    #[must_use]
    pub fn of_queries(rule: &ResolvedRule, entries: &[PacketRule]) -> Option<Self> {
        let question = rule.target.question.as_ref()?;
        let entries = entries.iter().map(|part| RuleEntry {
            // Other draws than those over UDP.
            key: rule_key(part.entry.key, TCP_SALT),
            mix_key: rule_key(part.entry.mix_key, TCP_SALT),
            // The relay has the rule only while its window is open.
            at_ns: 0,
            length_ns: 0,
            period_ns: 0,
            ..part.entry
        });
        let fault = RelayFault::Queries(Queries::answered(question, entries)?);
        let resolved = ResolvedRule {
            name: format!("tcp:{}", dns::PORT),
            target: ResolvedTarget {
                protocol: Protocol::Tcp,
                question: None,
                ..rule.target.clone()
            },
            server: None,
            modifiers: Modifiers {
                direction: Direction::ToServer,
                ..packet::times(&rule.modifiers)
            },
            fault: rule.fault.clone(),
        };
        Some(Self { resolved, fault })
    }

    /// The DNS queries that it answers, if it does.
    #[must_use]
    pub const fn queries(&self) -> Option<&Queries> {
        match &self.fault {
            RelayFault::Queries(queries) => Some(queries),
            _ => None,
        }
    }

    /// Whether it acts on the relay of this transport.
    #[must_use]
    pub fn acts_on(&self, transport: Transport) -> bool {
        let is_aimed = match self.resolved.target.protocol {
            Protocol::Any => true,
            Protocol::Tcp => transport == Transport::Tcp,
            Protocol::Udp | Protocol::Dns => transport == Transport::Udp,
            Protocol::Icmp => false,
        };
        // What clients ask for is read from TCP only.
        let is_read = transport == Transport::Tcp || self.resolved.modifiers.asked.is_empty();
        is_aimed && is_read && self.fault.acts_on(transport)
    }
}

/// The datagrams that a rule selects by counting.
#[must_use]
pub fn datagrams(modifiers: &Modifiers, transport: Transport) -> Option<Datagrams> {
    let triggers = &modifiers.triggers;
    if transport == Transport::Tcp || triggers.is_empty() {
        return None;
    }
    let bounds = triggers.bounds();
    Some(Datagrams {
        picked: Picked {
            first: bounds.first,
            last: bounds.last,
            step: triggers.step(),
            base: 0,
        },
        count_all: modifiers.count == CountScope::PerRule,
    })
}

/// The connections that a rule selects by what their clients ask for. A rule for a host does not apply to clients that
/// ask for another one at the same address.
#[must_use]
pub fn filter(rule: &ResolvedRule, transport: Transport) -> GreetingFilter {
    if transport == Transport::Udp {
        return GreetingFilter::default();
    }
    GreetingFilter {
        asked: rule.modifiers.asked.clone(),
        server: rule.server.clone(),
    }
}

/// The connections that a rule selects. Its counts count those that `conn` selects.
#[must_use]
pub fn connections(modifiers: &Modifiers, transport: Transport) -> Picked {
    let allowed = modifiers.connections.unwrap_or(Bounds {
        first: 1,
        last: Bounds::OPEN,
    });
    let base = allowed.first.saturating_sub(1);
    let triggers = match transport {
        Transport::Tcp => modifiers.triggers,
        Transport::Udp => Triggers::default(),
    };
    let counted = triggers.bounds();
    Picked {
        first: base.saturating_add(counted.first),
        last: base.saturating_add(counted.last).min(allowed.last),
        step: triggers.step(),
        base,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Rule, SystemResolver, Targets};

    fn resolved(text: &str) -> ResolvedRule {
        let rule: Rule = text.parse().unwrap();
        rule.resolve(&Targets::new(), &mut SystemResolver).unwrap()
    }

    #[test]
    fn counts_pick_connections() {
        let picked = |text: &str| {
            let picked = connections(
                &resolved(&format!("tcp:1 latency=1s {text}")).modifiers,
                Transport::Tcp,
            );
            (1..=9).filter(|n| picked.has(*n)).collect::<Vec<_>>()
        };
        assert_eq!(picked(""), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(picked("conn=2..4"), [2, 3, 4]);
        assert_eq!(picked("conn=8.."), [8, 9]);
        assert_eq!(picked("first=2"), [1, 2]);
        assert_eq!(picked("nth=3 count=rule"), [3]);
        assert_eq!(picked("every=3"), [3, 6, 9]);
        assert_eq!(picked("conn=4..8 every=2"), [5, 7]);
        assert_eq!(picked("conn=4..6 after=1"), [5, 6]);
    }

    #[test]
    fn no_modifier_is_ignored() {
        for (text, expected) in [
            ("tcp:1 no_accept p=50%", "leave it out"),
            ("tcp:1 no_accept conn=2", "conn"),
            ("tcp:1 close nth=2", "a count"),
            ("tcp:1 no_accept sni=a.example", "sni"),
            ("tcp:1 close dir=to-server", "dir"),
            ("tcp:1 error=http dir=to-client", "`error`"),
            ("tcp:1 mix 10%:abort dir=to-client", "`abort`"),
            ("tcp:1 mix 10%:no_accept", "part of a mix"),
            ("tcp:1 mix 10%:loss=5% 10%:latency=1s", "`loss`"),
        ] {
            let error = check(&resolved(text)).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for text in [
            "tcp:1 no_accept at=1s for=1s",
            "tcp:1 error=http p=10% conn=1..3 every=2 period=2s duty=50%",
            "tcp:1 mix 10%:latency=1s 10%:timeout dir=to-client reconnect",
        ] {
            check(&resolved(text)).unwrap();
        }
    }
}
