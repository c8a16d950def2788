//! Stream faults on services that nobody reconfigured.

use std::io::{BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::support::echo::{tcp_echo, udp_client, udp_echo};
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, count_lines, enter_fresh, fault, has_bash, is_emulated, run,
    set_option, wait_for,
};
use fault_user::relay::{
    ClientEvent, Engine, HeldSyn, Listen, Pair, RawSockets, Relay, Settings, TcpInlet, Upstream,
    pair,
};
use fault_user::sys::process::netns::NetworkNamespace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, Uid};
use socket2::{Domain, Socket, Type};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Whether the kernel tells network namespaces apart (Linux 5.14), without which the whole host can't be redirected.
fn can_redirect_the_host() -> bool {
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

fn local(host: &str) -> SocketAddr {
    let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
    tcp_echo(TcpListener::bind(address).unwrap())
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

/// A round trip over a new connection, which must look as if it bypassed the relay.
fn round_trip(address: SocketAddr) -> std::io::Result<Duration> {
    let mut stream = TcpStream::connect(address)?;
    assert_eq!(stream.peer_addr()?, address, "who was dialled");
    exchange(&mut stream)
}

const SLOW: Duration = Duration::from_millis(200);

/// Whether each new connection is slow under `latency=100ms`, which holds both ways: one may be on a busy machine.
fn is_slow(address: SocketAddr) -> bool {
    (0..3).all(|_| round_trip(address).unwrap() >= SLOW)
}

#[test]
fn a_hosts_connections_are_redirected_while_the_rule_is_applied() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = local(host);
        let mut old = TcpStream::connect(address).unwrap();
        exchange(&mut old).unwrap();
        let applied = AppliedRules::begin(&["tcp:7000 latency=100ms"], "--scope host");
        assert!(is_slow(address), "{host}");
        assert!(
            exchange(&mut old).unwrap() < SLOW,
            "an open connection stays as it is"
        );
        let mut redirected = TcpStream::connect(address).unwrap();
        exchange(&mut redirected).unwrap();
        let summary = applied.end();
        assert!(summary.contains("relay (connect hook)"), "{summary}");
        assert!(!is_slow(address), "{host} restored");
        assert!(
            exchange(&mut redirected).is_err(),
            "what was redirected ends, and does not hang"
        );
    }
}

#[test]
fn a_listener_for_both_versions_and_a_mapped_address() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    tcp_echo(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 7000)).unwrap());
    let applied = AppliedRules::begin(&["127.0.0.1:7000 latency=100ms"], "--scope host");
    assert!(is_slow("127.0.0.1:7000".parse().unwrap()));
    assert!(is_slow("[::ffff:127.0.0.1]:7000".parse().unwrap()));
    assert!(!is_slow("[::1]:7000".parse().unwrap()), "another host");
    applied.end();
}

#[test]
fn a_server_elsewhere_is_reached_through_the_relay() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for host in ["10.77.0.2", "fd77::2"] {
        let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
        tcp_echo(namespace.enter(|| Ok(TcpListener::bind(address)?)).unwrap());
        let applied = AppliedRules::begin(&["tcp:7000 latency=100ms"], "--scope host");
        assert!(is_slow(address), "{host}");
        applied.end();
        assert!(!is_slow(address), "{host} restored");
    }
}

#[test]
fn only_the_command_is_redirected_and_two_instances_do_not_interfere() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let first = AppliedRules::begin(&["tcp:7000 latency=100ms"], "");
    let second = AppliedRules::begin(&["tcp:7000 reset_peer"], "");
    assert!(!is_slow(address), "this process is not the command");
    second.end();
    first.end();
    let script =
        "exec 3<>/dev/tcp/127.0.0.1/7000; echo hello >&3; read -t 5 -r line <&3; echo \"$line\"";
    let output = run(
        &["tcp:7000 substitute=hello,fault"],
        "",
        &["bash", "-c", script],
    );
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "fault\n",
        "{stderr_text}"
    );
    assert_eq!(output.status.code(), Some(0), "{stderr_text}");
}

#[test]
fn several_faults_on_one_target_add_up() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(
        &[
            "tcp:7000 latency=100ms dir=to-server",
            "tcp:7000 slicer=2,delay:1ms dir=to-client",
        ],
        "--scope host",
    );
    let took = round_trip(address).unwrap();
    assert!(
        took >= Duration::from_millis(100) && (took < SLOW || is_emulated()),
        "{took:?}"
    );
    let summary = applied.end();
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
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr_text}");
    let answers = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(answers.lines().count(), 3, "{answers} {stderr_text}");
    for answer in answers.lines() {
        assert!(
            answer != "relay" && answer != "hello",
            "{answers} {stderr_text}"
        );
    }
    assert!(
        stderr_text.contains("  3 pkts"),
        "three answers, each once: {stderr_text}"
    );
}

#[test]
fn a_mix_draws_once_for_a_connection() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(
        &["tcp:7000 mix 50%:reset_peer 50%:latency=20ms"],
        "--scope host --seed 5",
    );
    let results: Vec<bool> = (0..40).map(|_| round_trip(address).is_ok()).collect();
    applied.end();
    let good = results.iter().filter(|good| **good).count();
    assert!((8..=32).contains(&good), "{good} of 40");
}

#[test]
fn connections_are_picked_by_their_order() {
    if !can_redirect_the_host() {
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
        let applied = AppliedRules::begin(&[&rule], "--scope host");
        // Those of both versions of IP are counted as one.
        let slow: Vec<bool> = (0..6)
            .map(|n| round_trip(addresses[n % 2]).unwrap() >= SLOW)
            .collect();
        let summary = applied.end();
        assert_eq!(slow, expected, "{modifiers}: {summary}");
        let count = expected.iter().filter(|slow| **slow).count();
        assert!(summary.contains("6 conns"), "{summary}");
        assert!(summary.contains(&format!("  {count}  relay")), "{summary}");
    }
}

#[test]
fn a_mix_acts_on_both_directions_as_its_faults_do() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(&["tcp:7000 mix 100%:latency=100ms"], "--scope host");
    assert!(is_slow(address), "late both ways");
    applied.end();
    let applied = AppliedRules::begin(
        &["tcp:7000 mix 100%:latency=100ms dir=to-client"],
        "--scope host",
    );
    assert!(!is_slow(address), "late one way");
    applied.end();
}

#[test]
fn a_window_leads_connections_only_while_it_is_open() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(&["tcp:7000 latency=100ms at=1s for=2s"], "--scope host");
    assert!(!is_slow(address), "not yet");
    wait_for(|| is_slow(address), "the window to open");
    wait_for(|| !is_slow(address), "the window to close");
    let summary = applied.end();
    assert!(!summary.contains(" 0 conns"), "{summary}");
}

#[test]
fn what_a_client_has_asked_for_is_known_to_a_rule_that_starts_later() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let rules = [
        "tcp:7000 latency=1ms",
        "tcp:7000 latency=100ms host=*.example.com at=1s",
    ];
    let applied = AppliedRules::begin(&rules, "--scope host");
    let ask = |host: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut echoed = vec![0; request.len()];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut echoed).unwrap();
        assert_eq!(echoed, request.as_bytes());
        stream
    };
    let (mut selected, mut other) = (ask("a.example.com"), ask("a.example.org"));
    // Three times in a row: one exchange may be slow on a busy machine.
    let is_slow = |stream: &mut TcpStream| (0..3).all(|_| exchange(stream).unwrap() >= SLOW);
    wait_for(|| is_slow(&mut selected), "the rule to start");
    assert!(!is_slow(&mut other), "another host");
    applied.end();
}

