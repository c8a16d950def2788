//! The way of a packet through the XDP program, which loses packets before the kernel has made a buffer of them.
//!
//! It stands in front of the tc program at ingress, judges what it can, and leaves the rest to that one. What it has
//! judged and let pass says so in its metadata, where the tc program finds it. Rules reach it only when none of them
//! does more than lose packets, and none is limited to a cgroup: see `plan` of the daemon.

use core::arch::asm;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::bpf_xdp_adjust_meta;
use aya_ebpf::programs::XdpContext;
use fault_common::flow::end;
use fault_common::packet::{Load, Packet};

use crate::classify;
use crate::counting::Judging;
use crate::flows;
use crate::frame::{Frame, JUDGED, Losing, Near, PacketEnds};
use crate::maps::{NETNS_MARK, Scratch};
use crate::scope;

/// Headers are looked for in so many bytes.
const HEADERS_MAX: u32 = 1024;
/// What is longer, from the IP header on, may be a super-packet. XDP is not told; tc is.
const PACKET_MAX: u32 = 1500;

/// A frame with an Ethernet header, before there is a socket buffer.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Raw(*mut xdp_md);

impl Raw {
    #[inline(always)]
    pub fn new(ctx: &XdpContext) -> Self {
        Self(ctx.ctx)
    }

    /// Where the frame begins and ends.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        let (data, end): (usize, usize);
        // The fields are 32 bits wide, and LLVM copies such values by 32-bit moves, after which they are no pointers
        // to the verifier any more. What comes out of here has 64 bits.
        // SAFETY: the context is valid for as long as the program runs; the offsets are those of `struct xdp_md`.
        unsafe {
            asm!(
                "{data} = *(u32 *)({context} + 0)",
                "{end} = *(u32 *)({context} + 4)",
                context = in(reg) self.0,
                data = out(reg) data,
                end = out(reg) end,
                options(readonly, nostack)
            );
        }
        (data, end)
    }

    /// Where `bytes` bytes lie from `offset` on.
    #[inline(always)]
    fn at(&self, offset: u32, bytes: usize) -> Option<*const u8> {
        if offset > HEADERS_MAX {
            return None;
        }
        let (data, end) = self.bounds();
        let at = data + offset as usize;
        if at + bytes > end {
            return None;
        }
        Some(at as *const u8)
    }

    /// Has the frame say that it is judged.
    #[inline(always)]
    fn set_judged(&self) -> Option<()> {
        // SAFETY: the context is valid; the bounds are read anew.
        unsafe {
            if bpf_xdp_adjust_meta(self.0, -(size_of::<u32>() as i32)) != 0 {
                return None;
            }
            let (at, end) = ((*self.0).data_meta as usize, (*self.0).data as usize);
            if at + size_of::<u32>() > end {
                return None;
            }
            *(at as *mut u32) = JUDGED | NETNS_MARK.load();
        }
        Some(())
    }
}

impl Load for Raw {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: any bytes are a value, and arrays of bytes lie anywhere.
        Some(unsafe { *self.at(offset, N)?.cast() })
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: any bytes are a value.
        Some(unsafe { self.at(offset, 4 * N)?.cast::<[u32; N]>().read_unaligned() })
    }
}

impl PacketEnds for Raw {
    #[inline(always)]
    fn ends(&self) -> u32 {
        end::RECEIVER
    }

    /// No rule is limited to a cgroup.
    #[inline(always)]
    fn ask(&self, _scratch: *mut Scratch, _ends: u32) {}

    #[inline(always)]
    fn find_service(&self) {
        flows::find_service(|packet, at| {
            at == end::RECEIVER && scope::listens(self.0.cast(), packet, at)
        });
    }
}

impl Frame for Raw {
    const LINK: u32 = 14;

    #[inline(always)]
    fn length(&self) -> u32 {
        let (data, end) = self.bounds();
        (end - data) as u32
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        self.load::<2>(12).map_or(0, u16::from_be_bytes)
    }

    #[inline(always)]
    fn glance<const N: usize>(&self) -> Option<Near> {
        let (data, end) = self.bounds();
        let at = data + Self::LINK as usize;
        if at + N > end {
            return None;
        }
        // SAFETY: the bytes lie between the two bounds that the kernel gives.
        Some(unsafe { Near::new(at as *const u8) })
    }

    #[inline(always)]
    fn segments(&self, _packet: &Packet) -> u32 {
        1
    }

    #[inline(always)]
    fn segment_size(&self, packet: &Packet) -> u32 {
        packet.length()
    }
}

impl Losing for Raw {
    #[inline(always)]
    fn is_concerned(&self, _packet: &Packet) -> bool {
        true
    }

    #[inline(always)]
    fn may_judge(&self, _scratch: &mut Scratch) -> bool {
        self.set_judged().is_some()
    }
}

/// Judges one packet and returns what is to be done with it.
#[inline(always)]
pub fn handle<C: Judging>(frame: Raw) -> u32 {
    let is_small = frame.length() <= Raw::LINK + PACKET_MAX;
    if is_small && classify::is_lost::<C, Raw>(frame) == Some(true) {
        xdp_action::XDP_DROP
    } else {
        // Policy: whatever can't be judged here is the tc program's, which also counts why it passes.
        xdp_action::XDP_PASS
    }
}
