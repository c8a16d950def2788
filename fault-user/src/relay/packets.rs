//! Datagrams in the packets that carry them. A relay of packets needs no sockets of its own: client and server see
//! each other's addresses, headers and errors.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;

use super::attributes::StreamDirection;
use crate::relay::exchange::TapPacket;
use crate::sys::net::tap::{HEADER_BYTES, TAG_AT, TAG_BYTES};

/// Bytes of a UDP header.
const HEADER: usize = 8;
/// Bytes of IPv6's header, and of IPv4's without options.
const V6_HEADER: usize = 40;
const V4_HEADER: usize = 20;
/// Protocol numbers.
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;
/// Every link passes packets of this size (RFC 8200).
const SIZE_ANYWHERE: usize = 1280;

/// Who sent something, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The client.
    pub client: SocketAddr,
    /// The address that it sent to.
    pub local: SocketAddr,
}

/// The packet that a datagram came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Carrier(Arc<Carried>);

#[derive(Debug, PartialEq, Eq)]
struct Carried {
    packet: TapPacket,
    headers: Headers,
    /// Its place among those of a super-packet; nothing for the only one.
    place: Option<u16>,
}

/// Where the headers of a packet are in its frame.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Headers {
    network: usize,
    transport: usize,
    payload: Range<usize>,
    from: SocketAddr,
    to: SocketAddr,
}

/// What a packet carries.
pub(crate) struct Unpacked {
    pub(crate) pair: Pair,
    pub(crate) direction: StreamDirection,
    pub(crate) datagrams: Vec<(Bytes, Carrier)>,
}

/// The datagrams of a packet, which are several in a super-packet.
///
/// # Errors
/// A packet that carries none, or a part of one: it comes back.
pub(crate) fn unpack(packet: TapPacket) -> Result<Unpacked, TapPacket> {
    let Some(headers) = Headers::find(&packet.frame) else {
        return Err(packet);
    };
    let (direction, pair) = if packet.to_client {
        let pair = Pair {
            client: headers.to,
            local: headers.from,
        };
        (StreamDirection::Downstream, pair)
    } else {
        let pair = Pair {
            client: headers.from,
            local: headers.to,
        };
        (StreamDirection::Upstream, pair)
    };
    let data = packet.frame.slice(headers.payload.clone());
    let size = segment_size(&packet.frame);
    let carrier = |place| {
        Carrier(Arc::new(Carried {
            packet: packet.clone(),
            headers: headers.clone(),
            place,
        }))
    };
    let datagrams = match size {
        Some(size) => (0..)
            .zip((0..data.len()).step_by(size))
            .map(|(place, at)| {
                let part = data.slice(at..data.len().min(at + size));
                (part, carrier(Some(place)))
            })
            .collect(),
        None => vec![(data.clone(), carrier(None))],
    };
    Ok(Unpacked {
        pair,
        direction,
        datagrams,
    })
}

