//! Stream faults on services that are not reconfigured are applied and removed: on old connections and on new ones,
//! with real servers and with their ordinary clients.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use crate::support::place::{
    AppliedRules, PATIENCE, can_redirect_the_host, enter_fresh, fault, ip, run, wait_for,
};
use crate::support::servers::{Server, certify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

const PYTHON: &str = "/usr/bin/python3";
const CLIENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/client.py");
const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/server.py");

/// What is slower is delayed by the rule.
const SLOW_MS: u64 = 500;

/// Holds both ways of one round trip so long.
const ONE_TRIP: &str = "latency=250ms";
/// For clients that make two at least.
const TWO_TRIPS: &str = "latency=130ms";

/// A client in a process of its own.
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    /// Connects, and has had an answer.
    fn connect(protocol: &str, port: u16) -> Self {
        Self::by(Command::new(PYTHON), protocol, port)
    }

    /// The same, of a command that takes the client's own words at its end.
    fn by(mut command: Command, protocol: &str, port: u16) -> Self {
        let mut child = command
            .args([CLIENT, protocol, &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut client = Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        };
        assert_eq!(client.line(), "ready", "{protocol}");
        client
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What comes of an order: how many milliseconds it took, or the error.
    fn ask(&mut self, order: &str) -> Result<u64, String> {
        writeln!(self.input, "{order}").unwrap();
        let line = self.line();
        match line.split_once(' ') {
            Some(("ok", took)) => Ok(took.parse().unwrap()),
            _ => Err(line),
        }
    }

    fn took(&mut self, order: &str) -> u64 {
        let took = self.ask(order);
        took.unwrap_or_else(|error| panic!("{order}: {error}"))
    }

    fn is_slow(&mut self, order: &str) -> bool {
        self.took(order) >= SLOW_MS
    }

    /// A busy machine is slow now and then, what a rule delays always is.
    fn is_quick(&mut self, order: &str) -> bool {
        (0..5).any(|_| self.took(order) < SLOW_MS)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.child.kill();
        self.child.wait().expect("it is our child");
    }
}

/// A server's process, which ends with the test.
struct Killed {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended already. A `fault` passes the signal on to its command.
        let _ended = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        );
        self.child.wait().expect("it is our child");
    }
}

/// Starts a server and waits until it listens.
fn start(port: u16, folder: tempfile::TempDir, command: &mut Command) -> Killed {
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let server = Killed {
        child: child.expect("cargo xtask setup --for test"),
        _folder: folder,
    };
    wait_for(
        || TcpStream::connect(("127.0.0.1", port)).is_ok(),
        "the server to listen",
    );
    server
}

fn python(kind: &str, port: u16) -> Killed {
    let folder = tempfile::tempdir().unwrap();
    let certificate = folder.path().join("certificate.pem");
    if kind == "tls" {
        certify(&certificate);
    }
    let mut command = Command::new(PYTHON);
    start(
        port,
        folder,
        command
            .args([SERVER, kind, &port.to_string()])
            .arg(certificate),
    )
}

fn nats(port: u16) -> Killed {
    let mut command = Command::new("nats-server");
    let words = ["-a", "127.0.0.1", "-p", &port.to_string()];
    start(port, tempfile::tempdir().unwrap(), command.args(words))
}

fn mariadb(port: u16) -> Killed {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    // It runs as a user of its own.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let data = folder.path().join("data");
    let data_words = format!("--datadir={}", data.display());
    let made = Command::new("mariadb-install-db")
        .args([
            "--no-defaults",
            "--user=mysql",
            "--skip-test-db",
            &data_words,
        ])
        .stdout(Stdio::null())
        .status();
    assert!(made.expect("cargo xtask setup --for test").success());
    let mut command = Command::new("mariadbd");
    command
        .args(["--no-defaults", "--user=mysql", "--bind-address=127.0.0.1"])
        .args(["--skip-grant-tables", "--skip-name-resolve", &data_words])
        .arg(format!("--port={port}"))
        .arg(format!("--socket={}", data.join("socket").display()));
    start(port, folder, &mut command)
}

/// Answers with what it is sent; what ends each connection is told.
fn echo(listener: TcpListener) -> Receiver<std::io::Result<usize>> {
    let (sender, ends) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, sender) = (stream.unwrap(), sender.clone());
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                let end = loop {
                    match stream.read(&mut bytes) {
                        Ok(read @ 1..) => stream.write_all(&bytes[..read]).unwrap_or_default(),
                        end => break end,
                    }
                };
                // Nobody may be interested.
                let _told = sender.send(end);
            });
        }
    });
    ends
}

