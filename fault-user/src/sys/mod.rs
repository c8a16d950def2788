//! A thin typed layer over Linux. Nothing here depends on rules.

pub mod bpf;
pub mod clock;
pub mod net;
pub mod preflight;
pub mod probe;
pub mod process;
pub mod version;
