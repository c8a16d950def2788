//! Reads the headers of a packet without trusting any length in them.
//!
//! What can't be read in full is not guessed at: the packet is [`Unparsed`], and the caller lets it
//! pass and counts why.

use crate::flow::{Address, mapped};

/// Where the bytes of a packet come from: `bpf_skb_load_bytes` in the kernel, a slice in tests.
pub trait Load {
    /// `N` bytes from `offset` on, or nothing when the packet is shorter than that.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// `N` times four bytes, each as they lie there.
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }

    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0; N];
        for (at, word) in (offset..).step_by(4).zip(&mut words) {
            *word = u32::from_ne_bytes(self.load(at)?);
        }
        Some(words)
    }
}

/// The bytes of a header, read at places that are known when the program is built.
pub trait Bytes {
    /// The byte at `AT`.
    fn byte<const AT: usize>(&self) -> u8;
    /// 16 bits from `AT` on, out of network byte order.
    fn half<const AT: usize>(&self) -> u16;
    /// Four bytes from `AT` on, as they lie there.
    fn word<const AT: usize>(&self) -> u32;
}

impl<const N: usize> Bytes for [u8; N] {
    #[inline(always)]
    fn byte<const AT: usize>(&self) -> u8 {
        self[AT]
    }

    #[inline(always)]
    fn half<const AT: usize>(&self) -> u16 {
        u16::from_be_bytes([self[AT], self[AT + 1]])
    }

    #[inline(always)]
    fn word<const AT: usize>(&self) -> u32 {
        u32::from_ne_bytes([self[AT], self[AT + 1], self[AT + 2], self[AT + 3]])
    }
}

impl<const N: usize> Bytes for [u32; N] {
    #[inline(always)]
    fn byte<const AT: usize>(&self) -> u8 {
        self[AT / 4].to_ne_bytes()[AT % 4]
    }

    #[inline(always)]
    fn half<const AT: usize>(&self) -> u16 {
        u16::from_be_bytes([
            self[AT / 4].to_ne_bytes()[AT % 4],
            self[(AT + 1) / 4].to_ne_bytes()[(AT + 1) % 4],
        ])
    }

    #[inline(always)]
    fn word<const AT: usize>(&self) -> u32 {
        const { assert!(AT.is_multiple_of(4)) };
        self[AT / 4]
    }
}

/// `EtherType` of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// `EtherType` of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// `EtherType` of a VLAN tag (802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// `EtherType` of a service VLAN tag (802.1ad).
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

/// IP protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of `ICMPv6`.
pub const PROTOCOL_ICMPV6: u8 = 58;

/// TCP flag FIN.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP flag RST.
pub const TCP_RST: u8 = 0x04;
/// TCP flag PSH.
pub const TCP_PSH: u8 = 0x08;
/// TCP flag CWR.
pub const TCP_CWR: u8 = 0x80;
/// TCP flag ACK.
pub const TCP_ACK: u8 = 0x10;

/// How many IPv6 extension headers are followed before a packet counts as [`Unparsed::Headers`].
pub const EXTENSION_HEADERS_MAX: u32 = 6;
/// The offset bits of IPv4's fragment field.
const FRAGMENT_OFFSET: u16 = 0x1fff;
/// The flag in it that says that more fragments follow.
const MORE_FRAGMENTS: u16 = 0x2000;
/// How many VLAN tags are followed.
pub const VLAN_TAGS_MAX: u32 = 2;

/// What a packet is, as far as rules can ask (`match=`); bits of [`Packet::kinds`].
pub mod kind {
    /// A TCP segment with SYN, also SYN-ACK.
    pub const SYN: u8 = 1;
    /// A packet with payload after its transport header.
    pub const DATA: u8 = 2;
    /// A TCP segment with ACK and nothing else: no payload, no SYN, FIN or RST.
    pub const ACK: u8 = 4;
    /// A TCP segment with FIN.
    pub const FIN: u8 = 8;
    /// A TCP segment with RST.
    pub const RST: u8 = 16;
}

