//! Resets connections that are open before a rule, so that they come back through the relay.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
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

use crate::kernel::netlink::{Netlink, attributes};
use crate::kernel::services::relay_mark;
use crate::process::proc::open_sockets;
use crate::rule::ResolvedTarget;

/// Bytes of `struct inet_diag_msg` (`linux/inet_diag.h`).
const HEADER_BYTES: usize = 72;
/// Attributes behind it: `INET_DIAG_MARK`, `INET_DIAG_CGROUP_ID` (Linux 5.8).
const MARK: u16 = 15;
const CGROUP_ID: u16 = 21;

/// One end of a connection in this network namespace.
pub struct End {
    family: u8,
    id: SocketId,
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's.
    pub remote: SocketAddr,
    inode: u32,
    cgroup: Option<u64>,
    /// Whether it is the relay's own.
    pub ours: bool,
}

/// Resets the connections to a target that processes in `cgroup` (with its descendants), or all clients here, have open; `netlink` tells where that is.
/// Where the server is on this host it is its end that is closed, so that the client sees a reset and not
/// `ECONNABORTED`. Gives how many.
///
/// # Errors
/// The kernel can't list or close sockets of others (`CONFIG_INET_DIAG_DESTROY`), or there are no rights.
pub fn reset(netlink: &mut Netlink, target: &ResolvedTarget, cgroup: Option<&Path>) -> Result<u64> {
    let scope = cgroup.map(Scope::of).transpose()?;
    let mut states = StateFlags::all();
    states.remove(StateFlags::LISTEN | StateFlags::TIME_WAIT);
    let ends = list(netlink, &states)?;
    let mut count = 0;
    let is_led = |end: &End| !end.ours && scope.as_ref().is_none_or(|scope| scope.has(end));
    for end in ends.iter().filter(|end| is_led(end)) {
        let other = ends
            .iter()
            .find(|other| other.local == end.remote && other.remote == end.local);
        let closed = if is_aimed(target, end.remote) {
            other.unwrap_or(end)
        } else if is_aimed(target, end.local) && other.is_none() {
            // Its client is outside.
            end
        } else {
            continue;
        };
        if close(netlink, closed)? {
            count += 1;
        }
    }
    Ok(count)
}

/// Where processes in a cgroup listen already.
///
/// # Errors
/// The kernel can't list sockets of others, or the cgroup is gone.
pub fn listeners(cgroup: &Path) -> Result<Vec<SocketAddr>> {
    let scope = Scope::of(cgroup)?;
    if scope.is_empty {
        return Ok(Vec::new());
    }
    let mut netlink = Netlink::sock_diag()?;
    let ends = list(&mut netlink, &StateFlags::LISTEN)?;
    let own = ends.iter().filter(|end| scope.has(end));
    Ok(own.map(|end| end.local).collect())
}

/// Whether a target has this address.
#[must_use]
pub fn is_aimed(target: &ResolvedTarget, address: SocketAddr) -> bool {
    let port = target
        .ports
        .iter()
        .any(|range| (range.first..=range.last).contains(&address.port()));
    let mut hosts = target.hosts.iter();
    port && (target.hosts.is_empty() || hosts.any(|host| host.contains(address.ip())))
}

/// Sockets that belong to a cgroup: made in it or below, or open in a process that is there now.
pub struct Scope {
    cgroups: HashSet<u64>,
    inodes: HashSet<u64>,
    /// There are no processes in it.
    is_empty: bool,
}

impl Scope {
    /// What there is of a cgroup now.
    ///
    /// # Errors
    /// It is gone.
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
                // One that may not be looked into is known by its cgroup alone.
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

    /// Whether a socket is its own.
    #[must_use]
    pub fn has(&self, end: &End) -> bool {
        end.cgroup
            .is_some_and(|cgroup| self.cgroups.contains(&cgroup))
            || self.inodes.contains(&end.inode.into())
    }
}

/// The cgroups in a cgroup.
fn below(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).with_context(|| format!("listing {}", path.display()))?;
    Ok(entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect())
}

/// The sockets of TCP in these states, in the network namespace of `netlink`.
///
/// # Errors
/// The kernel does not list them.
pub fn list(netlink: &mut Netlink, states: &StateFlags) -> Result<Vec<End>> {
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

fn decode(family: u8, payload: &[u8]) -> Result<End> {
    let header = InetResponseHeader::parse(payload).context("a malformed sock_diag answer")?;
    let id = header.socket_id;
    let mut end = End {
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

/// Closes one end; false when it has gone meanwhile.
fn close(netlink: &mut Netlink, end: &End) -> Result<bool> {
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
            "this kernel can't reset connections of others (CONFIG_INET_DIAG_DESTROY): leave `reconnect` out"
        ),
        Err(error) => Err(error).context("resetting a connection"),
    }
}
