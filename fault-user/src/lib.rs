//! The user-space half of `fault`.

pub mod api;
pub mod cli;
pub mod relay;
