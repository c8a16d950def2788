//! Packet rules by the daemon's API: `/v1/rules`, their events, and `/v1/doctor`.

use std::io::{ErrorKind, Read as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::echo::{echo_server, tcp_echo};
use crate::support::place::{PATIENCE, Peer, enter_fresh, fault, wait_for};
use fault_user::sys::process::netns::NetworkNamespace;
use serde_json::{Value, json};

/// What a connect to this address brings.
fn dial(address: SocketAddr) -> Result<(), ErrorKind> {
    let talk = || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        // To its end, so that none of its packets meets a rule that comes later.
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new())
    };
    talk()
        .map(drop)
        .map_err(|error: std::io::Error| error.kind())
}

fn add(daemon: &Daemon, rule: &Value) -> Value {
    let (status, answer) = daemon.call("POST", "/v1/rules", &rule.to_string());
    assert_eq!(status, 201, "{answer}");
    answer
}

/// The rule's line in the list.
fn listed(daemon: &Daemon, id: &Value) -> Value {
    let (status, rules) = daemon.call("GET", "/v1/rules", "");
    assert_eq!(status, 200, "{rules}");
    let rules = rules.as_array().expect("an array");
    let found = rules.iter().find(|rule| rule["id"] == *id);
    found
        .unwrap_or_else(|| panic!("no {id} in {rules:?}"))
        .clone()
}

#[test]
fn rules_come_and_go_while_traffic_flows() {
    enter_fresh();
    let (one, two) = (echo_server(), echo_server());
    let daemon = Daemon::start();
    assert_eq!(daemon.call("GET", "/v1/rules", ""), (200, json!([])));
    let refusing = add(&daemon, &json!(format!("tcp:{} reject", one.port())));
    assert_eq!(dial(one), Err(ErrorKind::ConnectionRefused));
    assert_eq!(dial(two), Ok(()));
    let object = json!({"target": {"protocol": "tcp", "port": two.port()}, "fault": "reject"});
    let another = add(&daemon, &json!([object]));
    assert_eq!(dial(two), Err(ErrorKind::ConnectionRefused));
    assert_eq!(
        another[0]["rule"],
        format!("tcp:{} reject", two.port()),
        "an array is answered by an array"
    );
    let first = listed(&daemon, &refusing["id"]);
    assert_eq!(
        first["hits"], 1,
        "what it did before is not forgotten: {first}"
    );
    let (_, metrics) = daemon.raw("GET", "/metrics", "", b"");
    let line = format!(
        "fault_rule_hit_packets_total{{id=\"1\",rule=\"tcp:{} reject\"}} 1\n",
        one.port()
    );
    assert!(metrics.contains(&line), "no {line} in {metrics}");
    let path = format!("/v1/rules/{}", refusing["id"]);
    assert_eq!(daemon.call("GET", &path, "").1["id"], refusing["id"]);
    assert_eq!(daemon.call("DELETE", &path, "").0, 204);
    assert_eq!(daemon.call("DELETE", &path, "").0, 404);
    assert_eq!(
        (dial(one), dial(two)),
        (Ok(()), Err(ErrorKind::ConnectionRefused))
    );
    let again = add(&daemon, &json!(format!("tcp:{} reject", one.port())));
    let again = listed(&daemon, &again["id"]);
    assert_eq!(again["hits"], 0, "it is another rule: {again}");
    assert_eq!(daemon.call("POST", "/reset", "").0, 204);
    assert_eq!((dial(one), dial(two)), (Ok(()), Ok(())));
    assert_eq!(daemon.call("GET", "/v1/rules", "").1, json!([]));
    add(&daemon, &json!(format!("tcp:{} reject", one.port())));
    assert_eq!(dial(one), Err(ErrorKind::ConnectionRefused));
    // Dropping it kills it.
    drop(daemon);
    assert!(is_restored(one));
}

