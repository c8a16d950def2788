//! `fault inject`: rules that are applied until a signal or a time limit.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::options::SessionOptions;
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

/// Interval for updating the live line.
const REFRESH: Duration = Duration::from_millis(500);

/// A file of rules that is reloaded when it changes.
pub struct WatchedFile {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
    read: Box<dyn Fn() -> Result<RuleSet, Failure>>,
}

impl WatchedFile {
    /// Records the current state of the file; `read` parses its rules.
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

    /// Whether the file has changed since the last call. A file that can't be read counts as unchanged.
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

/// The options of `fault inject`.
pub struct InjectOptions {
    /// The options of the session.
    pub options: SessionOptions,
    /// The time after which the rules are removed.
    pub length: Option<Duration>,
    /// The file to reload rules from.
    pub watched: Option<WatchedFile>,
    /// Rules that never fired are accepted.
    pub allow_unfired: bool,
}

impl InjectOptions {
    /// Applies the rules until the end.
    ///
    /// # Errors
    /// Wrong arguments, or the rules can't be applied; then nothing is changed.
    pub fn execute(mut self, mut rules: RuleSet) -> Outcome {
        check(&rules, &self.options, self.watched.is_some())?;
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
        watched: Option<WatchedFile>,
        subject: Subject,
        plan: Plan,
    ) -> Outcome {
        // Signals are handled before anything is changed, so that everything is restored.
        let mut ends = EndSignals::listen()?;
        let injection_options = InjectionOptions {
            live: watched.is_some(),
            divides: watched.is_some(),
            ..self.options.injection_options()
        };
        let patience = Patience::start("setting up");
        let scope = subject.scope();
        let mut loaded = Loaded::load(
            &self.options,
            rules,
            subject,
            scope,
            plan,
            injection_options,
        )?;
        loaded.count_endpoints();
        let session = loaded
            .start("fault inject".to_owned(), watched.is_none())
            .await?;
        drop(patience);
        tell!("fault: seed {}", session.plan.seed);
        tell!(
            "fault: {} applied; press Ctrl-C to stop",
            many(session.plan.rules.len())
        );
        let mut rights = session.rights();
        if watched.is_some() {
            // The file may belong to another user.
            rights.push(Capability::DacOverride);
        }
        give_up(&rights);
        let mut active = ActiveInjection {
            options: &self.options,
            watched,
            session,
            allow_unfired: self.allow_unfired,
        };
        active.last(&mut ends, self.length).await?;
        active.end().await
    }
}

/// Rejects what `fault inject` can't do with rules, the first ones and those of a changed file.
fn check(rules: &RuleSet, options: &SessionOptions, is_watched: bool) -> Result<(), Failure> {
    if !rules.expect.is_empty() {
        return Err(Failure::usage(anyhow::anyhow!(
            "the scenario has expectations, which only `fault run` checks: use `fault run`, or remove `expect`"
        )));
    }
    if is_watched && !rules.drawn.is_empty() {
        return Err(Failure::usage(anyhow::anyhow!(
            "--watch can't be combined with randomly drawn faults: leave --watch out"
        )));
    }
    if !options.is_given() {
        guard(rules, options)?;
    }
    Ok(())
}

/// The state while the rules are applied.
struct ActiveInjection<'a> {
    options: &'a SessionOptions,
    watched: Option<WatchedFile>,
    session: Session<'a>,
    allow_unfired: bool,
}

impl ActiveInjection<'_> {
    /// Runs until a signal or the time limit.
    async fn last(
        &mut self,
        ends: &mut EndSignals,
        length: Option<Duration>,
    ) -> anyhow::Result<()> {
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

    /// Updates the live line if `live`, and reloads the file if it has changed.
    fn tick(&mut self, live: bool) -> anyhow::Result<()> {
        if self.watched.as_mut().is_some_and(WatchedFile::has_changed) {
            match self.reload() {
                Ok(()) => tell!("fault: {} reloaded", many(self.session.plan.rules.len())),
                Err(failure) => {
                    tell!(
                        "fault: warning: the old rules stay applied: {:#}",
                        failure.error
                    );
                }
            }
        }
        if live {
            let folded = self.session.rules().folded(&self.session.plan);
            let figures = summary::line(&folded, &self.session.hits()?);
            tell::live(format_args!("\r\x1b[K{figures}"));
        }
        Ok(())
    }

    /// Reads the rules again and replaces the old ones.
    fn reload(&mut self) -> Result<(), Failure> {
        let Some(watched) = &self.watched else {
            return Ok(());
        };
        let rules = (watched.read)()?;
        check(&rules, self.options, true)?;
        let session = &mut self.session;
        let scope = session.scope();
        let old = &session.plan;
        let mut next = plan(&rules, scope.as_ref(), old.held_by, old.seed)?;
        next.leave_tcp();
        if !next.stream_rules().is_empty() || !old.stream_rules().is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "stream faults can't be replaced during a run: restart fault"
            )));
        }
        let hits = session.injection.reload(&session.plan, &mut next)?;
        session.control.targets(&session.plan, &hits.before, None);
        session.plan = next;
        session.control.forget(&rules, &session.plan, &hits.after);
        Ok(())
    }

    /// Prints the summary and removes everything.
    async fn end(mut self) -> Outcome {
        self.session.drain().await?;
        let hits = self.session.hits()?;
        self.session.rest();
        let unfired = self.session.summarize(&hits)?;
        tell_unfired(&unfired, self.allow_unfired);
        self.session.restore()?;
        Ok(exit::SUCCESS)
    }
}
