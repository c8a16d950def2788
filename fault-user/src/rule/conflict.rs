//! Rules of one set that can't both mean what they say.
//!
//! Packets pass the rules in order, and what several of them do adds up. So most pairs are sound, such as a loss on
//! everything beside a delay of one service. Three are not: rules that both alone decide about the same traffic, and
//! differently; a rule behind one that lets nothing through to it; and two values of a fault, for the very same traffic, of
//! which there can be but one. What a modifier picks (`p`, `first`, `match`, …) is never such a conflict.

use super::faults::{Fault, Overlap};
use super::modifier::{CountScope, Direction};
use super::spec::Layer;
use super::target::{Host, Protocol, Target, Targets};
use super::timeline::{horizon_ns, windows};
use super::units::{PPM, show_duration};
use super::{Modifiers, PortRange, Rule};

/// The most windows of each rule that are compared.
const MAX_WINDOWS: usize = 10_000;

/// Two rules that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The place of the earlier rule.
    pub first: usize,
    /// The place of the later one, which is to be changed.
    pub second: usize,
    /// Why: a clause whose subject is the first, with what was expected.
    pub why: String,
}

/// A rule with what its target stands for.
struct Aimed<'a> {
    place: usize,
    rule: &'a Rule,
    target: Target,
}

/// The first two rules that do not fit together, of those whose targets are known. Where `length_ns` is not given the rules
/// last for as long as any of them.
#[must_use]
pub fn find(rules: &[&Rule], targets: &Targets, length_ns: Option<u64>) -> Option<Conflict> {
    let owned: Vec<Rule>;
    let horizon = if let Some(length) = length_ns {
        length
    } else {
        owned = rules.iter().map(|rule| (*rule).clone()).collect();
        horizon_ns(&owned)
    };
    let aimed: Vec<Aimed<'_>> = rules
        .iter()
        .enumerate()
        .filter_map(|(place, rule)| {
            let target = rule.target_in(targets).ok()?;
            Some(Aimed {
                place,
                rule,
                target,
            })
        })
        .collect();
    aimed.iter().enumerate().find_map(|(nth, second)| {
        aimed[..nth].iter().find_map(|first| {
            let why = between(first, second, horizon)?;
            Some(Conflict {
                first: first.place,
                second: second.place,
                why,
            })
        })
    })
}

/// What is wrong with a rule behind another.
fn between(first: &Aimed<'_>, second: &Aimed<'_>, horizon: u64) -> Option<String> {
    let (a, b) = (&first.rule.modifiers, &second.rule.modifiers);
    let apart = !directions_meet(a, b) || !overlap(&first.target, &second.target);
    if apart || a.are_selective() || first.rule.fault == second.rule.fault {
        return None;
    }
    let (start, end) = meeting(a, b, horizon)?;
    let until = if end >= horizon {
        "on".to_owned()
    } else {
        format!("to {}", show_duration(end))
    };
    let from = format!("from {} {until}", show_duration(start));
    let (x, y) = (&first.rule.fault, &second.rule.fault);
    let all = !b.are_selective();
    if all && decides(x) && decides(y) {
        return Some(format!(
            "contradicts this rule: {from} `{x}` and `{y}` both decide about all of this traffic: expected other times, directions or targets"
        ));
    }
    let covered = covers(&first.target, &second.target) && all_within(b, a, horizon);
    if covered
        && x.overlap() == Overlap::Swallows
        && matches!(y.layer(), Layer::Packet | Layer::Either)
    {
        return Some(format!(
            "leaves no packets for this rule: whenever `{y}` acts, `{x}` has already dropped or rejected each packet: expected this rule before that one, or other times"
        ));
    }
    let same = covers(&first.target, &second.target) && covers(&second.target, &first.target);
    if all && (same || covered && x.overlap() == Overlap::FirstCounts) && is_one_value(x, y) {
        return Some(format!(
            "contradicts this rule: {from} `{x}` and `{y}` are two values for the same traffic: expected one of them, or other times, directions or targets"
        ));
    }
    None
}

