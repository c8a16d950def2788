//! Looks at the packets of this network namespace while the command runs without faults: what dependencies are called and
//! what they speak is in their first packets.

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::flows::{Conversation, Flows};
use crate::sys::process::rights::be_helper;

/// How long the thread waits for packets before it looks whether it is to end, in milliseconds.
const PATIENCE_MS: u16 = 50;
/// What may wait to be looked at, in bytes.
const BUFFER: usize = 32 << 20;
/// More than any packet.
const PACKET_MAX: usize = 1 << 17;

/// A thread that looks at packets.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Flows>>,
}

impl Capture {
    /// Looks at all packets of this network namespace from now on, also at those of connections that are `open`.
    ///
    /// # Errors
    /// The kernel has no packet sockets, or there is no thread to be had.
    pub fn start(open: HashSet<(SocketAddr, SocketAddr)>) -> Result<Self> {
        // In network byte order.
        let everything = Protocol::from(i32::from(u16::try_from(libc::ETH_P_ALL)?.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(everything))
            .context("looking at packets (CONFIG_PACKET, CAP_NET_RAW)")?;
        socket.set_recv_buffer_size(BUFFER)?;
        socket.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || {
                be_helper(&[]);
                collect(socket, Flows::with_open(open), &until)
            })
            .context("starting a thread")?;
        Ok(Self { stop, thread })
    }

    /// Ends it, and tells what was seen.
    ///
    /// # Errors
    /// Packets can't be read.
    pub fn finish(self) -> Result<Vec<Conversation>> {
        self.stop.store(true, Ordering::Release);
        let flows = self
            .thread
            .join()
            .map_err(|_| anyhow!("the thread that looks at packets panicked"))?;
        Ok(flows?.finish())
    }
}

fn collect(mut socket: Socket, mut flows: Flows, stop: &AtomicBool) -> Result<Flows> {
    let begun = Instant::now();
    let mut buffer = vec![0; PACKET_MAX];
    loop {
        // Looked at first: what came before the end is still taken below.
        let is_last = stop.load(Ordering::Acquire);
        loop {
            match socket.read(&mut buffer) {
                Ok(length) => {
                    let bytes = &buffer[..length];
                    flows.take(bytes, u32::try_from(length)?, begun.elapsed());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // An interface that went down, or a signal.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Err(error) => return Err(error).context("looking at packets"),
            }
        }
        if is_last {
            return Ok(flows);
        }
        let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        // A signal is as good a reason to look again.
        let _woken = poll(&mut waiting, PollTimeout::from(PATIENCE_MS));
    }
}
