//! Errors of a `MySQL` server: which code and which SQLSTATE belong to a text.
//!
//! Clients decide by the code, not by the text, whether they try again. The table has the errors that an
//! outage, overload or a conflict brings, from `MySQL`'s server error message reference.

use super::{Unknown, fits};

/// The code of an error that has no other (`ER_UNKNOWN_ERROR`).
const UNKNOWN: u16 = 1105;
/// The SQLSTATE of errors that have no other.
const GENERAL: &str = "HY000";
/// Code, SQLSTATE and text; `%` stands for what differs.
const ERRORS: &[(u16, &str, &str)] = &[
    (1040, "08004", "Too many connections"),
    (1042, "08S01", "Can't get hostname for your address"),
    (1043, "08S01", "Bad handshake"),
    (1044, "42000", "Access denied for user % to database %"),
    (1045, "28000", "Access denied for user %"),
    (1046, "3D000", "No database selected"),
    (1047, "08S01", "Unknown command"),
    (1048, "23000", "Column % cannot be null"),
    (1049, "42000", "Unknown database %"),
    (1050, "42S01", "Table % already exists"),
    (1051, "42S02", "Unknown table %"),
    (1053, "08S01", "Server shutdown in progress"),
    (1054, "42S22", "Unknown column %"),
    (1062, "23000", "Duplicate entry % for key %"),
    (1064, "42000", "You have an error in your SQL syntax%"),
    (1105, "HY000", "Unknown error"),
    (1114, "HY000", "The table % is full"),
    (
        1129,
        "HY000",
        "Host % is blocked because of many connection errors%",
    ),
    (1130, "HY000", "Host % is not allowed to connect to this %"),
    (1142, "42000", "% command denied to user %"),
    (1146, "42S02", "Table % doesn't exist"),
    (1152, "08S01", "Aborted connection %"),
    (
        1153,
        "08S01",
        "Got a packet bigger than 'max_allowed_packet' bytes",
    ),
    (1158, "08S01", "Got an error reading communication packets"),
    (1159, "08S01", "Got timeout reading communication packets"),
    (1160, "08S01", "Got an error writing communication packets"),
    (1161, "08S01", "Got timeout writing communication packets"),
    (1180, "HY000", "Got error % during COMMIT"),
    (1181, "HY000", "Got error % during ROLLBACK"),
    (
        1203,
        "42000",
        "User % already has more than 'max_user_connections' active connections",
    ),
    (
        1205,
        "HY000",
        "Lock wait timeout exceeded; try restarting transaction",
    ),
    (
        1206,
        "HY000",
        "The total number of locks exceeds the lock table size",
    ),
    (
        1213,
        "40001",
        "Deadlock found when trying to get lock; try restarting transaction",
    ),
    (1226, "42000", "User % has exceeded the % resource%"),
    (1227, "42000", "Access denied; you need %"),
    (
        1290,
        "HY000",
        "The MySQL server is running with the % option so it cannot execute this statement",
    ),
    (
        1290,
        "HY000",
        "The MariaDB server is running with the % option so it cannot execute this statement",
    ),
    (1317, "70100", "Query execution was interrupted"),
    (1364, "HY000", "Field % doesn't have a default value"),
    (
        1451,
        "23000",
        "Cannot delete or update a parent row: a foreign key constraint fails%",
    ),
    (
        1452,
        "23000",
        "Cannot add or update a child row: a foreign key constraint fails%",
    ),
    (
        1614,
        "XA102",
        "XA_RBDEADLOCK: Transaction branch was rolled back: deadlock was detected",
    ),
    (1836, "HY000", "Running in read-only mode"),
    (
        1969,
        "70100",
        "Query execution was interrupted (max_statement_time exceeded)",
    ),
    (2006, "HY000", "MySQL server has gone away"),
    (
        2013,
        "HY000",
        "Lost connection to MySQL server during query",
    ),
    (
        3024,
        "HY000",
        "Query execution was interrupted, maximum statement execution time exceeded",
    ),
    (
        3572,
        "HY000",
        "Statement aborted because lock(s) could not be acquired immediately and NOWAIT is set.",
    ),
    (
        4031,
        "HY000",
        "The client was disconnected by the server because of inactivity.%",
    ),
];

/// An error as a server sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MysqlError {
    pub(crate) code: u16,
    /// Five letters and digits.
    pub(crate) state: String,
    pub(crate) text: String,
}

