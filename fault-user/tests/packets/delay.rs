//! Packets that are held: delay, jitter, order, rate, slots, and what is left afterwards.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::echo::connected;
use crate::support::late::{
    FRAGMENTED, assert_about, assert_within, delays_all, echo, exchange, order, timed,
};
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, enter_fresh, fault, has_bash, ip, is_emulated, run, set_option,
    wait_for,
};
use fault_user::sys::process::netns::NetworkNamespace;
use nix::sys::socket::{setsockopt, sockopt};

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
    let applied = AppliedRules::begin(&["7000 delay=2s"], "");
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took < Duration::from_secs(1), "{took:?}");
    applied.end();
}

#[test]
fn what_two_instances_hold_is_delayed_by_both_and_arrives() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let both = [0, 1].map(|_| AppliedRules::begin(&["udp:7000 delay=60ms"], "--scope host"));
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took >= Duration::from_millis(240), "{took:?}");
    for applied in both {
        let summary = applied.end();
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
    let applied = AppliedRules::begin(&["udp:7000 delay=2s"], &options);
    let socket = connected(address);
    let mut byte = [0; 1];
    let took = timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    });
    assert!(took < Duration::from_secs(1), "not this process: {took:?}");
    applied.end();
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn what_is_held_goes_on_when_the_rule_ends() {
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let applied = AppliedRules::begin(&["udp:7000 delay=50s dir=to-server"], "--scope host");
    let socket = connected(address);
    socket.send(b"x").unwrap();
    let summary = applied.end();
    assert!(summary.contains("1 pkt "), "{summary}");
    let mut byte = [0; 1];
    socket.recv(&mut byte).unwrap();
}

/// How long the last of so many datagrams of `size` bytes comes behind the first.
fn spread(address: SocketAddr, count: usize, size: usize) -> Duration {
    let socket = connected(address);
    let datagram = vec![0; size];
    for _ in 0..count {
        socket.send(&datagram).unwrap();
    }
    let mut buffer = [0; 2048];
    socket.recv(&mut buffer).unwrap();
    timed(|| {
        for _ in 1..count {
            socket.recv(&mut buffer).unwrap();
        }
    })
}

/// Whether a measurement is within 5 % of a figure: a busy machine makes some longer, and some shorter, where what they begin
/// with is late.
fn assert_figure(what: &str, figure: Duration, mut measure: impl FnMut() -> Duration) {
    let within = figure.mul_f64(0.95)..=figure.mul_f64(1.05);
    let mut all = Vec::new();
    while all.len() < 15 {
        let took = measure();
        if within.contains(&took) {
            return;
        }
        all.push(took);
    }
    panic!("{what}: {all:?}, not {figure:?}");
}

#[test]
fn a_profile_has_the_round_trip_and_the_rates_of_its_figures() {
    const COUNT: usize = 30;
    const PAYLOAD: usize = 1200;
    // The headers of Ethernet, IPv4 and UDP are on the wire too.
    const WIRE_BITS: f64 = 8.0 * (1200.0 + 14.0 + 20.0 + 8.0);
    enter_fresh();
    let address = echo(None, "127.0.0.1");
    let took = |bits_per_second: f64| Duration::from_secs_f64(29.0 * WIRE_BITS / bits_per_second);
    let applied = AppliedRules::begin(&["udp:7000 profile=3g"], "--scope host");
    assert_figure("round trip", Duration::from_millis(300), || {
        let socket = connected(address);
        timed(|| {
            socket.send(b"x").unwrap();
            socket.recv(&mut [0; 1]).unwrap();
        })
    });
    assert_figure("to the server", took(768e3), || {
        spread(address, COUNT, PAYLOAD)
    });
    let summary = applied.end();
    assert!(
        summary.contains("udp:7000 rate=1.6mbit dir=to-client"),
        "{summary}"
    );
    let applied = AppliedRules::begin(&["udp:7000 profile=3g dir=to-client"], "--scope host");
    assert_figure("to the client", took(1600e3), || {
        spread(address, COUNT, PAYLOAD)
    });
    applied.end();
}

