//! The summary at the end: for each rule the matched packets, the hits and the mechanism.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Write as _};
use std::net::IpAddr;
use std::sync::atomic::Ordering;

use fault_common::abi::{Counter, fault};

use super::fold::Folded;
use super::instead::instead;
use crate::hold::qdiscs::QdiscDrops;
use crate::inject::endpoints::Endpoints;
use crate::inject::injection::{Hits, Injection};
use crate::inject::names::LearnedName;
use crate::plan::{Plan, PlannedRule};
use crate::rule::{Cidr, Direction, Fault, Protocol};

/// Counters that are printed when they are not zero.
const NOTES: [(Counter, &str); 17] = [
    (Counter::Malformed, "malformed packets were let through"),
    (
        Counter::Headers,
        "packets with too many IPv6 extension headers were let through",
    ),
    (
        Counter::Fragment,
        "later IP fragments were not matched by port: their first fragment did not arrive before them, or more than 4096 \
         datagrams were in fragments at once",
    ),
    (
        Counter::FlowRuleTableFull,
        "packets were not checked against a rule: too many connections match more than 8 rules",
    ),
    (
        Counter::ActionFailed,
        "hits could not be carried out; the packets were let through",
    ),
    (
        Counter::NotHeld,
        "packets were not delayed because fault was stopped or got no processor time",
    ),
    (
        Counter::Group,
        "multicast or broadcast packets were delivered unchanged: a rule can only drop them for one of several \
         receivers",
    ),
    (
        Counter::FlowTableFull,
        "packets were let through because the connection table was full; they have no ordinals",
    ),
    (
        Counter::Forgotten,
        "idle connections were removed from the full connection table; they count as new if they continue",
    ),
    (
        Counter::Contended,
        "packets of one connection were processed by two CPUs at once; their ordinals are inexact",
    ),
    (
        Counter::EchoForgotten,
        "ICMP echo replies were not matched: more than 65,536 later requests had been sent",
    ),
    (
        Counter::LearnedFull,
        "addresses of host names were not matched: more than 16,384 were looked up",
    ),
    (
        Counter::Unread,
        "DNS messages could not be read in full: truncated (the rest comes over TCP), in fragments, malformed, or with \
         several questions",
    ),
    (
        Counter::DnsOverTcp,
        "connections to DNS servers over TCP: the programs neither match their queries nor read their answers",
    ),
    (
        Counter::Undivided,
        "super-packets were treated as one packet each: the network device that divides them was down",
    ),
    (
        Counter::EventLost,
        "events were lost: they came faster than they could be written",
    ),
    (
        Counter::TraceLost,
        "lines about packets were left out: the ring buffer was full",
    ),
];

/// The summary table.
#[must_use]
pub fn table(
    plan: &Plan,
    folded: &[Folded],
    hits: &[Hits],
    injection: &Injection,
    counters: &[u64],
) -> String {
    let how = if injection.has_packets() {
        format!(
            "attached by {} on {}",
            injection.hooks(),
            places(&injection.names())
        )
    } else {
        "applied by the relay".to_owned()
    };
    let mut text = format!(
        "fault: rules removed after {:.1} s; {how}; seed {}\n",
        injection.started().elapsed().as_secs_f64(),
        plan.seed
    );
    let mut rows = vec![["rule", "matched", "hit", "conns", "by"].map(str::to_owned)];
    rows.extend(folded.iter().map(|line| {
        let rule = &plan.rules[line.members[0]];
        row(line, rule, &sum(line, hits), injection)
    }));
    for (row, line) in rows[1..].iter_mut().zip(folded) {
        // Said once: it is the same for all.
        if let Some(text) = each_way(&row[0], &plan.rules[line.members[0]]) {
            row[0] = text;
            break;
        }
    }
    text += &columns(&rows);
    held(&mut text, injection);
    interfaces(&mut text, injection);
    for (counter, what) in NOTES {
        let count = counters.get(counter as usize).copied().unwrap_or(0);
        let count = match counter {
            Counter::Unread => count + plan.unread_over_tcp(),
            Counter::DnsOverTcp if !plan.misses_tcp() => 0,
            _ => count,
        };
        if count != 0 {
            let _ = writeln!(text, "  {count} {what}");
        }
    }
    text
}

