//! The HTTP API: every route and error text, security, robustness, the gate.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::daemon::{Daemon, client};
use crate::support::echo::echo_server;
use proptest::prelude::*;
use serde_json::{Value, json};

/// A port that nobody listens on.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .expect("loopback")
        .local_addr()
        .expect("bound")
}

/// Method, path, body, and the status and text of the error; `…` stands for the parser's own words.
const ERRORS: &[(&str, &str, &str, u16, &str)] = &[
    ("POST", "/proxies", "", 400, "bad request body: EOF"),
    ("POST", "/proxies", "{", 400, "bad request body: …"),
    ("POST", "/proxies", "[]", 400, "bad request body: …"),
    (
        "POST",
        "/proxies",
        r#"{"name":1}"#,
        400,
        "bad request body: …",
    ),
    (
        "POST",
        "/proxies",
        "{}",
        400,
        "missing required field: name",
    ),
    (
        "POST",
        "/proxies",
        r#"{"q":{"name":"q","upstream":"a:1"}}"#,
        400,
        "missing required field: name; these are several proxies: POST them to /populate",
    ),
    (
        "POST",
        "/proxies",
        r#"{"name":"q"}"#,
        400,
        "missing required field: upstream",
    ),
    (
        "POST",
        "/proxies",
        r#"{"name":"p","upstream":"a:1"}"#,
        409,
        "proxy already exists",
    ),
    (
        "POST",
        "/populate",
        r#"[{"name":"q","upstream":"a:1"},{"upstream":"a:1"}]"#,
        400,
        "missing required field: name at proxy 2",
    ),
    (
        "POST",
        "/populate",
        r#"[{"name":"q"}]"#,
        400,
        "missing required field: upstream at proxy 1",
    ),
    (
        "POST",
        "/proxies",
        r#"{"name":"q","upstream":"/run/q"}"#,
        400,
        "/run/q is a Unix socket, which is unsupported: give the HOST:PORT of the service",
    ),
    ("POST", "/populate", "{}", 400, "bad request body: …"),
    ("GET", "/proxies/x", "", 404, "proxy not found"),
    ("POST", "/proxies/x", "{", 404, "proxy not found"),
    ("PATCH", "/proxies/p", "{", 400, "bad request body: …"),
    ("DELETE", "/proxies/x", "", 404, "proxy not found"),
    ("GET", "/proxies/x/toxics", "", 404, "proxy not found"),
    ("POST", "/proxies/x/toxics", "{}", 404, "proxy not found"),
    ("POST", "/proxies/p/toxics", "x", 400, "bad request body: …"),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"stream":"x","type":"y"}"#,
        400,
        "stream was invalid, can be either upstream or downstream",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"y"}"#,
        400,
        "invalid toxic type",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"loss","name":"latency_downstream"}"#,
        409,
        "toxic already exists",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"latency","attributes":{"latency":"1"}}"#,
        409,
        "toxic already exists",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"latency","name":"n","attributes":{"jitter":2,"latency":"1"}}"#,
        400,
        "bad request body: attributes.latency: …",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"latency","name":"n","attributes":{"latency":1.5}}"#,
        400,
        "bad request body: …",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"latency","name":"n","sni":"a b"}"#,
        400,
        "sni: \"a b\" is no host name",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"latency","name":"n","alpn":"h 2"}"#,
        400,
        "alpn: \"h 2\" is no protocol of ALPN",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"loss","name":"n","host":"a.example"}"#,
        400,
        "sni, host and alpn select TCP connections for a stream toxic: leave them out here",
    ),
    (
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"down","name":"n","host":"a.example"}"#,
        400,
        "sni, host and alpn select TCP connections for a stream toxic: leave them out here",
    ),
    (
        "PATCH",
        "/proxies/p/toxics/latency_downstream",
        r#"{"sni":"a.example"}"#,
        400,
        "sni, host and alpn can't be changed: remove the toxic and add it again",
    ),
    ("GET", "/proxies/p/toxics/x", "", 404, "toxic not found"),
    ("POST", "/proxies/p/toxics/x", "{}", 404, "toxic not found"),
    (
        "POST",
        "/proxies/p/toxics/latency_downstream",
        "",
        400,
        "bad request body: EOF",
    ),
    (
        "PATCH",
        "/proxies/p/toxics/latency_downstream",
        r#"{"toxicity":"x"}"#,
        400,
        "bad request body: …",
    ),
    ("DELETE", "/proxies/p/toxics/x", "", 404, "toxic not found"),
    ("DELETE", "/proxies/x/toxics/x", "", 404, "proxy not found"),
];

