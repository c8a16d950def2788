//! The stream faults, as typed values and as the JSON of the control API.
//!
//! Attributes that Toxiproxy has keep its names, units and types (signed integers; negative ones act as 0).
//! Attributes that only `fault` has are left out of the JSON while they have their default, so that a client
//! which compares a toxic's attributes with what it sent sees no difference.

use anyhow::{Result, bail};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::attributes::{ErrorProtocol, FaultHelp, Probability, Transport, attributes};
use super::handling::{self, Handling};
use super::protocol::Wording;
use super::queries::Queries;
use super::requests::RequestStage;
use super::stage::{Stage, StageContext, StreamFault};
use crate::rule::{self, Acts, MixArm};

/// One alternative of a `mix`.
#[derive(Clone, Debug, PartialEq)]
pub struct MixShare {
    /// The share of connections that get it.
    pub share: Probability,
    /// What they get: any fault that acts on a single connection.
    pub fault: RelayFault,
}

impl Serialize for MixShare {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::json!({
            "share": self.share.0,
            "type": self.fault.kind(),
            "attributes": self.fault.attributes(),
        })
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for MixShare {
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
        let fault = RelayFault::of_kind(&raw.kind)
            .ok_or_else(|| D::Error::custom(format!("{:?} is no toxic type", raw.kind)))?
            .with_attributes(&raw.attributes)
            .map_err(D::Error::custom)?;
        Ok(Self {
            share: raw.share,
            fault,
        })
    }
}

attributes! {
    /// One draw per connection decides which of these it gets, if any.
    Mix {
        /// The alternatives; their shares add up to 1 at most, the rest of the connections is untouched.
        #[serde(alias = "choices")]
        faults: Vec<MixShare>,
    }
}

