//! The kernel programs, one packet at a time: what they return, what they make of the packet, what they
//! count; and the same decisions as the host takes.

mod kernel;
mod model;
mod packets;
use aya::programs::ProgramInfo;
use fault_common::abi::{Counter, DATAGRAMS, LEARNED_MAX, NAMES_MAX, action, rule_uid};
use fault_user::sys::net::clsact::TcHook;

use crate::support::dns::{RCODE, TYPE, alias, answer, query, query_for, read_response};
use kernel::{Kernel, NEXT, SHOT, VANISHED, XDP_DROP, XDP_PASS, compiled};
use model::At;
use packets::{Recipe, checksum, ethernet, is_sound};

const SYN: u8 = 2;
const ACK: u8 = 16;
const RST: u8 = 4;
const FIN: u8 = 1;

/// One rule, one packet, and what must come of it at egress of loopback.
fn expect(
    kernel: &mut Kernel,
    rule: &str,
    packet: &Recipe,
    code: u32,
    done: Option<u8>,
) -> Vec<u8> {
    kernel.install(&[rule]);
    kernel.take_events();
    let before = kernel.injector.counters().unwrap();
    let frame = packet.frame();
    let ran = kernel.out(&frame);
    assert_eq!(ran.code, code, "`{rule}` on {packet:?}");
    assert_eq!(kernel.changed_since(&before), [], "`{rule}` on {packet:?}");
    let events: Vec<u8> = kernel
        .take_events()
        .iter()
        .map(|event| event.action)
        .collect();
    assert_eq!(
        events,
        done.into_iter().collect::<Vec<_>>(),
        "`{rule}` on {packet:?}"
    );
    let (stats, connections) = kernel.injector.stats(0).unwrap();
    let seen = (stats.seen_packets, stats.seen_bytes, connections);
    assert_eq!(seen, (1, frame.len() as u64, 1), "`{rule}` on {packet:?}");
    assert_eq!(
        stats.hit_packets,
        u64::from(done.is_some()),
        "`{rule}` on {packet:?}"
    );
    ran.frame
}

/// The recipes of a connection that no other test packet has used, so that counts begin anew.
fn fresh(recipe: Recipe) -> Recipe {
    use std::sync::atomic::{AtomicU16, Ordering};
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    Recipe {
        source_port: PORT.fetch_add(1, Ordering::Relaxed),
        ..recipe
    }
}

#[test]
fn silent_faults_take_the_packets_that_they_pick() {
    let mut kernel = Kernel::new(64, 64);
    let drop = Some(action::DROP);
    for v6 in [false, true] {
        let make = |recipe: Recipe| fresh(if v6 { recipe.v6() } else { recipe });
        let data = || make(Recipe::tcp(ACK, b"data"));
        for (rule, packet, code, done) in [
            ("tcp:5432 loss=100%", data(), VANISHED, drop),
            ("tcp:5432 loss=0%", data(), NEXT, None),
            (
                "tcp:5432 blackhole",
                make(Recipe::tcp(SYN, b"")),
                VANISHED,
                drop,
            ),
            ("5432 blackhole", make(Recipe::udp(b"x")), VANISHED, drop),
            ("tcp:5432 drop match=data", data(), VANISHED, drop),
            (
                "tcp:5432 drop match=data",
                make(Recipe::tcp(ACK, b"")),
                NEXT,
                None,
            ),
            (
                "tcp:5432 drop match=ack",
                make(Recipe::tcp(ACK, b"")),
                VANISHED,
                drop,
            ),
            ("tcp:5432 drop match=ack", data(), NEXT, None),
            (
                "tcp:5432 drop match=syn",
                make(Recipe::tcp(SYN, b"")),
                VANISHED,
                drop,
            ),
            (
                "tcp:5432 drop match=fin",
                make(Recipe::tcp(FIN | ACK, b"")),
                VANISHED,
                drop,
            ),
            (
                "tcp:5432 drop match=rst",
                make(Recipe::tcp(RST, b"")),
                VANISHED,
                drop,
            ),
            (
                "tcp:5432 drop size=1..60",
                data(),
                if v6 { NEXT } else { VANISHED },
                if v6 { None } else { drop },
            ),
            ("tcp:5432 drop size=1000..", data(), NEXT, None),
            ("tcp:5432 drop first=1", data(), VANISHED, drop),
            ("tcp:5432 drop nth=2", data(), NEXT, None),
            ("tcp:5432 drop conn=2..3", data(), NEXT, None),
            ("tcp:5432 drop p=0%", data(), NEXT, None),
            ("tcp:5432 drop at=1h", data(), NEXT, None),
            (
                "tcp:5432 corrupt=100%,link",
                data(),
                VANISHED,
                Some(action::DROP_CHECKSUM),
            ),
            (
                "tcp:5432 mtu=68",
                make(Recipe::tcp(ACK, &[0; 200])),
                VANISHED,
                drop,
            ),
            (
                "tcp:5432 mtu=1500",
                make(Recipe::tcp(ACK, &[0; 200])),
                NEXT,
                None,
            ),
            (
                "icmp blackhole",
                make(Recipe::ping(b"echo")),
                VANISHED,
                drop,
            ),
            ("tcp:5432 mix 100%:drop", data(), VANISHED, drop),
            ("tcp:5432 mix 0%:drop", data(), NEXT, None),
        ] {
            let frame = expect(&mut kernel, rule, &packet, code, done);
            assert_eq!(frame, packet.frame(), "`{rule}` changed the packet");
        }
    }
}

#[test]
fn other_ports_hosts_and_directions_are_left_alone() {
    let mut kernel = Kernel::new(64, 64);
    for rule in [
        "tcp:5433 blackhole",
        "udp:5432 blackhole",
        "icmp blackhole",
        "tcp:5431,5433-6000 blackhole",
        "10.1.0.1:5432 blackhole",
        "[fd00::2]:5432 blackhole",
        "tcp:5432 blackhole dir=to-client",
    ] {
        kernel.install(&[rule]);
        let packet = fresh(Recipe::tcp(ACK, b"data"));
        kernel.expect_pass(rule, &packet.frame(), None);
    }
    for rule in [
        "10.1.0.0/24:5432 blackhole",
        "tcp:5000-6000 blackhole dir=to-server",
        "* blackhole",
    ] {
        kernel.install(&[rule]);
        let packet = fresh(Recipe::tcp(ACK, b"data"));
        assert_eq!(kernel.out(&packet.frame()).code, VANISHED, "{rule}");
    }
    // The answer comes from the service's port and host.
    kernel.install(&["10.1.0.2:5432 blackhole dir=to-client"]);
    let answer = fresh(Recipe::tcp(ACK, b"data")).reversed();
    assert_eq!(kernel.out(&answer.frame()).code, VANISHED);
}

