//! What a command talks to: a service, told apart by protocol, name or addresses, and port.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::flows::Conversation;
use super::kind::{self, ApplicationProtocol};
use super::names::HostNames;
use crate::inject::endpoints::EndpointUse;
use crate::rule::Protocol;

/// What was seen of one run without faults.
#[derive(Clone, Debug, Default)]
pub struct Sighting {
    /// Where the command connected to, sent datagrams to and bound sockets.
    pub endpoints: Vec<EndpointUse>,
    /// How often it connected to a Unix socket.
    pub unix: u64,
    /// Its conversations.
    pub flows: Vec<Conversation>,
    /// The names of addresses.
    pub names: HostNames,
    /// The servers of connections that were open before.
    pub kept: Vec<SocketAddr>,
}

/// A service that the command used, or a name that it looked up (then the protocol is DNS, and the addresses are those
/// of the servers that were asked).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// TCP, UDP or DNS.
    pub protocol: Protocol,
    /// Its name, where that is known.
    pub name: Option<String>,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Its port.
    pub port: u16,
    /// What it speaks.
    pub kind: ApplicationProtocol,
    /// How a rule names it.
    pub target: String,
    /// Connects, or calls that sent a datagram.
    pub connections: u64,
    /// Whether it is also used by connections that were open before.
    pub is_kept: bool,
    /// What was carried.
    pub usage: Usage,
}

/// What a dependency carried in one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Conversations that were answered.
    pub answered: u64,
    /// When it was first used, since the command started.
    pub first: Duration,
    /// When it was last used.
    pub last: Duration,
    /// The longest handshake.
    pub connect: Option<Duration>,
    /// The longest wait for a first answer.
    pub answer: Option<Duration>,
    /// Payload to the service, in bytes.
    pub to_server_bytes: u64,
    /// Payload from the service, in bytes.
    pub to_client_bytes: u64,
    /// Packets with payload to the service.
    pub to_server_packets: u64,
    /// Packets with payload from the service.
    pub to_client_packets: u64,
    /// Requests, as far as the order of packets tells.
    pub turns: u64,
    /// The length of the shortest first answer, in bytes.
    pub response_bytes: u64,
}

/// Everything that the command talks to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What faults can be injected into.
    pub dependencies: Vec<Dependency>,
    /// What they can't be injected into, and why: one line each.
    pub out_of_reach: Vec<String>,
}

impl fmt::Display for Dependency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.protocol == Protocol::Dns {
            return f.write_str(&self.target);
        }
        let mut addresses = self.addresses.iter();
        let first = addresses.next().map(|address| match address {
            IpAddr::V4(address) => format!("{address}:"),
            IpAddr::V6(address) => format!("[{address}]:"),
        });
        let first = first.unwrap_or_default();
        write!(
            f,
            "{} {}:{first}{}",
            self.kind,
            word(self.protocol),
            self.port
        )?;
        match (&self.name, addresses.count()) {
            (Some(name), 0) => write!(f, " ({name})"),
            (Some(name), more) => write!(f, " ({name}, {more} more addresses)"),
            (None, 0) => Ok(()),
            (None, more) => write!(f, " ({more} more addresses)"),
        }
    }
}

impl Dependency {
    /// What it speaks, and how a rule names it.
    #[must_use]
    pub fn label(&self) -> String {
        match self.protocol {
            Protocol::Dns => self.target.clone(),
            _ => format!("{} {}", self.kind, self.target),
        }
    }

    /// The host name by which a rule names it; its addresses are learned. Nothing where a rule names it by an address, or
    /// by its port alone.
    #[must_use]
    pub fn host(&self) -> Option<&String> {
        let name = self.name.as_ref();
        name.filter(|name| self.target.contains(&format!(":{name}:")))
    }
}

/// A protocol as rules write it.
fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Udp => "udp",
        _ => "tcp",
    }
}

/// What tells one dependency from another. `localhost` is one host, whatever version of IP it is reached by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Host {
    Loopback,
    Named(String),
    Address(IpAddr),
}

impl Host {
    fn of(address: IpAddr, names: &HostNames) -> Self {
        if address == Ipv4Addr::LOCALHOST || address == Ipv6Addr::LOCALHOST {
            return Self::Loopback;
        }
        match names.of(address) {
            Some(name) => Self::Named(name.to_owned()),
            None => Self::Address(address),
        }
    }
}

