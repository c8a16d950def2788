//! Carries a verdict out.

use aya_ebpf::bindings::__sk_buff;
use fault_common::abi::{CORRUPT_BITS_MAX, Counter, MATCHES_MAX, action, fault};
use fault_common::decide::{Counting, Verdict, corrupt_count, corrupt_position, holding};
use fault_common::packet::{
    Load, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet,
};

use crate::maps::{ACTIONS, CORRUPT_BITS, MATCHES, SCRATCH, Scratch, count};
use crate::skb::{Any, NEXT, Skb};
use crate::{answer, classify, dns, hold, trace};

/// Whether the packet is to vanish and nothing else: most faults that fire do that.
#[inline(always)]
pub fn is_drop(verdict: &Verdict) -> bool {
    verdict.end == action::DROP || verdict.end == action::DROP_CHECKSUM
}

/// Whether [`is_drop`] tells all that rules do.
#[inline(always)]
pub fn may_only_drop() -> bool {
    ACTIONS.load() & !(1 << action::DROP | 1 << action::DROP_CHECKSUM) == 0
}

/// Does what the rules decided, unless [`is_drop`]. A change that the kernel refuses leaves the packet to pass, and is no
/// hit.
#[inline(never)]
pub fn carry_out<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> i32 {
    scratch.undone = u32::MAX;
    let done = match scratch.verdict.end {
        0 => alter::<C, EGRESS, LINK>(skb, scratch),
        action::RESET if may(action::RESET) => answer::reset_both(skb, scratch),
        _ => send_back(skb, scratch),
    };
    done.unwrap_or_else(|()| {
        count(Counter::ActionFailed);
        trace::passed(scratch, Counter::ActionFailed);
        for index in 0..MATCHES_MAX as u32 {
            if index >= MATCHES.load() {
                break;
            }
            withdraw_hit(scratch, index);
        }
        NEXT
    })
}

/// Answers the packet. A function of its own, for want of room on the stack.
#[inline(never)]
fn send_back<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    match scratch.verdict.end {
        action::REJECT_RST if may(action::REJECT_RST) => answer::refuse_with_rst(skb, scratch),
        action::REJECT_ICMP if may(action::REJECT_ICMP) => answer::refuse_with_icmp(skb, scratch),
        action::ANSWER if may(action::ANSWER) => answer::answer_query(skb, scratch),
        _ => Err(()),
    }
}

/// Takes a hit back, of those counted for the packet, when its fault is not carried out.
#[inline(never)]
fn withdraw_hit(scratch: &Scratch, hit: u32) {
    if hit >= scratch.hits {
        return;
    }
    let rule = scratch.hit_rules[hit as usize % MATCHES_MAX];
    if let Some((rule, stats, _)) = classify::rule_at(scratch, rule)
        && scratch.undone >> (rule.fault % 32) & 1 == 1
    {
        // SAFETY: the pointer is to this CPU's own entry of the map.
        let stats = unsafe { &mut *stats };
        stats.hit_packets -= 1;
        stats.hit_segments -= u64::from(scratch.sight.segments);
        stats.hit_bytes -= u64::from(scratch.sight.bytes);
    }
}

/// Whether a rule of this object may do `action`.
#[inline(always)]
fn may(action: u8) -> bool {
    ACTIONS.load() & (1 << action) != 0
}

#[inline(always)]
fn alter<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    if may(action::LEARN) && scratch.verdict.holding & holding::LEARN != 0 {
        dns::fault_learn(skb.raw());
    }
    if may(action::CORRUPT) && scratch.verdict.corrupt_bits != 0 {
        corrupt(skb, scratch)?;
        scratch.undone &= !(1 << fault::CORRUPT_VISIBLE);
    }
    if may(action::ECN) && scratch.verdict.mark_ce {
        mark_ce(skb, &scratch.packet)?;
        scratch.undone &= !(1 << fault::ECN);
    }
    if may(action::HOLD)
        && let Some(delay_ns) = scratch.verdict.held_ns()
    {
        return hold::hold::<C, EGRESS, LINK>(skb, scratch, delay_ns);
    }
    if may(action::DUPLICATE) && scratch.verdict.duplicate {
        skb.clone_onward()?;
    }
    Ok(NEXT)
}

/// Flips bits of the payload and puts the checksum right, so that the receiver reads them.
#[inline(never)]
fn corrupt<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: *mut Scratch,
) -> Result<(), ()> {
    // SAFETY: see `Scratch`; no reference lives across a call of a global function.
    let bits = unsafe {
        (*scratch).checksum_offset = checksum_offset(&(*scratch).packet);
        bits_to_flip(&*scratch)
    };
    for n in 0..CORRUPT_BITS_MAX {
        if n >= CORRUPT_BITS.load() || n >= bits {
            break;
        }
        if fault_flip(skb.raw(), n) == 0 {
            return Err(());
        }
    }
    Ok(())
}

#[inline(always)]
fn bits_to_flip(scratch: &Scratch) -> u32 {
    corrupt_count(
        scratch.verdict.corrupt_bits,
        scratch.packet.payload_length() * 8,
    )
}

/// Flips the bit that the packet's draw number `n` picks; 0 when the kernel refuses. A global function: see
/// `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_flip(skb: *mut __sk_buff, n: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; nothing is written.
    let scratch = unsafe { &*scratch };
    let (packet, key) = (&scratch.packet, scratch.verdict.corrupt_key);
    let (bits, payload_bits) = (bits_to_flip(scratch), packet.payload_length() * 8);
    if !may(action::CORRUPT) || n >= bits {
        // The verifier looks at global functions also where nobody calls them.
        return 0;
    }
    let position = corrupt_position(key, n, bits, payload_bits);
    let offset = packet.payload_offset + position / 8;
    let mask = 0x80 >> (position % 8);
    u32::from(flip(Any::of(skb), packet, scratch.checksum_offset, offset, mask).is_ok())
}

/// Where the transport checksum is, from the start of the packet; 0 where there is none.
#[inline(always)]
fn checksum_offset(packet: &Packet) -> u32 {
    let within = match packet.protocol {
        PROTOCOL_TCP => 16,
        PROTOCOL_UDP => 6,
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => 2,
        _ => return 0,
    };
    if packet.has_transport {
        packet.transport_offset + within
    } else {
        0
    }
}

#[inline(always)]
fn flip(skb: Any, packet: &Packet, checksum: u32, offset: u32, mask: u8) -> Result<(), ()> {
    let [byte] = skb.load::<1>(offset).ok_or(())?;
    let changed = byte ^ mask;
    if checksum != 0 {
        // The checksum adds 16-bit words from the transport header on.
        let shift = ((offset - packet.transport_offset) & 1) * 8;
        let word = |byte| u16::from_le(u16::from(byte) << shift);
        skb.replace_l4_sum(
            checksum,
            word(byte),
            word(changed),
            packet.protocol == PROTOCOL_UDP,
        )?;
    }
    skb.store(offset, &[changed])
}

/// Sets both ECN bits, and the IPv4 header checksum with them.
#[inline(always)]
fn mark_ce<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
) -> Result<(), ()> {
    let at = packet.network_offset;
    let [first, second] = skb.load::<2>(at).ok_or(())?;
    if packet.ipv6 {
        return skb.store_summed(at, &[first, second | 0x30]);
    }
    let marked = [first, second | 0x03];
    skb.replace_l3_sum(
        at + 10,
        u16::from_ne_bytes([first, second]),
        u16::from_ne_bytes(marked),
    )?;
    skb.store(at, &marked)
}
