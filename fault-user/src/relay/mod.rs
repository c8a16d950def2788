//! The relay in user space: TCP streams and UDP datagrams with every stream fault.
//!
//! A [`Relay`] listens, connects each client to its [`Upstream`] and puts [`RelayFault`]s on what passes. Faults can
//! be added, changed and removed while connections are open. It needs no privileges and no HTTP: the control
//! API is a layer on top. `docs/relay.md` says what each fault does.

// `each_stage!`: the list of the faults, which are the files of `stage`.
include!(concat!(env!("OUT_DIR"), "/stages.rs"));

pub mod attributes;
mod budget;
mod connection;
mod control;
pub mod decisions;
mod engine;
pub mod exchange;
pub mod fault;
mod fuzz;
mod greeting;
mod handling;
mod handshake;
mod inner;
mod lane;
mod openings;
mod packets;
mod picked;
mod pipe;
mod pipeline;
mod postgres;
mod protocol;
mod queries;
mod random;
mod requests;
mod shared;
mod socket;
mod stage;
mod tcp;
mod timer;
mod toxic;
mod trouble;
mod udp;
mod upstream;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{Mutex, Notify, mpsc, oneshot};

pub use attributes::{CloseMode, StreamDirection, Transport};
pub use control::{Cut, Drain};
pub use decisions::{DecisionLog, Decisions, StreamDecision, StreamReplay};
pub use engine::Engine;
pub use fault::RelayFault;
pub use fuzz::{fuzz, fuzz_greeting, fuzz_queries};
pub use greeting::GreetingFilter;
pub use handshake::{ClientEvent, HeldSyn, RawSockets, StopHolding, TcpInlet, pair};
pub use packets::Pair;
pub use picked::{Datagrams, Picked};
pub use queries::Queries;
pub use toxic::{ToxicConfig, ToxicError};
pub use upstream::{Accepted, Answered, Prepare, Resolve, Upstream, UpstreamTarget};
pub(crate) use upstream::{bind, resolve_name};

use crate::relay::exchange::Exchange;
use inner::{Inner, Stats};
use tcp::ListenerCommand;
use toxic::ToxicSet;
use trouble::Trouble;

/// The longest queue of connections that wait to be accepted: the kernel cuts it to `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = i32::MAX;

/// How long a change waits for every connection to have met it.
const PROMPT: Duration = Duration::from_millis(50);
/// What connections are given to end when their time is over.
const LAST_TURN: Duration = Duration::from_secs(1);

/// Makes the listener of a TCP relay, each time that it starts to listen.
pub type BindTcp = Arc<dyn Fn() -> io::Result<TcpInlet> + Send + Sync>;

/// Where a relay listens.
#[derive(Clone)]
pub enum Listen {
    /// TCP on `host:port`; port 0 lets the kernel choose, an empty host means every address.
    Tcp(String),
    /// UDP on `host:port`.
    Udp(String),
    /// TCP on a listener that is made elsewhere, for instance by what redirects a service to it.
    TcpHook(BindTcp),
    /// UDP in packets on their way between others, which come by this number of an exchange.
    Packets(Arc<Exchange>, usize),
}

impl Listen {
    /// Streams or datagrams.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        match self {
            Self::Tcp(_) | Self::TcpHook(_) => Transport::Tcp,
            Self::Udp(_) | Self::Packets(..) => Transport::Udp,
        }
    }
}

impl fmt::Debug for Listen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(formatter, "tcp:{address}"),
            Self::Udp(address) => write!(formatter, "udp:{address}"),
            Self::TcpHook(_) => formatter.write_str("tcp hook"),
            Self::Packets(_, number) => write!(formatter, "packets for {number}"),
        }
    }
}

/// What a relay is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name: together with the seed it decides what is drawn.
    pub name: String,
    /// What its user knows it by.
    pub title: String,
    /// The seed of all randomness.
    pub seed: u64,
    /// Where clients come.
    pub listen: Listen,
    /// Where they are brought to.
    pub upstream: Upstream,
    /// How long a UDP client may be silent before it is forgotten.
    pub udp_idle: Duration,
    /// Counts its connections; several relays may share it, so that theirs are numbered as one.
    pub ordinals: Arc<AtomicU64>,
}

