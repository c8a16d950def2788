//! Echoes, and what is measured on them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::time::{Duration, Instant};

use fault_user::sys::process::netns::NetworkNamespace;

use super::echo::{connected, tcp_echo, udp_echo};
use super::place::{AppliedRules, is_emulated};

/// Bytes of a datagram that needs four fragments where packets have 1,500 bytes.
pub const FRAGMENTED: usize = 5000;

/// Starts UDP and TCP echoes on port 7000.
pub fn echo(namespace: Option<&NetworkNamespace>, host: &str) -> SocketAddr {
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    let bind = || Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?));
    let (datagrams, listener) = match namespace {
        Some(namespace) => namespace.enter(bind).unwrap(),
        None => bind().unwrap(),
    };
    udp_echo(datagrams);
    tcp_echo(listener)
}

pub fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

pub fn exchange(stream: &mut TcpStream) {
    let mut answer = [0; 5];
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut answer).unwrap();
}

/// How often a time is measured before the test fails.
const ATTEMPTS: u64 = 20;

/// Measures a time until the machine is not busy with other work: it is never below the range, in milliseconds, and once within it. Gives the
/// number of measurements.
pub fn assert_within(range: Range<u64>, what: &str, mut measure: impl FnMut() -> Duration) -> u64 {
    let [least, end] = [range.start, range.end].map(Duration::from_millis);
    let mut longer = Vec::new();
    for attempt in 1..=ATTEMPTS {
        let took = measure();
        assert!(took >= least, "{what}: {took:?}, expected {range:?} ms");
        if took < end {
            return attempt;
        }
        longer.push(took);
    }
    panic!("{what}: {longer:?}, expected {range:?} ms");
}

/// [`assert_within`] from `ms` on, and longer only by what a machine takes by itself.
pub fn assert_about(ms: u64, what: &str, measure: impl FnMut() -> Duration) -> u64 {
    let more = if is_emulated() { 1000 } else { 40 };
    assert_within(ms..ms + more, what, measure)
}

/// All kinds of packets are late by 60 ms each way, and `mechanism` is said to have held them.
pub fn delays_all(address: SocketAddr, options: &str, mechanism: &str) {
    let mut old = TcpStream::connect(address).unwrap();
    old.set_nodelay(true).unwrap();
    exchange(&mut old);
    let socket = connected(address);
    let mut answer = vec![0; FRAGMENTED];
    let mut exchange_datagram = |bytes| {
        timed(|| {
            socket.send(&vec![7; bytes]).unwrap();
            assert_eq!(socket.recv(&mut answer).unwrap(), bytes);
        })
    };
    let applied = AppliedRules::begin(&["7000 delay=60ms"], options);
    assert_about(120, "UDP", || exchange_datagram(1));
    assert_about(120, "UDP in fragments", || exchange_datagram(FRAGMENTED));
    assert_about(120, "the handshake", || {
        timed(|| drop(TcpStream::connect(address).unwrap()))
    });
    assert_about(120, "an old connection", || timed(|| exchange(&mut old)));
    let summary = applied.end();
    assert!(summary.contains(mechanism), "{summary}");
    assert_within(0..120, "UDP, restored", || exchange_datagram(1));
    assert_within(0..120, "TCP, restored", || timed(|| exchange(&mut old)));
    let applied = AppliedRules::begin(&["udp:7000 delay=60ms dir=to-client"], options);
    assert_about(60, "one way", || exchange_datagram(1));
    applied.end();
}

/// The numbers of 120 datagrams in the order in which they come back.
pub fn order(rules: &[&str], options: &str) -> Vec<u16> {
    let applied = AppliedRules::begin(rules, &format!("{options} --seed 7"));
    let socket = connected("127.0.0.1:7000".parse().unwrap());
    for number in 0..120_u16 {
        socket.send(&number.to_be_bytes()).unwrap();
    }
    let mut bytes = [0; 2];
    let numbers = (0..120)
        .map(|_| {
            socket.recv(&mut bytes).unwrap();
            u16::from_be_bytes(bytes)
        })
        .collect();
    applied.end();
    numbers
}
