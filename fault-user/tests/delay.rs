//! Packets that are held: delay, jitter, order, rate, slots, and what is left afterwards.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use fault_user::process::netns::NetworkNamespace;
use support::echo::connected;
use support::late::{assert_about, delays_all, echo, order, timed};
use support::place::{Hurt, PATIENCE, Peer, enter_fresh, fault, wait_for};

const SETTINGS: [&str; 2] = [
    "/proc/sys/net/ipv4/conf/lo/accept_local",
    "/proc/sys/net/ipv4/conf/lo/route_localnet",
];

#[test]
fn loopback_is_delayed_and_its_settings_are_put_back() {
    enter_fresh();
    let before = SETTINGS.map(|path| std::fs::read_to_string(path).unwrap());
    for host in ["127.0.0.1", "::1"] {
        let address = echo(None, host);
        delays_all(address, "--scope host", "delay-line");
        delays_all(address, "--scope host --attach clsact", "delay-line");
    }
    assert_eq!(
        SETTINGS.map(|path| std::fs::read_to_string(path).unwrap()),
        before
    );
}

#[test]
fn both_ways_of_a_device_are_delayed() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for host in ["10.77.0.2", "fd77::2"] {
        delays_all(echo(Some(&namespace), host), "--scope host", "delay-line");
    }
}

#[test]
fn only_the_commands_own_packets_are_held() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let hurt = Hurt::begin(&["7000 delay=2s"], "");
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took < Duration::from_secs(1), "{took:?}");
    hurt.end();
}

#[test]
fn what_two_instances_hold_is_delayed_by_both_and_arrives() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let both = [0, 1].map(|_| Hurt::begin(&["udp:7000 delay=60ms"], "--scope host"));
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took >= Duration::from_millis(240), "{took:?}");
    for hurt in both {
        let summary = hurt.end();
        assert!(summary.contains("  2 pkts"), "each judges once: {summary}");
    }
}

#[test]
fn a_process_that_runs_already_is_delayed_on_loopback() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let mut child = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Its move to a cgroup and the settings of loopback are both noted.
    let options = format!("--pid {}", child.id());
    let hurt = Hurt::begin(&["udp:7000 delay=2s"], &options);
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took < Duration::from_secs(1), "not this process: {took:?}");
    hurt.end();
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn what_is_held_goes_on_when_the_rule_ends() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let hurt = Hurt::begin(&["udp:7000 delay=50s dir=to-server"], "--scope host");
    let socket = connected(address);
    socket.send(b"x").unwrap();
    let summary = hurt.end();
    assert!(summary.contains("1 pkts"), "{summary}");
    let mut byte = [0; 1];
    socket.recv(&mut byte).unwrap();
}

#[test]
fn packets_overtake_each_other_where_they_may() {
    enter_fresh();
    echo(None, "127.0.0.1");
    let in_order: Vec<u16> = (0..120).collect();
    assert_eq!(order(&["udp:7000 delay=20ms"], "--scope host"), in_order);
    assert_eq!(
        order(&["udp:7000 delay=20ms~20ms,keep-order"], "--scope host"),
        in_order
    );
    for rule in [
        "udp:7000 delay=20ms~20ms",
        "udp:7000 delay=20ms~5ms,dist=normal",
        "udp:7000 reorder=25%",
        "udp:7000 reorder=50%,5",
    ] {
        let mut numbers = order(&[rule], "--scope host");
        assert_ne!(numbers, in_order, "{rule}");
        numbers.sort_unstable();
        assert_eq!(numbers, in_order, "{rule}: none is lost");
    }
    // What overtakes is not held, what does not is.
    let mixed = order(
        &["udp:7000 delay=30ms", "udp:7000 reorder=100% dir=to-server"],
        "--scope host",
    );
    assert_eq!(mixed, in_order);
}

