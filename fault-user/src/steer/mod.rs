//! Stream faults on services that are not reconfigured. The connections of a cgroup are redirected to a relay on this
//! host, which connects to the original destinations.
//!
//! The relay listens on loopback. Outside the windows of a target's rules, the target's connections bypass the relay.

pub mod front;
mod handshakes;
mod hooks;
mod originals;
mod prompt;
pub mod reconnect;
mod redirection;
mod relays;
mod served;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinHandle;

use crate::inject::injection::Hits;
use crate::inject::names::LearnedAddresses;
use crate::plan::stream::{self, RelayRule};
use crate::relay::attributes::Probability;
use crate::relay::{
    Cut, Decisions, Drain, Engine, Relay, RelayFault, StreamDirection, ToxicConfig, Transport,
};
use crate::rule::{Acts, Cidr, Direction, Fault, ResolvedTarget};
use crate::sys::net::netlink::Netlink;
use crate::sys::process::netns::NetworkNamespace;
use crate::sys::process::sockets::queue;
use crate::tell::tell;
use hooks::SteeringHooks;
use redirection::Registered;
pub use redirection::{Redirection, SteeringScope};
use relays::RelayListeners;
pub(crate) use relays::prepare;

/// Two threads suffice for the connections of one command.
const WORKERS: usize = 2;

/// At the end of the rules, connections get this time in addition to the rules' own delays: for bytes queued by a rate
/// limit and for peers that read slowly.
const SPARE: Duration = Duration::from_secs(10);
/// The same for connections whose peers still send.
const TALK: Duration = Duration::from_millis(500);
/// Time for connections to notice that a rule has ended.
const CHANGE: Duration = Duration::from_secs(1);
/// After this time a message says that draining takes longer.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// The hits of one stream rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamHits {
    /// Connections that passed through the relay while the rule was applied.
    pub seen: u64,
    /// Connections that the rule was applied to.
    pub connections: u64,
    /// Chunks, connection ends and requests that the rule hit.
    pub hits: u64,
}

/// A stream rule and the index of its target.
struct StreamRule {
    /// Its index among all rules.
    index: usize,
    target: usize,
    rule: RelayRule,
}

/// A target with its relays: one per IP version, and one for datagrams.
struct RedirectedTarget {
    /// Its name or text.
    name: String,
    target: ResolvedTarget,
    relays: Vec<Arc<Relay>>,
    /// The relays' listeners, to read the lengths of their queues.
    listeners: Vec<std::net::TcpListener>,
}

struct Shared {
    /// The cgroup whose connections are redirected; `None` for every process of the network namespace.
    scope: Option<PathBuf>,
    /// A `sock_diag` socket of the network namespace, if rules reset connections.
    diagnosis: Option<Mutex<Netlink>>,
    /// Raw sockets to reset connections to other hosts.
    peers: reconnect::Peers,
    /// The addresses of the names that rules are aimed at.
    learned: Option<LearnedAddresses>,
    registered: Registered,
    redirected: Vec<RedirectedTarget>,
    rules: Vec<StreamRule>,
    /// What becomes of the rules' decisions.
    decisions: Decisions,
    /// The number of rules of each target that are in their windows.
    active: Mutex<Vec<u32>>,
    /// The hits of each rule in past windows.
    past: Mutex<Vec<StreamHits>>,
    /// The number of connections at the start of the current window; `None` while the rule is not active.
    before: Mutex<Vec<Option<u64>>>,
    /// The most connections that waited at once for a rule's `no_accept`, in the current window.
    most_waiting: Mutex<Vec<u64>>,
    /// Which rules are active.
    turns: tokio::sync::Mutex<Vec<RuleSwitch>>,
    /// Redirection has ended; windows that open later have no effect.
    is_over: AtomicBool,
}

/// A rule is active while its window is open and it is not turned off.
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

/// The traffic of a target through the relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayTraffic {
    /// Bytes in both directions.
    pub bytes: u64,
    /// Open connections.
    pub open: u64,
}

