//! `fault explore`: what a command talks to, what happens to it when that fails, and the smallest fault that makes it fail.
//!
//! `capture`, `flows`, `kind`, `names` and `dependency` find out what it talks to; `faults` makes experiments of that,
//! `experimenter` tries them, `verdict` judges the runs and `shrink` makes faults smaller; `matrix` is what is printed.
//! All of these are pure but for `capture` and `lane`, which runs the command.

mod accept;
mod again;
mod attempt;
mod capture;
mod cell;
mod coverage;
mod dependency;
mod experimenter;
mod faults;
mod fewest;
mod flows;
mod kind;
mod lane;
mod matrix;
mod names;
mod own;
mod report;
mod service;
mod shrink;
mod verdict;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use futures_util::future::join_all;

pub use self::faults::FAULTS;

use self::accept::AcceptFile;
use self::again::Again;
use self::attempt::{Measured, Runner as _};
use self::cell::{Cell, Standing};
use self::dependency::{Dependency, Found, Sighting, differences, find};
use self::experimenter::{Cells, Explored, Manner, Stop, explore};
use self::faults::{Experiment, FaultKind, experiments, pairs};
use self::lane::{Commands, ExperimentLane, IdleRule};
use self::names::HostNames;
use self::own::OwnRules;
use self::report::{About, ExploreReport};
use self::verdict::{Observation, RunEnd};
use crate::inject::endpoints::EndpointUse;
use crate::report::file;
use crate::report::summary::counted;
use crate::session::files::{Files, GrowingList, HTML, JUNIT};
use crate::session::options::SessionOptions;
use crate::session::outcome::{Failure, Outcome, exit};
use crate::session::rules::draw_seed;
use crate::session::{require, runtime};
use crate::sys::preflight::Need;
use crate::sys::process::caller;
use crate::sys::process::command::CommandSpec;
use crate::sys::process::user::Identity;
use crate::tell::{self, Patience, tell};

/// The least time that a run may take under a fault.
const TIMEOUT_LEAST: Duration = Duration::from_secs(10);
/// So many times as long as without faults a run may take.
const TIMEOUT_TIMES: u32 = 5;
/// Without `--timeout` a run without faults may take as long as it likes.
const NO_LIMIT: Duration = Duration::from_hours(365 * 24);
/// With `--jobs` this variable tells the command which job it runs in, counted from 1.
const JOB: &str = "FAULT_JOB";
/// The exit code after Ctrl-C, as shells count.
const INTERRUPTED: u8 = 130;

/// What is explored, and how.
#[derive(Debug)]
pub struct ExploreOptions {
    /// How programs are put on interfaces.
    pub options: SessionOptions,
    /// Who runs the command, where that was asked for.
    pub user: Option<String>,
    /// Runs without faults.
    pub runs: u32,
    /// Where all randomness comes from.
    pub seed: Option<u64>,
    /// The kinds of faults to try, by name; all when empty.
    pub faults: Vec<String>,
    /// A file of rules that are experiments, too.
    pub file: Option<PathBuf>,
    /// Only dependencies that one of these is part of.
    pub only: Vec<String>,
    /// None of these.
    pub skip: Vec<String>,
    /// Whether the command's own servers are dependencies.
    pub internal: bool,
    /// Whether experiments are only listed.
    pub plan: bool,
    /// How many faults there are at once: 1 or 2.
    pub depth: u8,
    /// How many runs there are at once.
    pub jobs: usize,
    /// How long a run may take.
    pub timeout: Option<Duration>,
    /// How long all may take.
    pub budget: Option<Duration>,
    /// Whether failures are made smaller.
    pub shrinks: bool,
    /// Within which time a running service must be well again after a fault.
    pub recovery: Duration,
    /// The file of accepted failures.
    pub accept: Option<PathBuf>,
    /// The folder of the report.
    pub report: Option<PathBuf>,
    /// The folder of an interrupted run's report, to go on from there.
    pub resume: Option<PathBuf>,
    /// Done before each run.
    pub before: Option<String>,
    /// Done after each run.
    pub after: Option<String>,
    /// Must succeed after each run.
    pub check: Option<String>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

/// What runs without faults have shown.
struct Baseline {
    found: Found,
    /// All that was connected to.
    endpoints: Vec<EndpointUse>,
    took: Duration,
}

/// Tells of each experiment that is done, and keeps it.
struct Progress<'a> {
    files: &'a Files,
    list: &'a mut GrowingList,
    about: About<'a>,
    accept: Option<&'a AcceptFile>,
    earlier: Option<&'a ExploreReport>,
    /// The number of experiments, and of those that were known before.
    count: usize,
    known: usize,
}

