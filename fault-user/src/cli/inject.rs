//! `fault inject`.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::aim::{Aim, prepare_in};
use super::rules::Rules;
use super::{Failure, Outcome, exit};
use crate::doctor::{Need, preflight};
use crate::kernel::injection::{Injection, Wishes};
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
        let plan = Plan::new(&parsed.rules, seed, scope.as_ref(), parsed.length_ns)
            .map_err(Failure::usage)?;
        let wishes = Wishes {
            events: false,
            attachment: self.aim.attachment(),
        };
        let mut prepared = prepare_in(elsewhere.as_ref(), &plan, &self.aim, wishes)?;
        if let Some(aimed) = &aimed {
            prepared.watch(&aimed.scope)?;
            prepared.adopt(&aimed.cgroup, &aimed.scope)?;
        }
        let injection = prepared.start()?;
        eprintln!("fault: seed {seed}");
        eprintln!("fault: {} rules in force; Ctrl-C heals", plan.rules.len());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(wait(&injection, &plan, length))?;
        let hits = injection.hits(&plan)?;
        let counters = injection.counters()?;
        eprint!("{}", summary::table(&plan, &hits, &injection, &counters));
        injection.heal()?;
        drop(aimed);
        Ok(exit::SUCCESS)
    }
}

fn parse_length(text: &str) -> Result<Duration, Failure> {
    parse_duration(text)
        .map(Duration::from_nanos)
        .map_err(|error| Failure::usage(anyhow::anyhow!("--for: {}", error.one_line())))
}

/// Waits for the end, with a line of hits where someone is looking.
async fn wait(injection: &Injection, plan: &Plan, length: Option<Duration>) -> anyhow::Result<()> {
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
            _ = refresh.tick(), if live => {
                print!("\r\x1b[K{}", summary::line(plan, &injection.hits(plan)?));
                std::io::stdout().flush()?;
            }
        }
    }
    if live {
        println!();
    }
    Ok(())
}
