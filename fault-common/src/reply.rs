//! The headers of the packets that refusals and resets answer with.

use crate::abi::reject;
use crate::decide::REJECT_TOO_BIG;
use crate::packet::{
    PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet, TCP_ACK, TCP_FIN, TCP_RST,
    TCP_SYN,
};

/// Bytes of a TCP header without options.
pub const TCP_HEADER: u32 = 20;
/// Bytes of a UDP header.
pub const UDP_HEADER: u32 = 8;
/// Bytes that an ICMP error for IPv4 puts in front of the packet it quotes: IPv4 and ICMP headers.
pub const ICMP_ROOM_V4: u32 = 28;
/// The same for IPv6.
pub const ICMP_ROOM_V6: u32 = 48;
/// How many bytes of a packet's transport header are quoted: the eight that RFC 792 asks for, but all of
/// a TCP header, because the kernel lets no packet be cut in front of a checksum that is still to be
/// computed.
#[must_use]
#[inline(always)]
pub const fn quoted_transport(packet: &Packet) -> u32 {
    if packet.protocol == PROTOCOL_TCP {
        TCP_HEADER
    } else {
        8
    }
}

/// Adds up bytes as the Internet checksum does (RFC 1071), in 16-bit words of native order.
#[must_use]
#[inline(always)]
pub const fn sum_word(sum: u64, word: u32) -> u64 {
    sum + word as u64
}

/// Folds a sum of native-order words into 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) as u16
}

/// The sum of the pseudo header of a packet of `length` transport bytes; the same in both directions.
#[must_use]
#[inline(always)]
pub const fn pseudo_sum(packet: &Packet, protocol: u8, length: u32) -> u64 {
    let (s, d) = (&packet.source, &packet.destination);
    let mut sum = s[3] as u64 + d[3] as u64;
    if packet.ipv6 {
        sum += s[0] as u64 + s[1] as u64 + s[2] as u64;
        sum += d[0] as u64 + d[1] as u64 + d[2] as u64;
    }
    sum + length.to_be() as u64 + (protocol as u32).to_be() as u64
}

const fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes a TCP header that resets: to the receiver of `packet` as if its sender had, or
/// (`reversed`) to its sender as if its receiver had.
///
/// The sequence number is the one that the addressee expects next, so that RFC 5961's check accepts
/// it. `partial` leaves the sum of the pseudo header in the checksum field, for a packet whose
/// checksum the device completes.
#[must_use]
#[inline(always)]
pub fn rst_header(packet: &Packet, reversed: bool, partial: bool) -> [u8; TCP_HEADER as usize] {
    let control =
        u32::from(packet.tcp_flags & TCP_SYN != 0) + u32::from(packet.tcp_flags & TCP_FIN != 0);
    let behind = packet
        .sequence
        .wrapping_add(packet.payload_length())
        .wrapping_add(control);
    let (sequence, acknowledgement) = if reversed {
        let sequence = if packet.tcp_flags & TCP_ACK == 0 {
            0
        } else {
            packet.acknowledgement
        };
        (sequence, behind)
    } else {
        (packet.sequence, packet.acknowledgement)
    };
    let (from, to) = if reversed {
        (packet.destination_port, packet.source_port)
    } else {
        (packet.source_port, packet.destination_port)
    };
    let ports = [from.to_be_bytes(), to.to_be_bytes()];
    let numbers = [sequence.to_be_bytes(), acknowledgement.to_be_bytes()];
    let ([[f0, f1], [t0, t1]], [[s0, s1, s2, s3], [a0, a1, a2, a3]]) = (ports, numbers);
    let flags = TCP_RST | TCP_ACK;
    let mut header = [
        f0, f1, t0, t1, s0, s1, s2, s3, a0, a1, a2, a3, 0x50, flags, 0, 0, 0, 0, 0, 0,
    ];
    let pseudo = pseudo_sum(packet, PROTOCOL_TCP, TCP_HEADER);
    let checksum = if partial {
        fold(pseudo)
    } else {
        let sum = pseudo
            + u64::from(word_at(&header, 0))
            + u64::from(word_at(&header, 4))
            + u64::from(word_at(&header, 8))
            + u64::from(word_at(&header, 12));
        !fold(sum)
    };
    [header[16], header[17]] = checksum.to_ne_bytes();
    header
}