#[test]
fn a_killed_instance_redirects_nothing() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let server = udp_echo(UdpSocket::bind("127.0.0.1:7053").unwrap());
    let rules = ["tcp:7000 latency=100ms", "udp:7053 latency=100ms"];
    for _ in 0..5 {
        let mut applied = AppliedRules::begin(&rules, "--scope host");
        let client = udp_client(server);
        assert!(ask(&client, server, "question").1 >= SLOW);
        let mut redirected = TcpStream::connect(address).unwrap();
        exchange(&mut redirected).unwrap();
        applied.kill();
        let ended = exchange(&mut redirected).unwrap_err().kind();
        assert!(
            matches!(
                ended,
                ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe
            ),
            "{ended}"
        );
        wait_for(
            || {
                let direct = TcpStream::connect(address).and_then(|mut one| exchange(&mut one));
                direct.is_ok_and(|took| took < SLOW)
            },
            "connections to bypass the relay",
        );
        client.set_read_timeout(Some(SLOW)).unwrap();
        wait_for(
            || {
                client.send_to(b"question", server).unwrap();
                // What is late was sent while the relay was still there.
                client
                    .recv_from(&mut [0; 9])
                    .is_ok_and(|(_, from)| from == server)
            },
            "datagrams to bypass the relay",
        );
    }
}

/// Starts a server of UDP that answers each datagram with it.
/// A question and its answer without connect(2): the answer must come from who was asked.
fn ask(client: &UdpSocket, server: SocketAddr, text: &str) -> (String, Duration) {
    let start = Instant::now();
    client.send_to(text.as_bytes(), server).unwrap();
    let mut bytes = vec![0; 1 << 16];
    let (size, from) = client.recv_from(&mut bytes).expect("an answer");
    assert_eq!(from, server, "who answers");
    let answer = String::from_utf8_lossy(&bytes[..size]).into_owned();
    (answer, start.elapsed())
}

#[test]
fn datagrams_are_redirected_with_connect_and_without() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7053);
        let server = udp_echo(UdpSocket::bind(address).unwrap());
        let old = udp_client(server);
        old.connect(server).unwrap();
        let applied = AppliedRules::begin(&["udp:7053 latency=100ms"], "--scope host");
        let client = udp_client(server);
        assert!(ask(&client, server, "one").1 >= SLOW, "{host}");
        let connected = udp_client(server);
        connected.connect(server).unwrap();
        assert_eq!(connected.peer_addr().unwrap(), server, "who was dialled");
        let start = Instant::now();
        connected.send(b"two").unwrap();
        assert_eq!(connected.recv(&mut [0; 9]).unwrap(), 3);
        assert!(start.elapsed() >= SLOW, "{host}");
        let start = Instant::now();
        old.send(b"three").unwrap();
        old.recv(&mut [0; 9]).unwrap();
        assert!(start.elapsed() >= SLOW, "what was connected is hit too");
        let summary = applied.end();
        assert!(summary.contains("3 conns"), "{summary}");
        // The same sockets, without the rule.
        let (answer, took) = ask(&client, server, "four");
        assert_eq!(answer, "four");
        assert!(took < SLOW, "{host} restored");
        connected.send(b"five").unwrap();
        assert_eq!(connected.recv(&mut [0; 9]).unwrap(), 4, "connected");
        assert_eq!(connected.peer_addr().unwrap(), server);
    }
}

#[test]
fn one_socket_with_several_servers_and_many_clients() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let servers: Vec<SocketAddr> = ["10.77.0.2:7053", "[fd77::2]:7053", "127.0.0.1:7053"]
        .map(|text| text.parse().unwrap())
        .to_vec();
    for server in &servers {
        let bind = || Ok(UdpSocket::bind(server)?);
        let socket = if server.ip().is_loopback() {
            bind().unwrap()
        } else {
            namespace.enter(bind).unwrap()
        };
        udp_echo(socket);
    }
    let applied = AppliedRules::begin(
        &["udp:7053 substitute=question,answered dir=to-client"],
        "--scope host",
    );
    let client = UdpSocket::bind("[::]:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    for round in 0..3 {
        for server in &servers {
            let asked = match server {
                SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
                SocketAddr::V6(_) => *server,
            };
            let (answer, _) = ask(&client, asked, &format!("question {round} for {server}"));
            assert_eq!(answer, format!("answered {round} for {server}"));
        }
    }
    let clients: Vec<UdpSocket> = (0..100).map(|_| udp_client(servers[0])).collect();
    for (number, client) in clients.iter().enumerate() {
        let text = format!("question {number}");
        client
            .send_to(text.as_bytes(), servers[number % 2 * 2])
            .unwrap();
    }
    for (number, client) in clients.iter().enumerate() {
        let mut bytes = [0; 64];
        let (size, from) = client.recv_from(&mut bytes).expect("an answer");
        assert_eq!(from, servers[number % 2 * 2]);
        let expected = format!("answered {number}");
        assert_eq!(String::from_utf8_lossy(&bytes[..size]), expected);
    }
    let connected: Vec<UdpSocket> = servers
        .iter()
        .map(|server| {
            let client = udp_client(*server);
            client.connect(server).unwrap();
            client
        })
        .collect();
    let question = |client: &UdpSocket| {
        client.send(b"question").unwrap();
        let mut bytes = [0; 64];
        let size = client.recv(&mut bytes).expect("an answer");
        String::from_utf8_lossy(&bytes[..size]).into_owned()
    };
    assert!(
        connected
            .iter()
            .all(|client| question(client) == "answered")
    );
    applied.end();
    // Their own address is no longer that of loopback, from which no other host is reached.
    assert!(
        connected
            .iter()
            .all(|client| question(client) == "question")
    );
}

/// The words by which `fault` starts this program in a role of [`another_process`].
fn role(words: &str) -> Vec<String> {
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
    let role = format!("FAULT_TEST_ROLE={words}");
    let words = [
        "env",
        &role,
        program,
        "--exact",
        "steer::another_process",
        "--nocapture",
    ];
    words.map(str::to_owned).to_vec()
}

/// Not a test: what this program does in the place of CMD. The virtual machines have neither bash nor Python.
#[test]
fn another_process() {
    let Ok(role) = std::env::var("FAULT_TEST_ROLE") else {
        return;
    };
    let mut words = role.split(' ');
    match words.next().unwrap() {
        "serve" => words.for_each(|address| {
            tcp_echo(TcpListener::bind(address).unwrap());
        }),
        "leave" => drop(TcpListener::bind(words.next().unwrap()).unwrap()),
        "say" => {
            let mut stream = TcpStream::connect(words.next().unwrap()).unwrap();
            stream.write_all(&last_words()).unwrap();
            drop(stream);
            if words.next() == Some("die") {
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
            }
            return;
        }
        "reply" => {
            let listener = TcpListener::bind(words.next().unwrap()).unwrap();
            println!("ready");
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0]).unwrap();
            stream.write_all(&last_words()).unwrap();
            return;
        }
        "ask" => {
            ask_four(words.next().unwrap().parse().unwrap());
            return;
        }
        other => panic!("{other}"),
    }
    println!("ready");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}