/// The hits of all rules of a line.
fn sum(line: &Folded, hits: &[Hits]) -> Hits {
    let mut sum = Hits::default();
    for hits in line.members.iter().filter_map(|index| hits.get(*index)) {
        sum.add(hits);
    }
    sum
}

/// The row of one rule, or of all faults that were drawn from one.
fn row(line: &Folded, rule: &PlannedRule, hits: &Hits, injection: &Injection) -> [String; 5] {
    let stats = &hits.stats;
    let (seen, hit) = if rule.stream.is_some() {
        (
            counted(stats.seen_packets, "conn"),
            counted(stats.hit_packets, "time"),
        )
    } else {
        (
            amount(stats.seen_packets, stats.seen_segments, stats.seen_bytes),
            amount(stats.hit_packets, stats.hit_segments, stats.hit_bytes),
        )
    };
    let by = rule.mechanism(Some(injection.hooks().to_string()));
    [
        line.to_string(),
        seen,
        hit,
        hits.connections.to_string(),
        by,
    ]
}

/// A rule's line with `(each way)` behind its delay, if that adds up to twice as much for a round trip.
fn each_way(line: &str, planned: &PlannedRule) -> Option<String> {
    let rule = &planned.rule;
    let delays = |part: &Fault| matches!(part, Fault::Delay(_) | Fault::Latency(_));
    let is_both =
        rule.modifiers.direction == Direction::Both && planned.resolved.question.is_none();
    let fault = rule.fault.to_string();
    (is_both && rule.fault.parts().any(delays))
        .then(|| line.replacen(&fault, &format!("{fault} (each way)"), 1))
}

/// Lines about packets that the delay line could not hold.
fn held(text: &mut String, injection: &Injection) {
    if let Some(figures) = injection.delay_line() {
        for (count, what) in [
            (
                &figures.queue_full,
                "packets were dropped because the queue of a `rate` was full",
            ),
            (
                &figures.no_room,
                "packets were not delayed or changed: the limit of held packets was reached (256 MiB, or 16,384 \
                 datagrams of a target)",
            ),
            (&figures.refused, "held packets could not be forwarded"),
        ] {
            let count = count.load(Ordering::Relaxed);
            if count != 0 {
                let _ = writeln!(text, "  {count} {what}");
            }
        }
    }
}

/// Lines about packets dropped at interfaces, and about interfaces that have disappeared.
fn interfaces(text: &mut String, injection: &Injection) {
    match (injection.losses(), injection.vanished()) {
        (Ok(losses), Ok(vanished)) => {
            for QdiscDrops { interface, packets } in losses {
                let _ = writeln!(
                    text,
                    "  {packets} packets were dropped in the full queue of {interface}"
                );
            }
            for name in vanished {
                let _ = writeln!(
                    text,
                    "  {name} disappeared during the run: no rule was applied there afterwards"
                );
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            let _ = writeln!(text, "  the state of the interfaces is unknown: {error:#}");
        }
    }
}

/// Formats rows in columns. The first and the last column are left-aligned, the others right-aligned.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                if column == 0 {
                    format!("{cell:width$}")
                } else if column + 1 == N {
                    cell.clone()
                } else {
                    format!("{cell:>width$}")
                }
            });
        format!("  {}\n", cells.collect::<Vec<_>>().join("  "))
    };
    rows.iter().map(line).collect()
}

