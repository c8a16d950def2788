//! `fault run`: rules that are applied while a command runs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use fault_common::abi::{Counter, DecisionKey};

use super::files::Files;
use super::observe::{Observer, WatchList};
use super::options::SessionOptions;
use super::outcome::{Failure, Outcome, exit, give_up};
use super::rules::RuleSet;
use super::subject::{Subject, scope_of};
use super::{Loaded, Session, choose_mechanism, guard, plan, require, runtime, tell_unfired};
use crate::inject::injection::{Hits, InjectionOptions};
use crate::plan::PlannedRule;
use crate::plan::mechanism::Mechanism;
use crate::relay::{Decisions, StreamReplay};
use crate::report::expectations::{self, Facts};
use crate::report::file::{
    self, Amount, Expectation, ProbeReport, RuleReport, RunReport, TryReport,
};
use crate::report::record::Recorder;
use crate::report::samples::{SAMPLING, Samples};
use crate::rule::windows;
use crate::sys::preflight::Need;
use crate::sys::process::caller;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::sys::process::command::{CommandSpec, Ended, PreparedCommand, Running};
use crate::sys::process::user::Identity;
use crate::tell::{Patience, tell};
use crate::watch::probe;

/// Nanoseconds per millisecond.
const MS_NS: u64 = 1_000_000;

/// Decisions of an earlier run, to be repeated.
#[derive(Clone, Debug)]
pub struct ReplayedDecisions {
    /// Those about packets.
    pub packets: Arc<[(DecisionKey, u64)]>,
    /// Those about connections.
    pub streams: Arc<StreamReplay>,
    /// The connections that each rule matched in that run.
    pub connections: Vec<u64>,
}

/// The options of `fault run`.
#[derive(Debug)]
pub struct RunOptions {
    /// The options of the session.
    pub options: SessionOptions,
    /// Rules apply to the whole host.
    pub host: bool,
    /// The user to run the command as, if given.
    pub user: Option<String>,
    /// Succeed even if a rule never fired.
    pub allow_unfired: bool,
    /// The file for decisions that fire.
    pub events: Option<PathBuf>,
    /// The folder of the report.
    pub report: Option<PathBuf>,
    /// Decisions to replay.
    pub replay: Option<ReplayedDecisions>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

impl RunOptions {
    /// Runs the command with the rules applied.
    ///
    /// # Errors
    /// Wrong arguments, or the rules can't be applied; then nothing is changed.
    pub fn execute(self, mut rules: RuleSet) -> Outcome {
        self.check(&rules)?;
        if self.host {
            guard(&rules, &self.options)?;
        }
        let cgroup = (!self.host).then_some(Need::Cgroup);
        let needs: Vec<_> = [Need::Programs].into_iter().chain(cgroup).collect();
        require(&needs)?;
        let identity = Identity::choose(self.user.as_deref(), |name| std::env::var_os(name))?;
        let mechanism = choose_mechanism(&mut rules, &self.options)?;
        let watch_list = WatchList::new(&rules, self.report.is_some(), identity.clone())?;
        // A user given by --user gets an environment of its own.
        let environment = match self.user {
            None => caller::environment(),
            Some(_) => Vec::new(),
        };
        let command = CommandSpec::new(self.command.clone(), identity)?
            .with_environment(environment)
            .resolve()?;
        runtime()?.block_on(self.inject(&rules, watch_list, mechanism, &command))
    }

    /// Rejects options that can't be combined with `--follow`.
    fn check(&self, rules: &RuleSet) -> Result<(), Failure> {
        if !self.options.follow {
            return Ok(());
        }
        if self.events.is_some() || self.report.is_some() || self.replay.is_some() {
            return Err(Failure::usage(anyhow::anyhow!(
                "--events and --report do not work with --follow: leave one of them out"
            )));
        }
        match rules.expect.names().first() {
            Some(first) => Err(Failure::usage(anyhow::anyhow!(
                "--follow: connections can't be counted across restarts of a container: remove `{}` from the \
                 expectations",
                first.0
            ))),
            None => Ok(()),
        }
    }

