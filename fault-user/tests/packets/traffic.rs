//! The binary `fault` on real traffic with nothing but the standard library: what `cargo xtask vm` runs on every
//! kernel, by TCX where the kernel has it and by clsact.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::support::dns::{
    RCODE, TYPE, alias, answer, ask_over_tcp, look_up, query, query_for, read_response, serve,
    serve_streams,
};
use crate::support::echo::{tcp_echo, udp_client, udp_echo};
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, can_lead_the_host, enter_fresh, fault, has_bash, ip, is_emulated,
    run, wait_for,
};
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::process::proc;
use io_uring::IoUring;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

/// Starts a server on loopback.
fn echo(host: &str) -> SocketAddr {
    tcp_echo(TcpListener::bind((host, 7000)).unwrap())
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Whether no connection comes about in a moment.
fn is_cut_off(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, Duration::from_millis(800)).is_err()
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<[u8; 5]> {
    let mut answer = [0; 5];
    stream.write_all(b"hello")?;
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn inject_and_restore(address: SocketAddr, options: &str) {
    let rule = |text: &str| format!("tcp:7000 {text}");
    let is_well = || assert_eq!(&exchange(&mut connect(address).unwrap()).unwrap(), b"hello");
    is_well();
    let applied = AppliedRules::begin(&[&rule("blackhole")], options);
    assert!(is_cut_off(address), "blackhole");
    applied.end();
    is_well();
    for reject in ["reject", "reject=icmp-port"] {
        let applied = AppliedRules::begin(&[&rule(reject)], options);
        // Over loopback and IPv6 the error can meet a socket that is still being worked on by connect(2);
        // the kernel drops it then, and it is the one about the SYN's retransmission that counts.
        let refused = connect(address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{reject}");
        applied.end();
    }
    let mut old = connect(address).unwrap();
    exchange(&mut old).unwrap();
    let applied = AppliedRules::begin(&[&rule("reset match=data")], options);
    assert_eq!(
        exchange(&mut old).unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "reset"
    );
    applied.end();
    let mut old = connect(address).unwrap();
    exchange(&mut old).unwrap();
    let applied = AppliedRules::begin(&[&rule("corrupt=100% dir=to-client")], options);
    assert_ne!(&exchange(&mut old).unwrap(), b"hello", "corrupt");
    applied.end();
    assert_eq!(
        &exchange(&mut old).unwrap(),
        b"hello",
        "the old connection goes on"
    );
    is_well();
}

#[test]
fn tcp_faults_are_applied_and_removed_by_the_default_attachment() {
    enter_fresh();
    inject_and_restore(echo("127.0.0.1"), "--scope host");
    inject_and_restore(echo("::1"), "--scope host");
}

#[test]
fn tcp_faults_are_applied_and_removed_by_clsact() {
    enter_fresh();
    inject_and_restore(echo("127.0.0.1"), "--scope host --attach clsact");
}

#[test]
fn the_first_connection_to_a_name_that_is_looked_up_is_matched() {
    const LOOKUPS: u32 = 10_000;
    enter_fresh();
    serve("127.0.0.1:53".parse().unwrap());
    let listener = TcpListener::bind("0.0.0.0:7000").unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect("127.0.0.1:53").unwrap();
    // An emulated processor has other things to do.
    let lookups = if is_emulated() { LOOKUPS / 50 } else { LOOKUPS };
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(&["tcp:*.example:7000 reject=rst"], options);
        for number in 0..lookups {
            let address = Ipv4Addr::from(0x7f01_0000 + number);
            if number % 1000 == 0 {
                connect((address, 7000).into()).expect("not looked up yet");
                listener.accept().unwrap();
            }
            look_up(
                &client,
                &format!("{}.example", address.to_string().replace('.', "-")),
            );
            let refused = connect((address, 7000).into()).expect_err("looked up");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
        applied.end();
    }
}

/// Looks a name up that has these addresses now. Server and client are the caller's.
fn tell(server: &UdpSocket, client: &UdpSocket, response: &[u8]) {
    client.send(&query("asked.example")).unwrap();
    let (_, asker) = server.recv_from(&mut [0; 512]).unwrap();
    server.send_to(response, asker).unwrap();
    client.recv(&mut [0; 512]).unwrap();
}

/// A server of DNS at 127.0.0.1, and a client of it.
fn dns_by_hand() -> (UdpSocket, UdpSocket) {
    let server = UdpSocket::bind("127.0.0.1:53").unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.connect("127.0.0.1:53").unwrap();
    (server, client)
}

/// Whether the relay resets a connection.
fn is_reset(host: &str) -> bool {
    let came = exchange(&mut connect(SocketAddr::new(host.parse().unwrap(), 7000)).unwrap());
    came.is_err()
}

#[test]
fn a_stream_rule_follows_the_addresses_of_its_name() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let (server, client) = dns_by_hand();
    for host in ["0.0.0.0", "::1"] {
        echo(host);
    }
    let rules = [
        "tcp:asked.example:7000 reset_peer",
        "tcp:*.cdn.example:7000 reset_peer",
    ];
    let applied = AppliedRules::begin(&rules, "--scope host");
    let name = "asked.example";
    assert!(!is_reset("127.0.0.2"), "not looked up yet");
    tell(
        &server,
        &client,
        &answer(
            name,
            &[(name, "127.0.0.2"), (name, "127.0.0.3"), (name, "::1")],
        ),
    );
    for host in ["127.0.0.2", "127.0.0.3", "::1"] {
        assert!(is_reset(host), "{host}");
    }
    tell(
        &server,
        &client,
        &alias("other.example", "a.cdn.example", &["127.0.0.4"]),
    );
    tell(&server, &client, &alias(name, "b.example", &["127.0.0.5"]));
    for host in ["127.0.0.4", "127.0.0.5"] {
        assert!(is_reset(host), "through an alias: {host}");
    }
    assert!(is_reset("127.0.0.2"), "what was learned stays");
    assert!(!is_reset("127.0.0.6"), "another address");
    let summary = applied.end();
    assert!(!summary.contains("uses the addresses"), "{summary}");
    assert!(!is_reset("127.0.0.2"), "restored");
}

#[test]
fn a_stream_rule_of_a_process_follows_the_addresses_of_its_name() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    serve("127.0.0.1:53".parse().unwrap());
    echo("0.0.0.0");
    let bytes = query("127-0-0-2.example");
    let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
    let question = bytes.collect::<Vec<_>>().concat();
    let script = format!(
        "read go; exec 3<>/dev/udp/127.0.0.1/53; printf '{question}' >&3; head -c 1 <&3 >/dev/null; \
         exec 4<>/dev/tcp/127.0.0.2/7000; echo x >&4; read -u 4 answer && echo came || echo reset"
    );
    let mut client = Command::new("bash")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let options = format!("--pid {}", client.id());
    let applied = AppliedRules::begin(&["tcp:*.example:7000 reset_peer"], &options);
    writeln!(client.stdin.as_mut().unwrap()).unwrap();
    let output = client.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "reset\n");
    applied.end();
}

