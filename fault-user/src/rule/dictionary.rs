//! Words of other tools and of everyday speech, each with what a rule calls it. Only errors read them.

/// A word, and what to write instead.
type Hint = (&'static str, &'static str);

/// Names of faults.
pub(super) const FAULTS: &[Hint] = &[
    ("kill", "reset"),
    ("disconnect", "reset"),
    ("rst", "reset"),
    ("throttle", "bandwidth"),
    ("bw", "rate"),
    ("shape", "rate"),
    ("partition", "blackhole"),
    ("netsplit", "blackhole"),
    ("isolate", "blackhole"),
    ("block", "blackhole"),
    ("refuse", "reject"),
    ("deny", "reject"),
    ("outage", "down"),
    ("offline", "down"),
    ("unavailable", "down"),
    ("hang", "stall"),
    ("freeze", "stall"),
    ("pause", "stall"),
    ("lag", "delay"),
    ("slow", "latency"),
    ("packet_loss", "loss"),
    ("packetloss", "loss"),
    ("shuffle", "reorder"),
    ("mangle", "corrupt"),
    ("fail", "error"),
    ("http_delay", "latency"),
    ("fixed_delay", "latency"),
    ("fixedDelay", "latency"),
    ("replace", "substitute"),
    ("network_delay", "delay"),
    ("networkdelay", "delay"),
    ("network_loss", "loss"),
    ("networkloss", "loss"),
    ("network_corrupt", "corrupt"),
    ("network_duplicate", "duplicate"),
    ("network_partition", "blackhole"),
    ("network_bandwidth", "rate"),
    ("ratelimit", "rate"),
    ("rate_limit", "rate"),
    ("speed", "rate"),
    ("mss", "mtu"),
    ("disable", "down"),
    ("enabled", "down"),
    ("stop", "down"),
    ("crash", "down"),
    ("restart", "down for=5s"),
    ("fin", "slow_close=200ms"),
];

/// Faults on streams, and the one that does so to queries of DNS.
pub(super) const DNS_FAULTS: &[Hint] = &[
    ("error", "servfail"),
    ("fail", "servfail"),
    ("random", "servfail"),
    ("latency", "delay"),
    ("timeout", "blackhole"),
    ("redirect", "answer"),
    ("a", "answer"),
    ("aaaa", "answer"),
];

/// Words that introduce the name of a fault: `action=delay`, `toxic=latency`.
pub(super) const INTRODUCTIONS: &[&str] = &["fault", "action", "toxic", "type", "effect", "chaos"];

/// What stands in front of a port elsewhere, and the protocol that carries it.
pub(super) const OVER: &[Hint] = &[
    ("http", "tcp"),
    ("https", "tcp"),
    ("http2", "tcp"),
    ("h2", "tcp"),
    ("tls", "tcp"),
    ("ssl", "tcp"),
    ("ws", "tcp"),
    ("wss", "tcp"),
    ("grpc", "tcp"),
    ("http3", "udp"),
    ("h3", "udp"),
    ("quic", "udp"),
    ("dtls", "udp"),
    ("ip", "any"),
];

/// Faults that need an argument, each with one.
pub(super) const EXAMPLES: &[Hint] = &[
    ("loss", "loss=10%"),
    ("delay", "delay=200ms"),
    ("duplicate", "duplicate=10%"),
    ("corrupt", "corrupt=5%"),
    ("reorder", "reorder=25%"),
    ("ecn", "ecn=20%"),
    ("rate", "rate=10mbit"),
    ("slot", "slot=10ms,50ms"),
    ("mtu", "mtu=1400"),
    ("profile", "profile=lte"),
    ("answer", "answer=10.0.0.9"),
    ("error", "error=http:503"),
    ("coalesce", "coalesce=4KiB,20ms"),
    ("substitute", "substitute=old,new"),
];

/// Values of arguments that are words: what `reject` answers, how delays are distributed.
pub(super) const WORDS: &[Hint] = &[
    ("tcp-reset", "rst"),
    ("reset", "rst"),
    ("icmp-port-unreachable", "icmp-port"),
    ("icmp-host-unreachable", "icmp-host"),
    ("icmp-net-unreachable", "icmp-host"),
    ("icmp-admin-prohibited", "icmp-admin"),
    ("gaussian", "normal"),
    ("gauss", "normal"),
];

/// Faults with an argument that is another fault's; `{}` stands for it.
pub(super) const FORMS: &[Hint] = &[
    ("drop", "loss={}"),
    ("blackhole", "loss={}"),
    ("jitter", "delay={}~{}"),
    ("http", "error=http:{}"),
    ("status", "error=http:{}"),
    ("abort", "error=http:{}"),
    ("httpStatus", "error=http:{}"),
    ("http_status", "error=http:{}"),
    ("code", "error=http:{}"),
];

/// Link profiles.
pub(super) const PROFILES: &[Hint] = &[
    ("2g", "edge"),
    ("4g", "lte"),
    ("mobile", "lte"),
    ("wifi", "wifi-lossy"),
    ("adsl", "dsl"),
];