#[test]
fn an_rst_refuses_and_resets() {
    let mut kernel = Kernel::new(64, 64);
    for v6 in [false, true] {
        let make = |recipe: Recipe| fresh(if v6 { recipe.v6() } else { recipe });
        let syn = make(Recipe::tcp(SYN, b""));
        let answer = expect(
            &mut kernel,
            "tcp:5432 reject",
            &syn,
            NEXT,
            Some(action::REJECT_RST),
        );
        let expected = Recipe {
            flags: RST | ACK,
            sequence: 0,
            acknowledgement: 1001,
            ..syn.clone().reversed()
        };
        assert_rst(&answer, &expected);
        let data = make(Recipe::tcp(ACK, b"0123456789"));
        let onward = expect(
            &mut kernel,
            "tcp:5432 reset",
            &data,
            NEXT,
            Some(action::RESET),
        );
        let expected = Recipe {
            flags: RST | ACK,
            payload: Vec::new(),
            ..data.clone()
        };
        assert_rst(&onward, &expected);
        // What is being opened is not live, and an RST is not answered.
        expect(
            &mut kernel,
            "tcp:5432 reset",
            &make(Recipe::tcp(SYN, b"")),
            NEXT,
            None,
        );
        expect(
            &mut kernel,
            "tcp:5432 reset",
            &make(Recipe::tcp(RST, b"")),
            NEXT,
            None,
        );
        let down = make(Recipe::tcp(SYN, b""));
        expect(
            &mut kernel,
            "tcp:5432 down",
            &down,
            NEXT,
            Some(action::REJECT_RST),
        );
        let open = make(Recipe::tcp(ACK, b"data"));
        expect(
            &mut kernel,
            "tcp:5432 down",
            &open,
            NEXT,
            Some(action::RESET),
        );
    }
}

/// Compares all but the window and what comes of identifiers.
fn assert_rst(frame: &[u8], expected: &Recipe) {
    let ip = &frame[14..];
    let expected = expected.ip(&[]);
    assert!(is_sound(ip), "{ip:02x?}");
    assert_eq!(ip.len(), expected.len());
    let header = expected.len() - 20;
    let addresses = if ip[0] >> 4 == 4 { 12..20 } else { 8..40 };
    assert_eq!(ip[addresses.clone()], expected[addresses]);
    assert_eq!(
        ip[header..header + 14],
        expected[header..header + 14],
        "ports, numbers, flags"
    );
}

#[test]
fn an_icmp_error_refuses() {
    let mut kernel = Kernel::new(64, 64);
    for (rule, recipe, v4, v6) in [
        ("udp:5432 reject", Recipe::udp(b"question"), (3, 3), (1, 4)),
        (
            "udp:5432 reject=icmp-host",
            Recipe::udp(b"question"),
            (3, 1),
            (1, 3),
        ),
        (
            "udp:5432 reject=icmp-admin",
            Recipe::udp(b"question"),
            (3, 13),
            (1, 1),
        ),
        (
            "tcp:5432 reject=icmp-port",
            Recipe::tcp(SYN, b""),
            (3, 3),
            (1, 4),
        ),
        ("icmp reject", Recipe::ping(b"echo"), (3, 1), (1, 3)),
        ("udp:5432 down", Recipe::udp(b"question"), (3, 3), (1, 4)),
        (
            "tcp:5432 mtu=100,icmp",
            Recipe::tcp(ACK, &[1; 300]),
            (3, 4),
            (2, 0),
        ),
    ] {
        for (packet, (kind, code)) in [
            (fresh(recipe.clone()), v4),
            (fresh(recipe.clone().v6()), v6),
        ] {
            let frame = expect(&mut kernel, rule, &packet, NEXT, Some(action::REJECT_ICMP));
            let ip = &frame[14..];
            let original = packet.ip(&[]);
            let is_v6 = ip[0] >> 4 == 6;
            let room = if is_v6 { 40 } else { 20 };
            assert!(is_sound(ip), "`{rule}`: {ip:02x?}");
            assert_eq!((ip[room], ip[room + 1]), (kind, code), "`{rule}`");
            // From where the packet was going to where it came from.
            let back = packet.clone().reversed().ip(&[]);
            let addresses = if is_v6 { 8..40 } else { 12..20 };
            assert_eq!(ip[addresses.clone()], back[addresses], "`{rule}`");
            assert!(
                original.starts_with(&ip[room + 8..]),
                "`{rule}` quotes something else"
            );
            assert!(
                ip.len() - room - 8 >= room + 8,
                "`{rule}` quotes too little"
            );
            if rule.contains("mtu") {
                let at = if is_v6 { 44..48 } else { 26..28 };
                assert_eq!(
                    ip[at.clone()]
                        .iter()
                        .fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)),
                    100
                );
            }
        }
    }
}

#[test]
fn corruption_flips_as_many_bits_as_asked_for_and_mends_the_checksum() {
    let mut kernel = Kernel::new(64, 64);
    for recipe in [
        Recipe::tcp(ACK, b"some bytes"),
        Recipe::udp(b"odd"),
        Recipe::ping(b"echo"),
    ] {
        for packet in [fresh(recipe.clone()), fresh(recipe.clone().v6())] {
            for bits in [1_u32, 3, 20] {
                let target = if recipe.flags == 8 { "icmp" } else { "5432" };
                let rule = format!("{target} corrupt=100%,bits:{bits}");
                let frame = expect(
                    &mut kernel,
                    &rule,
                    &fresh(packet.clone()),
                    NEXT,
                    Some(action::CORRUPT),
                );
                assert!(is_sound(&frame[14..]), "`{rule}`: {frame:02x?}");
                let original = packet.frame();
                let payload = original.len() - packet.payload.len();
                let flipped: u32 = frame[payload..]
                    .iter()
                    .zip(&original[payload..])
                    .map(|(a, b)| (a ^ b).count_ones())
                    .sum();
                assert_eq!(flipped, bits, "`{rule}`");
                assert_eq!(frame.len(), original.len());
            }
        }
    }
    // Nothing to corrupt.
    expect(
        &mut kernel,
        "tcp:5432 corrupt=100%",
        &fresh(Recipe::tcp(SYN, b"")),
        NEXT,
        None,
    );
}

