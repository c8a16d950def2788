//! What a fault's values and a rule's parts must fulfil, whichever way they were written.

use super::args::one_of;
use super::catalog::{Acts, FAULTS, Layer, Spec};
use super::error::{Piece, RuleError};
use super::faults::{Fault, RejectWith};
use super::modifier::{Direction, Modifiers, PacketKinds};
use super::target::{Protocol, Target};
use super::units::show_duration;

/// What is wrong with a value, before it is known where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Complaint {
    /// The argument, modifier or part that is wrong.
    pub param: &'static str,
    /// What is wrong.
    pub message: String,
    /// What would have been right.
    pub expected: Option<String>,
}

impl Complaint {
    /// The complaint in one line, where it has no place in a text.
    pub fn one_line(&self) -> String {
        match &self.expected {
            Some(expected) => format!("{}: expected {expected}", self.message),
            None => self.message.clone(),
        }
    }

    /// The complaint as an error at its place in a text.
    pub fn at(&self, piece: Piece<'_>) -> RuleError {
        let error = piece.error(self.message.clone());
        match &self.expected {
            Some(expected) => error.expected(expected.clone()),
            None => error,
        }
    }
}

/// A complaint about an argument.
#[expect(
    clippy::unnecessary_wraps,
    reason = "every caller answers with an option"
)]
pub(super) fn complain(
    param: &'static str,
    message: impl Into<String>,
    expected: &str,
) -> Option<Complaint> {
    Some(Complaint {
        param,
        message: message.into(),
        expected: (!expected.is_empty()).then(|| expected.to_owned()),
    })
}

/// One second in nanoseconds.
pub(super) const SECOND: u64 = 1_000_000_000;

/// The longest time that has no limit of its own: 30 days.
pub const MAX_TIME_NS: u64 = 30 * 24 * 3_600 * SECOND;

/// The highest rate: 100 Tbit/s.
pub const MAX_RATE: u64 = 100_000_000_000_000;

/// A complaint where a time is longer than a limit.
pub(super) fn longer(param: &'static str, ns: u64, limit_ns: u64) -> Option<Complaint> {
    (ns > limit_ns)
        .then(|| {
            let most = format!("at most {}", show_duration(limit_ns));
            complain(param, format!("{} is too long", show_duration(ns)), &most)
        })
        .flatten()
}

/// A complaint where the middle is zero or too long, or the jitter larger than it.
pub(super) fn jittered(
    param: &'static str,
    ns: u64,
    jitter_ns: u64,
    limit_ns: u64,
) -> Option<Complaint> {
    if ns == 0 {
        return complain(param, format!("a {param} of 0 does nothing"), "more than 0");
    }
    if jitter_ns > ns {
        return complain(
            "jitter",
            format!("the jitter is larger than the {param}"),
            &format!("at most {}", show_duration(ns)),
        );
    }
    longer(param, ns, limit_ns)
}

/// A complaint where a rate is zero or absurd.
pub(super) fn bad_rate(bits: u64, instead: &str) -> Option<Complaint> {
    match bits {
        0 => complain("rate", "a rate of 0 lets nothing pass", instead),
        _ if bits > MAX_RATE => complain("rate", "this rate is absurd", "at most 100tbit"),
        _ => None,
    }
}

/// A complaint where a queue has room for nothing.
pub(super) fn no_queue(limit_packets: Option<u32>) -> Option<Complaint> {
    if limit_packets != Some(0) {
        return None;
    }
    complain(
        "limit_packets",
        "a queue of 0 packets loses all",
        "1 or more",
    )
}

/// A complaint where a text is no regular expression.
pub(super) fn bad_regex(param: &'static str, expression: &str) -> Option<Complaint> {
    let error = regex::bytes::Regex::new(expression).err()?;
    // The crate draws a picture over several lines; its last line says what is wrong.
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    let reason = last.strip_prefix("error: ").unwrap_or(last);
    complain(
        param,
        format!("this is no regular expression: {reason}"),
        "the syntax of the regex crate",
    )
}

