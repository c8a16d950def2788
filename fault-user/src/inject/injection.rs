//! An applied plan: its programs, its rules, and their removal.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use fault_common::abi::{Counter, DecisionKey, RuleStats};
use fault_common::flow::FlowKey;
use nix::errno::Errno;

use crate::hold::line::{DelayLine, Figures};
use crate::hold::qdiscs::{QdiscDrops, Qdiscs};
use crate::inject::endpoints::Endpoints;
use crate::inject::follow::InterfaceWatcher;
use crate::inject::idle::Idle;
use crate::inject::injector::{Attachment, Injector, Marker};
use crate::inject::names::{LearnedAddresses, LearnedName};
use crate::inject::reach::{IngressMechanism, InterfaceSet};
use crate::inject::records::DecisionEvents;
use crate::inject::tracer::Tracer;
use crate::inject::xdp::Mode;
use crate::plan::needs::Needs;
use crate::plan::tables::{CgroupScope, PacketRule, compile};
use crate::plan::{Plan, PlannedRule};
use crate::relay::Decisions;
use crate::relay::exchange::Exchange;
use crate::sys::clock::monotonic_ns;
use crate::sys::net::interfaces::{Selection, list_by};
use crate::sys::process::cgroup::Cgroup;
use crate::sys::process::proc::{open_pidfd, open_sockets, take_descriptor};
use crate::tell::{step, tell};

/// The options of an injection.
#[expect(clippy::struct_excessive_bools, reason = "each says something else")]
#[derive(Clone, Debug, Default)]
pub struct InjectionOptions {
    /// Report decisions that fire as events.
    pub events: bool,
    /// Print a line for each packet that reaches a rule's port.
    pub trace: bool,
    /// The rules may be replaced: the maps and programs support further rules with other faults.
    pub live: bool,
    /// Later rules may divide super-packets: the device for that is created even if the first rules need none.
    pub divides: bool,
    /// Replay these decisions instead of making new ones.
    pub replay: Option<Arc<[(DecisionKey, u64)]>>,
    /// What becomes of the decisions of stream rules.
    pub streams: Decisions,
    /// Force this attachment.
    pub attachment: Option<Attachment>,
    /// The mechanism for incoming packets.
    pub front: IngressMechanism,
    /// The interfaces that appear later to which rules are applied; `None` for no later ones.
    pub later_interfaces: Option<Selection>,
}

/// Attached programs whose rules are not applied yet.
pub struct PreparedInjection {
    /// Dropped first, because it uses the other fields.
    pub(super) later_interfaces: Option<InterfaceWatcher>,
    /// Makes idle connections notice rules that reset them.
    pub(super) idle: Idle,
    /// The rules, until they are applied.
    pub(super) entries: Vec<PacketRule>,
    pub(super) reach: Arc<Mutex<InterfaceSet>>,
    /// The cgroup whose sockets are marked.
    pub(super) scope: Option<CgroupScope>,
    /// The names whose addresses are learned.
    pub(super) names: BTreeSet<String>,
    /// Whether these rules, or later ones in their place, may concern datagrams of UDP.
    pub(super) concern_datagrams: bool,
    /// Whether there are packet programs: rules for streams alone need none.
    pub(super) has_packets: bool,
    /// Prints what is done with packets, if that was requested.
    pub(super) tracer: Option<Tracer>,
}

/// Applied rules. Dropping this removes them; [`Injection::remove`] also reports errors.
pub struct Injection {
    prepared: PreparedInjection,
    started: Instant,
    epoch_ns: u64,
    /// The number of plans so far.
    age: u32,
    /// The hits of each rule before [`Injection::move_to`], or before it was removed and added again.
    past: Vec<Hits>,
    /// Rules that were removed, by their text.
    removed: HashMap<String, Vec<Removed>>,
    past_counters: Vec<u64>,
}

/// A rule that was removed, and may be added again.
struct Removed {
    /// The [`RuleEntry::uid`](fault_common::abi::RuleEntry::uid) of its first entry.
    uid: u32,
    hits: Hits,
}

/// The hooks at which the programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHooks {
    /// The attachment of the tc programs.
    pub attachment: Attachment,
    /// The mode of the XDP program in front of them, if there is one.
    pub xdp: Option<Mode>,
}

