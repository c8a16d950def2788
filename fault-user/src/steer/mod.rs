//! Stream faults on an unchanged service: the connections of a cgroup are led to a relay on this host, which brings
//! them to where they were meant to go.
//!
//! The relay's listeners are on loopback. While no rule of a target is in its window its connections go straight.

pub mod front;
mod handshakes;
mod hooks;
mod originals;
pub mod reconnect;
mod relays;
mod served;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinHandle;

use crate::inject::injection::Hits;
use crate::inject::injector::Marker;
use crate::inject::services::{Service, relay_mark};
use crate::plan::stream::{self, check};
use crate::relay::exchange::Exchange;
use crate::relay::fault::Probability;
use crate::relay::{
    Cut, Direction as Way, Drain, Engine, Fault as Relayed, Relay, ToxicConfig, Transport,
};
use crate::rule::{Acts, Direction, Fault, ResolvedRule, ResolvedTarget};
use crate::sys::net::netlink::Netlink;
use crate::sys::process::netns::NetworkNamespace;
use crate::tell::tell;
use handshakes::Events;
use hooks::{Hooks, HookScope};
use originals::Originals;
pub(crate) use relays::prepare;
use relays::{RelayListeners, Maker, backlog};

/// Two are enough for what one command opens.
const WORKERS: usize = 2;

/// What connections are given at the end beside the rules' own delays: bytes that a rate lets pass, peers
/// that read slowly.
const SPARE: Duration = Duration::from_secs(10);
/// The same for connections whose peers still talk.
const TALK: Duration = Duration::from_millis(500);
/// What a rule's end is given to reach connections that wait for it.
const CHANGE: Duration = Duration::from_secs(1);
/// When the user is told that the end takes a while.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// What one stream rule did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamHits {
    /// Connections that came through the relay while it was in force.
    pub seen: u64,
    /// Those that it was put on.
    pub connections: u64,
    /// Chunks, ends and requests that it did something to.
    pub hits: u64,
}

/// A rule, and which target it is for.
struct StreamRule {
    /// Its place among all rules.
    index: usize,
    target: usize,
    rule: ResolvedRule,
}

/// A target with its relays: one for each version of IP, and one for datagrams.
struct RedirectedTarget {
    /// Its name or text.
    name: String,
    target: ResolvedTarget,
    relays: Vec<Arc<Relay>>,
    /// Where they listen, to look at who waits.
    listeners: Vec<std::net::TcpListener>,
}

struct Shared {
    /// The cgroup whose connections are led; nothing for every process here.
    scope: Option<PathBuf>,
    /// Knows the sockets of the network namespace, if any are to be reset.
    diagnosis: Option<Mutex<Netlink>>,
    /// Where connections to other hosts are to be reset.
    peers: reconnect::Peers,
    hooks: Mutex<Hooks>,
    redirected: Vec<RedirectedTarget>,
    rules: Vec<StreamRule>,
    /// How many rules of each target are in their windows.
    active: Mutex<Vec<u32>>,
    /// What each rule did in windows that are over.
    past: Mutex<Vec<StreamHits>>,
    /// How many connections there had been when the window opened that is open now.
    before: Mutex<Vec<Option<u64>>>,
    /// Which rules act.
    turns: tokio::sync::Mutex<Vec<RuleSwitch>>,
    /// Nothing is redirected any more, whatever windows open.
    is_over: AtomicBool,
}

/// A rule acts while its window is open and nobody has switched it off.
#[derive(Clone, Copy, Default)]
struct RuleSwitch {
    in_window: bool,
    is_off: bool,
}

impl RuleSwitch {
    const fn acts(self) -> bool {
        self.in_window && !self.is_off
    }
}

/// What a target's connections carry by way of the relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes, both ways.
    pub bytes: u64,
    /// Connections that are open.
    pub open: u64,
}

/// Connections led to relays with the faults of some rules; dropping it lets new ones go straight and closes those that
/// are led.
pub struct Steering {
    shared: Arc<Shared>,
    timelines: Vec<JoinHandle<()>>,
    started: Instant,
    _engine: Arc<Engine>,
}

