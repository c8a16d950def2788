//! Narrows a rule set down to the rules that concern a packet, at a cost that does not grow with their
//! number.
//!
//! Each field of a packet (port, host, cgroup) is looked up once and gives a *class*: the set of rules
//! that the field's value satisfies, as a bit vector. The rules of the packet are the intersection of
//! its classes. A 64-bit summary of each vector (a bit for every word that is not zero) tells, with
//! one AND, that there is no rule at all, which is the common case, and which words to look at
//! otherwise. Source: Lakshman and Stiliadis, "High-speed policy-based packet forwarding", SIGCOMM
//! 1998; the summaries are those of Baboescu and Varghese, "Scalable packet classification", 2001.

use core::cmp::Ordering;

use crate::abi::{MATCHES_MAX, PortClasses, SetHeader, WORDS_MAX, direction};
use crate::flow::{Address, Side};
use crate::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet, TCP_ACK};

/// Where classes and vectors are looked up: BPF maps in the kernel, arrays in tests. Class 0 is the
/// empty set.
pub trait Tables {
    /// What all rules share.
    fn header(&self) -> &SetHeader;
    /// The classes of a port.
    fn port(&self, port: u16) -> PortClasses;
    /// The class of an address, the one of rules without a host included.
    fn host(&self, address: &Address) -> u16;
    /// The class of a scope, the one of rules without a scope included; nothing for an unknown one.
    fn scope(&self, cgroup: u64) -> Option<u16>;
    /// The names that an address is known by, as bits.
    fn names(&self, _address: &Address) -> u64 {
        0
    }
    /// How many names there are, at most 64.
    fn name_count(&self) -> u32 {
        0
    }
    /// One of the classes of a name: see [`about`].
    fn name_class(&self, _name: u32, _about: u32) -> u16 {
        0
    }
    /// What [`join`] gives. The programs do it in a function of its own.
    fn joined(&self, names: u64, about: u32, word: Option<u32>) -> u64
    where
        Self: Sized,
    {
        join(self, names, about, word)
    }
    /// The summary of a class: bit n is set when word n is not zero.
    fn summary(&self, class: u16) -> u64;
    /// One word of a class.
    fn word(&self, class: u16, index: u32) -> u64;
}

/// What rules are aimed at by a name: the class of a name that [`Tables::name_class`] gives.
pub mod about {
    /// Its addresses.
    pub const HOST: u32 = 0;
    /// Queries for it.
    pub const QUESTION: u32 = 1;
}

/// The rules that are aimed at any of these names (a bit each), of one word or as a summary.
#[inline(always)]
pub fn join<T: Tables>(tables: &T, names: u64, about: u32, word: Option<u32>) -> u64 {
    let mut rules = 0;
    for name in 0..u64::BITS {
        if name >= tables.name_count() {
            break;
        }
        if names >> name & 1 != 0 {
            let class = tables.name_class(name, about);
            rules |= match word {
                Some(index) => tables.word(class, index),
                None => tables.summary(class),
            };
        }
    }
    rules
}

/// The classes of a packet by its ports and protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Rules for which the packet is one *to* the service, by port.
    to_server: u16,
    /// Rules for which it is one *from* the service, by port.
    to_client: u16,
    /// Rules without a port, by direction.
    portless: [u16; 2],
}

/// What the connection of a packet adds to what the packet itself says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// The packet's [`direction`] by who began the connection, for rules that the ports say nothing
    /// about.
    pub direction: u8,
    /// Whether that is certain: then the client's port matches no rule.
    pub is_certain: bool,
    /// The cgroups of the connection's local ends; 0 for none.
    pub scopes: [u64; 2],
    /// The names that the packet, a query of DNS, asks for, as bits.
    pub questions: u64,
}

/// A rule that concerns the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Index of the rule in its set.
    pub rule: u16,
    /// The packet's direction as seen from the rule's service: see [`direction`].
    pub direction: u16,
}

/// The matching rules of a packet, in the order of the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matches {
    /// The first [`Matches::count`] are valid.
    pub items: [Match; MATCHES_MAX],
    /// How many there are.
    pub count: u32,
    /// 1 when there are more than fit: see [`Query::beyond`].
    pub overflow: u32,
}

#[inline(always)]
const fn protocol_index(packet: &Packet) -> usize {
    match packet.protocol {
        PROTOCOL_TCP => 0,
        PROTOCOL_UDP => 1,
        _ if packet.is_icmp() => 2,
        _ => 3,
    }
}

impl Ports {
    /// What the classes of a packet's two ports come to, and of having none. `index` is 0 for TCP, 1 for UDP.
    /// Nothing when no rule can concern the packet.
    #[inline(always)]
    #[must_use]
    pub fn of(
        index: usize,
        header: &SetHeader,
        to: PortClasses,
        from: PortClasses,
    ) -> Option<Self> {
        let (to_server, to_client) = if index == 0 {
            (to.tcp[0], from.tcp[1])
        } else {
            (to.udp[0], from.udp[1])
        };
        Self {
            to_server,
            to_client,
            portless: header.portless[index],
        }
        .if_any()
    }

