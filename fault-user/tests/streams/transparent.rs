//! The relay in front of a service that stays where it is: proxies of the daemon that listen where their upstream is, and
//! clients that come from outside.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::echo::tcp_echo;
use crate::support::place::{PATIENCE, Peer, enter_fresh};
use crate::support::watched::Watched;
use fault_user::sys::process::netns::NetworkNamespace;
use fault_user::sys::version;
use nix::sys::signal::Signal;

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    assert_eq!(
        stream.peer_addr()?,
        address,
        "the client sees whom it dialled"
    );
    Ok(stream)
}

/// How long an answer takes.
fn exchange(stream: &mut TcpStream) -> std::io::Result<Duration> {
    let start = Instant::now();
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    Ok(start.elapsed())
}

fn took(address: SocketAddr) -> Duration {
    exchange(&mut connect(address).unwrap()).unwrap()
}

const SLOW: Duration = Duration::from_millis(200);

fn needs_netns_cookies() -> bool {
    let has = version::at_least(5, 14);
    if !has {
        eprintln!("skipped: stream faults on the whole host need Linux 5.14");
    }
    has
}

fn ask(daemon: &Daemon, method: &str, path: &str, body: &str) -> (u16, String) {
    daemon.raw(method, path, "", body.as_bytes())
}