/// Whose connections and datagrams are led.
pub struct SteeringScope<'a> {
    /// Those of processes in this cgroup.
    pub cgroup: &'a Path,
    /// It is the root.
    pub all_cgroups: bool,
    /// In this network namespace, if it is not the caller's: the relay works in there.
    pub namespace: Option<&'a NetworkNamespace>,
    /// Applied to the sockets that the relay opens, where nobody else's are led: so they belong to the command for packet
    /// rules. What clients from outside open is led too: to the cgroup's servers, or without this to all.
    pub marker: Option<Marker>,
    /// Where the packets of datagrams come from; there is none without rules on UDP.
    pub exchange: Option<Arc<Exchange>>,
}

/// Rules with their targets, each of which is there once.
fn by_target(rules: &[(usize, &ResolvedRule)]) -> Result<(Vec<ResolvedTarget>, Vec<StreamRule>)> {
    let mut targets: Vec<ResolvedTarget> = Vec::new();
    let mut stream_rules = Vec::new();
    for &(index, rule) in rules {
        check(rule)?;
        let known = targets.iter().position(|target| *target == rule.target);
        let target = known.unwrap_or_else(|| {
            targets.push(rule.target.clone());
            targets.len() - 1
        });
        stream_rules.push(StreamRule {
            index,
            target,
            rule: rule.clone(),
        });
    }
    Ok((targets, stream_rules))
}

/// What is opened inside the network namespace.
struct Opened {
    ends: Vec<RelayListeners>,
    hooks: Hooks,
    originals: Originals,
    events: Events,
    diagnosis: Option<Mutex<Netlink>>,
    peers: reconnect::Peers,
}

impl Opened {
    fn new(
        cgroup: &Path,
        reach: HookScope,
        targets: &[ResolvedTarget],
        rules: &[StreamRule],
    ) -> Result<Self> {
        let ends = (0..targets.len())
            .map(|target| RelayListeners::open(has(Transport::Tcp, target, rules).is_some()))
            .collect::<Result<Vec<_>>>()?;
        let services: Vec<Service> = ends
            .iter()
            .zip(targets)
            .map(|(ends, target)| ends.service(target))
            .collect::<std::io::Result<_>>()?;
        let (hooks, originals, events) = Hooks::attach(cgroup, reach, &services)?;
        if !reach.all_servers {
            for listener in reconnect::listeners(cgroup)? {
                hooks.served().add(listener)?;
            }
        }
        let (diagnosis, peers) = if rules.iter().any(|rule| rule.rule.modifiers.reconnect) {
            let diagnosis = Mutex::new(Netlink::sock_diag()?);
            (Some(diagnosis), reconnect::Peers::open())
        } else {
            (None, reconnect::Peers::default())
        };
        Ok(Self {
            ends,
            hooks,
            originals,
            events,
            diagnosis,
            peers,
        })
    }
}

