//! Turns a packet into the refusal, reset or response that answers it.

use fault_common::dns::RESPONSE_MAX;
use fault_common::packet::{Load, Packet};
use fault_common::reply::{
    ICMP_ROOM_V4, ICMP_ROOM_V6, TCP_HEADER, UDP_HEADER, icmp_header, icmp_ipv4_header,
    icmp_ipv6_start, quoted_transport, rst_header, sum_word, udp_header,
};

use crate::dns;
use crate::maps::Scratch;
use crate::skb::Skb;

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: u32 = 16;
/// The same in a UDP header.
pub const UDP_CHECKSUM: u32 = 6;
/// Words of the largest quote: an IPv4 header with all its options, or an IPv6 header with a few
/// extension headers, and the ports.
const QUOTE_WORDS_MAX: u32 = 32;

/// Answers a packet with an RST to its sender; the packet itself goes no further.
#[inline(never)]
pub fn refuse_with_rst<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    let packet = &scratch.packet;
    let partial = is_partial(skb, packet.transport_offset + TCP_CHECKSUM)?;
    cut_to_rst(skb, packet)?;
    swap_ends(skb, packet)?;
    skb.store_summed(packet.transport_offset, &rst_header(packet, true, partial))?;
    Ok(skb.send_back())
}

/// Resets a connection at both ends: an RST back to the sender of the packet, and the packet becomes
/// an RST to its receiver.
#[inline(never)]
pub fn reset_both<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    let packet = &scratch.packet;
    let partial = is_partial(skb, packet.transport_offset + TCP_CHECKSUM)?;
    cut_to_rst(skb, packet)?;
    swap_ends(skb, packet)?;
    skb.store_summed(packet.transport_offset, &rst_header(packet, true, partial))?;
    let sent = skb.clone_back();
    restore_ends(skb, packet)?;
    skb.store_summed(packet.transport_offset, &rst_header(packet, false, partial))?;
    sent.map(|()| crate::skb::NEXT)
}

/// Answers a packet with an ICMP error to its sender; the packet itself goes no further.
#[inline(never)]
pub fn refuse_with_icmp<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
) -> Result<i32, ()> {
    let packet = &scratch.packet;
    let with = scratch.verdict.reject;
    let at = packet.network_offset;
    let quote = packet.transport_offset - at + quoted_transport(packet);
    let quoted = sum_quote(skb, at, quote)?;
    skb.resize(at + quote)?;
    if packet.ipv6 {
        skb.make_room(ICMP_ROOM_V6)?;
        skb.store(at, &icmp_ipv6_start(quote))?;
        skb.store(at + 8, &address_bytes(&packet.destination))?;
        skb.store(at + 24, &address_bytes(&packet.source))?;
        skb.store(at + 40, &icmp_header(packet, with, quote, quoted))?;
    } else {
        skb.make_room(ICMP_ROOM_V4)?;
        skb.store(at, &icmp_ipv4_header(packet, quote))?;
        skb.store(at + 20, &icmp_header(packet, with, quote, quoted))?;
    }
    swap_link(skb)?;
    Ok(skb.send_back())
}

/// Answers a query of DNS as the rule says that fired last; the packet itself goes no further. In two functions, for
/// want of room on the stack.
#[inline(never)]
pub fn answer_query<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &Scratch,
) -> Result<i32, ()> {
    let length = dns::fault_respond();
    send_response(skb, &scratch.packet, length)
}