    async fn inject(
        &self,
        rules: &RuleSet,
        watch_list: WatchList<'_>,
        mechanism: Mechanism,
        command: &PreparedCommand,
    ) -> Outcome {
        watch_list.before(rules).await?;
        let patience = Patience::start("setting up");
        let subject = Subject::find(&self.options)?;
        let own = self.own_cgroup()?;
        let waiting = command.begin(own.as_ref())?;
        let scope = match &own {
            Some(own) => Some(scope_of(own.cgroup())?),
            None => subject.scope(),
        };
        let mut plan = plan(rules, scope.as_ref(), mechanism, rules.seed()?)?;
        plan.learn(watch_list.names(), scope.as_ref());
        let files = Files::open(self.report.clone(), self.events.clone())?;
        let injection_options = self.injection_options();
        let log = injection_options.streams.log.clone().unwrap_or_default();
        let seed = plan.seed;
        let mut loaded = Loaded::load(
            &self.options,
            rules,
            subject,
            scope,
            plan,
            injection_options,
        )?;
        let recorder = match files.decisions()? {
            Some((file, path)) => Some(Recorder::start(loaded.take_events()?, log, file, path)?),
            None => None,
        };
        tell!("fault: seed {seed}");
        loaded.count_endpoints();
        let observer = loaded.watch(watch_list)?;
        let session = loaded.start(self.title(), true).await?;
        drop(patience);
        let mut running = waiting.go()?;
        give_up(&rights(&session, command, own.as_ref()));
        let mut active = ActiveRun {
            run: self,
            files,
            session,
            observer,
            samples: Samples::default(),
        };
        active.observer.probe(active.session.injection.started());
        let ended = active.wait(&mut running).await?;
        let code = active.judge(ended, recorder).await?;
        active.session.restore()?;
        if let Some(own) = own {
            release(own)?;
        }
        Ok(code)
    }

    /// Creates a cgroup for the command, unless the rules apply to the host or to other processes.
    fn own_cgroup(&self) -> anyhow::Result<Option<CommandCgroup>> {
        if self.host || self.options.is_given() {
            return Ok(None);
        }
        CommandCgroup::create(&Hierarchy::find()?, Leftovers::Release).map(Some)
    }

    fn injection_options(&self) -> InjectionOptions {
        let events = self.events.is_some() || self.report.is_some();
        let replay = self.replay.as_ref();
        InjectionOptions {
            events,
            replay: replay.map(|replay| Arc::clone(&replay.packets)),
            streams: Decisions {
                log: events.then(Arc::default),
                replay: replay.map(|replay| Arc::clone(&replay.streams)),
                ..Decisions::default()
            },
            ..self.options.injection_options()
        }
    }

    /// The title in `fault top`.
    fn title(&self) -> String {
        let words: Vec<_> = self.command.iter().map(|w| w.to_string_lossy()).collect();
        format!("fault run -- {}", words.join(" "))
    }

    fn exit_code(
        &self,
        rules: &RuleSet,
        verdicts: &[Expectation],
        all_fired: bool,
        ended: Ended,
    ) -> u8 {
        // A command that fails as expected has succeeded.
        let expected = rules.expect.exit == Some(ended.exit_code());
        if !ended.is_success() && !expected {
            ended.exit_code()
        } else if verdicts.iter().any(|verdict| !verdict.holds) {
            exit::EXPECTATION
        } else if !all_fired && !self.allow_unfired {
            exit::UNFIRED
        } else if expected {
            // The exit code that the scenario expects is a success.
            exit::SUCCESS
        } else {
            ended.exit_code()
        }
    }

