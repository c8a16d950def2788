//! What a run under a fault comes to.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::relay::StreamDecision;
use crate::report::record::Decision;
use crate::watch::history::Connect;

/// What a command is given to recover when a fault is over.
const GRACE: Duration = Duration::from_millis(500);

/// Nothing that took only this much longer is slow: a machine has its moods.
const UNNOTICED: Duration = Duration::from_millis(100);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// With this code.
    Exited(u8),
    /// By this signal.
    Signalled(i32),
    /// It was killed at the timeout.
    TimedOut,
}

/// What was seen of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// How it ended.
    pub end: RunEnd,
    /// How long it took.
    pub took: Duration,
    /// What the rules did something to.
    pub hits: u64,
    /// Connects to each dependency, in their order.
    pub connects: Vec<u64>,
    /// What the rules decided about packets; the rules are counted from 1.
    pub decisions: Vec<Decision>,
    /// What they decided about connections.
    pub streams: Vec<StreamDecision>,
    /// The connections that were hit, by their ordinals for the rule.
    pub reached: BTreeSet<u32>,
    /// Retries to each dependency whose pauses did not grow; none where they did, or where there were few.
    pub retries: Vec<u64>,
    /// The connections to each dependency that were watched, in their order.
    pub watched: Vec<Vec<Connect>>,
    /// What it connected to, and does not without faults.
    pub others: Vec<String>,
    /// The end of what it wrote.
    pub output: String,
    /// Connections that were open when it was killed.
    pub waited_for: Vec<String>,
    /// Why a service was not well in time when the fault was over, if it was not.
    pub unrecovered: Option<String>,
    /// Why `--check` failed, if it did.
    pub broken: Option<String>,
    /// Processes that it left behind.
    pub left_behind: usize,
}

/// The number of retries among these pauses between connects in vain, where there are enough of them and they don't
/// grow; else 0. A limit that is reached soon and jitter are back-off, too.
#[must_use]
pub fn retries_without_backoff(pauses_ns: &[u64]) -> u64 {
    /// Fewer pauses show nothing.
    const PAUSES_LEAST: usize = 6;
    /// So many first ones are compared with so many last ones.
    const PAUSES: usize = 3;
    /// A pause that grew is this much longer, in percent.
    const GROWN_PERCENT: u64 = 150;
    let middle = |pauses: &[u64]| {
        let mut sorted = pauses.to_vec();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(0)
    };
    if pauses_ns.len() < PAUSES_LEAST {
        return 0;
    }
    let first = middle(&pauses_ns[..PAUSES]);
    let last = middle(&pauses_ns[pauses_ns.len() - PAUSES..]);
    let grows = last.saturating_mul(100) >= first.saturating_mul(GROWN_PERCENT) && last > first;
    if grows { 0 } else { pauses_ns.len() as u64 }
}

/// What it comes to, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExperimentVerdict {
    /// The fault never came to act.
    NotReached,
    /// It succeeded.
    Survived,
    /// It succeeded, and took over three times as long as without the fault.
    Slow,
    /// It ended with another exit code than without the fault.
    Failed,
    /// It was killed at the timeout, under the fault.
    Hung,
    /// The fault was over for half a second, and it failed or hung all the same; or a service was not well in time.
    NoRecovery,
    /// It left behind what must not be.
    Broken,
}

/// What runs are measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// How long a run takes without faults.
    pub baseline: Duration,
    /// How much longer the fault itself makes it.
    pub adds: Duration,
    /// When the fault is over.
    pub over: Option<Duration>,
}

impl ExperimentVerdict {
    /// Judges a run.
    #[must_use]
    pub fn of(seen: &Observation, measure: &Measure) -> Self {
        if seen.broken.is_some() {
            return Self::Broken;
        }
        if seen.unrecovered.is_some() {
            return Self::NoRecovery;
        }
        let slow = (measure.baseline * 3).max(measure.baseline + UNNOTICED);
        let is_over = measure.over.is_some_and(|over| seen.took > over + GRACE);
        match seen.end {
            RunEnd::TimedOut if is_over => Self::NoRecovery,
            RunEnd::TimedOut => Self::Hung,
            RunEnd::Exited(0) if seen.hits == 0 => Self::NotReached,
            RunEnd::Exited(0) if seen.took > slow + measure.adds => Self::Slow,
            RunEnd::Exited(0) => Self::Survived,
            _ if is_over => Self::NoRecovery,
            _ => Self::Failed,
        }
    }

    /// Whether two runs came to the same. The clock tells a failure just before the end of a fault from one just after.
    #[must_use]
    pub fn agrees_with(self, other: Self) -> bool {
        let is_timed = |one| matches!(one, Self::Failed | Self::NoRecovery);
        self == other || (is_timed(self) && is_timed(other))
    }

