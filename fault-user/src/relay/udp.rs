//! The UDP relay: each client has an upstream socket of its own, and is forgotten when it has been silent.
//!
//! A datagram is never cut or merged. What a stage has no room for is dropped, as a network would.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::ReadBuf;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

use super::connection::Control;
use super::engine::Engine;
use super::fault::CloseMode;
use super::inlet::{Inlet, Pair, Watched};
use super::stage::{Chunk, Item, Output, Owner, Pipeline};
use super::tcp::{Command, Inner, acknowledge};
use super::timer::Timer;
use super::toxic::Direction;
use super::upstream::Accepted;

/// The largest datagram, in bytes.
const LARGEST: usize = 65_536;
/// How many datagrams of one client may wait for its task.
const WAITING: usize = 1024;
/// How long at most a socket is read whose relay comes to its end.
const LAST_DATAGRAMS: Duration = Duration::from_millis(20);
/// How many datagrams of one client are moved on before others have their turn.
const PIECES: usize = 1024;
/// When a full socket buffer is tried again.
const RETRY: Duration = Duration::from_micros(500);

/// Starts relaying what comes in by any of the sockets.
pub(crate) fn start(
    engine: &Arc<Engine>,
    inner: &Arc<Inner>,
    inlets: Vec<Inlet>,
    idle: Duration,
    accepts: bool,
) -> mpsc::UnboundedSender<Command> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let (state, accepts) = watch::channel(accepts);
    // Each of them holds a sender: nothing more comes when all have ended.
    let (alive, ended) = mpsc::channel(1);
    for inlet in inlets {
        let mut listener = Listener {
            engine: Arc::downgrade(engine),
            inner: Arc::clone(inner),
            idle,
            accepts: accepts.clone(),
            sessions: HashMap::new(),
        };
        let alive = alive.clone();
        engine.spawn(async move {
            match inlet.watched() {
                Ok(inlet) => listener.serve(Arc::new(inlet)).await,
                Err(error) => log::error!("a socket can't be watched: {error}"),
            }
            drop(alive);
        });
    }
    engine.spawn(command(Arc::clone(inner), receiver, state, ended));
    commands
}

/// Carries out what the relay is told.
async fn command(
    inner: Arc<Inner>,
    mut commands: mpsc::UnboundedReceiver<Command>,
    state: watch::Sender<bool>,
    mut ended: mpsc::Receiver<()>,
) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Accept(accepts, done) => {
                state.send_replace(accepts);
                acknowledge(done);
            }
            Command::Stop(done) => {
                end(state, &mut ended).await;
                inner.close(usize::MAX, CloseMode::Fin).await;
                acknowledge(done);
                return;
            }
            Command::Finish(done) => {
                end(state, &mut ended).await;
                acknowledge(done);
                return;
            }
        }
    }
}

/// Has all listeners end, and waits until they have.
async fn end(state: watch::Sender<bool>, ended: &mut mpsc::Receiver<()>) {
    drop(state);
    // Nobody ever sends here: it tells that all have ended.
    let _none = ended.recv().await;
}

/// One socket that clients send to, and the clients.
struct Listener {
    engine: Weak<Engine>,
    inner: Arc<Inner>,
    idle: Duration,
    /// Whether new clients are served; closed when nothing is any more.
    accepts: watch::Receiver<bool>,
    sessions: HashMap<Pair, mpsc::Sender<Bytes>>,
}

impl Listener {
    async fn serve(&mut self, inlet: Arc<Watched>) {
        let mut buffer = vec![0; LARGEST];
        let (closed, mut closings) = mpsc::unbounded_channel::<Pair>();
        loop {
            tokio::select! {
                biased;
                changed = self.accepts.changed() => if changed.is_err() {
                    self.take_waiting(&inlet, &mut buffer, &closed).await;
                    return;
                },
                Some(pair) = closings.recv() => {
                    // A new session of the same client may have taken the place of the one that ended.
                    if self.sessions.get(&pair).is_some_and(mpsc::Sender::is_closed) {
                        self.sessions.remove(&pair);
                    }
                }
                received = inlet.receive(&mut buffer) => match received {
                    Ok((size, pair)) => self.dispatch(&inlet, pair, &buffer[..size], &closed),
                    // An ICMP error for an earlier answer is no reason to stop.
                    Err(error) => log::debug!("receive: {error}"),
                },
            }
        }
    }

    /// Takes what has come before the end, and little more.
    async fn take_waiting(
        &mut self,
        inlet: &Arc<Watched>,
        buffer: &mut [u8],
        closed: &mpsc::UnboundedSender<Pair>,
    ) {
        let until = Instant::now() + LAST_DATAGRAMS;
        while Instant::now() < until
            && let Ok(Ok((size, pair))) =
                tokio::time::timeout(LAST_DATAGRAMS / 10, inlet.receive(buffer)).await
        {
            self.dispatch(inlet, pair, &buffer[..size], closed);
        }
    }

