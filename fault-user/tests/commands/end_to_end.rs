//! The binary `fault` on real traffic: real servers, real clients, in network namespaces of the tests' own.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use crate::support::place::{
    AppliedRules, PATIENCE, Peer, count_lines, enter_fresh, fault, hide_run, run, set_option,
    wait_for,
};
use crate::support::servers::{Redis, Server, psql, psql_words};
use fault_user::sys::process::cgroup::Hierarchy;

const PONG: &[u8; 7] = b"+PONG\r\n";

/// Asserts that the service is as it should be, on a new connection.
fn is_well(host: &str, port: u16) {
    let mut redis = Redis::connect(host, port).expect("a new connection");
    assert_eq!(&redis.ping().expect("an answer"), PONG);
}

/// Injects each fault into an old and a new connection to Redis, and looks at both again after the rules are removed.
fn inject_and_restore(host: &str, port: u16, options: &str) {
    let rule = |fault: &str| format!("tcp:{port} {fault}");
    let old = || {
        let mut redis = Redis::connect(host, port).unwrap();
        assert_eq!(&redis.ping().unwrap(), PONG);
        redis
    };

    let mut redis = Redis::hasty(host, port).unwrap();
    let applied = AppliedRules::begin(&[&rule("blackhole")], options);
    assert!(is_timeout(&redis.ping().unwrap_err()), "old, blackhole");
    assert!(
        is_timeout(&Redis::hasty(host, port).err().expect("no connection")),
        "new, blackhole"
    );
    applied.end();
    assert_eq!(&redis.late(), PONG, "the old connection goes on");
    is_well(host, port);

    let applied = AppliedRules::begin(&[&rule("reject")], options);
    let refused = Redis::connect(host, port).err().expect("no connection");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    applied.end();
    is_well(host, port);

    let mut redis = old();
    let applied = AppliedRules::begin(&[&rule("reset match=data")], options);
    assert_eq!(
        redis.ping().unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "old, reset"
    );
    let mut fresh = Redis::connect(host, port).unwrap();
    assert_eq!(
        fresh.ping().unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "new, reset"
    );
    applied.end();
    is_well(host, port);

    let mut redis = old();
    let applied = AppliedRules::begin(&[&rule("corrupt=100% dir=to-client")], options);
    assert_ne!(&redis.ping().unwrap(), PONG, "old, corrupt");
    let mut fresh = Redis::connect(host, port).unwrap();
    assert_ne!(&fresh.ping().unwrap(), PONG, "new, corrupt");
    applied.end();
    assert_eq!(&redis.ping().unwrap(), PONG);
    is_well(host, port);

    let mut redis = old();
    let applied = AppliedRules::begin(
        &[&rule("loss=30%"), &rule("duplicate=50%")],
        &format!("{options} --seed 3"),
    );
    redis_survives(&mut redis);
    let summary = applied.end();
    assert!(!summary.contains(" 0 pkts"), "{summary}");
    assert_eq!(&redis.ping().unwrap(), PONG);
    is_well(host, port);

    let mut redis = old();
    let applied = AppliedRules::begin(&[&rule("down")], options);
    assert_eq!(
        redis.ping().unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "old, down"
    );
    let refused = Redis::connect(host, port).err().expect("no connection");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "new, down");
    applied.end();
    is_well(host, port);
}

