//! Lines that say what was done with packets, for `-vv`: one for each packet and rule.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fault_common::abi::{Counter, Trace, action, direction, fault, step, trace_flag};
use fault_common::explain::{Cause, Explanation, Filter, Unsuited, explain};
use fault_common::packet::{
    PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN,
};

use crate::plan::Plan;
use crate::plan::tables::{Network, PacketRule, ProtocolClass};
use crate::sys::net::ip_address;

/// A rule of the programs with its text.
#[derive(Clone, Debug)]
pub(super) struct TracedRule {
    /// `None` for what reads DNS responses, which is no rule of the user's.
    text: Option<String>,
    rule: PacketRule,
}

/// The rules of a plan without those whose indexes are in `off`, in the order in which the programs have them: that of
/// [`Plan::entries_without`].
pub(super) fn traced(plan: &Plan, off: &BTreeSet<usize>) -> Vec<TracedRule> {
    let applied = plan.rules.iter().enumerate();
    let texts = applied
        .filter(|(index, _)| !off.contains(index))
        .flat_map(|(_, rule)| rule.entries.iter().map(|_| Some(rule.text.clone())))
        .chain([None]);
    let entries = plan.entries_without(off);
    let rules = entries.into_iter().zip(texts);
    rules
        .map(|(rule, text)| TracedRule { text, rule })
        .collect()
}

/// The lines about one record.
pub(super) fn lines(rules: &[TracedRule], trace: &Trace) -> Vec<String> {
    match trace.step {
        step::JUDGED | step::FORESEEN => {
            let judged = rules.iter().find(|one| one.rule.entry.uid == trace.rule);
            judged
                .and_then(|one| judged_line(one, trace))
                .into_iter()
                .collect()
        }
        step::LISTED | step::OTHER_WAY | step::NOBODY => unmatched(rules, trace),
        step::PASSED => vec![format!("{}: passed: {}", packet(trace), passed(trace))],
        step::UNREAD => vec![format!("packet: passed: {}", passed(trace))],
        _ => Vec::new(),
    }
}

/// The line about a rule that judged the packet.
fn judged_line(judged: &TracedRule, trace: &Trace) -> Option<String> {
    let text = judged.text.as_ref()?;
    let said = explain(&judged.rule.entry, trace);
    let mut line = packet(trace);
    write_direction(&mut line, trace.direction);
    // Writing to a string can't fail.
    let _ = write!(line, ", connection {}", trace.connection);
    if let Some(ordinal) = said.packet {
        let first = if trace.step == step::FORESEEN {
            ordinal + 1 - u64::from(trace.seen)
        } else {
            ordinal
        };
        let _ = if first == ordinal {
            write!(line, ", packet {ordinal}")
        } else {
            write!(line, ", packets {first} to {ordinal}")
        };
    }
    let _ = write!(line, ": '{text}' {}", outcome(judged, trace, &said));
    Some(line)
}

/// What a rule did, and why.
fn outcome(judged: &TracedRule, trace: &Trace, said: &Explanation) -> String {
    let mut drawn = String::new();
    if let Some(share) = said.probability {
        let _ = write!(drawn, "drew {} for p=, ", share_of(share));
    }
    if let Some(share) = said.chance {
        let _ = write!(drawn, "drew {}, ", share_of(share));
    }
    if judged.rule.entry.fault == fault::LOSS_GILBERT_ELLIOTT && said.chance.is_some() {
        let is_bad = trace.memory & 1 != 0;
        let _ = write!(drawn, "{} state, ", if is_bad { "bad" } else { "good" });
    }
    match said.cause {
        Cause::Fired => format!("{drawn}{}", done(judged, trace)),
        Cause::Probability | Cause::Chance => format!("{drawn}passed"),
        Cause::Filter(filter) => format!("passed: {}", filtered(filter, trace)),
        Cause::Trigger { count } => {
            format!("passed: first=, after=, nth=, every= or range= does not select packet {count}")
        }
        Cause::Datagram => "passed: the rule did not pick the first fragment".to_owned(),
        Cause::Unsuited(why) => format!("{drawn}passed: {}", unsuited(why)),
    }
}