#[test]
fn ecn_marks_only_what_can_carry_it() {
    let mut kernel = Kernel::new(64, 64);
    for (service, marked) in [(0, None), (1, Some(3)), (2, Some(3)), (3, None)] {
        for v6 in [false, true] {
            let recipe = Recipe {
                service,
                ..Recipe::tcp(ACK, b"data")
            };
            let packet = fresh(if v6 { recipe.v6() } else { recipe });
            let done = marked.map(|_| action::ECN);
            let frame = expect(&mut kernel, "tcp:5432 ecn=100%", &packet, NEXT, done);
            let expected = Recipe {
                service: marked.unwrap_or(service),
                ..packet
            };
            assert_eq!(frame, expected.frame());
        }
    }
}

#[test]
fn a_duplicate_is_sent_and_the_packet_goes_on() {
    let mut kernel = Kernel::new(64, 64);
    let packet = fresh(Recipe::udp(b"twice"));
    let frame = expect(
        &mut kernel,
        "udp:5432 duplicate=100%",
        &packet,
        NEXT,
        Some(action::DUPLICATE),
    );
    assert_eq!(frame, packet.frame());
    // Nobody is attached in this namespace: the copy is in loopback's counters.
    let sent = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let loopback = sent
        .lines()
        .find(|line| line.trim_start().starts_with("lo:"))
        .unwrap();
    assert_eq!(loopback.split_whitespace().nth(10), Some("1"), "{loopback}");
}

#[test]
fn ingress_drops_and_redirects() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["udp:5432 blackhole"]);
    let ran = kernel.run(TcHook::Ingress, false, &fresh(Recipe::udp(b"x")).frame());
    assert_eq!(ran.code, SHOT);
    kernel.install(&["tcp:5432 reject"]);
    // Sent back through the device: a redirect.
    let ran = kernel.run(
        TcHook::Ingress,
        false,
        &fresh(Recipe::tcp(SYN, b"")).frame(),
    );
    assert_eq!(ran.code, VANISHED);
    assert_eq!(
        ran.frame[..12],
        [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2],
        "link addresses change places"
    );
    let ran = kernel.run(TcHook::Egress, false, &fresh(Recipe::tcp(SYN, b"")).frame());
    assert_eq!(ran.code, VANISHED);
}

#[test]
fn what_cannot_be_read_passes_and_is_counted() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["tcp:5432 blackhole", "udp:5432 blackhole"]);
    let sound = Recipe::tcp(ACK, b"data").frame();
    let v6 = Recipe::tcp(ACK, b"data").v6().frame();
    let edit = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let malformed = Some(Counter::Malformed);
    for (what, frame, counter) in [
        ("ARP", edit(&sound, 12, &[8, 6]), Some(Counter::NotIp)),
        (
            "IPv4 header of 16 bytes",
            edit(&sound, 14, &[0x44]),
            malformed,
        ),
        ("IPv4 of version 5", edit(&sound, 14, &[0x55]), malformed),
        (
            "IPv4 longer than the frame",
            edit(&sound, 16, &[1, 0]),
            malformed,
        ),
        (
            "TCP header of 16 bytes",
            edit(&sound, 46, &[0x40]),
            malformed,
        ),
        (
            "TCP header longer than the packet",
            edit(&sound, 46, &[0xf0]),
            malformed,
        ),
        ("IPv6 of version 4", edit(&v6, 14, &[0x40]), malformed),
        (
            "IPv6 longer than the frame",
            edit(&v6, 18, &[1, 0]),
            malformed,
        ),
        ("cut within the TCP header", sound[..44].to_vec(), malformed),
    ] {
        kernel.expect_pass(what, &frame, counter);
    }
    let later = edit(&sound, 20, &[0, 100]);
    kernel.expect_pass("a later fragment", &later, Some(Counter::Fragment));
    let solicitation = Recipe {
        protocol: 58,
        flags: 135,
        ..Recipe::ping(b"0123456789abcdef").v6()
    };
    kernel.expect_pass(
        "neighbour solicitation",
        &solicitation.frame(),
        Some(Counter::Discovery),
    );
}

/// What becomes of each frame, in letters: lost, kept.
fn fates(kernel: &mut Kernel, frames: &[Vec<u8>]) -> String {
    let fate = |frame: &Vec<u8>| match kernel.out(frame).code {
        NEXT => '.',
        _ => 'x',
    };
    frames.iter().map(fate).collect()
}

/// The fragments of datagrams, of which no other test packet has the identification.
fn datagrams(count: u16, v6: bool) -> Vec<Vec<Vec<u8>>> {
    let recipe = fresh(Recipe::udp(&[0x5a; 80]));
    let recipe = if v6 { recipe.v6() } else { recipe };
    let first = recipe.source_port;
    let cut = |n| recipe.fragments(first.wrapping_mul(31).wrapping_add(n), 32);
    (0..count).map(cut).collect()
}

#[test]
fn later_fragments_follow_their_first() {
    let mut kernel = Kernel::new(64, 64);
    for v6 in [false, true] {
        for (rule, expected) in [
            ("udp:5432 blackhole", "xxxxxxxxx"),
            ("udp:5433 blackhole", "........."),
            ("udp:5432 blackhole dir=to-client", "........."),
            ("10.1.0.0/16:5433 blackhole", "........."),
            ("* blackhole", "xxxxxxxxx"),
            ("udp:5432 drop nth=2", "...xxx..."),
            ("udp:5432 drop first=2 count=rule", "xxxxxx..."),
            ("udp:5432 drop size=50..", "xxxxxxxxx"),
            ("* drop nth=2", "...xxx..."),
            ("udp:5432 loss=0%", "........."),
        ] {
            kernel.install(&[rule]);
            let before = kernel.injector.counters().unwrap();
            let frames = datagrams(3, v6).concat();
            assert_eq!(frames.len(), 9, "8 + 80 bytes in parts of 32");
            assert_eq!(fates(&mut kernel, &frames), expected, "`{rule}`");
            assert_eq!(kernel.changed_since(&before), [], "`{rule}`");
        }
        // Datagrams whose fragments come by turns.
        kernel.install(&["udp:5432 drop nth=2"]);
        let three = datagrams(3, v6);
        let turns: Vec<_> = (0..3)
            .flat_map(|part| three.iter().map(move |one| one[part].clone()))
            .collect();
        assert_eq!(fates(&mut kernel, &turns), ".x..x..x.");
    }
}

