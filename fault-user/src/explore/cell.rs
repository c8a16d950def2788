//! What an experiment came to, and how that compares with what is accepted.

use serde::{Deserialize, Serialize};

use super::attempt::Attempt;
use super::faults::Experiment;
use super::shrink::Smallest;
use super::verdict::ExperimentVerdict;

/// What an experiment came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The experiment.
    pub experiment: Experiment,
    /// Its first run.
    pub first: Attempt,
    /// What the second run with the same seed came to, where that is something else.
    pub differs: Option<ExperimentVerdict>,
    /// The smallest fault that fails.
    pub smallest: Option<Smallest>,
    /// The largest magnitude that was survived, in milliseconds, where the fault has one.
    pub survives_ms: Option<u64>,
    /// Whether an interruption, or the end of the budget, came before the smallest fault was found.
    pub is_unfinished: bool,
    /// How many times the usual number of connects there were, where that is a storm.
    pub storm: Option<u64>,
    /// How many retries without growing back-off there were, where that is so.
    pub retries: Option<u64>,
    /// How it compares with what is accepted.
    pub standing: Standing,
}

impl Cell {
    /// Whether it is a finding: it failed, twice.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        self.first.verdict.is_failure() && self.differs.is_none()
    }

    /// Whether it is of a single kind of fault, and the command survived that.
    #[must_use]
    pub fn is_survived(&self) -> bool {
        self.experiment.own.is_none() && self.first.verdict.is_success()
    }

    /// The verdict in words.
    #[must_use]
    pub fn verdict(&self) -> String {
        match self.differs {
            Some(other) => format!(
                "flaky: {}, then {}",
                self.first.verdict.name(),
                other.name()
            ),
            None => self.first.verdict.name().to_owned(),
        }
    }

    /// Whether it hammered what failed.
    #[must_use]
    pub fn is_storm(&self) -> bool {
        self.storm.is_some() || self.retries.is_some()
    }

    /// In one letter.
    #[must_use]
    pub fn symbol(&self) -> &'static str {
        match self.differs {
            Some(_) => "?",
            None if self.is_storm() => "!",
            None => self.first.verdict.symbol(),
        }
    }

    /// The rules that reproduce it.
    #[must_use]
    pub fn rules(&self) -> &[String] {
        match &self.smallest {
            Some(smallest) => &smallest.rules,
            None => &self.experiment.rules,
        }
    }
}

/// How a cell compares with what is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It does not fail, and no failure was accepted.
    Well,
    /// It fails, and no failure was accepted.
    New,
    /// It fails as accepted.
    Accepted,
    /// It fails worse than accepted.
    Worse,
    /// It fails less than accepted, or not at all.
    Better,
}

impl Standing {
    /// Whether the cell makes `fault explore` fail.
    #[must_use]
    pub fn fails(self) -> bool {
        matches!(self, Self::New | Self::Worse)
    }

    /// In words, behind the verdict.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Well | Self::New => "",
            Self::Accepted => " (accepted)",
            Self::Worse => " (worse than accepted)",
            Self::Better => " (better than accepted)",
        }
    }

    /// Of a cell, where a failure with this verdict was accepted.
    #[must_use]
    pub fn of(cell: &Cell, accepted: Option<ExperimentVerdict>) -> Self {
        let verdict = cell.first.verdict;
        match accepted {
            None if cell.is_failure() => Self::New,
            None => Self::Well,
            // A second run that came to something else, or a fault that never hit, shows nothing.
            Some(_) if cell.differs.is_some() || verdict == ExperimentVerdict::NotReached => {
                Self::Accepted
            }
            Some(accepted) if verdict.agrees_with(accepted) => Self::Accepted,
            Some(accepted) if verdict > accepted => Self::Worse,
            Some(_) => Self::Better,
        }
    }
}
