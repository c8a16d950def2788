//! Names to addresses: what the plan compiles.

use std::io;
use std::net::{IpAddr, Ipv6Addr, ToSocketAddrs};

use fault_common::dns;

use super::dictionary::is_interface;
use super::error::{Piece, RuleError};
use super::hints;
use super::target::{Cidr, Host, PortRange, Protocol, Target, TargetRef, Targets};
use super::{Fault, Modifiers, NamePattern, Rule};

/// Looks up host names.
pub trait Resolver {
    /// The addresses of a host, IPv4 and IPv6.
    ///
    /// # Errors
    /// Where the look-up fails.
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// The system's resolver (getaddrinfo). It blocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolver for SystemResolver {
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>> {
        Ok((host, 0)
            .to_socket_addrs()?
            .map(|address| address.ip())
            .collect())
    }
}

impl<F: FnMut(&str) -> io::Result<Vec<IpAddr>>> Resolver for F {
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>> {
        self(host)
    }
}

/// A target whose names are looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ResolvedTarget {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The hosts, sorted and without those that another one covers; empty means any, unless there is a name.
    pub hosts: Vec<Cidr>,
    /// The host name whose further addresses are learned, or `*.` and a domain.
    pub name: Option<String>,
    /// The name that a query of DNS asks for, `*.` and a domain, or `*`; nothing where other packets are meant too.
    pub question: Option<String>,
    /// The host names whose addresses were looked up once and are not learned; `localhost` left out.
    pub fixed_names: Vec<String>,
    /// The ports, sorted, without overlap; empty means any.
    pub ports: Vec<PortRange>,
    /// Protocols that are meant at every port although there are ports, which are of the others; [`Protocol::Any`] stands
    /// for those that are neither TCP, UDP nor ICMP.
    pub portless: Vec<Protocol>,
}

impl ResolvedTarget {
    /// Whether every host is meant.
    #[must_use]
    pub fn has_any_host(&self) -> bool {
        self.hosts.is_empty() && self.name.is_none()
    }

    /// Whether an address belongs to a host that is meant, as far as addresses were known when the rule was resolved.
    #[must_use]
    pub fn has_host(&self, address: IpAddr) -> bool {
        self.has_any_host() || self.hosts.iter().any(|host| host.contains(address))
    }
}

/// A rule that is ready to be planned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ResolvedRule {
    /// The target's name as the rule writes it, for reports and expectations.
    pub name: String,
    /// What it is aimed at.
    pub target: ResolvedTarget,
    /// The name of the host that it is aimed at, where it has one with a dot.
    pub server: Option<NamePattern>,
    /// What it does.
    pub fault: Fault,
    /// What decides whether it fires.
    pub modifiers: Modifiers,
}

impl Rule {
    /// The target that the rule's name stands for.
    ///
    /// # Errors
    /// Where there is no such target and the name is not a host's either.
    pub fn target_in(&self, targets: &Targets) -> Result<Target, RuleError> {
        let name = match &self.target {
            TargetRef::Spec(target) => return Ok(target.clone()),
            TargetRef::Name(name) => name,
        };
        if let Some(target) = targets.get(name) {
            return Ok(target.clone());
        }
        if name == Protocol::Dns.word() {
            return Ok(Target {
                protocol: Protocol::Dns,
                ..Target::default()
            });
        }
        if name.contains('.') || name == "localhost" {
            let host = Some(Host::Name(name.to_ascii_lowercase()));
            return Ok(Target {
                host,
                ..Target::default()
            });
        }
        let text = self.to_string();
        let known: Vec<_> = targets.keys().map(String::as_str).collect();
        let error = Piece::whole(&text)
            .slice(0..name.len())
            .error(format!("unknown target `{name}`"))
            .nearest(name, known.iter().copied())
            .suggest_some(hints::service(name, Protocol::Any));
        Err(if is_interface(name) {
            let instead = format!("`* …` with the option `-i {name}`");
            error.expected(instead)
        } else if known.is_empty() {
            error.expected(format!(
                "`--target {name}=tcp:PORT`, or the target itself such as `tcp:3306`"
            ))
        } else {
            error.expected(format!("one of {}", super::args::one_of(&known)))
        })
    }

