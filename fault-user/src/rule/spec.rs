//! What the language says about a fault in general: its name, its arguments, where it works. The parser,
//! the printer, the object form, the JSON schema, the reference and the error messages all read it.

use super::words::words;

words! {
    /// Which part of `fault` carries a fault.
    Layer {
        /// The eBPF programs, with a delay mechanism for what holds packets.
        Packet = "packet",
        /// The userspace relay.
        Stream = "stream",
        /// Either of the two.
        Either = "either",
        /// A mix with arms of both layers: the draw is made once per connection, each arm goes to its layer.
        Mixed = "mixed",
    }
}

/// What a fault acts on, and with it what `dir` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acts {
    /// On each direction by itself: without `dir` on both.
    OneWay,
    /// On a connection, once.
    OnConnections,
    /// On requests together with their answers: `dir` has no meaning.
    OnRequests,
    /// On queries of DNS.
    OnQueries,
    /// On the service as a whole: nothing can pick some of its connections.
    OnService,
}

/// What an argument's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// A probability.
    Probability,
    /// A duration.
    Duration,
    /// A size in bytes.
    Size,
    /// A rate.
    Rate,
    /// A whole number.
    Count,
    /// A whole number with a sign.
    Signed,
    /// One of some words; the word alone is enough.
    Word(&'static [&'static str]),
    /// There or not; the name alone is enough.
    Flag,
    /// Any text, in double quotes where it has other characters than letters, digits, `_`, `-` and `.`.
    Text,
    /// A text, or the name alone for the usual one.
    OptionalText,
    /// A size, or the name alone for the usual one.
    OptionalSize,
    /// HTTP statuses separated by `/`, or the name alone for 500.
    Statuses,
    /// `name(a,b,…)`: probabilities in brackets, of which the first `required` must be there.
    Call {
        /// The names of the probabilities.
        names: &'static [&'static str],
        /// How many of them must be there.
        required: usize,
    },
}

/// An argument of a fault.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// Its name in the object form.
    pub name: &'static str,
    /// Its name in the one-line form.
    pub text: &'static str,
    /// What its value is.
    pub kind: ValueKind,
    /// It needs no name in the one-line form.
    pub positional: bool,
    /// Its spread, which may be written behind it with `~`.
    pub spread: Option<&'static str>,
    /// What it does, for the reference and the schema.
    pub help: &'static str,
}

/// A fault's name, its arguments and where it works.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// Its name.
    pub name: &'static str,
    /// Which part of `fault` carries it.
    pub layer: Layer,
    /// It has a meaning on UDP.
    pub udp: bool,
    /// It has a meaning on ICMP.
    pub icmp: bool,
    /// What it acts on.
    pub acts: Acts,
    /// Its arguments.
    pub params: &'static [Param],
    /// What the application sees.
    pub help: &'static str,
    /// Its place in lists: faults with lower numbers come before.
    pub rank: u16,
}

impl Spec {
    /// The argument of this name, in either form's spelling; `-` and `_` are the same.
    #[must_use]
    pub fn param(&self, name: &str) -> Option<&'static Param> {
        self.params
            .iter()
            .find(|param| same(param.name, name) || same(param.text, name))
    }

    /// The same, but not for UDP and ICMP.
    #[must_use]
    pub(super) const fn tcp_only(self) -> Self {
        Self {
            udp: false,
            icmp: false,
            ..self
        }
    }

    /// The same, at a place in lists; without one it comes last.
    #[must_use]
    pub(super) const fn listed(self, rank: u16) -> Self {
        Self { rank, ..self }
    }

    /// The same, but it acts on something else.
    #[must_use]
    pub(super) const fn acting(self, acts: Acts) -> Self {
        Self { acts, ..self }
    }
}

/// Whether two names are the same up to `-` and `_`.
pub(super) fn same(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.len() == b.len() && a.bytes().map(plain).eq(b.bytes().map(plain))
}

/// An argument that goes by its name.
pub(super) const fn named(name: &'static str, kind: ValueKind, help: &'static str) -> Param {
    Param {
        name,
        text: name,
        kind,
        positional: false,
        spread: None,
        help,
    }
}

/// An argument that needs no name.
pub(super) const fn first(name: &'static str, kind: ValueKind, help: &'static str) -> Param {
    Param {
        positional: true,
        ..named(name, kind, help)
    }
}

/// An argument that needs no name and may be followed by `~` and its spread.
pub(super) const fn spread(
    name: &'static str,
    kind: ValueKind,
    by: &'static str,
    help: &'static str,
) -> Param {
    Param {
        spread: Some(by),
        ..first(name, kind, help)
    }
}

/// An argument with a shorter name in the one-line form.
pub(super) const fn short(text: &'static str, param: Param) -> Param {
    Param { text, ..param }
}

/// A fault of the packet layer, which works on every protocol and on each direction by itself.
pub(super) const fn packet(name: &'static str, help: &'static str) -> Spec {
    Spec {
        name,
        layer: Layer::Packet,
        udp: true,
        icmp: true,
        acts: Acts::OneWay,
        params: &[],
        help,
        rank: u16::MAX,
    }
}

/// A fault of the packet layer that answers queries of DNS.
pub(super) const fn query(name: &'static str, help: &'static str) -> Spec {
    Spec {
        icmp: false,
        acts: Acts::OnQueries,
        ..packet(name, help)
    }
}

/// A fault of the packet layer and of the UDP relay.
pub(super) const fn either(name: &'static str, help: &'static str) -> Spec {
    Spec {
        layer: Layer::Either,
        ..packet(name, help)
    }
}

/// A fault of the TCP relay that acts on a connection, once.
pub(super) const fn stream(name: &'static str, help: &'static str) -> Spec {
    Spec {
        layer: Layer::Stream,
        acts: Acts::OnConnections,
        ..packet(name, help).tcp_only()
    }
}

/// A fault of the TCP relay and of the UDP relay that acts on each direction by itself.
pub(super) const fn datagram(name: &'static str, help: &'static str) -> Spec {
    Spec {
        udp: true,
        acts: Acts::OneWay,
        ..stream(name, help)
    }
}

/// How a queue that holds packets is bounded.
pub(super) const LIMIT: Param = short(
    "limit",
    named(
        "limit_packets",
        ValueKind::Count,
        "the most packets held at once; more are lost and counted",
    ),
);

/// One count or rate for the whole relay.
pub(super) const SHARED: Param = named(
    "shared",
    ValueKind::Flag,
    "one for the whole relay instead of one per connection",
);

/// Faults in the order of lists.
pub(super) const fn ranked<const N: usize>(mut specs: [Spec; N]) -> [Spec; N] {
    let mut end = 1;
    while end < N {
        let mut at = end;
        while at > 0 && specs[at].rank < specs[at - 1].rank {
            (specs[at], specs[at - 1]) = (specs[at - 1], specs[at]);
            at -= 1;
        }
        end += 1;
    }
    specs
}