    fn report_of(
        &self,
        session: &Session<'_>,
        samples: &Samples,
        facts: &Facts<'_>,
        judged: Judged,
        decisions_lost: u64,
    ) -> RunReport {
        let length_ms = facts.history.length_ns / MS_NS;
        let (version, fault, kernel) = file::versions();
        let command: Vec<String> = self
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let targets: BTreeMap<_, _> = session
            .rules()
            .targets
            .iter()
            .map(|(name, target)| (name.clone(), target.to_string()))
            .collect();
        RunReport {
            version,
            fault,
            kernel,
            seed: session.plan.seed,
            again: again(
                std::env::args_os().map(|word| word.to_string_lossy().into_owned()),
                session.plan.seed,
            ),
            command,
            host: self.host,
            started_unix_s: file::unix_s().saturating_sub(length_ms / 1000),
            length_ms,
            command_exit: facts.ended.exit_code(),
            exit: judged.exit,
            allow_unfired: self.allow_unfired,
            targets,
            rules: rule_reports(session, facts, length_ms, &judged.unfired),
            expectations: judged.expectations,
            probes: probe_reports(session, facts, length_ms),
            samples: samples.rules.clone(),
            traffic: samples.traffic.clone(),
            connects: file::connects(facts.history),
            decisions_lost,
        }
    }
}

impl ReplayedDecisions {
    /// Warns of what was recorded and not repeated, and of what came beyond it.
    fn tell_differences(&self, facts: &Facts<'_>) {
        for ((index, rule), hits) in (0..).zip(&facts.plan.rules).zip(facts.hits) {
            let text = &rule.text;
            let is_stream = rule.stream.is_some();
            let (recorded, repeated) = if is_stream {
                self.streams.count(index + 1)
            } else {
                (self.packets_of(rule), hits.stats.hit_packets)
            };
            if repeated < recorded {
                let missed = recorded - repeated;
                let what = if is_stream { "connections" } else { "packets" };
                tell!(
                    "fault: warning: `{text}`: {missed} of {recorded} recorded decisions were not repeated, because their \
                     {what} did not come"
                );
            }
            let then = self.connections.get(index as usize).copied().unwrap_or(0);
            let now = hits.stats.seen_packets;
            if is_stream && recorded != 0 && now > then {
                tell!(
                    "fault: warning: `{text}`: {now} connections came, {then} in the recorded run: the rule does not act \
                     on those beyond"
                );
            }
        }
    }

    /// The recorded decisions of a packet rule.
    fn packets_of(&self, rule: &PlannedRule) -> u64 {
        let is_own = |uid| rule.entries.iter().any(|part| part.entry.uid == uid);
        let own = self.packets.iter().filter(|(key, _)| is_own(key.rule));
        own.count() as u64
    }
}

/// What a run was found to be.
struct Judged {
    /// The exit code of `fault`.
    exit: u8,
    expectations: Vec<Expectation>,
    /// The indexes of the rules that should have fired but never did.
    unfired: BTreeSet<usize>,
}

/// The state while the command runs.
struct ActiveRun<'a> {
    run: &'a RunOptions,
    files: Files,
    session: Session<'a>,
    observer: Observer<'a>,
    samples: Samples,
}

