//! Links that hold programs at cgroups, made by hand: aya makes them only where it can read the kernel's version, and
//! attaches otherwise in a way that outlives the process.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;

/// Where in a cgroup a program sits: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_CGROUP_INET_SOCK_CREATE`.
    SocketCreate = 2,
    /// `BPF_CGROUP_SOCK_OPS`.
    SocketOperations = 3,
    /// `BPF_CGROUP_INET4_CONNECT`.
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`.
    Connect6 = 11,
    /// `BPF_CGROUP_INET4_GETPEERNAME`.
    PeerName4 = 29,
    /// `BPF_CGROUP_INET6_GETPEERNAME`.
    PeerName6 = 30,
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
        const BPF_LINK_CREATE: libc::c_long = 28;
        /// The start of `union bpf_attr` for that command.
        #[repr(C)]
        struct Attributes {
            program: i32,
            target: i32,
            hook: u32,
            flags: u32,
        }
        let attributes = Attributes {
            program: program.as_raw_fd(),
            target: cgroup.as_raw_fd(),
            hook: hook as u32,
            flags: 0,
        };
        // SAFETY: the structure lives through the call, and its size is told.
        let link = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_LINK_CREATE,
                &raw const attributes,
                size_of::<Attributes>(),
            )
        };
        let link = i32::try_from(Errno::result(link)?).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the call has just made it, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(link) }))
    }
}