impl Steering {
    /// Leads connections and datagrams to relays with the faults of `rules` (each with its place among all rules). Rules
    /// that begin at once are in force on return.
    ///
    /// # Errors
    /// A rule that can't be carried out, or the kernel refuses.
    pub async fn start(
        rules: &[(usize, &ResolvedRule)],
        seed: u64,
        whose: SteeringScope<'_>,
    ) -> Result<Self> {
        let (targets, rules) = by_target(rules)?;
        let engine = Engine::start_in(WORKERS, whose.namespace).context("starting the relay")?;
        let all_servers = whose.marker.is_none();
        let reach = HookScope {
            all_cgroups: whose.all_cgroups,
            all_servers,
        };
        let open = || Opened::new(whose.cgroup, reach, &targets, &rules);
        let Opened {
            mut ends,
            mut hooks,
            originals,
            events,
            diagnosis,
            peers,
        } = match whose.namespace {
            Some(namespace) => namespace.enter(open)?,
            None => open()?,
        };
        events.follow(&engine);
        let handshakes = hooks.handshakes().clone();
        let maker = Maker {
            engine: &engine,
            seed,
            originals: &originals,
            handshakes: &handshakes,
            prepare: prepare(relay_mark(), whose.marker, Some(hooks.served().clone())),
            exchange: whose.exchange.as_ref(),
        };
        let mut redirected = Vec::with_capacity(targets.len());
        for (number, (target, ends)) in targets.into_iter().zip(&mut ends).enumerate() {
            let named = rules.iter().find(|rule| rule.target == number);
            let title = named.map_or("", |rule| &rule.rule.name);
            let packets = has(Transport::Udp, number, &rules);
            let relays = ends.relays(&maker, (number, title), packets)?;
            let target = RedirectedTarget::start(number, target, &rules, ends, relays).await?;
            target.show(u32::try_from(number)?, &mut hooks)?;
            redirected.push(target);
        }
        let shared = Arc::new(Shared {
            scope: (!all_servers).then(|| whose.cgroup.to_owned()),
            diagnosis,
            peers,
            hooks: Mutex::new(hooks),
            active: Mutex::new(vec![0; redirected.len()]),
            past: Mutex::new(vec![StreamHits::default(); rules.len()]),
            before: Mutex::new(vec![None; rules.len()]),
            turns: tokio::sync::Mutex::new(vec![RuleSwitch::default(); rules.len()]),
            is_over: AtomicBool::new(false),
            redirected,
            rules,
        });
        let mut timelines = Vec::new();
        for rule in 0..shared.rules.len() {
            timelines.push(begin(&shared, rule).await?);
        }
        Ok(Self {
            shared,
            timelines,
            started: Instant::now(),
            _engine: engine,
        })
    }

    /// Redirects nothing any more, and has what is on its way arrive as the rules have it, for `limit` at most;
    /// without it for what the rules themselves need and 10 s more. Connections of which something may be missing
    /// then are reset, all of them as soon as `hurry` is ready. What was lost.
    pub async fn finish(
        &self,
        limit: Option<Duration>,
        transit: Duration,
        hurry: impl Future<Output = ()>,
    ) -> Cut {
        self.shared.stop_redirecting();
        let all = Drain::within(limit.unwrap_or_else(|| self.delay() + SPARE));
        let drain = Drain {
            open_until: match limit {
                Some(_) => all.until,
                None => all.since + self.delay() + TALK,
            },
            change_until: self
                .change_by()
                .map_or(all.since, |change| (change + CHANGE).min(all.until)),
            transit,
            ..all
        };
        {
            // One and the same to the end: where it is given up, clients that wait for their servers are refused.
            let draining = self.shared.drain(drain);
            tokio::pin!(hurry, draining);
            tokio::select! {
                cut = &mut draining => return cut,
                () = &mut hurry => {}
                () = tokio::time::sleep(TOLD_AFTER) => {
                    let most = drain.until.saturating_duration_since(Instant::now()).as_secs() + 1;
                    tell!("fault: waiting for data on its way to arrive, {most} s at most (Ctrl-C resets its connections)");
                    tokio::select! {
                        cut = draining => return cut,
                        () = hurry => {}
                    }
                }
            }
        }
        let now = Instant::now();
        self.shared
            .drain(Drain {
                until: now,
                ..drain
            })
            .await
    }

    /// How long the rules hold what is on its way, one after the other.
    fn delay(&self) -> Duration {
        let rules = self.shared.rules.iter();
        rules
            .map(|rule| Duration::from_nanos(rule.rule.fault.held_ns()))
            .sum()
    }

    /// When the last window that is open now closes.
    fn change_by(&self) -> Option<Instant> {
        let elapsed_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let rules = self.shared.rules.iter();
        let ends = rules.filter_map(|rule| rule.rule.modifiers.schedule().closes_after(elapsed_ns));
        ends.max()
            .map(|end_ns| self.started + Duration::from_nanos(end_ns))
    }

