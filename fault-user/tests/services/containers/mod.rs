//! Containers of Podman and Docker, from the host and from inside: rules are applied, removed, and nothing is left
//! behind.

mod docker;
mod engine;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use fault_user::sys::net::{clsact, interfaces};
use fault_user::sys::process::netns::NetworkNamespace;

use crate::support::place::{PATIENCE, count_lines, fault, wait_for};
use crate::support::watched::{Watched, switch};
use engine::{Engine, PAGE};

/// A rule that swallows everything of the server's.
const SWALLOW: &str = "tcp:80 blackhole";

/// Nothing of ours is left in the network namespace of this process, nor a note of it.
fn is_clean(pid: i32) {
    assert_eq!(attached(pid), Vec::<String>::new());
    assert_eq!(journals(), 0);
}

/// What there is of ours in the network namespace of a process: programs, filters, interfaces.
fn attached(pid: i32) -> Vec<String> {
    let look = || {
        let mut found = Vec::new();
        for interface in interfaces::list()? {
            let name = &interface.name;
            if name.starts_with("fault-") {
                found.push(format!("interface {name}"));
            }
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                // An error: a kernel without TCX.
                if let Ok((_, programs)) = SchedClassifier::query_tcx(name, side) {
                    found.extend(programs.iter().map(|one| format!("{one:?} on {name}")));
                }
            }
            for filter in clsact::filters(interface.index)? {
                found.push(format!("{filter:?} on {name}"));
            }
        }
        Ok(found)
    };
    let namespace = NetworkNamespace::of_process(pid).expect("a process");
    namespace.enter(look).expect("it can be looked at")
}

/// How many instances have noted changes that are still to be undone.
fn journals() -> usize {
    match std::fs::read_dir("/run/fault") {
        Ok(entries) => entries.count(),
        Err(_) => 0,
    }
}

/// Sends a request on a connection.
fn ask(connection: &mut TcpStream) {
    connection
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .expect("sent");
}

/// The answer, for as long as it takes.
fn answer(mut connection: TcpStream) -> String {
    connection
        .set_read_timeout(Some(PATIENCE))
        .expect("a timeout");
    let mut text = String::new();
    connection.read_to_string(&mut text).expect("an answer");
    text
}

#[test]
fn a_bridged_container_is_faulted_from_the_host_by_name_without_its_neighbour() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.server("other", &[]);
    engine.idle("client", &[]);
    let (web, other) = (engine.address("web"), engine.address("other"));
    assert!(engine.fetch("client", &web));

    for options in [
        &["--container", "web"][..],
        &["--container", "web", "--attach", "clsact"],
    ] {
        let mut old = TcpStream::connect((web.as_str(), 80)).expect("a connection");
        let applied = Watched::inject(&[options, &["-r", SWALLOW]].concat());
        assert_ne!(attached(engine.pid("web")).len(), 0);
        ask(&mut old);
        assert!(!engine.fetch("client", &web), "the rule applies");
        assert!(engine.fetch("client", &other), "the neighbour is not");
        let (code, stderr_text) = applied.end();
        assert_eq!(code, Some(0), "{stderr_text}");
        assert!(engine.fetch("client", &web), "restored");
        assert!(answer(old).ends_with(PAGE), "the old connection goes on");
        is_clean(engine.pid("web"));
    }
}

#[test]
fn stream_faults_of_a_container_as_server_and_as_client() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.server("other", &[]);
    engine.idle("client", &[]);
    let (web, other) = (engine.address("web"), engine.address("other"));
    let is_served = |server: &str| {
        let mut connection = TcpStream::connect((server, 80)).expect("the handshake completes");
        ask(&mut connection);
        let mut text = String::new();
        let read = connection.read_to_string(&mut text);
        read.is_ok() && text.ends_with(PAGE)
    };
    for (name, faulted, reached) in [("web", &web, &other), ("client", &other, &web)] {
        let rule = format!("tcp:{faulted}:80 reset_peer=100ms");
        let applied = Watched::inject(&["--container", name, "-r", &rule]);
        assert!(!engine.fetch("client", faulted), "{name} is faulted");
        assert!(engine.fetch("client", reached), "another service is not");
        assert_eq!(is_served(&web), name != "web", "the host is outside");
        let (code, stderr_text) = applied.end();
        assert_eq!(code, Some(0), "{stderr_text}");
        assert!(engine.fetch("client", faulted), "restored: {stderr_text}");
        assert!(is_served(&web), "restored: {stderr_text}");
    }
}