/// Why a packet could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unparsed {
    /// Neither IPv4 nor IPv6: ARP, LLDP, more than two VLAN tags, ...
    NotIp,
    /// Ends before its headers do.
    Truncated,
    /// A length or version field contradicts itself or the packet.
    Malformed,
    /// More IPv6 extension headers than [`EXTENSION_HEADERS_MAX`].
    Headers,
    /// IPv6 neighbour and router discovery, without which there is no link: never touched, as ARP is
    /// not.
    Discovery,
}

/// The headers of one packet. Offsets count from the first byte that [`Load`] gives.
#[expect(clippy::struct_excessive_bools, reason = "each says something else")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port in host byte order; the identifier of an ICMP echo; 0 where there is none.
    pub source_port: u16,
    /// Destination port in host byte order; the identifier of an ICMP echo; 0 where there is none.
    pub destination_port: u16,
    /// IP protocol number of the transport header. [`PROTOCOL_ICMPV6`] stays what it is.
    pub protocol: u8,
    /// Whether this is IPv6.
    pub ipv6: bool,
    /// Whether the transport header is there: not in the later fragments of a datagram.
    pub has_transport: bool,
    /// Whether this is a fragment, the first one included.
    pub is_fragment: bool,
    /// Whether this is a later fragment that has got its ports from the first one: see [`crate::fragment`].
    pub follows: bool,
    /// Offset of a fragment in its datagram, in units of eight bytes; 0 for the first one and for a whole packet.
    pub fragment: u16,
    /// What the fragments of one datagram have in common, as it lies in the header. Only a fragment has one.
    pub identification: u32,
    /// TCP flags, 0 for others.
    pub tcp_flags: u8,
    /// ICMP type, 0 for others.
    pub icmp_type: u8,
    /// What it is to `match=`: bits of [`kind`].
    pub kinds: u8,
    /// The type that a query of DNS asks for, where it has been read; else 0.
    pub query_type: u16,
    /// The two ECN bits of the IP header: 0 not ECT, 1 and 2 ECT, 3 CE.
    pub ecn: u8,
    /// Offset of the IP header.
    pub network_offset: u32,
    /// Offset of the transport header.
    pub transport_offset: u32,
    /// Offset of the payload; equals `end` where there is none.
    pub payload_offset: u32,
    /// Offset behind the last byte of the IP packet, without Ethernet padding.
    pub end: u32,
    /// TCP sequence number, or that of an ICMP echo, in host byte order.
    pub sequence: u32,
    /// TCP acknowledgement number, host byte order.
    pub acknowledgement: u32,
}

/// What a wire packet of a super-packet has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes of payload before it.
    pub skipped: u32,
    /// Bytes of payload in it.
    pub length: u32,
    /// Its TCP flags.
    pub tcp_flags: u8,
    /// What it is to `match=`.
    pub kinds: u8,
}

impl Packet {
    /// Bytes of the IP packet, headers included.
    #[must_use]
    #[inline(always)]
    pub const fn length(&self) -> u32 {
        self.end - self.network_offset
    }

    /// Bytes behind the transport header.
    #[must_use]
    #[inline(always)]
    pub const fn payload_length(&self) -> u32 {
        self.end - self.payload_offset
    }

    /// The `number`-th wire packet (from 0) of a super-packet whose segments have `size` bytes of payload, the last one
    /// what is left. Nothing behind the last one. Source: `tcp_gso_segment` of Linux.
    #[must_use]
    #[inline(always)]
    pub const fn part(&self, number: u32, size: u32) -> Option<Part> {
        let (payload, skipped) = (self.payload_length(), number * size);
        if size == 0 || skipped >= payload {
            return None;
        }
        let rest = payload - skipped;
        let length = if rest < size { rest } else { size };
        let mut tcp_flags = self.tcp_flags;
        if rest > length {
            tcp_flags &= !(TCP_FIN | TCP_PSH);
        }
        if number != 0 {
            tcp_flags &= !TCP_CWR;
        }
        let kinds = if self.protocol == PROTOCOL_TCP {
            tcp_kinds(tcp_flags, length)
        } else {
            self.kinds
        };
        Some(Part {
            skipped,
            length,
            tcp_flags,
            kinds,
        })
    }

