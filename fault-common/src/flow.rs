//! A connection's name, the same from both of its ends.

use crate::abi::{Flow, Owner};
use crate::matching::Service;
use crate::packet::Packet;
use crate::random::mix;

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

/// A flow's two ends in an order that does not depend on who sent the packet. It is short because hashing it is a
/// large part of what judging a packet costs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The IPv4 addresses, that of the end whose (address, port) is the smaller one first. Of IPv6 64 mixed bits of
    /// both: two connections between equal ports are taken for one once in 2^64 pairs.
    pub addresses: [u32; 2],
    /// Port of the low end in host byte order; 0 where the packet has no port.
    pub low_port: u16,
    /// Port of the high end in host byte order.
    pub high_port: u16,
    /// IP protocol number, and [`IPV6`].
    pub protocol: u32,
}

/// Set in [`FlowKey::protocol`] of IPv6.
pub const IPV6: u32 = 1 << 8;

const _: () = assert!(size_of::<FlowKey>() == 16);

/// 64 bits that every bit of an address has an effect on.
#[inline(always)]
pub(crate) const fn digest(address: &Address) -> u64 {
    let upper = ((address[0] as u64) << 32) | address[1] as u64;
    let lower = ((address[2] as u64) << 32) | address[3] as u64;
    mix(mix(upper) ^ lower)
}

/// Which end of a flow a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Side {
    /// From the low end of the [`FlowKey`].
    Low = 0,
    /// From the high end.
    High = 1,
}

impl Side {
    /// The other end.
    #[must_use]
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Low => Self::High,
            Self::High => Self::Low,
        }
    }
}

/// The ends of a packet, as bits.
pub mod end {
    /// Who sends it.
    pub const SENDER: u32 = 1;
    /// Who receives it.
    pub const RECEIVER: u32 = 2;
}

/// What the sockets at a packet's ends tell of whose it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Whose the sender's and the receiver's sockets are.
    pub owners: [Owner; 2],
    /// At which ends a socket of this host was looked for: bits of [`end`].
    pub asked: u32,
    /// At which of these there is one.
    pub found: u32,
}

impl Told {
    /// Whether a socket was found that belongs to a scope.
    #[must_use]
    #[inline(always)]
    pub const fn has_scope(&self) -> bool {
        self.owners[0].scope | self.owners[1].scope != 0
    }
}

/// A bit of [`Flow::resolved`] for each side: its end has sent something, and told whose it is.
const SENT: u8 = 1;
/// The same: it has been looked up as a receiver, or has sent something.
const LOOKED_UP: u8 = 4;
/// Stands in [`Flow::sockets`] for the sockets that belong to no scope.
const STRANGER: u32 = u32::MAX;

/// What [`Flow::sockets`] remembers of a socket; 0 is for one that has not been seen yet.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "cookies are counted up")]
const fn trace(owner: &Owner) -> u32 {
    if owner.scope == 0 {
        STRANGER
    } else {
        owner.socket as u32 | 1 << 31
    }
}

impl Flow {
    /// Begins the connection that `packet` is the first one seen of.
    #[inline(always)]
    pub const fn begin(&mut self, packet: &Packet, service: Service) {
        self.scopes = [0; 2];
        self.sockets = [[0; 2]; 2];
        self.resolved = 0;
        self.ended = [0; 2];
        self.serve(service);
        self.has_initial = packet.is_initial() as u8;
        self.initial_sequence = packet.sequence;
        let mut index = 0;
        while index < self.rules.len() {
            self.rules[index].uid = 0;
            index += 1;
        }
    }

    /// Remembers which end the service is.
    #[inline(always)]
    pub const fn serve(&mut self, service: Service) {
        self.server_side = service.side as u8;
        self.is_certain = service.is_certain as u8;
    }

    /// Whether `packet` begins another connection between the same ports: a SYN that is not the one seen before.
    #[must_use]
    #[inline(always)]
    pub const fn is_begun_anew(&self, packet: &Packet) -> bool {
        packet.is_initial() && (self.has_initial == 0 || self.initial_sequence != packet.sequence)
    }

    /// Which of a packet's `ends` a TCP connection does not know the owner of. Each end is asked once, because a
    /// connection keeps its sockets; the one that sends knows best.
    #[must_use]
    #[inline(always)]
    pub const fn unresolved(&self, sender: Side, ends: u32) -> u32 {
        let mut missing = 0;
        if self.resolved & (SENT << sender as u8) == 0 {
            missing |= end::SENDER;
        }
        if self.resolved & (LOOKED_UP << sender.other() as u8) == 0 {
            missing |= end::RECEIVER;
        }
        missing & ends
    }

    /// Has all ends asked again.
    #[inline(always)]
    pub const fn forget_owners(&mut self) {
        self.resolved = 0;
    }

