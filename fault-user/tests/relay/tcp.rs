//! Every stream fault on TCP through real sockets, in both directions, live on open connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::place::PATIENCE;
use crate::support::relay::*;
use fault_user::relay::{CloseMode, Cut, Drain, StreamDirection, Upstream, UpstreamTarget};
use fault_user::rule::{Asked, NamePattern};
use serde_json::json;

#[test]
fn bytes_pass_unchanged_both_ways_and_half_close_keeps_the_other_way() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        let sent = pattern(20_000_000);
        let mut sender = writer.try_clone().expect("clone");
        let to_send = sent.clone();
        let sending = thread::spawn(move || {
            sender.write_all(&to_send).expect("write");
            sender.shutdown(Shutdown::Write).expect("shutdown");
        });
        assert!(read_to_end(reader) == sent, "bytes changed {direction:?}");
        sending.join().expect("no panic");
        reader
            .write_all(b"the answer")
            .expect("the other way is open");
        reader.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(writer), b"the answer");
    }
    bed.run(bed.relay.wait_for(|open, _| open == 0));
}

#[test]
fn a_reset_stays_a_reset_both_ways() {
    let bed = Bed::tcp();
    let (client, mut server) = bed.pair();
    abort(client);
    assert_reset(&mut server);
    let (mut client, server) = bed.pair();
    abort(server);
    assert_reset(&mut client);
}

#[test]
fn a_reset_after_a_half_close_is_passed_on() {
    let bed = Bed::tcp();
    let (client, mut server) = bed.pair();
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_to_end(&mut server), b"");
    abort(client);
    bed.run(bed.relay.wait_for(|open, _| open == 0));
    // The end of the client's stream has been read, so only a write meets the reset.
    let written = server.write(b"x").map_err(|error| error.kind());
    assert!(
        matches!(
            written,
            Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
        ),
        "{written:?}"
    );
}

#[test]
fn a_reset_is_passed_on_while_the_other_end_does_not_read() {
    let bed = Bed::tcp();
    for kind in [None, Some("latency")] {
        if let Some(kind) = kind {
            bed.add(StreamDirection::Upstream, kind, &json!({}));
        }
        let (mut client, mut server) = bed.pair();
        fill(&mut client);
        abort(client);
        // The server's kernel has bytes to read before the reset.
        assert_reset(&mut server);
        bed.run(bed.relay.wait_for(|open, _| open == 0));
    }
}

/// The largest size, in bytes, that the kernel gives a buffer of a TCP socket.
fn largest_buffer(name: &str) -> usize {
    let sizes = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("a sysctl");
    let largest = sizes.split_whitespace().last().expect("three sizes");
    largest.parse().expect("a number")
}

/// Writes until nobody takes any more; how much.
fn fill(writer: &mut TcpStream) -> usize {
    writer
        .set_write_timeout(Some(Duration::from_millis(300)))
        .expect("a timeout");
    // What the kernel may buffer for two sockets on each side, and as much again for the relay.
    let most = 4 * (largest_buffer("tcp_rmem") + largest_buffer("tcp_wmem"));
    let (chunk, mut total) = (vec![7; 65536], 0);
    loop {
        match writer.write(&chunk) {
            Ok(count) => total += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return total;
            }
        }
        assert!(total < most, "no backpressure");
    }
}

#[test]
fn a_slow_reader_slows_the_writer_and_gets_everything() {
    let bed = Bed::tcp();
    for kind in [None, Some("latency"), Some("slicer"), Some("corrupt_data")] {
        for direction in StreamDirection::ALL {
            if let Some(kind) = kind {
                bed.add(direction, kind, &json!({"probability": 0, "latency": 5}));
            }
            let (mut client, mut server) = bed.pair();
            let (writer, reader) = ends(direction, &mut client, &mut server);
            let total = fill(writer);
            assert_eq!(read_exactly(reader, total), vec![7; total]);
            if let Some(kind) = kind {
                bed.remove(kind);
            }
        }
    }
}

/// Gives it an upstream that nobody listens at, made of that address.
fn rewire_to_nobody(bed: &Bed, upstream: impl FnOnce(SocketAddr) -> Upstream) {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("loopback")
        .local_addr()
        .expect("bound");
    let listen = fault_user::relay::Listen::Tcp("127.0.0.1:0".to_owned());
    let rewired = bed.relay.rewire(listen, upstream(closed));
    bed.run(rewired).expect("it can listen");
}

#[test]
fn a_client_of_the_relay_gets_an_orderly_end_when_the_upstream_refuses() {
    let bed = Bed::tcp();
    rewire_to_nobody(&bed, |closed| Upstream::name(closed.to_string()));
    for _ in 0..100 {
        // A reset would make some connect(2) fail: Toxiproxy's clients take that for a proxy that is down.
        assert_eq!(read_to_end(&mut bed.connect()), b"");
    }
    assert_eq!(bed.relay.stats().refused, 100);
}

