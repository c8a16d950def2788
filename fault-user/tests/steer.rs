//! Stream faults on services that nobody reconfigured.

#[path = "end_to_end/place.rs"]
#[expect(dead_code, reason = "most of it is for the suite end_to_end")]
mod place;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use fault_user::process::netns::NetworkNamespace;
use place::{Hurt, PATIENCE, Peer, enter_fresh, run, wait_for};

/// Whether the kernel tells network namespaces apart (Linux 5.14), without which the whole host can't be led.
fn can_lead_the_host() -> bool {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let (mut cookie, mut length) = (0_u64, 8);
    // SAFETY: eight bytes of room, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status != 0 {
        eprintln!("skipped: SO_NETNS_COOKIE is of Linux 5.14");
    }
    status == 0
}

/// The virtual machines have no bash.
fn has_bash() -> bool {
    let found = std::path::Path::new("/bin/bash").exists();
    if !found {
        eprintln!("skipped: there is no bash");
    }
    found
}

/// Starts a server that answers each message with it, and names its client's port on connection.
fn echo(listener: TcpListener) -> SocketAddr {
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

fn local(host: &str) -> SocketAddr {
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    echo(TcpListener::bind(address).unwrap())
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<Duration> {
    let start = Instant::now();
    let mut answer = [0; 5];
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"hello");
    Ok(start.elapsed())
}

/// A round trip over a new connection, which must look as if it went straight.
fn round_trip(address: SocketAddr) -> std::io::Result<Duration> {
    let mut stream = TcpStream::connect(address)?;
    assert_eq!(stream.peer_addr()?, address, "who was dialled");
    exchange(&mut stream)
}

const SLOW: Duration = Duration::from_millis(200);

/// Whether a new connection is slow under `latency=100ms`, which holds both ways.
fn is_slow(address: SocketAddr) -> bool {
    round_trip(address).unwrap() >= SLOW
}

#[test]
fn a_hosts_connections_are_led_while_the_rule_is_in_force() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = local(host);
        let mut old = TcpStream::connect(address).unwrap();
        exchange(&mut old).unwrap();
        let hurt = Hurt::begin(&["tcp:7000 latency=100ms"], "--scope host");
        assert!(is_slow(address), "{host}");
        assert!(
            exchange(&mut old).unwrap() < SLOW,
            "an open connection stays as it is"
        );
        let mut led = TcpStream::connect(address).unwrap();
        exchange(&mut led).unwrap();
        let summary = hurt.end();
        assert!(summary.contains("relay (connect hook)"), "{summary}");
        assert!(!is_slow(address), "{host} healed");
        assert!(
            exchange(&mut led).is_err(),
            "what was led ends, and does not hang"
        );
    }
}

#[test]
fn a_listener_for_both_versions_and_a_mapped_address() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    echo(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 7000)).unwrap());
    let hurt = Hurt::begin(&["127.0.0.1:7000 latency=100ms"], "--scope host");
    assert!(is_slow("127.0.0.1:7000".parse().unwrap()));
    assert!(is_slow("[::ffff:127.0.0.1]:7000".parse().unwrap()));
    assert!(!is_slow("[::1]:7000".parse().unwrap()), "another host");
    hurt.end();
}

#[test]
fn a_server_elsewhere_is_reached_through_the_relay() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for host in ["10.77.0.2", "fd77::2"] {
        let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
        echo(namespace.enter(|| Ok(TcpListener::bind(address)?)).unwrap());
        let hurt = Hurt::begin(&["tcp:7000 latency=100ms"], "--scope host");
        assert!(is_slow(address), "{host}");
        hurt.end();
        assert!(!is_slow(address), "{host} healed");
    }
}

#[test]
fn only_the_command_is_led_and_two_at_once_do_not_meet() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let first = Hurt::begin(&["tcp:7000 latency=100ms"], "");
    let second = Hurt::begin(&["tcp:7000 reset_peer"], "");
    assert!(!is_slow(address), "this process is not the command");
    second.end();
    first.end();
    let script =
        "exec 3<>/dev/tcp/127.0.0.1/7000; echo hello >&3; read -t 5 -r line <&3; echo \"$line\"";
    let output = run(
        &["tcp:7000 substitute=hello,hurt!"],
        "",
        &["bash", "-c", script],
    );
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hurt!\n", "{told}");
    assert_eq!(output.status.code(), Some(0), "{told}");
}

#[test]
fn several_faults_on_one_target_add_up() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let hurt = Hurt::begin(
        &[
            "tcp:7000 latency=100ms dir=to-server",
            "tcp:7000 slicer=2,delay:1ms dir=to-client",
        ],
        "--scope host",
    );
    let took = round_trip(address).unwrap();
    assert!(
        took >= Duration::from_millis(100) && took < SLOW,
        "{took:?}"
    );
    let summary = hurt.end();
    assert!(!summary.contains(" 0 times"), "{summary}");
}

#[test]
fn packet_faults_act_behind_the_relay_once() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    local("127.0.0.1");
    let script = "exec 3<>/dev/tcp/127.0.0.1/7000; for n in 1 2 3; do echo hello >&3; read -t 5 -r line <&3; echo \"$line\"; done";
    let output = run(
        &[
            "tcp:7000 substitute=hello,relay dir=to-server",
            "tcp:7000 corrupt=100% dir=to-client match=data",
        ],
        "",
        &["bash", "-c", script],
    );
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{told}");
    let answers = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(answers.lines().count(), 3, "{answers} {told}");
    for answer in answers.lines() {
        assert!(answer != "relay" && answer != "hello", "{answers} {told}");
    }
    assert!(
        told.contains("         3 pkts"),
        "three answers, each once: {told}"
    );
}