#[test]
fn the_first_connection_to_a_name_that_is_looked_up_reaches_the_relay() {
    const LOOKUPS: u32 = 10_000;
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    serve("127.0.0.1:53".parse().unwrap());
    echo("0.0.0.0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect("127.0.0.1:53").unwrap();
    let lookups = if is_emulated() { LOOKUPS / 50 } else { LOOKUPS };
    let applied = AppliedRules::begin(&["tcp:*.example:7000 reset_peer"], "--scope host");
    for number in 0..lookups {
        let address = Ipv4Addr::from(0x7f01_0000 + number);
        let name = format!("{}.example", address.to_string().replace('.', "-"));
        look_up(&client, &name);
        assert!(is_reset(&address.to_string()), "{address}");
    }
    applied.end();
}

#[test]
fn datagrams_to_a_name_that_is_looked_up_reach_the_relay() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let (server, client) = dns_by_hand();
    let echo = udp_echo(UdpSocket::bind("127.0.0.2:7000").unwrap());
    let applied = AppliedRules::begin(&["udp:*.example:7000 latency=100ms"], "--scope host");
    let sender = udp_client(echo);
    let round_trip = || {
        let started = Instant::now();
        sender.send_to(b"hello", echo).unwrap();
        sender.recv(&mut [0; 5]).unwrap();
        started.elapsed()
    };
    let slow = Duration::from_millis(200);
    assert!((0..3).any(|_| round_trip() < slow), "not looked up yet");
    let name = "asked.example";
    tell(&server, &client, &answer(name, &[(name, "127.0.0.2")]));
    assert!((0..3).all(|_| round_trip() >= slow), "looked up");
    applied.end();
}

#[test]
fn reconnect_resets_connections_to_addresses_that_were_learned() {
    if !can_lead_the_host() {
        return;
    }
    enter_fresh();
    let (server, client) = dns_by_hand();
    let address = echo("127.0.0.2");
    let rule = "tcp:*.example:7000 latency=1ms at=2s reconnect";
    let applied = AppliedRules::begin(&[rule], "--scope host");
    let name = "asked.example";
    tell(&server, &client, &answer(name, &[(name, "127.0.0.2")]));
    let mut open = connect(address).unwrap();
    exchange(&mut open).unwrap();
    let ended = open
        .read(&mut [0])
        .expect_err("it is reset when the rule starts");
    assert!(
        matches!(
            ended.kind(),
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted
        ),
        "{ended}"
    );
    applied.end();
}

#[test]
fn queries_are_answered_the_way_this_kernel_has() {
    enter_fresh();
    let _peer = Peer::joined();
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(
            &[
                "dns:api.example.com answer=10.0.0.9 type=A",
                "dns:*.example.com nxdomain",
            ],
            options,
        );
        // No server is there.
        for server in ["127.0.0.1:53", "[::1]:53", "10.77.0.2:53", "[fd77::2]:53"] {
            let server: SocketAddr = server.parse().unwrap();
            let any = if server.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let client = UdpSocket::bind(any).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.connect(server).unwrap();
            for (name, kind, expected) in [
                (
                    "api.example.com",
                    TYPE::A,
                    (RCODE::NoError, vec!["10.0.0.9".to_owned()]),
                ),
                ("api.example.com", TYPE::AAAA, (RCODE::NameError, vec![])),
                ("www.example.com", TYPE::HTTPS, (RCODE::NameError, vec![])),
            ] {
                client.send(&query_for(name, kind)).unwrap();
                let mut buffer = [0; 512];
                let length = client
                    .recv(&mut buffer)
                    .unwrap_or_else(|error| panic!("{server} {name}: {error}"));
                let (code, _, addresses) = read_response(&buffer[..length]);
                assert_eq!((code, addresses), expected, "{server} {name}");
            }
        }
        applied.end();
    }
}

#[test]
fn queries_over_tcp_are_answered_where_the_relay_can_be_used() {
    enter_fresh();
    let servers = ["127.0.0.1:53", "[::1]:53"].map(|server| server.parse().unwrap());
    for server in servers {
        serve_streams(server);
    }
    // The relay does not know interfaces.
    answer_over_tcp(servers, "--scope host", can_lead_the_host());
    answer_over_tcp(servers, "--scope host -i lo", false);
}