/// What is wrong with a fault on a protocol; `param` of the complaint is `fault`.
fn on_protocol(fault: &Fault, protocol: Protocol) -> Option<Complaint> {
    let (name, works): (_, fn(&Spec) -> bool) = match protocol {
        Protocol::Any | Protocol::Tcp => return None,
        Protocol::Udp => ("UDP", |spec| spec.udp && spec.acts != Acts::OnQueries),
        Protocol::Icmp => ("ICMP", |spec| spec.icmp),
        Protocol::Dns => ("DNS", |spec| {
            spec.udp && matches!(spec.layer, Layer::Packet | Layer::Either)
        }),
    };
    fault.parts().find_map(|part| {
        if matches!(part, Fault::Reject(reject) if reject.with == Some(RejectWith::Rst)) {
            return complain(
                "fault",
                format!("{name} has no RST"),
                "`reject=icmp-port`, `reject=icmp-host` or `reject=icmp-admin`",
            );
        }
        if works(part.spec()) {
            return None;
        }
        let others = FAULTS.iter().filter(|spec| works(spec));
        let others: Vec<_> = others.map(|spec| spec.name).collect();
        complain(
            "fault",
            format!("`{}` has no meaning on {name}", part.name()),
            &one_of(&others),
        )
    })
}

/// What is wrong about queries of DNS.
fn on_queries(target: Option<&Target>, fault: &Fault, modifiers: &Modifiers) -> Option<Complaint> {
    const EXPECTED: &str = "a target such as `dns:api.example.com`, or `dns` for all queries";
    let is_dns = target?.protocol == Protocol::Dns;
    if let Some(part) = fault.part_that(Acts::OnQueries).filter(|_| !is_dns) {
        let message = format!("`{}` answers DNS queries", part.name());
        return complain("target", message, EXPECTED);
    }
    if modifiers.query_type.is_some() && !is_dns {
        return complain("type", "only DNS queries have a type", EXPECTED);
    }
    if is_dns && modifiers.direction == Direction::ToClient {
        return complain(
            "dir",
            "a target of `dns` is the queries, which go to the server",
            "no `dir`, or `udp:53` for all packets from servers",
        );
    }
    None
}

/// What is wrong between the parts of a rule; `param` is `target`, `fault` or a modifier's key.
pub(super) fn rule(
    target: Option<&Target>,
    fault: &Fault,
    modifiers: &Modifiers,
) -> Option<Complaint> {
    let layer = fault.layer();
    let protocol = target.map_or(Protocol::Any, |target| target.protocol);
    let complaint = on_queries(target, fault, modifiers).or_else(|| on_protocol(fault, protocol));
    if complaint.is_some() {
        return complaint;
    }
    let flags = modifiers.packets.without(PacketKinds::DATA);
    if !flags.is_empty() && matches!(protocol, Protocol::Udp | Protocol::Icmp | Protocol::Dns) {
        return complain(
            "match",
            "only TCP packets have flags",
            "`match=data` or a tcp target",
        );
    }
    if layer == Layer::Stream {
        let packets = [
            (!modifiers.packets.is_empty(), "match"),
            (
                modifiers.size.is_some() && protocol != Protocol::Udp,
                "size",
            ),
        ];
        if let Some((_, key)) = packets.iter().find(|(wrong, _)| *wrong) {
            let message = format!(
                "`{key}` picks packets, and `{}` works on a stream",
                fault.name()
            );
            return complain(key, message, "a fault of the packet layer");
        }
    }
    if let Some(key) = modifiers.asked.key() {
        if layer != Layer::Stream {
            let message = format!(
                "`{key}` is read from a stream, and `{}` works on packets",
                fault.name()
            );
            return complain(
                key,
                message,
                "a stream fault such as latency, reset_peer, timeout or error",
            );
        }
        if protocol == Protocol::Udp {
            let message = format!("`{key}` is read from TCP, and this target is UDP");
            return complain(key, message, "a tcp target");
        }
    }
    if let Fault::Profile(_) = fault {
        let plain = Modifiers::default();
        let picking = [
            (modifiers.probability != plain.probability, "p"),
            (!modifiers.triggers.is_empty(), "count"),
            (!modifiers.packets.is_empty(), "match"),
            (modifiers.size.is_some(), "size"),
        ];
        if let Some((_, key)) = picking.iter().find(|(wrong, _)| *wrong) {
            return complain(
                key,
                "a profile is a whole link, and this would pick some of its packets",
                "`conn`, `dir` or times, or the faults of the profile one by one",
            );
        }
    }
    if modifiers.reconnect && matches!(layer, Layer::Packet | Layer::Either) {
        let message = format!("`{}` already acts on open connections", fault.name());
        return complain("reconnect", message, "`reconnect` with a stream fault");
    }
    if modifiers.reconnect && protocol == Protocol::Udp {
        return complain(
            "reconnect",
            "UDP has no connections to reset",
            "a tcp target",
        );
    }
    modifiers.complaint()
}