#[test]
fn a_running_container_is_explored() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    let web = engine.address("web");
    // It asks the other container for the page, and has an older one.
    let script =
        format!("#!/bin/sh\\necho\\ntimeout 1 wget -q -O - http://{web}/ || echo of yesterday\\n");
    let serve = format!(
        "mkdir -p /www/cgi-bin && printf '{script}' > /www/cgi-bin/page && chmod 755 /www/cgi-bin/page && \
         exec httpd -f -p 80 -h /www"
    );
    engine.container("app", &[], &["sh", "-c", &serve]);
    wait_for(|| engine.fetch("app", "127.0.0.1"), "the service to answer");
    let app = engine.address("app");
    let explored = |needs: &str, faults: &str| {
        let probe = format!(
            "exec 3<>/dev/tcp/{app}/80; printf 'GET /cgi-bin/page HTTP/1.0\\r\\n\\r\\n' >&3; grep -qE '{needs}' <&3"
        );
        let output = fault()
            .args([
                "explore",
                "--container",
                "app",
                "--runs",
                "1",
                "--seed",
                "1",
            ])
            .args(["--no-shrink", "--faults", faults])
            .args(["--", "bash", "-c", &probe])
            .output()
            .expect("fault runs");
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    };
    let (code, text) = explored("well|yesterday", "refused,silent,cut,error");
    assert_eq!(code, Some(0), "{text}");
    for fault in ["refused", "silent", "cut", "error"] {
        let told = format!("tcp:{web}:80 {fault}: ");
        let line = text.lines().find(|line| line.contains(&told));
        let line = line.unwrap_or_else(|| panic!("{fault}: {text}"));
        assert!(line.contains("exit code 0"), "{line}");
        assert!(!line.contains("not reached"), "{line}");
    }
    let (code, text) = explored("well", "refused");
    assert_eq!(code, Some(121), "{text}");
    let line = format!("sudo fault run --seed 1 --container app -r 'tcp:{web}:80 reject' -- bash");
    assert!(text.contains(&line), "{text}");
    is_clean(engine.pid("app"));
}

#[test]
fn a_container_aimed_at_by_id_as_client_is_refused_everywhere() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &[]);
    let web = engine.address("web");
    let id = engine.podman(&["inspect", "--format", "{{.Id}}", "client"]);
    let get = format!("http://{web}/");
    // CMD runs on the host, and only the container is touched.
    let mut here = TcpStream::connect((web.as_str(), 80)).expect("a connection");
    let rule = format!("tcp:{web}:80 reject");
    let words = ["run", "--container", &id[..12], "-r", &rule, "--"];
    let command = ["podman", "exec", "client", "wget", "-q", "-O", "-", &get];
    let output = fault()
        .args([&words[..], &command].concat())
        .output()
        .expect("fault");
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "wget fails: {stderr_text}");
    assert!(stderr_text.contains("Connection refused"), "{stderr_text}");
    ask(&mut here);
    assert!(answer(here).ends_with(PAGE));
    assert!(engine.fetch("client", &web), "restored");
    is_clean(engine.pid("client"));
}

