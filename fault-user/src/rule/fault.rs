//! The faults: everything that can be done to traffic.

use super::units::PPM;
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

words! {
    /// How `reject` refuses a packet.
    RejectWith {
        /// A TCP segment with RST.
        Rst = "rst",
        /// ICMP "port unreachable".
        IcmpPort = "icmp-port",
        /// ICMP "host unreachable" (`ICMPv6`: "address unreachable").
        IcmpHost = "icmp-host",
        /// ICMP "administratively prohibited".
        IcmpAdmin = "icmp-admin",
    }
}

words! {
    /// Who notices that a payload was corrupted.
    #[derive(Default)]
    CorruptMode {
        /// The checksum is made right: the application reads wrong bytes.
        #[default]
        Visible = "visible",
        /// The checksum stays as it was: the receiver drops the packet.
        Link = "link",
    }
}

words! {
    /// How a delay spreads around its middle.
    #[derive(Default)]
    Distribution {
        /// Every value between delay - jitter and delay + jitter is equally likely.
        #[default]
        Uniform = "uniform",
        /// The jitter is the standard deviation of a normal distribution.
        Normal = "normal",
        /// Mostly early, with a long tail.
        Pareto = "pareto",
        /// A quarter normal and three quarters Pareto, as in tc-netem.
        ParetoNormal = "paretonormal",
    }
}

words! {
    /// How a connection is ended.
    #[derive(Default)]
    CloseHow {
        /// In order, with FIN.
        #[default]
        Fin = "fin",
        /// At once, with RST.
        Rst = "rst",
    }
}

words! {
    /// What `corrupt_data` makes of a byte.
    #[derive(Default)]
    CorruptDataMode {
        /// All its bits are inverted.
        #[default]
        Flip = "flip",
        /// It becomes zero.
        Zero = "zero",
        /// It becomes a drawn byte that differs.
        Random = "random",
    }
}

words! {
    /// From when `lifetime` is counted.
    #[derive(Default)]
    LifetimeFrom {
        /// From the connection's start.
        #[default]
        Connect = "connect",
        /// From its first byte of data, in either direction.
        FirstData = "first-data",
    }
}

/// Which packets are lost. All probabilities are parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LossModel {
    /// Each packet on its own.
    Random(u32),
    /// The Gilbert-Elliott model: a good and a bad state (Elliott 1963; the parameters are tc-netem's).
    GilbertElliott {
        /// From good to bad.
        p: u32,
        /// From bad to good; 1 - p where it was not given.
        r: u32,
        /// Loss in the bad state; 100% where it was not given.
        one_minus_h: u32,
        /// Loss in the good state; 0 where it was not given.
        one_minus_k: u32,
    },
    /// The four-state Markov model of Salsano, Ludovici and Ordine (2009), as in tc-netem: 1 received in
    /// a gap, 2 received in a burst, 3 lost in a burst, 4 lost alone in a gap.
    State {
        /// From 1 to 3.
        p13: u32,
        /// From 3 to 1; 1 - p32 where it was not given.
        p31: u32,
        /// From 3 to 2; 0 where it was not given.
        p32: u32,
        /// From 2 to 3; 100% where it was not given.
        p23: u32,
        /// From 1 to 4; 0 where it was not given.
        p14: u32,
    },
}

/// Where `corrupt_data` hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CorruptAt {
    /// Each byte with this probability, in parts per million.
    Probability(u32),
    /// The one byte at this offset of the stream (of each datagram with UDP), counted from 0.
    Offset(u64),
}

/// The reply that stands in for the server's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ErrorReply {
    /// An HTTP response with one of these statuses, drawn per request; never empty.
    Http(Vec<u16>),
    /// A Redis error; a usual one where there is no text.
    Redis(Option<String>),
    /// A `MySQL` error packet.
    Mysql(Option<String>),
    /// An SMTP error reply.
    Smtp(Option<String>),
    /// A memcached error reply.
    Memcache(Option<String>),
    /// This many random bytes.
    Random(u64),
}

/// One arm of a mix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MixArm {
    /// The share of the connections, in parts per million.
    pub probability: u32,
    /// What happens to them; never a mix.
    pub fault: Fault,
}

