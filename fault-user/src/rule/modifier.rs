//! What decides whether a fault fires: probability, counts, packet kinds, the timeline, the direction.

use std::fmt;

use super::asked::{self, Asked, NamePattern};
use super::catalog;
use super::complaint::{Complaint, MAX_TIME_NS};
use super::error::{Piece, RuleError};
use super::sample::HostShare;
use super::units::{self, PPM};
use super::words::words;

words! {
    /// A packet's way, seen from the service.
    #[derive(Default)]
    Direction {
        /// Both ways.
        #[default]
        Both = "both",
        /// To the service's port.
        ToServer = "to-server",
        /// From the service's port.
        ToClient = "to-client",
    }
}

words! {
    /// What a counted trigger counts over.
    #[derive(Default)]
    CountScope {
        /// Each connection on its own, each direction on its own.
        #[default]
        PerConnection = "connection",
        /// The whole rule.
        PerRule = "rule",
    }
}

words! {
    /// The type of records that a query of DNS asks for.
    QueryType {
        /// IPv4 addresses.
        A = "A",
        /// IPv6 addresses.
        Aaaa = "AAAA",
        /// Another name for the name.
        Cname = "CNAME",
        /// Mail servers.
        Mx = "MX",
        /// Name servers.
        Ns = "NS",
        /// The name of an address.
        Ptr = "PTR",
        /// The start of a zone.
        Soa = "SOA",
        /// Servers of a service.
        Srv = "SRV",
        /// Text.
        Txt = "TXT",
        /// Endpoints of a service.
        Svcb = "SVCB",
        /// Endpoints of HTTPS.
        Https = "HTTPS",
        /// All.
        Any = "ANY",
    }
}

impl QueryType {
    /// Its number in messages.
    #[must_use]
    pub const fn number(self) -> u16 {
        match self {
            Self::A => 1,
            Self::Ns => 2,
            Self::Cname => 5,
            Self::Soa => 6,
            Self::Ptr => 12,
            Self::Mx => 15,
            Self::Txt => 16,
            Self::Aaaa => 28,
            Self::Srv => 33,
            Self::Svcb => 64,
            Self::Https => 65,
            Self::Any => 255,
        }
    }
}

/// Numbers from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// The smallest.
    pub first: u64,
    /// The largest; [`Bounds::OPEN`] where there is none.
    pub last: u64,
}

impl Bounds {
    /// The `last` of bounds without an upper end.
    pub const OPEN: u64 = u64::MAX;

    /// Whether a number lies within.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        (self.first..=self.last).contains(&number)
    }

    /// Reads `A..B`, `A..`, `..B` or `A`; `least` is the smallest number that there is.
    fn read(
        piece: Piece<'_>,
        least: u64,
        number: fn(Piece<'_>) -> Result<u64, RuleError>,
    ) -> Result<Self, RuleError> {
        let text = piece.text();
        let bounds = match text.find("..") {
            None => {
                let value = number(piece)?;
                Self {
                    first: value,
                    last: value,
                }
            }
            Some(at) => {
                let (a, b) = (piece.slice(0..at), piece.slice(at + 2..text.len()));
                if a.text().is_empty() && b.text().is_empty() {
                    return Err(piece
                        .error("both ends are missing")
                        .expected("A..B, A.. or ..B"));
                }
                let or = |piece: Piece<'_>, absent| {
                    if piece.text().is_empty() {
                        Ok(absent)
                    } else {
                        number(piece)
                    }
                };
                Self {
                    first: or(a, least)?,
                    last: or(b, Self::OPEN)?,
                }
            }
        };
        if bounds.first > bounds.last {
            return Err(piece
                .error("this range is empty")
                .expected("the smaller number first")
                .suggest(format!("{}..{}", bounds.last, bounds.first)));
        }
        if bounds.first < least {
            return Err(piece.error("counts begin at 1").expected("1 or more"));
        }
        Ok(bounds)
    }

    /// The bounds in the one-line form.
    fn show(&self, number: fn(u64) -> String) -> String {
        match (self.first, self.last) {
            (first, Self::OPEN) => format!("{}..", number(first)),
            (first, last) if first == last => number(first),
            (0, last) => format!("..{}", number(last)),
            (first, last) => format!("{}..{}", number(first), number(last)),
        }
    }
}