impl ActiveRun<'_> {
    /// Waits for the command. Meanwhile serves `fault top`, takes samples for the report and follows the container.
    async fn wait(&mut self, running: &mut Running) -> anyhow::Result<Ended> {
        let sampled = self.run.report.is_some();
        let mut ticks = tokio::time::interval(SAMPLING);
        loop {
            tokio::select! {
                ended = running.wait() => return ended,
                task = self.session.next() => {
                    self.session.handle(task?).await?;
                }
                _ = ticks.tick(), if sampled => {
                    let at = self.session.injection.started().elapsed();
                    if self.samples.is_due(at) {
                        let hits = self.session.hits()?;
                        self.sample(u64::try_from(at.as_millis()).unwrap_or(u64::MAX), &hits);
                    }
                }
            }
        }
    }

    /// Takes a sample for the report.
    fn sample(&mut self, at_ms: u64, hits: &[Hits]) {
        let session = &mut self.session;
        let steering = session.steering.as_ref();
        let lines = session.control.targets(&session.plan, hits, steering);
        let bytes = lines.iter().map(|line| (line.target.as_str(), line.bytes));
        self.samples.take(at_ms, hits, bytes);
    }

    /// Stops the rules, collects the results and chooses the exit code.
    async fn judge(&mut self, ended: Ended, recorder: Option<Recorder>) -> Outcome {
        let witnessed = self.observer.finish(self.session.injection.epoch_ns())?;
        self.session.drain().await?;
        let hits = self.session.hits()?;
        self.sample(witnessed.history.length_ns / MS_NS, &hits);
        self.session.rest();
        let after_removal = self.observer.after_removal().await;
        if let Some(recorder) = recorder {
            recorder.finish()?;
        }
        let rules = self.session.rules();
        self.conclude(&Facts {
            plan: &self.session.plan,
            rules: &rules.rules,
            hits: &hits,
            ended,
            rules_ns: rules.length_ns,
            history: &witnessed.history,
            tries: &witnessed.tries,
            after_removal: &after_removal,
        })
    }

    /// Prints the summary, writes the report and chooses the exit code.
    fn conclude(&self, facts: &Facts<'_>) -> Outcome {
        let (session, rules) = (&self.session, self.session.rules());
        let unfired = session.summarize(facts.hits)?;
        tell_unfired(&unfired, self.run.allow_unfired);
        if let Some(replay) = &self.run.replay {
            replay.tell_differences(facts);
        }
        let expectations = expectations::verdicts(&rules.expect, facts);
        let code = self
            .run
            .exit_code(rules, &expectations, unfired.is_empty(), facts.ended);
        for expectation in &expectations {
            let mark = if expectation.holds { "ok" } else { "FAILED" };
            tell!("fault: {mark}: {}", expectation.text());
        }
        if self.run.report.is_some() {
            let lost = session.counters()?[Counter::EventLost as usize];
            let unaccepted = unfired.into_iter().filter(|_| !self.run.allow_unfired);
            let judged = Judged {
                exit: code,
                expectations,
                unfired: unaccepted.flat_map(|one| one.members).collect(),
            };
            let report = self
                .run
                .report_of(session, &self.samples, facts, judged, lost);
            self.files.report(&report)?;
        }
        match code {
            // The command's own.
            _ if code == facts.ended.exit_code() => {}
            exit::UNFIRED => tell!(
                "fault: exit code 120: a rule never fired, so the run did not test it (--allow-unfired accepts this)"
            ),
            exit::EXPECTATION => tell!(
                "fault: exit code 121: the command succeeded, but an expectation failed (FAILED above)"
            ),
            _ => {}
        }
        Ok(code)
    }
}

/// The capabilities needed while the command runs and to restore everything.
fn rights(
    session: &Session<'_>,
    command: &PreparedCommand,
    own: Option<&CommandCgroup>,
) -> Vec<Capability> {
    let mut rights = session.rights();
    if command.is_another_users() {
        rights.push(Capability::Kill);
        if session.rules().has_command_probes() {
            rights.extend([Capability::Setuid, Capability::Setgid]);
        }
    }
    if own.is_some_and(CommandCgroup::is_protected) {
        rights.push(Capability::DacOverride);
    }
    rights
}

/// Releases the command's cgroup, and reports processes that are still running.
fn release(own: CommandCgroup) -> anyhow::Result<()> {
    let finished = own.finish()?;
    match finished.released.len() {
        0 => {}
        1 => tell!("fault: a background process of the command is still running, without faults"),
        many => tell!(
            "fault: {many} background processes of the command are still running, without faults"
        ),
    }
    Ok(())
}

