//! The closing summary: per rule, what it saw, what it hit, and by what mechanism.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::atomic::Ordering;

use fault_common::abi::{Counter, fault};

use super::instead::instead;
use crate::hold::qdiscs::Loss;
use crate::inject::endpoints::Endpoints;
use crate::inject::injection::{Hits, Injection};
use crate::inject::names::LearnedName;
use crate::plan::{Plan, PlannedRule};
use crate::rule::{Cidr, Protocol, Rule};

/// The counters that are worth a line when they are not zero.
const NOTES: [(Counter, &str); 13] = [
    (Counter::Malformed, "malformed packets passed"),
    (
        Counter::Headers,
        "packets with too many IPv6 extension headers passed",
    ),
    (
        Counter::Fragment,
        "later IP fragments were not matched by port: their first fragment did not arrive before them, or more than 4096 \
         datagrams were in fragments at once",
    ),
    (
        Counter::FlowRuleTableFull,
        "times a rule did not act on a packet: too many connections match more than 8 rules",
    ),
    (
        Counter::ActionFailed,
        "hits could not be carried out; the packet passed",
    ),
    (
        Counter::NotHeld,
        "packets were not delayed because fault did not run",
    ),
    (
        Counter::Group,
        "multicast or broadcast packets were delivered: for one of several receivers a rule can only drop them",
    ),
    (
        Counter::FlowTableFull,
        "packets passed because the table of connections was full: their ordinals are not counted",
    ),
    (
        Counter::Forgotten,
        "idle connections were forgotten because the table of connections was full: they count as new if they go on",
    ),
    (
        Counter::Contended,
        "packets were judged by two CPUs at once, with inexact ordinals",
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
        Counter::EventLost,
        "events were lost: the ring buffer was full",
    ),
];

/// The table that closes a run.
#[must_use]
pub fn table(plan: &Plan, hits: &[Hits], injection: &Injection, counters: &[u64]) -> String {
    let mut text = format!(
        "fault: healed after {:.1} s; by {} on {}; seed {}\n",
        injection.started().elapsed().as_secs_f64(),
        injection.hooks(),
        places(&injection.names()),
        plan.seed
    );
    let mut rows = vec![["rule", "seen", "hit", "conns", "by"].map(str::to_owned)];
    let rules = plan.rules.iter().zip(hits);
    rows.extend(rules.map(|(rule, hits)| row(rule, hits, injection)));
    text += &columns(&rows);
    held(&mut text, injection);
    interfaces(&mut text, injection);
    for (counter, what) in NOTES {
        let count = counters.get(counter as usize).copied().unwrap_or(0);
        if count != 0 {
            let _ = writeln!(text, "  {count} {what}");
        }
    }
    text
}

/// What one rule did.
fn row(rule: &PlannedRule, hits: &Hits, injection: &Injection) -> [String; 5] {
    let stats = &hits.stats;
    let (seen, hit) = if rule.stream.is_some() {
        (
            format!("{} conns", stats.seen_packets),
            format!("{} times", stats.hit_packets),
        )
    } else {
        (
            amount(stats.seen_packets, stats.seen_segments, stats.seen_bytes),
            amount(stats.hit_packets, stats.hit_segments, stats.hit_bytes),
        )
    };
    let by = rule.mechanism(Some(injection.hooks().to_string()));
    [
        rule.text.clone(),
        seen,
        hit,
        hits.connections.to_string(),
        by,
    ]
}

/// What the delay line could not keep.
fn held(text: &mut String, injection: &Injection) {
    if let Some(figures) = injection.delay_line() {
        for (count, what) in [
            (
                &figures.queue_full,
                "packets were lost in full queues of a rate",
            ),
            (
                &figures.no_room,
                "packets were not delayed or changed: all was held that may be (256 MiB, 16,384 datagrams of a target)",
            ),
            (&figures.refused, "held packets could not be sent on"),
        ] {
            let count = count.load(Ordering::Relaxed);
            if count != 0 {
                let _ = writeln!(text, "  {count} {what}");
            }
        }
    }
}

