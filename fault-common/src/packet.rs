//! Reads the headers of a packet without trusting any length in them.
//!
//! What can't be read in full is not guessed at: the packet is [`Unparsed`], and the caller lets it
//! pass and counts why.

use crate::flow::{Address, mapped};

/// Where the bytes of a packet come from: `bpf_skb_load_bytes` in the kernel, a slice in tests.
pub trait Load {
    /// `N` bytes from `offset` on, or nothing when the packet is shorter than that.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// TCP flags, 0 for others.
    pub tcp_flags: u8,
    /// ICMP type, 0 for others.
    pub icmp_type: u8,
    /// What it is to `match=`: bits of [`kind`].
    pub kinds: u8,
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
    /// TCP sequence number, host byte order.
    pub sequence: u32,
    /// TCP acknowledgement number, host byte order.
    pub acknowledgement: u32,
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

    /// Whether this is ICMP, of either version.
    #[must_use]
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        self.protocol == PROTOCOL_ICMP || self.protocol == PROTOCOL_ICMPV6
    }

    /// Whether this is an ICMP echo request, of either version.
    #[must_use]
    #[inline(always)]
    pub const fn is_echo_request(&self) -> bool {
        (self.protocol == PROTOCOL_ICMP && self.icmp_type == 8)
            || (self.protocol == PROTOCOL_ICMPV6 && self.icmp_type == 128)
    }
}

#[inline(always)]
const fn word(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}

/// Reads a packet of `length` bytes whose network header starts at `offset` and whose `EtherType` (host
/// byte order) is `ethertype`. VLAN tags that are part of the bytes are followed.
///
/// # Errors
/// [`Unparsed`] says why the packet must be left alone.
#[inline(always)]
pub fn parse<L: Load>(
    bytes: &L,
    ethertype: u16,
    offset: u32,
    length: u32,
) -> Result<Packet, Unparsed> {
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
        ETHERTYPE_IPV4 => parse_ipv4(bytes, offset, length),
        ETHERTYPE_IPV6 => parse_ipv6(bytes, offset, length),
        _ => Err(Unparsed::NotIp),
    }
}

#[inline(always)]
fn parse_ipv4<L: Load>(bytes: &L, offset: u32, length: u32) -> Result<Packet, Unparsed> {
    let header: [u8; 20] = bytes.load(offset).ok_or(Unparsed::Truncated)?;
    let header_length = u32::from(header[0] & 0x0f) * 4;
    let total = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] >> 4 != 4 || header_length < 20 {
        return Err(Unparsed::Malformed);
    }
    // A super-packet of more than 64 KiB (BIG TCP) has a total length of 0.
    let end = if total == 0 { length } else { offset + total };
    if end > length || offset + header_length > end {
        return Err(Unparsed::Malformed);
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let packet = Packet {
        source: mapped(word([header[12], header[13], header[14], header[15]])),
        destination: mapped(word([header[16], header[17], header[18], header[19]])),
        protocol: header[9],
        ipv6: false,
        has_transport: fragment & FRAGMENT_OFFSET == 0,
        is_fragment: fragment & (FRAGMENT_OFFSET | MORE_FRAGMENTS) != 0,
        network_offset: offset,
        transport_offset: offset + header_length,
        payload_offset: offset + header_length,
        end,
        source_port: 0,
        destination_port: 0,
        tcp_flags: 0,
        icmp_type: 0,
        kinds: 0,
        ecn: header[1] & 3,
        sequence: 0,
        acknowledgement: 0,
    };
    parse_transport(bytes, packet)
}

