//! The smallest fault that still makes a command fail.

use std::collections::BTreeSet;

use anyhow::Result;
use fault_common::abi::MATCHES_MAX;

use super::attempt::{Attempt, Measured, Runner, attempt};
use super::dependency::Dependency;
use super::faults::{Experiment, FaultKind, Magnitude};
use super::fewest::fewest;
use crate::report::record::Decision;
use crate::rule::units::show_duration;
use crate::rule::{Layer, Rule};

/// How near the two sides of a threshold come to each other: within a tenth.
const NEAR_PERCENT: u64 = 110;
/// The least magnitude that is tried, in milliseconds.
const LEAST_MS: u64 = 10;
/// How many sets of packets are tried at most: each costs a run.
const PACKET_TRIES: u32 = 40;
/// The same for sets of connections: a command that fails by them often hangs, which takes long.
const CONNECTION_TRIES: u32 = 20;
/// How many connections are tried, one after the other.
const CONNECTIONS_MAX: u64 = 4;

/// What is left of a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smallest {
    /// Its rules.
    pub rules: Vec<String>,
    /// From where on it fails, in milliseconds, where it has a magnitude.
    pub from_ms: Option<u64>,
    /// The connection that is enough, counted from 1.
    pub connection: Option<u64>,
    /// The number of packets that are enough, where that is known.
    pub packets: Option<u64>,
    /// The number of connections that are enough together, where that is known and one is not enough.
    pub connections: Option<u64>,
}

impl Smallest {
    /// In words, such as `from 640ms, connection 2 is enough`.
    #[must_use]
    pub fn in_words(&self) -> String {
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
    /// It was interrupted.
    Interrupted,
}

/// Makes a fault that was seen to fail smaller, as long as it still fails.
///
/// # Errors
/// As [`Runner::run`].
pub async fn shrink(
    runner: &mut impl Runner,
    measured: &Measured<'_>,
    failing: &Experiment,
) -> Result<Shrunk> {
    let mut shrinking = Shrinking {
        runner,
        measured,
        held: (Vec::new(), Vec::new()),
        is_interrupted: false,
    };
    let mut parts = match failing.parts.as_slice() {
        [] => vec![failing.clone()],
        parts => fewest(parts, async |some| shrinking.all_fail(some).await).await?,
    };
    let mut found = Reduced::default();
    for place in 0..parts.len() {
        shrinking.held = (parts[..place].to_vec(), parts[place + 1..].to_vec());
        found = shrinking.reduce(&mut parts[place]).await?;
    }
    shrinking.held = (Vec::new(), Vec::new());
    let Some(smallest) = parts.into_iter().reduce(Experiment::and) else {
        return Ok(Shrunk::FailsNoMore);
    };
    let is_smaller = smallest.rules != failing.rules;
    let fails = !is_smaller || shrinking.fails(&smallest).await?;
    if shrinking.is_interrupted {
        return Ok(Shrunk::Interrupted);
    }
    if !fails {
        return Ok(Shrunk::FailsNoMore);
    }
    Ok(Shrunk::To(Smallest {
        rules: smallest.rules,
        from_ms: found.from_ms,
        connection: found.connection,
        packets: found.packets,
        connections: found.connections,
    }))
}

/// What is left of one fault.
#[derive(Default)]
struct Reduced {
    from_ms: Option<u64>,
    connection: Option<u64>,
    packets: Option<u64>,
    connections: Option<u64>,
}

struct Shrinking<'a, R> {
    runner: &'a mut R,
    measured: &'a Measured<'a>,
    /// Faults at the same time as the one that is made smaller: those before and after it.
    held: (Vec<Experiment>, Vec<Experiment>),
    is_interrupted: bool,
}

