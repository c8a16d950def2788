//! The user-space half of `fault`.
pub mod rule;
