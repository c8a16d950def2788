//! `fault top` on a terminal, on instances and a daemon that run.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::dns::{RCODE, ask_over_tcp, serve_streams};
use crate::support::echo::echo_server;
use crate::support::late;
use crate::support::place::{
    AppliedRules, PATIENCE, Peer, can_redirect_the_host, enter_fresh, fault, has_bash, wait_for,
};
use crate::support::servers::{Redis, Server};
use crate::support::terminal::Terminal;
use crate::support::watched::{Watched, switch};
use fault_user::sys::process::netns::NetworkNamespace;

/// `fault top` on a terminal of its own.
struct Top(Terminal);

impl Top {
    fn start(options: &[&str]) -> Self {
        Self::refreshed("100ms", options)
    }

    /// With this time between two refreshes.
    fn refreshed(every: &str, options: &[&str]) -> Self {
        let mut top = fault();
        top.args(["top", "--every", every]).args(options);
        Self(Terminal::start(&mut top, 110))
    }

    fn shows(&self, what: &str) {
        wait_for(|| self.0.shown().contains(what), what);
    }

    fn press(&mut self, keys: &str) {
        self.0.types(keys);
    }

    /// Presses q; how it ended.
    fn quit(mut self) -> ExitStatus {
        self.press("q");
        let status = self.0.wait();
        self.shows("\x1b[?1049l");
        status
    }
}

fn answers(port: u16) -> bool {
    Redis::hasty("127.0.0.1", port).is_ok_and(|mut redis| redis.ping().is_ok())
}

#[test]
fn rules_are_shown_and_switched() {
    enter_fresh();
    let one = Server::redis(6379, None);
    let two = Server::redis(6380, None);
    let applied = AppliedRules::begin(&["tcp:6379 reject", "tcp:6380 stall"], "--scope host");
    assert!(!answers(one.port) && !answers(two.port));
    let mut top = Top::start(&[]);
    top.shows("fault run -- sh -c");
    top.shows("tcp:6379 reject");
    // Blanks that were there before are not written again.
    top.shows("relay");

    top.press(" ");
    wait_for(|| answers(one.port), "the first rule to be off");
    assert!(!answers(two.port), "the second one is on");
    top.shows("OFF");
    top.press(" ");
    wait_for(|| !answers(one.port), "the first rule to be on again");

    top.press("j ");
    wait_for(|| answers(two.port), "the second rule to be off");
    top.press(" ");
    wait_for(|| !answers(two.port), "the second rule to be on again");
    assert!(top.quit().success());
    assert!(!answers(one.port), "top only looks on");
    let summary = applied.end();
    assert!(!summary.contains("never fired"), "{summary}");
    assert!(answers(one.port) && answers(two.port));
}

