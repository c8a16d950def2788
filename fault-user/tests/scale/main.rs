//! Ten thousand connections through one relay, and many more one after another: nothing is left behind. A program of its own, since it
//! opens as many files as it may.

#[path = "../support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use serde_json::json;

fn open_files() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit may be had");
    hard
}

fn descriptors(daemon: &Daemon) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id()))
        .expect("it runs")
        .count()
}

fn field(daemon: &Daemon, file: &str, name: &str) -> u64 {
    let text =
        std::fs::read_to_string(format!("/proc/{}/{file}", daemon.child.id())).expect("it runs");
    let line = text
        .lines()
        .find(|line| line.starts_with(name))
        .expect("a known field");
    line.split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("a number")
}

/// User and system time in ticks of 10 ms.
fn cpu_ticks(daemon: &Daemon) -> u64 {
    let text =
        std::fs::read_to_string(format!("/proc/{}/stat", daemon.child.id())).expect("it runs");
    let after_name = text.rsplit(')').next().expect("a name in parentheses");
    after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().expect("a number"))
        .sum()
}

#[test]
fn ten_thousand_open_connections_and_thousands_in_a_row() {
    // Two descriptors for each here and in the daemon; a little is left for everything else.
    let count = usize::try_from(open_files() / 2 - 60)
        .unwrap_or(usize::MAX)
        .min(10_000);
    if count < 10_000 {
        eprintln!(
            "with {count} connections instead of 10000: the hard limit of open files allows no more"
        );
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", listener.local_addr().expect("bound"));
    one_after_another(&daemon, listen, &listener, 2_000);
    let (files, memory) = (descriptors(&daemon), field(&daemon, "status", "VmRSS"));
    one_after_another(&daemon, listen, &listener, 10_000);
    let grown = field(&daemon, "status", "VmRSS").saturating_sub(memory);
    assert!(
        descriptors(&daemon) <= files + 2,
        "{files} descriptors became {}",
        descriptors(&daemon)
    );
    assert!(grown < 2048, "{grown} kB more after 10000 connections");

    let mut pairs: Vec<(TcpStream, TcpStream)> = Vec::with_capacity(count);
    while pairs.len() < count {
        let client = TcpStream::connect(listen).expect("it listens");
        pairs.push((client, listener.accept().expect("it connects").0));
    }
    let each = (field(&daemon, "status", "VmRSS") - memory) * 1024 / count as u64;
    assert!(each <= 16 * 1024, "{each} bytes for an idle connection");
    let before = cpu_ticks(&daemon);
    thread::sleep(Duration::from_secs(1));
    assert!(
        cpu_ticks(&daemon) - before <= 1,
        "idle connections cost CPU time"
    );
    for (index, (client, server)) in pairs.iter_mut().enumerate() {
        let byte = [u8::try_from(index % 256).expect("a byte")];
        client.write_all(&byte).expect("write");
        let mut got = [0];
        server.read_exact(&mut got).expect("read");
        assert_eq!(got, byte);
    }
    let start = Instant::now();
    assert_eq!(
        daemon
            .call("POST", "/proxies/p/toxics", r#"{"type":"latency"}"#)
            .0,
        200
    );
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "a toxic on all took {:?}",
        start.elapsed()
    );
    let (status, closed) = daemon.call("POST", "/v1/proxies/p/close", "");
    assert_eq!((status, closed), (200, json!({"closed": count})));
    drop(pairs);
    let until = Instant::now() + Duration::from_secs(5);
    while descriptors(&daemon) > files + 2 && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(
        descriptors(&daemon) <= files + 2,
        "{files} descriptors became {}",
        descriptors(&daemon)
    );
}

#[test]
#[ignore = "takes half a minute: cargo test -p fault-user --test relay_scale -- --ignored"]
fn a_hundred_thousand_connections_leave_nothing_behind() {
    open_files();
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", listener.local_addr().expect("bound"));
    let mut seen = Vec::new();
    for _ in 0..5 {
        one_after_another(&daemon, listen, &listener, 20_000);
        let threads = field(&daemon, "status", "Threads");
        seen.push((
            descriptors(&daemon),
            field(&daemon, "status", "VmRSS"),
            threads,
        ));
    }
    println!("descriptors, kB of memory and threads after each 20000 connections: {seen:?}");
    let (first, last) = (seen[0], seen[4]);
    assert!(
        last.0 <= first.0 + 2 && last.1 <= first.1 + 1024 && last.2 == first.2,
        "{seen:?}"
    );
}

fn one_after_another(daemon: &Daemon, listen: SocketAddr, listener: &TcpListener, count: usize) {
    for index in 0..count {
        let mut client = TcpStream::connect(listen).expect("it listens");
        let (mut server, _) = listener.accept().expect("it connects");
        client.write_all(b"x").expect("write");
        server.read_exact(&mut [0]).expect("read");
        if index % 2 == 0 {
            // A reset leaves no TIME_WAIT behind, of which there could be too many.
            socket2::SockRef::from(&client)
                .set_linger(Some(Duration::ZERO))
                .expect("a TCP socket");
        }
    }
    assert_eq!(
        daemon
            .call("POST", "/v1/proxies/p/wait", r#"{"exactly":0}"#)
            .0,
        200
    );
}
