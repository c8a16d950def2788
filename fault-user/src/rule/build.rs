//! Arguments to faults and back: the one place that knows which argument is which field.

use super::args::{Args, Value};
use super::catalog::{self, Spec};
use super::error::RuleError;
use super::fault::{
    CloseHow, CorruptAt, CorruptDataMode, CorruptMode, Distribution, ErrorReply, Fault,
    LifetimeFrom, LossModel, RejectWith,
};
use super::units::PPM;

/// Typed access to the arguments that were given.
impl Args<'_> {
    /// A probability.
    fn ppm(&self, name: &str) -> Option<u32> {
        match self.value(name) {
            Some(Value::Probability(ppm)) => Some(*ppm),
            _ => None,
        }
    }

    /// A duration, size, rate or whole number.
    fn number(&self, name: &str) -> Option<u64> {
        match self.value(name) {
            Some(Value::Duration(n) | Value::Size(n) | Value::Rate(n) | Value::Count(n)) => {
                Some(*n)
            }
            _ => None,
        }
    }

    /// A whole number of 32 bits.
    fn small(&self, name: &str) -> Result<Option<u32>, RuleError> {
        let small = |n| u32::try_from(n).map_err(|_| self.error(name, "this number is too large"));
        self.number(name).map(small).transpose()
    }

    /// A number of bytes with a sign, at most 65,535 to either side.
    fn signed(&self, name: &str) -> Result<i32, RuleError> {
        match self.value(name) {
            Some(Value::Signed(n)) => i32::try_from(*n)
                .ok()
                .filter(|n| n.abs() <= 65_535)
                .ok_or_else(|| {
                    self.error(name, "this number is too large")
                        .expected("-65535 to 65535")
                }),
            _ => Ok(0),
        }
    }

    /// A word, as the value that it stands for.
    fn word<T>(&self, name: &str, from_word: impl Fn(&str) -> Option<T>) -> Option<T> {
        match self.value(name) {
            Some(Value::Word(word)) => from_word(word),
            _ => None,
        }
    }

    /// A text.
    fn text(&self, name: &str) -> Option<String> {
        match self.value(name) {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// Whether a flag is there.
    fn flag(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// An argument that must be there.
    fn need<T>(&self, name: &str, value: Option<T>) -> Result<T, RuleError> {
        value.ok_or_else(|| {
            let text = self.spec.param(name).map_or(name, |param| param.text);
            self.name
                .error(format!("`{}` needs its {text}", self.spec.name))
                .expected(format!("{}={}", self.spec.name, self.expected()))
        })
    }

    /// Arguments of which at most one may be there.
    fn at_most_one(&self, names: &[&str]) -> Result<(), RuleError> {
        let mut given = names.iter().filter(|name| self.piece(name).is_some());
        match (given.next(), given.next()) {
            (Some(first), Some(second)) => Err(self
                .error(
                    second,
                    format!("`{first}` and `{second}` exclude each other"),
                )
                .expected("one of them")),
            _ => Ok(()),
        }
    }

    /// The fault that the arguments make.
    pub fn build(&self) -> Result<Fault, RuleError> {
        let fault = match self.packet_fault()? {
            Some(fault) => fault,
            None => self.stream_fault()?,
        };
        match fault.complaint() {
            Some(complaint) => {
                let error = self.error(complaint.param, complaint.message);
                Err(match complaint.expected {
                    Some(expected) => error.expected(expected),
                    None => error,
                })
            }
            None => Ok(fault),
        }
    }

    /// A fault of the packet layer.
    fn packet_fault(&self) -> Result<Option<Fault>, RuleError> {
        Ok(Some(match self.spec.name {
            "loss" => Fault::Loss(self.loss()?),
            "drop" => Fault::Drop,
            "blackhole" => Fault::Blackhole,
            "reject" => Fault::Reject {
                with: self.word("with", RejectWith::from_word),
            },
            "reset" => Fault::Reset {
                bytes: self.small("bytes")?,
            },
            "corrupt" => Fault::Corrupt {
                probability: self.need("probability", self.ppm("probability"))?,
                bits: self.small("bits")?.unwrap_or(1),
                mode: self
                    .word("mode", CorruptMode::from_word)
                    .unwrap_or_default(),
            },
            "duplicate" => Fault::Duplicate {
                probability: self.need("probability", self.ppm("probability"))?,
            },
            "reorder" => Fault::Reorder {
                probability: self.need("probability", self.ppm("probability"))?,
                gap: self.small("gap")?.unwrap_or(1),
            },
            "delay" => self.delay()?,
            "rate" => Fault::Rate {
                bits_per_second: self.need("rate", self.number("rate"))?,
                burst_bytes: self.number("burst_bytes"),
                overhead_bytes: self.signed("overhead_bytes")?,
                cell_bytes: self.small("cell_bytes")?.unwrap_or(0),
                cell_overhead_bytes: self.signed("cell_overhead_bytes")?,
                limit_packets: self.small("limit_packets")?,
            },
            "mtu" => Fault::Mtu {
                bytes: self.need("bytes", self.small("bytes")?)?,
                icmp: self.flag("icmp"),
            },
            "ecn" => Fault::Ecn {
                probability: self.need("probability", self.ppm("probability"))?,
            },
            "slot" => {
                let min_ns = self.need("min", self.number("min"))?;
                Fault::Slot {
                    min_ns,
                    max_ns: self.number("max").unwrap_or(min_ns),
                    packets: self.small("packets")?,
                    bytes: self.number("bytes"),
                }
            }
            _ => return Ok(None),
        }))
    }

    /// The loss model.
    fn loss(&self) -> Result<LossModel, RuleError> {
        self.at_most_one(&["probability", "ge", "state"])?;
        let get = |list: &[u32], i: usize, default| list.get(i).copied().unwrap_or(default);
        match (self.value("ge"), self.value("state")) {
            (Some(Value::Call(list)), _) => Ok(LossModel::GilbertElliott {
                p: get(list, 0, 0),
                r: get(list, 1, 0),
                one_minus_h: get(list, 2, PPM),
                one_minus_k: get(list, 3, 0),
            }),
            (_, Some(Value::Call(list))) => {
                let p13 = get(list, 0, 0);
                Ok(LossModel::State {
                    p13,
                    p31: get(list, 1, PPM - p13),
                    p32: get(list, 2, 0),
                    p23: get(list, 3, PPM),
                    p14: get(list, 4, 0),
                })
            }
            _ => self
                .need("probability", self.ppm("probability"))
                .map(LossModel::Random),
        }
    }

    /// The delay.
    fn delay(&self) -> Result<Fault, RuleError> {
        let jitter_ns = self.number("jitter").unwrap_or(0);
        for name in ["distribution", "correlation"] {
            if jitter_ns == 0 && self.piece(name).is_some() {
                return Err(self
                    .error(name, format!("the {name} has no effect without a jitter"))
                    .expected("a jitter such as `delay=200ms~50ms`"));
            }
        }
        Ok(Fault::Delay {
            delay_ns: self.need("delay", self.number("delay"))?,
            jitter_ns,
            distribution: self
                .word("distribution", Distribution::from_word)
                .unwrap_or_default(),
            correlation: self.ppm("correlation").unwrap_or(0),
            keep_order: self.flag("keep_order"),
            limit_packets: self.small("limit_packets")?,
        })
    }

    /// A fault of the stream layer.
    fn stream_fault(&self) -> Result<Fault, RuleError> {
        Ok(match self.spec.name {
            "latency" => Fault::Latency {
                latency_ns: self.need("latency", self.number("latency"))?,
                jitter_ns: self.number("jitter").unwrap_or(0),
            },
            "bandwidth" => Fault::Bandwidth {
                bits_per_second: self.need("rate", self.number("rate"))?,
                shared: self.flag("shared"),
            },
            "slow_close" => Fault::SlowClose {
                delay_ns: self.need("delay", self.number("delay"))?,
            },
            "timeout" => Fault::Timeout {
                timeout_ns: self.number("timeout").unwrap_or(0),
            },
            "reset_peer" => Fault::ResetPeer {
                timeout_ns: self.number("timeout").unwrap_or(0),
            },
            "slicer" => Fault::Slicer {
                average_size_bytes: self.need("average_size", self.number("average_size_bytes"))?,
                size_variation_bytes: self.number("size_variation_bytes").unwrap_or(0),
                delay_ns: self.number("delay").unwrap_or(0),
            },
            "limit_data" => Fault::LimitData {
                bytes: self.need("bytes", self.number("bytes"))?,
                shared: self.flag("shared"),
            },
            "down" => Fault::Down,
            "no_accept" => Fault::NoAccept,
            "stall" => Fault::Stall,
            "discard" => Fault::Discard,
            "close_on_data" => Fault::CloseOnData { how: self.how() },
            "close" => Fault::Close {
                count: self.number("count"),
                how: self.how(),
            },
            "corrupt_data" => self.corrupt_data()?,
            "abort" => Fault::Abort,
            _ => return self.long_stream_fault(),
        })
    }

    /// A fault of the stream layer with many arguments.
    fn long_stream_fault(&self) -> Result<Fault, RuleError> {
        Ok(match self.spec.name {
            "lifetime" => Fault::Lifetime {
                time_ns: self.need("time", self.number("time"))?,
                jitter_ns: self.number("jitter").unwrap_or(0),
                from: self
                    .word("from", LifetimeFrom::from_word)
                    .unwrap_or_default(),
            },
            "coalesce" => Fault::Coalesce {
                min_bytes: self.need("min_bytes", self.number("min_bytes"))?,
                max_wait_ns: self.need("max_wait", self.number("max_wait"))?,
            },
            "substitute" => Fault::Substitute {
                regex: self.need("regex", self.text("regex"))?,
                replacement: self.need("replacement", self.text("replacement"))?,
            },
            "error" => match self.reply()? {
                Some(reply) => Fault::Error(reply),
                None => self.need("reply", None)?,
            },
            "transient" => Fault::Transient {
                errors: self.need("errors", self.number("errors"))?,
                reply: self.reply()?,
            },
            name => {
                // Only `mix` has no arguments of this kind, and its arms are read elsewhere.
                return Err(self
                    .name
                    .error(format!("`{name}` needs its arms"))
                    .expected("P%:FAULT P%:FAULT … such as `mix 10%:timeout 20%:latency=1s`"));
            }
        })
    }

    /// How a connection is ended.
    fn how(&self) -> CloseHow {
        self.word("how", CloseHow::from_word).unwrap_or_default()
    }

    /// The corruption of a stream.
    fn corrupt_data(&self) -> Result<Fault, RuleError> {
        self.at_most_one(&["probability", "offset"])?;
        let at = match self.number("offset") {
            Some(offset) => CorruptAt::Offset(offset),
            None => CorruptAt::Probability(self.ppm("probability").unwrap_or(PPM)),
        };
        Ok(Fault::CorruptData {
            mode: self
                .word("mode", CorruptDataMode::from_word)
                .unwrap_or_default(),
            at,
        })
    }

    /// The error reply, if one is named.
    fn reply(&self) -> Result<Option<ErrorReply>, RuleError> {
        let names = ["http", "redis", "mysql", "smtp", "memcache", "random"];
        self.at_most_one(&names)?;
        let Some(name) = names.into_iter().find(|name| self.piece(name).is_some()) else {
            return Ok(None);
        };
        Ok(Some(match (name, self.value(name)) {
            ("http", Some(Value::Statuses(list))) => ErrorReply::Http(list.clone()),
            ("http", _) => ErrorReply::Http(vec![500]),
            ("redis", _) => ErrorReply::Redis(self.text(name)),
            ("mysql", _) => ErrorReply::Mysql(self.text(name)),
            ("smtp", _) => ErrorReply::Smtp(self.text(name)),
            ("memcache", _) => ErrorReply::Memcache(self.text(name)),
            _ => ErrorReply::Random(self.number(name).unwrap_or(DEFAULT_RANDOM_BYTES)),
        }))
    }
}

/// How many random bytes stand in for a reply when no number was given.
const DEFAULT_RANDOM_BYTES: u64 = 64;

/// The arguments of a fault that differ from their defaults, by their names in the object form.
pub(super) type Given = Vec<(&'static str, Value)>;

/// An argument, if the condition holds.
fn when(condition: bool, name: &'static str, value: Value) -> Option<(&'static str, Value)> {
    condition.then_some((name, value))
}

/// A list of arguments, some of which are not there.
fn given<const N: usize>(items: [Option<(&'static str, Value)>; N]) -> Given {
    items.into_iter().flatten().collect()
}

/// A list of probabilities without those at the end that are the defaults.
fn shortened(values: &[u32], defaults: &[Option<u32>]) -> Value {
    let mut length = values.len();
    while length > 0 && defaults[length - 1] == Some(values[length - 1]) {
        length -= 1;
    }
    Value::Call(values[..length].to_vec())
}

impl Fault {
    /// The fault's entry in the catalog.
    #[must_use]
    pub fn spec(&self) -> &'static Spec {
        catalog::spec(self.catalog_name()).unwrap_or(&catalog::MIX)
    }

    /// The fault's name in the catalog.
    fn catalog_name(&self) -> &'static str {
        match self {
            Self::Loss(_) => "loss",
            Self::Drop => "drop",
            Self::Blackhole => "blackhole",
            Self::Reject { .. } => "reject",
            Self::Reset { .. } => "reset",
            Self::Corrupt { .. } => "corrupt",
            Self::Duplicate { .. } => "duplicate",
            Self::Reorder { .. } => "reorder",
            Self::Delay { .. } => "delay",
            Self::Rate { .. } => "rate",
            Self::Mtu { .. } => "mtu",
            Self::Ecn { .. } => "ecn",
            Self::Slot { .. } => "slot",
            Self::Latency { .. } => "latency",
            Self::Bandwidth { .. } => "bandwidth",
            Self::SlowClose { .. } => "slow_close",
            Self::Timeout { .. } => "timeout",
            Self::ResetPeer { .. } => "reset_peer",
            Self::Slicer { .. } => "slicer",
            Self::LimitData { .. } => "limit_data",
            Self::Down => "down",
            Self::NoAccept => "no_accept",
            Self::Stall => "stall",
            Self::Discard => "discard",
            Self::CloseOnData { .. } => "close_on_data",
            Self::Close { .. } => "close",
            Self::CorruptData { .. } => "corrupt_data",
            Self::Lifetime { .. } => "lifetime",
            Self::Coalesce { .. } => "coalesce",
            Self::Substitute { .. } => "substitute",
            Self::Error(_) => "error",
            Self::Transient { .. } => "transient",
            Self::Abort => "abort",
            Self::Mix(_) => catalog::MIX.name,
        }
    }

    /// The arguments that differ from their defaults.
    pub(super) fn given(&self) -> Given {
        match self {
            Self::Loss(LossModel::Random(ppm))
            | Self::Duplicate { probability: ppm }
            | Self::Ecn { probability: ppm } => vec![("probability", Value::Probability(*ppm))],
            Self::Loss(model) => loss_given(*model),
            Self::Reject { with } => with
                .iter()
                .map(|with| ("with", Value::Word(with.word())))
                .collect(),
            Self::Corrupt {
                probability,
                bits,
                mode,
            } => given([
                Some(("probability", Value::Probability(*probability))),
                when(*bits != 1, "bits", Value::Count((*bits).into())),
                when(
                    *mode != CorruptMode::default(),
                    "mode",
                    Value::Word(mode.word()),
                ),
            ]),
            Self::Reorder { probability, gap } => given([
                Some(("probability", Value::Probability(*probability))),
                when(*gap != 1, "gap", Value::Count((*gap).into())),
            ]),
            Self::Delay { .. } => self.delay_given(),
            Self::Rate { .. } => self.rate_given(),
            Self::Reset { bytes } => given([bytes.map(|n| ("bytes", Value::Size(n.into())))]),
            Self::Mtu { bytes, icmp } => given([
                Some(("bytes", Value::Size((*bytes).into()))),
                when(*icmp, "icmp", Value::Bare),
            ]),
            Self::Slot {
                min_ns,
                max_ns,
                packets,
                bytes,
            } => given([
                Some(("min", Value::Duration(*min_ns))),
                when(max_ns != min_ns, "max", Value::Duration(*max_ns)),
                packets.map(|n| ("packets", Value::Count(n.into()))),
                bytes.map(|n| ("bytes", Value::Size(n))),
            ]),
            _ => self.stream_given(),
        }
    }

    /// The arguments of `delay`.
    fn delay_given(&self) -> Given {
        let Self::Delay {
            delay_ns,
            jitter_ns,
            distribution,
            correlation,
            keep_order,
            limit_packets,
        } = self
        else {
            return Given::new();
        };
        given([
            Some(("delay", Value::Duration(*delay_ns))),
            when(*jitter_ns != 0, "jitter", Value::Duration(*jitter_ns)),
            when(
                *distribution != Distribution::default(),
                "distribution",
                Value::Word(distribution.word()),
            ),
            when(
                *correlation != 0,
                "correlation",
                Value::Probability(*correlation),
            ),
            when(*keep_order, "keep_order", Value::Bare),
            limit_packets.map(|n| ("limit_packets", Value::Count(n.into()))),
        ])
    }

    /// The arguments of `rate`.
    fn rate_given(&self) -> Given {
        let Self::Rate {
            bits_per_second,
            burst_bytes,
            overhead_bytes,
            cell_bytes,
            cell_overhead_bytes,
            limit_packets,
        } = self
        else {
            return Given::new();
        };
        given([
            Some(("rate", Value::Rate(*bits_per_second))),
            burst_bytes.map(|n| ("burst_bytes", Value::Size(n))),
            when(
                *overhead_bytes != 0,
                "overhead_bytes",
                Value::Signed((*overhead_bytes).into()),
            ),
            when(
                *cell_bytes != 0,
                "cell_bytes",
                Value::Count((*cell_bytes).into()),
            ),
            when(
                *cell_overhead_bytes != 0,
                "cell_overhead_bytes",
                Value::Signed((*cell_overhead_bytes).into()),
            ),
            limit_packets.map(|n| ("limit_packets", Value::Count(n.into()))),
        ])
    }

    /// The arguments of the stream faults.
    fn stream_given(&self) -> Given {
        match self {
            Self::Latency {
                latency_ns,
                jitter_ns,
            } => given([
                Some(("latency", Value::Duration(*latency_ns))),
                when(*jitter_ns != 0, "jitter", Value::Duration(*jitter_ns)),
            ]),
            Self::Bandwidth {
                bits_per_second,
                shared,
            } => given([
                Some(("rate", Value::Rate(*bits_per_second))),
                when(*shared, "shared", Value::Bare),
            ]),
            Self::SlowClose { delay_ns } => given([Some(("delay", Value::Duration(*delay_ns)))]),
            Self::Timeout { timeout_ns } | Self::ResetPeer { timeout_ns } => given([when(
                *timeout_ns != 0,
                "timeout",
                Value::Duration(*timeout_ns),
            )]),
            Self::Slicer {
                average_size_bytes,
                size_variation_bytes,
                delay_ns,
            } => given([
                Some(("average_size_bytes", Value::Size(*average_size_bytes))),
                when(
                    *size_variation_bytes != 0,
                    "size_variation_bytes",
                    Value::Size(*size_variation_bytes),
                ),
                when(*delay_ns != 0, "delay", Value::Duration(*delay_ns)),
            ]),
            Self::LimitData { bytes, shared } => given([
                Some(("bytes", Value::Size(*bytes))),
                when(*shared, "shared", Value::Bare),
            ]),
            Self::CloseOnData { how } => given([how_given(*how)]),
            Self::Close { count, how } => {
                given([count.map(|n| ("count", Value::Count(n))), how_given(*how)])
            }
            Self::CorruptData { mode, at } => given([
                when(
                    *mode != CorruptDataMode::default(),
                    "mode",
                    Value::Word(mode.word()),
                ),
                match at {
                    CorruptAt::Probability(ppm) => {
                        when(*ppm != PPM, "probability", Value::Probability(*ppm))
                    }
                    CorruptAt::Offset(offset) => Some(("offset", Value::Count(*offset))),
                },
            ]),
            _ => self.long_stream_given(),
        }
    }

    /// The arguments of the stream faults with many arguments; empty for those with none.
    fn long_stream_given(&self) -> Given {
        match self {
            Self::Lifetime {
                time_ns,
                jitter_ns,
                from,
            } => given([
                Some(("time", Value::Duration(*time_ns))),
                when(*jitter_ns != 0, "jitter", Value::Duration(*jitter_ns)),
                when(
                    *from != LifetimeFrom::default(),
                    "from",
                    Value::Word(from.word()),
                ),
            ]),
            Self::Coalesce {
                min_bytes,
                max_wait_ns,
            } => given([
                Some(("min_bytes", Value::Size(*min_bytes))),
                Some(("max_wait", Value::Duration(*max_wait_ns))),
            ]),
            Self::Substitute { regex, replacement } => given([
                Some(("regex", Value::Text(regex.clone()))),
                Some(("replacement", Value::Text(replacement.clone()))),
            ]),
            Self::Error(reply) => given([Some(reply_given(reply))]),
            Self::Transient { errors, reply } => given([
                Some(("errors", Value::Count(*errors))),
                reply.as_ref().map(reply_given),
            ]),
            _ => Given::new(),
        }
    }
}

/// The argument of a loss model that is not random.
fn loss_given(model: LossModel) -> Given {
    match model {
        LossModel::Random(ppm) => vec![("probability", Value::Probability(ppm))],
        LossModel::GilbertElliott {
            p,
            r,
            one_minus_h,
            one_minus_k,
        } => vec![(
            "ge",
            shortened(
                &[p, r, one_minus_h, one_minus_k],
                &[None, None, Some(PPM), Some(0)],
            ),
        )],
        LossModel::State {
            p13,
            p31,
            p32,
            p23,
            p14,
        } => vec![(
            "state",
            shortened(
                &[p13, p31, p32, p23, p14],
                &[None, PPM.checked_sub(p13), Some(0), Some(PPM), Some(0)],
            ),
        )],
    }
}

/// The argument for how a connection is ended.
fn how_given(how: CloseHow) -> Option<(&'static str, Value)> {
    when(how != CloseHow::default(), "how", Value::Word(how.word()))
}

/// The argument for an error reply.
fn reply_given(reply: &ErrorReply) -> (&'static str, Value) {
    let text = |text: &Option<String>| text.clone().map_or(Value::Bare, Value::Text);
    match reply {
        ErrorReply::Http(list) if list == &[500] => ("http", Value::Bare),
        ErrorReply::Http(list) => ("http", Value::Statuses(list.clone())),
        ErrorReply::Redis(t) => ("redis", text(t)),
        ErrorReply::Mysql(t) => ("mysql", text(t)),
        ErrorReply::Smtp(t) => ("smtp", text(t)),
        ErrorReply::Memcache(t) => ("memcache", text(t)),
        ErrorReply::Random(DEFAULT_RANDOM_BYTES) => ("random", Value::Bare),
        ErrorReply::Random(bytes) => ("random", Value::Size(*bytes)),
    }
}
