//! A plan in force: programs loaded and attached, rules installed, and all of it taken back.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use fault_common::abi::{Counter, DecisionKey, PLACES, RULES_MAX, RuleEntry, RuleStats, holder};
use nix::errno::Errno;

use super::clock::monotonic_ns;
use super::clsact;
use super::events::Events;
use super::injector::{Attachment, Capacity, Clock, Injector, Marker, Options, Side};
use super::interfaces::{self, Interface, Selection, list, list_by};
use super::leftovers::{Change, Journal};
use super::needs::Needs;
use super::netlink::Netlink;
use super::newcomers::Newcomers;
use super::qdisc::leaf;
use super::ruleset::{PacketRule, Scope, Tables, compile};
use super::version;
use super::xdp::{self, Mode, XdpLink};
use crate::plan::Plan;
use crate::process::cgroup::Cgroup;
use crate::process::proc::{open_pidfd, open_sockets, take_descriptor};
use crate::shaping::line::{DelayLine, Figures};
use crate::shaping::qdiscs::{Kind, Loss, Qdiscs};
use crate::shaping::schedule::Shapers;
use crate::shaping::tap::Tap;
use crate::shaping::ways::Ways;
use crate::tell::tell;

/// What the caller decides about an injection.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Report decisions that fire as events.
    pub events: bool,
    /// The rules are going to be replaced: room for others, with other faults.
    pub live: bool,
    /// Repeat these decisions instead of making new ones.
    pub replay: Option<Arc<[(DecisionKey, u64)]>>,
    /// Force one way of attaching.
    pub attachment: Option<Attachment>,
    /// Where packets that arrive are judged first.
    pub front: Front,
    /// Which of the interfaces that appear later the rules are put on too; none of them without this.
    pub newcomers: Option<Selection>,
}

/// Where packets that arrive are judged first, when the rules leave the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Front {
    /// In the tc program: it can do everything, and costs the traffic that no rule is about nothing more.
    #[default]
    Tc,
    /// In the driver, where it can and is a real one: a veth's peer would have to send without offload.
    NativeXdp,
    /// In the driver, or else in front of the network stack.
    Xdp,
}

/// Programs attached, rules not yet in force.
pub struct Prepared {
    /// Goes first: it works on the rest.
    newcomers: Option<Newcomers>,
    reach: Arc<Mutex<Reach>>,
    tables: Tables,
}

/// The programs, and all that they are on.
pub(super) struct Reach {
    injector: Injector,
    interfaces: Vec<Interface>,
    /// The names of all interfaces that there have been.
    names: Vec<String>,
    /// Interfaces that rules could not be put on, which has been said.
    refused: BTreeSet<u32>,
    /// Where packets that are held can go on, where any are.
    ways: Option<Ways>,
    journal: Option<Journal>,
    qdiscs: Option<Qdiscs>,
    delay_line: Option<DelayLine>,
    xdp: Vec<XdpLink>,
    notes: Vec<String>,
    /// Of the network namespace that all this is in.
    netlink: Netlink,
}

/// Rules in force. Dropping this heals, and [`Injection::heal`] also says how that went.
pub struct Injection {
    prepared: Prepared,
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

/// Loads and attaches the programs for a plan. Nothing acts before [`Prepared::start`].
///
/// # Errors
/// The kernel refuses, or an interface can't be used; whatever had been attached is taken away.
pub fn prepare(plan: &Plan, interfaces: &[Interface], wishes: &Wishes) -> Result<Prepared> {
    prepare_noting(plan, interfaces, wishes, None)
}

/// As [`prepare`], for a caller who has begun this process's journal already.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_noting(
    plan: &Plan,
    interfaces: &[Interface],
    wishes: &Wishes,
    journal: Option<Journal>,
) -> Result<Prepared> {
    let mut journal = journal;
    let qdiscs = match plan.qdiscs()? {
        Some(kind) => Some(Qdiscs::install(kind, interfaces, |change| {
            note(&mut journal, change)
        })?),
        None => None,
    };
    prepare_behind(qdiscs, plan, interfaces, wishes, journal)
}