    /// Takes over whose the ends of a TCP connection are.
    #[inline(always)]
    pub const fn resolve(&mut self, told: &Told, sender: Side) {
        if told.asked & end::RECEIVER != 0 {
            let side = sender.other();
            self.scopes[side as usize & 1] = told.owners[1].scope;
            self.resolved |= LOOKED_UP << side as u8;
        }
        if told.found & end::SENDER != 0 {
            // What the kernel sends for a socket that has gone tells nothing about it.
            if told.owners[0].scope != 0 {
                self.scopes[sender as usize & 1] = told.owners[0].scope;
            }
            self.resolved |= (SENT | LOOKED_UP) << sender as u8;
        }
    }

    /// Whether all sockets of a datagram are those remembered.
    #[must_use]
    #[inline(always)]
    pub const fn knows(&self, told: &Told, sender: Side) -> bool {
        let [sent, received] = self.traces(sender);
        (told.found & end::SENDER == 0 || sent == trace(&told.owners[0]))
            && (told.found & end::RECEIVER == 0 || received == trace(&told.owners[1]))
    }

    /// Whether a datagram is sent or received by another socket than the one that did so before: its port or
    /// identifier is used again, and another connection begins. Sockets are told apart by what they do, because a
    /// process may receive by one and answer by another.
    #[must_use]
    #[inline(always)]
    pub const fn is_taken_over(&self, told: &Told, sender: Side) -> bool {
        let [sent, received] = self.traces(sender);
        (told.found & end::SENDER != 0 && sent != 0 && sent != trace(&told.owners[0]))
            || (told.found & end::RECEIVER != 0
                && received != 0
                && received != trace(&told.owners[1]))
    }

    /// Remembers the sockets of a datagram.
    #[inline(always)]
    pub const fn remember(&mut self, told: &Told, sender: Side) {
        if told.found & end::SENDER != 0 {
            let at = sender as usize & 1;
            self.sockets[0][at] = trace(&told.owners[0]);
            self.scopes[at] = told.owners[0].scope;
        }
        if told.found & end::RECEIVER != 0 {
            let at = sender.other() as usize & 1;
            self.sockets[1][at] = trace(&told.owners[1]);
            self.scopes[at] = told.owners[1].scope;
        }
    }

    #[inline(always)]
    const fn traces(&self, sender: Side) -> [u32; 2] {
        [
            self.sockets[0][sender as usize & 1],
            self.sockets[1][sender.other() as usize & 1],
        ]
    }
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
    let from_low = comes_first(
        &packet.source,
        packet.source_port,
        &packet.destination,
        packet.destination_port,
    );
    let (low, high) = if from_low {
        key.low_port = packet.source_port;
        key.high_port = packet.destination_port;
        (&packet.source, &packet.destination)
    } else {
        key.low_port = packet.destination_port;
        key.high_port = packet.source_port;
        (&packet.destination, &packet.source)
    };
    key.protocol = u32::from(packet.protocol);
    if packet.ipv6 {
        key.protocol |= IPV6;
        let both = mix(digest(low)).wrapping_add(digest(high));
        #[expect(clippy::cast_possible_truncation, reason = "both halves are kept")]
        let halves = [(both >> 32) as u32, both as u32];
        key.addresses = halves;
    } else {
        key.addresses = [low[3], high[3]];
    }
    if from_low { Side::Low } else { Side::High }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;

    fn packet(ends: [(Address, u16); 2], ipv6: bool) -> Packet {
        let [(source, source_port), (destination, destination_port)] = ends;
        Packet {
            source,
            source_port,
            destination,
            destination_port,
            ipv6,
            protocol: 6,
            ..Packet::default()
        }
    }

    #[test]
    fn connections_have_keys_of_their_own() {
        let mut keys = std::collections::HashSet::new();
        for n in 0..20_000_u32 {
            // Addresses that differ in the last bits, in the first bits, and in the network alone.
            for address in [[1, 2, 3, n], [n, 2, 3, 4 << 16], [1, n << 8, 3, 5 << 16]] {
                let (key, _) = flow_of(&packet([(address, 80), ([9; 4], 443)], true));
                assert!(keys.insert(key) || n <= 4, "{address:?}");
            }
            let (key, _) = flow_of(&packet([(mapped(n), 80), (mapped(9), 443)], false));
            assert!(keys.insert(key));
        }
    }

    proptest! {
        #[test]
        fn both_directions_have_one_key(a: Address, b: Address, ports: [u16; 2], ipv6: bool) {
            let (a, b) = if ipv6 { (a, b) } else { (mapped(a[3]), mapped(b[3])) };
            let ends = [(a, ports[0]), (b, ports[1])];
            let (there, from) = flow_of(&packet(ends, ipv6));
            let (back, to) = flow_of(&packet([ends[1], ends[0]], ipv6));
            prop_assert_eq!(there, back);
            prop_assert!(from != to || ends[0] == ends[1]);
        }
    }
}
