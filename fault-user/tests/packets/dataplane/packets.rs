//! Packets, built byte by byte, with checksums computed here and not by the code under test.

use std::net::IpAddr;

/// What a test says of a packet.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub payload: Vec<u8>,
    /// The type-of-service byte.
    pub service: u8,
}

impl Recipe {
    pub fn tcp(flags: u8, payload: &[u8]) -> Self {
        Self {
            source: "10.1.0.1".parse().unwrap(),
            destination: "10.1.0.2".parse().unwrap(),
            protocol: 6,
            source_port: 40_000,
            destination_port: 5432,
            flags,
            sequence: 1000,
            acknowledgement: 2000,
            payload: payload.to_vec(),
            service: 0,
        }
    }

    pub fn udp(payload: &[u8]) -> Self {
        Self {
            protocol: 17,
            ..Self::tcp(0, payload)
        }
    }

    pub fn ping(payload: &[u8]) -> Self {
        Self {
            protocol: 1,
            source_port: 7,
            ..Self::tcp(8, payload)
        }
    }

    /// The same over IPv6.
    pub fn v6(mut self) -> Self {
        self.source = "fd00::1".parse().unwrap();
        self.destination = "fd00::2".parse().unwrap();
        if self.protocol == 1 {
            self.protocol = 58;
            self.flags = 128;
        }
        self
    }

    /// The packet that answers this one.
    pub fn reversed(mut self) -> Self {
        std::mem::swap(&mut self.source, &mut self.destination);
        std::mem::swap(&mut self.source_port, &mut self.destination_port);
        self
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.protocol {
            6 => {
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend(self.destination_port.to_be_bytes());
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend(self.acknowledgement.to_be_bytes());
                bytes.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
            17 => {
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend(self.destination_port.to_be_bytes());
                bytes.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
                bytes.extend([0, 0]);
            }
            _ => {
                bytes.extend([self.flags, 0, 0, 0]);
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend([0, 1]);
            }
        }
        bytes.extend(&self.payload);
        if let Some(at) = checksum_at(self.protocol) {
            let sum = checksum(&[&self.pseudo(bytes.len()), &bytes]);
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    fn pseudo(&self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        match (self.source, self.destination) {
            _ if self.protocol == 1 => return bytes,
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            _ => unreachable!("both ends are of one version"),
        }
        bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        bytes.extend([0, 0, 0, self.protocol]);
        bytes
    }

    /// The IP packet, `options` (a multiple of four bytes) in its IPv4 header.
    pub fn ip(&self, options: &[u8]) -> Vec<u8> {
        let transport = self.transport();
        let mut bytes = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + options.len();
                let total = u16::try_from(header + transport.len()).unwrap();
                bytes.extend([0x40 | u8::try_from(header / 4).unwrap(), self.service]);
                bytes.extend(total.to_be_bytes());
                bytes.extend([0, 1, 0, 0, 64, self.protocol, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(options);
                let sum = checksum(&[&bytes]);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let length = u16::try_from(transport.len()).unwrap();
                bytes.extend([0x60 | self.service >> 4, self.service << 4, 0, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([self.protocol, 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            _ => unreachable!("both ends are of one version"),
        }
        bytes.extend(transport);
        bytes
    }

    /// Its fragments as frames, each with `size` bytes (a multiple of eight) behind the IP header.
    pub fn fragments(&self, identification: u16, size: usize) -> Vec<Vec<u8>> {
        let whole = self.ip(&[]);
        let is_v4 = self.source.is_ipv4();
        let (header, payload) = whole.split_at(if is_v4 { 20 } else { 40 });
        let count = payload.chunks(size).count();
        let cut = |(number, part): (usize, &[u8])| {
            let more = u16::from(number + 1 < count);
            let units = u16::try_from(number * size / 8).unwrap();
            let mut bytes = header.to_vec();
            if is_v4 {
                let total = u16::try_from(20 + part.len()).unwrap();
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                bytes[4..6].copy_from_slice(&identification.to_be_bytes());
                bytes[6..8].copy_from_slice(&(more << 13 | units).to_be_bytes());
                bytes[10..12].fill(0);
                let sum = checksum(&[&bytes]);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            } else {
                let length = u16::try_from(8 + part.len()).unwrap();
                bytes[4..6].copy_from_slice(&length.to_be_bytes());
                bytes[6] = 44;
                bytes.extend([self.protocol, 0]);
                bytes.extend((units << 3 | more).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(identification.to_be_bytes());
            }
            bytes.extend(part);
            ethernet(&bytes)
        };
        payload.chunks(size).enumerate().map(cut).collect()
    }

    /// The frame, with an Ethernet header.
    pub fn frame(&self) -> Vec<u8> {
        ethernet(&self.ip(&[]))
    }
}

/// Puts an Ethernet header in front of an IP packet.
pub fn ethernet(ip: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if ip[0] >> 4 == 4 {
        [8, 0]
    } else {
        [0x86, 0xdd]
    };
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(kind);
    frame.extend(ip);
    frame
}

/// Where the checksum lies in a transport header.
pub fn checksum_at(protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(16),
        17 => Some(6),
        1 | 58 => Some(2),
        _ => None,
    }
}

/// The Internet checksum (RFC 1071) of some byte strings, each of which starts at an even offset.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// Whether all checksums of an IP packet are right.
pub fn is_sound(ip: &[u8]) -> bool {
    let (header, protocol, addresses) = if ip[0] >> 4 == 4 {
        let header = usize::from(ip[0] & 15) * 4;
        if checksum(&[&ip[..header]]) != 0 {
            return false;
        }
        (header, ip[9], &ip[12..20])
    } else {
        (40, ip[6], &ip[8..40])
    };
    let transport = &ip[header..];
    let mut pseudo = Vec::new();
    if protocol != 1 {
        pseudo.extend(addresses);
        pseudo.extend(u32::try_from(transport.len()).unwrap().to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
    }
    checksum(&[&pseudo, transport]) == 0
}
