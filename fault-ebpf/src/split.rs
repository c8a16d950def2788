//! Divides a super-packet into the wire packets that it stands for, so that each of them is judged by itself: what
//! the network would have lost, and nothing else, is lost.
//!
//! The whole is sent onward once for each segment, and every copy, when it comes by here again, is cut down to its
//! own part before it is judged. Which part that is, it carries in `tc_index`, as a judged packet carries who has
//! judged it. A copy of another instance of `fault` is cut in the same way.

use fault_common::abi::{Counter, MATCHES_MAX, rule_flag};
use fault_common::decide::in_window;
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP};

use crate::maps::{MATCHES, PIECE, RULES, Scratch, WORDS, count};
use crate::skb::Skb;

/// The most segments that are told apart; a super-packet of more is judged as one.
const SEGMENTS_MAX: u32 = 64;
/// The largest segment that a copy can be cut down to: what the kernel lets programs make of a packet is limited
/// (`BPF_SKB_MAX_LEN`, less than 16 KiB). Loopback's super-packets have larger ones.
const SEGMENT_BYTES_MAX: u32 = 12 << 10;
/// Upper bits of `tc_index` of a copy that is to be cut, the lower ones being the segment. No instance has this: see
/// `INSTANCE`.
const PART: u32 = 0xe000;
/// Bytes moved at a time.
const PIECE_BYTES: u32 = 2048;
/// Pieces of the largest segment.
const PIECES_MAX: u32 = SEGMENT_BYTES_MAX / PIECE_BYTES + 1;

const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// The segment that a copy of a super-packet is to be cut down to.
#[inline(always)]
pub fn segment_of<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> Option<u32> {
    let index = skb.tc_index();
    if index & 0xf000 == PART {
        Some(index & 0x0fff)
    } else {
        None
    }
}

/// Whether a rule that the super-packet matches asks for its wire packets one by one, and there are not too many.
#[inline(never)]
pub fn is_wanted(scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    if scratch.sight.segments > SEGMENTS_MAX
        || scratch.sight.size > SEGMENT_BYTES_MAX
        || (packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP)
    {
        return false;
    }
    for index in 0..MATCHES_MAX {
        if index >= MATCHES.load() as usize || index >= scratch.matches.count as usize {
            break;
        }
        let found = scratch.matches.items[index];
        let at = scratch.sight.generation * WORDS.load() * 64 + u32::from(found.rule);
        if let Some(rule) = RULES.get(at)
            && rule.flags & rule_flag::PER_SEGMENT != 0
            && in_window(rule, scratch.sight.since_ns)
        {
            return true;
        }
    }
    false
}

/// Sends the super-packet onward once for each segment. False when not even the first copy could be made: then the
/// packet is still whole. The scratch comes as a plain pointer, because the copies are judged meanwhile.
#[inline(never)]
pub fn divide<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: *mut Scratch,
) -> bool {
    // SAFETY: see `Scratch`; no reference lives across the sending of a copy.
    let segments = unsafe { (*scratch).sight.segments };
    for segment in 0..SEGMENTS_MAX {
        if segment >= segments {
            break;
        }
        skb.set_tc_index(PART | segment);
        if skb.clone_onward().is_err() {
            count(Counter::ActionFailed);
            if segment == 0 {
                return false;
            }
        }
    }
    true
}

/// Cuts a copy of a super-packet down to one segment. What it is then has to be read again.
///
/// Everything that segmentation offload would write is written: lengths, the IPv4 identification, the TCP sequence
/// number and flags. The checksum field of a super-packet holds the sum of its pseudo-header, of which only the length
/// changes. Source: `tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment` of Linux.
#[inline(never)]
pub fn cut<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &Scratch,
    segment: u32,
) -> Result<(), ()> {
    let packet = &scratch.packet;
    let size = skb.gso_size();
    let skipped = segment * size;
    let payload = packet.payload_length();
    if size == 0 || skipped >= payload {
        return Err(());
    }
    let rest = payload - skipped;
    let length = if rest < size { rest } else { size };
    if segment != 0 {
        move_payload(skb, packet.payload_offset, skipped, length)?;
    }
    skb.truncate(packet.payload_offset + length)?;
    let network = packet.network_offset;
    let shorter = payload - length;
    if packet.ipv6 {
        let total = packet.end - network - 40 - shorter;
        skb.store(network + 4, &(total as u16).to_be_bytes())?;
    } else {
        let total = (packet.length() - shorter) as u16;
        replace_ipv4(skb, network + 2, network + 10, |_| total)?;
        replace_ipv4(skb, network + 4, network + 10, |id| {
            id.wrapping_add(segment as u16)
        })?;
    }
    let at = packet.transport_offset;
    let before = (packet.end - at) as u16;
    let after = before - shorter as u16;
    if packet.protocol == PROTOCOL_UDP {
        skb.store(at + 4, &after.to_be_bytes())?;
        return skb.replace_pseudo_length(at + 6, before, after);
    }
    let sequence = packet.sequence.wrapping_add(skipped);
    skb.store(at + 4, &sequence.to_be_bytes())?;
    let mut flags = packet.tcp_flags;
    if rest > length {
        flags &= !TCP_FIN_PSH;
    }
    if segment != 0 {
        flags &= !TCP_CWR;
    }
    skb.store(at + 13, &[flags])?;
    skb.replace_pseudo_length(at + 16, before, after)
}

#[inline(always)]
fn replace_ipv4<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    at: u32,
    checksum: u32,
    change: impl Fn(u16) -> u16,
) -> Result<(), ()> {
    use fault_common::packet::Load as _;
    let before: [u8; 2] = skb.load(at).ok_or(())?;
    let after = change(u16::from_be_bytes(before)).to_be_bytes();
    skb.replace_l3_sum(
        checksum,
        u16::from_ne_bytes(before),
        u16::from_ne_bytes(after),
    )?;
    skb.store(at, &after)
}

/// Moves `length` bytes of payload to its start, from `skipped` bytes behind.
#[inline(never)]
fn move_payload<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    payload_offset: u32,
    skipped: u32,
    length: u32,
) -> Result<(), ()> {
    let piece = PIECE.get_ptr_mut(0).ok_or(())?.cast();
    for n in 0..PIECES_MAX {
        let done = n * PIECE_BYTES;
        if done >= length {
            return Ok(());
        }
        let to = payload_offset + done;
        let left = length - done;
        let most = if left > PIECE_BYTES {
            PIECE_BYTES
        } else {
            left
        };
        // The same again in a form that the verifier sees through: 1 to PIECE_BYTES.
        let bytes = ((most - 1) & (PIECE_BYTES - 1)) + 1;
        // SAFETY: the piece has PIECE_BYTES bytes.
        unsafe {
            skb.load_raw(to + skipped, piece, bytes)?;
            skb.store_raw(to, piece, bytes)?;
        }
    }
    Err(())
}