#[test]
fn a_refusal_answers_the_first_fragment_and_takes_the_others() {
    let mut kernel = Kernel::new(64, 64);
    for v6 in [false, true] {
        kernel.install(&["udp:5432 reject"]);
        let frames = datagrams(1, v6).concat();
        let answer = kernel.out(&frames[0]);
        assert_eq!(answer.code, NEXT);
        assert_ne!(answer.frame, frames[0], "an ICMP error");
        assert_eq!(fates(&mut kernel, &frames[1..]), "xx");
    }
}

#[test]
fn corruption_shows_in_the_fragment_with_the_checksum() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["udp:5432 corrupt=100%"]);
    for v6 in [false, true] {
        let frames = datagrams(1, v6).concat();
        let ran: Vec<_> = frames.iter().map(|frame| kernel.out(frame).frame).collect();
        assert_ne!(ran[0], frames[0]);
        assert_eq!(ran[1..], frames[1..]);
        // Together they are a datagram whose checksum is right.
        let header = if v6 { 14 + 48 } else { 14 + 20 };
        let transport: Vec<u8> = ran
            .iter()
            .flat_map(|frame| frame[header..].to_vec())
            .collect();
        let mut whole = fresh(Recipe::udp(&[0x5a; 80])).ip(&[]);
        if v6 {
            whole = fresh(Recipe::udp(&[0x5a; 80])).v6().ip(&[]);
        }
        let start = whole.len() - transport.len();
        whole[start..].copy_from_slice(&transport);
        assert!(is_sound(&whole), "{whole:02x?}");
    }
}

#[test]
fn a_wire_loses_each_fragment_by_itself() {
    const DATAGRAMS: u16 = 1000;
    let mut kernel = Kernel::new(64, 64);
    for rule in ["udp:5432 loss=10%", "* loss=10%"] {
        kernel.install(&[rule]);
        let whole = |frames: &Vec<Vec<u8>>| fates(&mut kernel, frames) == "...";
        let arrived = datagrams(DATAGRAMS, false)
            .iter()
            .map(whole)
            .filter(|is| *is)
            .count();
        // 0.9 to the third, of 1,000, and four standard deviations; the seed is fixed.
        assert!(
            (729 - 56..729 + 56).contains(&arrived),
            "`{rule}`: {arrived}"
        );
    }
}

#[test]
fn what_comes_before_its_first_fragment_passes_and_is_counted() {
    let mut kernel = Kernel::new(64, 64);
    for v6 in [false, true] {
        kernel.install(&["udp:5432 ecn=100%", "udp:5432 blackhole"]);
        let before = kernel.injector.counters().unwrap();
        let mut frames = datagrams(1, v6).concat();
        frames.rotate_left(1);
        frames.push(frames[0].clone());
        assert_eq!(fates(&mut kernel, &frames), "..xx");
        assert_eq!(
            kernel.changed_since(&before),
            [(Counter::Fragment as u32, 2)]
        );
        // The rates of the first one's rules are told of all bytes.
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let (stats, _) = kernel.injector.stats(1).unwrap();
        assert_eq!(stats.seen_bytes, bytes as u64);
    }
}

#[test]
fn more_datagrams_than_the_table_holds_are_counted() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["udp:5432 blackhole"]);
    let before = kernel.injector.counters().unwrap();
    let all = datagrams(2 * u16::try_from(DATAGRAMS).unwrap(), false);
    let firsts: Vec<_> = all.iter().map(|frames| frames[0].clone()).collect();
    assert!(!fates(&mut kernel, &firsts).contains('.'));
    let second: Vec<_> = all.iter().map(|frames| frames[1].clone()).collect();
    let passed = fates(&mut kernel, &second).matches('.').count();
    assert!(passed >= all.len() / 4, "{passed} were forgotten");
    assert_eq!(
        kernel.changed_since(&before),
        [(Counter::Fragment as u32, passed as u64)]
    );
}

#[test]
fn options_extensions_tags_padding_and_fragments_are_read() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["tcp:5432 blackhole"]);
    let packet = || fresh(Recipe::tcp(ACK, b"data"));
    // Four no-operations.
    let options = ethernet(&packet().ip(&[1, 1, 1, 1]));
    assert_eq!(kernel.out(&options).code, VANISHED, "IPv4 options");
    let mut padded = fresh(Recipe::tcp(SYN, b"")).frame();
    padded.resize(60, 0);
    assert_eq!(kernel.out(&padded).code, VANISHED, "Ethernet padding");
    // Hop-by-hop options, destination options and a first fragment in front of TCP.
    let mut extended = packet().v6().ip(&[]);
    let transport = extended.split_off(40);
    extended[6] = 0;
    extended.extend([60, 0, 1, 4, 0, 0, 0, 0]);
    extended.extend([44, 0, 1, 4, 0, 0, 0, 0]);
    extended.extend([6, 0, 0, 1, 0, 0, 0, 9]);
    extended.extend(&transport);
    let length = u16::try_from(extended.len() - 40).unwrap();
    extended[4..6].copy_from_slice(&length.to_be_bytes());
    assert_eq!(
        kernel.out(&ethernet(&extended)).code,
        VANISHED,
        "IPv6 extension headers"
    );
    // A tag that the device has not taken off; the test run takes the outer one off itself.
    let frame = packet().frame();
    let mut tagged = frame[..12].to_vec();
    tagged.extend([0x81, 0, 0, 5]);
    tagged.extend(&frame[12..]);
    assert_eq!(kernel.out(&tagged).code, VANISHED, "a VLAN tag");
    tagged.splice(12..12, [0x88, 0xa8, 0, 6]);
    assert_eq!(kernel.out(&tagged).code, VANISHED, "two VLAN tags");
}

