//! The UDP relay: each client has an upstream socket of its own, or is met in its packets on their way. It is forgotten
//! when it has been silent.
//!
//! A datagram is never cut or merged. What a stage has no room for is dropped, as a network would.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::ReadBuf;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

use super::attributes::{CloseMode, StreamDirection};
use super::control::ConnectionControl;
use super::engine::Engine;
use super::greeting::Greeted;
use super::inner::Inner;
use super::packets::{self, Carrier, Pair, Unpacked};
use super::pipeline::{Item, Output, Pipeline, PipelineOwner};
use super::stage::Chunk;
use super::tcp::{ListenerCommand, acknowledge};
use super::timer::Timer;
use super::upstream::Accepted;
use crate::relay::exchange::{Exchange, TapPacket};

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

/// Where datagrams come from.
pub(crate) enum DatagramSource {
    /// Clients send to this socket, which has this address.
    Socket(std::net::UdpSocket, SocketAddr),
    /// Packets on their way, which come by this number of the exchange.
    Packets(Arc<Exchange>, usize),
}

/// Starts relaying what comes in.
pub(crate) fn start(
    engine: &Arc<Engine>,
    inner: &Arc<Inner>,
    source: DatagramSource,
    idle: Duration,
    accepts: bool,
) -> mpsc::UnboundedSender<ListenerCommand> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let (state, accepts) = watch::channel(accepts);
    // The listener holds the sender: nothing more comes when it has ended.
    let (alive, ended) = mpsc::channel(1);
    let mut listener = Listener {
        engine: Arc::downgrade(engine),
        inner: Arc::clone(inner),
        idle,
        accepts,
        sessions: HashMap::new(),
    };
    match source {
        DatagramSource::Socket(socket, local) => engine.spawn(async move {
            match UdpSocket::from_std(socket) {
                Ok(socket) => listener.serve(&Arc::new(socket), local).await,
                Err(error) => log::error!("a socket can't be watched: {error}"),
            }
            drop(alive);
        }),
        DatagramSource::Packets(exchange, number) => {
            let packets = exchange.subscribe(number);
            engine.spawn(async move {
                listener.serve_packets(&exchange, packets).await;
                drop(alive);
            });
        }
    }
    engine.spawn(command(Arc::clone(inner), receiver, state, ended));
    commands
}

