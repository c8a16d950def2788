//! The TCP relay: accepts, connects, and keeps the books over its connections.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use super::connection::{Connection, close_by_reset, close_in_order};
use super::control::Control;
use super::engine::Engine;
use super::fault::CloseMode;
use super::handshake::{Delivery, HandshakeEvent, HeldSyn, TcpInlet, pair};
use super::inner::Inner;
use super::lane::unread;
use super::packets::Pair;
use super::upstream::Accepted;

/// What an accepting task is told.
pub(crate) enum Command {
    Accept(bool, oneshot::Sender<()>),
    Stop(oneshot::Sender<()>),
    /// As `Stop`, but what has come by then is still taken in.
    Finish(oneshot::Sender<()>),
}

/// Starts accepting.
pub(crate) fn start(
    engine: &Arc<Engine>,
    inner: &Arc<Inner>,
    inlet: TcpInlet,
    accepts: bool,
) -> mpsc::UnboundedSender<Command> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let is_held = inlet.handshakes.is_some();
    let (worker, inner) = (Arc::downgrade(engine), Arc::clone(inner));
    let task = async move {
        let listener = match TcpListener::from_std(inlet.listener) {
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
            openings: Arc::default(),
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
    listener: TcpListener,
    openings: Openings,
}

/// Connections whose SYN is held, or was let in and is not accepted yet: the task that has the server takes the client.
/// Dropping the sender ends it.
type Openings = Arc<Mutex<HashMap<Pair, oneshot::Sender<Client>>>>;

/// An accepted connection.
type Client = (io::Result<std::net::TcpStream>, Arc<Control>);

/// A server's connection, or how the client is to be closed for want of one.
type Reached = Result<std::net::TcpStream, CloseMode>;

impl Door {
    async fn serve(
        self,
        mut handshakes: Option<mpsc::UnboundedReceiver<HandshakeEvent>>,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut accepts: bool,
    ) {
        let done = loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Accept(wanted, done)) => {
                        accepts = wanted;
                        acknowledge(done);
                    }
                    Some(Command::Stop(done)) => break done,
                    Some(Command::Finish(done)) => {
                        if accepts {
                            self.accept_waiting(handshakes.is_some());
                        }
                        break done;
                    }
                    None => return,
                },
                Some(event) = next(&mut handshakes) => self.shake(event, accepts),
                accepted = self.listener.accept(), if accepts => match accepted {
                    Ok((client, address)) => {
                        self.dispatch(client.into_std(), address, handshakes.is_some());
                    }
                    Err(error) => pause_after(&self.inner, &error).await,
                },
            }
        };
        self.openings().clear();
        drop(self.listener);
        acknowledge(done);
    }

    /// Accepts what waits.
    fn accept_waiting(&self, is_held: bool) {
        let accept = || {
            let (client, address) = socket2::SockRef::from(&self.listener).accept()?;
            client.set_nonblocking(true)?;
            let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            Ok::<_, io::Error>((client.into(), address))
        };
        loop {
            match accept() {
                Ok((client, address)) => self.dispatch(Ok(client), address, is_held),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_gone(&error) => {}
                Err(error) => return self.inner.count_failure(&error),
            }
        }
    }

    fn openings(&self) -> MutexGuard<'_, HashMap<Pair, oneshot::Sender<Client>>> {
        self.openings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shake(&self, event: HandshakeEvent, accepts: bool) {
        match event {
            HandshakeEvent::Gone(pair) => {
                self.openings().remove(&pair);
            }
            // Nobody is to accept it: it waits in the kernel's queue.
            HandshakeEvent::Syn(syn) if !accepts => {
                if let Err(error) = syn.admit() {
                    log::warn!("{syn:?} can't be let in: {error}");
                }
            }
            HandshakeEvent::Syn(syn) => {
                let (sender, client) = oneshot::channel();
                match self.openings().entry(syn.pair) {
                    Entry::Vacant(opening) => opening.insert(sender),
                    // The client has sent it again.
                    Entry::Occupied(_) => return,
                };
                let (inner, openings) = (Arc::clone(&self.inner), Arc::clone(&self.openings));
                let engine = self.engine.clone();
                // On this worker: waking another would take longer than what is to be done.
                tokio::spawn(async move {
                    let pair = syn.pair;
                    if !open(engine, inner, syn, client).await {
                        let mut openings = openings.lock().unwrap_or_else(PoisonError::into_inner);
                        openings.remove(&pair);
                    }
                });
            }
        }
    }

    fn dispatch(
        &self,
        client: io::Result<std::net::TcpStream>,
        address: SocketAddr,
        is_held: bool,
    ) {
        let control = self.inner.register(address);
        let opening = match &client {
            Ok(client) if is_held => self.opening_of(client, address),
            _ => None,
        };
        let mut client = (client, control);
        if let Some(opening) = opening {
            match opening.send(client) {
                Ok(()) => return,
                Err(late) => client = late,
            }
        }
        hand_over(&self.engine, Arc::clone(&self.inner), client, None);
    }

    /// Takes the opening of an accepted connection, whose later segments nobody need look at.
    fn opening_of(
        &self,
        client: &std::net::TcpStream,
        address: SocketAddr,
    ) -> Option<oneshot::Sender<Client>> {
        if let Err(error) = socket2::SockRef::from(client).detach_filter() {
            log::debug!("a connection keeps its filter: {error}");
        }
        let local = client.local_addr().ok()?;
        self.openings().remove(&pair(address, local))
    }
}

