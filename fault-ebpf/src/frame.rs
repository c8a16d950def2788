//! What tc and XDP programs have in common: a packet that can be read.

use core::arch::asm;

use fault_common::flow::FlowKey;
use fault_common::packet::{Bytes, Load, Packet};

use crate::flows;
use crate::maps::Scratch;

/// Upper half of the metadata that an XDP program puts before a packet that it has judged; `NETNS_MARK` is the lower one.
/// An interface has one XDP program at most.
pub const JUDGED: u32 = 0xfa17_0000;

/// What the sockets at a packet's ends tell.
pub trait PacketEnds: Copy {
    /// At which ends of the packet there may be a socket of this host: bits of [`fault_common::flow::end`].
    fn ends(&self) -> u32;

    /// Asks the sockets at those of `ends` whose the packet in the scratch is, and leaves the answer there.
    fn ask(&self, scratch: *mut Scratch, ends: u32);

    /// Finds out which end of the packet's connection the service is: see `flows::fault_find_service`.
    fn find_service(&self);
}

/// A packet as a program is given it.
pub trait Frame: Load + PacketEnds {
    /// Bytes of the link layer header.
    const LINK: u32;

    /// Bytes from the link layer header on, of all segments together.
    fn length(&self) -> u32;

    /// `EtherType` in host byte order.
    fn ethertype(&self) -> u16;

    /// The first `N` bytes from the IP header on, when they lie in one piece: nothing is copied and no helper is
    /// called.
    fn glance<const N: usize>(&self) -> Option<Near>;

    /// Wire packets in this buffer: 1, or the segments of a super-packet.
    fn segments(&self, packet: &Packet) -> u32;

    /// Bytes of the largest wire packet in this buffer, from its IP header on.
    fn segment_size(&self, packet: &Packet) -> u32;

    /// Brings the connection of the packet in the scratch up to date: see `flows::renew`.
    #[inline(always)]
    fn renew(&self) {
        flows::renew(*self);
    }

    /// Enters the connection of the packet in the scratch: see `flows::insert`.
    #[inline(always)]
    fn insert(&self) {
        flows::insert(*self);
    }

    /// Makes the connection that of one receiver, where each of them is given the packet.
    #[inline(always)]
    fn single_out(&self, _key: &mut FlowKey) {}
}

/// A packet at a hook that can do no more than lose it.
pub trait Losing: Frame {
    /// Whether the packet is judged here at all.
    fn is_concerned(&self, packet: &Packet) -> bool;

    /// Whether it may be judged by the rules that it matches.
    fn may_judge(&self, scratch: &mut Scratch) -> bool;
}

/// Bytes of a packet where they lie. The words of a header need not be aligned, which the kernel's programs may read all
/// the same; Rust would read them byte by byte.
#[derive(Clone, Copy)]
pub struct Near(*const u8);

impl Near {
    /// # Safety
    /// All that is read lies between the bounds that the kernel gave, and does so for as long as this lives.
    #[inline(always)]
    pub unsafe fn new(at: *const u8) -> Self {
        Self(at)
    }

    /// What lies `bytes` further on.
    #[inline(always)]
    pub fn beyond(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl Bytes for Near {
    #[inline(always)]
    fn byte<const AT: usize>(&self) -> u8 {
        // SAFETY: see `Near::new`.
        unsafe { *self.0.add(AT) }
    }

    #[inline(always)]
    fn half<const AT: usize>(&self) -> u16 {
        let value: u64;
        // SAFETY: see `Near::new`.
        unsafe {
            asm!(
                "{value} = *(u16 *)({at} + {offset})",
                at = in(reg) self.0,
                offset = const AT,
                value = out(reg) value,
                options(readonly, nostack)
            );
        }
        u16::from_be(value as u16)
    }

    #[inline(always)]
    fn word<const AT: usize>(&self) -> u32 {
        let value: u64;
        // SAFETY: see `Near::new`.
        unsafe {
            asm!(
                "{value} = *(u32 *)({at} + {offset})",
                at = in(reg) self.0,
                offset = const AT,
                value = out(reg) value,
                options(readonly, nostack)
            );
        }
        value as u32
    }
}
