//! Which line and column of a file a value stands in.
//!
//! The formats' own errors know where parsing stopped, but a mistake is often found later: in the text
//! of a rule, or between two rules. So the path to the wrong value is kept, and the file is walked once
//! more along it, with the format's own parser telling where the value begins.

use super::super::{Fault, Rule, RuleError, Target, TargetRef, nearest};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;

use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// The format of a scenario file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// TOML.
    Toml,
}

impl Format {
    /// The format that a file's name says.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "json" => Some(Self::Json),
            "yaml" | "yml" => Some(Self::Yaml),
            "toml" => Some(Self::Toml),
            _ => None,
        }
    }
}

/// A line and a column, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

/// A step on the way to a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Into a field of an object.
    Key(String),
    /// Into an item of a list, from 0.
    Index(usize),
}

/// A path as people write it: `rules[1].fault`.
pub(super) fn show(path: &[Segment]) -> String {
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Index(index) => text = format!("{text}[{index}]"),
            Segment::Key(key) if text.is_empty() => text.clone_from(key),
            Segment::Key(key) => text = format!("{text}.{key}"),
        }
    }
    text
}

/// A mistake with its place.
pub(super) struct Located {
    /// Where the wrong value begins.
    pub place: Option<Position>,
    /// The path to it.
    pub field: String,
    /// What is wrong; without a text where that is not of a rule.
    pub error: Box<RuleError>,
}

/// What a format's parser says about a mistake.
struct Native {
    message: String,
    place: Option<Position>,
    /// The text is no JSON, YAML or TOML, so there is nothing to walk along.
    syntax: bool,
}

/// Reads a file's text.
pub(super) fn read<T: DeserializeOwned>(text: &str, format: Format) -> Result<T, Located> {
    let (path, native) = match format {
        Format::Json => match read_json(text) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        },
        Format::Yaml => match read_yaml(text) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        },
        Format::Toml => match read_toml(text) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        },
    };
    // An unknown field is a matter of the name, which the parser stands at, not of the value.
    let at_value = !native.syntax && !native.message.starts_with("unknown field");
    let walked = at_value.then(|| place(text, format, &path)).flatten();
    let value = at_value.then(|| text_at(text, format, &path)).flatten();
    let in_value = value.and_then(|value| in_text(&value, &native.message));
    Err(Located {
        place: walked.or(native.place),
        field: if native.syntax {
            String::new()
        } else {
            show(&path)
        },
        error: Box::new(
            in_value.unwrap_or_else(|| RuleError::of_line(String::new(), &advised(native.message))),
        ),
    })
}

/// The mistake in a text of the rule language that a reader has told as `message`.
fn in_text(text: &str, message: &str) -> Option<RuleError> {
    let errors = [
        text.parse::<Rule>().err(),
        text.parse::<Fault>().err(),
        text.parse::<Target>().err(),
        text.parse::<TargetRef>().err(),
    ];
    let mut errors = errors.into_iter().flatten();
    errors.find(|error| error.one_line() == message)
}

/// The longest line of a file that is shown with a mistake.
const MAX_EXCERPT: usize = 160;

/// A mistake with the line of the file that it stands in, unless that is long.
pub(super) fn excerpt(text: &str, place: Option<Position>, error: RuleError) -> RuleError {
    let Some(place) = place else {
        return error;
    };
    let line = text.lines().nth(place.line - 1).unwrap_or_default();
    let line = line.trim_end();
    let indent = line.len() - line.trim_start().len();
    let mut starts = line.char_indices().map(|(at, _)| at).skip(place.column - 1);
    let start = starts.next().unwrap_or(line.len());
    if line.len() > MAX_EXCERPT || start < indent {
        return error;
    }
    RuleError {
        input: line[indent..].to_owned(),
        span: start - indent..starts.next().unwrap_or(line.len()) - indent,
        ..error
    }
}

/// A reader's message with the nearest of the fields that it lists, or with the form of a list.
fn advised(message: String) -> String {
    // YAML's reader, and those of JSON and TOML.
    if message.ends_with("expected sequence start") || message.ends_with("expected a sequence") {
        return format!("{message}: write each rule on a line of its own, after `- `");
    }
    let named = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split_once("`, expected one of "));
    let found = named.and_then(|(field, names)| {
        let fields = names.split(", ").map(|name| name.trim_matches('`'));
        nearest(field, fields)
    });
    match found {
        Some(name) => format!("{message}; did you mean `{name}`?"),
        None => message,
    }
}

/// What a format's reader gives when it fails: how far it came, and why.
type Failed = (Vec<Segment>, Native);

/// The steps of a path, up to the first that is none of ours.
fn segments(path: &serde_path_to_error::Path) -> Vec<Segment> {
    path.iter()
        .map_while(|segment| match segment {
            serde_path_to_error::Segment::Map { key } => Some(Segment::Key(key.clone())),
            serde_path_to_error::Segment::Seq { index } => Some(Segment::Index(*index)),
            _ => None,
        })
        .collect()
}

/// Reads JSON.
fn read_json<T: DeserializeOwned>(text: &str) -> Result<T, Failed> {
    let native = |error: &serde_json::Error| Native {
        message: without_place(&error.to_string()),
        place: (error.line() > 0).then(|| Position {
            line: error.line(),
            column: error.column().max(1),
        }),
        syntax: error.classify() != serde_json::error::Category::Data,
    };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|error| (segments(error.path()), native(error.inner())))?;
    deserializer
        .end()
        .map_err(|error| (Vec::new(), native(&error)))?;
    Ok(value)
}

