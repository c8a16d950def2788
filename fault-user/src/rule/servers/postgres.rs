//! Errors of a `PostgreSQL` server: what belongs to an SQLSTATE.
//!
//! Codes are from appendix A of `PostgreSQL`'s manual, texts from its sources.

use super::{Unknown, fits};

/// The SQLSTATE of errors that have no other (`internal_error`).
const GENERAL: &str = "XX000";

/// When a server sends an error, and what becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// At the login, which fails.
    Login,
    /// At a statement. A transaction that is open has failed.
    Statement,
    /// At a statement. The connection ends.
    Farewell,
}

use Moment::{Farewell, Login, Statement};

/// SQLSTATE, text, moment.
const ERRORS: &[(&str, &str, Moment)] = &[
    ("08006", "connection failure", Statement),
    ("08P01", "protocol violation", Statement),
    ("0A000", "feature not supported", Statement),
    (
        "22001",
        "value too long for type character varying(%)",
        Statement,
    ),
    ("22003", "integer out of range", Statement),
    ("22012", "division by zero", Statement),
    (
        "23502",
        "null value in column % violates not-null constraint",
        Statement,
    ),
    (
        "23503",
        "insert or update on table % violates foreign key constraint %",
        Statement,
    ),
    (
        "23505",
        "duplicate key value violates unique constraint %",
        Statement,
    ),
    (
        "23514",
        "new row for relation % violates check constraint %",
        Statement,
    ),
    (
        "23P01",
        "conflicting key value violates exclusion constraint %",
        Statement,
    ),
    (
        "25006",
        "cannot execute statement in a read-only transaction",
        Statement,
    ),
    (
        "25P02",
        "current transaction is aborted, commands ignored until end of transaction block",
        Statement,
    ),
    (
        "25P03",
        "terminating connection due to idle-in-transaction timeout",
        Farewell,
    ),
    ("26000", "prepared statement % does not exist", Statement),
    ("28000", "role % is not permitted to log in", Login),
    ("28P01", "password authentication failed for user %", Login),
    ("3D000", "database % does not exist", Login),
    (
        "40001",
        "could not serialize access due to concurrent update",
        Statement,
    ),
    ("40P01", "deadlock detected", Statement),
    ("42501", "permission denied for table %", Statement),
    ("42601", "syntax error at or near %", Statement),
    ("42703", "column % does not exist", Statement),
    ("42P01", "relation % does not exist", Statement),
    ("53000", "insufficient resources", Statement),
    (
        "53100",
        "could not extend file: No space left on device",
        Statement,
    ),
    ("53200", "out of memory", Statement),
    ("53300", "sorry, too many clients already", Login),
    ("53400", "configuration limit exceeded", Statement),
    (
        "55P03",
        "canceling statement due to lock timeout",
        Statement,
    ),
    (
        "57014",
        "canceling statement due to statement timeout",
        Statement,
    ),
    (
        "57P01",
        "terminating connection due to administrator command",
        Farewell,
    ),
    (
        "57P02",
        "terminating connection because of crash of another server process",
        Farewell,
    ),
    ("57P03", "the database system is starting up", Login),
    (
        "57P05",
        "terminating connection due to idle-session timeout",
        Farewell,
    ),
    (
        "58030",
        "could not read file: Input/output error",
        Statement,
    ),
    ("72000", "snapshot too old", Statement),
    ("XX000", "injected by fault", Statement),
    ("XX001", "invalid page in block % of relation %", Statement),
];

/// An error as a server sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PostgresError {
    /// The SQLSTATE: five digits and capitals.
    pub(crate) state: String,
    /// What it says.
    pub(crate) text: String,
    /// When it is sent.
    pub(crate) moment: Moment,
}

impl PostgresError {
    /// The error that is meant by a text, which may begin with its SQLSTATE: `40001`, `40001 try again`, `deadlock
    /// detected`; the usual one where it is empty.
    ///
    /// # Errors
    /// A single word that is no SQLSTATE, and an SQLSTATE that is of no error.
    pub(crate) fn meant_by(text: &str) -> Result<Self, Unknown> {
        let text = text.trim();
        let (word, rest) = text.split_once([' ', ':']).unwrap_or((text, ""));
        let state = word.to_ascii_uppercase();
        if text.is_empty() {
            return Ok(Self::with_state(GENERAL, ""));
        }
        if is_state(&state) {
            return match &state[..2] {
                "00" | "01" | "02" => Err(unknown(format!("the SQLSTATE {state} is no error"))),
                _ => Ok(Self::with_state(
                    &state,
                    rest.trim_start_matches([' ', ':']),
                )),
            };
        }
        let known = ERRORS.iter().filter(|(_, pattern, _)| fits(pattern, text));
        let known = known.max_by_key(|(_, pattern, _)| pattern.len());
        if known.is_none() && rest.is_empty() {
            return Err(unknown(format!("`{text}` is no SQLSTATE")));
        }
        let (state, _, moment) = known.unwrap_or(&(GENERAL, "", Statement));
        Ok(Self {
            state: (*state).to_owned(),
            text: text.to_owned(),
            moment: *moment,
        })
    }

    fn with_state(state: &str, text: &str) -> Self {
        let known = ERRORS.iter().find(|(other, ..)| *other == state);
        let usual = known.map_or("injected by fault", |(_, text, _)| text);
        Self {
            state: state.to_owned(),
            text: if text.is_empty() {
                usual.replace('%', "\"injected by fault\"")
            } else {
                text.to_owned()
            },
            moment: known.map_or(Statement, |(.., moment)| *moment),
        }
    }
}

/// Whether a word is five digits and capitals, with a digit among them.
fn is_state(word: &str) -> bool {
    let is_of = |byte: u8| byte.is_ascii_digit() || byte.is_ascii_uppercase();
    word.len() == 5 && word.bytes().all(is_of) && word.bytes().any(|byte| byte.is_ascii_digit())
}

fn unknown(message: String) -> Unknown {
    Unknown {
        message,
        expected: "five digits and capitals such as 40001, 40P01 or 53300, and a text behind them if you like"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_an_sqlstate_comes_with_it() {
        for (text, state, says, moment) in [
            ("40P01", "40P01", "deadlock detected", Statement),
            ("40p01", "40P01", "deadlock detected", Statement),
            ("deadlock detected", "40P01", "deadlock detected", Statement),
            ("40001 try again", "40001", "try again", Statement),
            ("40001: try again", "40001", "try again", Statement),
            ("53300", "53300", "sorry, too many clients already", Login),
            ("57P01 bye", "57P01", "bye", Farewell),
            ("P0001 raised", "P0001", "raised", Statement),
            ("99999", "99999", "injected by fault", Statement),
            ("", "XX000", "injected by fault", Statement),
            ("disk on fire", "XX000", "disk on fire", Statement),
        ] {
            let error = PostgresError::meant_by(text).expect(text);
            let found = (error.state.as_str(), error.text.as_str(), error.moment);
            assert_eq!(found, (state, says, moment), "{text}");
        }
        assert!(ERRORS.is_sorted_by_key(|(state, ..)| state));
        assert!(ERRORS.iter().all(|(state, ..)| is_state(state)));
    }

    #[test]
    fn what_is_no_error_is_rejected() {
        for text in ["4001", "400011", "oops", "00000", "02000", "40-01"] {
            assert!(PostgresError::meant_by(text).is_err(), "{text}");
        }
    }
}
