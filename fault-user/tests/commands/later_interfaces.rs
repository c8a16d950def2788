//! Interfaces that appear after the rules were applied: those of containers, bridges and VPNs.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::echo::connected;
use crate::support::late::{echo, timed};
use crate::support::place::{AppliedRules, Peer, enter_fresh, fault, ip, wait_for};
use fault_user::inject::injection::{InjectionOptions, PreparedInjection};
use fault_user::inject::injector::Attachment;
use fault_user::inject::preparation::prepare;
use fault_user::plan::Plan;
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;

/// Both ways of a round trip are late.
const LATE: Duration = Duration::from_millis(120);
const RULE: &str = "udp:7000 delay=60ms";

fn round_trip(address: SocketAddr) -> Duration {
    let socket = connected(address);
    let mut byte = [0; 1];
    timed(|| {
        socket.send(b"x").unwrap();
        socket.recv(&mut byte).unwrap();
    })
}

fn echo_in(name: &str, host: &str) -> SocketAddr {
    echo(
        Some(&NetworkNamespace::open(Path::new(name)).unwrap()),
        host,
    )
}

/// A second pair of devices between both namespaces, `wa` and `wb`.
fn join_again(peer: &Peer) {
    ip("link add wa type veth peer name wb");
    ip(&format!("link set wb netns {}", peer.name));
    ip("addr add 10.79.0.1/24 dev wa");
    ip("link set wa up");
    ip(&format!("-n {} addr add 10.79.0.2/24 dev wb", peer.name));
    ip(&format!("-n {} link set wb up", peer.name));
}

/// The filters and the clsact qdisc of a device.
fn clsact(device: &str) -> String {
    let done = Command::new("tc")
        .args(["qdisc", "show", "dev", device])
        .output();
    String::from_utf8(done.unwrap().stdout).unwrap()
}

#[test]
fn rules_go_on_to_an_interface_that_appears() {
    for options in ["--scope host", "--scope host --attach clsact"] {
        enter_fresh();
        let applied = AppliedRules::begin(&[RULE], options);
        let peer = Peer::joined();
        let address = echo_in(&peer.name, "10.77.0.2");
        wait_for(|| round_trip(address) >= LATE, "the new device to be slow");
        let summary = applied.end();
        assert!(summary.contains(" on lo, va;"), "{summary}");
        assert!(!clsact("va").contains("clsact"), "{options}");
        assert!(round_trip(address) < LATE, "restored");
    }
}

/// What `fault` tells when `wa` is removed and made again, with the rule applied in between and afterwards.
fn made_again(options: &str) -> String {
    enter_fresh();
    let peer = Peer::joined();
    join_again(&peer);
    let applied = AppliedRules::begin(&[RULE], options);
    let address = echo_in(&peer.name, "10.79.0.2");
    assert!(round_trip(address) >= LATE);
    ip("link del wa");
    join_again(&peer);
    wait_for(|| round_trip(address) >= LATE, "the device to be back");
    let summary = applied.end();
    assert!(round_trip(address) < LATE, "restored");
    summary
}

#[test]
fn one_that_vanishes_is_missed_only_where_it_was_named() {
    let line = "fault: wa disappeared: the rules are applied again when it reappears\n";
    for attach in ["", "--attach clsact"] {
        let summary = made_again(&format!("--scope host --interface wa {attach}"));
        assert!(summary.contains(line), "{summary}");
        assert!(!summary.contains("meanwhile"), "{summary}");
    }
    let summary = made_again("--scope host");
    assert!(!summary.contains("disappeared"), "{summary}");
}

#[test]
fn rules_in_another_namespace_meet_its_new_interfaces() {
    enter_fresh();
    let peer = Peer::joined();
    let applied = AppliedRules::begin(&[RULE], &format!("--netns {}", peer.name));
    join_again(&peer);
    let address = echo_in(&peer.name, "10.79.0.2");
    wait_for(|| round_trip(address) >= LATE, "the new device to be slow");
    let summary = applied.end();
    assert!(summary.contains(", wb;"), "{summary}");
}