    /// Whether sockets of others are reached for, to reset connections.
    #[must_use]
    pub fn reaches_for_sockets(&self) -> bool {
        self.shared.diagnosis.is_some()
    }

    /// What each rule did, by its place among all rules.
    #[must_use]
    pub fn hits(&self) -> Vec<(usize, StreamHits)> {
        let shared = &self.shared;
        shared
            .rules
            .iter()
            .enumerate()
            .map(|(number, rule)| (rule.index, shared.hits(number)))
            .collect()
    }
}

/// The place among all rules of the first one that has the target's relays carry this; nothing where none has.
fn has(transport: Transport, target: usize, rules: &[StreamRule]) -> Option<usize> {
    let mut own = rules.iter().filter(|rule| rule.target == target);
    own.find(|rule| stream::acts_on(&rule.rule, transport))
        .map(|rule| rule.index)
}

impl Drop for Steering {
    fn drop(&mut self) {
        for timeline in &self.timelines {
            timeline.abort();
        }
        self.shared.stop_redirecting();
        for redirected in &self.shared.redirected {
            for note in redirected.notes() {
                tell!("fault: {note}");
            }
        }
    }
}

/// Begins the timeline of a rule; what begins at once has begun on return.
async fn begin(shared: &Arc<Shared>, number: usize) -> Result<JoinHandle<()>> {
    let schedule = shared.rules[number].rule.modifiers.schedule();
    let first = schedule.start_ns == 0;
    if first {
        shared.set_window(number, true).await?;
    }
    let shared = Arc::clone(shared);
    let started = tokio::time::Instant::now();
    Ok(tokio::spawn(async move {
        let at = |ns: u64| started + Duration::from_nanos(ns);
        let mut start_ns = schedule.start_ns;
        let mut is_open = first;
        loop {
            tokio::time::sleep_until(at(start_ns)).await;
            if !is_open && let Err(error) = shared.set_window(number, true).await {
                tell!("fault: a rule can't begin: {error:#}");
                return;
            }
            is_open = false;
            let end_ns = schedule.on_ns.map(|length| start_ns + length);
            let end_ns = match (end_ns, schedule.end_ns) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            let Some(end_ns) = end_ns else {
                return;
            };
            tokio::time::sleep_until(at(end_ns)).await;
            if let Err(error) = shared.set_window(number, false).await {
                tell!("fault: a rule can't end: {error:#}");
            }
            match schedule.period_ns {
                Some(period) if schedule.end_ns.is_none_or(|end| start_ns + period < end) => {
                    start_ns += period;
                }
                _ => return,
            }
        }
    }))
}

impl RedirectedTarget {
    /// Has the relays of target `number` listen.
    async fn start(
        number: usize,
        target: ResolvedTarget,
        rules: &[StreamRule],
        ends: &mut RelayListeners,
        relays: Vec<Arc<Relay>>,
    ) -> Result<Self> {
        for relay in &relays {
            let started = relay.set_enabled(true).await;
            started.context("starting the relay")?;
        }
        let named = rules.iter().find(|rule| rule.target == number);
        Ok(Self {
            name: named.map_or_else(String::new, |rule| rule.rule.name.clone()),
            target,
            relays,
            listeners: std::mem::take(&mut ends.streams)
                .into_iter()
                .flatten()
                .collect(),
        })
    }

    /// Tells the hooks where it listens.
    fn show(&self, index: u32, hooks: &mut Hooks) -> Result<()> {
        let mut listeners = self.listeners.iter();
        listeners.try_for_each(|listener| hooks.listen(index, listener))
    }

    /// What else is worth a line when all is over.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let name = &self.name;
        let mut failures = BTreeMap::new();
        for (reason, count) in self.relays.iter().flat_map(|relay| relay.stats().failures) {
            *failures.entry(reason).or_insert(0) += count;
        }
        for (reason, count) in failures {
            notes.push(format!("{count} connections to {name} failed: {reason}"));
        }
        notes
    }
}

