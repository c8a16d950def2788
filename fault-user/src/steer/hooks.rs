//! The programs that lead connections to the relay, and their maps.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData, SockMap};
use aya::programs::{CgroupSockAddr, SkLookup, SockOps};
use aya::{Ebpf, Pod};
use fault_common::abi::{Destination, Handshake, Original, STEERS, alias};
use fault_common::flow::MAPPED_PREFIX;

use super::handshakes::{Events, Handshakes};
use super::served::Served;
use crate::inject::services;
use crate::inject::services::{Service, Table, loaded, program};
use crate::relay::{Accepted, Pair};
use crate::rule::PortRange;
use crate::sys::bpf::cgroup_link::{CgroupLink, Hook};
use crate::sys::bpf::link;
use crate::sys::process::netns::netns_cookie;

/// A map of the programs, shared.
type Shared<K, V> = Arc<Mutex<HashMap<MapData, K, V>>>;

/// What was meant by what is led to the relay.
#[derive(Clone)]
pub struct Originals {
    /// Where connections were meant to go that are being opened.
    handshakes: Shared<Handshake, Original>,
}

impl Originals {
    /// Where a client's connection was meant to go that the listener at `relay` has accepted.
    ///
    /// # Errors
    /// A connection that was not led here: somebody connected to the relay by itself.
    pub fn of(&self, accepted: Accepted, relay: SocketAddr) -> io::Result<SocketAddr> {
        let local = accepted.local;
        if local.port() != relay.port() || !is_relays(local.ip()) {
            // It came from outside, and was given to the relay as it is.
            return Ok(local);
        }
        let original = Self::look_up(&self.handshakes, &handshake(accepted.client, local))?;
        Ok(address(original.server))
    }

    /// Has the SYNs of a connection let in from now on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop_holding(&self, pair: Pair) -> io::Result<()> {
        let key = handshake(pair.client, pair.local);
        let mut handshakes = self
            .handshakes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut original = handshakes.get(&key, 0).unwrap_or_default();
        original.admitted = 1;
        handshakes
            .insert(key, original, 0)
            .map_err(io::Error::other)
    }

    fn look_up<K: Pod, V: Pod>(known: &Shared<K, V>, key: &K) -> io::Result<V> {
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .get(key, 0)
            .map_err(|error| io::Error::other(format!("it was not redirected here: {error}")))
    }
}

/// Whether clients are redirected to this address: see [`alias`].
fn is_relays(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            first == 127 && second & alias::MASK == alias::FIRST
        }
        IpAddr::V6(v6) => v6.is_loopback(),
    }
}

/// Programs attached to a cgroup; they go with this value, and with the process.
pub struct Hooks {
    table: Table,
    listeners: SockMap<MapData>,
    handshakes: Handshakes,
    served: Served,
    _links: Vec<CgroupLink>,
    /// Gives the relay what clients open that the others do not meet.
    _lookup: OwnedFd,
    _ebpf: Ebpf,
}

/// Whose connections the hooks meet.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    /// The cgroup is the root, with processes of every network namespace.
    pub all_cgroups: bool,
    /// Every server in the network namespace is theirs, not only those of the cgroup.
    pub all_servers: bool,
}

