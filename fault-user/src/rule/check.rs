//! What a fault's values and a rule's parts must fulfil, whichever way they were written.

use super::fault::{CorruptAt, ErrorReply, Fault, LossModel};
use super::modifier::Modifiers;
use super::target::{Protocol, Target};
use super::units::{PPM, show_duration, show_probability};
use super::{Layer, PacketKinds, RejectWith};

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
}

/// A complaint about an argument.
#[expect(
    clippy::unnecessary_wraps,
    reason = "every caller answers with an option"
)]
fn complain(param: &'static str, message: impl Into<String>, expected: &str) -> Option<Complaint> {
    Some(Complaint {
        param,
        message: message.into(),
        expected: (!expected.is_empty()).then(|| expected.to_owned()),
    })
}

/// One second in nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// The longest packet delay: 60 s.
pub const MAX_DELAY_NS: u64 = 60 * SECOND;

/// The longest latency of a stream: an hour.
pub const MAX_LATENCY_NS: u64 = 3_600 * SECOND;

/// The longest of all other times: 30 days.
pub const MAX_TIME_NS: u64 = 30 * 24 * 3_600 * SECOND;

/// The highest rate: 100 Tbit/s.
pub const MAX_RATE: u64 = 100_000_000_000_000;

/// The most bits that `corrupt` inverts in a packet.
pub const MAX_CORRUPT_BITS: u32 = 64;

/// A complaint where a time is longer than a limit.
fn longer(param: &'static str, ns: u64, limit_ns: u64) -> Option<Complaint> {
    (ns > limit_ns)
        .then(|| {
            let most = format!("at most {}", show_duration(limit_ns));
            complain(param, format!("{} is too long", show_duration(ns)), &most)
        })
        .flatten()
}