#[test]
fn what_is_expected_of_a_container_is_judged_by_its_own_sockets() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &[]);
    let web = engine.address("web");
    let mut file = tempfile::Builder::new()
        .suffix(".json")
        .tempfile()
        .expect("a file");
    let scenario = serde_json::json!({
        "targets": { "web": format!("tcp:{web}:80") },
        "rules": ["web reject for=1s"],
        "expect": { "fired": ["web"], "max_open": { "web": 1 }, "recovers_within": { "web": "5s" } },
    });
    file.write_all(scenario.to_string().as_bytes())
        .expect("written");
    // The container tries until it is answered. What others do meanwhile, such as this host, is not its own.
    let get = format!("until wget -q -O - http://{web}/ 2> /dev/null; do sleep 0.2; done");
    let script = format!(
        "exec 3<>/dev/tcp/{web}/80 4<>/dev/tcp/{web}/80; exec podman exec client sh -c '{get}'"
    );
    let command = ["bash", "-c", &script];
    let words = ["run", "--container", "client", "-f"];
    let words = [
        &words[..],
        &[file.path().to_str().expect("UTF-8"), "--"],
        &command,
    ]
    .concat();
    let output = fault().args(&words).output().expect("fault");
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr_text}");
    assert!(
        stderr_text.contains("ok: expect web to recover within 5s: first answer"),
        "{stderr_text}"
    );
    assert!(
        stderr_text.contains("open connections to web: 1"),
        "{stderr_text}"
    );
}

/// What a container that runs `fault` needs beside its network: the capabilities, and a profile that lets bpf(2) pass.
const MINIMAL: [&str; 4] = [
    "--cap-drop=all",
    "--cap-add=BPF,PERFMON,NET_ADMIN",
    "--security-opt",
    "seccomp=unconfined",
];

#[test]
fn a_sidecar_with_minimal_capabilities_faults_the_application_in_its_network() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("app", &[]);
    engine.idle("client", &[]);
    let address = engine.address("app");
    let shared = [&MINIMAL[..], &["--network", "container:app"]].concat();
    let mut old = TcpStream::connect((address.as_str(), 80)).expect("a connection");
    let mut applied = engine.watched(
        &[&shared[..], &["--name", "sidecar"]].concat(),
        &["fault", "inject", "-r", SWALLOW],
        "press Ctrl-C",
    );
    ask(&mut old);
    assert!(
        !engine.fetch("client", &address),
        "the rule applies from outside"
    );
    assert!(
        !engine.fetch("app", "127.0.0.1"),
        "the rule applies on its loopback"
    );
    engine.podman(&["stop", "sidecar"]);
    let (code, stderr_text) = applied.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(engine.fetch("client", &address), "restored");
    assert!(answer(old).ends_with(PAGE), "the old connection goes on");
    is_clean(engine.pid("app"));
}

#[test]
fn a_sidecar_that_is_killed_leaves_nothing() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("app", &[]);
    engine.idle("client", &[]);
    let address = engine.address("app");
    let shared = [&MINIMAL[..], &["--network", "container:app"]].concat();
    let mut applied = engine.watched(
        &[&shared[..], &["--name", "sidecar"]].concat(),
        &["fault", "inject", "-r", SWALLOW],
        "press Ctrl-C",
    );
    assert!(!engine.fetch("client", &address), "the rule applies");
    engine.podman(&["kill", "--signal", "KILL", "sidecar"]);
    assert_eq!(applied.finish().0, Some(137));
    // At once by TCX; on kernels without it when the lease is over.
    wait_for(
        || engine.fetch("client", &address),
        "the network to be restored",
    );
}

/// Each capability that is missing is named with what it is for, by `fault` and by its doctor.
#[test]
fn what_a_container_lacks_is_named() {
    let Some(engine) = Engine::start() else {
        return;
    };
    let open = ["--security-opt", "seccomp=unconfined"];
    let inject = ["fault", "inject", "--for", "1ms", "-r", SWALLOW];
    let attempt = |options: &[&str], command: &[&str]| {
        let output = engine.once(options, command);
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    };
    for missing in ["BPF", "PERFMON", "NET_ADMIN"] {
        let others: Vec<&str> = ["BPF", "PERFMON", "NET_ADMIN"]
            .into_iter()
            .filter(|name| *name != missing)
            .collect();
        let others = format!("--cap-add={}", others.join(","));
        let options = [&["--cap-drop=all", &others], &open[..]].concat();
        let (code, text) = attempt(&options, &inject);
        assert_eq!(code, Some(125), "{text}");
        assert_eq!(count_lines(&text), 1, "{text}");
        assert!(text.contains(&format!("--cap-add {missing} ")), "{text}");
        let (_, text) = attempt(&options, &["fault", "doctor"]);
        let line = text
            .lines()
            .find(|line| line.contains(&format!("CAP_{missing} ")));
        assert!(line.is_some_and(|line| line.contains(" no ")), "{text}");
    }
    let (code, text) = attempt(&MINIMAL, &inject);
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = attempt(&MINIMAL, &["fault", "doctor"]);
    assert_eq!(code, Some(0), "it works there: {text}");
    // Podman's own profile of system calls.
    let (code, text) = attempt(&MINIMAL[..2], &inject);
    if code != Some(0) {
        assert_eq!((code, count_lines(&text)), (Some(125), 1), "{text}");
        assert!(text.contains("seccomp"), "{text}");
    }
    let (code, text) = attempt(
        &["--cap-drop=all", "--cap-add=SYS_ADMIN,NET_ADMIN"],
        &inject,
    );
    assert_eq!(
        code,
        Some(0),
        "SYS_ADMIN stands in, and the profile allows it: {text}"
    );
}

