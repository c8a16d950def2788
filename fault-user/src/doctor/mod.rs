//! What this machine can do.
pub(crate) mod bpf;
