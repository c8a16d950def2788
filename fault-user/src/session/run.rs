//! `fault run`: rules while a command runs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use fault_common::abi::{Counter, DecisionKey};

use super::files::Files;
use super::observe::{Observer, WatchList};
use super::options::Options;
use super::outcome::{Failure, Outcome, exit, give_up};
use super::rules::RuleSet;
use super::subject::{Subject, scope_of};
use super::{Loaded, Session, choose_mechanism, guard, plan, require, runtime, tell_unfired};
use crate::inject::injection::{Hits, InjectionOptions};
use crate::plan::mechanism::Mechanism;
use crate::report::expectations::{self, Facts, Verdict};
use crate::report::file::{self, Amount, Expectation, Report, RuleReport};
use crate::report::record::Recorder;
use crate::report::samples::{SAMPLING, Samples};
use crate::rule::windows;
use crate::sys::preflight::Need;
use crate::sys::process::caller;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::sys::process::command::{CommandSpec, Ended, PreparedCommand as ReadyCommand, Running};
use crate::sys::process::user::Identity;
use crate::tell::{Patience, tell};

/// Nanoseconds of a millisecond.
const MS_NS: u64 = 1_000_000;

/// A command, and what is done around it.
#[derive(Debug)]
pub struct Run {
    /// Whose traffic is touched besides the command's.
    pub options: Options,
    /// Everyone's traffic is touched.
    pub host: bool,
    /// Who runs the command, where that was asked for.
    pub user: Option<String>,
    /// A rule that never fired is no failure.
    pub allow_unfired: bool,
    /// Where the decisions that fire are written.
    pub events: Option<PathBuf>,
    /// The folder of the report.
    pub report: Option<PathBuf>,
    /// Decisions that are repeated.
    pub replay: Option<Arc<[(DecisionKey, u64)]>>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

impl Run {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
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
        // Another user that was asked for has an environment of its own.
        let environment = match self.user {
            None => caller::environment(),
            Some(_) => Vec::new(),
        };
        let command = CommandSpec::new(self.command.clone(), identity)?
            .with_environment(environment)
            .resolve()?;
        runtime()?.block_on(self.inject(&rules, watch_list, mechanism, &command))
    }

