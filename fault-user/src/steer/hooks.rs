//! The programs that lead connections to the relay, and their maps.

use std::collections::HashMap as StdHashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData};
use aya::programs::{CgroupSockAddr, Program, ProgramError, SockOps};
use aya::{Ebpf, EbpfLoader, Pod};
use fault_common::abi::{Destination, STEERS, Steer};
use fault_common::flow::MAPPED_PREFIX;

use crate::kernel::cgroup_link::{CgroupLink, Hook};
use crate::kernel::mapped::MappedArray;
use crate::kernel::object::{OBJECT, check_abi};
use crate::kernel::ruleset::Network;
use crate::kernel::verifier;
use crate::rule::PortRange;

/// `SO_NETNS_COOKIE` of Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// Maps of the same object that only the packet programs use, made as small as can be.
const UNUSED_MAPS: [&str; 9] = [
    "PORTS",
    "HOLDS",
    "RELEASES",
    "SPREADS",
    "FLOWS",
    "RULES",
    "VECTORS",
    "SUMMARIES",
    "SCOPES",
];

/// What connections were meant for, by the client's own address.
#[derive(Clone)]
pub struct Originals(Arc<Mutex<HashMap<MapData, Destination, Destination>>>);

impl Originals {
    /// Where a client's connection was meant to go.
    ///
    /// # Errors
    /// A connection that was not led here: somebody connected to the relay by itself.
    pub fn of(&self, client: SocketAddr) -> io::Result<SocketAddr> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let original = known
            .get(&destination(client), 0)
            .map_err(|error| io::Error::other(format!("{client} was not led here: {error}")))?;
        Ok(address(original))
    }
}

/// Programs attached to a cgroup; they go with this value, and with the process.
pub struct Hooks {
    ports: MappedArray<u64>,
    /// How often each entry is on, with its ports.
    on: StdHashMap<u32, Vec<PortRange>>,
    _links: Vec<CgroupLink>,
    _ebpf: Ebpf,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct HostKey {
    steer: u32,
    address: [u8; 16],
}

// SAFETY: `repr(C)` without padding; any bit pattern is a key.
unsafe impl Pod for HostKey {}

/// A target whose connections are led somewhere.
pub struct Entry {
    /// Where to.
    pub steer: Steer,
    /// Its hosts; empty for all.
    pub hosts: Vec<Network>,
}

impl Hooks {
    /// Loads the programs and attaches them to a cgroup. Nothing is led anywhere before [`Hooks::switch`]. `mark` is
    /// that of the relay's own sockets.
    ///
    /// # Errors
    /// The kernel refuses (the hooks are of Linux 5.8), or there are too many targets.
    pub fn attach(
        cgroup: &Path,
        whole_host: bool,
        mark: u32,
        entries: &[Entry],
    ) -> Result<(Self, Originals)> {
        ensure!(
            entries.len() <= STEERS as usize,
            "stream faults are possible on {STEERS} targets at once: use fewer"
        );
        check_abi(OBJECT)?;
        let netns = netns_cookie();
        // Without it the connections of every container would be led to a relay that they can't reach.
        ensure!(
            netns != 0 || !whole_host,
            "stream faults on the whole host need Linux 5.14, to tell network namespaces apart: use `fault run` without --scope \
             host, or --pid or --cgroup"
        );
        let hosts: usize = entries.iter().map(|entry| entry.hosts.len()).sum();
        let mut loader = EbpfLoader::new();
        loader
            .override_global("RELAY_MARK", &mark, true)
            .override_global("NETNS", &netns, true)
            .map_max_entries("STEER_HOSTS", u32::try_from(hosts.max(1))?);
        for name in UNUSED_MAPS {
            loader.map_max_entries(name, 1);
        }
        let mut ebpf = loader.load(OBJECT).context("creating the BPF maps")?;
        write_hosts(&mut ebpf, entries)?;
        let mut table = mapped(&mut ebpf, "STEER_TABLE", STEERS)?;
        for (index, entry) in entries.iter().enumerate() {
            table.set(index, entry.steer);
        }
        let ports = mapped(&mut ebpf, "STEER_PORTS", 1 << 16)?;
        let links = attach_all(&mut ebpf, cgroup)?;
        let peers = ebpf
            .take_map("PEERS")
            .context("the eBPF object has no map PEERS")?;
        let originals = Originals(Arc::new(Mutex::new(HashMap::try_from(peers)?)));
        let hooks = Self {
            ports,
            on: StdHashMap::new(),
            _links: links,
            _ebpf: ebpf,
        };
        Ok((hooks, originals))
    }

    /// From now on the connections to these ports of entry `index` are led to the relay, or go straight again.
    pub fn switch(&mut self, index: u32, ports: &[PortRange], on: bool) {
        if on {
            self.on.insert(index, ports.to_vec());
        } else {
            self.on.remove(&index);
        }
        for range in ports {
            for port in range.first..=range.last {
                let at = usize::from(port);
                let bit = 1_u64 << index;
                let before = self.ports.get(at);
                self.ports
                    .set(at, if on { before | bit } else { before & !bit });
            }
        }
    }
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

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))?
        .try_into()
        .with_context(|| format!("{name} is a program of another kind"))
}

fn loaded(name: &str, status: Result<(), ProgramError>) -> Result<()> {
    status.map_err(|error| {
        let summary = verifier::summary(name, &error);
        anyhow!(error).context(summary)
    })
}

fn mapped<T: Pod>(ebpf: &mut Ebpf, name: &str, entries: u32) -> Result<MappedArray<T>> {
    let map = ebpf
        .map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    let aya::maps::Map::Array(data) = map else {
        anyhow::bail!("the eBPF object's map {name} is not an array");
    };
    MappedArray::new(data, entries)
}

fn write_hosts(ebpf: &mut Ebpf, entries: &[Entry]) -> Result<()> {
    let map = ebpf
        .map_mut("STEER_HOSTS")
        .context("the eBPF object has no map STEER_HOSTS")?;
    let mut hosts: LpmTrie<&mut MapData, HostKey, u32> = map.try_into()?;
    for (steer, entry) in (0_u32..).zip(entries) {
        for network in &entry.hosts {
            let key = HostKey {
                steer,
                address: network.address.to_be_bytes(),
            };
            hosts.insert(&Key::new(32 + u32::from(network.prefix), key), 1, 0)?;
        }
    }
    Ok(())
}

/// The network namespace's cookie; 0 where the kernel does not tell it.
fn netns_cookie() -> u64 {
    let Ok(socket) = std::net::UdpSocket::bind(("0.0.0.0", 0)) else {
        return 0;
    };
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: eight bytes of room, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status == 0 { cookie } else { 0 }
}

/// An address as the maps have it.
fn destination(of: SocketAddr) -> Destination {
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

/// The address that the maps have.
fn address(of: Destination) -> SocketAddr {
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
