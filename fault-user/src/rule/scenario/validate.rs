//! What must fit together in a scenario.

use super::super::fault::Fault;
use super::super::modifier::{CountScope, Direction};
use super::super::target::{Host, Protocol, Target, TargetRef};
use super::super::timeline::windows;
use super::super::units::{PPM, show_duration};
use super::super::{Modifiers, PortRange, Rule, horizon_ns};
use super::{Scenario, Segment};

/// Something that does not fit, with its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    /// The path to the value.
    pub path: Vec<Segment>,
    /// What is wrong, in one line.
    pub message: String,
}

/// A flaw at a path of keys and indices.
fn flaw(path: impl Into<Vec<Segment>>, message: impl Into<String>) -> Flaw {
    Flaw {
        path: path.into(),
        message: message.into(),
    }
}

/// A step into a field.
fn key(name: &str) -> Segment {
    Segment::Key(name.to_owned())
}

impl Scenario {
    /// Everything that does not fit together, in the order of the file.
    pub(super) fn flaws(&self) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            let path = vec![key("rules"), Segment::Index(index)];
            flaws.extend(self.rule_flaw(rule, path));
        }
        flaws.extend(self.contradiction());
        self.expect_flaws(&mut flaws);
        self.random_flaws(&mut flaws);
        flaws
    }

    /// What is wrong with one rule among the targets and within the scenario's length.
    fn rule_flaw(&self, rule: &Rule, mut path: Vec<Segment>) -> Option<Flaw> {
        let target = match rule.target_in(&self.targets) {
            Ok(target) => target,
            Err(error) => return Some(flaw(path, error.one_line())),
        };
        if let Some(complaint) = rule.complaint(Some(&target)) {
            return Some(flaw(path, complaint.one_line()));
        }
        let length = self.length?.0;
        if rule.modifiers.at_ns < length {
            return None;
        }
        path.push(key("at"));
        let (at, end) = (show_duration(rule.modifiers.at_ns), show_duration(length));
        Some(flaw(
            path,
            format!(
                "the rule starts at {at}, but the scenario ends at {end}: expected an earlier `at` or a longer `for`"
            ),
        ))
    }

    /// The first pair of rules that decide differently about the same traffic at the same time.
    fn contradiction(&self) -> Option<Flaw> {
        let horizon = self
            .length
            .map_or_else(|| horizon_ns(&self.rules), |length| length.0);
        let decided: Vec<_> = self
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| decides(rule))
            .filter_map(|(index, rule)| Some((index, rule, rule.target_in(&self.targets).ok()?)))
            .collect();
        for (nth, (second, b, b_target)) in decided.iter().enumerate() {
            for (first, a, a_target) in &decided[..nth] {
                let same = a.fault == b.fault;
                let meet = meeting(&a.modifiers, &b.modifiers, horizon);
                let Some((start, end)) = meet.filter(|_| !same && overlap(a_target, b_target))
                else {
                    continue;
                };
                let until = if end >= horizon {
                    "on".to_owned()
                } else {
                    format!("to {}", show_duration(end))
                };
                return Some(flaw(
                    [key("rules"), Segment::Index(*second)],
                    format!(
                        "contradicts rules[{first}]: from {} {until} `{}` and `{}` both decide about all of this traffic: expected other times, directions or targets",
                        show_duration(start),
                        a.fault,
                        b.fault,
                    ),
                ));
            }
        }
        None
    }

    /// What is wrong with the expectations.
    fn expect_flaws(&self, flaws: &mut Vec<Flaw>) {
        let aimed = |name: &str| {
            self.rules
                .iter()
                .any(|rule| rule.target.to_string() == name)
        };
        let drawn = |name: &str| {
            let choices = self.random.iter().flat_map(|random| &random.choices);
            choices
                .into_iter()
                .any(|choice| choice.rule.target.to_string() == name)
        };
        for (index, name) in self.expect.fired.iter().enumerate() {
            let path = [key("expect"), key("fired"), Segment::Index(index)];
            if !aimed(name) && !drawn(name) {
                flaws.push(flaw(path, format!("no rule is aimed at `{name}`, so none can fire: expected the target of a rule")));
            }
        }
        for (field, name) in self.expect.names() {
            if let Err(message) = self.known(name) {
                flaws.push(flaw([key("expect"), key(field), key(name)], message));
            }
        }
        for name in self.expect.recovers_within.keys() {
            if !aimed(name) && !drawn(name) {
                let path = [key("expect"), key("recovers_within"), key(name)];
                flaws.push(flaw(
                    path,
                    format!("no rule is aimed at `{name}`: there is nothing to recover from"),
                ));
            }
        }
        for (name, while_) in &self.expect.no_traffic_while {
            let faulted = while_.faulted.as_deref().unwrap_or(name);
            if !aimed(faulted) && !drawn(faulted) {
                let path = [key("expect"), key("no_traffic_while"), key(name)];
                flaws.push(flaw(
                    path,
                    format!("no rule is aimed at `{faulted}`: there is no while"),
                ));
            }
        }
    }

    /// Whether a name of an expectation is a target's, or a target written out.
    fn known(&self, name: &str) -> Result<(), String> {
        let target: TargetRef = name
            .parse()
            .map_err(|error: super::super::RuleError| error.one_line())?;
        let rule = Rule {
            target,
            fault: Fault::Drop,
            modifiers: Modifiers::default(),
        };
        rule.target_in(&self.targets)
            .map(|_| ())
            .map_err(|mut error| {
                name.clone_into(&mut error.input);
                error.one_line()
            })
    }

    /// What is wrong with the drawn faults.
    fn random_flaws(&self, flaws: &mut Vec<Flaw>) {
        let Some(random) = &self.random else {
            return;
        };
        let at = |field: &str| [key("random"), key(field)];
        if random.choices.iter().all(|choice| choice.weight == 0) {
            flaws.push(flaw(
                at("choices"),
                "there is nothing to draw: expected a rule with a weight of at least 1",
            ));
        }
        for (index, choice) in random.choices.iter().enumerate() {
            let mut path = at("choices").to_vec();
            path.push(Segment::Index(index));
            let times = &choice.rule.modifiers;
            if times.at_ns != 0 || times.for_ns.is_some() || times.period_ns.is_some() {
                flaws.push(flaw(
                    path,
                    "the times of this rule are drawn: expected no at, for, period or duty",
                ));
            } else {
                flaws.extend(self.rule_flaw(&choice.rule, path));
            }
        }
        if random.length.least == 0 {
            flaws.push(flaw(
                at("length"),
                "a fault of 0 never acts: expected more than 0",
            ));
        }
        if random.at_a_time == 0 {
            flaws.push(flaw(
                at("at_a_time"),
                "nothing would ever act: expected 1 or more",
            ));
        }
        if random.quiet.least.saturating_add(random.length.least) > random.total.0 {
            flaws.push(flaw(
                at("total"),
                "not even one fault fits into this time: expected a longer one",
            ));
        }
        if random.connections.is_some_and(|share| share.0 == 0) {
            flaws.push(flaw(
                at("connections"),
                "nothing would ever be touched: expected more than 0%",
            ));
        }
    }
}

