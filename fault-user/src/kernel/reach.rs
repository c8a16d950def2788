//! The programs and the interfaces that they are on: attached, put on those that appear later, and all taken away.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use super::change::Change;
use super::clsact;
use super::injection::Front;
use super::injector::{Attachment, Injector, Side};
use super::interfaces::{self, Interface, Selection, list, list_by};
use super::journal::Journal;
use super::netlink::Netlink;
use super::qdisc::leaf;
use super::xdp::{Mode, XdpLink};
use crate::shaping::line::DelayLine;
use crate::shaping::qdiscs::{Kind, Loss, Qdiscs};
use crate::shaping::schedule::Shapers;
use crate::shaping::tap::Tap;
use crate::shaping::ways::Ways;
use crate::tell::tell;

/// The programs, and all that they are on.
pub(super) struct Reach {
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
}

impl Reach {
    /// Programs that are attached nowhere yet, for these interfaces.
    pub(super) fn new(
        injector: Injector,
        interfaces: &[Interface],
        qdiscs: Option<Qdiscs>,
        journal: Option<Journal>,
    ) -> Result<Self> {
        Ok(Self {
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
    pub(super) fn attach_xdp(&mut self, front: Front) -> Result<()> {
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
        let left = journal.map(Journal::heal).unwrap_or_default();
        if let Some(left) = left.first() {
            anyhow::bail!("{left}: run `fault clean`");
        }
        Ok(())
    }
}

/// Notes a change that outlives this process, before it is made.
pub(super) fn note(journal: &mut Option<Journal>, change: Change) -> Result<()> {
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
