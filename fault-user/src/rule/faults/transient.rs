//! `transient`: so many errors, then normal.

use super::ErrorReply;
use super::prelude::*;

/// So many errors, then normal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Transient {
    /// How many.
    pub errors: u64,
    /// Which; a reset where it was not given.
    pub reply: Option<ErrorReply>,
}

const ERRORS: Param = first("errors", Kind::Count, "how many");

impl Arguments for Transient {
    const SPEC: Spec = Spec {
        params: &{
            let [http, redis, mysql, smtp, memcache, random] = ErrorReply::PARAMS;
            [ERRORS, http, redis, mysql, smtp, memcache, random]
        },
        ..stream(
            "transient",
            "so many errors (resets where no reply is named), then normal",
        )
        .listed(320)
        .acting(Acts::OnRequests)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        Ok(Self {
            errors: args.field(&ERRORS, [])?,
            reply: ErrorReply::read(args)?,
        })
    }

    fn given(&self) -> Given {
        let mut given = Given::new();
        give(&mut given, &ERRORS, &self.errors, &[]);
        given.extend(self.reply.as_ref().map(ErrorReply::given));
        given
    }
}

impl Definition for Transient {
    fn complaint(&self) -> Option<Complaint> {
        if self.errors == 0 {
            return complain("errors", "0 errors do nothing", "1 or more");
        }
        self.reply.as_ref()?.complaint()
    }
}