fn answer_over_tcp(servers: [SocketAddr; 2], options: &str, is_relayed: bool) {
    let rules = [
        "dns:*.nx.example nxdomain",
        "dns:*.an.example answer=10.0.0.9 type=A",
        "dns:*.later.example servfail at=1h",
    ];
    let names = ["nx", "an", "later", "other"].map(|zone| format!("127-0-0-2.{zone}.example"));
    let names = names.each_ref().map(String::as_str);
    let real = || (RCODE::NoError, vec!["127.0.0.2".to_owned()]);
    let mut answers = [real(), real(), real(), real()];
    if is_relayed {
        answers[0] = (RCODE::NameError, vec![]);
        answers[1].1 = vec!["10.0.0.9".to_owned()];
    }
    let applied = AppliedRules::begin(&rules, options);
    for server in servers {
        let came = ask_over_tcp(server, &names);
        for (name, expected) in names.iter().zip(&answers) {
            assert_eq!(&came[*name], expected, "{server} {name}");
        }
    }
    // One over UDP, which is counted together with those.
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect("127.0.0.1:53").unwrap();
    client.send(&query(names[0])).unwrap();
    client.recv(&mut [0; 512]).unwrap();
    let summary = applied.end();
    let count = if is_relayed { 3 } else { 1 };
    let (_, row) = summary.split_once(rules[0]).unwrap();
    assert!(row.trim().starts_with(&format!("{count} pkt")), "{summary}");
    let is_missed = summary.contains("2 connections to DNS servers over TCP");
    assert_eq!(is_missed, !is_relayed, "{summary}");
    let came = ask_over_tcp(servers[0], &names);
    assert_eq!(came[names[0]], real(), "restored");
}

#[test]
fn without_the_relay_a_rule_for_queries_is_applied_all_the_same() {
    enter_fresh();
    let _peer = Peer::joined();
    ip("address delete 127.0.0.1/8 dev lo");
    let ran = run(&["dns nxdomain"], "--allow-unfired", &["true"]);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{errors}");
    for line in [
        "fault: warning: DNS queries over TCP are not answered: the relay can't listen",
        "sent no query over UDP that dns is for",
    ] {
        assert_eq!(errors.matches(line).count(), 1, "{line} in {errors}");
    }
}

/// Looks two names up, then connects to their address, and to one that the test looks up when it is told to.
const LOOKS_UP: &str = "
import socket, sys
def told(port, message):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(30)
    s.connect(('127.0.0.1', port))
    s.send(bytes.fromhex(message))
    return s.recv(512)
for query in sys.argv[1:]:
    told(53, query)
told(7001, '00')
for address in ('127.1.0.1', '127.1.0.2'):
    try:
        socket.create_connection((address, 7000), 30)
        print(address, 'connected')
    except ConnectionRefusedError:
        print(address, 'refused')
";

/// Looks a name up when it is asked to.
fn look_up_when_asked(name: &'static str) {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect("127.0.0.1:53").unwrap();
    let asked = UdpSocket::bind("127.0.0.1:7001").unwrap();
    std::thread::spawn(move || {
        while let Ok((_, who)) = asked.recv_from(&mut [0]) {
            look_up(&client, name);
            asked.send_to(&[0], who).unwrap();
        }
    });
}

#[test]
fn only_lookups_of_the_command_count_in_its_scope() {
    let python = std::process::Command::new("python3")
        .arg("--version")
        .output();
    if python.is_err() {
        eprintln!("skipped: there is no python3");
        return;
    }
    enter_fresh();
    serve("127.0.0.1:53".parse().unwrap());
    look_up_when_asked("127-1-0-2.example");
    let _listener = TcpListener::bind("0.0.0.0:7000").unwrap();
    let hex = |name: &str| {
        let bytes = query(name);
        let digits: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.concat()
    };
    let queries = [hex("127-1-0-1.EXAMPLE"), hex("127-1-0-1.test")];
    let command = ["python3", "-c", LOOKS_UP, &queries[0], &queries[1]];
    let rules = [
        "tcp:*.example:7000 reject=rst",
        "tcp:*.test:7000 delay=1ms",
        "tcp:never.example:7000 drop",
    ];
    let ran = run(&rules, "", &command);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(
        String::from_utf8_lossy(&ran.stdout),
        "127.1.0.1 refused\n127.1.0.2 connected\n",
        "{said}"
    );
    for line in [
        "fault: warning: never.example has no address yet",
        "fault: warning: *.example and *.test have the address 127.1.0.1 in common",
        "never.example was never looked up",
    ] {
        assert_eq!(said.matches(line).count(), 1, "{line} in {said}");
    }
    let ran = run(&rules[..1], "--scope host", &command);
    assert_eq!(
        String::from_utf8_lossy(&ran.stdout),
        "127.1.0.1 refused\n127.1.0.2 refused\n"
    );
}

/// Looks up a name by each resolver that is installed, and says what came of it.
const RESOLVERS: &str = r#"
names() { for n in nx sf rf nd an; do echo 127-0-0-1.$n.example; done; }
has() { command -v $1 > /dev/null; }
for name in $(names); do
    echo "getent $name $(getent ahosts $name | head -n 1 | cut -d ' ' -f 1)"
    has dig && dig ${RES_OPTIONS:++tcp} +tries=1 +noall +comments +answer A $name |
        awk -v n=$name '/status:/ { sub(",", "", $6); s = $6 } $4 == "A" { s = s " " $5 } END { print "dig", n, s }'
