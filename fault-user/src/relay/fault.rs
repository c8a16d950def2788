//! The stream faults and their attributes, as typed values and as the JSON of the control API.
//!
//! Attributes that Toxiproxy has keep its names, units and types (signed integers; negative ones act as 0).
//! Attributes that only `fault` has are left out of the JSON while they have their default, so that a client
//! which compares a toxic's attributes with what it sent sees no difference.

use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// How a connection is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CloseMode {
    /// In order: the bytes before it arrive, then the end of the stream.
    #[default]
    Fin,
    /// With a reset at both ends.
    Rst,
}

/// A probability, 0 to 1; read from a number in that range or from a text such as `"20%"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Probability(pub f64);

impl<'de> Deserialize<'de> for Probability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let number = match &value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => match text.trim().strip_suffix('%') {
                Some(percent) => percent
                    .trim()
                    .parse::<f64>()
                    .ok()
                    .map(|percent| percent / 100.0),
                None => text.trim().parse().ok(),
            },
            _ => None,
        };
        match number {
            Some(number) if (0.0..=1.0).contains(&number) => Ok(Self(number)),
            _ => Err(D::Error::custom(format!(
                "{value} is no probability, expected 0 to 1 or \"0%\" to \"100%\""
            ))),
        }
    }
}

/// Kilobytes (1000 bytes) per second. Whole numbers are shown as integers, as Toxiproxy does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct Rate(pub f64);

impl Rate {
    /// Bytes per second; 0 for a negative rate.
    #[must_use]
    pub fn bytes_per_second(self) -> f64 {
        (self.0 * 1000.0).max(0.0)
    }
}

impl Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.fract() != 0.0 {
            return serializer.serialize_f64(self.0);
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is a whole number")]
        serializer.serialize_i64(self.0 as i64)
    }
}

macro_rules! attributes {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl $name {
            const ATTRIBUTES: &[&str] = &[$(stringify!($field)),*];
        }
    )*};
}