/// Whether connections succeed within the lease of a killed instance.
fn is_restored(address: SocketAddr) -> bool {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if dial(address).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// A rule that holds packets needs programs that others do not: they are loaded anew, and nothing is forgotten.
#[test]
fn a_delay_joins_rules_that_are_in_force() {
    enter_fresh();
    if !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: no /dev/net/tun");
        return;
    }
    let (one, two) = (echo_server(), echo_server());
    let daemon = Daemon::start();
    let refusing = add(&daemon, &json!(format!("tcp:{} reject", one.port())));
    assert!(dial(one).is_err());
    let start = Instant::now();
    dial(two).expect("nothing is in the way");
    assert!(start.elapsed() < Duration::from_millis(200));
    let late = add(
        &daemon,
        &json!(format!("tcp:{} delay=200ms dir=to-client", two.port())),
    );
    let start = Instant::now();
    dial(two).expect("late, but it comes");
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert!(dial(one).is_err());
    assert_eq!(listed(&daemon, &refusing["id"])["hits"], 2);
    assert!(
        late["mechanism"]
            .as_str()
            .is_some_and(|by| by.contains("delay-line")),
        "{late}"
    );
    assert_eq!(daemon.call("DELETE", "/v1/rules", "").0, 204);
    assert_eq!((dial(one), dial(two)), (Ok(()), Ok(())));
}

#[test]
fn rules_go_on_to_an_interface_that_appears() {
    enter_fresh();
    let daemon = Daemon::start();
    add(&daemon, &json!("tcp:7000 reject"));
    let peer = Peer::joined();
    let there = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let address: SocketAddr = "10.77.0.2:7000".parse().unwrap();
    tcp_echo(there.enter(|| Ok(TcpListener::bind(address)?)).unwrap());
    wait_for(
        || dial(address) == Err(ErrorKind::ConnectionRefused),
        "the rule to act on the new device",
    );
    assert_eq!(daemon.call("DELETE", "/v1/rules", "").0, 204);
    assert_eq!(dial(address), Ok(()));
}

/// Super-packets are divided by a device, which is there from the first rule on that may need it.
#[test]
fn what_divides_comes_with_a_rule_that_divides() {
    enter_fresh();
    let daemon = Daemon::start();
    let has_device = || {
        let links = fault_user::sys::net::interfaces::list().unwrap();
        links.iter().any(|link| link.name.starts_with("fault-"))
    };
    let echo = echo_server();
    add(&daemon, &json!(format!("tcp:{} reject", echo.port())));
    assert!(!has_device(), "it loses every packet");
    add(&daemon, &json!("tcp:1 drop every=3"));
    assert!(has_device());
    assert_eq!(
        dial(echo),
        Err(ErrorKind::ConnectionRefused),
        "the first rule stays"
    );
    assert_eq!(daemon.call("DELETE", "/v1/rules", "").0, 204);
    wait_for(|| !has_device(), "the device to be removed");
}

#[test]
fn a_mistake_changes_nothing_and_is_pointed_at() {
    enter_fresh();
    let one = echo_server();
    let daemon = Daemon::start();
    let kept = format!("tcp:{} reject", one.port());
    add(&daemon, &json!(kept));
    let bad = [
        (
            json!("tcp:1 loos=3%"),
            400,
            "unknown fault `loos`\n  tcp:1 loos=3%\n        ^^^^\nhelp: ",
        ),
        (
            json!({"target": "tcp:1", "fault": "loss=x"}),
            400,
            "fault: `x` is not a number\n  loss=x\n       ^\nhelp: ",
        ),
        (json!(["tcp:1 drop", "tcp:2"]), 400, "fault"),
        (json!({"target": "tcp:1"}), 400, "missing field `fault`"),
        (json!("tcp:1 latency=3ms"), 400, "is a stream fault"),
        (json!("tcp:22 drop"), 400, "SSH"),
        (json!(7), 400, "expected a rule"),
        (json!({"rules": ["tcp:1 drop"]}), 400, "the list itself"),
    ];
    let (status, answer) = daemon.call("POST", "/v1/rules", "tcp:1 drop");
    assert_eq!(status, 400, "{answer}");
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(error.contains("in quotes: \"tcp:1 drop\""), "{error}");
    for (body, status, why) in bad {
        let (got, answer) = daemon.call("POST", "/v1/rules", &body.to_string());
        let error = answer["error"].as_str().unwrap_or_default();
        assert_eq!(got, status, "{body}: {answer}");
        assert!(error.contains(why), "{body}: {error}");
    }
    let (_, rules) = daemon.call("GET", "/v1/rules", "");
    assert_eq!(rules.as_array().map(Vec::len), Some(1), "{rules}");
    assert!(dial(one).is_err());
    let (status, forced) = daemon.call("POST", "/v1/rules?force=true", "\"tcp:22 drop\"");
    assert_eq!(status, 201, "{forced}");
    let browser = daemon.raw(
        "POST",
        "/v1/rules",
        "Origin: http://a\r\n",
        b"\"tcp:1 drop\"",
    );
    assert_eq!(browser.0, 403);
}

