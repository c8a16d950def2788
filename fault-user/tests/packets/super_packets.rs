//! What the stack sends as one super-packet (GSO) is judged, and lost, by the wire packet.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::support::echo::connected;
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, enter_fresh, fault, has_tcx, hide_run, ip, set_option, wait_for,
};
use fault_common::abi::{Counter, FlowRule, Followed, INSTANCES_MAX, RuleState, direction};
use fault_common::decide::{Plain, Sample, Verdict, judge, open};
use fault_common::packet::{PROTOCOL_UDP, Packet, kind};
use fault_user::inject::injection::{Injection, InjectionOptions};
use fault_user::inject::preparation::prepare;
use fault_user::plan::Plan;
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;
use nix::mount::MsFlags;

/// Bytes of a full datagram.
const DATAGRAM: usize = 1000;
/// Datagrams of a super-packet; the last one is half as long.
const BURST: usize = 40;

/// A number in the summary's only rule: `seen` (0) or `hit` (1).
fn packets(summary: &str, column: usize) -> u64 {
    let row = summary
        .lines()
        .find(|line| line.contains(" pkts"))
        .unwrap_or_else(|| panic!("{summary}"));
    assert!(!row.contains("segs"), "wire packets alone: {row}");
    let before = row.split(" pkts").nth(column).expect("two columns");
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Whether `hits` of `trials` at probability `p` are what one run in a million is not: nobody chose the seed, and how often TCP
/// sends again hangs on what is lost, which widens the interval by a tenth.
fn assert_binomial(hits: u64, trials: u64, p: f64) {
    let (hits, trials) = (
        f64::from(u32::try_from(hits).unwrap()),
        f64::from(u32::try_from(trials).unwrap()),
    );
    let deviation = (trials * p * (1.0 - p)).sqrt();
    let off = (hits - trials * p).abs();
    assert!(off <= 1.1 * 4.89 * deviation, "{hits} of {trials} at {p}");
}

/// The far end of a test. It is read by the thread that sends: what has arrived is there when the sending call and the next
/// answer have returned, and no thread has to be woken for it.
struct Receiver {
    socket: UdpSocket,
    came: u64,
}

impl Receiver {
    fn new(peer: &NetworkNamespace, address: SocketAddr) -> Self {
        let socket = peer.enter(|| Ok(UdpSocket::bind(address)?)).unwrap();
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
        socket.set_nonblocking(true).unwrap();
        Self { socket, came: 0 }
    }

    /// Takes what has come; each datagram must be as it was sent. How many have come in all.
    fn read(&mut self) -> u64 {
        let mut bytes = [0; 2000];
        loop {
            let length = match self.socket.recv(&mut bytes) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.came,
                Err(error) => panic!("{error}"),
            };
            let number = usize::from(bytes[0]);
            let whole = if number + 1 == BURST {
                DATAGRAM / 2
            } else {
                DATAGRAM
            };
            assert_eq!(length, whole, "datagram {number}");
            assert!(
                bytes[..length]
                    .iter()
                    .all(|byte| usize::from(*byte) == number)
            );
            self.came += 1;
        }
    }
}

/// Until the peer's link address is known, packets wait in a short queue before any program sees them.
fn know_the_neighbour(address: SocketAddr) {
    let refused = TcpStream::connect(SocketAddr::new(address.ip(), 9));
    assert!(refused.is_err(), "nobody listens there");
}

