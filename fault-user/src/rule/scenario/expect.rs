//! What must hold while a scenario runs, and after it.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::error::{Piece, RuleError};
use super::super::object::read_text;
use super::super::units;
use super::super::words::words;
use super::Nanoseconds;

/// Expectations by the name of a target, or by a target written out.
type PerTarget<T> = BTreeMap<String, T>;

/// The expectations of a scenario; what is empty is not checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// The command's exit code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit: Option<u8>,
    /// Targets of which a rule must have fired.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fired: Vec<String>,
    /// The most connects to a target (bounded retries).
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub max_connects: PerTarget<u64>,
    /// The most connects to a target in a time (back-off).
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub connect_rate: PerTarget<ConnectRate>,
    /// How long after a fault's end the first successful exchange may take.
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub recovers_within: PerTarget<Nanoseconds>,
    /// The most connections to a target that are open at once (bulkhead).
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub max_open: PerTarget<u64>,
    /// Targets that get no traffic while a fault acts (circuit breaker).
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub no_traffic_while: PerTarget<NoTraffic>,
    /// The longest time in which 99 of 100 connects are answered.
    #[serde(
        deserialize_with = "per_target",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub p99_connect: PerTarget<Nanoseconds>,
    /// Checks that must hold before the first fault and after the last one.
    #[serde(
        deserialize_with = "one_or_many",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub probe: Vec<Probe>,
}

impl Expect {
    /// Whether nothing is expected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Every target that an expectation names, with the expectation's field.
    #[must_use]
    pub fn names(&self) -> Vec<(&'static str, &str)> {
        fn keys<'m, T>(
            field: &'static str,
            map: &'m PerTarget<T>,
        ) -> impl Iterator<Item = (&'static str, &'m str)> {
            map.keys().map(move |name| (field, name.as_str()))
        }
        keys("max_connects", &self.max_connects)
            .chain(keys("connect_rate", &self.connect_rate))
            .chain(keys("recovers_within", &self.recovers_within))
            .chain(keys("max_open", &self.max_open))
            .chain(keys("no_traffic_while", &self.no_traffic_while))
            .chain(keys("p99_connect", &self.p99_connect))
            .collect()
    }
}

/// So many connects in a time: `10/s`, `5/10s`, `100/m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectRate {
    /// How many.
    pub count: u64,
    /// In which time, in nanoseconds; more than 0.
    pub per_ns: u64,
}

impl ConnectRate {
    /// Reads `N/TIME`, where the time's number may be left out.
    fn read(piece: Piece<'_>) -> Result<Self, RuleError> {
        let expected = "a number of connects in a time such as `10/s` or `5/10s`";
        let Some((count, per)) = piece.split_once(&['/']) else {
            return Err(piece
                .error(format!("`{}` has no time", piece.text()))
                .expected(expected));
        };
        let bare = per.text().starts_with(|c: char| c.is_ascii_alphabetic());
        let per_ns = if bare {
            let one = format!("1{}", per.text());
            units::duration(Piece::whole(&one))
                .map_err(|error| per.error(error.message).expected(expected))?
        } else {
            units::duration(per)?
        };
        if per_ns == 0 {
            return Err(per.error("a time of 0 has no connects").expected(expected));
        }
        Ok(Self {
            count: units::count(count)?,
            per_ns,
        })
    }
}

impl fmt::Display for ConnectRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per = units::show_duration(self.per_ns);
        // `1s` is written `s`, but `1.5s` stays.
        let short = per
            .strip_prefix('1')
            .filter(|unit| unit.bytes().all(|b| b.is_ascii_alphabetic()));
        write!(f, "{}/{}", self.count, short.unwrap_or(&per))
    }
}

impl Serialize for ConnectRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConnectRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_text(deserializer, Self::read)
    }
}

/// When a target gets no traffic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct NoTraffic {
    /// The target whose fault counts; the target itself where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faulted: Option<String>,
    /// How long after the fault's start traffic must have ended.
    pub after: Nanoseconds,
}

impl<'de> Deserialize<'de> for NoTraffic {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// The object form.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            faulted: Option<String>,
            #[serde(default)]
            after: Nanoseconds,
        }
        let read = |text: &str| {
            let after = Nanoseconds(units::duration(Piece::whole(text))?);
            Ok(Ok(Self {
                faulted: None,
                after,
            }))
        };
        Ok(
            match super::super::object::text_or::<D, _, Object>(deserializer, "a duration", read)? {
                Ok(value) => value,
                Err(Object { faulted, after }) => Self { faulted, after },
            },
        )
    }
}