/// The dependencies of one run, in the order in which they were first used. With `internal` the command's own servers
/// are among them.
#[must_use]
pub fn find(seen: &Sighting, internal: bool) -> Found {
    let mut found = Found::default();
    let mut groups: BTreeMap<(bool, u16, Host), Vec<&EndpointUse>> = BTreeMap::new();
    for one in seen
        .endpoints
        .iter()
        .filter(|one| !one.is_bound && one.port != 0)
    {
        if is_own(one, &seen.endpoints) && !internal {
            found.out_of_reach.push(format!(
                "{}:{} is the command's own server (--internal includes it)",
                word(one.protocol),
                one.port
            ));
        } else if one.is_elsewhere {
            found.out_of_reach.push(format!(
                "{}:{} was used in another network namespace",
                word(one.protocol),
                one.port
            ));
        } else {
            let host = Host::of(one.address, &seen.names);
            let key = (one.protocol == Protocol::Udp, one.port, host);
            groups.entry(key).or_default().push(one);
        }
    }
    for ((_, _, host), endpoints) in groups {
        let dependency = dependency(&host, &endpoints, &seen.flows, &seen.kept);
        if dependency.usage.answered != 0 {
            found.dependencies.push(dependency);
        } else if dependency.protocol == Protocol::Tcp {
            // A datagram socket that is only connected is how resolvers choose a source address.
            found
                .out_of_reach
                .push(format!("{dependency} never answered, even without faults"));
        }
    }
    if seen.unix != 0 {
        found.out_of_reach.push(format!(
            "Unix sockets ({} connects): faults are injected into networks only",
            seen.unix
        ));
    }
    found.out_of_reach.dedup();
    name_targets(&mut found.dependencies, &seen.endpoints);
    found.dependencies.extend(looked_up(&seen.flows));
    found.dependencies.sort_by_key(|one| one.usage.first);
    found
}

/// The names that were looked up with success. What has no record without faults can't be missed.
fn looked_up(flows: &[Conversation]) -> Vec<Dependency> {
    let mut names: Vec<Dependency> = Vec::new();
    for flow in flows {
        for lookup in flow.lookups.iter().filter(|lookup| lookup.is_found) {
            let known = names
                .iter()
                .position(|one| one.name.as_ref() == Some(&lookup.name));
            let place = known.unwrap_or_else(|| {
                names.push(name(&lookup.name, flow));
                names.len() - 1
            });
            let one = &mut names[place];
            one.addresses.insert(flow.server.ip());
            one.connections += 1;
            one.usage.answered += 1;
            one.usage.turns += 1;
            one.usage.last = one.usage.last.max(flow.last);
        }
    }
    names
}

/// A name that was first looked up in this conversation.
fn name(name: &str, flow: &Conversation) -> Dependency {
    Dependency {
        protocol: Protocol::Dns,
        name: Some(name.to_owned()),
        addresses: BTreeSet::new(),
        port: flow.server.port(),
        kind: ApplicationProtocol::Dns,
        target: format!("dns:{name}"),
        connections: 0,
        is_kept: false,
        usage: Usage {
            first: flow.began,
            ..Usage::default()
        },
    }
}

/// Whether the command itself listens there.
#[must_use]
pub fn is_own(one: &EndpointUse, all: &[EndpointUse]) -> bool {
    all.iter().any(|other| {
        other.is_bound
            && (other.protocol, other.port) == (one.protocol, one.port)
            && (other.address == one.address
                || other.address.is_unspecified() && one.address.is_loopback())
    })
}