/// Names of modifiers.
pub(super) const MODIFIERS: &[Hint] = &[
    ("chance", "p"),
    ("prob", "p"),
    ("percent", "p"),
    ("percentage", "p"),
    ("share", "p"),
    ("max", "first"),
    ("once", "first=1"),
    ("twice", "first=2"),
    ("tcp_flags", "match"),
    ("flag", "match"),
    ("state", "match=syn"),
    ("ctstate", "match=syn"),
    ("duration", "for"),
    ("during", "for"),
    ("start", "at"),
    ("skip", "after"),
    ("interval", "period"),
    ("connection", "conn"),
    ("until", "for"),
    ("times", "first"),
    ("limit", "first"),
    ("toxicity", "p"),
    ("stream", "dir"),
    ("flags", "match"),
    ("distribution", "dist"),
    ("repeat", "period"),
    ("gemodel", "loss=ge(1%,10%)"),
];

/// What stands elsewhere than behind the fault: the words for it, and where it stands.
pub(super) const ELSEWHERE: &[(&[&str], &str)] = &[
    (
        &[
            "src",
            "source",
            "saddr",
            "from",
            "dst",
            "destination",
            "daddr",
            "to",
            "ip",
            "address",
            "addr",
            "cidr",
            "remote",
        ],
        "the address in the target, such as `tcp:10.0.0.5:80 drop`",
    ),
    (
        &["port", "ports", "dport", "sport"],
        "the port in the target, such as `tcp:80 drop`",
    ),
    (
        &["proto", "protocol"],
        "the protocol in the target, such as `udp:53 drop`",
    ),
    (
        &["target", "selector", "name"],
        "the target in front of the fault; `--target NAME=TARGET` gives it a name",
    ),
    (&["seed"], "the option `--seed 42` for all rules"),
    (
        &["container", "pod"],
        "the option `--container NAME` for all rules",
    ),
    (
        &["pid", "process", "uid", "user", "owner"],
        "the option `--pid PID` or `--cgroup DIR` for all rules",
    ),
    (
        &["interface", "iface", "dev", "device"],
        "the option `-i NAME` for all rules",
    ),
    (
        &[
            "path", "url", "uri", "method", "route", "endpoint", "header",
        ],
        "`error=http:503,query:/api`, the only fault that selects requests by their text",
    ),
    (
        &["cron", "schedule"],
        "a period and the length of each repetition, such as `period=1m for=5s`",
    ),
];

/// Modifiers that count packets, and the one that takes a time in their place.
pub(super) const TIMES: &[Hint] = &[
    ("every", "period"),
    ("first", "for"),
    ("after", "at"),
    ("nth", "at"),
];

/// Values of `dir`. Incoming and outgoing are as a client sees them.
pub(super) const DIRECTIONS: &[Hint] = &[
    ("in", "to-client"),
    ("input", "to-client"),
    ("ingress", "to-client"),
    ("inbound", "to-client"),
    ("incoming", "to-client"),
    ("rx", "to-client"),
    ("out", "to-server"),
    ("output", "to-server"),
    ("egress", "to-server"),
    ("outbound", "to-server"),
    ("outgoing", "to-server"),
    ("tx", "to-server"),
    ("up", "to-server"),
    ("upstream", "to-server"),
    ("request", "to-server"),
    ("server", "to-server"),
    ("down", "to-client"),
    ("downstream", "to-client"),
    ("response", "to-client"),
    ("reply", "to-client"),
    ("client", "to-client"),
];

/// Units of time.
pub(super) const TIME_UNITS: &[Hint] = &[
    ("sec", "s"),
    ("secs", "s"),
    ("second", "s"),
    ("seconds", "s"),
    ("msec", "ms"),
    ("msecs", "ms"),
    ("millis", "ms"),
    ("millisecond", "ms"),
    ("milliseconds", "ms"),
    ("usec", "us"),
    ("mins", "m"),
    ("minute", "m"),
    ("minutes", "m"),
    ("hr", "h"),
    ("hour", "h"),
    ("hours", "h"),
];

/// Units of size.
pub(super) const SIZE_UNITS: &[Hint] = &[
    ("k", "kB"),
    ("m", "MB"),
    ("g", "GB"),
    ("ki", "KiB"),
    ("mi", "MiB"),
    ("gi", "GiB"),
    ("byte", ""),
    ("bytes", ""),
];

/// Fields of scenario files.
pub(super) const FIELDS: &[Hint] = &[
    ("faults", "rules"),
    ("toxics", "rules"),
    ("experiments", "rules"),
    ("duration", "for"),
    ("length", "for"),
    ("timeout", "for"),
    ("exit_code", "exit"),
    ("exitcode", "exit"),
    ("probes", "probe"),
    ("health", "probe"),
    ("assert", "expect"),
    ("expectations", "expect"),
];