/// Sends four datagrams, and tells of so many answers.
fn ask_four(count: usize) {
    let client = udp_client("127.0.0.1:7053".parse().unwrap());
    let mut bytes = [0; 100];
    for number in 0..4 {
        let text = format!("query{number}");
        client.send_to(text.as_bytes(), "127.0.0.1:7053").unwrap();
    }
    for _ in 0..count {
        let (size, from) = client.recv_from(&mut bytes).expect("an answer");
        println!("answer {} {from}", String::from_utf8_lossy(&bytes[..size]));
    }
    client.set_read_timeout(Some(SLOW)).unwrap();
    if let Ok((_, from)) = client.recv_from(&mut bytes) {
        println!("answer one too many {from}");
    }
}

#[test]
fn datagrams_of_the_command_are_faulted_and_counted() {
    enter_fresh();
    let server = udp_echo(UdpSocket::bind("127.0.0.1:7053").unwrap());
    for (rule, expected) in [
        (
            "udp:7053 discard first=2 dir=to-server",
            ["query2", "query3"].as_slice(),
        ),
        (
            "udp:7053 discard every=2 dir=to-client",
            &["query0", "query2"],
        ),
        (
            "udp:7053 corrupt_data=zero,offset:0 dir=to-client nth=3",
            &["query0", "query1", "\0uery2", "query3"],
        ),
        ("7053 limit_data=12", &["query0", "query1"]),
        (
            "udp:7053 discard conn=2",
            &["query0", "query1", "query2", "query3"],
        ),
    ] {
        let command = role(&format!("ask {}", expected.len()));
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let output = run(&[rule], "--allow-unfired", &command);
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let answers: Vec<&str> = lines
            .lines()
            .filter_map(|line| line.strip_prefix("answer "))
            .collect();
        let expected: Vec<_> = expected
            .iter()
            .map(|answer| format!("{answer} 127.0.0.1:7053"))
            .collect();
        assert_eq!(answers, expected, "{rule}: {stderr_text}");
    }
    let outside = udp_client(server);
    let applied = AppliedRules::begin(&["udp:7053 discard"], "");
    ask(&outside, server, "this process is not the command");
    applied.end();
}

#[test]
fn what_can_t_be_done_is_said_in_one_line() {
    enter_fresh();
    for (rule, expected) in [
        ("udp:7000 timeout=1s", "`timeout` does not work on UDP"),
        ("udp:7000 slicer=10", "`slicer` does not work on UDP"),
        ("udp:7000 latency=1s size=1..9", "`size`"),
        ("icmp latency=1s", "ICMP"),
        ("tcp latency=1s", "port"),
        ("tcp:7000 no_accept conn=1..2", "conn"),
        ("tcp:7000 error=http dir=to-client", "`dir`"),
        (
            "tcp:7000 loss=5% sni=a.example",
            "`sni` is read from a stream, and `loss` works on packets",
        ),
        (
            "udp:7000 latency=1s host=a.example",
            "`host` is read from TCP, and this target is UDP",
        ),
        ("tcp:7000 latency=1s sni=a..example", "is no host name"),
        ("tcp:7000 no_accept alpn=h2", "leave it out"),
        (
            "tcp:7000 mix 10%:latency=1s 10%:loss=5%",
            "`loss` does not act on a stream",
        ),
    ] {
        let output = run(&[rule], "", &["true"]);
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{rule}: {stderr_text}");
        assert!(stderr_text.contains(expected), "{rule}: {stderr_text}");
    }
    for (rule, expected) in [
        ("tcp:7000 latency=1s", "no new connection"),
        ("udp:7000 latency=1s", "no datagram"),
        ("udp latency=1s", "no datagram"),
        ("7000 latency=1s", "no new connection"),
    ] {
        let output = run(&[rule], "", &["true"]);
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(120), "{rule}: {stderr_text}");
        assert!(stderr_text.contains(expected), "{rule}: {stderr_text}");
    }
}

#[test]
fn a_rule_on_an_unused_connection_has_fired() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    for rule in ["tcp:7000 no_accept", "tcp:7000 stall"] {
        let applied = AppliedRules::begin(&[rule], "--scope host");
        let mut redirected = TcpStream::connect(address).expect("the handshake completes");
        redirected.write_all(b"hello").unwrap();
        redirected.set_read_timeout(Some(SLOW)).unwrap();
        let error = redirected.read(&mut [0; 5]).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{rule}");
        let summary = applied.end();
        assert!(!summary.contains("never fired"), "{summary}");
        assert!(!is_slow(address), "{rule} restored");
    }
}

#[test]
fn reconnect_brings_open_connections_through_the_relay() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = local(host);
        let mut old = TcpStream::connect(address).unwrap();
        exchange(&mut old).unwrap();
        let applied = AppliedRules::begin(&["tcp:7000 latency=100ms reconnect"], "");
        assert!(
            exchange(&mut old).unwrap() < SLOW,
            "this process is not the command"
        );
        applied.end();
        let applied = AppliedRules::begin(&["tcp:7000 latency=100ms reconnect"], "--scope host");
        let error = exchange(&mut old).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(is_slow(address));
        applied.end();
        assert!(!is_slow(address));
    }
}

#[test]
fn another_network_namespace_with_its_clients_inside_and_outside() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let here = local("127.0.0.1");
    let here_udp = udp_echo(UdpSocket::bind("127.0.0.1:7053").unwrap());
    for host in ["10.77.0.2", "fd77::2"] {
        let there = SocketAddr::new(host.parse::<IpAddr>().unwrap(), 7000);
        let there_udp = SocketAddr::new(there.ip(), 7053);
        let (tcp, udp) = namespace
            .enter(|| Ok((TcpListener::bind(there)?, UdpSocket::bind(there_udp)?)))
            .unwrap();
        tcp_echo(tcp);
        udp_echo(udp);
        let is_slow_inside = || namespace.enter(|| Ok(is_slow(there))).unwrap();
        let asked_inside = || {
            let ask = || Ok(ask(&udp_client(there_udp), there_udp, "inside").1 >= SLOW);
            namespace.enter(ask).unwrap()
        };
        let mut old = TcpStream::connect(there).unwrap();
        exchange(&mut old).unwrap();
        let applied = AppliedRules::begin(
            &["tcp:7000 latency=100ms reconnect", "udp:7053 latency=100ms"],
            &format!("--netns {}", peer.name),
        );
        assert!(exchange(&mut old).is_err(), "{host}: reset");
        assert!(is_slow_inside(), "{host}: a client in there");
        assert!(asked_inside(), "{host}: a client of UDP in there");
        assert!(is_slow(there), "{host}: a client from outside");
        // More than one packet, and an odd number of bytes.
        let (answer, took) = ask(&udp_client(there_udp), there_udp, &"outside".repeat(201));
        assert_eq!(answer, "outside".repeat(201), "{host}");
        assert!(took >= SLOW, "{host}: a client of UDP from outside");
        let connected = udp_client(there_udp);
        connected.connect(there_udp).unwrap();
        connected.send(b"").unwrap();
        assert_eq!(
            connected.recv(&mut [0; 9]).unwrap(),
            0,
            "{host}: nothing is something"
        );
        assert!(!is_slow(here), "another service at the same port elsewhere");
        assert!(ask(&udp_client(here_udp), here_udp, "here").1 < SLOW);
        applied.end();
        assert!(!is_slow_inside() && !asked_inside(), "{host} restored");
        assert!(!is_slow(there), "{host} restored");
        assert!(
            ask(&udp_client(there_udp), there_udp, "out").1 < SLOW,
            "{host} restored"
        );
    }
}

