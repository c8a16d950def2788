//! `fault inject`.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Args;
use fault_common::abi::Counter;
use nix::unistd::Uid;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::aim::{Aim, Place};
use super::control::{self, Control};
use super::follow::{Follower, Moving};
use super::rules::{Parsed, Rules};
use super::turns::Turns;
use super::{Failure, Outcome, exit, give_up};
use crate::session::machine::ThisMachine;
use crate::inject::injection::{Hits, Injection, Wishes};
use crate::plan::mechanism::choose;
use crate::plan::tables::Scope;
use crate::plan::{Plan, guard_host};
use crate::report::summary::{self, Audience};
use crate::rule::units::parse_duration;
use crate::steer::Steering;
use crate::sys::preflight::{Need, preflight};
use crate::sys::process::capabilities::Capability;
use crate::sys::process::{caller, signals};
use crate::tell::{self, Patience, tell};

/// How often the live line is written.
const REFRESH: Duration = Duration::from_millis(500);

/// Apply rules until Ctrl-C, SIGTERM or --for.
///
/// The whole host is touched, unless --container, --pid, --cgroup or --netns says whose traffic is. Rules on a container end
/// with it, unless --follow is given.
#[derive(Debug, Args)]
pub struct Inject {
    #[command(flatten)]
    rules: Rules,
    #[command(flatten)]
    aim: Aim,
    /// Heal after this time, e.g. 30s.
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<String>,
    /// Put the rules of the file in force anew whenever it changes, while traffic flows. Rules that hold packets (delay,
    /// rate, …) can come where the first ones held some too; stream faults can't be exchanged.
    #[arg(long, requires = "file", conflicts_with = "follow")]
    watch: bool,
}

impl Inject {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        // Before it is read: what is written from here on is a change.
        let watched = self.rules.file().filter(|_| self.watch).map(Watched::new);
        let mut parsed = self.rules.parse()?;
        if !parsed.expect.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "the scenario has expectations, which only `fault run` can check: use that, or take `expect` out"
            )));
        }
        if self.watch && !parsed.drawn.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "drawn faults can't be exchanged while they are in force: leave --watch out"
            )));
        }
        let length = self.length.as_deref();
        let length = length.map(|text| parse_time("--for", text)).transpose()?;
        self.aim.drain()?;
        if !self.aim.is_given() && !self.aim.force {
            guard_host(&parsed.rules, None).map_err(Failure::usage)?;
        }
        // Without root, sudo starts it again.
        if !Uid::effective().is_root() && preflight(&[Need::Programs]).is_err() {
            caller::go_through_sudo();
        }
        preflight(&[Need::Programs])?;
        let place = self.aim.place()?;
        let scope = place.scope();
        let seed = parsed.seed()?;
        let mechanism = choose(self.aim.mechanism(), &mut parsed.rules, &ThisMachine)?;
        let mut plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        plan.hold_by(mechanism);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(self.hurt(&parsed, watched, place, plan, length))
    }

    async fn hurt(
        &self,
        parsed: &Parsed,
        watched: Option<Watched<'_>>,
        mut place: Place,
        plan: Plan,
        length: Option<Duration>,
    ) -> Outcome {
        // Before anything is changed: what ends fault from here on heals first.
        let mut ends = Ends::listen()?;
        let scope = place.scope();
        let wishes = Wishes {
            events: false,
            live: self.watch,
            replay: None,
            attachment: self.aim.attachment(),
            front: self.aim.front(),
            newcomers: Some(self.aim.selection()),
        };
        let patience = Patience::start("setting up");
        let mut prepared = place.prepare(&plan, &self.aim, &wishes)?;
        if let Some(scope) = &scope {
            prepared.watch(scope)?;
        }
        place.adopt(&mut prepared)?;
        place.count_endpoints(scope.as_ref(), &mut prepared);
        let steering = self
            .aim
            .steer(&place, &plan, scope.as_ref(), &mut prepared)
            .await?;
        let mut follower = Follower::of(&self.aim, &place)?;
        let mut injection = prepared.start()?;
        drop(patience);
        tell!("fault: seed {}", plan.seed);
        tell!("fault: {} in force; Ctrl-C heals", many(plan.rules.len()));
        let mut rights = place.rights(&self.aim, &injection, steering.as_ref());
        if self.watch {
            // The file may be a user's.
            rights.push(Capability::DacOverride);
        }
        give_up(&rights);
        let turns = if self.watch {
            Turns::none(injection.started())
        } else {
            parsed.turns(injection.started())
        };
        let sockets = self.aim.sockets(&place, scope.as_ref(), parsed);
        let mut control = Control::open("fault inject".to_owned(), turns, sockets);
        control.begin(&mut injection, &plan)?;
        let mut course = Course {
            inject: self,
            parsed,
            watched,
            wishes,
            injection,
            plan,
            steering,
            place,
            control,
        };
        course.last(&mut ends, length, &mut follower).await?;
        course.end().await
    }

    /// Reads the rules anew and puts them in force.
    fn reload(
        &self,
        injection: &mut Injection,
        old: &Plan,
        scope: Option<&Scope>,
    ) -> Result<(Plan, Parsed), Failure> {
        let parsed = self.rules.parse()?;
        if scope.is_none() && !self.aim.force {
            guard_host(&parsed.rules, None).map_err(Failure::usage)?;
        }
        let mut plan =
            Plan::new(&parsed.rules, old.seed, scope, parsed.length_ns).map_err(Failure::usage)?;
        plan.hold_by(old.held_by);
        if !plan.stream_rules().is_empty() || !old.stream_rules().is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "stream faults can't be exchanged while they are in force: start again"
            )));
        }
        injection.replace(old, &mut plan)?;
        Ok((plan, parsed))
    }
}