#[test]
fn a_profile_loses_what_its_figures_say() {
    const COUNT: u32 = 60_000;
    if is_emulated() {
        eprintln!("skipped: an emulated processor is too slow for the profile's rate");
        return;
    }
    enter_fresh();
    let server = UdpSocket::bind("127.0.0.1:7000").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    // Room for all of them: what gets lost is lost by the rule.
    setsockopt(&server, sockopt::RcvBufForce, &(128 << 20)).unwrap();
    let counting = std::thread::spawn(move || {
        let mut buffer = [0; 1];
        let came = std::iter::from_fn(|| {
            server.recv(&mut buffer).unwrap();
            (buffer == *b"x").then_some(())
        });
        // The server stays: the last that are sent are not to be rejected.
        (u32::try_from(came.count()).unwrap(), server)
    });
    // The same packets are lost each time, since the seed is the same.
    let applied = AppliedRules::begin(
        &["udp:7000 profile=wifi-lossy dir=to-server"],
        "--scope host --seed 1",
    );
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect("127.0.0.1:7000").unwrap();
    for nth in 0..COUNT {
        client.send(b"x").unwrap();
        if nth % 64 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    while !counting.is_finished() {
        client.send(b".").unwrap();
        std::thread::yield_now();
    }
    applied.end();
    let (came, _server) = counting.join().unwrap();
    let lost = f64::from(COUNT - came);
    // From good to bad 1 %, back 50 %.
    let expected = f64::from(COUNT) * 0.01 / 0.51;
    assert!(
        (lost / expected - 1.0).abs() <= 0.05,
        "{lost}, not {expected}"
    );
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
    const PAYLOAD: usize = 958;
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    // All may be in flight at once before the first is read.
    set_option(&receiver, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 16 << 20);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    // 1,000 bytes on the wire, headers of UDP, IP and Ethernet included, at 8 Mbit/s: 1 ms each.
    let applied = AppliedRules::begin(&["udp:7000 rate=8mbit"], "--scope host");
    // An emulated machine is slow to wake up.
    let off = if is_emulated() { 250 } else { 50 };
    assert_within(500 - off..500 + off, "500 datagrams", || {
        timed(|| {
            for _ in 0..DATAGRAMS {
                sender.send(&[0; PAYLOAD]).unwrap();
            }
            let mut bytes = [0; 2000];
            for _ in 0..DATAGRAMS {
                receiver.recv(&mut bytes).unwrap();
            }
        })
    });
    applied.end();
}

#[test]
fn a_rate_counts_all_fragments_of_a_datagram() {
    const DATAGRAMS: u32 = 25;
    // 5,000 bytes, 8 of UDP, and in each of four fragments the headers of Ethernet and IP.
    for (host, bytes) in [("127.0.0.1", 5008 + 4 * 34), ("::1", 5008 + 4 * 62)] {
        enter_fresh();
        ip("link set lo mtu 1500");
        let address = echo(None, host);
        let socket = connected(address);
        let applied = AppliedRules::begin(&["udp:7000 rate=2mbit dir=to-server"], "--scope host");
        let took = timed(|| {
            for _ in 0..DATAGRAMS {
                socket.send(&[7; FRAGMENTED]).unwrap();
            }
            let mut answer = [0; FRAGMENTED];
            for _ in 0..DATAGRAMS {
                assert_eq!(socket.recv(&mut answer).unwrap(), FRAGMENTED);
            }
        });
        let summary = applied.end();
        let wanted = f64::from(DATAGRAMS * bytes) * 8.0 / 2e6;
        let took = took.as_secs_f64();
        assert!(
            took > 0.98 * wanted && took < 2.0 * wanted,
            "{took} s instead of {wanted}: {summary}"
        );
        assert!(!summary.contains("fragments"), "{summary}");
    }
}

#[test]
fn fragments_of_a_datagram_are_late_together() {
    enter_fresh();
    ip("link set lo mtu 1500");
    for host in ["127.0.0.1", "::1"] {
        let socket = connected(echo(None, host));
        let applied = AppliedRules::begin(
            &["udp:7000 delay=150ms~150ms dir=to-server"],
            "--scope host --seed 4",
        );
        let mut answer = [0; FRAGMENTED];
        // The latest of four fragments that each have a delay of their own would be about 250 ms late.
        assert_within(75..205, "the median", || {
            let mut took: Vec<_> = (0..12)
                .map(|_| {
                    timed(|| {
                        socket.send(&[7; FRAGMENTED]).unwrap();
                        assert_eq!(socket.recv(&mut answer).unwrap(), FRAGMENTED);
                    })
                })
                .collect();
            took.sort_unstable();
            took[took.len() / 2]
        });
        applied.end();
    }
}

#[test]
fn a_stream_on_loopback_gets_the_rate() {
    const BYTES: usize = 16 << 20;
    if is_emulated() {
        eprintln!("skipped: an emulated machine is too slow for this rate");
        return;
    }
    enter_fresh();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    let applied = AppliedRules::begin(&["tcp:7000 rate=100mbit"], "--scope host");
    // At the rate it takes 1,342 ms. Headers are a small part of packets of 64 KiB.
    assert_within(1278..1600, "16 MiB", || {
        let sender = std::thread::spawn(|| {
            let mut stream = TcpStream::connect("127.0.0.1:7000").unwrap();
            stream.write_all(&vec![0; BYTES]).unwrap();
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let took = timed(|| stream.read_exact(&mut vec![0; BYTES]).unwrap());
        sender.join().unwrap();
        took
    });
    applied.end();
}

#[test]
fn a_full_queue_loses_and_says_so() {
    enter_fresh();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    let applied = AppliedRules::begin(&["udp:7000 rate=8kbit,limit:5"], "--scope host");
    for _ in 0..20 {
        sender.send(&[0; 958]).unwrap();
    }
    // What is held goes on when the rule ends.
    let summary = applied.end();
    assert!(
        summary.contains("15 packets were dropped because the queue of a `rate` was full"),
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
    assert_about(0, "after the start of a slot", || {
        let applied =
            AppliedRules::begin(&["udp:7000 slot=100ms,100ms,packets:10"], "--scope host");
        let start = Instant::now();
        for _ in 0..30 {
            sender.send(b"x").unwrap();
        }
        let mut latest = Duration::ZERO;
        for number in 0..30 {
            receiver.recv(&mut [0; 1]).unwrap();
            let slot = Duration::from_millis(100 * (1 + number / 10));
            let after = start.elapsed().checked_sub(slot);
            latest = latest.max(after.expect("not before its slot"));
        }
        applied.end();
        latest
    });
}

#[test]
fn a_killed_instance_delays_nothing_and_its_settings_are_found() {
    enter_fresh();
    let before = SETTINGS.map(|path| std::fs::read_to_string(path).unwrap());
    let address = echo(None, "127.0.0.1");
    let mut applied = AppliedRules::begin(&["udp:7000 delay=1s"], "--scope host");
    let socket = connected(address);
    applied.kill();
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
    drop(applied);
    let cleaned = fault().arg("clean").output().unwrap();
    assert!(cleaned.status.success());
    assert_eq!(
        SETTINGS.map(|path| std::fs::read_to_string(path).unwrap()),
        before
    );
    let devices = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert!(!devices.contains("fault-"), "{devices}");
}

/// A round trip of one byte.
fn round_trip(socket: &UdpSocket) -> Duration {
    timed(|| {
        socket.send(b"x").unwrap();
        // A receive with a time limit is not begun again after an interruption.
        while let Err(error) = socket.recv(&mut [0; 1]) {
            assert_eq!(error.kind(), std::io::ErrorKind::Interrupted);
        }
    })
}

/// Namespaces joined by a bridge here, `br0`, which is 10.77.0.1 and `fd77::1`; nothing where the kernel has no bridges.
struct Bridge {
    ends: Vec<(Peer, NetworkNamespace)>,
}

impl Bridge {
    fn new() -> Option<Self> {
        let made = Command::new("ip")
            .args(["link", "add", "br0", "type", "bridge"])
            .status();
        if !made.unwrap().success() {
            eprintln!("skipped: the kernel has no bridges");
            return None;
        }
        ip("addr add 10.77.0.1/24 dev br0");
        ip("-6 addr add fd77::1/64 dev br0 nodad");
        ip("link set br0 up");
        Some(Self { ends: Vec::new() })
    }

    /// One more namespace, 10.77.0.N and `fd77::N` with N from 2 on.
    fn join(&mut self) -> &NetworkNamespace {
        let peer = Peer::fresh();
        let number = self.ends.len() + 2;
        ip(&format!(
            "link add port{number} type veth peer name eth0 netns {}",
            peer.name
        ));
        ip(&format!("link set port{number} master br0 up"));
        for words in [
            format!("addr add 10.77.0.{number}/24 dev eth0"),
            format!("-6 addr add fd77::{number}/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            "route add default via 10.77.0.1".to_owned(),
            "-6 route add default via fd77::1".to_owned(),
        ] {
            ip(&format!("-n {} {words}", peer.name));
        }
        let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
        self.ends.push((peer, namespace));
        &self.ends[number - 2].1
    }
}

/// A socket of `namespace` that is connected to `server`.
fn connected_in(namespace: &NetworkNamespace, server: SocketAddr) -> UdpSocket {
    namespace.enter(|| Ok(connected(server))).unwrap()
}

#[test]
fn frames_between_ports_of_a_bridge_are_delayed_and_judged_once() {
    for (host, options) in [
        ("10.77.0.2", "--scope host"),
        ("fd77::2", "--scope host"),
        ("10.77.0.2", "--scope host --attach clsact"),
        ("10.77.0.2", "--interface br0 --scope host"),
    ] {
        enter_fresh();
        let Some(mut bridge) = Bridge::new() else {
            return;
        };
        let server = echo(Some(bridge.join()), host);
        let client = connected_in(bridge.join(), server);
        round_trip(&client);
        let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], options);
        let trips = assert_about(120, "from port to port", || round_trip(&client))
            + assert_about(120, "from this host", || round_trip(&connected(server)));
        // It appears when the rules are there already.
        let late = connected_in(bridge.join(), server);
        let mut packets = 2 * trips;
        wait_for(
            || {
                packets += 2;
                round_trip(&late) >= Duration::from_millis(120)
            },
            "the new port to be slow",
        );
        let summary = applied.end();
        // Before the rules were on the new port too they were on that of the server.
        assert!(summary.contains(&format!("  {packets} pkts")), "{summary}");
        assert_within(0..120, "restored", || round_trip(&client));
    }
}

/// Has frames between ports of a bridge pass iptables; false where that can't be.
fn lets_iptables_see_bridges() -> bool {
    let settings =
        ["iptables", "ip6tables"].map(|name| format!("/proc/sys/net/bridge/bridge-nf-call-{name}"));
    let is_set = settings
        .iter()
        .all(|path| std::fs::write(path, "1").is_ok());
    let has_nat = ["iptables", "ip6tables"].iter().all(|name| {
        let done = Command::new(name).args(["-t", "nat", "-L"]).output();
        done.is_ok_and(|done| done.status.success())
    });
    if !is_set || !has_nat {
        eprintln!("skipped: there is no br_netfilter, or no NAT by iptables");
    }
    is_set && has_nat
}

fn translate(host: IpAddr, protocol: &str, port: u16, to: SocketAddr) {
    let program = if host.is_ipv4() {
        "iptables"
    } else {
        "ip6tables"
    };
    let words =
        format!("-t nat -A PREROUTING -d {host} -p {protocol} --dport {port} -j DNAT --to {to}");
    let done = Command::new(program).args(words.split(' ')).status();
    assert!(done.unwrap().success(), "{words}");
}

/// How many connections the only rule met, as the summary says.
fn connections(summary: &str) -> &str {
    let mut rows = summary.lines().skip_while(|line| !line.contains("conns"));
    let row = rows.nth(1).unwrap();
    let mut columns = row
        .split("  ")
        .map(str::trim)
        .filter(|word| !word.is_empty());
    columns.nth(3).unwrap()
}

/// As Kubernetes' nodes do: `br_netfilter` has translated a frame before the bridge gives it to the host.
#[test]
fn connections_through_a_bridge_that_translates_are_delayed_and_stay_one() {
    enter_fresh();
    if !lets_iptables_see_bridges() {
        return;
    }
    let Some(mut bridge) = Bridge::new() else {
        return;
    };
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    let outside = Peer::joined_by("10.78.0", "fd78:");
    ip(&format!(
        "-n {} route add default via 10.78.0.1",
        outside.name
    ));
    ip(&format!(
        "-n {} -6 route add default via fd78::1",
        outside.name
    ));
    let beyond = NetworkNamespace::open(Path::new(&outside.name)).unwrap();
    let inside = bridge.join();
    let servers = [
        (echo(Some(inside), "10.77.0.2"), "10.96.0.2"),
        (echo(Some(inside), "fd77::2"), "fd96::2"),
        (echo(Some(&beyond), "10.78.0.2"), "10.96.0.3"),
        (echo(Some(&beyond), "fd78::2"), "fd96::3"),
    ];
    let client = bridge.join();
    for (server, service) in servers {
        let service = SocketAddr::new(service.parse().unwrap(), 80);
        for protocol in ["tcp", "udp"] {
            translate(service.ip(), protocol, 80, server);
        }
        let applied = AppliedRules::begin(&["7000 delay=60ms"], "--scope host");
        let handshake = || {
            let mut stream = None;
            let took = timed(|| {
                stream = Some(client.enter(|| Ok(TcpStream::connect(service)?)).unwrap());
            });
            (took, stream.unwrap())
        };
        let mut stream = None;
        let opened = assert_about(120, "the handshake", || {
            let (took, opened) = handshake();
            stream = Some(opened);
            took
        });
        let mut stream = stream.unwrap();
        assert_about(120, "an exchange", || timed(|| exchange(&mut stream)));
        let socket = connected_in(client, service);
        assert_about(120, "a datagram", || round_trip(&socket));
        let summary = applied.end();
        assert_eq!(connections(&summary), (opened + 1).to_string(), "{summary}");
        // Of super-packets that are divided as they arrive, too.
        let applied = AppliedRules::begin(&["tcp:7000 duplicate=5%"], "--scope host");
        let (_, mut stream) = handshake();
        let mut writer = stream.try_clone().unwrap();
        let sent = vec![7; 4 << 20];
        let mut answer = vec![0; sent.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&sent).unwrap());
            stream.read_exact(&mut answer).unwrap();
        });
        let summary = applied.end();
        assert_eq!(connections(&summary), "1", "{summary}");
    }
}

