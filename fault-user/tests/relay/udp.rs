//! The UDP relay through real sockets: datagrams are never cut or merged.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::support::place::PATIENCE;
use crate::support::relay::*;
use fault_user::relay::{Cut, Drain, StreamDirection, Transport};
use serde_json::json;

/// A client that the server has heard of, and its address as the server sees it.
fn client(bed: &Bed) -> (UdpSocket, SocketAddr) {
    let client = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    client.connect(bed.address()).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    client.send(b"hello").expect("send");
    let mut buffer = [0; 100];
    let (count, from) = bed
        .datagrams
        .recv_from(&mut buffer)
        .expect("the greeting comes");
    assert_eq!(&buffer[..count], b"hello");
    (client, from)
}

fn send(bed: &Bed, direction: StreamDirection, client: &(UdpSocket, SocketAddr), data: &[u8]) {
    let sent = match direction {
        StreamDirection::Upstream => client.0.send(data),
        StreamDirection::Downstream => bed.datagrams.send_to(data, client.1),
    };
    assert_eq!(sent.expect("send"), data.len());
}

fn receiver<'a>(
    bed: &'a Bed,
    direction: StreamDirection,
    client: &'a (UdpSocket, SocketAddr),
) -> &'a UdpSocket {
    match direction {
        StreamDirection::Upstream => &bed.datagrams,
        StreamDirection::Downstream => &client.0,
    }
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let count = socket.recv(&mut buffer).expect("a datagram comes");
    buffer.truncate(count);
    buffer
}

fn assert_nothing(socket: &UdpSocket, time: Duration) {
    socket.set_read_timeout(Some(time)).expect("a timeout");
    let kind = socket.recv(&mut [0; 100]).map_err(|error| error.kind());
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert!(
        matches!(kind, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)),
        "{kind:?}"
    );
}

/// Runs a check in both directions, and afterwards that an old and a new client are served.
fn both_ways(check: impl Fn(&Bed, StreamDirection, &(UdpSocket, SocketAddr), &UdpSocket)) {
    for direction in StreamDirection::ALL {
        let bed = Bed::udp();
        let old = client(&bed);
        check(&bed, direction, &old, receiver(&bed, direction, &old));
        for client in [old, client(&bed)] {
            for direction in StreamDirection::ALL {
                send(&bed, direction, &client, b"are you well?");
                assert_eq!(
                    receive(receiver(&bed, direction, &client)),
                    b"are you well?"
                );
            }
        }
    }
}

#[test]
fn datagrams_of_every_size_pass_whole() {
    both_ways(|bed, direction, client, receiver| {
        for size in [0, 1, 1472, 9000, 65_507] {
            send(bed, direction, client, &pattern(size));
            assert_eq!(receive(receiver), pattern(size));
        }
    });
}

#[test]
fn many_clients_are_kept_apart() {
    let bed = Bed::udp();
    let clients: Vec<_> = (0..100).map(|_| client(&bed)).collect();
    for (index, client) in clients.iter().enumerate() {
        send(
            &bed,
            StreamDirection::Downstream,
            client,
            format!("for {index}").as_bytes(),
        );
    }
    for (index, client) in clients.iter().enumerate() {
        assert_eq!(receive(&client.0), format!("for {index}").as_bytes());
    }
    assert_eq!(bed.relay.connections().len(), 100);
}

#[test]
fn silent_clients_are_forgotten_and_welcome_again() {
    let bed = Bed::new(Transport::Udp, Duration::from_millis(100), 1);
    let (socket, _) = client(&bed);
    bed.run(bed.relay.wait_for(|open, _| open == 0));
    socket.send(b"again").expect("send");
    assert_eq!(receive(&bed.datagrams), b"again");
    assert_eq!(bed.relay.stats().accepted, 2);
}

#[test]
fn latency_shifts_and_its_removal_frees_what_is_in_flight() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "latency", &json!({"latency": 100}));
        let start = Instant::now();
        send(bed, direction, client, b"a");
        send(bed, direction, client, b"b");
        assert_eq!(
            (receive(receiver), receive(receiver)),
            (b"a".to_vec(), b"b".to_vec())
        );
        assert_between(start.elapsed(), 99, 150);
        send(bed, direction, client, b"c");
        assert_nothing(receiver, Duration::from_millis(30));
        bed.remove("latency");
        assert_eq!(receive(receiver), b"c");
    });
}

#[test]
fn bandwidth_paces_whole_datagrams() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "bandwidth", &json!({"rate": 100}));
        let start = Instant::now();
        for _ in 0..20 {
            send(bed, direction, client, &pattern(1000));
        }
        for _ in 0..20 {
            assert_eq!(receive(receiver), pattern(1000));
        }
        assert_between(start.elapsed(), 180, 260);
        bed.remove("bandwidth");
    });
}

#[test]
fn drop_discard_timeout_swallow() {
    both_ways(|bed, direction, client, receiver| {
        for kind in ["drop", "discard"] {
            bed.add(direction, kind, &json!({}));
            send(bed, direction, client, b"lost");
            assert_nothing(receiver, Duration::from_millis(40));
            bed.remove(kind);
        }
    });
}

#[test]
fn loss_loses_its_share() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "loss", &json!({"probability": "30%"}));
        for index in 0..100_u8 {
            send(bed, direction, client, &[index]);
        }
        let index = usize::from(direction == StreamDirection::Downstream);
        let before = if index == 0 { b"hello".len() as u64 } else { 0 };
        while bed.relay.stats().received_bytes[index] < before + 100 {
            std::thread::yield_now();
        }
        bed.remove("loss");
        send(bed, direction, client, b"end");
        let got =
            std::iter::from_fn(|| Some(receive(receiver)).filter(|data| data != b"end")).count();
        assert!((50..90).contains(&got), "{got} of 100 came");
    });
}

