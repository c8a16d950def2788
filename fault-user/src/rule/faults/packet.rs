//! What the kernel's programs, and what holds packets for them, are told of a fault.

use std::net::IpAddr;

use fault_common::abi::fault;
use fault_common::dns::record;

use super::{Rate, Slot};

/// What the kernel's programs are told of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketAction {
    /// Its number: a value of [`fault_common::abi::fault`].
    pub fault: u8,
    /// Its arguments, as [`fault_common::abi::fault`] says.
    pub arguments: [u64; 5],
    /// What it does may differ from one wire packet to the next, so that a super-packet must be divided.
    pub is_per_wire_packet: bool,
    /// What is shaped outside of the programs.
    pub shaper: Option<PacketShaper>,
}

/// What holds packets for longer than the programs say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PacketShaper {
    /// The wire of a rate.
    Rate(Rate),
    /// The slots of a shared medium.
    Slot(Slot),
}

impl PacketAction {
    /// An action that is decided for each wire packet; arguments that are left out are 0.
    #[must_use]
    pub fn new<const N: usize>(fault: u8, given: [u64; N]) -> Self {
        let mut arguments = [0; 5];
        arguments[..N].copy_from_slice(&given);
        Self {
            fault,
            arguments,
            is_per_wire_packet: true,
            shaper: None,
        }
    }

    /// A response to a query of DNS with these flags, and this address for queries of its type: see [`Reply`].
    ///
    /// [`Reply`]: fault_common::dns::Reply
    #[must_use]
    pub fn answer(flags: u16, address: Option<IpAddr>) -> Self {
        let kind = address.map_or(0, |address| match address {
            IpAddr::V4(_) => record::A,
            IpAddr::V6(_) => record::AAAA,
        });
        let bytes = address.map_or([0; 16], |address| match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        });
        let (halves, _) = bytes.as_chunks::<8>();
        let half = |index: usize| u64::from_ne_bytes(halves[index]);
        let arguments = [flags.into(), kind.into(), half(0), half(1)];
        Self::new(fault::ANSWER, arguments).per_wire_packet(false)
    }

    /// The same for all wire packets of a super-packet, unless `is_per_wire_packet`.
    #[must_use]
    pub fn per_wire_packet(self, is_per_wire_packet: bool) -> Self {
        Self {
            is_per_wire_packet,
            ..self
        }
    }

    /// With something that is shaped outside of the programs.
    #[must_use]
    pub fn shaped(self, shaper: PacketShaper) -> Self {
        Self {
            shaper: Some(shaper),
            ..self
        }
    }
}
