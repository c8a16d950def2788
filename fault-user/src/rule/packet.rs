//! What the kernel's programs, and what holds packets for them, are told of a fault.

use super::faults::{Rate, Slot};

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
    pub shaper: Option<Shaper>,
}

/// What holds packets for longer than the programs say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shaper {
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
    pub fn shaped(self, shaper: Shaper) -> Self {
        Self {
            shaper: Some(shaper),
            ..self
        }
    }
}
