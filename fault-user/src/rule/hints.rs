//! What a person most probably means by a word that the language does not have.
//!
//! A rule that can be read is never changed, and a whole fault is only suggested when it can be read.

use std::str::FromStr as _;

use super::dictionary::{
    self, DIRECTIONS, DNS_FAULTS, ELSEWHERE, EXAMPLES, FAULTS, FORMS, INTRODUCTIONS, MODIFIERS,
    PROFILES, TIMES, decimal_point, look_up, service_port,
};
use super::error::{Piece, RuleError};
use super::modifier::{PacketKinds, modifier};
use super::spec::ValueKind;
use super::target::{Protocol, is_name, is_plain};
use super::{Distribution, Fault, Profiles, Rule, catalog, units};

/// The target that is meant by the name of a service, with the protocol that was given.
pub(super) fn service(name: &str, protocol: Protocol) -> Option<String> {
    match protocol {
        Protocol::Any => dictionary::service(name).map(str::to_owned),
        Protocol::Icmp => None,
        _ => service_port(name).map(|port| format!("{protocol}:{port}")),
    }
}

/// The error for a fault that can't be read, with the whole fault as it is meant where that is clear; `next` is the
/// word behind it.
pub(super) fn fault(word: Piece<'_>, next: Option<&Piece<'_>>, error: RuleError) -> RuleError {
    let text = word.text();
    if let Some(unit) = next
        && let meant = format!("{text}{}", unit.text())
        && reads(&meant)
    {
        let error = word.to(*unit).error("a number and its unit are one word");
        return error.suggest(meant);
    }
    if let Some(meant) = decimal_point(text).filter(|meant| reads(meant)) {
        return word
            .error("a number has a decimal point and no comma")
            .suggest(meant);
    }
    let name = text.split(['=', ':', '(']).next().unwrap_or(text);
    let rest = &text[name.len()..];
    let meant = look_up(FAULTS, name);
    let needs_unit = error.message.ends_with("has no unit");
    // A word that people use goes before one that looks alike.
    if error.suggestion.is_some() && meant.is_none() && !needs_unit {
        return error;
    }
    let value = rest.trim_start_matches(['=', ':', '(']);
    if INTRODUCTIONS.contains(&name)
        && let Some(meant) = example(value)
    {
        return word.error(error.message).suggest(meant);
    }
    let values: Vec<_> = value.split(',').collect();
    let mut candidates = vec![
        netem(name, &values).unwrap_or_default(),
        distribution(name, value).unwrap_or_default(),
        spread_percentage(name, value).unwrap_or_default(),
        unquoted(name, value).unwrap_or_default(),
        text.replace("xx", "03"),
        format!(
            "error=http:{}",
            text.trim_start_matches("error=").replace("xx", "03")
        ),
        text.replacen(',', "/", 1),
        if value.contains('.') {
            format!("{text}s")
        } else {
            String::new()
        },
        format!("{name}={value}"),
        format!("{name}={}", value.trim_end_matches(')')),
        with_status(name, value),
        other_form(name, value),
        format!("{text}ms"),
        format!("{text}kB/s"),
        with_units(name, value),
        with_status(name, value.trim_matches(|c: char| !c.is_ascii_digit())),
        text.replacen(',', "~", 1),
        text.replacen(',', ":", 1),
        ["±", "+/-", "+-"]
            .iter()
            .fold(text.to_owned(), |text, sign| text.replacen(sign, "~", 1)),
        around_the_middle(name, value).unwrap_or_default(),
        format!("loss={text}"),
        format!("delay={text}"),
        format!("rate={text}"),
    ];
    candidates.extend(meant.map(|meant| format!("{meant}{rest}")));
    candidates.extend(meant.map(str::to_owned));
    candidates.extend(profile(text));
    candidates.extend(
        ["true", "on", "yes"]
            .contains(&value)
            .then(|| name.to_owned()),
    );
    candidates.push(value.to_owned());
    match candidates.into_iter().find(|meant| reads(meant)) {
        Some(meant) => RuleError {
            span: word.error("").span,
            ..error
        }
        .suggest(meant),
        None => match (meant, bare_value(value)) {
            (Some(meant), _) => error.suggest(example(meant).as_deref().unwrap_or(meant)),
            (None, Some(modifier)) if reads(name) || modifier.starts_with("p=") => {
                match example(name) {
                    Some(fault) => word
                        .error(error.message)
                        .suggest(format!("{fault} {modifier}")),
                    None => error,
                }
            }
            _ => error,
        },
    }
}