#[test]
fn every_error_has_its_status_and_text() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", nobody());
    daemon.call("POST", "/proxies/p/toxics", r#"{"type":"latency"}"#);
    let used = format!(r#"{{"name":"q","listen":"{listen}","upstream":"localhost:1"}}"#);
    let in_use = format!("listen tcp {listen}: bind: address already in use");
    let in_use = ("POST", "/proxies", &*used, 500, &*in_use);
    let places = [
        (
            "local373",
            "listen tcp: address local373: missing port in address",
        ),
        ("127.0.0.1:99999", "listen tcp: address 99999: invalid port"),
        (
            "nobody.invalid:0",
            "listen tcp: lookup nobody.invalid: no such host",
        ),
        (
            "192.0.2.1:0",
            "listen tcp 192.0.2.1:0: bind: cannot assign requested address",
        ),
    ];
    let bodies = places
        .map(|(listen, _)| json!({"name": "q", "listen": listen, "upstream": "a:1"}).to_string());
    let places: Vec<_> = std::iter::zip(&bodies, places)
        .map(|(body, (_, text))| ("POST", "/proxies", body.as_str(), 500, text))
        .collect();
    for (method, path, body, status, text) in ERRORS.iter().chain([&in_use]).chain(&places) {
        let (got, answer) = daemon.call(method, path, body);
        let error = answer["error"].as_str().unwrap_or_default();
        assert_eq!(got, *status, "{method} {path} {body}: {answer}");
        assert_eq!(answer["status"], *status, "{method} {path} {body}");
        match text.strip_suffix('…') {
            Some(beginning) => assert!(
                error.starts_with(beginning),
                "{method} {path} {body}: {error}"
            ),
            None => assert_eq!(error, *text, "{method} {path} {body}"),
        }
    }
    assert_eq!(daemon.raw("GET", "/nowhere", "", b"").0, 404);
    assert_eq!(daemon.raw("PUT", "/proxies", "", b"").0, 405);
    assert_eq!(daemon.raw("GET", "/reset", "", b"").0, 405);
}

#[test]
fn proxies_and_toxics_are_shown_as_toxiproxy_shows_them() {
    let daemon = Daemon::start();
    assert_eq!(
        daemon.raw("GET", "/version", "", b"").1,
        "{\"version\": \"2.12.0\"}\n"
    );
    let (status, proxy) = daemon.call(
        "POST",
        "/proxies",
        r#"{"Name":"p","listen":"localhost:0","upstream":"localhost:1","enabled":null,"x":1}"#,
    );
    assert_eq!(status, 201);
    let listen = proxy["listen"].as_str().expect("a text").to_owned();
    assert!(
        listen.starts_with("127.0.0.1:") && !listen.ends_with(":0"),
        "{listen}"
    );
    assert_eq!(
        proxy,
        json!({"name": "p", "listen": listen, "upstream": "localhost:1", "enabled": true, "toxics": []})
    );
    let toxics = "/proxies/p/toxics";
    let (status, first) = daemon.call("POST", toxics, r#"{"type":"latency","attributes":null}"#);
    assert_eq!(status, 200);
    assert_eq!(
        first,
        json!({"attributes": {"latency": 0, "jitter": 0}, "name": "latency_downstream", "type": "latency", "stream": "downstream", "toxicity": 1})
    );
    let (_, second) = daemon.call(
        "POST",
        toxics,
        r#"{"type":"slicer","stream":"UPSTREAM","toxicity":0.5,"attributes":{"delay":5}}"#,
    );
    assert_eq!(second["name"], "slicer_UPSTREAM");
    assert_eq!(second["stream"], "UPSTREAM");
    assert_eq!(second["toxicity"], 0.5);
    assert_eq!(daemon.call("GET", toxics, "").1, json!([second, first]));
    let (status, changed) = daemon.call(
        "PATCH",
        "/proxies/p/toxics/slicer_UPSTREAM",
        r#"{"attributes":{"average_size":9}}"#,
    );
    assert_eq!(status, 200);
    assert_eq!(
        changed["attributes"],
        json!({"average_size": 9, "size_variation": 0, "delay": 5})
    );
    assert_eq!(changed["toxicity"], 0.5);
    assert_eq!(
        daemon
            .call("DELETE", "/proxies/p/toxics/slicer_UPSTREAM", "")
            .0,
        204
    );
    // Disabled it keeps its text, enabled it has the same port again.
    let (_, off) = daemon.call("POST", "/proxies/p", r#"{"enabled":false}"#);
    assert_eq!(
        (&off["enabled"], &off["listen"]),
        (&json!(false), &json!(listen))
    );
    assert!(TcpStream::connect(&*listen).is_err());
    assert_eq!(daemon.call("POST", "/reset", "").0, 204);
    let (_, all) = daemon.call("GET", "/proxies", "");
    assert_eq!(
        all,
        json!({"p": {"name": "p", "listen": listen, "upstream": "localhost:1", "enabled": true, "toxics": []}})
    );
    assert_eq!(daemon.call("DELETE", "/proxies/p", "").0, 204);
    assert_eq!(daemon.call("GET", "/proxies", "").1, json!({}));
    let (status, disabled) = daemon.call(
        "POST",
        "/proxies",
        r#"{"name":"d","listen":"localhost:3310","upstream":"a:1","enabled":false}"#,
    );
    assert_eq!(
        (status, &disabled["listen"]),
        (201, &json!("localhost:3310"))
    );
}

#[test]
fn populate_keeps_equal_proxies_and_replaces_others() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("a", "127.0.0.1:1".parse().expect("an address"));
    daemon.call("POST", "/proxies/a/toxics", r#"{"type":"noop"}"#);
    let port = listen.port();
    let equal = format!(
        r#"[{{"name":"a","listen":"localhost:{port}","upstream":"127.0.0.1:1"}},{{"name":"b","listen":"127.0.0.1:0","upstream":"c:1","enabled":false}}]"#
    );
    let (status, answer) = daemon.call("POST", "/populate", &equal);
    assert_eq!(status, 201);
    assert_eq!(
        answer["proxies"][0]["toxics"].as_array().map(Vec::len),
        Some(1)
    );
    assert_eq!(answer["proxies"][1]["enabled"], false);
    let different = format!(
        r#"[{{"name":"a","listen":"127.0.0.1:{port}","upstream":"127.0.0.1:2"}},{{"name":"z","listen":"127.0.0.1:{port}","upstream":"d:1"}}]"#
    );
    let (status, answer) = daemon.call("POST", "/populate", &different);
    assert_eq!(status, 500);
    assert_eq!(answer["status"], 500);
    assert!(
        answer["error"]
            .as_str()
            .expect("a text")
            .ends_with("bind: address already in use"),
        "{answer}"
    );
    assert_eq!(answer["proxies"].as_array().map(Vec::len), Some(1));
    assert_eq!(answer["proxies"][0]["upstream"], "127.0.0.1:2");
    assert_eq!(answer["proxies"][0]["toxics"], json!([]));
}

#[test]
fn populate_makes_a_disabled_proxy_anew_as_toxiproxy_does() {
    let daemon = Daemon::start();
    let port = nobody().port();
    let body = |enabled| json!([{"name": "a", "listen": format!("localhost:{port}"), "upstream": "b:1", "enabled": enabled}]);
    let populate = |enabled: bool| {
        daemon
            .call("POST", "/populate", &body(enabled).to_string())
            .1
    };
    let listen = format!("localhost:{port}");
    assert_eq!(populate(false)["proxies"][0]["listen"], *listen);
    let enabled = &populate(true)["proxies"][0];
    assert_eq!(
        (&enabled["enabled"], &enabled["listen"]),
        (&json!(true), &json!(format!("127.0.0.1:{port}")))
    );
}

#[test]
fn the_address_of_every_interface_is_ipv6s_too() {
    let daemon = Daemon::start();
    let upstream = echo_server();
    let port = nobody().port();
    for listen in [format!("0.0.0.0:{port}"), format!(":{port}")] {
        let body = json!([{"name": "p", "listen": listen, "upstream": upstream.to_string()}]);
        let (status, answer) = daemon.call("POST", "/populate", &body.to_string());
        assert_eq!(status, 201, "{answer}");
        assert_eq!(answer["proxies"][0]["listen"], format!("[::]:{port}"));
        daemon.call("POST", "/proxies/p/toxics", r#"{"type":"noop"}"#);
        assert!(echoes(([127, 0, 0, 1], port).into()));
        assert!(echoes((std::net::Ipv6Addr::LOCALHOST, port).into()));
    }
    let (_, answer) = daemon.call("GET", "/proxies/p/toxics", "");
    assert_eq!(answer[0]["name"], "noop_downstream", "it was kept");
    // Those of before end a moment after their clients.
    daemon.call("POST", "/v1/proxies/p/wait", r#"{"exactly":0}"#);
    let _client = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    daemon.call("POST", "/v1/proxies/p/wait", r#"{"exactly":1}"#);
    let (_, open) = daemon.call("GET", "/v1/proxies/p/connections", "");
    let client = open["connections"][0]["client"].as_str().expect("a text");
    assert!(client.starts_with("127.0.0.1:"), "{client}");
}

#[test]
fn several_slashes_are_one() {
    let daemon = Daemon::start();
    let body = r#"{"name":"p","listen":"127.0.0.1:","upstream":"a:1"}"#;
    assert_eq!(daemon.call("POST", "//proxies", body).0, 201);
    let (status, toxic) = daemon.call("POST", "///proxies//p/toxics?x=//", r#"{"type":"noop"}"#);
    assert_eq!((status, &toxic["type"]), (200, &json!("noop")));
    let url = format!("http://{}//proxies/p", daemon.api);
    assert_eq!(daemon.call("GET", &url, "").1["name"], "p");
    assert_eq!(daemon.raw("GET", "//proxies//", "", b"").0, 404);
}

#[test]
fn a_moved_proxy_drops_its_connections_and_keeps_its_toxics() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", echo_server());
    daemon.call("POST", "/proxies/p/toxics", r#"{"type":"noop"}"#);
    let mut client = TcpStream::connect(listen).expect("it listens");
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a timeout");
    daemon.call("POST", "/v1/proxies/p/wait", r#"{"open":1}"#);
    let (status, moved) = daemon.call(
        "PATCH",
        "/proxies/p",
        &format!(r#"{{"upstream":"{}"}}"#, echo_server()),
    );
    assert_eq!(status, 200);
    assert_eq!(moved["listen"], listen.to_string());
    assert_eq!(moved["toxics"].as_array().map(Vec::len), Some(1));
    assert_eq!(client.read(&mut [0]).expect("an orderly end"), 0);
    assert!(echoes(listen));
}

fn echoes(address: SocketAddr) -> bool {
    let mut client = TcpStream::connect(address).expect("it listens");
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a timeout");
    client.write_all(b"x").expect("write");
    let mut byte = [0];
    client.read_exact(&mut byte).is_ok() && byte == *b"x"
}

#[test]
fn extreme_attributes_do_no_harm() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", echo_server());
    let extremes = [i64::MIN, -1, 0, i64::MAX];
    for kind in [
        "latency",
        "bandwidth",
        "slow_close",
        "timeout",
        "reset_peer",
        "slicer",
        "limit_data",
        "lifetime",
        "coalesce",
    ] {
        for value in extremes {
            let names = [
                "latency",
                "jitter",
                "rate",
                "delay",
                "timeout",
                "average_size",
                "size_variation",
                "bytes",
                "time",
                "min_bytes",
                "max_wait",
            ];
            let names = names.into_iter().filter(|name| {
                !(kind == "lifetime" && *name == "timeout"
                    || kind == "coalesce" && *name == "bytes")
            });
            let attributes: Value = names
                .map(|name| (name.to_owned(), json!(value)))
                .collect::<serde_json::Map<_, _>>()
                .into();
            let body = json!({"type": kind, "name": "t", "attributes": attributes}).to_string();
            assert_eq!(
                daemon.call("POST", "/proxies/p/toxics", &body).0,
                200,
                "{body}"
            );
            let mut client = TcpStream::connect(listen).expect("it listens");
            client
                .set_read_timeout(Some(Duration::from_millis(20)))
                .expect("a timeout");
            let _whatever_the_toxic_makes_of_it =
                client.write_all(b"x").and_then(|()| client.read(&mut [0]));
            assert_eq!(daemon.call("DELETE", "/proxies/p/toxics/t", "").0, 204);
        }
    }
    assert!(echoes(listen));
}

#[test]
fn browsers_strangers_and_giants_are_refused() {
    let daemon = Daemon::start();
    let refused = daemon.answer("GET", "/version", "User-Agent: Mozilla/5.0\r\n", b"");
    assert!(
        refused
            .to_ascii_lowercase()
            .contains("x-toxiproxy-request-id: "),
        "{refused}"
    );
    assert_eq!(
        daemon
            .raw("GET", "/version", "User-Agent: Mozilla/5.0\r\n", b"")
            .0,
        403
    );
    assert_eq!(
        daemon.raw("GET", "/version", "Origin: http://a\r\n", b"").0,
        403
    );
    assert_eq!(
        daemon
            .raw("GET", "/version", "User-Agent: toxiproxy-cli/2\r\n", b"")
            .0,
        200
    );
    assert_eq!(
        daemon.raw("POST", "/populate", "", &vec![b' '; 3 << 20]).0,
        413
    );
    let open = Command::new(env!("CARGO_BIN_EXE_fault"))
        .args(["daemon", "--listen", "0.0.0.0:0"])
        .output()
        .expect("it runs");
    assert_eq!(open.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&open.stderr).contains("--token"));
    let guarded = Daemon::with(&["--token", "secret"]);
    assert_eq!(guarded.raw("GET", "/version", "", b"").0, 401);
    assert_eq!(
        guarded
            .raw("GET", "/version", "Authorization: Bearer secret\r\n", b"")
            .0,
        200
    );
    let refused = guarded.answer("GET", "/version", "", b"").to_lowercase();
    assert!(refused.contains("www-authenticate: basic"), "{refused}");
    let list = |url: &str| client(url, &["list"]);
    let (code, text) = list(&format!("http://any:secret@{}", guarded.api));
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = list("http://any:secret@127.0.0.1:1");
    assert!(code == Some(125) && !text.contains("secret"), "{text}");
}

#[test]
fn slow_clients_do_not_block_the_api() {
    let daemon = Daemon::start();
    let slow: Vec<TcpStream> = (0..600)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.api).expect("it listens");
            stream
                .write_all(b"POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n")
                .expect("write");
            stream
        })
        .collect();
    let start = Instant::now();
    assert_eq!(daemon.call("GET", "/version", "").0, 200);
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    drop(slow);
}

#[test]
fn a_bad_config_or_a_port_in_use_is_fatal_and_a_good_one_has_toxics() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    let run = |config: &str| {
        std::fs::write(&path, config).expect("write");
        let output = Command::new(env!("CARGO_BIN_EXE_fault"))
            .args(["daemon", "-port", "0", "-config"])
            .arg(&path)
            .output()
            .expect("it runs");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let taken = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = taken.local_addr().expect("bound");
    let (code, error) = run("[{]");
    assert_eq!(code, Some(125), "{error}");
    assert!(error.contains("bad request body"), "{error}");
    let (code, error) = run(&format!(
        r#"[{{"name":"p","listen":"{address}","upstream":"a:1"}}]"#
    ));
    assert_eq!(code, Some(125), "{error}");
    assert!(
        error.contains("address already in use") && error.lines().count() == 2,
        "{error}"
    );
    let good = r#"[{"name":"p","listen":"127.0.0.1:0","upstream":"a:1","toxics":[{"type":"latency","attributes":{"latency":7}}]}]"#;
    std::fs::write(&path, good).expect("write");
    let daemon = Daemon::with(&["--config", path.to_str().expect("UTF-8")]);
    assert_eq!(
        daemon
            .call("GET", "/proxies/p/toxics/latency_downstream", "")
            .1["attributes"]["latency"],
        7
    );
}

#[test]
fn a_mix_comes_from_the_config_and_changes_live() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    let upstream = echo_server();
    let mix = |share: &str| json!({"faults": [{"share": share, "type": "close_on_data"}]});
    let toxic = json!({"type": "mix", "name": "m", "attributes": mix("100%")});
    let config = json!([{"name": "p", "listen": "127.0.0.1:0", "upstream": upstream.to_string(), "toxics": [toxic]}]);
    std::fs::write(&path, config.to_string()).expect("write");
    let daemon = Daemon::with(&["--seed", "3", "--config", path.to_str().expect("UTF-8")]);
    let (_, proxy) = daemon.call("GET", "/proxies/p", "");
    let listen: SocketAddr = proxy["listen"]
        .as_str()
        .expect("a text")
        .parse()
        .expect("an address");
    assert!(!echoes(listen));
    let change = |share: &str| {
        let body = json!({"attributes": mix(share)}).to_string();
        daemon.call("PATCH", "/proxies/p/toxics/m", &body).0
    };
    assert_eq!(change("0%"), 200);
    assert!(echoes(listen));
    assert_eq!(change("30%"), 200);
    let spared = (0..100).filter(|_| echoes(listen)).count();
    assert!((50..90).contains(&spared), "{spared} of 100 spared at 30%");
    assert_eq!(change("130%"), 400);
}

#[test]
fn the_gate_counts_awaits_closes_and_stops() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", echo_server());
    let mut clients: Vec<TcpStream> = (0..3)
        .map(|_| TcpStream::connect(listen).expect("it listens"))
        .collect();
    let gate = |what: &str, body: &str| daemon.call("POST", &format!("/v1/proxies/p/{what}"), body);
    assert_eq!(
        gate("wait", r#"{"exactly":3}"#),
        (200, json!({"open": 3, "accepted": 3}))
    );
    assert_eq!(
        gate("close", r#"{"count":2,"mode":"rst"}"#),
        (200, json!({"closed": 2}))
    );
    assert_eq!(
        daemon.call("GET", "/v1/proxies/p/connections", "").1["open"],
        1
    );
    for client in &mut clients[..2] {
        assert_eq!(
            client.read(&mut [0]).map_err(|error| error.kind()),
            Err(std::io::ErrorKind::ConnectionReset)
        );
    }
    assert_eq!(
        gate("accept", r#"{"accept":false}"#),
        (200, json!({"accept": false}))
    );
    let waiting = TcpStream::connect(listen).expect("the kernel completes the handshake");
    assert_eq!(gate("wait", r#"{"accepted":4,"timeout":50}"#).0, 408);
    assert_eq!(gate("accept", r#"{"accept":true}"#).0, 200);
    assert_eq!(gate("wait", r#"{"accepted":4}"#).0, 200);
    assert_eq!(gate("close", ""), (200, json!({"closed": 2})));
    assert_eq!(gate("close", r#"{"mode":"softly"}"#).0, 400);
    assert_eq!(gate("wait", "{}").0, 400);
    drop(waiting);
}

#[test]
fn metrics_have_toxiproxys_names_and_count_while_connections_are_open() {
    let daemon = Daemon::start();
    let upstream = echo_server();
    let listen = daemon.proxy("p", upstream);
    daemon.call("POST", "/proxies/p/toxics", r#"{"type":"latency"}"#);
    let mut client = TcpStream::connect(listen).expect("it listens");
    client.write_all(b"12345").expect("write");
    client.read_exact(&mut [0; 5]).expect("the echo");
    let labels = format!("listener=\"{listen}\",proxy=\"p\",upstream=\"{upstream}\"");
    let lines = [
        format!("toxiproxy_proxy_received_bytes_total{{direction=\"upstream\",{labels}}} 5"),
        format!("toxiproxy_proxy_sent_bytes_total{{direction=\"downstream\",{labels}}} 5"),
        format!(
            "fault_toxic_hits_total{{direction=\"downstream\",{labels},toxic=\"latency_downstream\",type=\"latency\"}} 1"
        ),
        format!("fault_proxy_connections_open{{{labels}}} 1"),
    ];
    // A byte can be with the client a moment before the relay has counted it.
    let start = Instant::now();
    loop {
        let (_, text) = daemon.raw("GET", "/metrics", "", b"");
        let missing = lines
            .iter()
            .find(|line| !text.lines().any(|found| found == line.as_str()));
        let Some(missing) = missing else {
            break;
        };
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "no {missing} in\n{text}"
        );
    }
}

#[test]
fn the_command_line_drives_the_daemon_over_tcp_and_a_socket_that_only_we_may_open() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("fault.sock");
    let daemon = Daemon::with(&["--socket", socket.to_str().expect("UTF-8")]);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&socket)
            .expect("it is there")
            .permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    for url in [
        format!("http://{}", daemon.api),
        format!("unix:{}", socket.display()),
    ] {
        let run = |words: &[&str]| client(&url, words);
        assert_eq!(
            run(&["add", "proxy", "a b", "127.0.0.1:0", "127.0.0.1:1"]).0,
            Some(0)
        );
        let again = [
            "add",
            "toxic",
            "a b",
            "latency",
            "latency=5",
            "--stream",
            "upstream",
        ];
        let first = [&again[..], &["--sni", "*.example.com"]].concat();
        assert_eq!(run(&first).0, Some(0));
        let (_, list) = run(&["list"]);
        assert!(
            list.contains("a b  127.0.0.1:")
                && list
                    .contains("latency_upstream  upstream latency toxicity=1 sni=*.example.com {"),
            "{list}"
        );
        let (code, error) = run(&again);
        assert!(
            code == Some(125)
                && error.contains("a b has latency_upstream\nhelp: ")
                && error.contains("--name"),
            "{error}"
        );
        assert!(run(&["stats", "--json"]).1.contains("\"accepted\": 0"));
        assert_eq!(
            run(&["remove", "toxic", "a b", "latency_upstream"]).0,
            Some(0)
        );
        assert_eq!(run(&["reset"]).0, Some(0));
        assert_eq!(run(&["remove", "proxy", "a b"]).0, Some(0));
        let (code, error) = run(&["remove", "proxy", "a b"]);
        assert_eq!(
            (code, error.as_str()),
            (
                Some(125),
                "fault: error: the daemon rejected the request: proxy not found\nhelp: `fault list` shows what there is\n"
            )
        );
        assert_eq!(run(&["add", "proxy"]).0, Some(2));
        let (code, error) = run(&["add", "proxy", "r3", "26380", "6379"]);
        assert!(
            code == Some(2) && error.contains("127.0.0.1:26380"),
            "{error}"
        );
    }
}

#[test]
fn events_are_sent_as_they_happen() {
    let daemon = Daemon::start();
    let mut events = daemon.events();
    daemon.proxy("p", nobody());
    events.until("\"event\":\"proxy created\"");
}

#[test]
fn two_hundred_proxies_and_hundreds_of_changes() {
    let daemon = Daemon::start();
    let upstream = echo_server();
    let all: Vec<Value> = (0..200).map(|index| json!({"name": format!("p{index}"), "listen": "127.0.0.1:0", "upstream": upstream.to_string()})).collect();
    let (status, answer) = daemon.call("POST", "/populate", &Value::Array(all).to_string());
    assert_eq!(status, 201);
    for proxy in answer["proxies"].as_array().expect("an array") {
        assert!(echoes(
            proxy["listen"]
                .as_str()
                .expect("a text")
                .parse()
                .expect("an address")
        ));
    }
    for _ in 0..250 {
        assert_eq!(
            daemon
                .call("POST", "/proxies/p7/toxics", r#"{"type":"latency"}"#)
                .0,
            200
        );
        assert_eq!(
            daemon
                .call("DELETE", "/proxies/p7/toxics/latency_downstream", "")
                .0,
            204
        );
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let names = "name|listen|upstream|enabled|type|stream|toxicity|attributes|toxics|latency|bytes|faults|share|regex|mode|[a-z]{1,3}";
    let texts = "upstream|downstream|latency|mix|substitute|corrupt_data|error|udp:x|127.0.0.1:0|\\(\\[|[ -~]{0,6}";
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        texts.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names, inner, 0..6)
                .prop_map(|map| map.into_iter().collect::<Value>()),
        ]
    })
}

#[test]
fn no_body_makes_it_panic_or_hang() {
    let daemon = Daemon::start();
    daemon.proxy("p", nobody());
    let paths = [
        "/proxies",
        "/populate",
        "/proxies/p",
        "/proxies/p/toxics",
        "/proxies/p/toxics/t",
        "/v1/proxies/p/wait",
        "/v1/proxies/p/close",
    ];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let body = prop_oneof![
        any_json().prop_map(|value| value.to_string().into_bytes()),
        prop::collection::vec(any::<u8>(), 0..64),
    ];
    let outcome = runner.run(&(0..paths.len(), body), |(path, body)| {
        // A wait may be meant to be long.
        if paths[path].ends_with("wait") && String::from_utf8_lossy(&body).contains("timeout") {
            return Ok(());
        }
        let (status, _) = daemon.raw("POST", paths[path], "", &body);
        prop_assert!((200..=500).contains(&status), "{status}");
        Ok(())
    });
    outcome.expect("every body is answered");
    assert_eq!(daemon.call("GET", "/version", "").0, 200);
}

/// The answer to this request.
fn answer_to(daemon: &Daemon, head: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(daemon.api).expect("the API listens");
    let length = body.len();
    let request = format!("{head}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn by_its_name_it_is_toxiproxys_server_and_open() {
    let daemon = Daemon::toxiproxy_server(&[
        "-host=0.0.0.0",
        "-port",
        "0",
        "-seed",
        "-7",
        "-runtime-metrics",
    ]);
    assert!(daemon.api.ip().is_unspecified());
    let with_name = answer_to(&daemon, "GET /version HTTP/1.1\r\nHost: toxiproxy:8474", "");
    assert!(with_name.starts_with("HTTP/1.1 200"), "{with_name}");
    let (status, metrics) = daemon.raw("GET", "/metrics", "", b"");
    assert!(
        status == 200 && metrics.contains("\nprocess_open_fds "),
        "{metrics}"
    );
    let server = echo_server().to_string();
    let refused = [
        ("/v1/rules", json!("tcp:7600 loss=1%")),
        (
            "/proxies",
            json!({"name": "t", "listen": server, "upstream": server}),
        ),
        (
            "/populate",
            json!([{"name": "t", "listen": server, "upstream": server}]),
        ),
    ];
    for (path, body) in refused {
        let (status, answer) = daemon.call("POST", path, &body.to_string());
        assert_eq!(status, 403, "{answer}");
        let why = answer["error"].as_str().expect("a text");
        assert!(why.contains("unavailable in open mode"), "{why}");
    }
    let browser = daemon.raw("GET", "/version", "Origin: http://evil.example\r\n", b"");
    assert_eq!(browser.0, 403);
}

#[test]
fn an_api_beyond_loopback_is_secured_or_said_to_be_open() {
    let run = |words: &[&str], open: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fault"));
        let command = command.arg("daemon").args(words).env("FAULT_OPEN", open);
        let output = command.env_remove("FAULT_TOKEN").output().expect("it runs");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, error) = run(&["--listen", "0.0.0.0:0"], "0");
    assert!(code == Some(125) && error.contains("--open"), "{error}");
    // It does start, and ends for want of the config.
    let (code, error) = run(&["--listen", "0.0.0.0:0", "--config", "/none"], "1");
    assert!(
        code == Some(125) && error.contains("can't read the config"),
        "{error}"
    );
    assert_eq!(run(&["--open", "--token", "x"], "").0, Some(2));
}

#[test]
fn the_command_line_knows_attributes_and_units() {
    let daemon = Daemon::start();
    daemon.proxy("p", echo_server());
    let add = |words: &[&str]| daemon.client(&[&["add", "toxic", "p"], words].concat());
    let (code, shown) = add(&["latency", "latency=1.5s", "JITTER=20"]);
    assert_eq!(code, Some(0), "{shown}");
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["attributes"], json!({"latency": 1500, "jitter": 20}));
    let (code, shown) = add(&["slicer", "delay=2ms"]);
    assert!(
        code == Some(0) && shown.contains("\"delay\": 2000"),
        "{shown}"
    );
    for (words, why) in [
        (
            &["latency", "latencyy=5"][..],
            "has no attribute `latencyy`, did you mean `latency`?: it has latency, jitter",
        ),
        (&["latency", "latency=5us"], "expected whole milliseconds"),
        (
            &["bandwith"],
            "unknown toxic type `bandwith`, did you mean `bandwidth`?",
        ),
        (&["noop", "x=1"], "noop has no attribute `x`: it has none"),
    ] {
        let (code, said) = add(words);
        assert!(code == Some(125) && said.contains(why), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let (_, said) = daemon.client(&["add", "toxic", "q", "noop"]);
    assert!(
        said.ends_with("proxy not found; the daemon's proxies: p\n"),
        "{said}"
    );
    // Over the API they are ignored, as by Toxiproxy.
    let body = r#"{"type":"noop","name":"n","attributes":{"colour":"red"}}"#;
    assert_eq!(daemon.call("POST", "/proxies/p/toxics", body).0, 200);
}

#[test]
fn what_is_listed_can_be_sent_back() {
    let daemon = Daemon::start();
    daemon.proxy("p", echo_server());
    daemon.call(
        "POST",
        "/proxies/p/toxics",
        r#"{"type":"packet_loss","attributes":{"loss_rate":0.5}}"#,
    );
    let filtered = r#"{"type":"latency","sni":"*.example.com","host":"a.example","alpn":"h2"}"#;
    let (status, filtered) = daemon.call("POST", "/proxies/p/toxics", filtered);
    assert_eq!(
        (
            status,
            &filtered["sni"],
            &filtered["host"],
            &filtered["alpn"]
        ),
        (
            200,
            &json!("*.example.com"),
            &json!("a.example"),
            &json!("h2")
        )
    );
    let (_, proxies) = daemon.call("GET", "/proxies", "");
    let toxic = &proxies["p"]["toxics"][0];
    assert_eq!(
        toxic["attributes"],
        json!({"loss_rate": 0.5, "correlation": 0.0})
    );
    let another = Daemon::start();
    let (status, answer) = another.call("POST", "/populate", &proxies.to_string());
    assert_eq!(status, 500, "its port is the first daemon's: {answer}");
    assert_eq!(daemon.call("DELETE", "/proxies/p", "").0, 204);
    let (status, answer) = another.call("POST", "/populate", &proxies.to_string());
    assert_eq!(status, 201, "{answer}");
    assert_eq!(another.call("GET", "/proxies", "").1, proxies);
    let toxic = &proxies["p"]["toxics"][0];
    assert_eq!(
        another
            .call("DELETE", "/proxies/p/toxics/packet_loss_downstream", "")
            .0,
        204
    );
    let (status, sent) = another.call("POST", "/proxies/p/toxics", &toxic.to_string());
    assert_eq!((status, &sent), (200, toxic));
}

#[test]
fn packet_loss_drops_chunks_as_toxiproxys_does() {
    let daemon = Daemon::start();
    let listen = daemon.proxy("p", echo_server());
    let lost = |attributes: &str| {
        let body =
            format!(r#"{{"type":"packet_loss","stream":"upstream","attributes":{attributes}}}"#);
        assert_eq!(daemon.call("POST", "/proxies/p/toxics", &body).0, 200);
        let mut client = TcpStream::connect(listen).expect("it listens");
        client.write_all(b"lost or not").expect("write");
        client.shutdown(std::net::Shutdown::Write).expect("an end");
        let mut echo = Vec::new();
        client
            .read_to_end(&mut echo)
            .expect("the end comes all the same");
        assert_eq!(
            daemon
                .call("DELETE", "/proxies/p/toxics/packet_loss_upstream", "")
                .0,
            204
        );
        echo.is_empty()
    };
    assert!(lost(r#"{"loss_rate":1}"#));
    assert!(lost(r#"{"loss_rate":7.5,"correlation":-3}"#));
    assert!(!lost(r#"{"loss_rate":-1,"correlation":1}"#));
    assert!(!lost("{}"));
}