attributes! {
    /// No attributes.
    Nothing {}

    /// Holds every chunk for `latency` ± a uniform `jitter` from its arrival; the order is kept.
    Latency {
        /// Milliseconds.
        latency: i64,
        /// Milliseconds to either side.
        jitter: i64,
    }

    /// Paces the stream.
    Bandwidth {
        /// Kilobytes (1000 bytes) per second, also fractions; 0 lets nothing through.
        rate: Rate,
        /// All connections share the rate instead of having it each.
        #[serde(skip_serializing_if = "is_false")]
        shared: bool,
    }

    /// Holds the end of the stream back.
    SlowClose {
        /// Milliseconds.
        delay: i64,
    }

    /// Throws the data away, then closes the connection.
    Timeout {
        /// Milliseconds until the close; 0 never closes.
        timeout: i64,
    }

    /// Resets the connection at both ends; until then the data waits.
    ResetPeer {
        /// Milliseconds until the reset.
        timeout: i64,
    }

    /// Cuts the stream into pieces.
    Slicer {
        /// Bytes; 0 cuts nothing.
        average_size: i64,
        /// Bytes to either side of the average.
        size_variation: i64,
        /// Microseconds between two pieces.
        delay: i64,
    }

    /// Lets exactly so many bytes through, then closes the connection.
    LimitData {
        /// Bytes.
        bytes: i64,
        /// All connections share the bytes instead of having them each; at the limit all are closed.
        #[serde(skip_serializing_if = "is_false")]
        shared: bool,
        /// Once the shared bytes are used up counting begins anew: every so many bytes all
        /// connections are closed.
        #[serde(skip_serializing_if = "is_false")]
        every: bool,
    }

    /// Closes the connection when data comes; the data is not forwarded. A UDP client is forgotten.
    CloseOnData {
        /// `fin` or `rst`.
        #[serde(alias = "how")]
        mode: CloseMode,
    }

    /// Closes connections that are open now, once.
    Close {
        /// How many, the oldest first; 0 closes all.
        count: i64,
        /// `fin` or `rst`.
        #[serde(alias = "how")]
        mode: CloseMode,
    }

    /// Changes bytes on their way; never how many there are.
    CorruptData {
        /// What becomes of a byte.
        mode: CorruptMode,
        /// The share of bytes that are hit; without it and without `offset` every byte is.
        #[serde(skip_serializing_if = "Option::is_none")]
        probability: Option<Probability>,
        /// Hits the byte at this offset (from 0) of the stream or datagram, and no other.
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    }

    /// Closes the connection on a timer, idle or not.
    Lifetime {
        /// Milliseconds.
        #[serde(alias = "lifetime", alias = "timeout")]
        time: i64,
        /// Milliseconds to either side.
        #[serde(skip_serializing_if = "is_zero")]
        jitter: i64,
        /// What starts the timer.
        #[serde(skip_serializing_if = "is_default")]
        from: LifetimeStart,
        /// `fin` or `rst`.
        #[serde(skip_serializing_if = "is_default", alias = "how")]
        mode: CloseMode,
    }

    /// Collects small chunks into larger ones.
    Coalesce {
        /// Bytes that must have come before they are sent on.
        #[serde(alias = "min", alias = "bytes")]
        min_bytes: i64,
        /// Milliseconds that the first byte waits at most; 0 waits for the bytes or the end.
        #[serde(alias = "wait")]
        max_wait: i64,
    }

    /// Replaces what a regular expression matches, across chunk borders.
    Substitute {
        /// The expression (the `regex` crate's syntax, on bytes).
        regex: String,
        /// What is put in its place; `$1` and `$name` stand for groups.
        replacement: String,
        /// Milliseconds that the beginning of a possible match is held back; 0 means 50.
        #[serde(skip_serializing_if = "is_zero")]
        max_wait: i64,
    }

    /// Answers requests with an error in the server's name; the server does not see them.
    ErrorReply {
        /// Whose language the error is in.
        protocol: Protocol,
        /// HTTP status codes to choose from; none means 500, 502, 503 and 504.
        #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_many")]
        status: Vec<u16>,
        /// The error in the protocol's own words, such as `LOADING try later` or `421 try later`; one line.
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// How many random bytes `random` answers with; none means 16 to 127.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    }

    /// Answers the first requests with an error, then lets everything through.
    Transient {
        /// How many requests get an error.
        #[serde(alias = "errors", alias = "n")]
        count: i64,
        /// Whose language the error is in.
        protocol: Protocol,
        /// HTTP status codes to choose from; none means 500, 502, 503 and 504.
        #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_many")]
        status: Vec<u16>,
        /// The error in the protocol's own words, such as `LOADING try later` or `421 try later`; one line.
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// How many random bytes `random` answers with; none means 16 to 127.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// Each connection counts for itself instead of all together.
        #[serde(skip_serializing_if = "is_false")]
        per_connection: bool,
    }

    /// Breaks the connection after a request has reached the server and before its answer is seen.
    Abort {
        /// Whose language says where a request ends.
        protocol: Protocol,
        /// What the client gets; unset means a reset.
        #[serde(skip_serializing_if = "Option::is_none", alias = "how")]
        mode: Option<CloseMode>,
    }

    /// One draw per connection decides which of these it gets, if any.
    Mix {
        /// The alternatives; their shares add up to 1 at most, the rest of the connections is untouched.
        #[serde(alias = "choices")]
        faults: Vec<Share>,
    }

    /// Loses datagrams.
    Loss {
        /// The share that is lost.
        probability: Probability,
    }

    /// Loses chunks of a stream or datagrams, as Toxiproxy does: what is lost of a stream is missing in it.
    PacketLoss {
        /// The share that is lost; below 0 acts as 0, above 1 as 1.
        loss_rate: f64,
        /// What the share is higher by after a loss.
        correlation: f64,
    }

    /// Sends datagrams twice.
    Duplicate {
        /// The share that is sent twice.
        probability: Probability,
    }

    /// Lets later datagrams overtake.
    Reorder {
        /// The share that is held back.
        probability: Probability,
        /// How many datagrams overtake one that is held back; 0 means 1.
        gap: i64,
        /// Milliseconds after which a datagram that nothing overtook is sent on; 0 means 100.
        #[serde(skip_serializing_if = "is_zero")]
        max_wait: i64,
    }
}

/// What becomes of a byte that `corrupt_data` hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CorruptMode {
    /// One of its bits is inverted.
    #[default]
    Flip,
    /// It becomes 0.
    Zero,
    /// It becomes another value, at random.
    Random,
}