impl Settings {
    /// How long a UDP client may be silent when nothing else is said.
    pub const UDP_IDLE: Duration = Duration::from_mins(1);
}

enum Running {
    Tcp {
        inner: Arc<Inner>,
        commands: mpsc::UnboundedSender<ListenerCommand>,
    },
    Udp {
        inner: Arc<Inner>,
        commands: mpsc::UnboundedSender<ListenerCommand>,
    },
}

impl Running {
    const fn parts(&self) -> (&Arc<Inner>, &mpsc::UnboundedSender<ListenerCommand>) {
        match self {
            Self::Tcp { inner, commands } | Self::Udp { inner, commands } => (inner, commands),
        }
    }
}

struct State {
    listen: Listen,
    upstream: Upstream,
    enabled: bool,
    gate_open: bool,
    /// What the accepting task was last told.
    accepts: bool,
    running: Option<Running>,
}

/// A relay: a handle to be shared; dropping the last one stops it.
pub struct Relay {
    engine: Arc<Engine>,
    name: String,
    key: u64,
    transport: Transport,
    udp_idle: Duration,
    toxics: Arc<ToxicSet>,
    stats: Arc<Stats>,
    ordinals: Arc<AtomicU64>,
    changed: Arc<Notify>,
    trouble: Arc<Trouble>,
    state: Mutex<State>,
    /// The connections of now, where they can be seen without waiting for a change of state.
    current: RwLock<Option<Arc<Inner>>>,
    address: RwLock<Option<SocketAddr>>,
}

/// What a relay has carried, by direction where it is a pair: upstream, downstream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelayStats {
    /// Connections (UDP: clients) that are open.
    pub open: usize,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Connections that could not be opened.
    pub refused: u64,
    /// The same by the reason.
    pub failures: BTreeMap<String, u64>,
    /// Bytes read from the side where they come from.
    pub received_bytes: [u64; 2],
    /// Bytes written to the side where they go.
    pub sent_bytes: [u64; 2],
    /// What each toxic did.
    pub toxics: Vec<ToxicStats>,
}

/// What a toxic has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToxicStats {
    /// Its name.
    pub name: String,
    /// Its fault.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its direction.
    pub stream: &'static str,
    /// Connections that it was put on.
    pub connections: u64,
    /// Chunks, datagrams, requests or ends that it did something to.
    pub hits: u64,
}

/// An open connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectionInfo {
    /// Its ordinal in the relay, from 1.
    pub ordinal: u64,
    /// The client's address.
    pub client: SocketAddr,
    /// How long it has been open, in milliseconds.
    pub age_ms: u128,
}