/// Ten answers, however long retransmission takes.
fn redis_survives(redis: &mut Redis) {
    for _ in 0..10 {
        assert_eq!(&redis.ping().unwrap(), PONG);
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

#[test]
fn redis_on_loopback_recovers_from_faults() {
    enter_fresh();
    let server = Server::redis(6379, None);
    inject_and_restore("127.0.0.1", server.port, "--scope host");
    inject_and_restore("::1", server.port, "--scope host");
}

#[test]
fn redis_on_loopback_recovers_from_faults_by_clsact() {
    enter_fresh();
    let server = Server::redis(6379, None);
    inject_and_restore("127.0.0.1", server.port, "--scope host --attach clsact");
    let left = Command::new("tc")
        .args(["filter", "show", "dev", "lo", "egress"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
}

#[test]
fn redis_across_a_veth_is_faulted_from_either_side() {
    enter_fresh();
    let peer = Peer::joined();
    let _server = Server::redis(6379, Some(&peer.name));
    for host in ["10.77.0.2", "fd77::2"] {
        inject_and_restore(host, 6379, "--scope host");
        inject_and_restore(host, 6379, &format!("--netns {}", peer.name));
    }
}

#[test]
fn postgres_recovers_from_faults() {
    enter_fresh();
    let server = Server::postgres(5432);
    let words = psql_words(server.port);
    let query: Vec<&str> = words.iter().map(String::as_str).collect();
    let patient: Vec<&str> = ["timeout", "20"]
        .into_iter()
        .chain(query.iter().copied())
        .collect();
    let hasty: Vec<&str> = ["timeout", "1"]
        .into_iter()
        .chain(query.iter().copied())
        .collect();
    let applied = run(&["tcp:5432 loss=20%"], "--seed 5", &patient);
    assert_eq!(
        (applied.status.code(), applied.stdout.as_slice()),
        (Some(0), b"42\n".as_slice()),
        "{applied:?}"
    );
    for (rule, command, code, message) in [
        ("tcp:5432 blackhole", &hasty, 124, ""),
        ("tcp:5432 reject", &patient, 2, "Connection refused"),
        (
            "tcp:5432 reset match=data",
            &patient,
            2,
            "server closed the connection",
        ),
        ("tcp:5432 down", &patient, 2, "Connection refused"),
    ] {
        let applied = run(&[rule], "", command);
        let stderr_text = String::from_utf8_lossy(&applied.stderr);
        assert_eq!(applied.status.code(), Some(code), "{rule}: {stderr_text}");
        assert!(stderr_text.contains(message), "{rule}: {stderr_text}");
        assert!(
            psql(server.port, 10).status.success(),
            "restored after {rule}"
        );
    }
}

#[test]
fn only_the_commands_own_traffic_is_touched() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let applied = AppliedRules::begin(&["tcp:6379 blackhole"], "");
    is_well("127.0.0.1", server.port);
    applied.end();
    // The command's children are its own; a second client at the same time is not.
    let child = [
        "sh",
        "-c",
        "timeout 1 sh -c 'redis-cli -p 6379 ping'; test $? = 124",
    ];
    let output = run(&["tcp:6379 blackhole"], "", &child);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    is_well("127.0.0.1", server.port);
}

#[test]
fn a_server_under_fault_is_faulted_for_clients_outside() {
    enter_fresh();
    let mut served = fault()
        .args([
            "run",
            "-r",
            "tcp:6380 corrupt=100% dir=to-client",
            "--",
            "redis-server",
            "--port",
            "6380",
            "--save",
            "",
        ])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for(
        || Redis::connect("127.0.0.1", 6380).is_ok(),
        "redis to listen",
    );
    let mut redis = Redis::connect("127.0.0.1", 6380).unwrap();
    let answer = redis.ping();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(served.id()).unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    served.wait().unwrap();
    assert_ne!(&answer.unwrap(), PONG);
}

#[test]
fn a_running_server_is_aimed_at_with_its_open_connections() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let other = Server::redis(6380, None);
    // By clsact there are two kinds of changes to note for one process.
    for attachment in ["", "--attach clsact"] {
        let mut old = Redis::hasty("127.0.0.1", server.port).unwrap();
        let applied = AppliedRules::begin(
            &["tcp:6379,6380 blackhole"],
            &format!("--pid {} {attachment}", server.pid()),
        );
        assert!(is_timeout(&old.ping().unwrap_err()));
        assert!(Redis::hasty("127.0.0.1", server.port).is_err());
        is_well("127.0.0.1", other.port);
        applied.end();
        assert_eq!(&old.late(), PONG);
        is_well("127.0.0.1", server.port);
    }
}

#[test]
fn silent_loss_is_not_told_to_the_sender() {
    enter_fresh();
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    set_option(&sender, libc::IPPROTO_IP, libc::IP_RECVERR, 1);
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(&["udp:7000 blackhole"], options);
        for _ in 0..20 {
            assert_eq!(sender.send(b"gone").expect("no ENOBUFS"), 4);
        }
        let summary = applied.end();
        assert!(summary.contains("20 pkts"), "{summary}");
    }
    sender.send(b"back").unwrap();
    let mut bytes = [0; 8];
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let read = receiver.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..read], b"back");
}