    /// What `--follow` can't be combined with.
    fn check(&self, rules: &RuleSet) -> Result<(), Failure> {
        if !self.options.follow {
            return Ok(());
        }
        if self.events.is_some() || self.report.is_some() || self.replay.is_some() {
            return Err(Failure::usage(anyhow::anyhow!(
                "--follow has no decisions of one run to write or repeat: take --events and --report away"
            )));
        }
        match rules.expect.names().first() {
            Some(first) => Err(Failure::usage(anyhow::anyhow!(
                "--follow: connections can't be counted across restarts of a container: take `{}` out of the expectations",
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
        command: &ReadyCommand,
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
        let plan = plan(rules, scope.as_ref(), mechanism, rules.seed()?)?;
        let files = Files::open(self.report.clone(), self.events.clone())?;
        let injection_options = self.injection_options();
        let seed = plan.seed;
        let mut loaded = Loaded::load(&self.options, rules, subject, scope, plan, injection_options)?;
        let recorder = match files.decisions()? {
            Some((file, path)) => Some(Recorder::start(loaded.take_events()?, file, path)?),
            None => None,
        };
        tell!("fault: seed {seed}");
        loaded.count_endpoints();
        let observer = watch_list.watch(&loaded.subject, loaded.scope())?;
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

    /// A cgroup for the command, unless everyone or somebody else is aimed at.
    fn own_cgroup(&self) -> anyhow::Result<Option<CommandCgroup>> {
        if self.host || self.options.is_given() {
            return Ok(None);
        }
        CommandCgroup::create(&Hierarchy::find()?, Leftovers::Release).map(Some)
    }

    fn injection_options(&self) -> InjectionOptions {
        InjectionOptions {
            events: self.events.is_some() || self.report.is_some(),
            replay: self.replay.clone(),
            ..self.options.injection_options()
        }
    }

    /// What `fault top` calls it.
    fn title(&self) -> String {
        let words: Vec<_> = self.command.iter().map(|w| w.to_string_lossy()).collect();
        format!("fault run -- {}", words.join(" "))
    }

    fn exit_code(
        &self,
        rules: &RuleSet,
        verdicts: &[Verdict],
        all_fired: bool,
        ended: Ended,
    ) -> u8 {
        // A command that is expected to fail, and does, has succeeded.
        let expected = rules.expect.exit == Some(ended.exit_code());
        if !ended.is_success() && !expected {
            ended.exit_code()
        } else if verdicts.iter().any(|verdict| !verdict.holds) {
            exit::EXPECTATION
        } else if !all_fired && !self.allow_unfired {
            exit::UNFIRED
        } else if expected {
            // A code that the scenario expects is a success, whatever it is.
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
        verdicts: &[Verdict],
        exit: u8,
        decisions_lost: u64,
    ) -> Report {
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
        Report {
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
            exit,
            targets,
            rules: rule_reports(session, facts, length_ms),
            expectations: verdicts.iter().map(Expectation::from).collect(),
            samples: samples.rules.clone(),
            traffic: samples.traffic.clone(),
            connects: file::connects(facts.history),
            decisions_lost,
        }
    }
}

/// A run while it lasts.
struct ActiveRun<'a> {
    run: &'a Run,
    files: Files,
    session: Session<'a>,
    observer: Observer<'a>,
    samples: Samples,
}

impl ActiveRun<'_> {
    /// Waits for the command; answers `fault top`, takes samples for a report, and goes with a container meanwhile.
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

    /// Takes the figures of now for a report.
    fn sample(&mut self, at_ms: u64, hits: &[Hits]) {
        let session = &self.session;
        let lines = super::control::targets(&session.plan, hits, session.steering.as_ref());
        let bytes = lines.iter().map(|line| (line.target.as_str(), line.bytes));
        self.samples.take(at_ms, hits, bytes);
    }

    /// The rules act no more: what was done and seen is told, and the exit code chosen.
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
        let mut unfired = session.summarize(facts.hits)?;
        // Drawn faults may come when nobody is there, or not before the command ends. One at least must have fired.
        if !rules.drawn.is_empty() && unfired.len() < session.plan.rules.len() {
            unfired.retain(|(rule, _)| !rules.is_drawn(rule));
        }
        tell_unfired(&unfired);
        let verdicts = expectations::verdicts(&rules.expect, facts);
        let code = self
            .run
            .exit_code(rules, &verdicts, unfired.is_empty(), facts.ended);
        if self.run.report.is_some() {
            let lost = session.injection.counters()?[Counter::EventLost as usize];
            let report = self
                .run
                .report_of(session, &self.samples, facts, &verdicts, code, lost);
            self.files.report(&report)?;
        }
        for verdict in &verdicts {
            let mark = if verdict.holds { "ok" } else { "FAILED" };
            tell!("fault: {mark}: {}", verdict.text);
        }
        if code == exit::UNFIRED {
            tell!(
                "fault: exit code 120: a fault that never fired tests nothing (--allow-unfired accepts it)"
            );
        }
        Ok(code)
    }
}

/// What is still needed while the command runs, and to take everything back.
fn rights(
    session: &Session<'_>,
    command: &ReadyCommand,
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

/// Gives the command's cgroup up, and says what goes on without it.
fn release(own: CommandCgroup) -> anyhow::Result<()> {
    let finished = own.finish()?;
    match finished.released.len() {
        0 => {}
        1 => tell!("fault: a background process of the command runs on, unhurt"),
        many => tell!("fault: {many} background processes of the command run on, unhurt"),
    }
    Ok(())
}

/// The words that were typed, with the seed that was drawn and without a place for the report.
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

fn rule_reports(session: &Session<'_>, facts: &Facts<'_>, length_ms: u64) -> Vec<RuleReport> {
    let rules = facts.plan.rules.iter().zip(facts.hits).zip(facts.rules);
    rules
        .map(|((rule, hits), (_, resolved))| RuleReport {
            rule: rule.text.clone(),
            target: rule.target.clone(),
            mechanism: rule.mechanism(Some(session.injection.hooks().to_string())),
            fired: hits.stats.hit_packets != 0,
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
            windows_ms: windows(&resolved.modifiers, length_ms.saturating_mul(MS_NS))
                .map(|(from, to)| (from / MS_NS, to / MS_NS))
                .collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
