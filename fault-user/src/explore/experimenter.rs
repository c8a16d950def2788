//! Tries one fault after the other, confirms failures, and has them made smaller.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use futures_util::future::join_all;

use super::attempt::{Attempt, Measured, Runner, attempt};
use super::cell::{Cell, Standing};
use super::faults::Experiment;
use super::shrink::{Halt, Shrunk, shrink, tolerance};

/// So many times the usual number of connects are a storm.
const STORM: u64 = 10;

/// How experiments are made.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Whether failures are made smaller, and the largest magnitude that is survived is looked for.
    pub shrinks: bool,
    /// When no further one begins, and none is made smaller any more.
    pub until: Option<Instant>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Explored {
    /// By experiment, in their order.
    pub cells: Vec<Cell>,
    /// Experiments that were left out for want of time.
    pub left_out: Vec<Experiment>,
    /// Why it ended early, if it did.
    pub stopped: Option<Stop>,
}

/// Why exploring ended early.
#[derive(Debug)]
pub enum Stop {
    /// A signal.
    Interrupted,
    /// Something went wrong.
    Error(anyhow::Error),
}

/// What was found so far, by the numbers of the experiments.
pub type Cells = BTreeMap<usize, Cell>;

/// Tries all experiments, as many at once as there are runners. `tell` is called when one is done, with its number and
/// all that are done; an error of it ends everything. The cells in `known` are not tried again.
pub async fn explore(
    runners: &mut [impl Runner],
    measured: &Measured<'_>,
    experiments: &[Experiment],
    known: Cells,
    manner: Manner,
    tell: impl FnMut(usize, &mut Cells) -> Result<()>,
) -> Explored {
    let progress = RefCell::new(Progress {
        experiments,
        until: manner.until,
        next: 0,
        done: known,
        stopped: None,
        tell,
    });
    let work = runners.iter_mut().map(async |runner| {
        loop {
            let Some(number) = progress.borrow_mut().next() else {
                return;
            };
            let tried = cell(runner, measured, &experiments[number], manner).await;
            progress.borrow_mut().take(number, tried);
        }
    });
    join_all(work).await;
    progress.into_inner().finish()
}

/// What is done, and what comes next.
struct Progress<'a, F> {
    experiments: &'a [Experiment],
    until: Option<Instant>,
    next: usize,
    done: Cells,
    stopped: Option<Stop>,
    tell: F,
}