/// Which packets are picked by counting: those that every given trigger picks. Counts begin at 1 and include
/// both ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Triggers {
    /// Packets 1 to N.
    pub first: Option<u64>,
    /// Packets from N + 1 on.
    pub after: Option<u64>,
    /// Packet N alone.
    pub nth: Option<u64>,
    /// Packets N, 2 N, 3 N and so on.
    pub every: Option<u64>,
    /// Packets A to B.
    pub range: Option<Bounds>,
}

impl Triggers {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the packet with this ordinal, which begins at 1, is picked.
    #[must_use]
    pub fn picks(&self, ordinal: u64) -> bool {
        self.bounds().contains(ordinal) && ordinal.is_multiple_of(self.step())
    }

    /// The first and the last ordinal that may be picked.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        let range = self.range.unwrap_or(Bounds {
            first: 1,
            last: Bounds::OPEN,
        });
        let after = self.after.map_or(1, |n| n.saturating_add(1));
        let last = self.first.unwrap_or(u64::MAX);
        Bounds {
            first: range.first.max(after).max(self.nth.unwrap_or(1)),
            last: range.last.min(last).min(self.nth.unwrap_or(u64::MAX)),
        }
    }

    /// Only multiples of this are picked; 1 for all.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.every.unwrap_or(1)
    }

    /// Whether no packet can be picked.
    fn is_never(&self) -> bool {
        let bounds = self.bounds();
        bounds.first > bounds.last
            || bounds
                .first
                .checked_next_multiple_of(self.step())
                .is_none_or(|multiple| multiple > bounds.last)
    }

    /// Key and value of each, in the order of the table.
    fn given(&self) -> impl Iterator<Item = (&'static str, String)> {
        let number = |n: Option<u64>| n.map(|n| n.to_string());
        [
            ("first", number(self.first)),
            ("after", number(self.after)),
            ("nth", number(self.nth)),
            ("every", number(self.every)),
            (
                "range",
                self.range.map(|bounds| bounds.show(|n| n.to_string())),
            ),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
    }
}

/// A set of packet kinds; a packet is picked when it is of any of them. The empty set picks all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PacketKinds(u8);

impl PacketKinds {
    /// SYN is set (SYN-ACK included).
    pub const SYN: Self = Self(1);
    /// It carries payload.
    pub const DATA: Self = Self(1 << 1);
    /// A bare acknowledgement: ACK without SYN, FIN, RST and payload.
    pub const ACK: Self = Self(1 << 2);
    /// FIN is set.
    pub const FIN: Self = Self(1 << 3);
    /// RST is set.
    pub const RST: Self = Self(1 << 4);

    /// The kinds and their words.
    pub(super) const ALL: [(Self, &'static str); 5] = [
        (Self::SYN, "syn"),
        (Self::DATA, "data"),
        (Self::ACK, "ack"),
        (Self::FIN, "fin"),
        (Self::RST, "rst"),
    ];

    /// The set as bits: 1 SYN, 2 data, 4 ACK, 8 FIN, 16 RST.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether all kinds are picked.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Both sets together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// This set without the other's kinds.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The words of the set's kinds.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        Self::ALL
            .into_iter()
            .filter(move |(kind, _)| self.0 & kind.0 != 0)
            .map(|(_, word)| word)
    }
}

/// What decides whether a fault fires. Times are nanoseconds, probabilities parts per million.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Modifiers {
    /// Per packet (packet layer) or per connection (stream layer); 1,000,000 where it was not given.
    pub probability: u32,
    /// Counted triggers.
    pub triggers: Triggers,
    /// What they count over.
    pub count: CountScope,
    /// Which connections, in order of appearance from 1; nothing means all.
    pub connections: Option<Bounds>,
    /// Which of the target's hosts; nothing means all.
    pub hosts: Option<HostShare>,
    /// Which connections, by what their clients ask for.
    pub asked: Asked,
    /// Which kinds of packets.
    pub packets: PacketKinds,
    /// The size of the IP packet in bytes; nothing means any.
    pub size: Option<Bounds>,
    /// The type that a query of DNS asks for; nothing means any.
    pub query_type: Option<QueryType>,
    /// Which way.
    pub direction: Direction,
    /// When the rule starts.
    pub at_ns: u64,
    /// How long it acts, or with a period and no duty in each period; nothing means to the end.
    pub for_ns: Option<u64>,
    /// How often it repeats; nothing means once.
    pub period_ns: Option<u64>,
    /// The part of each period in which it acts.
    pub duty: Option<u32>,
    /// Open connections are reset when the rule starts, so that they come back through the relay.
    pub reconnect: bool,
}