/// The bytes of each datagram of a super-packet.
fn segment_size(frame: &[u8]) -> Option<usize> {
    /// Where `struct virtio_net_hdr` tells the kind of segmentation and the size, and the kind of UDP.
    const KIND_AT: usize = 1;
    const SIZE_AT: usize = 4;
    const KIND_UDP: u8 = 5;
    let size = u16::from_ne_bytes([frame[SIZE_AT], frame[SIZE_AT + 1]]);
    (frame[KIND_AT] & 0x7f == KIND_UDP && size > 0).then_some(size.into())
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

impl Headers {
    fn find(frame: &[u8]) -> Option<Self> {
        const VLAN: [u16; 2] = [0x8100, 0x88a8];
        let mut network = TAG_AT + TAG_BYTES;
        while VLAN.contains(&word(frame, network - 2)?) {
            network += 4;
        }
        match word(frame, network - 2)? {
            0x0800 => Self::find_v4(frame, network),
            0x86dd => Self::find_v6(frame, network),
            _ => None,
        }
    }

    fn find_v4(frame: &[u8], network: usize) -> Option<Self> {
        /// The bit that says that more fragments follow, and the offset.
        const FRAGMENTED: u16 = 0x3fff;
        let header = frame.get(network..network + V4_HEADER)?;
        if header[9] != UDP || word(header, 6)? & FRAGMENTED != 0 {
            return None;
        }
        let address = |at: usize| {
            let octets: [u8; 4] = header.get(at..at + 4)?.try_into().ok()?;
            Some(IpAddr::V4(octets.into()))
        };
        let transport = network + usize::from(header[0] & 0xf) * 4;
        Self::new(frame, network, transport, (address(12)?, address(16)?))
    }

    fn find_v6(frame: &[u8], network: usize) -> Option<Self> {
        let header = frame.get(network..network + V6_HEADER)?;
        let address = |at: usize| {
            let octets: [u8; 16] = header.get(at..at + 16)?.try_into().ok()?;
            Some(IpAddr::V6(octets.into()))
        };
        let addresses = (address(8)?, address(24)?);
        let (mut kind, mut transport) = (header[6], network + V6_HEADER);
        while [HOP_BY_HOP, ROUTING, DESTINATION].contains(&kind) {
            let extension = frame.get(transport..transport + 2)?;
            kind = extension[0];
            transport += (usize::from(extension[1]) + 1) * 8;
        }
        if kind != UDP {
            return None;
        }
        Self::new(frame, network, transport, addresses)
    }

    fn new(
        frame: &[u8],
        network: usize,
        transport: usize,
        (from, to): (IpAddr, IpAddr),
    ) -> Option<Self> {
        let from = SocketAddr::new(from, word(frame, transport)?);
        let to = SocketAddr::new(to, word(frame, transport + 2)?);
        let length = usize::from(word(frame, transport + 4)?);
        let start = transport + HEADER;
        // What follows a short packet fills the smallest frame of Ethernet.
        let end = if segment_size(frame).is_some() {
            frame.len()
        } else {
            transport + length
        };
        (start <= end && end <= frame.len()).then_some(Self {
            network,
            transport,
            payload: start..end,
            from,
            to,
        })
    }
}

impl Carrier {
    /// Sends on the packet with `data` in place of what it carried: in fragments, where it does not fit any more.
    ///
    /// # Errors
    /// No datagram can be so large.
    pub(crate) fn carry(&self, data: &Bytes, mut send: impl FnMut(TapPacket)) -> io::Result<()> {
        let Carried {
            packet,
            headers,
            place,
        } = &*self.0;
        let before = &packet.frame[headers.payload.clone()];
        if place.is_none() && data.as_ptr_range() == before.as_ptr_range() {
            send(packet.clone());
            return Ok(());
        }
        let mut frame = packet.frame[..headers.transport].to_vec();
        // The checksum is there, and nothing is left to be divided.
        frame[..HEADER_BYTES].fill(0);
        let mut load = udp_header(data, headers.from, headers.to)?.to_vec();
        load.extend_from_slice(data);
        let mut emit = |frame: Vec<u8>| {
            send(TapPacket {
                frame: frame.into(),
                ..packet.clone()
            });
        };
        let own = headers.payload.len() + HEADER;
        let above = headers.transport - headers.network;
        let most = if place.is_none() {
            own.max(SIZE_ANYWHERE - above)
        } else {
            load.len()
        };
        if load.len() <= most {
            let identity = identity_of(&frame, headers.network, place.unwrap_or(0));
            finish(&mut frame, headers.network, identity, &load, None);
            emit(frame);
            return Ok(());
        }
        let identity = NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed);
        let size = (most - HEADER) & !7;
        for at in (0..load.len()).step_by(size) {
            let part = &load[at..load.len().min(at + size)];
            let fragment = Fragment {
                offset: at,
                more: at + size < load.len(),
            };
            let mut frame = frame.clone();
            finish(&mut frame, headers.network, identity, part, Some(fragment));
            emit(frame);
        }
        Ok(())
    }
}

