//! Rules change while traffic flows.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::echo::tcp_echo;
use crate::support::place::{PATIENCE, enter_fresh, fault, has_bash, hierarchy, ip};
use crate::support::watched::Watched;
use fault_user::inject::injection::{Injection, InjectionOptions};
use fault_user::inject::preparation::prepare;
use fault_user::plan::Plan;
use fault_user::rule::{Rule, SystemResolver, Targets};
use fault_user::session::subject::scope_of;
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::cgroup::{CommandCgroup, Leftovers, move_process};
use nix::unistd::Pid;

fn plan(texts: &[String]) -> Plan {
    let rules: Vec<_> = texts
        .iter()
        .map(|text| {
            let rule: Rule = text.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            (rule, resolved)
        })
        .collect();
    Plan::new(&rules, 1, None, None).unwrap()
}

fn start(plan: &Plan) -> Injection {
    let injection_options = InjectionOptions {
        live: true,
        ..InjectionOptions::default()
    };
    let devices = select(&list().unwrap(), &Selection::Default).unwrap();
    prepare(plan, &devices, &injection_options)
        .unwrap()
        .start()
        .unwrap()
}

/// By clsact there is one journal for each process: one test at a time.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A sender and a receiver on loopback, port 7000.
fn pair() -> (UdpSocket, UdpSocket) {
    let receiver = UdpSocket::bind("127.0.0.1:7000").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect("127.0.0.1:7000").unwrap();
    (sender, receiver)
}

#[test]
fn no_packet_sees_half_a_rule_set() {
    let _alone = alone();
    enter_fresh();
    let (sender, receiver) = pair();
    let small = ["udp:7000 drop".to_owned()];
    let mut large: Vec<String> = (1..200).map(|port| format!("udp:{port} drop")).collect();
    large.push("udp:1-8000 drop".to_owned());
    let mut current = plan(&large);
    let mut injection = start(&current);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sending = std::thread::spawn(move || {
        let mut sent = 0_u64;
        while !stopped.load(Ordering::Relaxed) {
            sender.send(b"lost").unwrap();
            sent += 1;
        }
        (sender, sent)
    });
    for turn in 0..200 {
        let mut next = plan(if turn % 2 == 0 { &small } else { &large });
        injection.replace(&current, &mut next).unwrap();
        current = next;
    }
    stop.store(true, Ordering::Relaxed);
    let (sender, sent) = sending.join().unwrap();
    injection.remove().unwrap();
    assert!(sent > 200, "{sent}");
    sender.send(b"over").unwrap();
    let mut bytes = [0; 4];
    assert_eq!(receiver.recv(&mut bytes).unwrap(), 4);
    assert_eq!(&bytes, b"over", "every packet before was lost");
}

#[test]
fn a_connection_outlives_many_rule_sets() {
    let _alone = alone();
    enter_fresh();
    let (sender, receiver) = pair();
    let mut current = plan(&["udp:7000 drop nth=1".to_owned()]);
    let mut injection = start(&current);
    for set in 1..40 {
        // The first packet that each new rule sees is lost, the second comes: the rule has its own count.
        sender.send(&[set, 1]).unwrap();
        sender.send(&[set, 2]).unwrap();
        let mut bytes = [0; 2];
        receiver.recv(&mut bytes).unwrap();
        assert_eq!(bytes, [set, 2]);
        let hits = injection.hits(&current).unwrap();
        assert_eq!(hits[0].stats.hit_packets, 1, "set {set}");
        assert_eq!(hits[0].connections, 1);
        let mut next = plan(&[format!(
            "udp:7000 drop nth=1 size=1..{}",
            1000 + u32::from(set)
        )]);
        injection.replace(&current, &mut next).unwrap();
        current = next;
    }
    injection.remove().unwrap();
}

#[test]
fn a_rule_that_stays_goes_on_counting() {
    let _alone = alone();
    enter_fresh();
    let (sender, _receiver) = pair();
    let stays = "udp:7000 loss=0%".to_owned();
    let mut current = plan(std::slice::from_ref(&stays));
    let mut injection = start(&current);
    for more in 0..5 {
        sender.send(b"seen").unwrap();
        let mut next = plan(&[format!("udp:{} drop", 8000 + more), stays.clone()]);
        injection.replace(&current, &mut next).unwrap();
        current = next;
    }
    assert_eq!(injection.hits(&current).unwrap()[1].stats.seen_packets, 5);
    injection.remove().unwrap();
}

