//! What a rule is aimed at: protocol, host and the service's ports.

mod meant;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::dictionary::{self, OVER, look_up};
use super::error::{Piece, RuleError, nearest};
use super::words::words;

words! {
    /// The transport protocol of a target.
    #[derive(Default)]
    Protocol {
        /// With ports TCP and UDP, without ports all of IP.
        #[default]
        Any = "any",
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
        /// `ICMP` and `ICMPv6`; it has no ports.
        Icmp = "icmp",
        /// Queries to servers of DNS, by the name that they ask for.
        Dns = "dns",
    }
}

/// A network: an address and how many of its leading bits count. The other bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The network of one address. An IPv4-mapped IPv6 address is the IPv4 address that is on the wire.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        let address = address.to_canonical();
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        Self { address, prefix }
    }

    /// A network, or nothing where the prefix is too long or a bit behind it is set.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = Self { address, prefix };
        (prefix <= network.width() && masked(address, prefix) == address).then_some(network)
    }

    /// The first address of the network.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// How many leading bits count: 0 to 32 for IPv4, 0 to 128 for IPv6.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether an address belongs to this network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }

    /// Whether the two networks have an address in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }

    /// Whether every address of the other network belongs to this one.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    /// The bits of an address of this family.
    fn width(&self) -> u8 {
        if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// Whether the network is a single address.
    fn is_host(&self) -> bool {
        self.prefix == self.width()
    }
}

/// The address with all bits behind the prefix at zero.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if self.is_host() {
            Ok(())
        } else {
            write!(f, "/{}", self.prefix)
        }
    }
}

/// The service ports `first` to `last`, both included, 1 to 65,535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// The host part of a target as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address or a network.
    Cidr(Cidr),
    /// A name, or `*.` and a domain for all names in it.
    Name(String),
}

/// What a rule is aimed at. The port is the service's, wherever the service runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Target {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The host, or nothing for any.
    pub host: Option<Host>,
    /// The service's ports; empty means any.
    pub ports: Vec<PortRange>,
    /// What is not meant: each has a host or ports, and no exclusions of its own.
    pub except: Vec<Target>,
}

/// A target as a rule names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetRef {
    /// A name: of a target, or where there is none and it has a dot, of a host.
    Name(String),
    /// A target written out.
    Spec(Target),
}

/// Named targets, from `--target NAME=TARGET` and the scenario's `targets`.
pub type Targets = BTreeMap<String, Target>;

/// What a target may look like, for error messages.
const EXPECTED: &str = "[tcp:|udp:|icmp:|any:][host-or-CIDR:]port[,port|-port], icmp, * or a name";

/// Reads a target of a rule.
pub(super) fn target_ref(piece: Piece<'_>) -> Result<TargetRef, RuleError> {
    let text = piece.text();
    if text.is_empty() {
        return Err(piece.error("the target is missing").expected(EXPECTED));
    }
    if !is_reserved(text) && is_name(text) {
        return Ok(TargetRef::Name(text.to_owned()));
    }
    target(piece).map(TargetRef::Spec)
}

/// Reads a target that is written out, with its exclusions: `tcp:!22`, `*,!10.0.0.0/8`, `!tcp:22`.
pub(super) fn target(piece: Piece<'_>) -> Result<Target, RuleError> {
    let text = piece.text();
    let Some(at) = text.find('!') else {
        return included(piece);
    };
    let mut target = match text[..at].strip_suffix([',', ':']) {
        None if at == 0 => Target::default(),
        Some(before) => included(piece.slice(0..before.len()))?,
        None => {
            return Err(piece
                .slice(at..text.len())
                .error("an exclusion stands alone or behind a comma or a colon")
                .expected("`tcp:!22`, `*,!10.0.0.0/8` or `!tcp:22`"));
        }
    };
    let mut start = at + 1;
    for excluded in text[start..].split(",!") {
        let place = piece.slice(start..start + excluded.len());
        start += excluded.len() + ",!".len();
        let exclusion = included(place)?;
        if let Some((message, expected)) = misfit(&target, &exclusion) {
            return Err(place.error(message).expected(expected));
        }
        target.except.push(exclusion);
    }
    Ok(target)
}

