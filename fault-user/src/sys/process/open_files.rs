//! The limit of open files: `fault` may have as many as the hard limit allows, CMD as many as the caller.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;

/// What the soft and the hard limit were before [`raise`].
static BEFORE: OnceLock<libc::rlimit> = OnceLock::new();

/// Raises the soft limit to the hard one: the programs and their maps need a hundred descriptors, and each connection of the
/// relay two.
pub fn raise() {
    if let Err(error) = try_raise() {
        log::warn!("the limit of open files can't be raised: {error}");
    }
}

fn try_raise() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is valid and outlives the call.
    Errno::result(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let before = *BEFORE.get_or_init(|| limit);
    set(&libc::rlimit {
        rlim_cur: before.rlim_max,
        ..before
    })
}

/// Takes that back, in a process that is about to become CMD. Makes a system call only, and allocates nothing.
///
/// # Errors
/// The kernel refuses.
pub fn restore() -> io::Result<()> {
    BEFORE.get().map_or(Ok(()), set)
}

fn set(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: the structure is valid and outlives the call.
    Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) })?;
    Ok(())
}