impl Relay {
    /// Makes a relay that does not listen yet: [`Relay::set_enabled`] starts it.
    #[must_use]
    pub fn new(engine: &Arc<Engine>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            engine: Arc::clone(engine),
            key: random::fold_text(random::fold(0, settings.seed), &settings.name),
            name: settings.name,
            transport: settings.listen.transport(),
            udp_idle: settings.udp_idle,
            toxics: Arc::default(),
            stats: Arc::default(),
            ordinals: settings.ordinals,
            changed: Arc::default(),
            trouble: Arc::new(Trouble::of(settings.title)),
            state: Mutex::new(State {
                listen: settings.listen,
                upstream: settings.upstream,
                enabled: false,
                gate_open: true,
                accepts: true,
                running: None,
            }),
            current: RwLock::new(None),
            address: RwLock::new(None),
        })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Streams or datagrams.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// The address that it listens on now.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        *self.address.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts or stops it. Stopping closes the listener and every connection; on return it has happened.
    ///
    /// # Errors
    ///
    /// When it can't listen; then it stays stopped.
    pub async fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let mut state = self.state.lock().await;
        state.enabled = enabled;
        let applied = self.apply(&mut state).await;
        if applied.is_err() {
            state.enabled = false;
        }
        applied
    }

    /// Whether it is meant to listen (a `down` may keep it from it).
    pub async fn is_enabled(&self) -> bool {
        self.state.lock().await.enabled
    }

    /// Changes where it listens and connects to. Drops its connections; toxics stay.
    ///
    /// # Errors
    ///
    /// When it was enabled and can't listen; then it stays stopped.
    pub async fn rewire(&self, listen: Listen, upstream: Upstream) -> io::Result<()> {
        let mut state = self.state.lock().await;
        self.stop(&mut state).await;
        state.listen = listen;
        state.upstream = upstream;
        let applied = self.apply(&mut state).await;
        if applied.is_err() {
            state.enabled = false;
        }
        applied
    }

    /// Lets it accept connections, or lets them wait in the kernel's queue. On return it is so.
    ///
    /// # Errors
    ///
    /// When it can't listen.
    pub async fn set_accepting(&self, accepting: bool) -> io::Result<()> {
        let mut state = self.state.lock().await;
        state.gate_open = accepting;
        self.apply(&mut state).await
    }

    fn has(&self, wanted: impl Fn(&RelayFault) -> bool) -> bool {
        self.toxics
            .snapshot()
            .1
            .iter()
            .any(|toxic| wanted(&toxic.config.fault))
    }

    /// Makes what runs fit what is wanted.
    async fn apply(&self, state: &mut State) -> io::Result<()> {
        let applied = self.try_apply(state).await;
        if let Err(error) = &applied {
            self.trouble.tell("listen", error);
        }
        applied
    }

    async fn try_apply(&self, state: &mut State) -> io::Result<()> {
        let listens = state.enabled && !self.has(|fault| matches!(fault, RelayFault::Down(_)));
        if !listens {
            self.stop(state).await;
            return Ok(());
        }
        let accepts =
            state.gate_open && !self.has(|fault| matches!(fault, RelayFault::NoAccept(_)));
        let Some(running) = &state.running else {
            state.accepts = accepts;
            return self.start(state).await;
        };
        if state.accepts != accepts {
            state.accepts = accepts;
            tell(running.parts().1, |done| {
                ListenerCommand::Accept(accepts, done)
            })
            .await;
        }
        Ok(())
    }

    async fn start(&self, state: &mut State) -> io::Result<()> {
        let inner = Arc::new(Inner {
            toxics: Arc::clone(&self.toxics),
            key: self.key,
            stats: Arc::clone(&self.stats),
            upstream: state.upstream.clone(),
            ordinals: Arc::clone(&self.ordinals),
            open: std::sync::Mutex::default(),
            openings: std::sync::Mutex::default(),
            drain: std::sync::Mutex::default(),
            changed: Arc::clone(&self.changed),
            trouble: Arc::clone(&self.trouble),
        });
        let (address, running) = match &state.listen {
            Listen::Tcp(address) => {
                let inlet = TcpInlet {
                    listener: bind_tcp(address).await?,
                    handshakes: None,
                };
                self.start_tcp(&inner, inlet, state.accepts)?
            }
            Listen::TcpHook(bind) => self.start_tcp(&inner, bind()?, state.accepts)?,
            Listen::Udp(address) => {
                let socket = bind_udp(address).await?;
                socket.set_nonblocking(true)?;
                let address = socket.local_addr()?;
                let source = udp::DatagramSource::Socket(socket, address);
                (Some(address), self.start_udp(&inner, source, state.accepts))
            }
            Listen::Packets(exchange, number) => {
                let source = udp::DatagramSource::Packets(Arc::clone(exchange), *number);
                (None, self.start_udp(&inner, source, state.accepts))
            }
        };
        // The same address again when it is stopped and started.
        if let (Listen::Tcp(text) | Listen::Udp(text), Some(address)) = (&mut state.listen, address)
        {
            *text = address.to_string();
        }
        state.running = Some(running);
        self.trouble.forget();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(inner);
        *self.address.write().unwrap_or_else(PoisonError::into_inner) = address;
        Ok(())
    }

    fn start_tcp(
        &self,
        inner: &Arc<Inner>,
        inlet: TcpInlet,
        accepts: bool,
    ) -> io::Result<(Option<SocketAddr>, Running)> {
        inlet.listener.set_nonblocking(true)?;
        let socket = socket2::SockRef::from(&inlet.listener);
        // Accepted sockets inherit both.
        socket.set_tcp_nodelay(true)?;
        socket.set_out_of_band_inline(true)?;
        let address = inlet.listener.local_addr()?;
        let commands = tcp::start(&self.engine, inner, inlet, accepts);
        Ok((
            Some(address),
            Running::Tcp {
                inner: Arc::clone(inner),
                commands,
            },
        ))
    }

    fn start_udp(&self, inner: &Arc<Inner>, source: udp::DatagramSource, accepts: bool) -> Running {
        Running::Udp {
            inner: Arc::clone(inner),
            commands: udp::start(&self.engine, inner, source, self.udp_idle, accepts),
        }
    }

    async fn stop(&self, state: &mut State) {
        let Some(running) = state.running.take() else {
            return;
        };
        *self.address.write().unwrap_or_else(PoisonError::into_inner) = None;
        let (inner, commands) = running.parts();
        // Before others have their turns: a connection that is to close does nothing else any more.
        for control in inner.controls() {
            control.close(CloseMode::Fin);
        }
        tell(commands, ListenerCommand::Stop).await;
        inner.close(usize::MAX, CloseMode::Fin).await;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends it for good: nothing is accepted any more, and what is on its way by then still arrives, as
    /// the toxics have it. Connections of which something may be missing at the end of that are reset.
    /// What was lost; when it is called again, what has been lost altogether.
    pub async fn drain(&self, drain: Drain) -> Cut {
        let running = {
            let mut state = self.state.lock().await;
            state.enabled = false;
            let running = state.running.take();
            if let Some(running) = &running {
                tell(running.parts().1, ListenerCommand::Finish).await;
            }
            *self.address.write().unwrap_or_else(PoisonError::into_inner) = None;
            running
        };
        if let Some(inner) = self.current() {
            inner.drain(drain);
            // Clients whose servers have not answered yet connect if they do now, and are refused otherwise.
            let left = drain.open_until.saturating_duration_since(Instant::now());
            let answered = inner.wait_until(|| !inner.holds_clients());
            if tokio::time::timeout(left, answered).await.is_err() {
                log::debug!(
                    "{}: clients are refused: their servers do not answer",
                    self.name
                );
            }
            drop(running);
            let left = drain.until.saturating_duration_since(Instant::now()) + LAST_TURN;
            let over = inner.wait_until(|| inner.controls().is_empty());
            if tokio::time::timeout(left, over).await.is_err() {
                // Those whose servers have not answered yet.
                inner.close(usize::MAX, CloseMode::Rst).await;
            }
        }
        self.stats.cut()
    }

    fn current(&self) -> Option<Arc<Inner>> {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The toxics in the order of adding.
    #[must_use]
    pub fn toxics(&self) -> Vec<ToxicConfig> {
        self.toxics
            .snapshot()
            .1
            .iter()
            .map(|toxic| toxic.config.clone())
            .collect()
    }

    /// Has what new clients ask for read from here on, so that toxics which select connections by it and are added later act
    /// on these connections too.
    pub fn read_greetings(&self) {
        self.toxics.read_greetings();
    }

    /// Adds a toxic. What arrives after the return is subject to it, on open connections too.
    ///
    /// # Errors
    ///
    /// When its name is taken or its fault does not fit the transport.
    pub async fn add_toxic(&self, config: ToxicConfig) -> Result<(), ToxicError> {
        let close = match &config.fault {
            RelayFault::Close(close) => {
                Some((usize::try_from(close.count).unwrap_or(0), close.mode))
            }
            _ => None,
        };
        let is_proxy_wide = config.fault.is_proxy_wide();
        let name = config.name.clone();
        self.toxics.add(config, self.transport)?;
        self.toxics_changed(is_proxy_wide).await;
        if let Some((count, mode)) = close {
            let most = if count == 0 { usize::MAX } else { count };
            let closed = self.close_connections(most, mode).await as u64;
            let (_, toxics) = self.toxics.snapshot();
            if let Some(toxic) = toxics.iter().find(|toxic| toxic.config.name == name) {
                toxic.shared.counters.closed(closed);
            }
        }
        Ok(())
    }

    /// Changes a toxic's fault (of the same kind) or toxicity.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub async fn update_toxic(
        &self,
        name: &str,
        fault: Option<RelayFault>,
        toxicity: Option<f64>,
    ) -> Result<ToxicConfig, ToxicError> {
        let config = self.toxics.update(name, fault, toxicity)?;
        self.toxics_changed(config.fault.is_proxy_wide()).await;
        Ok(config)
    }

    /// Removes a toxic.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub async fn remove_toxic(&self, name: &str) -> Result<(), ToxicError> {
        let config = self.toxics.remove(name)?;
        self.toxics_changed(config.fault.is_proxy_wide()).await;
        Ok(())
    }

    /// Removes every toxic, and opens the gate.
    ///
    /// # Errors
    ///
    /// When a toxic kept it from listening and now it can't.
    pub async fn clear_toxics(&self) -> io::Result<()> {
        self.toxics.clear();
        let mut state = self.state.lock().await;
        state.gate_open = true;
        let applied = self.apply(&mut state).await;
        self.wake().await;
        applied
    }

    async fn toxics_changed(&self, is_proxy_wide: bool) {
        if is_proxy_wide {
            let mut state = self.state.lock().await;
            if let Err(error) = self.apply(&mut state).await {
                log::debug!("{} stays stopped: {error}", self.name);
            }
        }
        self.wake().await;
    }

    /// Has every open connection act by the newest toxics, and waits until they do.
    async fn wake(&self) {
        let Some(inner) = self.current() else { return };
        let version = self.toxics.version();
        let mut waited_for = inner.controls();
        for control in &waited_for {
            control.wake();
        }
        let all_act = inner.wait_until(|| {
            waited_for.retain(|control| !control.acts_by(version));
            waited_for.is_empty()
        });
        if tokio::time::timeout(PROMPT, all_act).await.is_ok() {
            return;
        }
        // The threads have much to do. A connection looks at the toxics before it takes anything in: all
        // that comes from now on is subject to them, once none is in the midst of a turn that began before.
        while !waited_for.is_empty() {
            waited_for.retain(|control| control.is_busy() && !control.acts_by(version));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Closes up to `count` connections, the oldest first; on return they are closed. How many it were.
    pub async fn close_connections(&self, count: usize, mode: CloseMode) -> usize {
        match self.current() {
            Some(inner) => inner.close(count, mode).await,
            None => 0,
        }
    }

    /// The open connections, the oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let controls = self
            .current()
            .map_or_else(Vec::new, |inner| inner.controls());
        let info = |control: &Arc<control::ConnectionControl>| ConnectionInfo {
            ordinal: control.ordinal,
            client: SocketAddr::new(control.client.ip().to_canonical(), control.client.port()),
            age_ms: control.opened.elapsed().as_millis(),
        };
        controls.iter().map(info).collect()
    }

    fn open_count(&self) -> usize {
        self.current().map_or(0, |inner| {
            inner
                .open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len()
        })
    }

    /// Waits until a condition holds on the number of open and of ever accepted connections.
    pub async fn wait_for(&self, holds: impl Fn(usize, u64) -> bool) -> (usize, u64) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let counts = (
                self.open_count(),
                self.stats.accepted.load(Ordering::Relaxed),
            );
            if holds(counts.0, counts.1) {
                return counts;
            }
            changed.await;
        }
    }

    /// What it has carried.
    #[must_use]
    pub fn stats(&self) -> RelayStats {
        let pair = |counters: &[AtomicU64; 2]| {
            [0, 1].map(|index: usize| counters[index].load(Ordering::Relaxed))
        };
        let toxics = self.toxics.snapshot().1;
        let failures = self.stats.failures.lock();
        let failures = failures.unwrap_or_else(PoisonError::into_inner).clone();
        RelayStats {
            open: self.open_count(),
            accepted: self.stats.accepted.load(Ordering::Relaxed),
            refused: failures.values().sum(),
            failures,
            received_bytes: pair(&self.stats.received),
            sent_bytes: pair(&self.stats.sent),
            toxics: toxics
                .iter()
                .map(|toxic| ToxicStats {
                    name: toxic.config.name.clone(),
                    kind: toxic.config.fault.kind(),
                    stream: toxic.config.direction.name(),
                    connections: toxic.shared.counters.connections.load(Ordering::Relaxed),
                    hits: toxic.shared.counters.hits.load(Ordering::Relaxed),
                })
                .collect(),
        }
    }
}

