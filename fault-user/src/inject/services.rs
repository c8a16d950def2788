//! Loads the cgroup programs, and passes them the ports and hosts of services.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{ArrayOfMaps, MapData};
use aya::{Ebpf, Pod};
use fault_common::abi::{STEERS, Steer, steered};

use crate::inject::names::{LearnedAddresses, LearnedMap};
use crate::plan::tables::Network;
use crate::rule::{PortRange, Protocol, ResolvedTarget};
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::bpf::object::{OBJECT, check_abi, mapped, new_loader};

/// Maps that only the packet programs use; they get the minimum size here.
const UNUSED_MAPS: [&str; 11] = [
    "PORTS",
    "HOLDS",
    "RELEASES",
    "RELEASED",
    "SPREADS",
    "DATAGRAMS",
    "FOLLOWED",
    "RULES",
    "VECTORS",
    "SUMMARIES",
    "SCOPES",
];

/// Maximum number of watched connections. If there are more, expectations are not evaluated.
const WATCHED: u32 = 1 << 18;
/// Maximum number of addresses and ports on which a cgroup's servers listen.
pub const SERVERS: u32 = 65_536;
/// Maximum number of connections that wait to be accepted by the relay.
const HANDSHAKES: u32 = 16_384;
/// Minimum number of hosts, as services can be added later. The map takes memory only for those that are there.
const HOSTS_LEAST: usize = 4096;

/// A target in the programs' format.
pub struct ServiceEntry {
    /// The destination that its connections are redirected to, if any.
    pub steer: Steer,
    /// Its hosts; empty for all.
    pub hosts: Vec<Network>,
}

impl ServiceEntry {
    /// The number of hosts of some services.
    #[must_use]
    pub fn hosts_of(services: &[Self]) -> usize {
        services.iter().map(|service| service.hosts.len()).sum()
    }