/// What is wrong with an exclusion from a target, and what would be right.
fn misfit(target: &Target, exclusion: &Target) -> Option<(&'static str, &'static str)> {
    if [target.protocol, exclusion.protocol].contains(&Protocol::Dns) {
        return Some((
            "no queries can be excluded",
            "`dns`, `dns:NAME` or `dns:*.DOMAIN`",
        ));
    }
    let same_protocol = exclusion.protocol == target.protocol;
    let any_protocol = exclusion.protocol == Protocol::Any;
    match (exclusion.host.is_some(), !exclusion.ports.is_empty()) {
        (true, true) | (false, false) => Some((
            "an exclusion names ports or a host, and not both",
            "an exclusion such as `!22` or `!10.0.0.0/8`",
        )),
        (true, false) if any_protocol || same_protocol => None,
        (true, false) => Some((
            "a host is excluded for all protocols of the target",
            "the exclusion without its protocol",
        )),
        (false, true) if target.protocol == Protocol::Icmp => {
            Some(("ICMP has no ports", "the exclusion of a host"))
        }
        (false, true) if any_protocol || same_protocol => None,
        (false, true) if target.protocol != Protocol::Any => Some((
            "the exclusion is of another protocol than the target",
            "the exclusion without its protocol",
        )),
        (false, true) if !target.ports.is_empty() => Some((
            "the target's ports are of TCP and UDP, and the exclusion is of one of them",
            "the target's own protocol, such as `tcp:8000-9000,!8080`",
        )),
        (false, true) => {
            let mut others = target.except.iter().filter(|other| !other.ports.is_empty());
            others
                .any(|other| other.protocol != exclusion.protocol)
                .then_some((
                    "the ports that are excluded are of different protocols",
                    "one rule for each protocol",
                ))
        }
    }
}

/// Reads a target without exclusions.
fn included(piece: Piece<'_>) -> Result<Target, RuleError> {
    plain(piece).map_err(|error| match meant::target(piece.text()) {
        Some(meant) if error.suggestion.is_none() => piece
            .error(format!("`{}` is not a target", piece.text()))
            .suggest(meant),
        _ => error,
    })
}

/// Whether a text is a target without exclusions.
pub(super) fn is_plain(text: &str) -> bool {
    plain(Piece::whole(text)).is_ok()
}

/// Reads a target without exclusions, and looks for no hint.
fn plain(piece: Piece<'_>) -> Result<Target, RuleError> {
    let text = piece.text();
    if text == "*" {
        return Ok(Target::default());
    }
    if let Some(protocol) = Protocol::from_word(text) {
        return Ok(Target {
            protocol,
            ..Target::default()
        });
    }
    let (protocol, rest) = match piece.split_once(&[':']) {
        Some((word, rest)) if Protocol::from_word(word.text()).is_some() => {
            (Protocol::from_word(word.text()), rest)
        }
        _ => (None, piece),
    };
    if text.starts_with("unix:") || rest.text().starts_with('/') {
        return Err(piece
            .error("a Unix socket sends no packets and has no port")
            .expected("the TCP port of the service, such as `tcp:5432`, and clients that use it"));
    }
    if rest.text() == "*" {
        return Ok(Target {
            protocol: protocol.unwrap_or_default(),
            ..Target::default()
        });
    }
    let (host_piece, port_piece) = host_and_ports(rest, protocol.is_some())?;
    let host = host_piece
        .map(|host_piece| host(host_piece, protocol.is_some()))
        .transpose()?;
    let ports = port_piece.map(ports).transpose()?.unwrap_or_default();
    let protocol = protocol.unwrap_or_default();
    match port_piece {
        Some(piece) if protocol == Protocol::Dns => Err(no_question(piece)),
        _ if protocol == Protocol::Dns && matches!(host, Some(Host::Cidr(_))) => {
            Err(no_question(host_piece.unwrap_or(rest)))
        }
        Some(port_piece) if protocol == Protocol::Icmp => Err(port_piece
            .error("ICMP has no ports")
            .expected("`icmp` or `icmp:HOST`")),
        _ => Ok(Target {
            protocol,
            host,
            ports,
            except: Vec::new(),
        }),
    }
}

