//! `fault run`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use fault_common::abi::{Counter, DecisionKey};
use nix::unistd::Uid;

use super::aim::{Aim, Place, scope_of};
use super::control::{self, Control};
use super::follow::{Follower, Moving};
use super::observe::{Observer, Wanted};
use super::rules::{Parsed, Rules};
use super::{Failure, Outcome, exit, give_up};
use crate::session::machine::ThisMachine;
use crate::inject::injection::{Hits, Injection, Wishes};
use crate::plan::mechanism::{Mechanism, choose};
use crate::plan::tables::Scope;
use crate::plan::{Plan, guard_host};
use crate::report::expectations::{self, Facts, Verdict};
use crate::report::file::{self, Amount, Expectation, Report, RuleReport};
use crate::report::record::Recorder;
use crate::report::samples::{SAMPLING, Samples};
use crate::report::summary::Audience;
use crate::report::{github, html, junit, summary};
use crate::rule::windows;
use crate::steer::Steering;
use crate::sys::preflight::{Need, preflight};
use crate::sys::process::caller;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::sys::process::command::{CommandSpec, Ended, Prepared as PreparedCommand, Running};
use crate::sys::process::files;
use crate::sys::process::files::{Folder, Writer};
use crate::sys::process::user::Identity;
use crate::tell::{Patience, tell};

/// Nanoseconds of a millisecond.
const MS_NS: u64 = 1_000_000;

/// Apply rules while a command runs; heal when it ends, however it ends.
///
/// Only traffic of the command and of what it starts is touched. The exit code is the command's own; 120
/// when it succeeded but a rule never fired; 125 when fault could not set up; 126 and 127 as env(1).
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    rules: Rules,
    /// Whose traffic is touched: the command's, or everyone's.
    #[arg(long, value_name = "WHOSE", default_value = "command")]
    scope: ScopeKind,
    #[command(flatten)]
    aim: Aim,
    /// Run the command as this user (NAME or UID, :GROUP); default: the one who called sudo.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Accept that a rule never fired.
    #[arg(long)]
    allow_unfired: bool,
    /// Write every decision that fired to this file, one JSON object a line.
    #[arg(long, value_name = "FILE", conflicts_with = "report")]
    events: Option<PathBuf>,
    /// Write report.json, junit.xml, report.html and the decisions that fired into this folder.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// What `fault replay` repeats.
    #[arg(skip)]
    replay: Option<Arc<[(DecisionKey, u64)]>>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// The values of `--scope`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScopeKind {
    /// The command's process tree.
    Command,
    /// The whole host.
    Host,
}

