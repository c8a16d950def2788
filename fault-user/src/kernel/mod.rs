//! What `fault` asks of the kernel: links, tc, BPF, and the traces that a killed instance leaves.
pub mod clsact;
pub mod interfaces;
pub mod leftovers;
pub mod netlink;
