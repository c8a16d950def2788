//! `/v1/rules`: packet rules of the daemon, exchanged while traffic flows. The programs are there while there are rules,
//! and only then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::anyhow;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use nix::sys::signal::SigSet;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval};

use super::body::{self, collect};
use super::error::ApiError;
use super::events::Events;
use super::proxies::Proxies;
use super::security::Caller;
use crate::doctor::Report;
use crate::inject::injection::{Hits, Injection, Wishes};
use crate::inject::preparation::prepare;
use crate::plan::mechanism::choose;
use crate::plan::{Plan, guard_host};
use crate::rule::{Layer, ResolvedRule, Rule, SystemResolver, Targets};
use crate::session::machine::ThisMachine;
use crate::sys::net::interfaces;
use crate::sys::net::interfaces::{Interface, Selection};
use crate::sys::preflight::{Need, preflight};

/// How often watchers are told what rules have done.
const TELL: Duration = Duration::from_millis(200);

type Api = State<Arc<Proxies>>;
type By = Extension<Caller>;
type Answer = Result<Response, ApiError>;

/// What callers may not have who are told so.
pub(super) const PACKET_RULES: &str = "packet rules";

/// A rule and what it is called.
#[derive(Clone, Debug)]
struct Entry {
    id: u64,
    rule: Rule,
    resolved: ResolvedRule,
    /// What it did before the programs were loaded anew.
    past: Hits,
    /// The toxic that it stands for.
    toxic: Option<String>,
}

/// A rule that is to be added.
#[derive(Clone, Debug)]
pub struct Wanted {
    rule: Rule,
    resolved: ResolvedRule,
}

impl Wanted {
    /// Reads a rule, as a text or as an object, and looks its names up.
    ///
    /// # Errors
    /// 400.
    pub fn read(value: Value) -> Result<Self, ApiError> {
        let bad = |why: String| ApiError::new(StatusCode::BAD_REQUEST, why);
        let rule: Rule =
            serde_json::from_value(text_of(value)).map_err(|error| bad(error.to_string()))?;
        if rule.fault.layer() == Layer::Stream {
            return Err(bad(format!(
                "`{rule}` is about a stream: add a proxy whose listen is its upstream, and the toxic to that"
            )));
        }
        let resolved = rule
            .resolve(&Targets::new(), &mut SystemResolver)
            .map_err(|error| bad(error.one_line()))?;
        Ok(Self { rule, resolved })
    }

    /// The rule as it is printed.
    #[must_use]
    pub fn text(&self) -> String {
        self.rule.to_string()
    }
}

/// The text of a rule in the form in which it is listed; anything else as it is.
fn text_of(value: Value) -> Value {
    let listed = value.get("rule").filter(|rule| rule.is_string());
    listed.cloned().unwrap_or(value)
}

/// Rules in the kernel.
struct Force {
    injection: Injection,
    plan: Plan,
}

#[derive(Default)]
struct Now {
    next_id: u64,
    entries: Vec<Entry>,
    force: Option<Force>,
}

type Work = Box<dyn FnOnce() + Send>;

/// The packet rules of a daemon.
pub struct Rules {
    seed: u64,
    /// Where the API itself listens, which rules are not to cut without force.
    api_port: Option<u16>,
    now: Mutex<Now>,
    /// To the thread that puts them in force. It keeps the rights for that, when those that read what comes from the
    /// network have given up theirs.
    hand: mpsc::Sender<Work>,
}

/// What becomes of the rules.
#[derive(Clone, Debug)]
pub struct Change {
    /// These are added at the end, for a toxic or for none.
    pub add: Vec<Wanted>,
    /// The toxic that they stand for.
    pub toxic: Option<String>,
    /// These go.
    pub remove: Vec<u64>,
    /// Rules that cut SSH or the API are meant so.
    pub force: bool,
}

