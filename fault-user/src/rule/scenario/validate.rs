//! What must fit together in a scenario.

use super::super::faults::{Drop, Fault};
use super::super::target::{Protocol, TargetRef};
use super::super::units::show_duration;
use super::super::{Modifiers, PortRange, Rule, RuleError, conflict};
use super::{NoTraffic, Scenario, Segment};

/// Something that does not fit, with its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    /// The path to the value.
    pub path: Vec<Segment>,
    /// What is wrong; without a text where that is not of a rule.
    pub error: RuleError,
}

/// A flaw at a path of keys and indices.
fn flaw(path: impl Into<Vec<Segment>>, message: impl AsRef<str>) -> Flaw {
    Flaw {
        path: path.into(),
        error: RuleError::of_line(String::new(), message.as_ref()),
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
        flaws.extend(self.conflict());
        self.expect_flaws(&mut flaws);
        self.random_flaws(&mut flaws);
        flaws
    }

    /// What is wrong with one rule among the targets and within the scenario's length.
    fn rule_flaw(&self, rule: &Rule, mut path: Vec<Segment>) -> Option<Flaw> {
        let target = match rule.target_in(&self.targets) {
            Ok(target) => target,
            Err(error) => return Some(Flaw { path, error }),
        };
        if let Some(complaint) = rule.complaint(Some(&target)) {
            return Some(flaw(path, complaint.one_line()));
        }
        if let Err(error) = rule.expanded(&self.profiles) {
            return Some(Flaw { path, error });
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

    /// The first two rules that can't both mean what they say.
    fn conflict(&self) -> Option<Flaw> {
        // Where a profile is unknown a flaw says so.
        let expanded = self.rules.iter().enumerate().flat_map(|(place, rule)| {
            let rules = rule.expanded(&self.profiles).unwrap_or_default();
            rules.into_iter().map(move |rule| (place, rule))
        });
        let (places, rules): (Vec<usize>, Vec<Rule>) = expanded.unzip();
        let rules: Vec<&Rule> = rules.iter().collect();
        let length_ns = self.length.map(|length| length.0);
        let found = conflict::find(&rules, &self.targets, length_ns)?;
        let (first, second) = (places[found.first], places[found.second]);
        let path = [key("rules"), Segment::Index(second)];
        Some(flaw(path, format!("rules[{first}] {}", found.why)))
    }

    /// What is wrong with the expectations.
    fn expect_flaws(&self, flaws: &mut Vec<Flaw>) {
        for (index, name) in self.expect.fired.iter().enumerate() {
            let path = [key("expect"), key("fired"), Segment::Index(index)];
            if !self.is_aimed_at(name) {
                flaws.push(flaw(path, format!("no rule is aimed at `{name}`, so none can fire: expected the target of a rule")));
            }
        }
        let mut at = |field: &str, name: &str, wrong: Option<String>| {
            flaws.extend(wrong.map(|why| flaw([key("expect"), key(field), key(name)], why)));
        };
        for (field, name) in self.expect.names() {
            at(field, name, self.unwatched(field, name));
        }
        for name in self.expect.recovers_within.keys() {
            at("recovers_within", name, self.never_recovers(name));
        }
        for (name, quiet) in &self.expect.no_traffic_while {
            at("no_traffic_while", name, self.never_quiet(name, quiet));
        }
        for name in self.expect.p99_connect.keys() {
            at("p99_connect", name, self.never_connects(name));
        }
    }

    /// Whether a fault may act on a target.
    fn is_aimed_at(&self, name: &str) -> bool {
        let choices = self.random.iter().flat_map(|random| &random.choices);
        let drawn = choices.map(|choice| &choice.rule);
        let mut rules = self.rules.iter().chain(drawn);
        rules.any(|rule| rule.target.to_string() == name)
    }

    /// The rules that are aimed at a target, with their times as they are written.
    fn aimed_at<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Rule> {
        let rules = self.rules.iter();
        rules.filter(move |rule| rule.target.to_string() == name)
    }

    /// Why a target can't recover as is expected of it.
    fn never_recovers(&self, name: &str) -> Option<String> {
        if !self.is_aimed_at(name) {
            return Some(format!(
                "no rule is aimed at `{name}`: there is nothing to recover from"
            ));
        }
        let lasts = |rule: &&Rule| {
            let times = rule.modifiers.schedule();
            times.end_ns.is_none() && times.on_ns.is_none()
        };
        if let Some(rule) = self.aimed_at(name).find(lasts)
            && self.length.is_none()
        {
            return Some(format!(
                "`{rule}` never ends, so there is nothing to recover from: expected a `for` of that rule or of the scenario"
            ));
        }
        let closed = self.expect.max_open.get(name) == Some(&0);
        let no_connection = closed.then(|| "max_open allows no connection".to_owned());
        self.never_connects(name).or_else(|| {
            no_connection.map(|why| {
                format!("{why}, and nothing comes back without one: expected more there")
            })
        })
    }

    /// Why there is no connect to a target where one is expected.
    fn never_connects(&self, name: &str) -> Option<String> {
        let none = self.expect.max_connects.get(name) == Some(&0);
        let never = self.expect.connect_rate.get(name);
        let field = if none {
            "max_connects"
        } else if never.is_some_and(|rate| rate.count == 0) {
            "connect_rate"
        } else {
            return None;
        };
        Some(format!(
            "{field} allows no connect to `{name}`, and this needs one: expected more there"
        ))
    }

    /// Why nothing is checked of the quiet that is expected of a target.
    fn never_quiet(&self, name: &str, quiet: &NoTraffic) -> Option<String> {
        let faulted = quiet.faulted.as_deref().unwrap_or(name);
        if !self.is_aimed_at(faulted) {
            return Some(format!(
                "no rule is aimed at `{faulted}`: there is no while"
            ));
        }
        // Faults of several rules may follow on each other, as one.
        let mut lasts_ns: u64 = 0;
        for rule in self.aimed_at(faulted) {
            lasts_ns = lasts_ns.saturating_add(rule.modifiers.schedule().on_ns?);
        }
        (lasts_ns <= quiet.after.0 && self.random.is_none()).then(|| {
            format!(
                "no fault of `{faulted}` lasts longer than {}, so nothing would be checked: expected a time shorter than that",
                show_duration(lasts_ns)
            )
        })
    }

    /// What keeps a target, by name or written out, from being watched for the expectation `field`.
    fn unwatched(&self, field: &str, name: &str) -> Option<String> {
        let target: TargetRef = match name.parse() {
            Ok(target) => target,
            Err(error) => return Some(error.one_line()),
        };
        let rule = Rule {
            target,
            fault: Fault::Drop(Drop),
            modifiers: Modifiers::default(),
        };
        match rule.target_in(&self.targets) {
            Ok(target) => not_watchable(field, name, target.protocol, &target.ports),
            Err(mut error) => {
                name.clone_into(&mut error.input);
                Some(error.one_line())
            }
        }
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

/// Why what the expectation `field` is about can't be seen of a target.
#[must_use]
pub fn not_watchable(
    field: &str,
    name: &str,
    protocol: Protocol,
    ports: &[PortRange],
) -> Option<String> {
    let goes_by_traffic = matches!(field, "recovers_within" | "no_traffic_while");
    if ports.is_empty() || protocol == Protocol::Icmp {
        Some(format!(
            "`{name}` is no service with a port: expected such as tcp:5432"
        ))
    } else if protocol == Protocol::Udp && !goes_by_traffic {
        Some(format!(
            "connections are counted for services of TCP, and `{name}` is none: expected such as tcp:5432"
        ))
    } else {
        None
    }
}