impl Run {
    /// The same rules as in a report, with its decisions.
    #[must_use]
    pub fn again(
        rules: Rules,
        host: bool,
        options: ReplayOptions,
        decisions: Arc<[(DecisionKey, u64)]>,
    ) -> Self {
        Self {
            rules,
            scope: if host {
                ScopeKind::Host
            } else {
                ScopeKind::Command
            },
            aim: options.aim,
            user: options.user,
            allow_unfired: options.allow_unfired,
            events: None,
            report: options.report,
            replay: Some(decisions),
            command: options.command,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        let mut parsed = self.rules.parse()?;
        self.aim.drain()?;
        if self.aim.follow
            && (self.events.is_some() || self.report.is_some() || self.replay.is_some())
        {
            return Err(Failure::usage(anyhow::anyhow!(
                "--follow has no decisions of one run to write or repeat: take --events and --report away"
            )));
        }
        if self.aim.follow && !parsed.expect.names().is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "--follow: connections can't be counted across restarts of a container: take `{}` out of the expectations",
                parsed.expect.names()[0].0
            )));
        }
        let host = self.scope == ScopeKind::Host;
        if host && !self.aim.force {
            guard_host(&parsed.rules, None).map_err(Failure::usage)?;
        }
        let mut needs = vec![Need::Programs];
        if !host {
            needs.push(Need::Cgroup);
        }
        // Without root, sudo starts it again.
        if !Uid::effective().is_root() && preflight(&needs).is_err() {
            caller::go_through_sudo();
        }
        preflight(&needs)?;
        let identity = Identity::choose(self.user.as_deref(), |name| std::env::var_os(name))?;
        let mechanism = choose(self.aim.mechanism(), &mut parsed.rules, &ThisMachine)?;
        let wanted = Wanted::new(&parsed, self.report.is_some(), identity.clone())?;
        // Another user that was asked for has an environment of its own.
        let environment = match self.user {
            None => caller::environment(),
            Some(_) => Vec::new(),
        };
        let command = CommandSpec::new(self.command.clone(), identity)?
            .with_environment(environment)
            .resolve()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(self.hurt(&parsed, wanted, mechanism, &command))
    }

    async fn hurt(
        &self,
        parsed: &Parsed,
        wanted: Wanted<'_>,
        mechanism: Mechanism,
        command: &PreparedCommand,
    ) -> Outcome {
        wanted.before(parsed).await?;
        let patience = Patience::start("setting up");
        let mut place = self.aim.place()?;
        let own = self.own_cgroup()?;
        let waiting = command.begin(own.as_ref())?;
        let scope = match &own {
            Some(own) => Some(scope_of(own.cgroup())?),
            None => place.scope(),
        };
        let scope = scope.as_ref();
        let plan = plan(parsed, scope, mechanism)?;
        let files = Files::open(self)?;
        let wishes = self.wishes(self.writes_decisions());
        let mut prepared = place.prepare(&plan, &self.aim, &wishes)?;
        if let Some(scope) = scope {
            prepared.watch(scope)?;
        }
        place.adopt(&mut prepared)?;
        let recorder = match files.decisions(self)? {
            Some((file, path)) => Some(Recorder::start(prepared.take_events()?, file, path)?),
            None => None,
        };
        tell!("fault: seed {}", plan.seed);
        place.count_endpoints(scope, &mut prepared);
        let mut observer = wanted.watch(&place, scope)?;
        let steering = self.aim.steer(&place, &plan, scope, &mut prepared).await?;
        let mut follower = Follower::of(&self.aim, &place)?;
        let sockets = self.aim.sockets(&place, scope, parsed);
        let mut run = Course {
            run: self,
            parsed,
            wishes,
            files,
            injection: prepared.start()?,
            steering,
            plan,
            who: place.who(scope),
            place,
            samples: Samples::default(),
        };
        let started = run.injection.started();
        let mut control = Control::open(self.title(), parsed.turns(started), sockets);
        control.begin(&mut run.injection, &run.plan)?;
        drop(patience);
        let mut running = waiting.go()?;
        give_up(&self.rights(&run, command, own.as_ref()));
        observer.probe(started);
        let ended = run.wait(&mut running, control, &mut follower).await?;
        let code = run.judge(ended, &mut observer, recorder).await?;
        run.heal()?;
        if let Some(own) = own {
            release(own)?;
        }
        Ok(code)
    }

    /// A cgroup for the command, unless everyone or somebody else is aimed at.
    fn own_cgroup(&self) -> anyhow::Result<Option<CommandCgroup>> {
        if self.scope == ScopeKind::Host || self.aim.is_given() {
            return Ok(None);
        }
        CommandCgroup::create(&Hierarchy::find()?, Leftovers::Release).map(Some)
    }

    fn wishes(&self, events: bool) -> Wishes {
        Wishes {
            events,
            attachment: self.aim.attachment(),
            front: self.aim.front(),
            newcomers: Some(self.aim.selection()),
            live: false,
            replay: self.replay.clone(),
        }
    }

    /// What is still needed while the command runs, and to heal.
    fn rights(
        &self,
        run: &Course<'_>,
        command: &PreparedCommand,
        own: Option<&CommandCgroup>,
    ) -> Vec<Capability> {
        let steering = run.steering.as_ref();
        let mut rights = run.place.rights(&self.aim, &run.injection, steering);
        if command.is_another_users() {
            rights.push(Capability::Kill);
            if run.parsed.has_command_probes() {
                rights.extend([Capability::Setuid, Capability::Setgid]);
            }
        }
        if own.is_some_and(CommandCgroup::is_protected) {
            rights.push(Capability::DacOverride);
        }
        rights
    }

    /// What `fault top` calls it.
    fn title(&self) -> String {
        let words: Vec<_> = self.command.iter().map(|w| w.to_string_lossy()).collect();
        format!("fault run -- {}", words.join(" "))
    }

    /// Whether the decisions that fire are written.
    fn writes_decisions(&self) -> bool {
        self.events.is_some() || self.report.is_some()
    }

    /// Prints the summary, writes the report and chooses the exit code.
    fn conclude(&self, run: &Course<'_>, parsed: &Parsed, facts: &Facts<'_>) -> Outcome {
        let (injection, plan, ended) = (&run.injection, &run.plan, facts.ended);
        let counters = injection.counters()?;
        tell!(
            "{}",
            summary::table(plan, facts.hits, injection, &counters).trim_end()
        );
        let endpoints = injection.endpoints()?;
        let audience = Audience {
            who: run.who,
            endpoints: endpoints.as_ref(),
            failed: counters[Counter::ActionFailed as usize],
            has_bridge: injection.has_bridge(),
        };
        let mut unfired = summary::unfired(plan, facts.hits, &audience);
        // Drawn faults may come when nobody is there, or not before the command ends. One at least must have hurt.
        if !parsed.drawn.is_empty() && unfired.len() < plan.rules.len() {
            unfired.retain(|(rule, _)| !parsed.is_drawn(rule));
        }
        for (rule, why) in &unfired {
            tell!("fault: the rule `{rule}` never fired: {why}");
        }
        let verdicts = expectations::verdicts(&parsed.expect, facts);
        let code = self.exit_code(parsed, &verdicts, unfired.is_empty(), ended);
        if self.report.is_some() {
            let lost = counters[Counter::EventLost as usize];
            run.files
                .report(&self.report_of(run, facts, &verdicts, code, lost))?;
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

    fn exit_code(
        &self,
        parsed: &Parsed,
        verdicts: &[Verdict],
        all_fired: bool,
        ended: Ended,
    ) -> u8 {
        // A command that is expected to fail, and does, has succeeded.
        let expected = parsed.expect.exit == Some(ended.exit_code());
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
        run: &Course<'_>,
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
        let targets: BTreeMap<_, _> = run
            .parsed
            .targets
            .iter()
            .map(|(name, target)| (name.clone(), target.to_string()))
            .collect();
        Report {
            version,
            fault,
            kernel,
            seed: run.plan.seed,
            again: again(
                std::env::args_os().map(|word| word.to_string_lossy().into_owned()),
                run.plan.seed,
            ),
            command,
            host: self.scope == ScopeKind::Host,
            started_unix_s: file::unix_s().saturating_sub(length_ms / 1000),
            length_ms,
            command_exit: facts.ended.exit_code(),
            exit,
            targets,
            rules: rule_reports(run, facts, length_ms),
            expectations: verdicts.iter().map(Expectation::from).collect(),
            samples: run.samples.rules.clone(),
            traffic: run.samples.traffic.clone(),
            connects: file::connects(facts.history),
            decisions_lost,
        }
    }
}

fn plan(parsed: &Parsed, scope: Option<&Scope>, mechanism: Mechanism) -> Result<Plan, Failure> {
    let mut plan = Plan::new(&parsed.rules, parsed.seed()?, scope, parsed.length_ns)
        .map_err(Failure::usage)?;
    plan.hold_by(mechanism);
    Ok(plan)
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

/// What `fault replay` may change about the run that it repeats.
#[derive(Debug)]
pub struct ReplayOptions {
    /// Where the programs are attached.
    pub aim: Aim,
    /// Who runs the command.
    pub user: Option<String>,
    /// Whether a rule need not fire.
    pub allow_unfired: bool,
    /// Where a report of the repetition goes.
    pub report: Option<PathBuf>,
    /// The command.
    pub command: Vec<OsString>,
}

/// A run while it lasts.
struct Course<'a> {
    run: &'a Run,
    parsed: &'a Parsed,
    wishes: Wishes,
    files: Files,
    injection: Injection,
    steering: Option<Steering>,
    plan: Plan,
    place: Place,
    /// Whom the rules are about.
    who: &'static str,
    samples: Samples,
}

impl Course<'_> {
    /// Waits for the command; answers `fault top`, takes samples for a report, and goes with a container meanwhile.
    async fn wait(
        &mut self,
        running: &mut Running,
        mut control: Control,
        follower: &mut Option<Follower>,
    ) -> anyhow::Result<Ended> {
        let sampled = self.run.report.is_some();
        let mut ticks = tokio::time::interval(SAMPLING);
        loop {
            tokio::select! {
                ended = running.wait() => return ended,
                event = control.next() => {
                    let steering = self.steering.as_ref();
                    control.handle(event, &mut self.injection, &self.plan, steering).await?;
                }
                _ = ticks.tick(), if sampled => {
                    let at = self.injection.started().elapsed();
                    if self.samples.is_due(at) {
                        let hits = self.hits()?;
                        self.sample(u64::try_from(at.as_millis()).unwrap_or(u64::MAX), &hits);
                    }
                }
                turn = Follower::next(follower) => {
                    if let Some(follower) = follower.as_mut() {
                        follower.take(turn?, self.moving());
                    }
                }
            }
        }
    }

    /// Nothing is hurt any more: what was done and seen is told, and the exit code chosen.
    async fn judge(
        &mut self,
        ended: Ended,
        observer: &mut Observer<'_>,
        recorder: Option<Recorder>,
    ) -> Outcome {
        let witnessed = observer.finish(self.injection.epoch_ns())?;
        if let Some(steering) = &self.steering {
            self.run.aim.finish(steering, &self.parsed.rules).await?;
        }
        let hits = self.hits()?;
        self.sample(witnessed.history.length_ns / MS_NS, &hits);
        self.rest();
        let healed = observer.healed().await;
        if let Some(recorder) = recorder {
            recorder.finish()?;
        }
        let facts = Facts {
            plan: &self.plan,
            rules: &self.parsed.rules,
            hits: &hits,
            ended,
            rules_ns: self.parsed.length_ns,
            history: &witnessed.history,
            tries: &witnessed.tries,
            healed: &healed,
        };
        self.run.conclude(self, self.parsed, &facts)
    }

    /// Takes the figures of now for a report.
    fn sample(&mut self, at_ms: u64, hits: &[Hits]) {
        let lines = control::targets(&self.plan, hits, self.steering.as_ref());
        let bytes = lines.iter().map(|line| (line.target.as_str(), line.bytes));
        self.samples.take(at_ms, hits, bytes);
    }

    fn moving(&mut self) -> Moving<'_> {
        Moving {
            aim: &self.run.aim,
            parsed: self.parsed,
            wishes: &self.wishes,
            place: &mut self.place,
            plan: &mut self.plan,
            injection: &mut self.injection,
        }
    }

    /// Nothing is hurt any more; the figures stay.
    fn rest(&mut self) {
        self.steering = None;
        self.injection.rest();
    }

    fn heal(self) -> anyhow::Result<()> {
        self.injection.heal()?;
        drop(self.place);
        Ok(())
    }

    fn hits(&self) -> anyhow::Result<Vec<Hits>> {
        control::hits(&self.injection, &self.plan, self.steering.as_ref())
    }
}

