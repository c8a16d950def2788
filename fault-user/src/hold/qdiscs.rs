//! fq or netem qdiscs on the interfaces of a plan, while its rules are applied.
//!
//! They only replace the kernel's default qdisc, which the kernel restores when they are removed. With any other qdisc
//! the mechanism is rejected.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::plan::mechanism::HoldingQdiscs;
use crate::sys::net::clsact::Qdisc;
use crate::sys::net::interfaces;
use crate::sys::net::interfaces::Interface;
use crate::sys::net::netlink::Netlink;
use crate::sys::net::own_links::link_name;
use crate::sys::net::qdisc::{
    HANDLE, QdiscQueue, ROOT, add_fq, add_netem, add_veth, queues, root_of,
};
use crate::sys::net::tap::be_quiet;
use crate::undo::change::SystemChange;

/// At the end of the rules, held packets get this time to be released; the rest is dropped with the qdisc.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Polling interval meanwhile.
const DRAIN_POLL: Duration = Duration::from_millis(5);

impl HoldingQdiscs {
    /// The kind of the qdisc at the root.
    fn root(&self) -> &'static str {
        match self {
            Self::Fq => "fq",
            Self::Netem(_) => "prio",
        }
    }

    /// The name of the mechanism.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fq => "fq",
            Self::Netem(_) => "netem",
        }
    }
}

/// Installed qdiscs.
pub struct Qdiscs {
    kind: HoldingQdiscs,
    /// A veth pair for incoming packets: they enter at one end and return through the other.
    detour: Option<(Interface, Interface)>,
    /// The interfaces, each with its former root qdisc.
    places: Vec<(Interface, Option<Qdisc>)>,
    /// A socket of this network namespace.
    netlink: Mutex<Netlink>,
}

/// Packets dropped by a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QdiscDrops {
    /// The interface.
    pub interface: String,
    /// The number of packets.
    pub packets: u32,
}

impl Qdiscs {
    /// Creates the veth pair, if there is an interface besides loopback, and installs the qdiscs for the instance with
    /// this number. `record` is called with each change before it is made.
    ///
    /// # Errors
    /// Another qdisc is installed, or the kernel lacks a feature. All changes made so far were passed to `record`.
    pub fn install(
        kind: HoldingQdiscs,
        chosen: &[Interface],
        number: u32,
        mut record: impl FnMut(SystemChange) -> Result<()>,
    ) -> Result<Self> {
        let mut places = Vec::with_capacity(chosen.len());
        for interface in chosen {
            let before = root_of(interface.index)?;
            check_free(interface, before.as_ref(), kind.name())?;
            places.push((interface.clone(), before));
        }
        let detour = if chosen.iter().all(|interface| interface.loopback) {
            None
        } else {
            Some(make_detour(number, &mut record)?)
        };
        let near = detour.as_ref().map(|(near, _)| near);
        for interface in near.into_iter().chain(chosen) {
            put(&kind, interface, &mut record)?;
        }
        let netlink = Mutex::new(Netlink::route()?);
        Ok(Self {
            kind,
            detour,
            places,
            netlink,
        })
    }

    /// Installs them on one more interface.
    ///
    /// # Errors
    /// As [`Qdiscs::install`], or there is no veth pair, because there was only loopback.
    pub fn include(
        &mut self,
        interface: &Interface,
        mut record: impl FnMut(SystemChange) -> Result<()>,
    ) -> Result<()> {
        self.places.retain(|(one, _)| one.index != interface.index);
        if self.detour.is_none() && !interface.loopback {
            bail!(
                "{} was set up to hold only loopback's packets: restart fault",
                self.kind.name()
            );
        }
        let before = root_of(interface.index)?;
        check_free(interface, before.as_ref(), self.kind.name())?;
        put(&self.kind, interface, &mut record)?;
        self.places.push((interface.clone(), before));
        Ok(())
    }

    /// The kind of qdiscs.
    #[must_use]
    pub fn kind(&self) -> &HoldingQdiscs {
        &self.kind
    }

    /// The near and the far end of the veth pair for incoming packets.
    #[must_use]
    pub fn detour(&self) -> Option<(&Interface, &Interface)> {
        self.detour.as_ref().map(|(near, far)| (near, far))
    }

    fn queues(&self) -> Result<Vec<(&Interface, QdiscQueue)>> {
        let mut netlink = self.netlink.lock().unwrap_or_else(PoisonError::into_inner);
        let all = queues(&mut netlink)?;
        let ours = self.places.iter().map(|(interface, _)| interface);
        Ok(ours
            .chain(self.detour.as_ref().map(|(near, _)| near))
            .filter_map(|interface| {
                let found = all.iter().find(|(index, _)| *index == interface.index);
                Some((interface, found?.1))
            })
            .collect())
    }