/// The UDP header of what answers `packet` with `length` bytes of payload whose sum is `sum`: see [`sum_word`]. `partial`
/// is that of [`rst_header`].
#[must_use]
#[inline(always)]
pub fn udp_header(packet: &Packet, length: u32, sum: u64, partial: bool) -> [u8; 8] {
    let length = UDP_HEADER + length;
    let [f0, f1] = packet.destination_port.to_be_bytes();
    let [t0, t1] = packet.source_port.to_be_bytes();
    let [_, _, l0, l1] = length.to_be_bytes();
    let mut header = [f0, f1, t0, t1, l0, l1, 0, 0];
    let pseudo = pseudo_sum(packet, PROTOCOL_UDP, length);
    let checksum = if partial {
        fold(pseudo)
    } else {
        match !fold(pseudo + u64::from(word_at(&header, 0)) + u64::from(word_at(&header, 4)) + sum)
        {
            // Zero stands for none.
            0 => u16::MAX,
            checksum => checksum,
        }
    };
    [header[6], header[7]] = checksum.to_ne_bytes();
    header
}

/// Type, code and the four bytes behind the checksum of an ICMP error.
#[inline(always)]
const fn icmp_kind(ipv6: bool, with: u64) -> (u8, u8, u32) {
    if with & REJECT_TOO_BIG != 0 {
        let mtu = (with & 0xffff_ffff) as u32;
        // IPv4 has room for 16 bits of it (RFC 1191), IPv6 for 32 (RFC 4443).
        return if ipv6 {
            (2, 0, mtu)
        } else {
            (3, 4, mtu & 0xffff)
        };
    }
    let (host, admin, port) = if ipv6 { (3, 1, 4) } else { (1, 13, 3) };
    let code = match with {
        reject::ICMP_HOST => host,
        reject::ICMP_ADMIN => admin,
        _ => port,
    };
    (if ipv6 { 1 } else { 3 }, code, 0)
}

/// The eight bytes of the ICMP header of an error about `packet`; `quoted` is the sum of the quoted
/// bytes and `quote` their number.
#[must_use]
#[inline(always)]
pub fn icmp_header(packet: &Packet, with: u64, quote: u32, quoted: u64) -> [u8; 8] {
    let (kind, code, rest) = icmp_kind(packet.ipv6, with);
    let r = rest.to_be_bytes();
    let mut header = [kind, code, 0, 0, r[0], r[1], r[2], r[3]];
    let mut sum = quoted + u64::from(word_at(&header, 0)) + u64::from(word_at(&header, 4));
    if packet.ipv6 {
        sum += pseudo_sum(packet, PROTOCOL_ICMPV6, quote + 8);
    }
    let c = (!fold(sum)).to_ne_bytes();
    header[2] = c[0];
    header[3] = c[1];
    header
}

/// The IPv4 header of an ICMP error from the packet's destination to its source, quoting `quote` bytes.
#[must_use]
#[inline(always)]
pub fn icmp_ipv4_header(packet: &Packet, quote: u32) -> [u8; 20] {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a quote is at most 80 bytes"
    )]
    let total = ((ICMP_ROOM_V4 + quote) as u16).to_be_bytes();
    let s = packet.destination[3].to_ne_bytes();
    let d = packet.source[3].to_ne_bytes();
    // Type of service: internetwork control, as the kernel sends its own errors.
    let mut header = [
        0x45,
        0xc0,
        total[0],
        total[1],
        0,
        0,
        0,
        0,
        64,
        PROTOCOL_ICMP,
        0,
        0,
        s[0],
        s[1],
        s[2],
        s[3],
        d[0],
        d[1],
        d[2],
        d[3],
    ];
    let sum = u64::from(word_at(&header, 0))
        + u64::from(word_at(&header, 4))
        + u64::from(word_at(&header, 8))
        + u64::from(word_at(&header, 12))
        + u64::from(word_at(&header, 16));
    let c = (!fold(sum)).to_ne_bytes();
    header[10] = c[0];
    header[11] = c[1];
    header
}

/// The first eight bytes of the IPv6 header of an ICMP error that quotes `quote` bytes.
#[must_use]
#[inline(always)]
pub const fn icmp_ipv6_start(quote: u32) -> [u8; 8] {
    let length = (((quote + 8) & 0xffff) as u16).to_be_bytes();
    [0x60, 0, 0, 0, length[0], length[1], PROTOCOL_ICMPV6, 64]
}
