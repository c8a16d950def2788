//! The smallest fault that still makes a command fail.

use anyhow::Result;

use super::attempt::{Measured, Runner, attempt};
use super::dependency::Dependency;
use super::faults::{Experiment, FaultKind, Magnitude};
use super::fewest::fewest;
use crate::rule::units::show_duration;

/// How near the two sides of a threshold come to each other: within a tenth.
const NEAR_PERCENT: u64 = 110;
/// The least magnitude that is tried, in milliseconds.
const LEAST_MS: u64 = 10;
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
    /// Whether one packet is enough.
    pub is_one_packet: bool,
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
        if self.is_one_packet {
            parts.push("one packet is enough".to_owned());
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
        is_one_packet: found.is_one_packet,
    }))
}

/// What is left of one fault.
#[derive(Default)]
struct Reduced {
    from_ms: Option<u64>,
    connection: Option<u64>,
    is_one_packet: bool,
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
        let Some(joined) = joined.filter(|_| !self.is_interrupted) else {
            return Ok(false);
        };
        let attempt = attempt(self.runner, self.measured, &joined).await?;
        self.is_interrupted = attempt.is_none();
        Ok(attempt.is_some_and(|attempt| attempt.verdict.is_failure()))
    }

    /// Makes one fault smaller.
    async fn reduce(&mut self, smallest: &mut Experiment) -> Result<Reduced> {
        let dependency = &self.measured.dependencies[smallest.dependency];
        if let Some(magnitude) = smallest.magnitude {
            let ms = self.bisect(smallest, dependency, magnitude).await?;
            self.settle(smallest, dependency, ms).await?;
        }
        let from_ms = smallest.magnitude.map(|magnitude| magnitude.ms);
        Ok(Reduced {
            from_ms,
            connection: self.connection(smallest, dependency).await?,
            is_one_packet: self.one_packet(smallest).await?,
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
        // A window in time and a count over all connections say already when it happens.
        if smallest.fault == FaultKind::Outage || counts(smallest) {
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

fn counts(experiment: &Experiment) -> bool {
    experiment
        .rules
        .iter()
        .any(|rule| rule.contains("count=rule"))
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
    use crate::rule::{Fault, Rule};

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
