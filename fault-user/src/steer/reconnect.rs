//! Resets connections that were open before a rule, so that clients reconnect through the relay.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::Parseable as _;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags,
};
use netlink_packet_sock_diag::message::SockDiagDestroy;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use socket2::{Domain, Socket, Type};

use crate::inject::services::relay_mark;
use crate::rule::ResolvedTarget;
use crate::sys::net::netlink::{Netlink, attributes};
use crate::sys::process::proc::{open_sockets, take_sockets};
use crate::sys::process::sockets::set_tcp;

/// Bytes of `struct inet_diag_msg` (`linux/inet_diag.h`).
const HEADER_BYTES: usize = 72;
/// Attributes that follow it: `INET_DIAG_MARK`, `INET_DIAG_CGROUP_ID` (Linux 5.8).
const MARK: u16 = 15;
const CGROUP_ID: u16 = 21;

/// One end of a connection in this network namespace.
pub struct SocketEnd {
    family: u8,
    id: SocketId,
    /// Its address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
    inode: u32,
    cgroup: Option<u64>,
    /// Whether it belongs to the relay.
    pub ours: bool,
}

/// Resets the open connections to a target: those of the processes in `cgroup` and its descendants, or of all local
/// clients. `netlink` determines the network namespace. If the other end is on this host, that end is closed, and the
/// client sees a reset instead of `ECONNABORTED`. Otherwise an RST is sent in the name of the other end. Returns the
/// number of connections.
///
/// # Errors
/// The kernel can't list or close sockets of other processes (`CONFIG_INET_DIAG_DESTROY`), or privileges are missing.
pub fn reset(
    netlink: &mut Netlink,
    peers: &Peers,
    target: &ResolvedTarget,
    cgroup: Option<&Path>,
) -> Result<u64> {
    let scope = cgroup.map(SocketScope::of).transpose()?;
    let mut states = StateFlags::all();
    states.remove(StateFlags::LISTEN | StateFlags::TIME_WAIT);
    let ends = list(netlink, &states)?;
    let mut count = 0;
    let mut alone = HashMap::new();
    let is_redirected =
        |end: &SocketEnd| !end.ours && scope.as_ref().is_none_or(|scope| scope.has(end));
    for end in ends.iter().filter(|end| is_redirected(end)) {
        let other = ends
            .iter()
            .find(|other| other.local == end.remote && other.remote == end.local);
        match other {
            Some(other) if is_aimed(target, end.remote) => {
                count += u64::from(close(netlink, other)?);
            }
            None if is_aimed(target, end.remote) || is_aimed(target, end.local) => {
                alone.insert(u64::from(end.inode), end);
            }
            _ => {}
        }
    }
    count += u64::try_from(alone.len())?;
    let mut left: HashMap<u64, &SocketEnd> = alone.clone();
    take_sockets(alone, |pid, socket, end| {
        match socket.and_then(|socket| peers.reset(&socket, end)) {
            Ok(true) => drop(left.remove(&u64::from(end.inode))),
            Ok(false) => {}
            Err(error) => {
                log::info!("a connection of process {pid} is aborted, not reset: {error}");
            }
        }
        Ok(())
    })?;
    for end in left.values() {
        close(netlink, end)?;
    }
    Ok(count)
}

/// Sends RSTs in the name of either end of a connection.
#[derive(Default)]
pub struct Peers {
    /// Over IPv4 and IPv6; none without `CAP_NET_RAW`.
    raw: [Option<Socket>; 2],
}

/// A socket that does not notice an RST within this time is aborted.
const NOTICE_MS: u16 = 200;

impl Peers {
    /// Opens raw sockets in the calling thread's network namespace. Without permission connections are aborted instead,
    /// and their owners see `ECONNABORTED`.
    #[must_use]
    pub fn open() -> Self {
        let raw = [Domain::IPV4, Domain::IPV6].map(|domain| {
            let protocol = socket2::Protocol::from(libc::IPPROTO_RAW);
            Socket::new(domain, Type::RAW, Some(protocol))
                .inspect_err(|error| {
                    log::info!(
                        "`reconnect` aborts connections to other hosts: no raw socket ({error})"
                    );
                })
                .ok()
        });
        Self { raw }
    }

