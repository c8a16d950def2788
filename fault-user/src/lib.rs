//! The user-space half of `fault`.