    /// Makes of a super-packet one of its wire packets.
    #[inline(always)]
    pub const fn become_part(&mut self, part: &Part) {
        self.end = self.payload_offset + part.length;
        self.tcp_flags = part.tcp_flags;
        self.kinds = part.kinds;
        if self.protocol == PROTOCOL_TCP {
            self.sequence = self.sequence.wrapping_add(part.skipped);
        }
    }

    /// Whether the destination is a multicast group, or everyone on the link.
    #[must_use]
    #[inline(always)]
    pub const fn is_to_group(&self) -> bool {
        if self.ipv6 {
            return self.destination[0].to_ne_bytes()[0] == 0xff;
        }
        let address = self.destination[3];
        address.to_ne_bytes()[0] >> 4 == 0xe || address == u32::MAX
    }

    /// Whether this is a SYN that is no answer: the first packet of a TCP connection.
    #[must_use]
    #[inline(always)]
    pub const fn is_initial(&self) -> bool {
        self.protocol == PROTOCOL_TCP && self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether this is a SYN or a SYN-ACK, which tell who the server is.
    #[must_use]
    #[inline(always)]
    pub const fn is_handshake(&self) -> bool {
        self.protocol == PROTOCOL_TCP && self.tcp_flags & TCP_SYN != 0
    }

    /// Whether this is ICMP, of either version.
    #[must_use]
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        self.protocol == PROTOCOL_ICMP || self.protocol == PROTOCOL_ICMPV6
    }

    /// Whether this is the answer to an ICMP echo request, of either version.
    #[must_use]
    #[inline(always)]
    pub const fn is_echo_reply(&self) -> bool {
        self.has_transport
            && ((self.protocol == PROTOCOL_ICMP && self.icmp_type == 0)
                || (self.protocol == PROTOCOL_ICMPV6 && self.icmp_type == 129))
    }

    /// Whether the packet itself tells the sockets at its ends, so that these need not be remembered: a datagram of
    /// UDP, an ICMP echo.
    #[must_use]
    #[inline(always)]
    pub const fn tells_sockets(&self) -> bool {
        (self.has_transport && self.protocol == PROTOCOL_UDP)
            || self.is_echo_request()
            || self.is_echo_reply()
    }

    /// Whether this tells a sender that something was refused: an RST, or an ICMP error (RFC 792, RFC 4443).
    #[must_use]
    #[inline(always)]
    pub const fn is_refusal(&self) -> bool {
        match self.protocol {
            PROTOCOL_TCP => self.tcp_flags & TCP_RST != 0,
            PROTOCOL_ICMP => self.has_transport && matches!(self.icmp_type, 3 | 4 | 11 | 12),
            PROTOCOL_ICMPV6 => self.has_transport && self.icmp_type < 128,
            _ => false,
        }
    }

    /// Whether this is an ICMP echo request, of either version.
    #[must_use]
    #[inline(always)]
    pub const fn is_echo_request(&self) -> bool {
        (self.protocol == PROTOCOL_ICMP && self.icmp_type == 8)
            || (self.protocol == PROTOCOL_ICMPV6 && self.icmp_type == 128)
    }
}

/// Reads a packet of `length` bytes whose network header starts at `offset` and whose `EtherType` (host
/// byte order) is `ethertype`. VLAN tags that are part of the bytes are followed.
///
/// # Errors
/// [`Unparsed`] says why the packet must be left alone.
pub fn parse<L: Load>(
    bytes: &L,
    ethertype: u16,
    offset: u32,
    length: u32,
) -> Result<Packet, Unparsed> {
    let mut packet = Packet::default();
    parse_network(bytes, ethertype, offset, length, &mut packet)?;
    parse_extensions(bytes, &mut packet)?;
    parse_transport(bytes, &mut packet)?;
    Ok(packet)
}

