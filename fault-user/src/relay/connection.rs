//! One connection: two lanes, the toxics that act on it, the commands that it gets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::net::TcpStream;

use super::fault::CloseMode;
use super::lane::{Ending, Lane, Ports};
use super::stage::Owner;
use super::tcp::Inner;
use super::timer::{Timer, sleep_until};
use super::toxic::{Direction, Toxic, ToxicSet};

/// How long a closed connection's sockets stay, so that what the peers still send does not turn the end
/// of the stream into a reset before they have read it.
const LINGER: Duration = Duration::from_millis(250);
/// How much of what they still send is read meanwhile, in bytes.
const LINGER_BYTES: usize = 256 * 1024;
/// How long an `abort` waits for the server's host to receive the request.
const ABORT_WAIT: Duration = Duration::from_secs(1);

const RUN: u8 = 0;
const CLOSE_FIN: u8 = 1;
const CLOSE_RST: u8 = 2;

/// What others see of a connection and tell it.
#[derive(Debug)]
pub(crate) struct Control {
    /// The ordinal in its relay, from 1.
    pub(crate) ordinal: u64,
    pub(crate) client: SocketAddr,
    pub(crate) opened: Instant,
    pub(crate) closed: AtomicBool,
    command: AtomicU8,
    /// The version of the toxics that it acts by.
    seen: AtomicU64,
    waker: AtomicWaker,
}

impl Control {
    pub(crate) fn new(ordinal: u64, client: SocketAddr) -> Self {
        Self {
            ordinal,
            client,
            opened: Instant::now(),
            closed: AtomicBool::new(false),
            command: AtomicU8::new(RUN),
            // Before its first look it can't act by anything old.
            seen: AtomicU64::new(u64::MAX),
            waker: AtomicWaker::new(),
        }
    }

    /// Has the connection closed by its task.
    pub(crate) fn close(&self, mode: CloseMode) {
        let command = match mode {
            CloseMode::Fin => CLOSE_FIN,
            CloseMode::Rst => CLOSE_RST,
        };
        self.command.store(command, Ordering::Release);
        self.waker.wake();
    }

    /// Has the connection look at the toxics again.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// Declares that it acts by the newest toxics from now on, and returns them with their version. What is
    /// declared is visible before the version is read again: a change either meets the declaration, and
    /// waits for the next one, or is part of this one.
    pub(crate) fn declare(&self, toxics: &ToxicSet) -> (u64, Arc<Vec<Arc<Toxic>>>) {
        loop {
            let (version, newest) = toxics.snapshot();
            self.seen.store(version, Ordering::SeqCst);
            if toxics.version() == version {
                return (version, newest);
            }
        }
    }

    /// Whether it acts by this version or a later one.
    pub(crate) fn acts_by(&self, version: u64) -> bool {
        self.closed.load(Ordering::Acquire) || self.seen.load(Ordering::SeqCst) >= version
    }

    fn commanded(&self) -> Option<CloseMode> {
        match self.command.load(Ordering::Acquire) {
            CLOSE_FIN => Some(CloseMode::Fin),
            CLOSE_RST => Some(CloseMode::Rst),
            _ => None,
        }
    }

    /// Ready when the connection is told to close; wakes for that and for changes of toxics.
    pub(crate) fn poll_told_to_close(&self, context: &Context<'_>) -> Poll<CloseMode> {
        self.waker.register(context.waker());
        self.commanded().map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits until the connection is told to close.
    pub(crate) async fn told_to_close(&self) -> CloseMode {
        std::future::poll_fn(|context| self.poll_told_to_close(context)).await
    }
}

/// The task's side of a connection.
pub(crate) struct Connection {
    pub(crate) relay: Arc<Inner>,
    pub(crate) control: Arc<Control>,
    pub(crate) client: Arc<TcpStream>,
    pub(crate) server: Arc<TcpStream>,
    lanes: [Lane; 2],
    version: Option<u64>,
    timer: Timer,
}

impl Connection {
    pub(crate) fn new(
        relay: Arc<Inner>,
        control: Arc<Control>,
        client: TcpStream,
        server: TcpStream,
    ) -> Self {
        Self {
            relay,
            control,
            client: Arc::new(client),
            server: Arc::new(server),
            lanes: Default::default(),
            version: None,
            timer: Timer::default(),
        }
    }

    /// Carries the connection until it ends; then its sockets are to be dropped, or (true) to linger first.
    pub(crate) async fn run(&mut self) -> bool {
        let ending = std::future::poll_fn(|context| self.poll(context)).await;
        self.lanes = Default::default();
        self.timer = Timer::default();
        match ending {
            None => false,
            Some(Ending::Close(mode)) => {
                self.close(mode);
                mode == CloseMode::Fin
            }
            Some(Ending::Abort(mode)) => {
                self.await_delivery().await;
                // The server ends in order whatever the client sees: a reset could cost it the request.
                shut_down(&self.server);
                match mode {
                    CloseMode::Rst => reset(&self.client),
                    CloseMode::Fin => shut_down(&self.client),
                }
                mode == CloseMode::Fin
            }
        }
    }