#[test]
fn a_client_of_the_server_is_reset_when_that_refuses() {
    let bed = Bed::tcp();
    rewire_to_nobody(&bed, |closed| Upstream {
        target: UpstreamTarget::Hook(Arc::new(move |_| Ok(closed))),
        prepare: None,
        answered: None,
    });
    // The reset may come before connect(2) has returned.
    match TcpStream::connect(bed.address()) {
        Ok(mut client) => assert_reset(&mut client),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    assert_eq!(bed.relay.stats().refused, 1);
}

#[test]
fn names_are_resolved_and_ipv6_works() {
    let bed = Bed::tcp();
    let port = bed.listener.local_addr().expect("bound").port();
    let rewired = bed.relay.rewire(
        fault_user::relay::Listen::Tcp("[::1]:0".to_owned()),
        Upstream::name(format!("localhost:{port}")),
    );
    bed.run(rewired).expect("it can listen on ::1");
    assert!(bed.address().is_ipv6());
    bed.assert_healthy(None);
}

#[test]
fn latency_shifts_each_direction_and_goes_at_once() {
    let bed = Bed::tcp();
    let (mut client, mut server) = bed.pair();
    for direction in StreamDirection::ALL {
        bed.add(direction, "latency", &json!({"latency": 100}));
        let (writer, reader) = ends(direction, &mut client, &mut server);
        let start = Instant::now();
        writer.write_all(b"x").expect("write");
        read_exactly(reader, 1);
        assert_between(start.elapsed(), 99, 150);
        writer.write_all(b"in flight").expect("write");
        assert_silent(reader, Duration::from_millis(30));
        bed.remove("latency");
        assert_eq!(read_exactly(reader, 9), b"in flight");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn latency_does_not_slow_a_stream_and_jitter_keeps_order() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Downstream,
        "latency",
        &json!({"latency": 100, "jitter": 50}),
    );
    let (mut client, mut server) = bed.pair();
    let sent = pattern(30_000_000);
    let to_send = sent.clone();
    let start = Instant::now();
    let sending = thread::spawn(move || {
        server.write_all(&to_send).expect("write");
    });
    assert!(read_to_end(&mut client) == sent, "bytes changed");
    sending.join().expect("no panic");
    assert_between(start.elapsed(), 60, 1500);
}

#[test]
fn a_latency_in_the_next_test_is_the_sum_of_several() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Upstream,
        "latency",
        &json!({"latency": 40}),
    );
    let (mut client, mut server) = bed.pair();
    let config = fault_user::relay::ToxicConfig {
        name: "second".to_owned(),
        direction: StreamDirection::Upstream,
        stream: "upstream".to_owned(),
        toxicity: 1.0,
        connections: fault_user::relay::Picked::ALL,
        filter: fault_user::relay::GreetingFilter::default(),
        datagrams: None,
        fault: fault_user::relay::RelayFault::Latency(fault_user::relay::fault::Latency {
            latency: 60,
            jitter: 0,
        }),
        decisions: fault_user::relay::Decisions::default(),
    };
    bed.run(bed.relay.add_toxic(config)).expect("new");
    let start = Instant::now();
    client.write_all(b"x").expect("write");
    read_exactly(&mut server, 1);
    assert_between(start.elapsed(), 99, 150);
}

#[test]
fn bandwidth_paces_each_direction() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        bed.add(direction, "bandwidth", &json!({"rate": 1000}));
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        let start = Instant::now();
        writer.write_all(&pattern(300_000)).expect("write");
        assert_eq!(read_exactly(reader, 300_000), pattern(300_000));
        assert_between(start.elapsed(), 285, 400);
        writer.write_all(&pattern(50_000)).expect("write");
        bed.update("bandwidth", &json!({"rate": 1_000_000}));
        let start = Instant::now();
        read_exactly(reader, 50_000);
        assert_between(start.elapsed(), 0, 40);
        bed.remove("bandwidth");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn a_shared_bandwidth_is_shared_and_a_rate_of_zero_stalls() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Upstream,
        "bandwidth",
        &json!({"rate": 1000, "shared": true}),
    );
    let start = Instant::now();
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (mut client, mut server) = bed.pair();
            thread::spawn(move || {
                client.write_all(&pattern(100_000)).expect("write");
                read_exactly(&mut server, 100_000);
            })
        })
        .collect();
    for reader in readers {
        reader.join().expect("no panic");
    }
    assert_between(start.elapsed(), 280, 450);
    bed.update("bandwidth", &json!({"rate": 0}));
    let (mut client, mut server) = bed.pair();
    client.write_all(b"x").expect("write");
    assert_silent(&server, Duration::from_millis(50));
    bed.remove("bandwidth");
    assert_eq!(read_exactly(&mut server, 1), b"x");
}

#[test]
fn slow_close_holds_the_end_back_and_nothing_else() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        bed.add(direction, "slow_close", &json!({"delay": 100}));
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        let start = Instant::now();
        writer.write_all(b"x").expect("write");
        writer.shutdown(Shutdown::Write).expect("shutdown");
        read_exactly(reader, 1);
        assert_between(start.elapsed(), 0, 50);
        assert_eq!(read_to_end(reader), b"");
        assert_between(start.elapsed(), 99, 160);
        bed.remove("slow_close");
        bed.assert_healthy(None);
    }
}

#[test]
fn timeout_swallows_data_then_closes_and_removing_it_closes() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(direction, "timeout", &json!({"timeout": 100}));
        let start = Instant::now();
        {
            let (writer, reader) = ends(direction, &mut client, &mut server);
            writer.write_all(b"lost").expect("write");
            assert_eq!(read_to_end(reader), b"");
            assert_between(start.elapsed(), 95, 200);
            assert_eq!(read_to_end(writer), b"");
        }
        bed.update("timeout", &json!({"timeout": 0}));
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        writer.write_all(b"lost").expect("write");
        assert_silent(reader, Duration::from_millis(150));
        bed.remove("timeout");
        assert_eq!(read_to_end(reader), b"");
        bed.assert_healthy(None);
    }
}

#[test]
fn reset_peer_resets_an_idle_connection_that_was_open_before() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(direction, "reset_peer", &json!({"timeout": 80}));
        let start = Instant::now();
        assert_reset(&mut client);
        assert_between(start.elapsed(), 75, 150);
        assert_reset(&mut server);
        let (mut client, mut server) = bed.pair();
        client.write_all(b"x").expect("write");
        assert_reset(&mut server);
        assert_reset(&mut client);
        bed.remove("reset_peer");
        bed.assert_healthy(None);
    }
}