impl Rules {
    /// None yet; `seed` decides what they draw, `api_port` is where the API listens. What the calling thread may do now they may do later.
    ///
    /// # Errors
    /// There can't be a thread for them.
    pub fn new(seed: u64, api_port: Option<u16>) -> anyhow::Result<Self> {
        let (hand, works) = mpsc::channel::<Work>();
        // It ends with the sender.
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

    /// All, as the API shows them.
    ///
    /// # Errors
    /// 500 when the kernel can't be asked.
    pub fn list(&self) -> Result<Vec<Value>, ApiError> {
        self.now().list()
    }

    /// Changes the rules, all at once or not at all; the numbers of the new ones.
    ///
    /// # Errors
    /// 400 for a rule that is refused, 403 without the rights, 500 when the kernel refuses.
    pub fn change(&self, change: &Change) -> Result<Vec<u64>, ApiError> {
        let mut now = self.now();
        let added: Vec<_> = change
            .add
            .iter()
            .map(|wanted| (wanted.rule.clone(), wanted.resolved.clone()))
            .collect();
        if !added.is_empty() {
            let bad =
                |error: anyhow::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("{error:#}"));
            if !change.force {
                guard_host(&added, self.api_port).map_err(bad)?;
            }
            if now.force.is_none() {
                preflight(&[Need::Programs]).map_err(|unmet| {
                    let why = format!("packet rules need root: {}", unmet.lines().join("; "));
                    ApiError::new(StatusCode::FORBIDDEN, why)
                })?;
            }
        }
        let mut entries = now.entries.clone();
        entries.retain(|entry| !change.remove.contains(&entry.id));
        let mut ids = Vec::new();
        for (rule, resolved) in added {
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
        now.put_in_force(entries, self.seed)?;
        Ok(ids)
    }

    /// Takes rules away.
    ///
    /// # Errors
    /// 500 when the kernel refuses.
    pub fn remove(&self, ids: Vec<u64>) -> Result<(), ApiError> {
        let change = Change {
            add: Vec::new(),
            toxic: None,
            remove: ids,
            force: false,
        };
        self.change(&change).map(|_none| ())
    }

    /// Takes all rules away.
    ///
    /// # Errors
    /// 500 when something can't be taken back.
    pub fn clear(&self) -> Result<(), ApiError> {
        self.now().put_in_force(Vec::new(), self.seed)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.now().entries.is_empty()
    }

    /// The number of each rule and how many packets it hit.
    fn hits(&self) -> Result<Vec<(u64, String, Hits)>, ApiError> {
        let now = self.now();
        let hits = now.hits()?;
        let entries = now.entries.iter().zip(hits);
        Ok(entries
            .map(|(entry, hits)| (entry.id, entry.rule.to_string(), hits))
            .collect())
    }

    /// Tells watchers what rules have done, for ever.
    pub async fn tell(self: Arc<Self>, events: Events) {
        let mut told: HashMap<u64, u64> = HashMap::new();
        let mut ticks = interval(TELL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let hits = match off_the_runtime(&self, Rules::hits).await {
                Ok(hits) => hits,
                Err(error) => {
                    log::debug!("{error}");
                    continue;
                }
            };
            told.retain(|id, _| hits.iter().any(|(there, ..)| there == id));
            for (id, rule, hits) in hits {
                let (packets, before) = (hits.stats.hit_packets, told.entry(id).or_default());
                if packets > *before {
                    let about = json!({"id": id, "rule": rule, "hits": packets - *before, "total": packets});
                    events.tell("rule hit", "", &about);
                    *before = packets;
                }
            }
        }
    }
}

impl Now {
    fn hits(&self) -> Result<Vec<Hits>, ApiError> {
        let mut all = match &self.force {
            Some(force) => force.injection.hits(&force.plan)?,
            None => Vec::new(),
        };
        for (hits, entry) in all.iter_mut().zip(&self.entries) {
            hits.add(&entry.past);
        }
        Ok(all)
    }

    fn list(&self) -> Result<Vec<Value>, ApiError> {
        let Some(force) = &self.force else {
            return Ok(Vec::new());
        };
        let hooks = force.injection.hooks();
        let rules = self.entries.iter().zip(self.hits()?).zip(&force.plan.rules);
        let shown = rules.map(|((entry, hits), planned)| {
            let mut shown = json!({
                "id": entry.id,
                "rule": entry.rule.to_string(),
                "mechanism": planned.mechanism(Some(hooks.to_string())),
                "seen": hits.stats.seen_packets,
                "hits": hits.stats.hit_packets,
                "connections": hits.connections,
            });
            if let Some(toxic) = &entry.toxic {
                shown["toxic"] = json!(toxic);
            }
            shown
        });
        Ok(shown.collect())
    }

