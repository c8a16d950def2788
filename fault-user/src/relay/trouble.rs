//! What goes wrong on a relay and concerns its user: told once for each kind, with the reason.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

use crate::tell::tell;

/// The trouble that a relay has told of.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    /// What the user calls the relay.
    title: String,
    told: Mutex<BTreeSet<&'static str>>,
}

impl Trouble {
    /// Of a relay that the user knows by this name.
    pub(crate) fn of(title: String) -> Self {
        Self {
            title,
            told: Mutex::default(),
        }
    }

    /// Warns the user, unless this kind of trouble has been told of. Whether it did.
    pub(crate) fn tell(&self, kind: &'static str, what: impl Display) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = told.insert(kind);
        if is_new {
            tell!("fault: warning: {}: {what}", self.title);
        }
        is_new
    }

    /// Has everything told again: the relay was set up anew.
    pub(crate) fn forget(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_once() {
        let trouble = Trouble::of("proxy test".to_owned());
        assert!(trouble.tell("a", "x"));
        assert!(!trouble.tell("a", "y"));
        assert!(trouble.tell("b", "x"));
        trouble.forget();
        assert!(trouble.tell("a", "x"));
    }
}
