//! `error`: the client gets an error that it understands as one from its server.

use super::prelude::*;
use crate::rule::args::STATUSES;
use crate::rule::servers::{Moment, MysqlError, PostgresError, Unknown, redis_error};

/// The client gets an error that it understands as one from its server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Error {
    /// Which.
    pub reply: ErrorReply,
    /// Only requests that this regular expression matches; nothing for all.
    pub query: Option<String>,
}

/// The reply that stands in for the server's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ErrorReply {
    /// An HTTP response with one of these statuses, drawn per request; never empty.
    Http(Vec<u16>),
    /// A Redis error; a usual one where there is no text.
    Redis(Option<String>),
    /// A `MySQL` error packet.
    Mysql(Option<String>),
    /// A `PostgreSQL` error, by its SQLSTATE.
    Postgres(Option<String>),
    /// An SMTP error reply.
    Smtp(Option<String>),
    /// A memcached error reply.
    Memcache(Option<String>),
    /// This many random bytes.
    Random(u64),
}

/// How many random bytes stand in for a reply when no number was given.
const DEFAULT_RANDOM_BYTES: u64 = 64;

impl ErrorReply {
    /// The arguments that choose a reply; at most one of them may be there.
    pub(super) const PARAMS: [Param; 7] = [
        named(
            "http",
            ValueKind::Statuses,
            "HTTP statuses, one drawn per request; 500 when absent",
        ),
        named(
            "redis",
            ValueKind::OptionalText,
            "a Redis error, with its prefix or its text",
        ),
        named(
            "mysql",
            ValueKind::OptionalText,
            "a MySQL error packet, with its code or its text",
        ),
        named(
            "postgres",
            ValueKind::OptionalText,
            "a PostgreSQL error, with its SQLSTATE",
        ),
        named(
            "smtp",
            ValueKind::OptionalText,
            "an SMTP error reply, with its text",
        ),
        named(
            "memcache",
            ValueKind::OptionalText,
            "a memcached error reply, with its text",
        ),
        named(
            "random",
            ValueKind::OptionalSize,
            "random bytes, 64 when absent",
        ),
    ];

    /// The reply that is named, if one is.
    pub(super) fn read(args: &Args<'_>) -> Result<Option<Self>, RuleError> {
        let names = Self::PARAMS.map(|param| param.name);
        args.at_most_one(&names)?;
        let Some(name) = names.into_iter().find(|name| args.piece(name).is_some()) else {
            return Ok(None);
        };
        let text = String::read(args, name)?;
        Ok(Some(match (name, args.value(name)) {
            ("http", Some(Value::Statuses(list))) => Self::Http(list.clone()),
            ("http", _) => Self::Http(vec![500]),
            ("redis", _) => Self::Redis(text),
            ("mysql", _) => Self::Mysql(text),
            ("postgres", _) => Self::Postgres(text),
            ("smtp", _) => Self::Smtp(text),
            ("memcache", _) => Self::Memcache(text),
            _ => Self::Random(u64::read(args, name)?.unwrap_or(DEFAULT_RANDOM_BYTES)),
        }))
    }

    /// The argument that names it.
    pub(super) fn given(&self) -> (&'static str, Value) {
        let text = |text: &Option<String>| text.clone().map_or(Value::Bare, Value::Text);
        match self {
            Self::Http(list) if list == &[500] => ("http", Value::Bare),
            Self::Http(list) => ("http", Value::Statuses(list.clone())),
            Self::Redis(t) => ("redis", text(t)),
            Self::Mysql(t) => ("mysql", text(t)),
            Self::Postgres(t) => ("postgres", text(t)),
            Self::Smtp(t) => ("smtp", text(t)),
            Self::Memcache(t) => ("memcache", text(t)),
            Self::Random(DEFAULT_RANDOM_BYTES) => ("random", Value::Bare),
            Self::Random(bytes) => ("random", Value::Size(*bytes)),
        }
    }

    /// What is wrong with it.
    pub(super) fn complaint(&self) -> Option<Complaint> {
        match self {
            Self::Http(list) if list.is_empty() || list.iter().any(|s| !STATUSES.contains(s)) => {
                complain("http", "this is no list of HTTP statuses", "200 to 599")
            }
            Self::Random(bytes) if !(1..=1 << 20).contains(bytes) => complain(
                "random",
                "this reply is empty or too large",
                "1 byte to 1MiB",
            ),
            Self::Redis(Some(text))
            | Self::Postgres(Some(text))
            | Self::Smtp(Some(text))
            | Self::Memcache(Some(text))
                if text.contains(['\r', '\n']) =>
            {
                complain(
                    self.given().0,
                    "the text of this reply is one line",
                    "no line breaks",
                )
            }
            Self::Redis(Some(text)) => self.unknown(redis_error(text).err()),
            Self::Mysql(Some(text)) => self.unknown(MysqlError::meant_by(text).err()),
            Self::Postgres(Some(text)) => self.unknown(PostgresError::meant_by(text).err()),
            _ => None,
        }
    }

    fn unknown(&self, unknown: Option<Unknown>) -> Option<Complaint> {
        let Unknown { message, expected } = unknown?;
        complain(self.given().0, message, &expected)
    }

    /// What is wrong with a choice of requests by what they say.
    pub(super) fn query_complaint(&self, query: Option<&String>) -> Option<Complaint> {
        let query = query?;
        if let Self::Random(_) = self {
            return complain(
                "query",
                "random bytes answer whatever comes, so there is no request to read",
                "the protocol, such as `postgres` or `http`",
            );
        }
        if let Self::Postgres(Some(text)) = self
            && PostgresError::meant_by(text).is_ok_and(|error| error.moment == Moment::Login)
        {
            return complain(
                "query",
                "this error is one of the login, before any statement",
                "no `query`, or an error of a statement such as 40001",
            );
        }
        bad_regex("query", query)
    }
}

/// Which requests get the error, by what they say.
pub(super) const QUERY: Param = named(
    "query",
    ValueKind::Text,
    "a regular expression: only requests that match (an SQL statement, a Redis command with its arguments, the first line of others), in upper or lower case",
);

impl Arguments for Error {
    const SPEC: Spec = Spec {
        params: &{
            let [http, redis, mysql, postgres, smtp, memcache, random] = ErrorReply::PARAMS;
            [http, redis, mysql, postgres, smtp, memcache, random, QUERY]
        },
        ..stream(
            "error",
            "an error that the client library understands as one from its server",
        )
        .listed(310)
        .acting(Acts::OnRequests)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        let reply = args.need("reply", ErrorReply::read(args)?)?;
        let query = args.field(&QUERY, [None])?;
        Ok(Self { reply, query })
    }

    fn given(&self) -> Given {
        let mut given = vec![self.reply.given()];
        give(&mut given, &QUERY, &self.query, &[None]);
        given
    }
}

impl Definition for Error {
    fn complaint(&self) -> Option<Complaint> {
        let complaint = self.reply.complaint();
        complaint.or_else(|| self.reply.query_complaint(self.query.as_ref()))
    }

    fn overlap(&self) -> Overlap {
        match self.query {
            Some(_) => Overlap::Adds,
            None => Overlap::Decides,
        }
    }
}
