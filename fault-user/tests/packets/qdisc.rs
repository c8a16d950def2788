//! Packets that fq and netem hold: as late as those of the delay line, and the qdiscs of others stay what they are.

use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::echo::connected;
use crate::support::late::{assert_about, delays_all, echo, exchange, order, timed};
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, count_lines, enter_fresh, fault, hide_run, ip, is_emulated, run,
    wait_for,
};
use fault_user::sys::process::netns::NetworkNamespace;

const FQ: &str = "--scope host --mechanism fq";
const NETEM: &str = "--scope host --mechanism netem";

fn tc(words: &str) -> Output {
    let done = Command::new("tc").args(words.split(' ')).output();
    done.expect("tc runs")
}

fn roots() -> String {
    String::from_utf8(tc("qdisc show").stdout).unwrap()
}

/// Enters a fresh namespace; false, aloud, where the kernel lacks one of these.
fn enter_with(features: &[&str]) -> bool {
    enter_fresh();
    for feature in features {
        let options = if *feature == "netem" {
            " delay 1ms"
        } else {
            ""
        };
        let words = format!("qdisc add dev lo root {feature}{options}");
        if !tc(&words).status.success() || !tc("qdisc del dev lo root").status.success() {
            eprintln!("skipped: needs {feature}");
            return false;
        }
    }
    true
}

/// Loopback, both versions of IP, both ways of attaching.
fn loopback(options: &str, mechanism: &str) {
    let before = roots();
    for host in ["127.0.0.1", "::1"] {
        let address = echo(None, host);
        delays_all(address, options, mechanism);
        delays_all(address, &format!("{options} --attach clsact"), mechanism);
    }
    assert_eq!(roots(), before);
}

#[test]
fn fq_delays_loopback() {
    if enter_with(&["fq"]) {
        loopback(FQ, ", fq\n");
    }
}

#[test]
fn netem_delays_loopback() {
    if enter_with(&["netem", "prio"]) {
        loopback(NETEM, ", netem\n");
    }
}

/// Both ways of a veth pair, both versions of IP, ICMP too; nothing is left.
fn device(options: &str, mechanism: &str) {
    let peer = Peer::joined();
    let before = roots();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for host in ["10.77.0.2", "fd77::2"] {
        let address = echo(Some(&namespace), host);
        delays_all(address, options, mechanism);
        delays_all(address, &format!("{options} --attach clsact"), mechanism);
    }
    let applied = AppliedRules::begin(&["icmp delay=60ms"], options);
    assert!(roots().contains("fa17:"), "{}", roots());
    assert_about(120, "ICMP", || {
        timed(|| {
            let done = Command::new("ping").args(["-c", "1", "10.77.0.2"]).output();
            assert!(done.unwrap().status.success());
        })
    });
    applied.end();
    assert_eq!(roots(), before);
    let devices = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert!(!devices.contains("fault-"), "{devices}");
}

#[test]
fn fq_delays_both_ways_of_a_device() {
    if enter_with(&["fq"]) {
        device(FQ, ", fq\n");
    }
}

#[test]
fn netem_delays_both_ways_of_a_device() {
    if enter_with(&["netem", "prio"]) {
        device(NETEM, ", netem\n");
    }
}

#[test]
fn fq_lets_packets_overtake_where_they_may() {
    if !enter_with(&["fq"]) {
        return;
    }
    echo(None, "127.0.0.1");
    let in_order: Vec<u16> = (0..120).collect();
    for rule in ["udp:7000 delay=20ms", "udp:7000 delay=40ms~40ms,keep-order"] {
        assert_eq!(order(&[rule], FQ), in_order, "{rule}");
    }
    for rule in [
        "udp:7000 delay=40ms~40ms",
        "udp:7000 delay=40ms~10ms,dist=normal",
        "udp:7000 reorder=25%",
    ] {
        let mut numbers = order(&[rule], FQ);
        assert_ne!(numbers, in_order, "{rule}");
        numbers.sort_unstable();
        assert_eq!(numbers, in_order, "{rule}: none is lost");
    }
}

