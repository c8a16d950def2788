//! The programs and the interfaces that they are on: attached, put on those that appear later, and all taken away.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use crate::hold::line::DelayLine;
use crate::hold::qdiscs::{Loss, Qdiscs};
use crate::hold::ways::Ways;
use crate::inject::injector::{Attachment, Injector, Side};
use crate::inject::xdp::{Mode, XdpLink};
use crate::plan::mechanism::HoldingQdiscs;
use crate::plan::shapers::Shapers;
use crate::sys::net::clsact;
use crate::sys::net::interfaces;
use crate::sys::net::interfaces::{Interface, Selection, list, list_by};
use crate::sys::net::netlink::Netlink;
use crate::sys::net::qdisc::leaf;
use crate::sys::net::tap::Tap;
use crate::tell::tell;
use crate::undo::change::SystemChange;
use crate::undo::instance;
use crate::undo::instance::Instance;
use crate::undo::journal::Journal;

/// Where packets that arrive are judged first, when the rules leave the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IngressMechanism {
    /// In the tc program: it can do everything, and costs the traffic that no rule is about nothing more.
    #[default]
    Tc,
    /// In the driver, where it can and is a real one: a veth's peer would have to send without offload.
    NativeXdp,
    /// In the driver, or else in front of the network stack.
    Xdp,
}

/// The programs, and all that they are on.
pub(super) struct InterfaceSet {
    pub(super) injector: Injector,
    pub(super) interfaces: Vec<Interface>,
    /// The names of all interfaces that there have been.
    pub(super) names: Vec<String>,
    /// Interfaces that rules could not be put on, which has been said.
    pub(super) refused: BTreeSet<u32>,
    /// Where packets that are held can go on, where any are.
    pub(super) ways: Option<Ways>,
    pub(super) journal: Option<Journal>,
    pub(super) qdiscs: Option<Qdiscs>,
    pub(super) delay_line: Option<DelayLine>,
    pub(super) xdp: Vec<XdpLink>,
    pub(super) notes: Vec<String>,
    /// Of the network namespace that all this is in.
    pub(super) netlink: Netlink,
    /// Goes last: what carries its number has gone then.
    pub(super) instance: Instance,
}