impl<F: FnMut(usize, &mut Cells) -> Result<()>> Progress<'_, F> {
    /// The number of the next experiment; nothing when no further one begins.
    fn next(&mut self) -> Option<usize> {
        while self.done.contains_key(&self.next) {
            self.next += 1;
        }
        let is_late = self.until.is_some_and(|until| Instant::now() >= until);
        if is_late || self.stopped.is_some() || self.next >= self.experiments.len() {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    /// Keeps what an experiment came to. Nothing more begins after an interruption or an error.
    fn take(&mut self, number: usize, Tried { cell, stop }: Tried) {
        if let Some(cell) = cell {
            self.done.insert(number, cell);
            if let Err(error) = (self.tell)(number, &mut self.done) {
                self.stopped = Some(Stop::Error(error));
            }
        }
        match stop {
            Some(Stop::Interrupted) => {
                self.stopped.get_or_insert(Stop::Interrupted);
            }
            Some(error) => self.stopped = Some(error),
            None => {}
        }
    }

    fn finish(self) -> Explored {
        let all = self.experiments.iter().enumerate();
        let left_out = all.filter(|(number, _)| !self.done.contains_key(number));
        Explored {
            left_out: left_out.map(|(_, one)| one.clone()).collect(),
            cells: self.done.into_values().collect(),
            stopped: self.stopped,
        }
    }
}

/// What one experiment came to.
struct Tried {
    /// Nothing where not even one run was made.
    cell: Option<Cell>,
    /// Why nothing more is to begin, if so.
    stop: Option<Stop>,
}

/// Makes one experiment.
async fn cell(
    runner: &mut impl Runner,
    measured: &Measured<'_>,
    experiment: &Experiment,
    Manner { shrinks, until }: Manner,
) -> Tried {
    let first = match attempt(runner, measured, experiment).await {
        Ok(Some(first)) => first,
        Ok(None) => return Tried::nothing(Stop::Interrupted),
        Err(error) => return Tried::nothing(Stop::Error(error)),
    };
    let mut cell = Cell {
        storm: storm(measured, experiment, &first),
        retries: retries(measured, experiment, &first),
        experiment: experiment.clone(),
        first,
        differs: None,
        smallest: None,
        survives_ms: None,
        is_unfinished: false,
        standing: Standing::Well,
    };
    if !cell.first.verdict.is_failure() {
        let mut stop = None;
        if cell.is_survived() {
            cell.survives_ms = experiment.magnitude.map(|magnitude| magnitude.ms);
        }
        if cell.is_survived() && shrinks {
            match tolerance(runner, measured, experiment, until).await {
                Ok(Some((ms, halt))) => {
                    cell.survives_ms = Some(ms);
                    stop = halt.and_then(Halt::stop);
                }
                Ok(None) => {}
                Err(error) => stop = Some(Stop::Error(error)),
            }
        }
        return Tried {
            cell: Some(cell),
            stop,
        };
    }
    let mut is_late = false;
    let stop = match attempt(runner, measured, experiment).await {
        Ok(Some(second)) if !second.verdict.agrees_with(cell.first.verdict) => {
            cell.differs = Some(second.verdict);
            None
        }
        // What somebody has written is as it is meant to be.
        Ok(Some(_)) if shrinks && !experiment.is_own() => {
            match shrink(runner, measured, experiment, until).await {
                Ok(Shrunk::To(smallest)) => {
                    cell.smallest = Some(smallest);
                    None
                }
                Ok(Shrunk::FailsNoMore) => None,
                Ok(Shrunk::Halted(smallest, halt)) => {
                    cell.smallest = smallest;
                    is_late = halt == Halt::Late;
                    halt.stop()
                }
                Err(error) => Some(Stop::Error(error)),
            }
        }
        Ok(Some(_)) => None,
        // Once is no failure yet.
        Ok(None) => return Tried::nothing(Stop::Interrupted),
        Err(error) if cell.first.seen.unrecovered.is_none() => {
            return Tried::nothing(Stop::Error(error));
        }
        Err(error) => Some(Stop::Error(error)),
    };
    // A service that stays down would be down again after it.
    cell.is_unfinished = (stop.is_some() || is_late) && cell.first.seen.unrecovered.is_none();
    Tried {
        cell: Some(cell),
        stop,
    }
}

impl Halt {
    /// Why nothing more is to begin, if that is to be told: the budget is asked before each experiment.
    fn stop(self) -> Option<Stop> {
        (self == Self::Interrupted).then_some(Stop::Interrupted)
    }
}

impl Tried {
    fn nothing(stop: Stop) -> Self {
        Self {
            cell: None,
            stop: Some(stop),
        }
    }
}

/// How many times the usual number of connects a run made that survived, where that is a storm.
fn storm(measured: &Measured<'_>, experiment: &Experiment, run: &Attempt) -> Option<u64> {
    let usual = measured.dependencies[experiment.dependency]
        .connections
        .max(1);
    let connects = *run.seen.connects.get(experiment.dependency)?;
    let is_storm = connects > usual * STORM && !run.verdict.is_failure();
    is_storm.then_some(connects / usual)
}

/// How many retries without growing back-off a run made that survived, where there are more connects than usual.
fn retries(measured: &Measured<'_>, experiment: &Experiment, run: &Attempt) -> Option<u64> {
    let place = experiment.dependency;
    let retries = *run.seen.retries.get(place)?;
    let is_more = *run.seen.connects.get(place)? > measured.dependencies[place].connections;
    (retries != 0 && is_more && !run.verdict.is_failure()).then_some(retries)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::super::dependency::tests::example;
    use super::super::faults::{FAULTS, experiments};
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::tests::seen;
    use super::super::verdict::{ExperimentVerdict, Observation, RunEnd};
    use super::*;
    use crate::relay::StreamDecision;
    use crate::report::record::Decision;
    use crate::rule::Rule;

    /// A command that fails when a rule says so.
    pub(crate) struct Fake<F> {
        fails: F,
        pub(crate) runs: usize,
        /// Interrupted at this run.
        pub(crate) last: usize,
        pub(crate) connects: u64,
        pub(crate) retries: u64,
        pub(crate) decisions: Vec<Decision>,
        pub(crate) streams: Vec<StreamDecision>,
    }

    impl<F: Fn(&Rule) -> bool> Fake<F> {
        pub(crate) fn new(fails: F) -> Self {
            Self {
                fails,
                runs: 0,
                last: usize::MAX,
                connects: 1,
                retries: 0,
                decisions: Vec::new(),
                streams: Vec::new(),
            }
        }
    }

    impl<F: Fn(&Rule) -> bool> Runner for Fake<F> {
        async fn run(&mut self, rules: &[String], _limit: Duration) -> Result<Option<Observation>> {
            self.runs += 1;
            if self.runs > self.last {
                return Ok(None);
            }
            let rules = rules
                .iter()
                .map(|text| text.parse::<Rule>().expect("a rule"));
            let fails = rules.into_iter().any(|rule| (self.fails)(&rule));
            let mut run = seen(RunEnd::Exited(u8::from(fails)), 50);
            run.connects = vec![self.connects];
            run.retries = vec![self.retries];
            run.decisions.clone_from(&self.decisions);
            run.streams.clone_from(&self.streams);
            Ok(Some(run))
        }
    }

    /// A cell that came to this at once.
    pub(crate) fn cell_of(
        experiment: Experiment,
        verdict: ExperimentVerdict,
        seen: Observation,
    ) -> Cell {
        Cell {
            experiment,
            first: Attempt { verdict, seen },
            differs: None,
            smallest: None,
            survives_ms: None,
            is_unfinished: false,
            storm: None,
            retries: None,
            standing: Standing::Well,
        }
    }

    pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(future)
    }

    fn explored<F: Fn(&Rule) -> bool>(runner: &mut Fake<F>, manner: Manner) -> Explored {
        explored_from(BTreeMap::new(), runner, manner)
    }

    fn explored_from<F: Fn(&Rule) -> bool>(
        known: BTreeMap<usize, Cell>,
        runner: &mut Fake<F>,
        manner: Manner,
    ) -> Explored {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        let limit = Duration::from_secs(10);
        let measured = Measured {
            dependencies: &dependencies,
            baseline: Duration::from_millis(50),
            limit,
        };
        let faults = FAULTS.map(|(fault, ..)| fault);
        let all = experiments(&[(0, &dependencies[0])], &faults, limit);
        let runners = std::slice::from_mut(runner);
        block_on(explore(runners, &measured, &all, known, manner, |_, _| {
            Ok(())
        }))
    }

    const MANNER: Manner = Manner {
        shrinks: false,
        until: None,
    };

    #[test]
    fn what_fails_is_tried_again_and_what_survives_is_not() {
        let mut runner = Fake::new(|rule: &Rule| rule.to_string().contains("reject"));
        let found = explored(&mut runner, MANNER);
        assert_eq!((found.cells.len(), runner.runs), (14, 15));
        let failures: Vec<_> = found
            .cells
            .iter()
            .filter(|cell| cell.is_failure())
            .collect();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].symbol(), "F");
    }

    #[test]
    fn a_failure_that_does_not_come_again_is_flaky() {
        let runs = std::cell::Cell::new(0);
        let mut runner = Fake::new(move |_: &Rule| {
            runs.set(runs.get() + 1);
            runs.get() == 1
        });
        let found = explored(&mut runner, MANNER);
        let cell = &found.cells[0];
        assert_eq!(cell.verdict(), "flaky: failed, then survived");
        assert_eq!((cell.symbol(), cell.is_failure()), ("?", false));
    }

    #[test]
    fn an_interruption_keeps_what_is_done() {
        let mut runner = Fake::new(|_: &Rule| false);
        runner.last = 3;
        let found = explored(&mut runner, MANNER);
        assert!(matches!(found.stopped, Some(Stop::Interrupted)));
        assert_eq!((found.cells.len(), found.left_out.len()), (3, 11));
    }

    #[test]
    fn an_interruption_while_a_fault_is_made_smaller_stops_and_keeps_the_failure() {
        let mut runner = Fake::new(|_: &Rule| true);
        // The first run, its confirmation, and one with a smaller fault.
        runner.last = 3;
        let shrinks = true;
        let found = explored(&mut runner, Manner { shrinks, ..MANNER });
        assert!(matches!(found.stopped, Some(Stop::Interrupted)));
        assert_eq!((found.cells.len(), found.left_out.len()), (1, 13));
        let cell = &found.cells[0];
        assert!(cell.is_failure() && cell.is_unfinished);
        assert_eq!(
            cell.rules(),
            ["tcp:1 reject conn=1"],
            "the third run failed"
        );
    }

    #[test]
    fn what_is_known_is_not_tried_again() {
        let mut runner = Fake::new(|_: &Rule| false);
        let all = explored(&mut runner, MANNER);
        let known = [(0, all.cells[0].clone()), (4, all.cells[4].clone())];
        let mut runner = Fake::new(|_: &Rule| false);
        let found = explored_from(known.into(), &mut runner, MANNER);
        assert_eq!((found.cells, runner.runs), (all.cells, 12));
    }

    #[test]
    fn without_time_nothing_begins() {
        let mut runner = Fake::new(|_: &Rule| false);
        let until = Some(Instant::now());
        let found = explored(&mut runner, Manner { until, ..MANNER });
        assert_eq!((found.left_out.len(), runner.runs), (14, 0));
    }

    #[test]
    fn a_storm_of_retries_is_seen_where_the_command_survives() {
        let mut runner = Fake::new(|_: &Rule| false);
        runner.connects = 42;
        let found = explored(&mut runner, MANNER);
        assert_eq!(found.cells[0].storm, Some(21), "usually there are two");
        assert_eq!(found.cells[0].symbol(), "!");
    }

    #[test]
    fn retries_without_backoff_are_seen_where_there_are_more_connects_than_usual() {
        for (connects, expected) in [(2, None), (9, Some(7))] {
            let mut runner = Fake::new(|_: &Rule| false);
            (runner.connects, runner.retries) = (connects, 7);
            let found = explored(&mut runner, MANNER);
            assert_eq!(
                (found.cells[0].storm, found.cells[0].retries),
                (None, expected)
            );
            assert_eq!(found.cells[0].symbol() == "!", expected.is_some());
        }
    }
}