#[test]
fn a_delay_in_a_minimal_container_needs_the_tun_device_and_an_interface() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("app", &[]);
    engine.idle("client", &[]);
    let address = engine.address("app");
    let shared = [&MINIMAL[..], &["--network", "container:app"]].concat();
    let rule = "tcp:80 delay=2s";
    let without = engine.once(&shared, &["fault", "inject", "-r", rule]);
    let stderr_text = String::from_utf8_lossy(&without.stderr).into_owned();
    assert_eq!(without.status.code(), Some(125), "{stderr_text}");
    assert!(
        stderr_text.contains("--device /dev/net/tun"),
        "{stderr_text}"
    );
    let with = [&shared[..], &["--device=/dev/net/tun", "--name=sidecar"]].concat();
    let mut applied = engine.watched(
        &with,
        &["fault", "inject", "-i", "eth0", "-r", rule],
        "press Ctrl-C",
    );
    assert!(
        !engine.fetch("client", &address),
        "it takes longer than a second"
    );
    engine.podman(&["stop", "sidecar"]);
    let (code, stderr_text) = applied.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(engine.fetch("client", &address), "restored");
    is_clean(engine.pid("app"));
}

/// Options of a container that works on its host: the host's network and the host's cgroups.
const ON_THE_HOST: [&str; 6] = [
    "--privileged",
    "--network=host",
    "--cgroupns=host",
    "--volume",
    "/sys/fs/cgroup:/sys/fs/cgroup",
    "--workdir=/tmp",
];

#[test]
fn a_privileged_container_with_host_networking_faults_only_its_command() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("neighbour", &["--network=host"]);
    let address = engine.address("web");
    let get = format!("http://{address}/");
    let wget = ["wget", "-q", "-O", "-", &get];
    let run = ["fault", "run", "-r", "tcp:80 reject", "--"];
    let output = engine.once(&ON_THE_HOST, &[&run[..], &wget].concat());
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr_text}");
    assert!(stderr_text.contains("refused"), "{stderr_text}");

    // Its command's traffic, and not its neighbour's on the same network.
    let mut applied = engine.watched(
        &[&ON_THE_HOST[..], &["--name=fault"]].concat(),
        &[
            "fault",
            "run",
            "--allow-unfired",
            "-r",
            SWALLOW,
            "--",
            "sh",
            "-c",
            "echo ready >&2; sleep 1000",
        ],
        "ready",
    );
    assert!(engine.fetch("neighbour", &address), "not the command's");
    engine.podman(&["stop", "fault"]);
    applied.finish();

    // All of the host's traffic.
    let mut applied = engine.watched(
        &[&ON_THE_HOST[..], &["--name=fault"]].concat(),
        &["fault", "inject", "-r", SWALLOW],
        "press Ctrl-C",
    );
    assert!(!engine.fetch("neighbour", &address), "everyone's");
    engine.podman(&["stop", "fault"]);
    let (code, stderr_text) = applied.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(engine.fetch("neighbour", &address), "restored");
    is_clean(i32::try_from(std::process::id()).expect("a number"));
}

