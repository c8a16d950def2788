//! The table of all faults and their arguments. The parser, the printer, the object form, the JSON
//! schema and the error messages all read it, so a fault is described once.

use super::fault::{
    CloseHow, CorruptDataMode, CorruptMode, Distribution, Fault, Layer, LifetimeFrom, RejectWith,
};

/// What an argument's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
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
    pub kind: Kind,
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
    /// Its arguments.
    pub params: &'static [Param],
    /// What the application sees.
    pub help: &'static str,
}

impl Spec {
    /// The argument of this name, in either form's spelling; `-` and `_` are the same.
    #[must_use]
    pub fn param(&self, name: &str) -> Option<&'static Param> {
        self.params
            .iter()
            .find(|param| same(param.name, name) || same(param.text, name))
    }
}

/// Whether two names are the same up to `-` and `_`.
pub(super) fn same(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.len() == b.len() && a.bytes().map(plain).eq(b.bytes().map(plain))
}

/// The fault of this name; `-` and `_` are the same.
#[must_use]
pub fn spec(name: &str) -> Option<&'static Spec> {
    FAULTS.iter().find(|spec| same(spec.name, name))
}

/// An argument that goes by its name.
const fn named(name: &'static str, kind: Kind, help: &'static str) -> Param {
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
const fn first(name: &'static str, kind: Kind, help: &'static str) -> Param {
    Param {
        positional: true,
        ..named(name, kind, help)
    }
}

/// An argument that needs no name and may be followed by `~` and its spread.
const fn spread(name: &'static str, kind: Kind, by: &'static str, help: &'static str) -> Param {
    Param {
        spread: Some(by),
        ..first(name, kind, help)
    }
}

/// An argument with a shorter name in the one-line form.
const fn short(text: &'static str, param: Param) -> Param {
    Param { text, ..param }
}

/// A fault of the packet layer, which works on every protocol.
const fn packet(name: &'static str, params: &'static [Param], help: &'static str) -> Spec {
    Spec {
        name,
        layer: Layer::Packet,
        udp: true,
        icmp: true,
        params,
        help,
    }
}

/// A fault of the packet layer and of the UDP relay.
const fn either(name: &'static str, params: &'static [Param], help: &'static str) -> Spec {
    Spec {
        layer: Layer::Either,
        ..packet(name, params, help)
    }
}

/// A fault of the TCP relay.
const fn stream(name: &'static str, params: &'static [Param], help: &'static str) -> Spec {
    Spec {
        layer: Layer::Stream,
        udp: false,
        icmp: false,
        ..packet(name, params, help)
    }
}

/// A fault of the TCP relay and of the UDP relay.
const fn datagram(name: &'static str, params: &'static [Param], help: &'static str) -> Spec {
    Spec {
        udp: true,
        ..stream(name, params, help)
    }
}

/// The arguments that choose an error reply; at most one of them may be there.
const HTTP: Param = named(
    "http",
    Kind::Statuses,
    "HTTP statuses, one drawn per request; 500 when absent",
);
const REDIS: Param = named("redis", Kind::OptionalText, "a Redis error, with its text");
const MYSQL: Param = named(
    "mysql",
    Kind::OptionalText,
    "a MySQL error packet, with its text",
);
const SMTP: Param = named(
    "smtp",
    Kind::OptionalText,
    "an SMTP error reply, with its text",
);
const MEMCACHE: Param = named(
    "memcache",
    Kind::OptionalText,
    "a memcached error reply, with its text",
);
const RANDOM: Param = named("random", Kind::OptionalSize, "random bytes, 64 when absent");

/// How a queue that holds packets is bounded.
const LIMIT: Param = short(
    "limit",
    named(
        "limit_packets",
        Kind::Count,
        "the most packets held at once; more are lost and counted",
    ),
);

/// Where an ending has two ways.
const HOW: Param = first(
    "how",
    Kind::Word(CloseHow::WORDS),
    "`fin` (default) or `rst`",
);

/// One count for the whole relay.
const SHARED: Param = named(
    "shared",
    Kind::Flag,
    "one for the whole relay instead of one per connection",
);

/// Every fault, in the order of the reference.
pub const FAULTS: &[Spec] = &[
    either(
        "loss",
        &[
            first(
                "probability",
                Kind::Probability,
                "share of the packets, each on its own",
            ),
            named(
                "ge",
                Kind::Call {
                    names: &["p", "r", "one_minus_h", "one_minus_k"],
                    required: 2,
                },
                "Gilbert-Elliott: good to bad, bad to good, loss when bad (100%), loss when good (0%)",
            ),
            named(
                "state",
                Kind::Call {
                    names: &["p13", "p31", "p32", "p23", "p14"],
                    required: 1,
                },
                "four-state Markov model; absent: p31 = 1 - p13, p32 = 0%, p23 = 100%, p14 = 0%",
            ),
        ],
        "silent loss, as on a wire: the sender is not told",
    ),
    either(
        "drop",
        &[],
        "the packets that the modifiers pick vanish silently",
    ),
    packet(
        "blackhole",
        &[],
        "everything vanishes silently, SYN included",
    ),
    packet(
        "reject",
        &[first(
            "with",
            Kind::Word(RejectWith::WORDS),
            "`rst` (default for TCP), `icmp-port` (for UDP), `icmp-host` (for ICMP), `icmp-admin`",
        )],
        "refused at once",
    ),
    Spec {
        udp: false,
        icmp: false,
        ..packet(
            "reset",
            &[first(
                "bytes",
                Kind::Size,
                "only once so much payload has gone in the packet's direction since the rule began",
            )],
            "live connections get an RST at both ends on their next packet",
        )
    },
    packet(
        "corrupt",
        &[
            first("probability", Kind::Probability, "share of the packets"),
            named(
                "bits",
                Kind::Count,
                "bits per packet, 1 to 64; 1 when absent",
            ),
            first(
                "mode",
                Kind::Word(CorruptMode::WORDS),
                "`visible` (default): the checksum is right and the application reads wrong bytes; `link`: the receiver drops it",
            ),
        ],
        "payload bits are inverted, never headers",
    ),
    either(
        "duplicate",
        &[first(
            "probability",
            Kind::Probability,
            "share of the packets",
        )],
        "the same packet twice",
    ),
    either(
        "reorder",
        &[
            first("probability", Kind::Probability, "chance of a candidate"),
            first(
                "gap",
                Kind::Count,
                "every gap-th packet is a candidate; 1 when absent",
            ),
        ],
        "picked packets overtake the others",
    ),
    packet(
        "delay",
        &[
            spread(
                "delay",
                Kind::Duration,
                "jitter",
                "middle of the delay, at most 60s",
            ),
            named(
                "jitter",
                Kind::Duration,
                "how far it spreads, at most the delay",
            ),
            short(
                "dist",
                named(
                    "distribution",
                    Kind::Word(Distribution::WORDS),
                    "how it spreads; `uniform` when absent",
                ),
            ),
            short(
                "corr",
                named(
                    "correlation",
                    Kind::Probability,
                    "how much a delay resembles the one before",
                ),
            ),
            short(
                "keep-order",
                named(
                    "keep_order",
                    Kind::Flag,
                    "packets of one flow never overtake each other",
                ),
            ),
            LIMIT,
        ],
        "every packet held, the handshake included",
    ),
    packet(
        "rate",
        &[
            first("rate", Kind::Rate, "the rate of the wire"),
            short(
                "burst",
                named(
                    "burst_bytes",
                    Kind::Size,
                    "how much may pass at once after a pause",
                ),
            ),
            short(
                "overhead",
                named(
                    "overhead_bytes",
                    Kind::Signed,
                    "bytes that the link adds to each packet",
                ),
            ),
            short(
                "cell",
                named("cell_bytes", Kind::Count, "size of a link cell; 0 for none"),
            ),
            short(
                "cell-overhead",
                named(
                    "cell_overhead_bytes",
                    Kind::Signed,
                    "bytes that each cell adds",
                ),
            ),
            LIMIT,
        ],
        "shaping at the wire rate, counting wire bytes",
    ),
    packet(
        "mtu",
        &[
            first(
                "bytes",
                Kind::Size,
                "the largest IP packet that passes, 68 to 65535",
            ),
            named(
                "icmp",
                Kind::Flag,
                "answer with ICMP \"too big\" instead of silence",
            ),
        ],
        "larger packets vanish: a path-MTU black hole",
    ),
    packet(
        "ecn",
        &[first(
            "probability",
            Kind::Probability,
            "share of the ECT packets",
        )],
        "ECT packets are marked CE",
    ),
    packet(
        "slot",
        &[
            first("min", Kind::Duration, "shortest time between two bursts"),
            first(
                "max",
                Kind::Duration,
                "longest time between two bursts; min when absent",
            ),
            named("packets", Kind::Count, "the most packets in a burst"),
            named("bytes", Kind::Size, "the most bytes in a burst"),
        ],
        "bursty delivery, as on a shared medium",
    ),
    datagram(
        "latency",
        &[
            spread(
                "latency",
                Kind::Duration,
                "jitter",
                "middle of the latency, at most 1h",
            ),
            named(
                "jitter",
                Kind::Duration,
                "how far it spreads to both sides, at most the latency",
            ),
        ],
        "the stream is shifted in time, not slowed",
    ),
    datagram(
        "bandwidth",
        &[first("rate", Kind::Rate, "the rate"), SHARED],
        "the stream is slowed",
    ),
    stream(
        "slow_close",
        &[first("delay", Kind::Duration, "for how long")],
        "the FIN is held back",
    ),
    stream(
        "timeout",
        &[first(
            "timeout",
            Kind::Duration,
            "after how long; absent or 0: hangs until the rule is lifted",
        )],
        "data is thrown away, then the connection is closed",
    ),
    stream(
        "reset_peer",
        &[first(
            "timeout",
            Kind::Duration,
            "how long after the connection's start; absent or 0: at once",
        )],
        "a real RST, on an idle connection too",
    ),
    stream(
        "slicer",
        &[
            short(
                "average_size",
                spread(
                    "average_size_bytes",
                    Kind::Size,
                    "size_variation_bytes",
                    "average size of a part",
                ),
            ),
            short(
                "size_variation",
                named(
                    "size_variation_bytes",
                    Kind::Size,
                    "how far the size spreads, less than the average",
                ),
            ),
            named("delay", Kind::Duration, "pause after each part"),
        ],
        "data comes in small parts",
    ),
    datagram(
        "limit_data",
        &[first("bytes", Kind::Size, "how many"), SHARED],
        "the connection ends after so many bytes",
    ),
    Spec {
        layer: Layer::Either,
        udp: true,
        ..stream(
            "down",
            &[],
            "new connections are refused, open ones reset; on UDP ICMP port unreachable",
        )
    },
    stream(
        "no_accept",
        &[],
        "the handshake completes, nobody serves the connection",
    ),
    stream("stall", &[], "nothing is read, nothing is lost, it resumes"),
    datagram("discard", &[], "read and thrown away"),
    datagram(
        "close_on_data",
        &[HOW],
        "the first data closes the connection",
    ),
    stream(
        "close",
        &[
            first(
                "count",
                Kind::Count,
                "how many, the oldest first; all when absent",
            ),
            HOW,
        ],
        "open connections are closed, once",
    ),
    datagram(
        "corrupt_data",
        &[
            first(
                "mode",
                Kind::Word(CorruptDataMode::WORDS),
                "`flip` (default), `zero` or `random`",
            ),
            first(
                "probability",
                Kind::Probability,
                "chance of each byte; 100% when absent",
            ),
            named(
                "offset",
                Kind::Count,
                "the one byte at this offset of the stream or datagram, from 0",
            ),
        ],
        "the application reads wrong bytes",
    ),
    stream(
        "lifetime",
        &[
            spread("time", Kind::Duration, "jitter", "middle of the time"),
            named(
                "jitter",
                Kind::Duration,
                "how far it spreads to both sides, at most the time",
            ),
            named(
                "from",
                Kind::Word(LifetimeFrom::WORDS),
                "`connect` (default) or `first-data`",
            ),
        ],
        "the connection ends when its time is over, idle or not",
    ),
    stream(
        "coalesce",
        &[
            short("min", first("min_bytes", Kind::Size, "what is waited for")),
            short(
                "wait",
                first("max_wait", Kind::Duration, "for how long at most"),
            ),
        ],
        "small parts are gathered into large ones",
    ),
    datagram(
        "substitute",
        &[
            first("regex", Kind::Text, "a regular expression over bytes"),
            first(
                "replacement",
                Kind::Text,
                "what replaces a match; `$1` stands for a group",
            ),
        ],
        "matching bytes are replaced, across chunk borders too",
    ),
    stream(
        "error",
        &[HTTP, REDIS, MYSQL, SMTP, MEMCACHE, RANDOM],
        "an error that the client library understands as one from its server",
    ),
    stream(
        "transient",
        &[
            first("errors", Kind::Count, "how many"),
            HTTP,
            REDIS,
            MYSQL,
            SMTP,
            MEMCACHE,
            RANDOM,
        ],
        "so many errors (resets where no reply is named), then normal",
    ),
    stream(
        "abort",
        &[],
        "the connection is reset after the request has reached the server",
    ),
];

/// The entry of `mix`, whose arms are faults and not arguments.
pub const MIX: Spec = Spec {
    name: "mix",
    layer: Layer::Either,
    udp: true,
    icmp: true,
    params: &[],
    help: "one draw per connection, the rest untouched",
};

/// The names of all faults, `mix` included.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAULTS.iter().map(|spec| spec.name).chain([MIX.name])
}

impl Fault {
    /// The name that users type.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.spec().name
    }
}
