//! The one-line form: `TARGET FAULT[=ARGS] [MODIFIER…]`, in both directions.

use std::fmt;
use std::str::FromStr;

use super::args::{self, Args};
use super::catalog::{self, MIX};
use super::check;
use super::complaint::Complaint;
use super::error::{Piece, RuleError};
use super::faults::Fault;
use super::hints;
use super::modifier::{MODIFIERS, ModifierReader, Modifiers, modifier};
use super::target::{TargetRef, is_plain, looks_like_ports, target_ref};
use super::units;
use super::{Mix, MixArm, Rule, Target};

/// The most bytes that a rule may have.
pub const MAX_RULE_BYTES: usize = 16 * 1024;

/// The characters that open and close what is not split.
struct Splitter {
    quoted: bool,
    escaped: bool,
    depth: usize,
}

impl Splitter {
    /// Nothing is open.
    fn new() -> Self {
        Self {
            quoted: false,
            escaped: false,
            depth: 0,
        }
    }

    /// Takes the next character and says whether it may separate.
    fn take(&mut self, c: char) -> bool {
        let outside = !self.quoted && self.depth == 0;
        if self.quoted {
            let escape = c == '\\' && !self.escaped;
            self.quoted = c != '"' || self.escaped;
            self.escaped = escape;
        } else {
            match c {
                '"' => self.quoted = true,
                '(' => self.depth += 1,
                ')' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        outside
    }
}

/// Splits a text where `separates` says so, except within quotes and brackets.
fn split(piece: Piece<'_>, separates: impl Fn(char) -> bool) -> Result<Vec<Piece<'_>>, RuleError> {
    let mut splitter = Splitter::new();
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, c) in piece.text().char_indices() {
        if splitter.take(c) && separates(c) {
            parts.push(piece.slice(start..at));
            start = at + c.len_utf8();
        }
    }
    parts.push(piece.slice(start..piece.text().len()));
    let last = parts.last().copied().unwrap_or(piece).trim();
    if splitter.quoted {
        return Err(last
            .error("a quote is not closed")
            .expected("`\"` at the end"));
    }
    if splitter.depth > 0 {
        return Err(last
            .error("a bracket is not closed")
            .expected("`)` at the end"));
    }
    Ok(parts)
}

/// The words of a text.
fn words(piece: Piece<'_>) -> Result<Vec<Piece<'_>>, RuleError> {
    let mut words = split(piece, char::is_whitespace)?;
    words.retain(|word| !word.text().is_empty());
    Ok(words)
}

/// A fault that has been read, with what is needed to point at its parts.
enum FaultReader<'a> {
    /// A fault with arguments.
    Plain(Args<'a>),
    /// A mix, with the place of its name and arms.
    Mix(Vec<MixArm>, Piece<'a>),
}

impl<'a> FaultReader<'a> {
    /// Reads `FAULT[=ARGS]`.
    fn start(piece: Piece<'a>) -> Result<Self, RuleError> {
        let (name, arguments) = match piece.split_once(&['=']) {
            Some((name, arguments)) => (name, Some(arguments)),
            None => (piece, None),
        };
        if name.text() == MIX.name {
            return match arguments {
                None => Ok(Self::Mix(Vec::new(), name)),
                Some(arguments) => Err(arguments
                    .error("the arms of `mix` are words of their own")
                    .expected("`mix P%:FAULT P%:FAULT`")),
            };
        }
        let Some(spec) = catalog::spec(name.text()) else {
            return Err(unknown_fault(name));
        };
        let mut args = Args::new(spec, name);
        if let Some(arguments) = arguments {
            for part in split(arguments, |c| c == ',')? {
                args.add(part)?;
            }
        }
        Ok(Self::Plain(args))
    }

    /// Takes a further word where it belongs to the fault.
    fn take(&mut self, word: Piece<'a>) -> Result<bool, RuleError> {
        match self {
            Self::Mix(arms, place) => {
                let name = word.split_once(&['=']).map_or(word, |(name, _)| name);
                if catalog::spec(name.text()).is_some() {
                    return Err(word
                        .error("this arm of the mix has no probability")
                        .suggest(format!("10%:{}", word.text())));
                }
                if !word
                    .text()
                    .starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == '-')
                {
                    return Ok(false);
                }
                arms.push(arm(word).map_err(|error| hints::arm(word, error))?);
                *place = place.to(word);
                Ok(true)
            }
            Self::Plain(args) => {
                if let Some((key, value)) = word.split_once(&['=']) {
                    return args.add_named(key.text(), value, word);
                }
                if args.add_word(word)? {
                    return Ok(true);
                }
                // `slot=10ms 50ms`: a number can't be anything but the next argument.
                let number = word.text().starts_with(|c: char| c.is_ascii_digit());
                if number && args.spec.name == "slot" {
                    return args.add_positional(word).map(|()| true);
                }
                Ok(false)
            }
        }
    }

    /// The fault.
    fn finish(&self) -> Result<Fault, RuleError> {
        match self {
            Self::Plain(args) => Fault::build(args),
            Self::Mix(arms, place) => {
                let fault = Fault::Mix(Mix { arms: arms.clone() });
                match fault.complaint() {
                    Some(complaint) => Err(complaint.at(*place)),
                    None => Ok(fault),
                }
            }
        }
    }

    /// The place of the fault's name.
    fn piece(&self) -> Piece<'a> {
        match self {
            Self::Plain(args) => args.name,
            Self::Mix(_, place) => *place,
        }
    }

    /// The further words that the fault would take, for suggestions.
    fn names(&self) -> Vec<&'static str> {
        match self {
            Self::Plain(args) => args.spec.params.iter().map(|p| p.text).collect(),
            Self::Mix(..) => Vec::new(),
        }
    }
}

/// The error for a name that is no fault's.
fn unknown_fault(name: Piece<'_>) -> RuleError {
    let message = match name.text() {
        "" => "the fault is missing".to_owned(),
        text => format!("unknown fault `{text}`"),
    };
    let error = name.error(message).nearest(name.text(), catalog::names());
    let list = "a fault such as loss, delay, blackhole, latency or down";
    error.expected(list)
}

/// Reads an arm of a mix: `P%:FAULT[=ARGS]`.
pub(super) fn arm(word: Piece<'_>) -> Result<MixArm, RuleError> {
    let Some((probability, fault)) = word.split_once(&[':']) else {
        return Err(word
            .error("this arm of the mix has no fault")
            .expected("P%:FAULT such as `10%:timeout`"));
    };
    Ok(MixArm {
        probability: units::probability(probability)?,
        fault: FaultReader::start(fault)?.finish()?,
    })
}

/// Reads a fault on its own, as in the object form: `FAULT[=ARGS]`, or `mix` with its arms.
pub(super) fn fault(piece: Piece<'_>) -> Result<Fault, RuleError> {
    let words = words(piece)?;
    let Some((first, rest)) = words.split_first() else {
        return Err(unknown_fault(piece));
    };
    let mut reader = FaultReader::start(*first)?;
    for word in rest {
        if !reader.take(*word)? {
            return Err(word
                .error(format!("`{}` does not belong to the fault", word.text()))
                .nearest(word.text(), reader.names()));
        }
    }
    reader.finish()
}

/// The error for a word that is no modifier; `before` are the fault and what belongs to it.
fn unknown_modifier(
    word: Piece<'_>,
    next: Option<&Piece<'_>>,
    reader: &FaultReader<'_>,
    before: Piece<'_>,
) -> RuleError {
    let (key, value) = match word.split_once(&['=']) {
        Some((key, value)) => (key, Some(value.text())),
        None => (word, None),
    };
    let value = value.or(next.map(Piece::text));
    let meant = hints::modifier_for(key.text(), value);
    let keys = MODIFIERS.iter().map(|m| m.key);
    let names: Vec<_> = keys.chain(reader.names()).collect();
    if let Some(spec) = catalog::spec(key.text()) {
        return key
            .error(format!("a second fault `{}` in one rule", spec.name))
            .expected("a rule for each fault");
    }
    if let Some(spec) = modifier(key.text()) {
        if spec.key != key.text() {
            let message = format!("`{}` is the name in the object form", spec.name);
            return word.error(message).suggest_some(meant);
        }
        let example = format!("{}={}", spec.key, spec.value);
        let meant = meant.filter(|meant| meant.contains('=')).unwrap_or(example);
        return key
            .error(format!("`{}` needs a value", spec.key))
            .suggest(meant);
    }
    if let Some(error) = hints::detached(before, word) {
        return error;
    }
    if is_plain(word.text()) && word.text().contains(':') {
        let error = word.error(format!("a second target `{}` in one rule", word.text()));
        return error.expected("a rule for each target");
    }
    let message = format!("unknown modifier `{}`", key.text());
    let meant = hints::bare_value(word.text()).or(meant);
    if let Some(meant) = meant {
        return word.error(message).suggest(meant);
    }
    let error = key.error(message).nearest(key.text(), names);
    if error.suggestion.is_some() {
        return error;
    }
    hints::elsewhere(key, error.expected("p, first, after, nth, every, range, count, conn, hosts, sni, host, alpn, match, size, dir, at, for, period, duty or reconnect"))
}

/// The error for a fault in front of its target, and for a target of two words.
fn misplaced(target: Piece<'_>, fault: Piece<'_>, rest: &[Piece<'_>]) -> Option<RuleError> {
    let (first, second) = (target.text(), fault.text());
    let both = target.to(fault);
    if hints::is_fault(first) && !hints::is_fault(second) && target_ref(fault).is_ok() {
        let error = both.error("the target comes before the fault");
        return Some(error.suggest(format!("{second} {first}")));
    }
    if !hints::is_fault(second)
        && let Some(meant) = hints::joined(first)
    {
        let error = target.error("target and fault are words of their own");
        return Some(error.suggest(meant));
    }
    let kinds = ["container:", "container/", "docker:", "pod:", "pod/"];
    if let Some(name) = kinds.iter().find_map(|kind| first.strip_prefix(kind)) {
        let error = target.error("a container is no target");
        let instead = format!("`* {second}` with the option `--container {name}`");
        return Some(error.expected(instead));
    }
    if let ("dev" | "iface" | "interface", Some(fault)) = (first, rest.first()) {
        let error = both.error("an interface is no target");
        let instead = format!("`* {}` with the option `-i {second}`", fault.text());
        return Some(error.expected(instead));
    }
    if is_plain(first) && is_plain(second) && second.contains(':') && !rest.is_empty() {
        let error = both.error("two targets in one rule");
        return Some(error.expected("a rule for each target"));
    }
    if let ("port" | "dport" | "sport", Some(port)) = (second, rest.first())
        && looks_like_ports(port.text())
    {
        let error = target.to(*port).error("a target is one word");
        return Some(error.suggest(format!("{first}:{}", port.text())));
    }
    if !looks_like_ports(second) || rest.is_empty() {
        return None;
    }
    let first = first.trim_end_matches(',');
    let last = first.rsplit(':').next().unwrap_or(first);
    let separator = if looks_like_ports(last) { "," } else { ":" };
    let error = both.error("a target is one word");
    Some(error.suggest(match first {
        "port" | "dport" | "sport" | "--dport" | "--sport" => second.to_owned(),
        _ => format!("{first}{separator}{second}"),
    }))
}

/// Reads a rule.
pub(super) fn rule(text: &str) -> Result<Rule, RuleError> {
    let whole = Piece::whole(text);
    if text.len() > MAX_RULE_BYTES {
        return Err(Piece::whole("").error(format!("a rule has at most {MAX_RULE_BYTES} bytes")));
    }
    let words = words(whole)?;
    let form = "TARGET FAULT[=ARGS] [MODIFIER…] such as `tcp:5432 loss=30%`";
    let (target_word, fault_word, rest) = match words.as_slice() {
        [] => return Err(whole.error("the rule is empty").expected(form)),
        [only] => {
            let inner = only.text().trim_matches(['"', '\'']);
            return Err(if inner != only.text() && self::rule(inner).is_ok() {
                only.error("the quotes are a part of the rule")
                    .suggest(inner)
            } else if let Some(profile) = hints::profile(only.text()) {
                only.error("the target is missing")
                    .suggest(format!("* {profile}"))
            } else if hints::is_fault(only.text()) {
                only.error("the target is missing").expected(form)
            } else if let Some(meant) = hints::joined(only.text()) {
                only.error("target and fault are words of their own")
                    .suggest(meant)
            } else {
                target_ref(*only)?;
                only.error("the fault is missing").expected(form)
            });
        }
        [target, fault, rest @ ..] => (*target, *fault, rest),
    };
    if let Some(error) = misplaced(target_word, fault_word, rest) {
        return Err(error);
    }
    let target = target_ref(target_word)?;
    let is_dns = target_word.text() == "dns" || target_word.text().starts_with("dns:");
    if is_dns && let Some(error) = hints::dns_fault(fault_word) {
        return Err(error);
    }
    let (fault_reader, reader) = with_modifiers(fault_word, rest)?;
    let rule = Rule {
        target,
        fault: fault_reader.finish()?,
        modifiers: reader.modifiers.clone(),
    };
    match rule.complaint(None) {
        None => Ok(rule),
        Some(complaint) => {
            let piece = match complaint.param {
                "target" => target_word,
                "fault" => fault_reader.piece(),
                key => reader.piece(key).unwrap_or(fault_reader.piece()),
            };
            Err(complaint.at(piece))
        }
    }
}

/// Whether a text is a rule.
pub(super) fn reads_rule(text: &str) -> bool {
    rule(text).is_ok()
}

/// Reads a fault with modifiers, without a target.
pub(super) fn fault_and_modifiers(piece: Piece<'_>) -> Result<(Fault, Modifiers), RuleError> {
    let words = words(piece)?;
    let Some((first, rest)) = words.split_first() else {
        return Err(unknown_fault(piece));
    };
    let (fault, reader) = with_modifiers(*first, rest)?;
    Ok((fault.finish()?, reader.modifiers))
}

/// Reads the words of a fault and of modifiers.
fn with_modifiers<'a>(
    fault_word: Piece<'a>,
    rest: &[Piece<'a>],
) -> Result<(FaultReader<'a>, ModifierReader<'a>), RuleError> {
    let mut fault_reader = FaultReader::start(fault_word).map_err(|error| {
        let words: Vec<_> = std::iter::once(fault_word)
            .chain(rest.iter().copied())
            .collect();
        hints::early_modifiers(&words)
            .or_else(|| hints::superfluous(&words))
            .unwrap_or_else(|| hints::fault(fault_word, rest.first(), error))
    })?;
    let mut reader = ModifierReader::default();
    for (at, word) in rest.iter().enumerate() {
        let (key, value) = match word.split_once(&['=']) {
            Some((key, value)) => (key, Some(value)),
            None => (*word, None),
        };
        match modifier(key.text()).filter(|spec| spec.key == key.text()) {
            Some(spec) if value.is_some() != spec.value.is_empty() => {
                reader
                    .set(spec, value.unwrap_or(key.slice(0..0)), *word)
                    .map_err(|error| hints::modifier_value(spec.key, *word, error))?;
            }
            _ if fault_reader.take(*word)? => {}
            Some(spec) if spec.value.is_empty() => {
                return Err(word
                    .error(format!("`{}` takes no value", spec.key))
                    .suggest(spec.key));
            }
            _ => {
                if let Some(error) = hints::values(fault_word, &rest[at..]) {
                    return Err(error);
                }
                let error = unknown_modifier(*word, rest.get(at + 1), &fault_reader, fault_word);
                // `delay time=3000`, `loss random 10%`, `latency = 200ms`.
                let value = value.filter(|value| !value.text().is_empty());
                let value = value.or(rest.get(at + 1).copied());
                let is_value = error.suggestion.is_none() && !hints::is_elsewhere(key.text());
                let value = value.filter(|_| is_value);
                let joined = value.and_then(|value| hints::detached(fault_word, value));
                return Err(joined.unwrap_or(error));
            }
        }
    }
    Ok((fault_reader, reader))
}

impl Rule {
    /// What is wrong between the parts of this rule, with its target where that is known.
    pub(super) fn complaint(&self, resolved: Option<&Target>) -> Option<Complaint> {
        let written = match &self.target {
            TargetRef::Spec(target) => Some(target),
            TargetRef::Name(_) => resolved,
        };
        check::rule(written, &self.fault, &self.modifiers)
    }

    /// Checks a rule that was not read from text; what is read from text is checked already.
    ///
    /// # Errors
    /// Where a value is out of its range, or two parts contradict each other.
    pub fn check(&self) -> Result<(), RuleError> {
        let complaint = self.fault.complaint().or_else(|| self.complaint(None));
        match complaint {
            None => Ok(()),
            Some(complaint) => Err(complaint.at(Piece::whole(&self.to_string()))),
        }
    }

    /// The error for a complaint that came up when the target became known.
    pub(super) fn told(&self, complaint: &Complaint) -> RuleError {
        complaint.at(Piece::whole(&self.to_string()))
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        rule(text).map_err(|error| {
            hints::several_rules(text)
                .or_else(|| hints::several_faults(text))
                .unwrap_or(error)
        })
    }
}

impl FromStr for Fault {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        fault(Piece::whole(text))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Self::Mix(mix) = self {
            for arm in &mix.arms {
                write!(
                    f,
                    " {}:{}",
                    units::show_probability(arm.probability),
                    arm.fault
                )?;
            }
            return Ok(());
        }
        let args = args::show(self.spec(), &self.given());
        if args.is_empty() {
            Ok(())
        } else {
            write!(f, "={args}")
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.target, self.fault)?;
        let modifiers = self.modifiers.to_string();
        if modifiers.is_empty() {
            Ok(())
        } else {
            write!(f, " {modifiers}")
        }
    }
}
