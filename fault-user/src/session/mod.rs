//! One run from its plan to its verdict.

pub mod machine;
pub mod tree;
