//! The smallest fault that still makes a command fail, and the largest one that it survives.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::attempt::{Attempt, Measured, Runner, attempt};
use super::dependency::Dependency;
use super::faults::{Experiment, FaultKind, Magnitude};
use super::fewest::fewest;
use crate::report::record::Decision;
use crate::rule::units::show_duration;
use crate::rule::{Layer, Protocol, Rule};

/// How near the two sides of a threshold come to each other: within a tenth.
const NEAR_PERCENT: u64 = 110;
/// The least magnitude that is tried, in milliseconds.
const LEAST_MS: u64 = 10;
/// The largest magnitude that is tried of a fault that is survived.
const TOLERANCE_MOST: Duration = Duration::from_secs(30);
/// How many sets of packets are tried at most: each costs a run.
const PACKET_TRIES: u32 = 40;
/// The same for sets of connections: a command that fails by them often hangs, which takes long.
const CONNECTION_TRIES: u32 = 20;
/// How many rules may name what a set consists of: a command line is to be read.
const RULES_MAX: usize = 32;
/// How many connections are tried, one after the other.
const CONNECTIONS_MAX: u64 = 4;

/// What is left of a fault, or of a pair of faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smallest {
    /// Its rules.
    pub rules: Vec<String>,
    /// What is left of each fault.
    pub parts: Vec<MinimalFault>,
}

/// What is left of one fault.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MinimalFault {
    /// Target and name of the fault, where it is one of a pair.
    pub of: Option<String>,
    /// From where on it fails, in milliseconds, where it has a magnitude.
    pub from_ms: Option<u64>,
    /// The connection that is enough, counted from 1.
    pub connection: Option<u64>,
    /// The number of packets that are enough, where that is known.
    pub packets: Option<u64>,
    /// The number of connections that are enough together, where that is known and one is not enough.
    pub connections: Option<u64>,
    /// Whether so many of each connection are needed.
    pub of_each: bool,
}

impl Smallest {
    /// In words, such as `from 640ms, connection 2 is enough`.
    #[must_use]
    pub fn in_words(&self) -> String {
        if let [MinimalFault { of: Some(of), .. }] = self.parts.as_slice() {
            let alone = format!("{of} alone is enough");
            let words = self.parts[0].in_words();
            return [alone, words].join(", ").trim_end_matches(", ").to_owned();
        }
        let parts = self.parts.iter().filter_map(|part| {
            let words = part.in_words();
            match &part.of {
                _ if words.is_empty() => None,
                Some(of) => Some(format!("{of}: {words}")),
                None => Some(words),
            }
        });
        parts.collect::<Vec<_>>().join("; ")
    }
}

impl MinimalFault {
    fn in_words(&self) -> String {
        let mut parts = Vec::new();
        if let Some(ms) = self.from_ms {
            parts.push(format!("from {}", show_duration(ms * 1_000_000)));
        }
        if let Some(number) = self.connection {
            parts.push(format!("connection {number} is enough"));
        }
        if let Some(connections) = self.connections {
            parts.push(format!("{connections} connections are enough"));
        }
        match self.packets {
            Some(1) if self.of_each => {
                parts.push("the first packet of each connection is enough".to_owned());
            }
            Some(1) => parts.push("one packet is enough".to_owned()),
            Some(packets) => parts.push(format!("{packets} packets are enough")),
            None => {}
        }
        parts.join(", ")
    }
}

/// What became of making a fault smaller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shrunk {
    /// The smallest fault, which failed again.
    To(Smallest),
    /// The smallest fault did not fail again.
    FailsNoMore,
    /// It was ended before; the smallest fault so far, if one smaller than the whole was seen to fail.
    Halted(Option<Smallest>, Halt),
}

/// Why no further run is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// A signal came.
    Interrupted,
    /// The time is over.
    Late,
}

