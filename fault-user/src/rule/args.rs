//! The arguments of a fault: read from text, and given back as text.

use std::fmt::Write as _;
use std::net::Ipv6Addr;

use super::dictionary;
use super::error::{Piece, RuleError};
use super::spec::{Param, Spec, ValueKind};
use super::units;

/// The value of an argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// Parts per million.
    Probability(u32),
    /// Nanoseconds.
    Duration(u64),
    /// Bytes.
    Size(u64),
    /// Bits per second.
    Rate(u64),
    /// A whole number.
    Count(u64),
    /// A whole number with a sign.
    Signed(i64),
    /// A word.
    Word(&'static str),
    /// The name alone.
    Bare,
    /// Any text.
    Text(String),
    /// HTTP statuses.
    Statuses(Vec<u16>),
    /// Probabilities in parts per million.
    Call(Vec<u32>),
}

/// The arguments of one fault while they are gathered.
pub(super) struct Args<'a> {
    /// The fault's entry in the catalog.
    pub spec: &'static Spec,
    /// Its name in the text.
    pub name: Piece<'a>,
    /// What was given, with its place in the text.
    given: Vec<(&'static Param, Value, Piece<'a>)>,
}

impl<'a> Args<'a> {
    /// No arguments yet.
    pub fn new(spec: &'static Spec, name: Piece<'a>) -> Self {
        Self {
            spec,
            name,
            given: Vec::new(),
        }
    }

    /// Adds one argument as it stands between two commas: a value, a word, or `key:value`.
    pub fn add(&mut self, piece: Piece<'a>) -> Result<(), RuleError> {
        let piece = piece.trim();
        if piece.text().is_empty() {
            return Err(piece
                .error("an argument is missing")
                .expected(self.expected()));
        }
        if self.add_word(piece)? || self.add_call(piece)? {
            return Ok(());
        }
        let separator = piece.text().find([':', '=']);
        if let Some(at) = separator.filter(|_| !piece.text().starts_with('"')) {
            let (key, value) = (piece.slice(0..at), piece.slice(at + 1..piece.text().len()));
            if let Some(param) = self.spec.param(key.text()) {
                return self.put(param, value.trim(), piece);
            }
            if is_key(key.text()) && !self.takes_text() {
                return Err(self.unknown(key));
            }
        }
        self.add_positional(piece)
    }

    /// Adds `key=value` where the fault has such an argument.
    pub fn add_named(
        &mut self,
        key: &str,
        value: Piece<'a>,
        piece: Piece<'a>,
    ) -> Result<bool, RuleError> {
        match self.spec.param(key) {
            Some(param) => self.put(param, value, piece).map(|()| true),
            None => Ok(false),
        }
    }

    /// Adds a word that alone says which argument it is: a flag's name or one of an argument's words.
    pub fn add_word(&mut self, piece: Piece<'a>) -> Result<bool, RuleError> {
        let word = piece.text().replace('_', "-");
        for param in self.spec.params {
            let value = match param.kind {
                ValueKind::Flag
                | ValueKind::OptionalText
                | ValueKind::OptionalSize
                | ValueKind::Statuses => self
                    .spec
                    .param(piece.text())
                    .filter(|p| p.name == param.name)
                    .map(|_| Value::Bare),
                ValueKind::Word(words) => {
                    words.iter().find(|w| **w == word).map(|w| Value::Word(w))
                }
                _ => None,
            };
            if let Some(value) = value {
                return self.insert(param, value, piece).map(|()| true);
            }
        }
        Ok(false)
    }

    /// Adds an argument that goes by its place.
    pub fn add_positional(&mut self, piece: Piece<'a>) -> Result<(), RuleError> {
        // Words were tried before; only where nothing else is left a wrong word is reported as one.
        let free = |p: &&'static Param| p.positional && self.piece(p.name).is_none();
        let word = |p: &&'static Param| matches!(p.kind, ValueKind::Word(_));
        let mut params = self.spec.params.iter().filter(free);
        let Some(param) = params.clone().find(|p| !word(p)).or_else(|| params.next()) else {
            return Err(self.unknown(piece));
        };
        // A word where a number belongs is most probably a misspelt word of another argument.
        let letter = piece.text().starts_with(|c: char| c.is_ascii_alphabetic());
        if letter
            && param.kind != ValueKind::Text
            && self.spec.params.iter().any(|p| word(&p))
            && !word(&param)
        {
            return Err(self.unknown(piece));
        }
        let parts = param
            .spread
            .and_then(|name| Some((name, piece.split_once(&['~'])?)));
        let Some((name, (middle, jitter))) = parts else {
            return self.put(param, piece, piece);
        };
        self.put(param, middle, middle)?;
        match self.spec.param(name) {
            Some(param) => self.put(param, jitter, jitter),
            None => Ok(()),
        }
    }