#[test]
fn udp_is_duplicated_corrupted_and_refused() {
    enter_fresh();
    let peer = Peer::joined();
    let receiver = UdpSocket::bind("10.77.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let send = format!(
        "ip netns exec {} bash -c 'echo -n ping >/dev/udp/10.77.0.1/7000'",
        peer.name
    );
    let deliver = || {
        let done = Command::new("sh").args(["-c", &send]).status();
        assert!(done.unwrap().success());
    };
    let mut bytes = [0; 16];
    // At ingress here, and at egress there.
    for options in ["--scope host".to_owned(), format!("--netns {}", peer.name)] {
        let applied = AppliedRules::begin(&["udp:7000 duplicate=100%"], &options);
        deliver();
        for _ in 0..2 {
            let read = receiver.recv(&mut bytes).expect("twice");
            assert_eq!(&bytes[..read], b"ping");
        }
        applied.end();
        let applied = AppliedRules::begin(&["udp:7000 corrupt=100%"], &options);
        deliver();
        let read = receiver
            .recv(&mut bytes)
            .expect("the wrong bytes have a right checksum");
        assert_ne!(&bytes[..read], b"ping");
        assert_eq!(read, 4);
        applied.end();
    }
    let client = UdpSocket::bind("10.77.0.1:0").unwrap();
    client.connect("10.77.0.2:7001").unwrap();
    let applied = AppliedRules::begin(&["udp:7001 reject"], "--scope host");
    client.send(b"question").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(
        client.recv(&mut bytes).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    applied.end();
}

/// Its new sysfs hides the cgroups.
#[test]
fn a_command_under_ip_netns_exec_is_hit() {
    enter_fresh();
    let peer = Peer::joined();
    let script = "grep ^0:: /proc/self/cgroup; echo -n x >/dev/udp/10.77.0.1/7000";
    let run = Command::new("ip")
        .args(["netns", "exec", &peer.name, env!("CARGO_BIN_EXE_fault")])
        .args(["run", "-r", "udp:7000 loss=100%", "--", "bash", "-c"])
        .arg(script)
        .output()
        .unwrap();
    let (said, seen) = (
        String::from_utf8_lossy(&run.stderr),
        String::from_utf8_lossy(&run.stdout),
    );
    assert!(run.status.success() && said.contains("1 pkt "), "{said}");
    let below = seen.trim().trim_start_matches("0::/");
    let cgroup = Hierarchy::find().unwrap().path().join(below);
    assert!(below.contains("fault-") && !cgroup.exists(), "{seen}");
}

#[test]
fn the_same_seed_gives_the_same_decisions() {
    enter_fresh();
    let _server = Server::redis(6379, None);
    let folder = tempfile::tempdir().unwrap();
    let decisions = |seed: u32, number: u32| -> Vec<String> {
        let file = folder.path().join(format!("events-{number}"));
        let options = format!("--seed {seed} --events {}", file.display());
        let output = run(
            &[
                "tcp:6379 duplicate=30%",
                "tcp:6379 corrupt=20%,link dir=to-client",
            ],
            &options,
            &["redis-cli", "-p", "6379", "-r", "30", "ping"],
        );
        assert!(output.status.success(), "{output:?}");
        let text = std::fs::read_to_string(file).unwrap();
        // One direction of one connection: what is not lost comes in order. Times differ.
        text.lines()
            .filter(|line| line.contains("to-server"))
            .map(|line| line.split(",\"bytes\"").next().unwrap().to_owned())
            .take(10)
            .collect()
    };
    let first = decisions(11, 1);
    assert_eq!(first.len(), 10, "{first:?}");
    assert_eq!(first, decisions(11, 2));
    assert_ne!(first, decisions(12, 3));
}

#[test]
fn kill_9_at_any_moment_leaves_nothing() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let mut moment = 12_345_u64;
    for round in 0..50 {
        let mut child = fault()
            .args([
                "run",
                "-r",
                "tcp:6379 blackhole",
                "--scope",
                "host",
                "--",
                "sleep",
                "5",
            ])
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The moments are the same on every run; what happens at them is not.
        moment = moment
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        std::thread::sleep(Duration::from_millis((moment >> 33) % 200));
        child.kill().unwrap();
        child.wait().unwrap();
        is_well("127.0.0.1", server.port);
        for side in ["ingress", "egress"] {
            let filters = Command::new("tc")
                .args(["filter", "show", "dev", "lo", side])
                .output()
                .unwrap();
            assert_eq!(filters.stdout, b"", "round {round}");
        }
        let links = Command::new("bpftool")
            .args(["net", "show", "dev", "lo"])
            .output()
            .unwrap();
        assert!(
            !String::from_utf8_lossy(&links.stdout).contains("fault_"),
            "round {round}"
        );
    }
}