/// A client that sends at once is connected and has sent when it is reset. What the server got.
fn reset_while_reading(bed: &Bed) -> Vec<u8> {
    let mut client = bed.connect();
    client
        .write_all(b"request")
        .expect("the connection is open");
    let mut server = bed.accept();
    let mut request = [0; 7];
    let got = match server.read_exact(&mut request) {
        Ok(()) => {
            server.write_all(b"answer").expect("write");
            request.to_vec()
        }
        Err(_reset) => Vec::new(),
    };
    assert_reset(&mut client);
    got
}

#[test]
fn a_reset_at_once_meets_the_first_read_and_not_the_connect() {
    let bed = Bed::tcp();
    for timeout in [0, 1] {
        bed.add(
            StreamDirection::Downstream,
            "reset_peer",
            &json!({ "timeout": timeout }),
        );
        for _ in 0..50 {
            assert_eq!(reset_while_reading(&bed), b"request", "{timeout} ms");
        }
        bed.remove("reset_peer");
        // As in Toxiproxy a request is not forwarded that a toxic on its way resets.
        bed.add(
            StreamDirection::Upstream,
            "reset_peer",
            &json!({ "timeout": timeout }),
        );
        for _ in 0..50 {
            assert_eq!(reset_while_reading(&bed), b"", "{timeout} ms");
        }
        // One that nobody says anything on is reset all the same.
        let (mut client, mut server) = bed.pair();
        assert_reset(&mut client);
        assert_reset(&mut server);
        bed.remove("reset_peer");
    }
}

#[test]
fn slicer_cuts_and_pauses() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(
            direction,
            "slicer",
            &json!({"average_size": 100, "size_variation": 20, "delay": 2000}),
        );
        let (writer, reader) = ends(direction, &mut client, &mut server);
        let start = Instant::now();
        writer.write_all(&pattern(2000)).expect("write");
        let (mut got, mut reads) = (Vec::new(), 0);
        let mut buffer = [0; 4096];
        while got.len() < 2000 {
            let count = reader.read(&mut buffer).expect("read");
            got.extend_from_slice(&buffer[..count]);
            reads += 1;
        }
        assert_eq!(got, pattern(2000));
        assert!(reads > 12, "{reads} reads");
        assert_between(start.elapsed(), 30, 90);
        bed.update("slicer", &json!({}));
        bed.assert_healthy(Some((&mut client, &mut server)));
        bed.remove("slicer");
    }
}

#[test]
fn limit_data_lets_exactly_so_many_through_and_keeps_count_over_an_update() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        bed.add(direction, "limit_data", &json!({"bytes": 100}));
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        writer.write_all(&pattern(60)).expect("write");
        assert_eq!(read_exactly(reader, 60), pattern(60));
        bed.update("limit_data", &json!({"bytes": 150}));
        writer.write_all(&pattern(1000)).expect("write");
        assert_eq!(read_to_end(reader), pattern(90));
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        writer.write_all(&pattern(100_000)).expect("write");
        assert_eq!(read_to_end(reader), pattern(150));
        bed.remove("limit_data");
        bed.assert_healthy(None);
    }
}

#[test]
fn a_shared_limit_counts_over_all_connections() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Upstream,
        "limit_data",
        &json!({"bytes": 100, "shared": true}),
    );
    let (mut client, mut server) = bed.pair();
    client.write_all(&pattern(70)).expect("write");
    read_exactly(&mut server, 70);
    let (mut client, mut server) = bed.pair();
    client.write_all(&pattern(70)).expect("write");
    assert_eq!(read_to_end(&mut server), pattern(30));
}

/// The ends are closed, without another byte.
fn assert_ended(ends: &mut [&mut TcpStream]) {
    for end in ends {
        assert_eq!(read_to_end(end), b"");
    }
}

#[test]
fn a_shared_limit_closes_all_connections_when_it_is_reached() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        bed.add(
            direction,
            "limit_data",
            &json!({"bytes": 12, "shared": true}),
        );
        let (mut client, mut server) = bed.pair();
        let (mut idle_client, mut idle_server) = bed.pair();
        // The relay carries it: a byte in the direction without a limit has passed.
        let (reader, writer) = ends(direction, &mut idle_client, &mut idle_server);
        writer.write_all(b"x").expect("write");
        assert_eq!(read_exactly(reader, 1), b"x");
        let (writer, reader) = ends(direction, &mut client, &mut server);
        for piece in [&b"hello"[..], b"die now"] {
            writer.write_all(piece).expect("write");
            assert_eq!(read_exactly(reader, piece.len()), piece);
        }
        assert_ended(&mut [&mut client, &mut server, &mut idle_client, &mut idle_server]);
        // It is used up: the first byte ends a new connection.
        let (mut client, mut server) = bed.pair();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        writer.write_all(b"x").expect("write");
        assert_ended(&mut [reader]);
        bed.remove("limit_data");
        bed.assert_healthy(None);
    }
}

#[test]
fn all_connections_are_closed_every_so_many_bytes() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Upstream,
        "limit_data",
        &json!({"bytes": 8, "every": true}),
    );
    for _ in 0..3 {
        let (mut first, mut first_server) = bed.pair();
        let (mut second, mut second_server) = bed.pair();
        first.write_all(b"hello").expect("write");
        assert_eq!(read_exactly(&mut first_server, 5), b"hello");
        second.write_all(b"die").expect("write");
        assert_eq!(read_exactly(&mut second_server, 3), b"die");
        assert_ended(&mut [
            &mut first,
            &mut first_server,
            &mut second,
            &mut second_server,
        ]);
    }
}

#[test]
fn down_refuses_and_closes_and_comes_back_on_the_same_port() {
    let bed = Bed::tcp();
    let (mut client, mut server) = bed.pair();
    let address = bed.address();
    bed.add(StreamDirection::Downstream, "down", &json!({}));
    assert_eq!(read_to_end(&mut client), b"");
    assert_eq!(read_to_end(&mut server), b"");
    let refused = TcpStream::connect(address).map_err(|error| error.kind());
    assert_eq!(refused.err(), Some(ErrorKind::ConnectionRefused));
    bed.remove("down");
    assert_eq!(bed.address(), address);
    bed.assert_healthy(None);
}

