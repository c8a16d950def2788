//! What the attributes of stream faults are made of, and how they are read and written.

use std::time::Duration;

use anyhow::{Result, bail};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

pub use crate::rule::CloseHow as CloseMode;
pub use crate::sys::process::sockets::Transport;

/// A probability, 0 to 1; read from a number in that range or from a text such as `"20%"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Probability(pub f64);

impl Probability {
    /// That of so many parts per million.
    #[must_use]
    pub fn of_ppm(ppm: u32) -> Self {
        Self(f64::from(ppm) / 1e6)
    }
}

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
pub struct BitRate(pub f64);

impl BitRate {
    /// That of so many bits per second.
    #[expect(
        clippy::cast_precision_loss,
        reason = "no link has a rate that needs more than 52 bits"
    )]
    #[must_use]
    pub fn of_bits(bits_per_second: u64) -> Self {
        Self(bits_per_second as f64 / 8000.0)
    }

    /// Bytes per second; 0 for a negative rate.
    #[must_use]
    pub fn bytes_per_second(self) -> f64 {
        (self.0 * 1000.0).max(0.0)
    }
}

impl Serialize for BitRate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.fract() != 0.0 {
            return serializer.serialize_f64(self.0);
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is a whole number")]
        serializer.serialize_i64(self.0 as i64)
    }
}

/// Declares the attributes of a fault: the fields of an object of the control API.
macro_rules! attributes {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl $name {
            pub(crate) const ATTRIBUTES: &[&str] = &[$(stringify!($field)),*];
        }
    };
}
pub(super) use attributes;

/// A fault as docs/relay.md describes it, in Markdown.
pub struct FaultHelp {
    /// Its attributes with their units.
    pub attributes: &'static str,
    /// What it does to a stream; nothing where it has no meaning.
    pub tcp: Option<&'static str>,
    /// The same for datagrams.
    pub udp: Option<&'static str>,
}

/// The protocol in which an error is put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorProtocol {
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
    /// The frontend/backend protocol of `PostgreSQL`, unencrypted: a request for TLS is answered with no.
    #[serde(alias = "postgresql")]
    Postgres,
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

/// A direction of a stream, as Toxiproxy names them.
/// In records they are `to-server` and `to-client`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StreamDirection {
    /// From the client to the server.
    #[serde(rename = "to-server")]
    Upstream,
    /// From the server to the client.
    #[serde(rename = "to-client")]
    Downstream,
}

impl StreamDirection {
    /// Both, upstream first.
    pub const ALL: [Self; 2] = [Self::Upstream, Self::Downstream];

    /// Reads a direction without regard to case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|direction| direction.name().eq_ignore_ascii_case(text))
    }

    /// The name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Downstream => "downstream",
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
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

/// A number of bytes, connections or requests as an attribute has it.
pub(super) fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Nanoseconds as an attribute in milliseconds.
///
/// # Errors
/// Where they are no whole milliseconds.
pub(super) fn whole_milliseconds(ns: u64) -> Result<i64> {
    if !ns.is_multiple_of(1_000_000) {
        bail!("stream faults count time in whole milliseconds: use 1ms or a multiple");
    }
    Ok(whole(ns / 1_000_000))
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

pub(super) fn one_or_many<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<u16>, D::Error> {
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