/// This program as the command of `fault run`, in a role in which it waits for the end of its input.
struct Serving(std::process::Child);

impl Serving {
    fn begin(rules: &[&str], words: &str) -> Self {
        let mut command = fault();
        command.args(["run", "--allow-unfired"]);
        for rule in rules {
            command.args(["-r", rule]);
        }
        let mut child = command
            .arg("--")
            .args(role(words))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(child.stdout.as_mut().unwrap());
        let is_ready = out.lines().any(|line| line.unwrap().ends_with("ready"));
        assert!(is_ready, "the command begins");
        Self(child)
    }

    fn end(mut self) -> String {
        drop(self.0.stdin.take());
        let mut summary = String::new();
        let mut stderr = self.0.stderr.take().unwrap();
        stderr.read_to_string(&mut summary).unwrap();
        assert!(self.0.wait().unwrap().success(), "{summary}");
        summary
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("waiting for fault: {error}");
        }
    }
}

#[test]
fn the_command_is_the_server_and_its_clients_are_not() {
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let others = local("127.0.0.1");
    for (bound, dialled) in [
        ("127.0.0.2:7000", ["127.0.0.2:7000"].as_slice()),
        ("[::1]:7000", &["[::1]:7000"]),
        ("10.77.0.1:7000", &["10.77.0.1:7000"]),
        (
            "[::]:7001 0.0.0.0:7002",
            &["[fd77::1]:7001", "10.77.0.1:7001", "127.0.0.1:7002"],
        ),
    ] {
        let serving = Serving::begin(&["tcp:7000-7002 latency=100ms"], &format!("serve {bound}"));
        for address in dialled {
            let address: SocketAddr = address.parse().unwrap();
            assert!(is_slow(address), "{address}");
            if !address.ip().is_loopback() {
                let outside = namespace.enter(|| Ok(is_slow(address)));
                assert!(outside.unwrap(), "{address} from outside");
            }
        }
        assert!(!is_slow(others), "a server of somebody else's at that port");
        // Many at once: none meets the relay twice, and none is let pass.
        let address: SocketAddr = dialled[0].parse().unwrap();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..20).map(|_| scope.spawn(|| is_slow(address))).collect();
            assert!(clients.into_iter().all(|client| client.join().unwrap()));
        });
        let summary = serving.end();
        assert!(!summary.contains(" 0 conns"), "{summary}");
    }
}

#[test]
fn a_port_that_the_commands_server_has_closed_is_not_redirected() {
    enter_fresh();
    let left = Serving::begin(&["tcp:7000 latency=100ms"], "leave 127.0.0.1:7000");
    let address = local("127.0.0.1");
    assert!(!is_slow(address), "it is this process' now");
    left.end();
}

/// Moves this thread, and so all that it starts, to where no cgroup2 is mounted.
fn leave_cgroups() {
    let none = None::<&str>;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
    nix::mount::mount(none, "/", none, private, none).unwrap();
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    for line in mounts
        .lines()
        .rev()
        .filter(|line| line.contains(" - cgroup2 "))
    {
        let place = line.split(' ').nth(4).unwrap();
        nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn what_is_missing_is_said_in_one_line() {
    use std::os::unix::process::CommandExt as _;
    enter_fresh();
    let said = |output: std::io::Result<std::process::Output>, expected: &str| {
        let output = output.unwrap();
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{stderr_text}");
        assert_eq!(count_lines(&stderr_text), 1, "{stderr_text}");
        assert!(stderr_text.contains(expected), "{stderr_text}");
    };
    let rule = ["-r", "tcp:7000 latency=1s"];
    let mut nobody = fault();
    nobody
        .args(["run", "--scope", "host"])
        .args(rule)
        .args(["--", "true"]);
    said(nobody.uid(65534).gid(65534).output(), "root");
    if is_emulated() {
        eprintln!("skipped: init may mount cgroup2 again");
        return;
    }
    leave_cgroups();
    let mut inject = fault();
    said(
        inject.args(["inject", "--for", "1s"]).args(rule).output(),
        "cgroup2",
    );
}

#[test]
fn nobody_listens_and_every_port_is_the_rules() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    // The relay's own ports are among these: nothing goes around in a circle.
    let rules = ["tcp:1-65535 latency=100ms", "udp:1-65535 latency=100ms"];
    let applied = AppliedRules::begin(&rules, "--scope host --force");
    let address = local("127.0.0.1");
    let server = udp_echo(UdpSocket::bind("127.0.0.1:7053").unwrap());
    assert!(is_slow(address));
    assert!(ask(&udp_client(server), server, "question").1 >= SLOW);
    assert_eq!(
        refusal("127.0.0.1:7001").raw_os_error(),
        Some(libc::ECONNREFUSED)
    );
    let summary = applied.end();
    assert!(
        summary.contains("1 connections to tcp:1-65535 failed: connection refused"),
        "{summary}"
    );
}

/// What a process sends before it is gone.
fn last_words() -> Vec<u8> {
    (0..50_000_u32)
        .flat_map(u32::to_be_bytes)
        .take(50_000)
        .collect()
}

/// What comes by a connection until its end, and whether that is an orderly one.
type Heard = (Vec<u8>, bool);

fn hear(mut stream: TcpStream) -> Heard {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    let is_orderly = stream.read_to_end(&mut bytes).is_ok();
    (bytes, is_orderly)
}

/// What a server hears of the next connection.
fn hear_next(listener: &TcpListener) -> std::thread::JoinHandle<Heard> {
    let listener = listener.try_clone().unwrap();
    std::thread::spawn(move || hear(listener.accept().unwrap().0))
}

#[test]
fn the_last_words_of_a_command_arrive_or_the_server_is_reset() {
    enter_fresh();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    // An emulated processor is too slow for the time that is enough elsewhere.
    let patient = if is_emulated() { "--drain 20s" } else { "" };
    for (rule, options, arrives) in [
        ("tcp:7000 latency=300ms dir=to-server", "", true),
        ("tcp:7000 bandwidth=50kB/s", patient, true),
        ("tcp:7000 slicer=1000,delay:1ms", patient, true),
        ("tcp:7000 coalesce=1MiB,300ms", "", true),
        ("tcp:7000 slow_close=300ms", "--drain 20s", true),
        ("tcp:7000 stall for=3s", "", true),
        ("tcp:7000 stall", "", false),
        ("tcp:7000 latency=60s", "--drain 100ms", false),
    ] {
        for role_name in ["say 127.0.0.1:7000", "say 127.0.0.1:7000 die"] {
            let hearing = hear_next(&listener);
            let command = role(role_name);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            let output = run(&[rule], &format!("--allow-unfired {options}"), &command);
            let stderr_text = String::from_utf8_lossy(&output.stderr);
            let (heard, is_orderly) = hearing.join().unwrap();
            let case = format!("{rule} {role_name}: {} bytes, {stderr_text}", heard.len());
            assert_eq!(is_orderly, arrives, "{case}");
            assert_eq!(heard == last_words(), arrives, "{case}");
            let counted = "1 connections were still open and were reset; 50000 of their bytes";
            assert_eq!(stderr_text.contains(counted), !arrives, "{case}");
        }
    }
}

#[test]
fn the_last_words_of_a_server_in_the_command_arrive() {
    enter_fresh();
    let address = "127.0.0.1:7000";
    let serving = Serving::begin(&["tcp:7000 latency=300ms"], &format!("reply {address}"));
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"x").unwrap();
    let (heard, is_orderly) = hear(client);
    assert!(is_orderly && heard == last_words(), "{} bytes", heard.len());
    serving.end();
}