    /// Hands a datagram to its client's session, which is made if need be.
    fn dispatch(
        &mut self,
        inlet: &Arc<Watched>,
        pair: Pair,
        data: &[u8],
        closed: &mpsc::UnboundedSender<Pair>,
    ) {
        let data = Bytes::copy_from_slice(data);
        let data = match self
            .sessions
            .get(&pair)
            .map(|session| session.try_send(data.clone()))
        {
            Some(Ok(())) => return,
            Some(Err(mpsc::error::TrySendError::Full(_dropped))) => return,
            Some(Err(mpsc::error::TrySendError::Closed(data))) => data,
            None => data,
        };
        let Some(engine) = self.engine.upgrade().filter(|_| *self.accepts.borrow()) else {
            return;
        };
        let (sender, datagrams) = mpsc::channel(WAITING);
        if sender.try_send(data).is_err() {
            log::error!("a new queue has room for a datagram");
        }
        self.sessions.insert(pair, sender);
        let control = self.inner.register(pair.client);
        let (inner, inlet, idle, closed) = (
            Arc::clone(&self.inner),
            Arc::clone(inlet),
            self.idle,
            closed.clone(),
        );
        engine.spawn(async move {
            carry(&inner, &control, (inlet, pair), datagrams, idle).await;
            inner.unregister(&control);
            if closed.send(pair).is_err() {
                log::trace!("the relay has stopped: nobody needs to know");
            }
        });
    }
}

async fn carry(
    inner: &Arc<Inner>,
    control: &Arc<Control>,
    (inlet, pair): (Arc<Watched>, Pair),
    datagrams: mpsc::Receiver<Bytes>,
    idle: Duration,
) {
    let (server, _kept) = match connect(inner, pair).await {
        Ok(server) => server,
        Err(error) => {
            inner.refused(&error);
            return;
        }
    };
    let mut session = Session {
        inner: Arc::clone(inner),
        control: Arc::clone(control),
        inlet,
        pair,
        server,
        datagrams,
        pipelines: Default::default(),
        outputs: Default::default(),
        version: None,
        idle,
        last: Instant::now(),
        retry: false,
        timer: Timer::default(),
    };
    poll_fn(|context| session.poll(context)).await;
}

/// A socket to the server, and what is kept with it.
async fn connect(inner: &Inner, pair: Pair) -> io::Result<(UdpSocket, Option<Box<dyn Send>>)> {
    let accepted = || {
        Ok(Accepted {
            client: pair.client,
            local: pair.local,
        })
    };
    let addresses = inner.upstream.resolve(accepted).await?;
    let address = *addresses.first().ok_or(io::ErrorKind::NotFound)?;
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        None,
    )?;
    socket.set_nonblocking(true)?;
    let kept = match &inner.upstream.prepare {
        Some(prepare) => prepare(std::os::fd::AsFd::as_fd(&socket), address)?,
        None => None,
    };
    socket.connect(&address.into())?;
    Ok((UdpSocket::from_std(socket.into())?, kept))
}

/// One client.
struct Session {
    inner: Arc<Inner>,
    control: Arc<Control>,
    inlet: Arc<Watched>,
    pair: Pair,
    server: UdpSocket,
    datagrams: mpsc::Receiver<Bytes>,
    pipelines: [Pipeline; 2],
    outputs: [Output; 2],
    version: Option<u64>,
    idle: Duration,
    last: Instant,
    retry: bool,
    timer: Timer,
}