/// Sends 10,000 datagrams in super-packets under `loss=10%`.
fn lose_datagrams(options: &str, peer: &NetworkNamespace, host: &str) {
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    let mut receiver = Receiver::new(peer, address);
    let socket = connected(address);
    know_the_neighbour(address);
    let applied = AppliedRules::begin(&["udp:7000 loss=10%"], options);
    let mut burst: Vec<u8> = (0..40_u8).flat_map(|n| [n; DATAGRAM]).collect();
    burst.truncate(BURST * DATAGRAM - DATAGRAM / 2);
    set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    for _ in 0..250 {
        assert_eq!(socket.send(&burst).unwrap(), burst.len());
        // What is divided as it arrives waits in the kernel's backlog of 1,000 packets, and the answer to this behind it.
        know_the_neighbour(address);
        // And each part counts for more than its size in the receive buffer.
        receiver.read();
    }
    let summary = applied.end();
    let lost = packets(&summary, 1);
    assert_eq!(packets(&summary, 0), 10_000, "{summary}");
    wait_for(
        || receiver.read() + lost >= 10_000,
        &format!("the rest: {summary}{}", elsewhere(peer)),
    );
    assert_eq!(receiver.came + lost, 10_000, "{summary}");
    assert_binomial(lost, 10_000, 0.1);
}

/// Where else packets may have been lost.
fn elsewhere(peer: &NetworkNamespace) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let there = peer
        .enter(|| Ok(read("/proc/thread-self/net/snmp")))
        .unwrap();
    let udp: Vec<_> = there
        .lines()
        .filter(|line| line.starts_with("Udp:"))
        .collect();
    let devices = peer
        .enter(|| Ok(read("/proc/thread-self/net/dev")))
        .unwrap();
    let backlog = read("/proc/net/softnet_stat");
    format!("{}\n{devices}{backlog}", udp.join("\n"))
}

fn peer_of(peer: &Peer) -> NetworkNamespace {
    NetworkNamespace::open(Path::new(&peer.name)).unwrap()
}

#[test]
fn datagrams_of_one_super_packet_are_lost_one_by_one() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    for host in ["10.77.0.2", "fd77::2"] {
        lose_datagrams("--scope host", &namespace, host);
        lose_datagrams("--scope host --attach clsact", &namespace, host);
    }
}

#[test]
fn arriving_super_packets_are_judged_by_the_datagram_too() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    for attach in ["", " --attach clsact"] {
        let options = format!("--netns {}{attach}", peer.name);
        lose_datagrams(&options, &namespace, "10.77.0.2");
        lose_datagrams(&options, &namespace, "fd77::2");
    }
}

/// Sends `bytes` bytes over each of `connections` at once, under a loss of `percent`.
fn lose_of_tcp(peer: &NetworkNamespace, host: &str, options: &str, percent: f64, load: [usize; 2]) {
    let [connections, bytes] = load;
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    let listener = peer.enter(|| Ok(TcpListener::bind(address)?)).unwrap();
    let data: Vec<u8> = (0..bytes).map(|n| (n / 997).to_le_bytes()[0]).collect();
    let rule = format!("tcp:7000 loss={percent}% dir=to-server");
    let applied = AppliedRules::begin(&[&rule], options);
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(&data).unwrap();
            });
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                assert!(all == data, "what arrives is what was sent");
            });
        }
    });
    let summary = applied.end();
    let (seen, lost) = (packets(&summary, 0), packets(&summary, 1));
    // Super-packets would be far fewer.
    assert!(seen > (connections * bytes / 1500) as u64, "{summary}");
    assert_binomial(lost, seen, percent / 100.0);
}

#[test]
fn bulk_tcp_loses_wire_packets_and_arrives_whole() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    let lose = |host, options, percent, load| lose_of_tcp(&namespace, host, options, percent, load);
    lose("10.77.0.2", "--scope host", 0.2, [1, 24 << 20]);
    lose(
        "fd77::2",
        "--scope host --attach clsact",
        0.2,
        [1, 24 << 20],
    );
    // Where much is lost one connection gets nowhere.
    lose("10.77.0.2", "--scope host", 10.0, [48, 200 << 10]);
    lose("fd77::2", "--scope host", 10.0, [48, 200 << 10]);
    // Those that arrive are divided on their way in.
    let arriving = format!("--netns {}", peer.name);
    lose("10.77.0.2", &arriving, 0.2, [1, 24 << 20]);
    lose("fd77::2", &arriving, 10.0, [48, 200 << 10]);
}

