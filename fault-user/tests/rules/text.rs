//! The one-line form: what the specification shows is read, and prints as its canonical text.

use fault_user::rule::{Profiles, Rule, Targets};

/// Rules as people write them, and their canonical text.
const RULES: &[(&str, &str)] = &[
    ("tcp:5432 loss=30%", ""),
    ("udp:53 drop first=2 dir=to-client", ""),
    ("tcp:6379 delay=200ms~50ms", ""),
    ("mysql down at=2s for=5s", ""),
    ("10.0.0.0/8:443 blackhole", ""),
    ("tcp:80 mix 10%:timeout 20%:latency=1s", ""),
    ("[::1]:8080 corrupt=5% dir=to-client", ""),
    ("tcp:!22 drop", ""),
    ("*,!10.0.0.0/8,!22 drop", ""),
    ("tcp:!22,!!80 drop", "error"),
    ("!dn,!!\u{514} drop", "error"),
    (
        "tcp:80 slicer=average_size:64,delay:10ms",
        "tcp:80 slicer=64,delay:10ms",
    ),
    (
        "tcp:80 delay=200ms~50ms dist=normal corr=25% keep-order",
        "tcp:80 delay=200ms~50ms,dist:normal,corr:25%,keep-order",
    ),
];

#[test]
fn examples() {
    for (text, canonical) in RULES {
        if *canonical == "error" {
            assert!(text.parse::<Rule>().is_err(), "{text}");
            continue;
        }
        let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
        let canonical = if canonical.is_empty() {
            text
        } else {
            canonical
        };
        assert_eq!(rule.to_string(), *canonical);
        assert_eq!(rule.to_string().parse(), Ok(rule), "{text}");
    }
}