#[inline(always)]
fn parse_ipv6<L: Load>(bytes: &L, offset: u32, length: u32) -> Result<Packet, Unparsed> {
    let header: [u8; 40] = bytes.load(offset).ok_or(Unparsed::Truncated)?;
    let payload = u32::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 {
        return Err(Unparsed::Malformed);
    }
    let end = if payload == 0 {
        length
    } else {
        offset + 40 + payload
    };
    if end > length {
        return Err(Unparsed::Malformed);
    }
    let chain = follow_extensions(bytes, header[6], offset + 40)?;
    if chain.offset > end {
        return Err(Unparsed::Malformed);
    }
    let at = |i: usize| word([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let packet = Packet {
        source: [at(8), at(12), at(16), at(20)],
        destination: [at(24), at(28), at(32), at(36)],
        protocol: chain.protocol,
        ipv6: true,
        has_transport: chain.has_transport,
        is_fragment: chain.is_fragment,
        network_offset: offset,
        transport_offset: chain.offset,
        payload_offset: chain.offset,
        end,
        source_port: 0,
        destination_port: 0,
        tcp_flags: 0,
        icmp_type: 0,
        kinds: 0,
        ecn: (header[1] >> 4) & 3,
        sequence: 0,
        acknowledgement: 0,
    };
    parse_transport(bytes, packet)
}

/// Where a chain of IPv6 extension headers ends.
struct Chain {
    protocol: u8,
    offset: u32,
    has_transport: bool,
    is_fragment: bool,
}

#[inline(always)]
fn follow_extensions<L: Load>(bytes: &L, next: u8, offset: u32) -> Result<Chain, Unparsed> {
    let mut chain = Chain {
        protocol: next,
        offset,
        has_transport: true,
        is_fragment: false,
    };
    for _ in 0..EXTENSION_HEADERS_MAX {
        let unit = match chain.protocol {
            // Hop-by-hop options, routing, destination options, mobility: length in 8 bytes less one.
            0 | 43 | 60 | 135 => 8,
            // Authentication header: length in 4 bytes less two.
            51 => 4,
            44 => 0,
            _ => return Ok(chain),
        };
        let header: [u8; 4] = bytes.load(chain.offset).ok_or(Unparsed::Truncated)?;
        if unit == 0 {
            chain.is_fragment = true;
            chain.has_transport = u16::from_be_bytes([header[2], header[3]]) & 0xfff8 == 0;
            chain.offset += 8;
        } else {
            chain.offset += u32::from(header[1]) * unit + 8;
        }
        chain.protocol = header[0];
        if !chain.has_transport {
            return Ok(chain);
        }
    }
    Err(Unparsed::Headers)
}

#[inline(always)]
fn parse_transport<L: Load>(bytes: &L, mut packet: Packet) -> Result<Packet, Unparsed> {
    if !packet.has_transport {
        packet.payload_offset = packet.transport_offset;
        packet.kinds = kind::DATA;
        return Ok(packet);
    }
    match packet.protocol {
        PROTOCOL_TCP => parse_tcp(bytes, packet),
        PROTOCOL_UDP => parse_udp(bytes, packet),
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => parse_icmp(bytes, packet),
        _ => {
            packet.has_transport = false;
            packet.kinds = kind::DATA;
            Ok(packet)
        }
    }
}

#[inline(always)]
fn parse_tcp<L: Load>(bytes: &L, mut packet: Packet) -> Result<Packet, Unparsed> {
    let at = packet.transport_offset;
    let header: [u8; 14] = bytes.load(at).ok_or(Unparsed::Truncated)?;
    let header_length = u32::from(header[12] >> 4) * 4;
    if header_length < 20 || at + header_length > packet.end {
        return Err(Unparsed::Malformed);
    }
    packet.source_port = u16::from_be_bytes([header[0], header[1]]);
    packet.destination_port = u16::from_be_bytes([header[2], header[3]]);
    packet.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    packet.acknowledgement = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    packet.tcp_flags = header[13];
    packet.payload_offset = at + header_length;
    packet.kinds = tcp_kinds(header[13], packet.payload_length());
    Ok(packet)
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
fn parse_udp<L: Load>(bytes: &L, mut packet: Packet) -> Result<Packet, Unparsed> {
    let at = packet.transport_offset;
    let header: [u8; 8] = bytes.load(at).ok_or(Unparsed::Truncated)?;
    if at + 8 > packet.end {
        return Err(Unparsed::Malformed);
    }
    packet.source_port = u16::from_be_bytes([header[0], header[1]]);
    packet.destination_port = u16::from_be_bytes([header[2], header[3]]);
    packet.payload_offset = at + 8;
    if packet.payload_length() > 0 {
        packet.kinds = kind::DATA;
    }
    Ok(packet)
}

#[inline(always)]
fn parse_icmp<L: Load>(bytes: &L, mut packet: Packet) -> Result<Packet, Unparsed> {
    let at = packet.transport_offset;
    let header: [u8; 8] = bytes.load(at).ok_or(Unparsed::Truncated)?;
    if at + 8 > packet.end {
        return Err(Unparsed::Malformed);
    }
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
    }
    packet.payload_offset = at + 8;
    if packet.payload_length() > 0 {
        packet.kinds = kind::DATA;
    }
    Ok(packet)
}