/// Makes `tun7`, at whose other end everything is sent back to where it comes from.
fn tun_echo() {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeroes is a request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tun7") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap();
    // SAFETY: the request lives through the call.
    let made = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&file),
            libc::TUNSETIFF,
            &raw mut request,
        )
    };
    assert_eq!(made, 0);
    ip("addr add 10.81.0.1/24 dev tun7");
    ip("-6 addr add fd81::1/64 dev tun7 nodad");
    ip("link set tun7 up");
    std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok(length) = (&file).read(&mut bytes) {
            // Addresses and ports change places, which no checksum minds.
            let (addresses, size) = if bytes[0] >> 4 == 4 { (12, 4) } else { (8, 16) };
            let ports = addresses + 2 * size;
            bytes[addresses..ports].rotate_left(size);
            bytes[ports..ports + 4].rotate_left(2);
            if (&file).write(&bytes[..length]).is_err() {
                return;
            }
        }
    });
}

#[test]
fn a_device_without_ethernet_headers_is_delayed() {
    enter_fresh();
    tun_echo();
    for options in [
        "--scope host",
        "--scope host --interface tun7",
        "--scope host --attach clsact",
    ] {
        for server in ["10.81.0.2:7000", "[fd81::2]:7000"] {
            let socket = connected(server.parse().unwrap());
            let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], options);
            let trips = assert_about(120, server, || round_trip(&socket));
            let summary = applied.end();
            assert!(
                summary.contains(&format!("  {} pkts", 2 * trips)),
                "{summary}"
            );
            assert!(!summary.contains("carried out"), "{summary}");
            assert_within(0..120, "restored", || round_trip(&socket));
        }
    }
}