    /// Reads a value and keeps it; `piece` is what an error about the argument points at.
    pub fn put(
        &mut self,
        param: &'static Param,
        value: Piece<'a>,
        piece: Piece<'a>,
    ) -> Result<(), RuleError> {
        let value = read(param, value)?;
        self.insert(param, value, piece)
    }

    /// Where an argument stands in the text, if it was given.
    pub fn piece(&self, name: &str) -> Option<Piece<'a>> {
        self.find(name).map(|(_, _, piece)| *piece)
    }

    /// The value of an argument, if it was given.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.find(name).map(|(_, value, _)| value)
    }

    /// An error at an argument, or at the fault's name where it was not given.
    pub fn error(&self, name: &str, message: impl Into<String>) -> RuleError {
        self.piece(name).unwrap_or(self.name).error(message)
    }

    /// The entry of an argument that was given.
    fn find(&self, name: &str) -> Option<&(&'static Param, Value, Piece<'a>)> {
        self.given.iter().find(|(param, _, _)| param.name == name)
    }

    /// Keeps a value; an argument that is given twice is an error.
    pub fn insert(
        &mut self,
        param: &'static Param,
        value: Value,
        piece: Piece<'a>,
    ) -> Result<(), RuleError> {
        if self.piece(param.name).is_some() {
            let message = format!("`{}` is given twice", param.text);
            return Err(piece.error(message).expected("it once"));
        }
        self.given.push((param, value, piece));
        Ok(())
    }

    /// Adds `name(…)`.
    fn add_call(&mut self, piece: Piece<'a>) -> Result<bool, RuleError> {
        let Some((name, _)) = piece.split_once(&['(']) else {
            return Ok(false);
        };
        match self.spec.param(name.text()) {
            Some(param) if matches!(param.kind, ValueKind::Call { .. }) => {
                self.put(param, piece, piece).map(|()| true)
            }
            _ if self
                .spec
                .params
                .iter()
                .any(|p| matches!(p.kind, ValueKind::Call { .. })) =>
            {
                Err(self.unknown(name))
            }
            _ => Ok(false),
        }
    }

    /// Whether the next argument by place may hold any text.
    fn takes_text(&self) -> bool {
        self.spec
            .params
            .iter()
            .any(|p| p.positional && p.kind == ValueKind::Text)
    }

    /// The error for a word that is no argument of the fault.
    fn unknown(&self, piece: Piece<'a>) -> RuleError {
        let error = piece.error(if self.spec.params.is_empty() {
            format!("`{}` takes no argument", self.spec.name)
        } else {
            format!("`{}` has no argument `{}`", self.spec.name, piece.text())
        });
        let words = self.spec.params.iter().flat_map(|param| match param.kind {
            ValueKind::Word(words) => words,
            _ => &[],
        });
        let names = self.spec.params.iter().map(|param| param.text);
        let error = error.nearest(piece.text(), names.chain(words.copied()));
        if self.spec.params.is_empty() {
            error
        } else {
            error.expected(self.expected())
        }
    }

    /// The arguments of the fault, for error messages.
    pub fn expected(&self) -> String {
        expected(self.spec)
    }
}

/// The arguments of a fault as they are written: without a name in capitals, optional ones in brackets.
pub(super) fn expected(spec: &Spec) -> String {
    let mut text = String::new();
    let leads = spec.params.first().is_some_and(|param| param.positional);
    for param in spec.params {
        let item = match param.kind {
            ValueKind::Flag => param.text.to_owned(),
            ValueKind::Word(words) if param.positional => words.join("|"),
            ValueKind::Word(words) => format!("{}:{}", param.text, words.join("|")),
            ValueKind::Call { names, .. } => format!("{}({})", param.text, names.join(",")),
            _ if param.positional => param.text.to_uppercase(),
            _ => format!("{}:{}", param.text, unit_name(param.kind)),
        };
        let reply = matches!(
            param.kind,
            ValueKind::Statuses | ValueKind::OptionalText | ValueKind::OptionalSize
        );
        let alternative = matches!(param.kind, ValueKind::Call { .. }) || (reply && !leads);
        text = match text.as_str() {
            "" => item,
            _ if alternative => format!("{text} or {item}"),
            _ if param.positional && !matches!(param.kind, ValueKind::Word(_)) => {
                format!("{text},{item}")
            }
            _ => format!("{text}[,{item}]"),
        };
    }
    text
}