impl<R: Runner> Shrinking<'_, R> {
    /// Whether the command fails under this and what is held. After an interruption it does not.
    async fn fails(&mut self, experiment: &Experiment) -> Result<bool> {
        let (before, after) = self.held.clone();
        let all = [before, vec![experiment.clone()], after].concat();
        self.all_fail(&all).await
    }

    /// Whether the command fails under all of these at the same time.
    async fn all_fail(&mut self, all: &[Experiment]) -> Result<bool> {
        let joined = all.iter().cloned().reduce(Experiment::and);
        match joined {
            Some(joined) => Ok(self.failure(&joined).await?.is_some()),
            None => Ok(false),
        }
    }

    /// The run under this, if it fails. After an interruption there is none.
    async fn failure(&mut self, experiment: &Experiment) -> Result<Option<Attempt>> {
        if self.is_interrupted {
            return Ok(None);
        }
        let attempt = attempt(self.runner, self.measured, experiment).await?;
        self.is_interrupted = attempt.is_none();
        Ok(attempt.filter(|attempt| attempt.verdict.is_failure()))
    }

    /// Makes one fault smaller.
    async fn reduce(&mut self, smallest: &mut Experiment) -> Result<Reduced> {
        let dependency = &self.measured.dependencies[smallest.dependency];
        if let Some(magnitude) = smallest.magnitude {
            let ms = self.bisect(smallest, dependency, magnitude).await?;
            self.settle(smallest, dependency, ms).await?;
        }
        let from_ms = smallest.magnitude.map(|magnitude| magnitude.ms);
        let whole = smallest.clone();
        let connection = self.connection(smallest, dependency).await?;
        let packets = if self.one_packet(smallest).await? {
            Some(1)
        } else {
            self.packets(smallest, &whole, dependency).await?
        };
        let connections = match connection {
            None => self.connections(smallest).await?,
            Some(_) => None,
        };
        Ok(Reduced {
            from_ms,
            connection,
            packets,
            connections,
        })
    }

    /// The least magnitude that fails, in milliseconds.
    async fn bisect(
        &mut self,
        experiment: &Experiment,
        dependency: &Dependency,
        magnitude: Magnitude,
    ) -> Result<u64> {
        let (mut survives_ms, mut fails_ms) = (0, magnitude.ms);
        while let Some(ms) = between(survives_ms, fails_ms) {
            let mut tried = experiment.clone();
            tried.set(dependency, Magnitude { ms, ..magnitude });
            if self.fails(&tried).await? {
                fails_ms = ms;
            } else {
                survives_ms = ms;
            }
        }
        Ok(fails_ms)
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
        while tried.ms < most.ms && !self.is_interrupted && !self.fails(smallest).await? {
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
            FaultKind::Corrupt => whole.rules.concat(),
            _ => return Ok(None),
        };
        if self.holds_others() {
            return Ok(None);
        }
        let Some(failing) = self.failure(smallest).await? else {
            return Ok(None);
        };
        let rules = |some: &[Packets]| -> Vec<String> {
            let merged = Packets::merged(some).into_iter();
            merged.map(|packets| packets.rule(&what)).collect()
        };
        let all = Packets::of(&failing.seen.decisions);
        let with = |some: &[Packets]| Experiment {
            rules: rules(some),
            ..whole.clone()
        };
        let Some(few) = self.fewest_of(&all, PACKET_TRIES, with).await? else {
            return Ok(None);
        };
        *smallest = with(&few);
        Ok(Some(few.len() as u64))
    }

    /// The number of connections that are enough together, by delta debugging over those that a stream rule acted on in
    /// a run that failed.
    async fn connections(&mut self, smallest: &mut Experiment) -> Result<Option<u64>> {
        if is_timed(smallest)
            || self.holds_others()
            || !smallest.rules.iter().all(|rule| is_of_streams(rule))
        {
            return Ok(None);
        }
        let Some(failing) = self.failure(smallest).await? else {
            return Ok(None);
        };
        let hit = failing.seen.streams.iter().map(|one| one.connection);
        let all: Vec<_> = hit.collect::<BTreeSet<_>>().into_iter().collect();
        let whole = smallest.clone();
        let with = |some: &[u64]| Experiment {
            rules: on_connections(&whole.rules, some),
            ..whole.clone()
        };
        let few = self.fewest_of(&all, CONNECTION_TRIES, with).await?;
        match few.filter(|few| few.len() < all.len()) {
            Some(few) => {
                *smallest = with(&few);
                Ok(Some(few.len() as u64))
            }
            None => Ok(None),
        }
    }

    /// The fewest of what was hit that are enough, by rules for some of it; nothing where that is not known.
    async fn fewest_of<T: Clone>(
        &mut self,
        all: &[T],
        mut left: u32,
        with: impl Fn(&[T]) -> Experiment,
    ) -> Result<Option<Vec<T>>> {
        let few = fewest(all, async |some| {
            // More rules than a packet may match can't be told apart from others: not known.
            if left == 0 || with(some).rules.len() > MATCHES_MAX {
                return Ok(false);
            }
            left -= 1;
            self.fails(&with(some)).await
        });
        let few = few.await?;
        let tried = with(&few);
        let fits = (1..=MATCHES_MAX).contains(&tried.rules.len());
        // All together have not been tried as rules of their own.
        if !fits || (few.len() == all.len() && !self.fails(&tried).await?) {
            return Ok(None);
        }
        Ok(Some(few))
    }

    /// Whether there are several faults, whose decisions are not told apart.
    const fn holds_others(&self) -> bool {
        !self.held.0.is_empty() || !self.held.1.is_empty()
    }

    /// Whether one packet is enough.
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
    direction: String,
    first: u64,
    last: u64,
}