/// What starts the timer of `lifetime`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LifetimeStart {
    /// The acceptance of the connection.
    #[default]
    Connect,
    /// The first byte in the toxic's direction.
    #[serde(alias = "first_data")]
    FirstData,
}

/// The protocol in which an error is put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Guessed from the first bytes of each request.
    #[default]
    #[serde(alias = "")]
    Auto,
    /// HTTP/1.
    Http,
    /// RESP arrays and inline commands.
    Redis,
    /// The client/server protocol of `MySQL` and `MariaDB`, unencrypted.
    Mysql,
    /// memcached's text and binary protocols.
    #[serde(alias = "memcached")]
    Memcache,
    /// SMTP, unencrypted.
    Smtp,
    /// No protocol: random bytes.
    Random,
    /// No answer: the connection is reset.
    None,
}

/// One alternative of a `mix`.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// The share of connections that get it.
    pub share: Probability,
    /// What they get: any fault that acts on a single connection.
    pub fault: Fault,
}

impl Serialize for Share {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::json!({
            "share": self.share.0,
            "type": self.fault.kind(),
            "attributes": self.fault.attributes(),
        })
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            share: Probability,
            #[serde(rename = "type")]
            kind: String,
            #[serde(default)]
            attributes: Value,
        }
        let raw = Raw::deserialize(deserializer)?;
        let fault = Fault::of_kind(&raw.kind)
            .ok_or_else(|| D::Error::custom(format!("{:?} is no toxic type", raw.kind)))?
            .with_attributes(&raw.attributes)
            .map_err(D::Error::custom)?;
        Ok(Self {
            share: raw.share,
            fault,
        })
    }
}

macro_rules! faults {
    ($($(#[$meta:meta])* $variant:ident($type:ty) = $name:literal,)*) => {
        /// What is done to a stream or to datagrams.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Fault { $($(#[$meta])* $variant($type),)* }

        /// The longest text of an error reply, in bytes.
const MESSAGE_MAX: usize = 400;
/// The most random bytes of an error reply.
const REPLY_MAX: u64 = 1 << 20;

/// Says what is wrong with an error reply.
///
/// # Errors
/// One line.
pub(crate) fn check_reply(
    status: &[u16],
    message: Option<&str>,
    size: Option<u64>,
) -> Result<(), String> {
    if let Some(status) = status.iter().find(|status| !(200..=599).contains(*status)) {
        return Err(format!("{status} is no HTTP status, expected 200 to 599"));
    }
    if let Some(message) = message
        && (message.len() > MESSAGE_MAX || message.contains(['\r', '\n']) || message.is_empty())
    {
        return Err(format!(
            "the message of an error is one line of 1 to {MESSAGE_MAX} bytes"
        ));
    }
    if size.is_some_and(|size| !(1..=REPLY_MAX).contains(&size)) {
        return Err(format!("an error has 1 to {REPLY_MAX} random bytes"));
    }
    Ok(())
}

impl Fault {
            /// The names of all faults, as toxics are typed.
            pub const KINDS: &[&str] = &[$($name),*];

            /// The fault with this name and default attributes.
            #[must_use]
            pub fn of_kind(kind: &str) -> Option<Self> {
                match kind {
                    $($name => Some(Self::$variant(<$type>::default())),)*
                    _ => None,
                }
            }

            /// The fault's name.
            #[must_use]
            pub const fn kind(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)* }
            }

            /// The names of its attributes.
            #[must_use]
            pub const fn attribute_names(&self) -> &'static [&'static str] {
                match self { $(Self::$variant(_) => <$type>::ATTRIBUTES,)* }
            }

            fn to_json(&self) -> serde_json::Result<Value> {
                match self { $(Self::$variant(attributes) => serde_json::to_value(attributes),)* }
            }

            fn of_same_kind(&self, value: Value) -> serde_json::Result<Self> {
                match self { $(Self::$variant(_) => serde_json::from_value(value).map(Self::$variant),)* }
            }
        }
    };
}