/// Lists as many names as fit on a line.
fn places(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

/// Formats packets and bytes, and segments if they differ.
fn amount(packets: u64, segments: u64, bytes: u64) -> String {
    let (packed, bytes) = (counted(packets, "pkt"), human_bytes(bytes));
    if packets == segments {
        format!("{packed} {bytes}")
    } else {
        format!("{packed}/{} {bytes}", counted(segments, "seg"))
    }
}

/// Formats a number with what it counts: `1 packet`, `2 packets`.
#[must_use]
pub fn counted<N: Copy + Display + PartialEq + From<u8>>(number: N, what: &str) -> String {
    let ending = if number == N::from(1) { "" } else { "s" };
    format!("{number} {what}{ending}")
}

/// Formats bytes in the largest suitable unit.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = bytes;
    let mut rest = 0;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    if unit == 0 {
        format!("{whole} B")
    } else {
        format!("{whole}.{} {}", rest * 10 / 1024, UNITS[unit])
    }
}

/// One line for a terminal, updated while the rules are applied.
#[must_use]
pub fn line(folded: &[Folded], hits: &[Hits]) -> String {
    let parts: Vec<String> = folded
        .iter()
        .map(|line| {
            let stats = sum(line, hits).stats;
            format!("{line}: {} of {}", stats.hit_packets, stats.seen_packets)
        })
        .collect();
    parts.join(" · ")
}

/// Says which addresses are known by several of the names: the rules for each of them match there.
#[must_use]
pub fn shared_addresses(plan: &Plan, learned: &[LearnedName]) -> Vec<String> {
    let mut names: BTreeMap<IpAddr, BTreeSet<&str>> = BTreeMap::new();
    let known = plan.rules.iter().filter_map(|rule| {
        let hosts = rule.resolved.hosts.iter();
        Some((rule.resolved.name.as_deref()?, hosts.map(Cidr::address)))
    });
    for (name, addresses) in known {
        for address in addresses {
            names.entry(address).or_default().insert(name);
        }
    }
    let is_host = |name: &&LearnedName| {
        let mut rules = plan.rules.iter();
        rules.any(|rule| rule.resolved.name.as_ref() == Some(&name.name))
    };
    for name in learned.iter().filter(is_host) {
        for address in &name.addresses {
            names.entry(*address).or_default().insert(&name.name);
        }
    }
    let mut shared: BTreeMap<Vec<&str>, Vec<IpAddr>> = BTreeMap::new();
    for (address, names) in names.into_iter().filter(|(_, names)| names.len() > 1) {
        shared
            .entry(names.into_iter().collect())
            .or_default()
            .push(address);
    }
    shared
        .into_iter()
        .map(|(names, addresses)| {
            let more = match addresses.len() {
                1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            format!(
                "{} have the address {}{more} in common: rules for either name match there",
                names.join(" and "),
                addresses[0]
            )
        })
        .collect()
}

/// The processes that rules apply to, for explaining rules that never fired.
#[derive(Clone, Copy, Debug)]
pub struct Audience<'a> {
    /// The name of the processes, such as `the command`.
    pub who: &'a str,
    /// The endpoints that they used, if known.
    pub endpoints: Option<&'a Endpoints>,
    /// The host names that rules are aimed at, with what was looked up.
    pub names: &'a [LearnedName],
    /// The number of hits that could not be carried out.
    pub failed: u64,
    /// Whether the rules are applied to a bridge, such as that of containers.
    pub has_bridge: bool,
}