fn bound(address: &str) -> TcpListener {
    TcpListener::bind(address).unwrap()
}

/// Two servers on one port.
fn shared(port: u16) {
    for _ in 0..2 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        socket.bind(&address.into()).unwrap();
        socket.listen(64).unwrap();
        echo(socket.into());
    }
}

/// What connects to the second address here comes from the first.
fn two_addresses() {
    for words in [
        "link add va type veth peer name vb",
        "addr add 10.78.0.1/24 dev va",
        "addr add 10.78.0.2/24 dev va",
        "link set va up",
        "link set vb up",
    ] {
        ip(words);
    }
}

/// Delays new connections, then closes all: before, meanwhile and afterwards.
fn injects_and_restores(protocol: &str, port: u16, latency: &str) {
    let mut client = Client::connect(protocol, port);
    assert!(
        client.is_quick("kept") && client.is_quick("new"),
        "{protocol}"
    );
    let applied = AppliedRules::begin(&[&format!("tcp:{port} {latency}")], "--scope host");
    assert!(
        client.is_slow("new"),
        "{protocol}: a new connection is delayed"
    );
    assert!(
        client.is_quick("kept"),
        "{protocol}: an open connection stays as it is"
    );
    let mut redirected = Client::connect(protocol, port);
    assert!(
        redirected.is_slow("kept"),
        "{protocol}: it is delayed for as long as it lasts"
    );
    let summary = applied.end();
    assert!(
        summary.contains("relay (connect hook)"),
        "{protocol}: {summary}"
    );
    assert!(
        client.is_quick("new") && client.is_quick("kept"),
        "{protocol} restored"
    );
    assert!(
        redirected.is_quick("again"),
        "{protocol}: who was redirected reconnects and bypasses the relay"
    );
    let applied = AppliedRules::begin(&[&format!("tcp:{port} down")], "--scope host");
    for order in ["kept", "new", "again"] {
        let error = client.ask(order).expect_err("it is down");
        assert!(!error.contains("imeout"), "{protocol}: at once: {error}");
    }
    let summary = applied.end();
    assert!(!summary.contains("never fired"), "{protocol}: {summary}");
    assert!(
        client.is_quick("new") && client.is_quick("again"),
        "{protocol} is up again"
    );
}

#[test]
fn small_services_recover_from_stream_faults() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let _redis = Server::redis(6379, None);
    let _servers = [nats(4222), python("http", 8000), python("tls", 8443)];
    echo(bound("[::]:7001"));
    shared(7002);
    echo(bound("127.0.0.2:7003"));
    two_addresses();
    echo(bound("10.78.0.2:7004"));
    for (protocol, port) in [
        ("redis", 6379),
        ("nats", 4222),
        ("http", 8000),
        ("tls", 8443),
        ("echo", 7001),
        ("mapped", 7001),
        ("echo", 7002),
        ("one-address", 7003),
        ("second-address", 7004),
    ] {
        eprintln!("{protocol} at {port}");
        injects_and_restores(protocol, port, ONE_TRIP);
    }
}

#[test]
fn databases_and_a_pool_recover_from_stream_faults() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let _postgres = Server::postgres(5432);
    let _mariadb = mariadb(3306);
    for (protocol, port) in [("postgres", 5432), ("pool", 5432), ("mariadb", 3306)] {
        injects_and_restores(protocol, port, TWO_TRIPS);
    }
}

/// What clients make of rules: the case of a script, which says whether all is as it should be.
fn understands(script: &str, case: &str, port: u16, rules: &[&str]) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/");
    let script = &format!("{folder}{script}");
    let output = run(rules, "", &[PYTHON, script, case, &port.to_string()]);
    let said = String::from_utf8_lossy(&output.stdout);
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("understood"), "{case}: {said}{stderr_text}");
    assert!(!stderr_text.contains("never"), "{case}: {stderr_text}");
}

#[test]
fn clients_take_errors_for_their_servers_own() {
    enter_fresh();
    let _postgres = Server::postgres(5432);
    let table = "create table counted as select 0 as n";
    let mut psql = Command::new("psql");
    psql.args(["-h", "127.0.0.1", "-U", "postgres", "-qc", table]);
    assert!(psql.status().expect("psql").success());
    let update = r#"query="^UPDATE""#;
    for (case, rule) in [
        ("retries", format!("transient=2,postgres:40001 {update}")),
        ("prepared", format!("transient=3,postgres:40P01 {update}")),
        (
            "commit",
            r#"error=postgres:"40001 try again" query="^commit""#.to_owned(),
        ),
        ("login", "error=postgres:53300".to_owned()),
        ("farewell", "error=postgres:57P01".to_owned()),
    ] {
        understands("errors.py", case, 5432, &[&format!("tcp:5432 {rule}")]);
    }
    let _redis = Server::redis(6379, None);
    let redis = [
        r#"tcp:6379 error=redis:READONLY query="^SET""#,
        r#"tcp:6379 error=redis:LOADING query="^LPUSH list""#,
        r#"tcp:6379 error=redis:"MOVED 12 10.0.0.2:6380" query="^INCR""#,
    ];
    understands("errors.py", "redis_prefixes", 6379, &redis);
    let _mariadb = mariadb(3306);
    let mysql = format!("tcp:3306 error=mysql:1213 {update}");
    understands("errors.py", "mysql", 3306, &[&mysql]);
}

