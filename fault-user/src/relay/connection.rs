//! One connection: two lanes, the toxics that act on it, the commands that it gets.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::attributes::{CloseMode, Direction};
use super::control::{Control, SILENCE};
use super::greeting::{self, Greeted, Greeting, Progress};
use super::inner::Inner;
use super::lane::{Ending, Lane, Ports, WaitsFor};
use super::pipeline::Owner;
use super::socket::unread;
use super::timer::{Timer, sleep_until};

/// How long a closed connection's sockets stay, so that what the peers still send does not turn the end
/// of the stream into a reset before they have read it.
const LINGER: Duration = Duration::from_millis(250);
/// How much of what they still send is read meanwhile, in bytes.
const LINGER_BYTES: usize = 256 * 1024;
/// How long an `abort` waits for the server's host to receive the request.
const ABORT_WAIT: Duration = Duration::from_secs(1);

/// A reset that comes sooner than this after the acceptance waits for the client's first bytes: its
/// connect(2) may not have returned yet, and would fail.
const CONNECTS: Duration = Duration::from_millis(50);

/// The same when one of them has ended its direction: the other is likely to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// The task's side of a connection.
pub(crate) struct Connection {
    pub(crate) relay: Arc<Inner>,
    pub(crate) control: Arc<Control>,
    pub(crate) client: Arc<TcpStream>,
    pub(crate) server: Arc<TcpStream>,
    lanes: [Lane; 2],
    /// What the client asks for.
    greeted: Greeted,
    /// When a greeting of which a part has come is taken for another protocol.
    greeting_due: Option<Instant>,
    version: Option<u64>,
    timer: Timer,
    /// What the lanes had moved when that was last looked at, and since when it is that much.
    moved: (u64, Instant),
    /// The client has sent something.
    has_heard: bool,
    /// The sockets that are reset: the client's and the server's.
    is_reset: [bool; 2],
}

impl Connection {
    pub(crate) fn new(
        relay: Arc<Inner>,
        control: Arc<Control>,
        client: TcpStream,
        server: TcpStream,
    ) -> Self {
        Self {
            greeted: if relay.toxics.reads_greetings() {
                Greeted::Awaited
            } else {
                Greeted::Unread
            },
            greeting_due: None,
            relay,
            control,
            client: Arc::new(client),
            server: Arc::new(server),
            lanes: Default::default(),
            version: None,
            timer: Timer::default(),
            moved: (0, Instant::now()),
            has_heard: false,
            is_reset: [false; 2],
        }
    }

    /// Carries the connection until it ends; then its sockets are to be dropped, or (true) to linger first.
    pub(crate) async fn run(&mut self) -> bool {
        let ending = std::future::poll_fn(|context| self.poll(context)).await;
        let owed = match ending {
            Some(Ending::Leave) => self.owed(),
            _ => [false, false],
        };
        self.has_heard = self.lanes[0].has_read;
        self.timer = Timer::default();
        self.lanes = Default::default();
        match ending {
            None => return false,
            Some(Ending::Close(CloseMode::Rst)) => {
                if !self.has_heard {
                    await_connect(&self.client, &self.control).await;
                }
                self.end([true, true]);
            }
            Some(Ending::Close(CloseMode::Fin)) => self.end([false, false]),
            Some(Ending::Leave) => self.end(owed),
            Some(Ending::Abort(mode)) => {
                self.await_delivery().await;
                // The server ends in order whatever the client sees: a reset could cost it the request.
                self.end([mode == CloseMode::Rst, false]);
            }
        }
        self.is_reset != [true, true]
    }

    /// Whether the client and the server miss something that is, or may be, on its way to them.
    fn owed(&self) -> [bool; 2] {
        if self.control.drains().is_some() {
            // Nobody knows whether the other would have sent more.
            let lost: usize =
                self.lanes[0].undelivered(&self.client) + self.lanes[1].undelivered(&self.server);
            self.relay.count_cut(lost);
            return [!self.lanes[1].finished, !self.lanes[0].finished];
        }
        [
            self.lanes[1].owes(&self.server),
            self.lanes[0].owes(&self.client),
        ]
    }