impl Packets {
    /// Those that were decided about: each by itself, in order.
    fn of(decisions: &[Decision]) -> Vec<Self> {
        let each = decisions.iter().map(|decision| Self {
            connection: decision.connection,
            direction: decision.direction.clone().into_owned(),
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
    use super::super::kind::Kind;
    use super::*;
    use crate::relay::{Direction, StreamDecision};
    use crate::rule::Fault;

    const LIMIT: Duration = Duration::from_secs(10);

    fn smallest(fault: FaultKind, fails: impl Fn(&Rule) -> bool + 'static) -> Option<Smallest> {
        let dependencies = [example(Kind::Redis, 1)];
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit: LIMIT,
        };
        let failing = experiment(0, &dependencies[0], fault, LIMIT).unwrap();
        let mut runner = Fake::new(fails);
        match block_on(shrink(&mut runner, &measured, &failing)).unwrap() {
            Shrunk::To(smallest) => Some(smallest),
            Shrunk::FailsNoMore => None,
            Shrunk::Interrupted => panic!("nobody interrupts"),
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
            let from_ms = found.unwrap().from_ms.unwrap();
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
        let from_ms = smallest(FaultKind::Slow, fails).unwrap().from_ms.unwrap();
        assert!((700..=770).contains(&from_ms), "{from_ms}");
    }

    #[test]
    fn the_connection_that_matters_is_found() {
        let second = |rule: &Rule| {
            let text = rule.to_string();
            !text.contains("conn=") || text.contains("conn=2")
        };
        let found = smallest(FaultKind::Refused, second).unwrap();
        assert_eq!(found.connection, Some(2));
        assert_eq!(found.rules, ["tcp:1 reject conn=2 first=1"]);
        assert_eq!(
            found.in_words(),
            "connection 2 is enough, one packet is enough"
        );
    }

    #[test]
    fn the_packets_that_matter_are_found() {
        let decision = |connection, packet, direction: &'static str| Decision {
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
        };
        let dependencies = [example(Kind::Redis, 1)];
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
        let found = block_on(shrink(&mut runner, &measured, &failing)).unwrap();
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
            direction: Direction::Downstream,
            action: "limit_data".into(),
            arm: 0,
            at: None,
            value: None,
            time_ns: 0,
        };
        let dependencies = [example(Kind::Redis, 1)];
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
            let found = block_on(shrink(&mut runner, &measured, &failing)).unwrap();
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
}
