//! BPF links, created without aya: they are removed with this process, even when it is killed. aya only creates them on
//! kernels that it expects to support them, and otherwise attaches in a way that outlives the process.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

/// `BPF_LINK_CREATE` (Linux 5.7): attaches a loaded program to `target`, a descriptor or an interface's index, until
/// the returned descriptor is closed. `hook` is one of `enum bpf_attach_type`.
///
/// # Errors
/// A system call fails.
pub fn create(
    program: BorrowedFd<'_>,
    target: u32,
    hook: u32,
    flags: u32,
) -> Result<OwnedFd, Errno> {
    const BPF_LINK_CREATE: libc::c_long = 28;
    /// The start of `union bpf_attr` for that command.
    #[repr(C)]
    struct Attributes {
        program: i32,
        target: u32,
        hook: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: program.as_raw_fd(),
        target,
        hook,
        flags,
    };
    own(bpf(BPF_LINK_CREATE, &attributes)?)
}

/// `BPF_LINK_UPDATE`: puts another program in the place of a link's. No packet is missed in between.
///
/// # Errors
/// `ENOLINK`: what it was attached to is gone. Other errors of the system call.
pub fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Errno> {
    const BPF_LINK_UPDATE: libc::c_long = 29;
    /// The part of `union bpf_attr` for that command.
    #[repr(C)]
    struct Attributes {
        link: i32,
        program: i32,
        flags: u32,
        old_program: u32,
    }
    let attributes = Attributes {
        link: link.as_raw_fd(),
        program: program.as_raw_fd(),
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &attributes).map(drop)
}

/// The ids of the programs that run for a cgroup at a hook, including those of parent cgroups.
///
/// # Errors
/// `CAP_NET_ADMIN` is missing.
pub fn effective(cgroup: BorrowedFd<'_>, hook: u32) -> Result<Vec<u32>, Errno> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    const BPF_F_QUERY_EFFECTIVE: u32 = 1;
    /// More than a hierarchy can have at one hook in practice: 64 at each level.
    const IDS_MAX: u32 = 1024;
    /// The start of `union bpf_attr` for that command.
    #[repr(C)]
    struct Attributes {
        target: i32,
        hook: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    let mut ids = vec![0_u32; IDS_MAX as usize];
    let mut attributes = Attributes {
        target: cgroup.as_raw_fd(),
        hook,
        query_flags: BPF_F_QUERY_EFFECTIVE,
        attach_flags: 0,
        ids: ids.as_mut_ptr().addr() as u64,
        count: IDS_MAX,
        padding: 0,
    };
    bpf_mut(BPF_PROG_QUERY, &mut attributes)?;
    ids.truncate(attributes.count as usize);
    Ok(ids)
}

/// A program by its id.
///
/// # Errors
/// It no longer exists, or `CAP_SYS_ADMIN` is missing.
pub fn program(id: u32) -> Result<OwnedFd, Errno> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
    /// The start of `union bpf_attr` for that command.
    #[repr(C)]
    struct Attributes {
        id: u32,
        next: u32,
        flags: u32,
    }
    let attributes = Attributes {
        id,
        next: 0,
        flags: 0,
    };
    own(bpf(BPF_PROG_GET_FD_BY_ID, &attributes)?)
}

/// bpf(2).
///
/// # Errors
/// The error of the system call.
pub fn bpf<T>(command: libc::c_long, attributes: &T) -> Result<libc::c_long, Errno> {
    // SAFETY: the structure and what it points to live through the call, which does not write to it, and its size is told.
    let status = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    Errno::result(status)
}

/// [`bpf`] for commands that return data in the structure.
fn bpf_mut<T>(command: libc::c_long, attributes: &mut T) -> Result<libc::c_long, Errno> {
    // SAFETY: as above.
    let status = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    Errno::result(status)
}

/// Takes the descriptor returned by [`bpf`].
///
/// # Errors
/// It is not a descriptor.
pub fn own(descriptor: libc::c_long) -> Result<OwnedFd, Errno> {
    let descriptor = i32::try_from(descriptor).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