impl Progress<'_> {
    fn tell(&mut self, number: usize, cells: &mut Cells) -> anyhow::Result<()> {
        let done = cells.len();
        let Some(cell) = cells.get_mut(&number) else {
            return Ok(());
        };
        let (about, count) = (&self.about, self.count);
        let dependencies = &about.found.dependencies;
        let accepted = self.accept;
        let accepted = accepted.and_then(|accept| accept.accepted(dependencies, cell));
        cell.standing = Standing::of(cell, accepted);
        let took = about.started.elapsed() / times(done - self.known);
        let eta = matrix::seconds(took * times(count - done));
        let happened = matrix::happened(dependencies, cell);
        tell!("fault: [{done}/{count}, {eta} left] {happened}");
        // Whatever ends this process, what is done is kept.
        let begin = || about.growing(self.earlier);
        let kept = self
            .list
            .add(self.files, file::REPORT, begin, about.item(cell)?);
        kept.map_err(|error| {
            if self.files.has(file::REPORT) {
                anyhow!("{error:#}: the report has what was done before; continue with --resume")
            } else {
                error
            }
        })
    }
}

impl ExploreOptions {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, a command that fails without faults, or what was asked for can't be set up.
    pub fn execute(&self) -> Outcome {
        let faults = self.faults()?;
        if self.options.is_given() && self.jobs > 1 {
            let error = anyhow!(
                "--jobs: there is one service, on which the faults of all jobs would act at once: leave --jobs out"
            );
            return Err(Failure::usage(error));
        }
        let accept = self.accept.as_deref().map(AcceptFile::open);
        let accept = accept.transpose().map_err(Failure::usage)?;
        let own = self.file.as_deref().map(OwnRules::load);
        let own = own.transpose().map_err(Failure::usage)?;
        require(&[Need::Programs, Need::Cgroup])?;
        let earlier = self.earlier().map_err(Failure::usage)?;
        let given = earlier.as_ref().map(ExploreReport::seed).or(self.seed);
        let seed = given.map_or_else(draw_seed, Ok)?;
        // Before hours of work are lost for want of a folder.
        let folder = self.report.clone().or(self.resume.clone());
        let files = Files::open(folder, None)?;
        let jobs = 1..=self.jobs;
        let commands: Vec<_> = jobs
            .map(|job| self.commands(job))
            .collect::<Result<_, _>>()?;
        let idle = IdleRule::new(&self.options, seed)?;
        runtime()?.block_on(async {
            let mut lanes = self.lanes(&commands, &idle).await?;
            let outcome = self
                .explore(&mut lanes, (&faults, own), seed, &files, (accept, earlier))
                .await;
            for lane in lanes {
                // What was found stands.
                if let Err(error) = lane.close() {
                    tell!("fault: warning: not everything was restored: {error:#}");
                }
            }
            outcome
        })
    }

