//! Checks the expectations of a scenario.

use anyhow::{Context as _, Result};

use super::file::Expectation;
use crate::inject::injection::Hits;
use crate::plan::Plan;
use crate::rule::scenario::{During, Expect, NoTraffic, Probe, not_watchable};
use crate::rule::units::show_duration;
use crate::rule::{ResolvedRule, ResolvedTarget, Rule, SystemResolver, Targets, windows};
use crate::sys::process::command::Ended;
use crate::watch::history::{History, Seen};
use crate::watch::probe::{self, Try};

const MS_NS: u64 = 1_000_000;
const US_NS: u64 = 1000;

/// The kind of an expectation of an exit code.
pub const EXIT: &str = "exit";

/// Resolves the targets of expectations, each once.
///
/// # Errors
/// A target is not a TCP service, or has no fault although an expectation waits for one.
pub fn targets(
    expect: &Expect,
    rules: &[(Rule, ResolvedRule)],
    known: &Targets,
) -> Result<Vec<(String, ResolvedTarget)>> {
    let mut found: Vec<(String, ResolvedTarget)> = Vec::new();
    for (field, name) in expect.names() {
        let target = look_up(name, rules, known).with_context(|| format!("expect.{field}"))?;
        if let Some(why) = not_watchable(field, name, target.protocol, &target.ports) {
            anyhow::bail!("expect.{field}: {why}");
        }
        if found.iter().all(|(other, _)| other != name) {
            found.push((name.to_owned(), target));
        }
    }
    let recovering = expect
        .recovers_within
        .keys()
        .map(|name| ("recovers_within", name));
    let quiet = expect
        .no_traffic_while
        .iter()
        .map(|(name, quiet)| ("no_traffic_while", quiet.faulted.as_ref().unwrap_or(name)));
    for (field, name) in recovering.chain(quiet) {
        if rules.iter().all(|(_, rule)| rule.name != *name) {
            anyhow::bail!(
                "expect.{field}: no rule has the target `{name}`, so no fault can be waited for"
            );
        }
    }
    Ok(found)
}

fn look_up(name: &str, rules: &[(Rule, ResolvedRule)], known: &Targets) -> Result<ResolvedTarget> {
    let target = if let Some((_, rule)) = rules.iter().find(|(_, rule)| rule.name == name) {
        rule.target.clone()
    } else {
        // A target is looked up as that of a rule.
        let rule: Rule = format!("{name} drop").parse()?;
        rule.resolve(known, &mut SystemResolver)?.target
    };
    if target.question.is_some() {
        anyhow::bail!(
            "`{name}` is DNS queries, and expectations watch services: use `udp:53` for all DNS traffic"
        );
    }
    Ok(target)
}

/// The results of a run.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The rules as written and as resolved.
    pub rules: &'a [(Rule, ResolvedRule)],
    /// The hits of the rules.
    pub hits: &'a [Hits],
    /// The end of the command.
    pub ended: Ended,
    /// The time after which all rules ended, if the scenario sets one.
    pub rules_ns: Option<u64>,
    /// The recorded connections; without targets if not requested.
    pub history: &'a History,
    /// The tries of each probe.
    pub tries: &'a [Vec<Try>],
    /// The last try of each probe after all rules were removed, if it was tried then.
    pub after_removal: &'a [Option<Try>],
}

/// Checks every expectation.
#[must_use]
pub fn verdicts(expect: &Expect, facts: &Facts<'_>) -> Vec<Expectation> {
    let mut verdicts = Vec::new();
    if let Some(code) = expect.exit {
        let found = facts.ended.exit_code();
        verdicts.push(Expectation {
            expected: format!("exit {code}"),
            found: format!("the command ended with {found}"),
            holds: found == code,
            limit: Some(code.into()),
            measured: Some(found.into()),
            ..facts.about(EXIT, None)
        });
    }
    verdicts.extend(expect.fired.iter().map(|name| facts.fired(name)));
    verdicts.extend(facts.counted(expect));
    for (name, limit) in &expect.recovers_within {
        verdicts.push(facts.recovers(name, limit.0));
    }
    for (name, quiet) in &expect.no_traffic_while {
        verdicts.push(facts.quiet(name, quiet));
    }
    for (number, probe) in expect.probe.iter().enumerate() {
        verdicts.push(facts.probed(number, probe));
    }
    for verdict in &mut verdicts {
        if verdict.holds {
            verdict.broke_ms = None;
        }
    }
    verdicts
}

/// The phase of a probe's try, relative to the faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Before,
    During,
    Between,
    After,
}

