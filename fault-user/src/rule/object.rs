//! The object form of rules, faults and targets, for JSON, YAML and TOML through serde.
//!
//! Every value goes through the readers of the one-line form, so both forms know the same values and
//! give the same errors. What is written here is the shape of the objects.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value as Json, json};

use super::args::{self, Args, Value};
use super::catalog::{self, MIX};
use super::error::{Piece, RuleError, nearest};
use super::faults::Fault;
use super::modifier::{MODIFIERS, ModifierReader, ModifierSpec, modifier};
use super::spec::{Param, ValueKind, same};
use super::target::{self, Protocol, Target, TargetRef};
use super::{Mix, MixArm};
use super::{Rule, text, units};

/// A value before it is known what it stands for.
#[derive(Debug, Clone)]
enum Loose {
    /// Nothing.
    Null,
    /// Yes or no.
    Bool(bool),
    /// A number, as its shortest text.
    Number(String),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Loose>),
    /// An object.
    Object(Vec<(String, Loose)>),
}

impl Loose {
    /// The value as the text that the one-line form has for it; lists with `separator` between their items.
    fn into_text(self, separator: &str) -> Result<String, String> {
        match self {
            Self::Bool(value) => Ok(value.to_string()),
            Self::Number(text) | Self::Text(text) => Ok(text),
            Self::List(items) => {
                let items: Result<Vec<_>, _> =
                    items.into_iter().map(|i| i.into_text(separator)).collect();
                Ok(items?.join(separator))
            }
            Self::Null => Err("null is no value here: leave the field out".to_owned()),
            Self::Object(_) => Err("an object is no value here: a text or number is".to_owned()),
        }
    }
}

/// Reads any value.
struct LooseVisitor;