/// The entries of the maps of this name, as text.
fn entries_of(map: &str) -> String {
    let words = ["-j", "map", "dump", "name", map];
    let done = Command::new("bpftool").args(words).output().unwrap();
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn fq_remembers_the_order_of_what_it_holds_and_then_no_more() {
    if !enter_with(&["fq"]) {
        return;
    }
    let socket = connected(echo(None, "127.0.0.1"));
    // An emulated processor takes seconds to start what reads the map.
    let seconds = if is_emulated() { 20 } else { 3 };
    let rule = format!("udp:7000 delay={seconds}s~1s,keep-order dir=to-server");
    let applied = AppliedRules::begin(&[&rule], FQ);
    socket.send(b"x").unwrap();
    wait_for(
        || entries_of("ORDERS").contains("key"),
        "what is held to be remembered",
    );
    socket.recv(&mut [0; 1]).unwrap();
    wait_for(
        || !entries_of("ORDERS").contains("key"),
        "what has gone to be forgotten",
    );
    applied.end();
}

#[test]
fn a_packet_that_is_not_held_does_not_wait_for_one_that_is() {
    for (options, features) in [(FQ, &["fq"][..]), (NETEM, &["netem", "prio"])] {
        if !enter_with(features) {
            continue;
        }
        let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        let applied = AppliedRules::begin(&["udp:7000 delay=700ms nth=1"], options);
        assert_about(700, options, || {
            let sender = connected("127.0.0.1:7000".parse().unwrap());
            let start = Instant::now();
            sender.send(b"1").unwrap();
            sender.send(b"2").unwrap();
            let mut byte = [0; 1];
            receiver.recv(&mut byte).unwrap();
            assert_eq!(&byte, b"2", "{options}");
            receiver.recv(&mut byte).unwrap();
            start.elapsed()
        });
        applied.end();
    }
}

#[test]
fn fq_holds_packets_beyond_its_usual_horizon() {
    if !enter_with(&["fq"]) {
        return;
    }
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    let applied = AppliedRules::begin(&["udp:7000 delay=11s"], FQ);
    assert_about(11_000, "beyond 10 s", || {
        timed(|| {
            sender.send(b"x").unwrap();
            receiver.recv(&mut [0; 1]).unwrap();
        })
    });
    applied.end();
}

#[test]
fn what_qdiscs_cannot_hold_stays_with_the_delay_line() {
    if !enter_with(&["fq"]) {
        return;
    }
    echo(None, "127.0.0.1");
    let rules = ["udp:7000 delay=60ms", "udp:7001 rate=8mbit"];
    let applied = AppliedRules::begin(&rules, FQ);
    let socket = connected("127.0.0.1:7000".parse().unwrap());
    assert_about(120, "held by fq", || {
        timed(|| {
            socket.send(b"x").unwrap();
            socket.recv(&mut [0; 1]).unwrap();
        })
    });
    let receiver = UdpSocket::bind("127.0.0.1:7001").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_about(100, "shaped by the delay line", || {
        timed(|| {
            for _ in 0..100 {
                sender.send_to(&[0; 958], "127.0.0.1:7001").unwrap();
            }
            for _ in 0..100 {
                receiver.recv(&mut [0; 1000]).unwrap();
            }
        })
    });
    let summary = applied.end();
    assert!(
        summary.contains(", fq\n") && summary.contains(", delay-line\n"),
        "{summary}"
    );
}

#[test]
fn a_foreign_qdisc_is_named_and_stays() {
    enter_fresh();
    let words = "qdisc add dev lo root handle 7: tbf rate 1gbit burst 1mb latency 1s";
    if !tc(words).status.success() {
        eprintln!("skipped: needs tbf");
        return;
    }
    let before = roots();
    for mechanism in ["fq", "netem"] {
        let options = format!("--scope host --mechanism {mechanism}");
        let refused = run(&["udp:7000 delay=1s"], &options, &["true"]);
        let stderr_text = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(125), "{stderr_text}");
        assert_eq!(
            stderr_text,
            format!(
                "fault: error: lo has a tbf qdisc (handle 7:) at its root, which fault does not replace: leave out \
                 --mechanism {mechanism} (the delay line works with any qdisc)\n"
            )
        );
        assert_eq!(roots(), before);
    }
    delays_all(echo(None, "127.0.0.1"), "--scope host", "delay-line");
    assert_eq!(roots(), before);
}

