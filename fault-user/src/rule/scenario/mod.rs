//! Scenario files: JSON, YAML or TOML, through one set of types.

mod expect;
mod locate;
mod random;
mod schema;
mod validate;

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{Piece, RuleError};
use super::object::read_text;
use super::profile::Profiles;
use super::target::{Targets, check_name};
use super::{Rule, units};

pub use expect::{ConnectRate, During, Expect, NoTraffic, Probe, ProbeCheck};
use locate::Located;
pub use locate::{Format, Position, Segment};
pub use random::{Random, SpanNs, WeightedRule};
pub use schema::schema;
pub use validate::not_watchable;

/// A duration in nanoseconds that is written as in the one-line form: `200ms`, `5s`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nanoseconds(pub u64);

impl fmt::Display for Nanoseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&units::show_duration(self.0))
    }
}

impl Serialize for Nanoseconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Nanoseconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_text(deserializer, |piece| units::duration(piece).map(Self))
    }
}

/// A scenario: rules with their timeline, and what must hold while they act.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// The schema that an editor checks the file with; it has no effect here.
    #[serde(rename = "$schema", skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// The seed of all decisions; drawn where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How long the scenario lasts; to the end of the command where it is not given.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub length: Option<Nanoseconds>,
    /// Named targets.
    #[serde(
        deserialize_with = "named_targets",
        skip_serializing_if = "Targets::is_empty"
    )]
    pub targets: Targets,
    /// Profiles by their names, beside those that are known everywhere.
    #[serde(
        deserialize_with = "named_profiles",
        skip_serializing_if = "Profiles::is_empty"
    )]
    pub profiles: Profiles,
    /// The rules, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// What must hold.
    #[serde(skip_serializing_if = "Expect::is_empty")]
    pub expect: Expect,
    /// Faults that are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random: Option<Random>,
}

/// Reads the named targets and checks their names.
fn named_targets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Targets, D::Error> {
    expect::unique_map(deserializer, |name| {
        check_name(Piece::whole(name)).map_err(|error| error.one_line())
    })
}

/// Reads the profiles and checks their names.
fn named_profiles<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Profiles, D::Error> {
    expect::unique_map(deserializer, |name| {
        let is_of = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if !name.is_empty() && name.bytes().all(is_of) {
            return Ok(());
        }
        Err(format!(
            "`{name}` is no name of a profile: expected letters, digits, `_`, `-` or `.`"
        ))
    })
}

/// A mistake in a scenario file, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScenarioError {
    /// The file as it was named.
    pub file: String,
    /// The line and the column, where they are known.
    pub place: Option<Position>,
    /// The field, such as `rules[1].fault`; empty for the whole file.
    pub field: String,
    /// What is wrong and what would be right, at its place in a rule or in the line of the file.
    pub error: Box<RuleError>,
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(place) = self.place {
            write!(f, ":{}:{}", place.line, place.column)?;
        }
        f.write_str(": ")?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        self.error.fmt(f)
    }
}

impl std::error::Error for ScenarioError {}

/// The largest scenario file: 4 MiB.
pub const MAX_FILE_BYTES: u64 = 4 << 20;

impl Scenario {
    /// Reads a scenario from a text and checks it as a whole; `file` is only for errors.
    ///
    /// # Errors
    /// The first mistake, with its line and column.
    pub fn read(text: &str, format: Format, file: &str) -> Result<Self, ScenarioError> {
        let refuse = |place, field, error: RuleError| ScenarioError {
            file: file.to_owned(),
            place,
            field,
            error: Box::new(if error.input.is_empty() {
                locate::excerpt(text, place, error)
            } else {
                error
            }),
        };
        let scenario: Self = locate::read(text, format)
            .map_err(|error| refuse(error.place, error.field, *error.error))?;
        match scenario.flaws().into_iter().next() {
            None => Ok(scenario),
            Some(flaw) => {
                let place = locate::place(text, format, &flaw.path);
                Err(refuse(place, locate::show(&flaw.path), flaw.error))
            }
        }
    }

    /// Reads a scenario file; its format goes by its name: `.json`, `.yaml`, `.yml`, `.toml`.
    ///
    /// # Errors
    /// Where the file can't be read, its name says no format, or it has a mistake.
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let file = path.display().to_string();
        let refuse = |message: String| ScenarioError {
            file: file.clone(),
            place: None,
            field: String::new(),
            error: Box::new(RuleError::of_line(String::new(), &message)),
        };
        let format = Format::of(path).ok_or_else(|| {
            refuse(if file.parse::<Rule>().is_ok() {
                format!("this is a rule and no file: did you mean `-r '{file}'`?")
            } else {
                "the name says no format: expected .json, .yaml, .yml or .toml".to_owned()
            })
        })?;
        let size = std::fs::metadata(path)
            .map_err(|error| refuse(error.to_string()))?
            .len();
        if size > MAX_FILE_BYTES {
            return Err(refuse(format!(
                "a scenario has at most {MAX_FILE_BYTES} bytes"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        Self::read(&text, format, &file)
    }
}

/// Reads one rule from JSON, as requests have it.
///
/// # Errors
/// The first mistake, with the text of the rule that it is in, or with the field.
pub fn read_rule(json: &serde_json::Value) -> Result<Rule, RuleError> {
    locate::read(&json.to_string(), Format::Json).map_err(|Located { field, error, .. }| {
        let message = match field.as_str() {
            "" => error.message,
            field => format!("{field}: {}", error.message),
        };
        RuleError { message, ..*error }
    })
}

/// Where a probe stands, as `FILE:LINE:COLUMN: expect.probe[N]`; without line and column where the file has changed since.
#[must_use]
pub fn place_of_probe(file: &Path, index: usize) -> String {
    let path = [
        Segment::Key("expect".to_owned()),
        Segment::Key("probe".to_owned()),
        Segment::Index(index),
    ];
    let text = std::fs::read_to_string(file).ok();
    let place = text
        .zip(Format::of(file))
        .and_then(|(text, format)| locate::place(&text, format, &path));
    let at = place.map_or_else(String::new, |at| format!(":{}:{}", at.line, at.column));
    format!("{}{at}: {}", file.display(), locate::show(&path))
}
