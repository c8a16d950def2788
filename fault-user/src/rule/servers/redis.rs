//! Errors of a Redis server: clients tell them apart by the first word.

use super::{Unknown, fits};
use crate::rule::error::nearest;

/// The prefix of errors that have no other.
const GENERAL: &str = "ERR";

/// Prefix and text, as Redis 7 words them. `MOVED` and `ASK` name a slot and the server that has it.
const ERRORS: &[(&str, &str)] = &[
    ("ASK", "3999 127.0.0.1:6379"),
    (
        "BUSY",
        "Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    ),
    ("BUSYGROUP", "Consumer Group name already exists"),
    ("BUSYKEY", "Target key name already exists."),
    ("CLUSTERDOWN", "The cluster is down"),
    ("CROSSSLOT", "Keys in request don't hash to the same slot"),
    ("ERR", "injected by fault"),
    (
        "EXECABORT",
        "Transaction discarded because of previous errors.",
    ),
    ("IOERR", "error or timeout reading from target instance"),
    ("LOADING", "Redis is loading the dataset in memory"),
    (
        "MASTERDOWN",
        "Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    ),
    (
        "MISCONF",
        "Redis is configured to save RDB snapshots, but it's currently unable to persist to disk. Commands that may \
         modify the data set are disabled, because this instance is configured to report errors during writes if RDB \
         snapshotting fails (stop-writes-on-bgsave-error option). Please check the Redis logs for details about the \
         RDB error.",
    ),
    ("MOVED", "3999 127.0.0.1:6379"),
    ("NOAUTH", "Authentication required."),
    ("NOGOODSLAVE", "No suitable replica to promote"),
    ("NOPERM", "this user has no permissions to run this command"),
    ("NOPROTO", "unsupported protocol version"),
    ("NOREPLICAS", "Not enough good replicas to write."),
    ("NOSCRIPT", "No matching script. Please use EVAL."),
    ("NOTBUSY", "No scripts in execution right now."),
    ("OOM", "command not allowed when used memory > 'maxmemory'."),
    ("READONLY", "You can't write against a read only replica."),
    ("TRYAGAIN", "Multiple keys request during rehashing of slot"),
    ("UNBLOCKED", "client unblocked via CLIENT UNBLOCK"),
    (
        "UNKILLABLE",
        "Sorry the script already executed write commands against the dataset.",
    ),
    (
        "WRONGPASS",
        "invalid username-password pair or user is disabled.",
    ),
    (
        "WRONGTYPE",
        "Operation against a key holding the wrong kind of value",
    ),
];

/// The error that is meant by a text, with its prefix: `LOADING`, `LOADING later`, `Redis is loading`.
///
/// # Errors
/// A single word in capitals that is no prefix of Redis.
pub(crate) fn redis_error(text: &str) -> Result<String, Unknown> {
    let text = text.trim();
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let is_prefix = word.len() > 1
        && word
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    if is_prefix && !rest.is_empty() {
        return Ok(text.to_owned());
    }
    let by_prefix = ERRORS.iter().find(|(prefix, _)| *prefix == text);
    let by_text = || ERRORS.iter().find(|(_, known)| fits(known, text));
    match (by_prefix, is_prefix) {
        (Some((prefix, known)), _) => Ok(format!("{prefix} {known}")),
        (None, true) => Err(unknown(text)),
        (None, false) => {
            let prefix = by_text().map_or(GENERAL, |(prefix, _)| *prefix);
            Ok(format!("{prefix} {text}"))
        }
    }
}

fn unknown(word: &str) -> Unknown {
    let known = ERRORS.iter().map(|(prefix, _)| *prefix);
    let meant = nearest(word, known).map_or_else(
        || "LOADING, READONLY, MOVED or another prefix of Redis".to_owned(),
        |meant| format!("`{meant}`"),
    );
    Unknown {
        message: format!("`{word}` is no error of Redis"),
        expected: format!("{meant}, or a text behind it such as \"{word} try later\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_its_prefix() {
        let loading = "LOADING Redis is loading the dataset in memory";
        for (text, expected) in [
            ("LOADING", loading),
            ("Redis is loading the dataset in memory", loading),
            ("LOADING try later", "LOADING try later"),
            ("MOVED 12 10.0.0.2:6380", "MOVED 12 10.0.0.2:6380"),
            ("MOVED", "MOVED 3999 127.0.0.1:6379"),
            ("CUSTOM of a module", "CUSTOM of a module"),
            ("the disk is on fire", "ERR the disk is on fire"),
            ("later", "ERR later"),
        ] {
            assert_eq!(redis_error(text).as_deref(), Ok(expected), "{text}");
        }
        assert!(ERRORS.is_sorted_by_key(|(prefix, _)| prefix));
    }

    #[test]
    fn a_misspelt_prefix_is_rejected() {
        let error = redis_error("LODING").unwrap_err().to_string();
        assert!(error.contains("`LOADING`"), "{error}");
        assert!(redis_error("FOOBAR").is_err());
    }
}
