//! Errors as servers word them: which code, state or prefix belongs to a text.

mod mysql;
mod postgres;
mod redis;

pub(crate) use mysql::MysqlError;
pub(crate) use postgres::{Moment, PostgresError};
pub(crate) use redis::redis_error;

/// The fewest bytes of the beginning of a known text that stand for it.
const SHORTEST: usize = 8;

/// A text that means no error of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unknown {
    /// What is wrong.
    pub(crate) message: String,
    /// What would be right.
    pub(crate) expected: String,
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, expected {}", self.message, self.expected)
    }
}

/// Whether a text is an instance of a pattern, in which `%` stands for what differs, or the beginning of one.
fn fits(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.to_ascii_lowercase(), text.to_ascii_lowercase());
    if text.len() >= SHORTEST && pattern.starts_with(&text) {
        return true;
    }
    let mut pieces = pattern.split('%');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    true
}