/// The first third of [`parse`], written to where the packet is to be, because the kernel's programs have no room
/// for copies: the IP header. After an error `packet` holds nothing of meaning.
///
/// # Errors
/// As [`parse`].
#[inline(always)]
pub fn parse_network<L: Load>(
    bytes: &L,
    ethertype: u16,
    offset: u32,
    length: u32,
    packet: &mut Packet,
) -> Result<(), Unparsed> {
    let mut ethertype = ethertype;
    let mut offset = offset;
    for _ in 0..VLAN_TAGS_MAX {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        let tag: [u8; 4] = bytes.load(offset).ok_or(Unparsed::Truncated)?;
        ethertype = u16::from_be_bytes([tag[2], tag[3]]);
        offset += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => {
            let header: [u32; 5] = bytes.load_words(offset).ok_or(Unparsed::Truncated)?;
            let header_length = u32::from(header.byte::<0>() & 0x0f) * 4;
            read_ipv4(&header, header_length, offset, length, packet)
        }
        ETHERTYPE_IPV6 => {
            let header: [u32; 10] = bytes.load_words(offset).ok_or(Unparsed::Truncated)?;
            read_ipv6(&header, offset, length, packet)
        }
        _ => Err(Unparsed::NotIp),
    }
}

/// [`parse`] for the common kind of IPv4 packet, of which 20 bytes of `network` and 14 of `transport` can be read: TCP or
/// UDP, without options and not a fragment, so that every field is where it always is. Nothing for any other kind.
#[inline(always)]
pub fn parse_plain_ipv4<B: Bytes>(
    network: &B,
    transport: &B,
    offset: u32,
    length: u32,
    packet: &mut Packet,
) -> Option<Result<(), Unparsed>> {
    let is_fragment = network.half::<6>() & (FRAGMENT_OFFSET | MORE_FRAGMENTS) != 0;
    if network.byte::<0>() != 0x45 || is_fragment {
        return None;
    }
    let protocol = network.byte::<9>();
    if protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP {
        return None;
    }
    if let Err(error) = read_ipv4(network, 20, offset, length, packet) {
        return Some(Err(error));
    }
    Some(plain_transport(protocol, transport, packet))
}

/// [`parse`] for the common kind of IPv6 packet, of which 40 bytes of `network` and 14 of `transport` can be read: TCP or
/// UDP without extension headers. Nothing for any other kind.
#[inline(always)]
pub fn parse_plain_ipv6<B: Bytes>(
    network: &B,
    transport: &B,
    offset: u32,
    length: u32,
    packet: &mut Packet,
) -> Option<Result<(), Unparsed>> {
    let protocol = network.byte::<6>();
    if protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP {
        return None;
    }
    if let Err(error) = read_ipv6(network, offset, length, packet) {
        return Some(Err(error));
    }
    Some(plain_transport(protocol, transport, packet))
}

#[inline(always)]
fn plain_transport<B: Bytes>(
    protocol: u8,
    header: &B,
    packet: &mut Packet,
) -> Result<(), Unparsed> {
    if protocol == PROTOCOL_TCP {
        read_tcp(header, packet)
    } else {
        read_udp(header, packet)
    }
}

#[inline(always)]
fn read_ipv4<B: Bytes>(
    header: &B,
    header_length: u32,
    offset: u32,
    length: u32,
    packet: &mut Packet,
) -> Result<(), Unparsed> {
    let total = u32::from(header.half::<2>());
    if header.byte::<0>() >> 4 != 4 || header_length < 20 {
        return Err(Unparsed::Malformed);
    }
    // A super-packet of more than 64 KiB (BIG TCP) has a total length of 0.
    let end = if total == 0 { length } else { offset + total };
    if end > length || offset + header_length > end {
        return Err(Unparsed::Malformed);
    }
    let fragment = header.half::<6>();
    packet.fragment = fragment & FRAGMENT_OFFSET;
    packet.source = mapped(header.word::<12>());
    packet.destination = mapped(header.word::<16>());
    packet.protocol = header.byte::<9>();
    packet.ipv6 = false;
    packet.has_transport = packet.fragment == 0;
    packet.is_fragment = fragment & (FRAGMENT_OFFSET | MORE_FRAGMENTS) != 0;
    packet.follows = false;
    if packet.is_fragment {
        packet.identification = u32::from(header.half::<4>());
    }
    packet.network_offset = offset;
    packet.transport_offset = offset + header_length;
    packet.end = end;
    packet.ecn = header.byte::<1>() & 3;
    Ok(())
}

