//! A connection's name, the same from both of its ends.

use crate::packet::Packet;

/// An address as four words of network byte order; IPv4 is mapped (`::ffff:a.b.c.d`).
pub type Address = [u32; 4];

/// Bytes 8 to 11 of an IPv4-mapped address, as a word of network byte order.
pub const MAPPED_PREFIX: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// The address word of an IPv4 address in network byte order.
#[must_use]
#[inline(always)]
pub const fn mapped(ipv4: u32) -> Address {
    [0, 0, MAPPED_PREFIX, ipv4]
}

/// A flow's two ends in an order that does not depend on who sent the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The end whose (address, port) is the smaller one.
    pub low_address: Address,
    /// The other end.
    pub high_address: Address,
    /// Port of the low end in host byte order; 0 where the packet has no port.
    pub low_port: u16,
    /// Port of the high end in host byte order.
    pub high_port: u16,
    /// IP protocol number, as wide as it takes to leave no padding: BPF hash maps compare every byte.
    pub protocol: u32,
}

const _: () = assert!(size_of::<FlowKey>() == 40);

/// Which end of a flow a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Side {
    /// From the low end of the [`FlowKey`].
    Low = 0,
    /// From the high end.
    High = 1,
}

#[inline(always)]
fn comes_first(a: &Address, a_port: u16, b: &Address, b_port: u16) -> bool {
    // Ports differ nearly always, so they are compared first.
    if a_port != b_port {
        return a_port < b_port;
    }
    if a[3] != b[3] {
        return a[3] < b[3];
    }
    if a[2] != b[2] {
        return a[2] < b[2];
    }
    if a[1] != b[1] {
        return a[1] < b[1];
    }
    a[0] <= b[0]
}

/// The flow of a packet and the side it was sent from. ICMP echoes use their identifier as both ports.
#[must_use]
pub fn flow_of(packet: &Packet) -> (FlowKey, Side) {
    let mut key = FlowKey::default();
    let side = flow_into(packet, &mut key);
    (key, side)
}

/// [`flow_of`], with the flow written to where it is to be.
#[inline(always)]
pub fn flow_into(packet: &Packet, key: &mut FlowKey) -> Side {
    key.protocol = u32::from(packet.protocol);
    let from_low = comes_first(
        &packet.source,
        packet.source_port,
        &packet.destination,
        packet.destination_port,
    );
    if from_low {
        key.low_address = packet.source;
        key.high_address = packet.destination;
        key.low_port = packet.source_port;
        key.high_port = packet.destination_port;
        Side::Low
    } else {
        key.low_address = packet.destination;
        key.high_address = packet.source;
        key.low_port = packet.destination_port;
        key.high_port = packet.source_port;
        Side::High
    }
}
