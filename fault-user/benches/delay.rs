//! How exact the mechanisms are that this kernel has, with tc's own netem as the reference where it has that; and how
//! much the delay line carries: round trips of an echo over a veth pair, a rate, bulk TCP and small packets. One JSON
//! object per line and figure.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fault_user::inject::injection::{Injection, InjectionOptions, PreparedInjection};
use fault_user::inject::preparation::prepare;
use fault_user::plan::Plan;
use fault_user::plan::mechanism::Mechanism;
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use nix::sched::{CloneFlags, unshare};
use support::{ip, measure};

const PEER: &str = "10.78.0.2:7000";

/// The rule applied to `va`, by the delay line.
fn inject(text: &str) -> Injection {
    inject_by(Mechanism::DelayLine, text).expect("rules")
}

/// The rule applied to `va`.
fn inject_by(mechanism: Mechanism, text: &str) -> anyhow::Result<Injection> {
    let rule: Rule = text.parse().expect("a valid rule");
    let resolved = rule
        .resolve(&Targets::new(), &mut SystemResolver)
        .expect("a target");
    let mut plan = Plan::new(&[(rule, resolved)], 1, None, None).expect("a plan");
    plan.hold_by(mechanism);
    let devices = select(
        &list().expect("devices"),
        &Selection::Names(vec!["va".to_owned()]),
    )
    .expect("va");
    prepare(&plan, &devices, &InjectionOptions::default()).and_then(PreparedInjection::start)
}

fn roomy(socket: &UdpSocket) {
    let room = 64_i32 << 20;
    // SAFETY: the value is an int, as the option wants it.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const room).cast(),
            4,
        )
    };
    assert_eq!(status, 0, "SO_RCVBUFFORCE (run as root)");
}

/// What the peer does: echoes datagrams, counts those of one byte, and swallows streams.
fn serve(peer: &NetworkNamespace, counted: &Arc<AtomicU64>) {
    let (datagrams, listener) = peer
        .enter(|| Ok((UdpSocket::bind(PEER)?, TcpListener::bind(PEER)?)))
        .expect("the peer's sockets");
    roomy(&datagrams);
    let counted = Arc::clone(counted);
    std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            if length == 1 {
                counted.fetch_add(1, Ordering::Relaxed);
            } else {
                datagrams
                    .send_to(&bytes[..length], from)
                    .expect("an answer");
            }
        }
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let (mut bytes, mut total) = (vec![0; 256 << 10], 0_u64);
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    total += read as u64;
                }
                // Whoever asks is told afterwards.
                stream.write_all(&total.to_be_bytes()).ok();
            });
        }
    });
}

