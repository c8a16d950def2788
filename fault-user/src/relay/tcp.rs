//! The TCP relay: accepts, connects, and keeps the books over its connections.

use std::future::{Future as _, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::attributes::CloseMode;
use super::connection::{RelayedConnection, close_by_reset, close_in_order};
use super::control::ConnectionControl;
use super::engine::Engine;
use super::handshake::{ClientEvent, Delivery, HeldSyn, TcpInlet, pair};
use super::inner::Inner;
use super::openings::AcceptedClient;
use super::socket::unread;
use super::timer::sleep_until;
use super::upstream::Accepted;

/// What an accepting task is told.
pub(crate) enum ListenerCommand {
    Accept(bool, oneshot::Sender<()>),
    Stop(oneshot::Sender<()>),
    /// What has come by then is still taken in, and clients whose SYNs are held. It stops when there are none.
    Finish(oneshot::Sender<()>),
}

/// Starts accepting.
pub(crate) fn start(
    engine: &Arc<Engine>,
    inner: &Arc<Inner>,
    inlet: TcpInlet,
    accepts: bool,
) -> mpsc::UnboundedSender<ListenerCommand> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let is_held = inlet.handshakes.is_some();
    let (worker, inner) = (Arc::downgrade(engine), Arc::clone(inner));
    let task = async move {
        // SAFETY: the descriptor is the value's own, and open until the `AsyncFd` is dropped.
        let listener = match unsafe { AsyncFd::register(inlet.listener) } {
            Ok(listener) => listener,
            Err(error) => {
                log::error!("a listener can't be watched: {error}");
                return;
            }
        };
        let door = Door {
            engine: worker,
            inner,
            listener,
        };
        door.serve(inlet.handshakes, receiver, accepts).await;
    };
    if is_held {
        engine.spawn_beside_handshakes(task);
    } else {
        engine.spawn(task);
    }
    commands
}

/// A listener, and the clients that wait for its relay to reach their servers.
struct Door {
    engine: Weak<Engine>,
    inner: Arc<Inner>,
    listener: AsyncFd<TcpListener>,
}

/// A server's connection, or how the client is to be closed for want of one.
type Reached = Result<std::net::TcpStream, CloseMode>;

impl Door {
    async fn serve(
        self,
        mut handshakes: Option<mpsc::UnboundedReceiver<ClientEvent>>,
        mut commands: mpsc::UnboundedReceiver<ListenerCommand>,
        mut accepts: bool,
    ) {
        let mut is_last = false;
        let done = loop {
            if is_last && !self.inner.holds_clients() {
                break None;
            }
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(ListenerCommand::Accept(wanted, done)) => {
                        accepts = wanted;
                        acknowledge(done);
                    }
                    Some(ListenerCommand::Stop(done)) => break Some(done),
                    Some(ListenerCommand::Finish(done)) => {
                        if accepts {
                            self.accept_waiting(handshakes.is_some());
                        }
                        is_last = true;
                        acknowledge(done);
                    }
                    None => break None,
                },
                Some(event) = next(&mut handshakes) => self.shake(event, accepts),
                accepted = self.accept(), if accepts => match accepted {
                    Ok((client, address)) => self.dispatch(client, address, handshakes.is_some()),
                    Err(error) => pause_after(&self.inner, &error).await,
                },
            }
        };
        self.inner.change_openings(|openings| openings.held.clear());
        drop(self.listener);
        if let Some(done) = done {
            acknowledge(done);
        }
    }

    async fn accept(&self) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        // However many wait, others have their turns.
        tokio::task::consume_budget().await;
        loop {
            let mut ready = self.listener.readable().await?;
            if let Ok(accepted) = ready.try_io(|listener| accept(listener.get_ref())) {
                return accepted;
            }
        }
    }

    /// Accepts what waits.
    fn accept_waiting(&self, is_held: bool) {
        loop {
            match accept(self.listener.get_ref()) {
                Ok((client, address)) => self.dispatch(client, address, is_held),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_gone(&error) => {}
                Err(error) => return self.inner.count_failure(&error),
            }
        }
    }

    fn shake(&self, event: ClientEvent, accepts: bool) {
        match event {
            ClientEvent::Gone(pair) => {
                self.inner
                    .change_openings(|openings| openings.held.remove(&pair));
            }
            // Nobody is to accept it: it waits in the kernel's queue.
            ClientEvent::Syn(syn) if !accepts => {
                if let Err(error) = syn.admit() {
                    log::warn!("{syn:?} can't be let in: {error}");
                }
            }
            ClientEvent::Syn(syn) => {
                if let Err(error) = self.hold(syn) {
                    log::warn!("a SYN can't be read: {error}");
                }
            }
        }
    }

    /// Looks for the server of a client whose SYN is held.
    fn hold(&self, syn: HeldSyn) -> io::Result<()> {
        let (pair, sequence) = (syn.pair, syn.sequence()?);
        // What waits here to be accepted came before it: a connection that had these ends and may be over already, or one
        // whose SYN was not held. Servers see connections in the order in which they are opened.
        self.accept_waiting(true);
        let Some(client) = self.inner.openings().begin(pair, sequence) else {
            return Ok(());
        };
        let inner = Arc::clone(&self.inner);
        let engine = self.engine.clone();
        // On this worker: waking another would take longer than what is to be done.
        tokio::spawn(async move {
            if !open(engine, Arc::clone(&inner), syn, client).await {
                inner.change_openings(|openings| openings.end(pair, sequence));
            }
        });
        Ok(())
    }

    fn dispatch(&self, client: std::net::TcpStream, address: SocketAddr, is_held: bool) {
        let control = self.inner.register(address);
        let opening = is_held.then(|| self.opening_of(&client, address)).flatten();
        let mut client = (client, control);
        if let Some(opening) = opening {
            match opening.send(client) {
                Ok(()) => return,
                Err(late) => client = late,
            }
        }
        let (engine, inner) = (self.engine.clone(), Arc::clone(&self.inner));
        if !is_held {
            return hand_over(&engine, inner, client, None);
        }
        // On this worker, on which one task begins after the other: see `hold`.
        tokio::spawn(async move {
            let reached = reach(&inner, &client.1, &client.0).await;
            hand_over(&engine, inner, client, Some(reached));
        });
    }

    /// Takes the opening of an accepted connection, whose later segments nobody need look at.
    fn opening_of(
        &self,
        client: &std::net::TcpStream,
        address: SocketAddr,
    ) -> Option<oneshot::Sender<AcceptedClient>> {
        if let Err(error) = socket2::SockRef::from(client).detach_filter() {
            log::debug!("a connection keeps its filter: {error}");
        }
        let local = client.local_addr().ok()?;
        let pair = pair(address, local);
        self.inner.change_openings(|openings| openings.accept(pair))
    }
}