#[test]
fn a_proxy_that_listens_where_its_upstream_is() {
    if !needs_netns_cookies() {
        return;
    }
    enter_fresh();
    for text in ["127.0.0.1:7000", "[::1]:7001"] {
        let address: SocketAddr = text.parse().unwrap();
        tcp_echo(TcpListener::bind(address).unwrap());
        let daemon = Daemon::start();
        let mut old = connect(address).unwrap();
        let body = format!(r#"{{"name":"svc","listen":"{text}","upstream":"{text}"}}"#);
        let (status, answer) = ask(&daemon, "POST", "/proxies", &body);
        assert_eq!(status, 201, "{answer}");
        assert!(
            answer.contains(&format!(r#""listen":"{text}""#)),
            "{answer}"
        );
        assert!(took(address) < SLOW);
        let toxic = r#"{"type":"latency","attributes":{"latency":200}}"#;
        let (status, answer) = ask(&daemon, "POST", "/proxies/svc/toxics", toxic);
        assert_eq!(status, 200, "{answer}");
        assert!(took(address) >= SLOW);
        assert!(exchange(&mut old).unwrap() < SLOW, "it was there before");
        let mut redirected = connect(address).unwrap();
        exchange(&mut redirected).unwrap();
        let (status, answer) = ask(&daemon, "POST", "/proxies/svc", r#"{"enabled":false}"#);
        assert_eq!(status, 200, "{answer}");
        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(
            exchange(&mut redirected).is_err(),
            "it went through the relay"
        );
        ask(&daemon, "POST", "/reset", "");
        assert!(took(address) < SLOW);
        let (status, answer) = ask(
            &daemon,
            "POST",
            "/proxies/svc",
            r#"{"upstream":"127.0.0.1:1"}"#,
        );
        assert_eq!(status, 400, "{answer}");
        assert_eq!(ask(&daemon, "DELETE", "/proxies/svc", "").0, 204);
        assert!(took(address) < SLOW);
    }
}

#[test]
fn a_service_that_does_not_listen_refuses_its_clients() {
    if !needs_netns_cookies() {
        return;
    }
    enter_fresh();
    let daemon = Daemon::start();
    for text in ["127.0.0.1:7000", "[::1]:7000"] {
        let body = format!(r#"{{"name":"{text}","listen":"{text}","upstream":"{text}"}}"#);
        let (status, answer) = ask(&daemon, "POST", "/proxies", &body);
        assert_eq!(status, 201, "{answer}");
        let refused = TcpStream::connect(text).expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{text}");
    }
}

/// Whether a new connection brings an answer.
fn answers(address: SocketAddr) -> bool {
    connect(address).is_ok_and(|mut stream| exchange(&mut stream).is_ok())
}

#[test]
fn a_packet_fault_is_a_toxic_of_a_transparent_proxy() {
    if !needs_netns_cookies() {
        return;
    }
    enter_fresh();
    let address: SocketAddr = "127.0.0.1:7000".parse().unwrap();
    tcp_echo(TcpListener::bind(address).unwrap());
    let daemon = Daemon::start();
    let body = r#"{"name":"svc","listen":"127.0.0.1:7000","upstream":"127.0.0.1:7000"}"#;
    assert_eq!(ask(&daemon, "POST", "/proxies", body).0, 201);
    let add = |body: &str| daemon.call("POST", "/proxies/svc/toxics", body);
    let (status, reject) = add(r#"{"type":"reject"}"#);
    assert_eq!(status, 200, "{reject}");
    assert_eq!(reject["name"], "reject_downstream");
    assert_eq!(reject["rule"], "tcp:127.0.0.1:7000 reject");
    assert!(!answers(address));
    assert_eq!(add(r#"{"type":"noop","name":"reject_downstream"}"#).0, 409);
    let rule = daemon.call("GET", "/v1/rules", "").1;
    assert_eq!(rule[0]["toxic"], "reject_downstream of svc");
    let path = format!("/v1/rules/{}", rule[0]["id"]);
    assert_eq!(daemon.call("DELETE", &path, "").0, 409);
    assert_eq!(
        ask(
            &daemon,
            "DELETE",
            "/proxies/svc/toxics/reject_downstream",
            ""
        )
        .0,
        204
    );
    assert!(answers(address));
    if Path::new("/dev/net/tun").exists() {
        let late =
            r#"{"type":"delay","stream":"upstream","attributes":{"delay":"200ms","first":9}}"#;
        let (status, late) = add(late);
        assert_eq!(status, 200, "{late}");
        assert_eq!(
            late["rule"],
            "tcp:127.0.0.1:7000 delay=200ms first=9 dir=to-server"
        );
        assert!(took(address) >= SLOW);
        let change = r#"{"attributes":{"delay":"1ms"}}"#;
        let (_, late) = daemon.call("PATCH", "/proxies/svc/toxics/delay_upstream", change);
        assert_eq!(
            late["attributes"],
            serde_json::json!({"delay": "1ms", "first": 9})
        );
        assert!(took(address) < SLOW);
    }
    let (status, some) = add(r#"{"type":"drop","name":"half","toxicity":0.5}"#);
    assert_eq!(status, 200, "{some}");
    assert_eq!(some["rule"], "tcp:127.0.0.1:7000 mix 50%:drop");
    assert_eq!(daemon.call("GET", "/proxies/svc/toxics/half", "").1, some);
    let (status, wrong) = add(r#"{"type":"loss","attributes":{"probabilty":1}}"#);
    assert_eq!(status, 400, "{wrong}");
    assert_eq!(ask(&daemon, "POST", "/reset", "").0, 204);
    assert_eq!(
        daemon.call("GET", "/proxies/svc/toxics", "").1,
        serde_json::json!([])
    );
    assert_eq!(daemon.call("GET", "/v1/rules", "").1, serde_json::json!([]));
    assert!(took(address) < SLOW);
    add(r#"{"type":"reject"}"#);
    assert_eq!(ask(&daemon, "DELETE", "/proxies/svc", "").0, 204);
    assert!(answers(address), "its rules go with a proxy");
    daemon.proxy("plain", address);
    let (status, refused) = daemon.call("POST", "/proxies/plain/toxics", r#"{"type":"reject"}"#);
    assert_eq!(status, 400, "{refused}");
    let why = refused["error"].as_str().unwrap();
    assert!(why.contains("use a transparent proxy"), "{why}");
}

#[test]
fn a_killed_daemon_leaves_the_service_to_itself() {
    if !needs_netns_cookies() {
        return;
    }
    enter_fresh();
    let address: SocketAddr = "127.0.0.1:7000".parse().unwrap();
    tcp_echo(TcpListener::bind(address).unwrap());
    let daemon = Daemon::start();
    let body = r#"{"name":"svc","listen":"127.0.0.1:7000","upstream":"127.0.0.1:7000"}"#;
    assert_eq!(ask(&daemon, "POST", "/proxies", body).0, 201);
    let mut redirected = connect(address).unwrap();
    exchange(&mut redirected).unwrap();
    // Dropping it kills it.
    drop(daemon);
    assert!(exchange(&mut redirected).is_err(), "a reset, not a hang");
    assert!(took(address) < SLOW);
}

#[test]
fn what_cannot_be_transparent_is_refused() {
    enter_fresh();
    let daemon = Daemon::start();
    for (listen, protocol, why) in [
        ("0.0.0.0:7000", "tcp", "needs the address of its service"),
        ("127.0.0.1:7000", "udp", "UDP is not supported"),
    ] {
        let body = format!(
            r#"{{"name":"svc","listen":"{listen}","upstream":"{listen}","protocol":"{protocol}"}}"#
        );
        let (status, answer) = ask(&daemon, "POST", "/proxies", &body);
        assert_eq!(status, 400, "{answer}");
        if version::at_least(5, 14) {
            assert!(answer.contains(why), "{answer}");
        }
    }
    assert_eq!(ask(&daemon, "GET", "/proxies", "").1.trim(), "{}");
}

#[test]
fn clients_from_outside_are_redirected_too() {
    if !needs_netns_cookies() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let outside = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    for (bound, dialled) in [
        ("0.0.0.0:7000", "10.77.0.1:7000"),
        ("[::]:7001", "[fd77::1]:7001"),
    ] {
        let address: SocketAddr = dialled.parse().unwrap();
        tcp_echo(TcpListener::bind(bound).unwrap());
        let took_outside = || outside.enter(|| Ok(took(address))).unwrap();
        assert!(took_outside() < SLOW);
        let rule = format!("tcp:{} latency=200ms", address.port());
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let mut inject = Watched::inject(&["-r", &rule]);
            assert!(took_outside() >= SLOW, "a client from outside");
            assert!(took(address) >= SLOW, "a client on this host");
            let mut redirected = outside.enter(|| Ok(connect(address)?)).unwrap();
            exchange(&mut redirected).unwrap();
            inject.signal(signal);
            inject.finish();
            assert!(took_outside() < SLOW);
            assert!(exchange(&mut redirected).is_err(), "a reset, not a hang");
        }
    }
}