#[test]
fn no_end_of_inject_is_an_orderly_end_after_missing_bytes() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    let talked_to = TcpListener::bind("127.0.0.1:7001").unwrap();
    for options in [&["--for", "2s"][..], &[]] {
        let mut inject = fault();
        inject.args(["inject", "-r", "tcp:7000-7001 latency=200ms"]);
        let mut inject = inject
            .args(options)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = std::io::BufReader::new(inject.stderr.take().unwrap()).lines();
        assert!(stderr.any(|line| line.unwrap().contains("press Ctrl-C")));
        // Everything was said before the end, or the peers still talk when it comes.
        let hearing = hear_next(&listener);
        let mut client = TcpStream::connect("127.0.0.1:7000").unwrap();
        let talking_to = hear_next(&talked_to);
        let talker = TcpStream::connect("127.0.0.1:7001").unwrap();
        client.write_all(&last_words()).unwrap();
        drop(client);
        let talking = std::thread::spawn(move || {
            let mut talker = talker;
            let mut sent = 0;
            while talker.write_all(&[7; 1000]).is_ok() && sent < 10_000_000 {
                sent += 1000;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        if options.is_empty() {
            let pid = nix::unistd::Pid::from_raw(inject.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        }
        let rest: Vec<String> = stderr.map(Result::unwrap).collect();
        assert!(inject.wait().unwrap().success(), "{rest:?}");
        let (heard, is_orderly) = hearing.join().unwrap();
        assert!(is_orderly && heard == last_words(), "{} bytes", heard.len());
        let (_, is_orderly) = talking_to.join().unwrap();
        assert!(!is_orderly, "who still talks is cut off aloud: {rest:?}");
        assert!(talking.join().unwrap() < 10_000_000);
        let counted = "1 connections were still open and were reset";
        assert!(rest.iter().any(|line| line.contains(counted)), "{rest:?}");
    }
}

/// Why a connection can't be opened.
fn refusal(address: &str) -> std::io::Error {
    let refused = TcpStream::connect_timeout(&address.parse().unwrap(), PATIENCE);
    refused.expect_err("nobody is there")
}

#[test]
fn a_connection_fails_as_it_does_without_a_rule() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let _peer = Peer::joined();
    let addresses = [
        "127.0.0.1:7001",
        "[::1]:7001",
        "10.77.0.2:7001",
        "10.77.0.1:7001",
        "[fd77::2]:7001",
        "203.0.113.1:7001",
        "[2001:db8::1]:7001",
        "255.255.255.255:7001",
        "224.0.0.1:7001",
        "[ff02::1]:7001",
        "[fe80::1]:7001",
        // Nobody has this address: the kernel asks three times.
        "10.77.0.99:7001",
    ];
    let all = || addresses.map(|address| refusal(address).raw_os_error());
    let plain = all();
    let applied = AppliedRules::begin(&["tcp:7000-7009 latency=1ms"], "--scope host");
    assert_eq!(all(), plain, "{addresses:?}");
    // The way of programs that wait for events.
    for (address, expected) in [
        ("127.0.0.1:7001", libc::ECONNREFUSED),
        ("203.0.113.1:7001", libc::ENETUNREACH),
    ] {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        let address: SocketAddr = address.parse().unwrap();
        let begun = client.connect(&address.into()).unwrap_err();
        assert_eq!(begun.raw_os_error(), Some(libc::EINPROGRESS));
        let mut error = None;
        wait_for(
            || {
                error = client.take_error().unwrap();
                error.is_some()
            },
            "an error of the socket",
        );
        assert_eq!(error.unwrap().raw_os_error(), Some(expected), "{address}");
    }
    // A script that waits for a port.
    assert_eq!(
        refusal("127.0.0.1:7000").kind(),
        ErrorKind::ConnectionRefused
    );
    let address = local("127.0.0.1");
    round_trip(address).unwrap();
    let summary = applied.end();
    assert!(
        summary.contains("failed: network is unreachable"),
        "{summary}"
    );
}

/// A relay whose clients' SYNs are told of by the test; nothing holds them.
struct AnnouncingRelay {
    _relay: std::sync::Arc<Relay>,
    events: UnboundedSender<ClientEvent>,
    sockets: std::sync::Arc<RawSockets>,
    address: SocketAddr,
    /// Tells that a server waits for its client.
    reached: (Sender<Pair>, Receiver<Pair>),
}

impl AnnouncingRelay {
    fn of(server: &TcpListener) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (events, handshakes) = unbounded_channel();
        let handshakes = Some(handshakes);
        let inlet = std::sync::Mutex::new(Some(TcpInlet {
            listener,
            handshakes,
        }));
        let bind = move || Ok(inlet.lock().unwrap().take().expect("it starts once"));
        let settings = Settings {
            name: "test".to_owned(),
            title: "test".to_owned(),
            seed: 1,
            listen: Listen::TcpHook(std::sync::Arc::new(bind)),
            upstream: Upstream::name(server.local_addr().unwrap().to_string()),
            udp_idle: Settings::UDP_IDLE,
            ordinals: std::sync::Arc::default(),
        };
        let relay = Relay::new(&Engine::start(1).unwrap(), settings);
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(relay.set_enabled(true)).unwrap();
        Self {
            _relay: relay,
            events,
            sockets: std::sync::Arc::new(RawSockets::open(|_| Ok(())).unwrap()),
            address,
            reached: channel(),
        }
    }

    /// A client of this port has sent, or has sent again, a SYN with this initial sequence number.
    fn tell(&self, port: u16, sequence: u32) {
        let mut header = [0; 20];
        header[..2].copy_from_slice(&port.to_be_bytes());
        header[2..4].copy_from_slice(&self.address.port().to_be_bytes());
        header[4..8].copy_from_slice(&sequence.to_be_bytes());
        header[12..14].copy_from_slice(&[5 << 4, 2]);
        let reached = self.reached.0.clone();
        let syn = HeldSyn {
            pair: pair(([127, 0, 0, 1], port).into(), self.address),
            header: header.to_vec(),
            sockets: std::sync::Arc::clone(&self.sockets),
            stop_holding: std::sync::Arc::new(move |pair| {
                reached.send(pair).unwrap();
                Ok(())
            }),
        };
        self.events.send(ClientEvent::Syn(syn)).unwrap();
    }

    /// Connects as that client, whose server the relay has reached.
    fn connect(&self, port: u16) -> TcpStream {
        let reached = self.reached.1.recv_timeout(PATIENCE).unwrap();
        assert_eq!(reached.client.port(), port);
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let own = SocketAddr::from(([127, 0, 0, 1], port));
        client.bind(&own.into()).unwrap();
        client.connect(&self.address.into()).unwrap();
        client.into()
    }
}

#[test]
fn a_syn_that_is_told_of_twice_opens_one_connection() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    enter_fresh();
    let server = TcpListener::bind("127.0.0.1:7000").unwrap();
    let accept = || {
        let (accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        accepted
    };
    let arrives = |mut client: &TcpStream, mut server: &TcpStream, byte: u8| {
        client.write_all(&[byte]).unwrap();
        let mut got = [0];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, [byte]);
    };
    let relay = AnnouncingRelay::of(&server);

    relay.tell(6001, 1);
    let first = accept();
    let client = relay.connect(6001);
    arrives(&client, &first, b'1');
    relay.tell(6001, 1);
    relay.tell(6002, 5);
    let second = accept();
    arrives(&relay.connect(6002), &second, b'2');

    // Another connection of the same ends, of whose predecessor's end nobody has told.
    relay.tell(6003, 7);
    let mut given_up = accept();
    relay.tell(6003, 8);
    let third = accept();
    assert!(!matches!(given_up.read(&mut [0]), Ok(1..)));
    arrives(&relay.connect(6003), &third, b'3');
}