impl Modifiers {
    /// Whether the rule is not about all traffic of its target while it acts.
    fn are_selective(&self) -> bool {
        self.probability != PPM
            || !self.triggers.is_empty()
            || self.count != CountScope::PerConnection
            || self.connections.is_some()
            || self.hosts.is_some()
            || !self.asked.is_empty()
            || !self.packets.is_empty()
            || self.size.is_some()
            || self.query_type.is_some()
    }
}

/// Whether a fault alone decides what becomes of the traffic.
fn decides(fault: &Fault) -> bool {
    matches!(fault.overlap(), Overlap::Decides | Overlap::Swallows)
}

/// Whether two faults give different values to what can have but one for the same traffic.
fn is_one_value(a: &Fault, b: &Fault) -> bool {
    let has_one = matches!(a.overlap(), Overlap::OneValue | Overlap::FirstCounts);
    has_one && a.name() == b.name()
}

fn directions_meet(a: &Modifiers, b: &Modifiers) -> bool {
    let both = Direction::Both;
    a.direction == b.direction || a.direction == both || b.direction == both
}

/// The first time in which two rules act.
fn meeting(a: &Modifiers, b: &Modifiers, horizon: u64) -> Option<(u64, u64)> {
    let mut left = windows(a, horizon).take(MAX_WINDOWS).peekable();
    let mut right = windows(b, horizon).take(MAX_WINDOWS).peekable();
    while let (Some((a_start, a_end)), Some((b_start, b_end))) = (left.peek(), right.peek()) {
        let (start, end) = (*a_start.max(b_start), *a_end.min(b_end));
        if start < end {
            return Some((start, end));
        }
        if a_end <= b_end {
            left.next();
        } else {
            right.next();
        }
    }
    None
}

/// Whether a rule acts only while another does, and in no other direction.
fn all_within(inner: &Modifiers, outer: &Modifiers, horizon: u64) -> bool {
    if outer.direction != Direction::Both && outer.direction != inner.direction {
        return false;
    }
    let mut outside = windows(outer, horizon).take(MAX_WINDOWS).peekable();
    windows(inner, horizon)
        .take(MAX_WINDOWS)
        .all(|(start, end)| {
            while outside.next_if(|(_, outer_end)| *outer_end < end).is_some() {}
            outside
                .peek()
                .is_some_and(|(outer_start, _)| *outer_start <= start)
        })
}

/// Whether two targets have traffic in common, as far as that is known without looking names up.
fn overlap(a: &Target, b: &Target) -> bool {
    let protocol = match (a.protocol, b.protocol) {
        (Protocol::Any, other) | (other, Protocol::Any) => {
            other != Protocol::Icmp || (a.ports.is_empty() && b.ports.is_empty())
        }
        (a, b) => a == b,
    };
    let hosts = match (&a.host, &b.host) {
        (None, _) | (_, None) => true,
        (Some(Host::Cidr(a)), Some(Host::Cidr(b))) => a.overlaps(b),
        (Some(a), Some(b)) => a == b,
    };
    let meet = |a: &PortRange, b: &PortRange| a.first <= b.last && b.first <= a.last;
    let ports = a.ports.is_empty()
        || b.ports.is_empty()
        || a.ports.iter().any(|x| b.ports.iter().any(|y| meet(x, y)));
    let excluded = |from: &Target, other| from.except.iter().any(|one| covers(one, other));
    protocol && hosts && ports && !excluded(a, b) && !excluded(b, a)
}