    /// The rule with its target's name and host name looked up.
    ///
    /// # Errors
    /// Where the target is unknown, its host has no address, or the fault has no meaning there.
    pub fn resolve(
        &self,
        targets: &Targets,
        resolver: &mut impl Resolver,
    ) -> Result<ResolvedRule, RuleError> {
        let target = self.target_in(targets)?;
        if let Some(complaint) = self.complaint(Some(&target)) {
            return Err(self.told(&complaint));
        }
        Ok(ResolvedRule {
            name: self.target.to_string(),
            target: self.resolve_target(&target, resolver)?,
            server: match &target.host {
                Some(Host::Name(name)) if name.contains('.') => NamePattern::of_name(name),
                _ => None,
            },
            fault: self.fault.clone(),
            modifiers: self.modifiers.clone(),
        })
    }

    /// The target with its host looked up and its ports merged.
    fn resolve_target(
        &self,
        target: &Target,
        resolver: &mut impl Resolver,
    ) -> Result<ResolvedTarget, RuleError> {
        if target.protocol == Protocol::Dns {
            return Ok(asked(target.host.as_ref()));
        }
        let text = self.to_string();
        let place = Piece::whole(&text).slice(0..self.target.to_string().len());
        let service = |name: &str| {
            let is_alone = target.ports.is_empty() && target.except.is_empty();
            hints::service(name, target.protocol).filter(|_| is_alone)
        };
        let live = Self::live_name(target);
        let mut fixed_names = Vec::new();
        let mut addresses = |host: &Host| {
            match host {
                Host::Cidr(network) => Ok(vec![*network]),
                Host::Name(name) if is_pattern(name) => match live {
                    Some(_) => Ok(Vec::new()),
                    None => Err(place
                        .error(format!("the names of `{name}` can't be looked up"))
                        .expected("no excluded hosts, or one host name")),
                },
                // What is learned is enough, but for a slip that is known.
                Host::Name(name) if live == Some(name) && service(name).is_none() => {
                    let addresses = resolver.addresses(name).unwrap_or_default();
                    Ok(addresses.into_iter().map(Cidr::host).collect())
                }
                Host::Name(name) => {
                    let addresses = resolver.addresses(name).map_err(|error| {
                        place
                            .error(format!("the host `{name}` can't be looked up: {error}"))
                            .suggest_some(service(name))
                    })?;
                    if addresses.is_empty() {
                        return Err(place.error(format!("the host `{name}` has no address")));
                    }
                    if !is_local(name) {
                        fixed_names.push(name.clone());
                    }
                    Ok(addresses.into_iter().map(Cidr::host).collect())
                }
            }
        };
        let mut hosts = match &target.host {
            None => Vec::new(),
            Some(host) => outermost(addresses(host)?),
        };
        for excluded in target.except.iter().filter_map(|one| one.host.as_ref()) {
            for hole in addresses(excluded)? {
                hosts = without_host(hosts, hole);
                if hosts.is_empty() {
                    return Err(place.error("the exclusions leave no host"));
                }
            }
        }
        let holes: Vec<_> = target
            .except
            .iter()
            .flat_map(|one| one.ports.iter().copied())
            .collect();
        let ports = without_ports(merged(target.ports.clone()), &merged(holes.clone()));
        if ports.is_empty() && !holes.is_empty() {
            return Err(place.error("the exclusions leave no port"));
        }
        Ok(ResolvedTarget {
            protocol: target.protocol,
            hosts,
            name: live.cloned(),
            question: None,
            fixed_names,
            ports,
            portless: portless(target),
        })
    }

    /// The host name of the target, when its addresses are learned while the rule is applied.
    fn live_name(target: &Target) -> Option<&String> {
        let Some(Host::Name(name)) = &target.host else {
            return None;
        };
        let excludes_hosts = target.except.iter().any(|one| one.host.is_some());
        (!is_local(name) && !excludes_hosts).then_some(name)
    }
}