impl Default for Modifiers {
    fn default() -> Self {
        Self {
            probability: PPM,
            triggers: Triggers::default(),
            count: CountScope::default(),
            connections: None,
            hosts: None,
            asked: Asked::default(),
            packets: PacketKinds::default(),
            size: None,
            query_type: None,
            direction: Direction::default(),
            at_ns: 0,
            for_ns: None,
            period_ns: None,
            duty: None,
            reconnect: false,
        }
    }
}

/// When a rule acts, computed from `at`, `for`, `period` and `duty`. All times in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// The start of the first window.
    pub start_ns: u64,
    /// The length of each window; nothing means without end (then there is no period).
    pub on_ns: Option<u64>,
    /// From one start to the next; nothing means one window.
    pub period_ns: Option<u64>,
    /// When even a repeated rule ends; windows are cut off there.
    pub end_ns: Option<u64>,
}

impl Schedule {
    /// When the window that is open at this time closes; nothing if none is open, or it has no end.
    #[must_use]
    pub fn closes_after(&self, now_ns: u64) -> Option<u64> {
        let since_ns = now_ns.checked_sub(self.start_ns)?;
        let begin_ns = match self.period_ns {
            Some(period_ns) if period_ns > 0 => now_ns - since_ns % period_ns,
            _ => self.start_ns,
        };
        let closes_ns = self.on_ns.map(|on_ns| begin_ns.saturating_add(on_ns));
        let first_ns = [closes_ns, self.end_ns].into_iter().flatten().min()?;
        (first_ns > now_ns).then_some(first_ns)
    }
}

/// A modifier's key and what it takes.
#[derive(Debug, Clone, Copy)]
pub struct ModifierSpec {
    /// Its key in the one-line form.
    pub key: &'static str,
    /// Its name in the object form.
    pub name: &'static str,
    /// An example of its value; empty where it takes none.
    pub value: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// A row of the table.
const fn row(
    key: &'static str,
    name: &'static str,
    value: &'static str,
    help: &'static str,
) -> ModifierSpec {
    ModifierSpec {
        key,
        name,
        value,
        help,
    }
}

/// Every modifier, in the order in which they are printed.
pub const MODIFIERS: &[ModifierSpec] = &[
    row(
        "p",
        "probability",
        "20%",
        "probability per packet (packet layer) or per connection (stream layer)",
    ),
    row("first", "first", "3", "packets 1 to N"),
    row("after", "after", "3", "packets from N + 1 on"),
    row("nth", "nth", "5", "packet N alone"),
    row("every", "every", "10", "packets N, 2 N, 3 N and so on"),
    row("range", "range", "4..6", "packets A to B"),
    row(
        "count",
        "count",
        "rule",
        "`connection` (default): a trigger counts each connection; `rule`: the whole rule",
    ),
    row(
        "conn",
        "connections",
        "1..3",
        "which connections, in order of appearance",
    ),
    row(
        "hosts",
        "hosts",
        "1/3",
        "a share of the target's hosts, chosen by the seed",
    ),
    row(
        "sni",
        "sni",
        "*.example.com",
        "connections whose TLS client asks for this server, by a stream fault",
    ),
    row(
        "host",
        "host",
        "*.example.com",
        "connections whose first HTTP/1 request is for this host, by a stream fault",
    ),
    row(
        "alpn",
        "alpn",
        "h2",
        "connections whose TLS client offers this protocol, by a stream fault",
    ),
    row(
        "match",
        "match",
        "syn/fin",
        "packet kinds: syn, data, ack, fin, rst; any of them",
    ),
    row("size", "size", "100..1500", "size of the IP packet"),
    row(
        "type",
        "type",
        "AAAA",
        "the type that a DNS query asks for: A, AAAA, CNAME, MX, NS, PTR, SOA, SRV, TXT, SVCB, HTTPS or ANY",
    ),
    row(
        "dir",
        "direction",
        "to-client",
        "`to-server`, `to-client` or `both` (default), seen from the service",
    ),
    row("at", "at", "2s", "start"),
    row(
        "for",
        "for",
        "5s",
        "length: of the whole rule, or with `period` and no `duty` of each repetition",
    ),
    row("period", "period", "30s", "repeat"),
    row(
        "duty",
        "duty",
        "20%",
        "the part of each period in which the rule acts",
    ),
    row(
        "reconnect",
        "reconnect",
        "",
        "open connections are reset at the start, so that they come back through the relay",
    ),
];

/// The table's row for a key or a name of the object form.
pub(super) fn modifier(key: &str) -> Option<&'static ModifierSpec> {
    MODIFIERS.iter().find(|m| m.key == key || m.name == key)
}