/// Makes a fault that was seen to fail smaller, as long as it still fails. No run begins after `until`.
///
/// # Errors
/// As [`Runner::run`].
pub async fn shrink(
    runner: &mut impl Runner,
    measured: &Measured<'_>,
    failing: &Experiment,
    until: Option<Instant>,
) -> Result<Shrunk> {
    let mut shrinking = Shrinking::new(runner, measured, until);
    let mut parts = match failing.parts.as_slice() {
        [] => vec![failing.clone()],
        parts => {
            let fails = async |some: &[Experiment]| shrinking.all_fail(some).await;
            fewest(parts, 2, fails).await?
        }
    };
    let mut left = Vec::new();
    for place in 0..parts.len() {
        shrinking.held = (parts[..place].to_vec(), parts[place + 1..].to_vec());
        let mut part = shrinking.reduce(&mut parts[place]).await?;
        let one = &parts[place];
        let is_of_pair = !failing.parts.is_empty();
        let name = || format!("{} {}", one.target(measured.dependencies), one.name());
        part.of = is_of_pair.then(name);
        left.push(part);
    }
    shrinking.held = (Vec::new(), Vec::new());
    let Some(joined) = parts.into_iter().reduce(Experiment::and) else {
        return Ok(Shrunk::FailsNoMore);
    };
    let is_smaller = joined.rules != failing.rules;
    let fails = !is_smaller || shrinking.fails(&joined).await?;
    let smallest = Smallest {
        rules: joined.rules,
        parts: left,
    };
    Ok(match shrinking.halted {
        Some(halt) => Shrunk::Halted(is_smaller.then_some(smallest), halt),
        None if fails => Shrunk::To(smallest),
        None => Shrunk::FailsNoMore,
    })
}

/// The largest magnitude of a fault that the command survives, in milliseconds, to within 10%, and why no larger one was
/// tried, if so. At most 30 s are tried, and no more than a run may take in all. Nothing where the fault has no magnitude.
///
/// # Errors
/// As [`Runner::run`].
pub async fn tolerance(
    runner: &mut impl Runner,
    measured: &Measured<'_>,
    survived: &Experiment,
    until: Option<Instant>,
) -> Result<Option<(u64, Option<Halt>)>> {
    let Some(magnitude) = survived.magnitude else {
        return Ok(None);
    };
    let mut shrinking = Shrinking::new(runner, measured, until);
    let times = u32::try_from(magnitude.times).unwrap_or(u32::MAX);
    let most = (measured.limit / times.max(1)).min(TOLERANCE_MOST);
    let most_ms = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
    let mut survives_ms = magnitude.ms;
    if most_ms > survives_ms {
        let dependency = &measured.dependencies[survived.dependency];
        let mut tried = survived.clone();
        tried.set(
            dependency,
            Magnitude {
                ms: most_ms,
                ..magnitude
            },
        );
        if shrinking.fails(&tried).await? {
            let range = (survives_ms, most_ms);
            (survives_ms, _) = shrinking.bisect(survived, dependency, range).await?;
        } else if shrinking.halted.is_none() {
            survives_ms = most_ms;
        }
    }
    Ok(Some((survives_ms, shrinking.halted)))
}

struct Shrinking<'a, R> {
    runner: &'a mut R,
    measured: &'a Measured<'a>,
    /// When no further run begins.
    until: Option<Instant>,
    /// Faults at the same time as the one that is made smaller: those before and after it.
    held: (Vec<Experiment>, Vec<Experiment>),
    halted: Option<Halt>,
}

impl<'a, R: Runner> Shrinking<'a, R> {
    fn new(runner: &'a mut R, measured: &'a Measured<'a>, until: Option<Instant>) -> Self {
        Self {
            runner,
            measured,
            until,
            held: (Vec::new(), Vec::new()),
            halted: None,
        }
    }

    /// Whether the command fails under this and what is held. When no further run is made it does not.
    async fn fails(&mut self, experiment: &Experiment) -> Result<bool> {
        let all = self.with_held(experiment);
        Ok(self.all_fail(&all).await? == Some(true))
    }