impl std::fmt::Display for PacketHooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(mode) = self.xdp {
            write!(f, "xdp ({mode}), ")?;
        }
        write!(f, "tc ({})", self.attachment)
    }
}

/// The counters of one rule. For a stream rule, packets are matched connections and hits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hits {
    /// Packets, segments and bytes.
    pub stats: RuleStats,
    /// Connections that the rule matched.
    pub connections: u64,
}

/// The hits of rules at the moment when others took their place.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// Those of the old rules, in their order.
    pub before: Vec<Hits>,
    /// Those with which the new rules begin: a rule that is kept has its own, one that was removed and is added again has
    /// the former ones.
    pub after: Vec<Hits>,
}

impl PreparedInjection {
    /// The exchange between the delay line and relays; `None` without a delay line.
    #[must_use]
    pub fn exchange(&self) -> Option<Arc<Exchange>> {
        let reach = self.reach();
        reach.delay_line.as_ref().map(DelayLine::exchange)
    }

    fn reach(&self) -> MutexGuard<'_, InterfaceSet> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes for the user about the mechanisms.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.reach().notes.clone()
    }

    /// Marks sockets that are created in `scope` from now on; [`PreparedInjection::adopt`] marks those that are already
    /// open.
    ///
    /// # Errors
    /// A system call fails.
    pub fn watch(&mut self, scope: &CgroupScope) -> Result<()> {
        if !self.has_packets {
            return Ok(());
        }
        let _step = step(format_args!("watching the cgroup"));
        self.scope = Some(scope.clone());
        let concern_datagrams = self.concern_datagrams;
        let injector = &mut self.reach().injector;
        injector.watch_cgroup(&scope.path)?;
        if concern_datagrams {
            injector.watch_groups(&scope.path)?;
        }
        Ok(())
    }

    /// Counts the endpoints that a cgroup's processes use from now on: see [`Injection::endpoints`]. `netns` is the
    /// cookie of the rules' network namespace, or 0 if unknown; `only_here` leaves out other namespaces.
    ///
    /// # Errors
    /// A system call fails.
    pub fn count_endpoints(&mut self, cgroup: &Path, netns: u64, only_here: bool) -> Result<()> {
        let _step = step(format_args!("counting endpoints"));
        let injector = &mut self.reach().injector;
        injector.count_endpoints(cgroup, netns, only_here)
    }

    /// Marks the open sockets of a cgroup's processes as belonging to `scope`.
    ///
    /// # Errors
    /// The processes can't be listed.
    pub fn adopt(&mut self, cgroup: &Cgroup, scope: &CgroupScope) -> Result<()> {
        if !self.has_packets {
            return Ok(());
        }
        // Sockets that are created after those here are listed, and before the rules are applied, are marked by the
        // programs, which learn the scope with this.
        let tables = compile(&[], Some(scope))?;
        self.reach().injector.install(&tables, 0)?;
        for pid in cgroup.processes()? {
            adopt_sockets(&mut self.reach().injector, pid.as_raw(), scope.cgroup)?;
        }
        Ok(())
    }

    /// Returns a function that marks sockets of this process, such as the relay's, as belonging to `scope`. Must be
    /// called last.
    ///
    /// # Errors
    /// It was already called.
    pub fn marker(&mut self, scope: &CgroupScope) -> Result<Marker> {
        self.reach().injector.take_marker(scope.cgroup)
    }

    /// The addresses that are learned of the names of the plan, for programs that look them up too; `None` without names.
    ///
    /// # Errors
    /// There is no room for the names, or a map can't be written.
    pub fn learned_addresses(&self) -> Result<Option<LearnedAddresses>> {
        self.addresses_of(&self.names)
    }

    /// The same for these names. Their addresses are learned under plans that have them.
    fn addresses_of(&self, names: &BTreeSet<String>) -> Result<Option<LearnedAddresses>> {
        if names.is_empty() {
            return Ok(None);
        }
        let learned = self.reach().injector.share_learned(names)?;
        Ok(Some(learned))
    }

    /// Applies the rules. Their time starts now.
    ///
    /// # Errors
    /// A map can't be written.
    pub fn start(mut self) -> Result<Injection> {
        let epoch_ns = monotonic_ns();
        self.apply(epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: Instant::now(),
            epoch_ns,
            age: 1,
            past: Vec::new(),
            removed: HashMap::new(),
            past_counters: Vec::new(),
        })
    }

    /// As [`PreparedInjection::start`], but continues the time and the plans of `old`: see [`Injection::follow`].
    ///
    /// # Errors
    /// A map can't be written.
    pub fn start_after(mut self, old: &Injection) -> Result<Injection> {
        self.apply(old.epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: old.started,
            epoch_ns: old.epoch_ns,
            age: old.age,
            past: Vec::new(),
            removed: HashMap::new(),
            past_counters: Vec::new(),
        })
    }

    fn apply(&mut self, epoch_ns: u64) -> Result<()> {
        let _step = step(format_args!("applying the rules"));
        let entries = std::mem::take(&mut self.entries);
        self.install(&entries, epoch_ns)
    }

    /// Uses these rules from now on.
    fn install(&mut self, entries: &[PacketRule], epoch_ns: u64) -> Result<()> {
        let tables = compile(entries, self.scope.as_ref())?;
        let mut reach = self.reach();
        reach.injector.install(&tables, epoch_ns)?;
        if Needs::of(entries).divides()
            && let Some(why) = reach.undivided.take()
        {
            tell!("fault: super-packets are treated as one packet each: {why:#}");
        }
        drop(reach);
        self.names = tables.named();
        self.idle.follow(entries, epoch_ns)
    }

    /// The events of decisions that fire, if requested.
    ///
    /// # Errors
    /// They were already taken.
    pub fn take_events(&mut self) -> Result<DecisionEvents> {
        self.reach().injector.take_events()
    }
}