/// Whether all traffic of a target is another's too, as far as that is known without looking names up.
fn covers(outer: &Target, inner: &Target) -> bool {
    let protocol = outer.protocol == inner.protocol
        || outer.protocol == Protocol::Any
            && (inner.protocol != Protocol::Icmp || outer.ports.is_empty());
    let hosts = match (&outer.host, &inner.host) {
        (None, _) => true,
        (Some(Host::Cidr(outer)), Some(Host::Cidr(inner))) => outer.covers(inner),
        (Some(outer), Some(inner)) => outer == inner,
        (Some(_), None) => false,
    };
    let within = |port: &PortRange| {
        let mut ranges = outer.ports.iter();
        ranges.any(|range| range.first <= port.first && port.last <= range.last)
    };
    let ports = outer.ports.is_empty() || !inner.ports.is_empty() && inner.ports.iter().all(within);
    protocol && hosts && ports && outer.except.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with two rules, up to the first colon.
    fn wrong(first: &str, second: &str) -> Option<String> {
        let rules: Vec<Rule> = [first, second]
            .map(|text| text.parse().unwrap_or_else(|error| panic!("{error}")))
            .into();
        let found = find(&[&rules[0], &rules[1]], &Targets::new(), None)?;
        assert_eq!((found.first, found.second), (0, 1));
        found.why.split(':').next().map(str::to_owned)
    }

    #[track_caller]
    fn assert_wrong(first: &str, second: &str, why: &str) {
        assert_eq!(wrong(first, second).as_deref(), Some(why));
    }

    #[track_caller]
    fn assert_sound(first: &str, second: &str) {
        assert_eq!(wrong(first, second), None);
    }

    #[test]
    fn two_that_decide() {
        assert_wrong("tcp:80 down", "tcp:80 blackhole", "contradicts this rule");
        assert_wrong(
            "* drop at=1s",
            "tcp:80 reset for=2s",
            "contradicts this rule",
        );
        assert_wrong("tcp:80 stall", "tcp:80 abort", "contradicts this rule");
        assert_sound("tcp:80 down", "tcp:80 down for=1s");
        assert_sound("tcp:80 down for=2s", "tcp:80 blackhole at=2s");
        assert_sound("tcp:80 down p=50%", "tcp:80 blackhole");
        assert_wrong(
            "dns answer=10.0.0.9",
            "dns nxdomain",
            "contradicts this rule",
        );
        assert_sound("dns answer=10.0.0.9 type=A", "dns answer=[::1] type=AAAA");
    }

    #[test]
    fn one_that_leaves_nothing_to_another() {
        let nothing = "leaves no packets for this rule";
        assert_wrong("tcp:80 blackhole", "tcp:80 loss=1%", nothing);
        assert_wrong("* drop", "udp:53 corrupt=5% p=10%", nothing);
        assert_wrong("10.0.0.0/8 reject", "10.1.0.0/16:80 delay=1s", nothing);
        assert_wrong(
            "tcp:80-90 down at=1s for=5s",
            "tcp:81,85 loss=1% at=2s for=2s",
            nothing,
        );
        assert_wrong(
            "tcp:80 down for=2s period=5s",
            "tcp:80 loss=1% at=500ms for=1s period=5s",
            nothing,
        );
        // The other order, another time or direction, a wider target, the relay: all of these can fire.
        assert_sound("tcp:80 loss=1%", "tcp:80 blackhole");
        assert_sound("tcp:80 down at=2s for=5s", "tcp:80 loss=1%");
        assert_sound("tcp:80 drop dir=to-server", "tcp:80 loss=1%");
        assert_sound("tcp:80 down", "* loss=1%");
        assert_sound("tcp:80 down", "tcp:80 latency=1s");
        assert_sound("tcp:80 drop first=1", "tcp:80 loss=1%");
        assert_sound("any:80 drop", "icmp loss=1%");
    }

    #[test]
    fn two_values_of_one_thing() {
        assert_wrong(
            "tcp:80 rate=1mbit",
            "tcp:80 rate=2mbit",
            "contradicts this rule",
        );
        assert_wrong(
            "tcp:80 delay=1ms",
            "tcp:80 delay=2ms at=3s",
            "contradicts this rule",
        );
        assert_wrong(
            "tcp:80 latency=1ms",
            "tcp:80 latency=2ms",
            "contradicts this rule",
        );
        // The first one shapes what both match, so a narrower one must come first.
        assert_wrong("* rate=1mbit", "tcp:80 rate=2mbit", "contradicts this rule");
        assert_sound("tcp:80 rate=2mbit", "* rate=1mbit");
        assert_sound(
            "tcp:80 rate=1mbit dir=to-server",
            "tcp:80 rate=2mbit dir=to-client",
        );
        // A network's delay and a service's add up, and one packet in ten may be later still.
        assert_sound("* delay=1ms", "tcp:80 delay=2ms");
        assert_sound("tcp:80 delay=1ms", "tcp:80 delay=50ms p=10%");
        assert_sound("tcp:80 delay=1ms", "tcp:80 rate=1mbit");
    }
}