/// Tells the accepting task something and waits until it is done.
async fn tell(
    commands: &mpsc::UnboundedSender<ListenerCommand>,
    command: impl FnOnce(oneshot::Sender<()>) -> ListenerCommand,
) {
    let (done, is_done) = oneshot::channel();
    // Either way the task is gone when this fails, and with it its listener.
    if commands.send(command(done)).is_err() || is_done.await.is_err() {
        log::debug!("the accepting task is gone");
    }
}

/// Resolves an address to listen on. An empty host is every address, of IPv6 and IPv4, and so is 0.0.0.0 for TCP, as in Go;
/// an empty port is any.
///
/// # Errors
///
/// As Toxiproxy words it: `listen tcp: address HOST: missing port in address`.
pub async fn resolve_listen(transport: Transport, text: &str) -> io::Result<SocketAddr> {
    let word = match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let fail = |what: String| io::Error::other(format!("listen {word}: {what}"));
    if text.is_empty() {
        return Ok(SocketAddr::from(([127, 0, 0, 1], 0)));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(fail(format!("address {text}: missing port in address")));
    };
    let port: u16 = match port {
        "" => 0,
        _ => port
            .parse()
            .map_err(|_| fail(format!("address {port}: invalid port")))?,
    };
    if host.is_empty() || host == "0.0.0.0" && transport == Transport::Tcp {
        return Ok(every_address(port));
    }
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let no_such_host = || fail(format!("lookup {host}: no such host"));
    let addresses = upstream::resolve_name(&format!("{host}:{port}"))
        .await
        .map_err(|error| {
            log::debug!("{text}: {error}");
            no_such_host()
        })?;
    // As Go does: an IPv4 address where there is one.
    let first = addresses
        .iter()
        .find(|address| address.is_ipv4())
        .or(addresses.first());
    first.copied().ok_or_else(no_such_host)
}

