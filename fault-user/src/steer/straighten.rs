//! Sockets for datagrams that were connected while they were led stay connected to the relay. When it goes they are
//! connected to whom they meant: no process need open them anew.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use socket2::{Domain, SockAddr, SockRef};

use crate::kernel::netlink::Netlink;
use crate::process::proc::open_pidfd;
use crate::process::sockets::{Protocol, list_by};

/// Connects what is connected to the relay to its server, by the relay's address. Nothing must be led any more.
///
/// # Errors
/// The kernel can't list sockets, or a process that has such a one can't be reached (`CAP_SYS_PTRACE`).
pub fn straighten(netlink: &mut Netlink, servers: &HashMap<SocketAddr, SocketAddr>) -> Result<()> {
    let sockets = list_by(netlink, Protocol::Udp)?;
    let mut led: HashMap<u64, SocketAddr> = sockets
        .iter()
        .filter_map(|socket| Some((socket.inode, *servers.get(&socket.remote?)?)))
        .collect();
    if led.is_empty() {
        return Ok(());
    }
    let processes = std::fs::read_dir("/proc").context("listing processes")?;
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().parse::<i32>();
        if let Ok(pid) = pid {
            straighten_process(pid, &process.path(), &mut led)?;
        }
    }
    Ok(())
}

/// One that has ended meanwhile, or that may not be looked into, has none.
fn straighten_process(pid: i32, folder: &Path, led: &mut HashMap<u64, SocketAddr>) -> Result<()> {
    let Ok(files) = std::fs::read_dir(folder.join("fd")) else {
        return Ok(());
    };
    for file in files.flatten() {
        let link = std::fs::read_link(file.path()).unwrap_or_default();
        let inode = link.to_str().and_then(|text| {
            text.strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse()
                .ok()
        });
        let number = file.file_name().to_string_lossy().parse::<i32>();
        let (Some(inode), Ok(number)) = (inode, number) else {
            continue;
        };
        // Another process may have the same socket.
        if let Some(server) = led.remove(&inode) {
            let socket = take(pid, number).and_then(|socket| connect(&socket, server));
            socket.with_context(|| format!("connecting a socket of process {pid} to {server}"))?;
        }
    }
    Ok(())
}

/// A second descriptor of a process's socket.
fn take(pid: i32, number: i32) -> io::Result<OwnedFd> {
    let process = open_pidfd(pid)?;
    // SAFETY: two descriptors and no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