/// Accepts a connection whose socket does not block.
fn accept(listener: &TcpListener) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let accept = |address: *mut socket2::SockAddrStorage, length: *mut _| {
        // SAFETY: the address has room for what the length says.
        let accepted =
            unsafe { libc::accept4(listener.as_raw_fd(), address.cast(), length, flags) };
        Ok(Errno::result(accepted)?)
    };
    // SAFETY: where it succeeds the kernel has written the address and its length.
    let (accepted, address) = unsafe { socket2::SockAddr::try_init(accept) }?;
    // SAFETY: the descriptor is new, and nobody else's.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((accepted.into(), address))
}

/// The next event; none ever where no SYN is held.
async fn next(
    handshakes: &mut Option<mpsc::UnboundedReceiver<ClientEvent>>,
) -> Option<ClientEvent> {
    match handshakes {
        Some(handshakes) => handshakes.recv().await,
        None => std::future::pending().await,
    }
}

/// How long the SYN that was sent again may take. When it is lost, the client's own next one is let in.
const RESENT: Duration = Duration::from_millis(200);
/// How long a server is kept for a client that does not come.
const KEPT: Duration = Duration::from_mins(2);
/// How often a client is told by ICMP that its server can't be reached: the kernel takes no notice while the client's
/// connect(2) has not returned or begun to wait. Each time it is waited twice as long, from a millisecond on.
const ERRORS: u32 = 8;

/// Connects to the server of a client whose SYN is held, and lets the client connect or fail accordingly. False when the
/// client has not been heard of meanwhile.
async fn open(
    engine: Weak<Engine>,
    inner: Arc<Inner>,
    syn: HeldSyn,
    mut client: oneshot::Receiver<AcceptedClient>,
) -> bool {
    let accepted = || {
        Ok(Accepted {
            client: syn.pair.client,
            local: syn.pair.local,
        })
    };
    let server = tokio::select! {
        biased;
        client = &mut client => {
            if let Ok(client) = client {
                hand_over(&engine, inner, client, None);
            }
            return true;
        }
        server = inner.upstream.connect(accepted) => server,
    };
    let server = match server {
        Ok(server) => Ok(server),
        Err(error) if is_reset_by(&error) => Err(CloseMode::Rst),
        Err(error) => {
            inner.failed(&error);
            return refuse(&syn, &error, &mut client).await;
        }
    };
    match admit(&syn, client).await {
        Some(Ok(client)) => {
            hand_over(&engine, inner, client, Some(server));
            true
        }
        // Its end of the channel is gone, and with it the opening.
        Some(Err(_gone)) => true,
        None => false,
    }
}

/// Has a worker carry an accepted connection, which belongs to it from then on: its sockets are registered there anew.
fn hand_over(
    engine: &Weak<Engine>,
    inner: Arc<Inner>,
    client: AcceptedClient,
    server: Option<Reached>,
) {
    if let Some(engine) = engine.upgrade() {
        engine.spawn(async move { carry(inner, client, server).await });
    }
}

/// Whether the server has accepted the relay's connection, and reset it at once: it was reached.
fn is_reset_by(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionReset
}

