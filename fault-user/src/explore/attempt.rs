//! Runs the command once under a fault, and judges the run. How it is run is up to a [`Runner`].

use std::time::Duration;

use anyhow::Result;

use super::dependency::Dependency;
use super::faults::Experiment;
use super::verdict::{ExperimentVerdict, Measure, Observation};

/// Runs the command.
pub trait Runner {
    /// Runs it under rules, and kills it when it takes longer than `limit`. Nothing when it was interrupted.
    ///
    /// # Errors
    /// The rules can't be injected, or the command can't be started.
    fn run(
        &mut self,
        rules: &[String],
        limit: Duration,
    ) -> impl Future<Output = Result<Option<Observation>>>;
}

/// What is known from the runs without faults.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// What the command talks to.
    pub dependencies: &'a [Dependency],
    /// How long it takes.
    pub baseline: Duration,
    /// How long it may take under a fault, besides the time that the fault itself adds.
    pub limit: Duration,
}

/// A run, judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// What it came to.
    pub verdict: ExperimentVerdict,
    /// What was seen.
    pub seen: Observation,
}

/// Runs the command once under an experiment, and judges that; nothing when it was interrupted.
///
/// # Errors
/// As [`Runner::run`].
pub async fn attempt(
    runner: &mut impl Runner,
    measured: &Measured<'_>,
    experiment: &Experiment,
) -> Result<Option<Attempt>> {
    let limit = measured.limit + experiment.adds;
    let seen = runner.run(&experiment.rules, limit).await?;
    let measure = Measure {
        baseline: measured.baseline,
        adds: experiment.adds,
        over: experiment.over,
    };
    Ok(seen.map(|seen| Attempt {
        verdict: ExperimentVerdict::of(&seen, &measure),
        seen,
    }))
}