#[test]
fn no_accept_completes_handshakes_and_serves_later() {
    let bed = Bed::tcp();
    let (mut old_client, mut old_server) = bed.pair();
    bed.add(StreamDirection::Downstream, "no_accept", &json!({}));
    let mut client = bed.connect();
    client.write_all(b"anyone?").expect("write");
    assert_silent(&client, Duration::from_millis(50));
    assert_eq!(bed.relay.stats().accepted, 1);
    assert_echo(&mut old_client, &mut old_server);
    bed.remove("no_accept");
    assert_eq!(read_exactly(&mut bed.accept(), 7), b"anyone?");
    bed.assert_healthy(Some((&mut old_client, &mut old_server)));
}

#[test]
fn stall_closes_the_window_and_loses_nothing() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(direction, "stall", &json!({}));
        {
            let (writer, reader) = ends(direction, &mut client, &mut server);
            let total = fill(writer);
            assert_silent(reader, Duration::from_millis(50));
            bed.remove("stall");
            assert_eq!(read_exactly(reader, total), vec![7; total]);
        }
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn a_reset_while_stalled_is_passed_on_after_the_data() {
    let bed = Bed::tcp();
    for kind in ["stall", "reset_peer"] {
        let (mut client, mut server) = bed.pair();
        bed.add(StreamDirection::Upstream, kind, &json!({"timeout": 60_000}));
        client.write_all(b"last words").expect("write");
        assert_silent(&server, Duration::from_millis(20));
        abort(client);
        // Changes of other toxics make the relay look at the dead connection again.
        bed.add(StreamDirection::Downstream, "noop", &json!({}));
        bed.remove("noop");
        assert_silent(&server, Duration::from_millis(20));
        bed.remove(kind);
        let mut got = Vec::new();
        let end = server.read_to_end(&mut got).map_err(|error| error.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
        assert!(got.is_empty() || got == b"last words", "{got:?}");
    }
}

/// A change must not wait for a connection that takes its first look at the toxics at that very moment.
#[test]
fn a_toxic_that_is_added_while_a_connection_opens_is_acknowledged() {
    let bed = Bed::tcp();
    for _ in 0..2000 {
        let client = bed.connect();
        bed.add(StreamDirection::Upstream, "noop", &json!({}));
        bed.remove("noop");
        drop((client, bed.accept()));
    }
}

#[test]
fn discard_reads_and_throws_away() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(direction, "discard", &json!({}));
        {
            let (writer, reader) = ends(direction, &mut client, &mut server);
            writer.write_all(&pattern(10_000_000)).expect("it is read");
            assert_silent(reader, Duration::from_millis(50));
        }
        bed.remove("discard");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn close_on_data_closes_on_the_first_byte() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        for mode in ["fin", "rst"] {
            let (mut client, mut server) = bed.pair();
            bed.add(direction, "close_on_data", &json!({"mode": mode}));
            let (writer, reader) = ends(direction, &mut client, &mut server);
            assert_silent(reader, Duration::from_millis(30));
            writer.write_all(b"x").expect("write");
            if mode == "fin" {
                assert_eq!(read_to_end(reader), b"");
                assert_eq!(read_to_end(writer), b"");
            } else {
                assert_reset(reader);
                assert_reset(writer);
            }
            bed.remove("close_on_data");
            bed.assert_healthy(None);
        }
    }
}

#[test]
fn close_closes_the_oldest_once_and_now() {
    let bed = Bed::tcp();
    let mut pairs: Vec<_> = (0..3).map(|_| bed.pair()).collect();
    bed.add(
        StreamDirection::Downstream,
        "close",
        &json!({"count": 2, "mode": "rst"}),
    );
    for (client, server) in &mut pairs[..2] {
        assert_reset(client);
        assert_reset(server);
    }
    assert_eq!(bed.relay.stats().toxics[0].hits, 2);
    let (client, server) = &mut pairs[2];
    bed.assert_healthy(Some((client, server)));
    // The connection that was opened to see so is gone a moment after its ends.
    bed.run(bed.relay.wait_for(|open, _| open == 1));
    assert_eq!(
        bed.run(bed.relay.close_connections(usize::MAX, CloseMode::Fin)),
        1
    );
    assert_eq!(read_to_end(&mut pairs[2].0), b"");
    assert!(bed.relay.connections().is_empty());
}

#[test]
fn corrupt_data_changes_bytes_in_each_mode() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        let check = |mode: serde_json::Value, client: &mut TcpStream, server: &mut TcpStream| {
            bed.add(direction, "corrupt_data", &mode);
            let (writer, reader) = ends(direction, client, server);
            writer.write_all(&[0x55; 1000]).expect("write");
            let got = read_exactly(reader, 1000);
            bed.remove("corrupt_data");
            got
        };
        let got = check(json!({"mode": "flip"}), &mut client, &mut server);
        assert!(got.iter().all(|byte| (byte ^ 0x55).is_power_of_two()));
        let got = check(
            json!({"mode": "zero", "offset": 3}),
            &mut client,
            &mut server,
        );
        assert_eq!(got.iter().position(|byte| *byte != 0x55), Some(3));
        assert_eq!(got.iter().filter(|byte| **byte != 0x55).count(), 1);
        let got = check(
            json!({"mode": "random", "probability": "20%"}),
            &mut client,
            &mut server,
        );
        let changed = got.iter().filter(|byte| **byte != 0x55).count();
        assert!((150..250).contains(&changed), "{changed} of 1000 at 20%");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn lifetime_is_a_timer_and_not_a_check() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        bed.add(direction, "lifetime", &json!({"time": 100, "mode": "rst"}));
        let start = Instant::now();
        let (mut client, mut server) = bed.pair();
        assert_echo(&mut client, &mut server);
        assert_reset(&mut client);
        assert_between(start.elapsed(), 95, 200);
        bed.update("lifetime", &json!({"time": 100, "from": "first-data"}));
        let (mut client, mut server) = bed.pair();
        assert_silent(&client, Duration::from_millis(150));
        let start = Instant::now();
        let (writer, reader) = ends(direction, &mut client, &mut server);
        writer.write_all(b"x").expect("write");
        assert_eq!(read_to_end(reader), b"x");
        assert_between(start.elapsed(), 95, 200);
        bed.remove("lifetime");
        bed.assert_healthy(None);
    }
}

