//! What is wrong with a value: complaints, and the limits that many values share.

use super::error::{Piece, RuleError};
use super::units::show_duration;

/// What is wrong with a value, before it is known where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Complaint {
    /// The argument, modifier or part that is wrong.
    pub param: &'static str,
    /// What is wrong.
    pub message: String,
    /// What would have been right.
    pub expected: Option<String>,
}

impl Complaint {
    /// The complaint in one line, where it has no place in a text.
    pub fn one_line(&self) -> String {
        match &self.expected {
            Some(expected) => format!("{}: expected {expected}", self.message),
            None => self.message.clone(),
        }
    }

    /// The complaint as an error at its place in a text.
    pub fn at(&self, piece: Piece<'_>) -> RuleError {
        let error = piece.error(self.message.clone());
        match &self.expected {
            Some(expected) => error.expected(expected.clone()),
            None => error,
        }
    }
}

/// A complaint about an argument.
#[expect(
    clippy::unnecessary_wraps,
    reason = "every caller answers with an option"
)]
pub(super) fn complain(
    param: &'static str,
    message: impl Into<String>,
    expected: &str,
) -> Option<Complaint> {
    Some(Complaint {
        param,
        message: message.into(),
        expected: (!expected.is_empty()).then(|| expected.to_owned()),
    })
}

/// One second in nanoseconds.
pub(super) const SECOND: u64 = 1_000_000_000;

/// The longest time that has no limit of its own: 30 days.
pub const MAX_TIME_NS: u64 = 30 * 24 * 3_600 * SECOND;

/// The highest rate: 100 Tbit/s.
pub const MAX_RATE: u64 = 100_000_000_000_000;

/// A complaint where a time is longer than a limit.
pub(super) fn longer(param: &'static str, ns: u64, limit_ns: u64) -> Option<Complaint> {
    (ns > limit_ns)
        .then(|| {
            let most = format!("at most {}", show_duration(limit_ns));
            complain(param, format!("{} is too long", show_duration(ns)), &most)
        })
        .flatten()
}

/// A complaint where the middle is zero or too long, or the jitter larger than it.
pub(super) fn jittered(
    param: &'static str,
    ns: u64,
    jitter_ns: u64,
    limit_ns: u64,
) -> Option<Complaint> {
    if ns == 0 {
        return complain(param, format!("a {param} of 0 does nothing"), "more than 0");
    }
    if jitter_ns > ns {
        return complain(
            "jitter",
            format!("the jitter is larger than the {param}"),
            &format!("at most {}", show_duration(ns)),
        );
    }
    longer(param, ns, limit_ns)
}

/// A complaint where a rate is zero or absurd.
pub(super) fn bad_rate(bits: u64, instead: &str) -> Option<Complaint> {
    match bits {
        0 => complain("rate", "a rate of 0 lets nothing pass", instead),
        _ if bits > MAX_RATE => complain("rate", "this rate is absurd", "at most 100tbit"),
        _ => None,
    }
}

/// A complaint where a queue has room for nothing.
pub(super) fn no_queue(limit_packets: Option<u32>) -> Option<Complaint> {
    if limit_packets != Some(0) {
        return None;
    }
    complain(
        "limit_packets",
        "a queue of 0 packets loses all",
        "1 or more",
    )
}

/// A complaint where a text is no regular expression.
pub(super) fn bad_regex(param: &'static str, expression: &str) -> Option<Complaint> {
    let error = regex::bytes::Regex::new(expression).err()?;
    // The crate draws a picture over several lines; its last line says what is wrong.
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    let reason = last.strip_prefix("error: ").unwrap_or(last);
    complain(
        param,
        format!("this is no regular expression: {reason}"),
        "the syntax of the regex crate",
    )
}
