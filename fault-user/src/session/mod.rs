//! One run from its plan to its verdict.

pub mod tree;
