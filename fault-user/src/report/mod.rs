//! What a run tells afterwards.

pub mod record;
pub mod summary;