/// Packets pass again, and `clean` finds the qdiscs and the veth pair, by the journal or without it.
fn killed(options: &str) {
    // Each start elsewhere cleans up after the killed instances of its /run.
    hide_run();
    let peer = Peer::joined();
    let before = roots();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let address = echo(Some(&namespace), "10.77.0.2");
    let socket = connected(address);
    let short = Duration::from_millis(200);
    socket.set_read_timeout(Some(short)).unwrap();
    for attach in ["", "--attach clsact"] {
        for has_journal in [true, false] {
            let mut applied =
                AppliedRules::begin(&["udp:7000 delay=1s"], &format!("{options} {attach}"));
            applied.kill();
            wait_for(
                || {
                    socket.send(b"x").unwrap();
                    timed(|| drop(socket.recv(&mut [0; 1]))) < short
                },
                "packets to pass again",
            );
            let journal = format!("/run/fault/{}.json", applied.pid());
            drop(applied);
            assert!(roots().contains("fa17:"), "{}", roots());
            if !has_journal {
                std::fs::remove_file(journal).unwrap();
            }
            let cleaned = fault().arg("clean").output().unwrap();
            assert!(cleaned.status.success(), "{cleaned:?}");
            let after = roots();
            assert!(!after.contains("fa17:"), "{after}");
            if has_journal {
                assert_eq!(after, before);
            } else {
                // Without a journal nobody knows whose an empty clsact is.
                for device in ["lo", "va"] {
                    let mut tc = Command::new("tc");
                    tc.args(["qdisc", "del", "dev", device, "clsact"]);
                    let _there_or_not = tc.output().unwrap();
                }
            }
            let devices = std::fs::read_to_string("/proc/net/dev").unwrap();
            assert!(!devices.contains("fault-"), "{devices}");
        }
    }
}

#[test]
fn after_a_kill_fqs_are_found_and_delay_nothing() {
    if enter_with(&["fq"]) {
        killed(FQ);
    }
}

#[test]
fn after_a_kill_netems_are_found_and_delay_nothing() {
    if enter_with(&["netem", "prio"]) {
        killed(NETEM);
    }
}

#[test]
fn fq_holds_packets_of_an_interface_that_appears() {
    if enter_with(&["fq"]) {
        appears(FQ);
    }
}

#[test]
fn netem_holds_packets_of_an_interface_that_appears() {
    if enter_with(&["netem", "prio"]) {
        appears(NETEM);
    }
}

/// A second device, beside one that was there before.
fn appears(options: &str) {
    let peer = Peer::joined();
    let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], options);
    ip("link add wa type veth peer name wb");
    ip(&format!("link set wb netns {}", peer.name));
    for (within, name, host) in [
        (String::new(), "wa", 1),
        (format!("-n {} ", peer.name), "wb", 2),
    ] {
        ip(&format!("{within}addr add 10.79.0.{host}/24 dev {name}"));
        ip(&format!("{within}link set {name} up"));
    }
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let socket = connected(echo(Some(&namespace), "10.79.0.2"));
    let mut byte = [0; 1];
    let mut round_trip = || {
        timed(|| {
            socket.send(b"x").unwrap();
            socket.recv(&mut byte).unwrap();
        })
    };
    let late = Duration::from_millis(120);
    wait_for(|| round_trip() >= late, "the new device to be slow");
    assert!(roots().contains("fa17: dev wa root"), "{}", roots());
    let summary = applied.end();
    assert!(summary.contains(" on lo, va, wa;"), "{summary}");
    assert!(!roots().contains("fa17:"), "{}", roots());
}