#[test]
fn coalesce_collects_until_there_is_enough_or_time_is_up() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(
            direction,
            "coalesce",
            &json!({"min_bytes": 10, "max_wait": 100}),
        );
        {
            let (writer, reader) = ends(direction, &mut client, &mut server);
            let mut buffer = [0; 100];
            let start = Instant::now();
            writer.write_all(b"abcd").expect("write");
            assert_silent(reader, Duration::from_millis(20));
            writer.write_all(b"efghijk").expect("write");
            assert_eq!(reader.read(&mut buffer).expect("read"), 11);
            assert_between(start.elapsed(), 20, 80);
            let start = Instant::now();
            writer.write_all(b"l").expect("write");
            assert_eq!(reader.read(&mut buffer).expect("read"), 1);
            assert_between(start.elapsed(), 99, 160);
        }
        bed.remove("coalesce");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn substitute_works_across_chunks() {
    let bed = Bed::tcp();
    for direction in StreamDirection::ALL {
        let (mut client, mut server) = bed.pair();
        bed.add(
            direction,
            "substitute",
            &json!({"regex": "pass(word)?=[a-z]+;", "replacement": "pass$1=***;"}),
        );
        {
            let (writer, reader) = ends(direction, &mut client, &mut server);
            writer.write_all(b"user=a;passw").expect("write");
            assert_eq!(read_exactly(reader, 7), b"user=a;");
            writer.write_all(b"ord=geheim;rest").expect("write");
            assert_eq!(read_exactly(reader, 17), b"password=***;rest");
            let start = Instant::now();
            writer.write_all(b"pa").expect("write");
            assert_eq!(read_exactly(reader, 2), b"pa");
            assert_between(start.elapsed(), 45, 120);
        }
        bed.remove("substitute");
        bed.assert_healthy(Some((&mut client, &mut server)));
    }
}

#[test]
fn error_answers_in_the_servers_name_and_the_server_sees_nothing() {
    let cases: &[(&str, &[u8], &[u8])] = &[
        (
            "http",
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"HTTP/1.1 503 Service Unavailable\r\n",
        ),
        (
            "redis",
            b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n",
            b"-ERR injected by fault\r\n",
        ),
        (
            "memcache",
            b"get k\r\n",
            b"SERVER_ERROR injected by fault\r\n",
        ),
        (
            "smtp",
            b"EHLO me\r\n",
            b"451 4.3.0 Requested action aborted: injected by fault\r\n",
        ),
        (
            "mysql",
            b"\x02\x00\x00\x00\x03q",
            b"\x1a\x00\x00\x01\xff\x51\x04#HY000injected by fault",
        ),
    ];
    let bed = Bed::tcp();
    for (protocol, request, answer) in cases {
        for protocol in [protocol, "auto"] {
            let (mut client, mut server) = bed.pair();
            assert_echo(&mut client, &mut server);
            bed.add(
                StreamDirection::Downstream,
                "error",
                &json!({"protocol": protocol, "status": [503]}),
            );
            for _ in 0..2 {
                client.write_all(request).expect("write");
                assert_eq!(
                    read_exactly(&mut client, answer.len()),
                    *answer,
                    "{protocol}"
                );
                let rest = if request.starts_with(b"GET /") {
                    64 + 21
                } else {
                    0
                };
                drain(&mut client, rest);
            }
            assert_silent(&server, Duration::from_millis(10));
            bed.remove("error");
            bed.assert_healthy(Some((&mut client, &mut server)));
        }
    }
}

/// Reads what is there, at most so much.
fn drain(client: &mut TcpStream, at_most: usize) {
    if at_most > 0 {
        let mut rest = vec![0; 4096];
        let count = client.read(&mut rest).expect("read");
        assert!(count <= at_most * 4, "{count}");
    }
}

#[test]
fn transient_fails_the_first_requests_and_then_passes() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Downstream,
        "transient",
        &json!({"count": 2, "protocol": "redis"}),
    );
    let error = b"-ERR injected by fault\r\n";
    let (mut client, server) = bed.pair();
    client.write_all(b"PING\r\n").expect("write");
    assert_eq!(read_exactly(&mut client, error.len()), error);
    drop(server);
    let (mut client, mut server) = bed.pair();
    client.write_all(b"PING\r\nPING\r\n").expect("write");
    assert_eq!(read_exactly(&mut client, error.len()), error);
    assert_eq!(read_exactly(&mut server, 6), b"PING\r\n");
    bed.assert_healthy(Some((&mut client, &mut server)));
}

#[test]
fn transient_without_an_answer_resets() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Downstream,
        "transient",
        &json!({"count": 2, "protocol": "none"}),
    );
    for _ in 0..2 {
        let (mut client, mut server) = bed.pair();
        client.write_all(&[1, 2, 3, 250]).expect("write");
        assert_reset(&mut client);
        assert_eq!(read_to_end(&mut server), b"", "the server sees nothing");
    }
    bed.assert_healthy(None);
}

