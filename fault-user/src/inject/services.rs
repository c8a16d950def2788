//! Services that programs at cgroups know by their ports and hosts, and how such programs are loaded.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::{Ebpf, Pod};
use fault_common::abi::{STEERS, Steer, steered};

use crate::plan::tables::Network;
use crate::rule::{PortRange, Protocol, ResolvedTarget};
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::bpf::object::{OBJECT, check_abi, mapped, new_loader};

/// Maps of the same object that only the packet programs use, made as small as can be.
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

/// How many connections can be watched at once. One more is counted, and no expectation is judged then.
const WATCHED: u32 = 1 << 18;
/// How many addresses and ports a cgroup's servers may listen at.
pub const SERVERS: u32 = 65_536;
/// How many connections can be on their way to being accepted by the relay.
const HANDSHAKES: u32 = 16_384;
/// Room for so many hosts at least: services can come later.
const HOSTS_LEAST: usize = 256;

/// A target as the programs know it.
pub struct Service {
    /// Where its connections are led, if they are.
    pub steer: Steer,
    /// Its hosts; empty for all.
    pub hosts: Vec<Network>,
}

impl Service {
    /// A target whose connections are led to relays on these ports of loopback (IPv4, IPv6); 0 for none.
    #[must_use]
    pub fn new(target: &ResolvedTarget, [port4, port6]: [u16; 2]) -> Self {
        let hosts: Vec<Network> = target
            .hosts
            .iter()
            .map(|host| Network::new(host.address(), host.prefix()))
            .collect();
        Self {
            steer: Steer {
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
        }
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

/// The mark of the relay's own sockets: 16 bits of it two instances most likely do not share. Their process numbers they
/// may: each is 1 in a container of its own.
#[must_use]
pub fn relay_mark() -> u32 {
    static DRAWN: OnceLock<u64> = OnceLock::new();
    let drawn = DRAWN.get_or_init(|| RandomState::new().hash_one(0));
    0xfa17_0000 | u32::try_from(drawn & 0xffff).unwrap_or(0)
}

/// Creates the maps of the programs at cgroups, with these services in them. None is looked for before
/// [`Table::switch`]. `netns` is the cookie of the network namespace, or 0; with `own_servers` only connections to servers
/// of the cgroup are given to the relay.
///
/// # Errors
/// The kernel refuses.
pub fn load(services: &[Service], netns: u64, own_servers: bool) -> Result<(Ebpf, Table)> {
    check_abi(OBJECT)?;
    let hosts: usize = services.iter().map(|service| service.hosts.len()).sum();
    let hosts = hosts.max(HOSTS_LEAST);
    let mark = relay_mark();
    let own_servers = u32::from(own_servers);
    let mut loader = new_loader();
    loader
        .override_global("RELAY_MARK", &mark, true)
        .override_global("NETNS", &netns, true)
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
    let mut table = Table {
        ports: mapped(&mut ebpf, "STEER_PORTS", 1 << 16)?,
        entries: mapped(&mut ebpf, "STEER_TABLE", STEERS)?,
        hosts: hosts.try_into()?,
    };
    for (index, service) in (0_u32..).zip(services) {
        table.set(index, service)?;
    }
    Ok((ebpf, table))
}

/// The services, and which of them are looked for.
pub struct Table {
    /// By port, a bit for each service.
    ports: MappedArray<u64>,
    entries: MappedArray<Steer>,
    hosts: LpmTrie<MapData, HostKey, u32>,
}

impl Table {
    /// Puts a service in place `index`. It must not be looked for meanwhile.
    ///
    /// # Errors
    /// The kernel refuses a host.
    pub fn set(&mut self, index: u32, service: &Service) -> Result<()> {
        for network in &service.hosts {
            self.hosts
                .insert(&host_key(index, network), 1, 0)
                .context("entering a host")?;
        }
        self.lead(index, service.steer);
        Ok(())
    }

    /// Leads the connections of service `index` elsewhere.
    pub fn lead(&mut self, index: u32, steer: Steer) {
        self.entries.set(index as usize, steer);
    }

    /// Forgets the hosts of service `index`.
    pub fn clear(&mut self, index: u32, service: &Service) {
        for network in &service.hosts {
            // What is not there needs no removal.
            let _gone = self.hosts.remove(&host_key(index, network));
        }
    }

    /// From now on service `index` is looked for at these ports, or no longer.
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