#[inline(always)]
fn read_ipv6<B: Bytes>(
    header: &B,
    offset: u32,
    length: u32,
    packet: &mut Packet,
) -> Result<(), Unparsed> {
    let payload = u32::from(header.half::<4>());
    if header.byte::<0>() >> 4 != 6 {
        return Err(Unparsed::Malformed);
    }
    let end = if payload == 0 {
        length
    } else {
        offset + 40 + payload
    };
    if end > length || offset + 40 > end {
        return Err(Unparsed::Malformed);
    }
    packet.source = [
        header.word::<8>(),
        header.word::<12>(),
        header.word::<16>(),
        header.word::<20>(),
    ];
    packet.destination = [
        header.word::<24>(),
        header.word::<28>(),
        header.word::<32>(),
        header.word::<36>(),
    ];
    packet.protocol = header.byte::<6>();
    packet.ipv6 = true;
    packet.has_transport = true;
    packet.is_fragment = false;
    packet.follows = false;
    packet.fragment = 0;
    packet.network_offset = offset;
    packet.transport_offset = offset + 40;
    packet.end = end;
    packet.ecn = (header.byte::<1>() >> 4) & 3;
    Ok(())
}

/// The second third of [`parse`]: follows the chain of IPv6 extension headers to its end.
///
/// # Errors
/// As [`parse`].
#[inline(always)]
pub fn parse_extensions<L: Load>(bytes: &L, packet: &mut Packet) -> Result<(), Unparsed> {
    if !packet.ipv6 {
        return Ok(());
    }
    for _ in 0..EXTENSION_HEADERS_MAX {
        let unit = match packet.protocol {
            // Hop-by-hop options, routing, destination options, mobility: length in 8 bytes less one.
            0 | 43 | 60 | 135 => 8,
            // Authentication header: length in 4 bytes less two.
            51 => 4,
            44 => 0,
            _ => return Ok(()),
        };
        let at = packet.transport_offset;
        let header: [u32; 2] = bytes.load_words(at).ok_or(Unparsed::Truncated)?;
        let size = if unit == 0 {
            packet.is_fragment = true;
            packet.fragment = header.half::<2>() >> 3;
            packet.has_transport = packet.fragment == 0;
            packet.identification = header.word::<4>();
            8
        } else {
            u32::from(header.byte::<1>()) * unit + 8
        };
        if at + size > packet.end {
            return Err(Unparsed::Malformed);
        }
        packet.transport_offset = at + size;
        packet.protocol = header.byte::<0>();
        if !packet.has_transport {
            return Ok(());
        }
    }
    Err(Unparsed::Headers)
}

/// The last third of [`parse`].
///
/// # Errors
/// As [`parse`].
#[inline(always)]
pub fn parse_transport<L: Load>(bytes: &L, packet: &mut Packet) -> Result<(), Unparsed> {
    let at = packet.transport_offset;
    match packet.protocol {
        _ if !packet.has_transport => opaque(packet),
        PROTOCOL_TCP => {
            return read_tcp(&bytes.load::<14>(at).ok_or(Unparsed::Truncated)?, packet);
        }
        PROTOCOL_UDP => {
            return read_udp(&bytes.load::<8>(at).ok_or(Unparsed::Truncated)?, packet);
        }
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => {
            return read_icmp(&bytes.load(at).ok_or(Unparsed::Truncated)?, packet);
        }
        _ => opaque(packet),
    }
    Ok(())
}

/// A packet in whose transport nothing is read.
#[inline(always)]
const fn opaque(packet: &mut Packet) {
    packet.has_transport = false;
    packet.source_port = 0;
    packet.destination_port = 0;
    packet.tcp_flags = 0;
    packet.icmp_type = 0;
    packet.kinds = kind::DATA;
    packet.payload_offset = packet.transport_offset;
    packet.sequence = 0;
    packet.acknowledgement = 0;
}