/// How long `count` datagrams of 972 bytes (1,000 with their headers) take, from the first sent to the last received.
fn time_of(count: usize, (sender, receiver): &(UdpSocket, UdpSocket)) -> Duration {
    let began = Instant::now();
    for _ in 0..count {
        sender.send(&[0; 972]).unwrap();
    }
    let mut bytes = [0; 972];
    for _ in 0..count {
        receiver.recv(&mut bytes).unwrap();
    }
    began.elapsed()
}

#[test]
fn a_rate_and_slots_that_come_later_are_held() {
    let _alone = alone();
    enter_fresh();
    let pair = pair();
    let mut current = plan(&["udp:7000 delay=1ms".to_owned()]);
    let mut injection = start(&current);
    let mut turn_to = |rule: &str, count| {
        let mut next = plan(&[rule.to_owned()]);
        injection.replace(&current, &mut next).unwrap();
        current = next;
        time_of(count, &pair)
    };
    // 20 kB at 800 kbit/s are 200 ms; none of it goes at once.
    let took = turn_to("udp:7000 rate=800kbit", 20);
    assert!(took >= Duration::from_millis(200), "{took:?}");
    let took = turn_to("udp:7000 slot=150ms,150ms", 1);
    assert!(took >= Duration::from_millis(149), "{took:?}");
    let took = turn_to("udp:7000 rate=400kbit", 10);
    assert!(took >= Duration::from_millis(200), "{took:?}");
    injection.remove().unwrap();
}

#[test]
fn inject_follows_its_file() {
    let _alone = alone();
    enter_fresh();
    let (sender, receiver) = pair();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yaml");
    std::fs::write(&file, "rules: [\"udp:7000 drop\"]\n").unwrap();
    let mut inject = Watched::inject(&["--watch", "-f", file.to_str().unwrap()]);
    sender.send(b"lost").unwrap();
    std::fs::write(&file, "rules: [\"udp:7000 dorp\"]\n").unwrap();
    inject.until("the old rules stay applied");
    assert!(
        inject.stderr_text.contains("dorp"),
        "{}",
        inject.stderr_text
    );
    // What the start rejects.
    for (more, mistake) in [
        ("expect: {exit: 0}", "`expect`"),
        (
            "random: {choices: [\"tcp:1 down\"], length: 1s..2s, quiet: 1s..2s, total: 10s}",
            "randomly drawn",
        ),
    ] {
        std::fs::write(&file, format!("rules: [\"udp:7001 drop\"]\n{more}\n")).unwrap();
        inject.until("the old rules stay applied");
        let last = inject.stderr_text.lines().last().unwrap();
        assert!(last.contains(mistake), "{last}");
    }
    sender.send(b"lost").unwrap();
    std::fs::write(&file, "rules: [\"udp:7001 drop\", \"udp:7002 drop\"]\n").unwrap();
    inject.until("2 rules reloaded");
    sender.send(b"come").unwrap();
    let mut bytes = [0; 4];
    receiver.recv(&mut bytes).unwrap();
    assert_eq!(&bytes, b"come");
    let (code, stderr_text) = inject.end();
    assert_eq!(code, Some(0), "{stderr_text}");
    receiver
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    assert!(receiver.recv(&mut bytes).is_err(), "nothing else came");
}

/// After a line of input, prints the datagrams that come to port 7000, for the group 239.1.2.3 too, until the input ends.
const RECEIVER: &str = "\
import select, socket, sys
sys.stdin.readline()
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(('', 7000))
group = socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1')
receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
print('ready', flush=True)
while receiver in select.select([receiver, sys.stdin], [], [])[0]:
    print(receiver.recv(9).decode(), flush=True)
";

#[test]
fn datagrams_to_groups_are_judged_by_rules_that_come_later() {
    const PYTHON: &str = "/usr/bin/python3";
    if hierarchy().is_none() {
        return;
    }
    if !Path::new(PYTHON).exists() {
        eprintln!("skipped: there is no {PYTHON}");
        return;
    }
    let _alone = alone();
    enter_fresh();
    ip("route add 239.0.0.0/8 dev lo");
    let mut receiver = Command::new(PYTHON)
        .args(["-c", RECEIVER])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    let lines = BufReader::new(receiver.stdout.take().unwrap()).lines();
    let mut lines = lines.map(Result::unwrap);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yaml");
    let write = |rule: &str| std::fs::write(&file, format!("rules: [\"{rule}\"]\n")).unwrap();
    write("tcp:7000 drop");
    let pid = receiver.id().to_string();
    let words = ["--pid", &pid, "-f", file.to_str().unwrap(), "--watch"];
    let mut inject = Watched::inject(&words);
    writeln!(receiver.stdin.as_mut().unwrap()).unwrap();
    assert_eq!(lines.next().as_deref(), Some("ready"));
    write("udp:7000 drop  ");
    inject.until("reloaded");
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"lost", "239.1.2.3:7000").unwrap();
    write("tcp:7000 drop");
    inject.until("reloaded");
    sender.send_to(b"come", "239.1.2.3:7000").unwrap();
    assert_eq!(lines.next().as_deref(), Some("come"));
    assert_eq!(inject.end().0, Some(0));
    drop(receiver.stdin.take());
    assert!(receiver.wait().unwrap().success());
}

