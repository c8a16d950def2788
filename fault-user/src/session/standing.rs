//! The packet rules of a daemon, which can be replaced without interrupting traffic. The programs are only loaded while
//! there are rules.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use anyhow::anyhow;
use nix::sys::signal::SigSet;
use serde::Serialize;
use tokio::sync::oneshot;

use super::machine::ThisMachine;
use crate::inject::injection::{Hits, Injection, InjectionOptions};
use crate::inject::preparation::prepare;
use crate::plan::mechanism::choose;
use crate::plan::{Plan, guard_host};
use crate::rule::{Layer, Profiles, ResolvedRule, Rule, SystemResolver, Targets};
use crate::sys::net::interfaces::{self, Interface, Selection};
use crate::sys::preflight::{Need, preflight};

/// A rule with its number.
#[derive(Clone, Debug)]
struct Entry {
    id: u64,
    rule: Rule,
    resolved: ResolvedRule,
    /// Its hits before the programs were reloaded.
    past: Hits,
    /// The toxic that it implements.
    toxic: Option<String>,
}

/// A rule to add.
#[derive(Clone, Debug)]
pub struct NewRule {
    rule: Rule,
    resolved: ResolvedRule,
}

impl NewRule {
    /// Looks the names of a rule up, or of those that its profile stands for.
    ///
    /// # Errors
    /// It is about a stream, or a name is unknown.
    pub fn all_of(rule: &Rule) -> Result<Vec<Self>, RulesError> {
        let rules = rule
            .expanded(&Profiles::new())
            .map_err(|error| RulesError::Bad(error.one_line()))?;
        rules.into_iter().map(Self::new).collect()
    }

    /// Resolves the names in a rule.
    ///
    /// # Errors
    /// It is a stream rule, or a name is unknown.
    pub fn new(rule: Rule) -> Result<Self, RulesError> {
        if rule.fault.layer() == Layer::Stream {
            return Err(RulesError::Bad(format!(
                "`{rule}` is a stream fault: add a transparent proxy (its listen address equals its upstream), and \
                 add the fault to it as a toxic"
            )));
        }
        let resolved = rule
            .resolve(&Targets::new(), &mut SystemResolver)
            .map_err(|error| RulesError::Bad(error.one_line()))?;
        Ok(Self { rule, resolved })
    }
}

impl fmt::Display for NewRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rule.fmt(f)
    }
}

/// The state of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleStatus {
    /// Its number.
    pub id: u64,
    /// The rule as it is printed.
    pub rule: String,
    /// The mechanism.
    pub mechanism: String,
    /// Packets that it matched.
    pub seen: u64,
    /// Packets that it hit.
    pub hits: u64,
    /// Connections that it matched.
    pub connections: u64,
    /// The toxic that it implements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toxic: Option<String>,
}

/// The reason why the rules were not changed.
#[derive(Debug)]
pub enum RulesError {
    /// A rule is invalid or unsupported.
    Bad(String),
    /// Privileges are missing.
    Forbidden(String),
    /// A system call failed.
    Failed(anyhow::Error),
}

impl fmt::Display for RulesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad(why) | Self::Forbidden(why) => f.write_str(why),
            Self::Failed(error) => write!(f, "{error:#}"),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for RulesError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Rules that are loaded into the kernel.
struct Applied {
    injection: Injection,
    plan: Plan,
    /// Whether the programs were loaded with what divides super-packets, as far as that is possible.
    divides: bool,
}

impl Applied {
    /// The programs that were loaded for this plan.
    fn new(injection: Injection, plan: Plan) -> Self {
        Self {
            divides: plan.divides(),
            injection,
            plan,
        }
    }
}

#[derive(Default)]
struct Now {
    next_id: u64,
    entries: Vec<Entry>,
    applied: Option<Applied>,
}

type Work = Box<dyn FnOnce() + Send>;

/// The packet rules of a daemon.
pub struct StandingRules {
    seed: u64,
    /// The port of the API. Rules that match it need `force`.
    api_port: Option<u16>,
    now: Mutex<Now>,
    /// Sends work to the thread that applies the rules. It keeps the capabilities for that, while threads that read
    /// from the network drop theirs.
    hand: mpsc::Sender<Work>,
}

/// A change of the rules.
#[derive(Clone, Debug)]
pub struct RulesChange {
    /// Rules to append.
    pub add: Vec<NewRule>,
    /// The toxic that they implement, if any.
    pub toxic: Option<String>,
    /// The numbers of the rules to remove.
    pub remove: Vec<u64>,
    /// Accept rules that match SSH or the API.
    pub force: bool,
}

