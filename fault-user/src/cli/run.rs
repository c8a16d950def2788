//! `fault run`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::aim::{Aim, prepare_in, scope_of};
use super::rules::{Parsed, Rules};
use super::{Failure, Outcome, exit};
use crate::doctor::{Need, preflight};
use crate::kernel::injection::{Injection, Wishes};
use crate::plan::{Plan, guard_host};
use crate::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::process::command::{CommandSpec, Ended, Prepared as PreparedCommand};
use crate::process::user::Identity;
use crate::report::record::Recorder;
use crate::report::{expectations, summary};
use crate::rule::scenario::Expect;
use crate::steer::Steering;

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
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
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
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        let parsed = self.rules.parse()?;
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
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(self.hurt(&parsed, &command))
    }

    async fn hurt(&self, parsed: &Parsed, command: &PreparedCommand) -> Outcome {
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
        let plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        let wishes = Wishes {
            events: self.events.is_some(),
            attachment: self.aim.attachment(),
            live: false,
        };
        let mut prepared = prepare_in(elsewhere.as_ref(), &plan, &self.aim, wishes)?;
        if let Some(scope) = &scope {
            prepared.watch(scope)?;
        }
        if let Some(aimed) = &aimed {
            prepared.adopt(&aimed.cgroup, &aimed.scope)?;
        }
        let recorder = match &self.events {
            Some(path) => Some(Recorder::start(prepared.take_events()?, path)?),
            None => None,
        };
        eprintln!("fault: seed {seed}");
        let steering = self.aim.steer(&plan, scope.as_ref()).await?;
        let injection = prepared.start()?;
        let mut running = command.spawn(own.as_ref())?;
        let ended = running.wait().await?;
        if let Some(recorder) = recorder {
            recorder.finish()?;
        }
        let code = self.conclude(&injection, steering.as_ref(), &plan, &parsed.expect, ended)?;
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

    /// Prints the summary and chooses the exit code.
    fn conclude(
        &self,
        injection: &Injection,
        steering: Option<&Steering>,
        plan: &Plan,
        expect: &Expect,
        ended: Ended,
    ) -> Outcome {
        let mut hits = injection.hits(plan)?;
        if let Some(steering) = steering {
            steering.add_to(&mut hits);
        }
        let counters = injection.counters()?;
        eprint!("{}", summary::table(plan, &hits, injection, &counters));
        let unfired = summary::unfired(plan, &hits);
        for (rule, why) in &unfired {
            eprintln!("fault: the rule `{rule}` never fired: {why}");
        }
        let verdicts = expectations::verdicts(expect, plan, &hits, ended);
        for verdict in &verdicts {
            let mark = if verdict.holds { "ok" } else { "FAILED" };
            eprintln!("fault: {mark}: {}", verdict.text);
        }
        // A command that is expected to fail, and does, has succeeded.
        let expected = expect.exit.is_some_and(|code| code == ended.exit_code());
        if !ended.is_success() && !expected {
            return Ok(ended.exit_code());
        }
        if verdicts.iter().any(|verdict| !verdict.holds) {
            return Ok(exit::EXPECTATION);
        }
        if !unfired.is_empty() && !self.allow_unfired {
            eprintln!(
                "fault: exit code 120: a fault that never fired tests nothing (--allow-unfired accepts it)"
            );
            return Ok(exit::UNFIRED);
        }
        // A code that the scenario expects is a success, whatever it is.
        Ok(if expected {
            exit::SUCCESS
        } else {
            ended.exit_code()
        })
    }
}