#[test]
fn rules_apply_in_order_and_the_first_end_is_the_last() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&[
        "tcp:5432 ecn=100%",
        "tcp:5432 corrupt=100%",
        "tcp:5432 blackhole",
        "tcp:5432 reject",
    ]);
    let packet = fresh(Recipe {
        service: 1,
        ..Recipe::tcp(ACK, b"data")
    });
    assert_eq!(kernel.out(&packet.frame()).code, VANISHED);
    let actions: Vec<u8> = kernel
        .take_events()
        .iter()
        .map(|event| event.action)
        .collect();
    assert_eq!(actions, [action::ECN, action::CORRUPT, action::DROP]);
    kernel.install(&["tcp:5432 corrupt=100%", "tcp:5432 ecn=100%"]);
    let ran = kernel.out(&packet.frame());
    assert_eq!(ran.code, NEXT);
    assert!(is_sound(&ran.frame[14..]));
    assert_eq!(ran.frame[15] & 3, 3);
    assert_ne!(ran.frame[54..], packet.frame()[54..]);
}

#[test]
fn counts_are_per_connection_and_direction_or_per_rule() {
    let mut kernel = Kernel::new(64, 64);
    let pick = |kernel: &mut Kernel, rule: &str, recipes: &[&Recipe]| -> String {
        kernel.install(&[rule]);
        let codes = recipes
            .iter()
            .map(|recipe| kernel.out(&recipe.frame()).code);
        codes
            .map(|code| if code == NEXT { '.' } else { 'x' })
            .collect()
    };
    let flows = || {
        let a = fresh(Recipe::tcp(ACK, b"data"));
        (a.clone(), a.reversed(), fresh(Recipe::tcp(ACK, b"data")))
    };
    for (rule, expected) in [
        ("tcp:5432 drop first=2", "xxxxxx.."),
        ("tcp:5432 drop nth=2", "..xx.x.."),
        ("tcp:5432 drop after=2", "......xx"),
        ("tcp:5432 drop range=2..3", "..xx.xxx"),
        ("tcp:5432 drop every=3", "......xx"),
        ("tcp:5432 drop nth=2 dir=to-server", "..x..x.."),
        ("tcp:5432 drop range=3..4 count=rule", "..xx...."),
        ("tcp:5432 drop conn=2", "....xx.."),
        ("tcp:5432 drop after=1 first=2", "..xx.x.."),
        ("tcp:5432 drop every=2 range=2..9", "..xx.x.."),
        ("tcp:5432 drop nth=2 count=rule conn=2", ".....x.."),
    ] {
        let (a, answer, b) = flows();
        let sequence = [&a, &answer, &a, &answer, &b, &b, &a, &answer];
        assert_eq!(pick(&mut kernel, rule, &sequence), expected, "{rule}");
    }
    // Ports that are used again, with another initial sequence number, are a new connection.
    let syn = fresh(Recipe::tcp(SYN, b""));
    let again = Recipe {
        sequence: 77,
        ..syn.clone()
    };
    assert_eq!(
        pick(
            &mut kernel,
            "tcp:5432 drop first=1",
            &[&syn, &syn, &again, &again]
        ),
        "x.x."
    );
}

#[test]
fn a_reset_may_wait_for_bytes() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["tcp:5432 reset=10 dir=to-server"]);
    let packet = fresh(Recipe::tcp(ACK, b"data"));
    let mut resets = 0;
    for sent in [4, 8, 12] {
        kernel.out(&packet.clone().reversed().frame());
        kernel.out(&packet.frame());
        for event in kernel.take_events() {
            assert_eq!((event.action, sent), (action::RESET, 12));
            resets += 1;
        }
    }
    assert_eq!(resets, 1);
}

/// Rules that each drop packets of one size, the first time that they see it.
#[test]
fn every_rule_that_matches_a_packet_acts() {
    let mut kernel = Kernel::new(128, 1024);
    for count in [8, 9, 20, 70] {
        let rules: Vec<String> = (0..count)
            .map(|n| format!("udp:5432 drop size={0}..{0} first=1", 100 + n))
            .collect();
        let texts: Vec<&str> = rules.iter().map(String::as_str).collect();
        kernel.install(&texts);
        let connection = fresh(Recipe::udp(b""));
        let before = kernel.injector.counters().unwrap();
        for round in [VANISHED, NEXT] {
            for n in 0..count {
                let packet = Recipe {
                    payload: vec![0; 100 + n - 28],
                    ..connection.clone()
                };
                let code = kernel.out(&packet.frame()).code;
                assert_eq!(code, round, "rule {n} of {count}");
            }
        }
        assert_eq!(kernel.changed_since(&before), [], "{count} rules");
        for state in 0..u32::try_from(count).unwrap() {
            let (stats, connections) = kernel.injector.stats(state).unwrap();
            assert_eq!((stats.hit_packets, connections), (1, 1), "rule {state}");
        }
    }
}

/// What a rule remembers stays when the rules before it become more than a connection's entry has slots for.
#[test]
fn a_rule_goes_on_counting_when_others_come_before_it() {
    let mut kernel = Kernel::new(128, 1024);
    let counting = compiled(&["udp:5432 drop nth=3"]).remove(0);
    let before_it = |count: u32| {
        let mut rules = compiled(&vec!["udp:5432 drop size=1400.."; count as usize]);
        for (rule, state) in rules.iter_mut().zip(1..) {
            rule.entry.state = state;
            rule.entry.uid = rule_uid(1, state);
        }
        rules.push(counting.clone());
        rules
    };
    let sets = [before_it(0), before_it(12), before_it(3)];
    let packet = fresh(Recipe::udp(b"x")).frame();
    for (set, code) in sets.iter().zip([NEXT, NEXT, VANISHED]) {
        kernel.install_entries(set, 0);
        assert_eq!(kernel.out(&packet).code, code);
    }
}