    /// This and what is held, in their order.
    fn with_held(&self, experiment: &Experiment) -> Vec<Experiment> {
        let (before, after) = &self.held;
        [&before[..], std::slice::from_ref(experiment), &after[..]].concat()
    }

    /// Whether the command fails under all of these at the same time; nothing when no further run is made.
    async fn all_fail(&mut self, all: &[Experiment]) -> Result<Option<bool>> {
        let Some(joined) = all.iter().cloned().reduce(Experiment::and) else {
            return Ok(Some(false));
        };
        let fails = self.failure(&joined).await?.is_some();
        Ok(self.halted.is_none().then_some(fails))
    }

    /// The run under this, if it fails. When no further run is made there is none.
    async fn failure(&mut self, experiment: &Experiment) -> Result<Option<Attempt>> {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.halted.get_or_insert(Halt::Late);
        }
        if self.halted.is_some() {
            return Ok(None);
        }
        let attempt = attempt(self.runner, self.measured, experiment).await?;
        if attempt.is_none() {
            self.halted = Some(Halt::Interrupted);
        }
        Ok(attempt.filter(|attempt| attempt.verdict.is_failure()))
    }

    /// Makes one fault smaller.
    async fn reduce(&mut self, smallest: &mut Experiment) -> Result<MinimalFault> {
        let dependency = &self.measured.dependencies[smallest.dependency];
        if let Some(magnitude) = smallest.magnitude {
            let range = (0, magnitude.ms);
            let (_, ms) = self.bisect(smallest, dependency, range).await?;
            self.settle(smallest, dependency, ms).await?;
        }
        let from_ms = smallest.magnitude.map(|magnitude| magnitude.ms);
        let whole = smallest.clone();
        let connection = self.connection(smallest, dependency).await?;
        let is_one = self.one_packet(smallest).await?;
        let packets = if is_one {
            Some(1)
        } else {
            self.packets(smallest, &whole, dependency).await?
        };
        let connections = match connection {
            None => self.connections(smallest).await?,
            Some(_) => None,
        };
        Ok(MinimalFault {
            of: None,
            from_ms,
            connection,
            packets,
            connections,
            of_each: is_one && connection.is_none(),
        })
    }

    /// Between a magnitude that is survived and one that fails, in milliseconds: the same nearer to each other.
    async fn bisect(
        &mut self,
        experiment: &Experiment,
        dependency: &Dependency,
        (mut survives_ms, mut fails_ms): (u64, u64),
    ) -> Result<(u64, u64)> {
        let mut tried = experiment.clone();
        while let (Some(magnitude), Some(ms)) =
            (experiment.magnitude, between(survives_ms, fails_ms))
        {
            tried.set(dependency, Magnitude { ms, ..magnitude });
            if self.fails(&tried).await? {
                fails_ms = ms;
            } else if self.halted.is_none() {
                survives_ms = ms;
            } else {
                break;
            }
        }
        Ok((survives_ms, fails_ms))
    }

    /// Sets the magnitude that was found, or the next larger one that fails again: at the threshold itself it is chance.
    async fn settle(
        &mut self,
        smallest: &mut Experiment,
        dependency: &Dependency,
        ms: u64,
    ) -> Result<()> {
        let Some(most) = smallest.magnitude else {
            return Ok(());
        };
        let mut tried = Magnitude { ms, ..most };
        smallest.set(dependency, tried);
        while tried.ms < most.ms && !self.fails(smallest).await? && self.halted.is_none() {
            tried.ms = (tried.ms * NEAR_PERCENT / 100).min(most.ms);
            smallest.set(dependency, tried);
        }
        Ok(())
    }

    /// The first connection that is enough.
    async fn connection(
        &mut self,
        smallest: &mut Experiment,
        dependency: &Dependency,
    ) -> Result<Option<u64>> {
        if is_timed(smallest) {
            return Ok(None);
        }
        let most = dependency.usage.answered.clamp(1, CONNECTIONS_MAX);
        for number in 1..=most {
            let tried = with(smallest, &format!("conn={number}"));
            if self.fails(&tried).await? {
                *smallest = tried;
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// The number of packets that are enough, by delta debugging over those that were hit in a run that failed.
    async fn packets(
        &mut self,
        smallest: &mut Experiment,
        whole: &Experiment,
        dependency: &Dependency,
    ) -> Result<Option<u64>> {
        let what = match smallest.fault {
            FaultKind::Loss => format!("{} drop", dependency.target),
            // Of TCP all are handshakes that are tried again.
            FaultKind::Silent if dependency.protocol == Protocol::Udp => {
                format!("{} drop", dependency.target)
            }
            FaultKind::Corrupt => whole.rules.concat(),
            _ => return Ok(None),
        };
        let Some((failing, own)) = self.failure_by(smallest).await? else {
            return Ok(None);
        };
        let own = failing
            .seen
            .decisions
            .iter()
            .filter(|one| own.contains(&one.rule));
        let all = Packets::of(own);
        let with = |some: &[Packets]| {
            let merged = Packets::merged(some);
            Experiment {
                rules: merged.iter().map(|packets| packets.rule(&what)).collect(),
                ..whole.clone()
            }
        };
        // Larger sets need more rules than there may be.
        let chunks = with(&all).rules.len().div_ceil(RULES_MAX).max(2);
        let Some(few) = self.fewest_of(&all, chunks, PACKET_TRIES, with).await? else {
            return Ok(None);
        };
        *smallest = with(&few);
        Ok(Some(few.len() as u64))
    }

    /// The number of connections that are enough together, by delta debugging over those that a stream rule acted on in
    /// a run that failed.
    async fn connections(&mut self, smallest: &mut Experiment) -> Result<Option<u64>> {
        if is_timed(smallest) || !smallest.rules.iter().all(|rule| is_of_streams(rule)) {
            return Ok(None);
        }
        let Some((failing, own)) = self.failure_by(smallest).await? else {
            return Ok(None);
        };
        let own = failing
            .seen
            .streams
            .iter()
            .filter(|one| own.contains(&one.rule));
        let hit: BTreeSet<_> = own.map(|one| one.connection).collect();
        let all: Vec<_> = hit.into_iter().collect();
        let whole = smallest.clone();
        let with = |some: &[u64]| Experiment {
            rules: on_connections(&whole.rules, some),
            ..whole.clone()
        };
        let few = self.fewest_of(&all, 2, CONNECTION_TRIES, with).await?;
        match few.filter(|few| few.len() < all.len()) {
            Some(few) => {
                *smallest = with(&few);
                Ok(Some(few.len() as u64))
            }
            None => Ok(None),
        }
    }

    /// A run that fails by this one and those that are held, and the numbers of its rules in that run.
    async fn failure_by(
        &mut self,
        one: &Experiment,
    ) -> Result<Option<(Attempt, RangeInclusive<u32>)>> {
        let before = self.held.0.iter().map(|one| one.rules.len());
        let before = u32::try_from(before.sum::<usize>())?;
        let own = before + 1..=before + u32::try_from(one.rules.len())?;
        let all = self.with_held(one).into_iter();
        let Some(all) = all.reduce(Experiment::and) else {
            return Ok(None);
        };
        let failing = self.failure(&all).await?;
        Ok(failing.map(|failing| (failing, own)))
    }

    /// The fewest of what was hit that are enough, by rules for some of it; nothing where that is not known.
    async fn fewest_of<T: Clone>(
        &mut self,
        all: &[T],
        chunks: usize,
        mut left: u32,
        with: impl Fn(&[T]) -> Experiment,
    ) -> Result<Option<Vec<T>>> {
        let few = fewest(all, chunks, async |some| {
            let tried = with(some);
            if tried.rules.len() > RULES_MAX {
                return Ok(Some(false));
            }
            if left == 0 {
                return Ok(None);
            }
            left -= 1;
            let fails = self.fails(&tried).await?;
            Ok(self.halted.is_none().then_some(fails))
        });
        let few = few.await?;
        let tried = with(&few);
        let fits = (1..=RULES_MAX).contains(&tried.rules.len());
        // All together have not been tried as rules of their own.
        if !fits || (few.len() == all.len() && !self.fails(&tried).await?) {
            return Ok(None);
        }
        Ok(Some(few))
    }

    /// Whether one packet of each connection is enough.
    async fn one_packet(&mut self, smallest: &mut Experiment) -> Result<bool> {
        let counts_packets = matches!(
            smallest.fault,
            FaultKind::Refused | FaultKind::Silent | FaultKind::Slow | FaultKind::Corrupt
        );
        if !counts_packets {
            return Ok(false);
        }
        let tried = with(smallest, "first=1");
        let fails = self.fails(&tried).await?;
        if fails {
            *smallest = tried;
        }
        Ok(fails)
    }
}

/// Packets of one connection and direction that follow each other, and what is done to them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packets {
    connection: u32,
    direction: Cow<'static, str>,
    first: u64,
    last: u64,
}

impl Packets {
    /// Those that were decided about: each by itself, in order.
    fn of<'a>(decisions: impl Iterator<Item = &'a Decision>) -> Vec<Self> {
        let each = decisions.map(|decision| Self {
            connection: decision.connection,
            direction: decision.direction.clone(),
            first: decision.packet,
            last: decision.packet,
        });
        each.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The same, with those that follow each other as one.
    fn merged(all: &[Self]) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for one in all {
            match merged.last_mut() {
                Some(last)
                    if (last.connection, &last.direction) == (one.connection, &one.direction)
                        && last.last + 1 == one.first =>
                {
                    last.last = one.last;
                }
                _ => merged.push(one.clone()),
            }
        }
        merged
    }

    /// A rule that does this to them and to no others.
    fn rule(&self, what: &str) -> String {
        let Self {
            connection,
            direction,
            first,
            last,
        } = self;
        let dir = if what.contains(" dir=") {
            String::new()
        } else {
            format!(" dir={direction}")
        };
        format!("{what} range={first}..{last} conn={connection}{dir}")
    }
}