/// The fault by itself, or with an argument where it needs one.
fn example(name: &str) -> Option<String> {
    if reads(name) {
        return Some(name.to_owned());
    }
    let example = look_up(EXAMPLES, name).map(str::to_owned);
    let example = example.or_else(|| Some(format!("{}=200ms", catalog::spec(name)?.name)));
    example.filter(|text| reads(text))
}

/// A fault with its values as netem, Pumba and Chaos Mesh have them: `delay 100ms 20ms 25%`, `loss random 10%`,
/// `delay latency=100ms jitter=10ms correlation=25`.
fn netem(name: &str, words: &[&str]) -> Option<String> {
    let spec = catalog::spec(name).filter(|spec| !spec.params.is_empty())?;
    if let ["state" | "gemodel" | "ge", values @ ..] = words {
        let kind = if words[0] == "state" { "state" } else { "ge" };
        let meant = format!("{name}={kind}({})", values.join(","));
        return reads(&meant).then_some(meant);
    }
    let unit = match spec.params[0].kind {
        ValueKind::Probability => "%",
        ValueKind::Duration => "ms",
        ValueKind::Rate => "",
        _ => return None,
    };
    let is_time = |text: &str| units::parse_duration(text).is_ok();
    let with = |value: &str, unit: &str| {
        let is_bare = value.bytes().all(|byte| byte.is_ascii_digit());
        format!("{value}{}", if is_bare { unit } else { "" })
    };
    let [mut middle, mut spread, mut correlation, mut shape] = [const { String::new() }; 4];
    for word in words
        .iter()
        .filter(|word| !matches!(**word, "random" | "distribution"))
    {
        let (key, value) = word.split_once('=').unwrap_or(("", word));
        let is_middle = [
            "",
            "time",
            "percent",
            "percentage",
            "delay",
            "latency",
            name,
        ]
        .contains(&key);
        let is_shape = ["", "distribution", "dist"].contains(&key);
        match key {
            "correlation" | "corr" => correlation = format!(",corr:{}", with(value, "%")),
            "jitter" => spread = format!("~{}", with(value, "ms")),
            _ if is_middle && middle.is_empty() => middle = with(value, unit),
            _ if is_shape && Distribution::from_word(value).is_some() => {
                shape = format!(",{value}");
            }
            "" if value.ends_with('%') => correlation = format!(",corr:{value}"),
            "" if spread.is_empty() && is_time(&with(value, "ms")) => {
                spread = format!("~{}", with(value, "ms"));
            }
            "" if unit.is_empty() && value.parse::<u32>().is_ok() => {}
            _ => return None,
        }
    }
    // A rate has neither, and only `delay` has a correlation.
    let forms = [
        format!("{name}={middle}{spread}{correlation}{shape}"),
        format!("{name}={middle}{spread}{shape}"),
        format!("{name}={middle}{shape}"),
    ];
    forms.into_iter().find(|meant| reads(meant))
}

/// The error for words behind a fault that are its values, as netem has them.
pub(super) fn values(before: Piece<'_>, words: &[Piece<'_>]) -> Option<RuleError> {
    let (name, first) = match before.split_once(&['=']) {
        Some((name, values)) => (name.text(), values.text()),
        None => (before.text(), ""),
    };
    let first = first.split(',').filter(|value| !value.is_empty());
    (1..=words.len()).rev().find_map(|count| {
        let all: Vec<_> = first
            .clone()
            .chain(words[..count].iter().map(Piece::text))
            .collect();
        let meant = netem(name, &all)?;
        let error = before
            .to(words[count - 1])
            .error("a fault and its arguments are one word");
        Some(error.suggest(meant))
    })
}