fn dependency(
    host: &Host,
    endpoints: &[&EndpointUse],
    flows: &[Conversation],
    kept: &[SocketAddr],
) -> Dependency {
    let (protocol, port) = (endpoints[0].protocol, endpoints[0].port);
    let is_own = |flow: &&Conversation| {
        let mut endpoints = endpoints.iter();
        flow.protocol == protocol
            && flow.server.port() == port
            && endpoints.any(|one| one.address == flow.server.ip())
    };
    let own: Vec<&Conversation> = flows.iter().filter(is_own).collect();
    let kinds = own.iter().map(|flow| match protocol {
        Protocol::Udp => kind::of_datagram(port, &flow.to_server.start),
        _ => kind::of_stream(&flow.to_server.start, &flow.to_client.start),
    });
    let mut kinds = kinds.filter(|kind| *kind != ApplicationProtocol::Unknown);
    let kind = kinds.next().unwrap_or_default();
    let name = match (host, &kind) {
        (Host::Named(name), _) => Some(name.clone()),
        (Host::Loopback, _) => Some("localhost".to_owned()),
        (_, ApplicationProtocol::Tls(name)) => name.clone(),
        (_, ApplicationProtocol::Http(name)) => {
            name.clone().filter(|name| name.parse::<IpAddr>().is_err())
        }
        _ => None,
    };
    // An address that is only tried, as ::1 for localhost, is none of the service's.
    let answering = own.iter().filter(|flow| is_answered(flow));
    let mut addresses: BTreeSet<_> = answering.map(|flow| flow.server.ip()).collect();
    if addresses.is_empty() {
        addresses = endpoints.iter().map(|one| one.address).collect();
    }
    Dependency {
        protocol,
        name,
        addresses,
        port,
        kind,
        target: String::new(),
        connections: endpoints.iter().map(|one| one.times).sum(),
        is_kept: kept.iter().any(|server| {
            let mut endpoints = endpoints.iter();
            endpoints.any(|one| (one.address, one.port) == (server.ip(), server.port()))
        }),
        usage: usage(&own),
    }
}

fn is_answered(flow: &Conversation) -> bool {
    flow.connect.is_some() || flow.to_client.packets != 0
}

fn usage(flows: &[&Conversation]) -> Usage {
    let mut usage = Usage::default();
    let answered = flows.iter().filter(|flow| is_answered(flow));
    for (number, flow) in answered.enumerate() {
        if number == 0 {
            usage.first = flow.began;
        }
        usage.answered += 1;
        usage.last = usage.last.max(flow.last);
        usage.connect = usage.connect.max(flow.connect);
        usage.answer = usage.answer.max(flow.answer);
        usage.to_server_bytes += flow.to_server.bytes;
        usage.to_client_bytes += flow.to_client.bytes;
        usage.to_server_packets += flow.to_server.packets;
        usage.to_client_packets += flow.to_client.packets;
        usage.turns += flow.turns;
        if flow.response != 0 {
            let shortest = usage.response_bytes.min(flow.response);
            usage.response_bytes = if usage.response_bytes == 0 {
                flow.response
            } else {
                shortest
            };
        }
    }
    usage
}

/// Names each as a rule does: `tcp:6379` on localhost, else with its address. What has several addresses is named by
/// its port alone where no other one has that, else by its name.
fn name_targets(dependencies: &mut [Dependency], endpoints: &[EndpointUse]) {
    let places: Vec<_> = dependencies
        .iter()
        .map(|one| (one.protocol, one.port))
        .collect();
    for one in dependencies {
        let place = (one.protocol, one.port);
        let is_bound = endpoints
            .iter()
            .any(|other| other.is_bound && (other.protocol, other.port) == place);
        let is_shared = is_bound || places.iter().filter(|other| **other == place).count() > 1;
        let is_local = one.addresses.iter().all(IpAddr::is_loopback) && one.name.is_some();
        let mut addresses = one.addresses.iter();
        let first = addresses.next();
        let host = match (first, addresses.next(), &one.name) {
            (None, ..) => String::new(),
            (Some(_), Some(_), _) if !is_shared => String::new(),
            (Some(_), None, _) if !is_shared && is_local => String::new(),
            (Some(_), Some(_), Some(name)) => format!("{name}:"),
            (Some(IpAddr::V4(address)), ..) => format!("{address}:"),
            (Some(IpAddr::V6(address)), ..) => format!("[{address}]:"),
        };
        one.target = format!("{}:{host}{}", word(one.protocol), one.port);
    }
}