    /// Ends both sockets, with a reset or in order.
    fn end(&mut self, is_reset: [bool; 2]) {
        self.is_reset = is_reset;
        for (socket, is_reset) in [&self.client, &self.server].into_iter().zip(is_reset) {
            if is_reset {
                reset(socket);
            } else {
                shut_down(socket);
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
        self.control.set_busy(true);
        let polled = self.poll_turn(context);
        self.control.set_busy(false);
        polled
    }

    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<Option<Ending>> {
        if let Poll::Ready(mode) = self.control.poll_told_to_close(context) {
            return Poll::Ready(Some(match mode {
                CloseMode::Rst => Ending::Close(mode),
                CloseMode::Fin => Ending::Leave,
            }));
        }
        self.read_greeting(context);
        let newest = self.relay.toxics.version();
        if self.version != Some(newest) {
            if let Err(ending) = self.reconcile() {
                return Poll::Ready(Some(ending));
            }
            self.relay.changed.notify_waiters();
        }
        let polled = self.poll_lanes(context);
        let concerns = self.lanes.each_mut().map(Lane::take_concern);
        if concerns.contains(&true) {
            self.relay.wake_all();
        }
        match polled {
            Err(ending) => Poll::Ready(Some(ending)),
            Ok(()) if self.lanes.iter().all(|lane| lane.finished) => Poll::Ready(None),
            Ok(()) => {
                let patience = self.patience();
                if patience.is_some_and(|patience| patience <= Instant::now()) {
                    return Poll::Ready(Some(Ending::Leave));
                }
                let deadlines = self.lanes.iter().filter_map(|lane| lane.deadline);
                let deadline = deadlines.chain(patience).chain(self.greeting_due).min();
                self.timer.set(deadline, context.waker());
                Poll::Pending
            }
        }
    }

    /// Looks for the client's greeting. When it is known, so are the toxics that act on the connection.
    fn read_greeting(&mut self, context: &mut Context<'_>) {
        if self.greeted != Greeted::Awaited {
            return;
        }
        let trouble = &self.relay.trouble;
        let greeting = match greeting::poll(&self.client, &self.server, trouble, context) {
            Progress::Whole(greeting) => {
                let has_spoken = unread(&self.client) > 0 || unread(&self.server) > 0;
                if greeting == Greeting::default()
                    && has_spoken
                    && self.relay.toxics.are_demanding()
                {
                    greeting::tell_nameless(trouble);
                }
                greeting
            }
            Progress::Nothing => return,
            Progress::Reset => {
                self.lanes[0].source_is_broken();
                Greeting::default()
            }
            Progress::Part => {
                let due = self.greeting_due.get_or_insert_with(greeting::due);
                if *due > Instant::now() {
                    return;
                }
                greeting::tell_overdue(trouble);
                greeting::make_readable(&self.client);
                Greeting::default()
            }
        };
        self.greeted = Greeted::Known(greeting);
        self.greeting_due = None;
        self.version = None;
    }

    /// When it is left, if its relay comes to its end and nothing moves any more.
    fn patience(&mut self) -> Option<Instant> {
        let drain = self.control.drains()?;
        let moves = self.lanes[0].moves + self.lanes[1].moves;
        if moves != self.moved.0 {
            self.moved = (moves, Instant::now());
        }
        let waits = self.lanes.each_ref().map(Lane::waits_for);
        let silence = if self.lanes.iter().any(|lane| lane.finished) {
            ANSWER
        } else {
            SILENCE
        };
        let since = self.moved.1.max(drain.since);
        // On a busy machine bytes may lie there longer than others are silent.
        let reads = self.lanes[0].is_about_to_read(&self.client)
            || self.lanes[1].is_about_to_read(&self.server);
        let until = if reads || waits.contains(&WaitsFor::Time) {
            drain.until
        } else if waits.contains(&WaitsFor::Change) {
            drain.change_until
        } else {
            since + silence + drain.transit
        };
        let is_open =
            !self.lanes[0].is_ending(&self.client) && !self.lanes[1].is_ending(&self.server);
        let most = if is_open {
            drain.open_until
        } else {
            drain.until
        };
        Some(until.min(most))
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
                greeted: &self.greeted,
                is_datagram: false,
                trouble: &self.relay.trouble,
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
                // It is known first which toxics act on what is read.
                is_withheld: self.greeted == Greeted::Awaited,
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

    /// Keeps the sockets that were closed in order for a moment.
    pub(crate) async fn linger(self) {
        let Self {
            client,
            server,
            is_reset,
            ..
        } = self;
        let [client, server] = [(client, is_reset[0]), (server, is_reset[1])]
            .map(|(socket, is_reset)| (!is_reset).then_some(socket));
        tokio::join!(linger(client), linger(server));
    }
}

/// Keeps a socket that was closed in order for a moment.
async fn linger(socket: Option<Arc<TcpStream>>) {
    let Some(socket) = socket else { return };
    tokio::select! {
        () = drain(&socket) => {}
        () = sleep_until(Instant::now() + LINGER) => {}
    }
}

/// Ends a connection of which only this socket was opened, in order: what its peer has sent does not
/// turn the end into a reset.
pub(crate) async fn close_in_order(socket: TcpStream) {
    shut_down(&socket);
    linger(Some(Arc::new(socket))).await;
}

/// Ends a connection of which only this socket was opened, by a reset.
pub(crate) async fn close_by_reset(client: TcpStream, control: &Control) {
    await_connect(&client, control).await;
    reset(&client);
}

/// Waits until the client's connect(2) has returned, as far as that can be known.
async fn await_connect(client: &TcpStream, control: &Control) {
    let until = control.opened + CONNECTS;
    if Instant::now() < until {
        tokio::select! {
            // What it has sent lies there or has been read.
            _ready = client.readable() => {}
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