done
has python3 && python3 -c '
import socket, sys, time
for name in sys.argv[1:]:
    started = time.monotonic()
    try:
        came = socket.getaddrinfo(name, 7000, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        came = error.args[0]
    slow = " late" if time.monotonic() - started >= 0.9 else ""
    print("python", name, str(came) + slow)
' $(names) 127-0-0-1.late.example 127-0-0-1.lost.example
has node && node -e '
for (const name of process.argv.slice(1))
    require("dns").resolve4(name, (error, found) => console.log("node", name, error ? error.code : found[0]));
' $(names)
true
"#;

/// Has commands of this thread look names up at 127.0.0.1.
fn resolve_here(directory: &tempfile::TempDir) {
    let file = directory.path().join("resolv.conf");
    std::fs::write(
        &file,
        "nameserver 127.0.0.1\nsearch .\noptions timeout:1 attempts:5\n",
    )
    .unwrap();
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(
        Some(&file),
        "/etc/resolv.conf",
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
}

#[test]
fn resolvers_accept_the_responses() {
    if !has_resolver() {
        return;
    }
    enter_fresh();
    let directory = tempfile::tempdir().unwrap();
    resolve_here(&directory);
    serve("127.0.0.1:53".parse().unwrap());
    let rules = [
        "dns:*.nx.example nxdomain",
        "dns:*.sf.example servfail",
        "dns:*.rf.example refused",
        "dns:*.nd.example nodata",
        "dns:*.an.example answer=127.0.0.9",
        "dns:*.late.example delay=900ms",
        "dns:*.lost.example drop first=1",
    ];
    serve_streams("127.0.0.1:53".parse().unwrap());
    for over_tcp in [false, true] {
        let options = if over_tcp { "use-vc" } else { "" };
        let script = format!("export RES_OPTIONS={options}; {RESOLVERS}");
        let ran = run(&rules, "--allow-unfired", &["sh", "-c", &script]);
        accept_the_responses(&ran, over_tcp);
    }
}

fn accept_the_responses(ran: &Output, over_tcp: bool) {
    let output = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    // Over TCP glibc takes an error of the server for the absence of the name.
    let failed = if over_tcp { "-2" } else { "-3" };
    // No rule makes queries over TCP late, but a busy machine can.
    let irrelevant = if over_tcp { " late" } else { "" };
    let expected = [
        ("nx", ["", "-2", "ENOTFOUND", "NXDOMAIN"]),
        ("sf", ["", failed, "ESERVFAIL", "SERVFAIL"]),
        ("rf", ["", failed, "EREFUSED", "REFUSED"]),
        ("nd", ["", "-5", "ENODATA", "NOERROR"]),
        (
            "an",
            ["127.0.0.9", "127.0.0.9", "127.0.0.9", "NOERROR 127.0.0.9"],
        ),
    ];
    let mut lines = 0;
    for (zone, by) in expected {
        for (resolver, came) in ["getent", "python", "node", "dig"].into_iter().zip(by) {
            let start = format!("{resolver} 127-0-0-1.{zone}.example ");
            if let Some(line) = output.lines().find_map(|line| line.strip_prefix(&start)) {
                let line = line.strip_suffix(irrelevant).unwrap_or(line);
                assert_eq!(line, came, "{start}: {output}{errors}");
                lines += 1;
            }
        }
    }
    for zone in ["late", "lost"] {
        let start = format!("python 127-0-0-1.{zone}.example ");
        if let Some(line) = output.lines().find_map(|line| line.strip_prefix(&start)) {
            let came = ["127.0.0.1 late", "127.0.0.1"][usize::from(over_tcp)];
            let line = line.strip_suffix(irrelevant).unwrap_or(line);
            assert_eq!(line, came, "{start}: {output}{errors}");
            lines += 1;
        }
    }
    assert_eq!(output.lines().count(), lines, "{output}{errors}");
    assert!(lines >= 5, "getent is part of glibc: {output}{errors}");
    let is_missed = errors.contains("connections to DNS servers over TCP");
    assert_eq!(is_missed, over_tcp, "{errors}");
}

#[test]
fn after_a_truncated_answer_the_real_one_comes_over_tcp() {
    if Command::new("getent").arg("--version").output().is_err() {
        eprintln!("skipped: there is no getent");
        return;
    }
    enter_fresh();
    let directory = tempfile::tempdir().unwrap();
    resolve_here(&directory);
    serve_streams("127.0.0.1:53".parse().unwrap());
    let rules = ["dns:*.tc.example truncated", "dns:*.nx.example nxdomain"];
    let script = "getent ahosts 127-0-0-5.tc.example | head -n 1 | cut -d ' ' -f 1
        RES_OPTIONS=use-vc getent ahosts 127-0-0-5.nx.example || echo none";
    let ran = run(&rules, "", &["sh", "-c", script]);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(
        String::from_utf8_lossy(&ran.stdout),
        "127.0.0.5\nnone\n",
        "{errors}"
    );
    assert!(
        ran.status.success(),
        "a rule that fires over TCP alone has fired: {errors}"
    );
    assert!(
        errors.contains("connections to DNS servers over TCP"),
        "{errors}"
    );
}

/// Has iptables translate port 53 of 127.0.0.11 as Docker does in its containers; false where it can't.
fn translate_as_docker(udp: u16, tcp: u16) -> bool {
    let rules = [
        format!("OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to 127.0.0.11:{udp}"),
        format!("OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to 127.0.0.11:{tcp}"),
        format!("POSTROUTING -s 127.0.0.11 -p udp --sport {udp} -j SNAT --to :53"),
        format!("POSTROUTING -s 127.0.0.11 -p tcp --sport {tcp} -j SNAT --to :53"),
    ];
    let translates = rules.iter().all(|rule| {
        let words = format!("-t nat -A {rule}");
        let done = Command::new("iptables").args(words.split(' ')).output();
        done.is_ok_and(|done| done.status.success())
    });
    if !translates {
        eprintln!("skipped: there is no NAT by iptables");
    }
    translates
}

#[test]
fn docker_s_dns_server_is_at_port_53() {
    enter_fresh();
    serve("127.0.0.11:4100".parse().unwrap());
    serve_streams("127.0.0.11:4200".parse().unwrap());
    // Where nothing translates the programs can still be loaded.
    AppliedRules::begin(&["udp:53 delay=1ms", "53 reject"], "--scope host").end();
    if !translate_as_docker(4100, 4200) {
        return;
    }
    let server: SocketAddr = "127.0.0.11:53".parse().unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect(server).unwrap();
    let name = "127-0-0-2.example";
    let ask = || {
        client.send(&query_for(name, TYPE::A)).unwrap();
        let mut response = [0; 512];
        let length = client.recv(&mut response)?;
        Ok::<_, std::io::Error>(response[..length].to_vec())
    };
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(&["dns:*.example nxdomain"], options);
        assert_eq!(
            read_response(&ask().unwrap()).0,
            RCODE::NameError,
            "{options}"
        );
        applied.end();
        for rule in [
            "udp:53 delay=60ms",
            "udp:53 delay=60ms dir=to-client",
            "*,!22,8474 delay=60ms",
        ] {
            let applied = AppliedRules::begin(&[rule], options);
            let start = Instant::now();
            look_up(&client, name);
            assert!(start.elapsed() >= Duration::from_millis(60), "{rule}");
            let start = Instant::now();
            assert_eq!(ask_over_tcp(server, &[name])[name].1, ["127.0.0.2"]);
            let is_late = start.elapsed() >= Duration::from_millis(240);
            assert!(is_late || rule.starts_with("udp"), "{rule}");
            applied.end();
        }
        let applied = AppliedRules::begin(&["53 reject"], options);
        for refused in [ask().map(drop), connect(server).map(drop)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
        applied.end();
        let applied = AppliedRules::begin(&["tcp:53 reset match=data"], options);
        let mut stream = connect(server).unwrap();
        assert_eq!(
            exchange(&mut stream).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
        applied.end();
        look_up(&client, name);
    }
}

/// Whether programs can look names up. Those of the virtual machines are static, and glibc's resolver is not.
fn has_resolver() -> bool {
    if is_emulated() {
        eprintln!("skipped: a static program has no resolver");
    }
    !is_emulated()
}

#[test]
fn only_excluded_names_keep_the_addresses_that_they_had() {
    if !has_resolver() {
        return;
    }
    enter_fresh();
    let directory = tempfile::tempdir().unwrap();
    resolve_here(&directory);
    serve("127.0.0.1:53".parse().unwrap());
    let rules = [
        "tcp:127-0-0-2.example:7000 latency=1ms",
        "tcp:7001,!any:127-0-0-3.example drop",
        "tcp:127-0-0-4.example:7002 drop",
    ];
    let ran = run(&rules, "--allow-unfired", &["true"]);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{errors}");
    let warnings: Vec<_> = errors
        .lines()
        .filter(|line| line.contains("warning"))
        .collect();
    let warning = |rule: &str, name: &str| {
        format!("fault: warning: `{rule}` uses the addresses that {name} has now, not later ones")
    };
    assert_eq!(
        warnings,
        [warning(rules[1], "127-0-0-3.example")],
        "{errors}"
    );
}

/// Connects to a name by each client that is installed, and says what came of it.
const CONNECTS: &str = r#"
has() { command -v $1 > /dev/null; }
for name in 127-0-0-2.live.example 127-0-0-3.other.example; do
    has curl && { curl -s -m 30 http://$name:7000/; [ $? = 7 ]; echo "curl $name $?"; }
    has python3 && python3 -c '
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7000), 30)
    print("python", sys.argv[1], "connected")
except OSError as error:
    print("python", sys.argv[1], error.strerror)
' $name
    has node && node -e '
const name = process.argv[1];
const socket = require("net").connect(7000, name, () => { console.log("node", name, "connected"); socket.destroy(); });
socket.on("error", (error) => console.log("node", name, error.code));
' $name
done
true
"#;

#[test]
fn clients_that_look_up_a_name_and_connect_are_matched() {
    if !has_resolver() {
        return;
    }
    enter_fresh();
    let directory = tempfile::tempdir().unwrap();
    resolve_here(&directory);
    serve("127.0.0.1:53".parse().unwrap());
    let listener = TcpListener::bind("0.0.0.0:7000").unwrap();
    std::thread::spawn(move || {
        // Each is closed at once.
        listener.incoming().for_each(drop);
    });
    let rules = ["tcp:*.live.example:7000 reject=rst"];
    let ran = run(&rules, "", &["sh", "-c", CONNECTS]);
    let output = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    let expected = [
        (
            "127-0-0-2.live",
            ["0", "Connection refused", "ECONNREFUSED"],
        ),
        ("127-0-0-3.other", ["1", "connected", "connected"]),
    ];
    for (name, by) in expected {
        for (client, came) in ["curl", "python", "node"].into_iter().zip(by) {
            let start = format!("{client} {name}.example ");
            let line = output.lines().find_map(|line| line.strip_prefix(&start));
            assert!(
                line.is_none_or(|line| line == came),
                "{start}: {output}{errors}"
            );
        }
    }
    assert!(
        !output.is_empty(),
        "install curl, python3 or node: {errors}"
    );
}

#[test]
fn expectations_count_connections_to_addresses_that_were_learned() {
    if !has_bash() || !has_resolver() {
        return;
    }
    enter_fresh();
    let directory = tempfile::tempdir().unwrap();
    resolve_here(&directory);
    serve("127.0.0.1:53".parse().unwrap());
    echo("0.0.0.0");
    let script = "for name in 127-0-0-2.live 127-0-0-3.live 127-0-0-4.other; do
        exec 3<>/dev/tcp/$name.example/7000
    done";
    // One target is a rule's, the other is not.
    for target in ["tcp:*.live.example:7000", "tcp:*.example:7000,7001"] {
        let rule = "tcp:*.live.example:7000 loss=1% at=1h";
        let scenario = directory.path().join("scenario.json");
        let text =
            format!(r#"{{"rules":["{rule}"],"expect":{{"max_connects":{{"{target}":1}}}}}}"#);
        std::fs::write(&scenario, text).unwrap();
        let ran = fault()
            .args(["run", "--allow-unfired", "-f"])
            .arg(&scenario)
            .args(["--", "bash", "-c", script])
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&ran.stderr);
        let count = if target.contains("live") { 2 } else { 3 };
        let failed = format!("FAILED: expect at most 1 connects to {target}: {count}");
        assert!(errors.contains(&failed), "{errors}");
        assert_eq!(ran.status.code(), Some(121), "{errors}");
    }
}

#[test]
fn a_host_behind_a_proxy_header_is_read_and_a_connection_without_a_name_is_told_of() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    echo("127.0.0.1");
    let say = |words: &str| {
        format!(
            "exec 3<>/dev/tcp/127.0.0.1/7000; printf '{words}\\r\\n\\r\\n' >&3; read -r x <&3; "
        )
    };
    let named = say("PROXY TCP4 192.0.2.1 192.0.2.2 5 80\\r\\nGET / HTTP/1.1\\r\\nHost: a.example");
    let nameless = say("hello");
    let rules = ["tcp:7000 latency=1ms host=a.example"];
    let warning = "fault: warning: tcp:7000: a connection began without a name";
    let command = ["bash", "-c", &[&*nameless, &nameless, &named].concat()];
    let ran = run(&rules, "", &command);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "the rule fires: {errors}");
    assert_eq!(errors.matches(warning).count(), 1, "{errors}");
    let ran = run(&rules, "", &["bash", "-c", &named]);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(!errors.contains(warning), "{errors}");
}

