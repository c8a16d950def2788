//! What a person most probably means by a word that the language does not have.
//!
//! The tables name words of other tools and of everyday speech, each with what a rule calls it. Only errors read them: a rule
//! that can be read is never changed, and a whole fault or target is only suggested when it can be read.

use std::str::FromStr as _;

use super::error::{Piece, RuleError};
use super::target::{self, Protocol, looks_like_ports};
use super::{Fault, catalog, units};

/// A word, and what to write instead.
type Hint = (&'static str, &'static str);

/// Names of faults.
const FAULTS: &[Hint] = &[
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
];

/// Names of modifiers.
pub(super) const MODIFIERS: &[Hint] = &[
    ("chance", "p"),
    ("prob", "p"),
    ("percent", "p"),
    ("duration", "for"),
    ("during", "for"),
    ("start", "at"),
    ("skip", "after"),
    ("interval", "period"),
    ("connection", "conn"),
];

/// Modifiers that count packets, and the one that takes a time in their place.
const TIMES: &[Hint] = &[
    ("every", "period"),
    ("first", "for"),
    ("after", "at"),
    ("nth", "at"),
];

/// Values of `dir`.
const DIRECTIONS: &[Hint] = &[
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

/// Well-known services and their ports: the names of the IANA registry, and those that people use.
const SERVICES: &[Hint] = &[
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
    let (_, port) = look_up(SERVICES, name)?.split_once(':')?;
    Some(port)
}

/// The target that is meant by the name of a service, with the protocol that was given.
pub(super) fn service(name: &str, protocol: Protocol) -> Option<String> {
    match protocol {
        Protocol::Any => look_up(SERVICES, name).map(str::to_owned),
        Protocol::Icmp => None,
        _ => service_port(name).map(|port| format!("{protocol}:{port}")),
    }
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

/// The error for a fault that can't be read, with the whole fault as it is meant where that is clear.
pub(super) fn fault(word: Piece<'_>, error: RuleError) -> RuleError {
    let text = word.text();
    if let Some(meant) = decimal_point(text).filter(|meant| reads(meant)) {
        return word
            .error("a number has a decimal point and no comma")
            .suggest(meant);
    }
    if error.suggestion.is_some() {
        return error;
    }
    let name = text.split(['=', ':', '(']).next().unwrap_or(text);
    let rest = &text[name.len()..];
    let value = rest.trim_start_matches(['=', ':', '(']);
    let mut candidates = vec![
        format!("{name}={value}"),
        format!("{name}={}", value.trim_end_matches(')')),
        with_status(name, value),
        format!("{text}ms"),
        text.replacen(',', "~", 1),
        format!("loss={text}"),
        format!("delay={text}"),
        format!("rate={text}"),
    ];
    let meant = look_up(FAULTS, name);
    candidates.extend(meant.map(|meant| format!("{meant}{rest}")));
    candidates.extend(meant.map(str::to_owned));
    match candidates.into_iter().find(|meant| reads(meant)) {
        Some(meant) => RuleError {
            span: word.error("").span,
            ..error
        }
        .suggest(meant),
        None => match meant {
            Some(meant) => error.suggest(meant),
            None => error,
        },
    }
}

/// The error for a word behind a fault that is most probably a part of it: `delay 200ms`, `delay=200ms 20ms`.
pub(super) fn detached(before: Piece<'_>, word: Piece<'_>) -> Option<RuleError> {
    let (fault, value) = (before.text(), word.text().trim_start_matches('='));
    let fault = fault.trim_end_matches('=');
    let candidates = [
        format!("{fault}={value}"),
        format!("{fault}~{value}"),
        format!("{fault},{value}"),
        with_status(fault, value),
    ];
    let meant = candidates.into_iter().find(|meant| reads(meant))?;
    let error = before
        .to(word)
        .error("a fault and its arguments are one word");
    Some(error.suggest(meant))
}

/// The error for a modifier whose value can't be read, with the modifier that takes such a value.
pub(super) fn modifier_value(key: &str, word: Piece<'_>, error: RuleError) -> RuleError {
    let value = word
        .split_once(&['='])
        .map_or("", |(_, value)| value.text());
    if key == "dir" {
        return match look_up(DIRECTIONS, value) {
            Some(meant) => error.suggest(meant),
            None => error,
        };
    }
    let is_time = value.parse::<u64>().is_err() && units::parse_duration(value).is_ok();
    match look_up(TIMES, key).filter(|_| is_time) {
        Some(meant) => word
            .error(format!("`{key}` counts packets and takes no time"))
            .suggest(format!("{meant}={value}")),
        None => error,
    }
}

/// The target that is most probably meant by a text that can't be read as one.
pub(super) fn target(text: &str) -> Option<String> {
    let candidates = [
        url(text),
        reversed(text),
        text.rsplit_once([':', '*'])
            .map(|(before, port)| match before.trim_end_matches([':', '*']) {
                "" => port.to_owned(),
                protocol => format!("{protocol}:{port}"),
            })
            .filter(|_| {
                text.contains("::") || text.starts_with([':', '*']) || text.contains(":*:")
            }),
        Some(text.to_ascii_lowercase()),
    ];
    let mut candidates = candidates.into_iter().flatten();
    candidates.find(|meant| target::is_plain(meant))
}

/// `tcp:host:443` for `https://host/path`.
fn url(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?;
    let protocol = Protocol::from_word(scheme).unwrap_or(Protocol::Tcp);
    let has_port = host.rsplit(']').next()?.contains(':');
    match service_port(scheme).filter(|_| !has_port) {
        Some(port) => Some(format!("{protocol}:{host}:{port}")),
        None => Some(format!("{protocol}:{host}")),
    }
}

/// `tcp:5432` for `5432/tcp`, `tcp/5432` and `tcp=5432`; `5432` for `port=5432`.
fn reversed(text: &str) -> Option<String> {
    let (a, b) = text.split_once(['/', '='])?;
    let (word, ports) = if looks_like_ports(a) { (b, a) } else { (a, b) };
    let word = word.to_ascii_lowercase();
    if word == "port" {
        return Some(ports.to_owned());
    }
    (Protocol::from_word(&word).is_some() && looks_like_ports(ports))
        .then(|| format!("{word}:{ports}"))
}

/// The text with a point for the first comma between two digits.
pub(super) fn decimal_point(text: &str) -> Option<String> {
    let digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    let bytes = text.as_bytes();
    let at = (1..bytes.len())
        .find(|&at| bytes[at] == b',' && digit(bytes.get(at - 1)) && digit(bytes.get(at + 1)))?;
    Some(format!("{}.{}", &text[..at], &text[at + 1..]))
}

/// A fault that answers with an HTTP status; where the value is none, what is no fault.
fn with_status(name: &str, value: &str) -> String {
    match value.parse::<u16>() {
        Ok(status) => format!("{name}=http:{status}"),
        Err(_no_status) => String::new(),
    }
}

/// Whether a text is a fault.
fn reads(text: &str) -> bool {
    Fault::from_str(text).is_ok()
}

/// Whether a word begins with the name of a fault.
pub(super) fn is_fault(text: &str) -> bool {
    let name = text.split('=').next().unwrap_or(text);
    catalog::spec(name).is_some()
}