/// How the dependencies of two runs differ, one line for each; order and figures don't count.
#[must_use]
pub fn differences(first: &[Dependency], other: &[Dependency]) -> Vec<String> {
    let only = |these: &[Dependency], those: &[Dependency], run: &str| -> Vec<String> {
        let missing = these
            .iter()
            .filter(|one| !those.iter().any(|other| other.target == one.target));
        missing
            .map(|one| format!("{one} was used only in {run}"))
            .collect()
    };
    let mut lines = only(first, other, "the first run");
    lines.extend(only(other, first, "a later run"));
    lines
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::explore::flows::Way;
    use crate::explore::names::Lookup;

    /// A dependency on TCP with two connections of one request each.
    pub(crate) fn example(kind: ApplicationProtocol, port: u16) -> Dependency {
        Dependency {
            protocol: Protocol::Tcp,
            name: None,
            addresses: ["10.0.0.5".parse().unwrap()].into(),
            port,
            kind,
            target: format!("tcp:{port}"),
            connections: 2,
            is_kept: false,
            usage: Usage {
                answered: 2,
                to_server_packets: 2,
                to_client_packets: 2,
                to_client_bytes: 400,
                turns: 2,
                response_bytes: 200,
                ..Usage::default()
            },
        }
    }

    fn endpoint(address: &str, port: u16, is_bound: bool) -> EndpointUse {
        EndpointUse {
            protocol: Protocol::Tcp,
            address: address.parse().unwrap(),
            port,
            is_bound,
            is_elsewhere: false,
            times: 3,
        }
    }

    fn flow(server: &str, began_ms: u64, request: &[u8]) -> Conversation {
        let mut flow =
            Conversation::example(server.parse().unwrap(), Duration::from_millis(began_ms));
        flow.to_server = Way::example(request);
        flow
    }

    #[test]
    fn dependencies_are_told_apart_by_what_they_are() {
        let seen = Sighting {
            endpoints: vec![
                endpoint("127.0.0.1", 6379, false),
                endpoint("::1", 6379, false),
                endpoint("10.0.0.5", 80, false),
                endpoint("10.0.0.6", 80, false),
                endpoint("0.0.0.0", 9000, true),
                endpoint("127.0.0.1", 9000, false),
                endpoint("10.0.0.7", 81, false),
            ],
            unix: 2,
            flows: vec![
                flow("10.0.0.6:80", 1, b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"),
                flow("10.0.0.5:80", 2, b""),
                flow("127.0.0.1:6379", 3, b"*1\r\n$4\r\nPING\r\n"),
            ],
            names: HostNames::of_hosts("10.0.0.5 a.internal\n127.0.0.1 box"),
            kept: vec!["10.0.0.5:80".parse().unwrap()],
        };
        let found = find(&seen, false);
        let texts: Vec<_> = found.dependencies.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "http tcp:10.0.0.6:80 (b)",
                "unknown tcp:10.0.0.5:80 (a.internal)",
                "redis tcp:127.0.0.1:6379 (localhost)"
            ]
        );
        let targets: Vec<_> = found.dependencies.iter().map(|one| &*one.target).collect();
        assert_eq!(targets, ["tcp:10.0.0.6:80", "tcp:10.0.0.5:80", "tcp:6379"]);
        assert_eq!(found.dependencies[2].connections, 6, "::1 was tried too");
        let kept: Vec<_> = found.dependencies.iter().map(|one| one.is_kept).collect();
        assert_eq!(kept, [false, true, false]);
        let out = found.out_of_reach.join("\n");
        for part in [
            "9000 is the command's own",
            "10.0.0.7:81 never answered",
            "Unix sockets (2",
        ] {
            assert!(out.contains(part), "{out}");
        }
        assert_eq!(
            find(&seen, true).out_of_reach.len(),
            3,
            "9000 never answered"
        );
    }

    #[test]
    fn names_that_were_found_are_dependencies() {
        let lookup = |name: &str, is_found| Lookup {
            name: name.to_owned(),
            addresses: Vec::new(),
            is_found,
        };
        let mut asked = flow("10.0.0.1:53", 4, b"");
        asked.lookups = vec![lookup("a.internal", true), lookup("b.internal", false)];
        let mut again = flow("10.0.0.2:53", 5, b"");
        again.lookups = vec![lookup("a.internal", true)];
        let seen = Sighting {
            flows: vec![asked, again],
            ..Sighting::default()
        };
        let found = find(&seen, false).dependencies;
        let [name] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(
            (name.to_string(), name.connections),
            ("dns:a.internal".to_owned(), 2)
        );
        assert_eq!(
            (name.addresses.len(), name.usage.first),
            (2, Duration::from_millis(4))
        );
    }

    #[test]
    fn runs_that_use_different_services_differ() {
        let [a, b] = [
            example(ApplicationProtocol::Redis, 1),
            example(ApplicationProtocol::Unknown, 2),
        ];
        assert!(differences(&[a.clone(), b.clone()], &[b.clone(), a.clone()]).is_empty());
        assert_eq!(
            differences(&[a], &[b]),
            [
                "redis tcp:10.0.0.5:1 was used only in the first run",
                "unknown tcp:10.0.0.5:2 was used only in a later run"
            ]
        );
    }
}
