//! Checks kernel features in a temporary network namespace and cgroup. Only `tcx_here` uses the caller's own
//! interfaces.
//!
//! If a qdisc or classifier is a module, the check loads it, as its use by `fault` would.

use crate::sys::bpf::features as bpf;
use crate::sys::bpf::features::{XDP_GENERIC, attach_type, program_type};
use crate::sys::net::clsact;
use crate::sys::net::clsact::TcHook;
use crate::sys::net::netlink::Netlink;
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use anyhow::{Context, Result, anyhow};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NetlinkSerializable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

/// The index of `lo` in every new network namespace.
const LOOPBACK: u32 = 1;

/// Runs `probe` in a new network namespace, which is removed when it returns.
///
/// # Errors
/// When no namespace can be made (no `CAP_SYS_ADMIN`), or the probe's own error.
pub(crate) fn in_throw_away_netns<T: Send>(probe: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let tried = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("can't create a network namespace for the check (needs CAP_SYS_ADMIN)")?;
            probe()
        });
        tried
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether TCX and whether clsact with `cls_bpf` work. Must be called in a namespace of its own.
///
/// # Errors
/// When not even a program can be loaded.
pub(crate) fn tc_hooks() -> Result<(Result<()>, Result<()>)> {
    let program = bpf::load(program_type::SCHED_CLS, 0, -1).context("can't load a tc program")?;
    let tcx = bpf::link(program.as_fd(), LOOPBACK, attach_type::TCX_INGRESS, 0);
    let tcx = tcx.map(drop).map_err(anyhow::Error::from);
    let clsact = clsact::ensure(LOOPBACK).and_then(|_| {
        let name = "fault_probe";
        clsact::attach(LOOPBACK, TcHook::Egress, program.as_fd(), name, 0)
    });
    Ok((tcx, clsact))
}

/// Whether TCX works, in the caller's own namespace: on `lo` for an instant, by a program that lets the next one decide.
///
/// # Errors
/// The kernel's own.
pub(crate) fn tcx_here() -> Result<()> {
    let program = bpf::load(program_type::SCHED_CLS, 0, -1).context("can't load a tc program")?;
    drop(bpf::link(
        program.as_fd(),
        LOOPBACK,
        attach_type::TCX_INGRESS,
        0,
    )?);
    Ok(())
}

/// XDP in generic mode, on `lo`. Must be called in a namespace of its own.
pub(crate) fn xdp() -> Result<()> {
    // 2 is XDP_PASS.
    let program = bpf::load(program_type::XDP, 0, 2).context("can't load an XDP program")?;
    bpf::link(program.as_fd(), LOOPBACK, attach_type::XDP, XDP_GENERIC)?;
    Ok(())
}

/// An `sk_lookup` program on a namespace. Must be called in a namespace of its own.
pub(crate) fn sk_lookup() -> Result<()> {
    let hook = attach_type::SK_LOOKUP;
    // 1 is SK_PASS.
    let program = bpf::load(program_type::SK_LOOKUP, hook, 1).context("can't load it")?;
    let namespace = File::open("/proc/thread-self/ns/net").context("can't open the namespace")?;
    bpf::link(
        program.as_fd(),
        namespace.as_raw_fd().cast_unsigned(),
        hook,
        0,
    )?;
    Ok(())
}

/// A `connect4` hook on an empty cgroup.
pub(crate) fn connect_hook() -> Result<()> {
    let hook = attach_type::CGROUP_INET4_CONNECT;
    let program = bpf::load(program_type::CGROUP_SOCK_ADDR, hook, 1).context("can't load it")?;
    let cgroup = CommandCgroup::create(&Hierarchy::find()?, Leftovers::Release)?;
    let folder = File::open(cgroup.cgroup().path()).context("can't open the cgroup")?;
    let linked = bpf::link(program.as_fd(), folder.as_raw_fd().cast_unsigned(), hook, 0);
    drop(linked?);
    cgroup.finish()?;
    Ok(())
}

/// A qdisc on `lo`. Must be called in a namespace of its own.
pub(crate) fn qdisc(kind: &str) -> Result<()> {
    let header = TcHeader {
        index: LOOPBACK.cast_signed(),
        parent: TcHandle::ROOT,
        handle: TcHandle { major: 1, minor: 0 },
        ..TcHeader::default()
    };
    let attributes = vec![TcAttribute::Kind(kind.to_owned())];
    let message = TcMessage::from_parts(header, attributes);
    let request = RouteNetlinkMessage::NewQueueDiscipline(message);
    match Netlink::route()?.change(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(()),
        // The qdisc exists, but needs options.
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {
            Err(anyhow!("not in this kernel"))
        }
        Err(error) => Err(error.into()),
    }
}

/// An ifb device. Must be called in a namespace of its own.
pub(crate) fn ifb() -> Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName("fault-probe".to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
    ];
    let request = RouteNetlinkMessage::NewLink(message);
    Netlink::route()?.change(request, NLM_F_CREATE | NLM_F_EXCL)?;
    Ok(())
}

/// The device for creating taps, if no namespace can be created to try it.
pub(crate) fn tap_device() -> Result<()> {
    open_tun().map(drop)
}

fn open_tun() -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("can't open /dev/net/tun")
}

/// A tap device with a virtio header, as the delay line needs it. Must be called in a namespace of its own.
pub(crate) fn tap() -> Result<()> {
    let device = open_tun()?;
    // SAFETY: ifreq is plain data for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags)?;
    // SAFETY: TUNSETIFF takes a pointer to an ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

/// membarrier(2).
pub(crate) fn membarrier() -> Result<()> {
    // SAFETY: MEMBARRIER_CMD_QUERY is 0, takes no flags and changes nothing.
    let supported = unsafe { libc::syscall(libc::SYS_membarrier, 0, 0, 0) };
    if supported < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

/// Destroying sockets of other processes, tried on a nonexistent one. Must be called in a namespace of its own.
pub(crate) fn sock_destroy() -> Result<()> {
    let mut socket_id = SocketId::new_v4();
    socket_id.source_address = Ipv4Addr::LOCALHOST.into();
    socket_id.destination_address = Ipv4Addr::LOCALHOST.into();
    (socket_id.source_port, socket_id.destination_port) = (1, 1);
    // INET_DIAG_NOCOOKIE.
    socket_id.cookie = [0xFF; 8];
    let request = SockDestroy(SockDiagMessage::InetRequest(InetRequest {
        family: AF_INET,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    }));
    match Netlink::sock_diag()?.change(request, 0) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => Err(anyhow!("a socket that is not there was destroyed")),
    }
}

/// A `sock_diag` request under the number of `SOCK_DESTROY` (`linux/sock_diag.h`).
struct SockDestroy(SockDiagMessage);

impl NetlinkSerializable for SockDestroy {
    fn message_type(&self) -> u16 {
        21
    }

    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.serialize(buffer);
    }
}

/// Whether the kernel has these qdiscs, checked in a temporary network namespace.
#[must_use]
pub fn has_qdiscs(kinds: &[&str]) -> bool {
    in_throw_away_netns(|| kinds.iter().try_for_each(|kind| qdisc(kind))).is_ok()
}
