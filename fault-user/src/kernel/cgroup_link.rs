//! Links that hold programs at cgroups.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use super::link;

/// Where in a cgroup a program sits: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_CGROUP_INET_INGRESS`: packets that reach a socket.
    Ingress = 0,
    /// `BPF_CGROUP_INET_EGRESS`: packets that a socket sends.
    Egress = 1,
    /// `BPF_CGROUP_INET_SOCK_CREATE`.
    SocketCreate = 2,
    /// `BPF_CGROUP_SOCK_OPS`.
    SocketOperations = 3,
    /// `BPF_CGROUP_INET4_CONNECT`.
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`.
    Connect6 = 11,
    /// `BPF_CGROUP_INET4_POST_BIND`.
    PostBind4 = 12,
    /// `BPF_CGROUP_INET6_POST_BIND`.
    PostBind6 = 13,
    /// `BPF_CGROUP_UDP4_SENDMSG`.
    Send4 = 14,
    /// `BPF_CGROUP_UDP6_SENDMSG`.
    Send6 = 15,
    /// `BPF_CGROUP_UDP4_RECVMSG`.
    Receive4 = 19,
    /// `BPF_CGROUP_UDP6_RECVMSG`.
    Receive6 = 20,
    /// `BPF_CGROUP_INET4_GETPEERNAME`.
    PeerName4 = 29,
    /// `BPF_CGROUP_INET6_GETPEERNAME`.
    PeerName6 = 30,
    /// `BPF_CGROUP_UNIX_CONNECT` (Linux 6.7).
    UnixConnect = 49,
}

/// A program at a cgroup, beside those of others, for as long as this lives and no longer than the process.
#[derive(Debug)]
pub struct CgroupLink(
    #[expect(dead_code, reason = "held, so that the kernel keeps the link")] OwnedFd,
);

impl CgroupLink {
    /// Attaches a loaded program (Linux 5.7).
    ///
    /// # Errors
    /// No such cgroup, or the kernel refuses.
    pub fn attach(program: BorrowedFd<'_>, cgroup: &Path, hook: Hook) -> Result<Self> {
        let folder =
            std::fs::File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        Self::create(program, folder.as_fd(), hook)
            .with_context(|| format!("attaching to {}", cgroup.display()))
    }

    fn create(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: Hook) -> Result<Self, Errno> {
        let cgroup = cgroup.as_raw_fd().cast_unsigned();
        link::create(program, cgroup, hook as u32, 0).map(Self)
    }
}