    #[inline(always)]
    fn if_any(self) -> Option<Self> {
        let any = self.to_server | self.to_client | self.portless[0] | self.portless[1];
        if any == 0 { None } else { Some(self) }
    }
}

/// Looks the ports up. Nothing is returned when no rule can concern the packet: the fast way out.
#[inline(always)]
pub fn ports<T: Tables>(tables: &T, header: &SetHeader, packet: &Packet) -> Option<Ports> {
    let index = protocol_index(packet);
    if (packet.has_transport || packet.follows) && index < 2 {
        let to = tables.port(packet.destination_port);
        return Ports::of(index, header, to, tables.port(packet.source_port));
    }
    Ports {
        to_server: 0,
        to_client: 0,
        portless: header.portless[index],
    }
    .if_any()
}

/// Which end of a connection the service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The end.
    pub side: Side,
    /// Whether there is a good reason to say so. Otherwise a rule may name the port of either end.
    pub is_certain: bool,
}

/// What tells the service's end of a packet, beside the packet: of its sender, then of its receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Whether a TCP socket of this host listens at the address and port.
    pub listens: [bool; 2],
    /// Whether a rule gives the port by itself, not within a range.
    pub named: [bool; 2],
}

/// Ports below this are those of system services (RFC 6335).
const SYSTEM_PORTS_END: u16 = 1024;

/// Which end of a connection the service is, by its first packet seen. A TCP SYN comes from the client and a SYN-ACK
/// from the server; an ICMP echo request comes from the client. Where the beginning was not seen, and over UDP, the
/// service is the only end that listens on this host, else the only one whose port a rule gives by itself, else the
/// only one with a port below 1024. Failing all that it is taken to be the end with the lower port, or the receiver,
/// but that is not certain.
#[must_use]
#[inline(always)]
pub fn service(packet: &Packet, sender: Side, hints: Hints) -> Service {
    let known = |is_sender: bool| Service {
        side: if is_sender { sender } else { sender.other() },
        is_certain: true,
    };
    if packet.is_handshake() {
        return known(packet.tcp_flags & TCP_ACK != 0);
    }
    if packet.is_icmp() {
        return known(!packet.is_echo_request());
    }
    let (from, to) = (packet.source_port, packet.destination_port);
    let [sends, receives] = hints.listens;
    if sends != receives {
        return known(sends);
    }
    let [sends, receives] = hints.named;
    if sends != receives {
        return known(sends);
    }
    let [sends, receives] = [from < SYSTEM_PORTS_END, to < SYSTEM_PORTS_END];
    if sends != receives {
        return known(sends);
    }
    Service {
        is_certain: false,
        ..known(from < to)
    }
}

/// The classes that a packet's rules must be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Query {
    to_server: [u16; 2],
    to_client: [u16; 2],
    hosts: [u16; 2],
    names: [u64; 2],
    questions: u64,
    scope: [u16; 2],
    /// As the header has them: a comparison here would be one more branch to the verifier.
    has_hosts: u8,
    has_scopes: u8,
    has_portless: u8,
    guess: u8,
}

/// Looks the remaining classes of a packet up.
#[inline(always)]
pub fn query<T: Tables>(
    tables: &T,
    packet: &Packet,
    ports: Ports,
    connection: &Connection,
) -> Query {
    let header = tables.header();
    let guess = connection.direction;
    let portless = if guess == direction::TO_SERVER {
        [ports.portless[0], 0]
    } else {
        [0, ports.portless[1]]
    };
    let scope = if header.has_scopes == 0 {
        [0, 0]
    } else {
        let class = |scope| tables.scope(scope).unwrap_or(header.any_scope);
        [class(connection.scopes[0]), class(connection.scopes[1])]
    };
    let hosts = if header.has_hosts == 0 {
        [0, 0]
    } else {
        [
            tables.host(&packet.destination),
            tables.host(&packet.source),
        ]
    };
    let names = if tables.name_count() == 0 || header.has_names == 0 {
        [0, 0]
    } else {
        [
            tables.names(&packet.destination),
            tables.names(&packet.source),
        ]
    };
    let ways = if !connection.is_certain {
        [ports.to_server, ports.to_client]
    } else if guess == direction::TO_SERVER {
        [ports.to_server, 0]
    } else {
        [0, ports.to_client]
    };
    Query {
        to_server: [ways[0], portless[0]],
        to_client: [ways[1], portless[1]],
        hosts,
        names,
        questions: connection.questions,
        scope,
        has_hosts: header.has_hosts,
        has_scopes: header.has_scopes,
        has_portless: header.has_portless,
        guess,
    }
}

