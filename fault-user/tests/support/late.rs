//! Echoes, and what is measured on them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use fault_user::sys::process::netns::NetworkNamespace;

use super::echo::{connected, tcp_echo, udp_echo};
use super::place::Hurt;

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

/// Not shorter than it must be, and longer only by what a loaded machine takes, or an emulated one.
pub fn assert_about(took: Duration, ms: u64, what: &str) {
    let emulated = std::env::var_os("FAULT_VM_KERNEL").is_some();
    let more = Duration::from_millis(if emulated { 1000 } else { 40 });
    let least = Duration::from_millis(ms);
    assert!(
        took >= least && took < least + more,
        "{what}: {took:?}, expected {least:?}"
    );
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
    let hurt = Hurt::begin(&["7000 delay=60ms"], options);
    assert_about(exchange_datagram(1), 120, "UDP");
    assert_about(exchange_datagram(FRAGMENTED), 120, "UDP in fragments");
    let handshake = timed(|| drop(TcpStream::connect(address).unwrap()));
    assert_about(handshake, 120, "the handshake");
    assert_about(timed(|| exchange(&mut old)), 120, "an old connection");
    let summary = hurt.end();
    assert!(summary.contains(mechanism), "{summary}");
    assert!(exchange_datagram(1) < Duration::from_millis(120), "healed");
    assert!(timed(|| exchange(&mut old)) < Duration::from_millis(120));
    let hurt = Hurt::begin(&["udp:7000 delay=60ms dir=to-client"], options);
    assert_about(exchange_datagram(1), 60, "one way");
    hurt.end();
}

/// The numbers of 120 datagrams in the order in which they come back.
pub fn order(rules: &[&str], options: &str) -> Vec<u16> {
    let hurt = Hurt::begin(rules, &format!("{options} --seed 7"));
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
    hurt.end();
    numbers
}
