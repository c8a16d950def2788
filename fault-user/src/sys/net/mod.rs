//! Network devices: over netlink, their queueing disciplines, and the tap device.

pub mod clsact;
pub mod interfaces;
pub mod netlink;
pub mod own_links;
pub mod qdisc;
pub mod tap;
