//! A thin layer over Linux: what the kernel offers, with types. Nothing here knows of rules.

pub mod bpf;
pub mod clock;
pub mod net;
pub mod preflight;
pub mod probe;
pub mod process;
pub mod version;
