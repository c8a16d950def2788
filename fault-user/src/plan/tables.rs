//! Compiles rules into the lookup tables of the programs.
//!
//! Every field of a packet has a class, and a class is a set of rules: see [`fault_common::matching`]. This module
//! computes the classes.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use anyhow::{Result, bail};

use crate::plan::shapers::{RateShaper, Slots};
use fault_common::abi::{
    NAMED_WORDS, PortClasses, RULES_MAX, RuleEntry, SCOPE_LEVELS_MAX, SetHeader, direction,
    named_at,
};

/// The protocols a rule can name; indexes of [`SetHeader::portless`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolClass {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
    /// ICMP and `ICMPv6`.
    Icmp = 2,
    /// All others.
    Other = 3,
}

/// A cgroup that a rule is limited to, with everything below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupScope {
    /// The cgroup's id: the inode number of its directory.
    pub cgroup: u64,
    /// Its depth; the root is 0.
    pub level: u8,
    /// Its path, to tell which scopes lie within which.
    pub path: std::path::PathBuf,
}

/// A network: an address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    /// The address, IPv4-mapped where it is IPv4, without bits behind the prefix.
    pub address: u128,
    /// Leading bits, of 128.
    pub prefix: u8,
}

impl Network {
    /// The network of `address`'s leading `prefix` bits (of 32 or 128, as the address has).
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Self {
        let (bits, prefix) = match address {
            IpAddr::V4(v4) => (u128::from(v4.to_ipv6_mapped()), prefix + 96),
            IpAddr::V6(v6) => (u128::from(v6), prefix),
        };
        let mask = if prefix == 0 {
            0
        } else {
            u128::MAX << (128 - u32::from(prefix))
        };
        Self {
            address: bits & mask,
            prefix,
        }
    }

    /// Whether another network lies within this one.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        if other.prefix < self.prefix {
            return false;
        }
        self.prefix == 0 || (self.address ^ other.address) >> (128 - u32::from(self.prefix)) == 0
    }
}

/// A rule for the kernel: its match and its entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketRule {
    /// The protocols concerned.
    pub protocols: Vec<ProtocolClass>,
    /// The service's ports, both ends included; empty for all, and for protocols without ports.
    pub ports: Vec<(u16, u16)>,
    /// Those of `protocols` that are meant at every port, although there are ports.
    pub portless: Vec<ProtocolClass>,
    /// The service's addresses; empty for all, unless there is a name.
    pub hosts: Vec<Network>,
    /// The name whose addresses are learned: a host's, or `*.` and a domain.
    pub name: Option<String>,
    /// The names whose addresses are learned for programs that don't judge packets: those of streams and expectations.
    pub learned: BTreeSet<String>,
    /// The name that a query of DNS asks for, `*.` and a domain, or `*`; nothing for other packets too.
    pub question: Option<String>,
    /// The cgroup concerned; nothing for the whole host.
    pub scope: Option<CgroupScope>,
    /// Its entry. `directions` is also used for the tables.
    pub entry: RuleEntry,
    /// Its rate or slots for the delay line.
    pub shaper: Option<Shaper>,
}

impl PacketRule {
    /// Whether every host is meant.
    #[must_use]
    pub fn has_any_host(&self) -> bool {
        self.hosts.is_empty() && self.name.is_none()
    }
}

/// The part of a rule that only the delay line needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shaper {
    /// A rate.
    Rate(RateShaper),
    /// Slots.
    Slots(Slots),
}

/// A name and its classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameClasses {
    /// The name, or a pattern: see [`fault_common::dns::key_of`].
    pub name: String,
    /// The rules that are aimed at its addresses.
    pub host: u16,
    /// The rules that are aimed at queries for it.
    pub question: u16,
}

