//! Explains a rule that never matched by the endpoints that processes used instead.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::inject::endpoints::{EndpointUse, Endpoints};
use crate::rule::{Protocol, ResolvedTarget};

/// Maximum number of endpoints that are listed.
const NAMED: usize = 5;

/// Describes the endpoints that `who` used instead of the target, which the rule calls `name`, or that the target was
/// used in another network namespace. `None` if it was used in the rules' namespace.
#[must_use]
pub fn instead(
    target: &ResolvedTarget,
    name: &str,
    who: &str,
    endpoints: &Endpoints,
) -> Option<String> {
    let used = |one: &&EndpointUse| is_target(target, one);
    if endpoints
        .known
        .iter()
        .filter(used)
        .any(|one| !one.is_elsewhere)
    {
        return None;
    }
    let elsewhere: u64 = endpoints
        .known
        .iter()
        .filter(used)
        .map(|one| one.times)
        .sum();
    if elsewhere != 0 {
        return Some(format!(
            "{who} used {name} {}, but in another network namespace than that of the rules (select it with --netns, \
             --container or --pid)",
            times(elsewhere)
        ));
    }
    let mut connected = named(target, endpoints, false);
    if endpoints.unix != 0 {
        connected.push(format!("a Unix socket ({})", times(endpoints.unix)));
    }
    if endpoints.left_out != 0 {
        connected.push(format!("others ({})", times(endpoints.left_out)));
    }
    let bound = list(&named(target, endpoints, true));
    Some(match (connected.as_slice(), bound.as_str()) {
        ([], "") => format!("{who} opened no connection and sent no datagram"),
        ([], bound) => format!("{who} bound {bound} and never used {name}"),
        (connected, "") => format!("{who} connected to {}, never to {name}", list(connected)),
        (connected, bound) => format!(
            "{who} connected to {}, never to {name}, and bound {bound}",
            list(connected)
        ),
    })
}

/// Whether an endpoint belongs to the target.
fn is_target(target: &ResolvedTarget, one: &EndpointUse) -> bool {
    let protocol = match target.protocol {
        Protocol::Tcp | Protocol::Udp => one.protocol == target.protocol,
        Protocol::Dns => one.protocol == Protocol::Udp,
        Protocol::Any => true,
        Protocol::Icmp => false,
    };
    let port = target.ports.is_empty()
        || target
            .ports
            .iter()
            .any(|range| (range.first..=range.last).contains(&one.port));
    let address = is_any(one.address) || target.has_host(one.address);
    protocol && port && address
}

/// A wildcard address matches every host.
fn is_any(address: IpAddr) -> bool {
    address.is_unspecified()
}

/// The most used endpoints in the syntax of rules, with addresses if the target has hosts.
fn named(target: &ResolvedTarget, endpoints: &Endpoints, is_bound: bool) -> Vec<String> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for one in endpoints
        .known
        .iter()
        .filter(|one| one.is_bound == is_bound)
    {
        let protocol = if one.protocol == Protocol::Udp {
            "udp"
        } else {
            "tcp"
        };
        let name = match one.address {
            IpAddr::V4(address) if !target.has_any_host() => {
                format!("{protocol}:{address}:{}", one.port)
            }
            IpAddr::V6(address) if !target.has_any_host() => {
                format!("{protocol}:[{address}]:{}", one.port)
            }
            _ => format!("{protocol}:{}", one.port),
        };
        *counts.entry(name).or_default() += one.times;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| Reverse(*count));
    let more = counts.len().saturating_sub(NAMED);
    let mut names: Vec<_> = counts
        .into_iter()
        .take(NAMED)
        .map(|(name, count)| {
            if is_bound {
                name
            } else {
                format!("{name} ({})", times(count))
            }
        })
        .collect();
    if more != 0 {
        names.push(format!("{more} more"));
    }
    names
}

fn times(count: u64) -> String {
    match count {
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        count => format!("{count} times"),
    }
}

/// `a, b and c`.
fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Rule, SystemResolver, Targets};

    fn target(text: &str) -> ResolvedTarget {
        let rule: Rule = format!("{text} drop").parse().unwrap();
        rule.resolve(&Targets::new(), &mut SystemResolver)
            .unwrap()
            .target
    }

    fn endpoint(protocol: Protocol, address: &str, port: u16, times: u64) -> EndpointUse {
        EndpointUse {
            protocol,
            address: address.parse().unwrap(),
            port,
            is_bound: false,
            is_elsewhere: false,
            times,
        }
    }

    fn told(text: &str, known: Vec<EndpointUse>, unix: u64) -> Option<String> {
        let endpoints = Endpoints {
            known,
            left_out: 0,
            unix,
        };
        instead(&target(text), text, "the command", &endpoints)
    }

    #[test]
    fn what_was_used_instead_is_named() {
        let used = vec![
            endpoint(Protocol::Udp, "127.0.0.53", 53, 2),
            endpoint(Protocol::Tcp, "127.0.0.1", 5433, 7),
            endpoint(Protocol::Tcp, "::1", 5433, 5),
        ];
        assert_eq!(
            told("tcp:5432", used, 1).unwrap(),
            "the command connected to tcp:5433 (12 times), udp:53 (twice) and a Unix socket (once), never to tcp:5432"
        );
        assert_eq!(
            told("tcp:5432", Vec::new(), 0).unwrap(),
            "the command opened no connection and sent no datagram"
        );
    }

    #[test]
    fn addresses_are_named_where_the_target_has_some() {
        let used = || vec![endpoint(Protocol::Tcp, "10.0.0.5", 5432, 1)];
        assert_eq!(
            told("tcp:10.0.0.6:5432", used(), 0).unwrap(),
            "the command connected to tcp:10.0.0.5:5432 (once), never to tcp:10.0.0.6:5432"
        );
        assert_eq!(told("tcp:10.0.0.5:5432", used(), 0), None);
        assert_eq!(told("tcp:5432", used(), 0), None);
    }

    #[test]
    fn another_network_namespace_is_told() {
        let mut used = endpoint(Protocol::Tcp, "10.0.0.5", 5432, 3);
        used.is_elsewhere = true;
        let text = told("tcp:5432", vec![used], 0).unwrap();
        assert!(
            text.contains("3 times, but in another network namespace"),
            "{text}"
        );
    }

    #[test]
    fn servers_are_told_where_they_listen() {
        let mut used = endpoint(Protocol::Tcp, "0.0.0.0", 5433, 1);
        used.is_bound = true;
        assert_eq!(
            told("tcp:5432", vec![used], 0).unwrap(),
            "the command bound tcp:5433 and never used tcp:5432"
        );
    }
}