    /// Puts these rules in force instead of those that are.
    fn put_in_force(&mut self, mut entries: Vec<Entry>, seed: u64) -> Result<(), ApiError> {
        if entries.is_empty() {
            self.entries = entries;
            return match self.force.take() {
                Some(force) => force.injection.heal().map_err(ApiError::from),
                None => Ok(()),
            };
        }
        let plan = plan(&entries, seed)?;
        let Some(mut force) = self.force.take() else {
            self.force = Some(begin(plan)?);
            self.entries = entries;
            return Ok(());
        };
        let exchanged = if must_begin_anew(&force, &plan)? {
            None
        } else {
            let mut next = plan.clone();
            let exchanged = force.injection.replace(&force.plan, &mut next);
            // Without room for more they begin anew, with more room.
            exchanged.is_ok().then_some(next)
        };
        if let Some(plan) = exchanged {
            force.plan = plan;
            self.force = Some(force);
        } else {
            let hits = force.injection.hits(&force.plan)?;
            for (old, hits) in self.entries.iter().zip(hits) {
                if let Some(entry) = entries.iter_mut().find(|entry| entry.id == old.id) {
                    entry.past.add(&hits);
                }
            }
            self.begin_anew(force, plan)?;
        }
        self.entries = entries;
        Ok(())
    }

    /// Loads the programs anew, for the rules' time as it was. When that fails the old rules come back; if they don't,
    /// there are none.
    fn begin_anew(&mut self, mut old: Force, mut plan: Plan) -> Result<(), ApiError> {
        old.injection.follow(&old.plan, &mut plan)?;
        // What lies outside the process is there once.
        old.injection.settle()?;
        let started =
            |plan: &Plan| prepare(plan, &everywhere()?, &live())?.start_after(&old.injection);
        let error = match started(&plan) {
            Ok(injection) => {
                self.force = Some(Force { injection, plan });
                return Ok(());
            }
            Err(error) => error,
        };
        match started(&old.plan) {
            Ok(injection) => {
                let plan = old.plan;
                self.force = Some(Force { injection, plan });
            }
            Err(again) => {
                log::error!("the old rules did not come back: {again:#}");
                self.entries.clear();
            }
        }
        Err(error.into())
    }
}

fn plan(entries: &[Entry], seed: u64) -> Result<Plan, ApiError> {
    let refused =
        |error: anyhow::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("{error:#}"));
    let mut rules: Vec<_> = entries
        .iter()
        .map(|entry| (entry.rule.clone(), entry.resolved.clone()))
        .collect();
    let mechanism = choose(None, &mut rules, &ThisMachine).map_err(refused)?;
    let mut plan = Plan::new(&rules, seed, None, None).map_err(refused)?;
    plan.hold_by(mechanism);
    if let Some((index, _)) = plan.stream_rules().first() {
        let text = &plan.rules[*index].text;
        return Err(refused(anyhow::anyhow!(
            "nothing here can hold the packets of `{text}`: `fault doctor` tells what is missing"
        )));
    }
    Ok(plan)
}

fn begin(plan: Plan) -> Result<Force, ApiError> {
    let begun = || prepare(&plan, &everywhere()?, &live())?.start();
    let injection = begun()?;
    Ok(Force { injection, plan })
}

fn everywhere() -> anyhow::Result<Vec<Interface>> {
    interfaces::select(&interfaces::list()?, &Selection::Default)
}

fn live() -> Wishes {
    Wishes {
        live: true,
        newcomers: Some(Selection::Default),
        ..Wishes::default()
    }
}

/// What holds packets is set up with the programs.
fn must_begin_anew(force: &Force, plan: &Plan) -> Result<bool, ApiError> {
    Ok(plan.held_by != force.plan.held_by
        || plan.qdiscs()? != force.plan.qdiscs()?
        || plan.needs_delay_line() && force.injection.delay_line().is_none())
}