/// The next event; none ever where no SYN is held.
async fn next(
    handshakes: &mut Option<mpsc::UnboundedReceiver<HandshakeEvent>>,
) -> Option<HandshakeEvent> {
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
    mut client: oneshot::Receiver<Client>,
) -> bool {
    let accepted = || {
        Ok(Accepted {
            client: syn.pair.client,
            local: syn.pair.local,
        })
    };
    let server = tokio::select! {
        biased;
        _gone = &mut client => return true,
        server = inner.upstream.connect(accepted) => server.and_then(TcpStream::into_std),
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
fn hand_over(engine: &Weak<Engine>, inner: Arc<Inner>, client: Client, server: Option<Reached>) {
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
    mut client: oneshot::Receiver<Client>,
) -> Option<Result<Client, oneshot::error::RecvError>> {
    let sent = syn.admit();
    if sent.is_ok()
        && let Ok(client) = tokio::time::timeout(RESENT, &mut client).await
    {
        return Some(client);
    }
    log::debug!("{syn:?} waits for the client's next: {sent:?}");
    if let Err(error) = (syn.stop_holding)(syn.pair) {
        log::warn!("{syn:?} can't be let in: {error}");
    }
    tokio::time::timeout(KEPT, client).await.ok()
}

async fn refuse(syn: &HeldSyn, error: &io::Error, client: &mut oneshot::Receiver<Client>) -> bool {
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

fn unwatched(inner: &Inner, control: &Control, error: &io::Error) {
    log::error!("a connection can't be watched: {error}");
    inner.unregister(control);
}

/// What a server is given to answer when its client is to be closed meanwhile.
const LAST_CHANCE: Duration = Duration::from_millis(10);

/// Connects to the server of a client, else says how that is to be closed.
async fn reach(
    inner: &Inner,
    control: &Control,
    client: &TcpStream,
) -> Result<TcpStream, CloseMode> {
    let accepted = || {
        Ok(Accepted {
            client: control.client,
            local: client.local_addr()?,
        })
    };
    let connecting = inner.upstream.connect(accepted);
    tokio::pin!(connecting);
    tokio::select! {
        biased;
        server = &mut connecting => server.map_err(|error| {
            if is_reset_by(&error) {
                return CloseMode::Rst;
            }
            inner.failed(&error);
            inner.upstream.unreachable()
        }),
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
        _ready = client.ready(Interest::ERROR) => Err(CloseMode::Rst),
    }
}

/// Carries a connection to a server that has been reached already, or is to be.
async fn carry(inner: Arc<Inner>, (client, control): Client, server: Option<Reached>) {
    let client = match client.and_then(TcpStream::from_std) {
        Ok(client) => client,
        Err(error) => return unwatched(&inner, &control, &error),
    };
    let server = match server {
        Some(reached) => reached.map(TcpStream::from_std),
        None => reach(&inner, &control, &client).await.map(Ok),
    };
    match server {
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
async fn carry_on(inner: Arc<Inner>, control: Arc<Control>, client: TcpStream, server: TcpStream) {
    let mut connection = Connection::new(Arc::clone(&inner), Arc::clone(&control), client, server);
    let lingers = connection.run().await;
    if lingers {
        inner.unregister(&control);
        connection.linger().await;
    } else {
        drop(connection);
        inner.unregister(&control);
    }
}