/// Redirection of connections to relays that apply stream rules. Dropping it ends the redirection and closes the
/// redirected connections.
pub struct Steering {
    shared: Arc<Shared>,
    timelines: Vec<JoinHandle<()>>,
    started: Instant,
    _engine: Arc<Engine>,
}

/// Deduplicates the targets of the rules.
fn by_target(rules: &[(usize, &RelayRule)]) -> (Vec<ResolvedTarget>, Vec<StreamRule>) {
    let mut targets: Vec<ResolvedTarget> = Vec::new();
    let mut stream_rules = Vec::new();
    for &(index, rule) in rules {
        let own = &rule.resolved.target;
        let known = targets.iter().position(|target| target == own);
        let target = known.unwrap_or_else(|| {
            targets.push(own.clone());
            targets.len() - 1
        });
        stream_rules.push(StreamRule {
            index,
            target,
            rule: rule.clone(),
        });
    }
    (targets, stream_rules)
}

/// Resources that are opened inside the network namespace.
struct Opened {
    ends: Vec<RelayListeners>,
    diagnosis: Option<Mutex<Netlink>>,
    peers: reconnect::Peers,
}

impl Opened {
    fn new(targets: usize, rules: &[StreamRule]) -> Result<Self> {
        let ends = (0..targets)
            .map(|target| RelayListeners::open(has(Transport::Tcp, target, rules).is_some()))
            .collect::<Result<Vec<_>>>()?;
        let (diagnosis, peers) = if rules
            .iter()
            .any(|rule| rule.rule.resolved.modifiers.reconnect)
        {
            let diagnosis = Mutex::new(Netlink::sock_diag()?);
            (Some(diagnosis), reconnect::Peers::open())
        } else {
            (None, reconnect::Peers::default())
        };
        Ok(Self {
            ends,
            diagnosis,
            peers,
        })
    }
}

impl Steering {
    async fn begin(
        redirection: &Redirection,
        rules: &[(usize, &RelayRule)],
        (seed, decisions): (u64, &Decisions),
        namespace: Option<&NetworkNamespace>,
        learned: Option<LearnedAddresses>,
    ) -> Result<Self> {
        let (targets, rules) = by_target(rules);
        let open = || Opened::new(targets.len(), &rules);
        let Opened {
            mut ends,
            diagnosis,
            peers,
        } = match namespace {
            Some(namespace) => namespace.enter(open)?,
            None => open()?,
        };
        let services = ends.iter().zip(&targets);
        let services = services.map(|(ends, target)| ends.service(target, learned.as_ref()));
        let registered =
            redirection.register(services.collect::<Result<_>>()?, learned.as_ref())?;
        let maker = redirection.maker(seed);
        let mut redirected = Vec::with_capacity(targets.len());
        for (number, (target, ends)) in targets.into_iter().zip(&mut ends).enumerate() {
            let named = rules.iter().find(|rule| rule.target == number);
            let title = named.map_or("", |rule| &rule.rule.resolved.name);
            let packets = has(Transport::Udp, number, &rules);
            let relays = ends.relays(&maker, (number, title), packets)?;
            let target = RedirectedTarget::start(number, target, &rules, ends, relays).await?;
            target.show(u32::try_from(number)?, &mut redirection.hooks())?;
            redirected.push(target);
        }
        let shared = Arc::new(Shared {
            scope: redirection.scope.clone(),
            diagnosis,
            peers,
            learned,
            registered,
            active: Mutex::new(vec![0; redirected.len()]),
            past: Mutex::new(vec![StreamHits::default(); rules.len()]),
            before: Mutex::new(vec![None; rules.len()]),
            most_waiting: Mutex::new(vec![0; rules.len()]),
            turns: tokio::sync::Mutex::new(vec![RuleSwitch::default(); rules.len()]),
            is_over: AtomicBool::new(false),
            redirected,
            rules,
            decisions: decisions.clone(),
        });
        let mut timelines = Vec::new();
        for rule in 0..shared.rules.len() {
            timelines.push(begin(&shared, rule).await?);
        }
        Ok(Self {
            shared,
            timelines,
            started: Instant::now(),
            _engine: Arc::clone(&redirection.engine),
        })
    }