/// Does what may take long, and what needs rights, on the thread that has them.
pub(crate) async fn off_the_runtime<T: Send + 'static>(
    rules: &Arc<Rules>,
    work: impl FnOnce(&Rules) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let (done, result) = oneshot::channel();
    let own = Arc::clone(rules);
    let whole = move || {
        // Whoever asked may have gone away meanwhile.
        drop(done.send(work(&own)));
    };
    let gone = "the thread of the packet rules has ended: restart the daemon";
    rules
        .hand
        .send(Box::new(whole))
        .map_err(|_| anyhow!(gone))?;
    result.await.map_err(|_| anyhow!(gone))?
}

pub(crate) fn routes() -> Router<Arc<Proxies>> {
    Router::new()
        .route("/v1/rules", get(index).post(add).delete(clear))
        .route("/v1/rules/{id}", get(show).delete(remove))
        .route("/v1/doctor", get(doctor))
}

async fn index(State(proxies): Api) -> Answer {
    let rules = off_the_runtime(proxies.rules(), Rules::list).await?;
    Ok(Json(rules).into_response())
}

#[derive(Deserialize)]
struct Options {
    /// Rules that cut SSH or the API are meant so.
    #[serde(default)]
    force: bool,
}

/// Adds one rule, or all of an array: a text or an object each.
async fn add(
    State(proxies): Api,
    Extension(caller): By,
    Query(options): Query<Options>,
    body: Body,
) -> Answer {
    caller.require(PACKET_RULES)?;
    let value = body::value(&collect(body).await?)?;
    let (many, values) = match value {
        Value::Array(values) => (true, values),
        one => (false, vec![one]),
    };
    let mut added = off_the_runtime(proxies.rules(), move |rules| {
        let add = values
            .into_iter()
            .map(Wanted::read)
            .collect::<Result<_, _>>()?;
        let ids = rules.change(&Change {
            add,
            toxic: None,
            remove: Vec::new(),
            force: options.force,
        })?;
        let mut all = rules.list()?;
        all.retain(|rule| ids.iter().any(|id| rule["id"] == *id));
        Ok(all)
    })
    .await?;
    for rule in &added {
        proxies.events().tell("rule added", "", rule);
    }
    let answer = match added.pop() {
        Some(one) if !many => one,
        last => {
            added.extend(last);
            Value::Array(added)
        }
    };
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// The rule with this number.
async fn find(proxies: &Proxies, id: &str) -> Result<(u64, Value), ApiError> {
    let rules = off_the_runtime(proxies.rules(), Rules::list).await?;
    let number = id.parse::<u64>().ok();
    let found = number.and_then(|id| {
        let rule = rules.into_iter().find(|rule| rule["id"] == id)?;
        Some((id, rule))
    });
    found.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "rule not found"))
}

async fn show(State(proxies): Api, Path(id): Path<String>) -> Answer {
    Ok(Json(find(&proxies, &id).await?.1).into_response())
}

async fn remove(State(proxies): Api, Extension(caller): By, Path(id): Path<String>) -> Answer {
    caller.require(PACKET_RULES)?;
    let (id, rule) = find(&proxies, &id).await?;
    if let Some(toxic) = rule["toxic"].as_str() {
        let why = format!("the rule belongs to a toxic ({toxic}): remove that");
        return Err(ApiError::new(StatusCode::CONFLICT, why));
    }
    take_away(&proxies, vec![id]).await
}

async fn clear(State(proxies): Api, Extension(caller): By) -> Answer {
    caller.require(PACKET_RULES)?;
    let rules = off_the_runtime(proxies.rules(), Rules::list).await?;
    let own = rules.iter().filter(|rule| rule["toxic"].is_null());
    take_away(
        &proxies,
        own.filter_map(|rule| rule["id"].as_u64()).collect(),
    )
    .await
}

async fn take_away(proxies: &Proxies, ids: Vec<u64>) -> Answer {
    let gone = ids.clone();
    off_the_runtime(proxies.rules(), |rules| rules.remove(ids)).await?;
    for id in gone {
        proxies
            .events()
            .tell("rule removed", "", &json!({"id": id}));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// What this machine can do, as `fault doctor --json` tells it.
async fn doctor(State(proxies): Api) -> Answer {
    let report = off_the_runtime(proxies.rules(), |_rules| Ok(Report::gather()?)).await?;
    Ok(Json(json!(report)).into_response())
}