faults! {
    /// Nothing.
    Noop(Nothing) = "noop",
    /// Delay.
    Latency(Latency) = "latency",
    /// Pacing.
    Bandwidth(Bandwidth) = "bandwidth",
    /// A late end.
    SlowClose(SlowClose) = "slow_close",
    /// Silence, then an end.
    Timeout(Timeout) = "timeout",
    /// A reset.
    ResetPeer(ResetPeer) = "reset_peer",
    /// Small pieces.
    Slicer(Slicer) = "slicer",
    /// So many bytes and no more.
    LimitData(LimitData) = "limit_data",
    /// The whole proxy is down: connections are refused, open ones closed.
    Down(Nothing) = "down",
    /// The whole proxy does not accept: handshakes complete, nobody serves.
    NoAccept(Nothing) = "no_accept",
    /// Nothing is read, nothing is lost.
    Stall(Nothing) = "stall",
    /// Everything is read and thrown away.
    Discard(Nothing) = "discard",
    /// Data ends the connection.
    CloseOnData(CloseOnData) = "close_on_data",
    /// The whole proxy closes connections, once, now.
    Close(Close) = "close",
    /// Changed bytes.
    CorruptData(CorruptData) = "corrupt_data",
    /// A timer ends the connection.
    Lifetime(Lifetime) = "lifetime",
    /// Larger chunks.
    Coalesce(Coalesce) = "coalesce",
    /// Replaced text.
    Substitute(Substitute) = "substitute",
    /// Error answers.
    Error(ErrorReply) = "error",
    /// Some error answers.
    Transient(Transient) = "transient",
    /// A break between request and answer.
    Abort(Abort) = "abort",
    /// One of several faults.
    Mix(Mix) = "mix",
    /// Datagrams vanish.
    Drop(Nothing) = "drop",
    /// Some datagrams vanish.
    Loss(Loss) = "loss",
    /// Some chunks vanish.
    PacketLoss(PacketLoss) = "packet_loss",
    /// Some datagrams come twice.
    Duplicate(Duplicate) = "duplicate",
    /// Some datagrams come late.
    Reorder(Reorder) = "reorder",
}

/// What a relay carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Streams.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

impl Fault {
    /// The attributes as a JSON object.
    ///
    /// # Panics
    ///
    /// Never: numbers, texts and lists of them can always be written as JSON.
    #[must_use]
    pub fn attributes(&self) -> Value {
        self.to_json()
            .expect("attributes are numbers, texts and lists of them")
    }

    /// The same fault with some attributes changed: those that `given` (an object or null) has, except nulls.
    /// Names are matched without regard to case, unknown ones are ignored, as Toxiproxy does.
    ///
    /// # Errors
    ///
    /// When an attribute has the wrong type or value.
    pub fn with_attributes(&self, given: &Value) -> Result<Self, String> {
        let given = match given {
            Value::Null => return self.clone().checked(),
            Value::Object(given) => given,
            other => return Err(format!("attributes must be an object, not {other}")),
        };
        let changed = self.of_same_kind(self.merged(given));
        changed
            .map_err(|error| self.blamed(given, &error.to_string()))?
            .checked()
    }