/// Where to try next; nothing once both sides are near enough.
fn between(survives_ms: u64, fails_ms: u64) -> Option<u64> {
    if survives_ms == 0 {
        let ms = (fails_ms / 8).max(LEAST_MS);
        return (ms < fails_ms).then_some(ms);
    }
    let is_near = fails_ms * 100 <= survives_ms * NEAR_PERCENT;
    let ms = (survives_ms * fails_ms).isqrt();
    (!is_near && ms > survives_ms && ms < fails_ms).then_some(ms)
}

/// Whether a window in time or a count over all connections says already when it happens.
fn is_timed(experiment: &Experiment) -> bool {
    let counts = |rule: &String| rule.contains("count=rule");
    experiment.fault == FaultKind::Outage || experiment.rules.iter().any(counts)
}

fn is_of_streams(rule: &str) -> bool {
    let rule = rule.parse::<Rule>();
    rule.is_ok_and(|rule| rule.fault.layer() == Layer::Stream)
}

/// The rules for some connections alone, of which those that follow each other are named as one.
fn on_connections(rules: &[String], connections: &[u64]) -> Vec<String> {
    let runs = connections.chunk_by(|one, next| one + 1 == *next);
    let each = |run: &[u64]| {
        let (first, last) = (run[0], run[run.len() - 1]);
        rules
            .iter()
            .map(move |rule| format!("{rule} conn={first}..{last}"))
    };
    runs.flat_map(each).collect()
}

