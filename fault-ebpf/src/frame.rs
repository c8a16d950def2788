//! What tc and XDP programs have in common: a packet that can be read.

use fault_common::abi::SetHeader;
use fault_common::packet::{Load, Packet};

/// Upper half of the metadata that an XDP program puts before a packet that it has judged; `INSTANCE` is the lower one.
pub const JUDGED: u32 = 0xfa17_0000;

/// A packet as a program is given it.
pub trait Frame: Load + Copy {
    /// Bytes of the link layer header.
    const LINK: u32;

    /// Bytes from the link layer header on, of all segments together.
    fn length(&self) -> u32;

    /// `EtherType` in host byte order.
    fn ethertype(&self) -> u16;

    /// The first bytes of the IP header, up to behind the ports where it has no options, when they lie in
    /// one piece: nothing is copied and no helper is called.
    fn glance<const N: usize>(&self) -> Option<&[u8; N]>;

    /// Wire packets in this buffer: 1, or the segments of a super-packet.
    fn segments(&self, packet: &Packet) -> u32;

    /// Bytes of the largest wire packet in this buffer, from its IP header on.
    fn segment_size(&self, packet: &Packet) -> u32;

    /// The scopes of the connection's two ends: the sender's, the receiver's; 0 for none.
    fn scopes(&self, packet: &Packet, header: &SetHeader, generation: u32) -> [u64; 2];
}
