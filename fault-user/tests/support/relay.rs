//! What the relay's tests share: a relay in this process, with a server whose connections the test accepts.

use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use fault_user::relay::{
    Decisions, Direction, Engine, Fault, Filter, Listen, Picked, Relay, Settings, ToxicConfig,
    Transport, Upstream,
};
use fault_user::rule::Asked;
use serde_json::Value;

use super::place::PATIENCE;

pub struct Bed {
    runtime: tokio::runtime::Runtime,
    pub relay: Arc<Relay>,
    pub listener: TcpListener,
    pub datagrams: UdpSocket,
}

impl Bed {
    pub fn tcp() -> Self {
        Self::new(Transport::Tcp, Settings::UDP_IDLE, 42)
    }

    pub fn seeded(seed: u64) -> Self {
        Self::new(Transport::Tcp, Settings::UDP_IDLE, seed)
    }

    pub fn udp() -> Self {
        Self::new(Transport::Udp, Settings::UDP_IDLE, 42)
    }

    pub fn new(transport: Transport, udp_idle: Duration, seed: u64) -> Self {
        LazyLock::force(&LATENESS);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let datagrams = UdpSocket::bind("127.0.0.1:0").expect("loopback");
        datagrams
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout");
        let (listen, server) = match transport {
            Transport::Tcp => (Listen::Tcp("127.0.0.1:0".to_owned()), listener.local_addr()),
            Transport::Udp => (
                Listen::Udp("127.0.0.1:0".to_owned()),
                datagrams.local_addr(),
            ),
        };
        let settings = Settings {
            name: "test".to_owned(),
            title: "proxy test".to_owned(),
            seed,
            listen,
            upstream: Upstream::name(server.expect("bound").to_string()),
            udp_idle,
            ordinals: std::sync::Arc::default(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let relay = Relay::new(&Engine::start(2).expect("threads"), settings);
        let bed = Self {
            runtime,
            relay,
            listener,
            datagrams,
        };
        bed.run(bed.relay.set_enabled(true)).expect("it can listen");
        bed
    }

    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub fn address(&self) -> SocketAddr {
        self.relay.address().expect("it listens")
    }

    /// A new connection: the client's end and the server's.
    pub fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.connect();
        (client, self.accept())
    }

    pub fn connect(&self) -> TcpStream {
        prepared(TcpStream::connect(self.address()).expect("the relay listens"))
    }

    pub fn accept(&self) -> TcpStream {
        prepared(self.listener.accept().expect("the relay connects").0)
    }

    pub fn add(&self, direction: Direction, kind: &str, attributes: &Value) {
        self.add_with(direction, kind, attributes, 1.0);
    }

    pub fn add_with(&self, direction: Direction, kind: &str, attributes: &Value, toxicity: f64) {
        self.add_config(ToxicConfig {
            toxicity,
            ..config(direction, kind, attributes)
        });
    }

    /// Adds a toxic that acts on connections whose clients ask for this.
    pub fn add_filtered(&self, kind: &str, attributes: &Value, asked: Asked) {
        self.add_config(ToxicConfig {
            filter: Filter {
                asked,
                server: None,
            },
            ..config(Direction::Downstream, kind, attributes)
        });
    }

    fn add_config(&self, config: ToxicConfig) {
        self.run(self.relay.add_toxic(config)).expect("a new toxic");
    }

    pub fn update(&self, kind: &str, attributes: &Value) {
        let fault = Fault::of_kind(kind)
            .expect("a kind")
            .with_attributes(attributes)
            .expect("valid attributes");
        self.run(self.relay.update_toxic(kind, Some(fault), None))
            .expect("a toxic");
    }

    pub fn remove(&self, kind: &str) {
        self.run(self.relay.remove_toxic(kind)).expect("a toxic");
    }

    /// The service works, on a new connection and on these ends of an old one.
    pub fn assert_healthy(&self, old: Option<(&mut TcpStream, &mut TcpStream)>) {
        let (mut client, mut server) = self.pair();
        assert_echo(&mut client, &mut server);
        if let Some((client, server)) = old {
            assert_echo(client, server);
        }
    }
}

fn config(direction: Direction, kind: &str, attributes: &Value) -> ToxicConfig {
    let fault = Fault::of_kind(kind).expect("a kind");
    ToxicConfig {
        name: kind.to_owned(),
        direction,
        stream: direction.name().to_owned(),
        toxicity: 1.0,
        connections: Picked::ALL,
        filter: Filter::default(),
        datagrams: None,
        fault: fault.with_attributes(attributes).expect("valid attributes"),
        decisions: Decisions::default(),
    }
}

fn prepared(stream: TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("a TCP socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// The ends in the order of a direction: who writes, who reads.
pub fn ends<'a>(
    direction: Direction,
    client: &'a mut TcpStream,
    server: &'a mut TcpStream,
) -> (&'a mut TcpStream, &'a mut TcpStream) {
    match direction {
        Direction::Upstream => (client, server),
        Direction::Downstream => (server, client),
    }
}

pub fn assert_echo(client: &mut TcpStream, server: &mut TcpStream) {
    let start = Instant::now();
    for direction in Direction::ALL {
        let (writer, reader) = ends(direction, client, server);
        writer.write_all(b"are you well?").expect("write");
        assert_eq!(read_exactly(reader, 13), b"are you well?");
    }
    assert!(
        start.elapsed() < Duration::from_millis(500),
        "slow: {:?}",
        start.elapsed()
    );
}

pub fn read_exactly(reader: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    reader.read_exact(&mut bytes).expect("the bytes come");
    bytes
}

/// Everything up to the end of the stream, which must be an orderly one.
pub fn read_to_end(reader: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("an orderly end");
    bytes
}

/// Nothing comes within this time.
pub fn assert_silent(reader: &TcpStream, time: Duration) {
    reader.set_read_timeout(Some(time)).expect("a timeout");
    let mut byte = [0];
    let read = reader.peek(&mut byte);
    reader.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let kind = read.map_err(|error| error.kind());
    assert!(
        matches!(kind, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)),
        "{kind:?}"
    );
}

pub fn assert_reset(reader: &mut TcpStream) {
    let mut bytes = Vec::new();
    let kind = reader.read_to_end(&mut bytes).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionReset));
}