#[test]
fn udp_is_dropped_and_sent_twice() {
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(
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
        applied.end();
    }
}

#[test]
fn only_the_commands_own_sockets_are_touched() {
    enter_fresh();
    let address = echo("127.0.0.1");
    let applied = AppliedRules::begin(&["tcp:7000 blackhole"], "");
    assert_eq!(&exchange(&mut connect(address).unwrap()).unwrap(), b"hello");
    applied.end();
    let output = run(
        &["tcp:7000 reject"],
        "",
        &["busybox", "nc", "127.0.0.1", "7000"],
    );
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0), "{stderr_text}");
    assert!(!stderr_text.contains("never fired"), "{stderr_text}");
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
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    let expected = "the command connected to tcp:7000 (once), never to tcp:5432";
    assert!(stderr_text.contains(expected), "{stderr_text}");
    assert_eq!(output.status.code(), Some(120), "{stderr_text}");
}

#[test]
fn a_killed_instance_stops_acting_after_its_lease() {
    enter_fresh();
    let address = echo("127.0.0.1");
    let mut applied = AppliedRules::begin(&["tcp:7000 blackhole"], "--scope host --attach clsact");
    assert!(is_cut_off(address));
    applied.kill();
    wait_for(|| !is_cut_off(address), "the lease to end");
    drop(applied);
    assert!(fault().arg("clean").output().unwrap().status.success());
}

