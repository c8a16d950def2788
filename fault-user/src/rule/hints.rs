//! What a person most probably means by a word that the language does not have.
//!
//! A rule that can be read is never changed, and a whole fault is only suggested when it can be read.

use std::str::FromStr as _;

use super::dictionary::{self, DIRECTIONS, FAULTS, TIMES, decimal_point, look_up, service_port};
use super::error::{Piece, RuleError};
use super::target::Protocol;
use super::{Fault, catalog, units};

/// The target that is meant by the name of a service, with the protocol that was given.
pub(super) fn service(name: &str, protocol: Protocol) -> Option<String> {
    match protocol {
        Protocol::Any => dictionary::service(name).map(str::to_owned),
        Protocol::Icmp => None,
        _ => service_port(name).map(|port| format!("{protocol}:{port}")),
    }
}

/// The error for a fault that can't be read, with the whole fault as it is meant where that is clear.
pub(super) fn fault(word: Piece<'_>, error: RuleError) -> RuleError {
    let text = word.text();
    if let Some(meant) = decimal_point(text).filter(|meant| reads(meant)) {
        return word
            .error("a number has a decimal point and no comma")
            .suggest(meant);
    }
    if error.suggestion.is_some() {
        return error;
    }
    let name = text.split(['=', ':', '(']).next().unwrap_or(text);
    let rest = &text[name.len()..];
    let value = rest.trim_start_matches(['=', ':', '(']);
    let mut candidates = vec![
        format!("{name}={value}"),
        format!("{name}={}", value.trim_end_matches(')')),
        with_status(name, value),
        format!("{text}ms"),
        text.replacen(',', "~", 1),
        format!("loss={text}"),
        format!("delay={text}"),
        format!("rate={text}"),
    ];
    let meant = look_up(FAULTS, name);
    candidates.extend(meant.map(|meant| format!("{meant}{rest}")));
    candidates.extend(meant.map(str::to_owned));
    match candidates.into_iter().find(|meant| reads(meant)) {
        Some(meant) => RuleError {
            span: word.error("").span,
            ..error
        }
        .suggest(meant),
        None => match meant {
            Some(meant) => error.suggest(meant),
            None => error,
        },
    }
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
    ];
    let meant = candidates.into_iter().find(|meant| reads(meant))?;
    let error = before
        .to(word)
        .error("a fault and its arguments are one word");
    Some(error.suggest(meant))
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
    let is_time = value.parse::<u64>().is_err() && units::parse_duration(value).is_ok();
    match look_up(TIMES, key).filter(|_| is_time) {
        Some(meant) => word
            .error(format!("`{key}` counts packets and takes no time"))
            .suggest(format!("{meant}={value}")),
        None => error,
    }
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
