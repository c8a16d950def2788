//! The programs that redirect connections to the relay, and their maps.

use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData, SockMap};
use aya::programs::{CgroupSockAddr, SkLookup, SockOps};
use aya::{Ebpf, Pod};

use super::handshakes::{HandshakeEvents, Handshakes};
use super::originals::{Originals, SharedMap};
use super::prompt::Prompts;
use super::served::Served;
use crate::inject::services;
use crate::inject::services::{Room, Table};
use crate::rule::PortRange;
use crate::sys::bpf::cgroup_link::{CgroupLink, Hook};
use crate::sys::bpf::link;
use crate::sys::bpf::object::{loaded, program};
use crate::sys::process::netns::netns_cookie;
use crate::tell::step;

/// Programs attached to a cgroup. They are detached when this value is dropped or the process ends.
pub struct SteeringHooks {
    table: Table,
    listeners: SockMap<MapData>,
    handshakes: Handshakes,
    served: Served,
    prompts: Prompts,
    _links: Vec<CgroupLink>,
    /// Gives the relay connections of clients outside the cgroup.
    _lookup: OwnedFd,
    _ebpf: Ebpf,
}

/// Selects the connections that the hooks apply to.
#[derive(Clone, Copy, Debug)]
pub struct HookScope {
    /// The cgroup is the root, which contains processes of every network namespace.
    pub all_cgroups: bool,
    /// The hooks apply to every server in the network namespace, not only to those of the cgroup.
    pub all_servers: bool,
}

impl SteeringHooks {
    /// Loads the programs and attaches them to a cgroup, for this thread's network namespace. Nothing is redirected before
    /// [`SteeringHooks::switch`]. The caller must process the handshake events.
    ///
    /// # Errors
    /// The kernel does not support the hooks (Linux 5.8).
    pub fn attach(
        cgroup: &Path,
        reach: HookScope,
        room: Room,
    ) -> Result<(Self, Originals, HandshakeEvents)> {
        let _step = step(format_args!("attaching the hooks of the relay"));
        let netns = netns_cookie();
        // Without the cookie the connections of every container would be redirected to a relay that they can't reach.
        ensure!(
            netns != 0 || !reach.all_cgroups,
            "stream faults on the whole host or network namespace need Linux 5.14: use `fault run` without --scope \
             host, or --pid, --cgroup or --container"
        );
        let (mut ebpf, table) = services::load(room, netns, !reach.all_servers)?;
        let links = attach_all(&mut ebpf, cgroup)?;
        let lookup = attach_lookup(&mut ebpf)?;
        let listeners = ebpf
            .take_map("LISTENERS")
            .context("the eBPF object has no map LISTENERS")?;
        let served = Served::new(&mut ebpf)?;
        let originals = Originals {
            handshakes: shared(&mut ebpf, "HANDSHAKES")?,
        };
        let (handshakes, events) = Handshakes::load(&mut ebpf, &originals)?;
        let hooks = Self {
            table,
            listeners: listeners.try_into()?,
            handshakes,
            served,
            prompts: Prompts::new(&mut ebpf)?,
            _links: links,
            _lookup: lookup,
            _ebpf: ebpf,
        };
        Ok((hooks, originals, events))
    }

    /// Starts or ends the redirection of connections to these ports of service `index`.
    pub fn switch(&mut self, index: u32, ports: &[PortRange], on: bool) {
        self.table.switch(index, ports, on);
    }

    /// Gives connections from outside to service `index` to this listener.
    ///
    /// # Errors
    /// The kernel rejects the socket.
    pub fn listen(&mut self, index: u32, listener: &TcpListener) -> Result<()> {
        let address = listener.local_addr()?;
        let place = index * 2 + u32::from(address.is_ipv6());
        self.enter(place, listener)?;
        if address.is_ipv4() {
            // It is reached at many addresses.
            self.served.show_listener(address.port(), place);
        }
        Ok(())
    }

    fn enter(&mut self, place: u32, socket: &impl AsRawFd) -> Result<()> {
        let entered = self.listeners.set(place, socket, 0);
        entered.context("adding a socket of the relay")
    }

    /// Listeners at which SYNs are held.
    #[must_use]
    pub const fn handshakes(&self) -> &Handshakes {
        &self.handshakes
    }

    /// The cgroup's servers.
    #[must_use]
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// Servers that answer at once.
    #[must_use]
    pub const fn prompts(&self) -> &Prompts {
        &self.prompts
    }

    /// The services themselves.
    pub fn table(&mut self) -> &mut Table {
        &mut self.table
    }
}

fn shared<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<SharedMap<K, V>> {
    let map = ebpf
        .take_map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    Ok(Arc::new(Mutex::new(HashMap::try_from(map)?)))
}

fn attach_all(ebpf: &mut Ebpf, cgroup: &Path) -> Result<Vec<CgroupLink>> {
    let mut links = Vec::new();
    // The hooks of connect(2) come first: when this process is killed they are also removed first, and no connection is
    // redirected to a relay that has ended. Nothing is redirected yet.
    for (name, at) in [
        ("fault_connect4", Hook::Connect4),
        ("fault_connect6", Hook::Connect6),
        ("fault_peer4", Hook::PeerName4),
        ("fault_peer6", Hook::PeerName6),
    ] {
        let hook: &mut CgroupSockAddr = program(ebpf, name)?;
        loaded(name, || hook.load())?;
        links.push(CgroupLink::attach(hook.fd()?.as_fd(), cgroup, at)?);
    }
    let opening: &mut SockOps = program(ebpf, "fault_opening")?;
    loaded("fault_opening", || opening.load())?;
    let opening = opening.fd()?.as_fd();
    links.push(CgroupLink::attach(opening, cgroup, Hook::SocketOperations)?);
    Ok(links)
}

/// Attaches the `sk_lookup` program to this network namespace.
fn attach_lookup(ebpf: &mut Ebpf) -> Result<OwnedFd> {
    const BPF_SK_LOOKUP: u32 = 36;
    const NAME: &str = "fault_lookup";
    let lookup: &mut SkLookup = program(ebpf, NAME)?;
    loaded(NAME, || lookup.load())?;
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    link::create(
        lookup.fd()?.as_fd(),
        namespace.as_raw_fd().cast_unsigned(),
        BPF_SK_LOOKUP,
        0,
    )
    .context("attaching to the network namespace (sk_lookup needs Linux 5.9)")
}