#[test]
fn without_rights_it_says_so() {
    enter_fresh();
    let daemon = Daemon::unprivileged();
    let (status, answer) = daemon.call("POST", "/v1/rules", "\"tcp:1 drop\"");
    assert_eq!(status, 403, "{answer}");
    let error = answer["error"].as_str().expect("a text");
    assert!(error.starts_with("packet rules need root: "), "{error}");
    let proxy = r#"{"name":"a","listen":"127.0.0.1:7000","upstream":"127.0.0.1:7000"}"#;
    let (status, answer) = daemon.call("POST", "/proxies", proxy);
    assert_eq!(status, 400, "{answer}");
    let error = answer["error"].as_str().expect("a text");
    assert!(
        error.contains("transparent") && error.contains("CAP_BPF"),
        "{error}"
    );
    assert!(!error.contains("EVENTS"), "it is asked before: {error}");
}

#[test]
fn hits_are_events() {
    enter_fresh();
    let daemon = Daemon::start();
    let server = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    let address = server.local_addr().expect("bound");
    let mut events = daemon.events();
    add(
        &daemon,
        &json!(format!("udp:{} drop first=1", address.port())),
    );
    events.until("\"event\":\"rule added\"");
    let client = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    client.send_to(b"lost", address).expect("it is sent");
    events.until("\"event\":\"rule hit\"");
    events.until("\"total\":1");
    daemon.call("DELETE", "/v1/rules", "");
    events.until("\"event\":\"rule removed\"");
}

#[test]
fn the_doctor_is_asked_by_the_api() {
    let daemon = Daemon::start();
    let (status, report) = daemon.call("GET", "/v1/doctor", "");
    assert_eq!(status, 200, "{report}");
    assert!(
        report["kernel"].is_string() && report["mechanisms"].is_array(),
        "{report}"
    );
    assert!(
        report["verdict"]["text"].is_string() && report["verdict"]["level"].is_string(),
        "{report}"
    );
}

#[test]
fn the_doctor_begins_with_its_verdict() {
    let doctor = |words: &[&str]| {
        let output = fault().arg("doctor").args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let text = doctor(&[]);
    let first = text.lines().next().unwrap();
    assert!(first.starts_with("fault works here"), "{text}");
    let json = doctor(&["--json"]);
    let (verdict, kernel) = (json.find("\"verdict\""), json.find("\"kernel\""));
    assert!(verdict < kernel, "first in JSON too: {json}");
    assert!(json.contains(first), "the same line: {json}");
}

#[test]
fn the_command_line_knows_rules() {
    enter_fresh();
    let one = echo_server();
    let daemon = Daemon::start();
    let run = |words: &[&str]| daemon.client(words);
    let rule = format!("tcp:{} reject", one.port());
    let (code, added) = run(&["add", "rule", &rule]);
    assert_eq!(code, Some(0), "{added}");
    assert!(dial(one).is_err());
    let (_, list) = run(&["list"]);
    assert!(
        list.contains(&format!("rule 1  {rule}  hits=1 of 1 packets")),
        "{list}"
    );
    assert_eq!(run(&["remove", "rule", "1"]).0, Some(0));
    assert_eq!(dial(one), Ok(()));
    let (code, refused) = run(&["add", "rule", "tcp:22 drop"]);
    assert_eq!(code, Some(125));
    assert!(refused.contains("SSH"), "{refused}");
    assert_eq!(run(&["add", "rule", "tcp:22 drop", "--force"]).0, Some(0));
    assert_eq!(run(&["reset"]).0, Some(0));
    assert!(run(&["list"]).1.is_empty());
}

/// What a process of another user gets from the daemon: its sockets are those of a thread with that user's file rights.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::unistd::setfsuid(65_534.into());
            work()
        });
        thread.join().expect("no panic")
    })
}