/// What was lost at interfaces, and those that are gone.
fn interfaces(text: &mut String, injection: &Injection) {
    match (injection.losses(), injection.vanished()) {
        (Ok(losses), Ok(vanished)) => {
            for Loss { interface, packets } in losses {
                let _ = writeln!(
                    text,
                    "  {packets} packets were lost in the full queue of {interface}"
                );
            }
            for name in vanished {
                let _ = writeln!(
                    text,
                    "  {name} has vanished meanwhile: nothing was hurt there from then on"
                );
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            let _ = writeln!(
                text,
                "  what became of the interfaces can't be told: {error:#}"
            );
        }
    }
}

/// Rows in columns as wide as what is in them: the first and the last begin at the left, figures end at the right.
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

/// Names, as many as fit a line.
fn places(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

/// Packets and bytes; segments as well where they differ.
fn amount(packets: u64, segments: u64, bytes: u64) -> String {
    let bytes = human_bytes(bytes);
    if packets == segments {
        format!("{packets} pkts {bytes}")
    } else {
        format!("{packets} pkts/{segments} segs {bytes}")
    }
}

/// Bytes in the largest unit of which there is at least one.
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

/// One line for a terminal, rewritten while rules are in force.
#[must_use]
pub fn line(plan: &Plan, hits: &[Hits]) -> String {
    let parts: Vec<String> = plan
        .rules
        .iter()
        .zip(hits)
        .map(|(rule, hits)| {
            format!(
                "{}: {} of {}",
                rule.text, hits.stats.hit_packets, hits.stats.seen_packets
            )
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

/// Whom rules are about, and what these did.
#[derive(Clone, Copy, Debug)]
pub struct Audience<'a> {
    /// Who: `the command`.
    pub who: &'a str,
    /// What they connected to, where that is known.
    pub endpoints: Option<&'a Endpoints>,
    /// The host names that rules are aimed at, with what was looked up.
    pub names: &'a [LearnedName],
    /// How many hits could not be carried out.
    pub failed: u64,
    /// The rules are on a bridge, as containers have.
    pub has_bridge: bool,
}

/// The rules that never fired, each with the likeliest reason.
#[must_use]
pub fn unfired<'a>(
    plan: &'a Plan,
    hits: &[Hits],
    audience: &Audience<'_>,
) -> Vec<(&'a str, String)> {
    plan.rules
        .iter()
        .zip(hits)
        .filter(|(_, hits)| hits.stats.hit_packets == 0)
        .map(|(rule, hits)| {
            let was_seen = hits.stats.seen_packets != 0;
            let instead = audience
                .endpoints
                .filter(|_| !was_seen)
                .and_then(|used| instead(&rule.resolved, &rule.target, audience.who, used));
            let published = if audience.has_bridge {
                "; of a published container port, name the container's own port"
            } else {
                ""
            };
            let unknown = audience.names.iter().find(|name| {
                rule.resolved.name.as_ref() == Some(&name.name) && rule.resolved.hosts.is_empty()
            });
            let why = match &rule.stream {
                None if unknown.is_some_and(|name| name.lookups == 0) => format!(
                    "{} was never looked up, as far as DNS over UDP shows, and had no address at the start",
                    rule.resolved.name.as_deref().unwrap_or_default()
                ),
                None if unknown.is_some_and(|name| name.addresses.is_empty()) => format!(
                    "the lookups of {} gave no address",
                    rule.resolved.name.as_deref().unwrap_or_default()
                ),
                None if rule.resolved.question.is_some() && !was_seen => format!(
                    "{} sent no query over UDP that {} is for",
                    audience.who, rule.target
                ),
                Some(stream) if !was_seen => {
                    let why = never_redirected(stream.target.protocol);
                    instead.map_or_else(|| why.to_owned(), |instead| format!("{why}; {instead}"))
                }
                None if instead.is_some() => instead.unwrap_or_default() + published,
                Some(_) => "its target was used, but its modifiers and chance picked nothing, or what it acts on did not \
                            happen there"
                    .to_owned(),
                None if !was_seen => format!(
                    "no packet of its target was seen (is it the right port, protocol, host and interface, and did \
                     the command use it?{published})"
                ),
                None if only_marks(rule) => "its target was seen, but no packet on which it can mark congestion was picked \
                                             (ECN is agreed on with `sysctl -w net.ipv4.tcp_ecn=1` at the client)"
                    .to_owned(),
                None if audience.failed != 0 => "its target was seen, but none of its hits could be carried out".to_owned(),
                None => format!(
                    "its target was seen, but {}",
                    condition(rule).unwrap_or_else(|| "its modifiers and chance picked nothing".to_owned())
                ),
            };
            (rule.text.as_str(), why)
        })
        .collect()
}

/// Why the relay has met nobody.
fn never_redirected(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Udp => "no datagram of its target was seen while it was in force",
        Protocol::Tcp => {
            "no new connection to its target was opened while it was in force (open connections stay as they are)"
        }
        _ => {
            "no new connection to its target was opened, and no datagram of it seen, while it was in force (open \
             connections stay as they are)"
        }
    }
}

/// What did not happen, for a fault that waits for something; such a rule has one entry.
fn condition(rule: &PlannedRule) -> Option<String> {
    rule.text.parse::<Rule>().ok()?.fault.waits_for()
}

/// Whether all that a rule does is to mark congestion.
fn only_marks(rule: &PlannedRule) -> bool {
    rule.entries
        .iter()
        .all(|part| part.entry.fault == fault::ECN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{SystemResolver, Targets};

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
                "its modifiers and chance picked nothing",
            ),
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
            let why = &unfired(&plan, &[seen], &audience)[0].1;
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
        let reasons = unfired(&plan, &[seen, seen], &audience);
        let says = reasons.iter().map(|(_, why)| why.contains("tcp_ecn"));
        assert_eq!(says.collect::<Vec<_>>(), [true, false]);
        let reasons = unfired(&plan, &[Hits::default(); 2], &audience);
        assert!(reasons.iter().all(|(_, why)| why.contains("right port")));
        let reasons = unfired(
            &plan,
            &[seen, seen],
            &Audience {
                failed: 1,
                ..audience
            },
        );
        assert!(reasons[1].1.contains("carried out"), "{reasons:?}");
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