#[test]
fn rules_apply_to_late_devices_and_those_without_ethernet_headers() {
    enter_fresh();
    ip("link add wa type veth peer name wb");
    ip("addr add 10.80.0.1/24 dev wa");
    ip("neigh add 10.80.0.2 lladdr 02:00:00:00:00:02 dev wa nud permanent");
    let applied = AppliedRules::begin(&["udp:7000 drop"], "--scope host --attach clsact");
    ip("tuntap add dev tun7 mode tun");
    ip("addr add 10.81.0.1/24 dev tun7");
    for (device, host) in [("wa", "10.80.0.2:7000"), ("tun7", "10.81.0.2:7000")] {
        ip(&format!("link set {device} up"));
        wait_for(|| has_filters(device), device);
        connected(host.parse().unwrap()).send(b"x").unwrap();
    }
    let summary = applied.end();
    assert!(summary.contains(" on lo, wa, tun7;"), "{summary}");
    assert!(summary.contains("2 pkts"), "{summary}");
}

/// Whether an answer comes back in time. What is held or lost has come to nothing.
fn passes(address: SocketAddr) -> bool {
    let socket = connected(address);
    socket.set_read_timeout(Some(LATE)).unwrap();
    socket.send(b"x").unwrap();
    socket.recv(&mut [0; 1]).is_ok()
}

#[test]
fn after_a_kill_a_new_interface_is_found_and_passes() {
    enter_fresh();
    let mut applied = AppliedRules::begin(&[RULE], "--scope host --attach clsact");
    let peer = Peer::joined();
    let address = echo_in(&peer.name, "10.77.0.2");
    wait_for(|| !passes(address), "the new device to be slow");
    applied.kill();
    wait_for(|| passes(address), "packets to pass again");
    drop(applied);
    // The filters outlive the process, until the next instance, which may be another test's, or this takes them away.
    let cleaned = fault().arg("clean").output().unwrap();
    assert!(cleaned.status.success(), "{cleaned:?}");
    assert!(!clsact("va").contains("clsact"), "{}", clsact("va"));
}

fn has_filters(device: &str) -> bool {
    ["egress", "ingress"].iter().all(|side| {
        let done = Command::new("tc")
            .args(["filter", "show", "dev", device, side])
            .output();
        String::from_utf8(done.unwrap().stdout)
            .unwrap()
            .contains("fault_")
    })
}

/// Between the list of interfaces and the programs on them a container may end.
#[test]
fn an_interface_that_vanishes_meanwhile_is_left_out() {
    let rule: Rule = "udp:7000 loss=1%".parse().unwrap();
    let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
    let plan = Plan::new(&[(rule, resolved)], 1, None, None).unwrap();
    for attachment in [Attachment::Tcx, Attachment::Clsact] {
        if attachment == Attachment::Tcx && !version::at_least(6, 6) {
            eprintln!("skipped: TCX is there from Linux 6.6 on");
            continue;
        }
        enter_fresh();
        ip("link add wa type veth peer name wb");
        ip("link set wa up");
        let all = select(&list().unwrap(), &Selection::Default).unwrap();
        let names: Vec<_> = all.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["lo", "wa"]);
        ip("link del wa");
        let injection_options = InjectionOptions {
            attachment: Some(attachment),
            ..InjectionOptions::default()
        };
        let injection = prepare(&plan, &all, &injection_options)
            .and_then(PreparedInjection::start)
            .unwrap_or_else(|error| panic!("{attachment}: {error:#}"));
        injection.remove().unwrap();
        let refused = prepare(&plan, &all[1..], &injection_options)
            .err()
            .expect("nothing");
        assert_eq!(format!("{refused:#}"), "wa has disappeared", "{attachment}");
    }
}