/// Queries of DNS for a name, or for any.
fn asked(host: Option<&Host>) -> ResolvedTarget {
    ResolvedTarget {
        protocol: Protocol::Udp,
        hosts: Vec::new(),
        name: None,
        question: Some(host.map_or_else(|| "*".to_owned(), Host::to_string)),
        fixed_names: Vec::new(),
        ports: vec![PortRange {
            first: dns::PORT,
            last: dns::PORT,
        }],
        portless: Vec::new(),
    }
}

/// Whether a name always means this host.
fn is_local(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// Whether a host name stands for the names of a domain.
fn is_pattern(name: &str) -> bool {
    name.starts_with("*.")
}

impl Target {
    /// The same target without these ports of TCP and UDP; nothing where that can't be said, or leaves none.
    #[must_use]
    pub fn excluding(&self, ports: &[u16]) -> Option<Self> {
        let ports = ports.iter().map(|&first| PortRange { first, last: first });
        let exclusion = Self {
            ports: ports.collect(),
            ..Self::default()
        };
        let mut holes = exclusion.ports.clone();
        holes.extend(self.except.iter().flat_map(|one| one.ports.iter().copied()));
        let left = without_ports(merged(self.ports.clone()), &merged(holes));
        let mut target = self.clone();
        target.except.push(exclusion);
        // Reading it checks it.
        let checked = target.to_string().parse().ok();
        checked.filter(|_: &Self| !left.is_empty())
    }
}

/// The protocols that a target means at every port although it excludes ports of others.
fn portless(target: &Target) -> Vec<Protocol> {
    let mut exclusions = target.except.iter().filter(|one| !one.ports.is_empty());
    match exclusions.next() {
        Some(excluded) if target.protocol == Protocol::Any && target.ports.is_empty() => {
            let is_portless = |one: &Protocol| match one {
                Protocol::Tcp | Protocol::Udp | Protocol::Dns => {
                    excluded.protocol != Protocol::Any && excluded.protocol != *one
                }
                Protocol::Icmp | Protocol::Any => true,
            };
            let all = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Any];
            all.into_iter().filter(is_portless).collect()
        }
        _ => Vec::new(),
    }
}

/// These ports, all where there are none, without others; both are sorted and do not overlap.
fn without_ports(ports: Vec<PortRange>, holes: &[PortRange]) -> Vec<PortRange> {
    if holes.is_empty() {
        return ports;
    }
    let all = PortRange {
        first: 1,
        last: u16::MAX,
    };
    let mut left = if ports.is_empty() { vec![all] } else { ports };
    for hole in holes {
        left = left
            .into_iter()
            .flat_map(|range| {
                let below = PortRange {
                    first: range.first,
                    last: range.last.min(hole.first - 1),
                };
                let above = hole.last.checked_add(1).map(|first| PortRange {
                    first: range.first.max(first),
                    last: range.last,
                });
                let left = [Some(below), above];
                left.into_iter()
                    .flatten()
                    .filter(|part| part.first <= part.last)
            })
            .collect();
    }
    left
}

/// These networks, or all addresses where there are none, without another: the siblings on the way down to it.
fn without_host(hosts: Vec<Cidr>, hole: Cidr) -> Vec<Cidr> {
    let all = Block { bits: 0, prefix: 0 };
    let from = if hosts.is_empty() {
        vec![all]
    } else {
        hosts.into_iter().map(Block::of).collect()
    };
    let hole = Block::of(hole);
    let left = from.into_iter().flat_map(|block| block.without(&hole));
    left.map(Block::into_cidr).collect()
}

/// A network in the space of IPv6, where IPv4 has its mapped addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Block {
    bits: u128,
    prefix: u8,
}

impl Block {
    /// The prefix of the IPv4-mapped addresses.
    const MAPPED: u8 = 96;

    fn of(network: Cidr) -> Self {
        match network.address() {
            IpAddr::V4(v4) => Self {
                bits: v4.to_ipv6_mapped().to_bits(),
                prefix: network.prefix() + Self::MAPPED,
            },
            IpAddr::V6(v6) => Self {
                bits: v6.to_bits(),
                prefix: network.prefix(),
            },
        }
    }

