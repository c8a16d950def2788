//! `fault inject`.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::aim::{Aim, prepare_in};
use super::rules::Rules;
use super::{Failure, Outcome, exit};
use crate::doctor::{Need, preflight};
use crate::kernel::injection::{Injection, Wishes};
use crate::kernel::ruleset::Scope;
use crate::plan::mechanism::choose;
use crate::plan::{Plan, guard_host};
use crate::report::summary;
use crate::rule::units::parse_duration;

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
        let mut parsed = self.rules.parse()?;
        if !parsed.expect.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "the scenario has expectations, which only `fault run` can check: use that, or take `expect` out"
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
        let mechanism = choose(self.aim.mechanism(), &mut parsed.rules)?;
        let mut plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        plan.hold_by(mechanism);
        let mut watched = self.rules.file().filter(|_| self.watch).map(Watched::new);
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
        runtime.block_on(wait(length, async |live| {
            if watched.as_mut().is_some_and(Watched::has_changed) {
                match self.reload(&mut injection, &plan, scope.as_ref()) {
                    Ok(next) => {
                        plan = next;
                        eprintln!("fault: {} rules in force", plan.rules.len());
                    }
                    Err(failure) => {
                        eprintln!("fault: the old rules stay in force: {:#}", failure.error);
                    }
                }
            }
            if live {
                let mut hits = injection.hits(&plan)?;
                if let Some(steering) = &steering {
                    steering.add_to(&mut hits);
                }
                print!("\r\x1b[K{}", summary::line(&plan, &hits));
                std::io::stdout().flush()?;
            }
            Ok(())
        }))?;
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
        plan.hold_by(old.held_by);
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

/// Waits for the end; `tick` is called now and then, and told whether someone is looking.
async fn wait(
    length: Option<Duration>,
    mut tick: impl AsyncFnMut(bool) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let end = tokio::time::sleep(length.unwrap_or(Duration::from_secs(u64::from(u32::MAX))));
    tokio::pin!(end);
    let mut refresh = tokio::time::interval(REFRESH);
    let live = std::io::stdout().is_terminal();
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = hangup.recv() => break,
            () = &mut end => break,
            _ = refresh.tick() => tick(live).await?,
        }
    }
    if live {
        println!();
    }
    Ok(())
}
