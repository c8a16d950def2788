//! Conversations put together from the packets that were seen: who began them, what was said first, how much.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use fault_common::dns;
use fault_common::flow::{FlowKey, flow_of};
use fault_common::packet::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet, TCP_ACK, TCP_SYN, parse,
};

use super::names::Lookup;
use crate::rule::Protocol;
use crate::sys::net::ip_address;

/// How many conversations are remembered.
const FLOWS_MAX: usize = 65_536;
/// How many bytes of the start of each direction are kept.
const START_MAX: usize = 600;

/// One direction of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Payload, without what was sent again.
    pub bytes: u64,
    /// Packets with payload, likewise.
    pub packets: u64,
    /// How it begins.
    pub start: Vec<u8>,
    /// The number of the byte that comes next (TCP), once that is known.
    next: Option<u32>,
}

/// A connection over TCP, or the datagrams between two sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// By what the programs in the kernel know it.
    pub key: FlowKey,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Who was spoken to.
    pub server: SocketAddr,
    /// When it began, since packets are looked at.
    pub began: Duration,
    /// How long the handshake took; nothing when it was never answered.
    pub connect: Option<Duration>,
    /// How long the first answer took.
    pub answer: Option<Duration>,
    /// When the last payload was seen.
    pub last: Duration,
    /// What the client sent.
    pub to_server: Way,
    /// What the server sent.
    pub to_client: Way,
    /// How often the client spoke after the server had, the first time included.
    pub turns: u64,
    /// The bytes of the server's first answer.
    pub response: u64,
    /// The DNS responses in it.
    pub lookups: Vec<Lookup>,
    asked: Option<Duration>,
    is_clients_turn: bool,
}

/// Protocol, client and server.
type Key = (Protocol, SocketAddr, SocketAddr);

/// All conversations so far.
#[derive(Debug, Default)]
pub struct Flows {
    flows: HashMap<Key, Conversation>,
    /// Connections that were open before, by client and server.
    open: HashSet<(SocketAddr, SocketAddr)>,
}

impl Flows {
    /// Looks at these connections too, which are open already: client and server.
    #[must_use]
    pub fn with_open(open: HashSet<(SocketAddr, SocketAddr)>) -> Self {
        Self {
            open,
            ..Self::default()
        }
    }

    /// Takes a packet that was seen at `at`: `bytes` from its IP header on, which may be cut off behind the start.
    /// `length` is what it had in all. What can't be read is ignored.
    pub fn take(&mut self, bytes: &[u8], length: u32, at: Duration) {
        let ethertype = match bytes.first().map(|first| first >> 4) {
            Some(4) => ETHERTYPE_IPV4,
            Some(6) => ETHERTYPE_IPV6,
            _ => return,
        };
        let Ok(packet) = parse(&bytes, ethertype, 0, length) else {
            return;
        };
        if packet.follows {
            return;
        }
        let payload = bytes.get(packet.payload_offset as usize..);
        let payload = payload.unwrap_or_default();
        match packet.protocol {
            PROTOCOL_TCP => self.take_segment(&packet, payload, at),
            PROTOCOL_UDP => self.take_datagram(&packet, payload, at),
            _ => {}
        }
    }

    /// The conversations, in the order in which they began.
    #[must_use]
    pub fn finish(self) -> Vec<Conversation> {
        let mut flows: Vec<_> = self.flows.into_values().collect();
        flows.sort_by_key(|flow| (flow.began, flow.server));
        flows
    }