    /// Resets both ends of a connection, one of which is `socket`. Returns `false` if the socket did not notice the
    /// RST.
    fn reset(&self, socket: &OwnedFd, end: &SocketEnd) -> std::io::Result<bool> {
        let [sent, received] = sequences(socket)?;
        self.send_rst(end.local, end.remote, sent)?;
        self.send_rst(end.remote, end.local, received)?;
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        Ok(poll(&mut polled, NOTICE_MS)? != 0)
    }

    fn send_rst(&self, from: SocketAddr, to: SocketAddr, sequence: u32) -> std::io::Result<()> {
        let raw = self.raw[usize::from(from.is_ipv6())].as_ref();
        let raw = raw.ok_or(Errno::EPERM)?;
        let packet = rst(from, to, sequence);
        raw.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())?;
        Ok(())
    }
}

/// The next sequence numbers that a socket sends and expects (`TCP_REPAIR`, tcp(7)).
fn sequences(socket: &OwnedFd) -> std::io::Result<[u32; 2]> {
    const TCP_RECV_QUEUE: libc::c_int = 1;
    const TCP_SEND_QUEUE: libc::c_int = 2;
    /// Without the window probe.
    const OFF: libc::c_int = -1;
    set_tcp(socket, libc::TCP_REPAIR, 1)?;
    let read = [TCP_SEND_QUEUE, TCP_RECV_QUEUE].map(|queue| {
        set_tcp(socket, libc::TCP_REPAIR_QUEUE, queue)?;
        tcp(socket, libc::TCP_QUEUE_SEQ)
    });
    set_tcp(socket, libc::TCP_REPAIR, OFF)?;
    let [sent, received] = read;
    Ok([sent?, received?])
}

fn tcp(socket: &OwnedFd, option: libc::c_int) -> Result<u32, Errno> {
    let mut value = 0_u32;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(0);
    // SAFETY: room for an integer of the size that is told.
    let status = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            value,
            &raw mut length,
        )
    };
    Errno::result(status).map(|_| value)
}

/// A packet that resets a connection, starting with the IP header. The kernel fills in IPv4's length and checksum.
fn rst(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    const TCP: u8 = 6;
    const HEADER: u8 = 20;
    const RST: u8 = 4;
    const HOPS: u8 = 64;
    let mut segment = [from.port(), to.port()].map(u16::to_be_bytes).concat();
    segment.extend(sequence.to_be_bytes());
    segment.extend([0, 0, 0, 0, (HEADER / 4) << 4, RST, 0, 0, 0, 0, 0, 0]);
    let (mut packet, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V6(from), IpAddr::V6(to)) => (
            vec![0x60, 0, 0, 0, 0, HEADER, TCP, HOPS],
            [from.octets(), to.octets()].concat(),
        ),
        (IpAddr::V4(from), IpAddr::V4(to)) => (
            vec![0x45, 0, 0, 40, 0, 0, 0, 0, HOPS, TCP, 0, 0],
            [from.octets(), to.octets()].concat(),
        ),
        // Both ends of a connection have the same IP version.
        _ => return Vec::new(),
    };
    let summed = addresses.chunks(2).chain(segment.chunks(2));
    let mut sum: u32 = u32::from(HEADER) + u32::from(TCP);
    for word in summed {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum).unwrap_or(0);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(addresses);
    packet.extend(segment);
    packet
}

/// The addresses on which processes in a cgroup already listen.
///
/// # Errors
/// The kernel can't list sockets of other processes, or the cgroup has been removed.
pub fn listeners(cgroup: &Path) -> Result<Vec<SocketAddr>> {
    let scope = SocketScope::of(cgroup)?;
    if scope.is_empty {
        return Ok(Vec::new());
    }
    let mut netlink = Netlink::sock_diag()?;
    let ends = list(&mut netlink, &StateFlags::LISTEN)?;
    let own = ends.iter().filter(|end| scope.has(end));
    Ok(own.map(|end| end.local).collect())
}