/// The error for something that no query asks for.
fn no_question(piece: Piece<'_>) -> RuleError {
    piece
        .error("queries are matched by the name that they ask for")
        .expected("`dns`, `dns:NAME` or `dns:*.DOMAIN`")
}

/// Whether a word means a protocol and can't be the name of a target. `dns` can: it is one where no target has the name.
fn is_reserved(word: &str) -> bool {
    Protocol::from_word(word).is_some_and(|protocol| protocol != Protocol::Dns)
}

/// Splits what is behind the protocol into its host and its ports.
fn host_and_ports(
    rest: Piece<'_>,
    has_protocol: bool,
) -> Result<(Option<Piece<'_>>, Option<Piece<'_>>), RuleError> {
    let text = rest.text();
    if text.is_empty() {
        return Err(rest.error("the host or port is missing").expected(EXPECTED));
    }
    if text.starts_with('[') {
        let Some(close) = text.find(']') else {
            return Err(rest
                .error("the bracket is not closed")
                .expected("an IPv6 address such as `[::1]:8080`"));
        };
        // Both `[2001:db8::/32]` and `[2001:db8::]/32` are in use.
        let after = rest.slice(close + 1..text.len());
        let end = after.text().find(':').unwrap_or(after.text().len());
        let host = rest.slice(0..close + 1 + end);
        let port = (end < after.text().len()).then(|| after.slice(end + 1..after.text().len()));
        return Ok((Some(host), port));
    }
    if looks_like_ports(text) {
        return Ok((None, Some(rest)));
    }
    match text.matches(':').count() {
        0 => Ok((Some(rest), None)),
        1 => match rest.split_once(&[':']) {
            Some((word, ports)) if !has_protocol && looks_like_ports(ports.text()) => {
                match look_up(OVER, word.text()) {
                    Some(protocol) => Err(word
                        .error(format!("`{}` is no protocol of packets", word.text()))
                        .expected(format!("`any:{}` for a host of this name", rest.text()))
                        .suggest(format!("{protocol}:{}", ports.text()))),
                    None => Ok((Some(word), Some(ports))),
                }
            }
            Some((host, ports)) => Ok((Some(host), Some(ports))),
            None => Ok((Some(rest), None)),
        },
        _ if text
            .split('/')
            .next()
            .is_some_and(|ip| Ipv6Addr::from_str(ip).is_ok()) =>
        {
            let error = rest.error("an IPv6 address is written in brackets");
            Err(match port_in_brackets(text) {
                Some(meant) if Ipv6Addr::from_str(text).is_ok_and(is_ipv4_compatible) => {
                    error.suggest(meant)
                }
                Some(meant) => error
                    .expected(format!("`[{text}]` if all of it is the address"))
                    .suggest(meant),
                None => error.suggest(format!("[{text}]")),
            })
        }
        _ if has_protocol => Err(rest.error("too many colons").expected(EXPECTED)),
        _ => Err(wrong_protocol(rest)),
    }
}

/// `[::1]:5432` for `::1:5432`, whose last group may be meant as the port.
fn port_in_brackets(text: &str) -> Option<String> {
    let (address, port) = text.rsplit_once(':')?;
    let is_address = Ipv6Addr::from_str(address).is_ok();
    (is_address && looks_like_ports(port)).then(|| format!("[{address}]:{port}"))
}

/// Whether an address is of the form `::a.b.c.d`, which nothing uses any more: `::1:5432` is one.
fn is_ipv4_compatible(address: Ipv6Addr) -> bool {
    let bits = address.to_bits();
    bits > 1 && bits <= u128::from(u32::MAX)
}

