//! How many connections wait at a listener.

use std::net::TcpListener;
use std::os::fd::AsRawFd as _;

/// The connections that wait at a listener to be accepted.
#[derive(Default)]
pub struct Queue {
    /// How many there are.
    pub length: u64,
    /// How many there may be.
    pub limit: u64,
}

/// The queue of a listener; an empty one without room if unknown.
pub fn queue(listener: &TcpListener) -> Queue {
    // SAFETY: all zeros is a value of this structure of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = u32::try_from(size_of_val(&info)).unwrap_or(0);
    // SAFETY: room for the structure, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if status != 0 {
        return Queue::default();
    }
    // For a listening socket the kernel reports the queue in these fields.
    Queue {
        length: info.tcpi_unacked.into(),
        limit: info.tcpi_sacked.into(),
    }
}