#[test]
fn a_device_that_nothing_can_be_held_at_is_refused_before_anything_starts() {
    enter_fresh();
    let made = Command::new("ip")
        .args(["link", "add", "ifb7", "type", "ifb"])
        .status();
    if !made.unwrap().success() {
        eprintln!("skipped: the kernel has no ifb");
        return;
    }
    let refused = run(&["udp:7000 delay=60ms"], "--interface ifb7", &["true"]);
    assert_eq!(refused.status.code(), Some(125));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("can't hold packets of ifb7"), "{error}");
    let passed = run(
        &["udp:7000 loss=1%"],
        "--interface ifb7 --allow-unfired",
        &["true"],
    );
    assert!(passed.status.success(), "{passed:?}");
}

/// Whether a process still has its delay line.
fn has_delay_line(pid: u32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .any(|task| {
            let name = std::fs::read_to_string(task.unwrap().path().join("comm"));
            name.is_ok_and(|name| name == "delay-line\n")
        })
}

/// The name of the only tap device of `fault` here.
fn tap() -> String {
    let links = Command::new("ip").args(["-o", "link"]).output().unwrap();
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    let mut names = links.lines().filter_map(|line| line.split(": ").nth(1));
    let name = names.find(|name| name.starts_with("fault-"));
    name.expect("a tap device").to_owned()
}