#[inline(always)]
fn read_tcp<B: Bytes>(header: &B, packet: &mut Packet) -> Result<(), Unparsed> {
    let at = packet.transport_offset;
    let header_length = u32::from(header.byte::<12>() >> 4) * 4;
    if header_length < 20 || at + header_length > packet.end {
        return Err(Unparsed::Malformed);
    }
    packet.source_port = header.half::<0>();
    packet.destination_port = header.half::<2>();
    packet.sequence = u32::from_be(header.word::<4>());
    packet.acknowledgement = u32::from_be(header.word::<8>());
    packet.tcp_flags = header.byte::<13>();
    packet.icmp_type = 0;
    packet.payload_offset = at + header_length;
    packet.kinds = tcp_kinds(packet.tcp_flags, packet.payload_length());
    Ok(())
}

#[inline(always)]
const fn tcp_kinds(flags: u8, payload: u32) -> u8 {
    let mut kinds = 0;
    if flags & TCP_SYN != 0 {
        kinds |= kind::SYN;
    }
    if flags & TCP_FIN != 0 {
        kinds |= kind::FIN;
    }
    if flags & TCP_RST != 0 {
        kinds |= kind::RST;
    }
    if payload > 0 {
        kinds |= kind::DATA;
    }
    if kinds == 0 && flags & TCP_ACK != 0 {
        kinds = kind::ACK;
    }
    kinds
}

#[inline(always)]
fn read_udp<B: Bytes>(header: &B, packet: &mut Packet) -> Result<(), Unparsed> {
    opaque(packet);
    packet.has_transport = true;
    packet.source_port = header.half::<0>();
    packet.destination_port = header.half::<2>();
    end_of_header(packet)
}

#[inline(always)]
fn read_icmp(header: &[u8; 8], packet: &mut Packet) -> Result<(), Unparsed> {
    opaque(packet);
    packet.has_transport = true;
    packet.icmp_type = header[0];
    if packet.protocol == PROTOCOL_ICMPV6 && header[0] >= 133 && header[0] <= 137 {
        return Err(Unparsed::Discovery);
    }
    let is_echo = match packet.protocol {
        PROTOCOL_ICMP => header[0] == 8 || header[0] == 0,
        _ => header[0] == 128 || header[0] == 129,
    };
    if is_echo {
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        packet.source_port = identifier;
        packet.destination_port = identifier;
        packet.sequence = u16::from_be_bytes([header[6], header[7]]).into();
    }
    end_of_header(packet)
}

/// Where the payload begins behind a header of eight bytes.
#[inline(always)]
const fn end_of_header(packet: &mut Packet) -> Result<(), Unparsed> {
    packet.payload_offset = packet.transport_offset + 8;
    if packet.payload_offset > packet.end {
        return Err(Unparsed::Malformed);
    }
    packet.kinds = if packet.payload_length() > 0 {
        kind::DATA
    } else {
        0
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_parts_make_up_the_whole(payload in 1..70_000_u32, size in 1..9_000_u32, tcp_flags: u8) {
            let whole = Packet {
                protocol: PROTOCOL_TCP,
                payload_offset: 54,
                end: 54 + payload,
                tcp_flags,
                ..Packet::default()
            };
            let (mut end, mut number) = (0, 0);
            let mut flags = 0;
            while let Some(part) = whole.part(number, size) {
                prop_assert_eq!(part.skipped, end);
                prop_assert!(part.length > 0 && part.length <= size);
                prop_assert!(number == 0 || part.tcp_flags & TCP_CWR == 0);
                end += part.length;
                number += 1;
                flags |= part.tcp_flags;
                prop_assert!(end == payload || part.tcp_flags & (TCP_FIN | TCP_PSH) == 0);
                prop_assert!(part.kinds & kind::DATA != 0);
            }
            prop_assert_eq!(end, payload);
            prop_assert_eq!(number, payload.div_ceil(size));
            prop_assert_eq!(flags, tcp_flags);
        }
    }
}