    /// Its attributes with those that are given, which are not null.
    fn merged<'a>(&self, given: impl IntoIterator<Item = (&'a String, &'a Value)>) -> Value {
        let mut merged = match self.attributes() {
            Value::Object(attributes) => attributes,
            _ => Map::new(),
        };
        for (name, value) in given.into_iter().filter(|(_, value)| !value.is_null()) {
            let known = merged
                .keys()
                .find(|known| known.eq_ignore_ascii_case(name))
                .cloned();
            let name =
                known.unwrap_or_else(|| self.canonical(&name.to_ascii_lowercase()).to_owned());
            merged.insert(name, value.clone());
        }
        Value::Object(merged)
    }

    /// An error with the name of the attribute that it is about: the first that can't be given alone.
    fn blamed(&self, given: &Map<String, Value>, error: &str) -> String {
        let wrong = given
            .iter()
            .find(|one| self.of_same_kind(self.merged([*one])).is_err());
        match wrong {
            Some((name, _)) => format!("attributes.{name}: {error}"),
            None => error.to_owned(),
        }
    }

    /// The attribute that a name or alias in lower case stands for.
    #[must_use]
    pub fn canonical<'a>(&self, name: &'a str) -> &'a str {
        match (self, name) {
            (Self::CloseOnData(_) | Self::Close(_) | Self::Lifetime(_) | Self::Abort(_), "how") => {
                "mode"
            }
            (Self::Lifetime(_), "lifetime" | "timeout") => "time",
            (Self::Coalesce(_), "min" | "bytes") => "min_bytes",
            (Self::Coalesce(_), "wait") => "max_wait",
            (Self::Transient(_), "errors" | "n") => "count",
            (Self::Mix(_), "choices") => "faults",
            _ => name,
        }
    }

    fn checked(self) -> Result<Self, String> {
        match &self {
            Self::Substitute(attributes) => {
                regex::bytes::Regex::new(&attributes.regex).map_err(|error| error.to_string())?;
            }
            Self::Mix(mix) => mix.check()?,
            Self::Error(ErrorReply {
                status,
                message,
                size,
                ..
            })
            | Self::Transient(Transient {
                status,
                message,
                size,
                ..
            }) => check_reply(status, message.as_deref(), *size)?,
            _ => {}
        }
        Ok(self)
    }

    /// Whether it acts on the proxy as a whole, not on single connections.
    #[must_use]
    pub const fn is_proxy_wide(&self) -> bool {
        matches!(self, Self::Down(_) | Self::NoAccept(_) | Self::Close(_))
    }

    /// Whether it has a meaning on this transport.
    #[must_use]
    pub fn acts_on(&self, transport: Transport) -> bool {
        match self {
            Self::Mix(mix) => mix
                .faults
                .iter()
                .all(|share| share.fault.acts_on(transport)),
            Self::Drop(_) | Self::Loss(_) | Self::Duplicate(_) | Self::Reorder(_) => {
                transport == Transport::Udp
            }
            Self::SlowClose(_)
            | Self::ResetPeer(_)
            | Self::Slicer(_)
            | Self::Coalesce(_)
            | Self::Error(_)
            | Self::Transient(_)
            | Self::Abort(_) => transport == Transport::Tcp,
            _ => true,
        }
    }
}

impl Mix {
    fn check(&self) -> Result<(), String> {
        let total: f64 = self.faults.iter().map(|share| share.share.0).sum();
        if total > 1.0 + 1e-9 {
            return Err(format!(
                "the shares of a mix add up to {:.1}%, 100% is all there is",
                total * 100.0
            ));
        }
        let unfit = |fault: &Fault| fault.is_proxy_wide() || matches!(fault, Fault::Mix(_));
        match self.faults.iter().find(|share| unfit(&share.fault)) {
            Some(share) => Err(format!(
                "{} cannot be part of a mix: it does not act on one connection",
                share.fault.kind()
            )),
            None => Ok(()),
        }
    }

    /// The alternative of a connection whose draw is `unit` (0 to 1).
    #[must_use]
    pub fn choose(&self, unit: f64) -> Option<&Fault> {
        let mut below = 0.0;
        self.faults.iter().find_map(|share| {
            below += share.share.0;
            (unit < below).then_some(&share.fault)
        })
    }
}

/// Ten years: longer delays are cut to it, so that adding one to a time can't overflow.
const LONGEST_MS: u64 = 10 * 365 * 24 * 60 * 60 * 1000;

/// A number of milliseconds as a duration; negative ones are zero, and ten years is the longest.
#[must_use]
pub fn milliseconds(count: i64) -> Duration {
    Duration::from_millis(u64::try_from(count).unwrap_or(0).min(LONGEST_MS))
}