/// A named interface that goes in the middle is told about; the rules end well all the same.
fn vanishes(options: &str) {
    for attach in ["", "--attach clsact"] {
        let peer = Peer::joined();
        let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
        let address = echo(Some(&namespace), "10.77.0.2");
        let options = format!("{options} --interface va {attach}");
        let applied = AppliedRules::begin(&["udp:7000 delay=60ms"], &options);
        let socket = connected(address);
        // One comes back, others are held when the interface goes.
        socket.send(b"x").unwrap();
        socket.recv(&mut [0; 1]).unwrap();
        for _ in 0..10 {
            socket.send(b"x").unwrap();
        }
        ip("link del va");
        let summary = applied.end();
        let line = "  va disappeared during the run: no rule was applied there afterwards\n";
        assert!(summary.contains(line), "{options}: {summary}");
    }
}

#[test]
fn a_disappearing_interface_is_reported() {
    enter_fresh();
    vanishes("--scope host");
    for (options, features) in [(FQ, &["fq"][..]), (NETEM, &["netem", "prio"])] {
        if enter_with(features) {
            vanishes(options);
        }
    }
}

/// `fault` where no tap device can be made.
fn without_tap() -> Command {
    let mut command = Command::new("unshare");
    let script = "mount --bind /dev/null /dev/net/tun && exec \"$0\" \"$@\"";
    command.args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_fault")]);
    command
}

#[test]
fn without_a_tap_something_else_holds_or_it_is_refused() {
    let has_fq = enter_with(&["fq"]);
    enter_fresh();
    let rate = ["run", "-r", "udp:7000 rate=1mbit", "--", "true"];
    let refused = without_tap().args(rate).output().unwrap();
    let stderr_text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(125), "{stderr_text}");
    assert!(
        stderr_text.contains("tap device") && count_lines(&stderr_text) == 1,
        "{stderr_text}"
    );
    let address = echo(None, "127.0.0.1");
    let applied = AppliedRules::begin_by(without_tap(), &["tcp:7000 delay=300ms"], "--scope host");
    let mut stream = TcpStream::connect(address).unwrap();
    assert_about(600, "an answer", || timed(|| exchange(&mut stream)));
    let stderr_text = applied.end();
    let by = if has_fq {
        ", fq\n"
    } else {
        "relay (connect hook), as there is no tap device, fq or netem\n"
    };
    assert!(stderr_text.contains(by), "{stderr_text}");
}

/// Errors of round trips in milliseconds: the median, and the worst.
fn errors(socket: &UdpSocket, ms: u32, count: usize) -> (f64, f64) {
    let mut times: Vec<f64> = (0..count)
        .map(|_| {
            let took = timed(|| {
                socket.send(b"echo").unwrap();
                socket.recv(&mut [0; 8]).unwrap();
            });
            took.as_secs_f64() * 1e3 - f64::from(ms)
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    (times[count / 2], times[count - 1])
}

/// Not a goal, since an emulated machine is slow and other tests run on it: figures of all mechanisms, and netem's own
/// beside them. Only what is early, or late beyond what [`assert_about`] allows there, fails.
#[test]
fn figures_of_all_mechanisms_and_netems_own() {
    if !enter_with(&["fq", "netem", "prio"]) {
        return;
    }
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let socket = connected(echo(Some(&namespace), "10.77.0.2"));
    let (direct, _) = errors(&socket, 0, 100);
    println!("round trip without delay: {direct:.3} ms");
    for (ms, count) in [(1, 100), (10, 50), (100, 10), (1000, 3)] {
        let own = format!("qdisc add dev va root netem delay {ms}ms");
        assert!(tc(&own).status.success());
        let (netem, worst) = errors(&socket, ms, count);
        println!("delay {ms} ms by tc's netem: median {netem:+.3} ms, worst {worst:+.3} ms");
        assert!(tc("qdisc del dev va root").status.success());
        for mechanism in ["fq", "netem", "delay-line"] {
            let rule = format!("udp:7000 delay={ms}ms dir=to-server");
            let options = format!("--scope host -i va --mechanism {mechanism}");
            let applied = AppliedRules::begin(&[&rule], &options);
            let (median, worst) = errors(&socket, ms, count);
            applied.end();
            println!("delay {ms} ms by {mechanism}: median {median:+.3} ms, worst {worst:+.3} ms");
            assert!(median >= 0.0, "{mechanism} at {ms} ms: {median} ms early");
            assert!(
                median < netem + 400.0,
                "{mechanism} at {ms} ms: {median} ms late"
            );
        }
    }
}