/// Closes with a reset.
pub fn abort(stream: TcpStream) {
    socket2::SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .expect("a TCP socket");
    drop(stream);
}

/// Asserts how long something took that has just ended. On a busy machine it may take longer: by as much as a thread that
/// only sleeps was woken late meanwhile, at each of the relay's three threads and the test's own.
pub fn assert_between(time: Duration, from_ms: u64, to_ms: u64) {
    let lateness = LATENESS.within(time) * 4;
    let range = Duration::from_millis(from_ms)..=Duration::from_millis(to_ms) + lateness;
    assert!(
        range.contains(&time),
        "{time:?} is not in {from_ms}..={to_ms} ms, threads being woken {lateness:?} late"
    );
}

/// By how much threads are woken late on this machine. It begins with the first [`Bed`].
static LATENESS: LazyLock<Lateness> = LazyLock::new(Lateness::watch);

/// When a sleeping thread was woken, and how much too late.
struct Lateness(Arc<Mutex<Vec<(Instant, Duration)>>>);

impl Lateness {
    /// How long the thread sleeps at a time.
    const NAP: Duration = Duration::from_millis(2);

    fn watch() -> Self {
        let wakes = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&wakes);
        std::thread::spawn(move || {
            loop {
                let start = Instant::now();
                std::thread::sleep(Self::NAP);
                let late = start.elapsed().saturating_sub(Self::NAP);
                noted.lock().expect("no panic").push((start, late));
            }
        });
        Self(wakes)
    }

    /// The sum of the last `time`.
    fn within(&self, time: Duration) -> Duration {
        let since = Instant::now().checked_sub(time);
        let wakes = self.0.lock().expect("no panic");
        let recent = wakes.iter().rev();
        let recent = recent.take_while(|(start, _)| since.is_none_or(|since| *start > since));
        recent.map(|(_, late)| *late).sum()
    }
}

/// Bytes that differ from their neighbours, so that a loss or a swap is seen.
pub fn pattern(count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| u8::try_from((index * 7 + index / 251) % 256).expect("a byte"))
        .collect()
}