/// The command line with the seed and without the report's folder.
fn again(arguments: impl IntoIterator<Item = String>, seed: u64) -> Vec<String> {
    let mut again = vec!["sudo".to_owned(), "fault".to_owned()];
    let mut arguments = arguments.into_iter().skip(1);
    again.extend(arguments.next());
    let drawn = again.len();
    let mut has_seed = again.last().is_none_or(|command| command != "run");
    while let Some(word) = arguments.next() {
        if word == "--" {
            again.push(word);
            again.extend(arguments);
            break;
        }
        if word == "--report" {
            arguments.next();
        } else if !word.starts_with("--report=") {
            has_seed |= word == "--seed" || word.starts_with("--seed=");
            again.push(word);
        }
    }
    if !has_seed {
        again.splice(drawn..drawn, ["--seed".to_owned(), seed.to_string()]);
    }
    again
}

fn rule_reports(
    session: &Session<'_>,
    facts: &Facts<'_>,
    length_ms: u64,
    unfired: &BTreeSet<usize>,
) -> Vec<RuleReport> {
    let rules = facts.plan.rules.iter().zip(facts.hits).zip(facts.rules);
    rules
        .enumerate()
        .map(|(index, ((rule, hits), (_, resolved)))| RuleReport {
            rule: rule.text.clone(),
            drawn_from: session.rules().drawn_from(index),
            target: rule.target.clone(),
            mechanism: rule.mechanism(Some(session.injection.hooks().to_string())),
            fired: hits.stats.hit_packets != 0,
            accepted: hits.stats.hit_packets == 0 && !unfired.contains(&index),
            connections: hits.connections,
            seen: Amount {
                packets: hits.stats.seen_packets,
                segments: hits.stats.seen_segments,
                bytes: hits.stats.seen_bytes,
            },
            hit: Amount {
                packets: hits.stats.hit_packets,
                segments: hits.stats.hit_segments,
                bytes: hits.stats.hit_bytes,
            },
            windows_ms: windows_ms(
                windows(&resolved.modifiers, length_ms.saturating_mul(MS_NS)),
                length_ms,
            ),
        })
        .collect()
}

/// Windows in milliseconds. Those that could not be told apart in a picture of the run are merged.
fn windows_ms(windows: impl Iterator<Item = (u64, u64)>, length_ms: u64) -> Vec<(u64, u64)> {
    const PARTS: u64 = 10_000;
    let gap_ms = length_ms / PARTS;
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (from, to) in windows.map(|(from, to)| (from / MS_NS, to / MS_NS)) {
        match merged.last_mut() {
            Some(last) if from <= last.1 + gap_ms => last.1 = to,
            _ => merged.push((from, to)),
        }
    }
    merged
}

fn probe_reports(session: &Session<'_>, facts: &Facts<'_>, length_ms: u64) -> Vec<ProbeReport> {
    let probes = session.rules().expect.probe.iter().enumerate();
    probes
        .map(|(index, probe)| {
            let tries = facts.tries.get(index).into_iter().flatten();
            let last = facts.after_removal.get(index).and_then(Option::as_ref);
            ProbeReport {
                name: probe::name(probe),
                tries: tries
                    .chain(last)
                    .map(|one| TryReport::of(one, length_ms))
                    .collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_look_like_one_are_merged() {
        let merged = |windows: &[(u64, u64)], length_ms| {
            let windows = windows.iter().map(|(from, to)| (from * MS_NS, to * MS_NS));
            windows_ms(windows, length_ms)
        };
        let windows = [(0, 10), (12, 20), (20, 30)];
        assert_eq!(merged(&windows, 1000), [(0, 10), (12, 30)]);
        assert_eq!(merged(&windows, 20_000), [(0, 30)]);
    }

    #[test]
    fn a_run_is_repeated_as_it_was_typed() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let repeated = |typed| again(words(typed), 7).join(" ");
        assert_eq!(
            repeated("./fault run --report out -f a.yaml --container db -- x --report y"),
            "sudo fault run --seed 7 -f a.yaml --container db -- x --report y"
        );
        assert_eq!(
            repeated("fault run --seed=3 -- x"),
            "sudo fault run --seed=3 -- x"
        );
        assert_eq!(
            repeated("fault replay out -- x"),
            "sudo fault replay out -- x"
        );
    }
}