#[test]
fn encrypted_connections_pass_what_reads_requests() {
    let hello = b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03 and what follows";
    let bed = Bed::tcp();
    let protocols = ["http", "redis", "mysql", "memcache", "smtp", "auto"];
    for kind in ["error", "transient", "abort"] {
        for protocol in protocols {
            let attributes = json!({"protocol": protocol, "count": 1});
            bed.add(StreamDirection::Downstream, kind, &attributes);
            let (mut client, mut server) = bed.pair();
            client.write_all(hello).expect("write");
            assert_eq!(read_exactly(&mut server, hello.len()), hello);
            bed.remove(kind);
            assert_echo(&mut client, &mut server);
        }
    }
}

#[test]
fn abort_breaks_after_the_request_has_reached_the_server() {
    let bed = Bed::tcp();
    for mode in ["rst", "fin"] {
        bed.add(
            StreamDirection::Downstream,
            "abort",
            &json!({"protocol": "redis", "mode": mode}),
        );
        let (mut client, mut server) = bed.pair();
        client.write_all(b"*1\r\n$4\r\n").expect("write");
        assert_silent(&client, Duration::from_millis(30));
        client.write_all(b"PING\r\n").expect("write");
        assert_eq!(read_exactly(&mut server, 14), b"*1\r\n$4\r\nPING\r\n");
        if mode == "rst" {
            assert_reset(&mut client);
        } else {
            assert_eq!(read_to_end(&mut client), b"");
        }
        assert_eq!(read_to_end(&mut server), b"");
        bed.remove("abort");
        bed.assert_healthy(None);
    }
}

/// What each of the first connections gets: silence, slowness or nothing.
fn drawn_by_mix(seed: u64, count: usize) -> Vec<char> {
    let bed = Bed::seeded(seed);
    bed.add(
        StreamDirection::Downstream,
        "mix",
        &json!({"faults": [
            {"share": "20%", "type": "discard"},
            {"share": 0.3, "type": "corrupt_data", "attributes": {"mode": "zero"}},
        ]}),
    );
    let mut pairs: Vec<_> = (0..count).map(|_| bed.pair()).collect();
    for (_, server) in &mut pairs {
        server.write_all(b"x").expect("write");
        server.shutdown(Shutdown::Write).expect("shutdown");
    }
    let result = |client: &mut TcpStream| match &read_to_end(client)[..] {
        b"x" => '-',
        b"\0" => 'c',
        _ => 'd',
    };
    pairs.iter_mut().map(|(client, _)| result(client)).collect()
}

#[test]
fn a_mix_is_one_draw_per_connection_from_the_seed() {
    let first = drawn_by_mix(7, 200);
    assert_eq!(first, drawn_by_mix(7, 200));
    assert_ne!(first, drawn_by_mix(8, 200));
    let count = |wanted| first.iter().filter(|drawn| **drawn == wanted).count();
    assert!(
        (20..60).contains(&count('d')) && (40..80).contains(&count('c')),
        "{} {}",
        count('d'),
        count('c')
    );
}

#[test]
fn toxicity_is_per_connection_and_follows_an_update() {
    let bed = Bed::tcp();
    bed.add_with(StreamDirection::Upstream, "discard", &json!({}), 0.5);
    let mut pairs: Vec<_> = (0..60).map(|_| bed.pair()).collect();
    let hit = |pairs: &mut Vec<(TcpStream, TcpStream)>| -> usize {
        let mut hit = 0;
        for (client, _) in pairs.iter_mut() {
            client.write_all(b"x").expect("write");
        }
        for (_, server) in pairs.iter_mut() {
            server
                .set_read_timeout(Some(Duration::from_millis(20)))
                .expect("a timeout");
            hit += usize::from(server.read(&mut [0]).is_err());
        }
        hit
    };
    let half = hit(&mut pairs);
    assert!((15..45).contains(&half), "{half} of 60");
    bed.run(bed.relay.update_toxic("discard", None, Some(1.0)))
        .expect("a toxic");
    assert_eq!(hit(&mut pairs), 60);
    bed.run(bed.relay.update_toxic("discard", None, Some(0.0)))
        .expect("a toxic");
    assert_eq!(hit(&mut pairs), 0);
}

#[test]
fn changing_toxics_under_load_loses_no_byte() {
    let bed = Bed::tcp();
    let (mut client, server) = bed.pair();
    let sent = pattern(40_000_000);
    let to_send = sent.clone();
    let mut sender = server;
    let sending = thread::spawn(move || sender.write_all(&to_send).expect("write"));
    let reading = thread::spawn(move || read_to_end(&mut client));
    let kinds = [
        ("latency", json!({"latency": 3, "jitter": 3})),
        (
            "slicer",
            json!({"average_size": 5000, "size_variation": 1000}),
        ),
        ("coalesce", json!({"min_bytes": 100_000, "max_wait": 5})),
        ("bandwidth", json!({"rate": 500_000})),
        (
            "substitute",
            json!({"regex": "never to be found", "replacement": "x"}),
        ),
    ];
    while !sending.is_finished() {
        for (kind, attributes) in &kinds {
            bed.add(StreamDirection::Downstream, kind, attributes);
        }
        for (kind, _) in &kinds {
            bed.remove(kind);
        }
    }
    sending.join().expect("no panic");
    assert!(reading.join().expect("no panic") == sent, "bytes changed");
}