#[test]
fn a_mix_draws_once_for_a_connection() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let hurt = Hurt::begin(
        &["tcp:7000 mix 50%:reset_peer 50%:latency=20ms"],
        "--scope host --seed 5",
    );
    let results: Vec<bool> = (0..40).map(|_| round_trip(address).is_ok()).collect();
    hurt.end();
    let good = results.iter().filter(|good| **good).count();
    assert!((8..=32).contains(&good), "{good} of 40");
}

#[test]
fn connections_are_picked_by_their_order() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let addresses = [local("127.0.0.1"), local("::1")];
    for (modifiers, expected) in [
        ("conn=2..3", [false, true, true, false, false, false]),
        (
            "conn=2..5 every=2",
            [false, false, true, false, true, false],
        ),
        ("after=5", [false, false, false, false, false, true]),
    ] {
        let rule = format!("tcp:7000 latency=100ms {modifiers}");
        let hurt = Hurt::begin(&[&rule], "--scope host");
        // Those of both versions of IP are counted as one.
        let slow: Vec<bool> = (0..6).map(|n| is_slow(addresses[n % 2])).collect();
        let summary = hurt.end();
        assert_eq!(slow, expected, "{modifiers}: {summary}");
        let count = expected.iter().filter(|slow| **slow).count();
        assert!(summary.contains("6 conns"), "{summary}");
        assert!(summary.contains(&format!("  {count}  relay")), "{summary}");
    }
}

#[test]
fn a_mix_acts_on_both_directions_as_its_faults_do() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let hurt = Hurt::begin(&["tcp:7000 mix 100%:latency=100ms"], "--scope host");
    assert!(is_slow(address), "late both ways");
    hurt.end();
    let hurt = Hurt::begin(
        &["tcp:7000 mix 100%:latency=100ms dir=to-client"],
        "--scope host",
    );
    assert!(!is_slow(address), "late one way");
    hurt.end();
}

#[test]
fn a_window_leads_connections_only_while_it_is_open() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let hurt = Hurt::begin(&["tcp:7000 latency=100ms at=1s for=2s"], "--scope host");
    assert!(!is_slow(address), "not yet");
    wait_for(|| is_slow(address), "the window to open");
    wait_for(|| !is_slow(address), "the window to close");
    let summary = hurt.end();
    assert!(!summary.contains(" 0 conns"), "{summary}");
}

#[test]
fn a_killed_instance_leads_nothing_any_more() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    for _ in 0..10 {
        let hurt = Hurt::begin(&["tcp:7000 latency=100ms"], "--scope host");
        let mut led = TcpStream::connect(address).unwrap();
        exchange(&mut led).unwrap();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(hurt.pid()).unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        let ended = exchange(&mut led).unwrap_err().kind();
        assert!(
            matches!(
                ended,
                ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe
            ),
            "{ended}"
        );
        wait_for(
            || {
                let straight = TcpStream::connect(address).and_then(|mut one| exchange(&mut one));
                straight.is_ok_and(|took| took < SLOW)
            },
            "connections to go straight",
        );
    }
}

#[test]
fn what_can_t_be_done_is_said_in_one_line() {
    enter_fresh();
    for (rule, expected) in [
        ("udp:7000 latency=1s", "UDP"),
        ("tcp latency=1s", "port"),
        ("tcp:7000 no_accept conn=1..2", "conn"),
        ("tcp:7000 error=http dir=to-client", "`dir`"),
        (
            "tcp:7000 mix 10%:latency=1s 10%:loss=5%",
            "`loss` does not act on a stream",
        ),
    ] {
        let output = run(&[rule], "", &["true"]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{rule}: {told}");
        assert!(told.contains(expected), "{rule}: {told}");
    }
    let output = run(&["tcp:7000 latency=1s"], "", &["true"]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(120), "{told}");
    assert!(told.contains("no new connection"), "{told}");
}

#[test]
fn what_serves_nobody_and_reads_nothing_has_fired() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    for rule in ["tcp:7000 no_accept", "tcp:7000 stall"] {
        let hurt = Hurt::begin(&[rule], "--scope host");
        let mut led = TcpStream::connect(address).expect("the handshake completes");
        led.write_all(b"hello").unwrap();
        led.set_read_timeout(Some(SLOW)).unwrap();
        let error = led.read(&mut [0; 5]).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{rule}");
        let summary = hurt.end();
        assert!(!summary.contains("never fired"), "{summary}");
        assert!(!is_slow(address), "{rule} healed");
    }
}

#[test]
fn reconnect_brings_open_connections_through_the_relay() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = local(host);
        let mut old = TcpStream::connect(address).unwrap();
        exchange(&mut old).unwrap();
        let hurt = Hurt::begin(&["tcp:7000 latency=100ms reconnect"], "");
        assert!(
            exchange(&mut old).unwrap() < SLOW,
            "this process is not the command"
        );
        hurt.end();
        let hurt = Hurt::begin(&["tcp:7000 latency=100ms reconnect"], "--scope host");
        let error = exchange(&mut old).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(is_slow(address));
        hurt.end();
        assert!(!is_slow(address));
    }
}