impl Facts<'_> {
    /// An expectation that is only known at the end, to be filled in.
    fn about(&self, kind: &str, target: Option<&str>) -> Expectation {
        Expectation {
            kind: kind.to_owned(),
            target: target.map(str::to_owned),
            broke_ms: Some(self.history.length_ns / MS_NS),
            ..Expectation::default()
        }
    }

    fn fired(&self, name: &str) -> Expectation {
        let of_target = self.plan.rules.iter().zip(self.hits);
        let fired: u64 = of_target
            .filter(|(rule, _)| rule.target == *name)
            .map(|(_, hits)| hits.stats.hit_packets)
            .sum();
        Expectation {
            expected: format!("{name} fired"),
            found: format!("{fired} packets hit"),
            holds: fired > 0,
            limit: Some(1),
            measured: Some(fired),
            ..self.about("fired", Some(name))
        }
    }

    /// Expectations that limit a figure.
    fn counted(&self, expect: &Expect) -> Vec<Expectation> {
        let seen = |name: &str| self.history.of(name).cloned().unwrap_or_default();
        let mut verdicts = Vec::new();
        for (name, &limit) in &expect.max_connects {
            let seen = seen(name);
            let found = seen.connects.len() as u64;
            let broke_ns = seen.first_connect_above(limit);
            let expected = format!("at most {limit} connects to {name}");
            verdicts.push(self.limited("max_connects", name, expected, (limit, found), broke_ns));
        }
        for (name, rate) in &expect.connect_rate {
            let seen = seen(name);
            let found = seen.busiest(rate.per_ns);
            let broke_ns = seen.first_connect_above_rate(rate.count, rate.per_ns);
            let expected = format!("at most {rate} connects to {name}");
            let mut verdict = self.limited(
                "connect_rate",
                name,
                expected,
                (rate.count, found),
                broke_ns,
            );
            verdict.found += " at the busiest";
            verdicts.push(verdict);
        }
        for (name, &limit) in &expect.max_open {
            let seen = seen(name);
            let (found, broke_ns) = (seen.most_open(), seen.first_open_above(limit));
            let expected = format!("at most {limit} open connections to {name}");
            verdicts.push(self.limited("max_open", name, expected, (limit, found), broke_ns));
        }
        for (name, limit) in &expect.p99_connect {
            verdicts.push(self.p99(name, limit.0, &seen(name)));
        }
        verdicts
    }

    /// The verdict on a limit and the measured figure.
    fn limited(
        &self,
        kind: &str,
        name: &str,
        expected: String,
        (limit, found): (u64, u64),
        broke_ns: Option<u64>,
    ) -> Expectation {
        Expectation {
            expected,
            found: found.to_string(),
            holds: found <= limit,
            limit: Some(limit),
            measured: Some(found),
            broke_ms: broke_ns.map(|ns| ns / MS_NS),
            ..self.about(kind, Some(name))
        }
    }

    fn p99(&self, name: &str, limit_ns: u64, seen: &Seen) -> Expectation {
        let about = Expectation {
            expected: format!(
                "99 of 100 connects to {name} to be answered within {}",
                show_duration(limit_ns)
            ),
            limit: Some(limit_ns / US_NS),
            ..self.about("p99_connect", Some(name))
        };
        let end_ns = self.history.length_ns;
        match seen.p99_connect_ns(end_ns) {
            Some(found) => Expectation {
                found: format!(
                    "it took {}, of {} connects",
                    rounded(found),
                    seen.connects.len()
                ),
                holds: found <= limit_ns,
                measured: Some(found / US_NS),
                broke_ms: seen.p99_broke_ns(limit_ns, end_ns).map(|ns| ns / MS_NS),
                ..about
            },
            None => Expectation {
                found: "there was no connection attempt".to_owned(),
                ..about
            },
        }
    }

    /// The merged windows of a target's faults, or of all faults.
    fn windows(&self, name: Option<&str>) -> Vec<(u64, u64)> {
        let rules = self
            .rules
            .iter()
            .filter(|(_, rule)| name.is_none_or(|name| rule.name == name));
        let horizon = self
            .rules_ns
            .unwrap_or(u64::MAX)
            .min(self.history.length_ns);
        let mut all: Vec<_> = rules
            .flat_map(|(_, rule)| windows(&rule.modifiers, horizon))
            .collect();
        all.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (from, to) in all {
            match merged.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        merged
    }

    fn recovers(&self, name: &str, limit_ns: u64) -> Expectation {
        let seen = self.history.of(name).cloned().unwrap_or_default();
        let about = Expectation {
            expected: format!("{name} to recover within {}", show_duration(limit_ns)),
            limit: Some(limit_ns / US_NS),
            ..self.about("recovers_within", Some(name))
        };
        let ends: Vec<u64> = self
            .windows(Some(name))
            .into_iter()
            .map(|(_, end)| end)
            .filter(|end| *end < self.history.length_ns)
            .collect();
        if ends.is_empty() {
            return Expectation {
                found: "its fault lasted until the command had ended".to_owned(),
                ..about
            };
        }
        let is_late = |end: &&u64| {
            seen.answered_after_ns(**end)
                .is_none_or(|time| time > limit_ns)
        };
        let broke_ns = ends
            .iter()
            .find(is_late)
            .map(|end| end.saturating_add(limit_ns));
        let answers: Option<Vec<u64>> = ends
            .iter()
            .map(|end| seen.answered_after_ns(*end))
            .collect();
        let slowest = answers.and_then(|answers| answers.into_iter().max());
        Expectation {
            holds: slowest.is_some_and(|time| time <= limit_ns),
            found: match slowest {
                Some(time) => format!("first answer {} after the fault", rounded(time)),
                None => "no answer after the fault".to_owned(),
            },
            measured: slowest.map(|time| time / US_NS),
            broke_ms: broke_ns.map(|ns| ns.min(self.history.length_ns) / MS_NS),
            ..about
        }
    }

    fn quiet(&self, name: &str, quiet: &NoTraffic) -> Expectation {
        let faulted = quiet.faulted.as_deref().unwrap_or(name);
        let seen = self.history.of(name).cloned().unwrap_or_default();
        let after = quiet.after.0;
        let first = self
            .windows(Some(faulted))
            .into_iter()
            .find_map(|(from, to)| Some((from, seen.traffic_in(from.saturating_add(after), to)?)));
        Expectation {
            expected: format!(
                "no traffic to {name} from {} after the start of a fault of {faulted}",
                show_duration(after)
            ),
            found: match first {
                Some((from, at)) => format!("there was some after {}", rounded(at - from)),
                None => "there was none".to_owned(),
            },
            holds: first.is_none(),
            limit: Some(after / US_NS),
            measured: first.map(|(from, at)| (at - from) / US_NS),
            broke_ms: first.map(|(_, at)| at / MS_NS),
            ..self.about("no_traffic_while", Some(name))
        }
    }

    fn probed(&self, number: usize, probe: &Probe) -> Expectation {
        let none = Vec::new();
        let tries = self.tries.get(number).unwrap_or(&none);
        let windows = self.windows(None);
        let of = |wanted: Phase| {
            tries
                .iter()
                .filter(|one| phase(&windows, one.at_ns) == wanted)
                .collect::<Vec<_>>()
        };
        let starts_late = windows.first().is_none_or(|(from, _)| *from > 0);
        let after_removal = self.after_removal.get(number).and_then(Option::as_ref);
        let complaint = before(&of(Phase::Before), starts_late)
            .or_else(|| during(&of(Phase::During), probe.during))
            .or_else(|| after(of(Phase::After).last().copied().or(after_removal)));
        let count = tries.len() as u64;
        let holds = complaint.is_none();
        let (found, at_ns) = complaint.map_or_else(
            || (format!("it did ({count} tries)"), None),
            |complaint| (complaint.why, complaint.at_ns),
        );
        let about = self.about("probe", None);
        Expectation {
            expected: format!("the probe `{}` to hold", probe::name(probe)),
            found,
            holds,
            measured: Some(count),
            broke_ms: at_ns
                .map(|ns| ns.min(self.history.length_ns) / MS_NS)
                .or(about.broke_ms),
            ..about
        }
    }
}