/// The tables of one rule set.
#[derive(Clone, Debug)]
pub struct RuleTables {
    /// What all rules share; `epoch_ns` and `scope_version` are set when it is installed.
    pub header: SetHeader,
    /// The rules, in their order.
    pub rules: Vec<RuleEntry>,
    /// The classes of all 65,536 ports.
    pub ports: Vec<PortClasses>,
    /// The ports that rules give by themselves: see [`named_at`].
    pub named: Vec<u64>,
    /// The vectors, by class; class 0 is empty.
    pub classes: Vec<Vec<u64>>,
    /// The classes of networks.
    pub hosts: Vec<(Network, u16)>,
    /// The classes of names, each name once.
    pub names: Vec<NameClasses>,
    /// The classes of cgroups.
    pub scopes: Vec<(u64, u16)>,
}

impl RuleTables {
    /// The names, without their classes.
    #[must_use]
    pub fn named(&self) -> BTreeSet<String> {
        self.names.iter().map(|one| one.name.clone()).collect()
    }

    /// Words of each vector.
    #[must_use]
    pub fn words(&self) -> usize {
        self.rules.len().div_ceil(64).max(1)
    }
}

/// Gives equal vectors the same class.
struct Classes {
    vectors: Vec<Vec<u64>>,
    known: HashMap<Vec<u64>, u16>,
}

impl Classes {
    fn new(words: usize) -> Self {
        let empty = vec![0; words];
        Self {
            known: HashMap::from([(empty.clone(), 0)]),
            vectors: vec![empty],
        }
    }

    fn intern(&mut self, vector: &[u64]) -> Result<u16> {
        if let Some(class) = self.known.get(vector) {
            return Ok(*class);
        }
        let Ok(class) = u16::try_from(self.vectors.len()) else {
            bail!(
                "the rules divide ports and hosts into more than 65,535 classes: use fewer or simpler rules"
            );
        };
        self.known.insert(vector.to_vec(), class);
        self.vectors.push(vector.to_vec());
        Ok(class)
    }

    fn of_rules(&mut self, words: usize, rules: impl Iterator<Item = usize>) -> Result<u16> {
        let mut vector = vec![0; words];
        for rule in rules {
            set(&mut vector, rule);
        }
        self.intern(&vector)
    }
}

fn set(vector: &mut [u64], rule: usize) {
    vector[rule / 64] |= 1 << (rule % 64);
}

/// Computes the tables of a rule set. Sockets that are created in `scope` are marked as its own even while no rule is
/// limited to it, for later rules.
///
/// # Errors
/// There are more rules, classes or scope levels than the programs support.
pub fn compile(rules: &[PacketRule], scope: Option<&CgroupScope>) -> Result<RuleTables> {
    if rules.len() > RULES_MAX as usize {
        bail!(
            "{} rules are too many, at most {RULES_MAX} are possible: use fewer or wider rules",
            rules.len()
        );
    }
    let words = rules.len().div_ceil(64).max(1);
    let mut classes = Classes::new(words);
    let mut header = empty_header();
    for (protocol, directions) in header.portless.iter_mut().enumerate() {
        for (direction, class) in directions.iter_mut().enumerate() {
            let named = rules.iter().enumerate().filter(|(_, rule)| {
                is_portless(rule, protocol) && names(rule, protocol) && goes(rule, direction)
            });
            *class = classes.of_rules(words, named.map(|(index, _)| index))?;
        }
    }
    let ports = port_classes(rules, words, &mut classes)?;
    header.has_portless = u8::from(
        rules
            .iter()
            .any(|rule| rule.ports.is_empty() || !rule.portless.is_empty()),
    );
    header.has_hosts = u8::from(!rules.iter().all(PacketRule::has_any_host));
    header.has_questions = u8::from(rules.iter().any(|rule| rule.question.is_some()));
    let others = rules.iter().enumerate();
    let others = others.filter(|(_, rule)| rule.question.is_none());
    header.any_question = classes.of_rules(words, others.map(|(index, _)| index))?;
    header.has_names = u8::from(rules.iter().any(|rule| rule.name.is_some()));
    let hostless = rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| rule.has_any_host());
    header.any_host = classes.of_rules(words, hostless.map(|(index, _)| index))?;
    let hosts = host_classes(rules, words, &mut classes)?;
    let names = name_classes(rules, words, &mut classes)?;
    let scopes = scope_classes(rules, scope, words, &mut classes, &mut header)?;
    Ok(RuleTables {
        header,
        rules: rules.iter().map(|rule| rule.entry).collect(),
        ports,
        named: named_ports(rules),
        classes: classes.vectors,
        hosts,
        names,
        scopes,
    })
}

