//! `fault run -vv`: the lines about the packets of a known exchange.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;

use crate::support::daemon::Daemon;
use crate::support::echo::{connected, udp_echo};
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, enter_fresh, hierarchy, set_option, wait_for,
};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;

/// A socket that takes datagrams to a port of every address.
fn receiver(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a free port");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

/// Sends datagrams of these sizes from one socket to a receiver on loopback, and waits for those that pass. Where from.
fn send(receiver: &UdpSocket, sizes: &[usize], passing: usize) -> SocketAddr {
    let port = receiver.local_addr().expect("bound").port();
    let socket = connected(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    for size in sizes {
        socket.send(&vec![b'x'; *size]).expect("it is sent");
    }
    for _ in 0..passing {
        receiver.recv(&mut [0; 256]).expect("it passes");
    }
    socket.local_addr().expect("bound")
}

/// The lines about packets to and from a port, from `packet` on, without the client's address.
fn lines(summary: &str, client: SocketAddr) -> Vec<String> {
    let client = client.to_string();
    summary
        .lines()
        .filter_map(|line| line.strip_prefix("fault: packet udp "))
        .filter(|line| line.contains(&client))
        .map(|line| line.replace(&client, "CLIENT"))
        .collect()
}

#[test]
fn each_packet_of_an_exchange_is_explained() {
    enter_fresh();
    let receivers: Vec<_> = (5001..=5007).map(receiver).collect();
    let [nth, size, at, dir, host, p, loss] = &receivers[..] else {
        panic!("seven of them");
    };
    let rules = [
        "udp:5001 drop nth=2",
        "udp:5002 drop size=100..200",
        "udp:5003 drop at=1h",
        "udp:5004 drop dir=to-client",
        "udp:10.9.9.9:5005 drop",
        "udp:5006 drop p=50%",
        "udp:5007 loss=50%",
    ];
    let applied = AppliedRules::begin(&rules, "-vv --scope host --seed 1");
    let clients = [
        send(nth, &[1, 1, 1], 2),
        send(size, &[10, 100], 1),
        send(at, &[1], 1),
        send(dir, &[1], 1),
        send(host, &[1], 1),
    ];
    // At least one of these passes: `check_draws` asks for that, too.
    let drawn = [send(p, &[1; 20], 1), send(loss, &[1; 20], 1)];
    let summary = applied.end();
    let said = clients.map(|client| lines(&summary, client));
    let to = |port: u16, rest: &str| format!("CLIENT > 127.0.0.1:{port} to-server{rest}");
    let selects = "passed: first=, after=, nth=, every= or range= does not select packet";
    let rule = "'udp:5001 drop nth=2'";
    assert_eq!(
        said[0],
        [
            to(
                5001,
                &format!(", connection 1, packet 1: {rule} {selects} 1")
            ),
            to(5001, &format!(", connection 1, packet 2: {rule} dropped")),
            to(
                5001,
                &format!(", connection 1, packet 3: {rule} {selects} 3")
            ),
        ],
        "{summary}"
    );
    let rule = "'udp:5002 drop size=100..200'";
    let excluded = format!(", connection 1: {rule} passed: size= does not select 38 bytes");
    assert_eq!(
        said[1],
        [
            to(5002, &excluded),
            to(5002, &format!(", connection 1, packet 1: {rule} dropped")),
        ],
        "{summary}"
    );
    let early = &said[2];
    assert_eq!(early.len(), 1, "{summary}");
    assert!(
        early[0].contains("passed: at=, for=, period= or duty= does not select "),
        "{summary}"
    );
    let other_way = ": 'udp:5004 drop dir=to-client' passed: dir= does not select to-server";
    assert_eq!(said[3], [to(5004, other_way)], "{summary}");
    let elsewhere = ": 'udp:10.9.9.9:5005 drop' passed: it is for another host, 127.0.0.1";
    assert_eq!(said[4], [to(5005, elsewhere)], "{summary}");
    let [by_rule, by_fault] = drawn.map(|client| lines(&summary, client));
    check_draws(&by_rule, " for p=, ", &summary);
    check_draws(&by_fault, ", ", &summary);
}

/// Checks that of these packets each one that drew less than a half was dropped, the others passed, and both occur.
fn check_draws(lines: &[String], then: &str, summary: &str) {
    assert_eq!(lines.len(), 20, "{summary}");
    let mut dropped = 0;
    for (line, ordinal) in lines.iter().zip(1..) {
        assert!(
            line.contains(&format!(", connection 1, packet {ordinal}: ")),
            "{summary}"
        );
        let (_, rest) = line.split_once(" drew ").expect(line);
        let (drawn, outcome) = rest.split_once(then).expect(line);
        let is_below = drawn.parse::<f64>().expect(line) < 0.5;
        assert_eq!(
            outcome,
            if is_below { "dropped" } else { "passed" },
            "{line}"
        );
        dropped += usize::from(is_below);
    }
    // The seed is fixed, and so are all draws.
    assert!((1..20).contains(&dropped), "{summary}");
}

#[test]
fn packets_of_another_process_are_explained() {
    enter_fresh();
    if hierarchy().is_none() {
        return;
    }
    let receiver = receiver(5001);
    let applied = AppliedRules::begin(&["udp:5001 drop"], "-vv");
    let client = send(&receiver, &[1], 1);
    let summary = applied.end();
    assert_eq!(
        lines(&summary, client),
        [
            "CLIENT > 127.0.0.1:5001 to-server: 'udp:5001 drop' passed: it belongs to another process"
        ],
        "{summary}"
    );
}

#[test]
fn a_daemon_explains_the_packets_of_its_rules() {
    enter_fresh();
    let receiver = receiver(5001);
    let daemon = Daemon::with(&["-vv", "--seed", "1"]);
    let rules = ["udp:5001 drop nth=2", "udp:5001 drop size=1000.."];
    for rule in rules {
        let (code, text) = daemon.client(&["add", "rule", rule]);
        assert_eq!(code, Some(0), "{text}");
    }
    let client = send(&receiver, &[1, 1, 1], 2);
    let about = |rule: &str| {
        let said = lines(&daemon.said(), client);
        let said = said.into_iter().filter(|line| line.contains(rule));
        said.collect::<Vec<_>>()
    };
    wait_for(
        || {
            rules
                .iter()
                .all(|rule| about(rule).len() == 3 - usize::from(*rule != rules[0]))
        },
        "lines about the packets",
    );
    assert!(about(rules[0])[1].ends_with("packet 2: 'udp:5001 drop nth=2' dropped"));
    for line in about(rules[1]) {
        assert!(
            line.ends_with("passed: size= does not select 29 bytes"),
            "{line}"
        );
    }
}

#[test]
fn the_answers_are_explained_too_and_one_v_explains_none() {
    enter_fresh();
    let server = udp_echo(receiver(5001));
    let exchange = || {
        let client = connected(SocketAddr::from((Ipv4Addr::LOCALHOST, server.port())));
        client.send(b"ping").expect("it is sent");
        client.recv(&mut [0; 16]).expect("an answer");
        client.local_addr().expect("bound")
    };
    let rules = ["udp:5001 delay=1ms"];
    let applied = AppliedRules::begin(&rules, "-vv --scope host");
    let client = exchange();
    let summary = applied.end();
    assert_eq!(
        lines(&summary, client),
        [
            "CLIENT > 127.0.0.1:5001 to-server, connection 1, packet 1: 'udp:5001 delay=1ms' delayed 1.000 ms",
            "127.0.0.1:5001 > CLIENT to-client, connection 1, packet 1: 'udp:5001 delay=1ms' delayed 1.000 ms",
        ],
        "{summary}"
    );
    let applied = AppliedRules::begin(&rules, "-v --scope host");
    exchange();
    let summary = applied.end();
    assert!(!summary.contains("packet udp"), "{summary}");
    assert!(summary.contains("fault: at "), "{summary}");
}

#[test]
fn a_super_packet_has_a_line_for_what_is_decided_together() {
    enter_fresh();
    let receiver = receiver(5001);
    let sent = |rule: &str| {
        let socket = connected(SocketAddr::from((Ipv4Addr::LOCALHOST, 5001)));
        set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 100);
        let applied = AppliedRules::begin(&[rule], "-vv --scope host");
        socket.send(&[b'x'; 300]).expect("it is sent");
        // The last of the three passes.
        receiver.recv(&mut [0; 256]).expect("it passes");
        let summary = applied.end();
        lines(&summary, socket.local_addr().expect("bound"))
    };
    let divided = sent("udp:5001 drop nth=2");
    assert_eq!(divided.len(), 3, "{divided:?}");
    let second =
        "CLIENT > 127.0.0.1:5001 to-server, connection 1, packet 2: 'udp:5001 drop nth=2' dropped";
    assert_eq!(divided[1], second);
    let whole = sent("udp:5001 drop nth=9");
    if version::at_least(6, 12) {
        let line = "CLIENT > 127.0.0.1:5001 (3 wire packets) to-server, connection 1, packets 1 to 3: \
                    'udp:5001 drop nth=9' passed";
        assert_eq!(whole, [line]);
    } else {
        assert_eq!(whole.len(), 3, "{whole:?}");
    }
}

#[test]
fn xdp_explains_what_it_drops() {
    if !version::at_least(5, 12) {
        eprintln!("skipped: XDP is used from Linux 5.12 on");
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).expect("it is there");
    let receiver = namespace.enter(|| Ok(receiver(7000))).expect("entered");
    let options = format!("-vv --netns {} --mechanism xdp -i vb", peer.name);
    let applied = AppliedRules::begin(&["udp:7000 drop nth=2"], &options);
    let client = connected(SocketAddr::from(([10, 77, 0, 2], 7000)));
    for _ in 0..3 {
        client.send(b"x").expect("it is sent");
    }
    for _ in 0..2 {
        receiver.recv(&mut [0; 16]).expect("it passes");
    }
    let summary = applied.end();
    assert!(summary.contains("xdp (native)"), "{summary}");
    let said = lines(&summary, client.local_addr().expect("bound"));
    assert_eq!(said.len(), 3, "{summary}");
    let dropped =
        "CLIENT > 10.77.0.2:7000 to-server, connection 1, packet 2: 'udp:7000 drop nth=2' dropped";
    assert_eq!(said[1], dropped, "{summary}");
}
