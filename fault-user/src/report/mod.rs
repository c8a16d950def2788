//! What a run tells afterwards.

pub mod expectations;
pub mod record;
pub mod summary;
