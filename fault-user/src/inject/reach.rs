//! The set of interfaces that the programs are attached to: attaching, including later interfaces, and removal.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use super::divider::Divider;
use super::places::{DIVIDED, Place, RELEASE, Reservation};
use crate::hold::line::DelayLine;
use crate::hold::qdiscs::{Loss, Qdiscs};
use crate::hold::ways::Ways;
use crate::inject::injector::{Attachment, Injector, Side, is_old, program_name};
use crate::inject::xdp::{Mode, XdpLink};
use crate::plan::mechanism::HoldingQdiscs;
use crate::plan::shapers::Shapers;
use crate::sys::net::clsact;
use crate::sys::net::interfaces;
use crate::sys::net::interfaces::{Interface, Selection, list_by};
use crate::sys::net::netlink::Netlink;
use crate::sys::net::qdisc::leaf;
use crate::sys::net::tap::Tap;
use crate::tell::{step, tell};
use crate::undo::change::SystemChange;
use crate::undo::instance;
use crate::undo::instance::Instance;
use crate::undo::journal::Journal;

/// What loopback needs to take packets that come in there again: see [`InterfaceSet::let_loopback_come_back`].
const LOOPBACK_COMES_BACK: [&str; 2] = [
    "net/ipv4/conf/lo/accept_local",
    "net/ipv4/conf/lo/route_localnet",
];

/// Whether [`InterfaceSet::let_loopback_come_back`] can set them: `/proc/sys` is read-only in many containers.
pub(super) fn may_let_loopback_come_back() -> bool {
    LOOPBACK_COMES_BACK.iter().all(|name| {
        let path = Path::new("/proc/sys").join(name);
        std::fs::OpenOptions::new().write(true).open(path).is_ok()
    })
}

/// The mechanism for incoming packets, if the rules support the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IngressMechanism {
    /// The tc program: supports every rule, and costs nothing extra for traffic that no rule matches.
    #[default]
    Tc,
    /// XDP in the driver, if it supports XDP and belongs to hardware: with XDP on a veth its peer has to send without
    /// offload.
    NativeXdp,
    /// XDP in the driver, otherwise generic XDP.
    Xdp,
}

/// The programs and the interfaces that they are attached to.
pub(super) struct InterfaceSet {
    pub(super) injector: Injector,
    pub(super) interfaces: Vec<Interface>,
    /// The names of all interfaces so far.
    pub(super) names: Vec<String>,
    /// Interfaces to which rules can't be applied; already reported.
    pub(super) refused: BTreeSet<u32>,
    /// Where held packets continue; `None` if no rule holds packets.
    pub(super) ways: Option<Ways>,
    pub(super) journal: Option<Journal>,
    pub(super) qdiscs: Option<Qdiscs>,
    pub(super) delay_line: Option<DelayLine>,
    pub(super) divider: Option<Divider>,
    /// Why there is none although rules may need it, until that is reported.
    pub(super) undivided: Option<anyhow::Error>,
    /// Whether loopback takes packets that come in there again: see [`InterfaceSet::let_loopback_come_back`].
    loopback_comes_back: bool,
    pub(super) xdp: Vec<XdpLink>,
    pub(super) notes: Vec<String>,
    /// A socket of this network namespace.
    pub(super) netlink: Netlink,
    /// Dropped last: everything with its number has been removed by then.
    pub(super) instance: Instance,
}

