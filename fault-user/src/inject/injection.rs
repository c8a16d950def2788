//! A plan in force: programs loaded and attached, rules installed, and all of it taken back.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use fault_common::abi::{Counter, DecisionKey, RuleStats};
use nix::errno::Errno;

use crate::hold::line::{DelayLine, Figures};
use crate::hold::qdiscs::{Loss, Qdiscs};
use crate::inject::endpoints::Endpoints;
use crate::inject::events::Events;
use crate::inject::follow::InterfaceWatcher;
use crate::inject::idle::Idle;
use crate::inject::injector::{Attachment, Injector, Marker};
use crate::inject::names::LearnedName;
use crate::inject::reach::{IngressMechanism, InterfaceSet};
use crate::inject::xdp::Mode;
use crate::plan::Plan;
use crate::plan::tables::{PacketRule, Scope, Tables, compile};
use crate::relay::exchange::Exchange;
use crate::sys::clock::monotonic_ns;
use crate::sys::net::interfaces::{Selection, list_by};
use crate::sys::process::cgroup::Cgroup;
use crate::sys::process::proc::{open_pidfd, open_sockets, take_descriptor};

/// What the caller decides about an injection.
#[derive(Clone, Debug, Default)]
pub struct InjectionOptions {
    /// Report decisions that fire as events.
    pub events: bool,
    /// The rules are going to be replaced: room for others, with other faults.
    pub live: bool,
    /// Repeat these decisions instead of making new ones.
    pub replay: Option<Arc<[(DecisionKey, u64)]>>,
    /// Force one way of attaching.
    pub attachment: Option<Attachment>,
    /// Where packets that arrive are judged first.
    pub front: IngressMechanism,
    /// Which of the interfaces that appear later the rules are put on too; none of them without this.
    pub later_interfaces: Option<Selection>,
}

/// Programs attached, rules not yet in force.
pub struct PreparedInjection {
    /// Goes first: it works on the rest.
    pub(super) later_interfaces: Option<InterfaceWatcher>,
    /// Has idle connections notice rules that reset them, once these are applied.
    pub(super) idle: Idle,
    /// The rules.
    pub(super) entries: Vec<PacketRule>,
    pub(super) reach: Arc<Mutex<InterfaceSet>>,
    pub(super) tables: Tables,
}

/// Rules in force. Dropping this heals, and [`Injection::remove`] also says how that went.
pub struct Injection {
    prepared: PreparedInjection,
    started: Instant,
    epoch_ns: u64,
    /// How many plans there have been.
    age: u32,
    /// What the rules did where they were before ([`Injection::move_to`]).
    past: Vec<Hits>,
    past_counters: Vec<u64>,
}

/// How packets reach the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// How the tc programs are held.
    pub attachment: Attachment,
    /// How the XDP program in front of them is run, if there is one.
    pub xdp: Option<Mode>,
}

impl std::fmt::Display for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(mode) = self.xdp {
            write!(f, "xdp ({mode}), ")?;
        }
        write!(f, "tc ({})", self.attachment)
    }
}

/// What one rule of the plan saw and did. For a stream rule packets are connections seen and things done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hits {
    /// Packets, segments and bytes.
    pub stats: RuleStats,
    /// Connections that the rule met.
    pub connections: u64,
}

impl PreparedInjection {
    /// Where the delay line gives packets to relays; nothing where there is none.
    #[must_use]
    pub fn exchange(&self) -> Option<Arc<Exchange>> {
        let reach = self.reach();
        reach.delay_line.as_ref().map(DelayLine::exchange)
    }