/// Reads YAML. An empty file is an empty scenario there, as in TOML.
fn read_yaml<T: DeserializeOwned>(text: &str) -> Result<T, Failed> {
    let mut path = None;
    let result = serde_saphyr::with_deserializer_from_str(text, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            path = Some(segments(error.path()));
            error.into_inner()
        })
    });
    result.map_err(|error| {
        let place = error.location().and_then(|at| {
            let line = usize::try_from(at.line()).ok().filter(|line| *line > 0)?;
            Some(Position {
                line,
                column: usize::try_from(at.column()).ok()?.max(1),
            })
        });
        let message = without_place(&error.without_snippet().to_string());
        let syntax = serde_saphyr::from_str::<IgnoredAny>(text).is_err();
        (
            path.unwrap_or_default(),
            Native {
                message,
                place,
                syntax,
            },
        )
    })
}

/// Reads TOML.
fn read_toml<T: DeserializeOwned>(text: &str) -> Result<T, Failed> {
    let native = |error: &toml::de::Error, syntax| Native {
        message: error.message().lines().collect::<Vec<_>>().join(" "),
        place: error.span().map(|span| place_of(text, span.start)),
        syntax,
    };
    let deserializer =
        toml::Deserializer::parse(text).map_err(|error| (Vec::new(), native(&error, true)))?;
    serde_path_to_error::deserialize(deserializer)
        .map_err(|error| (segments(error.path()), native(error.inner(), false)))
}

/// A message without the ` at line 3 column 5` at its end, which is shown in front of it.
fn without_place(message: &str) -> String {
    let first = message.lines().next().unwrap_or_default();
    match first.rfind(" at line ") {
        Some(at) if first[at + 9..].starts_with(|c: char| c.is_ascii_digit()) => {
            first[..at].to_owned()
        }
        _ => first.to_owned(),
    }
}

/// The line and column of a byte of a text.
fn place_of(text: &str, offset: usize) -> Position {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Position {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

/// Where the value at a path begins, or the nearest value around it that there is.
pub(super) fn place(text: &str, format: Format, path: &[Segment]) -> Option<Position> {
    (0..=path.len())
        .rev()
        .find_map(|length| exact_place(text, format, &path[..length]))
}

/// Where the value at a path begins.
fn exact_place(text: &str, format: Format, path: &[Segment]) -> Option<Position> {
    match format {
        Format::Json => {
            let mut deserializer = serde_json::Deserializer::from_str(text);
            let raw: &RawValue = walk(path, &mut deserializer)?;
            Some(place_of(
                text,
                raw.get().as_ptr() as usize - text.as_ptr() as usize,
            ))
        }
        Format::Yaml => serde_saphyr::with_deserializer_from_str(text, |deserializer| {
            let value: Option<serde_saphyr::Spanned<IgnoredAny>> = walk(path, deserializer);
            Ok(value.map(|value| value.referenced))
        })
        .ok()
        .flatten()
        .and_then(|at| {
            let line = usize::try_from(at.line()).ok().filter(|line| *line > 0)?;
            Some(Position {
                line,
                column: usize::try_from(at.column()).ok()?.max(1),
            })
        }),
        Format::Toml => {
            let deserializer = toml::Deserializer::parse(text).ok()?;
            let value: toml::Spanned<IgnoredAny> = walk(path, deserializer)?;
            let Range { start, .. } = value.span();
            Some(place_of(text, start))
        }
    }
}

/// The text that a path leads to.
fn text_at(text: &str, format: Format, path: &[Segment]) -> Option<String> {
    match format {
        Format::Json => walk(path, &mut serde_json::Deserializer::from_str(text)),
        Format::Yaml => serde_saphyr::with_deserializer_from_str(text, |deserializer| {
            Ok(walk(path, deserializer))
        })
        .ok()
        .flatten(),
        Format::Toml => walk(path, toml::Deserializer::parse(text).ok()?),
    }
}

/// Walks along a path and reads what is at its end.
fn walk<'de, L: Deserialize<'de>, D: Deserializer<'de>>(
    path: &[Segment],
    deserializer: D,
) -> Option<L> {
    let walk = Walk {
        path,
        leaf: PhantomData,
    };
    walk.deserialize(deserializer).ok().flatten()
}

/// The rest of a path, with the type that is read at its end.
struct Walk<'p, L> {
    path: &'p [Segment],
    leaf: PhantomData<L>,
}

impl<'de, L: Deserialize<'de>> DeserializeSeed<'de> for Walk<'_, L> {
    type Value = Option<L>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<L>, D::Error> {
        if self.path.is_empty() {
            L::deserialize(deserializer).map(Some)
        } else {
            deserializer.deserialize_any(self)
        }
    }
}

impl<'de, L: Deserialize<'de>> Visitor<'de> for Walk<'_, L> {
    type Value = Option<L>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a list on the way to a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<L>, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            match self.path {
                [Segment::Key(wanted), rest @ ..] if *wanted == key && found.is_none() => {
                    found = map.next_value_seed(Walk {
                        path: rest,
                        leaf: PhantomData,
                    })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Option<L>, A::Error> {
        let (wanted, rest) = match self.path {
            [Segment::Index(index), rest @ ..] => (*index, rest),
            _ => (usize::MAX, self.path),
        };
        let mut found = None;
        for index in 0.. {
            if index == wanted {
                match seq.next_element_seed(Walk {
                    path: rest,
                    leaf: PhantomData,
                })? {
                    Some(value) => found = value,
                    None => break,
                }
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
        }
        Ok(found)
    }
}