/// The most likely reason why the rule with this index never fired.
#[must_use]
pub fn why_unfired(plan: &Plan, hits: &[Hits], index: usize, audience: &Audience<'_>) -> String {
    let (rule, hits) = (&plan.rules[index], &hits[index]);
    let was_seen = hits.stats.seen_packets != 0;
    let instead = audience
        .endpoints
        .filter(|_| !was_seen)
        .and_then(|used| instead(&rule.resolved, &rule.target, audience.who, used));
    let published = if audience.has_bridge {
        "; for a published container port, name the container's own port"
    } else {
        ""
    };
    let unknown = audience.names.iter().find(|name| {
        rule.resolved.name.as_ref() == Some(&name.name) && rule.resolved.hosts.is_empty()
    });
    match &rule.stream {
        _ if !was_seen && unknown.is_some_and(|name| name.lookups == 0) => format!(
            "{} was never looked up, as far as DNS over UDP shows, and had no address at the start",
            rule.resolved.name.as_deref().unwrap_or_default()
        ),
        _ if !was_seen && unknown.is_some_and(|name| name.addresses.is_empty()) => format!(
            "the lookups of {} gave no address",
            rule.resolved.name.as_deref().unwrap_or_default()
        ),
        None if rule.resolved.question.is_some() && !was_seen => format!(
            "{} sent no query{} that {} is for",
            audience.who,
            rule.over_tcp.as_ref().map_or(" over UDP", |_| ""),
            rule.target
        ),
        Some(stream) if !was_seen => {
            let why = never_redirected(stream.resolved.target.protocol);
            instead.map_or_else(|| why.to_owned(), |instead| format!("{why}; {instead}"))
        }
        None if instead.is_some() => instead.unwrap_or_default() + published,
        Some(_) => format!(
            "connections matched its target, but {}",
            not_selected(
                rule,
                "its modifiers or its probability selected nothing, or the event that it acts \
                    on did not occur"
            )
        ),
        None if !was_seen => format!(
            "no packet matched its target; check the port, protocol, host and interface, and that the command \
                     uses the target{published}"
        ),
        None if only_marks(rule) => {
            "packets matched its target, but none of them supports ECN (enable it \
                with `sysctl -w net.ipv4.tcp_ecn=1` at the client)"
                .to_owned()
        }
        None if audience.failed != 0 => {
            "packets matched its target, but the fault could not be applied to \
                any of them"
                .to_owned()
        }
        None => format!(
            "packets matched its target, but {}",
            not_selected(rule, "its modifiers or its probability selected no packet")
        ),
    }
}

/// The reason why no connection was redirected.
fn never_redirected(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Udp => "no datagram matched its target while the rule was applied",
        Protocol::Tcp => {
            "no new connection to its target was opened while the rule was applied (existing connections are \
             unaffected unless `reconnect` is given)"
        }
        _ => {
            "no new connection to its target was opened and no datagram matched while the rule was applied (existing \
             connections are unaffected unless `reconnect` is given)"
        }
    }
}

/// Why a rule selected nothing of what matched its target: its window, then its fault's condition or else `otherwise`.
fn not_selected(PlannedRule { rule, .. }: &PlannedRule, otherwise: &str) -> String {
    let given = rule.modifiers.given();
    let is_time = |key: &str| matches!(key, "at" | "for" | "period" | "duty");
    let (times, others): (Vec<_>, Vec<_>) = given.into_iter().partition(|(key, _)| is_time(key));
    let fault = rule.fault.waits_for();
    // A probability is the only argument that selects, and it is a percentage.
    let is_certain = others.is_empty() && fault.is_none() && !rule.fault.to_string().contains('%');
    let otherwise = fault.unwrap_or_else(|| otherwise.to_owned());
    let times: Vec<_> = times
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    match times.join(" ").as_str() {
        "" => otherwise,
        window if is_certain => format!("all outside of its window `{window}`"),
        window => format!("all outside of its window `{window}`, or {otherwise}"),
    }
}

