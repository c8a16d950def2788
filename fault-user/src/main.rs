//! The `fault` binary.
fn main() {}