    fn take_segment(&mut self, packet: &Packet, payload: &[u8], at: Duration) {
        let (source, destination) = ends(packet);
        match packet.tcp_flags & (TCP_SYN | TCP_ACK) {
            TCP_SYN => {
                let next = packet.sequence.wrapping_add(1);
                let flow = self.begin((Protocol::Tcp, source, destination), packet, at);
                if let Some(flow) = flow {
                    flow.to_server.next = Some(next);
                }
                return;
            }
            _ if packet.tcp_flags & TCP_SYN != 0 => {
                if let Some(flow) = self.flows.get_mut(&(Protocol::Tcp, destination, source)) {
                    flow.to_client.next = Some(packet.sequence.wrapping_add(1));
                    let took = at.saturating_sub(flow.began);
                    flow.connect.get_or_insert(took);
                }
                return;
            }
            _ => {}
        }
        if packet.payload_length() == 0 {
            return;
        }
        for (client, server) in [(source, destination), (destination, source)] {
            if self.open.contains(&(client, server)) {
                self.begin((Protocol::Tcp, client, server), packet, at);
            }
        }
        if let Some(flow) = self.flows.get_mut(&(Protocol::Tcp, source, destination)) {
            if flow.to_server.advance(packet, payload) != 0 {
                flow.client_spoke(at);
            }
        } else if let Some(flow) = self.flows.get_mut(&(Protocol::Tcp, destination, source)) {
            let bytes = flow.to_client.advance(packet, payload);
            if bytes != 0 {
                flow.server_spoke(bytes, at);
            }
        }
    }

    fn take_datagram(&mut self, packet: &Packet, payload: &[u8], at: Duration) {
        let (source, destination) = ends(packet);
        let bytes = u64::from(packet.payload_length());
        if let Some(flow) = self.flows.get_mut(&(Protocol::Udp, destination, source)) {
            if source.port() == dns::PORT {
                flow.lookups.extend(Lookup::read(payload));
            }
            flow.to_client.add(bytes, payload);
            flow.server_spoke(bytes, at);
            return;
        }
        if let Some(flow) = self.begin((Protocol::Udp, source, destination), packet, at) {
            flow.to_server.add(bytes, payload);
            flow.client_spoke(at);
        }
    }

    /// The conversation, which begins now unless it has begun; nothing where there are too many.
    fn begin(&mut self, key: Key, packet: &Packet, at: Duration) -> Option<&mut Conversation> {
        let is_full = self.flows.len() >= FLOWS_MAX;
        if is_full && !self.flows.contains_key(&key) {
            return None;
        }
        Some(self.flows.entry(key).or_insert_with(|| Conversation {
            key: flow_of(packet).0,
            protocol: key.0,
            server: key.2,
            began: at,
            connect: None,
            answer: None,
            last: at,
            to_server: Way::default(),
            to_client: Way::default(),
            turns: 0,
            response: 0,
            lookups: Vec::new(),
            asked: None,
            is_clients_turn: true,
        }))
    }
}

fn ends(packet: &Packet) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(ip_address(packet.source), packet.source_port),
        SocketAddr::new(ip_address(packet.destination), packet.destination_port),
    )
}

impl Way {
    /// Counts what is new in a segment, in bytes. The same packet is seen at several interfaces, or sent again.
    fn advance(&mut self, packet: &Packet, payload: &[u8]) -> u64 {
        let length = packet.payload_length();
        let end = packet.sequence.wrapping_add(length);
        let new = end.wrapping_sub(self.next.unwrap_or(packet.sequence));
        if new == 0 || new > u32::MAX / 2 {
            return 0;
        }
        let new = new.min(length);
        let skipped = (length - new) as usize;
        self.add(new.into(), payload.get(skipped..).unwrap_or_default());
        self.next = Some(end);
        new.into()
    }

    fn add(&mut self, bytes: u64, payload: &[u8]) {
        self.bytes += bytes;
        self.packets += 1;
        let room = START_MAX.saturating_sub(self.start.len());
        self.start.extend(payload.iter().take(room));
    }
}

impl Conversation {
    fn client_spoke(&mut self, at: Duration) {
        self.last = at;
        if self.is_clients_turn {
            self.turns += 1;
            self.asked.get_or_insert(at);
        }
        self.is_clients_turn = false;
    }

    fn server_spoke(&mut self, bytes: u64, at: Duration) {
        self.last = at;
        self.is_clients_turn = true;
        if self.turns <= 1 {
            self.response += bytes;
        }
        if let Some(asked) = self.asked {
            self.answer.get_or_insert(at.saturating_sub(asked));
        }
    }
}