words! {
    /// What a probe must do while a fault acts.
    #[derive(Default)]
    During {
        /// Either is right.
        #[default]
        MayFail = "may-fail",
        /// It must hold then too: the fault must not be felt.
        MustHold = "must-hold",
        /// It must fail, or else the fault is not felt where it should be.
        MustFail = "must-fail",
    }
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ProbeCheck {
    /// An HTTP request, right when it is answered with the status.
    Http {
        /// The URL, `http://`.
        url: String,
        /// The status; any from 200 to 399 where it is not given.
        status: Option<u16>,
    },
    /// A TCP connect, right when it succeeds.
    Tcp {
        /// Host and port.
        address: String,
    },
    /// A command, right when it exits with 0.
    Command {
        /// The program and its arguments; never empty.
        argv: Vec<String>,
    },
}

/// A check that must hold before the first fault, may fail during it, and must hold afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "ProbeObject", into = "ProbeObject")]
pub struct Probe {
    /// What it is called in the report.
    pub name: Option<String>,
    /// What it does.
    pub check: ProbeCheck,
    /// How long an answer may take, in nanoseconds; 5 s where it is not given.
    pub timeout_ns: u64,
    /// How often it is tried, in nanoseconds; 1 s where it is not given.
    pub interval_ns: u64,
    /// What it must do while a fault acts.
    pub during: During,
}

/// A probe's default timeout.
const PROBE_TIMEOUT_NS: u64 = 5_000_000_000;

/// A probe's default interval.
const PROBE_INTERVAL_NS: u64 = 1_000_000_000;

/// The object of a probe.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ProbeObject {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<Nanoseconds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<Nanoseconds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    during: Option<String>,
}

impl TryFrom<ProbeObject> for Probe {
    type Error = String;

    fn try_from(object: ProbeObject) -> Result<Self, String> {
        let check = match (object.http, object.tcp, object.command) {
            (Some(url), None, None) if url.starts_with("http://") && url.len() > 7 => {
                ProbeCheck::Http {
                    url,
                    status: object.status,
                }
            }
            (Some(url), None, None) => {
                return Err(format!(
                    "`{url}` is not a URL that a probe can use: expected http://…"
                ));
            }
            (None, Some(address), None) if object.status.is_none() => {
                match address.rsplit_once(':') {
                    Some((host, port))
                        if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) =>
                    {
                        ProbeCheck::Tcp { address }
                    }
                    _ => {
                        return Err(format!(
                            "`{address}` is not a host and port: expected such as 127.0.0.1:5432"
                        ));
                    }
                }
            }
            (None, None, Some(argv))
                if object.status.is_none() && argv.first().is_some_and(|p| !p.is_empty()) =>
            {
                ProbeCheck::Command { argv }
            }
            (None, _, _) if object.status.is_some() => {
                return Err("`status` belongs to `http`".to_owned());
            }
            (None, None, Some(_)) => {
                return Err(
                    "the command is empty: expected [\"program\", \"argument\", …]".to_owned(),
                );
            }
            _ => return Err("a probe is one of `http`, `tcp` and `command`".to_owned()),
        };
        if object
            .status
            .is_some_and(|status| !(100..=599).contains(&status))
        {
            return Err("this is not an HTTP status: expected 100 to 599".to_owned());
        }
        let time = |given: Option<Nanoseconds>, default| match given {
            Some(Nanoseconds(0)) => Err("a probe's times are more than 0".to_owned()),
            Some(Nanoseconds(ns)) => Ok(ns),
            None => Ok(default),
        };
        let during = match &object.during {
            None => During::default(),
            Some(word) => During::from_word(word).ok_or_else(|| {
                format!(
                    "`{word}` is not a valid value: expected {}",
                    super::super::args::one_of(During::WORDS)
                )
            })?,
        };
        Ok(Self {
            name: object.name,
            check,
            timeout_ns: time(object.timeout, PROBE_TIMEOUT_NS)?,
            interval_ns: time(object.interval, PROBE_INTERVAL_NS)?,
            during,
        })
    }
}

impl From<Probe> for ProbeObject {
    fn from(probe: Probe) -> Self {
        let other = |ns: u64, default| (ns != default).then_some(Nanoseconds(ns));
        let mut object = Self {
            name: probe.name,
            timeout: other(probe.timeout_ns, PROBE_TIMEOUT_NS),
            interval: other(probe.interval_ns, PROBE_INTERVAL_NS),
            during: (probe.during != During::default()).then(|| probe.during.to_string()),
            ..Self::default()
        };
        match probe.check {
            ProbeCheck::Http { url, status } => {
                object.http = Some(url);
                object.status = status;
            }
            ProbeCheck::Tcp { address } => object.tcp = Some(address),
            ProbeCheck::Command { argv } => object.command = Some(argv),
        }
        object
    }
}

/// One probe or a list of them.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Probe>, D::Error> {
    /// Reads either.
    struct OneOrMany;

    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<Probe>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a probe or a list of probes")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<Probe>, A::Error> {
            Probe::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                .map(|probe| vec![probe])
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> Result<Vec<Probe>, A::Error> {
            Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(seq))
        }
    }

    deserializer.deserialize_any(OneOrMany)
}

/// A map by target in which no name stands twice.
fn per_target<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<PerTarget<T>, D::Error> {
    unique_map(deserializer, |_| Ok(()))
}

/// A map in which no name stands twice and each fulfils a check.
pub(super) fn unique_map<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    check: fn(&str) -> Result<(), String>,
) -> Result<BTreeMap<String, T>, D::Error> {
    /// Reads such a map.
    struct Unique<T>(fn(&str) -> Result<(), String>, PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Unique<T> {
        type Value = BTreeMap<String, T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object with names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut out = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                (self.0)(&name).map_err(A::Error::custom)?;
                let value = map.next_value()?;
                if out.insert(name.clone(), value).is_some() {
                    return Err(A::Error::custom(format!("`{name}` is given twice")));
                }
            }
            Ok(out)
        }
    }

    deserializer.deserialize_map(Unique(check, PhantomData))
}