/// The error for a first word that should have been a protocol.
fn wrong_protocol(piece: Piece<'_>) -> RuleError {
    let word = piece.split_once(&[':']).map_or(piece, |(word, _)| word);
    word.error(format!("unknown protocol `{}`", word.text()))
        .expected("tcp, udp, icmp or any")
        .nearest(word.text(), Protocol::WORDS.iter().copied())
}

/// Whether a text can only be meant as ports.
pub(super) fn looks_like_ports(text: &str) -> bool {
    let digit = text.starts_with(|c: char| c.is_ascii_digit());
    (digit && text.contains(',') && !text.contains(':'))
        || text
            .bytes()
            .all(|b| b.is_ascii_digit() || b == b',' || b == b'-')
}

/// Reads a host: an address, a network or a name.
fn host(piece: Piece<'_>, has_protocol: bool) -> Result<Host, RuleError> {
    let text = piece.text();
    let bracketed = text.starts_with('[');
    let plain = text.replace(['[', ']'], "");
    let (address, prefix) = match plain.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (plain.as_str(), None),
    };
    let parsed = if bracketed {
        Ipv6Addr::from_str(address).ok().map(IpAddr::from)
    } else {
        Ipv4Addr::from_str(address).ok().map(IpAddr::from)
    };
    match (parsed, prefix) {
        (Some(IpAddr::V6(address)), None) if is_ipv4_compatible(address) => {
            let error = piece.error(format!("{address} is not the address of a host"));
            Err(match port_in_brackets(&plain) {
                Some(meant) => error.suggest(meant),
                None => error.expected("an IPv6 address such as `[::1]`"),
            })
        }
        (Some(address), None) => Ok(Host::Cidr(Cidr::host(address))),
        (Some(address), Some(prefix)) => network(piece, address, prefix).map(Host::Cidr),
        (None, None) if !bracketed && is_host_name(text.strip_prefix("*.").unwrap_or(text)) => {
            let short = !text.contains('.') && !has_protocol;
            match short.then(|| nearest(text, Protocol::WORDS.iter().copied())) {
                Some(Some(_)) => Err(wrong_protocol(piece)),
                _ => Ok(Host::Name(text.to_ascii_lowercase())),
            }
        }
        _ => Err(piece
            .error(format!("`{text}` is not a host"))
            .expected("an address such as 10.0.0.5, a network such as 10.0.0.0/8, an IPv6 address in brackets, a host name, or `*.` and a domain")),
    }
}

/// Reads the prefix of a network and checks that no bit behind it is set.
fn network(piece: Piece<'_>, address: IpAddr, prefix: &str) -> Result<Cidr, RuleError> {
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
    let Some(bits) = prefix
        .parse::<u8>()
        .ok()
        .filter(|bits| *bits <= longest && digits)
    else {
        return Err(piece
            .error(format!("`/{prefix}` is not a prefix length"))
            .expected(format!("0 to {longest}")));
    };
    Cidr::new(address, bits).ok_or_else(|| {
        let network = Cidr {
            address: masked(address, bits),
            prefix: bits,
        };
        piece
            .error(format!("bits after the first {bits} are set"))
            .expected("the first address of the network")
            .suggest(bracketed(&network))
    })
}

/// Reads a list of ports and port ranges.
fn ports(piece: Piece<'_>) -> Result<Vec<PortRange>, RuleError> {
    let mut ranges = Vec::new();
    let mut rest = Some(piece);
    while let Some(part) = rest {
        let (item, more) = match part.split_once(&[',']) {
            Some((item, more)) => (item, Some(more)),
            None => (part, None),
        };
        ranges.push(match item.split_once(&['-']) {
            None => {
                let port = port(item)?;
                PortRange {
                    first: port,
                    last: port,
                }
            }
            Some((first, last)) => {
                let range = PortRange {
                    first: port(first)?,
                    last: port(last)?,
                };
                if range.first > range.last {
                    return Err(item
                        .error("this range of ports is empty")
                        .expected("the smaller port first")
                        .suggest(format!("{}-{}", range.last, range.first)));
                }
                range
            }
        });
        rest = more;
    }
    Ok(ranges)
}