/// `delay=150ms~50ms` for `delay=uniform(100ms,200ms)`, `delay=200ms~50ms,normal` for `delay=normal(200ms,50ms)`.
fn distribution(name: &str, value: &str) -> Option<String> {
    let (kind, values) = value.strip_suffix(')')?.split_once('(')?;
    let (a, b) = values.split_once(',')?;
    match kind {
        "uniform" | "random" | "rand" => around_the_middle(name, &format!("{a}..{b}")),
        "normal" | "gaussian" => Some(format!("{name}={a}~{b},normal")),
        _ => None,
    }
}

/// `latency=200ms` for `latency="200ms"`.
fn unquoted(name: &str, value: &str) -> Option<String> {
    let inner = value.strip_prefix('"')?.strip_suffix('"')?;
    Some(format!("{name}={inner}"))
}

/// `delay=200ms~100ms` for `delay=200ms~50%`.
fn spread_percentage(name: &str, value: &str) -> Option<String> {
    let (middle, share) = value.split_once('~')?;
    let middle_ns = units::parse_duration(middle).ok()?;
    let ppm = units::probability(Piece::whole(share)).ok()?;
    let spread_ns = middle_ns / u64::from(units::PPM) * u64::from(ppm);
    Some(format!(
        "{name}={middle}~{}",
        units::show_duration(spread_ns)
    ))
}

/// The error for a fault on streams in a rule about queries of DNS, with the fault that does so to queries.
pub(super) fn dns_fault(word: Piece<'_>) -> Option<RuleError> {
    let text = word.text();
    let name = text.split('=').next().unwrap_or(text);
    let meant = look_up(DNS_FAULTS, name)?;
    let value = text[name.len()..].trim_start_matches('=');
    let candidates = [
        value.to_owned(),
        format!("{meant}={value}"),
        meant.to_owned(),
    ];
    let meant = candidates
        .into_iter()
        .find(|meant| format!("dns:* {meant}").parse::<Rule>().is_ok())
        .or_else(|| example(meant))?;
    let error = word.error(format!("`{name}` does not work on DNS"));
    Some(error.suggest(meant))
}

/// Where what a word says stands, if elsewhere than behind the fault.
fn place(word: &str) -> Option<&'static str> {
    let mut rows = ELSEWHERE.iter();
    rows.find(|(words, _)| words.contains(&word))
        .map(|(_, place)| *place)
}

/// Whether what a word says stands elsewhere than behind the fault.
pub(super) fn is_elsewhere(word: &str) -> bool {
    place(word).is_some()
}

/// The error for a word that is no modifier: where what it says stands.
pub(super) fn elsewhere(key: Piece<'_>, error: RuleError) -> RuleError {
    let text = key.text();
    let owners = catalog::FAULTS
        .iter()
        .filter(|spec| spec.param(text).is_some());
    let owners: Vec<_> = owners.map(|spec| format!("`{}`", spec.name)).collect();
    match (place(text), owners.as_slice()) {
        (Some(place), _) => error.expected(place),
        _ if text.starts_with('-') => error.expected(
            "words without dashes: `p=50%` for a probability, `first=3` for a count, `match=syn` for flags",
        ),
        _ if text.starts_with('#') => error.expected("the end of the rule: it has no comments"),
        (None, [_, ..]) => error.expected(format!("a fault that has it: {}", owners.join(" or "))),
        _ => error,
    }
}

/// The modifier that is meant by a key with its value.
pub(super) fn modifier_for(key: &str, value: Option<&str>) -> Option<String> {
    let known = modifier(key).map(|spec| spec.key);
    let meant = known.or_else(|| look_up(MODIFIERS, key))?;
    if meant.contains('=') {
        return Some(meant.to_owned());
    }
    let given = value.and_then(|value| {
        let text = format!("{meant}={value}");
        match format!("* drop {text}").parse::<Rule>() {
            Ok(_) => Some(text),
            Err(error) => {
                let meant_value = error.suggestion?;
                let whole = format!("{meant}={meant_value}");
                Some(if meant_value.contains('=') {
                    meant_value
                } else {
                    whole
                })
            }
        }
    });
    Some(given.unwrap_or_else(|| meant.to_owned()))
}

