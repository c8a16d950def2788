//! Leftovers of killed instances.

use serde::Serialize;

/// The fate of a leftover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It exists and was not touched ([`super::leftovers::find`]).
    Found,
    /// It was removed or restored.
    Removed,
    /// It could not be removed, for this reason.
    Kept(String),
}

/// A leftover of a dead instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// `filter`, `link`, `cgroup`, `sysctl`, `qdisc`, `process`, `journal`.
    pub kind: &'static str,
    /// A description for people.
    pub what: String,
    /// Its fate.
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