async fn admit(
    syn: &HeldSyn,
    mut client: oneshot::Receiver<AcceptedClient>,
) -> Option<Result<AcceptedClient, oneshot::error::RecvError>> {
    let sent = syn.admit();
    if sent.is_ok() {
        tokio::select! {
            biased;
            client = &mut client => return Some(client),
            () = sleep_until(Instant::now() + RESENT) => {}
        }
    }
    log::debug!("{syn:?} waits for the client's next: {sent:?}");
    if let Err(error) = (syn.stop_holding)(syn.pair) {
        log::warn!("{syn:?} can't be let in: {error}");
    }
    tokio::time::timeout(KEPT, client).await.ok()
}

async fn refuse(
    syn: &HeldSyn,
    error: &io::Error,
    client: &mut oneshot::Receiver<AcceptedClient>,
) -> bool {
    for attempt in 0..ERRORS {
        match syn.refuse(error) {
            Ok(Delivery::Certain) => return false,
            Ok(Delivery::Doubtful) => {}
            Err(error) => {
                log::warn!("{syn:?} can't be refused: {error}");
                return false;
            }
        }
        let pause = Duration::from_millis(1 << attempt);
        if tokio::time::timeout(pause, &mut *client).await.is_ok() {
            return true;
        }
    }
    false
}

/// Whether only a client that is gone again made an accept fail.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}

pub(crate) fn acknowledge(done: oneshot::Sender<()>) {
    if done.send(()).is_err() {
        log::debug!("nobody waits for an acknowledgement any more");
    }
}

/// An accept can fail because its client is gone again, or for lack of descriptors: then trying again at
/// once would only burn time.
async fn pause_after(inner: &Inner, error: &io::Error) {
    if !is_gone(error) {
        inner.count_failure(error);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn unwatched(inner: &Inner, control: &ConnectionControl, error: &io::Error) {
    log::error!("a connection can't be watched: {error}");
    inner.unregister(control);
}

/// What a server is given to answer when its client is to be closed meanwhile.
const LAST_CHANCE: Duration = Duration::from_millis(10);

/// Connects to the server of a client, else says how that is to be closed.
async fn reach(
    inner: &Inner,
    control: &ConnectionControl,
    client: &std::net::TcpStream,
) -> Reached {
    let accepted = || {
        Ok(Accepted {
            client: control.client,
            local: client.local_addr()?,
        })
    };
    let answered = |server: io::Result<std::net::TcpStream>| {
        server.map_err(|error| {
            if is_reset_by(&error) {
                return CloseMode::Rst;
            }
            inner.failed(&error);
            inner.upstream.unreachable()
        })
    };
    let connecting = inner.upstream.connect(accepted);
    tokio::pin!(connecting);
    // Of a server that answers at once the client need not be watched.
    let first = poll_fn(|context| Poll::Ready(connecting.as_mut().poll(context)));
    if let Poll::Ready(server) = first.await {
        return answered(server);
    }
    let watched = match client.try_clone().and_then(TcpStream::from_std) {
        Ok(watched) => watched,
        Err(error) => {
            inner.failed(&error);
            return Err(CloseMode::Rst);
        }
    };
    tokio::select! {
        biased;
        server = &mut connecting => answered(server),
        mode = control.told_to_close() => {
            // A server that has accepted by now may have sent something.
            let last = tokio::time::timeout(LAST_CHANCE, connecting).await;
            last.ok().and_then(Result::ok).ok_or_else(|| {
                if control.drains().is_some() {
                    inner.count_cut(unread(client));
                }
                mode
            })
        }
        // A client that gives up while the server does not answer is not kept.
        _ready = watched.ready(Interest::ERROR) => Err(CloseMode::Rst),
    }
}

/// Carries a connection to a server that has been reached already, or is to be.
async fn carry(inner: Arc<Inner>, (client, control): AcceptedClient, server: Option<Reached>) {
    let reached = match server {
        Some(reached) => reached,
        None => reach(&inner, &control, &client).await,
    };
    let client = match TcpStream::from_std(client) {
        Ok(client) => client,
        Err(error) => return unwatched(&inner, &control, &error),
    };
    match reached.map(TcpStream::from_std) {
        Ok(Ok(server)) => carry_on(inner, control, client, server).await,
        Ok(Err(error)) => unwatched(&inner, &control, &error),
        Err(CloseMode::Fin) => {
            inner.unregister(&control);
            close_in_order(client).await;
        }
        Err(CloseMode::Rst) => {
            close_by_reset(client, &control).await;
            inner.unregister(&control);
        }
    }
}

/// Carries what a client and its server send.
async fn carry_on(
    inner: Arc<Inner>,
    control: Arc<ConnectionControl>,
    client: TcpStream,
    server: TcpStream,
) {
    let mut connection =
        RelayedConnection::new(Arc::clone(&inner), Arc::clone(&control), client, server);
    let lingers = connection.run().await;
    if lingers {
        inner.unregister(&control);
        connection.linger().await;
    } else {
        drop(connection);
        inner.unregister(&control);
    }
}
