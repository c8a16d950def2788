//! The way of a datagram that several sockets are given, multicast or broadcast, into one of them.
//!
//! A tc program sees such a packet once, whoever receives it. Where rules are limited to a cgroup, each socket in there
//! is asked for itself, by a program at the cgroup. That one can lose a packet and do nothing else to it.

use crate::counting::Judging;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use fault_common::abi::{Counter, MATCHES_MAX};
use fault_common::flow::{FlowKey, end};
use fault_common::packet::{Load, Packet};

use crate::frame::{Frame, Losing, Near, PacketEnds};
use crate::maps::{MATCHES, SETS, Scratch, count};
use crate::skb::Skb;
use crate::{classify, flows, scope, split, trace};

/// Set in [`FlowKey::protocol`] of what one of several sockets is given.
const GROUP: u32 = 1 << 9;
/// What the program returns.
const LOSE: i32 = 0;
const PASS: i32 = 1;

/// A packet at the socket that receives it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Received(Skb<false, 0>);

impl Load for Received {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load(offset)
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.0.load_words(offset)
    }
}

impl PacketEnds for Received {
    #[inline(always)]
    fn ends(&self) -> u32 {
        end::RECEIVER
    }

    #[inline(always)]
    fn ask(&self, scratch: *mut Scratch, ends: u32) {
        // SAFETY: see `Scratch`.
        let (generation, told) = unsafe { ((*scratch).sight.generation & 1, &mut (*scratch).told) };
        told.asked = ends;
        let Some(header) = SETS.get(generation) else {
            return;
        };
        if scope::holder(self.0, header, generation, &mut told.owners[1]) {
            told.found = end::RECEIVER;
        }
    }

    /// A datagram has no listener.
    #[inline(always)]
    fn find_service(&self) {
        flows::find_service(|_, _| false);
    }
}

impl Frame for Received {
    const LINK: u32 = 0;

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.length()
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        self.0.ethertype()
    }

    #[inline(always)]
    fn glance<const N: usize>(&self) -> Option<Near> {
        self.0.glance::<N>()
    }

    #[inline(always)]
    fn segments(&self, packet: &Packet) -> u32 {
        self.0.segments(packet)
    }

    #[inline(always)]
    fn segment_size(&self, packet: &Packet) -> u32 {
        self.0.segment_size(packet)
    }

    /// The counts of one receiver are not those of another.
    #[inline(always)]
    fn single_out(&self, key: &mut FlowKey) {
        // SAFETY: the context is the program's own.
        let cookie = unsafe { bpf_get_socket_cookie(self.0.raw().cast()) };
        key.addresses[0] ^= cookie as u32;
        key.addresses[1] ^= (cookie >> 32) as u32;
        key.protocol |= GROUP;
    }
}

impl Losing for Received {
    #[inline(always)]
    fn is_concerned(&self, packet: &Packet) -> bool {
        self.0.is_group(packet)
    }

    #[inline(always)]
    fn may_judge(&self, scratch: &mut Scratch) -> bool {
        let may = only_lose(scratch);
        if !may {
            trace::passed(scratch, Counter::Group);
            count(Counter::Group);
        }
        may
    }
}

/// Whether all that the packet's rules do is to lose it.
#[inline(never)]
fn only_lose(scratch: &Scratch) -> bool {
    if scratch.matches.overflow != 0 {
        // Nobody looks at what is beyond the list.
        return false;
    }
    for index in 0..MATCHES_MAX as u32 {
        if index >= MATCHES.load() {
            break;
        }
        if let Some((rule, _)) = split::rule_at(scratch, index)
            && !rule.only_loses()
        {
            return false;
        }
    }
    true
}

/// Judges one packet and returns what is to be done with it.
#[inline(always)]
pub fn handle<C: Judging>(skb: Skb<false, 0>) -> i32 {
    // Policy: what tc has judged, because of who sent it, is not judged again; what can't be judged passes.
    if !skb.is_marked() && classify::is_lost::<C, Received>(Received(skb)) == Some(true) {
        LOSE
    } else {
        PASS
    }
}
