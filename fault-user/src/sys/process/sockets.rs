//! The sockets that a process tree has open already.
//!
//! A socket keeps the cgroup that its maker was in, so a tree that is moved into a fresh cgroup
//! takes its new sockets along but not its old ones. Those are listed here, for the rules to know
//! them by their addresses.
use crate::sys::net::netlink::Netlink;
use crate::sys::process::proc::{ProcessId, socket_inodes};
use anyhow::{Context, Result};
use netlink_packet_core::Parseable;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags,
};
use nix::errno::Errno;
use nix::libc;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// TCP or UDP.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A TCP state as the kernel numbers them (`tcp_states.h`). A connected UDP socket is
/// [`TcpState::Established`], another one [`TcpState::Close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the states of RFC 9293 under their own names")]
pub enum TcpState {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynReceived,
    /// A state that a later kernel has added.
    Other(u8),
}

impl From<u8> for TcpState {
    fn from(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            12 => Self::NewSynReceived,
            other => Self::Other(other),
        }
    }
}

/// An open TCP or UDP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OpenSocket {
    /// Its protocol.
    pub protocol: Transport,
    /// Its own address. IPv4 on a dual-stack socket is given as IPv4: that is what its packets are.
    pub local: SocketAddr,
    /// The other end; `None` for a listener and an unconnected UDP socket.
    pub remote: Option<SocketAddr>,
    /// Its state.
    pub state: TcpState,
    /// The inode by which `/proc/PID/fd` names it.
    pub inode: u64,
}

/// The TCP and UDP sockets, IPv4 and IPv6, that these processes have open in the calling thread's
/// network namespace.
///
/// # Errors
/// When the processes' descriptors or the kernel's list of sockets can't be read.
pub fn of_processes(processes: &[ProcessId]) -> Result<Vec<OpenSocket>> {
    let inodes = socket_inodes(processes)?;
    if inodes.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = list()?;
    found.retain(|socket| inodes.contains(&socket.inode));
    Ok(found)
}

/// Every TCP and UDP socket of the calling thread's network namespace.
///
/// # Errors
/// When the kernel refuses the list (no `CONFIG_INET_DIAG`) or answers what can't be read.
pub fn list() -> Result<Vec<OpenSocket>> {
    let mut netlink = Netlink::sock_diag()?;
    let mut found = Vec::new();
    for protocol in [Transport::Tcp, Transport::Udp] {
        found.extend(list_by(&mut netlink, protocol)?);
    }
    Ok(found)
}

/// Every socket of a protocol in the network namespace that a netlink socket is of.
///
/// # Errors
/// As [`list`].
pub fn list_by(netlink: &mut Netlink, protocol: Transport) -> Result<Vec<OpenSocket>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let listed = netlink.dump(&request(protocol, family), |payload| {
            decode(protocol, payload).map(Some)
        });
        found.extend(listed.context("can't list the open sockets (CONFIG_INET_DIAG)")?);
    }
    Ok(found)
}

/// Whose socket it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// The user who made it.
    pub uid: u32,
    /// The inode by which `/proc/PID/fd` names it.
    pub inode: u64,
}

/// Whose the TCP socket with these addresses is, in the calling thread's network namespace; nothing when there is none, or
/// no process has it open any more: the kernel names root as the owner of those.
///
/// # Errors
/// When the kernel can't be asked (no `CONFIG_INET_DIAG`) or answers what can't be read.
pub fn owner(local: SocketAddr, remote: SocketAddr) -> Result<Option<SocketOwner>> {
    let header = find(&mut Netlink::sock_diag()?, local, remote)?;
    let exact = header.filter(|header| {
        let id = &header.socket_id;
        header.inode != 0 && (id.source_port, id.destination_port) == (local.port(), remote.port())
    });
    Ok(exact.map(|header| SocketOwner {
        uid: header.uid,
        inode: header.inode.into(),
    }))
}

/// The connections that wait at a listener to be accepted.
#[derive(Default)]
pub struct ListenerQueue {
    /// How many there are.
    pub length: u64,
    /// How many there may be.
    pub limit: u64,
}

/// The queue of a listener; an empty one without room if unknown.
pub fn queue(listener: &impl AsRawFd) -> ListenerQueue {
    // SAFETY: all zeros is a value of this structure of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = u32::try_from(size_of_val(&info)).unwrap_or(0);
    // SAFETY: room for the structure, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if status != 0 {
        return ListenerQueue::default();
    }
    // For a listening socket the kernel reports the queue in these fields.
    ListenerQueue {
        length: info.tcpi_unacked.into(),
        limit: info.tcpi_sacked.into(),
    }
}

/// How many more connections fit into the queue of the TCP socket that listens at `address` (or at all addresses), in the
/// network namespace of `netlink`; nothing when none listens.
///
/// # Errors
/// When the kernel can't be asked (no `CONFIG_INET_DIAG`) or answers what can't be read.
pub fn room_at(netlink: &mut Netlink, address: SocketAddr) -> Result<Option<u32>> {
    // No connection comes from port 0, so only a listener is found.
    let nobody = SocketAddr::new(address.ip(), 0);
    let header = find(netlink, address, nobody)?;
    let listener = header.filter(|header| TcpState::from(header.state) == TcpState::Listen);
    // Of a listener the kernel gives the length of its queue, and its limit, in these fields.
    Ok(listener.map(|header| header.send_queue.saturating_sub(header.recv_queue)))
}

/// Looks up the TCP socket with these addresses, or the one that listens at `local`.
fn find(
    netlink: &mut Netlink,
    local: SocketAddr,
    remote: SocketAddr,
) -> Result<Option<InetResponseHeader>> {
    let (local_ip, remote_ip) = (local.ip().to_canonical(), remote.ip().to_canonical());
    let family = if local_ip.is_ipv4() {
        AF_INET
    } else {
        AF_INET6
    };
    let request = SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local_ip,
            destination_address: remote_ip,
            interface_id: 0,
            // Any.
            cookie: [0xff; 8],
        },
    });
    let found = netlink.get(request, |payload| {
        InetResponseHeader::parse(payload).context("a malformed sock_diag answer")
    });
    found.context("can't look a socket up (CONFIG_INET_DIAG)")
}

fn request(protocol: Transport, family: u8) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: match protocol {
            Transport::Tcp => IPPROTO_TCP,
            Transport::Udp => IPPROTO_UDP,
        },
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: if family == AF_INET {
            SocketId::new_v4()
        } else {
            SocketId::new_v6()
        },
    })
}

fn decode(protocol: Transport, payload: &[u8]) -> Result<OpenSocket> {
    let header = InetResponseHeader::parse(payload).context("a malformed sock_diag answer")?;
    let id = header.socket_id;
    let local = SocketAddr::new(id.source_address.to_canonical(), id.source_port);
    let remote = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
    Ok(OpenSocket {
        protocol,
        local,
        remote: (remote.port() != 0).then_some(remote),
        state: TcpState::from(header.state),
        inode: header.inode.into(),
    })
}

/// Sets an integer option of a TCP socket.
///
/// # Errors
/// The kernel's own.
pub fn set_tcp(socket: &OwnedFd, option: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(0);
    // SAFETY: an integer of the size that is told, which lives through the call.
    let status = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, value, length)
    };
    Errno::result(status).map(drop)
}

/// Sets a socket's mark (`SO_MARK`).
///
/// # Errors
/// No rights.
pub fn set_mark(socket: BorrowedFd<'_>, number: u32) -> io::Result<()> {
    // SAFETY: the value is four bytes long.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            (&raw const number).cast(),
            4,
        )
    };
    Errno::result(status)?;
    Ok(())
}