#[test]
fn a_counted_packet_is_a_wire_packet() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    let address: SocketAddr = "10.77.0.2:7000".parse().unwrap();
    let mut receiver = Receiver::new(&namespace, address);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(address).unwrap();
    know_the_neighbour(address);
    let applied = AppliedRules::begin(&["udp:7000 drop every=10 range=1..25"], "--scope host");
    set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    let burst: Vec<u8> = (0..30_u8).flat_map(|n| [n; DATAGRAM]).collect();
    socket.send(&burst).unwrap();
    let summary = applied.end();
    wait_for(|| receiver.read() >= 28, "what is not lost");
    assert_eq!(receiver.came, 28, "{summary}");
    assert_eq!(packets(&summary, 1), 2, "{summary}");
}

/// Which of `count` datagrams of a connection, in bursts as [`numbered_burst`] makes them, the host says are lost.
fn lost_by_the_model(rule: &str, seed: u64, count: u32) -> Vec<u32> {
    lost_of_direction(rule, seed, count, direction::TO_SERVER)
}

fn lost_of_direction(rule: &str, seed: u64, count: u32, direction: u8) -> Vec<u32> {
    let rule: Rule = rule.parse().unwrap();
    let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
    let entry = fault_user::plan::packet::compile(&resolved, seed, 0, 0, None).unwrap()[0].entry;
    let (mut memory, mut state) = (FlowRule::default(), RuleState::default());
    open::<Plain>(&entry, &mut state, &mut memory);
    let is_lost = |number: &u32| {
        let packet = Packet {
            protocol: PROTOCOL_UDP,
            has_transport: true,
            payload_offset: 28,
            end: 28 + u32::try_from(length_of(*number)).unwrap(),
            kinds: kind::DATA,
            ..Packet::default()
        };
        let sample = Sample {
            now_ns: 0,
            size: packet.length(),
            direction,
        };
        let mut verdict = Verdict::default();
        judge::<Plain>(
            &entry,
            &sample,
            &packet,
            &mut { Followed::NONE },
            &mut memory,
            &mut state,
            &mut verdict,
        );
        verdict.end != 0
    };
    (0..count).filter(is_lost).collect()
}

/// Bytes of a numbered datagram: the last one of each burst is half as long.
fn length_of(number: u32) -> usize {
    if number as usize % BURST + 1 == BURST {
        DATAGRAM / 2
    } else {
        DATAGRAM
    }
}

/// A burst of datagrams that begin with their numbers.
fn numbered_burst(first: u32) -> Vec<u8> {
    (first..)
        .take(BURST)
        .flat_map(|number| {
            let mut bytes = vec![0; length_of(number)];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            bytes
        })
        .collect()
}

/// Where numbered datagrams go, and how one is read there: its number and length.
type Read = Box<dyn FnMut() -> (u32, usize)>;

/// A socket that datagrams are read from.
fn reader(socket: UdpSocket) -> Read {
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Box::new(move || {
        let mut bytes = [0; 2000];
        let length = socket.recv(&mut bytes).expect("what is not lost comes");
        (u32::from_be_bytes(*bytes.first_chunk().unwrap()), length)
    })
}

/// Most of these super-packets pass whole, some are divided: each wire packet meets the same either way.
fn lose_what_the_seed_says(faults: &[&str], options: &str, address: SocketAddr, read: &mut Read) {
    const BURSTS: u32 = 100;
    const SEED: u64 = 11;
    for faults in faults {
        let rule = format!("udp:7000 {faults} dir=to-server");
        let count = BURSTS * u32::try_from(BURST).unwrap();
        let expected = lost_by_the_model(&rule, SEED, count);
        assert!(!expected.is_empty(), "{rule}");
        let socket = connected(address);
        let applied = AppliedRules::begin(&[&rule], &format!("{options} --seed {SEED}"));
        set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
        let mut came = Vec::new();
        let alive = |number: &u32| expected.binary_search(number).is_err();
        for burst in 0..BURSTS {
            let first = burst * u32::try_from(BURST).unwrap();
            let data = numbered_burst(first);
            assert_eq!(socket.send(&data).unwrap(), data.len());
            for _ in (first..).take(BURST).filter(alive) {
                let (number, length) = read();
                assert_eq!(length, length_of(number), "{rule} {options}");
                came.push(number);
            }
        }
        let summary = applied.end();
        let kept: Vec<u32> = (0..count).filter(alive).collect();
        assert!(came == kept, "{rule} {options} {address}: {summary}");
        assert_eq!(packets(&summary, 0), u64::from(count), "{summary}");
        assert_eq!(packets(&summary, 1), expected.len() as u64, "{summary}");
    }
}

