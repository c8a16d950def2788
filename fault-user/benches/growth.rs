//! How the cost of rules grows: with their number, with that of connections, with the size of packets, with the number of
//! streams.
//!
//! Prints one JSON object a line, as `cargo xtask bench` reads them. Runs as root, in a network namespace of its own.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use fault_user::inject::injection::{Injection, InjectionOptions, PreparedInjection};
use fault_user::inject::preparation::prepare;
use fault_user::sys::net::clsact::TcHook;
use fault_user::sys::net::interfaces::{Selection, list, select};
use nix::sched::{CloneFlags, unshare};
use support::{injector, ip, measure, nanoseconds, plan, segment};

/// Runs of a program for one figure.
const REPEAT: u32 = 200_000;
/// How often a figure is taken; the best counts, because everything else that runs here only adds.
const ROUNDS: usize = 5;
/// How long streams are measured.
const STREAMING: Duration = Duration::from_millis(300);
/// The port of the rules that match.
const PORT: u16 = 5432;

/// The best of some rounds.
fn best(mut figure: impl FnMut() -> f64) -> f64 {
    (0..ROUNDS).map(|_| figure()).fold(f64::INFINITY, f64::min)
}

/// Prints a figure that has no goal beside the first one of its kind.
fn show(name: &str, value: f64, unit: &str, first: &mut Option<f64>) {
    let reference = *first.get_or_insert(value);
    measure(name, value, unit, Some(reference), "shown only", true);
}

fn rules() {
    let (mut passing, mut matching) = (None, None);
    for count in [1_u16, 16, 256, 1024, 4096] {
        let mut rules: Vec<_> = (1..count)
            .map(|n| format!("tcp:{} loss=30%", 10_000 + n))
            .collect();
        rules.push(format!("tcp:{PORT} loss=30%"));
        let mut injector = injector(&plan(&rules), 1024);
        let program = injector.program(TcHook::Egress, true).expect("the program");
        let mut of = |port| best(|| nanoseconds(program, &segment(0, port), REPEAT));
        let (other, matched) = (of(6000), of(PORT));
        show(
            &format!("a packet that no rule matches; rules: {count}"),
            other,
            "ns",
            &mut passing,
        );
        show(
            &format!("a packet that the last rule matches; rules: {count}"),
            matched,
            "ns",
            &mut matching,
        );
    }
}

/// Each packet is of another connection than the one before: nothing of it is in the processor's cache.
fn connections() {
    const MOST: u32 = 262_144;
    const SAMPLE: u32 = 4096;
    let plan = plan(&[format!("tcp:{PORT} loss=30%")]);
    let mut injector = injector(&plan, 2 * MOST);
    let program = injector.program(TcHook::Egress, true).expect("the program");
    let (mut first, mut known) = (None, 0);
    for count in [1, 1024, 16_384, 65_536, MOST] {
        for number in known..count {
            nanoseconds(program, &segment(number, PORT), 1);
        }
        known = count;
        let mut taken: Vec<f64> = (0..SAMPLE)
            .map(|n| {
                let number = n.wrapping_mul(2_654_435_761) % count;
                nanoseconds(program, &segment(number, PORT), 1)
            })
            .collect();
        taken.sort_unstable_by(f64::total_cmp);
        show(
            &format!("a single packet, median; connections: {count}"),
            taken[taken.len() / 2],
            "ns",
            &mut first,
        );
    }
}

/// Applies a rule to loopback.
fn inject(rule: &str) -> Injection {
    let devices = list().expect("devices");
    let devices = select(&devices, &Selection::Names(vec!["lo".to_owned()])).expect("lo");
    prepare(
        &plan(&[rule.to_owned()]),
        &devices,
        &InjectionOptions::default(),
    )
    .and_then(PreparedInjection::start)
    .expect("rules")
}

/// Prints the best figure with a rule, beside the best without; both are taken in turns.
fn beside(
    (name, unit): (&str, &str),
    rule: &str,
    better: fn(f64, f64) -> f64,
    mut figure: impl FnMut() -> f64,
) {
    let (mut without, mut with) = (figure(), f64::NAN);
    for _ in 0..ROUNDS {
        let injection = inject(rule);
        // `better` takes the other one where one is not a number.
        with = better(with, figure());
        injection.remove().expect("restored");
        without = better(without, figure());
    }
    measure(name, with, unit, Some(without), "shown only", true);
}

fn sizes() {
    let sink = UdpSocket::bind(("127.0.0.1", PORT)).expect("a socket");
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket
        .connect(sink.local_addr().expect("bound"))
        .expect("connected");
    // A datagram has a header of 8 bytes, in a packet with one of 20.
    for bytes in [64, 512, 1500, 9000, 65_535] {
        let data = vec![0x55; bytes - 28];
        let send = || {
            const COUNT: u32 = 5000;
            best(|| {
                let start = Instant::now();
                for _ in 0..COUNT {
                    // What the sink has no room for is lost behind the rule.
                    socket.send(&data).expect("sent");
                }
                start.elapsed().as_secs_f64() * 1e9 / f64::from(COUNT)
            })
        };
        beside(
            (
                &format!("a datagram of {bytes} bytes on loopback, with a rule that matches"),
                "ns",
            ),
            &format!("udp:{PORT} loss=0.0001%"),
            f64::min,
            send,
        );
    }
}

fn streams() {
    let listener = TcpListener::bind(("127.0.0.1", PORT)).expect("a listener");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(1..) = stream.read(&mut bytes) {}
                })
                .expect("a thread");
        }
    });
    for count in [1, 10, 100, 1000] {
        let mut streams: Vec<_> = (0..count)
            .map(|_| {
                let stream = TcpStream::connect(address).expect("a connection");
                stream.set_nonblocking(true).expect("a socket");
                stream
            })
            .collect();
        beside(
            (
                &format!("streams on loopback: {count} together, with a rule that matches"),
                "Gbit/s",
            ),
            &format!("tcp:{PORT} loss=0.0001%"),
            f64::max,
            || gigabits(&mut streams),
        );
    }
}

/// What goes over all streams together: each in turn takes what it has room for.
fn gigabits(streams: &mut [TcpStream]) -> f64 {
    let data = vec![0x55; 64 << 10];
    let (start, mut sent) = (Instant::now(), 0.0);
    while start.elapsed() < STREAMING {
        let mut taken = 0;
        for stream in &mut *streams {
            match stream.write(&data) {
                Ok(length) => taken += length,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
        if taken == 0 {
            std::thread::yield_now();
        }
        sent += 8.0 * f64::from(u32::try_from(taken).expect("at most 1,000 pieces"));
    }
    sent / start.elapsed().as_secs_f64() / 1e9
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    ip("link set lo up");
    rules();
    connections();
    sizes();
    streams();
}