/// Set where this program is the command of a run.
const IS_COMMAND: &str = "FAULT_TEST_IS_COMMAND";

/// The group and port of multicast.
const GROUP: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 255, 0, 7), 7400);

/// What the command of a run does here: for each line that it reads, `send PORT ADDRESS`, it sends a datagram from that
/// port to that address; for `ask PORT ADDRESS` it waits for a corrupted answer too; for `join` it receives multicast,
/// for `listen` it does so by MPTCP, for `io_uring` it opens sockets by `io_uring`, for `echoes` it sends one ICMP echo request
/// more than are remembered. It says so each time.
#[test]
fn what_the_command_does() {
    if std::env::var_os(IS_COMMAND).is_none() {
        return;
    }
    let (mut joined, mut listeners) = (Vec::new(), Vec::new());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match *words {
            ["listen"] => {
                let socket = mptcp().expect("the test has tried");
                let address = SocketAddr::from(([127, 0, 0, 1], 7000));
                socket.bind(&address.into()).unwrap();
                socket.listen(8).unwrap();
                listeners.push(socket);
            }
            ["join"] => joined.push(join(Ipv4Addr::UNSPECIFIED)),
            ["io_uring"] => refused_by_io_uring(),
            ["echoes"] => {
                let socket = icmp();
                for number in 0..=ECHOES_REMEMBERED {
                    let [.., a, b] = number.to_be_bytes();
                    let identifier = [1, u8::from(number == ECHOES_REMEMBERED)];
                    send_echo(&socket, ECHO_REQUEST, identifier, [a, b]);
                }
            }
            [what, port, address] => {
                let socket = send_from(port.parse().unwrap(), address.parse().unwrap(), b'c');
                let mut byte = *b"c";
                if what == "ask" {
                    socket.recv(&mut byte).unwrap();
                    assert_ne!(byte, *b"c");
                }
            }
            _ => panic!("{line}"),
        }
        println!("done");
    }
}

/// A socket that has sent a byte from `port` to `address`.
fn send_from(port: u16, address: SocketAddr, byte: u8) -> UdpSocket {
    let any = if address.is_ipv4() { "0.0.0.0" } else { "::" };
    // The one who had the port before may be closing it still.
    let mut bound = None;
    wait_for(
        || {
            bound = UdpSocket::bind((any, port)).ok();
            bound.is_some()
        },
        "the port to be free",
    );
    let socket = bound.unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(&[byte], address).unwrap();
    socket
}

/// A socket that receives the group's datagrams on the interface with that address.
fn join(interface: Ipv4Addr) -> UdpSocket {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let any: SocketAddr = (Ipv4Addr::UNSPECIFIED, GROUP.1).into();
    socket.bind(&any.into()).unwrap();
    socket.join_multicast_v4(&GROUP.0, &interface).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A ring of `io_uring`, if the kernel has it, lets us, and makes sockets by it. The kernel has a thread that reads its queue.
fn ring() -> Option<IoUring> {
    let Ok(ring) = IoUring::builder().setup_sqpoll(1000).build(4) else {
        return None;
    };
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).ok()?;
    probe
        .is_supported(io_uring::opcode::Socket::CODE)
        .then_some(ring)
}

/// What becomes of one operation; negative where it is an error.
fn by(ring: &mut IoUring, operation: &io_uring::squeue::Entry) -> i32 {
    // SAFETY: what it points to lives until it has ended, which is waited for.
    unsafe { ring.submission().push(operation) }.expect("room for one");
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().expect("it has ended").result()
}