#[test]
fn a_rate_is_that_of_the_wire() {
    const DATAGRAMS: u32 = 500;
    const PAYLOAD: u32 = 958;
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    // All may be in flight at once before the first is read.
    let room = 16_i32 << 20;
    // SAFETY: the value is an int, as the option wants it.
    let status = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&receiver),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const room).cast(),
            4,
        )
    };
    assert_eq!(status, 0);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    // 1,000 bytes on the wire, headers of UDP, IP and Ethernet included, at 8 Mbit/s: 1 ms each.
    let hurt = Hurt::begin(&["udp:7000 rate=8mbit"], "--scope host");
    let took = timed(|| {
        for _ in 0..DATAGRAMS {
            sender.send(&[0; PAYLOAD as usize]).unwrap();
        }
        let mut bytes = [0; 2000];
        for _ in 0..DATAGRAMS {
            receiver.recv(&mut bytes).unwrap();
        }
    });
    hurt.end();
    let wanted = f64::from(DATAGRAMS) * 1e-3;
    let off = (took.as_secs_f64() - wanted).abs() / wanted;
    // An emulated machine is slow to wake up.
    let tolerance = if std::env::var_os("FAULT_VM_KERNEL").is_some() {
        0.5
    } else {
        0.1
    };
    assert!(off < tolerance, "{took:?} instead of {wanted} s");
}

#[test]
fn a_stream_on_loopback_gets_the_rate() {
    const BYTES: usize = 16 << 20;
    if std::env::var_os("FAULT_VM_KERNEL").is_some() {
        eprintln!("skipped: an emulated machine is too slow for this rate");
        return;
    }
    enter_fresh();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    let hurt = Hurt::begin(&["tcp:7000 rate=100mbit"], "--scope host");
    let sender = std::thread::spawn(|| {
        let mut stream = TcpStream::connect("127.0.0.1:7000").unwrap();
        stream.write_all(&vec![0; BYTES]).unwrap();
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let took = timed(|| stream.read_exact(&mut vec![0; BYTES]).unwrap());
    sender.join().unwrap();
    hurt.end();
    // Headers are a small part of packets of 64 KiB. A machine with other work to do may be late, but not by as much as
    // when every super-packet takes the time of two.
    let rate = f64::from(u32::try_from(BYTES).unwrap()) * 8.0 / took.as_secs_f64() / 100e6;
    assert!((0.75..1.05).contains(&rate), "{rate} of the rate");
}

#[test]
fn a_full_queue_loses_and_says_so() {
    enter_fresh();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    let hurt = Hurt::begin(&["udp:7000 rate=8kbit,limit:5"], "--scope host");
    for _ in 0..20 {
        sender.send(&[0; 958]).unwrap();
    }
    // What is held goes on when the rule ends.
    let summary = hurt.end();
    assert!(
        summary.contains("15 packets were lost in full queues"),
        "{summary}"
    );
}

#[test]
fn slots_deliver_in_bursts() {
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    let hurt = Hurt::begin(&["udp:7000 slot=100ms,100ms,packets:10"], "--scope host");
    let start = Instant::now();
    for _ in 0..30 {
        sender.send(b"x").unwrap();
    }
    let mut byte = [0; 1];
    let arrivals: Vec<Duration> = (0..30)
        .map(|_| {
            receiver.recv(&mut byte).unwrap();
            start.elapsed()
        })
        .collect();
    hurt.end();
    for (burst, ms) in arrivals.chunks(10).zip([100, 200, 300]) {
        assert_about(burst[0], ms, "the start of a burst");
        assert_about(burst[9], ms, "its end");
    }
}

#[test]
fn a_killed_instance_delays_nothing_and_its_settings_are_found() {
    enter_fresh();
    let before = SETTINGS.map(|path| std::fs::read_to_string(path).unwrap());
    let address = echo(None, "127.0.0.1");
    let mut hurt = Hurt::begin(&["udp:7000 delay=1s"], "--scope host");
    let socket = connected(address);
    hurt.kill();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut byte = [0; 1];
    wait_for(
        || {
            socket.send(b"x").unwrap();
            timed(|| drop(socket.recv(&mut byte))) < Duration::from_millis(200)
        },
        "packets to pass again",
    );
    drop(hurt);
    let cleaned = fault().arg("clean").output().unwrap();
    assert!(cleaned.status.success());
    assert_eq!(
        SETTINGS.map(|path| std::fs::read_to_string(path).unwrap()),
        before
    );
    let devices = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert!(!devices.contains("fault-"), "{devices}");
}
