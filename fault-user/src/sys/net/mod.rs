//! Network devices: over netlink, their queueing disciplines, and the tap device.

pub mod clsact;
pub mod interfaces;
pub mod macvlan;
pub mod netlink;
pub mod own_links;
pub mod qdisc;
pub mod tap;

use std::net::{IpAddr, Ipv6Addr};

use fault_common::flow::Address;

/// Converts an address from the format of packets and maps; IPv4 addresses are mapped there (RFC 4291, section 2.5.5.2).
#[must_use]
pub fn ip_address(words: Address) -> IpAddr {
    let mut bytes = [0; 16];
    for (part, word) in bytes.chunks_exact_mut(4).zip(words) {
        part.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(bytes).to_canonical()
}