/// What stands behind the colon of a named argument.
pub(super) fn unit_name(kind: ValueKind) -> &'static str {
    match kind {
        ValueKind::Probability => "P%",
        ValueKind::Duration => "TIME",
        ValueKind::Size | ValueKind::OptionalSize => "SIZE",
        ValueKind::Rate => "RATE",
        ValueKind::Count | ValueKind::Signed => "N",
        ValueKind::Statuses => "STATUS/STATUS",
        _ => "TEXT",
    }
}

/// Whether a text in front of a colon looks like the name of an argument.
fn is_key(text: &str) -> bool {
    !text.is_empty()
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Reads the value of an argument.
pub(super) fn read(param: &'static Param, piece: Piece<'_>) -> Result<Value, RuleError> {
    match param.kind {
        ValueKind::Probability => units::probability(piece).map(Value::Probability),
        ValueKind::Duration => units::duration(piece).map(Value::Duration),
        ValueKind::Size | ValueKind::OptionalSize => units::size(piece).map(Value::Size),
        ValueKind::Rate => units::rate(piece).map(Value::Rate),
        ValueKind::Count => units::count(piece).map(Value::Count),
        ValueKind::Signed => units::signed(piece).map(Value::Signed),
        ValueKind::Text | ValueKind::OptionalText => unquote(piece).map(Value::Text),
        ValueKind::Statuses => statuses(piece).map(Value::Statuses),
        ValueKind::Call { names, required } => call(piece, names, required).map(Value::Call),
        ValueKind::Flag => match piece.text() {
            "" | "true" | "yes" => Ok(Value::Bare),
            _ => Err(piece
                .error(format!("`{}` takes no value", param.text))
                .expected("the name alone")),
        },
        ValueKind::Word(words) => {
            let word = piece.text().replace('_', "-");
            words
                .iter()
                .find(|w| **w == word)
                .map(|w| Value::Word(w))
                .ok_or_else(|| {
                    piece
                        .error(format!(
                            "`{}` is no value of `{}`",
                            piece.text(),
                            param.text
                        ))
                        .expected(one_of(words))
                        .nearest(piece.text(), words.iter().copied())
                        .suggest_some(
                            dictionary::look_up(dictionary::REPLIES, piece.text())
                                .filter(|meant| words.contains(meant)),
                        )
                })
        }
    }
}

/// `a, b or c`.
pub(super) fn one_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [word] => (*word).to_owned(),
        [head @ .., last] => format!("{} or {last}", head.join(", ")),
    }
}

/// The HTTP statuses that end a request; those below do not.
pub(crate) const STATUSES: std::ops::RangeInclusive<u16> = 200..=599;

/// Reads HTTP statuses separated by `/`.
fn statuses(piece: Piece<'_>) -> Result<Vec<u16>, RuleError> {
    let mut statuses = Vec::new();
    let mut rest = Some(piece);
    while let Some(part) = rest {
        let (item, more) = match part.split_once(&['/']) {
            Some((item, more)) => (item, Some(more)),
            None => (part, None),
        };
        let status = item.text().parse::<u16>();
        match status {
            Ok(status) if STATUSES.contains(&status) && item.text().len() == 3 => {
                statuses.push(status);
            }
            _ => {
                let message = match item.text() {
                    "" => "a status is missing".to_owned(),
                    text => format!("`{text}` is not an HTTP status"),
                };
                return Err(item
                    .error(message)
                    .expected("200 to 599, several with `/` between them"));
            }
        }
        rest = more;
    }
    Ok(statuses)
}

