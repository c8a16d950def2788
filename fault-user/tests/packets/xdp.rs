//! The XDP program in front of the tc program, on a veth pair, whose driver has native XDP.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;

use crate::support::echo::connected;
use crate::support::place::{AppliedRules, PATIENCE, Peer, enter_fresh, wait_for};
use aya::programs::Xdp;
use fault_user::inject::xdp::{Mode, XdpLink};
use fault_user::sys::bpf::object::OBJECT;
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;

/// Datagrams sent at a time: as many as a socket keeps.
const DATAGRAMS: u16 = 200;

/// A socket in the other namespace, and one connected to it here.
fn sockets(peer: &NetworkNamespace, host: &str) -> (UdpSocket, UdpSocket) {
    let receiver = peer.enter(|| Ok(UdpSocket::bind((host, 7000))?)).unwrap();
    let sender = connected(receiver.local_addr().unwrap());
    (receiver, sender)
}

/// Sends numbered datagrams and returns which arrived. One to another port, which no rule is about, marks the end.
fn arrived(peer: &NetworkNamespace, sender: &UdpSocket, receiver: &UdpSocket) -> Vec<u16> {
    let address = sender.peer_addr().unwrap();
    let end = peer
        .enter(|| Ok(UdpSocket::bind((address.ip(), 7001))?))
        .unwrap();
    end.set_read_timeout(Some(PATIENCE)).unwrap();
    for number in 0..DATAGRAMS {
        sender.send(&number.to_be_bytes()).unwrap();
    }
    sender.send_to(b"end", (address.ip(), 7001)).unwrap();
    end.recv(&mut [0; 8]).expect("the end arrives");
    receiver.set_nonblocking(true).unwrap();
    let mut numbers = Vec::new();
    let mut bytes = [0; 8];
    loop {
        match receiver.recv(&mut bytes) {
            Ok(_) => numbers.push(u16::from_be_bytes([bytes[0], bytes[1]])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return numbers,
            Err(error) => panic!("{error}"),
        }
    }
}

fn links(peer: &Peer) -> String {
    let shown = Command::new("ip")
        .args(["-n", &peer.name, "link", "show", "vb"])
        .output()
        .unwrap();
    String::from_utf8(shown.stdout).unwrap()
}

fn has_xdp() -> bool {
    let has = version::at_least(5, 12);
    if !has {
        eprintln!("skipped: XDP is used from Linux 5.12 on");
    }
    has
}

#[test]
fn xdp_and_tc_lose_the_same_packets() {
    if !has_xdp() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for host in ["10.77.0.2", "fd77::2"] {
        let (receiver, sender) = sockets(&namespace, host);
        assert_eq!(
            arrived(&namespace, &sender, &receiver).len(),
            usize::from(DATAGRAMS)
        );
        let mut by = Vec::new();
        for mechanism in ["xdp", "tc"] {
            let options = format!(
                "--netns {} --seed 7 --mechanism {mechanism} -i vb",
                peer.name
            );
            let applied = AppliedRules::begin(&["udp:7000 loss=30%"], &options);
            assert_eq!(
                links(&peer).contains("xdp"),
                mechanism == "xdp",
                "{}",
                links(&peer)
            );
            let came = arrived(&namespace, &sender, &receiver);
            let summary = applied.end();
            assert_eq!(
                summary.contains("xdp (native), tc ("),
                mechanism == "xdp",
                "{summary}"
            );
            let seen = format!("{DATAGRAMS} pkts");
            assert!(summary.contains(&seen), "each is judged once: {summary}");
            let lost = format!("{} pkts", usize::from(DATAGRAMS) - came.len());
            assert!(summary.contains(&lost), "{summary}");
            by.push(came);
        }
        assert!((110..170).contains(&by[0].len()));
        assert_eq!(by[0], by[1]);
        assert_eq!(
            arrived(&namespace, &sender, &receiver).len(),
            usize::from(DATAGRAMS)
        );
    }
    assert!(!links(&peer).contains("xdp"));
}

#[test]
fn where_xdp_cannot_be_tc_does_it_and_says_so() {
    if !has_xdp() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let (receiver, sender) = sockets(&namespace, "10.77.0.2");
    let options = format!("--netns {} --mechanism xdp", peer.name);
    let check = |rule: &str, note: &str| {
        let applied = AppliedRules::begin(&[rule], &options);
        let came = arrived(&namespace, &sender, &receiver);
        let summary = applied.end();
        assert!(summary.contains(note), "`{rule}`: {summary}");
        came.len()
    };
    let all = usize::from(DATAGRAMS);
    assert_eq!(
        check(
            "udp:7000 corrupt=100%",
            "XDP can only drop packets, and a rule does more"
        ),
        all
    );
    let foreign = foreign_program(&namespace);
    assert_eq!(
        check(
            "udp:7000 blackhole",
            "XDP is not used on vb: another XDP program is attached"
        ),
        0
    );
    assert!(links(&peer).contains("xdp"), "the other program stays");
    drop(foreign);
}

/// A program of someone else at the interface.
fn foreign_program(peer: &NetworkNamespace) -> (aya::Ebpf, XdpLink) {
    let mut ebpf = aya::Ebpf::load(OBJECT).unwrap();
    let program: &mut Xdp = ebpf.program_mut("fault_xdp").unwrap().try_into().unwrap();
    program.load().unwrap();
    let fd = program.fd().unwrap().try_clone().unwrap();
    let link = peer
        .enter(|| {
            let index = nix::net::if_::if_nametoindex("vb")?;
            Ok(XdpLink::attach(fd.as_fd(), index, Mode::Native)?)
        })
        .unwrap();
    (ebpf, link)
}

#[test]
fn a_killed_fault_takes_its_xdp_program_along() {
    if !has_xdp() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let options = format!("--netns {} --mechanism xdp", peer.name);
    let mut applied = AppliedRules::begin(&["udp:7000 blackhole"], &options);
    assert!(links(&peer).contains("xdp"));
    applied.kill();
    wait_for(|| !links(&peer).contains("xdp"), "the program to go");
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let (receiver, sender) = sockets(&namespace, "10.77.0.2");
    // The tc program behind it goes a moment later.
    wait_for(
        || arrived(&namespace, &sender, &receiver).len() == usize::from(DATAGRAMS),
        "all to arrive",
    );
}