fn empty_header() -> SetHeader {
    SetHeader {
        epoch_ns: 0,
        rules: 0,
        scope_version: 0,
        has_hosts: 0,
        has_scopes: 0,
        scope_level_count: 0,
        scope_levels: [0; SCOPE_LEVELS_MAX],
        has_portless: 0,
        portless: [[0; 2]; 4],
        any_host: 0,
        any_scope: 0,
        has_names: 0,
        has_questions: 0,
        any_question: 0,
    }
}

/// Whether a rule means all packets of a protocol, whatever their ports.
fn is_portless(rule: &PacketRule, protocol: usize) -> bool {
    let mut portless = rule.portless.iter();
    rule.ports.is_empty() || portless.any(|one| *one as usize == protocol)
}

fn names(rule: &PacketRule, protocol: usize) -> bool {
    rule.protocols
        .iter()
        .any(|named| *named as usize == protocol)
}

fn goes(rule: &PacketRule, direction: usize) -> bool {
    let bit = if direction == usize::from(direction::TO_SERVER) {
        direction::BIT_TO_SERVER
    } else {
        direction::BIT_TO_CLIENT
    };
    rule.entry.directions & bit != 0
}

/// The set of the ports that rules give by themselves.
fn named_ports(rules: &[PacketRule]) -> Vec<u64> {
    let mut set = vec![0; NAMED_WORDS as usize];
    for protocol in [ProtocolClass::Tcp, ProtocolClass::Udp] {
        let ports = rules
            .iter()
            .filter(|rule| names(rule, protocol as usize))
            .flat_map(|rule| &rule.ports);
        for &(port, _) in ports.filter(|(first, last)| first == last) {
            let (word, bit) = named_at(protocol as u32, port);
            set[word as usize] |= 1 << bit;
        }
    }
    set
}

/// Sweeps over the ports, from each start or end of a range to the next.
fn port_classes(
    rules: &[PacketRule],
    words: usize,
    classes: &mut Classes,
) -> Result<Vec<PortClasses>> {
    let mut ports = vec![PortClasses::default(); 1 << 16];
    for protocol in [ProtocolClass::Tcp, ProtocolClass::Udp] {
        for direction in 0..2 {
            // What changes at a port: (port, rule, +1 or -1 ranges of it).
            let mut changes: Vec<(u32, usize, i32)> = Vec::new();
            for (index, rule) in rules.iter().enumerate() {
                let named = names(rule, protocol as usize) && goes(rule, direction);
                if !named || is_portless(rule, protocol as usize) {
                    continue;
                }
                for &(first, last) in &rule.ports {
                    changes.push((u32::from(first), index, 1));
                    changes.push((u32::from(last) + 1, index, -1));
                }
            }
            changes.sort_unstable();
            sweep(&changes, rules.len(), words, classes, |from, to, class| {
                for entry in &mut ports[from as usize..to as usize] {
                    let by_direction = match protocol {
                        ProtocolClass::Tcp => &mut entry.tcp,
                        _ => &mut entry.udp,
                    };
                    by_direction[direction] = class;
                }
            })?;
        }
    }
    Ok(ports)
}

fn sweep(
    changes: &[(u32, usize, i32)],
    rules: usize,
    words: usize,
    classes: &mut Classes,
    mut fill: impl FnMut(u32, u32, u16),
) -> Result<()> {
    let mut depth = vec![0_i32; rules];
    let mut vector = vec![0_u64; words];
    let mut rest = changes;
    while let Some(&(port, _, _)) = rest.first() {
        let here = rest.partition_point(|change| change.0 == port);
        for &(_, rule, by) in &rest[..here] {
            depth[rule] += by;
            let bit = 1 << (rule % 64);
            if depth[rule] > 0 {
                vector[rule / 64] |= bit;
            } else {
                vector[rule / 64] &= !bit;
            }
        }
        rest = &rest[here..];
        let next = rest.first().map_or(1 << 16, |change| change.0);
        if port < 1 << 16 {
            fill(port, next, classes.intern(&vector)?);
        }
    }
    Ok(())
}