fn phase(windows: &[(u64, u64)], at_ns: u64) -> Phase {
    if windows
        .iter()
        .any(|(from, to)| (*from..*to).contains(&at_ns))
    {
        Phase::During
    } else if windows.first().is_none_or(|(from, _)| at_ns < *from) {
        Phase::Before
    } else if windows.last().is_some_and(|(_, to)| at_ns >= *to) {
        Phase::After
    } else {
        Phase::Between
    }
}

/// Why a probe's expectation is not met.
struct Complaint {
    why: String,
    /// The time of the try; `None` where one is missing.
    at_ns: Option<u64>,
}

impl Complaint {
    /// A failed try; `None` if it held.
    fn of(one: &Try, when: &str) -> Option<Self> {
        one.complaint.as_ref().map(|why| Self {
            why: format!("not {when} the fault: {why}"),
            at_ns: Some(one.at_ns),
        })
    }

    /// No try in a phase.
    fn not_tried(when: &str) -> Self {
        Self {
            why: format!("it was not tried {when} the fault: give a shorter interval"),
            at_ns: None,
        }
    }
}

/// The complaint about tries before the first fault, if any. If a fault starts at once, the probe was tried before the
/// run.
fn before(tries: &[&Try], asked: bool) -> Option<Complaint> {
    match tries.last() {
        Some(last) => Complaint::of(last, "before"),
        None if asked => Some(Complaint::not_tried("before")),
        None => None,
    }
}

fn during(tries: &[&Try], wanted: During) -> Option<Complaint> {
    if wanted == During::MayFail {
        return None;
    }
    let Some(first) = tries.first() else {
        return Some(Complaint::not_tried("during"));
    };
    let mut failed = tries.iter().filter_map(|one| Complaint::of(one, "during"));
    match (wanted, failed.next()) {
        (During::MustHold, failed) => failed,
        (During::MustFail, None) => Some(Complaint {
            why: "it also held during the fault, where it must fail".to_owned(),
            at_ns: Some(first.at_ns),
        }),
        _ => None,
    }
}

fn after(last: Option<&Try>) -> Option<Complaint> {
    match last {
        Some(last) => Complaint::of(last, "after"),
        None => Some(Complaint::not_tried("after")),
    }
}

/// Formats a measured time to the tenth of a millisecond.
fn rounded(ns: u64) -> String {
    const STEP: u64 = 100_000;
    show_duration(ns.div_ceil(STEP) * STEP)
}