    fn close(&self, mode: CloseMode) {
        for socket in [&self.client, &self.server] {
            match mode {
                CloseMode::Rst => reset(socket),
                CloseMode::Fin => shut_down(socket),
            }
        }
    }

    /// Waits until the server's host has acknowledged everything.
    async fn await_delivery(&self) {
        let until = Instant::now() + ABORT_WAIT;
        while Instant::now() < until && unacknowledged(&self.server) > 0 {
            sleep_until(Instant::now() + Duration::from_millis(1)).await;
        }
    }

    /// None when both directions have ended in order.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Ending>> {
        if let Poll::Ready(mode) = self.control.poll_told_to_close(context) {
            return Poll::Ready(Some(Ending::Close(mode)));
        }
        let newest = self.relay.toxics.version();
        if self.version != Some(newest) {
            if let Err(ending) = self.reconcile() {
                return Poll::Ready(Some(ending));
            }
            self.relay.changed.notify_waiters();
        }
        match self.poll_lanes(context) {
            Err(ending) => Poll::Ready(Some(ending)),
            Ok(()) if self.lanes.iter().all(|lane| lane.finished) => Poll::Ready(None),
            Ok(()) => {
                let deadline = self.lanes.iter().filter_map(|lane| lane.deadline).min();
                self.timer.set(deadline, context.waker());
                Poll::Pending
            }
        }
    }

    fn reconcile(&mut self) -> Result<(), Ending> {
        let (version, toxics) = self.control.declare(&self.relay.toxics);
        self.version = Some(version);
        let now = Instant::now();
        for direction in Direction::ALL {
            let owner = Owner {
                direction,
                relay_key: self.relay.key,
                connection: self.control.ordinal,
                opened: self.control.opened,
                is_datagram: false,
            };
            self.lanes[direction.index()]
                .reconcile(&toxics, &owner, now)
                .map_err(|error| {
                    log::warn!(
                        "bytes were lost in a change of toxics, so the connection is reset: {error}"
                    );
                    Ending::Close(CloseMode::Rst)
                })?;
        }
        Ok(())
    }

    fn poll_lanes(&mut self, context: &mut Context<'_>) -> Result<(), Ending> {
        for direction in Direction::ALL {
            let index = direction.index();
            if direction == Direction::Downstream && self.lanes[0].is_aborting() {
                return Ok(());
            }
            let (source, sink) = match direction {
                Direction::Upstream => (&self.client, &self.server),
                Direction::Downstream => (&self.server, &self.client),
            };
            let ports = Ports {
                source,
                sink,
                received: &self.relay.stats.received[index],
                sent: &self.relay.stats.sent[index],
            };
            match self.lanes[index].poll(context, &ports) {
                Ok(()) => {}
                Err(Some(ending)) => return Err(ending),
                Err(None) => self.sink_failed(index, context)?,
            }
            if index == 0 {
                self.pass_replies();
            }
        }
        Ok(())
    }

    /// One peer takes no more data: what it has sent still goes to the other, then that is reset.
    fn sink_failed(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), Ending> {
        let other = &mut self.lanes[1 - index];
        if other.finished || other.source_has_ended() {
            return Err(Ending::Close(CloseMode::Rst));
        }
        other.source_is_broken();
        context.waker().wake_by_ref();
        Ok(())
    }

    fn pass_replies(&mut self) {
        let replies = self.lanes[0].take_replies();
        if !replies.is_empty() {
            let now = Instant::now();
            for reply in replies {
                self.lanes[1].inject(reply, now);
            }
        }
    }

    /// Keeps the sockets for a moment after an orderly close.
    pub(crate) async fn linger(self) {
        let until = Instant::now() + LINGER;
        let drained = async {
            tokio::join!(drain(&self.client), drain(&self.server));
        };
        tokio::select! {
            () = drained => {}
            () = sleep_until(until) => {}
        }
    }
}

/// Has the socket send a reset when it is closed.
fn reset(socket: &TcpStream) {
    if let Err(error) = socket.set_zero_linger() {
        log::trace!("linger: {error}");
    }
}

/// Sends the end of the stream.
fn shut_down(socket: &TcpStream) {
    // It fails on a socket that its peer has reset, which is as closed as can be.
    if let Err(error) = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write) {
        log::trace!("shutdown: {error}");
    }
}

/// Bytes that the peer's host has not acknowledged.
fn unacknowledged(socket: &TcpStream) -> i32 {
    use std::os::fd::AsRawFd;
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as `socket` lives, and TIOCOUTQ (SIOCOUTQ) writes one int.
    let failed = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if failed == 0 { count } else { 0 }
}

/// Reads and forgets until the peer has closed, or too much has come.
async fn drain(socket: &TcpStream) {
    let mut buffer = [0; 2048];
    let mut total = 0;
    while total < LINGER_BYTES {
        match socket.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => total += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if socket.readable().await.is_err() {
                    return;
                }
            }
            Err(_reset_by_peer) => return,
        }
    }
}
