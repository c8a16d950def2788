//! BPF programs, links and maps.

pub mod cgroup_link;
pub mod features;
pub mod grace;
pub mod lease;
pub mod link;
pub mod mapped;
pub mod object;
pub mod verifier;
