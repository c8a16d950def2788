//! The loaded programs with their maps.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues, SkStorage};
use aya::programs::{CgroupSkb, CgroupSock, SchedClassifier, Xdp};
use fault_common::abi::{
    COUNTERS, Counter, DecisionKey, Flow, FlowRule, FlowRuleKey, HOLDS, LEARNED_MAX, MATCHES_MAX,
    NAMED_WORDS, Owner, PLACES, PortClasses, RuleEntry, RuleState, RuleStats, ScopeKey, SetHeader,
    clock, holder, line, protocol,
};

use fault_common::delay::{TABLE_ENTRIES, distribution};
use fault_common::dns::DockerPorts;
use fault_common::flow::FlowKey;

use super::connections;
use super::distributions;
use super::endpoints;
use super::places::{self, HookPoint, RELEASE, Reservation, unless_vanished};
use crate::hold::line::LineMaps;
use crate::inject::connections::Connections;
use crate::inject::endpoints::Endpoints;
use crate::inject::names::{LearnedAddresses, LearnedName, NumberedNames};
use crate::inject::records::{DecisionEvents, Traces};
use crate::plan::needs::Needs;
use crate::plan::tables::RuleTables;
use crate::sys::bpf::cgroup_link::{CgroupLink, Hook};
use crate::sys::bpf::grace;
use crate::sys::bpf::lease::Lease;
use crate::sys::bpf::link;
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::bpf::object::{self, OBJECT, check_abi, mapped, new_loader};
use crate::sys::clock::monotonic_ns;
use crate::sys::net::clsact::{self, TcHook};
use crate::sys::net::interfaces::Interface;
use crate::sys::version;
use crate::tell::step;
use crate::undo::instance::Marks;

/// The attachment of programs to interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// A TCX link (Linux 6.6), removed when this process ends.
    Tcx,
    /// A clsact qdisc and a netlink filter. After a kill it stays, but stops acting when the lease expires.
    Clsact,
}

impl Attachment {
    /// The best one that a kernel of this version should have.
    #[must_use]
    pub fn of_kernel() -> Self {
        if version::at_least(6, 6) {
            Self::Tcx
        } else {
            Self::Clsact
        }
    }
}

impl std::fmt::Display for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// The resolution of the programs' clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockResolution {
    /// To the nanosecond, for rules with windows.
    Exact,
    /// The kernel's last tick, a few milliseconds: sufficient for the lease, and faster. With links instead of the
    /// lease the time is not read at all. Events have exact times in any case.
    Tick,
}

/// The sizes of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rules; rounded up to a multiple of 64.
    pub rules: u32,
    /// Distinct classes of ports, hosts and scopes.
    pub classes: u32,
    /// Hosts named by rules.
    pub hosts: u32,
    /// Names whose addresses are learned.
    pub names: u32,
    /// Cgroups named by rules.
    pub scopes: u32,
    /// Entries of the connection table.
    pub connections: u32,
}

impl Capacity {
    /// The smallest sizes for a rule set that is not replaced.
    ///
    /// # Errors
    /// None for tables that [`crate::plan::tables::compile`] made.
    pub fn of(tables: &RuleTables) -> Result<Self> {
        Ok(Self {
            rules: u32::try_from(tables.words() * 64)?,
            classes: u32::try_from(tables.classes.len())?,
            hosts: u32::try_from(tables.hosts.len().max(1))?,
            names: u32::try_from(tables.names.len())?,
            scopes: u32::try_from(tables.scopes.len().max(1))?,
            connections: connections::capacity(),
        })
    }

    fn words(self) -> u32 {
        self.rules.div_ceil(64).max(1)
    }
}

/// The options for loading the programs.
#[expect(clippy::struct_excessive_bools, reason = "each says something else")]
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Map sizes.
    pub capacity: Capacity,
    /// Whether decisions that fire are reported as events.
    pub events: bool,
    /// Whether the programs tell what they do with each packet that reaches a rule's port.
    pub trace: bool,
    /// Forces an attachment; default: TCX if supported.
    pub attachment: Option<Attachment>,
    /// The features that the rules need.
    pub needs: Needs,
    /// Whether rules may be limited to cgroups.
    pub scoped: bool,
    /// Upper bound of the rules that match one packet.
    pub matches: usize,
    /// Index of the delay line's tap device, if there is one.
    pub tap: Option<u32>,
    /// The mechanism that holds packets: see [`fault_common::abi::holder`].
    pub holder: u32,
    /// Index of the near end of the detour, if qdiscs hold incoming packets.
    pub detour: Option<u32>,
    /// The number of interfaces on which packets can be held.
    pub places: u32,
    /// Index of the device that divides super-packets, if there is one.
    pub divider: Option<u32>,
    /// The number of decisions to replay; `None` to make new ones.
    pub replay: Option<u32>,
    /// Whether an XDP program may be attached in front of the tc programs.
    pub xdp: bool,
    /// The ports of Docker's DNS server in this network namespace.
    pub docker_ports: DockerPorts,
    /// The resolution of the programs' clock.
    pub clock: ClockResolution,
    /// The number of this instance among those of the network namespace.
    pub number: u32,
    /// The marks by which a packet carries that this instance has processed it.
    pub marks: Marks,
}