/// The error for a word behind a fault that is most probably a part of it: `delay 200ms`, `delay=200ms 20ms`.
pub(super) fn detached(before: Piece<'_>, word: Piece<'_>) -> Option<RuleError> {
    let (fault, value) = (before.text(), word.text().trim_start_matches('='));
    let fault = fault.trim_end_matches('=');
    let candidates = [
        format!("{fault}={value}"),
        format!("{fault}~{value}"),
        format!("{fault},{value}"),
        with_status(fault, value),
        other_form(fault, value),
        format!("{fault},corr:{value}"),
        format!("{fault}={value}ms"),
        format!("{fault}={value}bit"),
    ];
    let meant = candidates.into_iter().find(|meant| reads(meant))?;
    let error = before
        .to(word)
        .error("a fault and its arguments are one word");
    Some(error.suggest(meant))
}

/// The error for a word that is no fault in front of one: `netem delay 100ms`, `-j REJECT`.
pub(super) fn superfluous(words: &[Piece<'_>]) -> Option<RuleError> {
    let [first, fault, rest @ ..] = words else {
        return None;
    };
    let name = fault.text().to_ascii_lowercase();
    if is_fault(first.text()) || !is_fault(&name) {
        return None;
    }
    let joined = rest.first().map(|value| format!("{name}={}", value.text()));
    let meant = joined
        .into_iter()
        .chain([name.clone()])
        .find(|meant| reads(meant))?;
    let last = if meant == name { fault } else { rest.first()? };
    let error = first.error(format!("unknown fault `{}`", first.text()));
    let span = first.to(*last).error("").span;
    Some(RuleError { span, ..error }.suggest(meant))
}

/// The profile that is meant by a word.
pub(super) fn profile(word: &str) -> Option<String> {
    // What can't be read as a name would look for hints again, and come here.
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if word.is_empty() || !word.bytes().all(is_name) {
        return None;
    }
    let meant = format!("profile={}", look_up(PROFILES, word).unwrap_or(word));
    let rule: Rule = format!("* {meant}").parse().ok()?;
    rule.expanded(&Profiles::new()).is_ok().then_some(meant)
}

/// What is meant by a word behind a fault that is a value without its modifier, or a direction.
pub(super) fn bare_value(word: &str) -> Option<String> {
    if let Some(direction) = look_up(DIRECTIONS, word) {
        return Some(format!("dir={direction}"));
    }
    if word.parse::<u64>().is_ok_and(|count| count > 0) {
        return Some(format!("first={word}"));
    }
    if word.ends_with('%') && units::probability(Piece::whole(word)).is_ok() {
        return Some(format!("p={word}"));
    }
    if PacketKinds::ALL.iter().any(|(_, kind)| *kind == word) {
        return Some(format!("match={word}"));
    }
    if let Some(ordinal) = ordinal(word) {
        return Some(format!("nth={ordinal}"));
    }
    units::parse_duration(word)
        .is_ok()
        .then(|| format!("for={word}"))
}

/// The number of an ordinal such as `3rd`.
fn ordinal(word: &str) -> Option<&str> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let is_one = ["st", "nd", "rd", "th"].contains(&&word[digits.len()..]);
    (is_one && digits.parse::<u64>().is_ok_and(|number| number > 0)).then_some(digits)
}

