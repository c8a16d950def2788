//! What the kernel tells of a socket, and is told, beyond the standard library.

use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use tokio::net::TcpStream;

/// Bytes that have arrived at a socket and have not been read.
pub(crate) fn unread(socket: &impl AsRawFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as `socket` lives, and FIONREAD writes one int.
    let failed = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    // It fails on a socket that nothing can be read from any more.
    if failed == 0 {
        usize::try_from(count).unwrap_or(0)
    } else {
        0
    }
}

/// Whether a socket's peer has ended its direction, be it that there are bytes to read before.
pub(crate) fn has_peer_ended(socket: &TcpStream) -> bool {
    let mut state = 0_u8;
    let mut length: libc::socklen_t = 1;
    // SAFETY: the kernel writes no more of its structure, whose first byte is the state, than there is room for.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut length,
        )
    };
    // A socket that tells nothing is as good as ended.
    status != 0 || !OPEN_STATES.contains(&state)
}

/// The states in which a peer has not ended: `TCP_ESTABLISHED`, `TCP_FIN_WAIT1` and `TCP_FIN_WAIT2`.
const OPEN_STATES: [u8; 3] = [1, 4, 5];

/// Sets an option of a socket that is a number.
pub(crate) fn set(
    socket: &impl AsRawFd,
    level: i32,
    name: i32,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is four bytes long.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            4,
        )
    };
    nix::errno::Errno::result(status)?;
    Ok(())
}