#[test]
fn a_port_that_is_used_again_at_once_connects() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    for _ in 0..300 {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let own: SocketAddr = "127.0.0.1:6000".parse().unwrap();
        client.set_reuse_address(true).unwrap();
        client.bind(&own.into()).unwrap();
        client.set_linger(Some(Duration::ZERO)).unwrap();
        // Other tests' processes may have the client before still, for a moment.
        let connects = || match client.connect(&address.into()) {
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => false,
            connected => connected.map(|()| true).unwrap(),
        };
        wait_for(connects, "the client's ends to be free");
        // Its end is a reset, which nobody waits for.
        exchange(&mut client.into()).unwrap();
    }
    let summary = applied.end();
    assert!(summary.contains("300 conns"), "{summary}");
}

#[test]
fn a_server_that_resets_at_once_has_accepted() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let server = TcpListener::bind("127.0.0.1:7000").unwrap();
    let address = server.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in server.incoming() {
            let client = Socket::from(client.unwrap());
            client.set_linger(Some(Duration::ZERO)).unwrap();
        }
    });
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    for _ in 0..50 {
        let mut client = TcpStream::connect(address).expect("the server accepts");
        let error = client.read(&mut [0]).expect_err("the server resets");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    let summary = applied.end();
    assert!(!summary.contains("failed"), "{summary}");
}

#[test]
fn clients_from_outside_are_refused_at_a_closed_port() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], &format!("--netns {}", peer.name));
    for address in ["10.77.0.2:7000", "[fd77::2]:7000"] {
        assert_eq!(
            refusal(address).kind(),
            ErrorKind::ConnectionRefused,
            "{address}"
        );
    }
    applied.end();
}

#[test]
fn sockets_have_the_addresses_that_they_would_have() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let servers: Vec<SocketAddr> = ["127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.2:7000"]
        .iter()
        .map(|address| tcp_echo(TcpListener::bind(address).unwrap()))
        .collect();
    tcp_echo(TcpListener::bind("[::1]:7002").unwrap());
    let applied = AppliedRules::begin(&["tcp:7000-7009 latency=1ms"], "--scope host");
    let from = |port: u16| {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        client.set_reuse_address(true).unwrap();
        client
            .bind(&SocketAddr::from(([127, 0, 0, 1], port)).into())
            .unwrap();
        client
    };
    // One port for several servers.
    let clients: Vec<TcpStream> = servers
        .iter()
        .map(|server| {
            let client = from(6000);
            client.connect(&(*server).into()).unwrap();
            client.into()
        })
        .collect();
    for (client, server) in clients.into_iter().zip(&servers) {
        let mut client = client;
        assert_eq!(client.peer_addr().unwrap(), *server);
        exchange(&mut client).unwrap();
    }
    // The kernel takes no address for this host's.
    for (dialled, peer) in [
        ("0.0.0.0:7000", "127.0.0.1:7000"),
        ("[::]:7002", "[::1]:7002"),
    ] {
        let mut client = TcpStream::connect(dialled).unwrap();
        assert_eq!(client.peer_addr().unwrap(), peer.parse().unwrap());
        exchange(&mut client).unwrap();
    }
    // A socket that is connected to itself, and one that goes elsewhere after it was refused.
    let mine = from(7005);
    mine.connect(&mine.local_addr().unwrap()).unwrap();
    mine.send(b"me").unwrap();
    assert_eq!(std::io::Read::read(&mut &mine, &mut [0; 9]).unwrap(), 2);
    let elsewhere = TcpListener::bind("127.0.0.1:6500").unwrap();
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 7009));
    client.connect(&nobody.into()).expect_err("nobody listens");
    client
        .connect(&elsewhere.local_addr().unwrap().into())
        .unwrap();
    assert_eq!(
        client.peer_addr().unwrap().as_socket(),
        Some(elsewhere.local_addr().unwrap())
    );
    applied.end();
}

#[test]
fn a_client_that_waits_for_its_server_connects_when_the_rules_end() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let server = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 7000));
    server.bind(&address.into()).unwrap();
    server.listen(0).unwrap();
    // Its queue is full: it answers nobody until it accepts.
    let _waiting = TcpStream::connect(address).unwrap();
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host --drain 25s");
    let (sender, connected) = channel();
    std::thread::spawn(move || sender.send(TcpStream::connect(address)));
    let waits = || std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let is_opening = |line: &str| line.contains("0100007F:1B58 02 ");
    wait_for(|| waits().lines().any(is_opening), "the relay's SYN");
    let accepting = std::thread::spawn(move || {
        for _ in 0..2 {
            std::mem::forget(server.accept().unwrap());
        }
    });
    applied.end();
    connected
        .recv_timeout(PATIENCE)
        .unwrap()
        .expect("the server has accepted");
    accepting.join().unwrap();
}

/// A server at port 7000 with a queue for so many clients, which it does not accept by itself.
fn queueing(backlog: i32) -> (Socket, SocketAddr) {
    let server = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 7000));
    server.set_reuse_address(true).unwrap();
    server.bind(&address.into()).unwrap();
    server.listen(backlog).unwrap();
    (server, address)
}

/// A client that does not wait until it has connected.
fn connecting(address: SocketAddr) -> TcpStream {
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    client.set_nonblocking(true).unwrap();
    let begun = client.connect(&address.into()).unwrap_err();
    assert_eq!(begun.raw_os_error(), Some(libc::EINPROGRESS));
    client.into()
}

#[test]
fn connections_in_a_row_do_not_wait_for_the_relay() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    let pid = Pid::from_raw(i32::try_from(applied.pid()).unwrap());
    let connects_while_it_stands_still = || {
        // The relay has just connected to the server.
        let _first = TcpStream::connect(address).unwrap();
        kill(pid, Signal::SIGSTOP).unwrap();
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        // Over loopback the client is connected on return, or has to wait for the relay.
        let is_connected = connecting(address).peer_addr().is_ok();
        kill(pid, Signal::SIGCONT).unwrap();
        is_connected
    };
    wait_for(
        connects_while_it_stands_still,
        "a connection without the relay",
    );
    applied.end();
}

#[test]
fn servers_see_connections_in_the_order_in_which_they_are_opened() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let (server, address) = queueing(1024);
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    let open = |_| TcpStream::connect(address).unwrap();
    let clients: Vec<TcpStream> = (0..300).map(open).collect();
    for (number, client) in clients.iter().enumerate() {
        let (_, from) = server.accept().unwrap();
        let from = from.as_socket().unwrap();
        assert_eq!(from, client.local_addr().unwrap(), "client {number}");
    }
    drop(clients);
    applied.end();
}