/// Opens connections to 127.0.0.1:7000, which must be refused, and sends datagrams there: by the thread that reads the queue and by a worker,
/// neither of which the command has started.
fn refused_by_io_uring() {
    use io_uring::{opcode, squeue::Flags, types::Fd};
    let mut ring = ring().expect("the test has tried");
    let server = socket2::SockAddr::from(SocketAddr::from(([127, 0, 0, 1], 7000)));
    for flags in [Flags::empty(), Flags::ASYNC] {
        for (kind, refused) in [
            (libc::SOCK_STREAM, -libc::ECONNREFUSED),
            (libc::SOCK_DGRAM, 0),
        ] {
            let socket = opcode::Socket::new(libc::AF_INET, kind, 0).build();
            let socket = Fd(by(&mut ring, &socket.flags(flags)));
            let connect = opcode::Connect::new(socket, server.as_ptr().cast(), server.len());
            let connected = by(&mut ring, &connect.build().flags(flags));
            assert_eq!(connected, refused, "{flags:?}");
            if kind == libc::SOCK_DGRAM {
                let send = opcode::Send::new(socket, b"c".as_ptr(), 1).build();
                assert_eq!(by(&mut ring, &send.flags(flags)), 1, "{flags:?}");
            }
            assert_eq!(by(&mut ring, &opcode::Close::new(socket).build()), 0);
        }
    }
}

/// A socket of MPTCP.
fn mptcp() -> std::io::Result<Socket> {
    const IPPROTO_MPTCP: i32 = 262;
    Socket::new(Domain::IPV4, Type::STREAM, Some(IPPROTO_MPTCP.into()))
}

/// How many ICMP echo requests are remembered: see docs/rules.md.
const ECHOES_REMEMBERED: u32 = 65_536;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

fn icmp() -> Socket {
    let kind = Type::RAW;
    Socket::new(Domain::IPV4, kind, Some(socket2::Protocol::ICMPV4)).unwrap()
}

/// An ICMP echo message without data to loopback.
fn send_echo(socket: &Socket, kind: u8, [i0, i1]: [u8; 2], [s0, s1]: [u8; 2]) {
    let words = [[kind, 0], [i0, i1], [s0, s1]].map(u16::from_be_bytes);
    let sum: u32 = words.iter().copied().map(u32::from).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let [.., c0, c1] = (!folded).to_be_bytes();
    let message = [kind, 0, c0, c1, i0, i1, s0, s1];
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.send_to(&message, &loopback.into()).unwrap();
}

/// A run whose command is this program.
struct Commanded {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Commanded {
    fn start(rule: &str) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut child = fault()
            .args(["run", "-r", rule, "--"])
            .arg(own)
            .args(["traffic::what_the_command_does", "--exact", "--nocapture"])
            .env(IS_COMMAND, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// Has the command do something, and waits until it has.
    fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut said = String::new();
        while !said.ends_with("done\n") {
            let read = self.said.read_line(&mut said).unwrap();
            assert_ne!(read, 0, "the command ended: {said}");
        }
    }

    /// A second descriptor of the first datagram socket that the command has open.
    fn take_socket(&self) -> UdpSocket {
        let fault = Pid::from_raw(self.child.id().cast_signed());
        let command = proc::tree(fault).unwrap().last().unwrap().pid;
        let process = proc::open_pidfd(command).unwrap();
        proc::open_sockets(command)
            .unwrap()
            .iter()
            .map(|socket| Socket::from(proc::take_descriptor(&process, socket.number).unwrap()))
            .find(|socket| socket.r#type().ok() == Some(Type::DGRAM))
            .map(UdpSocket::from)
            .expect("the command has one")
    }

    /// Ends it; its only rule must have matched and hit so many packets.
    fn end(self, packets: usize) {
        assert_hits(&self.summary(), packets);
    }

    /// Ends it, and gives the summary.
    fn summary(self) -> String {
        let mut child = self.child;
        drop(child.stdin.take());
        let output = child.wait_with_output().unwrap();
        drop(self.said);
        String::from_utf8(output.stderr).unwrap()
    }
}

/// Asserts that the only rule of a summary has matched and hit so many packets.
fn assert_hits(summary: &str, packets: usize) {
    let unit = if packets == 1 { "pkt" } else { "pkts" };
    let both = summary.matches(&format!(" {packets} {unit} ")).count();
    assert_eq!(both, 2, "{packets} packets: {summary}");
}

/// Sends datagrams back, and tells what they were once it has.
fn telling_echo(socket: UdpSocket) -> Receiver<u8> {
    let (sender, heard) = channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while let Ok((_, client)) = socket.recv_from(&mut byte) {
            socket.send_to(&byte, client).unwrap();
            if sender.send(byte[0]).is_err() {
                break;
            }
        }
    });
    heard
}

#[test]
fn a_port_belongs_to_who_uses_it_now() {
    const ROUNDS: usize = 20;
    enter_fresh();
    let peer = Peer::joined();
    let there = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let here = |address: &str| UdpSocket::bind(address).unwrap();
    let beyond = |address: &str| there.enter(|| Ok(UdpSocket::bind(address)?)).unwrap();
    let servers = [
        here("127.0.0.1:7000"),
        here("[::1]:7000"),
        beyond("10.77.0.2:7000"),
        beyond("[fd77::2]:7000"),
    ];
    let servers = servers.map(|socket| (socket.local_addr().unwrap(), telling_echo(socket)));
    for (what, rule) in [
        ("send", "udp:7000 blackhole dir=to-server"),
        ("ask", "udp:7000 corrupt=100% dir=to-client"),
    ] {
        let mut command = Commanded::start(rule);
        for (round, (address, stderr_text)) in
            (0..ROUNDS).flat_map(|n| servers.iter().map(move |s| (n, s)))
        {
            let port = 33_333 + u16::try_from(round % 2).unwrap();
            // Somebody else, before and after the command.
            let ask = || {
                let socket = send_from(port, *address, b'o');
                let mut byte = [0];
                let answer = socket.recv(&mut byte);
                assert_eq!(answer.ok(), Some(1), "{address} round {round}: {rule}");
                assert_eq!(byte, *b"o", "{address} round {round}: {rule}");
                assert_eq!(stderr_text.recv().ok(), Some(b'o'));
            };
            ask();
            command.tell(&format!("{what} {port} {address}"));
            if what == "ask" {
                assert_eq!(stderr_text.recv().ok(), Some(b'c'));
            }
            ask();
        }
        command.end(ROUNDS * servers.len());
    }
}