#[test]
fn a_full_table_of_connections_is_counted_and_those_that_ended_make_room() {
    const ROOM: usize = 64;
    let mut kernel = Kernel::remembering(64, 64, u32::try_from(ROOM).unwrap());
    kernel.install(&["tcp:5432 drop nth=2"]);
    let connections: Vec<Recipe> = (0..=ROOM).map(|_| fresh(Recipe::tcp(ACK, b"x"))).collect();
    let [known @ .., last] = &connections[..] else {
        unreachable!()
    };
    for connection in known {
        kernel.expect_pass("a known one", &connection.frame(), None);
    }
    for _ in 0..3 {
        // Its packets are not counted: none of them is dropped.
        kernel.expect_pass("one too many", &last.frame(), Some(Counter::FlowTableFull));
    }
    for connection in known {
        assert_eq!(kernel.out(&connection.frame()).code, VANISHED);
    }
    for connection in &known[..ROOM / 2] {
        let reset = Recipe {
            flags: RST,
            payload: Vec::new(),
            ..connection.clone()
        };
        assert_eq!(kernel.out(&reset.frame()).code, NEXT);
    }
    let next = last.frame();
    crate::support::place::wait_for(
        || {
            let before = kernel.injector.counters().unwrap();
            let code = kernel.out(&next).code;
            code == NEXT && kernel.changed_since(&before).is_empty()
        },
        "room for another connection",
    );
    assert_eq!(kernel.out(&next).code, VANISHED, "its second packet");
    let counters = kernel.injector.counters().unwrap();
    assert_eq!(counters[Counter::Forgotten as usize], 0);
}

#[test]
fn a_window_opens_and_closes() {
    const SECOND: u64 = 1_000_000_000;
    let mut kernel = Kernel::new(64, 64);
    let rule: fault_user::rule::Rule = "tcp:5432 blackhole at=100s for=100s".parse().unwrap();
    let flapping: fault_user::rule::Rule = "tcp:5432 blackhole at=100s period=100s duty=30%"
        .parse()
        .unwrap();
    for (rule, age, code) in [
        (&rule, 50, NEXT),
        (&rule, 150, VANISHED),
        (&rule, 250, NEXT),
        (&flapping, 110, VANISHED),
        (&flapping, 150, NEXT),
        (&flapping, 1_110, VANISHED),
        (&flapping, 1_150, NEXT),
    ] {
        let resolved = rule
            .resolve(
                &fault_user::rule::Targets::new(),
                &mut fault_user::rule::SystemResolver,
            )
            .unwrap();
        let plan = fault_user::plan::Plan::new(&[(rule.clone(), resolved)], 1, None, None).unwrap();
        let packet = fresh(Recipe::tcp(ACK, b"data")).frame();
        kernel.install_entries(&plan.entries(), 0);
        // The clock starts with the machine: what began before that is shifted into the rule instead.
        let mut entries = plan.entries();
        for entry in &mut entries {
            let begins = entry.entry.at_ns;
            entry.entry.at_ns = begins.saturating_sub(age * SECOND);
            let late = (age * SECOND).saturating_sub(begins);
            if entry.entry.length_ns != 0 {
                entry.entry.length_ns = entry.entry.length_ns.saturating_sub(late).max(1);
            }
            if entry.entry.period_ns != 0 {
                let phase = late % entry.entry.period_ns;
                entry.entry.active_ns = entry.entry.active_ns.saturating_sub(phase).max(1);
            }
        }
        kernel.install_entries(&entries, 1_000);
        assert_eq!(kernel.out(&packet).code, code, "`{rule}` after {age} s");
    }
}

/// The packet with a DNS message that a server sends, or with another source port somebody else.
fn from_server(source_port: u16, message: &[u8]) -> Vec<u8> {
    let packet = Recipe {
        source_port,
        ..Recipe::udp(message)
    };
    packet.frame()
}

#[test]
fn addresses_of_names_are_learned_before_a_response_is_delivered() {
    for rules in [64, 128] {
        let mut kernel = Kernel::new(rules, 64);
        kernel.install(&[
            "tcp:api.example.com:5432 drop",
            "tcp:*.example.net:5432 reject=rst",
        ]);
        let code = |kernel: &mut Kernel, address: &str| {
            let recipe = fresh(Recipe {
                source: if address.contains(':') {
                    "fd00::1"
                } else {
                    "10.1.0.1"
                }
                .parse()
                .unwrap(),
                destination: address.parse().unwrap(),
                ..Recipe::tcp(SYN, b"")
            });
            kernel.out(&recipe.frame()).code
        };
        for address in ["10.9.0.1", "10.9.0.2", "fd09::1", "10.9.0.3"] {
            assert_eq!(code(&mut kernel, address), NEXT, "{address}");
        }
        let before = kernel.injector.counters().unwrap();
        for (port, message) in [
            (
                53,
                answer(
                    "API.example.com",
                    &[
                        ("API.example.com", "10.9.0.1"),
                        ("API.example.com", "fd09::1"),
                    ],
                ),
            ),
            (
                53,
                alias(
                    "www.example.org",
                    "a.example.net",
                    &["10.9.0.2", "10.9.0.1"],
                ),
            ),
            // What is no response of DNS, or about another name.
            (53, answer("example.net", &[("example.net", "10.9.0.3")])),
            (53, query("api.example.com")),
            (
                5353,
                answer("api.example.com", &[("api.example.com", "10.9.0.3")]),
            ),
        ] {
            let frame = from_server(port, &message);
            let ran = kernel.run(TcHook::Ingress, false, &frame);
            assert_eq!((ran.code, ran.frame), (NEXT, frame));
        }
        assert_eq!(kernel.changed_since(&before), []);
        assert_eq!(code(&mut kernel, "10.9.0.1"), VANISHED);
        assert_eq!(code(&mut kernel, "fd09::1"), VANISHED);
        assert_eq!(code(&mut kernel, "10.9.0.3"), NEXT);
        let answered = kernel.take_events();
        assert_eq!(
            code(&mut kernel, "10.9.0.2"),
            NEXT,
            "on loopback the answer goes on"
        );
        let answered_now = kernel.take_events();
        assert_eq!(answered.len(), 2);
        assert_eq!(answered_now[0].action, action::REJECT_RST);
        let learned = kernel.injector.learned().unwrap();
        let read: Vec<_> = learned
            .iter()
            .map(|name| (name.name.as_str(), name.lookups, name.addresses.len()))
            .collect();
        assert_eq!(read, [("*.example.net", 0, 2), ("api.example.com", 1, 2)]);
    }
}

/// A query on its way to a server.
fn to_server(name: &str, kind: TYPE, v6: bool) -> Recipe {
    let recipe = Recipe {
        destination_port: 53,
        ..Recipe::udp(&query_for(name, kind))
    };
    fresh(if v6 { recipe.v6() } else { recipe })
}