    /// Ends redirection and closes the redirected connections at once.
    ///
    /// # Errors
    /// A relay can't be stopped.
    pub async fn stop(mut self) -> Result<()> {
        self.shared.stop_redirecting();
        for timeline in &mut self.timelines {
            timeline.abort();
            // Until it has ended, its services are registered.
            let _cancelled = timeline.await;
        }
        for relay in self.shared.redirected.iter().flat_map(|one| &one.relays) {
            relay.set_enabled(false).await?;
        }
        Ok(())
    }

    /// Ends redirection and delivers data in transit according to the rules. This takes at most `limit`; by default,
    /// the rules' own delays plus 10 s. Connections with undelivered data are then reset, or earlier when `hurry` is
    /// ready. Returns what was cut off.
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
            // The same future is polled to the end: dropping it would refuse clients that wait for their servers.
            let draining = self.shared.drain(drain);
            tokio::pin!(hurry, draining);
            tokio::select! {
                cut = &mut draining => return cut,
                () = &mut hurry => {}
                () = tokio::time::sleep(TOLD_AFTER) => {
                    let most = drain.until.saturating_duration_since(Instant::now()).as_secs() + 1;
                    tell!("fault: waiting up to {most} s for data in transit to be delivered (Ctrl-C resets the \
                    connections)");
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

    /// The sum of the delays of all rules.
    fn delay(&self) -> Duration {
        let rules = self.shared.rules.iter();
        rules
            .map(|rule| Duration::from_nanos(rule.rule.resolved.fault.held_ns()))
            .sum()
    }

    /// The time at which the last open window closes.
    fn change_by(&self) -> Option<Instant> {
        let elapsed_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let rules = self.shared.rules.iter();
        let ends = rules.filter_map(|rule| {
            rule.rule
                .resolved
                .modifiers
                .schedule()
                .closes_after(elapsed_ns)
        });
        ends.max()
            .map(|end_ns| self.started + Duration::from_nanos(end_ns))
    }

    /// Whether rules reset connections of other processes.
    #[must_use]
    pub fn reaches_for_sockets(&self) -> bool {
        self.shared.diagnosis.is_some()
    }
}

/// The index of the first rule of a target that acts on this transport.
fn has(transport: Transport, target: usize, rules: &[StreamRule]) -> Option<usize> {
    let mut own = rules.iter().filter(|rule| rule.target == target);
    own.find(|rule| rule.rule.acts_on(transport))
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

/// Starts the timeline of a rule. A rule without a start time is applied on return.
async fn begin(shared: &Arc<Shared>, number: usize) -> Result<JoinHandle<()>> {
    let schedule = shared.rules[number].rule.resolved.modifiers.schedule();
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
                tell!("fault: warning: a rule can't be applied: {error:#}");
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
                tell!("fault: warning: a rule can't be removed: {error:#}");
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
    /// Starts the relays of target `number`.
    async fn start(
        number: usize,
        target: ResolvedTarget,
        rules: &[StreamRule],
        ends: &mut RelayListeners,
        relays: Vec<Arc<Relay>>,
    ) -> Result<Self> {
        let filters = |transport| {
            let of_target = rules.iter().filter(|rule| rule.target == number);
            of_target.map(move |rule| stream::filter(&rule.rule.resolved, transport))
        };
        for relay in &relays {
            if filters(relay.transport()).any(|filter| !filter.is_empty()) {
                relay.read_greetings();
            }
            let started = relay.set_enabled(true).await;
            started.context("starting the relay")?;
        }
        let named = rules.iter().find(|rule| rule.target == number);
        Ok(Self {
            name: named.map_or_else(String::new, |rule| rule.rule.resolved.name.clone()),
            target,
            relays,
            listeners: std::mem::take(&mut ends.streams)
                .into_iter()
                .flatten()
                .collect(),
        })
    }

    /// Registers the listeners at the hooks.
    fn show(&self, index: u32, hooks: &mut SteeringHooks) -> Result<()> {
        let mut listeners = self.listeners.iter();
        listeners.try_for_each(|listener| hooks.listen(index, listener))
    }

    /// Messages for the user at the end.
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
    /// The toxics of a rule: one, or one per direction with shared random draws. None if the fault does not support the
    /// transport.
    fn toxics(&self, number: usize, transport: Transport) -> Result<Vec<ToxicConfig>> {
        let StreamRule { index, rule, .. } = &self.rules[number];
        if !rule.acts_on(transport) {
            return Ok(Vec::new());
        }
        let RelayRule {
            resolved: rule,
            fault,
        } = rule;
        let ways: &[StreamDirection] = match rule.modifiers.direction {
            Direction::ToServer => &[StreamDirection::Upstream],
            Direction::Both if rule.fault.part_that(Acts::OneWay).is_some() => {
                &StreamDirection::ALL
            }
            Direction::ToClient | Direction::Both => &[StreamDirection::Downstream],
        };
        let config = |way: &StreamDirection| {
            Ok(ToxicConfig {
                name: format!("{number}@{}", way.name()),
                direction: *way,
                stream: way.name().to_owned(),
                toxicity: Probability::of_ppm(rule.modifiers.probability).0,
                connections: stream::connections(&rule.modifiers, transport),
                filter: stream::filter(rule, transport),
                datagrams: stream::datagrams(&rule.modifiers, transport),
                fault: if ways.len() == 2 && *way == StreamDirection::Upstream {
                    RelayFault::one_way_part(&rule.fault)?
                } else {
                    fault.clone()
                },
                decisions: self.decisions.of_rule(u32::try_from(index + 1)?),
            })
        };
        ways.iter().map(config).collect()
    }

    /// Opens or closes the window of a rule.
    async fn set_window(&self, number: usize, is_open: bool) -> Result<()> {
        self.turn(number, |turn| turn.in_window = is_open).await
    }

    /// Changes a rule's switch, and applies or removes the rule accordingly.
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

    /// Applies a rule.
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
        if self.rules[number].rule.resolved.modifiers.reconnect {
            // New connections are redirected from here on: a client that was reset reconnects through the relay.
            let Some(diagnosis) = &self.diagnosis else {
                bail!("no socket is open to reset connections with");
            };
            let mut netlink = diagnosis.lock().unwrap_or_else(PoisonError::into_inner);
            let mut target = self.redirected[target].target.clone();
            if let Some(learned) = &self.learned {
                let addresses = learned.of(&target)?;
                target.hosts.extend(addresses.into_iter().map(Cidr::host));
            }
            let scope = self.scope.as_deref();
            let count = reconnect::reset(&mut netlink, &self.peers, &target, scope)?;
            let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            past[number].hits += count;
        }
        Ok(())
    }

    /// Removes a rule. Redirected connections stay with the relay, without the fault.
    async fn stop_acting(&self, number: usize) {
        let target = self.rules[number].target;
        self.count(target, false);
        // Removing a toxic discards its counters.
        let did = self.current_hits(number);
        {
            let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            past[number].seen += did.seen;
            past[number].connections += did.connections;
            past[number].hits += did.hits;
        }
        // From here on only `past` counts, also while the toxics are being removed.
        self.before.lock().unwrap_or_else(PoisonError::into_inner)[number] = None;
        self.most_waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)[number] = 0;
        for relay in &self.redirected[target].relays {
            let Ok(toxics) = self.toxics(number, relay.transport()) else {
                return;
            };
            for toxic in toxics {
                if let Err(error) = relay.remove_toxic(&toxic.name).await {
                    tell!("fault: warning: a rule can't be removed: {error}");
                }
            }
        }
    }

    /// Counts the active rules of a target. Its connections are redirected while there is at least one.
    fn count(&self, target: usize, up: bool) {
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let before = active[target];
        active[target] = if up { before + 1 } else { before - 1 };
        if (before == 0) != (active[target] == 0) {
            let mut hooks = self.registered.hooks();
            let index = u32::try_from(target).unwrap_or(u32::MAX);
            let up = up && !self.is_over.load(Ordering::SeqCst);
            hooks.switch(index, &self.redirected[target].target.ports, up);
        }
    }

    /// Delivers data in transit through the relays. Returns what was cut off.
    async fn drain(&self, drain: Drain) -> Cut {
        let relays = self
            .redirected
            .iter()
            .flat_map(|redirected| &redirected.relays);
        let cuts = futures_util::future::join_all(relays.map(|relay| relay.drain(drain))).await;
        cuts.into_iter().sum()
    }

    /// Ends redirection.
    fn stop_redirecting(&self) {
        let mut hooks = self.registered.hooks();
        self.is_over.store(true, Ordering::SeqCst);
        for (index, redirected) in (0..).zip(&self.redirected) {
            hooks.switch(index, &redirected.target.ports, false);
        }
    }

    fn hits(&self, number: usize) -> StreamHits {
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner)[number];
        let now = before.map_or_else(StreamHits::default, |_| self.current_hits(number));
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
        if matches!(self.rules[number].rule.resolved.fault, Fault::NoAccept(_)) {
            return self.waiting(number);
        }
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner)[number];
        let since = before.map_or(0, |before| self.accepted(target) - before);
        // The rule may also be applied to connections that were accepted earlier.
        sum.seen = since.max(sum.connections);
        sum
    }

    /// The number of connections to a target that the relay accepted.
    fn accepted(&self, target: usize) -> u64 {
        let relays = self.redirected[target].relays.iter();
        relays.map(|relay| relay.stats().accepted).sum()
    }

    /// The hits of `no_accept`: the most connections that were in the listeners' queues at once. The relay has not
    /// accepted them. A client that gives up stays in the queue, so nothing is missed between two calls.
    fn waiting(&self, number: usize) -> StreamHits {
        let redirected = &self.redirected[self.rules[number].target];
        let listeners = redirected.listeners.iter();
        let waiting = listeners.map(|one| queue(one).length).sum();
        let mut most = self
            .most_waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        most[number] = most[number].max(waiting);
        let count = most[number];
        StreamHits {
            seen: count,
            connections: count,
            hits: count,
        }
    }
}