#[test]
fn a_connection_made_while_all_rules_are_off_is_the_commands_when_they_are_on() {
    if !has_bash() {
        return;
    }
    enter_fresh();
    let peer = Peer::joined();
    let namespace = NetworkNamespace::open(Path::new(&peer.name)).unwrap();
    let server = late::echo(Some(&namespace), "10.77.0.2");
    // Only what arrives is matched: its receiver must be known as the command's.
    let rule = format!("tcp:{} loss=0% dir=to-client", server.port());
    let script = format!(
        "echo ready; read go; exec 3<>/dev/tcp/10.77.0.2/{}; echo connected; \
         read go; echo x >&3; read -u 3 answer; echo answered; read go",
        server.port()
    );
    let mut child = fault()
        .args(["run", "-r", &rule, "--", "bash", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut says = |expected: &str| assert_eq!(output.next().unwrap().unwrap(), expected);
    says("ready");
    switch(child.id(), false);
    writeln!(input).unwrap();
    says("connected");
    switch(child.id(), true);
    writeln!(input).unwrap();
    says("answered");
    let shown = switch(child.id(), true);
    drop(input);
    child.wait().unwrap();
    assert!(shown["rules"][0]["seen"].as_u64() > Some(0), "{shown}");
}

#[test]
fn answers_to_queries_over_tcp_are_switched_with_their_rule() {
    if !can_redirect_the_host() {
        return;
    }
    enter_fresh();
    let server = "127.0.0.1:53".parse().unwrap();
    serve_streams(server);
    let name = "127-0-0-2.example";
    let applied = AppliedRules::begin(&["dns:*.example nxdomain"], "--scope host");
    for (on, expected) in [
        (true, RCODE::NameError),
        (false, RCODE::NoError),
        (true, RCODE::NameError),
    ] {
        switch(applied.pid(), on);
        assert_eq!(ask_over_tcp(server, &[name])[name].0, expected, "{on}");
    }
    applied.end();
}

#[test]
fn a_service_that_is_turned_down_resets_idle_connections() {
    enter_fresh();
    let server = late::echo(None, "127.0.0.1");
    let inject = Watched::inject(&["-r", "tcp:7000 down"]);
    let pid = inject.child.id();
    switch(pid, false);
    let mut idle = TcpStream::connect(server).unwrap();
    late::exchange(&mut idle);
    switch(pid, true);
    idle.set_read_timeout(Some(PATIENCE)).unwrap();
    let error = idle.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    assert_eq!(inject.end().0, Some(0));
}

#[test]
fn an_injection_is_shown_as_json() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let inject = Watched::inject(&["-r", "tcp:6379 duplicate=100%", "--seed", "7"]);
    let look = || {
        let output = fault().args(["top", "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or(serde_json::Value::Null)
    };
    wait_for(|| look() != serde_json::Value::Null, "the injection");
    assert!(answers(server.port));
    let open = [(), ()].map(|()| Redis::connect("127.0.0.1", server.port).unwrap());
    wait_for(
        || look()[0]["targets"][0]["open"] == 2,
        "two open connections",
    );
    let shown = look();
    drop(open);
    wait_for(|| look()[0]["targets"][0]["open"] == 0, "none to be open");
    assert_eq!(inject.end().0, Some(0));
    assert_eq!(shown[0]["title"], "fault inject");
    assert_eq!(shown[0]["seed"], 7);
    let rule = &shown[0]["rules"][0];
    assert_eq!(rule["rule"], "tcp:6379 duplicate=100%");
    assert_eq!(rule["on"], true);
    assert!(rule["hits"].as_u64() > Some(3), "{shown}");
    let target = &shown[0]["targets"][0];
    assert_eq!(target["target"], "tcp:6379");
    assert!(target["bytes"].as_u64() > Some(100), "{shown}");
}

#[test]
fn a_daemons_toxics_are_shown_and_switched() {
    enter_fresh();
    let daemon = Daemon::start();
    let echoes = |address: SocketAddr| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        stream.write_all(b"x").unwrap();
        matches!(stream.read(&mut [0; 1]), Ok(1))
    };
    let address = daemon.proxy("echo", echo_server());
    let toxic = r#"{"name":"t","type":"timeout","toxicity":1.0,"attributes":{"timeout":0}}"#;
    daemon.call("POST", "/proxies/echo/toxics", toxic);
    assert!(!echoes(address));
    let url = format!("http://{}", daemon.api);
    let mut top = Top::start(&["--url", &url]);
    top.shows("fault daemon");
    top.shows("echo timeout (downstream)");
    top.press(" ");
    wait_for(|| echoes(address), "the toxic to be off");
    top.press(" ");
    wait_for(|| !echoes(address), "the toxic to be on again");
    assert!(top.quit().success());
}

#[test]
fn a_daemons_packet_rules_are_shown_with_their_hits() {
    enter_fresh();
    let daemon = Daemon::start();
    let server = Server::redis(6379, None);
    daemon.call("POST", "/v1/rules", "\"udp:53 drop\"");
    let proxy = r#"{"name":"redis","listen":"127.0.0.1:6379","upstream":"127.0.0.1:6379"}"#;
    let (status, answer) = daemon.call("POST", "/proxies", proxy);
    assert_eq!(status, 201, "{answer}");
    let toxic = r#"{"name":"twice","type":"duplicate","attributes":{"probability":"100%"}}"#;
    let (status, answer) = daemon.call("POST", "/proxies/redis/toxics", toxic);
    assert_eq!(status, 200, "{answer}");
    assert!(answers(server.port));
    let url = format!("http://{}", daemon.api);
    let output = fault()
        .args(["top", "--json", "--url", &url])
        .output()
        .unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rules = shown[0]["rules"].as_array().unwrap();
    let find = |text: &str| rules.iter().find(|rule| rule["rule"] == text).expect(text);
    assert!(
        find("redis duplicate (downstream)")["hits"].as_u64() > Some(0),
        "a packet fault has the figures of its rule: {shown}"
    );
    assert_eq!(find("udp:53 drop")["hits"], 0);
    assert_eq!(rules.len(), 2, "each is shown once: {shown}");
    let mut top = Top::start(&["--url", &url]);
    top.shows("udp:53");
    top.press("G ");
    top.shows("remove");
    assert!(top.quit().success());
}

#[test]
fn a_toxic_that_has_gone_is_not_mistaken_for_another() {
    enter_fresh();
    let daemon = Daemon::start();
    daemon.proxy("echo", echo_server());
    for name in ["first", "second"] {
        let toxic = format!(r#"{{"name":"{name}","type":"latency","attributes":{{"latency":1}}}}"#);
        daemon.call("POST", "/proxies/echo/toxics", &toxic);
    }
    let url = format!("http://{}", daemon.api);
    let mut top = Top::refreshed("1h", &["--url", &url]);
    top.shows("echo latency (downstream)");
    daemon.call("DELETE", "/proxies/echo/toxics/first", "");
    top.press(" ");
    // Cells that stay the same are not written again: only single words can be waited for.
    top.shows("meanwhile:");
    // The screen has been refreshed since: the other toxic has taken its row, but is not selected.
    top.press(" ");
    top.press("s?");
    top.shows("columns");
    let (_, toxic) = daemon.call("GET", "/proxies/echo/toxics/second", "");
    assert_eq!(toxic["toxicity"].as_f64(), Some(1.0), "{toxic}");
    top.press("q");
    assert!(top.quit().success());
}

#[test]
fn what_can_t_be_shown_is_said_in_one_line() {
    enter_fresh();
    let attempt = |arguments: &[&str]| {
        let output = fault().arg("top").args(arguments).output().unwrap();
        let stderr_text = String::from_utf8_lossy(&output.stderr).into_owned();
        let told = stderr_text
            .lines()
            .filter(|line| !line.starts_with("help: "));
        assert_eq!(told.count(), 1, "{stderr_text}");
        (output.status.code(), stderr_text)
    };
    let (code, text) = attempt(&[]);
    assert_eq!(code, Some(125), "{text}");
    assert!(
        text.contains("nothing to show") && text.contains("start `fault daemon`"),
        "{text}"
    );
    let (code, text) = attempt(&["--pid", "1"]);
    assert_eq!(code, Some(125), "{text}");
    let applied = AppliedRules::begin(&["tcp:1 reject"], "--scope host");
    let (code, text) = attempt(&[]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("--json"), "{text}");
    applied.end();
}