/// A complaint where the middle is zero or too long, or the jitter larger than it.
fn jittered(param: &'static str, ns: u64, jitter_ns: u64, limit_ns: u64) -> Option<Complaint> {
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
fn rate(bits: u64, instead: &str) -> Option<Complaint> {
    match bits {
        0 => complain("rate", "a rate of 0 lets nothing pass", instead),
        _ if bits > MAX_RATE => complain("rate", "this rate is absurd", "at most 100tbit"),
        _ => None,
    }
}

impl Fault {
    /// What is wrong with the values of this fault.
    pub(super) fn complaint(&self) -> Option<Complaint> {
        match self {
            Self::Loss(model) => loss(*model),
            Self::Corrupt { bits, .. } if !(1..=MAX_CORRUPT_BITS).contains(bits) => complain(
                "bits",
                format!("{bits} bits are too few or too many"),
                &format!("1 to {MAX_CORRUPT_BITS}"),
            ),
            Self::Reorder { gap: 0, .. } => {
                complain("gap", "a gap of 0 has no packets", "1 or more")
            }
            Self::Delay {
                delay_ns,
                jitter_ns,
                ..
            } => jittered("delay", *delay_ns, *jitter_ns, MAX_DELAY_NS),
            Self::Rate {
                bits_per_second, ..
            } => rate(*bits_per_second, "more, or `blackhole`"),
            Self::Reset { bytes: Some(0) } => complain(
                "bytes",
                "after 0 bytes means at once".to_owned(),
                "`reset` alone, or a size of 1 or more",
            ),
            Self::Mtu { bytes, .. } if !(68..=65_535).contains(bytes) => complain(
                "bytes",
                format!("{bytes} bytes are no MTU"),
                "68 to 65535 (68 is IPv4's smallest)",
            ),
            Self::Slot { min_ns, max_ns, .. } => slot(*min_ns, *max_ns),
            Self::Mix(arms) => mix(arms),
            _ => self.stream_complaint(),
        }
        .or_else(|| self.limit_complaint())
    }

    /// What is wrong with the queue limit and burst of this fault.
    fn limit_complaint(&self) -> Option<Complaint> {
        let (Self::Delay { limit_packets, .. } | Self::Rate { limit_packets, .. }) = self else {
            return None;
        };
        match self {
            _ if *limit_packets == Some(0) => complain(
                "limit_packets",
                "a queue of 0 packets loses all",
                "1 or more",
            ),
            Self::Rate {
                burst_bytes: Some(0),
                ..
            } => complain(
                "burst_bytes",
                "a burst of 0 bytes lets nothing pass",
                "1500 or more",
            ),
            Self::Rate {
                cell_bytes: 0,
                cell_overhead_bytes,
                ..
            } if *cell_overhead_bytes != 0 => complain(
                "cell_overhead_bytes",
                "there is no cell size to add this to",
                "cell:N as well",
            ),
            _ => None,
        }
    }

    /// What is wrong with the values of a stream fault.
    fn stream_complaint(&self) -> Option<Complaint> {
        match self {
            Self::Latency {
                latency_ns,
                jitter_ns,
            } => jittered("latency", *latency_ns, *jitter_ns, MAX_LATENCY_NS),
            Self::Bandwidth {
                bits_per_second, ..
            } => rate(*bits_per_second, "more, or `stall`"),
            Self::SlowClose { delay_ns } if *delay_ns == 0 => {
                complain("delay", "a delay of 0 does nothing", "more than 0")
            }
            Self::SlowClose { delay_ns } => longer("delay", *delay_ns, MAX_TIME_NS),
            Self::Timeout { timeout_ns } | Self::ResetPeer { timeout_ns } => {
                longer("timeout", *timeout_ns, MAX_TIME_NS)
            }
            Self::Slicer {
                average_size_bytes: 0,
                ..
            } => complain(
                "average_size_bytes",
                "parts of 0 bytes carry nothing",
                "1 or more",
            ),
            Self::Slicer {
                average_size_bytes,
                size_variation_bytes,
                ..
            } if size_variation_bytes >= average_size_bytes => complain(
                "size_variation_bytes",
                "the variation is not smaller than the average",
                "less than the average size",
            ),
            Self::Slicer { delay_ns, .. } => longer("delay", *delay_ns, MAX_LATENCY_NS),
            Self::Close { count: Some(0), .. } => {
                complain("count", "closing 0 connections does nothing", "1 or more")
            }
            Self::CorruptData {
                at: CorruptAt::Probability(0),
                ..
            } => complain(
                "probability",
                "a probability of 0 does nothing",
                "more than 0%",
            ),
            Self::Lifetime {
                time_ns, jitter_ns, ..
            } => jittered("time", *time_ns, *jitter_ns, MAX_TIME_NS),
            Self::Coalesce {
                min_bytes,
                max_wait_ns,
            } => coalesce(*min_bytes, *max_wait_ns),
            Self::Substitute { regex, .. } => pattern(regex),
            Self::Transient { errors: 0, .. } => {
                complain("errors", "0 errors do nothing", "1 or more")
            }
            Self::Error(reply)
            | Self::Transient {
                reply: Some(reply), ..
            } => error_reply(reply),
            _ => None,
        }
    }
}

/// What is wrong with a loss model.
fn loss(model: LossModel) -> Option<Complaint> {
    let values = match model {
        LossModel::Random(p) => [p, 0, 0, 0, 0],
        LossModel::GilbertElliott {
            p,
            r,
            one_minus_h,
            one_minus_k,
        } => [p, r, one_minus_h, one_minus_k, 0],
        LossModel::State {
            p13,
            p31,
            p32,
            p23,
            p14,
        } => [p13, p31, p32, p23, p14],
    };
    if values.iter().any(|p| *p > PPM) {
        return complain(
            "probability",
            "this probability is more than 100%",
            "0% to 100%",
        );
    }
    match model {
        LossModel::State { p13, p14, .. } if p13 + p14 > PPM => complain(
            "state",
            format!("p13 + p14 is {}", show_probability(p13 + p14)),
            "at most 100% for what leaves state 1",
        ),
        LossModel::State { p31, p32, .. } if p31 + p32 > PPM => complain(
            "state",
            format!("p31 + p32 is {}", show_probability(p31 + p32)),
            "at most 100% for what leaves state 3",
        ),
        _ => None,
    }
}

/// What is wrong with a slot.
fn slot(min_ns: u64, max_ns: u64) -> Option<Complaint> {
    if max_ns == 0 {
        return complain("min", "a slot of 0 does nothing", "more than 0");
    }
    if max_ns < min_ns {
        let least = format!("at least {}", show_duration(min_ns));
        return complain(
            "max",
            "the longest time is shorter than the shortest",
            &least,
        );
    }
    longer("max", max_ns, MAX_DELAY_NS)
}

/// What is wrong with the arms of a mix.
fn mix(arms: &[super::MixArm]) -> Option<Complaint> {
    let sum: u64 = arms.iter().map(|arm| u64::from(arm.probability)).sum();
    if arms.is_empty() {
        return complain("arms", "`mix` needs its arms", "P%:FAULT P%:FAULT …");
    }
    if arms.iter().any(|arm| matches!(arm.fault, Fault::Mix(_))) {
        return complain("arms", "a mix has no mix inside", "another fault");
    }
    if sum > u64::from(PPM) {
        return complain(
            "arms",
            "the arms add up to more than 100%",
            "at most 100% in all",
        );
    }
    arms.iter().find_map(|arm| arm.fault.complaint())
}

/// What is wrong with `coalesce`.
fn coalesce(min_bytes: u64, max_wait_ns: u64) -> Option<Complaint> {
    if min_bytes < 2 {
        return complain("min_bytes", "every part is already that large", "2 or more");
    }
    if max_wait_ns == 0 {
        return complain("max_wait", "a wait of 0 gathers nothing", "more than 0");
    }
    longer("max_wait", max_wait_ns, MAX_LATENCY_NS)
}

/// What is wrong with a regular expression.
fn pattern(regex: &str) -> Option<Complaint> {
    if regex.is_empty() {
        return complain(
            "regex",
            "an empty expression matches everywhere",
            "a regular expression",
        );
    }
    let error = regex::bytes::Regex::new(regex).err()?;
    // The crate draws a picture over several lines; its last line says what is wrong.
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    let reason = last.strip_prefix("error: ").unwrap_or(last);
    complain(
        "regex",
        format!("this is no regular expression: {reason}"),
        "the syntax of the regex crate",
    )
}

/// What is wrong with an error reply.
fn error_reply(reply: &ErrorReply) -> Option<Complaint> {
    match reply {
        ErrorReply::Http(list)
            if list.is_empty() || list.iter().any(|s| !(100..=599).contains(s)) =>
        {
            complain("http", "this is no list of HTTP statuses", "100 to 599")
        }
        ErrorReply::Random(bytes) if !(1..=1 << 20).contains(bytes) => complain(
            "random",
            "this reply is empty or too large",
            "1 byte to 1MiB",
        ),
        ErrorReply::Redis(Some(text))
        | ErrorReply::Smtp(Some(text))
        | ErrorReply::Memcache(Some(text))
            if text.contains(['\r', '\n']) =>
        {
            complain(
                reply_name(reply),
                "the text of this reply is one line",
                "no line breaks",
            )
        }
        _ => None,
    }
}

/// The argument that names a reply.
fn reply_name(reply: &ErrorReply) -> &'static str {
    match reply {
        ErrorReply::Http(_) => "http",
        ErrorReply::Redis(_) => "redis",
        ErrorReply::Mysql(_) => "mysql",
        ErrorReply::Smtp(_) => "smtp",
        ErrorReply::Memcache(_) => "memcache",
        ErrorReply::Random(_) => "random",
    }
}

