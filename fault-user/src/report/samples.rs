//! Samples of counters during a run, for its report.

use std::time::Duration;

use super::file::{CounterSample, TargetTraffic};
use crate::inject::injection::Hits;

/// The sampling interval of a short run.
pub const SAMPLING: Duration = Duration::from_millis(100);

/// Maximum number of samples. Of a longer run every second one is kept, then every fourth, and so on.
const MOST: usize = 6000;

/// The samples so far.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The samples of rules.
    pub rules: Vec<CounterSample>,
    /// The samples of targets.
    pub traffic: Vec<TargetTraffic>,
    every: Duration,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            traffic: Vec::new(),
            every: SAMPLING,
        }
    }
}

impl Samples {
    /// Whether the next sample is due.
    #[must_use]
    pub fn is_due(&self, at: Duration) -> bool {
        let last = self.rules.last();
        // A tick may come a little early.
        last.is_none_or(|last| at + SAMPLING / 2 >= Duration::from_millis(last.at_ms) + self.every)
    }

    /// Takes a sample of all rules, and of the bytes of all targets. Targets must be the same in every call.
    pub fn take<'a>(
        &mut self,
        at_ms: u64,
        hits: &[Hits],
        targets: impl Iterator<Item = (&'a str, u64)>,
    ) {
        if self.rules.len() >= MOST {
            self.thin();
        }
        self.rules.push(CounterSample::of(at_ms, hits));
        for (place, (target, bytes)) in targets.enumerate() {
            if place == self.traffic.len() {
                self.traffic.push(TargetTraffic {
                    target: target.to_owned(),
                    bytes: Vec::new(),
                });
            }
            self.traffic[place].bytes.push(bytes);
        }
    }

    fn thin(&mut self) {
        self.every *= 2;
        halve(&mut self.rules);
        for one in &mut self.traffic {
            halve(&mut one.bytes);
        }
    }
}

/// Keeps every second one.
fn halve<T>(list: &mut Vec<T>) {
    let mut keep = false;
    list.retain(|_| {
        keep = !keep;
        keep
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_has_not_more_figures() {
        let mut samples = Samples::default();
        let mut taken = 0;
        for at_ms in (0..4 * 3_600_000).step_by(100) {
            if samples.is_due(Duration::from_millis(at_ms)) {
                samples.take(at_ms, &[], [("db", at_ms)].into_iter());
                taken += 1;
            }
        }
        assert!((MOST / 2..=MOST).contains(&samples.rules.len()));
        assert!(taken < 40_000, "{taken}");
        let steps: Vec<u64> = samples
            .rules
            .windows(2)
            .map(|pair| pair[1].at_ms - pair[0].at_ms)
            .collect();
        assert!(steps.iter().all(|step| *step == steps[0]), "{steps:?}");
        let at: Vec<u64> = samples.rules.iter().map(|sample| sample.at_ms).collect();
        assert_eq!(samples.traffic[0].bytes, at);
    }
}