/// A container on the host's network is told from others there by its cgroup.
#[test]
fn a_container_with_host_networking_is_faulted_by_its_cgroup() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    for name in ["one", "two"] {
        engine.idle(name, &["--network=host"]);
    }
    let address = engine.address("web");
    let applied = Watched::inject(&["--container", "one", "-r", SWALLOW]);
    assert!(!engine.fetch("one", &address), "the rule applies");
    assert!(engine.fetch("two", &address), "not the other one");
    let (code, stderr_text) = applied.end();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(engine.fetch("one", &address), "restored");
}

/// As a `DaemonSet` does: the host's processes and the runtime's state, read-only, and no `--privileged`.
const ON_A_NODE: [&str; 8] = [
    "--cap-drop=all",
    "--cap-add=BPF,PERFMON,NET_ADMIN,SYS_ADMIN,SYS_PTRACE",
    "--network=host",
    "--pid=host",
    "--volume",
    "/run/containers:/run/containers:ro",
    "--volume",
    "/var/lib/containers/storage/overlay-containers:/var/lib/containers/storage/overlay-containers:ro",
];

#[test]
fn a_container_aims_at_another_one_by_name() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &[]);
    let address = engine.address("web");
    let inject = ["fault", "inject", "--container", "web", "-r", SWALLOW];
    let mut applied = engine.watched(
        &[&ON_A_NODE[..], &["--name=agent"]].concat(),
        &inject,
        "press Ctrl-C",
    );
    assert!(!engine.fetch("client", &address), "the rule applies");
    engine.podman(&["stop", "agent"]);
    let (code, stderr_text) = applied.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    assert!(engine.fetch("client", &address), "restored");
    is_clean(engine.pid("web"));

    // What it can't do without.
    let refused = |options: &[&str]| {
        let output = engine.once(options, &inject);
        let stderr_text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            (output.status.code(), count_lines(&stderr_text)),
            (Some(125), 1),
            "{stderr_text}"
        );
        stderr_text
    };
    let fewer = |capabilities| {
        let mut options = ON_A_NODE.to_vec();
        options[1] = capabilities;
        options.extend(["--security-opt", "seccomp=unconfined"]);
        refused(&options)
    };
    assert!(fewer("--cap-add=BPF,PERFMON,NET_ADMIN,SYS_ADMIN").contains("CAP_SYS_PTRACE"));
    assert!(fewer("--cap-add=BPF,PERFMON,NET_ADMIN,SYS_PTRACE").contains("CAP_SYS_ADMIN"));
    let own_processes: Vec<&str> = ON_A_NODE
        .into_iter()
        .filter(|option| *option != "--pid=host")
        .collect();
    assert!(refused(&own_processes).contains("--pid host"));
}

/// A container that is killed and started again, in a new network namespace.
#[test]
fn rules_follow_a_container_that_is_restarted() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &[]);
    for options in [&[][..], &["--attach", "clsact"]] {
        let words = [&["--container", "web", "--follow", "-r", SWALLOW], options].concat();
        let mut applied = Watched::inject(&words);
        assert!(
            !engine.fetch("client", &engine.address("web")),
            "the rule applies"
        );
        for round in 0..2 {
            let before = engine.pid("web");
            engine.podman(&["kill", "--signal", "KILL", "web"]);
            applied.until("the container `web` has ended; waiting for it to restart");
            engine.podman(&["wait", "web"]);
            engine.podman(&["start", "web"]);
            applied.until("the container `web` is running again: 1 rule applied");
            assert_ne!(engine.pid("web"), before);
            let address = engine.address("web");
            assert!(
                !engine.fetch("client", &address),
                "the rule applies again, {round}"
            );
        }
        let (code, stderr_text) = applied.end();
        assert_eq!(code, Some(0), "{stderr_text}");
        let connections = stderr_text
            .lines()
            .last()
            .and_then(|line| line.split_whitespace().rev().nth(2));
        let connections: u32 = connections
            .and_then(|text| text.parse().ok())
            .expect(&stderr_text);
        assert!(
            connections >= 3,
            "the figures are those of all three: {stderr_text}"
        );
        wait_for(
            || engine.fetch("client", &engine.address("web")),
            "the network to be restored",
        );
        is_clean(engine.pid("web"));
    }
}