/// What tells the fragments of one datagram from others.
static NEXT_IDENTITY: AtomicU32 = AtomicU32::new(0);

/// The identity of a datagram of a super-packet, whose first one's is in the header.
fn identity_of(frame: &[u8], network: usize, place: u16) -> u32 {
    let first = word(frame, network + 4).unwrap_or(0);
    first.wrapping_add(place).into()
}

/// A part of a datagram.
#[derive(Clone, Copy)]
struct Fragment {
    offset: usize,
    more: bool,
}

/// Puts the IP header right and the load behind it.
fn finish(
    frame: &mut Vec<u8>,
    network: usize,
    identity: u32,
    load: &[u8],
    fragment: Option<Fragment>,
) {
    let is_v4 = frame[network] >> 4 == 4;
    if !is_v4 && let Some(fragment) = fragment {
        insert_fragment_header(frame, network, identity, fragment);
    }
    frame.extend_from_slice(load);
    let header = &mut frame[network..];
    let whole = u16::try_from(header.len()).unwrap_or(u16::MAX);
    if !is_v4 {
        let length = whole.saturating_sub(40);
        header[4..6].copy_from_slice(&length.to_be_bytes());
        return;
    }
    header[2..4].copy_from_slice(&whole.to_be_bytes());
    let [.., high, low] = identity.to_be_bytes();
    header[4..6].copy_from_slice(&[high, low]);
    if let Some(Fragment { offset, more }) = fragment {
        let offset = u16::try_from(offset / 8).unwrap_or(0) | u16::from(more) << 13;
        header[6..8].copy_from_slice(&offset.to_be_bytes());
    }
    header[10..12].fill(0);
    let length = usize::from(header[0] & 0xf) * 4;
    let sum = !fold(add(0, &header[..length]));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Puts a fragment header (RFC 8200, section 4.5) behind the last of the others.
fn insert_fragment_header(
    frame: &mut Vec<u8>,
    network: usize,
    identity: u32,
    Fragment { offset, more }: Fragment,
) {
    let mut next_at = network + 6;
    let mut at = network + V6_HEADER;
    while frame[next_at] != UDP && at + 1 < frame.len() {
        next_at = at;
        at += (usize::from(frame[at + 1]) + 1) * 8;
    }
    frame[next_at] = FRAGMENT;
    let offset = u16::try_from(offset).unwrap_or(0) | u16::from(more);
    let [high, low] = offset.to_be_bytes();
    frame.extend_from_slice(&[UDP, 0, high, low]);
    frame.extend_from_slice(&identity.to_be_bytes());
}

/// The header of a datagram (RFC 768).
fn udp_header(data: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<[u8; HEADER]> {
    let length = u16::try_from(HEADER + data.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut header = [0; HEADER];
    header[0..2].copy_from_slice(&from.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let mut sum = u32::from(length) + u32::from(UDP);
    for ip in [from.ip(), to.ip()] {
        sum = match ip {
            IpAddr::V4(v4) => add(sum, &Ipv4Addr::octets(&v4)),
            IpAddr::V6(v6) => add(sum, &Ipv6Addr::octets(&v6)),
        };
    }
    sum = add(add(sum, &header), data);
    let checksum = match !fold(sum) {
        // Zero would mean that there is none.
        0 => u16::MAX,
        sum => sum,
    };
    header[6..8].copy_from_slice(&checksum.to_be_bytes());
    Ok(header)
}

/// Adds 16-bit words in network byte order; at most 64 KiB do not overflow.
pub(crate) fn add(sum: u32, bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    words.fold(sum, |sum, word| {
        let low = word.get(1).copied().unwrap_or(0);
        sum + u32::from(u16::from_be_bytes([word[0], low]))
    })
}

/// The ones' complement sum (RFC 1071).
pub(crate) fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fault_common::abi::Release;

    const V4: [&str; 2] = ["10.1.2.3:4000", "192.168.0.1:53"];
    const V6: [&str; 2] = ["[fd00::1]:9", "[fd00::2]:53"];

    /// A packet between these ends, with an option of IPv4 or a header of IPv6 between, and a VLAN's tag.
    fn packet([from, to]: [&str; 2], data: &[u8]) -> TapPacket {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut frame = vec![0; TAG_AT + TAG_BYTES - 2];
        frame.extend([0x81, 0x00, 0, 7]);
        let load = [&udp_header(data, from, to).unwrap()[..], data].concat();
        match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend([0x08, 0x00]);
                let network = frame.len();
                frame.extend([0x46, 0x20, 0, 0, 0x12, 0x34, 0x40, 0, 5, UDP, 0, 0]);
                frame.extend(from.octets());
                frame.extend(to.octets());
                frame.extend([1, 1, 1, 0]);
                finish(&mut frame, network, 0x1234, &load, None);
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame.extend([0x86, 0xdd]);
                let network = frame.len();
                frame.extend([0x62, 0, 0, 1, 0, 0, DESTINATION, 5]);
                frame.extend(from.octets());
                frame.extend(to.octets());
                frame.extend([UDP, 0, 1, 4, 0, 0, 0, 0]);
                finish(&mut frame, network, 0, &load, None);
            }
            _ => unreachable!("both ends have one version"),
        }
        TapPacket {
            frame: frame.into(),
            release: Release {
                judges: 1,
                place: 2,
            },
            to_client: false,
        }
    }

    fn carried(carrier: &Carrier, data: &[u8]) -> Vec<TapPacket> {
        let mut sent = Vec::new();
        let data = Bytes::copy_from_slice(data);
        carrier.carry(&data, |packet| sent.push(packet)).unwrap();
        sent
    }

    /// Both checksums of a packet are right, and its lengths are.
    fn assert_sound(frame: &[u8]) {
        let headers = Headers::find(frame).expect("a datagram");
        let load = &frame[headers.transport..];
        let length = usize::from(word(load, 4).unwrap());
        assert_eq!(length, load.len());
        let header = &frame[headers.network..headers.transport];
        let whole = frame.len() - headers.network;
        let pseudo = if header[0] >> 4 == 4 {
            assert_eq!(usize::from(word(header, 2).unwrap()), whole);
            assert_eq!(fold(add(0, header)), 0xffff);
            &header[12..20]
        } else {
            assert_eq!(usize::from(word(header, 4).unwrap()), whole - V6_HEADER);
            &header[8..40]
        };
        let sum = add(u32::from(UDP) + u32::try_from(length).unwrap(), pseudo);
        assert_eq!(fold(add(sum, load)), 0xffff);
    }

    #[test]
    fn what_is_not_changed_is_the_same_packet() {
        for ends in [V4, V6] {
            let packet = packet(ends, b"question");
            let unpacked = unpack(packet.clone()).unwrap();
            assert_eq!(unpacked.direction, StreamDirection::Upstream);
            assert_eq!(unpacked.pair.client, ends[0].parse().unwrap());
            assert_eq!(unpacked.pair.local, ends[1].parse().unwrap());
            let [(data, carrier)] = &unpacked.datagrams[..] else {
                panic!("one datagram");
            };
            assert_eq!(data, "question");
            let mut sent = Vec::new();
            carrier.carry(data, |packet| sent.push(packet)).unwrap();
            assert_eq!(sent, [packet]);
        }
    }

    #[test]
    fn what_is_changed_has_the_same_headers_and_right_sums() {
        for ends in [V4, V6] {
            let packet = packet(ends, b"question");
            assert_sound(&packet.frame);
            let unpacked = unpack(packet.clone()).unwrap();
            let (_, carrier) = &unpacked.datagrams[0];
            for data in [&b""[..], b"odd", b"the answer", &[255; 1100]] {
                let [sent] = &carried(carrier, data)[..] else {
                    panic!("one packet");
                };
                assert_sound(&sent.frame);
                assert_eq!(sent.release, packet.release);
                let again = unpack(sent.clone()).unwrap();
                assert_eq!(again.pair, unpacked.pair);
                assert_eq!(again.datagrams[0].0, data);
                // The time to live, and the class of traffic.
                let at = Headers::find(&packet.frame).unwrap().network;
                for same in [at, at + 1, at + 7, at + 8] {
                    let is_length = same == at + 7 && ends == V6;
                    assert!(
                        is_length || sent.frame[same] == packet.frame[same],
                        "{same}"
                    );
                }
            }
            let too_large = Bytes::from(vec![0; 65_536]);
            carrier.carry(&too_large, |_| ()).unwrap_err();
        }
    }

    #[test]
    fn what_has_grown_beyond_a_link_goes_in_fragments() {
        for ends in [V4, V6] {
            let unpacked = unpack(packet(ends, &[1; 1400])).unwrap();
            let data: Vec<u8> = (0..=255).cycle().take(4000).collect();
            let sent = carried(&unpacked.datagrams[0].1, &data);
            assert_eq!(sent.len(), 3);
            let mut load = Vec::new();
            let mut identities = std::collections::HashSet::new();
            for (number, packet) in sent.iter().enumerate() {
                let at = TAG_AT + TAG_BYTES + 4;
                let (start, field, identity) = if ends == V4 {
                    let field = word(&packet.frame, at + 6).unwrap();
                    assert_eq!(fold(add(0, &packet.frame[at..at + 24])), 0xffff);
                    (
                        24,
                        ((field & 0x1fff) * 8) | (field >> 13),
                        &packet.frame[at + 4..at + 6],
                    )
                } else {
                    let field = word(&packet.frame, at + 50).unwrap();
                    assert_eq!(packet.frame[at + 40], FRAGMENT);
                    assert_eq!(packet.frame[at + 48], UDP);
                    (56, field, &packet.frame[at + 52..at + 56])
                };
                identities.insert(identity.to_vec());
                assert_eq!(usize::from(field & !7), load.len());
                assert_eq!(field & 1 == 1, number < 2, "more follow");
                load.extend_from_slice(&packet.frame[at + start..]);
                unpack(packet.clone()).map(|_| ()).unwrap_err();
            }
            assert_eq!(identities.len(), 1);
            assert_eq!(load[HEADER..], data);
        }
    }

    #[test]
    fn a_super_packet_is_divided() {
        for ends in [V4, V6] {
            let mut whole = packet(ends, b"first second last");
            let mut frame = whole.frame.to_vec();
            frame[1] = 5;
            frame[4..6].copy_from_slice(&7_u16.to_ne_bytes());
            whole.frame = frame.into();
            let unpacked = unpack(whole).unwrap();
            let parts: Vec<_> = unpacked
                .datagrams
                .iter()
                .map(|(data, _)| data.clone())
                .collect();
            assert_eq!(parts, ["first s", "econd l", "ast"]);
            for (number, (data, carrier)) in (0..).zip(&unpacked.datagrams) {
                let [sent] = &carried(carrier, data)[..] else {
                    panic!("one packet");
                };
                assert_sound(&sent.frame);
                assert_eq!(sent.frame[..HEADER_BYTES], [0; HEADER_BYTES]);
                if ends == V4 {
                    let at = TAG_AT + TAG_BYTES + 4;
                    assert_eq!(word(&sent.frame, at + 4), Some(0x1234 + number));
                }
            }
        }
    }

    #[test]
    fn what_is_no_datagram_comes_back() {
        let whole = packet(V4, b"question").frame;
        for length in 0..whole.len() {
            let packet = TapPacket {
                frame: whole.slice(..length),
                release: Release::default(),
                to_client: false,
            };
            if length >= HEADER_BYTES {
                unpack(packet).map(|_| ()).unwrap_err();
            }
        }
    }
}