/// A fault with its arguments: probabilities in parts per million, durations in nanoseconds, sizes in
/// bytes, rates in bits per second.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Silent loss, as on a wire.
    Loss(LossModel),
    /// The packets that the modifiers pick vanish silently.
    Drop,
    /// Everything vanishes silently, SYN included.
    Blackhole,
    /// Refused at once.
    Reject {
        /// How; where it was not given RST for TCP, port unreachable for UDP, host unreachable for ICMP.
        with: Option<RejectWith>,
    },
    /// Live connections get an RST at both ends on their next packet.
    Reset {
        /// Only once so many bytes of payload have gone in the packet's direction since the rule began; nothing
        /// means with the next packet.
        bytes: Option<u32>,
    },
    /// Bits of the payload are inverted.
    Corrupt {
        /// The share of the packets.
        probability: u32,
        /// Bits per packet, 1 to 64.
        bits: u32,
        /// Who notices.
        mode: CorruptMode,
    },
    /// The same packet twice.
    Duplicate {
        /// The share of the packets.
        probability: u32,
    },
    /// Picked packets overtake the others.
    Reorder {
        /// The chance of a candidate.
        probability: u32,
        /// Every gap-th packet is a candidate; 1 where it was not given.
        gap: u32,
    },
    /// Packets are held.
    Delay {
        /// The middle of the delay, at most 60 s.
        delay_ns: u64,
        /// How far it spreads; at most the delay.
        jitter_ns: u64,
        /// How it spreads.
        distribution: Distribution,
        /// How much one delay resembles the one before, in parts per million.
        correlation: u32,
        /// Packets of one flow never overtake each other.
        keep_order: bool,
        /// The most packets that are held at once; what comes on top is lost and counted.
        limit_packets: Option<u32>,
    },
    /// Shaping at a rate of the wire.
    Rate {
        /// The rate.
        bits_per_second: u64,
        /// How much may pass at once after a pause; the plan chooses where it was not given.
        burst_bytes: Option<u64>,
        /// Bytes that the link adds to each packet (negative: headers that are not counted).
        overhead_bytes: i32,
        /// The cell size of a link such as ATM; 0 for none.
        cell_bytes: u32,
        /// Bytes that each cell adds.
        cell_overhead_bytes: i32,
        /// The most packets that wait; what comes on top is lost and counted.
        limit_packets: Option<u32>,
    },
    /// Larger packets vanish.
    Mtu {
        /// The largest IP packet that passes, 68 to 65,535 bytes.
        bytes: u32,
        /// With ICMP "too big" instead of silence.
        icmp: bool,
    },
    /// ECT packets are marked CE.
    Ecn {
        /// The share of the packets.
        probability: u32,
    },
    /// Bursty delivery, as on a shared medium.
    Slot {
        /// The shortest time between two bursts.
        min_ns: u64,
        /// The longest time between two bursts.
        max_ns: u64,
        /// The most packets in one burst.
        packets: Option<u32>,
        /// The most bytes in one burst.
        bytes: Option<u64>,
    },

    /// A stream is shifted in time.
    Latency {
        /// The middle of the latency, at most an hour.
        latency_ns: u64,
        /// How far it spreads to both sides; at most the latency.
        jitter_ns: u64,
    },
    /// A stream is slowed.
    Bandwidth {
        /// The rate.
        bits_per_second: u64,
        /// One rate for the whole relay, not one for each connection.
        shared: bool,
    },
    /// The FIN is held back.
    SlowClose {
        /// For how long.
        delay_ns: u64,
    },
    /// Data is thrown away, then the connection is closed.
    Timeout {
        /// After how long; 0 hangs until the rule is lifted.
        timeout_ns: u64,
    },
    /// A real RST.
    ResetPeer {
        /// How long after the connection's start; 0 at once.
        timeout_ns: u64,
    },
    /// Data comes in small parts.
    Slicer {
        /// The average size of a part, at least 1.
        average_size_bytes: u64,
        /// How far the size spreads; less than the average.
        size_variation_bytes: u64,
        /// The pause after each part.
        delay_ns: u64,
    },
    /// The connection ends after so many bytes.
    LimitData {
        /// How many.
        bytes: u64,
        /// One count for the whole relay, not one for each connection.
        shared: bool,
    },
    /// New connections are refused, open ones reset.
    Down,
    /// The handshake completes, nobody serves the connection.
    NoAccept,
    /// Nothing is read and nothing is lost.
    Stall,
    /// Read and thrown away.
    Discard,
    /// The first data closes the connection.
    CloseOnData {
        /// How.
        how: CloseHow,
    },
    /// Open connections are closed, once.
    Close {
        /// How many of them, the oldest first; all where it was not given.
        count: Option<u64>,
        /// How.
        how: CloseHow,
    },
    /// Bytes of the stream are changed.
    CorruptData {
        /// Into what.
        mode: CorruptDataMode,
        /// Which.
        at: CorruptAt,
    },
    /// A connection ends when its time is over.
    Lifetime {
        /// The middle of its time.
        time_ns: u64,
        /// How far it spreads to both sides; at most the time.
        jitter_ns: u64,
        /// From when it is counted.
        from: LifetimeFrom,
    },
    /// Small parts are gathered into large ones.
    Coalesce {
        /// What is waited for.
        min_bytes: u64,
        /// For how long at most.
        max_wait_ns: u64,
    },
    /// Matching bytes are replaced, across chunk borders too.
    Substitute {
        /// A regular expression of the `regex` crate over bytes.
        regex: String,
        /// What replaces each match; `$1` and `${name}` stand for groups.
        replacement: String,
    },
    /// The client gets an error that it understands as one from its server.
    Error(ErrorReply),
    /// So many errors, then normal.
    Transient {
        /// How many.
        errors: u64,
        /// Which; a reset where it was not given.
        reply: Option<ErrorReply>,
    },
    /// The connection is reset after the request has reached the server.
    Abort,

    /// One draw per connection; the rest is untouched.
    Mix(Vec<MixArm>),
}

impl Fault {
    /// Which part of `fault` carries this fault.
    #[must_use]
    pub fn layer(&self) -> Layer {
        match self {
            Self::Mix(arms) => arms
                .iter()
                .map(|arm| arm.fault.layer())
                .reduce(|a, b| match (a, b) {
                    (a, b) if a == b => a,
                    (Layer::Either, other) | (other, Layer::Either) => other,
                    _ => Layer::Mixed,
                })
                .unwrap_or(Layer::Either),
            _ => self.spec().layer,
        }
    }
}

/// The share of the connections that no arm of a mix takes, in parts per million.
#[must_use]
pub fn untouched(arms: &[MixArm]) -> u32 {
    arms.iter()
        .fold(PPM, |rest, arm| rest.saturating_sub(arm.probability))
}