#[test]
fn clsact_stops_acting_by_the_lease_and_clean_removes_it() {
    enter_fresh();
    hide_run();
    let server = Server::redis(6379, None);
    let mut applied = AppliedRules::begin(&["tcp:6379 blackhole"], "--scope host --attach clsact");
    assert!(Redis::hasty("127.0.0.1", server.port).is_err());
    applied.kill();
    let start = std::time::Instant::now();
    wait_for(
        || Redis::hasty("127.0.0.1", server.port).is_ok(),
        "the lease to end",
    );
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
    drop(applied);
    let shown = |words: &str| {
        let output = Command::new("tc").args(words.split(' ')).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(shown("filter show dev lo egress").contains("fault_"));
    assert!(fault().arg("clean").status().unwrap().success());
    assert_eq!(shown("filter show dev lo egress"), "");
    assert!(!shown("qdisc show dev lo").contains("clsact"));
}

#[test]
fn foreign_qdiscs_and_filters_stay_and_still_run() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let tc = |words: &str| {
        let output = Command::new("tc").args(words.split(' ')).output().unwrap();
        assert!(output.status.success(), "tc {words}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    tc("qdisc add dev lo root handle 77: tbf rate 1gbit burst 1mb latency 50ms");
    let qdiscs = tc("qdisc show dev lo");
    for options in ["--scope host", "--scope host --attach clsact"] {
        let applied = AppliedRules::begin(&["tcp:6379 reject"], options);
        assert!(Redis::hasty("127.0.0.1", server.port).is_err());
        let sent = |text: &str| {
            text.split("Sent ")
                .nth(1)
                .and_then(|rest| rest.split(' ').next())
                .unwrap()
                .to_owned()
        };
        let before = sent(&tc("-s qdisc show dev lo root"));
        assert!(Redis::connect("127.0.0.1", 1).is_err());
        assert_ne!(
            before,
            sent(&tc("-s qdisc show dev lo root")),
            "the qdisc still runs"
        );
        applied.end();
        assert_eq!(tc("qdisc show dev lo"), qdiscs);
    }
    is_well("127.0.0.1", server.port);
}

#[test]
fn two_instances_on_one_port_do_not_meet() {
    enter_fresh();
    let server = Server::redis(6379, None);
    let first = AppliedRules::begin(&["tcp:6379 blackhole"], "");
    let second = run(
        &["tcp:6379 reject"],
        "",
        &["redis-cli", "-p", "6379", "ping"],
    );
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("refused"),
        "{second:?}"
    );
    is_well("127.0.0.1", server.port);
    first.end();
    is_well("127.0.0.1", server.port);
}

#[test]
fn ping_is_lost_and_refused() {
    enter_fresh();
    let ping = |target: &'static str| ["ping", "-c", "3", "-i", "0.05", "-W", "1", target];
    for target in ["127.0.0.1", "::1"] {
        let lost = run(&["icmp blackhole"], "", &ping(target));
        assert_eq!(lost.status.code(), Some(1), "{lost:?}");
        assert!(String::from_utf8_lossy(&lost.stdout).contains("100% packet loss"));
        let refused = run(&["icmp reject"], "", &ping(target));
        assert!(
            String::from_utf8_lossy(&refused.stdout).contains("nreachable"),
            "{refused:?}"
        );
    }
}

#[test]
fn exit_codes_and_messages_are_those_of_the_documentation() {
    enter_fresh();
    let long = "tcp:5432 loss=30%";
    for (rules, options, command, code, message) in [
        (
            &[long][..],
            "--allow-unfired",
            &["true"][..],
            0,
            "never fired",
        ),
        (&[long], "", &["true"], 120, "never fired"),
        (&[long], "", &["sh", "-c", "exit 7"], 7, ""),
        (&[long], "", &["sh", "-c", "kill -TERM $$"], 143, ""),
        (&[long], "", &["/nonexistent"], 127, "no such file"),
        (&[long], "", &["no-such-command"], 127, "not found"),
        (&[long], "", &["/etc/passwd"], 126, "can't be executed"),
        (
            &["tcp:5432 los=30%"],
            "",
            &["true"],
            2,
            "did you mean `loss`?",
        ),
        (&["tcp:5432 loss=130%"], "", &["true"], 2, "^^^^"),
        (&["tcp:99999 loss=1%"], "", &["true"], 2, "^^^^^"),
        (&["mysql down"], "", &["true"], 2, "--target"),
        (&["tcp:22 loss=1%"], "--scope host", &["true"], 2, "--force"),
        (&["* loss=1%"], "--scope host", &["true"], 2, "--force"),
        (
            &[long],
            "--interface loo",
            &["true"],
            125,
            "did you mean `lo`?",
        ),
        (&[long], "--cgroup /etc", &["true"], 125, "is not a cgroup"),
        (
            &[long],
            "--pid 99999999",
            &["true"],
            125,
            "there is no process",
        ),
        (
            &[long],
            "--container nothing-of-this-name",
            &["true"],
            125,
            "no container",
        ),
        (
            &[long],
            "--netns nothing-of-this-name",
            &["true"],
            125,
            "no network namespace",
        ),
        (
            &[long],
            "--user nobody-of-this-name",
            &["true"],
            125,
            "nobody-of-this-name",
        ),
    ] {
        let output = run(rules, options, command);
        let stderr_text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{rules:?} {options}: {stderr_text}"
        );
        assert!(
            stderr_text.contains(message),
            "{rules:?} {options}: {stderr_text}"
        );
    }
    let nobody = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups", "--inh-caps=-all"])
        .arg(copied_binary().path().join("fault"))
        .args(["run", "-r", long, "--", "true"])
        .output()
        .unwrap();
    let stderr_text = String::from_utf8_lossy(&nobody.stderr);
    assert_eq!(nobody.status.code(), Some(125), "{stderr_text}");
    assert_eq!(count_lines(&stderr_text), 1, "{stderr_text}");
    assert!(stderr_text.contains("sudo"), "{stderr_text}");
}

