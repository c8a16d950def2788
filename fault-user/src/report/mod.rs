//! Summary, expectations and reports of a run.

pub mod chart;
pub mod expectations;
pub mod file;
pub mod fold;
pub mod github;
pub mod html;
pub mod instead;
pub mod junit;
pub mod record;
pub mod samples;
pub mod summary;
pub mod timeline;
