//! The user-space half of `fault`.
pub mod doctor;
pub mod kernel;
pub mod process;