/// Makes the packet one with the message at hand, which has become a response of `length` bytes.
#[inline(never)]
fn send_response<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    length: u32,
) -> Result<i32, ()> {
    if length == 0 || length > RESPONSE_MAX {
        return Err(());
    }
    // SAFETY: see `dns::message`.
    let message = unsafe { &*dns::message().ok_or(())? };
    let at = packet.transport_offset;
    let partial = is_partial(skb, at + UDP_CHECKSUM)?;
    resize(skb, packet, at + UDP_HEADER + length)?;
    swap_ends(skb, packet)?;
    skb.store_summed(at, &udp_header(packet, length, message.sum(), partial))?;
    // The same again in a form that the verifier sees through: 1 to 512.
    let bytes = ((length - 1) & 511) + 1;
    // SAFETY: a message has more bytes than that.
    unsafe { skb.store_raw_summed(at + UDP_HEADER, message.bytes.as_ptr(), bytes) }?;
    Ok(skb.send_back())
}

/// Adds up the bytes that an ICMP error quotes. A longer chain of headers than fits is not answered.
#[inline(always)]
fn sum_quote<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    at: u32,
    quote: u32,
) -> Result<u64, ()> {
    let mut sum = 0;
    for index in 0..QUOTE_WORDS_MAX {
        if index * 4 >= quote {
            return Ok(sum);
        }
        sum = sum_word(sum, u32::from_ne_bytes(skb.load(at + index * 4).ok_or(())?));
    }
    Err(())
}

/// Whether the checksum, which is at `at`, is left to the device. The helper that adjusts a checksum for a change of the
/// payload does nothing then, which tells.
#[inline(always)]
fn is_partial<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    at: u32,
) -> Result<bool, ()> {
    let before = skb.load::<2>(at).ok_or(())?;
    skb.replace_l4_sum(at, 0, 0x1111, false)?;
    let after = skb.load::<2>(at).ok_or(())?;
    if after != before {
        skb.replace_l4_sum(at, 0x1111, 0, false)?;
    }
    Ok(after == before)
}

/// Cuts the payload and TCP options off.
#[inline(always)]
fn cut_to_rst<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
) -> Result<(), ()> {
    resize(skb, packet, packet.transport_offset + TCP_HEADER)
}

/// Has the packet end at `end`, and sets the length in the IP header.
#[inline(always)]
fn resize<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    end: u32,
) -> Result<(), ()> {
    skb.resize(end)?;
    let at = packet.network_offset;
    if packet.ipv6 {
        let length = (end - at - 40) as u16;
        return skb.store_summed(at + 4, &length.to_be_bytes());
    }
    let old = skb.load::<2>(at + 2).ok_or(())?;
    let new = ((end - at) as u16).to_be_bytes();
    skb.replace_l3_sum(at + 10, u16::from_ne_bytes(old), u16::from_ne_bytes(new))?;
    skb.store(at + 2, &new)
}

#[inline(always)]
fn address_bytes(address: &[u32; 4]) -> [u8; 16] {
    // SAFETY: both are 16 bytes without padding.
    unsafe { core::mem::transmute(*address) }
}

/// Exchanges the link layer and IP addresses of sender and receiver.
#[inline(always)]
fn swap_ends<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
) -> Result<(), ()> {
    swap_link(skb)?;
    write_addresses(skb, packet, &packet.destination, &packet.source)
}

/// Puts the addresses back as they were.
#[inline(always)]
fn restore_ends<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
) -> Result<(), ()> {
    swap_link(skb)?;
    write_addresses(skb, packet, &packet.source, &packet.destination)
}

#[inline(always)]
fn write_addresses<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    from: &[u32; 4],
    to: &[u32; 4],
) -> Result<(), ()> {
    let at = packet.network_offset;
    if packet.ipv6 {
        skb.store_summed(at + 8, &address_bytes(from))?;
        return skb.store_summed(at + 24, &address_bytes(to));
    }
    skb.store_summed(at + 12, &from[3].to_ne_bytes())?;
    skb.store_summed(at + 16, &to[3].to_ne_bytes())
}

#[inline(always)]
fn swap_link<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> Result<(), ()> {
    if LINK == 0 {
        return Ok(());
    }
    let to = skb.load::<6>(0).ok_or(())?;
    let from = skb.load::<6>(6).ok_or(())?;
    skb.store(0, &from)?;
    skb.store(6, &to)
}