    fn reach(&self) -> MutexGuard<'_, InterfaceSet> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the user should know of how the rules are carried out.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.reach().notes.clone()
    }

    /// Lets sockets that are made in `scope` from now on be known by it; [`PreparedInjection::adopt`] is for those
    /// that are open there already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&mut self, scope: &Scope) -> Result<()> {
        let injector = &mut self.reach().injector;
        injector.watch_cgroup(&scope.path)?;
        if self.tables.concern_datagrams() {
            injector.watch_groups(&scope.path)?;
        }
        Ok(())
    }

    /// Counts from now on where the processes of a cgroup connect to: see [`Injection::endpoints`]. `netns` is the cookie
    /// of the network namespace that the rules are in, 0 where the kernel does not tell it; `only_here` leaves out what
    /// happens in others.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn count_endpoints(&mut self, cgroup: &Path, netns: u64, only_here: bool) -> Result<()> {
        let injector = &mut self.reach().injector;
        injector.count_endpoints(cgroup, netns, only_here)
    }

    /// Marks the sockets that the processes of a cgroup have open as belonging to `scope`.
    ///
    /// # Errors
    /// The processes can't be listed.
    pub fn adopt(&mut self, cgroup: &Cgroup, scope: &Scope) -> Result<()> {
        for pid in cgroup.processes()? {
            adopt_sockets(&mut self.reach().injector, pid.as_raw(), scope.cgroup)?;
        }
        Ok(())
    }

    /// What makes sockets of this process, such as the relay's, belong to `scope`. To be called last.
    ///
    /// # Errors
    /// It has been called before.
    pub fn marker(&mut self, scope: &Scope) -> Result<Marker> {
        self.reach().injector.take_marker(scope.cgroup)
    }

    /// Puts the rules in force: from here on their time runs.
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn start(mut self) -> Result<Injection> {
        let epoch_ns = monotonic_ns();
        self.apply(epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: Instant::now(),
            epoch_ns,
            age: 1,
            past: Vec::new(),
            past_counters: Vec::new(),
        })
    }

    /// As [`PreparedInjection::start`], for the rules' time and the plans that there have been: see [`Injection::follow`].
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn start_after(mut self, old: &Injection) -> Result<Injection> {
        self.apply(old.epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: old.started,
            epoch_ns: old.epoch_ns,
            age: old.age,
            past: Vec::new(),
            past_counters: Vec::new(),
        })
    }

    fn apply(&mut self, epoch_ns: u64) -> Result<()> {
        self.reach().injector.install(&self.tables, epoch_ns)?;
        self.idle.follow(&self.entries, epoch_ns)
    }

    /// The decisions that fire, when they were asked for.
    ///
    /// # Errors
    /// They have been taken already.
    pub fn take_events(&mut self) -> Result<Events> {
        self.reach().injector.take_events()
    }
}