/// As [`prepare_noting`], with the qdiscs that hold packets there already.
fn prepare_behind(
    qdiscs: Option<Qdiscs>,
    plan: &Plan,
    interfaces: &[Interface],
    wishes: &Wishes,
    journal: Option<Journal>,
) -> Result<Prepared> {
    let entries = plan.entries();
    let tables = compile(&entries)?;
    let tap = if plan.needs_delay_line() {
        Some(Tap::create()?)
    } else {
        None
    };
    let mut options = if wishes.live {
        live_options(&tables, wishes)?
    } else {
        fixed_options(plan, &entries, &tables, wishes)?
    };
    options.tap = tap.as_ref().map(Tap::index);
    if let Some(qdiscs) = &qdiscs {
        options.holder = plan.held_by.holder();
        options.detour = qdiscs.detour().map(|(near, _)| near.index);
        options.places = PLACES / 2;
    }
    let decisions = wishes.replay.as_deref();
    options.replay = match decisions {
        Some(decisions) => Some(u32::try_from(decisions.len())?),
        None => None,
    };
    let front = choose_front(&entries, wishes);
    options.xdp = front.is_ok_and(|front| front != Front::Tc);
    let mut injector = Injector::load(&options)?;
    injector.repeat(decisions.unwrap_or_default())?;
    let mut reach = Reach {
        injector,
        interfaces: interfaces.to_vec(),
        names: interfaces.iter().map(|one| one.name.clone()).collect(),
        refused: BTreeSet::new(),
        ways: None,
        journal,
        qdiscs,
        delay_line: None,
        netlink: Netlink::route()?,
        xdp: Vec::new(),
        notes: Vec::new(),
    };
    let attached = reach.attach_all(tap, &plan.shapers());
    // Some vendors' kernels have the version of TCX but not TCX itself.
    if attached.is_err()
        && wishes.attachment.is_none()
        && reach.injector.attachment() == Attachment::Tcx
        && attached.as_ref().is_err_and(is_tcx_missing)
    {
        let (qdiscs, journal) = (reach.qdiscs.take(), reach.journal.take());
        drop(reach);
        let wishes = Wishes {
            attachment: Some(Attachment::Clsact),
            ..wishes.clone()
        };
        return prepare_behind(qdiscs, plan, interfaces, &wishes, journal);
    }
    attached?;
    match front {
        Ok(front) => reach.attach_xdp(front)?,
        Err(reason) => reach.notes.push(format!("XDP is not used: {reason}")),
    }
    let reach = Arc::new(Mutex::new(reach));
    let newcomers = wishes
        .newcomers
        .clone()
        .map(|selection| Newcomers::watch(selection, Arc::clone(&reach)))
        .transpose()?;
    Ok(Prepared {
        newcomers,
        reach,
        tables,
    })
}

/// Where packets are judged first; an error when what was wished for can't be.
fn choose_front(entries: &[PacketRule], wishes: &Wishes) -> Result<Front, &'static str> {
    if wishes.front == Front::Tc {
        return Ok(Front::Tc);
    }
    let suits = if wishes.live {
        Err("the rules are going to be replaced by others")
    } else if !version::at_least(5, 12) {
        Err("it needs Linux 5.12")
    } else {
        xdp::suits(entries)
    };
    match (suits, wishes.front) {
        (Ok(()), front) => Ok(front),
        (Err(reason), Front::Xdp) => Err(reason),
        // Nobody asked for it.
        (Err(_), _) => Ok(Front::Tc),
    }
}

/// For rules that stay as they are: what they don't need is left out.
fn fixed_options(
    plan: &Plan,
    entries: &[PacketRule],
    tables: &Tables,
    wishes: &Wishes,
) -> Result<Options> {
    Ok(Options {
        capacity: Capacity::of(tables)?,
        events: wishes.events,
        attachment: wishes.attachment,
        needs: Needs::of(entries),
        scoped: entries.iter().any(|rule| rule.scope.is_some()),
        matches: entries.len(),
        clock: if plan.holds() || entries.iter().any(|rule| has_window(&rule.entry)) {
            Clock::Exact
        } else {
            Clock::Tick
        },
        once: true,
        tap: None,
        holder: holder::DELAY_LINE,
        detour: None,
        places: 0,
        replay: None,
        xdp: false,
    })
}

/// For rules that others are going to follow.
fn live_options(tables: &Tables, wishes: &Wishes) -> Result<Options> {
    /// Room for so many times what the first rules need.
    const ROOM: u32 = 4;
    let needed = Capacity::of(tables)?;
    Ok(Options {
        capacity: Capacity {
            rules: (needed.rules * ROOM).clamp(256, RULES_MAX),
            classes: (needed.classes * ROOM).max(1024),
            hosts: (needed.hosts * ROOM).max(256),
            scopes: (needed.scopes * ROOM).max(16),
        },
        events: wishes.events,
        attachment: wishes.attachment,
        needs: Needs::ALL,
        scoped: true,
        matches: usize::MAX,
        clock: Clock::Exact,
        once: true,
        tap: None,
        holder: holder::DELAY_LINE,
        detour: None,
        places: 0,
        replay: None,
        xdp: false,
    })
}