impl Hooks {
    /// Loads the programs and attaches them to a cgroup, for what is in this thread's network namespace. Nothing is led anywhere before [`Hooks::switch`].
    /// What the programs tell of handshakes has to be followed.
    ///
    /// # Errors
    /// The kernel refuses (the hooks are of Linux 5.8), or there are too many targets.
    pub fn attach(
        cgroup: &Path,
        reach: Reach,
        services: &[Service],
    ) -> Result<(Self, Originals, Events)> {
        ensure!(
            services.len() <= STEERS as usize,
            "stream faults are possible on {STEERS} targets at once: use fewer"
        );
        let netns = netns_cookie();
        // Without it the connections of every container would be led to a relay that they can't reach.
        ensure!(
            netns != 0 || !reach.all_cgroups,
            "stream faults on the whole host or network namespace need Linux 5.14, to tell network namespaces apart: use \
             `fault run` without --scope host, or --pid, --cgroup or --container"
        );
        let (mut ebpf, table) = services::load(services, netns, !reach.all_servers)?;
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
            _links: links,
            _lookup: lookup,
            _ebpf: ebpf,
        };
        Ok((hooks, originals, events))
    }

    /// From now on the connections to these ports of service `index` are led to the relay, or go straight again.
    pub fn switch(&mut self, index: u32, ports: &[PortRange], on: bool) {
        self.table.switch(index, ports, on);
    }

    /// Connections from outside to service `index` are given to this listener.
    ///
    /// # Errors
    /// The kernel refuses the socket.
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
        entered.context("entering a socket of the relay")
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

    /// The services themselves.
    pub fn table(&mut self) -> &mut Table {
        &mut self.table
    }
}

fn shared<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Shared<K, V>> {
    let map = ebpf
        .take_map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    Ok(Arc::new(Mutex::new(HashMap::try_from(map)?)))
}

fn attach_all(ebpf: &mut Ebpf, cgroup: &Path) -> Result<Vec<CgroupLink>> {
    let mut links = Vec::new();
    // The hooks of connect(2) first: when this process is killed they go first as well, and no connection is led to a
    // relay that is gone. So far they lead nothing anywhere.
    for (name, at) in [
        ("fault_connect4", Hook::Connect4),
        ("fault_connect6", Hook::Connect6),
        ("fault_peer4", Hook::PeerName4),
        ("fault_peer6", Hook::PeerName6),
    ] {
        let hook: &mut CgroupSockAddr = program(ebpf, name)?;
        loaded(name, hook.load())?;
        links.push(CgroupLink::attach(hook.fd()?.as_fd(), cgroup, at)?);
    }
    let opening: &mut SockOps = program(ebpf, "fault_opening")?;
    loaded("fault_opening", opening.load())?;
    let opening = opening.fd()?.as_fd();
    links.push(CgroupLink::attach(opening, cgroup, Hook::SocketOperations)?);
    Ok(links)
}

/// Puts the program in front of this network namespace's listeners.
fn attach_lookup(ebpf: &mut Ebpf) -> Result<OwnedFd> {
    const BPF_SK_LOOKUP: u32 = 36;
    const NAME: &str = "fault_lookup";
    let lookup: &mut SkLookup = program(ebpf, NAME)?;
    loaded(NAME, lookup.load())?;
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    link::create(
        lookup.fd()?.as_fd(),
        namespace.as_raw_fd().cast_unsigned(),
        BPF_SK_LOOKUP,
        0,
    )
    .context("attaching to the network namespace (sk_lookup is of Linux 5.9)")
}

/// An address as the maps have it.
pub fn destination(of: SocketAddr) -> Destination {
    let bytes = match of.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Destination {
        address: [word(0), word(4), word(8), word(12)],
        port: u32::from(of.port()),
    }
}

/// The same of both ends of a connection.
fn handshake(client: SocketAddr, server: SocketAddr) -> Handshake {
    Handshake {
        client: destination(client),
        server: destination(server),
    }
}

/// The address that the maps have.
pub fn address(of: Destination) -> SocketAddr {
    let port = u16::try_from(of.port).unwrap_or(0);
    if of.address[..3] == [0, 0, MAPPED_PREFIX] {
        return SocketAddr::from((of.address[3].to_ne_bytes(), port));
    }
    let mut bytes = [0; 16];
    for (part, word) in bytes.chunks_exact_mut(4).zip(of.address) {
        part.copy_from_slice(&word.to_ne_bytes());
    }
    SocketAddr::from((bytes, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_they_were() {
        for text in [
            "10.0.0.5:80",
            "[fd77::2]:5432",
            "[::1]:1",
            "127.0.0.1:65535",
        ] {
            let there: SocketAddr = text.parse().unwrap();
            assert_eq!(address(destination(there)), there);
        }
    }
}