#[test]
fn other_users_of_the_host_have_plain_proxies_and_no_more() {
    enter_fresh();
    let echo = echo_server();
    let daemon = Daemon::start();
    let transparent =
        json!({"name": "t", "listen": echo.to_string(), "upstream": echo.to_string()});
    let loopback =
        json!({"name": "loop", "listen": "127.0.0.1:0", "upstream": daemon.api.to_string()});
    let privileged = json!({"name": "w", "listen": "127.0.0.1:80", "upstream": echo.to_string()});
    let rule = json!(format!("tcp:{} loss=100%", echo.port()));
    let toxic = json!({"type": "timeout"});
    let post = |path: &str, body: &Value| daemon.call("POST", path, &body.to_string());

    let (status, plain) = as_nobody(|| post("/proxies", &loopback));
    assert_eq!(status, 201, "{plain}");
    let forbidden = |method: &str, path: &str, body: &Value| {
        let (status, answer) = as_nobody(|| daemon.call(method, path, &body.to_string()));
        assert_eq!(status, 403, "{method} {path}: {answer}");
        let why = answer["error"].as_str().expect("a text");
        assert!(why.contains("only for root"), "{why}");
    };
    forbidden("POST", "/v1/rules?force=true", &rule);
    forbidden("POST", "/proxies", &transparent);
    forbidden("POST", "/proxies", &privileged);
    forbidden("POST", "/populate", &json!([transparent]));
    forbidden("PATCH", "/proxies/loop", &json!({"listen": "127.0.0.1:80"}));

    // Root may, but not by a proxy that would lend it the daemon's rights.
    let by_proxy = Daemon {
        child: std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("a child"),
        api: plain["listen"]
            .as_str()
            .expect("a text")
            .parse()
            .expect("an address"),
        said: Arc::default(),
    };
    let (status, answer) = by_proxy.call("POST", "/v1/rules", &rule.to_string());
    assert_eq!(status, 403, "{answer}");
    for (path, body) in [
        ("/proxies", &transparent),
        ("/proxies", &privileged),
        ("/v1/rules", &rule),
    ] {
        let (status, answer) = post(path, body);
        assert_eq!(status, 201, "{answer}");
    }

    forbidden("DELETE", "/v1/rules", &Value::Null);
    forbidden("DELETE", "/v1/rules/1", &Value::Null);
    forbidden("POST", "/reset", &Value::Null);
    for proxy in ["t", "w"] {
        forbidden("POST", &format!("/proxies/{proxy}/toxics"), &toxic);
        forbidden(
            "PATCH",
            &format!("/proxies/{proxy}"),
            &json!({"enabled": false}),
        );
        forbidden("DELETE", &format!("/proxies/{proxy}"), &Value::Null);
        forbidden("POST", &format!("/v1/proxies/{proxy}/close"), &Value::Null);
        forbidden(
            "POST",
            &format!("/v1/proxies/{proxy}/accept"),
            &json!({"accept": false}),
        );
    }
    let (status, answer) = as_nobody(|| post("/proxies/loop/toxics", &toxic));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(as_nobody(|| daemon.call("GET", "/v1/rules", "")).0, 200);
}

#[test]
fn rules_do_not_cut_the_api_wherever_it_listens() {
    enter_fresh();
    let daemon = Daemon::start();
    let port = daemon.api.port();
    let add = |rule: String| daemon.call("POST", "/v1/rules", &json!(rule).to_string());
    for rule in [
        format!("tcp:{port} drop"),
        format!("tcp:{}-{port} delay=3s", port - 1),
        "127.0.0.1 drop".to_owned(),
        "* drop".to_owned(),
    ] {
        let (status, answer) = add(rule);
        let why = answer["error"].as_str().expect("a text");
        let named = format!("port {port} (fault's own control API)");
        assert!(status == 400 && why.contains(&named), "{answer}");
    }
    // The error shows what to write instead, which is accepted, also in the form in which it is listed.
    let (_, answer) = add("127.0.0.1 drop".to_owned());
    let why = answer["error"].as_str().expect("a text");
    let instead = why
        .split("write `")
        .nth(1)
        .and_then(|rest| rest.split('`').next());
    assert_eq!(instead, Some(&*format!("127.0.0.1:!22,{port}")), "{why}");
    let (status, added) = add(format!("{} loss=0.1%", instead.expect("just seen")));
    assert_eq!(status, 201, "{added}");
    assert_eq!(
        daemon
            .call("DELETE", &format!("/v1/rules/{}", added["id"]), "")
            .0,
        204
    );
    assert_eq!(daemon.call("POST", "/v1/rules", &added.to_string()).0, 201);
    // Nobody listens there.
    let (status, answer) = add("tcp:8474 drop".to_owned());
    assert_eq!(status, 201, "{answer}");
}