/// A rule that is turned off stays off in the container that comes back.
#[test]
fn a_rule_that_is_off_does_not_follow_a_container() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &[]);
    let mut applied = Watched::inject(&["--container", "web", "--follow", "-r", SWALLOW]);
    let pid = applied.child.id();
    switch(pid, false);
    engine.podman(&["kill", "--signal", "KILL", "web"]);
    applied.until("waiting for it to restart");
    engine.podman(&["wait", "web"]);
    engine.podman(&["start", "web"]);
    applied.until("is running again");
    wait_for(
        || engine.fetch("client", &engine.address("web")),
        "the container without the rule",
    );
    switch(pid, true);
    assert!(!engine.fetch("client", &engine.address("web")), "on again");
    assert_eq!(applied.end().0, Some(0));
}

/// One that shares the host's network is followed by its cgroup, by a command too.
#[test]
fn rules_follow_a_restarted_container_on_the_hosts_network() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.idle("client", &["--network=host"]);
    let address = engine.address("web");
    let words = [
        "run",
        "--container",
        "client",
        "--follow",
        "-r",
        SWALLOW,
        "--",
    ];
    let mut applied = Watched::start(
        fault()
            .args(words)
            .args(["sh", "-c", "echo ready >&2; exec sleep 1000"]),
        "ready",
    );
    assert!(!engine.fetch("client", &address), "the rule applies");
    engine.podman(&["restart", "--time", "0", "client"]);
    applied.until("is running again");
    assert!(!engine.fetch("client", &address), "the rule applies again");
    let (code, stderr_text) = applied.end();
    assert_eq!(code, Some(143), "its command was ended: {stderr_text}");
    assert!(engine.fetch("client", &address), "restored");
}

#[test]
fn the_end_of_a_container_is_reported_in_one_line() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    let mut applied = Watched::inject(&["--container", "web", "-r", SWALLOW]);
    engine.podman(&["kill", "web"]);
    let (code, stderr_text) = applied.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    let line = "fault: the container `web` has ended; its rules are removed (--follow applies them again after a \
    restart)";
    assert!(stderr_text.lines().any(|one| one == line), "{stderr_text}");
    assert_eq!(journals(), 0);
}

/// A container that can't be selected is rejected with one line, and nothing is applied.
#[test]
fn what_can_not_be_aimed_at_is_refused_in_a_line() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.server("web", &[]);
    engine.container("done", &[], &["sleep", "0"]);
    engine.podman(&["wait", "done"]);
    let id = engine.podman(&["inspect", "--format", "{{.Id}}", "web"]);
    // A container whose name is the id of another one.
    engine.idle(&id, &[]);
    for (container, code, expected) in [
        ("nobody", 125, "no container `nobody`: there are "),
        ("we", 125, "no container `we`"),
        (
            "done",
            125,
            "the container `done` (podman) is not running: start it first",
        ),
        (&id, 125, "several containers are named"),
        ("", 125, "no container ``"),
    ] {
        let mut words = vec!["inject", "--for", "1ms", "-r", SWALLOW];
        words.push("--container");
        words.push(container);
        let output = fault().args(&words).output().expect("fault");
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{container}: {stderr_text}"
        );
        assert!(stderr_text.contains(expected), "{container}: {stderr_text}");
        if code == 125 {
            assert_eq!(count_lines(&stderr_text), 1, "{container}: {stderr_text}");
        }
    }
    for words in [
        &["inject", "--follow", "-r", SWALLOW][..],
        &[
            "run",
            "--container",
            "web",
            "--follow",
            "--events",
            "/dev/null",
            "-r",
            SWALLOW,
            "--",
            "true",
        ],
    ] {
        let output = fault().args(words).output().expect("fault");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    assert_eq!(attached(engine.pid("web")).len(), 0);
}

/// Root in a user namespace, as in a rootless container, has no rights over the host's BPF.
#[test]
fn a_user_namespace_is_refused_in_a_line() {
    let Some(engine) = Engine::start() else {
        return;
    };
    let options = [
        "--privileged",
        "--uidmap=0:100000:65536",
        "--gidmap=0:100000:65536",
    ];
    let inject = ["fault", "inject", "--for", "1ms", "-r", SWALLOW];
    let output = engine.once(&options, &inject);
    let stderr_text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{stderr_text}");
    assert_eq!(count_lines(&stderr_text), 1, "{stderr_text}");
    assert!(stderr_text.contains("user namespace"), "{stderr_text}");
}