fn rule_reports(run: &Course<'_>, facts: &Facts<'_>, length_ms: u64) -> Vec<RuleReport> {
    let rules = facts.plan.rules.iter().zip(facts.hits).zip(facts.rules);
    rules
        .map(|((rule, hits), (_, resolved))| RuleReport {
            rule: rule.text.clone(),
            target: rule.target.clone(),
            mechanism: rule.mechanism(Some(run.injection.hooks().to_string())),
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

/// What a run writes; opened before the command could put anything in its way.
struct Files {
    writer: Option<Writer>,
    folder: Option<Arc<Folder>>,
}

impl Files {
    /// Opens the report's folder, with the rights of the user who called sudo.
    fn open(run: &Run) -> anyhow::Result<Self> {
        let is_needed = run.writes_decisions();
        let writer = is_needed.then(Writer::start).transpose()?;
        let folder = match (&writer, run.report.clone()) {
            (Some(writer), Some(path)) => Some(Arc::new(writer.run(move || Folder::make(&path))?)),
            _ => None,
        };
        Ok(Self { writer, folder })
    }

    /// The file for the decisions that fire, and its path.
    fn decisions(&self, run: &Run) -> anyhow::Result<Option<(File, PathBuf)>> {
        let Some(writer) = &self.writer else {
            return Ok(None);
        };
        let path = match (&run.report, &run.events) {
            (Some(folder), _) => folder.join(file::DECISIONS),
            (None, Some(path)) => path.clone(),
            (None, None) => return Ok(None),
        };
        let (folder, named) = (self.folder.clone(), path.clone());
        let file = writer.run(move || match folder {
            Some(folder) => folder.create(OsStr::new(file::DECISIONS)),
            None => files::create(&named),
        })?;
        Ok(Some((file, path)))
    }

    /// Writes all files of a report.
    fn report(&self, report: &Report) -> anyhow::Result<()> {
        let (Some(writer), Some(folder)) = (&self.writer, &self.folder) else {
            return Ok(());
        };
        let texts = [
            (file::REPORT, serde_json::to_vec_pretty(report)?),
            ("junit.xml", junit::render(report)?),
            ("report.html", html::render(report).into_bytes()),
        ];
        for (name, text) in texts {
            let folder = Arc::clone(folder);
            writer.run(move || {
                let written = folder.create(OsStr::new(name))?.write_all(&text);
                written.with_context(|| format!("can't write {name}"))
            })?;
        }
        github::tell(report, writer)
    }
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