impl InterfaceSet {
    /// Creates the set for these interfaces; nothing is attached yet.
    pub(super) fn new(
        injector: Injector,
        interfaces: &[Interface],
        qdiscs: Option<Qdiscs>,
        journal: Option<Journal>,
        instance: Instance,
    ) -> Result<Self> {
        Ok(Self {
            injector,
            instance,
            interfaces: interfaces.to_vec(),
            names: interfaces.iter().map(|one| one.name.clone()).collect(),
            refused: BTreeSet::new(),
            ways: None,
            journal,
            qdiscs,
            delay_line: None,
            divider: None,
            undivided: None,
            loopback_comes_back: false,
            netlink: Netlink::route()?,
            xdp: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Attaches the programs to all `places`, which may be reserved, and starts what holds packets.
    pub(super) fn attach_all(
        &mut self,
        tap: Option<Tap>,
        shapers: &Shapers,
        places: &[Place],
        reservation: Option<Reservation>,
    ) -> Result<()> {
        if self.injector.attachment() == Attachment::Clsact {
            for interface in self.interfaces.clone() {
                if let Err(error) = self.make_clsact(interface.index)
                    && interface.is_there()
                {
                    return Err(error);
                }
            }
        }
        if tap.is_some() || self.qdiscs.is_some() {
            self.ways = Some(Ways::default());
        }
        if let Some(tap) = tap {
            self.start_delay_line(tap, shapers)?;
        }
        if let Some(qdiscs) = &self.qdiscs {
            serve(&mut self.injector, qdiscs)?;
        }
        if let Some(divider) = &self.divider
            && self.injector.attachment() == Attachment::Clsact
        {
            // The device and its filters disappear with this process.
            clsact::ensure(divider.far().index)?;
        }
        for interface in self.interfaces.clone() {
            self.open_ways(&interface)?;
        }
        let there = list_by(&mut self.netlink)?;
        self.note_bridge_ports(&there)?;
        self.injector.attach_all(places, reservation)?;
        let (left, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.interfaces)
            .into_iter()
            .partition(Interface::is_there);
        self.interfaces = left;
        for Interface { name, .. } in &gone {
            log::info!("{name} disappeared before the rules were applied to it");
        }
        if self.interfaces.is_empty()
            && let Some(gone) = gone.first()
        {
            bail!("{} has disappeared", gone.name);
        }
        Ok(())
    }

    /// Tells the programs which interfaces are ports of bridges.
    fn note_bridge_ports(&mut self, there: &[Interface]) -> Result<()> {
        let ports = there
            .iter()
            .filter_map(|one| Some((one.index, one.port_of()?)));
        self.injector.write_bridge_ports(ports)
    }

    /// Adds the qdisc that the programs are attached to on kernels without TCX.
    fn make_clsact(&mut self, interface_index: u32) -> Result<()> {
        let journal = begun(&mut self.journal)?;
        let lock = instance::lock()?;
        let change = SystemChange::Clsact { interface_index };
        let what = change.shared().unwrap_or_default();
        // An existing qdisc that no instance shares belongs to another program and stays.
        if !clsact::is_there(interface_index)? || !instance::holders(&lock, &what)?.is_empty() {
            let share = instance::hold(&lock, &what, "")?;
            journal.record_share(change, Some(share))?;
            clsact::ensure(interface_index)?;
        }
        journal.record(SystemChange::Filters {
            interface_index,
            number: self.instance.number(),
        })
    }

    /// Lets held packets continue at an interface, if any are held.
    fn open_ways(&mut self, interface: &Interface) -> Result<()> {
        let Some(ways) = self.ways.as_mut().filter(|_| interface.can_hold) else {
            return Ok(());
        };
        for (number, inwards) in ways.open(interface.index)? {
            self.injector.open_way(number, interface.index, inwards)?;
        }
        Ok(())
    }

    /// Applies the rules to interfaces that have appeared, and releases those that have disappeared.
    pub(super) fn meet(&mut self, selection: &Selection) -> Result<()> {
        let there = list_by(&mut self.netlink)?;
        // First: without it super-packets are lost.
        self.miss_divider(&there);
        self.leave_gone(&there, selection);
        self.miss_tap(&there)?;
        self.note_bridge_ports(&there)?;
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
                    log::info!("{name} appeared: the rules are applied to it");
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

    /// Releases interfaces that have disappeared. Reports those that were named.
    fn leave_gone(&mut self, there: &[Interface], selection: &Selection) {
        let is_there = |index| there.iter().any(|one| one.index == index);
        self.refused.retain(|index| is_there(*index));
        let all = std::mem::take(&mut self.interfaces);
        let (left, gone): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| is_there(one.index));
        self.interfaces = left;
        for Interface { index, name, .. } in gone {
            self.leave(index);
            if matches!(selection, Selection::Names(_)) {
                tell!("fault: {name} disappeared: the rules are applied again when it reappears");
            }
        }
    }

    /// Lets packets through when the delay line's device was removed or set down.
    fn miss_tap(&mut self, there: &[Interface]) -> Result<()> {
        let is_there = |index| there.iter().any(|one| one.index == index && one.up);
        if let Some(line) = self.delay_line.as_ref()
            && !is_there(line.tap_index())
            && line.is_open()
        {
            line.close("its network device is gone or down");
            self.injector.close_delay_line()?;
        }
        Ok(())
    }

    /// Has super-packets treated as one packet each when the device that divides them was removed or set down.
    fn miss_divider(&mut self, there: &[Interface]) {
        let is_up = |index| there.iter().any(|one| one.index == index && one.up);
        if let Some(divider) = &self.divider
            && !(is_up(divider.index()) && is_up(divider.far().index))
        {
            self.injector.stop_dividing();
            self.divider = None;
            tell!(
                "fault: warning: super-packets are treated as one packet each from now on: the network device that \
                 divides them is gone or down"
            );
        }
    }

    fn leave(&mut self, interface_index: u32) {
        self.injector.leave(interface_index);
        if let Some(ways) = &mut self.ways {
            ways.close(interface_index);
        }
    }

    /// Applies the rules to one more interface.
    fn include(&mut self, interface: &Interface) -> Result<()> {
        if let Some(qdiscs) = &mut self.qdiscs {
            let journal = &mut self.journal;
            qdiscs.include(interface, |change| note(journal, change))?;
        }
        self.open_ways(interface)?;
        if self.injector.attachment() == Attachment::Clsact {
            self.make_clsact(interface.index)?;
        }
        for side in sides(interface, &self.interfaces) {
            self.injector.attach(interface, side)?;
        }
        Ok(())
    }

    /// Reports that rules can't be applied to an interface, unless it has disappeared.
    fn refuse(&mut self, interface: &Interface, error: &anyhow::Error) -> Result<()> {
        self.leave(interface.index);
        let there = list_by(&mut self.netlink)?;
        if there.iter().any(|one| one.index == interface.index) {
            tell!(
                "fault: warning: the rules can't be applied to the new interface {}: {error:#}",
                interface.name
            );
            self.refused.insert(interface.index);
        }
        Ok(())
    }

    /// Attaches the XDP program in front of the tc programs for incoming packets. Where that is impossible, tc does
    /// everything.
    pub(super) fn attach_xdp(&mut self, front: IngressMechanism) -> Result<()> {
        let modes: &[Mode] = match front {
            IngressMechanism::Tc => return Ok(()),
            IngressMechanism::NativeXdp => &[Mode::Native],
            IngressMechanism::Xdp => &[Mode::Native, Mode::Generic],
        };
        for interface in &self.interfaces {
            let virtually = front == IngressMechanism::NativeXdp && interface.kind.is_some();
            let arrives = sides(interface, &self.interfaces).any(|side| side == Side::Ingress);
            if !arrives || !interface.ethernet || virtually {
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
                Err(error) if front == IngressMechanism::Xdp => {
                    self.notes.push(not_by_xdp(interface, error));
                }
                // XDP was not requested.
                Err(_) => {}
            }
        }
        if front == IngressMechanism::Xdp && self.xdp.is_empty() && self.notes.is_empty() {
            self.notes.push(
                "XDP is not used: packets on loopback are processed when they are sent".to_owned(),
            );
        }
        Ok(())
    }

    /// Starts the delay line.
    fn start_delay_line(&mut self, tap: Tap, shapers: &Shapers) -> Result<()> {
        if self.injector.attachment() == Attachment::Clsact {
            // The device and its filters disappear with this process.
            clsact::ensure(tap.index())?;
        }
        let maps = self.injector.serve_delay_line()?;
        if self.interfaces.iter().any(|interface| interface.loopback) {
            self.let_loopback_come_back("held")?;
        }
        let ways = self.ways.get_or_insert_default();
        self.delay_line = Some(DelayLine::start(tap, maps, ways.places(), shapers)?);
        Ok(())
    }

    /// A loopback packet loses its route in the delay line, as does an answer that comes in there. Without a route the
    /// kernel rejects local IPv4 addresses as sources unless this sysctl is set. An error says what `can't be` done.
    pub(super) fn let_loopback_come_back(&mut self, done: &str) -> Result<()> {
        if std::mem::replace(&mut self.loopback_comes_back, true) {
            return Ok(());
        }
        for name in LOOPBACK_COMES_BACK {
            self.switch_on(name).with_context(|| {
                format!("loopback's packets can't be {done} without {name}: name another interface with --interface")
            })?;
        }
        Ok(())
    }

    /// Sets a sysctl to 1 for as long as an instance needs it.
    fn switch_on(&mut self, name: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        // First, because it restores settings of a killed instance.
        let journal = begun(&mut self.journal)?;
        let lock = instance::lock()?;
        let now = std::fs::read_to_string(&path)
            .with_context(|| format!("can't read {}", path.display()))?;
        let now = now.trim();
        // The value before the first instance changed it.
        let before = instance::holders(&lock, name)?.into_iter().next();
        let before = before.unwrap_or_else(|| now.to_owned());
        // Also where it is set: a dead instance may have done that, and somebody be about to put it back.
        let share = instance::hold(&lock, name, &before)?;
        let change = SystemChange::Sysctl {
            name: name.to_owned(),
            before,
            after: "1".to_owned(),
        };
        journal.record_share(change, Some(share))?;
        if now != "1" {
            std::fs::write(&path, "1")
                .with_context(|| format!("can't write {}", path.display()))?;
        }
        Ok(())
    }

    /// Undoes everything except the programs, which are removed when this is dropped.
    pub(super) fn settle(&mut self) -> Result<()> {
        let journal = self.journal.take();
        self.injector.rest();
        // No more packets are passed to the delay line; held packets are released at once.
        let ending = self.delay_line.take().map(DelayLine::finish).transpose()?;
        if let Some(qdiscs) = self.qdiscs.take() {
            for Loss { interface, packets } in qdiscs.drain()? {
                tell!("fault: warning: {packets} packets still held by {interface} were dropped");
            }
        }
        std::thread::scope(|scope| {
            if let Some(divider) = self.divider.take() {
                let removing = move || {
                    let _step = step(format_args!(
                        "removing the device that divides super-packets"
                    ));
                    drop(divider);
                };
                // Meanwhile the rest is detached. Without a thread it is removed at once.
                drop(std::thread::Builder::new().spawn_scoped(scope, removing));
            }
            self.injector.detach();
        });
        // Its device was removed meanwhile.
        drop(ending);
        let left = journal.map(Journal::undo).unwrap_or_default();
        if let Some(left) = left.first() {
            anyhow::bail!("{left}: run `fault clean`");
        }
        Ok(())
    }
}

/// The places at which packets of these interfaces are processed, and those of the devices that hold and divide packets.
pub(super) fn places(
    interfaces: &[Interface],
    tap: Option<&Interface>,
    divider: Option<&Divider>,
) -> Vec<Place> {
    let old = is_old();
    let released = tap.map(|tap| Place {
        interface: tap.clone(),
        side: Side::Ingress,
        program: RELEASE,
    });
    let far = divider.map(|divider| Place {
        interface: divider.far().clone(),
        side: Side::Egress,
        program: DIVIDED,
    });
    let judged = interfaces.iter().flat_map(|interface| {
        sides(interface, interfaces).map(move |side| Place {
            interface: interface.clone(),
            side,
            program: program_name(side, interface.ethernet, old),
        })
    });
    // When this process is killed the kernel detaches one after the other, with a grace period each, and the first one last:
    // where super-packets come back from must not go before those that send them there.
    far.into_iter().chain(judged).chain(released).collect()
}

/// The sides of an interface at which packets are processed. Packets that arrive at a bridge, or at a VLAN on one,
/// were processed at the bridge's ports: `br_netfilter` may have translated them since, and they must not be held
/// before their connection is tracked.
fn sides(interface: &Interface, all: &[Interface]) -> impl Iterator<Item = Side> + use<> {
    let has_bridge = interface
        .bridge
        .is_some_and(|bridge| all.iter().any(|one| one.index == bridge));
    // A packet on loopback leaves before it arrives: it is processed when it leaves.
    let is_seen_before = interface.loopback || has_bridge;
    [Side::Egress]
        .into_iter()
        .chain((!is_seen_before).then_some(Side::Ingress))
}

/// Records a change that outlives this process, before it is made. Holds a share of resources that other instances may
/// need, or might take for leftovers.
pub(super) fn note(journal: &mut Option<Journal>, change: SystemChange) -> Result<()> {
    let journal = begun(journal)?;
    let share = match change.shared() {
        Some(what) => Some(instance::hold(&instance::lock()?, &what, "")?),
        None => None,
    };
    journal.record_share(change, share)
}

/// The journal; started if it is not yet.
fn begun(journal: &mut Option<Journal>) -> Result<&mut Journal> {
    let begun = match journal.take() {
        Some(journal) => journal,
        None => Journal::create()?,
    };
    Ok(journal.insert(begun))
}

/// Sets up the programs for qdiscs that hold packets.
fn serve(injector: &mut Injector, qdiscs: &Qdiscs) -> Result<()> {
    if let HoldingQdiscs::Netem(delays_ns) = qdiscs.kind() {
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
        // The devices and their filters are removed with the rules.
        clsact::ensure(near.index)?;
        clsact::ensure(far.index)?;
    }
    injector.serve_detour(near, far, *qdiscs.kind() == HoldingQdiscs::Fq)
}

fn not_by_xdp(interface: &Interface, error: Errno) -> String {
    let name = &interface.name;
    match error {
        Errno::EBUSY => {
            format!(
                "XDP is not used on {name}: another XDP program is attached (see `ip link show {name}`)"
            )
        }
        error => format!("XDP is not used on {name}: the kernel rejects it ({error})"),
    }
}