impl Shared {
    /// The toxics of a rule: one, or one for each direction that draw as one; none on a relay of a transport on which its
    /// fault has no meaning.
    fn toxics(&self, number: usize, transport: Transport) -> Result<Vec<ToxicConfig>> {
        let rule = &self.rules[number].rule;
        if !stream::acts_on(rule, transport) {
            return Ok(Vec::new());
        }
        let ways: &[Way] = match rule.modifiers.direction {
            Direction::ToServer => &[Way::Upstream],
            Direction::Both if rule.fault.part_that(Acts::OneWay).is_some() => &Way::ALL,
            Direction::ToClient | Direction::Both => &[Way::Downstream],
        };
        let config = |way: &Way| {
            Ok(ToxicConfig {
                name: format!("{number}@{}", way.name()),
                direction: *way,
                stream: way.name().to_owned(),
                toxicity: Probability::of_ppm(rule.modifiers.probability).0,
                connections: stream::connections(&rule.modifiers, transport),
                datagrams: stream::datagrams(&rule.modifiers, transport),
                fault: if ways.len() == 2 && *way == Way::Upstream {
                    Relayed::one_way_part(&rule.fault)?
                } else {
                    Relayed::of_rule(&rule.fault)?
                },
            })
        };
        ways.iter().map(config).collect()
    }

    /// Opens the window of a rule, or closes it.
    async fn set_window(&self, number: usize, is_open: bool) -> Result<()> {
        self.turn(number, |turn| turn.in_window = is_open).await
    }

    /// Changes what decides whether a rule acts, and has it do so.
    async fn turn(&self, number: usize, change: impl FnOnce(&mut RuleSwitch)) -> Result<()> {
        let mut turns = self.turns.lock().await;
        let mut turn = turns[number];
        change(&mut turn);
        match (turns[number].acts(), turn.acts()) {
            (false, true) => self.begin_to_act(number).await?,
            (true, false) => self.stop_acting(number).await,
            _ => {}
        }
        turns[number] = turn;
        Ok(())
    }

    /// Puts a rule in force.
    async fn begin_to_act(&self, number: usize) -> Result<()> {
        let target = self.rules[number].target;
        let accepted = self.accepted(target);
        for relay in &self.redirected[target].relays {
            for toxic in self.toxics(number, relay.transport())? {
                relay
                    .add_toxic(toxic)
                    .await
                    .map_err(|error| anyhow::anyhow!("{error}"))?;
            }
        }
        self.before.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(accepted);
        self.count(target, true);
        if self.rules[number].rule.modifiers.reconnect {
            // New connections are led from here on: what is reset comes back through the relay.
            let Some(diagnosis) = &self.diagnosis else {
                bail!("nothing was opened to reset connections with");
            };
            let mut netlink = diagnosis.lock().unwrap_or_else(PoisonError::into_inner);
            let target = &self.redirected[target].target;
            let count = reconnect::reset(&mut netlink, &self.peers, target, self.scope.as_deref())?;
            let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            past[number].hits += count;
        }
        Ok(())
    }

    /// Takes it back. Connections that are led stay so, without the fault.
    async fn stop_acting(&self, number: usize) {
        let target = self.rules[number].target;
        self.count(target, false);
        // A toxic's counts go with it.
        let did = self.current_hits(number);
        {
            let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            past[number].seen += did.seen;
            past[number].connections += did.connections;
            past[number].hits += did.hits;
        }
        self.before.lock().unwrap_or_else(PoisonError::into_inner)[number] = None;
        for relay in &self.redirected[target].relays {
            let Ok(toxics) = self.toxics(number, relay.transport()) else {
                return;
            };
            for toxic in toxics {
                if let Err(error) = relay.remove_toxic(&toxic.name).await {
                    tell!("fault: a rule can't end: {error}");
                }
            }
        }
    }

