//! The TCP relay: accepts, connects, and keeps the books over its connections.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};

use super::connection::{Connection, Control, Cut, Drain, close_in_order};
use super::engine::Engine;
use super::fault::CloseMode;
use super::lane::unread;
use super::toxic::ToxicSet;
use super::trouble::Trouble;
use super::upstream::{Accepted, Target, Upstream};

/// What a relay has carried.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// Bytes read from the source, by direction.
    pub(crate) received: [AtomicU64; 2],
    /// Bytes written to the sink, by direction.
    pub(crate) sent: [AtomicU64; 2],
    pub(crate) accepted: AtomicU64,
    /// Connections whose server could not be reached.
    pub(crate) refused: AtomicU64,
    /// Connections that were reset at the end, and the bytes that were lost by that.
    cut: [AtomicU64; 2],
}

impl Stats {
    /// What was lost at the end.
    pub(crate) fn cut(&self) -> Cut {
        let [connections, bytes] = self
            .cut
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed));
        Cut { connections, bytes }
    }
}

/// What the connections of a relay share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) toxics: Arc<ToxicSet>,
    /// Everything that is drawn here is drawn under this key.
    pub(crate) key: u64,
    pub(crate) stats: Arc<Stats>,
    pub(crate) upstream: Upstream,
    /// Counts accepted connections over restarts, so that their ordinals go on.
    pub(crate) ordinals: Arc<AtomicU64>,
    pub(crate) open: Mutex<BTreeMap<u64, Arc<Control>>>,
    /// Tells that a connection was opened or closed.
    pub(crate) changed: Arc<Notify>,
    pub(crate) trouble: Arc<Trouble>,
}

impl Inner {
    /// Has every connection look at its stages.
    pub(crate) fn wake_all(&self) {
        for control in self.controls() {
            control.wake();
        }
    }

    /// The server of a connection could not be reached: counted, and told of a proxy whose clients do
    /// not see why.
    pub(crate) fn refused(&self, error: &io::Error) {
        self.stats.refused.fetch_add(1, Ordering::Relaxed);
        match &self.upstream.target {
            Target::Name(name) => {
                let what = format_args!("can't reach its upstream {name}: {error}");
                self.trouble.tell("upstream", what);
            }
            Target::Hook(_) | Target::OriginalDestination => log::info!("upstream: {error}"),
        }
    }

    /// Counts a connection that is reset at the end.
    pub(crate) fn count_cut(&self, bytes: usize) {
        let [connections, lost] = &self.stats.cut;
        connections.fetch_add(1, Ordering::Relaxed);
        lost.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Has every connection end once nothing of it is on its way any more.
    pub(crate) fn drain(&self, drain: Drain) {
        for control in self.controls() {
            control.drain(drain);
        }
    }

    pub(crate) fn controls(&self) -> Vec<Arc<Control>> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    pub(crate) fn register(&self, client: SocketAddr) -> Arc<Control> {
        let ordinal = self.ordinals.fetch_add(1, Ordering::Relaxed) + 1;
        let control = Arc::new(Control::new(ordinal, client));
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(ordinal, Arc::clone(&control));
        drop(open);
        self.stats.accepted.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_waiters();
        control
    }

    pub(crate) fn unregister(&self, control: &Control) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&control.ordinal);
        control.closed.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Closes up to `count` connections, the oldest first, and waits until it has happened.
    pub(crate) async fn close(&self, count: usize, mode: CloseMode) -> usize {
        let closing: Vec<_> = self.controls().into_iter().take(count).collect();
        for control in &closing {
            control.close(mode);
        }
        self.wait_until(|| {
            closing
                .iter()
                .all(|control| control.closed.load(Ordering::Acquire))
        })
        .await;
        closing.len()
    }

    /// Waits until a condition on the connections holds.
    pub(crate) async fn wait_until(&self, mut holds: impl FnMut() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Only a waiter that is enabled before the look can't miss a change after it.
            changed.as_mut().enable();
            if holds() {
                return;
            }
            changed.await;
        }
    }
}

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
    listener: std::net::TcpListener,
    accepts: bool,
) -> mpsc::UnboundedSender<Command> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let (worker, inner) = (Arc::downgrade(engine), Arc::clone(inner));
    engine.spawn(async move {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                log::error!("a listener can't be watched: {error}");
                return;
            }
        };
        serve(&worker, &inner, listener, receiver, accepts).await;
    });
    commands
}

async fn serve(
    engine: &std::sync::Weak<Engine>,
    inner: &Arc<Inner>,
    listener: TcpListener,
    mut commands: mpsc::UnboundedReceiver<Command>,
    mut accepts: bool,
) {
    loop {
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Command::Accept(wanted, done)) => {
                    accepts = wanted;
                    acknowledge(done);
                }
                Some(Command::Stop(done)) => {
                    drop(listener);
                    acknowledge(done);
                    return;
                }
                Some(Command::Finish(done)) => {
                    if accepts && let Some(engine) = engine.upgrade() {
                        accept_waiting(&engine, inner, &listener);
                    }
                    acknowledge(done);
                    return;
                }
                None => return,
            },
            accepted = listener.accept(), if accepts => match accepted {
                Ok((client, address)) => {
                    let Some(engine) = engine.upgrade() else { return };
                    dispatch(&engine, inner, client.into_std(), address);
                }
                Err(error) => pause_after(&error).await,
            },
        }
    }
}

/// Accepts what waits.
fn accept_waiting(engine: &Engine, inner: &Arc<Inner>, listener: &TcpListener) {
    let accept = || {
        let (client, address) = socket2::SockRef::from(listener).accept()?;
        client.set_nonblocking(true)?;
        let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok::<_, io::Error>((client.into(), address))
    };
    loop {
        match accept() {
            Ok((client, address)) => dispatch(engine, inner, Ok(client), address),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                log::error!("accept: {error}");
                return;
            }
        }
    }
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
async fn pause_after(error: &io::Error) {
    if !is_gone(error) {
        log::error!(
            "accept: {error}; raise the limit of open files (ulimit -n) if that is what it says"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn dispatch(
    engine: &Engine,
    inner: &Arc<Inner>,
    client: io::Result<std::net::TcpStream>,
    address: SocketAddr,
) {
    let control = inner.register(address);
    let inner = Arc::clone(inner);
    // The connection belongs to the worker that carries it: it is registered there anew.
    engine.spawn(async move {
        match client.and_then(TcpStream::from_std) {
            Ok(client) => carry(inner, control, client).await,
            Err(error) => {
                log::error!("a connection can't be watched: {error}");
                inner.unregister(&control);
            }
        }
    });
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
            // It has accepted, and reset the connection at once: that is no failure to reach it.
            if error.kind() == io::ErrorKind::ConnectionReset {
                return CloseMode::Rst;
            }
            inner.refused(&error);
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

async fn carry(inner: Arc<Inner>, control: Arc<Control>, client: TcpStream) {
    let server = reach(&inner, &control, &client).await;
    let server = match server {
        Ok(server) => server,
        Err(CloseMode::Fin) => {
            inner.unregister(&control);
            close_in_order(client).await;
            return;
        }
        Err(CloseMode::Rst) => {
            if let Err(error) = client.set_zero_linger() {
                log::trace!("linger: {error}");
            }
            drop(client);
            inner.unregister(&control);
            return;
        }
    };
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