#[test]
fn packets_pass_when_the_tap_is_removed_or_switched_off() {
    const WARNING: &str = "fault: warning: the delay line has stopped";
    for attach in ["", "--attach clsact"] {
        enter_fresh();
        let socket = connected(echo(None, "127.0.0.1"));
        let options = format!("--scope host {attach}");
        let applied = AppliedRules::begin(&["udp:7000 delay=60s"], &options);
        ip(&format!("link del {}", tap()));
        wait_for(|| !has_delay_line(applied.pid()), "the loss to be noticed");
        assert!(round_trip(&socket) < Duration::from_secs(10));
        let summary = applied.end();
        assert!(summary.contains(WARNING), "{summary}");
        assert!(
            summary.contains("2 hits could not be carried out"),
            "{summary}"
        );
        assert!(
            summary.contains("the fault could not be applied to any of them"),
            "{summary}"
        );

        let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], &options);
        assert_about(120, "with its tap", || round_trip(&socket));
        ip(&format!("link set {} down", tap()));
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        wait_for(
            || {
                socket.send(b"x").unwrap();
                socket.recv(&mut [0; 1]).is_ok()
            },
            "packets to pass",
        );
        let summary = applied.end();
        assert_eq!(summary.matches(WARNING).count(), 1, "{summary}");
    }
}

