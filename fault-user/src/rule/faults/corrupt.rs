//! `corrupt`: bits of the payload are inverted.

use super::prelude::*;

/// The most bits that `corrupt` inverts in a packet.
pub const MAX_CORRUPT_BITS: u32 = 64;

words! {
    /// Who notices that a payload was corrupted.
    #[derive(Default)]
    CorruptMode {
        /// The checksum is made right: the application reads wrong bytes.
        #[default]
        Visible = "visible",
        /// The checksum stays as it was: the receiver drops the packet.
        Link = "link",
    }
}

fault! {
    /// Bits of the payload are inverted.
    Corrupt: packet("corrupt", "payload bits are inverted, never headers").listed(60);

    /// The share of the packets, in parts per million.
    probability: u32 => first("probability", ValueKind::Probability, "share of the packets");
    /// Bits per packet, 1 to 64.
    bits: u32 = 1 => named("bits", ValueKind::Count, "bits per packet, 1 to 64; 1 when absent");
    /// Who notices.
    mode: CorruptMode = CorruptMode::default() => first(
        "mode",
        ValueKind::Word(CorruptMode::WORDS),
        "`visible` (default): with the right checksum, the application reads wrong bytes; `link`: without, the receiver drops the packet",
    );
}

impl Definition for Corrupt {
    fn complaint(&self) -> Option<Complaint> {
        if (1..=MAX_CORRUPT_BITS).contains(&self.bits) {
            return None;
        }
        complain(
            "bits",
            format!("{} bits are too few or too many", self.bits),
            &format!("1 to {MAX_CORRUPT_BITS}"),
        )
    }

    fn packet(&self) -> Option<PacketAction> {
        let arguments = [threshold_from_ppm(self.probability), self.bits.into()];
        Some(match self.mode {
            CorruptMode::Visible => PacketAction::new(fault::CORRUPT_VISIBLE, arguments),
            CorruptMode::Link => PacketAction::new(fault::CORRUPT_LINK, arguments)
                .per_wire_packet(self.probability < PPM),
        })
    }
}