#[test]
fn exactly_those_datagrams_are_lost_that_the_seed_says() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    let address: SocketAddr = "10.77.0.2:7000".parse().unwrap();
    know_the_neighbour(address);
    let faults = [
        "loss=1%",
        "loss=ge(0.5%,40%)",
        "loss=state(0.3%,30%,20%,40%,0.2%)",
        "drop every=170",
        "drop p=20% size=..600",
        "drop range=1001..1003",
        "mtu=600",
    ];
    let socket = namespace.enter(|| Ok(UdpSocket::bind(address)?)).unwrap();
    lose_what_the_seed_says(&faults, "--scope host", address, &mut reader(socket));
}

/// What is divided goes back to where it was met, whatever kind of device that is.
#[test]
fn the_same_are_lost_on_each_way() {
    const FAULTS: [&str; 3] = ["loss=2%", "drop every=170 count=rule", "mtu=600"];
    enter_fresh();
    let peer = Peer::joined();
    let namespace = peer_of(&peer);
    let arriving = format!("--netns {}", peer.name);
    for host in ["10.77.0.2", "fd77::2"] {
        let address = SocketAddr::new(host.parse().unwrap(), 7000);
        know_the_neighbour(address);
        let socket = namespace.enter(|| Ok(UdpSocket::bind(address)?)).unwrap();
        let mut read = reader(socket);
        for options in ["--scope host", arriving.as_str()] {
            lose_what_the_seed_says(&FAULTS, options, address, &mut read);
        }
    }
    for host in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(host.parse().unwrap(), 7000);
        let mut read = reader(UdpSocket::bind(address).unwrap());
        for options in ["--scope host", "--scope host --attach clsact"] {
            lose_what_the_seed_says(&FAULTS, options, address, &mut read);
        }
    }
    let mut tun = without_link_header();
    let address = "10.81.0.2:7000".parse().unwrap();
    lose_what_the_seed_says(&FAULTS, "--scope host --interface tun7", address, &mut tun);
}

/// Makes `tun7`, a device without a link layer header that takes super-packets.
fn without_link_header() -> Read {
    const HEADERS: usize = 10 + 28;
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeroes is a request; the requests take what they are given, which is alive.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"tun7") {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
        let made = libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request);
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        // Checksums are left to whoever reads.
        assert_eq!(libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 1), 0);
    }
    ip("addr add 10.81.0.1/24 dev tun7");
    ip("link set tun7 up");
    Box::new(move || {
        let (mut bytes, mut length) = ([0; 2000], 0);
        let mut has_come = || match file.read(&mut bytes) {
            Ok(read) => {
                length = read;
                // The rest is what IPv6 sends by itself.
                bytes[10] == 0x45 && bytes[10 + 9] == PROTOCOL_UDP
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                false
            }
        };
        wait_for(&mut has_come, "what is not lost");
        let number = u32::from_be_bytes(*bytes[HEADERS..].first_chunk().unwrap());
        (number, length - HEADERS)
    })
}