/// A shell that sends a byte to a server on each line that it reads, and answers with a line when the byte is back.
fn pinger(namespace: &NetworkNamespace, server: SocketAddr) -> std::process::Child {
    let script = format!(
        "exec 3<>/dev/udp/{}/{}; while read -r line; do printf x >&3; read -r -N1 -u3; echo back; done",
        server.ip(),
        server.port()
    );
    namespace
        .enter(|| {
            let child = Command::new("bash")
                .args(["-c", &script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            Ok(child)
        })
        .unwrap()
}

#[test]
fn a_process_is_found_in_its_own_network_namespace() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let server = echo(None, "10.77.0.1");
    let mut child = pinger(&namespace, server);
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut ask = {
        let mut input = child.stdin.take().unwrap();
        move || {
            timed(|| {
                input.write_all(b"\n").unwrap();
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                assert_eq!(line, "back\n");
            })
        }
    };
    ask();
    let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], &format!("--pid {}", child.id()));
    let trips = assert_about(120, "the process", &mut ask);
    let other = connected_in(&namespace, server);
    assert_within(0..120, "another one there", || round_trip(&other));
    let summary = applied.end();
    assert!(
        summary.contains(&format!("  {} pkts", 2 * trips)),
        "{summary}"
    );
    drop(ask);
    child.wait().unwrap();
}