/// A number of microseconds as a duration; negative ones are zero, and ten years is the longest.
#[must_use]
pub fn microseconds(count: i64) -> Duration {
    Duration::from_micros(u64::try_from(count).unwrap_or(0).min(LONGEST_MS * 1000))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
const fn is_false(value: &bool) -> bool {
    !*value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
const fn is_zero(value: &i64) -> bool {
    *value == 0
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u16>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(u16),
        Many(Vec<u16>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(status) => vec![status],
        OneOrMany::Many(statuses) => statuses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_kind_has_defaults_that_survive_json() {
        for kind in Fault::KINDS {
            let fault = Fault::of_kind(kind).expect("a listed kind");
            assert_eq!(fault.kind(), *kind);
            assert_eq!(
                fault.with_attributes(&fault.attributes()),
                Ok(fault.clone())
            );
            assert_eq!(fault.with_attributes(&Value::Null), Ok(fault));
        }
        assert_eq!(Fault::of_kind("latenci"), None);
    }

    #[test]
    fn toxiproxys_attributes_are_all_that_a_default_shows() {
        let shown = |kind: &str| Fault::of_kind(kind).expect("a listed kind").attributes();
        assert_eq!(shown("latency"), json!({"latency": 0, "jitter": 0}));
        assert_eq!(shown("bandwidth"), json!({"rate": 0}));
        assert_eq!(
            shown("slicer"),
            json!({"average_size": 0, "size_variation": 0, "delay": 0})
        );
        assert_eq!(shown("limit_data"), json!({"bytes": 0}));
    }

    #[test]
    fn a_rate_may_be_a_fraction_and_a_whole_one_is_shown_as_an_integer() {
        let rate = |value: Value| {
            let fault = Fault::Bandwidth(Bandwidth::default());
            let changed = fault.with_attributes(&json!({ "rate": value }));
            changed.map(|fault| fault.attributes()["rate"].clone())
        };
        for value in [json!(0.5), json!(0.002), json!(1000), json!(i64::MAX)] {
            assert_eq!(rate(value.clone()), Ok(value));
        }
        assert_eq!(rate(json!(2.0)), Ok(json!(2)));
        assert!(rate(json!("2")).is_err());
    }

    #[test]
    fn attributes_merge_without_regard_to_case_and_skip_nulls() {
        let fault = Fault::Latency(Latency {
            latency: 5,
            jitter: 6,
        });
        let changed =
            fault.with_attributes(&json!({"Latency": 7, "jitter": null, "colour": "red"}));
        assert_eq!(
            changed,
            Ok(Fault::Latency(Latency {
                latency: 7,
                jitter: 6
            }))
        );
        assert!(fault.with_attributes(&json!({"latency": "7"})).is_err());
        assert!(fault.with_attributes(&json!([1])).is_err());
    }

    #[test]
    fn an_alias_changes_the_attribute_that_it_stands_for() {
        let fault = Fault::Lifetime(Lifetime {
            time: 5,
            ..Lifetime::default()
        });
        let changed = fault
            .with_attributes(&json!({"timeout": 9, "how": "rst"}))
            .expect("valid");
        assert_eq!(
            changed,
            Fault::Lifetime(Lifetime {
                time: 9,
                mode: CloseMode::Rst,
                ..Lifetime::default()
            })
        );
    }

    #[test]
    fn a_mix_is_checked_and_chosen_from_by_share() {
        let mix =
            |faults: Value| Fault::Mix(Mix::default()).with_attributes(&json!({"faults": faults}));
        let Ok(Fault::Mix(mixed)) = mix(json!([
            {"share": "10%", "type": "timeout"},
            {"share": 0.2, "type": "latency", "attributes": {"latency": 1000}},
        ])) else {
            panic!("a valid mix");
        };
        assert_eq!(mixed.choose(0.05).map(Fault::kind), Some("timeout"));
        assert_eq!(mixed.choose(0.25).map(Fault::kind), Some("latency"));
        assert_eq!(mixed.choose(0.35), None);
        let too_much = mix(json!([{"share": 0.7, "type": "noop"}, {"share": 0.7, "type": "noop"}]));
        assert!(too_much.is_err_and(|error| error.contains("140.0%")));
        assert!(mix(json!([{"share": 1, "type": "down"}])).is_err());
    }
}
