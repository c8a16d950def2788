//! `fault run`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use fault_common::abi::DecisionKey;

use super::aim::{Aim, prepare_in, scope_of};
use super::rules::{Parsed, Rules};
use super::{Failure, Outcome, exit};
use crate::doctor::{Need, preflight};
use crate::kernel::injection::{Hits, Injection, Wishes};
use crate::plan::mechanism::{Mechanism, choose};
use crate::plan::{Plan, guard_host};
use crate::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::process::command::{CommandSpec, Ended, Prepared as PreparedCommand, Running};
use crate::process::user::Identity;
use crate::report::expectations::{self, Verdict};
use crate::report::file::{self, Amount, Expectation, Report, RuleReport, Sample};
use crate::report::record::Recorder;
use crate::report::{github, html, junit, summary};
use crate::rule::windows;
use crate::steer::Steering;

/// How often figures are taken for a report.
const SAMPLING: Duration = Duration::from_millis(100);

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
        expectations::supported(&parsed.expect).map_err(Failure::usage)?;
        let host = self.scope == ScopeKind::Host;
        if host && !self.aim.force {
            guard_host(&parsed.rules).map_err(Failure::usage)?;
        }
        let mut needs = vec![Need::Programs];
        if !host {
            needs.push(Need::Cgroup);
        }
        preflight(&needs)?;
        let identity = Identity::choose(self.user.as_deref(), |name| std::env::var_os(name))?;
        let command = CommandSpec::new(self.command.clone(), identity)?.resolve()?;
        let mechanism = choose(self.aim.mechanism(), &mut parsed.rules)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(self.hurt(&parsed, mechanism, &command))
    }

    async fn hurt(
        &self,
        parsed: &Parsed,
        mechanism: Mechanism,
        command: &PreparedCommand,
    ) -> Outcome {
        let elsewhere = self.aim.elsewhere()?;
        let mut journal = None;
        let aimed = match elsewhere {
            Some(_) => None,
            None => self.aim.take(&mut journal)?,
        };
        let own = if self.scope == ScopeKind::Host || self.aim.is_given() {
            None
        } else {
            Some(CommandCgroup::create(
                &Hierarchy::find()?,
                Leftovers::Release,
            )?)
        };
        let scope = match (&aimed, &own) {
            (Some(aimed), _) => Some(aimed.scope.clone()),
            (None, Some(own)) => Some(scope_of(own.cgroup())?),
            (None, None) => None,
        };
        let seed = parsed.seed()?;
        let mut plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        plan.hold_by(mechanism);
        let events = self.events_file()?;
        let wishes = Wishes {
            events: events.is_some(),
            attachment: self.aim.attachment(),
            live: false,
            replay: self.replay.clone(),
        };
        let mut prepared = prepare_in(elsewhere.as_ref(), &plan, &self.aim, &wishes)?;
        if let Some(scope) = &scope {
            prepared.watch(scope)?;
        }
        if let Some(aimed) = &aimed {
            prepared.adopt(&aimed.cgroup, &aimed.scope)?;
        }
        let recorder = match &events {
            Some(path) => Some(Recorder::start(prepared.take_events()?, path)?),
            None => None,
        };
        eprintln!("fault: seed {seed}");
        let steering = self.aim.steer(&plan, scope.as_ref(), &mut prepared).await?;
        let injection = prepared.start()?;
        let mut running = command.spawn(own.as_ref())?;
        let mut run = Course {
            injection: &injection,
            steering: steering.as_ref(),
            plan: &plan,
            samples: Vec::new(),
        };
        let ended = run.wait(&mut running, self.report.is_some()).await?;
        if let Some(recorder) = recorder {
            recorder.finish()?;
        }
        let code = self.conclude(&run, parsed, ended)?;
        drop(steering);
        injection.heal()?;
        drop(aimed);
        if let Some(own) = own {
            let finished = own.finish()?;
            if !finished.released.is_empty() {
                eprintln!(
                    "fault: {} background processes of the command run on, unhurt",
                    finished.released.len()
                );
            }
        }
        Ok(code)
    }

    /// Where the decisions that fire are written.
    fn events_file(&self) -> anyhow::Result<Option<PathBuf>> {
        let Some(folder) = &self.report else {
            return Ok(self.events.clone());
        };
        std::fs::create_dir_all(folder)
            .with_context(|| format!("can't make {}", folder.display()))?;
        Ok(Some(folder.join(file::DECISIONS)))
    }

    /// Prints the summary, writes the report and chooses the exit code.
    fn conclude(&self, run: &Course<'_>, parsed: &Parsed, ended: Ended) -> Outcome {
        let (injection, plan) = (run.injection, run.plan);
        let hits = run.hits()?;
        let counters = injection.counters()?;
        eprint!("{}", summary::table(plan, &hits, injection, &counters));
        let unfired = summary::unfired(plan, &hits);
        for (rule, why) in &unfired {
            eprintln!("fault: the rule `{rule}` never fired: {why}");
        }
        let verdicts = expectations::verdicts(&parsed.expect, plan, &hits, ended);
        let code = self.exit_code(parsed, &verdicts, unfired.is_empty(), ended);
        if let Some(folder) = &self.report {
            let report = self.report_of(run, parsed, &hits, &verdicts, (ended, code));
            write_report(folder, &report)?;
        }
        for verdict in &verdicts {
            let mark = if verdict.holds { "ok" } else { "FAILED" };
            eprintln!("fault: {mark}: {}", verdict.text);
        }
        if code == exit::UNFIRED {
            eprintln!(
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
        parsed: &Parsed,
        hits: &[Hits],
        verdicts: &[Verdict],
        (ended, exit): (Ended, u8),
    ) -> Report {
        let length = run.injection.started().elapsed();
        let length_ms = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        let (version, fault, kernel) = file::versions();
        let command: Vec<String> = self
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let targets: BTreeMap<_, _> = parsed
            .targets
            .iter()
            .map(|(name, target)| (name.clone(), target.to_string()))
            .collect();
        let mut samples = run.samples.clone();
        samples.push(Sample::of(length_ms, hits));
        Report {
            version,
            fault,
            kernel,
            seed: run.plan.seed,
            again: self.again_words(run.plan, &targets, &command),
            command,
            host: self.scope == ScopeKind::Host,
            started_unix_s: file::unix_s().saturating_sub(length_ms / 1000),
            length_ms,
            command_exit: ended.exit_code(),
            exit,
            targets,
            rules: rule_reports(run, parsed, hits, length_ms),
            expectations: verdicts.iter().map(Expectation::from).collect(),
            samples,
        }
    }

    /// The words that make the same draws again.
    fn again_words(
        &self,
        plan: &Plan,
        targets: &BTreeMap<String, String>,
        command: &[String],
    ) -> Vec<String> {
        let mut words = vec!["sudo".to_owned(), "fault".to_owned(), "run".to_owned()];
        words.extend(["--seed".to_owned(), plan.seed.to_string()]);
        if self.scope == ScopeKind::Host {
            words.extend(["--scope".to_owned(), "host".to_owned()]);
        }
        if let Some(mechanism) = self.aim.mechanism() {
            words.extend(["--mechanism".to_owned(), mechanism.to_string()]);
        }
        for (name, target) in targets {
            words.extend(["--target".to_owned(), format!("'{name}={target}'")]);
        }
        for rule in &plan.rules {
            words.extend(["-r".to_owned(), format!("'{}'", rule.text)]);
        }
        words.push("--".to_owned());
        words.extend(command.iter().cloned());
        words
    }
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
    injection: &'a Injection,
    steering: Option<&'a Steering>,
    plan: &'a Plan,
    samples: Vec<Sample>,
}

impl Course<'_> {
    /// Waits for the command; takes samples for a report meanwhile.
    async fn wait(&mut self, running: &mut Running, sampled: bool) -> anyhow::Result<Ended> {
        if !sampled {
            return running.wait().await;
        }
        let mut ticks = tokio::time::interval(SAMPLING);
        let ended = running.wait();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                ended = &mut ended => return ended,
                _ = ticks.tick() => {
                    let at_ms = self.injection.started().elapsed().as_millis();
                    let at_ms = u64::try_from(at_ms).unwrap_or(u64::MAX);
                    let hits = self.hits()?;
                    self.samples.push(Sample::of(at_ms, &hits));
                }
            }
        }
    }

    fn hits(&self) -> anyhow::Result<Vec<Hits>> {
        let mut hits = self.injection.hits(self.plan)?;
        if let Some(steering) = self.steering {
            steering.add_to(&mut hits);
        }
        Ok(hits)
    }
}

fn rule_reports(
    run: &Course<'_>,
    parsed: &Parsed,
    hits: &[Hits],
    length_ms: u64,
) -> Vec<RuleReport> {
    const MS_NS: u64 = 1_000_000;
    let rules = run.plan.rules.iter().zip(hits).zip(&parsed.rules);
    rules
        .map(|((rule, hits), (_, resolved))| RuleReport {
            rule: rule.text.clone(),
            target: rule.target.clone(),
            mechanism: rule.mechanism(Some(run.injection.attachment())),
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

/// Writes all files of a report.
fn write_report(folder: &Path, report: &Report) -> anyhow::Result<()> {
    let write = |name: &str, text: Vec<u8>| {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    };
    write(file::REPORT, serde_json::to_vec_pretty(report)?)?;
    write("junit.xml", junit::render(report)?)?;
    write("report.html", html::render(report).into_bytes())?;
    github::tell(report)
}