impl InterfaceSet {
    /// Programs that are attached nowhere yet, for these interfaces.
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
            netlink: Netlink::route()?,
            xdp: Vec::new(),
            notes: Vec::new(),
        })
    }

    pub(super) fn attach_all(&mut self, tap: Option<Tap>, shapers: &Shapers) -> Result<()> {
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
            self.open_ways(&interface)?;
        }
        let there = list_by(&mut self.netlink)?;
        self.note_bridge_ports(&there)?;
        let places: Vec<_> = self
            .interfaces
            .iter()
            .flat_map(|one| self.sides(one).map(move |side| (one, side)))
            .collect();
        self.injector.attach_all(&places)?;
        let (left, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.interfaces)
            .into_iter()
            .partition(Interface::is_there);
        self.interfaces = left;
        for Interface { name, .. } in &gone {
            log::info!("{name} has vanished before the rules were on it");
        }
        if self.interfaces.is_empty()
            && let Some(gone) = gone.first()
        {
            bail!("{} has vanished", gone.name);
        }
        Ok(())
    }

    /// Where packets are judged at an interface. What arrives at a bridge, or at a VLAN on one, has been judged at the
    /// bridge's ports: `br_netfilter` may have translated it since, and it must not be held before the connection is
    /// known.
    fn sides(&self, interface: &Interface) -> impl Iterator<Item = Side> + use<> {
        let has_bridge = interface
            .bridge
            .is_some_and(|bridge| self.interfaces.iter().any(|one| one.index == bridge));
        // What passes loopback leaves before it arrives: it is judged when it leaves.
        let is_seen_before = interface.loopback || has_bridge;
        [Side::Egress]
            .into_iter()
            .chain((!is_seen_before).then_some(Side::Ingress))
    }

    /// Tells the programs which interfaces are ports of bridges.
    fn note_bridge_ports(&mut self, there: &[Interface]) -> Result<()> {
        let ports = there
            .iter()
            .filter_map(|one| Some((one.index, one.port_of()?)));
        self.injector.write_bridge_ports(ports)
    }

    /// The qdisc that the programs are attached to on kernels without TCX.
    fn make_clsact(&mut self, interface_index: u32) -> Result<()> {
        let journal = begun(&mut self.journal)?;
        let lock = instance::lock()?;
        let change = SystemChange::Clsact { interface_index };
        let what = change.shared().unwrap_or_default();
        // Where there is one already and no instance has a share, it is somebody else's and stays.
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

    /// Lets packets that are held go on at an interface, where any are held.
    fn open_ways(&mut self, interface: &Interface) -> Result<()> {
        let Some(ways) = self.ways.as_mut().filter(|_| interface.can_hold) else {
            return Ok(());
        };
        for (number, inwards) in ways.open(interface.index)? {
            self.injector.open_way(number, interface.index, inwards)?;
        }
        Ok(())
    }

    /// Puts the rules on the interfaces that have come since, and leaves those that have gone.
    pub(super) fn meet(&mut self, selection: &Selection) -> Result<()> {
        let there = list_by(&mut self.netlink)?;
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

    /// Lets packets pass when the delay line's device has been removed or switched off.
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
        self.open_ways(interface)?;
        if self.injector.attachment() == Attachment::Clsact {
            self.make_clsact(interface.index)?;
        }
        for side in self.sides(interface) {
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
    pub(super) fn attach_xdp(&mut self, front: IngressMechanism) -> Result<()> {
        let modes: &[Mode] = match front {
            IngressMechanism::Tc => return Ok(()),
            IngressMechanism::NativeXdp => &[Mode::Native],
            IngressMechanism::Xdp => &[Mode::Native, Mode::Generic],
        };
        for interface in &self.interfaces {
            let virtually = front == IngressMechanism::NativeXdp && interface.kind.is_some();
            let arrives = self.sides(interface).any(|side| side == Side::Ingress);
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
                Err(error) if front == IngressMechanism::Xdp => self.notes.push(not_by_xdp(interface, error)),
                // Nobody asked for it.
                Err(_) => {}
            }
        }
        if front == IngressMechanism::Xdp && self.xdp.is_empty() && self.notes.is_empty() {
            self.notes
                .push("XDP is not used: what passes loopback is judged as it leaves".to_owned());
        }
        Ok(())
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
        let maps = self.injector.serve_delay_line(&device)?;
        if self.interfaces.iter().any(|interface| interface.loopback) {
            self.let_loopback_come_back()?;
        }
        let ways = self.ways.get_or_insert_default();
        self.delay_line = Some(DelayLine::start(tap, maps, ways.places(), shapers)?);
        Ok(())
    }

    /// A packet of loopback loses its route on the way through the delay line. Without it the kernel takes IPv4's local
    /// addresses from nobody, unless told to.
    fn let_loopback_come_back(&mut self) -> Result<()> {
        for name in [
            "net/ipv4/conf/lo/accept_local",
            "net/ipv4/conf/lo/route_localnet",
        ] {
            self.switch_on(name).with_context(|| {
                format!("packets of loopback can't be held without {name}: use --interface for another one")
            })?;
        }
        Ok(())
    }

    /// Sets a sysctl to 1 for as long as an instance needs it.
    fn switch_on(&mut self, name: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        // First: it takes back what a killed instance has set.
        let journal = begun(&mut self.journal)?;
        let lock = instance::lock()?;
        let now = std::fs::read_to_string(&path)
            .with_context(|| format!("can't read {}", path.display()))?;
        let now = now.trim();
        // What it was before the first of them came.
        let before = instance::holders(&lock, name)?.into_iter().next();
        let before = before.unwrap_or_else(|| now.to_owned());
        if before == "1" {
            return Ok(());
        }
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

    /// Takes away all but the programs, which go with this.
    pub(super) fn settle(&mut self) -> Result<()> {
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
        let left = journal.map(Journal::undo).unwrap_or_default();
        if let Some(left) = left.first() {
            anyhow::bail!("{left}: run `fault clean`");
        }
        Ok(())
    }
}

/// Notes a change that outlives this process, before it is made. Of what others may need, or take for a dead one's, a share
/// is held.
pub(super) fn note(journal: &mut Option<Journal>, change: SystemChange) -> Result<()> {
    let journal = begun(journal)?;
    let share = match change.shared() {
        Some(what) => Some(instance::hold(&instance::lock()?, &what, "")?),
        None => None,
    };
    journal.record_share(change, share)
}

/// The journal, begun if it is not yet.
fn begun(journal: &mut Option<Journal>) -> Result<&mut Journal> {
    let begun = match journal.take() {
        Some(journal) => journal,
        None => Journal::create()?,
    };
    Ok(journal.insert(begun))
}

/// Lets the programs work with qdiscs that hold packets.
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
        // The devices go with the rules, and their filters with them.
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
                "XDP is not used on {name}: another program is there already (`ip link show {name}` tells)"
            )
        }
        error => format!("XDP is not used on {name}: the kernel refuses it ({error})"),
    }
}