/// The words that are the values of a key; none where it takes others.
pub(super) fn words(key: &str) -> Vec<&'static str> {
    match key {
        "count" => CountScope::WORDS.to_vec(),
        "match" => PacketKinds::ALL.map(|(_, word)| word).to_vec(),
        "type" => QueryType::WORDS.to_vec(),
        "dir" => Direction::WORDS.to_vec(),
        _ => Vec::new(),
    }
}

/// Modifiers while they are read.
#[derive(Default)]
pub(super) struct ModifierReader<'a> {
    /// What was read so far.
    pub modifiers: Modifiers,
    /// Each key that was read, with its place.
    pieces: Vec<(&'static str, Piece<'a>)>,
}

impl<'a> ModifierReader<'a> {
    /// Reads one value; `piece` is the whole `key=value`, to point at. The two may lie in different texts.
    pub fn set(
        &mut self,
        spec: &ModifierSpec,
        value: Piece<'_>,
        piece: Piece<'a>,
    ) -> Result<(), RuleError> {
        if self.piece(spec.key).is_some() {
            return Err(piece
                .error(format!("`{}` is given twice", spec.key))
                .expected("it once"));
        }
        self.read(spec.key, value)?;
        self.pieces.push((spec.key, piece));
        Ok(())
    }

    /// Where a modifier stands.
    pub fn piece(&self, key: &str) -> Option<Piece<'a>> {
        self.pieces
            .iter()
            .find(|(k, _)| *k == key)
            .map(|(_, piece)| *piece)
    }

    /// Reads the value of a key.
    fn read(&mut self, key: &str, value: Piece<'_>) -> Result<(), RuleError> {
        let to = &mut self.modifiers;
        match key {
            "p" => to.probability = units::probability(value)?,
            "first" => to.triggers.first = Some(ordinal(value)?),
            "after" => to.triggers.after = Some(units::count(value)?),
            "nth" => to.triggers.nth = Some(ordinal(value)?),
            "every" => to.triggers.every = Some(ordinal(value)?),
            "range" => to.triggers.range = Some(Bounds::read(value, 1, units::count)?),
            "count" => to.count = word(value, CountScope::WORDS, CountScope::from_word)?,
            "conn" => to.connections = Some(Bounds::read(value, 1, units::count)?),
            "hosts" => to.hosts = Some(HostShare::read(value)?),
            "sni" => to.asked.sni = Some(NamePattern::read(value)?),
            "host" => to.asked.host = Some(NamePattern::read(value)?),
            "alpn" => to.asked.alpn = Some(asked::alpn(value)?),
            "match" => to.packets = packet_kinds(value)?,
            "size" => to.size = Some(Bounds::read(value, 0, units::size)?),
            "type" => {
                let find = |word: &str| QueryType::from_word(&word.to_ascii_uppercase());
                let is_fault = catalog::spec(value.text()).is_some();
                // As Toxiproxy has it.
                let meant = is_fault.then(|| format!("fault: {}", value.text()));
                let kind = word(value, QueryType::WORDS, find);
                to.query_type = Some(kind.map_err(|error| error.suggest_some(meant))?);
            }
            "dir" => to.direction = word(value, Direction::WORDS, Direction::from_word)?,
            "at" => to.at_ns = units::seconds(value)?,
            "for" => to.for_ns = Some(units::seconds(value)?),
            "period" => to.period_ns = Some(units::seconds(value)?),
            "duty" => to.duty = Some(units::probability(value)?),
            _ => {
                if !matches!(value.text(), "" | "true") {
                    return Err(value
                        .error(format!("`{key}` takes no value"))
                        .expected("the word alone"));
                }
                to.reconnect = true;
            }
        }
        Ok(())
    }
}

