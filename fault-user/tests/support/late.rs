//! Echoes, and what is measured on them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use fault_user::process::netns::NetworkNamespace;

use super::place::{Hurt, PATIENCE};

/// Starts UDP and TCP echoes on port 7000.
pub fn echo(namespace: Option<&NetworkNamespace>, host: &str) -> SocketAddr {
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    let bind = || Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?));
    let (datagrams, listener) = match namespace {
        Some(namespace) => namespace.enter(bind).unwrap(),
        None => bind().unwrap(),
    };
    std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            datagrams.send_to(&bytes[..length], from).unwrap();
        }
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// A client's UDP socket.
pub fn datagrams(address: SocketAddr) -> UdpSocket {
    let any: IpAddr = if address.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
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
    let more = Duration::from_millis(if emulated { 400 } else { 40 });
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
    let socket = datagrams(address);
    let mut byte = [0; 1];
    let mut round_trip = || {
        timed(|| {
            socket.send(b"x").unwrap();
            socket.recv(&mut byte).unwrap();
        })
    };
    let hurt = Hurt::begin(&["7000 delay=60ms"], options);
    assert_about(round_trip(), 120, "UDP");
    let handshake = timed(|| drop(TcpStream::connect(address).unwrap()));
    assert_about(handshake, 120, "the handshake");
    assert_about(timed(|| exchange(&mut old)), 120, "an old connection");
    let summary = hurt.end();
    assert!(summary.contains(mechanism), "{summary}");
    assert!(round_trip() < Duration::from_millis(120), "healed");
    assert!(timed(|| exchange(&mut old)) < Duration::from_millis(120));
    let hurt = Hurt::begin(&["udp:7000 delay=60ms dir=to-client"], options);
    assert_about(round_trip(), 60, "one way");
    hurt.end();
}