#[test]
fn a_full_queue_takes_no_more_clients_than_without_a_rule() {
    // The kernel lets one more in than it is asked for.
    const BACKLOG: i32 = 60;
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let (_server, address) = queueing(BACKLOG);
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host --drain 0s");
    let table = || std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    // Its SYN is lost: it has been sent again.
    let is_lost = |line: &str| {
        let retransmitted = line.split_whitespace().nth(6);
        line.contains("0100007F:1B58 02 ") && retransmitted != Some("00000000")
    };
    let mut clients = Vec::new();
    loop {
        let client = connecting(address);
        let mut is_connected = false;
        let is_answered = || {
            is_connected = client.peer_addr().is_ok();
            is_connected || table().lines().any(is_lost)
        };
        wait_for(
            is_answered,
            "the client's connection, or the relay's SYN to be lost",
        );
        if !is_connected {
            break;
        }
        clients.push(client);
    }
    assert_eq!(clients.len(), usize::try_from(BACKLOG).unwrap() + 1);
    drop(clients);
    applied.end();
}

#[test]
fn a_server_that_is_gone_refuses_at_once() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    for _ in 0..20 {
        let (server, address) = queueing(1024);
        for _ in 0..5 {
            TcpStream::connect(address).unwrap();
            server.accept().unwrap();
        }
        drop(server);
        assert_eq!(
            refusal("127.0.0.1:7000").kind(),
            ErrorKind::ConnectionRefused
        );
    }
    applied.end();
}

#[test]
fn servers_see_the_ports_of_their_clients() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let there = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
    for (host, seen) in [
        ("127.0.0.1", "127.0.0.1"),
        ("127.9.9.9", "127.0.0.1"),
        ("::1", "::1"),
        ("10.77.0.1", "10.77.0.1"),
        ("10.77.0.2", "10.77.0.1"),
    ] {
        let address = SocketAddr::new(host.parse().unwrap(), 7000);
        let listen = || Ok(TcpListener::bind(address)?);
        let server = if host == "10.77.0.2" {
            there.enter(listen)
        } else {
            listen()
        };
        let server = server.unwrap();
        let seen: IpAddr = seen.parse().unwrap();
        for _ in 0..3 {
            let client = TcpStream::connect(address).unwrap();
            let (_accepted, from) = server.accept().unwrap();
            let port = client.local_addr().unwrap().port();
            assert_eq!(from, SocketAddr::new(seen, port), "{host}");
        }
        // A client that binds its port, again and again: it is served also while the server has an earlier connection from
        // there.
        let mut kept = Vec::new();
        for _ in 0..3 {
            let own = if address.is_ipv4() {
                "127.0.0.1:6000"
            } else {
                "[::1]:6000"
            };
            let own: SocketAddr = own.parse().unwrap();
            let client = Socket::new(Domain::for_address(own), Type::STREAM, None).unwrap();
            client.set_reuse_address(true).unwrap();
            client.bind(&own.into()).unwrap();
            client.set_linger(Some(Duration::ZERO)).unwrap();
            client.connect(&address.into()).unwrap();
            kept.push(server.accept().unwrap());
        }
        assert_eq!(kept[0].1, SocketAddr::new(seen, 6000), "{host}");
    }
    applied.end();
}

#[test]
fn a_datagram_that_closes_is_lost() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let server = UdpSocket::bind("127.0.0.1:7000").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect("127.0.0.1:7000").unwrap();
    let applied = AppliedRules::begin(&["udp:7000 close_on_data"], "--scope host");
    client.send(b"one").unwrap();
    let summary = applied.end();
    assert!(summary.contains("1 conn  1 time "), "{summary}");
    client.send(b"two").unwrap();
    let mut buffer = [0; 9];
    let (size, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..size], b"two");
}

/// What a datagram and the messages beside it say: its bytes, its sender, the time to live or hop limit, and the class.
fn hear_all(socket: &UdpSocket) -> (Vec<u8>, Option<SocketAddr>, Vec<i32>) {
    use nix::sys::socket::{ControlMessageOwned as Message, MsgFlags, SockaddrStorage, recvmsg};
    use std::os::fd::AsRawFd as _;
    let mut space = nix::cmsg_space!([u8; 256]);
    let mut bytes = [0; 100];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::empty();
    let heard = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)
        .expect("a datagram");
    let from = heard.address.and_then(|address| {
        let v4 = address
            .as_sockaddr_in()
            .map(|v4| SocketAddr::V4((*v4).into()));
        v4.or_else(|| {
            address
                .as_sockaddr_in6()
                .map(|v6| SocketAddr::V6((*v6).into()))
        })
    });
    let messages = heard.cmsgs().expect("room for all");
    let values = messages.map(|message| match message {
        Message::Ipv4Ttl(value) | Message::Ipv6HopLimit(value) | Message::Ipv6TClass(value) => {
            value
        }
        Message::Ipv4Tos(value) => value.into(),
        other => panic!("{other:?}"),
    });
    let values = values.collect();
    let size = heard.bytes;
    (bytes[..size].to_vec(), from, values)
}