#[test]
fn connections_are_selected_by_what_their_clients_ask_for() {
    enter_fresh();
    // As on a network, so that a long greeting has several segments.
    ip("link set lo mtu 1500");
    let _servers = [python("http", 8000), python("tls", 8443)];
    echo(bound("127.0.0.1:7000"));
    for (case, rule) in [
        ("sni", "tcp:8443 reset_peer sni=*.example.com"),
        ("alpn", "tcp:8443 reset_peer alpn=h2"),
        ("host", "tcp:8000 reset_peer host=api.example.com"),
    ] {
        let port = if case == "host" { 8000 } else { 8443 };
        understands("asks.py", case, port, &[rule]);
    }
    // Rules that never fire let everything pass.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/asks.py");
    let rule = "tcp:7000 reset_peer sni=a.example host=b.example";
    let output = run(
        &[rule],
        "--allow-unfired",
        &[PYTHON, script, "other", "7000"],
    );
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("understood"), "{output:?}");
}

/// What curl gets from each address under a rule, of two names with one server: "STATUS VERSION CONNECTIONS".
fn curl(fault: &mut Command, rule: &str, words: &str) -> Vec<String> {
    let ask = format!(
        "curl -sk --max-time 30 -w '%{{http_code}} %{{http_version}} %{{num_connects}}\\n' -o /dev/null -o /dev/null \
         --connect-to ::127.0.0.1: {words}; true"
    );
    fault.args(["run", "-r", rule, "--allow-unfired", "--", "sh", "-c"]);
    let output = fault.arg(ask).output().expect("fault runs");
    assert!(output.status.success(), "{rule}: {output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines().map(str::to_owned).collect()
}

#[test]
fn one_of_two_names_on_a_port_is_under_fault_for_curl() {
    enter_fresh();
    let _servers = (python("http", 8000), Server::https(8443));
    let (reset, h2, h1) = (["000 0 1"], ["200 2 1"], ["200 1.1 1"]);
    for (rule, words, expected) in [
        (
            "sni=api.example.com",
            "https://api.example.com:8443/",
            &reset,
        ),
        ("sni=api.example.com", "https://www.example.com:8443/", &h2),
        ("alpn=h2", "https://api.example.com:8443/", &reset),
        ("alpn=h2", "--http1.1 https://api.example.com:8443/", &h1),
        // Without SNI, for there is no name.
        ("sni=*", "https://127.0.0.1:8443/", &h2),
    ] {
        let rule = format!("tcp:8443 reset_peer {rule}");
        assert_eq!(
            curl(&mut fault(), &rule, words),
            expected,
            "{rule}, {words}"
        );
    }
    // Both requests of a kept connection.
    let rule = "tcp:8000 error=http:503 host=api.example.com";
    let twice = |name: &str| format!("http://{name}:8000/1 http://{name}:8000/2");
    let api = curl(&mut fault(), rule, &twice("api.example.com"));
    assert_eq!(api, ["503 1.1 1", "503 1.1 0"]);
    let www = curl(&mut fault(), rule, &twice("www.example.com"));
    assert_eq!(www, ["200 1.1 1", "200 1.1 0"]);
}

#[test]
fn a_rule_for_a_host_leaves_another_one_at_its_address_alone() {
    enter_fresh();
    let _servers = (python("http", 8000), Server::https(8443));
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    std::fs::write(&hosts, "127.0.0.1 api.example.com www.example.com\n").unwrap();
    let under_hosts = || {
        let mut command = Command::new("unshare");
        let mount = r#"mount --bind "$1" /etc/hosts && shift && exec "$@""#;
        command
            .args(["--mount", "sh", "-c", mount, "sh"])
            .arg(&hosts);
        command.arg(fault().get_program());
        command
    };
    for (url, port, succeeded) in [("https", 8443, "200 2 1"), ("http", 8000, "200 1.1 1")] {
        let rule = format!("tcp:api.example.com:{port} reset_peer");
        let ask = |name: &str| {
            curl(
                &mut under_hosts(),
                &rule,
                &format!("{url}://{name}:{port}/"),
            )
        };
        assert_eq!(ask("api.example.com"), ["000 0 1"], "{url}");
        assert_eq!(ask("www.example.com"), [succeeded], "{url}");
        assert_eq!(ask("127.0.0.1"), ["000 0 1"], "{url}: no other name");
    }
}

#[test]
fn a_server_under_fault_on_a_second_address_is_reached_once() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    two_addresses();
    let mut command = fault();
    command
        .args(["run", "-r", "tcp:8000 latency=250ms", "--", PYTHON])
        .args([SERVER, "http", "8000"])
        .env("HOST", "10.78.0.2")
        .stdout(Stdio::null());
    // However the test ends, the server ends with its `fault`.
    let server = Killed {
        child: command.spawn().expect("fault runs"),
        _folder: tempfile::tempdir().unwrap(),
    };
    wait_for(
        || TcpStream::connect(("10.78.0.2", 8000)).is_ok(),
        "the server to listen",
    );
    let mut python = Command::new(PYTHON);
    python.env("HOST", "10.78.0.2");
    let mut client = Client::by(python, "http", 8000);
    let took = client.ask("new");
    drop(server);
    assert!(took.as_ref().is_ok_and(|ms| *ms >= SLOW_MS), "{took:?}");
}