fn has_window(rule: &RuleEntry) -> bool {
    rule.at_ns != 0 || rule.length_ns != 0 || rule.period_ns != 0
}

/// Notes a change that outlives this process, before it is made.
fn note(journal: &mut Option<Journal>, change: Change) -> Result<()> {
    let begun = match journal.take() {
        Some(journal) => journal,
        None => Journal::create()?,
    };
    journal.insert(begun).record(change)
}

/// Lets the programs work with qdiscs that hold packets.
fn serve(injector: &mut Injector, qdiscs: &Qdiscs) -> Result<()> {
    if let Kind::Netem(delays_ns) = qdiscs.kind() {
        let leaves: Vec<_> = (0..)
            .zip(delays_ns)
            .map(|(number, delay_ns)| (*delay_ns, leaf(number)))
            .collect();
        injector.write_leaves(&leaves)?;
    }
    let Some((near, far)) = qdiscs.detour() else {
        return Ok(());
    };
    if injector.attachment() == Attachment::Clsact {
        // The devices go with the rules, and their filters with them.
        clsact::ensure(near.index)?;
        clsact::ensure(far.index)?;
    }
    injector.serve_detour(near, far, *qdiscs.kind() == Kind::Fq)
}

/// Whether the kernel has no TCX, as opposed to having something against this attachment.
fn is_tcx_missing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| {
            matches!(
                io.raw_os_error().map(Errno::from_raw),
                Some(Errno::EINVAL | Errno::EOPNOTSUPP)
            )
        })
    })
}

impl Reach {
    fn attach_all(&mut self, tap: Option<Tap>, shapers: &Shapers) -> Result<()> {
        if self.injector.attachment() == Attachment::Clsact {
            for interface in self.interfaces.clone() {
                self.make_clsact(interface.index)?;
            }
        }
        if tap.is_some() || self.qdiscs.is_some() {
            self.injector.write_spreads()?;
            self.ways = Some(Ways::default());
        }
        if let Some(tap) = tap {
            self.start_delay_line(tap, shapers)?;
        }
        if let Some(qdiscs) = &self.qdiscs {
            serve(&mut self.injector, qdiscs)?;
        }
        for interface in self.interfaces.clone() {
            self.open_ways(interface.index)?;
        }
        let mut places = Vec::new();
        for interface in &self.interfaces {
            places.push((interface, Side::Egress));
            // What passes loopback leaves before it arrives: it is judged when it leaves.
            if !interface.loopback {
                places.push((interface, Side::Ingress));
            }
        }
        self.injector.attach_all(&places)
    }

    /// The qdisc that the programs are attached to on kernels without TCX.
    fn make_clsact(&mut self, interface_index: u32) -> Result<()> {
        self.record(Change::Clsact { interface_index })?;
        clsact::ensure(interface_index)?;
        self.record(Change::Filters { interface_index })
    }

    /// Lets packets that are held go on at an interface, where any are held.
    fn open_ways(&mut self, interface_index: u32) -> Result<()> {
        let Some(ways) = &mut self.ways else {
            return Ok(());
        };
        let detoured = self
            .qdiscs
            .as_ref()
            .is_some_and(|qdiscs| qdiscs.detour().is_some());
        for (number, inwards) in ways.open(interface_index)? {
            self.injector
                .open_way(number, interface_index, inwards, detoured)?;
        }
        Ok(())
    }

    /// Puts the rules on the interfaces that have come since, and leaves those that have gone.
    pub(super) fn meet(&mut self, selection: &Selection) -> Result<()> {
        let there = list_by(&mut self.netlink)?;
        self.leave_gone(&there, selection);
        for interface in interfaces::wanted(&there, selection) {
            let known = self
                .interfaces
                .iter()
                .any(|one| one.index == interface.index);
            if known || self.refused.contains(&interface.index) {
                continue;
            }
            let name = &interface.name;
            match self.include(interface) {
                Ok(()) => {
                    log::info!("{name} has appeared: the rules act there too");
                    self.interfaces.push(interface.clone());
                    if !self.names.contains(name) {
                        self.names.push(name.clone());
                    }
                }
                Err(error) => self.refuse(interface, &error)?,
            }
        }
        Ok(())
    }

    /// Forgets interfaces that are gone. One that was named is missed.
    fn leave_gone(&mut self, there: &[Interface], selection: &Selection) {
        let is_there = |index| there.iter().any(|one| one.index == index);
        self.refused.retain(|index| is_there(*index));
        let all = std::mem::take(&mut self.interfaces);
        let (left, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| is_there(one.index));
        self.interfaces = left;
        for Interface { index, name, .. } in gone {
            self.leave(index);
            if matches!(selection, Selection::Names(_)) {
                tell!("fault: {name} has vanished: nothing is hurt there until it is back");
            }
        }
    }

