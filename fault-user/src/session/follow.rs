//! The end of a container that is aimed at, and its return (`--follow`).

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::Interval;

use super::many;
use super::options::Options;
use super::rules::RuleSet;
use super::subject::Subject;
use crate::inject::injection::{Injection, InjectionOptions};
use crate::plan::Plan;
use crate::sys::process::container;
use crate::sys::process::container::{Container, RuntimePaths};
use crate::sys::process::proc::open_pidfd;
use crate::tell::tell;

/// How often a container that has ended is looked for.
const PACE: Duration = Duration::from_millis(200);

/// What has happened to the container.
#[derive(Debug)]
pub enum ContainerEvent {
    /// Its first process has ended.
    Ended,
    /// It runs again, in another process.
    Back(Container),
}

/// Watches a container.
#[derive(Debug)]
pub struct Follower {
    name: String,
    /// Whether the rules are to go with it.
    pub follows: bool,
    /// Its first process; `None` while it does not run.
    process: Option<AsyncFd<OwnedFd>>,
    pace: Interval,
    /// Why it could not be followed the last time, said once.
    refused: String,
}

impl Follower {
    /// Watches the container that is aimed at, if one is. To be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel refuses to watch its process.
    pub fn of(options: &Options, subject: &Subject) -> Result<Option<Self>> {
        let (Some(name), Some(container)) = (&options.container, &subject.container) else {
            return Ok(None);
        };
        Ok(Some(Self {
            name: name.clone(),
            follows: options.follow,
            process: watch(container.pid)?,
            pace: tokio::time::interval(PACE),
            refused: String::new(),
        }))
    }

    /// Waits for the next turn; for ever where there is none. Safe to cancel.
    ///
    /// # Errors
    /// The process can't be watched.
    pub async fn next(follower: &mut Option<Self>) -> Result<ContainerEvent> {
        match follower {
            Some(follower) => follower.turn().await,
            None => std::future::pending().await,
        }
    }

    async fn turn(&mut self) -> Result<ContainerEvent> {
        if let Some(process) = &self.process {
            drop(process.readable().await.context("watching the container")?);
            self.process = None;
            return Ok(ContainerEvent::Ended);
        }
        if !self.follows {
            std::future::pending::<()>().await;
        }
        loop {
            self.pace.tick().await;
            // Stopped, being made, or gone for now.
            if let Ok(container) = container::find(&RuntimePaths::default(), &self.name)
                && let Some(process) = watch(container.pid)?
            {
                self.process = Some(process);
                return Ok(ContainerEvent::Back(container));
            }
        }
    }

    /// Says what has happened, and moves the rules when it is back.
    pub fn take(&mut self, turn: ContainerEvent, relocation: Relocation<'_>) {
        let name = &self.name;
        match turn {
            ContainerEvent::Ended if self.follows => {
                tell!("fault: the container `{name}` has ended; the rules wait for it");
            }
            ContainerEvent::Ended => tell!(
                "fault: the container `{name}` has ended, and its rules with it (--follow goes on when it is back)"
            ),
            ContainerEvent::Back(container) => match relocation.to(container) {
                Ok(rules) => {
                    self.refused.clear();
                    tell!(
                        "fault: the container `{name}` is back: {} in force",
                        many(rules)
                    );
                }
                Err(error) => self.refuse(&format!("{error:#}")),
            },
        }
    }

    /// Tries again later; most likely it has ended again meanwhile.
    fn refuse(&mut self, error: &str) {
        self.process = None;
        if self.refused != error {
            tell!(
                "fault: the container `{}` is not followed yet: {error}",
                self.name
            );
            error.clone_into(&mut self.refused);
        }
    }
}

/// Rules that go from one place to another.
pub struct Relocation<'a> {
    /// What they are aimed at.
    pub options: &'a Options,
    /// The rules.
    pub rules: &'a RuleSet,
    /// How they are put in force.
    pub injection_options: &'a InjectionOptions,
    /// Where they are.
    pub subject: &'a mut Subject,
    /// The plan in force.
    pub plan: &'a mut Plan,
    /// Their programs.
    pub injection: &'a mut Injection,
}

impl Relocation<'_> {
    /// Puts the rules in force in a container; gives how many.
    fn to(self, container: Container) -> Result<usize> {
        let mut subject = Subject::of(self.options, Some(container))?;
        let scope = subject.scope();
        let mut plan = Plan::new(
            &self.rules.rules,
            self.plan.seed,
            scope.as_ref(),
            self.rules.length_ns,
        )?;
        plan.hold_by(self.plan.held_by);
        self.injection.settle()?;
        let mut prepared = subject.load(&plan, self.options, self.injection_options)?;
        if let Some(scope) = &scope {
            prepared.watch(scope)?;
        }
        subject.adopt(&mut prepared)?;
        self.injection.move_to(self.plan, prepared)?;
        *self.plan = plan;
        *self.subject = subject;
        Ok(self.plan.rules.len())
    }
}

/// A descriptor that gets readable when the process ends; `None` when it has ended.
fn watch(pid: i32) -> Result<Option<AsyncFd<OwnedFd>>> {
    match open_pidfd(pid) {
        // SAFETY: it owns the descriptor, and keeps it open for as long as it lives.
        Ok(process) => unsafe { AsyncFd::register(process) }
            .map(Some)
            .context("watching the container"),
        Err(Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("watching process {pid}")),
    }
}
