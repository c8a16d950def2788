//! Checks the expectations of a scenario.

use anyhow::{Context as _, Result};

use crate::inject::injection::Hits;
use crate::plan::Plan;
use crate::rule::scenario::{During, Expect, NoTraffic, Probe, not_watchable};
use crate::rule::units::show_duration;
use crate::rule::{ResolvedRule, ResolvedTarget, Rule, SystemResolver, Targets, windows};
use crate::sys::process::command::Ended;
use crate::watch::history::{History, Seen};
use crate::watch::probe::{self, Try};

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
    if target.hosts.is_empty() && !target.has_any_host() {
        anyhow::bail!(
            "expectations watch the addresses that a host has at the start, and `{name}` has none: use a host that has one"
        );
    }
    Ok(target)
}

/// An expectation and its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it was met.
    pub holds: bool,
    /// The expectation and the result in one line.
    pub text: String,
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
pub fn verdicts(expect: &Expect, facts: &Facts<'_>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    if let Some(code) = expect.exit {
        verdicts.push(Verdict {
            holds: facts.ended.exit_code() == code,
            text: format!(
                "expect exit {code}: the command ended with {}",
                facts.ended.exit_code()
            ),
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
    fn fired(&self, name: &str) -> Verdict {
        let of_target = self.plan.rules.iter().zip(self.hits);
        let fired: u64 = of_target
            .filter(|(rule, _)| rule.target == *name)
            .map(|(_, hits)| hits.stats.hit_packets)
            .sum();
        Verdict {
            holds: fired > 0,
            text: format!("expect {name} fired: {fired} packets hit"),
        }
    }

    /// Expectations that limit a figure.
    fn counted(&self, expect: &Expect) -> Vec<Verdict> {
        let seen = |name: &str| self.history.of(name).cloned().unwrap_or_default();
        let mut verdicts = Vec::new();
        for (name, &limit) in &expect.max_connects {
            let found = seen(name).connects.len() as u64;
            verdicts.push(Verdict {
                holds: found <= limit,
                text: format!("expect at most {limit} connects to {name}: {found}"),
            });
        }
        for (name, rate) in &expect.connect_rate {
            let found = seen(name).busiest(rate.per_ns);
            verdicts.push(Verdict {
                holds: found <= rate.count,
                text: format!("expect at most {rate} connects to {name}: {found} at the busiest"),
            });
        }
        for (name, &limit) in &expect.max_open {
            let found = seen(name).most_open();
            verdicts.push(Verdict {
                holds: found <= limit,
                text: format!("expect at most {limit} open connections to {name}: {found}"),
            });
        }
        for (name, limit) in &expect.p99_connect {
            verdicts.push(self.p99(name, limit.0, &seen(name)));
        }
        verdicts
    }

    fn p99(&self, name: &str, limit_ns: u64, seen: &Seen) -> Verdict {
        let limit = show_duration(limit_ns);
        let expected = format!("expect 99 of 100 connects to {name} to be answered within {limit}");
        match seen.p99_connect_ns(self.history.length_ns) {
            Some(found) => Verdict {
                holds: found <= limit_ns,
                text: format!(
                    "{expected}: it took {}, of {} connects",
                    rounded(found),
                    seen.connects.len()
                ),
            },
            None => Verdict {
                holds: false,
                text: format!("{expected}: there was no connection attempt"),
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

    fn recovers(&self, name: &str, limit_ns: u64) -> Verdict {
        let seen = self.history.of(name).cloned().unwrap_or_default();
        let expected = format!(
            "expect {name} to recover within {}",
            show_duration(limit_ns)
        );
        let ends: Vec<u64> = self
            .windows(Some(name))
            .into_iter()
            .map(|(_, end)| end)
            .filter(|end| *end < self.history.length_ns)
            .collect();
        if ends.is_empty() {
            return Verdict {
                holds: false,
                text: format!("{expected}: its fault lasted until the command had ended"),
            };
        }
        let answers: Option<Vec<u64>> = ends
            .iter()
            .map(|end| seen.answered_after_ns(*end))
            .collect();
        let slowest = answers.and_then(|answers| answers.into_iter().max());
        Verdict {
            holds: slowest.is_some_and(|time| time <= limit_ns),
            text: match slowest {
                Some(time) => format!("{expected}: first answer {} after the fault", rounded(time)),
                None => format!("{expected}: no answer after the fault"),
            },
        }
    }

    fn quiet(&self, name: &str, quiet: &NoTraffic) -> Verdict {
        let faulted = quiet.faulted.as_deref().unwrap_or(name);
        let seen = self.history.of(name).cloned().unwrap_or_default();
        let after = quiet.after.0;
        let expected = format!(
            "expect no traffic to {name} from {} after the start of a fault of {faulted}",
            show_duration(after)
        );
        let first = self
            .windows(Some(faulted))
            .into_iter()
            .find_map(|(from, to)| Some(seen.traffic_in(from.saturating_add(after), to)? - from));
        Verdict {
            holds: first.is_none(),
            text: match first {
                Some(time) => format!("{expected}: there was some after {}", rounded(time)),
                None => format!("{expected}: there was none"),
            },
        }
    }

    fn probed(&self, number: usize, probe: &Probe) -> Verdict {
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
        Verdict {
            holds: complaint.is_none(),
            text: format!(
                "expect the probe `{}` to hold: {}",
                probe::name(probe),
                complaint.unwrap_or_else(|| format!("it did ({} tries)", tries.len()))
            ),
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

/// The complaint about tries before the first fault, if any. If a fault starts at once, the probe was tried before the
/// run.
fn before(tries: &[&Try], asked: bool) -> Option<String> {
    match tries.last() {
        Some(last) => last
            .complaint
            .as_ref()
            .map(|why| format!("not before the fault: {why}")),
        None if asked => {
            Some("it was not tried before the fault: give a shorter interval".to_owned())
        }
        None => None,
    }
}

fn during(tries: &[&Try], wanted: During) -> Option<String> {
    if wanted != During::MayFail && tries.is_empty() {
        return Some("it was not tried during the fault: give a shorter interval".to_owned());
    }
    let failed = tries.iter().find_map(|one| one.complaint.as_ref());
    match (wanted, failed) {
        (During::MustHold, Some(why)) => Some(format!("not during the fault: {why}")),
        (During::MustFail, None) => {
            Some("it also held during the fault, where it must fail".to_owned())
        }
        _ => None,
    }
}

fn after(last: Option<&Try>) -> Option<String> {
    match last {
        Some(last) => last
            .complaint
            .as_ref()
            .map(|why| format!("not after the fault: {why}")),
        None => Some("it was not tried after the fault: give a shorter interval".to_owned()),
    }
}

/// Formats a measured time to the tenth of a millisecond.
fn rounded(ns: u64) -> String {
    const STEP: u64 = 100_000;
    show_duration(ns.div_ceil(STEP) * STEP)
}