    /// A target whose connections are redirected to relays on these loopback ports (IPv4, IPv6); 0 for none. `learned`
    /// has the addresses of its name, if it has one.
    ///
    /// # Errors
    /// The addresses of its name are not learned.
    pub fn new(
        target: &ResolvedTarget,
        [port4, port6]: [u16; 2],
        learned: Option<&LearnedAddresses>,
    ) -> Result<Self> {
        let names = learned.map(|learned| learned.bit_of(target)).transpose()?;
        let hosts: Vec<Network> = target
            .hosts
            .iter()
            .map(|host| Network::new(host.address(), host.prefix()))
            .collect();
        Ok(Self {
            steer: Steer {
                names: names.unwrap_or(0),
                port4,
                port6,
                any_host: u16::from(target.has_any_host()),
                refused: 0,
                padding: 0,
                protocols: match target.protocol {
                    Protocol::Tcp => steered::TCP,
                    Protocol::Udp | Protocol::Dns => steered::UDP,
                    Protocol::Any => steered::TCP | steered::UDP,
                    Protocol::Icmp => 0,
                },
            },
            hosts,
        })
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct HostKey {
    service: u32,
    address: [u8; 16],
}

// SAFETY: `repr(C)` without padding; any bit pattern is a key.
unsafe impl Pod for HostKey {}

/// The mark of the relay's own sockets. 16 bits of it are random, because process ids do not distinguish instances:
/// each is 1 in its own container.
#[must_use]
pub fn relay_mark() -> u32 {
    static DRAWN: OnceLock<u64> = OnceLock::new();
    let drawn = DRAWN.get_or_init(|| RandomState::new().hash_one(0));
    0xfa17_0000 | u32::try_from(drawn & 0xffff).unwrap_or(0)
}

/// How many services the programs have room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Services, at most [`STEERS`]. The verifier takes the longer, the more these are.
    pub services: u32,
    /// Their hosts; there is always room for some thousands.
    pub hosts: usize,
}

impl Room {
    /// Room for services that are not known yet.
    pub const LATER: Self = Self {
        services: STEERS,
        hosts: 0,
    };
}

/// Creates the maps of the cgroup programs; no service is in them yet. `netns` is the cookie of the network namespace,
/// or 0; with `own_servers`, only connections to servers of the cgroup are redirected to the relay.
///
/// # Errors
/// A system call fails.
pub fn load(room: Room, netns: u64, own_servers: bool) -> Result<(Ebpf, Table)> {
    check_abi(OBJECT)?;
    let hosts = room.hosts.max(HOSTS_LEAST);
    let mark = relay_mark();
    let own_servers = u32::from(own_servers);
    let mut loader = new_loader();
    loader
        .override_global("RELAY_MARK", &mark, true)
        .override_global("NETNS", &netns, true)
        .override_global("SERVICES", &room.services, true)
        .override_global("OWN_SERVERS", &own_servers, true)
        .map_max_entries("SERVED", SERVERS)
        .map_max_entries("WATCHED", WATCHED)
        .map_max_entries("HANDSHAKES", HANDSHAKES)
        .map_max_entries("STEER_HOSTS", u32::try_from(hosts)?);
    for name in UNUSED_MAPS {
        loader.map_max_entries(name, 1);
    }
    let mut ebpf = loader.load(OBJECT).context("creating the BPF maps")?;
    let hosts = ebpf
        .take_map("STEER_HOSTS")
        .context("the eBPF object has no map STEER_HOSTS")?;
    let learned = ebpf
        .take_map("STEER_LEARNED")
        .context("the eBPF object has no map STEER_LEARNED")?;
    let table = Table {
        ports: mapped(&mut ebpf, "STEER_PORTS", 1 << 16)?,
        entries: mapped(&mut ebpf, "STEER_TABLE", STEERS)?,
        hosts: hosts.try_into()?,
        learned: learned.try_into()?,
    };
    Ok((ebpf, table))
}

/// The services, and which of them are matched.
pub struct Table {
    /// A bit mask of services for each port.
    ports: MappedArray<u64>,
    entries: MappedArray<Steer>,
    hosts: LpmTrie<MapData, HostKey, u32>,
    /// The map with the addresses of names.
    learned: ArrayOfMaps<MapData, LearnedMap<MapData>>,
}

impl Table {
    /// Sets the first services. None is matched before [`Table::switch`]. `learned` has the addresses of their names.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn fill(
        &mut self,
        services: &[ServiceEntry],
        learned: Option<&LearnedAddresses>,
    ) -> Result<()> {
        // Setting it waits for running programs, which takes some milliseconds.
        if let Some(learned) = learned
            && services.iter().any(|service| service.steer.names != 0)
        {
            let set = self.learned.set(0, learned.map(), 0);
            set.context("sharing the addresses of names")?;
        }
        let mut services = (0..).zip(services);
        services.try_for_each(|(index, service)| self.set(index, service))
    }

    /// Sets the service `index`. It must be switched off meanwhile.
    ///
    /// # Errors
    /// A host can't be added to the map.
    pub fn set(&mut self, index: u32, service: &ServiceEntry) -> Result<()> {
        for network in &service.hosts {
            self.hosts
                .insert(&host_key(index, network), 1, 0)
                .context("entering a host")?;
        }
        self.lead(index, service.steer);
        Ok(())
    }

    /// Redirects the connections of service `index` elsewhere.
    pub fn lead(&mut self, index: u32, steer: Steer) {
        self.entries.set(index as usize, steer);
    }

    /// Removes the hosts of service `index`.
    pub fn clear(&mut self, index: u32, service: &ServiceEntry) {
        for network in &service.hosts {
            // An entry that does not exist needs no removal.
            let _gone = self.hosts.remove(&host_key(index, network));
        }
    }

    /// Starts or stops matching service `index` on these ports.
    pub fn switch(&mut self, index: u32, ports: &[PortRange], on: bool) {
        for range in ports {
            for port in range.first..=range.last {
                let at = usize::from(port);
                let bit = 1_u64 << index;
                let before = self.ports.get(at);
                let now = if on { before | bit } else { before & !bit };
                self.ports.set(at, now);
            }
        }
    }
}

fn host_key(service: u32, network: &Network) -> Key<HostKey> {
    let key = HostKey {
        service,
        address: network.address.to_be_bytes(),
    };
    Key::new(32 + u32::from(network.prefix), key)
}
