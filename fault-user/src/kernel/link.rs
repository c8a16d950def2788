//! BPF links, made by hand: they go with this process, also when it is killed. aya makes them only where it trusts the
//! kernel to have them, and attaches otherwise in a way that outlives the process.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

/// `BPF_LINK_CREATE` (Linux 5.7): holds a loaded program at `target`, a descriptor or an interface's index, for as long
/// as what is returned stays open. `hook` is one of `enum bpf_attach_type`.
///
/// # Errors
/// The kernel refuses.
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
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}