    fn into_cidr(self) -> Cidr {
        let address = Ipv6Addr::from_bits(self.bits);
        let network = match address.to_ipv4_mapped() {
            Some(v4) if self.prefix >= Self::MAPPED => {
                Cidr::new(v4.into(), self.prefix - Self::MAPPED)
            }
            _ => Cidr::new(address.into(), self.prefix),
        };
        network.unwrap_or_else(|| Cidr::host(address.into()))
    }

    /// The leading bits of an address.
    fn leading(bits: u128, prefix: u8) -> u128 {
        let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
        bits & mask
    }

    fn covers(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && Self::leading(other.bits, self.prefix) == self.bits
    }

    fn without(self, hole: &Self) -> Vec<Self> {
        if hole.covers(&self) {
            return Vec::new();
        }
        if !self.covers(hole) {
            return vec![self];
        }
        let sibling = |prefix: u8| Self {
            bits: Self::leading(hole.bits, prefix) ^ 1 << (128 - u32::from(prefix)),
            prefix,
        };
        (self.prefix + 1..=hole.prefix).map(sibling).collect()
    }
}

/// The networks that no other one of them covers, sorted.
fn outermost(mut hosts: Vec<Cidr>) -> Vec<Cidr> {
    hosts.sort_unstable();
    hosts.dedup();
    let all = hosts.clone();
    hosts.retain(|host| !all.iter().any(|other| other != host && other.covers(host)));
    hosts
}

/// The same ports as sorted ranges that neither overlap nor touch.
fn merged(mut ports: Vec<PortRange>) -> Vec<PortRange> {
    ports.sort_unstable();
    let mut out: Vec<PortRange> = Vec::new();
    for range in ports {
        match out.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::Protocol::{Any, Icmp, Tcp, Udp};
    use super::*;
    use crate::rule::Targets;

    fn resolved(text: &str) -> ResolvedTarget {
        let rule: Rule = format!("{text} drop").parse().expect("a rule");
        let nobody = &mut |_: &str| Ok(Vec::new());
        rule.resolve(&Targets::new(), nobody)
            .expect("resolved")
            .target
    }

    #[test]
    fn excluded_hosts_are_those_of_the_networks_and_no_others() {
        let target = resolved("*,!10.0.0.0/8,![2001:db8::]/32");
        let has = |address: &str| {
            let address = address.parse().expect("an address");
            let block = Block::of(Cidr::host(address));
            target
                .hosts
                .iter()
                .any(|host| Block::of(*host).covers(&block))
        };
        for inside in [
            "10.0.0.0",
            "10.255.255.255",
            "2001:db8::1",
            "2001:db8:ffff::",
        ] {
            assert!(!has(inside), "{inside}");
        }
        for outside in [
            "9.255.255.255",
            "11.0.0.0",
            "0.0.0.0",
            "255.255.255.255",
            "::1",
            "2001:db9::",
        ] {
            assert!(has(outside), "{outside}");
        }
    }

    #[test]
    fn excluded_ports_leave_the_others_of_their_protocol() {
        let text = |ports: &[PortRange]| {
            let all: Vec<_> = ports.iter().map(ToString::to_string).collect();
            all.join(",")
        };
        let of = |target: &str| text(&resolved(target).ports);
        assert_eq!(of("tcp:!22"), "1-21,23-65535");
        assert_eq!(of("tcp:!1,65535"), "2-65534");
        assert_eq!(of("tcp:20-30,!22-24,!30"), "20-21,25-29");
        assert_eq!(of("*,!10.0.0.1"), "");
        assert_eq!(resolved("*,!22").portless, [Icmp, Any]);
        assert_eq!(resolved("!tcp:22").portless, [Udp, Icmp, Any]);
        assert_eq!(resolved("!udp:53").portless, [Tcp, Icmp, Any]);
        assert_eq!(resolved("tcp:!22").portless, []);
    }
}
