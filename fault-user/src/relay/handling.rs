//! What is done with requests, as the faults that look at them say.

use regex::bytes::{Regex, RegexBuilder};

use super::attributes::{CloseMode, ErrorProtocol};
use super::protocol::Wording;
use super::queries::Queries;
use crate::rule::servers::PostgresError;

/// What is done with requests.
pub(crate) struct Handling {
    /// The fault's name.
    pub(crate) fault: &'static str,
    /// Which requests, and what becomes of them.
    pub(crate) rule: RequestRule,
    /// Their protocol.
    pub(crate) protocol: ErrorProtocol,
    /// What is answered.
    pub(crate) wording: Wording,
    /// Only requests that this regular expression matches.
    pub(crate) query: Option<String>,
    /// They are queries of DNS, answered as a packet rule says.
    pub(crate) queries: Option<Queries>,
}

impl Handling {
    /// Whether it is carried out on what the server answers as well.
    pub(crate) const fn reads_answers(&self) -> bool {
        matches!(self.protocol, ErrorProtocol::Postgres)
            && !matches!(self.rule, RequestRule::Abort(_))
    }

    /// The error of `PostgreSQL`.
    pub(crate) fn postgres(&self) -> Option<PostgresError> {
        let text = self.wording.message.as_deref().unwrap_or_default();
        PostgresError::meant_by(text).ok()
    }

    /// The regular expression of its `query`.
    pub(crate) fn selection(&self) -> Option<Regex> {
        // It was checked with the attributes.
        selection(self.query.as_deref()?).ok()
    }
}

/// The regular expression that selects requests by what they say.
///
/// # Errors
/// Where it is none.
pub(crate) fn selection(query: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(query).case_insensitive(true).build()
}

/// What is done with a request.
pub(crate) enum RequestRule {
    /// Each is answered.
    Always,
    /// The first so many are answered, by all connections together or by each.
    First { count: u64, per_connection: bool },
    /// The first reaches the server, its answer does not reach the client.
    Abort(CloseMode),
}