impl StandingRules {
    /// Starts without rules. `seed` is the random seed, `api_port` the port of the API. The rules' thread keeps the
    /// capabilities of the calling thread.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn new(seed: u64, api_port: Option<u16>) -> anyhow::Result<Self> {
        let (hand, works) = mpsc::channel::<Work>();
        // The thread ends when the sender is dropped.
        std::thread::Builder::new()
            .name("rules".to_owned())
            .spawn(move || {
                if let Err(error) = SigSet::all().thread_block() {
                    log::warn!("signals may be lost: {error}");
                }
                for work in works {
                    work();
                }
            })?;
        Ok(Self {
            seed,
            api_port,
            now: Mutex::default(),
            hand,
        })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of all rules.
    ///
    /// # Errors
    /// The kernel's counters can't be read.
    pub fn list(&self) -> Result<Vec<RuleStatus>, RulesError> {
        self.now().list()
    }

    /// Changes the rules atomically. Returns the numbers of the new ones.
    ///
    /// # Errors
    /// A rule is unsupported, privileges are missing, or a system call fails.
    pub fn change(&self, change: &RulesChange) -> Result<Vec<u64>, RulesError> {
        let mut now = self.now();
        let added: Vec<_> = change
            .add
            .iter()
            .map(|new| (new.rule.clone(), new.resolved.clone()))
            .collect();
        if !added.is_empty() {
            let bad = |error: anyhow::Error| RulesError::Bad(format!("{error:#}"));
            if !change.force {
                guard_host(&added, self.api_port).map_err(bad)?;
            }
            if now.applied.is_none() {
                preflight(&[Need::Programs]).map_err(|unmet| {
                    let why = format!("packet rules need root: {}", unmet.lines().join("; "));
                    RulesError::Forbidden(why)
                })?;
            }
        }
        let mut entries = now.entries.clone();
        entries.retain(|entry| !change.remove.contains(&entry.id));
        let mut ids = Vec::new();
        for (rule, resolved) in added {
            let resolved = resolved
                .sampled(&rule, self.seed)
                .map_err(|error| RulesError::Bad(error.one_line()))?;
            now.next_id += 1;
            ids.push(now.next_id);
            entries.push(Entry {
                id: now.next_id,
                rule,
                resolved,
                past: Hits::default(),
                toxic: change.toxic.clone(),
            });
        }
        now.apply(entries, self.seed)?;
        Ok(ids)
    }

    /// Removes rules.
    ///
    /// # Errors
    /// A system call fails.
    pub fn remove(&self, ids: Vec<u64>) -> Result<(), RulesError> {
        let change = RulesChange {
            add: Vec::new(),
            toxic: None,
            remove: ids,
            force: false,
        };
        self.change(&change).map(|_none| ())
    }

    /// Removes all rules.
    ///
    /// # Errors
    /// Something can't be restored.
    pub fn clear(&self) -> Result<(), RulesError> {
        self.now().apply(Vec::new(), self.seed)
    }

    /// Whether there are no rules.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.now().entries.is_empty()
    }

    /// The number, text and hits of each rule.
    ///
    /// # Errors
    /// The kernel's counters can't be read.
    pub fn hits(&self) -> Result<Vec<(u64, String, Hits)>, RulesError> {
        let now = self.now();
        let hits = now.hits()?;
        let entries = now.entries.iter().zip(hits);
        Ok(entries
            .map(|(entry, hits)| (entry.id, entry.rule.to_string(), hits))
            .collect())
    }
}

impl Now {
    fn hits(&self) -> Result<Vec<Hits>, RulesError> {
        let mut all = match &self.applied {
            Some(applied) => applied.injection.hits(&applied.plan)?,
            None => Vec::new(),
        };
        for (hits, entry) in all.iter_mut().zip(&self.entries) {
            hits.add(&entry.past);
        }
        Ok(all)
    }

    fn list(&self) -> Result<Vec<RuleStatus>, RulesError> {
        let Some(applied) = &self.applied else {
            return Ok(Vec::new());
        };
        let hooks = applied.injection.hooks().to_string();
        let rules = self
            .entries
            .iter()
            .zip(self.hits()?)
            .zip(&applied.plan.rules);
        let shown = rules.map(|((entry, hits), planned)| RuleStatus {
            id: entry.id,
            rule: entry.rule.to_string(),
            mechanism: planned.mechanism(Some(hooks.clone())),
            seen: hits.stats.seen_packets,
            hits: hits.stats.hit_packets,
            connections: hits.connections,
            toxic: entry.toxic.clone(),
        });
        Ok(shown.collect())
    }

