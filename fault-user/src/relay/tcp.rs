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

use super::connection::{Connection, Control};
use super::engine::Engine;
use super::fault::CloseMode;
use super::toxic::ToxicSet;
use super::upstream::{Accepted, Upstream};

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
}

impl Inner {
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
                None => return,
            },
            accepted = listener.accept(), if accepts => match accepted {
                Ok((client, address)) => {
                    let Some(engine) = engine.upgrade() else { return };
                    dispatch(&engine, inner, client, address);
                }
                Err(error) => pause_after(&error).await,
            },
        }
    }
}

pub(crate) fn acknowledge(done: oneshot::Sender<()>) {
    if done.send(()).is_err() {
        log::debug!("nobody waits for an acknowledgement any more");
    }
}

/// An accept can fail because its client is gone again, or for lack of descriptors: then trying again at
/// once would only burn time.
async fn pause_after(error: &io::Error) {
    let gone = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    );
    if !gone {
        log::error!(
            "accept: {error}; raise the limit of open files (ulimit -n) if that is what it says"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn dispatch(engine: &Engine, inner: &Arc<Inner>, client: TcpStream, address: SocketAddr) {
    let control = inner.register(address);
    let inner = Arc::clone(inner);
    // The connection belongs to the worker that carries it: it is registered there anew.
    let client = client.into_std();
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

async fn carry(inner: Arc<Inner>, control: Arc<Control>, client: TcpStream) {
    let accepted = || {
        Ok(Accepted {
            client: control.client,
            local: client.local_addr()?,
        })
    };
    let server = tokio::select! {
        biased;
        mode = control.told_to_close() => Err(mode),
        server = inner.upstream.connect(accepted) => server.map_err(|error| {
            log::info!("upstream {:?}: {error}", inner.upstream);
            inner.stats.refused.fetch_add(1, Ordering::Relaxed);
            if error.kind() == io::ErrorKind::ConnectionReset {
                // A server that can't be reached refuses: this one had accepted.
                CloseMode::Rst
            } else {
                inner.upstream.unreachable()
            }
        }),
        // A client that gives up while the server does not answer is not kept.
        _ready = client.ready(Interest::ERROR) => Err(CloseMode::Rst),
    };
    let server = match server {
        Ok(server) => server,
        Err(mode) => {
            if mode == CloseMode::Rst
                && let Err(error) = client.set_zero_linger()
            {
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