/// Carries out what the relay is told.
async fn command(
    inner: Arc<Inner>,
    mut commands: mpsc::UnboundedReceiver<ListenerCommand>,
    state: watch::Sender<bool>,
    mut ended: mpsc::Receiver<()>,
) {
    while let Some(command) = commands.recv().await {
        match command {
            ListenerCommand::Accept(accepts, done) => {
                state.send_replace(accepts);
                acknowledge(done);
            }
            ListenerCommand::Stop(done) => {
                end(state, &mut ended).await;
                inner.close(usize::MAX, CloseMode::Fin).await;
                acknowledge(done);
                return;
            }
            ListenerCommand::Finish(done) => {
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

/// A datagram on its way.
struct Datagram {
    direction: StreamDirection,
    data: Bytes,
    carrier: Option<Carrier>,
}

/// How the two ends of a client are reached.
#[derive(Clone)]
enum Way {
    /// The client by this socket, and the server by one of the client's own.
    Socket(Arc<UdpSocket>),
    /// Both in the packets that they send.
    Packets(Arc<Exchange>),
}

/// Where clients send to, and the clients.
struct Listener {
    engine: Weak<Engine>,
    inner: Arc<Inner>,
    idle: Duration,
    /// Whether new clients are served; closed when nothing is any more.
    accepts: watch::Receiver<bool>,
    sessions: HashMap<Pair, mpsc::Sender<Datagram>>,
}

type Closed = mpsc::UnboundedSender<Pair>;

impl Listener {
    async fn serve(&mut self, socket: &Arc<UdpSocket>, local: SocketAddr) {
        let mut buffer = vec![0; LARGEST];
        let way = Way::Socket(Arc::clone(socket));
        let (closed, mut closings) = mpsc::unbounded_channel();
        loop {
            tokio::select! {
                biased;
                changed = self.accepts.changed() => if changed.is_err() {
                    self.take_waiting(&way, local, &mut buffer, &closed).await;
                    return;
                },
                Some(pair) = closings.recv() => self.forget(pair),
                received = socket.recv_from(&mut buffer) => match received {
                    Ok((size, client)) => {
                        let pair = Pair { client, local };
                        self.dispatch(&way, pair, from_client(&buffer[..size]), &closed);
                    }
                    // An ICMP error for an earlier answer is no reason to stop.
                    Err(error) => log::debug!("receive: {error}"),
                },
            }
        }
    }

    /// Takes what has come before the end, and little more.
    async fn take_waiting(
        &mut self,
        way: &Way,
        local: SocketAddr,
        buffer: &mut [u8],
        closed: &Closed,
    ) {
        let until = Instant::now() + LAST_DATAGRAMS;
        while let Way::Socket(socket) = way
            && Instant::now() < until
            && let Ok(Ok((size, client))) =
                tokio::time::timeout(LAST_DATAGRAMS / 10, socket.recv_from(buffer)).await
        {
            let pair = Pair { client, local };
            self.dispatch(way, pair, from_client(&buffer[..size]), closed);
        }
    }

    /// Takes packets, up to those that have come before the end: later ones bypass the relay.
    async fn serve_packets(
        &mut self,
        exchange: &Arc<Exchange>,
        mut packets: mpsc::Receiver<TapPacket>,
    ) {
        let (closed, mut closings) = mpsc::unbounded_channel();
        loop {
            tokio::select! {
                biased;
                changed = self.accepts.changed() => if changed.is_err() {
                    packets.close();
                    while let Some(packet) = packets.recv().await {
                        self.take(exchange, packet, &closed);
                    }
                    return;
                },
                Some(pair) = closings.recv() => self.forget(pair),
                Some(packet) = packets.recv() => self.take(exchange, packet, &closed),
            }
        }
    }

    /// Takes the datagrams out of a packet.
    fn take(&mut self, exchange: &Arc<Exchange>, packet: TapPacket, closed: &Closed) {
        match packets::unpack(packet) {
            Ok(Unpacked {
                pair,
                direction,
                datagrams,
            }) => {
                let way = Way::Packets(Arc::clone(exchange));
                for (data, carrier) in datagrams {
                    let datagram = Datagram {
                        direction,
                        data,
                        carrier: Some(carrier),
                    };
                    self.dispatch(&way, pair, datagram, closed);
                }
            }
            Err(packet) => {
                self.inner.trouble.tell(
                    "fragments",
                    "a datagram came in fragments, and passes as it is",
                );
                exchange.give_back(packet);
            }
        }
    }

    /// A session has ended. A new one of the same client may have taken its place.
    fn forget(&mut self, pair: Pair) {
        if self
            .sessions
            .get(&pair)
            .is_some_and(mpsc::Sender::is_closed)
        {
            self.sessions.remove(&pair);
        }
    }

    /// Hands a datagram to its client's session, which is made if need be.
    fn dispatch(&mut self, way: &Way, pair: Pair, datagram: Datagram, closed: &Closed) {
        let datagram = match self.sessions.get(&pair) {
            None => datagram,
            Some(session) => match session.try_send(datagram) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    self.inner.trouble.tell(
                        "waiting",
                        format_args!(
                            "a client's datagrams come faster than they can be relayed: what comes while {WAITING} wait is lost"
                        ),
                    );
                    return;
                }
                Err(mpsc::error::TrySendError::Closed(datagram)) => datagram,
            },
        };
        let Some(engine) = self.engine.upgrade().filter(|_| *self.accepts.borrow()) else {
            return;
        };
        let (sender, datagrams) = mpsc::channel(WAITING);
        if sender.try_send(datagram).is_err() {
            log::error!("a new queue has room for a datagram");
        }
        self.sessions.insert(pair, sender);
        let control = self.inner.register(pair.client);
        let (inner, way, idle, closed) = (
            Arc::clone(&self.inner),
            way.clone(),
            self.idle,
            closed.clone(),
        );
        engine.spawn(async move {
            carry(&inner, &control, way, pair, datagrams, idle).await;
            inner.unregister(&control);
            if closed.send(pair).is_err() {
                log::trace!("the relay has stopped: nobody needs to know");
            }
        });
    }
}

fn from_client(data: &[u8]) -> Datagram {
    Datagram {
        direction: StreamDirection::Upstream,
        data: Bytes::copy_from_slice(data),
        carrier: None,
    }
}

async fn carry(
    inner: &Arc<Inner>,
    control: &Arc<ConnectionControl>,
    way: Way,
    pair: Pair,
    datagrams: mpsc::Receiver<Datagram>,
    idle: Duration,
) {
    let (ends, _kept) = match way {
        Way::Packets(exchange) => (Ends::Packets(exchange), None),
        Way::Socket(client) => match connect(inner, pair).await {
            Ok((server, kept)) => (Ends::Sockets { client, server }, kept),
            Err(error) => {
                inner.failed(&error);
                return;
            }
        },
    };
    let mut session = Session {
        inner: Arc::clone(inner),
        control: Arc::clone(control),
        ends,
        pair,
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
        Some(prepare) => {
            let any = if address.is_ipv4() {
                SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
            } else {
                SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
            };
            prepare(std::os::fd::AsFd::as_fd(&socket), any, address)?
        }
        None => None,
    };
    socket.connect(&address.into())?;
    Ok((UdpSocket::from_std(socket.into())?, kept))
}

/// Where a client's datagrams go.
enum Ends {
    /// To the client from the socket that it sent to, to the server from another.
    Sockets {
        client: Arc<UdpSocket>,
        server: UdpSocket,
    },
    /// Back into the packets that they came in.
    Packets(Arc<Exchange>),
}

/// One client.
struct Session {
    inner: Arc<Inner>,
    control: Arc<ConnectionControl>,
    ends: Ends,
    pair: Pair,
    datagrams: mpsc::Receiver<Datagram>,
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
        let mut moved = self.take_queued(context, now);
        moved |= self.take_from_server(context, now);
        if moved {
            self.last = now;
        }
        let mut deadline = None;
        self.retry = false;
        for direction in StreamDirection::ALL {
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
        for direction in StreamDirection::ALL {
            let owner = PipelineOwner {
                direction,
                relay_key: self.inner.key,
                connection: self.control.ordinal,
                opened: self.control.opened,
                greeted: &Greeted::Unread,
                is_datagram: true,
                trouble: &self.inner.trouble,
            };
            let index = direction.index();
            self.pipelines[index].reconcile(&toxics, &owner, now, &mut self.outputs[index]);
        }
    }

    fn push(&mut self, datagram: Datagram, now: Instant) {
        let index = datagram.direction.index();
        count(&self.inner.stats.received[index], datagram.data.len());
        if self.pipelines[index].room(now) == 0 {
            // What is due makes room, though nothing has looked at it since.
            let mut pieces = PIECES;
            self.pipelines[index].advance(now, &mut self.outputs[index], &mut pieces);
            self.send(datagram.direction);
        }
        if self.pipelines[index].room(now) > 0 {
            let chunk = Chunk {
                data: datagram.data,
                at: now,
                carrier: datagram.carrier,
            };
            self.pipelines[index].push(chunk, &mut self.outputs[index]);
        }
    }

    fn take_queued(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        for step in 0..WAITING {
            match self.datagrams.poll_recv(context) {
                Poll::Ready(Some(datagram)) => self.push(datagram, now),
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
            let Ends::Sockets { server, .. } = &self.ends else {
                return false;
            };
            let received = with_buffer(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                server
                    .poll_recv(context, &mut buffer)
                    .map_ok(|()| Bytes::copy_from_slice(buffer.filled()))
            });
            match received {
                Poll::Ready(Ok(data)) => {
                    moved = true;
                    let datagram = Datagram {
                        direction: StreamDirection::Downstream,
                        data,
                        carrier: None,
                    };
                    self.push(datagram, now);
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
    fn send(&mut self, direction: StreamDirection) -> bool {
        let index = direction.index();
        let mut moved = false;
        while let Some(item) = self.outputs[index].items.front() {
            let (Item::Data(data) | Item::Packet(data, _)) = item else {
                self.outputs[index].items.pop_front();
                continue;
            };
            let sent = match (&self.ends, item) {
                (Ends::Packets(exchange), Item::Packet(data, carrier)) => carrier
                    .carry(data, |packet| exchange.give_back(packet))
                    .map(|()| data.len()),
                (Ends::Sockets { client, server }, _) => match direction {
                    StreamDirection::Upstream => server.try_send(data),
                    StreamDirection::Downstream => client.try_send_to(data, self.pair.client),
                },
                // No stage makes up datagrams.
                (Ends::Packets(_), _) => Ok(0),
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
