//! Datagrams in the packets that carry them. A relay of packets needs no sockets of its own: client and server see
//! each other's addresses, headers and errors.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;

use super::toxic::Direction;
use crate::shaping::exchange::Packet;
use crate::shaping::tap::{HEADER_BYTES, TAG_AT, TAG_BYTES};

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
    packet: Packet,
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
    pub(crate) direction: Direction,
    pub(crate) datagrams: Vec<(Bytes, Carrier)>,
}

/// The datagrams of a packet, which are several in a super-packet.
///
/// # Errors
/// A packet that carries none, or a part of one: it comes back.
pub(crate) fn unpack(packet: Packet) -> Result<Unpacked, Packet> {
    let Some(headers) = Headers::find(&packet.frame) else {
        return Err(packet);
    };
    let (direction, pair) = if packet.to_client {
        let pair = Pair {
            client: headers.to,
            local: headers.from,
        };
        (Direction::Downstream, pair)
    } else {
        let pair = Pair {
            client: headers.from,
            local: headers.to,
        };
        (Direction::Upstream, pair)
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
    pub(crate) fn carry(&self, data: &Bytes, mut send: impl FnMut(Packet)) -> io::Result<()> {
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
            send(Packet {
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
