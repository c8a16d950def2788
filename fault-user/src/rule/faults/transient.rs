//! `transient`: so many errors, then normal.

use super::ErrorReply;
use super::error::QUERY;
use super::prelude::*;

/// So many errors, then normal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Transient {
    /// How many.
    pub errors: u64,
    /// Which; a reset where it was not given.
    pub reply: Option<ErrorReply>,
    /// Only requests that this regular expression matches; nothing for all.
    pub query: Option<String>,
}

const ERRORS: Param = first("errors", ValueKind::Count, "how many");

impl Arguments for Transient {
    const SPEC: Spec = Spec {
        params: &{
            let [http, redis, mysql, postgres, smtp, memcache, random] = ErrorReply::PARAMS;
            [
                ERRORS, http, redis, mysql, postgres, smtp, memcache, random, QUERY,
            ]
        },
        ..stream(
            "transient",
            "this many errors (resets if no reply is named), then requests pass",
        )
        .listed(320)
        .acting(Acts::OnRequests)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        Ok(Self {
            errors: args.field(&ERRORS, [])?,
            reply: ErrorReply::read(args)?,
            query: args.field(&QUERY, [None])?,
        })
    }

    fn given(&self) -> Given {
        let mut given = Given::new();
        give(&mut given, &ERRORS, &self.errors, &[]);
        given.extend(self.reply.as_ref().map(ErrorReply::given));
        give(&mut given, &QUERY, &self.query, &[None]);
        given
    }
}

impl Definition for Transient {
    fn complaint(&self) -> Option<Complaint> {
        if self.errors == 0 {
            return complain("errors", "0 errors do nothing", "1 or more");
        }
        let Some(reply) = &self.reply else {
            return self.query.as_ref().and_then(|_| {
                complain(
                    "query",
                    "a reset answers whatever comes, so there is no request to read",
                    "a reply such as `http:503` or `postgres:40001` as well",
                )
            });
        };
        let complaint = reply.complaint();
        complaint.or_else(|| reply.query_complaint(self.query.as_ref()))
    }
}