/// The binary where a user without rights can reach it.
fn copied_binary() -> &'static tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    static FOLDER: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_fault"), folder.path().join("fault")).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        folder
    })
}

#[test]
fn under_sudo_the_command_runs_as_the_caller() {
    enter_fresh();
    let output = fault()
        .args([
            "run",
            "--allow-unfired",
            "-r",
            "tcp:5432 loss=1%",
            "--",
            "id",
            "-u",
        ])
        .env("SUDO_UID", "65534")
        .env("SUDO_GID", "65534")
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "65534\n",
        "{output:?}"
    );
}

#[test]
fn a_scenario_file_is_checked_and_its_expectations_decide() {
    enter_fresh();
    let _server = Server::redis(6379, None);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("scenario.yaml");
    let write = |exit: u8| {
        let text = format!(
            "seed: 1\ntargets: {{ redis: \"tcp:6379\" }}\nrules: [ \"redis reject\" ]\nexpect: {{ exit: {exit}, fired: [redis] }}\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    let go = |command: &[&str]| {
        let mut fault = fault();
        fault.args(["run", "-f"]).arg(&file).arg("--").args(command);
        fault.output().unwrap()
    };
    write(1);
    let output = go(&["redis-cli", "-p", "6379", "ping"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "an expected failure is a success: {output:?}"
    );
    write(3);
    let output = go(&["sh", "-c", "redis-cli -p 6379 ping; true"]);
    assert_eq!(output.status.code(), Some(121), "{output:?}");
    let check = fault().arg("check").arg(&file).output().unwrap();
    assert!(
        String::from_utf8_lossy(&check.stdout).contains("redis reject"),
        "{check:?}"
    );
    std::fs::write(&file, "rules: [ \"redis reject\" ]\n").unwrap();
    let check = fault().arg("check").arg(&file).output().unwrap();
    assert_eq!(check.status.code(), Some(2), "{check:?}");
    assert!(
        String::from_utf8_lossy(&check.stderr).contains("scenario.yaml:1:"),
        "{check:?}"
    );
}