impl Session {
    /// Ready when the session is over.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.control.set_busy(true);
        let polled = self.poll_turn(context);
        self.control.set_busy(false);
        polled
    }

    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.control.poll_told_to_close(context).is_ready() {
            return Poll::Ready(());
        }
        let now = Instant::now();
        self.reconcile(now);
        let mut moved = self.take_from_client(context, now);
        moved |= self.take_from_server(context, now);
        if moved {
            self.last = now;
        }
        let mut deadline = None;
        self.retry = false;
        for direction in Direction::ALL {
            let index = direction.index();
            let mut pieces = PIECES;
            let due = self.pipelines[index].advance(now, &mut self.outputs[index], &mut pieces);
            if self.outputs[index].now.is_some() {
                return Poll::Ready(());
            }
            if std::mem::take(&mut self.outputs[index].concerns_others) {
                self.inner.wake_all();
            }
            if pieces == 0 {
                context.waker().wake_by_ref();
            } else {
                self.pipelines[index].starved();
            }
            if self.send(direction) {
                self.last = now;
            }
            deadline = [deadline, due].into_iter().flatten().min();
        }
        let is_empty = self.is_empty();
        if let Some(drain) = self.control.drains() {
            let until = match deadline {
                // An answer may be on its way.
                _ if is_empty => drain.quiet_until(),
                Some(_) => drain.until,
                None => drain.change_until,
            };
            if until.min(drain.until) <= now {
                self.count_cut();
                return Poll::Ready(());
            }
            deadline = [deadline, Some(until)].into_iter().flatten().min();
        }
        if now >= self.last + self.idle {
            if is_empty {
                return Poll::Ready(());
            }
            // What is held on purpose keeps the session alive.
            self.last = now;
        }
        let idle = Some(self.last + self.idle);
        let retry = self.retry.then(|| now + RETRY);
        // After a send there may be more to advance than had room before.
        let soon = self
            .outputs
            .iter()
            .any(|output| !output.items.is_empty())
            .then(|| now + RETRY);
        let deadline = [deadline, idle, retry, soon].into_iter().flatten().min();
        self.timer.set(deadline, context.waker());
        Poll::Pending
    }

    /// Whether nothing is on its way.
    fn is_empty(&self) -> bool {
        self.pipelines.iter().all(Pipeline::is_empty)
            && self.outputs.iter().all(|output| output.items.is_empty())
    }

    /// Counts what is lost at the end.
    fn count_cut(&self) {
        let held: usize = self.pipelines.iter().map(Pipeline::bytes).sum();
        let sending: usize = self.outputs.iter().map(|output| output.bytes).sum();
        if held + sending > 0 {
            self.inner.count_cut(held + sending);
        }
    }

    fn reconcile(&mut self, now: Instant) {
        if self.version == Some(self.inner.toxics.version()) {
            return;
        }
        let (version, toxics) = self.control.declare(&self.inner.toxics);
        self.version = Some(version);
        self.inner.changed.notify_waiters();
        for direction in Direction::ALL {
            let owner = Owner {
                direction,
                relay_key: self.inner.key,
                connection: self.control.ordinal,
                opened: self.control.opened,
                is_datagram: true,
                trouble: &self.inner.trouble,
            };
            let index = direction.index();
            self.pipelines[index].reconcile(&toxics, &owner, now, &mut self.outputs[index]);
        }
    }

    fn push(&mut self, direction: Direction, data: Bytes, now: Instant) {
        let index = direction.index();
        count(&self.inner.stats.received[index], data.len());
        if self.pipelines[index].room(now) > 0 {
            self.pipelines[index].push(Chunk { data, at: now }, &mut self.outputs[index]);
        }
    }

    fn take_from_client(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        for step in 0..WAITING {
            match self.datagrams.poll_recv(context) {
                Poll::Ready(Some(data)) => self.push(Direction::Upstream, data, now),
                // The relay has stopped, or Pending.
                Poll::Ready(None) | Poll::Pending => return step > 0,
            }
        }
        context.waker().wake_by_ref();
        true
    }

    fn take_from_server(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        let mut moved = false;
        for _ in 0..64 {
            let received = with_buffer(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                self.server
                    .poll_recv(context, &mut buffer)
                    .map_ok(|()| Bytes::copy_from_slice(buffer.filled()))
            });
            match received {
                Poll::Ready(Ok(data)) => {
                    moved = true;
                    self.push(Direction::Downstream, data, now);
                }
                // The server's port was closed when an earlier datagram came: the next may find it open.
                Poll::Ready(Err(error)) => log::debug!("receive from the server: {error}"),
                Poll::Pending => return moved,
            }
        }
        context.waker().wake_by_ref();
        moved
    }

    /// Sends what came out; what a full socket does not take waits.
    fn send(&mut self, direction: Direction) -> bool {
        let index = direction.index();
        let mut moved = false;
        while let Some(item) = self.outputs[index].items.front() {
            let Item::Data(data) = item else {
                self.outputs[index].items.pop_front();
                continue;
            };
            let sent = match direction {
                Direction::Upstream => self.server.try_send(data),
                Direction::Downstream => self.inlet.try_answer(data, self.pair),
            };
            match sent {
                Ok(size) => count(&self.inner.stats.sent[index], size),
                // A full socket buffer: the sessions share the listener, so none of them can wait for it alone.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.retry = true;
                    return moved;
                }
                Err(error) => log::debug!("send: {error}"),
            }
            moved = true;
            let size = data.len();
            self.outputs[index].bytes -= size;
            self.outputs[index].items.pop_front();
        }
        moved
    }
}

fn count(counter: &AtomicU64, size: usize) {
    counter.fetch_add(size as u64, Ordering::Relaxed);
}

thread_local! {
    static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; LARGEST]);
}

fn with_buffer<T>(read: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| read(buffer))
}
