//! `fault inject`.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::aim::{Aim, prepare_in};
use super::control::Control;
use super::rules::Rules;
use super::turns::Turns;
use super::{Failure, Outcome, exit};
use crate::doctor::{Need, preflight};
use crate::kernel::injection::{Injection, Wishes};
use crate::kernel::ruleset::Scope;
use crate::plan::{Plan, guard_host};
use crate::report::summary;
use crate::rule::units::parse_duration;
use crate::steer::Steering;

/// How often the live line is written.
const REFRESH: Duration = Duration::from_millis(500);

/// Apply rules until Ctrl-C, SIGTERM or --for.
///
/// The whole host is touched, unless --pid or --cgroup says whose traffic is.
#[derive(Debug, Args)]
pub struct Inject {
    #[command(flatten)]
    rules: Rules,
    #[command(flatten)]
    aim: Aim,
    /// Heal after this time, e.g. 30s.
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<String>,
    /// Put the rules of the file in force anew whenever it changes, while traffic flows.
    #[arg(long, requires = "file")]
    watch: bool,
}

impl Inject {
    /// Does it.
    ///
    /// # Errors
    /// Wrong arguments, or what was asked for can't be set up; then nothing is changed.
    pub fn execute(self) -> Outcome {
        let parsed = self.rules.parse()?;
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
        let length = self.length.as_deref().map(parse_length).transpose()?;
        if !self.aim.is_given() && !self.aim.force {
            guard_host(&parsed.rules).map_err(Failure::usage)?;
        }
        preflight(&[Need::Programs])?;
        let elsewhere = self.aim.elsewhere()?;
        let mut journal = None;
        let aimed = match elsewhere {
            Some(_) => None,
            None => self.aim.take(&mut journal)?,
        };
        let scope = aimed.as_ref().map(|aimed| aimed.scope.clone());
        let seed = parsed.seed()?;
        let mut plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        let watched = self.rules.file().filter(|_| self.watch).map(Watched::new);
        let wishes = Wishes {
            events: false,
            live: self.watch,
            replay: None,
            attachment: self.aim.attachment(),
        };
        let mut prepared = prepare_in(elsewhere.as_ref(), &plan, &self.aim, &wishes)?;
        if let Some(aimed) = &aimed {
            prepared.watch(&aimed.scope)?;
            prepared.adopt(&aimed.cgroup, &aimed.scope)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        let steering = runtime.block_on(self.aim.steer(&plan, scope.as_ref(), &mut prepared))?;
        let mut injection = prepared.start()?;
        eprintln!("fault: seed {seed}");
        eprintln!("fault: {} rules in force; Ctrl-C heals", plan.rules.len());
        let started = injection.started();
        let turns = if self.watch {
            Turns::none(started)
        } else {
            parsed.turns(started)
        };
        runtime.block_on(self.hold(
            length,
            (&mut injection, &mut plan),
            steering.as_ref(),
            scope.as_ref(),
            watched,
            turns,
        ))?;
        let mut hits = injection.hits(&plan)?;
        if let Some(steering) = &steering {
            steering.add_to(&mut hits);
        }
        let counters = injection.counters()?;
        eprint!("{}", summary::table(&plan, &hits, &injection, &counters));
        drop(steering);
        injection.heal()?;
        drop(aimed);
        Ok(exit::SUCCESS)
    }
}

impl Inject {
    /// Holds the rules in force until the end, answers `fault top`, shows the live line, and looks at the file.
    async fn hold(
        &self,
        length: Option<Duration>,
        (injection, plan): (&mut Injection, &mut Plan),
        steering: Option<&Steering>,
        scope: Option<&Scope>,
        mut watched: Option<Watched<'_>>,
        turns: Turns,
    ) -> anyhow::Result<()> {
        let mut control = Control::open("fault inject".to_owned(), turns);
        control.begin(injection, plan)?;
        let mut end = End::new(length)?;
        let mut refresh = tokio::time::interval(REFRESH);
        let live = std::io::stdout().is_terminal();
        loop {
            tokio::select! {
                () = end.comes() => break,
                event = control.next() => {
                    control.handle(event, injection, plan, steering).await?;
                    continue;
                }
                _ = refresh.tick() => {}
            }
            if watched.as_mut().is_some_and(Watched::has_changed) {
                match self.reload(injection, plan, scope) {
                    Ok(next) => {
                        *plan = next;
                        control.forget();
                        eprintln!("fault: {} rules in force", plan.rules.len());
                    }
                    Err(failure) => {
                        eprintln!("fault: the old rules stay in force: {:#}", failure.error);
                    }
                }
            }
            if live {
                show(injection, plan, steering)?;
            }
        }
        if live {
            println!();
        }
        Ok(())
    }

    /// Reads the rules anew and puts them in force.
    fn reload(
        &self,
        injection: &mut Injection,
        old: &Plan,
        scope: Option<&Scope>,
    ) -> Result<Plan, Failure> {
        let parsed = self.rules.parse()?;
        if scope.is_none() && !self.aim.force {
            guard_host(&parsed.rules).map_err(Failure::usage)?;
        }
        let mut plan =
            Plan::new(&parsed.rules, old.seed, scope, parsed.length_ns).map_err(Failure::usage)?;
        if !plan.stream_rules().is_empty() || !old.stream_rules().is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "stream faults can't be exchanged while they are in force: start again"
            )));
        }
        injection.replace(old, &mut plan)?;
        Ok(plan)
    }
}

fn parse_length(text: &str) -> Result<Duration, Failure> {
    parse_duration(text)
        .map(Duration::from_nanos)
        .map_err(|error| Failure::usage(anyhow::anyhow!("--for: {}", error.one_line())))
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

/// Writes the live line.
fn show(injection: &Injection, plan: &Plan, steering: Option<&Steering>) -> anyhow::Result<()> {
    let mut hits = injection.hits(plan)?;
    if let Some(steering) = steering {
        steering.add_to(&mut hits);
    }
    print!("\r\x1b[K{}", summary::line(plan, &hits));
    std::io::stdout().flush()?;
    Ok(())
}

/// What ends an injection.
struct End {
    signals: [Signal; 3],
    after: Pin<Box<tokio::time::Sleep>>,
}

impl End {
    fn new(length: Option<Duration>) -> anyhow::Result<Self> {
        let length = length.unwrap_or(Duration::from_secs(u64::from(u32::MAX)));
        Ok(Self {
            signals: [
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ],
            after: Box::pin(tokio::time::sleep(length)),
        })
    }

    /// Waits for a signal or the end of the time.
    async fn comes(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            () = &mut self.after => {}
        }
    }
}