/// The first error that a socket's error queue has: who reported it, and what.
fn queued_error(socket: &UdpSocket) -> (u8, i32) {
    use nix::sys::socket::{ControlMessageOwned as Message, MsgFlags, recvmsg};
    use std::os::fd::AsRawFd as _;
    let mut space = nix::cmsg_space!([u8; 256]);
    let mut bytes = [0; 100];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_ERRQUEUE;
    let heard =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags).expect("an error");
    let error = heard
        .cmsgs()
        .expect("room")
        .find_map(|message| match message {
            Message::Ipv4RecvErr(error, _) | Message::Ipv6RecvErr(error, _) => Some(error),
            _ => None,
        });
    let error = error.expect("an error");
    (error.ee_origin, error.ee_errno.cast_signed())
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// What programs do with sockets for datagrams at the ports of a rule, and what becomes of it.
fn use_datagrams(host: &str) {
    let address = |port: u16| SocketAddr::new(host.parse::<IpAddr>().unwrap(), port);
    let bound = |port: u16| {
        let socket = UdpSocket::bind(address(port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let receive = |socket: &UdpSocket| {
        let mut bytes = [0; 9];
        let (size, from) = socket.recv_from(&mut bytes).expect("a datagram");
        (bytes[..size].to_vec(), from)
    };
    // Nobody is there: the next call tells, and the queue of errors has it.
    let client = udp_client(address(0));
    let is_v4 = client.local_addr().unwrap().is_ipv4();
    client.connect(address(7050)).unwrap();
    client.send(b"x").unwrap();
    assert_eq!(errno(client.recv(&mut [0; 9])), Some(libc::ECONNREFUSED));
    let (level, name) = if is_v4 {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    };
    set_option(&client, level, name, 1);
    client.send(b"x").unwrap();
    assert_eq!(errno(client.recv(&mut [0; 9])), Some(libc::ECONNREFUSED));
    let origin = if is_v4 { 2 } else { 3 };
    assert_eq!(queued_error(&client), (origin, libc::ECONNREFUSED));
    // Two that are connected to each other, and one to itself.
    let (a, b) = (bound(7051), bound(7052));
    a.connect(address(7052)).unwrap();
    b.connect(address(7051)).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.send(b"one").unwrap();
        assert_eq!(receive(to), (b"one".to_vec(), from.local_addr().unwrap()));
    }
    assert_eq!(a.peer_addr().unwrap(), address(7052));
    let own = bound(7053);
    own.connect(address(7053)).unwrap();
    own.send(b"me").unwrap();
    assert_eq!(receive(&own), (b"me".to_vec(), address(7053)));
    // What the client's host puts in front of each datagram.
    let server = bound(7054);
    let options = if is_v4 {
        set_option(&server, libc::IPPROTO_IP, libc::IP_RECVTTL, 1);
        set_option(&server, libc::IPPROTO_IP, libc::IP_RECVTOS, 1);
        [libc::IP_TTL, libc::IP_TOS]
    } else {
        set_option(&server, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1);
        set_option(&server, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1);
        [libc::IPV6_UNICAST_HOPS, libc::IPV6_TCLASS]
    };
    let client = udp_client(address(0));
    // One after the other, while the first may still be held.
    for (limit, class) in [(33, 0xb8), (7, 0x28)] {
        set_option(&client, level, options[0], limit);
        set_option(&client, level, options[1], class);
        client.send_to(b"q", address(7054)).unwrap();
    }
    let port = client.local_addr().unwrap().port();
    for expected in [[33, 0xb8], [7, 0x28]] {
        let (data, from, options) = hear_all(&server);
        assert_eq!((&data[..], from), (&b"q"[..], Some(address(port))));
        assert_eq!(options, expected);
    }
    // A server that answers from another port, several servers, another one, and none any more.
    let other = bound(7055);
    other.send_to(b"r", address(port)).unwrap();
    assert_eq!(receive(&client), (b"r".to_vec(), address(7055)));
    client.send_to(b"s", address(7055)).unwrap();
    assert_eq!(receive(&other), (b"s".to_vec(), address(port)));
    for server in [&server, &other] {
        let to = server.local_addr().unwrap();
        client.connect(to).unwrap();
        client.send(b"t").unwrap();
        server.recv(&mut [0; 9]).unwrap();
        assert_eq!(client.peer_addr().unwrap(), to);
        server.send_to(b"u", client.local_addr().unwrap()).unwrap();
        assert_eq!(receive(&client), (b"u".to_vec(), to));
    }
    // SAFETY: all zeros is an address of no family, which connect(2) takes for none; it is as long as is said.
    let status = unsafe {
        let nobody: libc::sockaddr_storage = std::mem::zeroed();
        let length = u32::try_from(size_of_val(&nobody)).unwrap();
        let client = std::os::fd::AsRawFd::as_raw_fd(&client);
        libc::connect(client, (&raw const nobody).cast(), length)
    };
    assert_eq!(status, 0);
    assert_eq!(errno(client.peer_addr()), Some(libc::ENOTCONN));
    client.send_to(b"v", address(7054)).unwrap();
    assert_eq!(receive(&server).0, b"v");
    // Too large for any datagram, and as large as one can be.
    let most = if is_v4 { 65_507 } else { 65_527 };
    let sent = client.send_to(&vec![0; most + 1], address(7054));
    assert_eq!(errno(sent), Some(libc::EMSGSIZE));
    for size in [0, 1, 65_000] {
        client.send_to(&vec![7; size], address(7054)).unwrap();
        let mut bytes = vec![0; 70_000];
        let size_of_it = server.recv(&mut bytes).unwrap();
        assert_eq!(bytes[..size_of_it], vec![7; size]);
    }
    if is_v4 {
        use_broadcast(&client, &server);
    }
}

/// Everybody on loopback, and a group there.
fn use_broadcast(client: &UdpSocket, server: &UdpSocket) {
    let all: SocketAddr = "127.255.255.255:7056".parse().unwrap();
    assert_eq!(errno(client.send_to(b"x", all)), Some(libc::EACCES));
    let any = UdpSocket::bind("0.0.0.0:7056").unwrap();
    any.set_read_timeout(Some(PATIENCE)).unwrap();
    let from = server.local_addr().unwrap();
    server.set_broadcast(true).unwrap();
    server.send_to(b"all", all).unwrap();
    assert_eq!(any.recv_from(&mut [0; 9]).unwrap(), (3, from));
    any.join_multicast_v4(&[239, 1, 2, 3].into(), &[127, 0, 0, 1].into())
        .unwrap();
    server.send_to(b"group", "239.1.2.3:7056").unwrap();
    assert_eq!(any.recv_from(&mut [0; 9]).unwrap(), (5, from));
}

#[test]
fn datagrams_are_what_they_are_without_a_rule() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    // Groups on loopback take a route.
    let routed = std::process::Command::new("ip")
        .args(["route", "add", "239.0.0.0/8", "dev", "lo"])
        .status();
    assert!(routed.unwrap().success());
    for host in ["127.0.0.1", "::1"] {
        use_datagrams(host);
        for rule in [
            "udp:7050-7059 latency=5ms",
            "udp:1-65535 substitute=nothing,something",
        ] {
            eprintln!("{host} under {rule}");
            let applied = AppliedRules::begin(&[rule], "--scope host");
            use_datagrams(host);
            let summary = applied.end();
            assert!(summary.contains("relay (delay-line)"), "{summary}");
            assert!(!summary.contains("0 conns"), "{summary}");
        }
    }
}

#[test]
fn an_urgent_byte_stays_out_of_the_stream() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    for rule in ["tcp:7000 latency=1ms", "tcp:7000 slicer=2,delay:1ms"] {
        let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
        let applied = AppliedRules::begin(&[rule], "--scope host");
        let mut client = TcpStream::connect("127.0.0.1:7000").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"ab").unwrap();
        socket2::SockRef::from(&client)
            .send_out_of_band(b"!")
            .unwrap();
        client.write_all(b"cd").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut urgent = [std::mem::MaybeUninit::new(0)];
        wait_for(
            || {
                socket2::SockRef::from(&server)
                    .recv_out_of_band(&mut urgent)
                    .is_ok()
            },
            "the urgent byte",
        );
        // SAFETY: one byte was received.
        assert_eq!(unsafe { urgent[0].assume_init() }, b'!', "{rule}");
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcd", "{rule}");
        applied.end();
    }
}

#[test]
fn more_clients_than_a_short_queue_and_few_files_allow() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let address = local("127.0.0.1");
    let by_few_files = || {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "ulimit -Sn 64; exec \"$0\" \"$@\""]);
        shell.arg(fault().get_program());
        shell
    };
    // Nobody accepts: they wait in the relay's queue, which is as long as the kernel allows.
    let applied = AppliedRules::begin_by(by_few_files(), &["tcp:7000 no_accept"], "--scope host");
    let waiting: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect_timeout(&address, PATIENCE).unwrap())
        .collect();
    drop(waiting);
    applied.end();
    let applied = AppliedRules::begin_by(by_few_files(), &["tcp:7000 latency=1ms"], "--scope host");
    let mut clients: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    for client in &mut clients {
        exchange(client).unwrap();
    }
    applied.end();
    // The command has what its caller has.
    let mut shell = by_few_files();
    shell.args(["run", "--allow-unfired", "-r", "tcp:7000 latency=1ms", "--"]);
    let output = shell.args(["sh", "-c", "ulimit -Sn"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "64\n");
}
