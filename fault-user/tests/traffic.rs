//! The binary `fault` on real traffic with nothing but the standard library: what `cargo xtask vm` runs on every
//! kernel, by TCX where the kernel has it and by clsact.

mod support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use support::echo::tcp_echo;
use support::place::{Hurt, enter_fresh, fault, run, wait_for};

/// Starts a server on loopback.
fn echo(host: &str) -> SocketAddr {
    tcp_echo(TcpListener::bind((host, 7000)).unwrap())
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_millis(800))?;
    stream.set_read_timeout(Some(Duration::from_millis(800)))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<[u8; 5]> {
    let mut answer = [0; 5];
    stream.write_all(b"hello")?;
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn hurt_and_heal(address: SocketAddr, options: &str) {
    let rule = |text: &str| format!("tcp:7000 {text}");
    let is_well = || assert_eq!(&exchange(&mut connect(address).unwrap()).unwrap(), b"hello");
    is_well();
    let hurt = Hurt::begin(&[&rule("blackhole")], options);
    assert!(connect(address).is_err(), "blackhole");
    hurt.end();
    is_well();
    for reject in ["reject", "reject=icmp-port"] {
        let hurt = Hurt::begin(&[&rule(reject)], options);
        // Over loopback and IPv6 the error can meet a socket that is still being worked on by connect(2);
        // the kernel drops it then, and it is the one about the SYN's retransmission that counts.
        let refused = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{reject}");
        hurt.end();
    }
    let mut old = connect(address).unwrap();
    exchange(&mut old).unwrap();
    let hurt = Hurt::begin(&[&rule("reset match=data")], options);
    assert_eq!(
        exchange(&mut old).unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "reset"
    );
    hurt.end();
    let mut old = connect(address).unwrap();
    exchange(&mut old).unwrap();
    let hurt = Hurt::begin(&[&rule("corrupt=100% dir=to-client")], options);
    assert_ne!(&exchange(&mut old).unwrap(), b"hello", "corrupt");
    hurt.end();
    assert_eq!(
        &exchange(&mut old).unwrap(),
        b"hello",
        "the old connection goes on"
    );
    is_well();
}

#[test]
fn tcp_is_hurt_and_heals_the_way_this_kernel_has() {
    enter_fresh();
    hurt_and_heal(echo("127.0.0.1"), "--scope host");
    hurt_and_heal(echo("::1"), "--scope host");
}

#[test]
fn tcp_is_hurt_and_heals_by_clsact() {
    enter_fresh();
    hurt_and_heal(echo("127.0.0.1"), "--scope host --attach clsact");
}

#[test]
fn udp_is_dropped_and_sent_twice() {
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    for options in ["--scope host", "--scope host --attach clsact"] {
        let hurt = Hurt::begin(
            &[
                "udp:7000 drop first=2 count=rule",
                "udp:7000 duplicate=100%",
            ],
            options,
        );
        for number in 1..=3_u8 {
            sender.send(&[number]).unwrap();
        }
        let mut byte = [0; 4];
        for _ in 0..2 {
            assert_eq!(receiver.recv(&mut byte).unwrap(), 1);
            assert_eq!(byte[0], 3);
        }
        hurt.end();
    }
}

#[test]
fn only_the_commands_own_sockets_are_touched() {
    enter_fresh();
    let address = echo("127.0.0.1");
    let hurt = Hurt::begin(&["tcp:7000 blackhole"], "");
    assert_eq!(&exchange(&mut connect(address).unwrap()).unwrap(), b"hello");
    hurt.end();
    let output = run(
        &["tcp:7000 reject"],
        "",
        &["busybox", "nc", "127.0.0.1", "7000"],
    );
    let told = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0), "{told}");
    assert!(!told.contains("never fired"), "{told}");
}

#[test]
fn a_rule_that_never_matched_tells_what_the_command_used_instead() {
    enter_fresh();
    echo("127.0.0.1");
    let output = run(
        &["tcp:5432 loss=30%"],
        "",
        &["busybox", "nc", "127.0.0.1", "7000"],
    );
    let told = String::from_utf8_lossy(&output.stderr);
    let expected = "the command connected to tcp:7000 (once), never to tcp:5432";
    assert!(told.contains(expected), "{told}");
    assert_eq!(output.status.code(), Some(120), "{told}");
}

#[test]
fn a_killed_instance_hurts_nothing_after_its_lease() {
    enter_fresh();
    let address = echo("127.0.0.1");
    let mut hurt = Hurt::begin(&["tcp:7000 blackhole"], "--scope host --attach clsact");
    assert!(connect(address).is_err());
    hurt.kill();
    wait_for(|| connect(address).is_ok(), "the lease to end");
    drop(hurt);
    assert!(fault().arg("clean").output().unwrap().status.success());
}
