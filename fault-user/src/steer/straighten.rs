//! Sockets for datagrams that were connected while they were led stay connected to the relay. When it goes they are
//! connected to whom they meant: no process need open them anew.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use socket2::{Domain, SockAddr, SockRef};

use crate::kernel::netlink::Netlink;
use crate::process::proc::take_sockets;
use crate::process::sockets::{Protocol, list_by};

/// Connects what is connected to the relay to its server, by the relay's address. Nothing must be led any more.
///
/// # Errors
/// The kernel can't list sockets, or a process that has such a one can't be reached (`CAP_SYS_PTRACE`).
pub fn straighten(netlink: &mut Netlink, servers: &HashMap<SocketAddr, SocketAddr>) -> Result<()> {
    let sockets = list_by(netlink, Protocol::Udp)?;
    let led: HashMap<u64, SocketAddr> = sockets
        .iter()
        .filter_map(|socket| Some((socket.inode, *servers.get(&socket.remote?)?)))
        .collect();
    take_sockets(led, |pid, socket, server| {
        socket
            .and_then(|socket| connect(&socket, server))
            .with_context(|| format!("connecting a socket of process {pid} to {server}"))
    })
}

fn connect(socket: &OwnedFd, server: SocketAddr) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // The kernel has chosen loopback for its own address: that is forgotten with the connection.
    // SAFETY: all zeros is an address of no family, which connect(2) takes for none.
    let nobody: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).map_err(io::Error::other)?;
    // SAFETY: the address is as long as is said, and lives through the call.
    let left = unsafe { libc::connect(socket.as_raw_fd(), (&raw const nobody).cast(), length) };
    Errno::result(left)?;
    let server = match server.ip() {
        IpAddr::V4(v4) if socket.domain()? == Domain::IPV6 => {
            SocketAddr::new(v4.to_ipv6_mapped().into(), server.port())
        }
        _ => server,
    };
    socket.connect(&SockAddr::from(server))
}