impl Query {
    /// The intersection of all fields for each direction, of one word or of summaries.
    #[inline(always)]
    fn intersect<T: Tables>(&self, tables: &T, word: Option<u32>) -> [u64; 2] {
        let bits = |class| match word {
            Some(index) => tables.word(class, index),
            None => tables.summary(class),
        };
        let named = |names, about| match names {
            0 => 0,
            names => tables.joined(names, about, word),
        };
        let mut both = [bits(self.to_server[0]), bits(self.to_client[0])];
        if self.has_portless != 0 {
            both[0] |= bits(self.to_server[1]);
            both[1] |= bits(self.to_client[1]);
        }
        if self.has_hosts != 0 {
            both[0] &= bits(self.hosts[0]) | named(self.names[0], about::HOST);
            both[1] &= bits(self.hosts[1]) | named(self.names[1], about::HOST);
        }
        // Asked here rather than kept: there is no room on the programs' stack.
        if tables.name_count() != 0 && tables.header().has_questions != 0 {
            let any = bits(tables.header().any_question);
            both[0] &= any | named(self.questions, about::QUESTION);
            both[1] &= any;
        }
        if self.has_scopes != 0 {
            let scope = bits(self.scope[0]) | bits(self.scope[1]);
            both[0] &= scope;
            both[1] &= scope;
        }
        both
    }

    /// The words in which there may be matching rules.
    #[inline(always)]
    pub fn summary<T: Tables>(&self, tables: &T) -> u64 {
        let [to_server, to_client] = self.intersect(tables, None);
        to_server | to_client
    }

    /// Lists the matching rules of one word.
    #[inline(always)]
    pub fn collect<T: Tables>(&self, tables: &T, index: u32, matches: &mut Matches) {
        collect(self.matching(tables, index), matches);
    }

    #[inline(always)]
    fn matching<T: Tables>(&self, tables: &T, index: u32) -> Word {
        Word {
            bits: self.intersect(tables, Some(index)),
            index,
            guess: self.guess,
        }
    }

    /// The matching rules of one word that lie behind those that fit the list.
    #[inline(always)]
    pub fn beyond<T: Tables>(&self, tables: &T, index: u32, matches: &Matches) -> Word {
        self.matching(tables, index)
            .after(matches.items[MATCHES_MAX - 1].rule)
    }
}

/// Lists the rules of a packet: the order of the steps, for those who need not split them up.
pub fn select<T: Tables>(
    tables: &T,
    packet: &Packet,
    connection: &Connection,
    matches: &mut Matches,
) {
    *matches = Matches::default();
    let Some(ports) = ports(tables, tables.header(), packet) else {
        return;
    };
    let query = query(tables, packet, ports, connection);
    let summary = query.summary(tables);
    for index in (0..WORDS_MAX).filter(|index| summary >> index & 1 != 0) {
        query.collect(tables, index, matches);
    }
}

impl Query {
    /// The packet's direction by the only rule of a set, where that rule concerns it.
    #[inline(always)]
    pub fn only<T: Tables>(&self, tables: &T) -> Option<u16> {
        let [to_server, to_client] = self.intersect(tables, Some(0));
        match (to_server & 1 != 0, to_client & 1 != 0) {
            (true, true) => Some(u16::from(self.guess)),
            (true, false) => Some(direction::TO_SERVER.into()),
            (false, true) => Some(direction::TO_CLIENT.into()),
            (false, false) => None,
        }
    }
}

/// Matching rules of one word that are yet to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// Those that see the packet go to the server, and to the client.
    bits: [u64; 2],
    /// Which word it is.
    index: u32,
    /// The direction for rules that see it go both ways: a range that holds both ports.
    guess: u8,
}

impl Word {
    /// The next rule; it is not given again.
    #[inline(always)]
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator is more than the verifier needs"
    )]
    pub fn next(&mut self) -> Option<Match> {
        let [to_server, to_client] = self.bits;
        let left = to_server | to_client;
        if left == 0 {
            return None;
        }
        let bit = left.trailing_zeros();
        let direction = if (to_server >> bit) & (to_client >> bit) & 1 != 0 {
            u16::from(self.guess)
        } else {
            u16::from((to_server >> bit) & 1 == 0)
        };
        let others = !(left & left.wrapping_neg());
        self.bits = [to_server & others, to_client & others];
        #[expect(clippy::cast_possible_truncation, reason = "below RULES_MAX")]
        let rule = (self.index * 64 + bit) as u16;
        Some(Match { rule, direction })
    }

    /// Leaves out the rules up to `last`.
    #[inline(always)]
    fn after(mut self, last: u16) -> Self {
        let word = u32::from(last) / 64;
        let kept = match self.index.cmp(&word) {
            Ordering::Less => 0,
            Ordering::Greater => u64::MAX,
            // Two shifts: one by 64 is none.
            Ordering::Equal => (u64::MAX << (last % 64)) << 1,
        };
        self.bits = [self.bits[0] & kept, self.bits[1] & kept];
        self
    }
}

/// Lists the rules of one word, as far as they fit.
#[inline(always)]
fn collect(mut word: Word, matches: &mut Matches) {
    for _ in 0..=MATCHES_MAX {
        let Some(found) = word.next() else {
            return;
        };
        let at = matches.count as usize;
        if at >= MATCHES_MAX {
            matches.overflow = 1;
            return;
        }
        matches.items[at] = found;
        matches.count += 1;
    }
}