#[test]
fn queries_become_their_responses() {
    let mut kernel = Kernel::new(64, 64);
    let none: &[&str] = &[];
    for v6 in [false, true] {
        for (rule, kind, code, truncated, addresses) in [
            (
                "dns:api.example.com nxdomain",
                TYPE::A,
                RCODE::NameError,
                false,
                none,
            ),
            (
                "dns:*.example.com servfail",
                TYPE::A,
                RCODE::ServerFailure,
                false,
                none,
            ),
            ("dns refused", TYPE::A, RCODE::Refused, false, none),
            (
                "dns:api.example.com nodata",
                TYPE::A,
                RCODE::NoError,
                false,
                none,
            ),
            (
                "dns:api.example.com truncated",
                TYPE::A,
                RCODE::NoError,
                true,
                none,
            ),
            (
                "dns:api.example.com answer=10.0.0.9",
                TYPE::A,
                RCODE::NoError,
                false,
                &["10.0.0.9"],
            ),
            (
                "dns:api.example.com answer=10.0.0.9",
                TYPE::AAAA,
                RCODE::NoError,
                false,
                none,
            ),
            (
                "dns:* answer=[::1]",
                TYPE::AAAA,
                RCODE::NoError,
                false,
                &["::1"],
            ),
            (
                "dns:api.example.com nxdomain type=aaaa",
                TYPE::AAAA,
                RCODE::NameError,
                false,
                none,
            ),
        ] {
            let query = to_server("API.example.com", kind, v6);
            let frame = expect(&mut kernel, rule, &query, NEXT, Some(action::ANSWER));
            assert!(is_sound(&frame[14..]), "{rule}");
            let at = 14 + if v6 { 40 } else { 20 };
            let ports = [53, query.source_port].map(u16::to_be_bytes).concat();
            assert_eq!(frame[at..at + 4], ports, "{rule}");
            let expected = addresses.iter().map(ToString::to_string).collect();
            assert_eq!(
                read_response(&frame[at + 8..]),
                (code, truncated, expected),
                "{rule}"
            );
            let ends = |frame: &[u8]| {
                let size = if v6 { 16 } else { 4 };
                let (from, to) = frame[at - 2 * size..at].split_at(size);
                (from.to_vec(), to.to_vec())
            };
            let (from, to) = ends(&query.frame());
            assert_eq!(ends(&frame), (to, from), "{rule}");
        }
    }
}

#[test]
fn only_queries_for_the_name_are_matched() {
    for rules in [64, 128] {
        let mut kernel = Kernel::new(rules, 64);
        kernel.install(&[
            "dns:api.example.com drop",
            "dns:*.internal nxdomain type=AAAA",
            "udp:5353 drop",
        ]);
        let code =
            |kernel: &mut Kernel, recipe: &Recipe| kernel.out(&fresh(recipe.clone()).frame()).code;
        let api = to_server("api.example.com", TYPE::TXT, false);
        assert_eq!(code(&mut kernel, &api), VANISHED);
        for passes in [
            to_server("example.com", TYPE::A, false),
            to_server("x.internal", TYPE::A, false),
            to_server("internal", TYPE::AAAA, true),
            Recipe {
                destination_port: 54,
                ..api.clone()
            },
            Recipe {
                protocol: 6,
                ..api.clone()
            },
            Recipe {
                source_port: 53,
                ..Recipe::udp(&answer("api.example.com", &[]))
            },
            Recipe {
                destination_port: 53,
                ..Recipe::udp(&answer("api.example.com", &[]))
            },
        ] {
            kernel.expect_pass("another packet", &fresh(passes).frame(), None);
        }
        let mut several = api.clone();
        several.payload[5] = 2;
        kernel.expect_pass(
            "several questions",
            &fresh(several).frame(),
            Some(Counter::Unread),
        );
    }
}

#[test]
fn what_can_not_be_learned_is_counted() {
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["tcp:*.example:5432 drop"]);
    let run = |kernel: &mut Kernel, message: &[u8]| {
        let before = kernel.injector.counters().unwrap();
        let ran = kernel.run(TcHook::Ingress, false, &from_server(53, message));
        assert_eq!(ran.code, NEXT);
        kernel.changed_since(&before)
    };
    let good = answer("a.example", &[("a.example", "10.9.0.1")]);
    let cut = good[..good.len() - 1].to_vec();
    let mut pointed = good.clone();
    // The owner of the answer points at itself.
    let owner = u16::try_from(12 + 11 + 4).unwrap();
    pointed[usize::from(owner)..][..2].copy_from_slice(&(0xc000 | owner).to_be_bytes());
    let mut questions = good.clone();
    questions[5] = 2;
    let mut truncated = good.clone();
    truncated[2] |= 2;
    let unread = [(Counter::Unread as u32, 1)];
    for message in [cut, pointed, questions, truncated, vec![0; 5]] {
        assert_eq!(run(&mut kernel, &message), unread);
    }
    // More addresses than there is room for.
    let mut full = 0;
    for part in 0..=LEARNED_MAX / 128 {
        let addresses: Vec<_> = (0..128)
            .map(|index| {
                (
                    "a.example",
                    std::net::Ipv4Addr::from((11 << 24) + part * 128 + index).to_string(),
                )
            })
            .collect();
        let addresses: Vec<_> = addresses
            .iter()
            .map(|(name, address)| (*name, address.as_str()))
            .collect();
        let counted = run(&mut kernel, &answer("a.example", &addresses));
        full += counted
            .iter()
            .map(|(counter, times)| {
                assert_eq!(*counter, Counter::LearnedFull as u32);
                times
            })
            .sum::<u64>();
    }
    let learned = kernel.injector.learned().unwrap();
    assert_eq!(learned[0].addresses.len(), LEARNED_MAX as usize);
    // One was learned from the truncated response.
    assert_eq!(full, 129);
}