    /// Counts the rules in force of a target: its connections are led while there is one.
    fn count(&self, target: usize, up: bool) {
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let before = active[target];
        active[target] = if up { before + 1 } else { before - 1 };
        if (before == 0) != (active[target] == 0) {
            let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
            let index = u32::try_from(target).unwrap_or(u32::MAX);
            let up = up && !self.is_over.load(Ordering::SeqCst);
            hooks.switch(index, &self.redirected[target].target.ports, up);
        }
    }

    /// Has what is on its way through the relays arrive. What was lost.
    async fn drain(&self, drain: Drain) -> Cut {
        let relays = self.redirected.iter().flat_map(|redirected| &redirected.relays);
        let cuts = futures_util::future::join_all(relays.map(|relay| relay.drain(drain))).await;
        cuts.into_iter().sum()
    }

    /// Nothing is redirected any more.
    fn stop_redirecting(&self) {
        let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_over.store(true, Ordering::SeqCst);
        for (index, redirected) in (0..).zip(&self.redirected) {
            hooks.switch(index, &redirected.target.ports, false);
        }
    }

    fn hits(&self, number: usize) -> StreamHits {
        let now = self.current_hits(number);
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner)[number];
        StreamHits {
            seen: past.seen + now.seen,
            connections: past.connections + now.connections,
            hits: past.hits + now.hits,
        }
    }

    fn current_hits(&self, number: usize) -> StreamHits {
        let prefix = format!("{number}@");
        let mut sum = StreamHits::default();
        let target = self.rules[number].target;
        for relay in &self.redirected[target].relays {
            let stats = relay.stats();
            let own = stats
                .toxics
                .iter()
                .filter(|toxic| toxic.name.starts_with(&prefix));
            let mut connections = 0;
            for toxic in own {
                connections = connections.max(toxic.connections);
                sum.hits += toxic.hits;
            }
            sum.connections += connections;
        }
        if matches!(self.rules[number].rule.fault, Fault::NoAccept(_)) {
            return self.waiting(number);
        }
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner)[number];
        let since = before.map_or(0, |before| self.accepted(target) - before);
        // Some that it was put on had come before.
        sum.seen = since.max(sum.connections);
        sum
    }

    /// How many connections to a target have come through the relay.
    fn accepted(&self, target: usize) -> u64 {
        let relays = self.redirected[target].relays.iter();
        relays.map(|relay| relay.stats().accepted).sum()
    }

    /// What `no_accept` did: the connections that nobody has accepted. The relay has never met them.
    fn waiting(&self, number: usize) -> StreamHits {
        let redirected = &self.redirected[self.rules[number].target];
        let count = redirected.listeners.iter().map(backlog).sum();
        StreamHits {
            seen: count,
            connections: count,
            hits: count,
        }
    }
}

impl Steering {
    /// Switches the rule at this place among all rules off or on; a packet rule is not here, and nothing happens.
    ///
    /// # Errors
    /// The relay refuses the fault.
    pub async fn switch(&self, index: usize, on: bool) -> Result<()> {
        let rules = &self.shared.rules;
        match rules.iter().position(|rule| rule.index == index) {
            Some(number) => self.shared.turn(number, |turn| turn.is_off = !on).await,
            None => Ok(()),
        }
    }

    /// What the target of each stream rule carries by way of the relay, by the rule's place among all rules.
    #[must_use]
    pub fn traffic(&self) -> Vec<(usize, Traffic)> {
        let of = |rule: &StreamRule| {
            let mut sum = Traffic::default();
            for relay in &self.shared.redirected[rule.target].relays {
                let stats = relay.stats();
                sum.bytes += stats.sent_bytes.iter().sum::<u64>();
                sum.open += stats.open as u64;
            }
            (rule.index, sum)
        };
        self.shared.rules.iter().map(of).collect()
    }

    /// Enters what the stream rules did into the figures of all rules.
    pub fn add_to(&self, hits: &mut [Hits]) {
        for (index, did) in self.hits() {
            hits[index].connections = did.connections;
            hits[index].stats.seen_packets = did.seen;
            hits[index].stats.hit_packets = did.hits;
        }
    }
}
