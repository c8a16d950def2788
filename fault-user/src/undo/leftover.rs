//! Something that an instance has left, and what has become of it.

use serde::Serialize;

/// What has become of something that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It is there; nothing was done ([`super::leftovers::find`]).
    Found,
    /// It is gone, or is as it was before.
    Removed,
    /// It could not be removed: why.
    Kept(String),
}

/// One thing that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// `filter`, `link`, `cgroup`, `sysctl`, `qdisc`, `process`, `journal`.
    pub kind: &'static str,
    /// Which one, for people.
    pub what: String,
    /// What was done about it.
    pub fate: Fate,
}

impl Leftover {
    pub(super) fn new(kind: &'static str, what: String, fate: Fate) -> Self {
        Self { kind, what, fate }
    }

    pub(super) fn kept(kind: &'static str, what: String, error: &anyhow::Error) -> Self {
        Self::new(kind, what, Fate::Kept(format!("{error:#}")))
    }
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: ", self.kind, self.what)?;
        match &self.fate {
            Fate::Found => f.write_str("left by an instance that has ended"),
            Fate::Removed => f.write_str("removed"),
            Fate::Kept(why) => write!(f, "not removed: {why}"),
        }
    }
}