/// What is wrong with a fault on a protocol; `param` of the complaint is `fault`.
fn on_protocol(fault: &Fault, protocol: Protocol) -> Option<Complaint> {
    if let Fault::Mix(arms) = fault {
        return arms
            .iter()
            .find_map(|arm| on_protocol(&arm.fault, protocol));
    }
    let spec = fault.spec();
    let (name, works) = match protocol {
        Protocol::Any | Protocol::Tcp => return None,
        Protocol::Udp => ("UDP", spec.udp),
        Protocol::Icmp => ("ICMP", spec.icmp),
    };
    if matches!(
        fault,
        Fault::Reject {
            with: Some(RejectWith::Rst)
        }
    ) {
        return complain(
            "fault",
            format!("{name} has no RST"),
            "`reject=icmp-port`, `reject=icmp-host` or `reject=icmp-admin`",
        );
    }
    if works {
        return None;
    }
    let others: Vec<_> = super::catalog::FAULTS
        .iter()
        .filter(|s| {
            if protocol == Protocol::Udp {
                s.udp
            } else {
                s.icmp
            }
        })
        .map(|s| s.name)
        .collect();
    complain(
        "fault",
        format!("`{}` has no meaning on {name}", spec.name),
        &super::args::one_of(&others),
    )
}

/// What is wrong between the parts of a rule; `param` is `target`, `fault` or a modifier's key.
pub(super) fn rule(
    target: Option<&Target>,
    fault: &Fault,
    modifiers: &Modifiers,
) -> Option<Complaint> {
    let layer = fault.layer();
    let protocol = target.map_or(Protocol::Any, |target| target.protocol);
    if let Some(complaint) = on_protocol(fault, protocol) {
        return Some(complaint);
    }
    let flags = modifiers.packets.without(PacketKinds::DATA);
    if !flags.is_empty() && matches!(protocol, Protocol::Udp | Protocol::Icmp) {
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