#[cfg(test)]
impl Way {
    /// One packet with this payload.
    pub fn example(payload: &[u8]) -> Self {
        let mut way = Self::default();
        way.add(payload.len() as u64, payload);
        way
    }
}

#[cfg(test)]
impl Conversation {
    /// A connection that was answered.
    pub fn example(server: SocketAddr, began: Duration) -> Self {
        let mut flows = Flows::default();
        let client = SocketAddr::new(server.ip(), 1);
        let flow = flows.begin((Protocol::Tcp, client, server), &Packet::default(), began);
        let mut flow = flow.expect("there is room").clone();
        flow.connect = Some(Duration::ZERO);
        flow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: u16 = 40000;

    /// A segment over IPv4 from 10.0.0.1 to 10.0.0.2, or back.
    fn segment(back: bool, flags: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(40 + payload.len()).unwrap();
        let (from, to): (u8, u8) = if back { (2, 1) } else { (1, 2) };
        let (sport, dport): (u16, u16) = if back { (80, CLIENT) } else { (CLIENT, 80) };
        let mut bytes = vec![0x45, 0];
        bytes.extend(total.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
        bytes.extend(sport.to_be_bytes());
        bytes.extend(dport.to_be_bytes());
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        bytes
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_conversation_is_put_together() {
        let mut flows = Flows::default();
        let mut take = |back, flags, sequence, payload: &[u8], at| {
            let bytes = segment(back, flags, sequence, payload);
            // Loopback shows each packet twice.
            for _ in 0..2 {
                flows.take(&bytes, u32::try_from(bytes.len()).unwrap(), ms(at));
            }
        };
        take(false, TCP_SYN, 99, b"", 5);
        take(true, TCP_SYN | TCP_ACK, u32::MAX, b"", 6);
        take(false, TCP_ACK, 100, b"one", 10);
        take(true, TCP_ACK, 0, b"answer", 17);
        take(true, TCP_ACK, 6, b"more", 18);
        take(false, TCP_ACK, 103, b"two", 20);
        take(true, TCP_ACK, 10, b"!", 22);
        let flows = flows.finish();
        let [flow] = flows.as_slice() else {
            panic!("{flows:?}");
        };
        assert_eq!(flow.server, "10.0.0.2:80".parse().unwrap());
        assert_eq!((flow.began, flow.last), (ms(5), ms(22)));
        assert_eq!((flow.connect, flow.answer), (Some(ms(1)), Some(ms(7))));
        assert_eq!((flow.turns, flow.response), (2, 10));
        assert_eq!((flow.to_client.bytes, flow.to_client.packets), (11, 3));
        assert_eq!(flow.to_server.start, b"onetwo");
    }

    #[test]
    fn a_connection_that_is_known_to_be_open_is_looked_at() {
        let ends = ["10.0.0.1:40000", "10.0.0.2:80"].map(|end| end.parse().unwrap());
        let mut flows = Flows::with_open([(ends[0], ends[1])].into());
        for (back, sequence, payload) in [
            (false, 7000, "one"),
            (true, 9000, "answer"),
            (false, 7003, "two"),
        ] {
            let bytes = segment(back, TCP_ACK, sequence, payload.as_bytes());
            for _ in 0..2 {
                flows.take(&bytes, u32::try_from(bytes.len()).unwrap(), ms(3));
            }
        }
        let flows = flows.finish();
        let [flow] = flows.as_slice() else {
            panic!("{flows:?}");
        };
        assert_eq!((flow.server, flow.connect), (ends[1], None));
        assert_eq!(
            (flow.to_server.bytes, flow.to_client.bytes, flow.turns),
            (6, 6, 2)
        );
    }

    #[test]
    fn a_connection_that_was_open_before_is_not_looked_at() {
        let mut flows = Flows::default();
        let bytes = segment(false, TCP_ACK, 5, b"x");
        flows.take(&bytes, u32::try_from(bytes.len()).unwrap(), ms(0));
        flows.take(&[], 0, ms(0));
        flows.take(&[0x45, 1, 2], 3, ms(0));
        assert!(flows.finish().is_empty());
    }
}