macro_rules! declare {
    ($($(#[$cfg:meta])* $module:ident $variant:ident $name:literal,)*) => {
        $($(#[$cfg])* pub use super::stage::$module::$variant;)*

        /// What is done to a stream or to datagrams.
        #[derive(Clone, Debug, PartialEq)]
        pub enum RelayFault {
            $($(#[$cfg])* #[doc = concat!("`", $name, "`.")] $variant($variant),)*
            /// One of several faults.
            Mix(Mix),
            /// What a packet rule does to queries of DNS over TCP. No toxic of the API.
            Queries(Queries),
        }

        impl RelayFault {
            /// The names of all faults, as toxics are typed.
            pub const KINDS: &[&str] = &[$($(#[$cfg])* $name,)* "mix"];

            /// The fault with this name and default attributes.
            #[must_use]
            pub fn of_kind(kind: &str) -> Option<Self> {
                match kind {
                    $($(#[$cfg])* $name => Some(Self::$variant($variant::default())),)*
                    "mix" => Some(Self::Mix(Mix::default())),
                    _ => None,
                }
            }

            /// The fault's name.
            #[must_use]
            pub const fn kind(&self) -> &'static str {
                match self {
                    $($(#[$cfg])* Self::$variant(_) => $name,)*
                    Self::Mix(_) => "mix",
                    Self::Queries(_) => "dns",
                }
            }

            /// The names of its attributes.
            #[must_use]
            pub const fn attribute_names(&self) -> &'static [&'static str] {
                match self {
                    $($(#[$cfg])* Self::$variant(_) => $variant::ATTRIBUTES,)*
                    Self::Mix(_) => Mix::ATTRIBUTES,
                    Self::Queries(_) => &[],
                }
            }

            fn to_json(&self) -> serde_json::Result<Value> {
                match self {
                    $($(#[$cfg])* Self::$variant(attributes) => serde_json::to_value(attributes),)*
                    Self::Mix(attributes) => serde_json::to_value(attributes),
                    Self::Queries(_) => Ok(Value::Null),
                }
            }

            fn of_same_kind(&self, value: Value) -> serde_json::Result<Self> {
                match self {
                    $($(#[$cfg])* Self::$variant(_) => serde_json::from_value(value).map(Self::$variant),)*
                    Self::Mix(_) => serde_json::from_value(value).map(Self::Mix),
                    Self::Queries(queries) => Ok(Self::Queries(queries.clone())),
                }
            }

            /// The relay's fault for a rule's.
            ///
            /// # Errors
            /// What does not work on a stream, or is finer than the relay's milliseconds.
            pub fn of_rule(rule: &rule::Fault) -> Result<Self> {
                $($(#[$cfg])* if let Some(fault) = $variant::of_rule(rule)? {
                    return Ok(Self::$variant(fault));
                })*
                match Mix::of_rule(rule)? {
                    Some(mix) => Ok(Self::Mix(mix)),
                    None => bail!("`{}` does not act on a stream", rule.name()),
                }
            }

            /// What all faults have in common.
            pub(crate) fn definition(&self) -> &dyn StreamFault {
                match self {
                    $($(#[$cfg])* Self::$variant(fault) => fault,)*
                    Self::Mix(mix) => mix,
                    Self::Queries(queries) => queries,
                }
            }
        }
    };
}
each_stage!(declare);

/// The table of docs/relay.md.
#[must_use]
pub fn reference() -> String {
    let rank = |kind: &&&str| rule::catalog::spec(kind).map_or(u16::MAX, |spec| spec.rank);
    let mut kinds: Vec<_> = RelayFault::KINDS.iter().collect();
    kinds.sort_by_key(rank);
    let head = "| type | attributes | TCP | UDP |\n|---|---|---|---|\n";
    let rows = kinds.into_iter().filter_map(|kind| {
        let help = RelayFault::of_kind(kind)?.definition().help();
        let cell = |text: Option<&'static str>| text.unwrap_or("-");
        let (attributes, tcp, udp) = (help.attributes, cell(help.tcp), cell(help.udp));
        Some(format!("| `{kind}` | {attributes} | {tcp} | {udp} |\n"))
    });
    rows.fold(head.to_owned(), |table, row| table + &row)
}

impl RelayFault {
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
        self.definition().canonical(name).unwrap_or(name)
    }

    fn checked(self) -> Result<Self, String> {
        self.definition().check()?;
        Ok(self)
    }

    /// Whether it acts on the proxy as a whole, not on single connections.
    #[must_use]
    pub fn is_proxy_wide(&self) -> bool {
        self.definition().is_proxy_wide()
    }

    /// Whether it has a meaning on this transport.
    #[must_use]
    pub fn acts_on(&self, transport: Transport) -> bool {
        if let Self::Mix(mix) = self {
            let mut faults = mix.faults.iter();
            return faults.all(|share| share.fault.acts_on(transport));
        }
        let help = self.definition().help();
        match transport {
            Transport::Tcp => help.tcp.is_some(),
            Transport::Udp => help.udp.is_some(),
        }
    }

    /// What it does with requests, where it looks at them.
    pub(crate) fn handling(&self) -> Option<Handling> {
        self.definition().handling()
    }

    /// Whether as many bytes come out as go in, until the end.
    pub(crate) fn keeps_length(&self) -> bool {
        self.definition().keeps_length()
    }

    /// What carries it out on one direction of one connection; nothing where the relay does.
    pub(crate) fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        match self.handling() {
            Some(handling) => Some(Box::new(RequestStage::new(handling, place))),
            None => self.definition().stage(place),
        }
    }

    /// What a rule for both directions puts on the way to the server: of a mix only the arms that act on each
    /// direction by itself. The others act once, on the way to the client.
    ///
    /// # Errors
    /// As [`Self::of_rule`].
    pub fn one_way_part(rule: &rule::Fault) -> Result<Self> {
        let mut fault = Self::of_rule(rule)?;
        if let (Self::Mix(mix), rule::Fault::Mix(arms)) = (&mut fault, rule) {
            for (share, arm) in mix.faults.iter_mut().zip(&arms.arms) {
                if arm.fault.part_that(Acts::OneWay).is_none() {
                    share.fault = Self::Noop(Noop {});
                }
            }
        }
        Ok(fault)
    }
}

impl StreamFault for Mix {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`faults`: list of `{share, type, attributes}`",
            tcp: Some(
                "one draw per connection gives it one of them or none; the shares (`0.1` or `\"10%\"`) add up to 1 at most",
            ),
            udp: Some("the same, per client"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Mix(rule) = rule else {
            return Ok(None);
        };
        let share = |arm: &MixArm| {
            let fault = RelayFault::of_rule(&arm.fault)?;
            if fault.is_proxy_wide() {
                bail!(
                    "`{}` acts on the service as a whole: it can't be part of a mix",
                    arm.fault.name()
                );
            }
            Ok(MixShare {
                share: Probability::of_ppm(arm.probability),
                fault,
            })
        };
        let faults = rule.arms.iter().map(share).collect::<Result<_>>()?;
        Ok(Some(Self { faults }))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        (name == "choices").then_some("faults")
    }

    fn check(&self) -> Result<(), String> {
        let total: f64 = self.faults.iter().map(|share| share.share.0).sum();
        if total > 1.0 + 1e-9 {
            return Err(format!(
                "the shares of a mix add up to {:.1}%, 100% is all there is",
                total * 100.0
            ));
        }
        let unfit =
            |fault: &RelayFault| fault.is_proxy_wide() || matches!(fault, RelayFault::Mix(_));
        match self.faults.iter().find(|share| unfit(&share.fault)) {
            Some(share) => Err(format!(
                "{} cannot be part of a mix: it does not act on one connection",
                share.fault.kind()
            )),
            None => Ok(()),
        }
    }
}

impl StreamFault for Queries {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some("queries of DNS are answered"),
            udp: None,
        }
    }

    fn handling(&self) -> Option<Handling> {
        Some(Handling {
            fault: "dns",
            rule: handling::RequestRule::Always,
            protocol: ErrorProtocol::Auto,
            wording: Wording::default(),
            query: None,
            queries: Some(self.clone()),
        })
    }
}

impl Mix {
    /// The number, from 1, of the alternative of a connection whose draw is `unit` (0 to 1).
    #[must_use]
    pub fn choose(&self, unit: f64) -> Option<usize> {
        let mut below = 0.0;
        let chosen = self.faults.iter().position(|share| {
            below += share.share.0;
            unit < below
        });
        chosen.map(|index| index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::attributes::CloseMode;
    use serde_json::json;

    #[test]
    fn every_kind_has_defaults_that_survive_json() {
        for kind in RelayFault::KINDS {
            let fault = RelayFault::of_kind(kind).expect("a listed kind");
            assert_eq!(fault.kind(), *kind);
            assert_eq!(
                fault.with_attributes(&fault.attributes()),
                Ok(fault.clone())
            );
            assert_eq!(fault.with_attributes(&Value::Null), Ok(fault));
        }
        assert_eq!(RelayFault::of_kind("latenci"), None);
    }

    #[test]
    fn toxiproxys_attributes_are_all_that_a_default_shows() {
        let shown = |kind: &str| {
            RelayFault::of_kind(kind)
                .expect("a listed kind")
                .attributes()
        };
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
            let fault = RelayFault::Bandwidth(Bandwidth::default());
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
        let fault = RelayFault::Latency(Latency {
            latency: 5,
            jitter: 6,
        });
        let changed =
            fault.with_attributes(&json!({"Latency": 7, "jitter": null, "colour": "red"}));
        assert_eq!(
            changed,
            Ok(RelayFault::Latency(Latency {
                latency: 7,
                jitter: 6
            }))
        );
        assert!(fault.with_attributes(&json!({"latency": "7"})).is_err());
        assert!(fault.with_attributes(&json!([1])).is_err());
    }

    #[test]
    fn an_alias_changes_the_attribute_that_it_stands_for() {
        let fault = RelayFault::Lifetime(Lifetime {
            time: 5,
            ..Lifetime::default()
        });
        let changed = fault
            .with_attributes(&json!({"timeout": 9, "how": "rst"}))
            .expect("valid");
        assert_eq!(
            changed,
            RelayFault::Lifetime(Lifetime {
                time: 9,
                mode: CloseMode::Rst,
                ..Lifetime::default()
            })
        );
    }

    #[test]
    fn a_mix_is_checked_and_chosen_from_by_share() {
        let mix = |faults: Value| {
            RelayFault::Mix(Mix::default()).with_attributes(&json!({"faults": faults}))
        };
        let Ok(RelayFault::Mix(mixed)) = mix(json!([
            {"share": "10%", "type": "timeout"},
            {"share": 0.2, "type": "latency", "attributes": {"latency": 1000}},
        ])) else {
            panic!("a valid mix");
        };
        assert_eq!(mixed.choose(0.05), Some(1));
        assert_eq!(mixed.choose(0.25), Some(2));
        assert_eq!(mixed.choose(0.35), None);
        let too_much = mix(json!([{"share": 0.7, "type": "noop"}, {"share": 0.7, "type": "noop"}]));
        assert!(too_much.is_err_and(|error| error.contains("140.0%")));
        assert!(mix(json!([{"share": 1, "type": "down"}])).is_err());
    }
}