/// A number of rules, in words.
pub(super) fn many(rules: usize) -> String {
    match rules {
        1 => "1 rule".to_owned(),
        rules => format!("{rules} rules"),
    }
}

/// The time that is given by an option.
pub(super) fn parse_time(option: &str, text: &str) -> Result<Duration, Failure> {
    parse_duration(text)
        .map(Duration::from_nanos)
        .map_err(|error| Failure::usage(anyhow::anyhow!("{option}: {}", error.one_line())))
}

/// A file that is looked at for changes.
struct Watched<'a> {
    path: &'a Path,
    seen: Option<(SystemTime, u64)>,
}

impl<'a> Watched<'a> {
    fn new(path: &'a Path) -> Self {
        let mut watched = Self { path, seen: None };
        watched.has_changed();
        watched
    }

    /// Whether it is another file than it was the last time. One that can't be read for the moment has not changed.
    fn has_changed(&mut self) -> bool {
        let Ok(status) = std::fs::metadata(self.path) else {
            return false;
        };
        let now = status.modified().ok().map(|time| (time, status.len()));
        let changed = now != self.seen;
        self.seen = now;
        changed
    }
}

/// The signals that end `fault inject` and `fault daemon`.
pub(super) struct Ends {
    interrupt: Signal,
    terminate: Signal,
    /// `None` under nohup(1).
    hangup: Option<Signal>,
}

impl Ends {
    pub(super) fn listen() -> anyhow::Result<Self> {
        let hangup = if signals::is_ignored(libc::SIGHUP)? {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
        })
    }

    /// Waits for one of them.
    pub(super) async fn come(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Rules in force, for as long as they last.
struct Course<'a> {
    inject: &'a Inject,
    parsed: &'a Parsed,
    watched: Option<Watched<'a>>,
    wishes: Wishes,
    injection: Injection,
    plan: Plan,
    steering: Option<Steering>,
    place: Place,
    control: Control,
}

impl Course<'_> {
    /// Waits for the end.
    async fn last(
        &mut self,
        ends: &mut Ends,
        length: Option<Duration>,
        follower: &mut Option<Follower>,
    ) -> anyhow::Result<()> {
        let end = tokio::time::sleep(length.unwrap_or(Duration::from_secs(u64::from(u32::MAX))));
        tokio::pin!(end);
        let mut refresh = tokio::time::interval(REFRESH);
        let live = std::io::stdout().is_terminal();
        loop {
            tokio::select! {
                () = ends.come() => break,
                () = &mut end => break,
                event = self.control.next() => {
                    let steering = self.steering.as_ref();
                    self.control
                        .handle(event, &mut self.injection, &self.plan, steering)
                        .await?;
                }
                _ = refresh.tick() => self.tick(live)?,
                turn = Follower::next(follower) => {
                    if let Some(follower) = follower.as_mut() {
                        follower.take(turn?, self.moving());
                        if !follower.follows {
                            break;
                        }
                    }
                }
            }
        }
        if live {
            tell::live(format_args!("\n"));
        }
        Ok(())
    }

    fn moving(&mut self) -> Moving<'_> {
        Moving {
            aim: &self.inject.aim,
            parsed: self.parsed,
            wishes: &self.wishes,
            place: &mut self.place,
            plan: &mut self.plan,
            injection: &mut self.injection,
        }
    }

    /// Done now and then; `live`: someone is looking.
    fn tick(&mut self, live: bool) -> anyhow::Result<()> {
        if self.watched.as_mut().is_some_and(Watched::has_changed) {
            let scope = self.place.scope();
            match self
                .inject
                .reload(&mut self.injection, &self.plan, scope.as_ref())
            {
                Ok((next, parsed)) => {
                    self.plan = next;
                    self.control.forget(&parsed);
                    tell!("fault: {} in force", many(self.plan.rules.len()));
                }
                Err(failure) => {
                    tell!("fault: the old rules stay in force: {:#}", failure.error);
                }
            }
        }
        if live {
            let figures = summary::line(&self.plan, &self.hits()?);
            tell::live(format_args!("\r\x1b[K{figures}"));
        }
        Ok(())
    }

    fn hits(&self) -> anyhow::Result<Vec<Hits>> {
        control::hits(&self.injection, &self.plan, self.steering.as_ref())
    }

    /// Tells what was hit, and heals.
    async fn end(self) -> Outcome {
        if let Some(steering) = &self.steering {
            self.inject.aim.finish(steering, &self.parsed.rules).await?;
        }
        let hits = self.hits()?;
        let counters = self.injection.counters()?;
        let table = summary::table(&self.plan, &hits, &self.injection, &counters);
        tell!("{}", table.trim_end());
        let scope = self.place.scope();
        let endpoints = self.injection.endpoints()?;
        let audience = Audience {
            who: self.place.who(scope.as_ref()),
            endpoints: endpoints.as_ref(),
            failed: counters[Counter::ActionFailed as usize],
            has_bridge: self.injection.has_bridge(),
        };
        for (rule, why) in summary::unfired(&self.plan, &hits, &audience) {
            tell!("fault: the rule `{rule}` never fired: {why}");
        }
        drop(self.steering);
        self.injection.heal()?;
        drop(self.place);
        Ok(exit::SUCCESS)
    }
}