    fn leave(&mut self, interface_index: u32) {
        self.injector.leave(interface_index);
        if let Some(ways) = &mut self.ways {
            ways.close(interface_index);
        }
    }

    /// Puts the rules on one more interface.
    fn include(&mut self, interface: &Interface) -> Result<()> {
        if let Some(qdiscs) = &mut self.qdiscs {
            let journal = &mut self.journal;
            qdiscs.include(interface, |change| note(journal, change))?;
        }
        self.open_ways(interface.index)?;
        if self.injector.attachment() == Attachment::Clsact {
            self.make_clsact(interface.index)?;
        }
        for side in [Side::Egress, Side::Ingress] {
            self.injector.attach(interface, side)?;
        }
        Ok(())
    }

    /// Says that an interface is left alone, unless it has gone already.
    fn refuse(&mut self, interface: &Interface, error: &anyhow::Error) -> Result<()> {
        self.leave(interface.index);
        let there = list_by(&mut self.netlink)?;
        if there.iter().any(|one| one.index == interface.index) {
            tell!(
                "fault: {} has appeared, but the rules can't be put on it: {error:#}",
                interface.name
            );
            self.refused.insert(interface.index);
        }
        Ok(())
    }

    /// Puts the XDP program in front of the tc programs that see packets arrive. Where it can't be, tc does all.
    fn attach_xdp(&mut self, front: Front) -> Result<()> {
        let modes: &[Mode] = match front {
            Front::Tc => return Ok(()),
            Front::NativeXdp => &[Mode::Native],
            Front::Xdp => &[Mode::Native, Mode::Generic],
        };
        for interface in &self.interfaces {
            let virtually = front == Front::NativeXdp && interface.kind.is_some();
            if interface.loopback || !interface.ethernet || virtually {
                continue;
            }
            let program = self.injector.xdp_program()?.fd()?.as_fd();
            let mut attached = Err(Errno::EOPNOTSUPP);
            for mode in modes {
                attached = XdpLink::attach(program, interface.index, *mode);
                if matches!(attached, Ok(_) | Err(Errno::EBUSY)) {
                    break;
                }
            }
            match attached {
                Ok(link) => self.xdp.push(link),
                Err(error) if front == Front::Xdp => self.notes.push(not_by_xdp(interface, error)),
                // Nobody asked for it.
                Err(_) => {}
            }
        }
        if front == Front::Xdp && self.xdp.is_empty() && self.notes.is_empty() {
            self.notes
                .push("XDP is not used: what passes loopback is judged as it leaves".to_owned());
        }
        Ok(())
    }

    /// Notes a change that outlives this process, before it is made.
    fn record(&mut self, change: Change) -> Result<()> {
        note(&mut self.journal, change)
    }

    /// Starts the delay line behind the programs.
    fn start_delay_line(&mut self, tap: Tap, shapers: &Shapers) -> Result<()> {
        let device = list()?
            .into_iter()
            .find(|interface| interface.index == tap.index())
            .context("the tap device has vanished")?;
        if self.injector.attachment() == Attachment::Clsact {
            // The device goes with this process, and its filters with it.
            clsact::ensure(device.index)?;
        }
        let holds = self.injector.serve_delay_line(&device)?;
        if self.interfaces.iter().any(|interface| interface.loopback) {
            self.let_loopback_come_back()?;
        }
        let ways = self.ways.get_or_insert_default();
        self.delay_line = Some(DelayLine::start(tap, holds, ways.places(), shapers)?);
        Ok(())
    }

    /// A packet of loopback loses its route on the way through the delay line. Without it the kernel takes IPv4's local
    /// addresses from nobody, unless told to.
    fn let_loopback_come_back(&mut self) -> Result<()> {
        for name in [
            "net/ipv4/conf/lo/accept_local",
            "net/ipv4/conf/lo/route_localnet",
        ] {
            let path = Path::new("/proc/sys").join(name);
            let before = std::fs::read_to_string(&path)
                .with_context(|| format!("reading {}", path.display()))?
                .trim()
                .to_owned();
            if before == "1" {
                continue;
            }
            self.record(Change::Sysctl {
                name: name.to_owned(),
                before,
                after: "1".to_owned(),
            })?;
            std::fs::write(&path, "1").with_context(|| {
                format!(
                    "holding packets of loopback needs {}, which can't be written: use --interface for another one",
                    path.display()
                )
            })?;
        }
        Ok(())
    }
}