/// The program at the near end of the detour.
const DETOUR: &str = "fault_detour";
/// ICMP echo requests that are remembered to match their replies; the oldest are forgotten: [`Counter::EchoForgotten`].
const ECHOES: u32 = 65_536;

/// The size of the ring buffer that tells what was done with packets: a power of two.
const TRACE_BYTES: u32 = 1 << 20;

/// The program for XDP.
const XDP: &str = "fault_xdp";

/// Large maps of the object's other programs, which are loaded with maps of their own, and the smallest sizes that they
/// may have here.
const ELSEWHERE: [(&str, u32); 4] = [
    ("STEER_PORTS", 1),
    ("RELAY_PORTS", 1),
    ("HANDSHAKE_EVENTS", 1 << 12),
    ("WITNESSES", 1 << 12),
];

/// Key of the map of hosts.
#[repr(C)]
#[derive(Clone, Copy)]
struct HostKey {
    generation: u32,
    address: [u8; 16],
}

// SAFETY: `repr(C)` without padding; any bit pattern is a key.
unsafe impl aya::Pod for HostKey {}

/// Marks a socket as belonging to a scope.
pub type Marker = std::sync::Arc<dyn Fn(BorrowedFd<'_>) -> std::io::Result<()> + Send + Sync>;

/// The loaded programs with their maps. [`Injector::attach`] attaches them.
pub struct Injector {
    attachment: Attachment,
    /// The number of this instance.
    number: u32,
    capacity: Capacity,
    /// Whether the kernel lacks fetching atomics (before 5.12).
    old: bool,
    scope_version: u32,
    events_wanted: bool,
    rules: MappedArray<RuleEntry>,
    ports: MappedArray<PortClasses>,
    named: MappedArray<u64>,
    summaries: MappedArray<u64>,
    vectors: MappedArray<u64>,
    /// The number of applied rules.
    active_rules: u32,
    /// Index of the device that divides super-packets; 0 without one.
    divider: u32,
    lease: Lease,
    connections: Connections,
    cgroup_links: Vec<CgroupLink>,
    /// The network namespace of counted endpoints, and whether others are left out.
    endpoints_of: Option<(u64, bool)>,
    /// The links of programs attached by TCX, with the indexes of their interfaces.
    links: Vec<(u32, OwnedFd)>,
    names: NumberedNames,
    ebpf: Ebpf,
}

impl Injector {
    /// Creates the maps. Programs are loaded into the kernel when they are attached, and do nothing
    /// before [`Injector::install`].
    ///
    /// # Errors
    /// The object has another version, privileges are missing, or the kernel has no BPF.
    pub fn load(options: &LoadOptions) -> Result<Self> {
        let _step = step(format_args!("creating the maps"));
        check_abi(OBJECT)?;
        let attachment = options.attachment.unwrap_or_else(Attachment::of_kernel);
        let capacity = options.capacity;
        let mut ebpf = create_maps(options, attachment)?;
        let control = mapped(&mut ebpf, "CONTROL", 1)?;
        let lease = Lease::start(control, attachment == Attachment::Tcx)?;
        let connections = Connections::look_after(&mut ebpf)?;
        Ok(Self {
            attachment,
            number: options.number,
            capacity,
            old: is_old(),
            scope_version: 0,
            events_wanted: options.events,
            rules: mapped(&mut ebpf, "RULES", 2 * capacity.words() * 64)?,
            ports: mapped(&mut ebpf, "PORTS", 2 << 16)?,
            named: mapped(&mut ebpf, "NAMED", 2 * NAMED_WORDS)?,
            summaries: mapped(&mut ebpf, "SUMMARIES", 2 * capacity.classes)?,
            vectors: mapped(
                &mut ebpf,
                "VECTORS",
                2 * capacity.classes * capacity.words(),
            )?,
            active_rules: 0,
            divider: options.divider.unwrap_or(0),
            lease,
            connections,
            cgroup_links: Vec::new(),
            endpoints_of: None,
            links: Vec::new(),
            names: NumberedNames::default(),
            ebpf,
        })
    }

    /// The attachment of the programs.
    #[must_use]
    pub fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// The name of the program for one side of an interface.
    fn program_name(&self, side: TcHook, link_header: bool) -> &'static str {
        program_name(side, link_header, self.old)
    }

    /// The program for one side of an interface, loaded. `link_header` says whether its packets begin
    /// with an Ethernet header.
    ///
    /// # Errors
    /// The kernel rejects the program; the error is one line.
    pub fn program(&mut self, side: TcHook, link_header: bool) -> Result<&mut SchedClassifier> {
        let name = self.program_name(side, link_header);
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, name)?;
        load_classifier(name, program)?;
        Ok(program)
    }

    /// Attaches the programs of all these places: to those that are reserved, or else as [`Injector::attach`] does. Those
    /// on devices of this process are not reserved. The programs are verified in parallel. Interfaces that have
    /// disappeared are left out.
    ///
    /// # Errors
    /// As [`Injector::attach`].
    pub(super) fn attach_all(
        &mut self,
        places: &[HookPoint],
        reservation: Option<Reservation>,
    ) -> Result<()> {
        self.load_all(places)?;
        let Some(reservation) = reservation else {
            for place in places {
                let HookPoint {
                    interface, side, ..
                } = place;
                let attached = self.attach_at(place.program, interface, *side);
                unless_vanished(interface, attached)?;
            }
            return Ok(());
        };
        let links = {
            let _step = step(format_args!("waiting until all are attached"));
            reservation.links()?
        };
        let (own, others): (Vec<_>, Vec<_>) = places.iter().partition(|one| one.is_on_own_device());
        for place in own {
            let attached = self.attach_to_own_device(place);
            unless_vanished(&place.interface, attached)?;
        }
        for (place, link) in others.into_iter().zip(links) {
            let Some(link) = link else {
                continue;
            };
            let program: &mut SchedClassifier = object::program(&mut self.ebpf, place.program)?;
            let updated = link::update(link.as_fd(), program.fd()?.as_fd())
                .with_context(|| format!("attaching to {}", place.interface.name));
            if unless_vanished(&place.interface, updated)?.is_some() {
                self.links.push((place.interface.index, link));
            }
        }
        Ok(())
    }

    /// Attaches to a device of this process by a netlink filter, which waits for no grace period; by TCX on a kernel that
    /// has no such filters.
    fn attach_to_own_device(&mut self, place: &HookPoint) -> Result<()> {
        let (name, device) = (place.program, &place.interface);
        let filtered = clsact::ensure(device.index)
            .and_then(|_created| self.attach_by(Attachment::Clsact, name, device, place.side));
        filtered.or_else(|error| {
            log::debug!("{} gets no filter: {error:#}", device.name);
            self.attach_by(Attachment::Tcx, name, device, place.side)
        })
    }

    /// Loads the programs of these places, each in a thread of its own.
    fn load_all(&mut self, places: &[HookPoint]) -> Result<()> {
        let mut programs = Vec::new();
        for (name, program) in self.ebpf.programs_mut() {
            if let Some(place) = places.iter().find(|place| place.program == name) {
                programs.push((place.program, <&mut SchedClassifier>::try_from(program)?));
            }
        }
        std::thread::scope(|scope| {
            let loading: Vec<_> = programs
                .into_iter()
                .map(|(name, program)| {
                    std::thread::Builder::new()
                        .spawn_scoped(scope, move || load_classifier(name, program))
                        .context("starting a thread to load the programs")
                })
                .collect();
            loading
                .into_iter()
                .try_for_each(|one| one?.join().map_err(|_| anyhow!("a loader panicked"))?)
        })
    }

    /// Attaches to one side of an interface, before every other program. With [`Attachment::Clsact`] the qdisc must
    /// already exist.
    ///
    /// # Errors
    /// The interface has disappeared, or a system call fails.
    pub fn attach(&mut self, interface: &Interface, side: TcHook) -> Result<()> {
        let name = self.program_name(side, interface.ethernet);
        self.attach_at(name, interface, side)
    }

    /// Detaches all programs that are attached by TCX: each waits for a grace period.
    pub(super) fn detach(&mut self) {
        for (index, link) in self.links.drain(..) {
            let _step = step(format_args!("detaching from interface {index}"));
            drop(link);
        }
    }

    /// The XDP program, loaded.
    ///
    /// # Errors
    /// The kernel rejects the program; the error is one line.
    pub fn xdp_program(&mut self) -> Result<&mut Xdp> {
        let program: &mut Xdp = object::program(&mut self.ebpf, XDP)?;
        if program.fd().is_err() {
            object::loaded(XDP, || program.load())?;
        }
        Ok(program)
    }

    /// The maps shared with a delay line, from whose tap device the program `fault_release` receives packets.
    /// [`Injector::open_way`] sets where they continue.
    ///
    /// # Errors
    /// A system call fails.
    pub fn serve_delay_line(&mut self) -> Result<LineMaps> {
        Ok(LineMaps {
            holds: mapped(&mut self.ebpf, "HOLDS", HOLDS)?,
            released: mapped(&mut self.ebpf, "RELEASED", HOLDS)?,
            state: mapped(&mut self.ebpf, "LINE", line::ENTRIES)?,
        })
    }

    /// Stops passing packets to the delay line: all are let through.
    ///
    /// # Errors
    /// A system call fails.
    pub fn close_delay_line(&mut self) -> Result<()> {
        let mut entries: Array<&mut MapData, u64> = self.map_mut("LINE")?.try_into()?;
        entries.set(line::ALIVE_UNTIL, 0, 0)?;
        Ok(())
    }

    /// Has the programs judge super-packets as one packet each from now on.
    pub fn stop_dividing(&mut self) {
        self.divider = 0;
        self.lease.amend(|control| control.divider = 0);
    }

    /// Tells the programs which interfaces are ports of bridges, as pairs of port index and bridge index.
    ///
    /// # Errors
    /// There are more than [`PLACES`].
    pub fn write_bridge_ports(&mut self, ports: impl Iterator<Item = (u32, u32)>) -> Result<()> {
        let mut known: HashMap<&mut MapData, u32, u32> =
            self.map_mut("BRIDGE_PORTS")?.try_into()?;
        for (port, bridge) in ports {
            known
                .insert(port, bridge, 0)
                .context("noting the ports of bridges")?;
        }
        Ok(())
    }

    /// Registers an interface and a direction under this number, so that held packets can continue there. Once the
    /// inward direction is registered, packets are held on that interface.
    ///
    /// # Errors
    /// A system call fails.
    pub fn open_way(&mut self, number: u16, interface_index: u32, inwards: bool) -> Result<()> {
        let mut releases = mapped(&mut self.ebpf, "RELEASES", PLACES)?;
        let place = u64::from(interface_index) << 1 | u64::from(inwards);
        releases.set(usize::from(number), place);
        if inwards {
            let mut ways: HashMap<&mut MapData, u32, u32> = self.map_mut("WAYS")?.try_into()?;
            ways.insert(interface_index, u32::from(number), 0)?;
        }
        Ok(())
    }

    /// Releases an interface that has disappeared: containers that restart must not leak descriptors.
    pub fn leave(&mut self, interface_index: u32) {
        self.links.retain(|(index, _)| *index != interface_index);
        for name in ["WAYS", "BRIDGE_PORTS"] {
            if let Ok(Ok(mut known)) = self
                .map_mut(name)
                .map(HashMap::<&mut MapData, u32, u32>::try_from)
                && let Err(error) = known.remove(&interface_index)
            {
                log::debug!("interface {interface_index} was not in {name}: {error}");
            }
        }
    }

    /// Passes the tables of delay distributions to the programs.
    ///
    /// # Errors
    /// A system call fails.
    pub fn write_spreads(&mut self) -> Result<()> {
        let entries = distribution::TABLES * TABLE_ENTRIES;
        let mut spreads = mapped(&mut self.ebpf, "SPREADS", entries)?;
        for (index, value) in distributions::tables().into_iter().enumerate() {
            spreads.set(index, value);
        }
        Ok(())
    }

    /// Sets up the programs to hold incoming packets, which leave through `near` and return through `far`. `stamped`
    /// says whether packets need a departure time.
    ///
    /// # Errors
    /// A system call fails.
    pub fn serve_detour(&mut self, near: &Interface, far: &Interface, stamped: bool) -> Result<()> {
        self.attach_at(RELEASE, far, TcHook::Ingress)?;
        if stamped {
            self.attach_at(DETOUR, near, TcHook::Egress)?;
        }
        Ok(())
    }

    fn attach_at(&mut self, name: &str, device: &Interface, side: TcHook) -> Result<()> {
        self.attach_by(self.attachment, name, device, side)
    }

    fn attach_by(
        &mut self,
        attachment: Attachment,
        name: &str,
        device: &Interface,
        side: TcHook,
    ) -> Result<()> {
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, name)?;
        load_classifier(name, program)?;
        let program = program.fd()?.as_fd();
        let failed = || format!("attaching to {}", device.name);
        let _step = step(format_args!("attaching to {} ({side:?})", device.name));
        match attachment {
            Attachment::Tcx => {
                let link = places::link(program, device, side).with_context(failed)?;
                self.links.push((device.index, link));
            }
            Attachment::Clsact => {
                clsact::attach(device.index, side, program, name, self.number)
                    .with_context(failed)?;
            }
        }
        Ok(())
    }

    /// Passes the delays of the prio qdisc's classes to the programs, in nanoseconds.
    ///
    /// # Errors
    /// There are too many delays.
    pub fn write_leaves(&mut self, leaves: &[(u64, u32)]) -> Result<()> {
        let mut known: HashMap<&mut MapData, u64, u32> = self.map_mut("LEAVES")?.try_into()?;
        for (delay_ns, class) in leaves {
            known.insert(delay_ns, class, 0)?;
        }
        Ok(())
    }

    /// Passes the decisions to replay to the programs.
    ///
    /// # Errors
    /// There are more than [`LoadOptions::replay`].
    pub fn repeat(&mut self, decisions: &[(DecisionKey, u64)]) -> Result<()> {
        let mut known: HashMap<&mut MapData, DecisionKey, u64> =
            self.map_mut("DECISIONS")?.try_into()?;
        for (key, packet) in decisions {
            known
                .insert(key, packet, 0)
                .context("handing decisions to the programs")?;
        }
        Ok(())
    }

    /// Lets every packet through until the next [`Injector::install`].
    pub fn rest(&mut self) {
        self.lease.end();
    }

    /// Stores the cgroup with each socket that is created in it from now on. Without this, a packet to a listening
    /// socket would not match rules limited to the cgroup.
    ///
    /// # Errors
    /// There is no cgroup2, or privileges are missing.
    pub fn watch_cgroup(&mut self, cgroup: &Path) -> Result<()> {
        const NAME: &str = "fault_socket";
        let program: &mut CgroupSock = object::program(&mut self.ebpf, NAME)?;
        if program.fd().is_err() {
            object::loaded(NAME, || program.load())?;
        }
        let link = CgroupLink::attach(program.fd()?.as_fd(), cgroup, Hook::SocketCreate)?;
        self.cgroup_links.push(link);
        Ok(())
    }

    /// Applies rules to multicast and broadcast datagrams at each receiving socket of a cgroup, which tc can't
    /// distinguish.
    ///
    /// # Errors
    /// There is no cgroup2, or privileges are missing.
    pub fn watch_groups(&mut self, cgroup: &Path) -> Result<()> {
        let name = if self.old {
            "fault_receive_old"
        } else {
            "fault_receive"
        };
        let program: &mut CgroupSkb = object::program(&mut self.ebpf, name)?;
        if program.fd().is_err() {
            object::loaded(name, || program.load())?;
        }
        let link = CgroupLink::attach(program.fd()?.as_fd(), cgroup, Hook::Ingress)?;
        self.cgroup_links.push(link);
        Ok(())
    }

    /// Counts the endpoints that a cgroup's processes connect to, send datagrams to or bind sockets to from now on.
    /// `netns` is the cookie of the rules' network namespace, or 0 if unknown; `only_here` leaves out other namespaces.
    ///
    /// # Errors
    /// There is no cgroup2, or privileges are missing.
    pub fn count_endpoints(
        &mut self,
        cgroup: &std::path::Path,
        netns: u64,
        only_here: bool,
    ) -> Result<()> {
        let links = endpoints::attach(&mut self.ebpf, cgroup)?;
        self.cgroup_links.extend(links);
        self.endpoints_of = Some((netns, only_here));
        Ok(())
    }

    /// The counters of [`Injector::count_endpoints`], if it was called.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn endpoints(&self) -> Result<Option<Endpoints>> {
        self.endpoints_of
            .map(|(netns, only_here)| endpoints::read(&self.ebpf, netns, only_here))
            .transpose()
    }

    /// The connections with an end in the scope of the rules, among those that a rule's ports were looked up for.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn flows_in_scope(&self) -> Result<HashSet<FlowKey>> {
        let map = self.ebpf.map("FLOWS");
        let map = map.context("the eBPF object has no map FLOWS")?;
        let flows: HashMap<&MapData, FlowKey, Flow> = map.try_into()?;
        let mut keys = HashSet::new();
        for entry in &flows {
            let (key, flow) = entry?;
            if flow.scopes != [0, 0] {
                keys.insert(key);
            }
        }
        Ok(keys)
    }

    /// The number of connections that the rule with this [`RuleEntry::uid`] has matched and whose end has not been seen.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn open_connections(&self, uid: u32) -> Result<u64> {
        let flows: HashMap<&MapData, FlowKey, Flow> = self.map("FLOWS")?.try_into()?;
        let apart: HashMap<&MapData, FlowRuleKey, FlowRule> = self.map("FLOW_RULES")?.try_into()?;
        let mut count = 0;
        for entry in &flows {
            let (key, flow) = entry?;
            let (birth, is_open) = (flow.birth, flow.ended != [1, 1]);
            let key = FlowRuleKey {
                flow: key,
                birth,
                uid,
            };
            let is_matched = flow.rules.iter().any(|rule| rule.uid == uid)
                || apart.get(&key, 0).is_ok_and(|rule| rule.uid == uid);
            count += u64::from(is_open && is_matched);
        }
        Ok(count)
    }

    /// Stores a cgroup with an existing socket, as [`Injector::watch_cgroup`] does for new ones.
    ///
    /// # Errors
    /// It is not a socket, or a system call fails.
    pub fn adopt_socket(&mut self, socket: BorrowedFd<'_>, cgroup: u64) -> Result<()> {
        let owner = owner_of(socket, cgroup).context("reading a socket's cookie")?;
        let mut owners: SkStorage<&mut MapData, Owner> =
            self.map_mut("SOCKET_SCOPES")?.try_into()?;
        owners.insert(&socket, owner, 0).context("marking a socket")
    }

    /// Returns a function that marks sockets of this process as belonging to a cgroup. No socket can be adopted
    /// afterwards.
    ///
    /// # Errors
    /// It was already taken.
    pub fn take_marker(&mut self, cgroup: u64) -> Result<Marker> {
        let map = self
            .ebpf
            .take_map("SOCKET_SCOPES")
            .context("the eBPF object has no map SOCKET_SCOPES")?;
        let owners: SkStorage<MapData, Owner> = map.try_into()?;
        let owners = std::sync::Mutex::new(owners);
        Ok(std::sync::Arc::new(move |socket| {
            let owner = owner_of(socket, cgroup)?;
            owners
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .insert(&socket, owner, 0)
                .map_err(std::io::Error::other)
        }))
    }

    /// Applies a rule set atomically: no packet is processed by a mixture of two sets. The rules' times count from
    /// `epoch_ns` (`CLOCK_MONOTONIC`).
    ///
    /// # Errors
    /// The tables exceed the capacity of the maps; then the old set stays applied.
    pub fn install(&mut self, tables: &RuleTables, epoch_ns: u64) -> Result<()> {
        let generation = 1 - self.lease.generation();
        self.check_capacity(tables)?;
        if self.scope_version != 0 {
            grace::wait_for_programs().context("waiting for running programs")?;
        }
        self.scope_version += 1;
        for rule in &tables.rules {
            self.take_state(rule)?;
        }
        self.write_vectors(tables, generation);
        self.write_hosts(tables, generation)?;
        self.names.write(&mut self.ebpf, tables, generation)?;
        self.write_scopes(tables, generation)?;
        let header = SetHeader {
            epoch_ns,
            rules: u32::try_from(tables.rules.len())?,
            scope_version: self.scope_version,
            ..tables.header
        };
        let mut sets: Array<&mut MapData, SetHeader> = self.map_mut("SETS")?.try_into()?;
        sets.set(generation, header, 0)?;
        let events = u32::from(self.events_wanted);
        self.lease.update(|control| {
            control.generation = generation;
            control.events = events;
            control.divider = self.divider;
        });
        self.active_rules = u32::try_from(tables.rules.len())?;
        Ok(())
    }

    fn check_capacity(&self, tables: &RuleTables) -> Result<()> {
        let needed = Capacity::of(tables)?;
        let has = self.capacity;
        for (what, needed, has) in [
            ("rules", needed.rules, has.words() * 64),
            ("classes", needed.classes, has.classes),
            ("hosts", needed.hosts, has.hosts),
            ("host names", needed.names, has.names),
            ("cgroups", needed.scopes, has.scopes),
        ] {
            if needed > has {
                bail!("the rules need {needed} {what}, but only {has} fit");
            }
        }
        Ok(())
    }

    fn write_vectors(&mut self, tables: &RuleTables, generation: u32) {
        let words = self.capacity.words() as usize;
        let generation = generation as usize;
        let first = generation * self.capacity.classes as usize;
        for (class, vector) in tables.classes.iter().enumerate() {
            let mut summary = 0;
            for word in 0..words {
                let bits = vector.get(word).copied().unwrap_or(0);
                summary |= u64::from(bits != 0) << word;
                self.vectors.set((first + class) * words + word, bits);
            }
            self.summaries.set(first + class, summary);
        }
        for (index, rule) in tables.rules.iter().enumerate() {
            self.rules.set(generation * words * 64 + index, *rule);
        }
        for (port, classes) in tables.ports.iter().enumerate() {
            self.ports.set((generation << 16) + port, *classes);
        }
        for (word, ports) in tables.named.iter().enumerate() {
            self.named
                .set(generation * NAMED_WORDS as usize + word, *ports);
        }
    }

    fn write_hosts(&mut self, tables: &RuleTables, generation: u32) -> Result<()> {
        let mut hosts: LpmTrie<&mut MapData, HostKey, u32> = self.map_mut("HOSTS")?.try_into()?;
        let stale: Vec<_> = hosts
            .keys()
            .filter(|key| {
                key.as_ref()
                    .map_or(true, |key| key.data().generation == generation)
            })
            .collect::<Result<_, _>>()?;
        for key in stale {
            hosts.remove(&key)?;
        }
        for (network, class) in &tables.hosts {
            let key = HostKey {
                generation,
                address: network.address.to_be_bytes(),
            };
            hosts.insert(
                &Key::new(32 + u32::from(network.prefix), key),
                u32::from(*class),
                0,
            )?;
        }
        Ok(())
    }

    fn write_scopes(&mut self, tables: &RuleTables, generation: u32) -> Result<()> {
        let mut scopes: HashMap<&mut MapData, ScopeKey, u32> =
            self.map_mut("SCOPES")?.try_into()?;
        let stale: Vec<_> = scopes
            .keys()
            .filter(|key| {
                key.as_ref()
                    .map_or(true, |key| key.generation == generation)
            })
            .collect::<Result<_, _>>()?;
        for key in stale {
            scopes.remove(&key)?;
        }
        for (cgroup, class) in &tables.scopes {
            let key = ScopeKey {
                cgroup: *cgroup,
                generation,
                padding: 0,
            };
            scopes.insert(key, u32::from(*class), 0)?;
        }
        Ok(())
    }

    /// Allocates a cleared state for a rule, unless the rule already has one.
    fn take_state(&mut self, rule: &RuleEntry) -> Result<()> {
        let mut states: Array<&mut MapData, RuleState> = self.map_mut("RULE_STATES")?.try_into()?;
        let before = states.get(&rule.state, 0)?.uid;
        if before == rule.uid {
            return Ok(());
        }
        let fresh = RuleState {
            uid: rule.uid,
            ..RuleState::default()
        };
        states.set(rule.state, fresh, 0)?;
        if before == 0 {
            return Ok(());
        }
        let mut counted: PerCpuArray<&mut MapData, RuleStats> =
            self.map_mut("RULE_STATS")?.try_into()?;
        let empty = vec![
            RuleStats::default();
            aya::util::nr_cpus().map_err(|(what, error)| anyhow!("{what}: {error}"))?
        ];
        counted.set(rule.state, PerCpuValues::try_from(empty)?, 0)?;
        Ok(())
    }

    /// Detaches a state from its rule, so that connections drop it. The counters stay.
    ///
    /// # Errors
    /// `state` is not below the capacity, or a map can't be written.
    pub fn retire(&mut self, state: u32) -> Result<()> {
        let mut states: Array<&mut MapData, RuleState> = self.map_mut("RULE_STATES")?.try_into()?;
        let before = states.get(&state, 0)?;
        states.set(state, RuleState { uid: 0, ..before }, 0)?;
        Ok(())
    }

    /// The counters of the rule with this [`RuleEntry::state`], and the number of connections that it matched.
    ///
    /// # Errors
    /// `state` is not below the capacity.
    pub fn stats(&self, state: u32) -> Result<(RuleStats, u64)> {
        let counted: PerCpuArray<&MapData, RuleStats> = self.map("RULE_STATS")?.try_into()?;
        let mut sum = RuleStats::default();
        for cpu in counted.get(&state, 0)?.iter() {
            sum.seen_packets += cpu.seen_packets;
            sum.seen_segments += cpu.seen_segments;
            sum.seen_bytes += cpu.seen_bytes;
            sum.hit_packets += cpu.hit_packets;
            sum.hit_segments += cpu.hit_segments;
            sum.hit_bytes += cpu.hit_bytes;
        }
        let states: Array<&MapData, RuleState> = self.map("RULE_STATES")?.try_into()?;
        Ok((sum, states.get(&state, 0)?.connections))
    }

    /// The number of packets let through for the reason `counter`.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn counter(&self, counter: Counter) -> Result<u64> {
        Ok(self.counters()?[counter as usize])
    }

    /// All counters, indexed by [`Counter`].
    ///
    /// # Errors
    /// A map can't be read.
    pub fn counters(&self) -> Result<Vec<u64>> {
        let counts: PerCpuArray<&MapData, u64> = self.map("COUNTS")?.try_into()?;
        let mut counters: Vec<u64> = (0..COUNTERS)
            .map(|index| Ok(counts.get(&index, 0)?.iter().sum()))
            .collect::<Result<_>>()?;
        counters[Counter::Forgotten as usize] = self.connections.forgotten();
        Ok(counters)
    }

    /// The addresses that are learned of these names, for other programs.
    ///
    /// # Errors
    /// There is no room for the names, or a map can't be written.
    pub(super) fn share_learned(&mut self, names: &BTreeSet<String>) -> Result<LearnedAddresses> {
        self.names.share(&mut self.ebpf, names)
    }

    /// What has been learned of the names that rules are aimed at.
    ///
    /// # Errors
    /// The kernel refuses to read a map.
    pub fn learned(&self) -> Result<Vec<LearnedName>> {
        self.names.read(&self.ebpf)
    }

    /// Takes the ring buffer of events.
    ///
    /// # Errors
    /// They were already taken.
    pub fn take_events(&mut self) -> Result<DecisionEvents> {
        DecisionEvents::take(&mut self.ebpf, "EVENTS")
    }

    /// Takes the ring buffer of what was done with packets.
    ///
    /// # Errors
    /// It was already taken.
    pub fn take_traces(&mut self) -> Result<Traces> {
        Traces::take(&mut self.ebpf, "TRACES")
    }

    fn map(&self, name: &str) -> Result<&aya::maps::Map> {
        self.ebpf
            .map(name)
            .with_context(|| format!("the eBPF object has no map {name}"))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.ebpf
            .map_mut(name)
            .with_context(|| format!("the eBPF object has no map {name}"))
    }
}

