//! `error`: the client gets an error that it understands as one from its server.

use super::prelude::*;

/// The client gets an error that it understands as one from its server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Error {
    /// Which.
    pub reply: ErrorReply,
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
    pub(super) const PARAMS: [Param; 6] = [
        named(
            "http",
            Kind::Statuses,
            "HTTP statuses, one drawn per request; 500 when absent",
        ),
        named("redis", Kind::OptionalText, "a Redis error, with its text"),
        named(
            "mysql",
            Kind::OptionalText,
            "a MySQL error packet, with its text",
        ),
        named(
            "smtp",
            Kind::OptionalText,
            "an SMTP error reply, with its text",
        ),
        named(
            "memcache",
            Kind::OptionalText,
            "a memcached error reply, with its text",
        ),
        named("random", Kind::OptionalSize, "random bytes, 64 when absent"),
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
            Self::Smtp(t) => ("smtp", text(t)),
            Self::Memcache(t) => ("memcache", text(t)),
            Self::Random(DEFAULT_RANDOM_BYTES) => ("random", Value::Bare),
            Self::Random(bytes) => ("random", Value::Size(*bytes)),
        }
    }

    /// What is wrong with it.
    pub(super) fn complaint(&self) -> Option<Complaint> {
        match self {
            Self::Http(list)
                if list.is_empty() || list.iter().any(|s| !(100..=599).contains(s)) =>
            {
                complain("http", "this is no list of HTTP statuses", "100 to 599")
            }
            Self::Random(bytes) if !(1..=1 << 20).contains(bytes) => complain(
                "random",
                "this reply is empty or too large",
                "1 byte to 1MiB",
            ),
            Self::Redis(Some(text)) | Self::Smtp(Some(text)) | Self::Memcache(Some(text))
                if text.contains(['\r', '\n']) =>
            {
                complain(
                    self.given().0,
                    "the text of this reply is one line",
                    "no line breaks",
                )
            }
            _ => None,
        }
    }
}

impl Arguments for Error {
    const SPEC: Spec = Spec {
        params: &ErrorReply::PARAMS,
        ..stream(
            "error",
            "an error that the client library understands as one from its server",
        )
        .listed(310)
        .acting(Acts::OnRequests)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        let reply = args.need("reply", ErrorReply::read(args)?)?;
        Ok(Self { reply })
    }

    fn given(&self) -> Given {
        vec![self.reply.given()]
    }
}

impl Definition for Error {
    fn complaint(&self) -> Option<Complaint> {
        self.reply.complaint()
    }

    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