    /// Replaces the applied rules with these.
    fn apply(&mut self, mut entries: Vec<Entry>, seed: u64) -> Result<(), RulesError> {
        if entries.is_empty() {
            self.entries = entries;
            return match self.applied.take() {
                Some(applied) => applied.injection.remove().map_err(RulesError::from),
                None => Ok(()),
            };
        }
        let plan = plan(&entries, seed)?;
        let Some(mut applied) = self.applied.take() else {
            self.applied = Some(begin(plan)?);
            self.entries = entries;
            return Ok(());
        };
        let exchanged = if must_begin_anew(&applied, &plan)? {
            None
        } else {
            let mut next = plan.clone();
            let exchanged = applied.injection.replace(&applied.plan, &mut next);
            // If they do not fit, the programs are reloaded with larger maps.
            exchanged.is_ok().then_some(next)
        };
        if let Some(plan) = exchanged {
            applied.plan = plan;
            self.applied = Some(applied);
        } else {
            let hits = applied.injection.hits(&applied.plan)?;
            for (old, hits) in self.entries.iter().zip(hits) {
                if let Some(entry) = entries.iter_mut().find(|entry| entry.id == old.id) {
                    entry.past.add(&hits);
                }
            }
            self.begin_anew(applied, plan)?;
        }
        self.entries = entries;
        Ok(())
    }

    /// Reloads the programs; the rules' time continues. On failure the old rules are restored; if that fails too, no
    /// rules remain.
    fn begin_anew(&mut self, mut old: Applied, mut plan: Plan) -> Result<(), RulesError> {
        old.injection.follow(&old.plan, &mut plan)?;
        // Resources outside the process exist only once.
        old.injection.settle()?;
        let started =
            |plan: &Plan| prepare(plan, &everywhere()?, &live())?.start_after(&old.injection);
        let error = match started(&plan) {
            Ok(injection) => {
                self.applied = Some(Applied::new(injection, plan));
                return Ok(());
            }
            Err(error) => error,
        };
        match started(&old.plan) {
            Ok(injection) => self.applied = Some(Applied::new(injection, old.plan)),
            Err(again) => {
                log::error!("the old rules could not be restored: {again:#}");
                self.entries.clear();
            }
        }
        Err(error.into())
    }
}

fn plan(entries: &[Entry], seed: u64) -> Result<Plan, RulesError> {
    let refused = |error: anyhow::Error| RulesError::Bad(format!("{error:#}"));
    let mut rules: Vec<_> = entries
        .iter()
        .map(|entry| (entry.rule.clone(), entry.resolved.clone()))
        .collect();
    let mechanism = choose(None, &mut rules, &ThisMachine).map_err(refused)?;
    let mut plan = Plan::new(&rules, seed, None, None).map_err(refused)?;
    plan.hold_by(mechanism);
    plan.leave_tcp();
    if let Some((index, _)) = plan.stream_rules().first() {
        let text = &plan.rules[*index].text;
        return Err(refused(anyhow::anyhow!(
            "no mechanism on this machine can hold the packets of `{text}`: run `fault doctor` to see what is missing"
        )));
    }
    Ok(plan)
}

fn begin(plan: Plan) -> Result<Applied, RulesError> {
    let begun = || prepare(&plan, &everywhere()?, &live())?.start();
    let injection = begun()?;
    Ok(Applied::new(injection, plan))
}

fn everywhere() -> anyhow::Result<Vec<Interface>> {
    interfaces::select(&interfaces::list()?, &Selection::Default)
}

fn live() -> InjectionOptions {
    InjectionOptions {
        live: true,
        later_interfaces: Some(Selection::Default),
        ..InjectionOptions::default()
    }
}

/// What holds packets, and what divides super-packets, is set up together with the programs.
fn must_begin_anew(applied: &Applied, plan: &Plan) -> Result<bool, RulesError> {
    Ok(plan.divides() && !applied.divides
        || plan.held_by != applied.plan.held_by
        || plan.qdiscs()? != applied.plan.qdiscs()?
        || plan.needs_delay_line() && applied.injection.delay_line().is_none())
}

/// Runs slow or privileged work on the rules' thread.
///
/// # Errors
/// The thread has ended; otherwise as `work`.
pub async fn off_the_runtime<T, E>(
    rules: &Arc<StandingRules>,
    work: impl FnOnce(&StandingRules) -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<anyhow::Error> + Send + 'static,
{
    let (done, result) = oneshot::channel();
    let own = Arc::clone(rules);
    let whole = move || {
        // The caller may have been cancelled.
        drop(done.send(work(&own)));
    };
    let gone = "the daemon's thread for packet rules has ended: restart the daemon";
    rules
        .hand
        .send(Box::new(whole))
        .map_err(|_| anyhow!(gone))?;
    result.await.map_err(|_| anyhow!(gone))?
}