impl Prepared {
    fn reach(&self) -> MutexGuard<'_, Reach> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the user should know of how the rules are carried out.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.reach().notes.clone()
    }

    /// Lets sockets that are made in `scope` from now on be known by it; [`Prepared::adopt`] is for those
    /// that are open there already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&mut self, scope: &Scope) -> Result<()> {
        self.reach().injector.watch_cgroup(&scope.path)
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
    pub fn start(self) -> Result<Injection> {
        let epoch_ns = monotonic_ns();
        self.reach().injector.install(&self.tables, epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: Instant::now(),
            epoch_ns,
            age: 1,
            past: Vec::new(),
            past_counters: Vec::new(),
        })
    }

    /// As [`Prepared::start`], for the rules' time and the plans that there have been: see [`Injection::follow`].
    ///
    /// # Errors
    /// The kernel refuses a map.
    pub fn start_after(self, old: &Injection) -> Result<Injection> {
        self.reach().injector.install(&self.tables, old.epoch_ns)?;
        Ok(Injection {
            prepared: self,
            started: old.started,
            epoch_ns: old.epoch_ns,
            age: old.age,
            past: Vec::new(),
            past_counters: Vec::new(),
        })
    }

    /// The decisions that fire, when they were asked for.
    ///
    /// # Errors
    /// They have been taken already.
    pub fn take_events(&mut self) -> Result<Events> {
        self.reach().injector.take_events()
    }
}

fn not_by_xdp(interface: &Interface, error: Errno) -> String {
    let name = &interface.name;
    match error {
        Errno::EBUSY => {
            format!(
                "XDP is not used on {name}: another program is there already (`ip link show {name}` tells)"
            )
        }
        error => format!("XDP is not used on {name}: the kernel refuses it ({error})"),
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
    /// the one set or by the other. Needs [`Wishes::live`].
    ///
    /// # Errors
    /// More rules than there is room for; then the old ones stay in force.
    pub fn replace(&mut self, old: &Plan, plan: &mut Plan) -> Result<()> {
        let elapsed_ns = monotonic_ns() - self.epoch_ns;
        self.can_hold(plan)?;
        plan.succeed(old, self.age + 1, elapsed_ns)?;
        let tables = compile(&plan.entries())?;
        self.prepared
            .reach()
            .injector
            .install(&tables, self.epoch_ns)?;
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
    pub fn move_to(&mut self, plan: &Plan, prepared: Prepared) -> Result<()> {
        let (past, past_counters) = (self.hits(plan)?, self.counters()?);
        prepared
            .reach()
            .injector
            .install(&prepared.tables, self.epoch_ns)?;
        self.past = past;
        self.past_counters = past_counters;
        std::mem::replace(&mut self.prepared, prepared).heal()
    }

    /// Puts the rules of `plan` in force, except those whose places are in `off`. What rules remember and counted stays.
    ///
    /// # Errors
    /// The kernel refuses; then all stays as it was.
    pub fn leave_out(&mut self, plan: &Plan, off: &BTreeSet<usize>) -> Result<()> {
        let entries: Vec<_> = plan
            .rules
            .iter()
            .enumerate()
            .filter(|(index, _)| !off.contains(index))
            .flat_map(|(_, rule)| rule.entries.iter().cloned())
            .collect();
        let tables = compile(&entries)?;
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
        let selection = self.prepared.newcomers.as_ref().map(Newcomers::selection);
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
    pub fn heal(self) -> Result<()> {
        self.prepared.heal()
    }
}

impl Prepared {
    fn heal(mut self) -> Result<()> {
        self.settle()
    }

    /// Takes away all but the programs, which go with this.
    fn settle(&mut self) -> Result<()> {
        self.newcomers = None;
        self.reach().settle()
    }
}

impl Reach {
    /// Takes away all but the programs, which go with this.
    fn settle(&mut self) -> Result<()> {
        let journal = self.journal.take();
        self.injector.rest();
        if let Some(line) = self.delay_line.take() {
            // Nothing is handed over any more; what is held goes on at once.
            line.finish()?;
        }
        if let Some(qdiscs) = self.qdiscs.take() {
            for Loss { interface, packets } in qdiscs.drain()? {
                tell!("fault: {packets} packets that {interface} still held were lost");
            }
        }
        let left = journal.map(Journal::heal).unwrap_or_default();
        if let Some(left) = left.first() {
            anyhow::bail!("{left}: run `fault clean`");
        }
        Ok(())
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