#[test]
fn a_socket_that_was_passed_on_is_still_its_makers() {
    enter_fresh();
    let server = UdpSocket::bind("127.0.0.1:7000").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    // The command has inherited one of ours.
    let ours = UdpSocket::bind("127.0.0.1:0").unwrap();
    ours.connect("127.0.0.1:7000").unwrap();
    let words = ["run", "--allow-unfired", "-r", "udp:7000 blackhole", "--"];
    let status = fault()
        .args(words)
        .args(["sh", "-c", "echo ours >&0"])
        .stdin(std::os::fd::OwnedFd::from(ours))
        .status()
        .unwrap();
    assert!(status.success());
    let mut bytes = [0; 8];
    assert_eq!(server.recv(&mut bytes).unwrap(), 5);
    // We have been given one of the command's.
    crate::support::place::ip("route add 224.0.0.0/4 dev lo");
    let mut command = Commanded::start("udp:7000 blackhole");
    command.tell("join");
    let given = command.take_socket();
    given.send_to(b"given", "127.0.0.1:7000").unwrap();
    server
        .send_to(b"mark", server.local_addr().unwrap())
        .unwrap();
    assert_eq!(server.recv(&mut bytes).unwrap(), 4, "nothing came before");
    command.end(1);
}

#[test]
fn a_socket_made_by_io_uring_is_the_commands() {
    if ring().is_none() {
        eprintln!("skipped: the kernel has no io_uring that makes sockets, or forbids it");
        return;
    }
    enter_fresh();
    let _service = echo("127.0.0.1");
    let mut command = Commanded::start("7000 reject");
    command.tell("io_uring");
    command.end(4);
}

#[test]
fn replies_to_pings_that_are_forgotten_are_counted() {
    enter_fresh();
    std::fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", "1").unwrap();
    let mut command = Commanded::start("icmp drop dir=to-client");
    command.tell("echoes");
    // The first request is forgotten, for it was one too many; the last is not.
    for identifier in [[1, 0], [1, 1]] {
        send_echo(&icmp(), ECHO_REPLY, identifier, [0, 0]);
    }
    let summary = command.summary();
    assert_hits(&summary, 1);
    let counted = "1 ICMP echo replies were not matched";
    assert!(summary.contains(counted), "{summary}");
}

#[test]
fn a_listener_of_mptcp_is_the_commands() {
    if !fault_user::sys::version::at_least(5, 19) || mptcp().is_err() {
        eprintln!("skipped: the kernel has no MPTCP, or is older than 5.19");
        return;
    }
    enter_fresh();
    let mut command = Commanded::start("tcp:7000 reject");
    command.tell("listen");
    let refused = TcpStream::connect("127.0.0.1:7000").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    command.end(1);
}

#[test]
fn a_range_is_one_of_services_ports_not_of_clients() {
    enter_fresh();
    for host in ["127.0.0.1", "::1"] {
        let address = echo(host);
        let mut old = connect(address).unwrap();
        exchange(&mut old).unwrap();
        let applied =
            AppliedRules::begin(&["tcp:1-6999,7001-65535 blackhole"], "--scope host --force");
        assert_eq!(&exchange(&mut old).unwrap(), b"hello", "open before");
        assert_eq!(&exchange(&mut connect(address).unwrap()).unwrap(), b"hello");
        assert_hits(&applied.end(), 0);
    }
}

/// Which of 16 addresses refuse connections under a rule for a share of them.
fn refusing(rule: &str, seed: u32) -> Vec<u8> {
    let rule = format!("tcp:127.0.1.0/28:7000 {rule}");
    let applied = AppliedRules::begin(&[&rule], &format!("--scope host --seed {seed}"));
    let refuses = |host: &u8| {
        let stream = connect(SocketAddr::from(([127, 0, 1, *host], 7000)));
        stream.and_then(|mut stream| exchange(&mut stream)).is_err()
    };
    let refusing = (0..16).filter(refuses).collect();
    applied.end();
    refusing
}

#[test]
fn a_share_of_the_hosts_is_chosen_by_the_seed() {
    enter_fresh();
    echo("0.0.0.0");
    let chosen = refusing("reject hosts=1/4", 5);
    assert_eq!(chosen.len(), 4, "{chosen:?}");
    assert_eq!(refusing("reject hosts=1/4", 5), chosen, "the same seed");
    assert_ne!(refusing("reject hosts=1/4", 6), chosen, "another seed");
    if fault_user::sys::version::at_least(5, 14) {
        let by_relay = refusing("close_on_data=rst hosts=1/4", 5);
        assert_eq!(by_relay, chosen, "whatever is done to them");
    }
}

#[test]
fn each_receiver_of_multicast_is_judged_by_itself() {
    const DATAGRAMS: usize = 10;
    enter_fresh();
    let peer = Peer::joined();
    crate::support::place::ip("route add 224.0.0.0/4 dev va");
    let there = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let sender = there.enter(|| Ok(UdpSocket::bind("10.77.0.2:0")?)).unwrap();
    let other = join(Ipv4Addr::new(10, 77, 0, 1));
    let mut command = Commanded::start(&format!("udp:{} blackhole", GROUP.1));
    command.tell("join");
    sender.set_multicast_ttl_v4(1).unwrap();
    for _ in 0..DATAGRAMS {
        sender.send_to(b"m", GROUP).unwrap();
        assert_eq!(other.recv(&mut [0]).unwrap(), 1);
    }
    command.end(DATAGRAMS);
    // What is sent here goes out and is looped back.
    let applied = AppliedRules::begin(&[&format!("udp:{} blackhole", GROUP.1)], "--scope host");
    let own = UdpSocket::bind("10.77.0.1:0").unwrap();
    for _ in 0..DATAGRAMS {
        own.send_to(b"m", GROUP).unwrap();
    }
    assert_hits(&applied.end(), 2 * DATAGRAMS);
    own.send_to(b"e", GROUP).unwrap();
    let mut byte = [0];
    other.recv(&mut byte).unwrap();
    assert_eq!(&byte, b"e", "none of those before has arrived");
}