#[test]
fn a_new_name_can_replace_one_that_no_rule_has() {
    let mut kernel = Kernel::new(64, 256);
    let names = |from: usize| -> Vec<String> {
        let numbers = from..from + NAMES_MAX;
        numbers
            .map(|number| format!("tcp:n{number}.example:5432 drop"))
            .collect()
    };
    let learn = |kernel: &mut Kernel, name: &str| {
        let message = answer(name, &[(name, "10.9.0.1")]);
        kernel.run(TcHook::Ingress, false, &from_server(53, &message));
    };
    let code = |kernel: &mut Kernel| {
        let recipe = fresh(Recipe {
            destination: "10.9.0.1".parse().unwrap(),
            ..Recipe::tcp(SYN, b"")
        });
        kernel.out(&recipe.frame()).code
    };
    let install = |kernel: &mut Kernel, rules: &[String]| {
        let rules: Vec<_> = rules.iter().map(String::as_str).collect();
        kernel.install(&rules);
    };
    install(&mut kernel, &names(0)[..NAMES_MAX - 1]);
    learn(&mut kernel, "n0.example");
    assert_eq!(code(&mut kernel), VANISHED);
    // Without the rule of the name its address stays known: there is room for one more name.
    kernel.install(&["tcp:other.example:5432 drop"]);
    assert_eq!(code(&mut kernel), NEXT);
    install(&mut kernel, &names(0)[..1]);
    assert_eq!(code(&mut kernel), VANISHED);
    // All numbers are needed for others.
    install(&mut kernel, &names(1000)[1..]);
    assert_eq!(code(&mut kernel), NEXT);
    let learned = kernel.injector.learned().unwrap();
    assert_eq!(learned.len(), NAMES_MAX);
    let known = learned.iter().filter(|name| !name.addresses.is_empty());
    let known: Vec<_> = known
        .map(|name| (name.name.as_str(), name.lookups))
        .collect();
    assert_eq!(known, [("n0.example", 1)], "it was applied until now");
    install(&mut kernel, &names(1001)[..1]);
    kernel.install(&["tcp:a.example:5432 drop", "tcp:b.example:5432 drop"]);
    assert_eq!(code(&mut kernel), NEXT);
    learn(&mut kernel, "n0.example");
    assert_eq!(code(&mut kernel), NEXT, "nobody looks for it any more");
    learn(&mut kernel, "b.example");
    assert_eq!(code(&mut kernel), VANISHED);
}

#[test]
fn connections_to_dns_servers_over_tcp_are_counted() {
    let mut kernel = Kernel::new(64, 64);
    for rules in [["tcp:a.example:5432 drop"], ["dns:a.example nxdomain"]] {
        kernel.install(&rules);
        let before = kernel.injector.counters().unwrap();
        let mut run = |flags| {
            let recipe = Recipe {
                source_port: 53,
                destination_port: 40_000,
                ..Recipe::tcp(flags, b"data")
            };
            kernel.run(TcHook::Ingress, false, &recipe.frame());
        };
        run(SYN | ACK);
        run(ACK);
        let counted = kernel.changed_since(&before);
        assert_eq!(counted, [(Counter::DnsOverTcp as u32, 1)], "{rules:?}");
    }
}

#[test]
fn every_program_loads_within_its_budget() {
    /// Verified instructions; a million is the kernel's limit. The most were 134,991, on Linux 6.18. See ARCHITECTURE.md.
    const BUDGET: u32 = 250_000;
    let mut verified = Vec::new();
    for (words, trace) in [(1, false), (64, false), (1, true), (64, true)] {
        let mut kernel = Kernel::new(64 * words, 1024);
        if trace {
            kernel.trace();
        }
        let mut note = |name: String, program: &ProgramInfo| {
            let count = program.verified_instruction_count();
            let told = if trace { ", -vv" } else { "" };
            verified.extend(count.map(|count| (format!("{name}, {words} words{told}"), count)));
        };
        for side in [TcHook::Egress, TcHook::Ingress] {
            for ethernet in [true, false] {
                let program = kernel.injector.program(side, ethernet);
                let program = program.unwrap_or_else(|error| panic!("{error:?}"));
                note(
                    format!("{side:?}, ethernet {ethernet}"),
                    &program.info().unwrap(),
                );
            }
        }
        if has_fetching_atomics() {
            let program = kernel.injector.xdp_program();
            let program = program.unwrap_or_else(|error| panic!("{error:?}"));
            note("XDP".to_owned(), &program.info().unwrap());
        }
    }
    eprintln!("{verified:?}");
    assert!(
        verified.iter().all(|(_, count)| *count < BUDGET),
        "{verified:#?}"
    );
}

#[test]
fn the_host_and_the_kernel_take_the_same_decisions() {
    model::compare(At::Egress, 100_000);
}

#[test]
fn programs_made_for_few_rules_take_the_same_decisions() {
    model::compare(At::Fitted, 3_600);
}

#[test]
fn xdp_takes_the_same_decisions() {
    if !has_fetching_atomics() {
        return;
    }
    model::compare(At::Xdp, 20_000);
}

/// XDP is not used before Linux 5.12.
fn has_fetching_atomics() -> bool {
    let has = fault_user::sys::version::at_least(5, 12);
    if !has {
        eprintln!("skipped: XDP is used from Linux 5.12 on");
    }
    has
}

#[test]
fn xdp_leaves_to_tc_what_it_cannot_judge() {
    if !has_fetching_atomics() {
        return;
    }
    let mut kernel = Kernel::new(64, 64);
    kernel.install(&["tcp:5432 blackhole"]);
    let large = fresh(Recipe::tcp(ACK, &[0x55; 1600])).frame();
    assert_eq!(kernel.run_xdp(&large), XDP_PASS, "maybe a super-packet");
    let mut tagged = fresh(Recipe::tcp(ACK, b"data")).frame();
    assert_eq!(kernel.run_xdp(&tagged), XDP_DROP);
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    assert_eq!(kernel.run_xdp(&tagged), XDP_DROP, "a VLAN tag");
    for fragment in fresh(Recipe::tcp(ACK, &[0; 80])).fragments(9, 40) {
        assert_eq!(kernel.run_xdp(&fragment), XDP_PASS, "a fragment");
    }
    let (stats, _) = kernel.injector.stats(0).unwrap();
    assert_eq!(stats.seen_packets, 2, "what is left to tc is counted there");
}

#[test]
fn the_checksum_of_these_tests_is_that_of_the_rfc() {
    // The example of RFC 1071, section 3.
    assert_eq!(
        !checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]),
        0xddf2
    );
}