#[test]
fn a_toxic_acts_on_open_connections_within_5_ms() {
    let bed = Bed::tcp();
    let (mut client, mut server) = bed.pair();
    for _ in 0..20 {
        assert_echo(&mut client, &mut server);
        bed.add(StreamDirection::Upstream, "discard", &json!({}));
        client.write_all(b"x").expect("write");
        assert_silent(&server, Duration::from_millis(5));
        bed.remove("discard");
    }
    bed.add(
        StreamDirection::Upstream,
        "close_on_data",
        &json!({"mode": "rst"}),
    );
    let start = Instant::now();
    client.write_all(b"x").expect("write");
    assert_reset(&mut client);
    assert!(
        start.elapsed() < Duration::from_millis(5),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn urgent_data_keeps_its_place() {
    let bed = Bed::tcp();
    let (mut client, mut server) = bed.pair();
    socket2::SockRef::from(&server)
        .set_out_of_band_inline(true)
        .expect("an option");
    client.write_all(b"ab").expect("write");
    socket2::SockRef::from(&client)
        .send_out_of_band(b"!")
        .expect("send");
    client.write_all(b"cd").expect("write");
    assert_eq!(read_exactly(&mut server, 5), b"ab!cd");
}

#[test]
fn many_connections_leave_nothing_behind() {
    let bed = Bed::tcp();
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("procfs").count();
    let round = |bed: &Bed| {
        for index in 0..500 {
            let (mut client, mut server) = bed.pair();
            client.write_all(b"x").expect("write");
            read_exactly(&mut server, 1);
            if index % 3 == 0 {
                abort(client);
                assert_reset(&mut server);
            }
        }
        bed.run(bed.relay.wait_for(|open, _| open == 0));
    };
    round(&bed);
    let before = descriptors();
    for _ in 0..4 {
        round(&bed);
    }
    // Other tests of this process come and go: the trend is what counts.
    assert!(
        descriptors() < before + 300,
        "{before} descriptors became {}",
        descriptors()
    );
}

/// In which order the peers end their directions.
#[derive(Clone, Copy, Debug)]
enum Closing {
    /// Who has written closes, and the other answers by that.
    Writer,
    /// Who has written closes both directions at once.
    WriterGone,
    /// The reader has ended its direction before.
    ReaderFirst,
    /// Nobody does.
    Nobody,
}

/// How the relay comes to its end.
#[derive(Clone, Copy, Debug)]
enum TheEnd {
    /// With time enough for what is on its way.
    Patient,
    /// Without any.
    AtOnce,
    /// A command disables the proxy.
    Disabled,
    /// The toxic goes first, as at the end of a window.
    Window,
}

/// The faults that delay what they carry and must not lose a byte of it.
fn patient_faults() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("noop", json!({})),
        ("latency", json!({"latency": 60, "jitter": 20})),
        ("bandwidth", json!({"rate": 2000})),
        (
            "slicer",
            json!({"average_size": 900, "size_variation": 300, "delay": 100}),
        ),
        ("slow_close", json!({"delay": 60})),
        ("coalesce", json!({"min_bytes": 1_000_000, "max_wait": 60})),
        (
            "substitute",
            json!({"regex": "never matches \\d", "replacement": "x"}),
        ),
        ("corrupt_data", json!({"probability": 0})),
        ("limit_data", json!({"bytes": 100_000_000})),
    ]
}

/// Everything that comes until the end, and whether that is an orderly one.
fn read_until_the_end(mut reader: TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let is_orderly = reader.read_to_end(&mut bytes).is_ok();
    (bytes, is_orderly)
}

/// Sends `sent` through a fault while the relay comes to its end; what the reader saw.
fn end_meanwhile(
    (kind, attributes): &(&str, serde_json::Value),
    direction: StreamDirection,
    closing: Closing,
    end: TheEnd,
    sent: &[u8],
) -> (Vec<u8>, bool) {
    let bed = Bed::tcp();
    bed.add(direction, kind, attributes);
    let (client, server) = bed.pair();
    let (mut writer, reader) = match direction {
        StreamDirection::Upstream => (client, server),
        StreamDirection::Downstream => (server, client),
    };
    if matches!(closing, Closing::ReaderFirst) {
        reader.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(&mut writer), b"");
    }
    let reading = thread::spawn(move || read_until_the_end(reader));
    let written = writer.write_all(sent);
    written.expect("the relay and the kernel take it");
    let kept = match closing {
        Closing::Writer => {
            writer.shutdown(Shutdown::Write).expect("shutdown");
            Some(writer)
        }
        Closing::WriterGone | Closing::ReaderFirst => None,
        Closing::Nobody => Some(writer),
    };
    let drain = |time: Duration| bed.run(bed.relay.drain(Drain::within(time)));
    match end {
        TheEnd::Patient => drop(drain(PATIENCE)),
        TheEnd::AtOnce => drop(drain(Duration::ZERO)),
        TheEnd::Disabled => bed.run(bed.relay.set_enabled(false)).expect("it stops"),
        TheEnd::Window => {
            bed.remove(kind);
            drain(PATIENCE);
        }
    }
    drop(kept);
    reading.join().expect("no panic")
}