    /// The packets dropped by full queues so far.
    ///
    /// # Errors
    /// The qdiscs can't be listed.
    pub fn losses(&self) -> Result<Vec<QdiscDrops>> {
        let all = self.queues()?;
        Ok(losses(all, |queue| queue.lost))
    }

    /// Waits at most 5 s until held packets are released. Returns those that remain and are dropped with the qdiscs.
    /// The programs must not pass packets to them any more.
    ///
    /// # Errors
    /// The qdiscs can't be listed.
    pub fn drain(&self) -> Result<Vec<QdiscDrops>> {
        let end = Instant::now() + DRAIN_MAX;
        loop {
            let all = self.queues()?;
            let is_empty = all.iter().all(|(_, queue)| queue.waiting == 0);
            if is_empty || Instant::now() >= end {
                return Ok(losses(all, |queue| queue.waiting));
            }
            std::thread::sleep(DRAIN_POLL);
        }
    }
}

fn put(
    kind: &HoldingQdiscs,
    interface: &Interface,
    record: &mut impl FnMut(SystemChange) -> Result<()>,
) -> Result<()> {
    record(SystemChange::Qdisc {
        interface_index: interface.index,
        parent: ROOT,
        handle: HANDLE,
        kind: kind.root().to_owned(),
    })?;
    let added = match kind {
        HoldingQdiscs::Fq => add_fq(interface.index),
        HoldingQdiscs::Netem(delays_ns) => add_netem(interface.index, delays_ns),
    };
    added.with_context(|| format!("holding packets of {}", interface.name))
}

fn make_detour(
    number: u32,
    record: &mut impl FnMut(SystemChange) -> Result<()>,
) -> Result<(Interface, Interface)> {
    let names = ["i", "o"].map(|end| format!("{}{end}", link_name(number)));
    record(SystemChange::Link {
        name: names[0].clone(),
    })?;
    add_veth(&names[0], &names[1])?;
    for name in &names {
        be_quiet(name);
    }
    let all = interfaces::list()?;
    let find = |name: &String| {
        let found = all.iter().find(|one| one.name == *name);
        found.cloned().context("the veth pair has disappeared")
    };
    Ok((find(&names[0])?, find(&names[1])?))
}

fn losses(all: Vec<(&Interface, QdiscQueue)>, of: impl Fn(&QdiscQueue) -> u32) -> Vec<QdiscDrops> {
    all.into_iter()
        .filter(|(_, queue)| of(queue) != 0)
        .map(|(interface, queue)| QdiscDrops {
            interface: interface.name.clone(),
            packets: of(&queue),
        })
        .collect()
}

/// Rejects an interface whose root qdisc is not the kernel's default.
fn check_free(interface: &Interface, root: Option<&Qdisc>, mechanism: &str) -> Result<()> {
    let Some(root) = root else {
        return Ok(());
    };
    let Interface { name, .. } = interface;
    let kind = &root.kind;
    if root.handle == HANDLE {
        bail!(
            "the root of {name} has a {kind} qdisc of another fault instance: end that instance, run `fault clean`, \
             or leave out --mechanism {mechanism} (the delay line works with any qdisc)"
        );
    }
    // The kernel's default qdiscs have no handle.
    let is_default = root.handle == 0
        && (["noqueue", "mq"].contains(&kind.as_str())
            || default_kind().is_none_or(|one| one == *kind));
    if !is_default {
        bail!(
            "{name} has a {kind} qdisc (handle {:x}:) at its root, which fault does not replace: leave out \
             --mechanism {mechanism} (the delay line works with any qdisc)",
            root.handle >> 16
        );
    }
    Ok(())
}

/// The kernel's default qdisc for an interface with one queue; only readable in the initial network namespace.
fn default_kind() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/net/core/default_qdisc").ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net::netlink::in_own_netns;

    fn root(kind: &str, handle: u32) -> Qdisc {
        Qdisc {
            interface_index: 1,
            kind: kind.to_owned(),
            handle,
            parent: ROOT,
        }
    }

    #[test]
    fn only_what_the_kernel_put_there_gives_way() {
        in_own_netns(|| {
            let lo = &interfaces::list().unwrap()[0];
            for kind in ["noqueue", "mq"] {
                check_free(lo, Some(&root(kind, 0)), "fq").unwrap();
            }
            check_free(lo, None, "fq").unwrap();
            let told = |root| check_free(lo, Some(&root), "fq").unwrap_err().to_string();
            assert!(told(root("tbf", 0x8001_0000)).contains("lo has a tbf qdisc (handle 8001:)"));
            assert!(told(root("fq_codel", 1 << 16)).contains("delay line works"));
            assert!(told(root("fq", HANDLE)).contains("another fault"));
        });
    }
}