/// Marks the sockets of one process. One that has ended meanwhile has none.
fn adopt_sockets(injector: &mut Injector, pid: i32, cgroup: u64) -> Result<()> {
    let sockets = match open_sockets(pid) {
        Ok(sockets) => sockets,
        // One that may not be looked into.
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
            // It has been closed, or its process has ended or may not be looked into.
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

/// Unix sockets and the like have no packets.
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
    /// From now on every packet passes. The figures stay, and what is held goes on.
    pub fn rest(&mut self) {
        self.prepared.reach().injector.rest();
    }

    /// How packets reach the programs.
    #[must_use]
    pub fn hooks(&self) -> Hooks {
        let reach = self.prepared.reach();
        Hooks {
            attachment: reach.injector.attachment(),
            xdp: reach.xdp.first().map(|link| link.mode),
        }
    }

    /// The names of the interfaces that the rules are, or have been, on.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.prepared.reach().names.clone()
    }

    /// Whether the rules are on a bridge.
    #[must_use]
    pub fn has_bridge(&self) -> bool {
        let reach = self.prepared.reach();
        reach.interfaces.iter().any(|one| one.bridge.is_some())
    }

    /// Whether something is noted that must be undone at the end.
    #[must_use]
    pub fn has_notes(&self) -> bool {
        self.prepared.reach().journal.is_some()
    }

    /// When the rules' time began.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The same on `CLOCK_MONOTONIC`, in nanoseconds.
    #[must_use]
    pub fn epoch_ns(&self) -> u64 {
        self.epoch_ns
    }

    /// Puts the rules of `plan` in force instead of those of `old`, at once and as a whole: every packet is judged by
    /// the one set or by the other. Needs [`InjectionOptions::live`].
    ///
    /// # Errors
    /// More rules than there is room for; then the old ones stay in force.
    pub fn replace(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        let elapsed_ns = monotonic_ns() - self.epoch_ns;
        self.can_hold(plan)?;
        plan.succeed(old, self.age + 1, elapsed_ns)?;
        let entries = plan.entries();
        let tables = compile(&entries)?;
        let mut reach = self.prepared.reach();
        if let Some(line) = &reach.delay_line {
            // What the old rules have sent to it may still be on its way.
            let mut shapers = old.shapers();
            shapers.extend(plan.shapers());
            line.reshape(&shapers);
        }
        reach.injector.install(&tables, self.epoch_ns)?;
        drop(reach);
        self.prepared.idle.follow(&entries, self.epoch_ns)?;
        self.age += 1;
        self.prepared.tables = tables;
        Ok(())
    }

    /// Makes `plan` the successor of `old`, for programs that are loaded anew.
    ///
    /// # Errors
    /// Too many rules, old and new together.
    pub fn follow(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        plan.succeed(old, self.age + 1, monotonic_ns() - self.epoch_ns)?;
        self.age += 1;
        Ok(())
    }

    /// What the rules were put on has gone, or is going: undoes what would outlive this process. The figures stay.
    ///
    /// # Errors
    /// A filter or qdisc that can't be removed.
    pub fn settle(&mut self) -> Result<()> {
        self.prepared.settle()
    }

    /// Goes on with other programs, in another place: the figures and the rules' time go on as they were. To be called
    /// after [`Injection::settle`].
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn move_to(&mut self, plan: &Plan, mut prepared: PreparedInjection) -> Result<()> {
        let (past, past_counters) = (self.hits(plan)?, self.counters()?);
        prepared.apply(self.epoch_ns)?;
        self.past = past;
        self.past_counters = past_counters;
        std::mem::replace(&mut self.prepared, prepared).remove()
    }

    /// Puts the rules of `plan` in force, except those whose places are in `off`. What rules remember and counted stays.
    ///
    /// # Errors
    /// The kernel refuses; then all stays as it was.
    pub fn leave_out(&mut self, plan: &Plan, off: &BTreeSet<usize>) -> Result<()> {
        let tables = compile(&plan.entries_without(off))?;
        self.prepared
            .reach()
            .injector
            .install(&tables, self.epoch_ns)?;
        self.prepared.tables = tables;
        Ok(())
    }

    /// Lets connections forget rules that have been left out and never come back: they remember only a few at a time.
    ///
    /// # Errors
    /// The kernel refuses to change a map.
    pub fn retire(&mut self, plan: &Plan, over: &[usize]) -> Result<()> {
        for rule in over.iter().filter_map(|index| plan.rules.get(*index)) {
            for part in &rule.entries {
                self.prepared.reach().injector.retire(part.entry.state)?;
            }
        }
        Ok(())
    }

    /// Refuses rules that hold packets for which there is nothing that does.
    fn can_hold(&self, plan: &Plan) -> Result<()> {
        let wanted = plan.qdiscs()?;
        let reach = self.prepared.reach();
        let there = reach.qdiscs.as_ref().map(Qdiscs::kind);
        if (plan.needs_delay_line() && reach.delay_line.is_none())
            || (wanted.is_some() && wanted.as_ref() != there)
        {
            anyhow::bail!(
                "what is to hold packets now is not what the first rules needed: start again with these rules"
            );
        }
        Ok(())
    }

    /// What each rule of the plan saw and did, in their order.
    ///
    /// # Errors
    /// The kernel refuses to read a map.
    pub fn hits(&self, plan: &Plan) -> Result<Vec<Hits>> {
        let mut all = Vec::with_capacity(plan.rules.len());
        for (ordinal, rule) in plan.rules.iter().enumerate() {
            let mut sum = Hits::default();
            for (index, part) in rule.entries.iter().enumerate() {
                let (stats, connections) =
                    self.prepared.reach().injector.stats(part.entry.state)?;
                if index == 0 {
                    // The arms of a mix all see the same packets.
                    sum.stats = stats;
                    sum.connections = connections;
                    continue;
                }
                sum.stats.hit_packets += stats.hit_packets;
                sum.stats.hit_segments += stats.hit_segments;
                sum.stats.hit_bytes += stats.hit_bytes;
            }
            if let Some(past) = self.past.get(ordinal) {
                sum.add(past);
            }
            all.push(sum);
        }
        Ok(all)
    }

    /// Where processes connected to; nothing where that was not counted.
    ///
    /// # Errors
    /// The kernel refuses to read the map.
    pub fn endpoints(&self) -> Result<Option<Endpoints>> {
        self.prepared.reach().injector.endpoints()
    }

    /// How many packets passed for each reason: by [`Counter`].
    ///
    /// # Errors
    /// The kernel refuses to read the map.
    pub fn counters(&self) -> Result<Vec<u64>> {
        let mut counters = self.prepared.reach().injector.counters()?;
        for (counter, past) in counters.iter_mut().zip(&self.past_counters) {
            *counter += past;
        }
        Ok(counters)
    }

    /// How many packets passed for one reason.
    ///
    /// # Errors
    /// The kernel refuses to read the map.
    pub fn counter(&self, counter: Counter) -> Result<u64> {
        self.prepared.reach().injector.counter(counter)
    }

    /// What has been learned of the names that rules are aimed at.
    ///
    /// # Errors
    /// The kernel refuses to read a map.
    pub fn learned(&self) -> Result<Vec<LearnedName>> {
        self.prepared.reach().injector.learned()
    }

    /// What the delay line has done, where there is one.
    #[must_use]
    pub fn delay_line(&self) -> Option<Arc<Figures>> {
        let reach = self.prepared.reach();
        reach.delay_line.as_ref().map(DelayLine::figures)
    }

    /// What the qdiscs that hold packets have lost because they were full.
    ///
    /// # Errors
    /// The kernel refuses to list them.
    pub fn losses(&self) -> Result<Vec<Loss>> {
        let reach = self.prepared.reach();
        let qdiscs = reach.qdiscs.as_ref();
        Ok(qdiscs.map(Qdiscs::losses).transpose()?.unwrap_or_default())
    }

    /// The names of the interfaces that have gone and not come back, among those that the rules were to be on
    /// whatever happens: all where none that appear later are asked for, else those that were named.
    ///
    /// # Errors
    /// The kernel refuses to list them.
    pub fn vanished(&self) -> Result<Vec<String>> {
        let mut reach = self.prepared.reach();
        let selection = self.prepared.later_interfaces.as_ref().map(InterfaceWatcher::selection);
        if selection == Some(&Selection::Default) {
            return Ok(Vec::new());
        }
        let there = list_by(&mut reach.netlink)?;
        let is_gone = |name: &&String| !there.iter().any(|one| one.name == **name);
        Ok(reach.names.iter().filter(is_gone).cloned().collect())
    }

    /// Takes everything away again.
    ///
    /// # Errors
    /// A filter or qdisc that can't be removed.
    pub fn remove(self) -> Result<()> {
        self.prepared.remove()
    }
}

impl PreparedInjection {
    fn remove(mut self) -> Result<()> {
        self.settle()
    }

    /// Takes away all but the programs, which go with this.
    fn settle(&mut self) -> Result<()> {
        self.later_interfaces = None;
        self.idle = Idle::default();
        self.reach().settle()
    }
}

impl Hits {
    /// Adds what was done elsewhere.
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