fn sorted_round_trips(socket: &UdpSocket, count: usize) -> Vec<f64> {
    let mut bytes = [0; 64];
    let mut times: Vec<f64> = (0..count)
        .map(|_| {
            let start = Instant::now();
            socket.send(b"echo").expect("sent");
            socket.recv(&mut bytes).expect("an answer");
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times
}

/// Median and 99th percentile under tc's own netem; nothing where the kernel has none.
fn netems_own(socket: &UdpSocket, ms: u32, count: usize) -> Option<(f64, f64)> {
    let tc = |words: &str| {
        let done = Command::new("tc").args(words.split(' ')).output();
        done.expect("tc runs").status.success()
    };
    if !tc(&format!("qdisc add dev va root netem delay {ms}ms")) {
        return None;
    }
    let times = sorted_round_trips(socket, count);
    assert!(tc("qdisc del dev va root"), "netem goes");
    Some((times[count / 2], times[count * 99 / 100]))
}

fn round_trips() {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.connect(PEER).expect("connected");
    let direct = sorted_round_trips(&socket, 500)[250];
    for (ms, count) in [(1_u32, 1000), (10, 300), (100, 50), (1000, 6)] {
        let wanted = f64::from(ms) + direct;
        let own = netems_own(&socket, ms, count);
        let most = (f64::from(ms) * 0.01).max(0.2);
        for mechanism in [Mechanism::DelayLine, Mechanism::Fq, Mechanism::Netem] {
            let rule = format!("udp:7000 delay={ms}ms dir=to-server");
            let Ok(injection) = inject_by(mechanism, &rule) else {
                eprintln!("no {mechanism} in this kernel");
                continue;
            };
            let times = sorted_round_trips(&socket, count);
            injection.remove().expect("restored");
            let median = times[count / 2] - wanted;
            let p99 = times[count * 99 / 100] - wanted;
            measure(
                &format!("delay={ms}ms by {mechanism}: median error"),
                median,
                "ms",
                own.map(|(median, _)| median - wanted),
                &format!("at most {most}"),
                median.abs() <= most,
            );
            measure(
                &format!("delay={ms}ms by {mechanism}: p99 error"),
                p99,
                "ms",
                own.map(|(_, p99)| p99 - wanted),
                "at most 1",
                p99.abs() <= 1.0,
            );
        }
    }
}

/// Bits per second that arrive over one connection.
fn stream_rate(length: Duration) -> f64 {
    let mut stream = TcpStream::connect(PEER).expect("a connection");
    let data = vec![0x55; 128 << 10];
    let start = Instant::now();
    while start.elapsed() < length {
        stream.write_all(&data).expect("the peer reads");
    }
    stream.shutdown(std::net::Shutdown::Write).expect("an end");
    let mut total = [0; 8];
    stream.read_exact(&mut total).expect("the peer's count");
    #[expect(clippy::cast_precision_loss, reason = "a figure")]
    let bits = u64::from_be_bytes(total) as f64 * 8.0;
    bits / start.elapsed().as_secs_f64()
}

fn rates() {
    let injection = inject("tcp:7000 rate=10mbit dir=to-server");
    let measured = stream_rate(Duration::from_secs(10));
    injection.remove().expect("restored");
    // The wire also carries headers: 14 of Ethernet, 20 of IP, 32 of TCP for each 1,448 of payload.
    let wire = measured * 1514.0 / 1448.0 / 1e6;
    measure(
        "rate=10mbit over 10 s",
        wire,
        "Mbit/s",
        Some(10.0),
        "within 2 %",
        (wire - 10.0).abs() <= 0.2,
    );
    let direct = stream_rate(Duration::from_secs(2)) / 1e9;
    let injection = inject("tcp:7000 delay=10ms");
    let bulk = stream_rate(Duration::from_secs(5)) / 1e9;
    injection.remove().expect("restored");
    measure(
        "bulk TCP at delay=10ms",
        bulk,
        "Gbit/s",
        Some(direct),
        "at least 1",
        bulk >= 1.0,
    );
}

fn small_packets(counted: &Arc<AtomicU64>) {
    const SENDERS: usize = 1;
    let injection = inject("udp:7000 delay=10ms dir=to-server");
    let stop = Arc::new(AtomicBool::new(false));
    let before = counted.load(Ordering::Relaxed);
    let start = Instant::now();
    let senders: Vec<_> = (0..SENDERS)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
                socket.connect(PEER).expect("connected");
                while !stop.load(Ordering::Relaxed) {
                    // A full queue is the peer's affair.
                    socket.send(b"x").ok();
                }
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(3));
    stop.store(true, Ordering::Relaxed);
    for sender in senders {
        sender.join().expect("a sender ends");
    }
    let took = start.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a figure")]
    let rate = (counted.load(Ordering::Relaxed) - before) as f64 / took;
    injection.remove().expect("restored");
    measure(
        "small packets at delay=10ms",
        rate,
        "packets/s",
        None,
        "at least 150000",
        rate >= 150_000.0,
    );
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    let name = format!("fault-bench-{}", std::process::id());
    ip("link set lo up");
    ip(&format!("netns add {name}"));
    ip(&format!("link add va type veth peer name vb netns {name}"));
    for words in ["addr add 10.78.0.1/24 dev va", "link set va up"] {
        ip(words);
    }
    for words in ["addr add 10.78.0.2/24 dev vb", "link set vb up"] {
        ip(&format!("-n {name} {words}"));
    }
    let peer = NetworkNamespace::open(Path::new(&name)).expect("the peer");
    let counted = Arc::new(AtomicU64::new(0));
    serve(&peer, &counted);
    // The peer's link address is known from here on.
    assert!(TcpStream::connect(SocketAddr::from(([10, 78, 0, 2], 9))).is_err());
    round_trips();
    rates();
    small_packets(&counted);
    ip(&format!("netns del {name}"));
}