/// The address that stands for all of this host: IPv6's, which takes IPv4 as well, where there is IPv6.
fn every_address(port: u16) -> SocketAddr {
    match socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None) {
        Ok(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        Err(error) => {
            log::debug!("no IPv6 here: {error}");
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
        }
    }
}

/// Words a failure to bind as Toxiproxy does.
fn bind_error(word: &str, address: SocketAddr, error: &io::Error) -> io::Error {
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => "address already in use".to_owned(),
        io::ErrorKind::AddrNotAvailable => "cannot assign requested address".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    };
    io::Error::new(
        error.kind(),
        format!("listen {word} {address}: bind: {what}"),
    )
}

fn socket(address: SocketAddr, kind: socket2::Type) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if kind == socket2::Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == socket2::Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

async fn bind_tcp(text: &str) -> io::Result<std::net::TcpListener> {
    let address = resolve_listen(Transport::Tcp, text).await?;
    let socket = socket(address, socket2::Type::STREAM)
        .map_err(|error| bind_error("tcp", address, &error))?;
    Ok(socket.into())
}

async fn bind_udp(text: &str) -> io::Result<std::net::UdpSocket> {
    let address = resolve_listen(Transport::Udp, text).await?;
    let socket = socket(address, socket2::Type::DGRAM)
        .map_err(|error| bind_error("udp", address, &error))?;
    Ok(socket.into())
}