/// Whether a target includes this address.
#[must_use]
pub fn is_aimed(target: &ResolvedTarget, address: SocketAddr) -> bool {
    let port = target
        .ports
        .iter()
        .any(|range| (range.first..=range.last).contains(&address.port()));
    port && target.has_host(address.ip())
}

/// The sockets of a cgroup: those created in it or below it, and those open in its current processes.
pub struct SocketScope {
    cgroups: HashSet<u64>,
    inodes: HashSet<u64>,
    /// The cgroup has no processes.
    is_empty: bool,
}

impl SocketScope {
    /// Reads the current processes and sockets of a cgroup.
    ///
    /// # Errors
    /// The cgroup has been removed.
    pub fn of(path: &Path) -> Result<Self> {
        let mut scope = Self {
            cgroups: HashSet::new(),
            inodes: HashSet::new(),
            is_empty: true,
        };
        let mut left = vec![path.to_owned()];
        while let Some(path) = left.pop() {
            scope.add(&path)?;
            left.extend(below(&path)?);
        }
        Ok(scope)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let status =
            std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        self.cgroups.insert(status.ino());
        let processes = std::fs::read_to_string(path.join("cgroup.procs"))
            .with_context(|| format!("listing the processes of {}", path.display()))?;
        for pid in processes.lines() {
            self.is_empty = false;
            let sockets = match open_sockets(pid.parse()?) {
                Ok(sockets) => sockets,
                // A process that can't be inspected is known only by its cgroup.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("listing the sockets of process {pid}"));
                }
            };
            self.inodes.extend(sockets.iter().map(|one| one.inode));
        }
        Ok(())
    }

    /// Whether a socket belongs to the cgroup.
    #[must_use]
    pub fn has(&self, end: &SocketEnd) -> bool {
        end.cgroup
            .is_some_and(|cgroup| self.cgroups.contains(&cgroup))
            || self.inodes.contains(&end.inode.into())
    }
}

/// The child cgroups of a cgroup.
fn below(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).with_context(|| format!("listing {}", path.display()))?;
    Ok(entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect())
}

/// Lists the TCP sockets in these states, in the network namespace of `netlink`.
///
/// # Errors
/// The kernel can't list them.
pub fn list(netlink: &mut Netlink, states: &StateFlags) -> Result<Vec<SocketEnd>> {
    let mut ends = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id: if family == AF_INET {
                SocketId::new_v4()
            } else {
                SocketId::new_v6()
            },
        });
        let listed = netlink.dump(&request, |payload| decode(family, payload).map(Some));
        ends.extend(listed.context("can't list the open sockets (CONFIG_INET_DIAG)")?);
    }
    Ok(ends)
}

fn decode(family: u8, payload: &[u8]) -> Result<SocketEnd> {
    let header = InetResponseHeader::parse(payload).context("a malformed sock_diag answer")?;
    let id = header.socket_id;
    let mut end = SocketEnd {
        family,
        local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
        remote: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
        id,
        inode: header.inode,
        cgroup: None,
        ours: false,
    };
    for (kind, value) in attributes(payload, HEADER_BYTES)? {
        match (kind, value.first_chunk::<4>(), value.first_chunk::<8>()) {
            (MARK, Some(mark), _) => end.ours = u32::from_ne_bytes(*mark) == relay_mark(),
            (CGROUP_ID, _, Some(cgroup)) => end.cgroup = Some(u64::from_ne_bytes(*cgroup)),
            _ => {}
        }
    }
    Ok(end)
}

/// Closes one end. Returns `false` if it no longer exists.
fn close(netlink: &mut Netlink, end: &SocketEnd) -> Result<bool> {
    let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(InetRequest {
        family: end.family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: end.id.clone(),
    }));
    match netlink.change(request, 0) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => bail!(
            "this kernel can't reset connections of other processes (CONFIG_INET_DIAG_DESTROY): leave `reconnect` out"
        ),
        Err(error) => Err(error).context("resetting a connection"),
    }
}