#[test]
fn corrupt_data_changes_and_keeps_lengths() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(
            direction,
            "corrupt_data",
            &json!({"mode": "zero", "offset": 2}),
        );
        for _ in 0..2 {
            send(bed, direction, client, b"abcdef");
            assert_eq!(receive(receiver), b"ab\0def");
        }
        bed.remove("corrupt_data");
    });
}

#[test]
fn substitute_looks_at_each_datagram() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(
            direction,
            "substitute",
            &json!({"regex": "secret", "replacement": "X"}),
        );
        send(bed, direction, client, b"a secret!");
        send(bed, direction, client, b"sec");
        assert_eq!(receive(receiver), b"a X!");
        assert_eq!(receive(receiver), b"sec");
        bed.remove("substitute");
    });
}

#[test]
fn duplicate_sends_twice() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "duplicate", &json!({"probability": 1}));
        send(bed, direction, client, b"twin");
        assert_eq!(
            (receive(receiver), receive(receiver)),
            (b"twin".to_vec(), b"twin".to_vec())
        );
        bed.remove("duplicate");
    });
}

#[test]
fn reorder_lets_others_overtake_and_forgets_nobody() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "reorder", &json!({"probability": 0.3, "gap": 2}));
        for index in 0..50 {
            send(bed, direction, client, &[index]);
        }
        let mut got: Vec<u8> = (0..50).map(|_| receive(receiver)[0]).collect();
        assert!(!got.is_sorted(), "nothing was reordered");
        got.sort_unstable();
        assert_eq!(got, (0..50).collect::<Vec<u8>>());
        bed.remove("reorder");
    });
}

#[test]
fn limit_data_drops_what_is_beyond() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "limit_data", &json!({"bytes": 10}));
        for data in [&b"123456"[..], b"1234567", b"abcd"] {
            send(bed, direction, client, data);
        }
        assert_eq!(
            (receive(receiver), receive(receiver)),
            (b"123456".to_vec(), b"abcd".to_vec())
        );
        send(bed, direction, client, b"x");
        assert_nothing(receiver, Duration::from_millis(30));
        bed.remove("limit_data");
    });
}

#[test]
fn stall_keeps_datagrams_and_lets_them_go() {
    both_ways(|bed, direction, client, receiver| {
        bed.add(direction, "stall", &json!({}));
        send(bed, direction, client, b"later");
        assert_nothing(receiver, Duration::from_millis(40));
        bed.remove("stall");
        assert_eq!(receive(receiver), b"later");
    });
}

#[test]
fn down_closes_the_socket_and_no_accept_ignores_new_clients() {
    let bed = Bed::udp();
    let old = client(&bed);
    bed.add(StreamDirection::Upstream, "no_accept", &json!({}));
    let new = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    new.connect(bed.address()).expect("connect");
    new.send(b"ignored").expect("send");
    send(&bed, StreamDirection::Upstream, &old, b"known");
    assert_eq!(receive(&bed.datagrams), b"known");
    bed.remove("no_accept");
    bed.add(StreamDirection::Upstream, "down", &json!({}));
    old.0.send(b"x").expect("send");
    let kind = old.0.recv(&mut [0; 10]).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionRefused));
    bed.remove("down");
    old.0.send(b"hello").expect("send");
    assert_eq!(receive(&bed.datagrams), b"hello");
}

#[test]
fn close_on_data_forgets_the_client_and_drops_the_datagram() {
    for direction in StreamDirection::ALL {
        let bed = Bed::udp();
        let old = client(&bed);
        bed.add(direction, "close_on_data", &json!({"mode": "fin"}));
        send(&bed, direction, &old, b"the last");
        bed.run(bed.relay.wait_for(|open, _| open == 0));
        assert_nothing(receiver(&bed, direction, &old), Duration::from_millis(30));
        bed.remove("close_on_data");
        client(&bed);
    }
}

#[test]
fn datagrams_on_their_way_arrive_at_the_end() {
    let bed = Bed::udp();
    let client = client(&bed);
    bed.add(
        StreamDirection::Upstream,
        "latency",
        &json!({"latency": 100}),
    );
    send(&bed, StreamDirection::Upstream, &client, b"last words");
    let drain = Drain::within(Duration::from_secs(20));
    let cut = bed.run(bed.relay.drain(drain));
    assert_eq!(cut, Cut::default());
    assert_eq!(receive(&bed.datagrams), b"last words");
}

#[test]
fn a_fault_of_streams_is_refused() {
    let bed = Bed::udp();
    let config = fault_user::relay::ToxicConfig {
        name: "s".to_owned(),
        direction: StreamDirection::Upstream,
        stream: "upstream".to_owned(),
        toxicity: 1.0,
        connections: fault_user::relay::Picked::ALL,
        filter: fault_user::relay::GreetingFilter::default(),
        datagrams: None,
        fault: fault_user::relay::RelayFault::of_kind("slicer").expect("a kind"),
        decisions: fault_user::relay::Decisions::default(),
    };
    let error = bed
        .run(bed.relay.add_toxic(config))
        .expect_err("no meaning on datagrams");
    assert_eq!(
        error.to_string(),
        "slicer does not work on this proxy's transport"
    );
}
