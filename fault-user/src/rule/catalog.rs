//! The faults that there are, by their names.

use super::faults::{Arguments as _, Mix};
use super::spec::{Spec, same};

pub use super::faults::FAULTS;

/// The entry of `mix`, whose arms are faults and not arguments.
pub const MIX: Spec = Mix::SPEC;

/// The fault of this name; `-` and `_` are the same.
#[must_use]
pub fn spec(name: &str) -> Option<&'static Spec> {
    FAULTS.iter().find(|spec| same(spec.name, name))
}

/// The names of all faults, `mix` included.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAULTS.iter().map(|spec| spec.name).chain([MIX.name])
}
