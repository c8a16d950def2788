//! Watches for the end of the selected container and for its restart (`--follow`).

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::Interval;

use super::many;
use super::options::SessionOptions;
use super::rules::RuleSet;
use super::subject::Subject;
use crate::inject::injection::{Injection, InjectionOptions};
use crate::plan::Plan;
use crate::sys::process::container;
use crate::sys::process::container::{Container, RuntimePaths};
use crate::sys::process::proc::open_pidfd;
use crate::tell::tell;

/// Interval for polling a container that has ended.
const PACE: Duration = Duration::from_millis(200);

/// An event of the container.
#[derive(Debug)]
pub enum ContainerEvent {
    /// Its first process has ended.
    Ended,
    /// It runs again, with another first process.
    Back(Container),
}

/// Watches a container.
#[derive(Debug)]
pub struct Follower {
    name: String,
    /// Whether to apply the rules again after a restart.
    pub follows: bool,
    /// Its first process; `None` while it is not running.
    process: Option<AsyncFd<OwnedFd>>,
    pace: Interval,
    /// The last error, to report it only once.
    refused: String,
}

impl Follower {
    /// Watches the selected container, if there is one. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The container's process can't be watched.
    pub fn of(options: &SessionOptions, subject: &Subject) -> Result<Option<Self>> {
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

    /// Waits for the next event; forever without a container. Cancel safe.
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
            // The container is stopped, being created, or removed.
            if let Ok(container) = container::find(&RuntimePaths::default(), &self.name)
                && let Some(process) = watch(container.pid)?
            {
                self.process = Some(process);
                return Ok(ContainerEvent::Back(container));
            }
        }
    }

    /// Reports the event, and moves the rules to a restarted container.
    pub fn take(&mut self, turn: ContainerEvent, relocation: Relocation<'_>) {
        let name = &self.name;
        match turn {
            ContainerEvent::Ended if self.follows => {
                tell!("fault: the container `{name}` has ended; waiting for it to restart");
            }
            ContainerEvent::Ended => tell!(
                "fault: the container `{name}` has ended; its rules are removed (--follow applies them again after a \
                 restart)"
            ),
            ContainerEvent::Back(container) => match relocation.to(container) {
                Ok(rules) => {
                    self.refused.clear();
                    tell!(
                        "fault: the container `{name}` is running again: {} applied",
                        many(rules)
                    );
                }
                Err(error) => self.refuse(&format!("{error:#}")),
            },
        }
    }

    /// Reports the error and tries again later. The container has probably ended again.
    fn refuse(&mut self, error: &str) {
        self.process = None;
        if self.refused != error {
            tell!(
                "fault: warning: the rules can't be applied to the restarted container `{}` yet: {error}",
                self.name
            );
            error.clone_into(&mut self.refused);
        }
    }
}

/// Moves rules from one container to another.
pub struct Relocation<'a> {
    /// The options that select traffic.
    pub options: &'a SessionOptions,
    /// The rules.
    pub rules: &'a RuleSet,
    /// The indexes of those that are not applied now.
    pub off: &'a BTreeSet<usize>,
    /// The options of the injection.
    pub injection_options: &'a InjectionOptions,
    /// The traffic that the rules apply to now.
    pub subject: &'a mut Subject,
    /// The applied plan.
    pub plan: &'a mut Plan,
    /// The attached programs.
    pub injection: &'a mut Injection,
}

impl Relocation<'_> {
    /// Applies the rules to a container. Returns the number of rules.
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
        self.injection.move_to(&plan, self.off, prepared)?;
        *self.plan = plan;
        *self.subject = subject;
        Ok(self.plan.rules.len())
    }
}

/// A descriptor that becomes readable when the process ends; `None` if it has ended.
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