/// A count that begins at 1.
fn ordinal(piece: Piece<'_>) -> Result<u64, RuleError> {
    match units::count(piece)? {
        0 => Err(piece.error("counts begin at 1").expected("1 or more")),
        n => Ok(n),
    }
}

/// One of some words.
fn word<T>(
    piece: Piece<'_>,
    words: &[&'static str],
    from_word: impl Fn(&str) -> Option<T>,
) -> Result<T, RuleError> {
    from_word(&piece.text().replace('_', "-")).ok_or_else(|| {
        piece
            .error(match piece.text() {
                "" => "a value is missing".to_owned(),
                text => format!("`{text}` is not a valid value"),
            })
            .expected(super::args::one_of(words))
            .nearest(piece.text(), words.iter().copied())
    })
}

/// Packet kinds with `/` between them, or `,` as many write it.
fn packet_kinds(piece: Piece<'_>) -> Result<PacketKinds, RuleError> {
    let mut kinds = PacketKinds::default();
    let mut rest = Some(piece);
    while let Some(part) = rest {
        let (item, more) = match part.split_once(&['/', ',']) {
            Some((item, more)) => (item, Some(more)),
            None => (part, None),
        };
        let names = PacketKinds::ALL.map(|(_, word)| word);
        let find = |word: &str| PacketKinds::ALL.into_iter().find(|(_, w)| *w == word);
        kinds = kinds.with(word(item, &names, find)?.0);
        rest = more;
    }
    Ok(kinds)
}

impl Modifiers {
    /// Every modifier that differs from its default: key and value, in the order of the table.
    #[must_use]
    pub fn given(&self) -> Vec<(&'static str, String)> {
        let mut list = Vec::new();
        if self.probability != PPM {
            list.push(("p", units::show_probability(self.probability)));
        }
        list.extend(self.triggers.given());
        if self.count != CountScope::default() {
            list.push(("count", self.count.to_string()));
        }
        if let Some(bounds) = &self.connections {
            list.push(("conn", bounds.show(|n| n.to_string())));
        }
        list.extend(self.hosts.map(|share| ("hosts", share.to_string())));
        list.extend(self.asked.given());
        if !self.packets.is_empty() {
            list.push(("match", self.packets.words().collect::<Vec<_>>().join("/")));
        }
        if let Some(bounds) = &self.size {
            list.push(("size", bounds.show(units::show_size)));
        }
        if let Some(kind) = self.query_type {
            list.push(("type", kind.to_string()));
        }
        if self.direction != Direction::default() {
            list.push(("dir", self.direction.to_string()));
        }
        if self.at_ns != 0 {
            list.push(("at", units::show_duration(self.at_ns)));
        }
        let times = [("for", self.for_ns), ("period", self.period_ns)];
        for (key, ns) in times.into_iter().filter_map(|(k, ns)| Some((k, ns?))) {
            list.push((key, units::show_duration(ns)));
        }
        if let Some(duty) = self.duty {
            list.push(("duty", units::show_probability(duty)));
        }
        if self.reconnect {
            list.push(("reconnect", String::new()));
        }
        list
    }

    /// When the rule acts.
    ///
    /// With `duty` the windows are that part of each period, and `for` is the length of the whole;
    /// without it `for` is the length of each window.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        let part = |period: u64, duty: u32| {
            let on = u128::from(period) * u128::from(duty) / u128::from(PPM);
            u64::try_from(on).unwrap_or(period)
        };
        let end = self.for_ns.map(|length| self.at_ns.saturating_add(length));
        let (on_ns, period_ns, end_ns) = match (self.period_ns, self.duty) {
            (Some(period), Some(duty)) => (Some(part(period, duty)), Some(period), end),
            (Some(period), None) => (self.for_ns, Some(period), None),
            (None, _) => (self.for_ns, None, end),
        };
        Schedule {
            start_ns: self.at_ns,
            on_ns,
            period_ns,
            end_ns,
        }
    }

    /// What is wrong between the modifiers.
    pub(super) fn complaint(&self) -> Option<Complaint> {
        let complain = |param, message: &str, expected: &str| {
            Some(Complaint {
                param,
                message: message.to_owned(),
                expected: Some(expected.to_owned()),
            })
        };
        if self.count == CountScope::PerRule && self.triggers.is_empty() {
            return complain(
                "count",
                "there is nothing to count",
                "`first`, `after`, `nth`, `every` or `range` as well",
            );
        }
        if self.triggers.is_never() {
            let last = self.triggers.given().last().map_or("nth", |(key, _)| key);
            return complain(
                last,
                "these counts together select no packet",
                "counts that at least one packet matches",
            );
        }
        let times = [
            ("at", Some(self.at_ns)),
            ("for", self.for_ns),
            ("period", self.period_ns),
        ];
        for (key, ns) in times {
            if ns.is_some_and(|ns| ns > MAX_TIME_NS) {
                return complain(
                    key,
                    "this is too long",
                    &format!("at most {}", units::show_duration(MAX_TIME_NS)),
                );
            }
        }
        if self.for_ns == Some(0) {
            return complain("for", "a rule for 0 never acts", "more than 0");
        }
        match (self.period_ns, self.duty, self.for_ns) {
            (None, Some(_), _) => complain(
                "duty",
                "`duty` is a part of a period",
                "`period=TIME` as well",
            ),
            (Some(0), _, _) => complain("period", "a period of 0 has no end", "more than 0"),
            (Some(_), None, None) => complain(
                "period",
                "a rule that acts all the time has no period",
                "`duty=P%` or `for=TIME` as well",
            ),
            (Some(period), None, Some(length)) if length > period => complain(
                "for",
                "`for` is longer than the period",
                "a shorter time, or `duty=P%` for how much of each period",
            ),
            (Some(period), Some(_), Some(length)) if length < period => complain(
                "for",
                "the rule ends before its first period is over",
                "a longer time, or no `duty`",
            ),
            (Some(_), Some(_), _) if self.schedule().on_ns == Some(0) => {
                complain("duty", "a duty of 0 never acts", "more than 0%")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Modifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.given().into_iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            let equals = if value.is_empty() { "" } else { "=" };
            write!(f, "{space}{key}{equals}{value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn triggers_count_from_one_and_include_both_ends() {
        let picked = |text: &str| {
            let rule: super::super::Rule = format!("tcp:1 drop {text}").parse().unwrap();
            let triggers = rule.modifiers.triggers;
            (1..=9).filter(|n| triggers.picks(*n)).collect::<Vec<_>>()
        };
        assert_eq!(picked("first=2"), [1, 2]);
        assert_eq!(picked("after=7"), [8, 9]);
        assert_eq!(picked("after=0"), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(picked("nth=5"), [5]);
        assert_eq!(picked("every=3"), [3, 6, 9]);
        assert_eq!(picked("range=4..6"), [4, 5, 6]);
        assert_eq!(picked("range=8.."), [8, 9]);
        assert_eq!(picked("after=2 first=5"), [3, 4, 5]);
        assert_eq!(picked("every=2 range=3..8"), [4, 6, 8]);
        assert_eq!(picked("every=2 nth=4"), [4]);
    }

    #[test]
    fn schedules() {
        let schedule = |text: &str| {
            let rule: super::super::Rule = format!("tcp:1 drop {text}").parse().unwrap();
            let s = rule.modifiers.schedule();
            let seconds = |ns: u64| ns / 1_000_000_000;
            (
                seconds(s.start_ns),
                s.on_ns.map(seconds),
                s.period_ns.map(seconds),
                s.end_ns.map(seconds),
            )
        };
        assert_eq!(schedule("at=2s"), (2, None, None, None));
        assert_eq!(schedule("at=2s for=5s"), (2, Some(5), None, Some(7)));
        assert_eq!(
            schedule("at=2s for=5s period=30s"),
            (2, Some(5), Some(30), None)
        );
        assert_eq!(
            schedule("at=2s period=30s duty=20%"),
            (2, Some(6), Some(30), None)
        );
        assert_eq!(
            schedule("at=2s for=60s period=30s duty=20%"),
            (2, Some(6), Some(30), Some(62))
        );
    }
}
