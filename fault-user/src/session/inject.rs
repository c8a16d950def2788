//! `fault inject`: rules until they are told to end.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::options::Options;
use super::outcome::{Failure, Outcome, exit, give_up};
use super::rules::RuleSet;
use super::signals::EndSignals;
use super::subject::Subject;
use super::{Loaded, Session, choose_mechanism, guard, many, plan, require, runtime, tell_unfired};
use crate::inject::injection::InjectionOptions;
use crate::plan::Plan;
use crate::report::summary;
use crate::sys::preflight::Need;
use crate::sys::process::capabilities::Capability;
use crate::tell::{self, Patience, tell};

/// How often the live line is written.
const REFRESH: Duration = Duration::from_millis(500);

/// A file of rules that is read again whenever it changes.
pub struct Watched {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
    read: Box<dyn Fn() -> Result<RuleSet, Failure>>,
}

impl Watched {
    /// The file as it is now; `read` gives its rules.
    #[must_use]
    pub fn new(path: &Path, read: Box<dyn Fn() -> Result<RuleSet, Failure>>) -> Self {
        let mut watched = Self {
            path: path.to_owned(),
            seen: None,
            read,
        };
        watched.has_changed();
        watched
    }

    /// Whether it is another file than it was the last time. One that can't be read for the moment has not changed.
    fn has_changed(&mut self) -> bool {
        let Ok(status) = std::fs::metadata(&self.path) else {
            return false;
        };
        let now = status.modified().ok().map(|time| (time, status.len()));
        let changed = now != self.seen;
        self.seen = now;
        changed
    }
}

/// Rules, and how long they last.
pub struct Inject {
    /// Whose traffic is touched.
    pub options: Options,
    /// When they end by themselves.
    pub length: Option<Duration>,
    /// Where other rules come from meanwhile.
    pub watched: Option<Watched>,
}

impl Inject {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(mut self, mut rules: RuleSet) -> Outcome {
        if !rules.expect.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "the scenario has expectations, which only `fault run` can check: use that, or take `expect` out"
            )));
        }
        if self.watched.is_some() && !rules.drawn.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "drawn faults can't be exchanged while they are in force: leave --watch out"
            )));
        }
        if !self.options.is_given() {
            guard(&rules, &self.options)?;
        }
        require(&[Need::Programs])?;
        let subject = Subject::find(&self.options)?;
        let mechanism = choose_mechanism(&mut rules, &self.options)?;
        let plan = plan(&rules, subject.scope().as_ref(), mechanism, rules.seed()?)?;
        let watched = self.watched.take();
        runtime()?.block_on(self.inject(&rules, watched, subject, plan))
    }

    async fn inject(
        &self,
        rules: &RuleSet,
        watched: Option<Watched>,
        subject: Subject,
        plan: Plan,
    ) -> Outcome {
        // Before anything is changed: what ends fault from here on takes everything back first.
        let mut ends = EndSignals::listen()?;
        let injection_options = InjectionOptions {
            live: watched.is_some(),
            ..self.options.injection_options()
        };
        let patience = Patience::start("setting up");
        let scope = subject.scope();
        let mut loaded = Loaded::load(&self.options, rules, subject, scope, plan, injection_options)?;
        loaded.count_endpoints();
        let session = loaded
            .start("fault inject".to_owned(), watched.is_none())
            .await?;
        drop(patience);
        tell!("fault: seed {}", session.plan.seed);
        tell!(
            "fault: {} in force; Ctrl-C heals",
            many(session.plan.rules.len())
        );
        let mut rights = session.rights();
        if watched.is_some() {
            // The file may be a user's.
            rights.push(Capability::DacOverride);
        }
        give_up(&rights);
        let mut active = ActiveInjection {
            options: &self.options,
            watched,
            session,
        };
        active.last(&mut ends, self.length).await?;
        active.end().await
    }
}

/// Rules that are applied, for as long as they last.
struct ActiveInjection<'a> {
    options: &'a Options,
    watched: Option<Watched>,
    session: Session<'a>,
}

impl ActiveInjection<'_> {
    /// Waits for the end.
    async fn last(&mut self, ends: &mut EndSignals, length: Option<Duration>) -> anyhow::Result<()> {
        let end = tokio::time::sleep(length.unwrap_or(Duration::from_secs(u64::from(u32::MAX))));
        tokio::pin!(end);
        let mut refresh = tokio::time::interval(REFRESH);
        let live = std::io::stdout().is_terminal();
        loop {
            tokio::select! {
                () = ends.come() => break,
                () = &mut end => break,
                task = self.session.next() => {
                    if !self.session.handle(task?).await? {
                        break;
                    }
                }
                _ = refresh.tick() => self.tick(live)?,
            }
        }
        if live {
            tell::live(format_args!("\n"));
        }
        Ok(())
    }

    /// Done now and then; `live`: someone is looking.
    fn tick(&mut self, live: bool) -> anyhow::Result<()> {
        if self.watched.as_mut().is_some_and(Watched::has_changed) {
            match self.reload() {
                Ok(()) => tell!("fault: {} in force", many(self.session.plan.rules.len())),
                Err(failure) => {
                    tell!("fault: the old rules stay in force: {:#}", failure.error);
                }
            }
        }
        if live {
            let figures = summary::line(&self.session.plan, &self.session.hits()?);
            tell::live(format_args!("\r\x1b[K{figures}"));
        }
        Ok(())
    }

    /// Reads the rules again, and applies them instead of the old ones.
    fn reload(&mut self) -> Result<(), Failure> {
        let Some(watched) = &self.watched else {
            return Ok(());
        };
        let rules = (watched.read)()?;
        let session = &mut self.session;
        let scope = session.scope();
        if scope.is_none() {
            guard(&rules, self.options)?;
        }
        let old = &session.plan;
        let mut next = plan(&rules, scope.as_ref(), old.held_by, old.seed)?;
        if !next.stream_rules().is_empty() || !old.stream_rules().is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "stream faults can't be exchanged while they are in force: start again"
            )));
        }
        session.injection.replace(&session.plan, &mut next)?;
        session.plan = next;
        session.control.forget(&rules);
        Ok(())
    }

    /// Tells what was hit, and takes everything back.
    async fn end(self) -> Outcome {
        self.session.drain().await?;
        let hits = self.session.hits()?;
        tell_unfired(&self.session.summarize(&hits)?);
        self.session.restore()?;
        Ok(exit::SUCCESS)
    }
}