impl Steering {
    /// Turns the rule with this index among all rules off or on. Does nothing for a packet rule.
    ///
    /// # Errors
    /// The relay rejects the fault.
    pub async fn switch(&self, index: usize, on: bool) -> Result<()> {
        let rules = &self.shared.rules;
        match rules.iter().position(|rule| rule.index == index) {
            Some(number) => self.shared.turn(number, |turn| turn.is_off = !on).await,
            None => Ok(()),
        }
    }

    /// The stream rules by their numbers. What the relay does for packet rules is counted with their packets.
    fn stream_rules(&self) -> impl Iterator<Item = (usize, &StreamRule)> {
        let rules = self.shared.rules.iter().enumerate();
        rules.filter(|(_, rule)| rule.rule.queries().is_none())
    }

    /// The relay traffic of each stream rule's target, with the rule's index among all rules.
    #[must_use]
    pub fn traffic(&self) -> Vec<(usize, RelayTraffic)> {
        let of = |(_, rule): (_, &StreamRule)| {
            let mut sum = RelayTraffic::default();
            for relay in &self.shared.redirected[rule.target].relays {
                let stats = relay.stats();
                sum.bytes += stats.sent_bytes.iter().sum::<u64>();
                sum.open += stats.open as u64;
            }
            (rule.index, sum)
        };
        self.stream_rules().map(of).collect()
    }

    /// Adds the hits of stream rules to those of all rules.
    pub fn add_to(&self, hits: &mut [Hits]) {
        for (number, rule) in self.stream_rules() {
            let (hits, did) = (&mut hits[rule.index], self.shared.hits(number));
            hits.connections = did.connections;
            hits.stats.seen_packets = did.seen;
            hits.stats.hit_packets = did.hits;
        }
    }
}