/// Each part of a divided super-packet counts in a receive buffer for what it is.
#[test]
fn a_divided_burst_fits_an_ordinary_receive_buffer() {
    enter_fresh();
    let socket = UdpSocket::bind("127.0.0.1:7000").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let address = socket.local_addr().unwrap();
    let sender = connected(address);
    set_option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    let applied = AppliedRules::begin(&["udp:7000 drop nth=1"], "--scope host");
    assert_eq!(sender.send(&numbered_burst(0)).unwrap(), 39_500);
    let summary = applied.end();
    let mut bytes = [0; 2000];
    for number in 1..BURST {
        socket
            .recv(&mut bytes)
            .unwrap_or_else(|error| panic!("{number}: {error}: {summary}"));
        assert_eq!(bytes[3], u8::try_from(number).unwrap());
    }
}

/// What was divided stays with the socket that sent it until it has left, so that nobody sends without end into a queue.
#[test]
fn a_sender_waits_for_its_divided_packets() {
    enter_fresh();
    let peer = Peer::joined();
    let address: SocketAddr = "10.77.0.2:7000".parse().unwrap();
    let _receiver = Receiver::new(&peer_of(&peer), address);
    let socket = connected(address);
    know_the_neighbour(address);
    let queue = "qdisc add dev va root tbf rate 8kbit burst 100k limit 100m";
    let added = std::process::Command::new("tc")
        .args(queue.split(' '))
        .status();
    if !added.unwrap().success() {
        eprintln!("skipped: the kernel has no tbf");
        return;
    }
    let applied = AppliedRules::begin(&["udp:7000 drop every=9 count=rule"], "--scope host");
    set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 200_000);
    socket.set_nonblocking(true).unwrap();
    let burst = numbered_burst(0);
    let refused = (0..100).find_map(|_| socket.send(&burst).err());
    let summary = applied.end();
    let error = refused.unwrap_or_else(|| panic!("4 MB are on their way: {summary}"));
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "{summary}");
}