/// A draw as a share of 1.
fn share_of(drawn: u32) -> String {
    // Rounded down: a draw below a threshold is not shown as the threshold.
    let parts = (u64::from(drawn) * 10_000) >> 32;
    format!("0.{parts:04}")
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// What the fault did to the packet.
fn done(judged: &TracedRule, trace: &Trace) -> String {
    let held_ms = || format!("{:.3} ms", 1e3 * seconds(trace.delay_ns));
    match trace.action {
        action::DROP => "dropped".to_owned(),
        action::DROP_CHECKSUM => "dropped, as by a wrong checksum".to_owned(),
        action::REJECT_RST => "refused by an RST".to_owned(),
        action::REJECT_ICMP => "refused by ICMP".to_owned(),
        action::RESET => "reset".to_owned(),
        action::CORRUPT => "corrupted".to_owned(),
        action::DUPLICATE => "duplicated".to_owned(),
        action::ECN => "marked CE".to_owned(),
        action::HOLD if judged.rule.entry.fault == fault::DELAY => format!("delayed {}", held_ms()),
        action::HOLD if judged.rule.entry.fault == fault::RELAY => "given to the relay".to_owned(),
        action::HOLD => "held".to_owned(),
        action::OVERTAKE => "sent ahead of those that are held".to_owned(),
        action::ANSWER => "answered".to_owned(),
        other => format!("hit (action {other})"),
    }
}

/// What filter excludes the packet.
fn filtered(filter: Filter, trace: &Trace) -> String {
    match filter {
        Filter::Kind => format!("match= does not select {}", kind_of(trace)),
        Filter::Size => format!("size= does not select {} bytes", trace.size),
        Filter::Connection => format!("conn= does not select connection {}", trace.connection),
        Filter::Mix => "the connection drew another fault of the mix, or none".to_owned(),
        Filter::QueryType => "type= does not select its query".to_owned(),
        Filter::Window => format!(
            "at=, for=, period= or duty= does not select {:.3} s",
            seconds(trace.since_ns)
        ),
    }
}

/// The packet in the words of `match=`, or by its flags.
fn kind_of(trace: &Trace) -> String {
    if trace.protocol != PROTOCOL_TCP {
        return "it".to_owned();
    }
    let flags = [
        (TCP_SYN, "SYN"),
        (TCP_FIN, "FIN"),
        (TCP_RST, "RST"),
        (TCP_ACK, "ACK"),
    ];
    let set = flags.iter().filter(|(flag, _)| trace.tcp_flags & flag != 0);
    let names: Vec<_> = set.map(|(_, name)| *name).collect();
    format!(
        "{} with {} bytes of payload",
        if names.is_empty() {
            "a segment".to_owned()
        } else {
            names.join("+")
        },
        trace.payload
    )
}

/// Why the fault has no effect.
fn unsuited(why: Unsuited) -> String {
    match why {
        Unsuited::NoPayload => "it has no payload to change".to_owned(),
        Unsuited::NotEct => "its sender does not use ECN".to_owned(),
        Unsuited::Fits => "it is not larger than the MTU".to_owned(),
        Unsuited::TooEarly { bytes } => format!("its direction has carried {bytes} bytes so far"),
        Unsuited::Opens => "it opens the connection".to_owned(),
        Unsuited::Refusal => "it is a refusal itself".to_owned(),
        Unsuited::NoReset => "it is not TCP, or a fragment".to_owned(),
        Unsuited::Gap => "it is not one of those that may overtake others".to_owned(),
        Unsuited::Other => "the fault has no effect on it".to_owned(),
    }
}

/// Why a program let the packet through.
fn passed(trace: &Trace) -> &'static str {
    let is = |counter: Counter| u32::from(trace.counter) == counter as u32;
    let reasons = [
        (Counter::Truncated, "its headers are cut off"),
        (Counter::Malformed, "it is malformed"),
        (Counter::Headers, "it has too many IPv6 extension headers"),
        (Counter::Fragment, "its first fragment is not known"),
        (Counter::LeaseExpired, "the rules are not applied any more"),
        (Counter::FlowTableFull, "the connection table is full"),
        (
            Counter::FlowRuleTableFull,
            "too many connections match more than 8 rules",
        ),
        (Counter::ActionFailed, "its fault could not be carried out"),
        (
            Counter::Group,
            "it has several receivers, for one of which it can only be dropped",
        ),
    ];
    reasons
        .into_iter()
        .find(|(counter, _)| is(*counter))
        .map_or("for an internal reason", |(_, reason)| reason)
}

/// The lines about rules whose port the packet reached, but which it does not match.
fn unmatched(rules: &[TracedRule], trace: &Trace) -> Vec<String> {
    let listed = usize::from(trace.match_count).min(trace.matches.len());
    let listed = &trace.matches[..listed];
    // Behind the last rule that fits the list there may be others that match.
    let end = match listed.last() {
        Some(last) if trace.overflow != 0 => usize::from(*last),
        _ => rules.len(),
    };
    let candidates = rules.iter().enumerate().take(end);
    candidates
        .filter(|(index, _)| !listed.iter().any(|rule| usize::from(*rule) == *index))
        .filter_map(|(_, one)| {
            let (text, way) = (one.text.as_ref()?, way_of(&one.rule, trace)?);
            let mut line = packet(trace);
            write_direction(&mut line, way);
            let why = mismatch(rules, &one.rule, way, trace);
            let _ = write!(line, ": '{text}' passed: {why}");
            Some(line)
        })
        .collect()
}