impl<'de> Visitor<'de> for LooseVisitor {
    type Value = Loose;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true, false, a list or an object")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Loose, E> {
        Ok(Loose::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Loose, E> {
        Ok(Loose::Number(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Loose, E> {
        Ok(Loose::Number(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Loose, E> {
        Ok(Loose::Number(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Loose, E> {
        Ok(Loose::Text(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Loose, E> {
        Ok(Loose::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Loose, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Loose::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose, A::Error> {
        let mut entries: Vec<(String, Loose)> = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, _>()? {
            if entries.iter().any(|(k, _)| *k == key) {
                return Err(A::Error::custom(format!("`{key}` is given twice")));
            }
            entries.push((key, value));
        }
        Ok(Loose::Object(entries))
    }
}

impl<'de> Deserialize<'de> for Loose {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LooseVisitor)
    }
}

/// A mistake in the text of a value, as serde's error.
fn told<E: serde::de::Error>(error: &RuleError) -> E {
    E::custom(error.one_line())
}

/// The error for a field that there is none of.
fn unknown_field<E: serde::de::Error>(field: &str, known: &[&'static str]) -> E {
    let near = nearest(field, known.iter().copied());
    let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    E::custom(format!(
        "unknown field `{field}`: expected {}{hint}",
        args::one_of(known)
    ))
}

/// The value of one argument of a fault.
struct ParamSeed(&'static Param);

impl<'de> DeserializeSeed<'de> for ParamSeed {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Value>, D::Error> {
        let loose = Loose::deserialize(deserializer)?;
        let param = self.0;
        let value = match (param.kind, loose) {
            (
                ValueKind::Flag
                | ValueKind::OptionalText
                | ValueKind::OptionalSize
                | ValueKind::Statuses,
                Loose::Bool(yes),
            ) => {
                return Ok(yes.then_some(Value::Bare));
            }
            // A text is itself here; only the one-line form needs quotes.
            (ValueKind::Text | ValueKind::OptionalText, Loose::Text(text)) => {
                return Ok(Some(Value::Text(text)));
            }
            (ValueKind::Call { names, .. }, Loose::Object(entries)) => {
                call(&entries, names).map_err(D::Error::custom)?
            }
            (ValueKind::Call { .. }, loose) => loose.into_text(",").map_err(D::Error::custom)?,
            (_, loose) => loose.into_text("/").map_err(D::Error::custom)?,
        };
        args::read(param, Piece::whole(&value))
            .map(Some)
            .map_err(|error| told(&error))
    }
}

/// The probabilities of an object, as the list of the one-line form.
fn call(entries: &[(String, Loose)], names: &[&str]) -> Result<String, String> {
    for (key, _) in entries {
        if !names.iter().any(|name| same(name, key)) {
            return Err(format!(
                "unknown field `{key}`: expected {}",
                args::one_of(names)
            ));
        }
    }
    let mut list = Vec::new();
    for name in names {
        let given = entries.iter().find(|(key, _)| same(name, key));
        match given {
            Some(_) if list.len() < names.iter().take_while(|n| *n != name).count() => {
                return Err(format!(
                    "`{}` is missing before `{name}`",
                    names[list.len()]
                ));
            }
            Some((_, value)) => list.push(value.clone().into_text(",")?),
            None => {}
        }
    }
    Ok(list.join(","))
}

/// The arguments of a fault: an object, a text, or nothing.
struct ArgsSeed(Args<'static>);

impl<'de> DeserializeSeed<'de> for ArgsSeed {
    type Value = Fault;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Fault, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl ArgsSeed {
    /// The fault with its arguments as the one-line form has them.
    fn with_text<E: serde::de::Error>(&self, arguments: &str) -> Result<Fault, E> {
        let line = format!("{}={arguments}", self.0.spec.name);
        line.parse().map_err(|error| told(&error))
    }
}

impl<'de> Visitor<'de> for ArgsSeed {
    type Value = Fault;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the arguments of `{}` as an object or a text",
            self.0.spec.name
        )
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Fault, E> {
        Fault::build(&self.0).map_err(|error| told(&error))
    }

    fn visit_str<E: serde::de::Error>(self, arguments: &str) -> Result<Fault, E> {
        self.with_text(arguments)
    }

    fn visit_u64<E: serde::de::Error>(self, argument: u64) -> Result<Fault, E> {
        self.with_text(&argument.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, argument: i64) -> Result<Fault, E> {
        self.with_text(&argument.to_string())
    }

    fn visit_f64<E: serde::de::Error>(self, argument: f64) -> Result<Fault, E> {
        self.with_text(&argument.to_string())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Fault, A::Error> {
        let spec = self.0.spec;
        while let Some(key) = map.next_key::<String>()? {
            let Some(param) = spec.param(&key) else {
                let known: Vec<_> = spec.params.iter().map(|p| p.name).collect();
                return Err(match known.as_slice() {
                    [] => A::Error::custom(format!("`{}` takes no argument", spec.name)),
                    known => unknown_field(&key, known),
                });
            };
            if let Some(value) = map.next_value_seed(ParamSeed(param))? {
                let place = Piece::whole(param.name);
                self.0
                    .insert(param, value, place)
                    .map_err(|error| told(&error))?;
            }
        }
        Fault::build(&self.0).map_err(|error| told(&error))
    }
}

/// Reads a fault: a text, or an object with the fault's name as its one field.
struct FaultVisitor;

impl<'de> Visitor<'de> for FaultVisitor {
    type Value = Fault;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a fault such as \"down\" or { \"delay\": { \"delay\": \"200ms\" } }")
    }

    fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Fault, E> {
        line.parse().map_err(|error| told(&error))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fault, A::Error> {
        let Some(name) = map.next_key::<String>()? else {
            return Err(A::Error::custom(
                "the fault is missing: expected its name as the field",
            ));
        };
        let fault = if name == MIX.name {
            let fault = Fault::Mix(Mix {
                arms: map.next_value()?,
            });
            if let Some(complaint) = fault.complaint() {
                return Err(A::Error::custom(complaint.one_line()));
            }
            fault
        } else {
            let Some(spec) = catalog::spec(&name) else {
                let near = nearest(&name, catalog::names());
                let hint = near.map_or(String::new(), |near| format!(": did you mean `{near}`?"));
                return Err(A::Error::custom(format!("unknown fault `{name}`{hint}")));
            };
            map.next_value_seed(ArgsSeed(Args::new(spec, Piece::whole(spec.name))))?
        };
        match map.next_key::<String>()? {
            None => Ok(fault),
            Some(other) => Err(A::Error::custom(format!(
                "a second fault `{other}` in one rule: expected a rule for each fault"
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Fault {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FaultVisitor)
    }
}

/// The object of a mix's arm.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ArmObject {
    probability: Loose,
    fault: Fault,
}

impl<'de> Deserialize<'de> for MixArm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let reader = TextOr::<ArmObject, _>::new("P%:FAULT", |line: &str| {
            text::arm(Piece::whole(line)).map(Ok)
        });
        match deserializer.deserialize_any(reader)? {
            Ok(arm) => Ok(arm),
            Err(ArmObject { probability, fault }) => {
                let probability = probability.into_text("/").map_err(D::Error::custom)?;
                Ok(Self {
                    probability: units::probability(Piece::whole(&probability))
                        .map_err(|error| told(&error))?,
                    fault,
                })
            }
        }
    }
}

/// Reads a text by a function, or an object by its type.
struct TextOr<O, F> {
    expecting: &'static str,
    from_text: F,
    object: PhantomData<O>,
}

impl<O, F> TextOr<O, F> {
    /// A reader; `expecting` says what the text is.
    fn new(expecting: &'static str, from_text: F) -> Self {
        Self {
            expecting,
            from_text,
            object: PhantomData,
        }
    }
}

impl<'de, T, O: Deserialize<'de>, F: FnOnce(&str) -> Result<Result<T, O>, RuleError>> Visitor<'de>
    for TextOr<O, F>
{
    type Value = Result<T, O>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as a text, or an object", self.expecting)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        (self.from_text)(text).map_err(|error| told(&error))
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Self::Value, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        O::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Err)
    }
}

/// Reads a text by a function (the inner `Ok`), or an object by its type (the inner `Err`).
pub(super) fn text_or<'de, D: Deserializer<'de>, T, O: Deserialize<'de>>(
    deserializer: D,
    expecting: &'static str,
    read: impl FnOnce(&str) -> Result<Result<T, O>, RuleError>,
) -> Result<Result<T, O>, D::Error> {
    deserializer.deserialize_any(TextOr::new(expecting, read))
}

/// Reads a text or a number as a text.
pub(super) fn plain_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Loose::deserialize(deserializer)? {
        Loose::Text(text) | Loose::Number(text) => Ok(text),
        _ => Err(D::Error::custom("this is not a text")),
    }
}

/// Reads a value that is a text (or a number, which most of them refuse for its missing unit).
pub(super) fn read_text<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    read: impl FnOnce(Piece<'_>) -> Result<T, RuleError>,
) -> Result<T, D::Error> {
    let text = plain_text(deserializer)?;
    read(Piece::whole(&text)).map_err(|error| D::Error::custom(error.one_line()))
}

/// The object of a target.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetObject {
    protocol: Option<String>,
    host: Option<String>,
    port: Option<Loose>,
    ports: Option<Loose>,
    #[serde(default)]
    except: Vec<String>,
}

impl TargetObject {
    /// The target that the object describes.
    fn build(self) -> Result<Target, String> {
        let mut parts = vec![self.protocol.unwrap_or_else(|| Protocol::Any.to_string())];
        if Protocol::from_word(&parts[0]).is_none() {
            return Err(format!(
                "unknown protocol `{}`: expected {}",
                parts[0],
                args::one_of(Protocol::WORDS)
            ));
        }
        if let Some(host) = self.host {
            if target::looks_like_ports(&host) {
                return Err(format!(
                    "`{host}` is not a host: expected an address or a name"
                ));
            }
            let bracket = host.contains(':') && !host.starts_with('[');
            parts.push(if bracket { format!("[{host}]") } else { host });
        }
        match (self.port, self.ports) {
            (Some(_), Some(_)) => {
                return Err("`port` and `ports` are the same: expected one of them".to_owned());
            }
            (Some(list), None) | (None, Some(list)) => parts.push(list.into_text(",")?),
            (None, None) => {}
        }
        let mut line = parts.join(":");
        for exclusion in self.except {
            line.push_str(",!");
            line.push_str(&exclusion);
        }
        target::target(Piece::whole(&line)).map_err(|error| error.clause())
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let reader = TextOr::<TargetObject, _>::new("a target", |text: &str| text.parse().map(Ok));
        match deserializer.deserialize_any(reader)? {
            Ok(target) => Ok(target),
            Err(object) => object.build().map_err(D::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for TargetRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let reader = TextOr::<TargetObject, _>::new("a target", |text: &str| text.parse().map(Ok));
        match deserializer.deserialize_any(reader)? {
            Ok(target) => Ok(target),
            Err(object) => object.build().map(Self::Spec).map_err(D::Error::custom),
        }
    }
}

/// The value of one modifier, as the text of the one-line form; nothing where it is `false`.
struct ModifierSeed<'r>(&'static ModifierSpec, &'r mut ModifierReader<'static>);

impl<'de> DeserializeSeed<'de> for ModifierSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Self(spec, reader) = self;
        let value = match Loose::deserialize(deserializer)? {
            Loose::Bool(false) if spec.value.is_empty() => return Ok(()),
            loose => {
                let separator = if spec.key == "match" { "/" } else { ".." };
                loose.into_text(separator).map_err(D::Error::custom)?
            }
        };
        reader
            .set(spec, Piece::whole(&value), Piece::whole(spec.name))
            .map_err(|error| told(&error))
    }
}

/// What is most probably meant by a field that a rule does not have: a fault beside the target, or the rule as a text in
/// which YAML found a `: `.
fn meant(key: &str, value: Loose) -> Option<String> {
    let value = match value {
        Loose::Object(entries) => {
            let words = entries.into_iter().map(|(name, value)| match value {
                Loose::Null => Ok(name),
                value => Ok(format!("{name}={}", value.into_text(",")?)),
            });
            words.collect::<Result<Vec<_>, String>>().ok()?.join(" ")
        }
        Loose::Null => String::new(),
        value => value.into_text(" ").ok()?,
    };
    let fault = format!("{key}={value}");
    if fault.parse::<Fault>().is_ok() {
        return Some(format!("fault: {fault}"));
    }
    let texts = [
        format!("{key} {value}"),
        format!("{key}:{value}"),
        format!("{value} {key}"),
    ];
    let meant = texts
        .into_iter()
        .find(|text| text.parse::<Rule>().is_ok())?;
    Some(format!("- {meant}"))
}

/// Reads a rule: a text or an object.
struct RuleVisitor;

impl<'de> Visitor<'de> for RuleVisitor {
    type Value = Rule;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a rule such as \"tcp:5432 loss=30%\", or an object with target and fault")
    }

    fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Rule, E> {
        line.parse().map_err(|error| told(&error))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Rule, A::Error> {
        let (mut target, mut fault) = (None, None);
        let mut reader = ModifierReader::default();
        while let Some(key) = map.next_key::<String>()? {
            match (key.as_str(), modifier(&key)) {
                ("target", _) if target.is_none() => target = Some(map.next_value()?),
                ("fault", _) if fault.is_none() => fault = Some(map.next_value()?),
                ("target" | "fault", _) => {
                    return Err(A::Error::custom(format!("`{key}` is given twice")));
                }
                (_, Some(spec)) => map.next_value_seed(ModifierSeed(spec, &mut reader))?,
                (_, None) => {
                    // The value is read only where it may help: an error stands at the field else.
                    let may_be_text = key.contains(':')
                        || catalog::spec(&key).is_some()
                        || Protocol::from_word(&key).is_some();
                    if may_be_text && let Some(meant) = meant(&key, map.next_value()?) {
                        return Err(A::Error::custom(format!(
                            "`{key}` is no field of a rule; did you mean `{meant}`?"
                        )));
                    }
                    let names = MODIFIERS.iter().map(|m| m.name);
                    let known: Vec<_> = ["target", "fault"].into_iter().chain(names).collect();
                    return Err(unknown_field(&key, &known));
                }
            }
        }
        let rule = Rule {
            target: target.ok_or_else(|| A::Error::missing_field("target"))?,
            fault: fault.ok_or_else(|| A::Error::missing_field("fault"))?,
            modifiers: reader.modifiers,
        };
        match rule.complaint(None) {
            None => Ok(rule),
            Some(complaint) => Err(A::Error::custom(complaint.one_line())),
        }
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RuleVisitor)
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Fault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The value of an argument in the object form.
fn json_value(value: &Value) -> Json {
    match value {
        Value::Bare => json!(true),
        Value::Count(n) => json!(n),
        Value::Signed(n) => json!(n),
        Value::Text(text) => json!(text),
        Value::Statuses(list) => json!(list),
        Value::Call(list) => list
            .iter()
            .map(|ppm| units::show_probability(*ppm))
            .collect(),
        _ => Json::String(value.show()),
    }
}

impl Fault {
    /// The fault in the object form; one without arguments is its name.
    #[must_use]
    pub fn to_object(&self) -> Json {
        if let Self::Mix(mix) = self {
            let arm = |arm: &MixArm| json!({ "probability": units::show_probability(arm.probability), "fault": arm.fault.to_object() });
            return json!({ "mix": mix.arms.iter().map(arm).collect::<Vec<_>>() });
        }
        let args: Map<_, _> = self
            .given()
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json_value(value)))
            .collect();
        if args.is_empty() {
            json!(self.name())
        } else {
            json!({ self.name(): args })
        }
    }
}

impl Target {
    /// The target in the object form.
    #[must_use]
    pub fn to_object(&self) -> Json {
        let mut object = Map::new();
        if self.protocol != Protocol::Any {
            object.insert("protocol".to_owned(), json!(self.protocol.word()));
        }
        if let Some(host) = &self.host {
            object.insert("host".to_owned(), json!(host.to_string()));
        }
        let port = |range: &target::PortRange| {
            if range.first == range.last {
                json!(range.first)
            } else {
                json!(range.to_string())
            }
        };
        match self.ports.as_slice() {
            [] => {}
            [one] => {
                object.insert("port".to_owned(), port(one));
            }
            several => {
                object.insert("ports".to_owned(), several.iter().map(port).collect());
            }
        }
        if !self.except.is_empty() {
            let except = self.except.iter().map(Self::to_string);
            object.insert("except".to_owned(), except.collect());
        }
        Json::Object(object)
    }
}

impl Rule {
    /// The rule in the object form.
    #[must_use]
    pub fn to_object(&self) -> Json {
        let target = match &self.target {
            TargetRef::Name(name) => json!(name),
            TargetRef::Spec(target) => target.to_object(),
        };
        let mut object = Map::new();
        object.insert("target".to_owned(), target);
        object.insert("fault".to_owned(), self.fault.to_object());
        for (key, value) in self.modifiers.given() {
            let name = modifier(key).map_or(key, |spec| spec.name);
            let json = match (value.parse::<u64>(), key) {
                _ if value.is_empty() => json!(true),
                (Ok(number), "first" | "after" | "nth" | "every") => json!(number),
                (_, "match") => value.split('/').collect(),
                _ => json!(value),
            };
            object.insert(name.to_owned(), json);
        }
        Json::Object(object)
    }
}