/// The same with another modifier.
fn with(experiment: &Experiment, modifier: &str) -> Experiment {
    let mut changed = experiment.clone();
    for rule in &mut changed.rules {
        *rule = format!("{rule} {modifier}");
    }
    changed
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::{Fake, block_on};
    use super::super::faults::experiment;
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::tests::seen;
    use super::super::verdict::{Observation, RunEnd};
    use super::*;
    use crate::relay::{StreamDecision, StreamDirection};
    use crate::rule::Fault;

    const LIMIT: Duration = Duration::from_secs(10);

    fn smallest(fault: FaultKind, fails: impl Fn(&Rule) -> bool + 'static) -> Option<Smallest> {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], fault, LIMIT).unwrap();
        let mut runner = Fake::new(fails);
        match block_on(shrink(&mut runner, &measured, &failing, None)).unwrap() {
            Shrunk::To(smallest) => Some(smallest),
            Shrunk::FailsNoMore => None,
            Shrunk::Halted(..) => panic!("nobody interrupts"),
        }
    }

    fn delay_ms(rule: &Rule) -> u64 {
        let text = rule.to_string();
        let (_, rest) = text.split_once("delay=").unwrap();
        let time = rest.split(' ').next().unwrap();
        crate::rule::units::parse_duration(time).unwrap() / 1_000_000
    }

    #[test]
    fn a_threshold_is_found_to_a_tenth() {
        for threshold_ms in [20, 300, 700, 1234, 2400] {
            let found = smallest(FaultKind::Slow, move |rule| delay_ms(rule) >= threshold_ms);
            let from_ms = found.unwrap().parts[0].from_ms.unwrap();
            assert!(
                (threshold_ms..=threshold_ms * 11 / 10).contains(&from_ms),
                "{threshold_ms}: {from_ms}"
            );
        }
    }

    #[test]
    fn chance_at_the_threshold_does_not_lose_it() {
        // Just below the threshold it fails once, as on a busy machine.
        let tries = std::cell::Cell::new(0);
        let fails = move |rule: &Rule| match delay_ms(rule) {
            700.. => true,
            650..700 => {
                tries.set(tries.get() + 1);
                tries.get() == 1
            }
            _ => false,
        };
        let found = smallest(FaultKind::Slow, fails).unwrap();
        let from_ms = found.parts[0].from_ms.unwrap();
        assert!((700..=770).contains(&from_ms), "{from_ms}");
    }

    #[test]
    fn a_packet_of_each_connection_is_told_as_such() {
        let any = |rule: &Rule| !rule.to_string().contains("conn=");
        let found = smallest(FaultKind::Refused, any).unwrap();
        assert_eq!(found.rules, ["tcp:1 reject first=1"]);
        let words = "the first packet of each connection is enough";
        assert_eq!(found.in_words(), words);
    }

    #[test]
    fn the_connection_that_matters_is_found() {
        let second = |rule: &Rule| {
            let text = rule.to_string();
            !text.contains("conn=") || text.contains("conn=2")
        };
        let found = smallest(FaultKind::Refused, second).unwrap();
        assert_eq!(found.parts[0].connection, Some(2));
        assert_eq!(found.rules, ["tcp:1 reject conn=2 first=1"]);
        assert_eq!(
            found.in_words(),
            "connection 2 is enough, one packet is enough"
        );
    }

    fn decision(connection: u32, packet: u64, direction: &'static str) -> Decision {
        Decision {
            rule: 1,
            connection,
            packet,
            seen: 0,
            direction: direction.into(),
            fragment: 0,
            action: "drop".into(),
            bytes: 0,
            segments: 1,
            time_ns: 0,
        }
    }

    #[test]
    fn the_packets_that_matter_are_found() {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], FaultKind::Loss, LIMIT).unwrap();
        // Packets 4 and 5 to the client must be lost together.
        let mut runner = Fake::new(|rule: &Rule| {
            let text = rule.to_string();
            text.contains("loss=") && !text.contains("conn=")
                || text.contains("range=4..5") && text.ends_with("dir=to-client")
        });
        let one_by_one = (1..30).map(|packet| decision(1, packet * 2, "to-server"));
        runner.decisions = one_by_one
            .chain([decision(1, 4, "to-client"), decision(1, 5, "to-client")])
            .collect();
        let found = block_on(shrink(&mut runner, &measured, &failing, None)).unwrap();
        let Shrunk::To(smallest) = found else {
            panic!("{found:?}");
        };
        assert_eq!(
            smallest.rules,
            ["tcp:1 drop range=4..5 conn=1 dir=to-client"]
        );
        assert_eq!(smallest.in_words(), "2 packets are enough");
    }

    #[test]
    fn the_connections_that_matter_together_are_found() {
        let decision = |connection| StreamDecision {
            rule: 1,
            connection,
            direction: StreamDirection::Downstream,
            action: "limit_data".into(),
            arm: 0,
            at: None,
            value: None,
            time_ns: 0,
        };
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], FaultKind::Cut, LIMIT).unwrap();
        let [rule] = failing.rules.as_slice() else {
            panic!("{:?}", failing.rules);
        };
        for (hit, needed, words) in [
            (1..=7, 2..=3, "2 connections are enough"),
            (1..=3, 1..=3, ""),
        ] {
            let expected = match words {
                "" => rule.clone(),
                _ => format!("{rule} conn={}..{}", needed.start(), needed.end()),
            };
            let mut runner = Fake::new(move |rule: &Rule| {
                let picked = rule.modifiers.connections.as_ref();
                picked.is_none_or(|picked| {
                    picked.first <= *needed.start() && picked.last >= *needed.end()
                })
            });
            runner.streams = hit.map(decision).collect();
            let found = block_on(shrink(&mut runner, &measured, &failing, None)).unwrap();
            let Shrunk::To(smallest) = found else {
                panic!("{found:?}");
            };
            assert_eq!(smallest.rules, [expected]);
            assert_eq!(smallest.in_words(), words);
        }
    }

    #[test]
    fn what_needs_all_of_the_fault_stays_whole() {
        let all = |rule: &Rule| {
            matches!(rule.fault, Fault::Blackhole(_)) && rule.to_string() == "tcp:1 blackhole"
        };
        let found = smallest(FaultKind::Silent, all).unwrap();
        assert_eq!(found.rules, ["tcp:1 blackhole"]);
        assert_eq!(found.in_words(), "");
    }

    #[test]
    fn what_does_not_fail_again_is_not_shown() {
        let tries = std::cell::Cell::new(0);
        let fails_once = move |_: &Rule| {
            tries.set(tries.get() + 1);
            tries.get() == 1
        };
        assert_eq!(smallest(FaultKind::Refused, fails_once), None);
    }

    /// Fails under all of these faults at the same time: one rule of each is there, with the packets that it needs.
    struct Together {
        needed: Vec<(&'static str, &'static str)>,
        decisions: Vec<Decision>,
        runs: usize,
    }

    impl Runner for Together {
        async fn run(&mut self, rules: &[String], _limit: Duration) -> Result<Option<Observation>> {
            self.runs += 1;
            let mut needed = self.needed.iter();
            let fails = needed.all(|(target, packets)| {
                let mut own = rules.iter().filter(|rule| rule.starts_with(target));
                own.any(|rule| !rule.contains("range=") || rule.contains(packets))
            });
            let mut run = seen(RunEnd::Exited(u8::from(fails)), 50);
            run.decisions.clone_from(&self.decisions);
            Ok(Some(run))
        }
    }

    #[test]
    fn each_fault_of_a_pair_is_made_smaller_and_told_of() {
        let dependencies = [
            example(ApplicationProtocol::Redis, 1),
            example(ApplicationProtocol::Redis, 2),
        ];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let of = |number: usize| {
            let one = &dependencies[number];
            experiment(number, one, FaultKind::Loss, LIMIT).unwrap()
        };
        let pair = Experiment::pair(&dependencies, &of(0), &of(1));
        let of_second = |packet| Decision {
            rule: 2,
            ..decision(1, packet, "to-client")
        };
        let mut runner = Together {
            needed: vec![("tcp:1 ", "range=4..4"), ("tcp:2 ", "range=7..8")],
            decisions: vec![decision(1, 4, "to-server"), of_second(7), of_second(8)],
            runs: 0,
        };
        let found = block_on(shrink(&mut runner, &measured, &pair, None)).unwrap();
        let Shrunk::To(smallest) = found else {
            panic!("{found:?}");
        };
        let words = smallest.in_words();
        assert_eq!(
            words,
            "tcp:1 loss: connection 1 is enough, one packet is enough; tcp:2 loss: connection 1 is enough, 2 packets \
             are enough"
        );
        let rules = [
            "tcp:1 drop range=4..4 conn=1 dir=to-server",
            "tcp:2 drop range=7..8 conn=1 dir=to-client",
        ];
        assert_eq!(smallest.rules, rules);
        runner.needed = vec![("tcp:2 ", "range=7..8")];
        let found = block_on(shrink(&mut runner, &measured, &pair, None)).unwrap();
        let Shrunk::To(alone) = found else {
            panic!("{found:?}");
        };
        assert!(alone.in_words().starts_with("tcp:2 loss alone is enough, "));
    }

    #[test]
    fn of_very_many_packets_a_bounded_number_of_sets_is_tried() {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], FaultKind::Loss, LIMIT).unwrap();
        let mut runner = Together {
            needed: vec![("tcp:1 ", "nothing less")],
            decisions: (0..50_000)
                .map(|n| decision(1, n * 3, "to-client"))
                .collect(),
            runs: 0,
        };
        let found = block_on(shrink(&mut runner, &measured, &failing, None)).unwrap();
        let Shrunk::To(smallest) = found else {
            panic!("{found:?}");
        };
        assert_eq!(smallest.rules, ["tcp:1 loss=30% conn=1"]);
        assert_eq!(smallest.parts[0].packets, None);
        // One connection, the run whose packets are told apart, and the last confirmation.
        assert_eq!(runner.runs, 3 + PACKET_TRIES as usize);
    }

    #[test]
    fn what_was_found_is_kept_when_no_further_run_is_made() {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], FaultKind::Slow, LIMIT).unwrap();
        let mut runner = Fake::new(|rule: &Rule| delay_ms(rule) >= 200);
        runner.last = 1;
        let found = block_on(shrink(&mut runner, &measured, &failing, None)).unwrap();
        let Shrunk::Halted(Some(smallest), Halt::Interrupted) = found else {
            panic!("{found:?}");
        };
        assert_eq!(smallest.in_words(), "from 312ms");
        let late = Some(Instant::now());
        let mut runner = Fake::new(|_: &Rule| true);
        let found = block_on(shrink(&mut runner, &measured, &failing, late)).unwrap();
        assert_eq!((found, runner.runs), (Shrunk::Halted(None, Halt::Late), 0));
    }

    #[test]
    fn what_is_survived_is_told_up_to_the_timeout() {
        let mut one = example(ApplicationProtocol::Redis, 1);
        one.usage.turns = 1;
        let dependencies = [one];
        let measured = |limit| Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit,
        };
        let survives = |limit: Duration, from_ms: u64| {
            let slow = experiment(0, &dependencies[0], FaultKind::Slow, limit).unwrap();
            let mut runner = Fake::new(move |rule: &Rule| delay_ms(rule) >= from_ms);
            let found = block_on(tolerance(&mut runner, &measured(limit), &slow, None)).unwrap();
            (found.unwrap().0, runner.runs)
        };
        assert_eq!(survives(LIMIT, u64::MAX), (10_000, 1));
        assert_eq!(survives(LIMIT * 9, u64::MAX), (30_000, 1));
        let (ms, _) = survives(LIMIT * 9, 17_000);
        assert!((15_400..17_000).contains(&ms), "{ms}");
        let refused = experiment(0, &dependencies[0], FaultKind::Refused, LIMIT).unwrap();
        let mut runner = Fake::new(|_: &Rule| false);
        let found = block_on(tolerance(&mut runner, &measured(LIMIT), &refused, None));
        assert_eq!((found.unwrap(), runner.runs), (None, 0));
    }
}