/// Mistakes that people make, and what the error names.
const MISTAKES: &[(&str, &str)] = &[
    // Targets.
    ("::1:5432 drop", "did you mean `[::1]:5432`?"),
    ("tcp:::1:5432 drop", "did you mean `[::1]:5432`?"),
    ("[::1:5432] drop", "did you mean `[::1]:5432`?"),
    ("tcp:[::1:5432] drop", "did you mean `[::1]:5432`?"),
    (
        "fe80::1:80 drop",
        "`[fe80::1:80]` if all of it is the address; did you mean `[fe80::1]:80`?",
    ),
    ("2001:db8::1 drop", "did you mean `[2001:db8::1]`?"),
    ("tcp/5432 loss=1%", "did you mean `tcp:5432`?"),
    ("TCP/5432 loss=1%", "did you mean `tcp:5432`?"),
    ("5432/tcp loss=1%", "did you mean `tcp:5432`?"),
    ("53/udp loss=1%", "did you mean `udp:53`?"),
    ("tcp=5432 loss=1%", "did you mean `tcp:5432`?"),
    ("port=5432 loss=1%", "did you mean `5432`?"),
    (":5432 loss=1%", "did you mean `5432`?"),
    ("tcp::5432 loss=1%", "did you mean `tcp:5432`?"),
    ("*:5432 loss=1%", "did you mean `5432`?"),
    ("tcp:*:5432 loss=1%", "did you mean `tcp:5432`?"),
    ("TCP:5432 loss=1%", "did you mean `tcp`?"),
    (
        "tcp://h.example:1 loss=1%",
        "did you mean `tcp:h.example:1`?",
    ),
    ("tcp://h:1 loss=1%", "did you mean `tcp:h:1`?"),
    (
        "https://api.example.com/v1?q loss=1%",
        "did you mean `tcp:api.example.com:443`?",
    ),
    (
        "http://localhost:8080 loss=1%",
        "did you mean `tcp:localhost:8080`?",
    ),
    (
        "http://[::1]:8080/ loss=1%",
        "did you mean `tcp:[::1]:8080`?",
    ),
    (
        "postgres://me:secret@db.example/app loss=1%",
        "did you mean `tcp:db.example:5432`?",
    ),
    ("localhost:postgres loss=1%", "did you mean `5432`?"),
    ("tcp:443,https loss=1%", "did you mean `443`?"),
    ("tcp 5432 loss=1%", "did you mean `tcp:5432`?"),
    ("localhost 5432 loss=1%", "did you mean `localhost:5432`?"),
    ("tcp:80 443 loss=1%", "did you mean `tcp:80,443`?"),
    // The order of words.
    ("loss=30% tcp:5432", "did you mean `tcp:5432 loss=30%`?"),
    ("drop tcp:5432 first=2", "did you mean `tcp:5432 drop`?"),
    ("loss=30%", "the target is missing"),
    ("tcp:5432", "the fault is missing"),
    ("tcp:5432 30%", "did you mean `loss=30%`?"),
    ("tcp:5432 200ms", "did you mean `delay=200ms`?"),
    ("tcp:5432 10mbit", "did you mean `rate=10mbit`?"),
    // Faults.
    ("tcp:5432 kill", "did you mean `reset`?"),
    ("tcp:5432 throttle=1mbit", "did you mean `bandwidth=1mbit`?"),
    ("tcp:5432 throttle", "did you mean `bandwidth`?"),
    ("tcp:5432 partition", "did you mean `blackhole`?"),
    ("tcp:5432 packet-loss=3%", "did you mean `loss=3%`?"),
    ("tcp:5432 LOSS=3%", "did you mean `loss`?"),
    ("tcp:5432 Lag=3ms", "did you mean `delay=3ms`?"),
    ("tcp:5432 delay 200ms", "did you mean `delay=200ms`?"),
    ("tcp:5432 delay =200ms", "did you mean `delay=200ms`?"),
    ("tcp:5432 delay:200ms", "did you mean `delay=200ms`?"),
    ("tcp:5432 delay(200ms)", "did you mean `delay=200ms`?"),
    (
        "tcp:5432 delay=200ms 20ms",
        "did you mean `delay=200ms~20ms`?",
    ),
    (
        "tcp:5432 delay=200ms,20ms",
        "did you mean `delay=200ms~20ms`?",
    ),
    ("tcp:5432 latency 1s", "did you mean `latency=1s`?"),
    (
        "tcp:5432 loss 30% dir=to-client",
        "did you mean `loss=30%`?",
    ),
    ("tcp:80 error=503", "did you mean `error=http:503`?"),
    ("tcp:80 error 503", "did you mean `error=http:503`?"),
    ("tcp:80 error:503", "did you mean `error=http:503`?"),
    // Numbers and units.
    ("tcp:5432 delay=200", "did you mean `delay=200ms`?"),
    ("tcp:5432 latency=200", "did you mean `latency=200ms`?"),
    ("tcp:5432 latency=1sec", "unknown unit `sec`"),
    ("tcp:5432 latency=1sec", "did you mean `s`?"),
    ("tcp:5432 delay=1second", "did you mean `s`?"),
    ("tcp:5432 delay=200MS", "did you mean `ms`?"),
    ("tcp:5432 delay=200msec", "did you mean `ms`?"),
    ("tcp:5432 loss=30", "did you mean `30%`?"),
    ("tcp:5432 loss=0,5", "did you mean `loss=0.5`?"),
    ("tcp:5432 loss=0,5%", "did you mean `loss=0.5%`?"),
    ("tcp:5432 delay=1,5s", "did you mean `delay=1.5s`?"),
    ("tcp:5432 drop p=0,5", "did you mean `0.5`?"),
    ("tcp:5432 drop at=1,5s", "did you mean `1.5s`?"),
    ("tcp:5432 rate=1Mbps", "did you mean `mbit`?"),
    ("tcp:5432 rate=1mbps", "did you mean `mbit`?"),
    ("tcp:5432 rate=1MBPS", "did you mean `mbit`?"),
    ("tcp:5432 rate=1Mb/s", "did you mean `mbit`?"),
    ("tcp:5432 rate=1Mb", "did you mean `mbit`?"),
    ("tcp:5432 rate=1M", "did you mean `mbit`?"),
    ("tcp:5432 rate=1MBps", "did you mean `MB/s`?"),
    ("tcp:5432 rate=1MB", "did you mean `MB/s`?"),
    ("tcp:5432 rate=1KB/s", "did you mean `kB/s`?"),
    ("tcp:5432 rate=1kbps", "did you mean `kbit`?"),
    ("tcp:5432 rate=1Gbps", "did you mean `gbit`?"),
    ("tcp:5432 bandwidth=100Kbps", "did you mean `kbit`?"),
    ("tcp:5432 reset=1K", "did you mean `kB`?"),
    // Modifiers.
    ("tcp:5432 drop every=10s", "did you mean `period=10s`?"),
    ("tcp:5432 drop first=10s", "did you mean `for=10s`?"),
    ("tcp:5432 drop after=2s", "did you mean `at=2s`?"),
    ("tcp:5432 drop duration=2s", "did you mean `for`?"),
    ("tcp:5432 drop chance=2%", "did you mean `p`?"),
    ("tcp:5432 drop dir=upstream", "did you mean `to-server`?"),
    ("tcp:5432 drop dir=down", "did you mean `to-client`?"),
    ("tcp:5432 drop FOR=2s", "did you mean `for`?"),
    // Words and signs of other tools, each with what stands for it.
    ("tcp:5432 drop nth=1,2", "did you mean `range=1..2`?"),
    ("tcp:5432 drop nth=3-7", "did you mean `range=3..7`?"),
    (
        "tcp:5432 drop nth=3,7",
        "`nth` takes no list (at 15 of `tcp:5432 drop nth=3,7`): expected a rule for each: `nth=3`, `nth=7`",
    ),
    ("tcp:5432 drop conn=0-3", "did you mean `conn=1..3`?"),
    ("tcp:5432 drop count=0", "expected connection or rule"),
    ("tcp:5432 p=x drop", "besides, `x` is not a number"),
    // What those who know other tools type.
    (
        "tcp:80 toxicity=0.5 latency=200ms",
        "did you mean `latency=200ms`?",
    ),
    ("tcp:80 latency=200ms toxicity=0.5", "did you mean `p`?"),
    (
        "tcp:80 latency=1000,jitter=50",
        "did you mean `latency=1000ms,jitter:50ms`?",
    ),
    (
        "tcp:80 latency=200ms upstream",
        "did you mean `dir=to-server`?",
    ),
    (
        "tcp:80 latency=200ms stream=downstream",
        "did you mean `dir`?",
    ),
    (
        "tcp:80 bandwidth=1000",
        "did you mean `bandwidth=1000kB/s`?",
    ),
    (
        "tcp:80 bandwidth rate=1000",
        "did you mean `rate=1000kB/s`?",
    ),
    ("tcp:80 netem delay 100ms", "did you mean `delay=100ms`?"),
    ("tcp:80 tbf rate 1mbit", "did you mean `rate=1mbit`?"),
    ("tcp:80 -j REJECT", "did you mean `reject`?"),
    ("tcp:80 rate 1m", "did you mean `rate=1mbit`?"),
    ("tcp:80 delay=50ms..10ms", "did you mean `delay=30ms~20ms`?"),
    ("tcp:80 delay time=3000", "did you mean `delay=3000ms`?"),
    (
        "tcp:80 loss gemodel 1% 10%",
        "did you mean `loss=ge(1%,10%)`?",
    ),
    ("* wifi", "did you mean `profile=wifi-lossy`?"),
    ("pod/web drop", "`* drop` with the option `--container web`"),
    (
        "container:web drop",
        "`* drop` with the option `--container web`",
    ),
    ("tcp:80 drop repeat=30s", "did you mean `period`?"),
    ("tcp:80 -> drop", "did you mean `drop`?"),
    ("tcp:80 loss random 10%", "did you mean `loss=10%`?"),
    (
        "tcp:80 delay=100ms~10ms 25%",
        "did you mean `delay=100ms~10ms,corr:25%`?",
    ),
    (
        "tcp:80 delay=9ms~1ms distribution normal",
        "did you mean `dist`?",
    ),
    ("tcp:80 delay --time 3000", "did you mean `delay=3000ms`?"),
    ("tcp:80 latency = 200ms", "did you mean `latency=200ms`?"),
    ("tcp:80 latency=.2s", "did you mean `0.2s`?"),
    ("tcp:80 loss", "did you mean `loss=10%`?"),
    ("tcp:80 duplicate", "did you mean `duplicate=10%`?"),
    ("tcp:80 reject=tcp-reset", "did you mean `rst`?"),
    (
        "tcp:80 reject=icmp-port-unreachable",
        "did you mean `icmp-port`?",
    ),
    ("tcp:80 drop flags=syn", "did you mean `match`?"),
    ("tcp:80 drop dir=INPUT", "did you mean `to-client`?"),
    ("tcp:80 drop every=10%", "did you mean `p=10%`?"),
    ("tcp:80 drop 5s", "did you mean `for=5s`?"),
    ("tcp:80 down=5s", "did you mean `down for=5s`?"),
    ("tcp:80 drop 3", "did you mean `first=3`?"),
    ("tcp:80 abort=true", "did you mean `abort`?"),
    ("tcp:80 error=404,http", "did you mean `error=http:404`?"),
    ("tcp:80 fault=abort", "did you mean `abort`?"),
    ("tcp:80 3g", "did you mean `profile=3g`?"),
    ("3g", "did you mean `* profile=3g`?"),
    ("port 80 drop", "did you mean `80`?"),
    ("tcp dport 80 drop", "did you mean `tcp:80`?"),
    ("dev eth0 loss=1%", "`* loss=1%` with the option `-i eth0`"),
    ("tcp:80:90 drop", "did you mean `tcp:80-90`?"),
    ("tcp:80;443 drop", "did you mean `tcp:80,443`?"),
    ("tcp:80, 443 drop", "did you mean `tcp:80,443`?"),
    ("tcp:80: drop", "did you mean `tcp:80`?"),
    ("tcp:80/api drop", "did you mean `tcp:80`?"),
    ("service/web:80 drop", "did you mean `web:80`?"),
    ("\"tcp:80 drop\"", "did you mean `tcp:80 drop`?"),
    (
        "tcp:80 drop, udp:53 drop",
        "each by itself: -r 'tcp:80 drop' -r 'udp:53 drop'",
    ),
    (
        "tcp:80 drop && udp:53 drop",
        "each by itself: -r 'tcp:80 drop' -r 'udp:53 drop'",
    ),
    ("tcp:80 udp:53 drop", "a rule for each target"),
    ("tcp:80 drop udp:53", "a rule for each target"),
    ("tcp:5432 drop range=1-3", "did you mean `range=1..3`?"),
    ("tcp:5432 slow=200ms", "did you mean `latency=200ms`?"),
    ("tcp:5432 refuse", "did you mean `reject`?"),
    ("tcp:5432 jitter=20ms", "did you mean `delay=20ms~20ms`?"),
    (
        "tcp:5432 delay=200ms±50ms",
        "did you mean `delay=200ms~50ms`?",
    ),
    (
        "tcp:5432 delay=200ms+-50ms",
        "did you mean `delay=200ms~50ms`?",
    ),
    (
        "tcp:5432 delay=200ms+/-50ms",
        "did you mean `delay=200ms~50ms`?",
    ),
    (
        "tcp:5432 delay=100ms..200ms",
        "did you mean `delay=150ms~50ms`?",
    ),
    (
        "tcp:5432 delay=100-200ms",
        "did you mean `delay=150ms~50ms`?",
    ),
    (
        "tcp:5432 latency=100ms-200ms",
        "did you mean `latency=150ms~50ms`?",
    ),
    ("tcp:5432 drop 10%", "did you mean `loss=10%`?"),
    ("tcp:5432 drop=10%", "did you mean `loss=10%`?"),
    ("tcp:80 http=503", "did you mean `error=http:503`?"),
    ("tcp:80 abort=503", "did you mean `error=http:503`?"),
    ("tcp:80 error=http,503", "did you mean `error=http:503`?"),
    ("tcp:80 drop at=5", "did you mean `at=5s`?"),
    ("tcp:80 drop for=1.5", "did you mean `for=1.5s`?"),
    (
        "tcp:80 delay=200ms jitter=50",
        "did you mean `jitter=50ms`?",
    ),
    (
        "tcp:80 delay=200ms,jitter:50",
        "did you mean `delay=200ms,jitter:50ms`?",
    ),
    ("tcp:80 drop until=5s", "did you mean `for`?"),
    ("tcp:80 drop times=5", "did you mean `first`?"),
    ("tcp:80 drop count=5", "did you mean `first=5`?"),
    ("tcp:80 drop dir=in", "did you mean `to-client`?"),
    ("tcp:80 drop dir=egress", "did you mean `to-server`?"),
    ("tcp:80..90 drop", "did you mean `tcp:80-90`?"),
    ("tcp:80,drop", "did you mean `tcp:80 drop`?"),
    ("tcp:80=drop", "did you mean `tcp:80 drop`?"),
    ("tcp:80,loss=3% first=2", "did you mean `tcp:80 loss=3%`?"),
    (r#""tcp:80" drop"#, "did you mean `tcp:80`?"),
    ("dns:nxdomain", "did you mean `dns nxdomain`?"),
    ("tcp:80 p=10% drop", "did you mean `drop p=10%`?"),
    (
        "tcp:80 size=100 first=2 drop",
        "did you mean `drop size=100 first=2`?",
    ),
    (
        "tcp:80 mix 10%:timeout,20%:latency=1s",
        "did you mean `10%:timeout 20%:latency=1s`?",
    ),
];

#[test]
fn a_mistake_is_reported_with_the_correction() {
    let mut wrong = Vec::new();
    for (text, part) in MISTAKES {
        let line = match text.parse::<Rule>() {
            Ok(rule) => format!("it is read as `{rule}`"),
            Err(error) => error.one_line(),
        };
        if !line.contains(part) || line.contains('\n') {
            wrong.push(format!("{text}: {line}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What can be a target's name or a host's is only a mistake when nothing of that name is there.
#[test]
fn a_service_name_suggests_its_port() {
    for (text, part) in [
        ("https loss=1%", "did you mean `tcp:443`?"),
        ("all loss=1%", "did you mean `*`?"),
        ("eth0 loss=1%", "`* …` with the option `-i eth0`"),
        ("redis loss=1%", "did you mean `tcp:6379`?"),
        ("tcp:postgres loss=1%", "did you mean `tcp:5432`?"),
        ("tcp:https loss=1%", "did you mean `tcp:443`?"),
        ("udp:dns loss=1%", "did you mean `udp:53`?"),
    ] {
        let rule: Rule = text.parse().unwrap();
        let mut nothing = |_: &str| Err(std::io::Error::other("no such host"));
        let error = rule.resolve(&Targets::new(), &mut nothing).unwrap_err();
        let line = error.one_line();
        assert!(line.contains(part), "{text}: {line}");
    }
    let rule: Rule = "tcp:80 profile=4g".parse().unwrap();
    let error = rule.expanded(&Profiles::new()).unwrap_err();
    assert_eq!(error.suggestion.as_deref(), Some("profile=lte"));
    let rule: Rule = "tcp:postgres loss=1%".parse().unwrap();
    let mut there = |_: &str| Ok(vec!["192.0.2.1".parse().unwrap()]);
    assert!(rule.resolve(&Targets::new(), &mut there).is_ok());
}