/// The script that `docs/kubernetes/daemonset.yaml` runs on each node, as it stands there.
fn agent_script() -> String {
    let manifest = include_str!("../../../../docs/kubernetes/daemonset.yaml");
    let (_, rest) = manifest.split_once("agent.sh: |\n").expect("the script");
    let lines = rest.lines().take_while(|line| line.starts_with("    "));
    lines.flat_map(|line| [&line[4..], "\n"]).collect()
}

/// The agent of the `DaemonSet` on a node without Kubernetes: `kubectl` is a script that lists two pods' containers, and
/// containerd's state is made from Podman's.
#[test]
fn the_kubernetes_agent_faults_the_pods_that_the_api_lists() {
    let Some(engine) = Engine::start() else {
        return;
    };
    let node = tempfile::tempdir().expect("a folder");
    let (state, scripts) = (node.path().join("state"), node.path().join("scripts"));
    std::fs::create_dir(&scripts).expect("a folder");
    let mut listed = Vec::new();
    for name in ["one", "two", "other"] {
        engine.server(name, &[]);
        let id = format!("{name}-of-kubernetes");
        let task = state.join("k8s.io").join(&id);
        std::fs::create_dir_all(&task).expect("a folder");
        std::fs::write(task.join("init.pid"), engine.pid(name).to_string()).expect("written");
        if name != "other" {
            listed.push(format!("containerd://{id}"));
        }
    }
    let list = |pods: &[String]| {
        // At once: the agent never reads half a list.
        std::fs::write(scripts.join("new"), pods.join("\n")).expect("written");
        std::fs::rename(scripts.join("new"), scripts.join("pods")).expect("renamed");
    };
    list(&listed);
    std::fs::write(scripts.join("kubectl"), "#!/bin/sh\ncat /agent/pods\n").expect("written");
    std::fs::write(scripts.join("agent.sh"), agent_script()).expect("written");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(scripts.join("kubectl"), executable).expect("set");
    engine.idle("client", &[]);

    let volumes = [
        format!(
            "--volume={}:/run/containerd/io.containerd.runtime.v2.task:ro",
            state.display()
        ),
        format!("--volume={}:/agent:ro", scripts.display()),
    ];
    let options = [
        "--cap-drop=all",
        "--cap-add=BPF,PERFMON,NET_ADMIN,SYS_ADMIN,SYS_PTRACE",
        "--pid=host",
        "--env=PATH=/agent:/bin",
        "--env=TARGET_NAMESPACE=default",
        "--env=TARGET_LABELS=app=web",
        "--env=NODE_NAME=here",
        "--env=RULE=tcp:80 blackhole",
        "--name=agent",
        &volumes[0],
        &volumes[1],
    ];
    let mut agent = engine.watched(&options, &["sh", "/agent/agent.sh"], "press Ctrl-C");
    agent.until("press Ctrl-C");
    for name in ["one", "two"] {
        assert!(
            !engine.fetch("client", &engine.address(name)),
            "{name}: the rule applies"
        );
    }
    assert!(
        engine.fetch("client", &engine.address("other")),
        "not listed"
    );
    // One loses its label, another gets it.
    list(&[
        listed[0].clone(),
        "containerd://other-of-kubernetes".to_owned(),
    ]);
    wait_for(
        || engine.fetch("client", &engine.address("two")),
        "it to be restored",
    );
    wait_for(
        || !engine.fetch("client", &engine.address("other")),
        "the rule to apply to it",
    );
    assert!(
        !engine.fetch("client", &engine.address("one")),
        "the rule still applies"
    );
    engine.podman(&["stop", "agent"]);
    let (code, stderr_text) = agent.finish();
    assert_eq!(code, Some(0), "{stderr_text}");
    for name in ["one", "two", "other"] {
        assert!(
            engine.fetch("client", &engine.address(name)),
            "{name}: restored"
        );
        is_clean(engine.pid(name));
    }
}