/// Whether a rule only marks congestion.
fn only_marks(rule: &PlannedRule) -> bool {
    rule.entries
        .iter()
        .all(|part| part.entry.fault == fault::ECN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::plan;
    use crate::rule::{Rule, SystemResolver, Targets};

    #[test]
    fn a_condition_that_was_not_met_is_named() {
        for (text, part) in [
            ("tcp:1 mtu=1400", "no packet was larger than 1400 bytes"),
            (
                "tcp:1 reset=1KiB",
                "no connection sent 1KiB in one direction",
            ),
            (
                "tcp:1 drop nth=9",
                "its modifiers or its probability selected no packet",
            ),
            (
                "tcp:1 drop at=1s for=2s",
                "packets matched its target, but all outside of its window `at=1s for=2s`",
            ),
            (
                "tcp:1 down for=100ms",
                "packets matched its target, but all outside of its window `for=100ms`",
            ),
            (
                "tcp:1 stall for=100ms",
                "connections matched its target, but all outside of its window `for=100ms`",
            ),
            (
                "tcp:1 loss=3% for=2s",
                "all outside of its window `for=2s`, or its modifiers or its probability selected no packet",
            ),
            ("tcp:1 close", "give it `at=TIME`"),
        ] {
            let rule: Rule = text.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            let plan = Plan::new(&[(rule, resolved)], 1, None, None).unwrap();
            let mut seen = Hits::default();
            seen.stats.seen_packets = 1;
            let audience = Audience {
                who: "the command",
                endpoints: None,
                names: &[],
                failed: 0,
                has_bridge: false,
            };
            let why = why_unfired(&plan, &[seen], 0, &audience);
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn what_marks_congestion_says_that_ecn_has_to_be_agreed_on() {
        let rules = ["tcp:1 ecn=20%", "tcp:1 loss=20%"].map(|text| {
            let rule: Rule = text.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            (rule, resolved)
        });
        let plan = Plan::new(&rules, 1, None, None).unwrap();
        let mut seen = Hits::default();
        seen.stats.seen_packets = 1;
        let audience = Audience {
            who: "the command",
            endpoints: None,
            names: &[],
            failed: 0,
            has_bridge: false,
        };
        let reasons = |hits: [Hits; 2], audience| {
            [0, 1].map(|index| why_unfired(&plan, &hits, index, audience))
        };
        let says = reasons([seen, seen], &audience).map(|why| why.contains("tcp_ecn"));
        assert_eq!(says, [true, false]);
        let unseen = reasons([Hits::default(); 2], &audience);
        assert!(unseen.iter().all(|why| why.contains("check the port")));
        let failed = Audience {
            failed: 1,
            ..audience
        };
        let reasons = reasons([seen, seen], &failed);
        assert!(reasons[1].contains("could not be applied"), "{reasons:?}");
    }

    #[test]
    fn a_delay_in_both_directions_says_each_way() {
        for (text, shown) in [
            (
                "tcp:1 delay=9ms p=5%",
                Some("tcp:1 delay=9ms (each way) p=5%"),
            ),
            ("tcp:1 latency=9ms", Some("tcp:1 latency=9ms (each way)")),
            (
                "tcp:1 mix 9%:drop 1%:delay=9ms",
                Some("tcp:1 mix 9%:drop 1%:delay=9ms (each way)"),
            ),
            ("tcp:1 delay=9ms dir=to-client", None),
            ("dns delay=9ms", None),
            ("tcp:1 drop", None),
        ] {
            let plan = plan(&[text]);
            assert_eq!(each_way(text, &plan.rules[0]).as_deref(), shown, "{text}");
        }
    }

    #[test]
    fn one_is_not_several() {
        assert_eq!(amount(1, 1, 60), "1 pkt 60 B");
        assert_eq!(amount(2, 3, 60), "2 pkts/3 segs 60 B");
        assert_eq!(counted(1, "time"), "1 time");
    }

    #[test]
    fn columns_are_as_wide_as_need_be() {
        let rows = [["rule", "seen", "by"], ["tcp:1 drop", "12 pkts", "tc"]];
        let rows = rows.map(|row| row.map(str::to_owned));
        assert_eq!(
            columns(&rows),
            "  rule           seen  by\n  tcp:1 drop  12 pkts  tc\n"
        );
    }
}