    /// A lane for each job.
    async fn lanes<'a>(
        &'a self,
        commands: &'a [Commands],
        idle: &'a IdleRule,
    ) -> Result<Vec<ExperimentLane<'a>>, Failure> {
        let _patience = Patience::start("setting up");
        let mut lanes = Vec::with_capacity(commands.len());
        for commands in commands {
            let (longest, recovery) = (self.longest(), self.recovery);
            let lane = ExperimentLane::open(commands, &self.options, idle, longest, recovery);
            lanes.push(lane.await?);
        }
        Ok(lanes)
    }

    /// How long a run without faults may take.
    fn longest(&self) -> Duration {
        self.timeout.unwrap_or(NO_LIMIT)
    }

    /// The command in words.
    fn words(&self) -> Vec<String> {
        let words = self.command.iter();
        words
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    /// How a cell is done again.
    fn again(&self, seed: u64) -> Again {
        Again {
            command: self.words(),
            seed,
            user: self.user.clone(),
            whose: self.whose(),
            job: (self.jobs > 1).then(|| format!("{JOB}=1")),
            before: self.before.clone(),
            after: self.after.clone(),
            check: self.check.clone(),
        }
    }

    /// The options that name a running service.
    fn whose(&self) -> Vec<String> {
        let SessionOptions {
            pid,
            cgroup,
            container,
            ..
        } = &self.options;
        let pid = pid.map(|pid| pid.to_string());
        let cgroup = cgroup.as_ref().map(|path| path.display().to_string());
        let given = [
            ("--pid", pid),
            ("--cgroup", cgroup),
            ("--container", container.clone()),
        ];
        let given = given.into_iter();
        given
            .filter_map(|(option, value)| Some([option.to_owned(), value?]))
            .flatten()
            .collect()
    }

    /// The report to go on from.
    fn earlier(&self) -> anyhow::Result<Option<ExploreReport>> {
        let Some(folder) = &self.resume else {
            return Ok(None);
        };
        let read = ExploreReport::read(&folder.join(file::REPORT)).and_then(|report| {
            report.check_command(&self.words())?;
            Ok(report)
        });
        read.map(Some).context("--resume")
    }

    fn faults(&self) -> Result<Vec<FaultKind>, Failure> {
        if self.faults.is_empty() {
            return Ok(FAULTS.map(|(fault, ..)| fault).to_vec());
        }
        let parsed = self.faults.iter().map(|name| name.parse());
        parsed
            .collect::<Result<_, String>>()
            .map_err(|error| Failure::usage(anyhow!("--faults: {error}")))
    }

    /// The commands of a job, counted from 1.
    fn commands(&self, job: usize) -> Result<Commands, Failure> {
        let identity = Identity::choose(self.user.as_deref(), |name| std::env::var_os(name))?;
        // Another user that was asked for has an environment of its own.
        let mut environment = match self.user {
            None => caller::environment(),
            Some(_) => Vec::new(),
        };
        if self.jobs > 1 {
            environment.push((JOB.into(), job.to_string().into()));
        }
        let shell = |line: &Option<String>| -> Result<_, Failure> {
            let line = line.as_deref();
            let ready =
                line.map(|line| Commands::shell(line, identity.clone(), environment.clone()));
            Ok(ready.transpose()?)
        };
        Ok(Commands {
            before: shell(&self.before)?,
            after: shell(&self.after)?,
            check: shell(&self.check)?,
            main: CommandSpec::new(self.command.clone(), identity.clone())?
                .with_environment(environment.clone())
                .resolve()?,
        })
    }

    async fn explore(
        &self,
        lanes: &mut [ExperimentLane<'_>],
        (faults, own): (&[FaultKind], Option<OwnRules>),
        seed: u64,
        files: &Files,
        (mut accept, earlier): (Option<AcceptFile>, Option<ExploreReport>),
    ) -> Outcome {
        let begun = Instant::now();
        let Some(baseline) = self.baseline(lanes).await? else {
            tell!("fault: interrupted before the runs without faults had ended");
            return Ok(INTERRUPTED);
        };
        let dependencies = &baseline.found.dependencies;
        let least = (baseline.took * TIMEOUT_TIMES).max(TIMEOUT_LEAST);
        let measured = Measured {
            dependencies,
            baseline: baseline.took,
            limit: self.timeout.unwrap_or(least),
        };
        let own = own.map_or(Ok(Vec::new()), |own| own.experiments(dependencies));
        let mut own = own.map_err(Failure::usage)?;
        if let Some(accept) = &accept {
            let checked = accept.check(dependencies, &own, measured.limit);
            checked.map_err(Failure::usage)?;
        }
        if let Some(earlier) = &earlier {
            let checked = earlier.check_targets(dependencies, &own);
            checked.map_err(Failure::usage)?;
        }
        let chosen = self.chosen(dependencies)?;
        own.retain(|one| chosen.iter().any(|(number, _)| *number == one.dependency));
        let singles = experiments(&chosen, faults, measured.limit);
        let pairs = if self.depth > 1 {
            pairs(dependencies, &singles)
        } else {
            Vec::new()
        };
        let experiments = [own, singles].concat();
        tell!("{}", estimate(&experiments, &measured, self.jobs));
        if self.depth > 1 {
            let known = match pairs.len() {
                0 => String::new(),
                count => format!(
                    "up to {} of faults that the command survives one by one, and ",
                    counted(count, "pair")
                ),
            };
            tell!("fault: --depth 2: then {known}pairs with what it uses only under a fault");
        }
        if self.plan {
            let all = [experiments, pairs].concat();
            tell::data(&matrix::plan(dependencies, &all))?;
            return Ok(exit::SUCCESS);
        }
        tell!("fault: seed {seed}");
        let again = self.again(seed);
        let mut trial = Trial {
            explore: self,
            lanes,
            usual: &baseline.endpoints,
            files,
            list: GrowingList::default(),
            again: &again,
            begun,
            started: None,
            until: self.budget.map(|budget| begun + budget),
            earlier: earlier.as_ref(),
        };
        let (mut found, accepted) = (baseline.found.clone(), accept.as_ref());
        let mut explored = trial
            .explore(&found, &measured, &experiments, accepted)
            .await;
        if self.depth > 1 && explored.stopped.is_none() && explored.left_out.is_empty() {
            trial
                .deepen(&mut found, &measured, faults, accepted, &mut explored)
                .await;
        }
        let dependencies = &found.dependencies;
        let started = trial.started.unwrap_or(begun);
        let written = compare(accept.as_mut(), dependencies, &mut explored);
        let about = About {
            found: &found,
            measured: &measured,
            again: &again,
            begun,
            started,
        };
        let report = about.whole(&explored, earlier.as_ref());
        let reported = files.write([
            (file::REPORT, report.json()?),
            (JUNIT, report.junit()?),
            (HTML, report.html().into_bytes()),
        ]);
        // A full disk loses files, and not what was found.
        let code = conclude(&found, explored, &again)?;
        written?;
        reported?;
        Ok(code)
    }

    /// Runs the command without faults; nothing when it was interrupted.
    async fn baseline(
        &self,
        lanes: &mut [ExperimentLane<'_>],
    ) -> Result<Option<Baseline>, Failure> {
        let hosts = hosts(lanes);
        let mut baseline: Option<Baseline> = None;
        let mut shortest = Duration::MAX;
        let mut endpoints = Vec::new();
        for number in 1..=self.runs {
            tell!("fault: run {number} of {} without faults", self.runs);
            let observed = lanes[0].observe(&[], self.longest()).await?;
            let Some((seen, mut sighting)) = observed else {
                return Ok(None);
            };
            must_succeed(&seen, "without faults")?;
            add_names(&mut sighting, &hosts);
            let found = find(&sighting, self.internal);
            endpoints.append(&mut sighting.endpoints);
            shortest = shortest.min(seen.took);
            match &mut baseline {
                None => {
                    tell_of_leftovers(&seen);
                    baseline = Some(Baseline {
                        found,
                        endpoints: Vec::new(),
                        took: seen.took,
                    });
                }
                Some(baseline) => {
                    let first = &baseline.found.dependencies;
                    for line in differences(first, &found.dependencies) {
                        tell!("fault: warning: {line}: verdicts are doubtful");
                    }
                    baseline.took = baseline.took.max(seen.took);
                }
            }
        }
        let mut baseline = baseline.context("--runs: at least one run without faults is needed")?;
        baseline.endpoints = endpoints;
        if baseline.took > shortest * 2 {
            tell!(
                "fault: warning: without faults it took {} to {}: verdicts are doubtful",
                matrix::seconds(shortest),
                matrix::seconds(baseline.took)
            );
        }
        let talks_to = matrix::dependencies(&baseline.found);
        let talks_to = match talks_to.trim_end() {
            "" => " nothing".to_owned(),
            list => format!(":\n{list}"),
        };
        let took = matrix::seconds(baseline.took);
        tell!("fault: without faults it takes {took} and talks to{talks_to}");
        let is_service = lanes[0].service().is_some();
        if baseline.found.dependencies.is_empty() {
            let who = if is_service { "service" } else { "command" };
            let error = anyhow!(
                "the {who} opened no connection that was answered: there is nothing to explore"
            );
            return Err(error.into());
        }
        if is_service && baseline.took >= self.recovery {
            return Err(Failure::usage(anyhow!(
                "--recovery {}: the command itself takes {}: give it more time",
                matrix::seconds(self.recovery),
                matrix::seconds(baseline.took)
            )));
        }
        if self.jobs > 1 && !self.plan {
            let Some(took) = self.together(lanes).await? else {
                return Ok(None);
            };
            baseline.took = baseline.took.max(took);
        }
        Ok(Some(baseline))
    }

    /// Runs the command as often at once as there are jobs, without faults: how long that takes. Nothing when it was
    /// interrupted.
    async fn together(
        &self,
        lanes: &mut [ExperimentLane<'_>],
    ) -> Result<Option<Duration>, Failure> {
        tell!("fault: {} runs at once without faults", self.jobs);
        let runs = lanes.iter_mut().map(|lane| lane.run(&[], self.longest()));
        let mut longest = Duration::ZERO;
        for seen in join_all(runs).await {
            let Some(seen) = seen? else {
                return Ok(None);
            };
            must_succeed(&seen, &format!("{} at once (--jobs)", self.jobs))?;
            longest = longest.max(seen.took);
        }
        Ok(Some(longest))
    }

    /// The dependencies that were chosen, with their places.
    fn chosen<'a>(
        &self,
        dependencies: &'a [Dependency],
    ) -> Result<Vec<(usize, &'a Dependency)>, Failure> {
        let is_part = |one: &Dependency, part: &String| {
            one.to_string().contains(part.as_str()) || one.target.contains(part.as_str())
        };
        let given = [("--only", &self.only), ("--skip", &self.skip)];
        for (option, parts) in given {
            for part in parts {
                if !dependencies.iter().any(|one| is_part(one, part)) {
                    return Err(Failure::usage(anyhow!(
                        "{option}: `{part}` is part of no dependency's name or address: they are listed above"
                    )));
                }
            }
        }
        let is_chosen = |one: &Dependency| {
            let is_only = self.only.is_empty() || self.only.iter().any(|part| is_part(one, part));
            is_only && !self.skip.iter().any(|part| is_part(one, part))
        };
        let all = dependencies.iter().enumerate();
        Ok(all.filter(|(_, one)| is_chosen(one)).collect())
    }
}

/// Experiments in the making, and what they have in common.
struct Trial<'a, 'l> {
    explore: &'a ExploreOptions,
    lanes: &'a mut [ExperimentLane<'l>],
    /// What is connected to without faults.
    usual: &'a [EndpointUse],
    files: &'a Files,
    list: GrowingList,
    again: &'a Again,
    begun: Instant,
    /// When the first experiment began.
    started: Option<Instant>,
    /// When no further experiment begins.
    until: Option<Instant>,
    earlier: Option<&'a ExploreReport>,
}

impl Trial<'_, '_> {
    /// Makes these experiments, but for those that an earlier report has.
    async fn explore(
        &mut self,
        found: &Found,
        measured: &Measured<'_>,
        experiments: &[Experiment],
        accept: Option<&AcceptFile>,
    ) -> Explored {
        let dependencies = &found.dependencies;
        let earlier = self.earlier;
        let known = earlier.map_or_else(Cells::new, |one| one.known(dependencies, experiments));
        if !known.is_empty() {
            let count = counted(known.len(), "experiment");
            tell!("fault: the report already has the results of {count}");
        }
        for lane in &mut *self.lanes {
            lane.count(dependencies, self.usual);
        }
        self.started.get_or_insert_with(Instant::now);
        let manner = Manner {
            shrinks: self.explore.shrinks,
            until: self.until,
        };
        let mut progress = Progress {
            files: self.files,
            list: &mut self.list,
            about: About {
                found,
                measured,
                again: self.again,
                begun: self.begun,
                started: Instant::now(),
            },
            accept,
            earlier: self.earlier,
            count: experiments.len(),
            known: known.len(),
        };
        let told = |number: usize, cells: &mut Cells| progress.tell(number, cells);
        explore(self.lanes, measured, experiments, known, manner, told).await
    }

    /// Tries pairs of the faults that are survived by themselves: first those that reach what the command uses only under
    /// a fault. What that is is added to `found`.
    async fn deepen(
        &mut self,
        found: &mut Found,
        measured: &Measured<'_>,
        faults: &[FaultKind],
        accept: Option<&AcceptFile>,
        explored: &mut Explored,
    ) {
        let survived = explored.cells.iter().filter(|cell| cell.is_survived());
        let uses_others = |cell: &&Cell| !cell.first.seen.others.is_empty();
        let firsts = survived.clone().filter(uses_others);
        let firsts: Vec<_> = firsts.map(|cell| cell.experiment.clone()).collect();
        let survived: Vec<_> = survived.map(|cell| cell.experiment.clone()).collect();
        let mut chosen = Vec::new();
        for first in &firsts {
            if self.until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            match self.seconds(found, measured, faults, first).await {
                Ok(Some(seconds)) => {
                    let dependencies = &found.dependencies;
                    let seconds = seconds.iter();
                    chosen.extend(seconds.map(|one| Experiment::pair(dependencies, first, one)));
                }
                Ok(None) => explored.stopped = Some(Stop::Interrupted),
                // What was found before is told all the same.
                Err(failure) => explored.stopped = Some(Stop::Error(failure.error)),
            }
            if explored.stopped.is_some() {
                break;
            }
        }
        chosen.extend(pairs(&found.dependencies, &survived));
        if explored.stopped.is_some() {
            explored.left_out = chosen;
            return;
        }
        tell!("{}", estimate(&chosen, measured, self.explore.jobs));
        let dependencies = found.dependencies.clone();
        let measured = Measured {
            dependencies: &dependencies,
            ..*measured
        };
        let deeper = self.explore(found, &measured, &chosen, accept).await;
        explored.cells.extend(deeper.cells);
        explored.left_out.extend(deeper.left_out);
        explored.stopped = deeper.stopped;
    }

    /// The experiments on what the command uses only under a fault. Nothing when it was interrupted.
    async fn seconds(
        &mut self,
        found: &mut Found,
        measured: &Measured<'_>,
        faults: &[FaultKind],
        first: &Experiment,
    ) -> Result<Option<Vec<Experiment>>, Failure> {
        let Some(others) = self.fallbacks(found, measured, first).await? else {
            return Ok(None);
        };
        let mut numbered = self.explore.chosen(&found.dependencies)?;
        numbered.retain(|(number, _)| others.contains(number));
        Ok(Some(experiments(&numbered, faults, measured.limit)))
    }

    /// The places of the dependencies that the command uses only under a fault; new ones are added. Nothing when it was
    /// interrupted.
    async fn fallbacks(
        &mut self,
        found: &mut Found,
        measured: &Measured<'_>,
        first: &Experiment,
    ) -> Result<Option<Vec<usize>>, Failure> {
        let limit = measured.limit + first.adds;
        let observed = self.lanes[0].observe(&first.rules, limit).await?;
        let Some((_, mut sighting)) = observed else {
            return Ok(None);
        };
        add_names(&mut sighting, &hosts(self.lanes));
        let usual = measured.dependencies;
        let mut places = Vec::new();
        for one in find(&sighting, self.explore.internal).dependencies {
            let is_same = |other: &Dependency| other.target == one.target;
            if usual.iter().any(is_same) {
                continue;
            }
            let known = found.dependencies.iter().position(is_same);
            places.push(known.unwrap_or(found.dependencies.len()));
            if known.is_none() {
                tell!(
                    "fault: under {} {} the command also uses {one}",
                    first.target(usual),
                    first.name()
                );
                found.dependencies.push(one);
            }
        }
        Ok(Some(places))
    }
}

/// Compares what was found with what is accepted. The first time everything is accepted, and written to the file.
fn compare(
    accept: Option<&mut AcceptFile>,
    dependencies: &[Dependency],
    explored: &mut Explored,
) -> anyhow::Result<()> {
    let Some(accept) = accept else {
        for cell in &mut explored.cells {
            cell.standing = Standing::of(cell, None);
        }
        return Ok(());
    };
    let written = if accept.is_new() && explored.stopped.is_none() {
        accept.write(dependencies, &explored.cells)
    } else {
        Ok(())
    };
    for cell in &mut explored.cells {
        cell.standing = Standing::of(cell, accept.accepted(dependencies, cell));
    }
    let count = accept.without_reason();
    if count != 0 {
        tell!(
            "fault: warning: {}: accepted failures without a reason: {count}",
            accept.path().display()
        );
    }
    written
}

/// Prints what was found, and chooses the exit code.
fn conclude(found: &Found, explored: Explored, again: &Again) -> Outcome {
    let (dependencies, cells) = (&found.dependencies, &explored.cells);
    let mut text = format!(
        "\n{}",
        matrix::matrix(dependencies, cells, tell::has_color(&std::io::stderr()))
    );
    for cell in cells.iter().filter(|cell| is_told(cell)) {
        text.extend([format!(
            "\n{}\n  output: {}\n  {}\n",
            matrix::happened(dependencies, cell),
            matrix::last_lines(&cell.first.seen.output),
            again.line(cell)
        )]);
    }
    text.extend([format!("\n{}\n", summary(found, &explored))]);
    tell::data(&text)?;
    let fails = cells.iter().any(|cell| cell.standing.fails());
    match explored.stopped {
        Some(Stop::Error(error)) => Err(error.into()),
        Some(Stop::Interrupted) => Ok(INTERRUPTED),
        None if fails => Ok(exit::EXPECTATION),
        None => Ok(exit::SUCCESS),
    }
}

/// Whether there is more to say of a cell than its symbol.
fn is_told(cell: &Cell) -> bool {
    let is_known = matches!(cell.standing, Standing::Well | Standing::Accepted);
    !is_known || cell.differs.is_some() || cell.is_storm()
}

fn must_succeed(seen: &Observation, how: &str) -> Result<(), Failure> {
    let end = match seen.end {
        RunEnd::Exited(0) => match &seen.broken {
            None => return Ok(()),
            Some(why) => return Err(anyhow!("--check fails {how}: {why}").into()),
        },
        RunEnd::Exited(code) => format!("ends with exit code {code}"),
        RunEnd::Signalled(signal) => format!("ends by signal {signal}"),
        RunEnd::TimedOut => "does not end in time (--timeout)".to_owned(),
    };
    Err(anyhow!(
        "{how} the command {end}, and must succeed (it has no terminal, and its standard input is empty). It wrote: {}",
        matrix::last_lines(&seen.output)
    )
    .into())
}

fn tell_of_leftovers(seen: &Observation) {
    if seen.left_behind != 0 {
        tell!(
            "fault: warning: the command leaves processes behind ({}), which are killed after each run",
            seen.left_behind
        );
    }
}

/// The text of the hosts file; empty where there is none.
fn hosts(lanes: &[ExperimentLane<'_>]) -> String {
    let hosts = match lanes[0].service() {
        Some(service) => service.hosts(),
        None => std::fs::read_to_string("/etc/hosts").ok(),
    };
    hosts.unwrap_or_default()
}

/// Names that the command did not ask a DNS server for.
fn add_names(sighting: &mut Sighting, hosts: &str) {
    let known = std::mem::replace(&mut sighting.names, HostNames::of_hosts(hosts));
    sighting.names.add(known);
}

/// A count to multiply times with.
fn times(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn estimate(experiments: &[Experiment], measured: &Measured<'_>, jobs: usize) -> String {
    let adds: Duration = experiments.iter().map(|one| one.adds).sum();
    let count = times(experiments.len());
    format!(
        "fault: {}: about {} if the command survives them all; a run may take {}, and what fails is run again",
        counted(count, "experiment"),
        matrix::seconds((measured.baseline * count + adds) / times(jobs)),
        matrix::seconds(measured.limit)
    )
}

/// How many of each, and what nothing was tried on.
fn summary(found: &Found, explored: &Explored) -> String {
    let cells = &explored.cells;
    let failures = cells.iter().filter(|cell| cell.standing.fails()).count();
    let accepted = cells
        .iter()
        .filter(|cell| cell.standing == Standing::Accepted);
    let accepted = accepted.count();
    let flaky = cells.iter().filter(|cell| cell.differs.is_some()).count();
    let mut text = format!(
        "{}: {}",
        counted(cells.len(), "experiment"),
        counted(failures, "failure")
    );
    if accepted != 0 {
        text.extend([format!(", {accepted} accepted")]);
    }
    if flaky != 0 {
        text.extend([format!(", {flaky} flaky")]);
    }
    if !explored.left_out.is_empty() {
        text.extend([format!(", {} not run", explored.left_out.len())]);
    }
    for line in coverage::unreached(found, explored) {
        text.extend([format!("\n{line}")]);
    }
    for line in &found.out_of_reach {
        text.extend([format!("\nout of reach: {line}")]);
    }
    text
}