/// Connects to the echo on port 7000 after one line of input, and sends something after another.
const CLIENT: &str = "read go; exec 3<>/dev/tcp/127.0.0.1/7000; echo connected; \
                      read go; echo x >&3; read -u 3 answer; echo answered; read go";

#[test]
fn a_socket_made_after_the_open_ones_were_adopted_is_in_the_scope() {
    let Some(hierarchy) = hierarchy().filter(|_| has_bash()) else {
        return;
    };
    let _alone = alone();
    enter_fresh();
    tcp_echo(TcpListener::bind("127.0.0.1:7000").unwrap());
    let cgroup = CommandCgroup::create(&hierarchy, Leftovers::Kill).unwrap();
    let mut client = Command::new("bash")
        .args(["-c", CLIENT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(client.id().cast_signed());
    move_process(pid, cgroup.cgroup().path()).unwrap();
    let mut input = client.stdin.take().unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let mut go = |answer: &str| {
        writeln!(input).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), answer);
    };
    let scope = scope_of(cgroup.cgroup()).unwrap();
    // Only what arrives at the client is matched.
    let rule: Rule = "tcp:7000 loss=0% dir=to-client".parse().unwrap();
    let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
    let plan = Plan::new(&[(rule, resolved)], 1, Some(&scope), None).unwrap();
    let devices = select(&list().unwrap(), &Selection::Default).unwrap();
    let mut prepared = prepare(&plan, &devices, &InjectionOptions::default()).unwrap();
    prepared.watch(&scope).unwrap();
    prepared.adopt(cgroup.cgroup(), &scope).unwrap();
    go("connected");
    let injection = prepared.start().unwrap();
    go("answered");
    let hits = injection.hits(&plan).unwrap();
    injection.remove().unwrap();
    drop(input);
    client.wait().unwrap();
    cgroup.finish().unwrap();
    assert_ne!(hits[0].stats.seen_packets, 0);
}

/// What `fault top --json` shows of the only instance.
fn shown() -> serde_json::Value {
    let output = fault().args(["top", "--json"]).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn figures_never_fall_when_rules_are_replaced() {
    let _alone = alone();
    enter_fresh();
    let (sender, receiver) = pair();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yaml");
    let write = |rules: &str| {
        // One step, so that the file is never read half written.
        let next = folder.path().join("next.yaml");
        std::fs::write(&next, format!("rules: [{rules}]\n")).unwrap();
        std::fs::rename(&next, &file).unwrap();
    };
    let pass = |count: usize| {
        for _ in 0..count {
            sender.send(b"data").unwrap();
            receiver.recv(&mut [0; 8]).unwrap();
        }
    };
    write("\"udp:7000 loss=0%\"");
    let mut inject = Watched::inject(&["-f", file.to_str().unwrap(), "--watch"]);
    pass(5);
    let before = shown();
    let bytes = |shown: &serde_json::Value| shown[0]["targets"][0]["bytes"].as_u64().unwrap();
    let seen = |shown: &serde_json::Value| shown[0]["rules"][0]["seen"].as_u64().unwrap();
    let connections = |shown: &serde_json::Value| {
        ["rules", "targets"].map(|of| shown[0][of][0]["connections"].as_u64().unwrap())
    };
    assert_eq!(seen(&before), 5, "{before}");
    // Another rule for the target, then the first one again.
    write("\"udp:7000 drop nth=999\"");
    inject.until("reloaded");
    pass(3);
    let other = shown();
    assert_eq!(seen(&other), 3, "its own figures: {other}");
    assert_eq!(bytes(&other) * 5, bytes(&before) * 8, "{before} {other}");
    write("\"udp:7000 loss=0%\", \"udp:1 drop\"");
    inject.until("reloaded");
    pass(2);
    let again = shown();
    assert_eq!(seen(&again), 7, "the figures of the rule go on: {again}");
    assert_eq!(bytes(&again) * 5, bytes(&before) * 10, "{before} {again}");
    assert_eq!(connections(&again)[0], 1, "it is still open: {again}");
    assert_eq!(inject.end().0, Some(0));
}