/// The error for several faults behind one target: `tcp:80 latency=100ms+loss=1%`.
pub(super) fn several_faults(text: &str) -> Option<RuleError> {
    let (target, rest) = text.trim().split_once(char::is_whitespace)?;
    [" ", "+", ";", "&", ","].iter().find_map(|separator| {
        let rest = rest.replace(separator, " ");
        let words = rest.split_whitespace().filter(|word| *word != "and");
        let mut rules: Vec<String> = Vec::new();
        for word in words {
            match rules.last_mut() {
                Some(rule) if !is_fault(word) => rule.extend([" ", word]),
                _ => rules.push(format!("{target} {word}")),
            }
        }
        let are_several = rules.len() > 1 && rules.iter().all(|rule| rule.parse::<Rule>().is_ok());
        are_several.then(|| each_by_itself(text, "these are several faults", &rules))
    })
}

/// The error for a text that has to become several rules.
fn each_by_itself(text: &str, message: &str, rules: &[String]) -> RuleError {
    let rules: Vec<_> = rules.iter().map(|rule| format!("-r '{rule}'")).collect();
    let error = Piece::whole(text).error(message);
    error.expected(format!("each by itself: {}", rules.join(" ")))
}

/// The error for several rules in one text.
pub(super) fn several_rules(text: &str) -> Option<RuleError> {
    let separators = [", ", "; ", " && ", " & ", " and ", " + ", "\n", ";", ","];
    separators.iter().find_map(|separator| {
        let parts: Vec<_> = text
            .split(separator)
            .map(|part| part.trim().to_owned())
            .filter(|part| !part.is_empty())
            .collect();
        let are_several = parts.len() > 1 && parts.iter().all(|part| part.contains(' '));
        (are_several && parts.iter().all(|part| part.parse::<Rule>().is_ok()))
            .then(|| each_by_itself(text, "these are several rules", &parts))
    })
}

/// The error for a modifier whose value can't be read, with the modifier that takes such a value.
pub(super) fn modifier_value(key: &str, word: Piece<'_>, error: RuleError) -> RuleError {
    let value = word
        .split_once(&['='])
        .map_or("", |(_, value)| value.text());
    if key == "dir" {
        return match look_up(DIRECTIONS, value) {
            Some(meant) => error.suggest(meant),
            None => error,
        };
    }
    if key == "count" && value.parse::<u64>().is_ok_and(|count| count > 0) {
        return word.error(error.message).suggest(format!("first={value}"));
    }
    if let Some(number) = ordinal(value) {
        return error.suggest(number);
    }
    if key == "match" && value.contains('+') {
        return error.suggest(value.replace('+', "/"));
    }
    if ["nth", "range", "conn"].contains(&key)
        && let Some(error) = several(key, value, word)
    {
        return error;
    }
    if look_up(TIMES, key).is_some()
        && value.ends_with('%')
        && units::probability(Piece::whole(value)).is_ok()
    {
        let error = word.error(format!("`{key}` counts packets and takes no share of them"));
        return error.suggest(format!("p={value}"));
    }
    let is_time = value.parse::<u64>().is_err() && units::parse_duration(value).is_ok();
    match look_up(TIMES, key).filter(|_| is_time) {
        Some(meant) => word
            .error(format!("`{key}` counts packets and takes no time"))
            .suggest(format!("{meant}={value}")),
        None => error,
    }
}

/// The error for several numbers in the place of one, or of a range.
fn several(key: &str, value: &str, word: Piece<'_>) -> Option<RuleError> {
    let numbers = value.split([',', '-']).map(str::parse);
    let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().ok()?;
    let [first, .., last] = numbers.as_slice() else {
        return None;
    };
    let in_a_row = numbers
        .windows(2)
        .all(|pair| pair[0].checked_add(1) == Some(pair[1]));
    if key != "range" && value.contains(',') && !in_a_row {
        let each: Vec<_> = numbers
            .iter()
            .map(|number| format!("`{key}={number}`"))
            .collect();
        let error = word.error(format!("`{key}` takes no list"));
        return Some(error.expected(format!("a rule for each: {}", each.join(", "))));
    }
    let key = if key == "nth" { "range" } else { key };
    let error = word.error("a range has two dots, and counts begin at 1");
    Some(error.suggest(format!("{key}={}..{last}", first.max(&1))))
}