/// A network's class holds the rules of all networks that contain it, and those without a host.
fn host_classes(
    rules: &[PacketRule],
    words: usize,
    classes: &mut Classes,
) -> Result<Vec<(Network, u16)>> {
    let mut named: HashMap<Network, Vec<usize>> = HashMap::new();
    let mut base = vec![0; words];
    for (index, rule) in rules.iter().enumerate() {
        if rule.has_any_host() {
            set(&mut base, index);
        }
        for host in &rule.hosts {
            named.entry(*host).or_default().push(index);
        }
    }
    let mut networks: Vec<_> = named.into_iter().collect();
    // By address, wider first: then those that contain a network are the ones still open before it.
    networks.sort_unstable();
    let mut open: Vec<(Network, Vec<u64>)> = Vec::new();
    let mut result = Vec::with_capacity(networks.len());
    for (network, indexes) in networks {
        while open
            .last()
            .is_some_and(|(wider, _)| !wider.contains(&network))
        {
            open.pop();
        }
        let mut vector = open
            .last()
            .map_or_else(|| base.clone(), |(_, vector)| vector.clone());
        for index in indexes {
            set(&mut vector, index);
        }
        result.push((network, classes.intern(&vector)?));
        open.push((network, vector));
    }
    Ok(result)
}

/// A name's classes hold the rules that are aimed at it.
fn name_classes(
    rules: &[PacketRule],
    words: usize,
    classes: &mut Classes,
) -> Result<Vec<NameClasses>> {
    let aims = rules
        .iter()
        .flat_map(|rule| rule.name.iter().chain(&rule.question).chain(&rule.learned));
    let names: BTreeSet<&String> = aims.collect();
    let mut class = |aimed: &dyn Fn(&PacketRule) -> bool| {
        let rules = rules.iter().enumerate();
        let aimed = rules.filter(|(_, rule)| aimed(rule));
        classes.of_rules(words, aimed.map(|(index, _)| index))
    };
    let of_name = |name: &String| {
        Ok(NameClasses {
            name: name.clone(),
            host: class(&|rule| rule.name.as_ref() == Some(name))?,
            question: class(&|rule| rule.question.as_ref() == Some(name))?,
        })
    };
    names.into_iter().map(of_name).collect()
}

/// A scope's class holds the rules of all scopes that it lies in, and those without one. `watched` has one also without
/// rules that are limited to it.
fn scope_classes(
    rules: &[PacketRule],
    watched: Option<&CgroupScope>,
    words: usize,
    classes: &mut Classes,
    header: &mut SetHeader,
) -> Result<Vec<(u64, u16)>> {
    let unscoped = rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| rule.scope.is_none());
    header.any_scope = classes.of_rules(words, unscoped.map(|(index, _)| index))?;
    let mut scopes: Vec<&CgroupScope> = rules
        .iter()
        .filter_map(|rule| rule.scope.as_ref())
        .chain(watched)
        .collect();
    scopes.sort_unstable_by_key(|scope| scope.cgroup);
    scopes.dedup_by_key(|scope| scope.cgroup);
    header.has_scopes = u8::from(!scopes.is_empty());
    let mut levels: Vec<u8> = scopes.iter().map(|scope| scope.level).collect();
    levels.sort_unstable_by(|a, b| b.cmp(a));
    levels.dedup();
    if levels.len() > SCOPE_LEVELS_MAX {
        bail!(
            "the rules are limited to cgroups of {} different depths, at most {SCOPE_LEVELS_MAX} are possible",
            levels.len()
        );
    }
    header.scope_levels[..levels.len()].copy_from_slice(&levels);
    header.scope_level_count = u8::try_from(levels.len())?;
    let mut result = Vec::with_capacity(scopes.len());
    for scope in scopes {
        let within = rules.iter().enumerate().filter(|(_, rule)| {
            rule.scope
                .as_ref()
                .is_none_or(|other| scope.path.starts_with(&other.path))
        });
        let class = classes.of_rules(words, within.map(|(index, _)| index))?;
        result.push((scope.cgroup, class));
    }
    Ok(result)
}