impl MysqlError {
    /// The error that is meant by a text, which may begin with its code and SQLSTATE as in `1213
    /// Deadlock found`, `1213 (40001) Deadlock found` or `ERROR 1213 (40001): Deadlock found`.
    ///
    /// # Errors
    /// A number that is no code of a server's error.
    pub(crate) fn meant_by(text: &str) -> Result<Self, Unknown> {
        let text = text.trim();
        let after_word = text.strip_prefix("ERROR ").unwrap_or(text);
        match split_code(after_word) {
            Some((code, rest)) => Ok(Self::with_code(code, rest)),
            None if text.bytes().all(|byte| byte.is_ascii_digit()) => Err(Unknown {
                message: format!("`{text}` is no error of a MySQL server"),
                expected: "a code such as 1213 or 1205, or a text".to_owned(),
            }),
            None => Ok(Self::with_text(text)),
        }
    }

    fn with_code(code: u16, rest: &str) -> Self {
        let known = ERRORS.iter().find(|(other, ..)| *other == code);
        let (state, text) = split_state(rest);
        let state = state.or(known.map(|(_, state, _)| *state));
        let text = match (text, known) {
            ("", Some((.., text))) => text.replace('%', "?"),
            ("", None) => "Unknown error".to_owned(),
            (text, _) => text.to_owned(),
        };
        Self {
            code,
            state: state.unwrap_or(GENERAL).to_owned(),
            text,
        }
    }

    fn with_text(text: &str) -> Self {
        let fitting = ERRORS.iter().filter(|(.., pattern)| fits(pattern, text));
        // The most special one.
        let known = fitting.max_by_key(|(.., pattern)| pattern.len());
        let (code, state) = known.map_or((UNKNOWN, GENERAL), |(code, state, _)| (*code, *state));
        Self {
            code,
            state: state.to_owned(),
            text: text.to_owned(),
        }
    }
}

/// A code of the ranges that servers use, and what follows it.
fn split_code(text: &str) -> Option<(u16, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (code, rest) = text.split_at(digits);
    let is_apart = rest.is_empty() || rest.starts_with([' ', ':', ',']);
    let code = code.parse().ok().filter(|_| is_apart)?;
    let is_known = ERRORS.iter().any(|(other, ..)| *other == code);
    let is_server = matches!(code, 1000..=1999 | 3000..=5999);
    (is_known || is_server).then(|| (code, rest.trim_start_matches([' ', ':', ','])))
}

/// An SQLSTATE in parentheses at the beginning, and the text.
fn split_state(text: &str) -> (Option<&str>, &str) {
    let state = text.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    match state {
        Some((state, rest))
            if state.len() == 5 && state.bytes().all(|byte| byte.is_ascii_alphanumeric()) =>
        {
            (Some(state), rest.trim_start_matches([' ', ':']))
        }
        _ => (None, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_the_code_that_belongs_to_it() {
        for (text, code, state) in [
            ("Too many connections", 1040, "08004"),
            ("too many connections", 1040, "08004"),
            ("Deadlock found", 1213, "40001"),
            (
                "Deadlock found when trying to get lock; try restarting transaction",
                1213,
                "40001",
            ),
            (
                "Lock wait timeout exceeded; try restarting transaction",
                1205,
                "HY000",
            ),
            (
                "Access denied for user 'x'@'h' (using password: YES)",
                1045,
                "28000",
            ),
            (
                "Access denied for user 'x'@'h' to database 'd'",
                1044,
                "42000",
            ),
            ("Table 'd.t' doesn't exist", 1146, "42S02"),
            ("Duplicate entry '1' for key 'PRIMARY'", 1062, "23000"),
            (
                "Query execution was interrupted (max_statement_time exceeded)",
                1969,
                "70100",
            ),
            ("The disk is on fire", 1105, "HY000"),
            ("Too", 1105, "HY000"),
        ] {
            let error = MysqlError::meant_by(text).expect(text);
            assert_eq!((error.code, error.state.as_str()), (code, state), "{text}");
            assert_eq!(error.text, text);
        }
    }

    #[test]
    fn a_code_that_is_given_counts() {
        let deadlock = "Deadlock found when trying to get lock; try restarting transaction";
        for (text, code, state, says) in [
            ("1213 Deadlock found", 1213, "40001", "Deadlock found"),
            ("1213: gone", 1213, "40001", "gone"),
            ("1213", 1213, "40001", deadlock),
            ("1205 (HY001) wait", 1205, "HY001", "wait"),
            ("ERROR 1213 (40001): Deadlock", 1213, "40001", "Deadlock"),
            ("3999 (no) state", 3999, "HY000", "(no) state"),
            ("5555", 5555, "HY000", "Unknown error"),
            ("500 errors", 1105, "HY000", "500 errors"),
            ("1213th error", 1105, "HY000", "1213th error"),
        ] {
            let error = MysqlError::meant_by(text).expect(text);
            let found = (error.code, error.state.as_str(), error.text.as_str());
            assert_eq!(found, (code, state, says), "{text}");
        }
    }

    #[test]
    fn a_number_that_is_no_code_is_rejected() {
        for text in ["1", "999", "99999", "100000"] {
            assert!(MysqlError::meant_by(text).is_err(), "{text}");
        }
    }
}
