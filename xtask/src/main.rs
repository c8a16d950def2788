//! Builds, checks, tests and packages fault.
fn main() {}
