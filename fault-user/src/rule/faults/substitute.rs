//! `substitute`: matching bytes are replaced.

use super::prelude::*;

fault! {
    /// Matching bytes are replaced, across chunk borders too.
    Substitute: datagram("substitute", "matching bytes are replaced, across chunk borders too").listed(300);

    /// A regular expression of the `regex` crate over bytes.
    regex: String => first("regex", ValueKind::Text, "a regular expression over bytes");
    /// What replaces each match; `$1` and `${name}` stand for groups.
    replacement: String => first(
        "replacement",
        ValueKind::Text,
        "what replaces a match; `$1` stands for a group",
    );
}

impl Definition for Substitute {
    fn complaint(&self) -> Option<Complaint> {
        if self.regex.is_empty() {
            return complain(
                "regex",
                "an empty expression matches everywhere",
                "a regular expression",
            );
        }
        bad_regex("regex", &self.regex)
    }
}