/// Reads one port.
fn port(piece: Piece<'_>) -> Result<u16, RuleError> {
    let text = piece.text();
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(port) if port > 0 && digits => Ok(port),
        _ if digits => Err(piece
            .error(format!("there is no port {text}"))
            .expected("a port from 1 to 65535")),
        _ => Err(piece
            .error(match text {
                "" => "a port is missing".to_owned(),
                _ => format!("`{text}` is not a port"),
            })
            .expected("a port from 1 to 65535")
            .suggest_some(dictionary::service_port(text))),
    }
}

/// Whether a text may be the name of a target: a letter or `_`, then letters, digits, `_`, `-`, `.`.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 253
        && bytes
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// Whether a text may be a host name: labels of letters, digits, `-` and `_`, not all of them digits.
fn is_host_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let last = text.rsplit('.').next().unwrap_or(text);
    text.len() <= 253
        && text.split('.').all(label)
        && !last.bytes().all(|b| b.is_ascii_digit() || b == b'-')
}

/// The text of a network as the grammar wants it: IPv6 in brackets.
fn bracketed(network: &Cidr) -> String {
    if network.address.is_ipv4() {
        network.to_string()
    } else {
        format!("[{network}]")
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cidr(network) => f.write_str(&bracketed(network)),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        // A host name alone could be read as the name of a target, or a short one as a protocol.
        let named = matches!(&self.host, Some(Host::Name(name)) if self.ports.is_empty() || !name.contains('.'));
        if self.protocol != Protocol::Any || named {
            parts.push(self.protocol.word().to_owned());
        }
        if let Some(host) = &self.host {
            parts.push(host.to_string());
        } else if self.protocol == Protocol::Dns {
            // Alone it could be the name of a target.
            parts.push("*".to_owned());
        }
        if !self.ports.is_empty() {
            let list: Vec<_> = self.ports.iter().map(PortRange::to_string).collect();
            parts.push(list.join(","));
        }
        let mut text = if parts.is_empty() {
            "*".to_owned()
        } else {
            parts.join(":")
        };
        for exclusion in &self.except {
            // Behind a protocol or a host the ports would follow, and so do those that are excluded.
            let is_first_port = !parts.is_empty() && !text.contains('!') && self.ports.is_empty();
            text.push_str(if is_first_port { ":!" } else { ",!" });
            text.push_str(&exclusion.to_string());
        }
        f.write_str(&text)
    }
}

impl FromStr for Target {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        target(Piece::whole(text))
    }
}

impl fmt::Display for TargetRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Spec(target) => target.fmt(f),
        }
    }
}

impl FromStr for TargetRef {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        target_ref(Piece::whole(text))
    }
}

/// Reads the argument of `--target`: `NAME=TARGET`.
///
/// # Errors
/// Where the name is not one, is a protocol's, or the target is wrong.
pub fn named_target(text: &str) -> Result<(String, Target), RuleError> {
    let piece = Piece::whole(text);
    let Some((name, spec)) = piece.split_once(&['=']) else {
        return Err(piece
            .error("the `=` is missing")
            .expected("NAME=TARGET such as `mysql=tcp:3306`"));
    };
    check_name(name)?;
    Ok((name.text().to_owned(), target(spec)?))
}

/// Checks a name that is given to a target.
pub(super) fn check_name(name: Piece<'_>) -> Result<(), RuleError> {
    if is_reserved(name.text()) {
        let message = format!("`{}` is a protocol, not a name for a target", name.text());
        return Err(name.error(message).expected("another name"));
    }
    if is_name(name.text()) {
        return Ok(());
    }
    Err(name
        .error(format!("`{}` is not a name for a target", name.text()))
        .expected("a letter or _, then letters, digits, `_`, `-` or `.`"))
}