/// The direction of the packet as a rule sees it that has its port; `None` when the packet does not reach the rule's port.
fn way_of(rule: &PacketRule, trace: &Trace) -> Option<u8> {
    let protocol = protocol_of(trace);
    if !rule.protocols.contains(&protocol) {
        return None;
    }
    if rule.ports.is_empty() || rule.portless.contains(&protocol) {
        return Some(trace.direction);
    }
    let has = |port: u16| {
        let mut ranges = rule.ports.iter();
        ranges.any(|(first, last)| (*first..=*last).contains(&port))
    };
    match (has(trace.destination_port), has(trace.source_port)) {
        (true, true) => Some(trace.direction),
        (true, false) => Some(direction::TO_SERVER),
        (false, true) => Some(direction::TO_CLIENT),
        (false, false) => None,
    }
}

/// Why a rule whose port the packet reached does not match it.
fn mismatch(rules: &[TracedRule], rule: &PacketRule, way: u8, trace: &Trace) -> String {
    let (bit, word) = if way == direction::TO_SERVER {
        (direction::BIT_TO_SERVER, "to-server")
    } else {
        (direction::BIT_TO_CLIENT, "to-client")
    };
    if rule.entry.directions & bit == 0 {
        return format!("dir= does not select {word}");
    }
    if trace.step == step::NOBODY || !is_in_scope(rules, rule, trace) {
        return "it belongs to another process".to_owned();
    }
    if way != trace.direction && trace.flags & trace_flag::CERTAIN != 0 {
        return "the rule's port is the client's, not the service's".to_owned();
    }
    let host = ip_address(if way == direction::TO_SERVER {
        trace.destination
    } else {
        trace.source
    });
    if let Some(name) = &rule.name {
        return match &rule.question {
            Some(question) => format!("it is no query for {question}"),
            None => format!("{host} is not known as an address of {name}"),
        };
    }
    if !rule.has_any_host()
        && !rule
            .hosts
            .iter()
            .any(|network| network.contains(&whole(host)))
    {
        return format!("it is for another host, {host}");
    }
    match &rule.question {
        Some(question) => format!("it is no query for {question}"),
        None => "it does not match".to_owned(),
    }
}

/// The network of one address.
fn whole(host: IpAddr) -> Network {
    Network::new(host, if host.is_ipv4() { 32 } else { 128 })
}

/// Whether one of the packet's sockets belongs to the cgroup that the rule is limited to.
fn is_in_scope(rules: &[TracedRule], rule: &PacketRule, trace: &Trace) -> bool {
    let Some(scope) = &rule.scope else {
        return true;
    };
    let mut scopes = rules.iter().filter_map(|one| one.rule.scope.as_ref());
    scopes.any(|one| trace.scopes.contains(&one.cgroup) && one.path.starts_with(&scope.path))
}

fn protocol_of(trace: &Trace) -> ProtocolClass {
    match trace.protocol {
        PROTOCOL_TCP => ProtocolClass::Tcp,
        PROTOCOL_UDP => ProtocolClass::Udp,
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => ProtocolClass::Icmp,
        _ => ProtocolClass::Other,
    }
}

/// The packet's protocol and addresses: `packet tcp 127.0.0.1:40312 > 127.0.0.1:5432`.
fn packet(trace: &Trace) -> String {
    let protocol = protocol_of(trace);
    let name = match protocol {
        ProtocolClass::Tcp => "tcp".to_owned(),
        ProtocolClass::Udp => "udp".to_owned(),
        ProtocolClass::Icmp => "icmp".to_owned(),
        ProtocolClass::Other => format!("protocol {}", trace.protocol),
    };
    let known = trace_flag::TRANSPORT | trace_flag::FOLLOWS;
    let has_ports =
        matches!(protocol, ProtocolClass::Tcp | ProtocolClass::Udp) && trace.flags & known != 0;
    let end = |address, port| {
        let address = ip_address(address);
        if has_ports {
            SocketAddr::new(address, port).to_string()
        } else {
            address.to_string()
        }
    };
    let mut text = format!(
        "packet {name} {} > {}",
        end(trace.source, trace.source_port),
        end(trace.destination, trace.destination_port)
    );
    if trace.fragment != 0 {
        let _ = write!(text, " fragment at {}", u32::from(trace.fragment) * 8);
    }
    if trace.segments > 1 {
        let _ = write!(text, " ({} wire packets)", trace.segments);
    }
    text
}

fn write_direction(line: &mut String, way: u8) {
    line.push_str(if way == direction::TO_SERVER {
        " to-server"
    } else {
        " to-client"
    });
}