/// The fault that has an argument of another one.
fn other_form(name: &str, value: &str) -> String {
    let form = look_up(FORMS, name).filter(|_| !value.is_empty());
    form.map_or_else(String::new, |form| form.replace("{}", value))
}

/// The arguments, with milliseconds where a number has no unit, and a colon behind the names of arguments.
fn with_units(name: &str, value: &str) -> String {
    let parts = value.split(',').map(|part| {
        let part = part.replacen('=', ":", 1);
        let is_bare = part.ends_with(|c: char| c.is_ascii_digit());
        if is_bare { part + "ms" } else { part }
    });
    format!("{name}={}", parts.collect::<Vec<_>>().join(","))
}

/// `delay=150ms~50ms` for `delay=100ms..200ms` and `delay=100-200ms`.
fn around_the_middle(name: &str, value: &str) -> Option<String> {
    let (least, most) = value.split_once("..").or_else(|| value.split_once('-'))?;
    let mut most_ns = units::parse_duration(most).ok()?;
    let unit = most.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let mut least_ns = units::parse_duration(least)
        .or_else(|_no_unit| units::parse_duration(&format!("{least}{unit}")))
        .ok()?;
    if most_ns < least_ns {
        std::mem::swap(&mut least_ns, &mut most_ns);
    }
    let spread_ns = (most_ns - least_ns) / 2;
    let [middle, spread] = [least_ns + spread_ns, spread_ns].map(units::show_duration);
    Some(format!("{name}={middle}~{spread}"))
}

/// The rule that is meant by a word in which another sign stands for the space behind the target: `tcp:80,drop`.
pub(super) fn joined(word: &str) -> Option<String> {
    let mut signs = word.char_indices().filter(|(_, c)| ",=:;/".contains(*c));
    // No whole rule is read: that would look for hints again, once more for each sign.
    signs.find_map(|(at, _)| {
        let (target, fault) = (&word[..at], &word[at + 1..]);
        let is_target = is_plain(target) || is_name(target);
        (is_target && is_fault(fault) && reads(fault)).then(|| format!("{target} {fault}"))
    })
}

/// The error for modifiers in front of their fault; `words` begins with the first of them.
pub(super) fn early_modifiers(words: &[Piece<'_>]) -> Option<RuleError> {
    let first = words.first()?;
    let is_modifier = |word: &Piece<'_>| {
        let key = word.text().split('=').next().unwrap_or_default();
        modifier(key).is_some_and(|spec| spec.key == key)
    };
    let at = words.iter().take_while(|word| is_modifier(word)).count();
    let fault = words
        .get(at)
        .filter(|fault| at > 0 && is_fault(fault.text()))?;
    let modifiers: Vec<_> = words[..at].iter().map(Piece::text).collect();
    let error = first
        .to(*fault)
        .error("the fault comes before its modifiers");
    let meant = format!("{} {}", fault.text(), modifiers.join(" "));
    Some(match format!("* {meant}").parse::<Rule>() {
        Ok(_) => error.suggest(meant),
        Err(other) => error.expected(format!("`FAULT MODIFIER…`; besides, {}", other.clause())),
    })
}

/// The error for an arm of a mix, with spaces for the commas between arms.
pub(super) fn arm(word: Piece<'_>, error: RuleError) -> RuleError {
    let meant = word.text().replace(',', " ");
    if word.text().contains(',') && reads(&format!("mix {meant}")) {
        return word
            .error("the arms of a mix are words of their own")
            .suggest(meant);
    }
    error
}

/// A fault that answers with an HTTP status; where the value is none, what is no fault.
fn with_status(name: &str, value: &str) -> String {
    match value.parse::<u16>() {
        Ok(status) => format!("{name}=http:{status}"),
        Err(_no_status) => String::new(),
    }
}

/// Whether a text is a fault.
fn reads(text: &str) -> bool {
    Fault::from_str(text).is_ok()
}

/// Whether a word begins with the name of a fault.
pub(super) fn is_fault(text: &str) -> bool {
    let name = text.split('=').next().unwrap_or(text);
    catalog::spec(name).is_some()
}