/// Well-known services and their ports: the names of the IANA registry, and those that people use.
const SERVICES: &[Hint] = &[
    ("all", "*"),
    ("everything", "*"),
    ("http", "tcp:80"),
    ("https", "tcp:443"),
    ("http-alt", "tcp:8080"),
    ("ssh", "tcp:22"),
    ("ftp", "tcp:21"),
    ("telnet", "tcp:23"),
    ("smtp", "tcp:25"),
    ("smtps", "tcp:465"),
    ("submission", "tcp:587"),
    ("pop3", "tcp:110"),
    ("imap", "tcp:143"),
    ("imaps", "tcp:993"),
    ("dns", "udp:53"),
    ("domain", "udp:53"),
    ("ntp", "udp:123"),
    ("snmp", "udp:161"),
    ("syslog", "udp:514"),
    ("statsd", "udp:8125"),
    ("ldap", "tcp:389"),
    ("ldaps", "tcp:636"),
    ("postgres", "tcp:5432"),
    ("postgresql", "tcp:5432"),
    ("pg", "tcp:5432"),
    ("mysql", "tcp:3306"),
    ("mariadb", "tcp:3306"),
    ("mssql", "tcp:1433"),
    ("sqlserver", "tcp:1433"),
    ("oracle", "tcp:1521"),
    ("redis", "tcp:6379"),
    ("rediss", "tcp:6379"),
    ("valkey", "tcp:6379"),
    ("memcached", "tcp:11211"),
    ("memcache", "tcp:11211"),
    ("mongo", "tcp:27017"),
    ("mongodb", "tcp:27017"),
    ("cassandra", "tcp:9042"),
    ("clickhouse", "tcp:9000"),
    ("elasticsearch", "tcp:9200"),
    ("opensearch", "tcp:9200"),
    ("influxdb", "tcp:8086"),
    ("kafka", "tcp:9092"),
    ("zookeeper", "tcp:2181"),
    ("nats", "tcp:4222"),
    ("amqp", "tcp:5672"),
    ("amqps", "tcp:5671"),
    ("rabbitmq", "tcp:5672"),
    ("mqtt", "tcp:1883"),
    ("etcd", "tcp:2379"),
    ("consul", "tcp:8500"),
    ("vault", "tcp:8200"),
    ("prometheus", "tcp:9090"),
    ("grpc", "tcp:50051"),
];

/// What a table says of a word; upper and lower case, `-` and `_` are the same.
pub(super) fn look_up(table: &[Hint], word: &str) -> Option<&'static str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace('-', "_");
    let word = plain(word);
    let (_, meant) = table.iter().find(|(wrong, _)| plain(wrong) == word)?;
    Some(meant)
}

/// The port of a well-known service.
pub(super) fn service_port(name: &str) -> Option<&'static str> {
    let (_, port) = service(name)?.split_once(':')?;
    Some(port)
}

/// The well-known services with a port, each port once, and that port as a target.
pub(super) fn ports() -> impl Iterator<Item = (&'static str, &'static str)> {
    let is_port = |(_, target): &&Hint| target.contains(':');
    let all = SERVICES.iter().enumerate();
    let first =
        |(at, (_, target)): &(usize, &Hint)| SERVICES[..*at].iter().all(|one| one.1 != *target);
    all.filter(first)
        .map(|(_, hint)| hint)
        .filter(is_port)
        .copied()
}

/// The usual target of a well-known service, such as `tcp:80`, or of all traffic.
pub(super) fn service(name: &str) -> Option<&'static str> {
    look_up(SERVICES, name)
}

/// The unit of a rate that is meant by a word, such as `mbit` by `Mbps` and `MB/s` by `MBps`.
pub(super) fn rate_unit(word: &str) -> Option<String> {
    let has_prefix = word.starts_with(|c: char| "kKmMgGtT".contains(c));
    let (prefix, unit) = word.split_at(usize::from(has_prefix));
    match unit {
        "" | "b" | "bps" | "BPS" | "b/s" | "bits" | "bits/s" if !word.is_empty() => {
            Some(format!("{}bit", prefix.to_lowercase()))
        }
        "B" | "Bps" | "B/s" | "byte/s" | "bytes/s" | "bytes" => Some(match prefix {
            "k" | "K" => "kB/s".to_owned(),
            _ => format!("{}B/s", prefix.to_uppercase()),
        }),
        "iB" | "iBps" => Some(format!("{}iB/s", prefix.to_uppercase())),
        _ => None,
    }
}

/// Whether a name is one of those that Linux gives to network interfaces.
pub(super) fn is_interface(name: &str) -> bool {
    let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
    name == "lo"
        || name.starts_with("enp")
        || kind != name
            && ["eth", "ens", "eno", "wlan", "docker", "veth", "tun", "wg"].contains(&kind)
}

/// The text with a point for the first comma between two digits.
pub(super) fn decimal_point(text: &str) -> Option<String> {
    let digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    let bytes = text.as_bytes();
    let at = (1..bytes.len())
        .find(|&at| bytes[at] == b',' && digit(bytes.get(at - 1)) && digit(bytes.get(at + 1)))?;
    Some(format!("{}.{}", &text[..at], &text[at + 1..]))
}