/// Reads `name(P,P,…)` or `P,P,…` as probabilities.
fn call(piece: Piece<'_>, names: &[&str], required: usize) -> Result<Vec<u32>, RuleError> {
    let text = piece.text();
    let inner = match (text.find('('), text.ends_with(')')) {
        (Some(open), true) => piece.slice(open + 1..text.len() - 1),
        (None, false) => piece,
        _ => return Err(piece.error("the bracket is not closed").expected("`)`")),
    };
    let mut values = Vec::new();
    let mut rest = Some(inner);
    while let Some(part) = rest {
        let (item, more) = match part.split_once(&[',']) {
            Some((item, more)) => (item, Some(more)),
            None => (part, None),
        };
        if values.len() == names.len() {
            return Err(item
                .error(format!("there are more than {} values", names.len()))
                .expected(names.join(", ")));
        }
        values.push(units::probability(item.trim())?);
        rest = more;
    }
    if values.len() < required {
        return Err(piece
            .error(format!("`{}` is missing", names[values.len()]))
            .expected(names.join(", ")));
    }
    Ok(values)
}

/// A text without its double quotes; inside them `\"` is a quote, `\\` a backslash, all else itself.
fn unquote(piece: Piece<'_>) -> Result<String, RuleError> {
    let text = piece.text();
    let Some(inner) = text.strip_prefix('"') else {
        return Ok(text.to_owned());
    };
    let mut out = String::new();
    let mut chars = inner.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' if at + 1 == inner.len() => return Ok(out),
            '"' => {
                return Err(piece
                    .slice(at + 2..text.len())
                    .error("there is text behind the closing quote")
                    .expected("`\\\"` for a quote inside of quotes"));
            }
            '\\' => match inner[at + 1..].chars().next() {
                Some(next @ ('"' | '\\')) => {
                    out.push(next);
                    chars.next();
                }
                _ => out.push('\\'),
            },
            _ => out.push(c),
        }
    }
    Err(piece
        .error("the quote is not closed")
        .expected("`\"` at the end"))
}

/// A text as an argument: in quotes where it must be.
fn quote(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    let address = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let is_ipv6 = address.is_some_and(|text| text.parse::<Ipv6Addr>().is_ok());
    if is_ipv6 || !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

impl Value {
    /// The value as it stands behind its name in the one-line form.
    pub fn show(&self) -> String {
        match self {
            Self::Probability(ppm) => units::show_probability(*ppm),
            Self::Duration(ns) => units::show_duration(*ns),
            Self::Size(bytes) => units::show_size(*bytes),
            Self::Rate(bits) => units::show_rate(*bits),
            Self::Count(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Word(word) => (*word).to_owned(),
            Self::Bare => String::new(),
            Self::Text(text) => quote(text),
            Self::Statuses(list) => {
                let items: Vec<_> = list.iter().map(u16::to_string).collect();
                items.join("/")
            }
            Self::Call(list) => {
                let items: Vec<_> = list
                    .iter()
                    .map(|ppm| units::show_probability(*ppm))
                    .collect();
                format!("({})", items.join(","))
            }
        }
    }
}

/// The arguments in their one-line form, without the fault's name.
pub(super) fn show(spec: &Spec, args: &[(&'static str, Value)]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let value = |name: &str| args.iter().find(|(n, _)| *n == name).map(|(_, v)| v);
    let mut joined = Vec::new();
    for param in spec.params {
        let Some(given) = value(param.name).filter(|_| !joined.contains(&param.name)) else {
            continue;
        };
        let mut text = match (given, param.kind) {
            (Value::Bare, _) => param.text.to_owned(),
            (_, ValueKind::Call { .. }) => format!("{}{}", param.text, given.show()),
            (Value::Word(word), _) if param.positional => (*word).to_owned(),
            _ if param.positional && !skipped(spec, param, &value) => given.show(),
            _ => format!("{}:{}", param.text, given.show()),
        };
        if let Some((name, by)) = param.spread.and_then(|name| Some((name, value(name)?))) {
            joined.push(name);
            if write!(text, "~{}", by.show()).is_err() {
                continue;
            }
        }
        parts.push(text);
    }
    parts.join(",")
}

/// Whether an argument that goes by its place comes before this one and is not there.
fn skipped<'v>(spec: &Spec, param: &Param, value: &impl Fn(&str) -> Option<&'v Value>) -> bool {
    spec.params
        .iter()
        .take_while(|p| p.name != param.name)
        .any(|p| p.positional && !matches!(p.kind, ValueKind::Word(_)) && value(p.name).is_none())
}