/// The [`RuleEntry::uid`](fault_common::abi::RuleEntry::uid) of a rule's first entry, by which it is known across plans; `None` for one of streams alone.
fn uid(rule: &PlannedRule) -> Option<u32> {
    rule.entries.first().map(|part| part.entry.uid)
}

/// Marks the sockets of one process. A process that has ended has none.
fn adopt_sockets(injector: &mut Injector, pid: i32, cgroup: u64) -> Result<()> {
    let sockets = match open_sockets(pid) {
        Ok(sockets) => sockets,
        // A process that can't be inspected.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("listing the sockets of process {pid}"));
        }
    };
    let process = match open_pidfd(pid) {
        Ok(process) => process,
        Err(Errno::ESRCH) => return Ok(()),
        Err(errno) => return Err(errno).with_context(|| format!("opening process {pid}")),
    };
    for socket in sockets {
        let socket = match take_descriptor(&process, socket.number) {
            Ok(socket) => socket,
            // It was closed, or its process has ended or can't be inspected.
            Err(Errno::EBADF | Errno::ESRCH | Errno::EPERM) => continue,
            Err(errno) => {
                return Err(errno).with_context(|| format!("taking a socket of process {pid}"));
            }
        };
        if is_internet(&socket) {
            injector.adopt_socket(socket.as_fd(), cgroup)?;
        }
    }
    Ok(())
}

/// Only Internet sockets have packets that rules can match.
fn is_internet(socket: &OwnedFd) -> bool {
    use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
    use std::os::fd::AsRawFd as _;
    getsockname::<SockaddrStorage>(socket.as_raw_fd()).is_ok_and(|address| {
        matches!(
            address.family(),
            Some(AddressFamily::Inet | AddressFamily::Inet6)
        )
    })
}

impl Injection {
    /// Stops the rules. Their counters stay, and held packets are still released. The last lines about packets are printed.
    pub fn rest(&mut self) {
        self.prepared.reach().injector.rest();
        self.prepared.tracer = None;
    }

    /// The hooks at which the programs are attached.
    #[must_use]
    pub fn hooks(&self) -> PacketHooks {
        let reach = self.prepared.reach();
        PacketHooks {
            attachment: reach.injector.attachment(),
            xdp: reach.xdp.first().map(|link| link.mode),
        }
    }

