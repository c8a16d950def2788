//! Links that attach programs to cgroups.
//!
//! A program that another tool attached to a parent cgroup with `BPF_F_ALLOW_OVERRIDE` does not run for a cgroup that
//! has a program of its own. When `fault` attaches one, it therefore also attaches the other tool's program there, for
//! the same time.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use super::link;
use crate::tell::tell;

/// A hook of a cgroup: `enum bpf_attach_type`.
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

/// A program attached to a cgroup, until this is dropped or the process ends.
#[derive(Debug)]
pub struct CgroupLink(
    #[expect(dead_code, reason = "held, so that the kernel keeps the links")] Vec<OwnedFd>,
);

impl CgroupLink {
    /// Attaches a loaded program (Linux 5.7).
    ///
    /// # Errors
    /// No such cgroup, or a system call fails.
    pub fn attach(program: BorrowedFd<'_>, cgroup: &Path, hook: Hook) -> Result<Self> {
        let folder =
            std::fs::File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let target = folder.as_raw_fd().cast_unsigned();
        let before = running(folder.as_fd(), hook);
        let own = match link::create(program, target, hook as u32, 0) {
            Err(Errno::EPERM) if !before.is_empty() => {
                return Err(Errno::EPERM).with_context(|| {
                    format!(
                        "program {} at a cgroup above {} allows no second program (`bpftool cgroup tree` shows it)",
                        before[0],
                        cgroup.display()
                    )
                });
            }
            other => other.with_context(|| format!("attaching to {}", cgroup.display()))?,
        };
        let mut links = vec![own];
        let after = running(folder.as_fd(), hook);
        for id in before.iter().filter(|id| !after.contains(id)) {
            let kept = link::program(*id)
                .and_then(|program| link::create(program.as_fd(), target, hook as u32, 0));
            match kept {
                Ok(link) => links.push(link),
                Err(error) => tell!(
                    "fault: warning: program {id} of another tool at {hook:?} does not run for {} during the run \
                     ({error}; `bpftool prog show id {id}` shows it)",
                    cgroup.display()
                ),
            }
        }
        Ok(Self(links))
    }
}

/// The ids of the programs that run for a cgroup at a hook; none if they can't be listed.
fn running(cgroup: BorrowedFd<'_>, hook: Hook) -> Vec<u32> {
    link::effective(cgroup, hook as u32).unwrap_or_else(|error| {
        log::debug!("the programs at a cgroup can't be listed: {error}");
        Vec::new()
    })
}