    /// Whether the fault acted and the command succeeded.
    #[must_use]
    pub fn is_success(self) -> bool {
        matches!(self, Self::Survived | Self::Slow)
    }

    /// Whether it is a finding.
    #[must_use]
    pub fn is_failure(self) -> bool {
        self >= Self::Failed
    }

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NotReached => "not reached",
            Self::Survived => "survived",
            Self::Slow => "slow",
            Self::Failed => "failed",
            Self::Hung => "hung",
            Self::NoRecovery => "no recovery",
            Self::Broken => "broken",
        }
    }

    /// In one letter, for a matrix.
    #[must_use]
    pub fn symbol(self) -> &'static str {
        match self {
            Self::NotReached => "·",
            Self::Survived => "✓",
            Self::Slow => "s",
            Self::Failed => "F",
            Self::Hung => "H",
            Self::NoRecovery => "R",
            Self::Broken => "B",
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run that was hit and ended like this after so many milliseconds.
    pub(crate) fn seen(end: RunEnd, took_ms: u64) -> Observation {
        Observation {
            end,
            took: Duration::from_millis(took_ms),
            hits: 1,
            connects: Vec::new(),
            watched: Vec::new(),
            decisions: Vec::new(),
            streams: Vec::new(),
            reached: BTreeSet::new(),
            retries: Vec::new(),
            others: Vec::new(),
            output: String::new(),
            waited_for: Vec::new(),
            unrecovered: None,
            broken: None,
            left_behind: 0,
        }
    }

    fn judged(seen: &Observation, over_ms: Option<u64>) -> ExperimentVerdict {
        let measure = Measure {
            baseline: Duration::from_millis(100),
            adds: Duration::from_millis(over_ms.unwrap_or(0)),
            over: over_ms.map(Duration::from_millis),
        };
        ExperimentVerdict::of(seen, &measure)
    }

    #[test]
    fn pauses_that_grow_are_backoff() {
        let cases: [(&[u64], u64); 6] = [
            (&[10; 5], 0),
            (&[10; 6], 6),
            (&[0; 9], 9),
            (&[100, 200, 400, 800, 1600, 3200], 0),
            // A limit that is reached soon.
            (&[100, 200, 400, 400, 400, 400, 400, 400], 0),
            // A busy machine.
            (&[100, 101, 140, 99, 100, 130, 100], 7),
        ];
        for (pauses, retries) in cases {
            assert_eq!(retries_without_backoff(pauses), retries, "{pauses:?}");
        }
    }

    #[test]
    fn runs_are_judged_by_how_they_end() {
        for (end, took_ms, over_ms, verdict) in [
            (RunEnd::Exited(0), 300, None, ExperimentVerdict::Survived),
            (RunEnd::Exited(0), 301, None, ExperimentVerdict::Slow),
            (RunEnd::Exited(0), 2301, Some(2000), ExperimentVerdict::Slow),
            (
                RunEnd::Exited(0),
                2300,
                Some(2000),
                ExperimentVerdict::Survived,
            ),
            (RunEnd::Exited(3), 50, None, ExperimentVerdict::Failed),
            (RunEnd::Exited(3), 50, Some(2000), ExperimentVerdict::Failed),
            (
                RunEnd::Exited(3),
                2450,
                Some(2000),
                ExperimentVerdict::Failed,
            ),
            (
                RunEnd::Exited(3),
                2550,
                Some(2000),
                ExperimentVerdict::NoRecovery,
            ),
            (RunEnd::Signalled(11), 50, None, ExperimentVerdict::Failed),
            (RunEnd::TimedOut, 9000, None, ExperimentVerdict::Hung),
            (
                RunEnd::TimedOut,
                9000,
                Some(2000),
                ExperimentVerdict::NoRecovery,
            ),
        ] {
            assert_eq!(
                judged(&seen(end, took_ms), over_ms),
                verdict,
                "{end:?} {took_ms}"
            );
        }
    }

    #[test]
    fn a_broken_invariant_is_the_worst_and_what_is_fast_is_not_slow() {
        let mut one = seen(RunEnd::Exited(0), 99);
        let measure = Measure {
            baseline: Duration::ZERO,
            adds: Duration::ZERO,
            over: None,
        };
        assert_eq!(
            ExperimentVerdict::of(&one, &measure),
            ExperimentVerdict::Survived
        );
        one.hits = 0;
        assert_eq!(judged(&one, None), ExperimentVerdict::NotReached);
        one.unrecovered = Some("exit code 1".to_owned());
        assert_eq!(judged(&one, None), ExperimentVerdict::NoRecovery);
        one.broken = Some("two rows".to_owned());
        assert_eq!(judged(&one, None), ExperimentVerdict::Broken);
        assert!(
            ExperimentVerdict::Broken > ExperimentVerdict::NoRecovery
                && !ExperimentVerdict::Slow.is_failure()
        );
    }
}