    /// The names of all interfaces that the rules are or were applied to.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.prepared.reach().names.clone()
    }

    /// Whether the rules are applied to a bridge.
    #[must_use]
    pub fn has_bridge(&self) -> bool {
        let reach = self.prepared.reach();
        reach.interfaces.iter().any(|one| one.bridge.is_some())
    }

    /// Whether the journal contains changes to undo.
    #[must_use]
    pub fn has_notes(&self) -> bool {
        self.prepared.reach().journal.is_some()
    }

    /// Whether there are packet programs: rules for streams alone need none.
    #[must_use]
    pub fn has_packets(&self) -> bool {
        self.prepared.has_packets
    }

    /// The start of the rules' time.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The same on `CLOCK_MONOTONIC`, in nanoseconds.
    #[must_use]
    pub fn epoch_ns(&self) -> u64 {
        self.epoch_ns
    }

    /// Replaces the rules of `old` with those of `plan` atomically: every packet is processed by one set or the other.
    /// Needs [`InjectionOptions::live`].
    ///
    /// # Errors
    /// The rules do not fit; then the old ones stay applied.
    pub fn replace(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        self.can_hold(plan)?;
        plan.succeed(old, self.age + 1, self.elapsed_ns())?;
        self.exchange(old, plan)
    }

    /// The same for rules that are known by their text: one that was removed and is added again keeps its hits. Returns
    /// the hits of the rules of both plans at the exchange.
    ///
    /// # Errors
    /// As [`Injection::replace`].
    pub fn reload(&mut self, old: &Plan, plan: &mut Plan) -> Result<Reloaded> {
        self.replace(old, plan)?;
        // Read now: the old rules counted until here.
        let before = self.hits(old)?;
        let after = self.carry_over(old, &before, plan)?;
        Ok(Reloaded { before, after })
    }

    /// Keeps the hits of rules that were removed, and gives them back to rules that were added again. Returns with which
    /// hits each rule of `plan` begins.
    fn carry_over(&mut self, old: &Plan, hits: &[Hits], plan: &Plan) -> Result<Vec<Hits>> {
        for (rule, hits) in old.rules.iter().zip(hits) {
            if let Some(uid) = uid(rule)
                && !plan.rules.iter().any(|other| self::uid(other) == Some(uid))
            {
                let removed = self.removed.entry(rule.text.clone()).or_default();
                removed.push(Removed { uid, hits: *hits });
            }
        }
        let mut past = Vec::with_capacity(plan.rules.len());
        let mut begun = Vec::with_capacity(plan.rules.len());
        for rule in &plan.rules {
            let mut others = old.rules.iter();
            let kept = others.position(|other| uid(other).is_some() && uid(other) == uid(rule));
            if let Some(index) = kept {
                past.push(self.past.get(index).copied().unwrap_or_default());
                begun.push(hits[index]);
                continue;
            }
            let removed = self.removed.get_mut(&rule.text).and_then(Vec::pop);
            let Some(Removed { uid, hits }) = removed else {
                past.push(Hits::default());
                begun.push(Hits::default());
                continue;
            };
            // Those that are still open are counted again when the rule matches them.
            let open = self.prepared.reach().injector.open_connections(uid)?;
            past.push(Hits {
                connections: hits.connections.saturating_sub(open),
                ..hits
            });
            begun.push(hits);
        }
        self.past = past;
        Ok(begun)
    }

    /// As [`Injection::replace`], but the counters, the state and the time of all rules begin anew.
    ///
    /// # Errors
    /// As [`Injection::replace`].
    pub fn replace_anew(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        self.can_hold(plan)?;
        plan.supersede(old, self.age + 1, self.elapsed_ns())?;
        self.exchange(old, plan)?;
        self.past.clear();
        self.removed.clear();
        Ok(())
    }

    /// The rules' time so far.
    fn elapsed_ns(&self) -> u64 {
        monotonic_ns() - self.epoch_ns
    }

    /// Puts a plan in the place of the one that it succeeds.
    fn exchange(&mut self, old: &Plan, plan: &Plan) -> Result<()> {
        let entries = plan.entries();
        if let Some(line) = &self.prepared.reach().delay_line {
            // The delay line may still hold packets of the old rules.
            let mut shapers = old.shapers();
            shapers.extend(plan.shapers());
            line.reshape(&shapers);
        }
        self.prepared.install(&entries, self.epoch_ns)?;
        self.prepared.trace(plan, &BTreeSet::new());
        self.age += 1;
        Ok(())
    }

    /// Makes `plan` the successor of `old`, before the programs are reloaded.
    ///
    /// # Errors
    /// The old and the new rules together are too many.
    pub fn follow(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        plan.succeed(old, self.age + 1, self.elapsed_ns())?;
        self.age += 1;
        Ok(())
    }

    /// Undoes the changes that would outlive this process, when the rules' network namespace is about to disappear. The
    /// counters stay.
    ///
    /// # Errors
    /// A filter or qdisc that can't be removed.
    pub fn settle(&mut self) -> Result<()> {
        self.prepared.settle()
    }

    /// Continues with other programs in another place. The rules of `plan` whose indexes are in `off` are left out there,
    /// too. The counters and the rules' time continue. Must be called after [`Injection::settle`].
    ///
    /// # Errors
    /// A map can't be written.
    pub fn move_to(
        &mut self,
        plan: &Plan,
        off: &BTreeSet<usize>,
        mut prepared: PreparedInjection,
    ) -> Result<()> {
        let (past, past_counters) = (self.hits(plan)?, self.counters()?);
        prepared.entries = plan.entries_without(off);
        prepared.trace(plan, off);
        prepared.apply(self.epoch_ns)?;
        self.past = past;
        self.past_counters = past_counters;
        std::mem::replace(&mut self.prepared, prepared).remove()
    }

    /// Applies the rules of `plan` except those whose indexes are in `off`. The rules' state and counters stay.
    ///
    /// # Errors
    /// A system call fails; then nothing is changed.
    pub fn leave_out(&mut self, plan: &Plan, off: &BTreeSet<usize>) -> Result<()> {
        let entries = plan.entries_without(off);
        self.prepared.install(&entries, self.epoch_ns)?;
        self.prepared.trace(plan, off);
        Ok(())
    }

    /// Frees the connections' state of rules that are left out for good: a connection has state for only a few rules.
    ///
    /// # Errors
    /// A map can't be written.
    pub fn retire(&mut self, plan: &Plan, over: &[usize]) -> Result<()> {
        for rule in over.iter().filter_map(|index| plan.rules.get(*index)) {
            for part in &rule.entries {
                self.prepared.reach().injector.retire(part.entry.state)?;
            }
        }
        Ok(())
    }

    /// Rejects rules that hold packets if no mechanism for them is set up.
    fn can_hold(&self, plan: &Plan) -> Result<()> {
        let wanted = plan.qdiscs()?;
        let reach = self.prepared.reach();
        let there = reach.qdiscs.as_ref().map(Qdiscs::kind);
        if (plan.needs_delay_line() && reach.delay_line.is_none())
            || (wanted.is_some() && wanted.as_ref() != there)
        {
            anyhow::bail!(
                "these rules need another mechanism to hold packets than the first ones: restart fault with them"
            );
        }
        Ok(())
    }

    /// The counters of all rules of the plan, in order.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn hits(&self, plan: &Plan) -> Result<Vec<Hits>> {
        let mut all = Vec::with_capacity(plan.rules.len());
        for (ordinal, rule) in plan.rules.iter().enumerate() {
            let mut sum = Hits::default();
            for (index, part) in rule.entries.iter().enumerate() {
                let (stats, connections) =
                    self.prepared.reach().injector.stats(part.entry.state)?;
                if index == 0 {
                    // All arms of a mix match the same packets.
                    sum.stats = stats;
                    sum.connections = connections;
                    continue;
                }
                sum.stats.hit_packets += stats.hit_packets;
                sum.stats.hit_segments += stats.hit_segments;
                sum.stats.hit_bytes += stats.hit_bytes;
            }
            if let Some(queries) = rule.queries() {
                let (stats, connections) = queries.totals();
                sum.add(&Hits { stats, connections });
            }
            if let Some(past) = self.past.get(ordinal) {
                sum.add(past);
            }
            all.push(sum);
        }
        Ok(all)
    }

    /// The endpoints that processes used; `None` if they were not counted.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn endpoints(&self) -> Result<Option<Endpoints>> {
        self.prepared.reach().injector.endpoints()
    }

    /// See [`Injector::flows_in_scope`].
    ///
    /// # Errors
    /// A map can't be read.
    pub fn flows_in_scope(&self) -> Result<HashSet<FlowKey>> {
        self.prepared.reach().injector.flows_in_scope()
    }

    /// The number of packets let through for each reason, indexed by [`Counter`].
    ///
    /// # Errors
    /// A map can't be read.
    pub fn counters(&self) -> Result<Vec<u64>> {
        let mut counters = self.prepared.reach().injector.counters()?;
        for (counter, past) in counters.iter_mut().zip(&self.past_counters) {
            *counter += past;
        }
        Ok(counters)
    }

    /// The number of packets let through for one reason.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn counter(&self, counter: Counter) -> Result<u64> {
        self.prepared.reach().injector.counter(counter)
    }

    /// See [`PreparedInjection::learned_addresses`].
    ///
    /// # Errors
    /// As there.
    pub fn learned_addresses(&self) -> Result<Option<LearnedAddresses>> {
        self.prepared.learned_addresses()
    }

    /// The same for names that later plans have, by [`Plan::learn`]; `None` without names.
    ///
    /// # Errors
    /// As there.
    pub fn addresses_of(&self, names: &BTreeSet<String>) -> Result<Option<LearnedAddresses>> {
        self.prepared.addresses_of(names)
    }

    /// What has been learned about the names that rules are aimed at.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn learned(&self) -> Result<Vec<LearnedName>> {
        self.prepared.reach().injector.learned()
    }

    /// The counters of the delay line, if there is one.
    #[must_use]
    pub fn delay_line(&self) -> Option<Arc<Figures>> {
        let reach = self.prepared.reach();
        reach.delay_line.as_ref().map(DelayLine::figures)
    }

    /// The packets that full qdiscs dropped.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn losses(&self) -> Result<Vec<QdiscDrops>> {
        let reach = self.prepared.reach();
        let qdiscs = reach.qdiscs.as_ref();
        Ok(qdiscs.map(Qdiscs::losses).transpose()?.unwrap_or_default())
    }

    /// The names of interfaces that have disappeared for good. With later interfaces requested, only those that were
    /// named count.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn vanished(&self) -> Result<Vec<String>> {
        let mut reach = self.prepared.reach();
        let selection = self
            .prepared
            .later_interfaces
            .as_ref()
            .map(InterfaceWatcher::selection);
        if selection == Some(&Selection::Default) {
            return Ok(Vec::new());
        }
        let there = list_by(&mut reach.netlink)?;
        let is_gone = |name: &&String| !there.iter().any(|one| one.name == **name);
        Ok(reach.names.iter().filter(is_gone).cloned().collect())
    }

    /// Removes the rules and everything that was set up.
    ///
    /// # Errors
    /// A filter or qdisc that can't be removed.
    pub fn remove(self) -> Result<()> {
        self.prepared.remove()
    }
}

impl PreparedInjection {
    /// From now on lines about packets are those of these rules, without those whose indexes are in `off`.
    fn trace(&self, plan: &Plan, off: &BTreeSet<usize>) {
        if let Some(tracer) = &self.tracer {
            tracer.follow(plan, off);
        }
    }

    fn remove(mut self) -> Result<()> {
        self.settle()
    }

    /// Undoes everything except the programs, which are removed when this is dropped.
    fn settle(&mut self) -> Result<()> {
        self.later_interfaces = None;
        self.idle = Idle::default();
        self.reach().settle()
    }
}

impl Hits {
    /// Adds other counters.
    pub fn add(&mut self, other: &Self) {
        let (sum, stats) = (&mut self.stats, &other.stats);
        sum.seen_packets += stats.seen_packets;
        sum.seen_segments += stats.seen_segments;
        sum.seen_bytes += stats.seen_bytes;
        sum.hit_packets += stats.hit_packets;
        sum.hit_segments += stats.hit_segments;
        sum.hit_bytes += stats.hit_bytes;
        self.connections += other.connections;
    }
}