/// Whether a rule alone decides about all traffic of its target while it acts.
fn decides(rule: &Rule) -> bool {
    let all = rule.modifiers.probability == PPM
        && rule.modifiers.triggers.is_empty()
        && rule.modifiers.count == CountScope::PerConnection
        && rule.modifiers.connections.is_none()
        && rule.modifiers.packets.is_empty()
        && rule.modifiers.size.is_none();
    let verdict = matches!(
        rule.fault,
        Fault::Drop
            | Fault::Blackhole
            | Fault::Reject { .. }
            | Fault::Reset { .. }
            | Fault::Down
            | Fault::NoAccept
            | Fault::Stall
            | Fault::Discard
            | Fault::Timeout { .. }
            | Fault::ResetPeer { .. }
            | Fault::Error(_)
            | Fault::Abort
    );
    all && verdict
}

/// The most windows of each rule that are compared.
const MAX_WINDOWS: usize = 10_000;

/// The first time in which two rules act on the same direction.
fn meeting(a: &Modifiers, b: &Modifiers, horizon: u64) -> Option<(u64, u64)> {
    let both = |d: Direction| d == Direction::Both;
    if a.direction != b.direction && !both(a.direction) && !both(b.direction) {
        return None;
    }
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
    protocol && hosts && ports
}