/// The value that is stored with a socket of a cgroup.
fn owner_of(socket: BorrowedFd<'_>, cgroup: u64) -> std::io::Result<Owner> {
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes to the cookie, which has eight.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(status)?;
    Ok(Owner {
        scope: cgroup,
        socket: cookie,
    })
}

/// Whether programs can find the MPTCP connection of a subflow: the kernel must have MPTCP and its type information.
fn knows_mptcp() -> bool {
    version::at_least(5, 19)
        && Path::new("/proc/sys/net/mptcp").exists()
        && Path::new("/sys/kernel/btf/vmlinux").exists()
}

/// The name of the program for one side of an interface; `old` for kernels before 5.12.
pub(super) fn program_name(side: TcHook, link_header: bool, old: bool) -> &'static str {
    match (side, link_header, old) {
        (TcHook::Egress, true, false) => "fault_egress",
        (TcHook::Ingress, true, false) => "fault_ingress",
        (TcHook::Egress, false, false) => "fault_egress_l3",
        (TcHook::Ingress, false, false) => "fault_ingress_l3",
        (TcHook::Egress, true, true) => "fault_egress_old",
        (TcHook::Ingress, true, true) => "fault_ingress_old",
        (TcHook::Egress, false, true) => "fault_egress_l3_old",
        (TcHook::Ingress, false, true) => "fault_ingress_l3_old",
    }
}