#[test]
fn no_end_of_the_relay_loses_a_byte_in_silence() {
    let sent = pattern(60_000);
    for fault in patient_faults() {
        for direction in StreamDirection::ALL {
            for closing in [
                Closing::Writer,
                Closing::WriterGone,
                Closing::ReaderFirst,
                Closing::Nobody,
            ] {
                for end in [
                    TheEnd::Patient,
                    TheEnd::AtOnce,
                    TheEnd::Disabled,
                    TheEnd::Window,
                ] {
                    let (got, is_orderly) = end_meanwhile(&fault, direction, closing, end, &sent);
                    let case = format!("{} {direction:?} {closing:?} {end:?}", fault.0);
                    assert!(sent.starts_with(&got), "{case}: other bytes");
                    assert!(
                        !is_orderly || got.len() == sent.len(),
                        "{case}: an orderly end after {} bytes of {}",
                        got.len(),
                        sent.len()
                    );
                    let is_patient = matches!(end, TheEnd::Patient | TheEnd::Window);
                    assert!(
                        !is_patient || got.len() == sent.len(),
                        "{case}: {} bytes of {} arrived",
                        got.len(),
                        sent.len()
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_lost_at_the_end_is_counted() {
    let bed = Bed::tcp();
    bed.add(
        StreamDirection::Upstream,
        "latency",
        &json!({"latency": 60_000}),
    );
    let (mut client, mut server) = bed.pair();
    client.write_all(&pattern(5000)).expect("write");
    drop(client);
    let (mut idle, mut idle_server) = bed.pair();
    let cut = bed.run(bed.relay.drain(Drain::within(Duration::from_millis(500))));
    assert_eq!(
        cut,
        Cut {
            connections: 2,
            bytes: 5000
        }
    );
    for end in [&mut server, &mut idle, &mut idle_server] {
        assert_reset(end);
    }
}

/// What Python with OpenSSL sends for `api.example.com`.
const CLIENT_HELLO: &[u8] = include_bytes!("../clients/hello.bin");

/// A bed whose server's answers are changed for clients that ask for `*.example.com`, by TLS or by HTTP.
fn bed_for_names() -> Bed {
    let bed = Bed::tcp();
    let pattern = || NamePattern::of_name("*.example.com");
    let sni = Asked {
        sni: pattern(),
        ..Asked::default()
    };
    let change = json!({"regex": "the answer", "replacement": "a fault"});
    bed.add_filtered("substitute", &change, sni);
    let host = Asked {
        host: pattern(),
        ..Asked::default()
    };
    bed.add_filtered("corrupt_data", &json!({"probability": 1}), host);
    bed
}

/// What the client gets when it has sent this in pieces and the server, which gets exactly that, answers.
fn answer(bed: &Bed, sent: &[u8], piece: usize) -> Vec<u8> {
    let (mut client, mut server) = bed.pair();
    let mut sender = client.try_clone().expect("clone");
    let pieces: Vec<Vec<u8>> = sent.chunks(piece).map(<[u8]>::to_vec).collect();
    let sending = thread::spawn(move || {
        for piece in pieces {
            sender.write_all(&piece).expect("write");
            thread::yield_now();
        }
    });
    assert!(read_exactly(&mut server, sent.len()) == sent, "other bytes");
    sending.join().expect("no panic");
    server.write_all(b"the answer").expect("write");
    server.shutdown(Shutdown::Write).expect("shutdown");
    read_to_end(&mut client)
}

#[test]
fn a_greeting_in_pieces_selects_its_connection_and_arrives_whole() {
    let bed = bed_for_names();
    let request = |host: &str, size: usize| {
        let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n");
        [head.into_bytes(), pattern(size)].concat()
    };
    for piece in [1, 7, 300, 100_000] {
        assert_eq!(answer(&bed, CLIENT_HELLO, piece), b"a fault", "{piece}");
        let corrupted = answer(&bed, &request("www.example.com:80", 10), piece);
        assert_ne!(corrupted, b"the answer", "{piece}");
        let other = answer(&bed, &request("example.org", 10), piece);
        assert_eq!(other, b"the answer", "{piece}");
    }
    // More follows at once than is peeked at.
    let long = [CLIENT_HELLO, &pattern(1_000_000)].concat();
    assert_eq!(answer(&bed, &long, 65_536), b"a fault");
    let other = request("example.org", 1_000_000);
    assert_eq!(answer(&bed, &other, 65_536), b"the answer");
    // Other protocols, and a head that is too long.
    let head = format!(
        "GET /{} HTTP/1.1\r\nHost: a.example.com\r\n\r\n",
        "x".repeat(20_000)
    );
    for other in [
        &b"\x16\x03\x01\x00\x02\x02\x00"[..],
        b"\0\0\0\x08\x04\xd2\x16/",
        b"EHLO me",
        head.as_bytes(),
    ] {
        assert_eq!(answer(&bed, other, 4096), b"the answer");
    }
}

#[test]
fn a_kept_connection_is_the_first_requests() {
    let bed = bed_for_names();
    for (first, second, is_selected) in [
        ("a.example.com", "example.org", true),
        ("example.org", "a.example.com", false),
    ] {
        let (mut client, mut server) = bed.pair();
        for host in [first, second] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            client.write_all(request.as_bytes()).expect("write");
            let got = read_exactly(&mut server, request.len());
            assert_eq!(got, request.as_bytes());
            server.write_all(b"the answer").expect("write");
            let is_changed = read_exactly(&mut client, 10) != b"the answer";
            assert_eq!(is_changed, is_selected, "{first}, then {second}");
        }
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let bed = bed_for_names();
    // The client says nothing, or what could become a greeting.
    for begun in [&b""[..], b"\x16", b"GET / HT"] {
        let (mut client, mut server) = bed.pair();
        client.write_all(begun).expect("write");
        server.write_all(b"the answer").expect("write");
        assert_eq!(read_exactly(&mut client, 10), b"the answer");
        assert_eq!(read_exactly(&mut server, begun.len()), begun);
        server.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(&mut client), b"");
        client.write_all(b"bye").expect("write");
        drop(client);
        assert_eq!(read_to_end(&mut server), b"bye");
    }
}

#[test]
fn a_greeting_that_does_not_end_is_passed_on() {
    let bed = bed_for_names();
    let begun = &CLIENT_HELLO[..100];
    // The client ends, or resets, or waits.
    let (mut client, mut server) = bed.pair();
    client.write_all(begun).expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(read_to_end(&mut server), begun);
    for begun in [begun, b""] {
        let (mut client, mut server) = bed.pair();
        client.write_all(begun).expect("write");
        abort(client);
        assert_reset(&mut server);
    }
    let (mut client, mut server) = bed.pair();
    client.write_all(begun).expect("write");
    assert_eq!(read_exactly(&mut server, begun.len()), begun);
    assert_echo(&mut client, &mut server);
}

#[test]
fn other_toxics_act_while_a_client_is_silent() {
    let bed = bed_for_names();
    bed.add(
        StreamDirection::Upstream,
        "timeout",
        &json!({"timeout": 50}),
    );
    let (mut client, mut server) = bed.pair();
    assert_eq!(read_to_end(&mut client), b"");
    assert_eq!(read_to_end(&mut server), b"");
}