#[test]
fn down_resets_both_ends() {
    enter_fresh();
    let ends = echo(bound("127.0.0.1:7000"));
    let mut client = Client::connect("echo", 7000);
    let applied = AppliedRules::begin(&["tcp:7000 down"], "--scope host");
    let error = client.ask("kept").unwrap_err();
    assert!(error.contains("ConnectionResetError"), "{error}");
    let end = ends.recv_timeout(PATIENCE).expect("the server's end");
    assert_eq!(
        end.map_err(|error| error.kind()),
        Err(std::io::ErrorKind::ConnectionReset)
    );
    let error = client.ask("new").unwrap_err();
    assert!(error.contains("ConnectionRefusedError"), "{error}");
    applied.end();
    assert!(client.is_quick("new") && client.is_quick("again"));
}

#[test]
fn two_runs_on_one_port_do_not_meet() {
    enter_fresh();
    echo(bound("127.0.0.1:7000"));
    let redirected = |rule: &str| {
        let mut command = fault();
        command.args(["run", "-r", rule, "--", PYTHON]);
        Client::by(command, "echo", 7000)
    };
    let mut slow = redirected("tcp:7000 latency=250ms");
    let mut slower = redirected("tcp:7000 latency=1s");
    let mut free = Client::connect("echo", 7000);
    for order in ["new", "kept"] {
        let least = (0..3).map(|_| slow.took(order)).min().unwrap();
        assert!((SLOW_MS..4 * SLOW_MS).contains(&least), "{order}: {least}");
        let least = slower.took(order);
        assert!(least >= 4 * SLOW_MS, "{order}: {least}");
        assert!(free.is_quick(order));
    }
}

/// Listeners in this namespace.
fn listeners() -> usize {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let states = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(3));
    states.filter(|state| *state == "0A").count()
}

#[test]
fn fifty_kills_leave_nothing() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    echo(bound("127.0.0.1:7000"));
    let mut client = Client::connect("echo", 7000);
    for turn in 0..50 {
        let mut applied = AppliedRules::begin(&["tcp:7000 latency=1ms"], "--scope host");
        let mut redirected = TcpStream::connect(("127.0.0.1", 7000)).unwrap();
        redirected.set_read_timeout(Some(PATIENCE)).unwrap();
        redirected.write_all(b"hello").unwrap();
        redirected.read_exact(&mut [0; 5]).unwrap();
        assert_eq!(listeners(), 2, "the service and the relay");
        applied.kill();
        let end = redirected.read(&mut [0; 5]).map_err(|error| error.kind());
        assert!(
            matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)),
            "{turn}: no hang: {end:?}"
        );
        drop(applied);
        wait_for(|| listeners() == 1, "the relay to be gone");
        assert!(
            client.ask("new").is_ok() && client.ask("kept").is_ok(),
            "{turn}"
        );
    }
}

#[test]
fn a_unix_socket_is_refused_in_one_line() {
    for target in ["unix:/run/service.sock", "/run/service.sock"] {
        let output = run(&[&format!("{target} latency=1s")], "", &["true"]);
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr_text}");
        assert!(
            stderr_text.contains("a Unix socket sends no packets and has no port"),
            "{stderr_text}"
        );
    }
}
