//! Hands packets to the delay line, and takes them back from it.
//!
//! A packet goes to the delay line through its tap device, with an 802.1ad tag in front that holds a ticket: the index
//! of what the delay line is told about it. It comes back through the same device with another tag, which says where it
//! goes on. A tag costs no room in the packet, so super-packets stay whole.

use fault_common::abi::{Hold, hold_flag};
use fault_common::decide::{Counting, holding};

use crate::maps::{HOLDS, RELEASES, Scratch, TAP, TICKETS};
use crate::skb::{NEXT, Skb};

/// Gives the packet to the delay line.
#[inline(never)]
pub fn hold<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
    delay_ns: u64,
) -> Result<i32, ()> {
    if LINK == 0 {
        // The tap is an Ethernet device.
        return Err(());
    }
    let tickets = TICKETS.get_ptr_mut(0).ok_or(())?;
    // SAFETY: a map value lives until the program ends.
    let ticket = C::next(unsafe { &mut *tickets }) & 0xffff;
    let told = HOLDS.get_ptr_mut(ticket as u32).ok_or(())?;
    let (sight, verdict) = (&scratch.sight, &scratch.verdict);
    let way = if EGRESS { 0 } else { hold_flag::INGRESS };
    let twice = if verdict.duplicate {
        hold_flag::TWICE
    } else {
        0
    };
    let from = if verdict.holding & holding::TO_CLIENT != 0 {
        hold_flag::TO_CLIENT
    } else {
        0
    };
    // SAFETY: as above; a ticket is given out again only after 65,536 others.
    unsafe {
        *told = Hold {
            now_ns: sight.now_ns,
            delay_ns,
            flow: verdict.flow,
            interface: skb.ifindex(),
            bytes: sight.bytes,
            rate: verdict.rate,
            slot: verdict.slot,
            flags: way | twice | from,
            segments: sight.segments as u16,
        };
    }
    skb.push_tag(ticket as u16)?;
    Ok(Skb::<EGRESS, LINK>::redirect(TAP.load(), 0))
}

/// Sends a packet of the delay line on its way, where it is not judged again.
#[inline(always)]
pub fn release(skb: Skb<false, 14>) -> i32 {
    let Some(tag) = skb.tag() else {
        // Policy: what the stack itself sends through the tap is nobody's.
        return NEXT;
    };
    let Some(&place) = RELEASES.get(u32::from(tag)) else {
        return NEXT;
    };
    if place == 0 || skb.pop_tag().is_err() || skb.set_for_this_host().is_err() {
        return NEXT;
    }
    skb.set_judged();
    Skb::<false, 14>::redirect((place >> 1) as u32, place & 1)
}