/// Whoever is killed leaves no device behind, and super-packets pass.
#[test]
fn nothing_stays_of_an_instance_that_is_killed() {
    enter_fresh();
    hide_run();
    let socket = UdpSocket::bind("127.0.0.1:7000").unwrap();
    let address = socket.local_addr().unwrap();
    let mut read = reader(socket);
    let sender = connected(address);
    set_option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    for options in ["--scope host", "--scope host --attach clsact"] {
        let mut applied = AppliedRules::begin(&["udp:7000 drop every=40 count=rule"], options);
        assert_eq!(sender.send(&numbered_burst(0)).unwrap(), 39_500);
        for _ in 1..BURST {
            read();
        }
        assert!(has_ours());
        applied.kill();
        wait_for(|| !has_ours(), "the device to disappear");
        if !version::at_least(5, 12) {
            eprintln!("skipped: before Linux 5.12 super-packets are lost until the lease ends");
            break;
        }
        // Programs that are attached without a link act for some seconds yet. They judge what they can't divide as one.
        assert_eq!(sender.send(&numbered_burst(0)).unwrap(), 39_500);
        for number in 0..BURST {
            assert_eq!(read().0, u32::try_from(number).unwrap(), "{options}");
        }
    }
    let done = fault().arg("clean").output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// Applies a rule in this process. With a selection, `fault` looks after later interfaces and its own devices.
fn inject(rule: &str, later_interfaces: Option<Selection>) -> Injection {
    let rule: Rule = rule.parse().unwrap();
    let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
    let plan = Plan::new(&[(rule, resolved)], 1, None, None).unwrap();
    let interfaces = select(&list().unwrap(), &Selection::Default).unwrap();
    let options = InjectionOptions {
        later_interfaces,
        ..InjectionOptions::default()
    };
    let prepared = prepare(&plan, &interfaces, &options).unwrap();
    prepared.start().unwrap()
}

/// A sender of bursts to itself on loopback, from one processor, and what counts the datagrams that have come.
fn bursts() -> (UdpSocket, impl FnMut() -> usize) {
    stay_on(0);
    let socket = UdpSocket::bind("127.0.0.1:7000").unwrap();
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
    socket.set_nonblocking(true).unwrap();
    let sender = connected(socket.local_addr().unwrap());
    set_option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
    let mut bytes = [0; 2000];
    (sender, move || {
        std::iter::repeat_with(|| socket.recv(&mut bytes))
            .take_while(Result::is_ok)
            .count()
    })
}

/// Nobody looks after the device here: the programs notice by themselves that nothing comes back from it.
#[test]
fn a_device_that_is_down_loses_few_super_packets() {
    const LOST: [usize; 7] = [0, 1, 2, 4, 8, 16, 32];
    enter_fresh();
    let (sender, mut read) = bursts();
    let injection = inject("udp:7000 drop every=40", None);
    let mut send = || {
        assert_eq!(sender.send(&numbered_burst(0)).unwrap(), 39_500);
        read()
    };
    assert_eq!(send(), 39, "it is divided");
    let device = divider();
    ip(&format!("link set {device} down"));
    let came: Vec<_> = (0..64).map(|_| send()).collect();
    let lost: Vec<_> = (0..64).filter(|at| came[*at] == 0).collect();
    // The 40th of those that are treated as one packet, too.
    let hit = 40 + LOST.len() - 1;
    assert!(
        lost.iter().all(|at| LOST.contains(at) || *at == hit),
        "{lost:?}"
    );
    let whole = u64::try_from(64 - LOST.len()).unwrap();
    assert_eq!(injection.counter(Counter::Undivided).unwrap(), whole);
    ip(&format!("link set {device} up"));
    assert_eq!([(); 3].map(|()| send()), [39; 3], "they are divided again");
    injection.remove().unwrap();
}

#[test]
fn rules_that_were_stopped_stay_so_when_the_device_is_removed() {
    enter_fresh();
    let (sender, mut read) = bursts();
    let mut injection = inject("udp:7000 drop every=2", Some(Selection::Default));
    injection.rest();
    ip(&format!("link del {}", divider()));
    wait_for(|| !has_ours(), "the device below to be given up");
    for _ in 0..2 {
        sender.send(&numbered_burst(0)).unwrap();
        assert_eq!(read(), BURST, "nothing is lost");
    }
    injection.remove().unwrap();
}

/// The kernel detaches from one interface after the other, with a grace period each.
#[test]
fn a_kill_with_many_interfaces_loses_no_super_packet() {
    if !has_tcx() {
        eprintln!("skipped: needs tcx, whose links the kernel removes one by one");
        return;
    }
    enter_fresh();
    hide_run();
    for number in 0..10 {
        ip(&format!(
            "link add va{number} type veth peer name vb{number}"
        ));
        ip(&format!("link set va{number} up"));
        ip(&format!("link set vb{number} up"));
    }
    let (sender, mut read) = bursts();
    let mut applied = AppliedRules::begin(&["udp:7000 drop every=40"], "--scope host");
    let mut send = || {
        assert_eq!(sender.send(&numbered_burst(0)).unwrap(), 39_500);
        read()
    };
    assert_eq!(send(), 39);
    applied.kill();
    let mut lost = 0;
    wait_for(
        || {
            lost += (0..100).filter(|_| send() < 39).count();
            !has_ours()
        },
        "the device to disappear",
    );
    assert_eq!(lost, 0);
}

/// In many containers there is no `/dev/net/tun`.
fn hide_tun() {
    let none = None::<&str>;
    nix::mount::mount(
        Some("/dev/null"),
        "/dev/net/tun",
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
}

#[test]
fn a_pair_on_which_no_device_can_be_made_is_removed() {
    enter_fresh();
    hide_run();
    hide_tun();
    // Whatever the instance's number is, the name of the device is taken.
    for number in 0..INSTANCES_MAX {
        ip(&format!("link add fault-{number}d type bridge"));
    }
    let applied = AppliedRules::begin(&["udp:7000 loss=2%"], "--scope host");
    let links = names_of_links();
    let summary = applied.end();
    assert!(
        summary.contains("super-packets are treated as one packet each: "),
        "{summary}"
    );
    assert!(!links.iter().any(|name| name.ends_with('e')), "{links:?}");
}

#[test]
fn without_a_tap_a_veth_pair_serves() {
    enter_fresh();
    hide_run();
    hide_tun();
    let address = "127.0.0.1:7000".parse().unwrap();
    let mut read = reader(UdpSocket::bind(address).unwrap());
    lose_what_the_seed_says(&["loss=2%"], "--scope host", address, &mut read);
    assert!(!has_ours(), "the pair is removed");
    let mut applied = AppliedRules::begin(&["udp:7000 loss=2%"], "--scope host");
    applied.kill();
    drop(applied);
    assert!(has_ours(), "the pair outlives a kill");
    let done = fault().arg("clean").output().unwrap();
    assert!(done.status.success(), "{done:?}");
    assert!(!has_ours(), "{done:?}");
}

fn names_of_links() -> Vec<String> {
    let all = list().unwrap();
    all.into_iter().map(|one| one.name).collect()
}

/// Whether a device of an instance is there.
fn has_ours() -> bool {
    names_of_links()
        .iter()
        .any(|name| name.starts_with("fault-"))
}

/// The name of the device that divides.
fn divider() -> String {
    let is_divider = |name: &String| name.starts_with("fault-") && name.ends_with('d');
    names_of_links().into_iter().find(is_divider).unwrap()
}

/// Has the calling thread run on one processor.
fn stay_on(cpu: usize) {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

/// Sends super-packets back and forth over one connection, from both processors at once: each direction's ordinals are
/// given to as many packets as were sent, none twice, so exactly as many are lost as the host says.
#[test]
fn two_processors_on_one_connection_take_the_same_decisions() {
    const SEED: u64 = 23;
    enter_fresh();
    // An emulated machine takes minutes for as many.
    let bursts: u32 = if std::env::var_os("FAULT_VM_KERNEL").is_some() {
        100
    } else {
        1500
    };
    let processors = std::thread::available_parallelism().unwrap().get();
    // Before Linux 5.12 there are no atomics by which two processors in one direction could be told apart.
    let doubled = version::at_least(5, 12);
    for (fault, senders) in [
        // The other direction from another processor.
        ("loss=0.1%", 1),
        ("loss=ge(0.5%,40%)", 1),
        ("drop every=1700", 1),
        // And another processor in the same direction.
        ("loss=0.1%", 2),
        ("drop every=1700", 2),
        ("drop nth=3", 2),
    ] {
        if senders == 2 && !doubled {
            continue;
        }
        let [client, server] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let port = server.local_addr().unwrap().port();
        client.connect(server.local_addr().unwrap()).unwrap();
        server.connect(client.local_addr().unwrap()).unwrap();
        let rule = format!("udp:{port} {fault}");
        let applied = AppliedRules::begin(&[&rule], &format!("--scope host --seed {SEED}"));
        for socket in [&client, &server] {
            set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
        }
        let start = std::sync::Barrier::new(2 * senders);
        std::thread::scope(|scope| {
            for (socket, cpu) in [&client, &server].into_iter().cycle().zip(0..2 * senders) {
                let start = &start;
                scope.spawn(move || {
                    stay_on((cpu + cpu / 2) % processors);
                    let burst = numbered_burst(0);
                    start.wait();
                    for _ in 0..bursts {
                        assert_eq!(socket.send(&burst).unwrap(), burst.len());
                    }
                });
            }
        });
        let summary = applied.end();
        let each = bursts * u32::try_from(BURST * senders).unwrap();
        let expected: usize = [direction::TO_SERVER, direction::TO_CLIENT]
            .map(|direction| lost_of_direction(&rule, SEED, each, direction).len())
            .iter()
            .sum();
        assert_eq!(packets(&summary, 0), 2 * u64::from(each), "{summary}");
        assert_eq!(packets(&summary, 1), expected as u64, "{summary}");
    }
}