/// Whether the kernel lacks fetching atomics (before 5.12).
pub(super) fn is_old() -> bool {
    !version::at_least(5, 12)
}

/// Loads a program unless it is already loaded.
fn load_classifier(name: &str, program: &mut SchedClassifier) -> Result<()> {
    if program.fd().is_err() {
        let _step = step(format_args!("verifying {name}"));
        object::loaded(name, || program.load())?;
    }
    Ok(())
}

fn create_maps(options: &LoadOptions, attachment: Attachment) -> Result<Ebpf> {
    let capacity = options.capacity;
    let words = capacity.words();
    let scoped = u32::from(options.scoped);
    // One more stands for any number.
    let matches = u32::try_from(options.matches.clamp(1, MATCHES_MAX + 1)).unwrap_or(1);
    let flow_rules = if options.matches > MATCHES_MAX {
        capacity.connections
    } else {
        1
    };
    let tcx = u32::from(attachment == Attachment::Tcx);
    let clock = match options.clock {
        ClockResolution::Tick if options.events => clock::EXACT,
        ClockResolution::Tick if attachment == Attachment::Tcx => clock::NONE,
        ClockResolution::Tick if version::at_least(5, 11) => clock::TICK,
        ClockResolution::Tick | ClockResolution::Exact => clock::EXACT,
    };
    let mut loader = new_loader();
    if options.scoped && options.needs.protocols & protocol::ICMP != 0 {
        loader.map_max_entries("ECHOES", ECHOES);
    }
    if options.tap.is_none() {
        // Unused here, and several megabytes large.
        loader.map_max_entries("HOLDS", 1);
        loader.map_max_entries("RELEASED", 1);
    }
    for (name, smallest) in ELSEWHERE {
        loader.map_max_entries(name, smallest);
    }
    if options.trace {
        loader.map_max_entries("TRACES", TRACE_BYTES);
    }
    if options.holder == holder::FQ {
        // Both directions.
        loader.map_max_entries("ORDERS", 2 * capacity.connections);
    }
    if capacity.names != 0 {
        // Each may have an entry for its domain.
        loader.map_max_entries("NAMES", 2 * capacity.names);
        loader.map_max_entries("LEARNED", LEARNED_MAX);
    }
    loader
        .override_global("NAME_COUNT", &capacity.names, true)
        .override_global("WORDS", &words, true)
        .override_global("CLASSES", &capacity.classes, true)
        .override_global("TCX", &tcx, true)
        .override_global("ACTIONS", &options.needs.actions, true)
        .override_global("FAULTS", &options.needs.faults, true)
        .override_global("MODIFIERS", &options.needs.modifiers, true)
        .override_global("PROTOCOLS", &options.needs.protocols, true)
        .override_global("CORRUPT_BITS", &options.needs.corrupt_bits, true)
        .override_global("SCOPED", &scoped, true)
        .override_global("ASKS_DEVICE", &u32::from(version::at_least(5, 12)), true)
        .override_global("MPTCP", &u32::from(knows_mptcp()), true)
        .override_global("MATCHES", &matches, true)
        .override_global("INSTANCE", &options.marks.instance, true)
        .override_global("NETNS_MARK", &options.marks.netns_mark, true)
        .override_global("NETNS_TAG", &options.marks.netns_tag, true)
        .override_global("CLOCK", &clock, true)
        .override_global("FORESEES", &u32::from(version::at_least(6, 12)), true)
        .override_global("TRACE", &u32::from(options.trace), true)
        .override_global("XDP", &u32::from(options.xdp), true)
        .override_global("DOCKER_PORTS", &options.docker_ports.packed(), true)
        .override_global("REPLAY", &u32::from(options.replay.is_some()), true)
        .map_max_entries("DECISIONS", options.replay.unwrap_or(0).max(1))
        .override_global("TAP", &options.tap.unwrap_or(0), true)
        .override_global("HOLDER", &options.holder, true)
        .override_global("DETOUR", &options.detour.unwrap_or(0), true)
        .map_max_entries("WAYS", options.places.max(1))
        .map_max_entries("BRIDGE_PORTS", PLACES)
        .override_global("STAMPS", &u32::from(version::at_least(5, 18)), true)
        .map_max_entries("FLOWS", capacity.connections)
        .map_max_entries("FLOW_RULES", flow_rules)
        .map_max_entries("RULES", 2 * words * 64)
        .map_max_entries("RULE_STATES", 2 * words * 64)
        .map_max_entries("RULE_STATS", 2 * words * 64)
        .map_max_entries("SUMMARIES", 2 * capacity.classes)
        .map_max_entries("VECTORS", 2 * capacity.classes * words)
        .map_max_entries("HOSTS", 2 * capacity.hosts)
        .map_max_entries("SCOPES", 2 * capacity.scopes)
        .load(OBJECT)
        .context("creating the BPF maps")
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector")
            .field("attachment", &self.attachment)
            .field("capacity", &self.capacity)
            .field("rules", &self.active_rules)
            .field("now_ns", &monotonic_ns())
            .finish_non_exhaustive()
    }
}
