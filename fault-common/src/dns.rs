//! Reads DNS messages (RFC 1035) without trusting any length or pointer in them.
//!
//! What is read on the way lies in the [`Message`] itself rather than in registers: to the kernel's
//! verifier that is one unknown value, so the paths through a name do not multiply.

use crate::flow::{Address, mapped};
use crate::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet};
use crate::reply::sum_word;

/// The port of DNS servers.
pub const PORT: u16 = 53;
/// Where Docker's DNS server is, as the containers of a network that a user has created see it.
pub const DOCKER: Address = mapped(u32::from_ne_bytes([127, 0, 0, 11]));
/// Bytes of a message that are read; what lies behind is cut off.
pub const MESSAGE_BYTES: usize = 4096;
/// Bytes of a header.
const HEADER_BYTES: u32 = 12;
/// A pointer to the question's name, which lies behind the header.
const QUESTION_POINTER: u16 = 0xc00c;
/// Bytes of type and class behind the name of a question.
const QUESTION_TAIL: u32 = 4;
/// Bytes of type, class, time to live and length behind the owner of a record.
const RECORD_TAIL: u32 = 10;
/// Bytes of a [`NameKey`]; a name on the wire has 255 at most.
pub const NAME_BYTES: usize = 256;
/// Bits of one.
pub const KEY_BITS: u32 = 2048;
/// Bytes of a name on the wire without the root at its end.
const NAME_MAX: u32 = 254;
/// Most steps through a name: a byte each, or a pointer. The longest name may have 32 pointers.
pub const STEPS_MAX: u32 = NAME_MAX + 1 + 32;
/// Most answers of one message that are read: more of them do not fit [`MESSAGE_BYTES`].
pub const ANSWERS_MAX: u32 = 256;

/// The ports that Docker's DNS server ([`DOCKER`]) really has. Docker has iptables translate port 53 to them on the way
/// out (`DNAT` in `OUTPUT`, and the source of responses back to 53), so a query is on loopback translated already, while
/// its response is so no more. Rules name the port that the client named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DockerPorts {
    /// UDP's, in host byte order; 0 where there is none.
    pub udp: u16,
    /// TCP's, likewise.
    pub tcp: u16,
}

impl DockerPorts {
    /// As one number that a program is given at its start: UDP's in the lower half.
    #[must_use]
    pub const fn packed(self) -> u32 {
        (self.tcp as u32) << 16 | self.udp as u32
    }

    /// The reverse of [`DockerPorts::packed`].
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "each half on its own")]
    pub const fn unpacked(ports: u32) -> Self {
        Self {
            udp: ports as u16,
            tcp: (ports >> 16) as u16,
        }
    }

    #[inline(always)]
    fn of(self, protocol: u8) -> u16 {
        match protocol {
            PROTOCOL_UDP => self.udp,
            PROTOCOL_TCP => self.tcp,
            _ => 0,
        }
    }

    /// Gives a translated query the port that its client named.
    #[inline(always)]
    pub fn name(self, packet: &mut Packet) {
        let port = self.of(packet.protocol);
        if port != 0 && packet.destination_port == port && packet.destination == DOCKER {
            packet.destination_port = PORT;
        }
    }

    /// Gives a query that [`DockerPorts::name`] has changed the port that it has on loopback.
    #[inline(always)]
    pub fn translate(self, packet: &mut Packet) {
        let port = self.of(packet.protocol);
        if port != 0 && packet.destination_port == PORT && packet.destination == DOCKER {
            packet.destination_port = port;
        }
    }

    /// What must be written into a packet that comes in on loopback a second time, without what connection tracking knew
    /// of it: the offset in the transport header, the port there and the port to write. So it is the same connection
    /// again, and is translated as it was before: a query has port 53 there, a response the server's own.
    #[must_use]
    #[inline(always)]
    pub fn rewrite(self, packet: &Packet) -> Option<(u32, u16, u16)> {
        let port = self.of(packet.protocol);
        if port == 0 || !packet.has_transport {
            None
        } else if packet.destination_port == port && packet.destination == DOCKER {
            Some((2, port, PORT))
        } else if packet.source_port == PORT && packet.source == DOCKER {
            Some((0, PORT, port))
        } else {
            None
        }
    }
}

/// Types of records.
pub mod record {
    /// An IPv4 address.
    pub const A: u16 = 1;
    /// An IPv6 address.
    pub const AAAA: u16 = 28;
}

/// The class of the internet.
const CLASS_INTERNET: u16 = 1;
/// The flag of a response.
const FLAG_RESPONSE: u16 = 0x8000;
/// The bits of the operation; 0 is a query.
const FLAGS_OPERATION: u16 = 0x7800;
/// The flag of a server that asks others.
const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
/// The flags that a response has of its query: recursion desired, checking disabled.
const FLAGS_KEPT: u16 = 0x0110;
/// The type of the record for extensions (RFC 6891).
const TYPE_EXTENSIONS: u16 = 41;
/// Bytes of such a record without options.
const EXTENSIONS_BYTES: u32 = 11;
/// The flag in it by which signatures are asked for.
const FLAG_SIGNATURES: u16 = 0x8000;
/// The largest datagram that the answers' server takes, as most servers do.
const DATAGRAM_BYTES: u16 = 1232;
/// Bytes of the longest response that [`Message::answer`] makes, to the next multiple of four.
pub const RESPONSE_MAX: u32 = 312;
/// The flag of a response that has been cut off to fit its datagram.
pub const FLAG_TRUNCATED: u16 = 0x0200;

/// A message, and what is being read of it. In the kernel it lies in a map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Its bytes; those from `length` on are of earlier messages.
    pub bytes: [u8; MESSAGE_BYTES],
    /// How many there are, at most [`MESSAGE_BYTES`].
    pub length: u32,
    /// Where [`Message::read_name`] is.
    cursor: Cursor,
    /// The names of rules that it is about, as bits. The caller keeps them here.
    pub names: u64,
    /// Where what follows the question begins. The caller keeps it here.
    pub question_end: u32,
    /// Always zero.
    padding: u32,
    /// The name that was read last: from [`NAME_BYTES`] downwards the key, before it room for the length of the key, and
    /// behind it zeros.
    name: [u8; KEY_AT + 2 * NAME_BYTES],
}

/// Bytes before a key for the number of its bits, which the kernel's tries want there.
pub const KEY_AT: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// The next byte.
    at: u32,
    /// Bytes of the label at hand that are left.
    left: u32,
    /// Bytes of the name so far.
    written: u32,
    /// Where the message goes on; 0 before the first pointer.
    end: u32,
    /// Pointers lead to before here: each to before the last one, so none leads in a circle.
    bound: u32,
}

/// What becomes of a name by one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// It goes on.
    On,
    /// It ends; [`Message::end`] tells where.
    End,
    /// It is cut off or malformed, is longer than a name can be, or has a pointer that does not lead back.
    Malformed,
}

/// Reads a field that the compiler must not keep in a register.
#[inline(always)]
fn get(field: &u32) -> u32 {
    // SAFETY: a valid reference.
    unsafe { core::ptr::read_volatile(field) }
}

/// Writes such a field.
#[inline(always)]
fn set(field: &mut u32, value: u32) {
    // SAFETY: a valid reference.
    unsafe { core::ptr::write_volatile(field, value) };
}

/// The header and the question of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    flags: u16,
    /// Records in the answer.
    pub answers: u16,
}

impl Head {
    /// Whether it asks, rather than answers; other operations, such as updates, do neither.
    #[must_use]
    #[inline(always)]
    pub const fn is_query(&self) -> bool {
        self.flags & (FLAG_RESPONSE | FLAGS_OPERATION) == 0
    }

    /// Whether it answers a query.
    #[must_use]
    #[inline(always)]
    pub const fn is_response(&self) -> bool {
        self.flags & (FLAG_RESPONSE | FLAGS_OPERATION) == FLAG_RESPONSE
    }
}

/// How a query is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// What is set in the header: a code of [`code`], or [`FLAG_TRUNCATED`].
    pub flags: u16,
    /// The type of the address that queries for this type are answered with, one of [`record`]; 0: no address. Queries for
    /// other types are answered without a record.
    pub kind: u16,
    /// That address.
    pub address: Address,
}

impl Reply {
    /// The one that a rule gives which answers queries, by its [`RuleEntry::arguments`](crate::abi::RuleEntry::arguments).
    #[expect(
        clippy::cast_possible_truncation,
        reason = "flags and kind have 16 bits, and each half of the address lies in 32"
    )]
    #[must_use]
    #[inline(always)]
    pub const fn of(arguments: &[u64; 5]) -> Self {
        let [flags, kind, upper, lower, _] = *arguments;
        Self {
            flags: flags as u16,
            kind: kind as u16,
            address: [
                upper as u32,
                (upper >> 32) as u32,
                lower as u32,
                (lower >> 32) as u32,
            ],
        }
    }
}

/// Codes of responses.
pub mod code {
    /// The name is there, whether or not there is a record.
    pub const NO_ERROR: u16 = 0;
    /// The server has failed.
    pub const SERVER_FAILURE: u16 = 2;
    /// There is no such name.
    pub const NO_NAME: u16 = 3;
    /// The server does not want to answer.
    pub const REFUSED: u16 = 5;
}

/// What lies behind the owner of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The address that it gives, if it gives one.
    pub address: Option<Address>,
    /// Where the next one begins.
    pub next: u32,
}

/// A name in the form by which names are looked up: its bytes on the wire without the root, from the last to the first
/// and in lower case, then zeros. That of `example.com` is `moc\x03elpmaxe\x07`, and a part of that of every name in its
/// domain.
pub type NameKey = [u8; NAME_BYTES];

impl Message {
    /// An empty one.
    pub const EMPTY: Self = Self {
        bytes: [0; MESSAGE_BYTES],
        length: 0,
        cursor: Cursor {
            at: 0,
            left: 0,
            written: 0,
            end: 0,
            bound: 0,
        },
        names: 0,
        question_end: 0,
        padding: 0,
        name: [0; KEY_AT + 2 * NAME_BYTES],
    };

    /// Takes the bytes of a datagram, as many as there is room for.
    pub fn fill(&mut self, datagram: &[u8]) {
        let length = datagram.len().min(MESSAGE_BYTES);
        self.bytes[..length].copy_from_slice(&datagram[..length]);
        #[expect(clippy::cast_possible_truncation, reason = "at most MESSAGE_BYTES")]
        let length = length as u32;
        self.length = length;
    }

    #[inline(always)]
    fn byte(&self, at: u32) -> u8 {
        self.bytes[at as usize & (MESSAGE_BYTES - 1)]
    }

    /// 16 bits out of network byte order; the caller has compared with the length.
    #[inline(always)]
    fn half(&self, at: u32) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// Four bytes as they lie there.
    #[inline(always)]
    fn word(&self, at: u32) -> u32 {
        let bytes = [
            self.byte(at),
            self.byte(at + 1),
            self.byte(at + 2),
            self.byte(at + 3),
        ];
        u32::from_ne_bytes(bytes)
    }

    /// Whether there are `bytes` from `at` on.
    #[inline(always)]
    fn has(&self, at: u32, bytes: u32) -> bool {
        at <= self.length && self.length - at >= bytes
    }

    /// The header; nothing where it is cut off, or there is not exactly one question.
    #[must_use]
    #[inline(always)]
    pub fn head(&self) -> Option<Head> {
        if !self.has(0, HEADER_BYTES) || self.half(4) != 1 {
            return None;
        }
        Some(Head {
            flags: self.half(2),
            answers: self.half(6),
        })
    }

    /// Whether it has been cut off to fit its datagram: the whole is asked for over TCP. It has a header.
    #[must_use]
    #[inline(always)]
    pub fn is_truncated(&self) -> bool {
        self.half(2) & FLAG_TRUNCATED != 0
    }

    /// Whether the name that was read last is one of those that a pattern stands for: see [`key_of`].
    #[must_use]
    pub fn is_named(&mut self, (pattern, bits): &(NameKey, u32)) -> bool {
        let name = &self.key()[KEY_AT..];
        let length = (bits / 8) as usize;
        // A domain is none of the names in it: there is a label more.
        let is_inside = length == 0 || pattern[length - 1] == 0 || name[length] != 0;
        name[..length] == pattern[..length] && is_inside
    }

    /// Where the question's name begins.
    pub const QUESTION: u32 = HEADER_BYTES;

    /// Where what follows the question begins, whose name ends before `end`; 0 where it is cut off.
    #[must_use]
    #[inline(always)]
    pub fn after_question(&self, end: u32) -> u32 {
        if self.has(end, QUESTION_TAIL) {
            end + QUESTION_TAIL
        } else {
            0
        }
    }

    /// Whether the name at `at` is a pointer to the question's.
    #[must_use]
    #[inline(always)]
    pub fn is_question(&self, at: u32) -> bool {
        self.has(at, 2) && self.half(at) == QUESTION_POINTER
    }

    /// The type that the question asks for, behind which the message goes on at `end`.
    #[must_use]
    #[inline(always)]
    pub fn question_type(&self, end: u32) -> u16 {
        self.half(end.wrapping_sub(QUESTION_TAIL))
    }

    /// What the query says of extensions: their flags, if it has them. Its question ends before `end`.
    #[inline(always)]
    fn extensions(&self, end: u32) -> Option<u16> {
        let is_first = self.half(6) == 0 && self.half(8) == 0 && self.half(10) != 0;
        let is_there = is_first
            && self.has(end, EXTENSIONS_BYTES)
            && self.byte(end) == 0
            && self.half(end + 1) == TYPE_EXTENSIONS;
        is_there.then(|| self.half(end + 7))
    }

    /// Turns the query, whose question ends before `end`, into its response. Gives its length, at most [`RESPONSE_MAX`];
    /// behind it there are zeros up to a multiple of four.
    #[inline(always)]
    pub fn answer(&mut self, end: u32, reply: &Reply) -> u32 {
        let extensions = self.extensions(end);
        let flags = FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | self.half(2) & FLAGS_KEPT;
        let has_address = reply.kind != 0 && reply.kind == self.question_type(end);
        self.put(2, flags | reply.flags);
        self.put(6, has_address.into());
        self.put(8, 0);
        self.put(10, extensions.is_some().into());
        let mut at = end;
        if has_address {
            at = self.put_address(at, reply);
        }
        if let Some(flags) = extensions {
            self.put(at, 0);
            self.put(at + 1, TYPE_EXTENSIONS);
            self.put(at + 3, DATAGRAM_BYTES);
            self.put(at + 5, 0);
            self.put(at + 7, flags & FLAG_SIGNATURES);
            self.put(at + 9, 0);
            at += EXTENSIONS_BYTES;
        }
        self.put(at, 0);
        self.put(at + 2, 0);
        self.length = at;
        at
    }

    /// Writes a record with the address, for the name that the question has. Gives where it ends.
    #[inline(always)]
    fn put_address(&mut self, at: u32, reply: &Reply) -> u32 {
        self.put(at, QUESTION_POINTER);
        self.put(at + 2, reply.kind);
        self.put(at + 4, CLASS_INTERNET);
        // It lives for no time: nobody keeps it for after the run.
        self.put(at + 6, 0);
        self.put(at + 8, 0);
        let data = at + 12;
        if reply.kind == record::A {
            self.put(at + 10, 4);
            self.put_word(data, reply.address[3]);
            return data + 4;
        }
        self.put(at + 10, 16);
        self.put_word(data, reply.address[0]);
        self.put_word(data + 4, reply.address[1]);
        self.put_word(data + 8, reply.address[2]);
        self.put_word(data + 12, reply.address[3]);
        data + 16
    }

    /// Writes 16 bits in network byte order.
    #[inline(always)]
    fn put(&mut self, at: u32, value: u16) {
        let [high, low] = value.to_be_bytes();
        self.bytes[at as usize & (MESSAGE_BYTES - 1)] = high;
        self.bytes[(at + 1) as usize & (MESSAGE_BYTES - 1)] = low;
    }

    /// Writes four bytes as they are.
    #[inline(always)]
    fn put_word(&mut self, at: u32, value: u32) {
        let [a, b, c, d] = value.to_ne_bytes();
        self.put(at, u16::from_be_bytes([a, b]));
        self.put(at + 2, u16::from_be_bytes([c, d]));
    }

    /// The sum of its bytes for a checksum, of a response that [`Message::answer`] made: see [`crate::reply::sum_word`].
    #[must_use]
    #[inline(always)]
    pub fn sum(&self) -> u64 {
        let mut sum = 0;
        for word in 0..RESPONSE_MAX / 4 {
            if word * 4 >= self.length {
                break;
            }
            sum = sum_word(sum, self.word(word * 4));
        }
        sum
    }

    /// What lies behind the owner of a record, which ends before `end`; nothing where the record is cut off.
    #[must_use]
    #[inline(always)]
    pub fn record(&self, end: u32) -> Option<Record> {
        if !self.has(end, RECORD_TAIL) {
            return None;
        }
        let (data, length) = (end + RECORD_TAIL, u32::from(self.half(end + 8)));
        if !self.has(data, length) {
            return None;
        }
        let address = match (self.half(end), length) {
            _ if self.half(end + 2) != CLASS_INTERNET => None,
            (record::A, 4) => Some(mapped(self.word(data))),
            (record::AAAA, 16) => Some([
                self.word(data),
                self.word(data + 4),
                self.word(data + 8),
                self.word(data + 12),
            ]),
            _ => None,
        };
        Some(Record {
            address,
            next: data + length,
        })
    }

    /// Reads the name at `at`, for [`Message::key`]. Gives where the message goes on behind it; 0 where it is
    /// [`Step::Malformed`].
    #[must_use]
    pub fn read_name(&mut self, at: u32) -> u32 {
        self.begin_name(at);
        for _ in 0..STEPS_MAX {
            match self.step() {
                Step::On => {}
                Step::End => return self.end(),
                Step::Malformed => return 0,
            }
        }
        0
    }

    /// Begins to read the name at `at`, which takes [`STEPS_MAX`] of [`Message::step`] at most.
    #[inline(always)]
    pub fn begin_name(&mut self, at: u32) {
        set(&mut self.cursor.at, at);
        set(&mut self.cursor.left, 0);
        set(&mut self.cursor.written, 0);
        set(&mut self.cursor.end, 0);
        set(&mut self.cursor.bound, at);
    }

    /// Where the message goes on behind the name that was read last.
    #[must_use]
    #[inline(always)]
    pub fn end(&self) -> u32 {
        get(&self.cursor.end)
    }

    /// Takes the next byte of a name, or follows a pointer.
    #[inline(always)]
    pub fn step(&mut self) -> Step {
        let at = get(&self.cursor.at);
        if at >= self.length {
            return Step::Malformed;
        }
        let (byte, left) = (self.byte(at), get(&self.cursor.left));
        if left == 0 && byte >= 0xc0 {
            return self.jump(at);
        }
        if left == 0 && byte == 0 {
            self.leave(at + 1);
            return Step::End;
        }
        let written = get(&self.cursor.written);
        if written >= NAME_MAX || (left == 0 && byte >= 0x40) {
            return Step::Malformed;
        }
        // The length of a label is below any letter.
        self.name[KEY_AT + NAME_BYTES - 1 - (written as usize & (NAME_BYTES - 1))] = lower(byte);
        set(&mut self.cursor.written, written + 1);
        set(
            &mut self.cursor.left,
            if left == 0 { byte.into() } else { left - 1 },
        );
        set(&mut self.cursor.at, at + 1);
        Step::On
    }

    /// Follows the pointer at `at`.
    #[inline(always)]
    fn jump(&mut self, at: u32) -> Step {
        let to = u32::from(self.half(at) & 0x3fff);
        if !self.has(at, 2) || to >= get(&self.cursor.bound) {
            return Step::Malformed;
        }
        self.leave(at + 2);
        set(&mut self.cursor.bound, to);
        set(&mut self.cursor.at, to);
        Step::On
    }

    /// Notes where the message goes on, unless a pointer has done so.
    #[inline(always)]
    fn leave(&mut self, end: u32) {
        if get(&self.cursor.end) == 0 {
            set(&mut self.cursor.end, end);
        }
    }

    /// The name that was read last, behind the number of its bits that are compared: all of [`NAME_BYTES`].
    #[inline(always)]
    pub fn key(&mut self) -> &[u8; KEY_AT + NAME_BYTES] {
        let start = NAME_BYTES - (get(&self.cursor.written) as usize & (NAME_BYTES - 1));
        let bits = KEY_BITS.to_ne_bytes();
        self.name[start] = bits[0];
        self.name[start + 1] = bits[1];
        self.name[start + 2] = bits[2];
        self.name[start + 3] = bits[3];
        // SAFETY: `start` is at most NAME_BYTES, and as many follow behind it as the array has beside.
        unsafe { &*self.name.as_ptr().add(start).cast() }
    }
}

/// ASCII in lower case.
#[inline(always)]
const fn lower(byte: u8) -> u8 {
    if byte.wrapping_sub(b'A') < 26 {
        byte + 32
    } else {
        byte
    }
}

/// A pattern of names: a name, `*.` and a domain for all names in it at any depth, or `*` for all.
///
/// Gives the key by which such names are looked up, and how many of its bits count: the root's byte as well for a name
/// that stands for itself. Nothing where it is too long.
#[must_use]
pub fn key_of(pattern: &str) -> Option<(NameKey, u32)> {
    let mut key = [0; NAME_BYTES];
    let (name, root) = match pattern.strip_prefix('*') {
        Some(domain) => (domain.strip_prefix('.').unwrap_or(domain), 0),
        None => (pattern, 1),
    };
    let mut length = 0_u32;
    for label in name.rsplit('.').filter(|label| !label.is_empty()) {
        let bytes = label.bytes().rev().map(|byte| byte.to_ascii_lowercase());
        let size = u8::try_from(label.len()).ok().filter(|size| *size < 0x40)?;
        for byte in bytes.chain([size]) {
            if length >= NAME_MAX {
                return None;
            }
            key[length as usize] = byte;
            length += 1;
        }
    }
    Some((key, (length + root) * 8))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::string::{String, ToString as _};
    use std::vec;
    use std::vec::Vec;

    use simple_dns::rdata::{A, AAAA, CNAME, HTTPS, OPT, RData, SVCB};
    use simple_dns::{
        CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, ResourceRecord, TYPE,
    };

    use super::*;

    #[test]
    fn docker_s_server_is_at_port_53_for_rules_and_for_connection_tracking() {
        let ports = DockerPorts {
            udp: 41_231,
            tcp: 35_601,
        };
        assert_eq!(DockerPorts::unpacked(ports.packed()), ports);
        let query = crate::packet::Packet {
            source: mapped(u32::from_ne_bytes([127, 0, 0, 1])),
            destination: DOCKER,
            source_port: 5000,
            destination_port: 41_231,
            protocol: PROTOCOL_UDP,
            has_transport: true,
            ..crate::packet::Packet::default()
        };
        let mut named = query;
        ports.name(&mut named);
        assert_eq!(named.destination_port, PORT);
        ports.translate(&mut named);
        assert_eq!(named, query);
        assert_eq!(ports.rewrite(&query), Some((2, 41_231, PORT)));
        let response = crate::packet::Packet {
            source: DOCKER,
            destination: query.source,
            source_port: PORT,
            destination_port: 5000,
            protocol: PROTOCOL_TCP,
            ..query
        };
        assert_eq!(ports.rewrite(&response), Some((0, PORT, 35_601)));
        // Somebody else's port of that number.
        let mut other = crate::packet::Packet {
            destination: query.source,
            ..query
        };
        ports.name(&mut other);
        assert_eq!(other.destination_port, 41_231);
        assert_eq!(ports.rewrite(&other), None);
        assert_eq!(DockerPorts::default().rewrite(&query), None);
    }

    /// What a message tells: the names of question and owners as they are looked up, and the addresses.
    #[derive(Debug, PartialEq, Eq)]
    struct Told {
        names: Vec<String>,
        addresses: Vec<Address>,
    }

    fn plain(message: &mut Message) -> String {
        let key = &message.key()[KEY_AT..];
        let length = key.iter().position(|byte| *byte == 0).unwrap();
        let wire: Vec<u8> = key[..length].iter().rev().copied().collect();
        let mut labels = Vec::new();
        let mut rest = wire.as_slice();
        while let Some((size, more)) = rest.split_first() {
            let (label, more) = more.split_at((*size).into());
            labels.push(std::str::from_utf8(label).unwrap().to_string());
            rest = more;
        }
        labels.join(".")
    }

    fn read(datagram: &[u8]) -> Option<Told> {
        let mut message = Message::EMPTY;
        message.name[..KEY_AT + NAME_BYTES].fill(0xee);
        message.fill(datagram);
        let head = message.head()?;
        let mut told = Told {
            names: Vec::new(),
            addresses: Vec::new(),
        };
        let mut at = match message.read_name(Message::QUESTION) {
            0 => return None,
            end => message.after_question(end),
        };
        told.names.push(plain(&mut message));
        for _ in 0..head.answers {
            let end = match message.read_name(at) {
                0 => return None,
                end => end,
            };
            let owner = plain(&mut message);
            assert_eq!(
                message.is_question(at),
                owner == told.names[0] && end == at + 2
            );
            told.names.push(owner);
            let record = message.record(end)?;
            told.addresses.extend(record.address);
            at = record.next;
        }
        Some(told)
    }

    fn named(name: &str) -> Name<'_> {
        Name::new(name).unwrap()
    }

    fn asked(name: &str, kind: TYPE) -> Packet<'_> {
        let mut packet = Packet::new_query(7);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        let (kind, class) = (QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN));
        packet
            .questions
            .push(Question::new(named(name), kind, class, false));
        packet
    }

    fn answered<'a>(name: &'a str, kind: TYPE, answers: Vec<(&'a str, RData<'a>)>) -> Packet<'a> {
        let mut packet = asked(name, kind);
        packet.set_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_AVAILABLE);
        for (owner, data) in answers {
            packet
                .answers
                .push(ResourceRecord::new(named(owner), CLASS::IN, 60, data));
        }
        packet
    }

    fn v4(address: [u8; 4]) -> RData<'static> {
        RData::A(A::from(Ipv4Addr::from(address)))
    }

    fn told(names: &[&str], addresses: &[[u8; 16]]) -> Told {
        Told {
            names: names.iter().map(|name| (*name).to_string()).collect(),
            addresses: addresses
                .iter()
                .map(|bytes| {
                    let word =
                        |n: usize| u32::from_ne_bytes(bytes[4 * n..4 * n + 4].try_into().unwrap());
                    [word(0), word(1), word(2), word(3)]
                })
                .collect(),
        }
    }

    fn mapped_bytes(address: [u8; 4]) -> [u8; 16] {
        Ipv4Addr::from(address).to_ipv6_mapped().octets()
    }

    #[test]
    fn answers_are_read_through_chains_and_compression() {
        let ipv6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
        let packet = answered(
            "WWW.Example.com",
            TYPE::A,
            vec![
                (
                    "WWW.Example.com",
                    RData::CNAME(CNAME(named("a.cdn.example.net"))),
                ),
                (
                    "a.cdn.example.net",
                    RData::CNAME(CNAME(named("b.cdn.example.net"))),
                ),
                ("b.cdn.example.net", v4([10, 0, 0, 9])),
                ("b.cdn.example.net", v4([10, 0, 0, 10])),
                ("b.cdn.example.net", RData::AAAA(AAAA::from(ipv6))),
            ],
        );
        let expected = told(
            &[
                "www.example.com",
                "www.example.com",
                "a.cdn.example.net",
                "b.cdn.example.net",
                "b.cdn.example.net",
                "b.cdn.example.net",
            ],
            &[
                mapped_bytes([10, 0, 0, 9]),
                mapped_bytes([10, 0, 0, 10]),
                ipv6.octets(),
            ],
        );
        for bytes in [
            packet.build_bytes_vec().unwrap(),
            packet.build_bytes_vec_compressed().unwrap(),
        ] {
            assert_eq!(read(&bytes).as_ref(), Some(&expected));
        }
    }

    #[test]
    fn records_of_other_types_and_classes_give_no_address() {
        let mut packet = answered(
            "x.example",
            TYPE::HTTPS,
            vec![("x.example", v4([1, 2, 3, 4]))],
        );
        packet.answers[0].class = CLASS::CH;
        let service = HTTPS(SVCB::new(1, named("y.example")));
        packet.answers.push(ResourceRecord::new(
            named("x.example"),
            CLASS::IN,
            1,
            RData::HTTPS(service),
        ));
        *packet.opt_mut() = Some(OPT {
            opt_codes: Vec::new(),
            udp_packet_size: 1232,
            version: 0,
        });
        let bytes = packet.build_bytes_vec_compressed().unwrap();
        assert_eq!(read(&bytes), Some(told(&["x.example"; 3], &[])));
    }

    #[test]
    fn a_message_says_whether_it_asks() {
        let filled = |packet: Packet<'_>| {
            let mut message = Message::EMPTY;
            message.fill(&packet.build_bytes_vec().unwrap());
            message
        };
        let head = |packet| filled(packet).head();
        let query = filled(asked("x.example", TYPE::A));
        assert!(!query.head().unwrap().is_response() && !query.is_truncated());
        let mut packet = answered("x.example", TYPE::A, Vec::new());
        packet.set_flags(PacketFlag::TRUNCATION);
        let response = filled(packet);
        assert!(response.head().unwrap().is_response() && response.is_truncated());
        let mut two = asked("x.example", TYPE::A);
        two.questions.push(two.questions[0].clone());
        assert_eq!(head(two), None);
        assert_eq!(head(Packet::new_query(1)), None);
    }

    /// A header with one question, whose name these bytes are.
    fn with_name(name: &[u8]) -> Message {
        let mut bytes = vec![0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(name);
        let mut message = Message::EMPTY;
        message.fill(&bytes);
        message
    }

    #[test]
    fn names_that_lead_nowhere_are_malformed() {
        let labels = |size: usize, last: usize| {
            let mut name = [vec![63; 64], vec![63; 64], vec![63; 64]].concat();
            assert_eq!(size, 63);
            #[expect(clippy::cast_possible_truncation, reason = "a label")]
            name.push(last as u8);
            name.extend(vec![b'x'; last]);
            name.push(0);
            name
        };
        for (name, end) in [
            (vec![0], 13),
            (vec![1, b'x', 0], 15),
            (labels(63, 61), 12 + 192 + 63),
            // One byte more than a name may have.
            (labels(63, 62), 0),
            // A pointer to itself, forward, back and forth, and one that is cut off.
            (vec![0xc0, 12], 0),
            (vec![1, b'x', 0xc0, 12], 0),
            (vec![0xc0, 14, 0], 0),
            (vec![0xc0], 0),
            // Kinds of labels that do not exist, and a label that is cut off.
            (vec![0x40, 0], 0),
            (vec![0x80, 0], 0),
            (vec![5, b'x'], 0),
            (vec![], 0),
        ] {
            let mut message = with_name(&name);
            assert_eq!(message.read_name(Message::QUESTION), end, "{name:?}");
        }
    }

    #[test]
    fn pointers_lead_back_only_and_not_without_end() {
        // A pointer behind the name leads into its middle; one behind that leads to the first pointer.
        let name = [
            1, b'a', 1, b'b', 0, 0xc0, 14, 0xc0, 17, 1, b'c', 0xc0, 19, 0xc0, 21,
        ];
        let mut message = with_name(&name);
        for (at, end, text) in [
            (12, 17, "a.b"),
            (17, 19, "b"),
            (19, 21, "b"),
            (21, 25, "c.b"),
            (25, 27, "c.b"),
        ] {
            assert_eq!(message.read_name(at), end);
            assert_eq!(plain(&mut message), text);
        }
        // Pointers to pointers: as many as there may be, and one more.
        let mut chain = vec![0];
        for index in 0..u16::try_from(STEPS_MAX).unwrap() {
            let to = if index == 0 { 12 } else { 11 + 2 * index };
            chain.extend((0xc000 | to).to_be_bytes());
        }
        let mut message = with_name(&chain);
        let end = 12 + u32::try_from(chain.len()).unwrap();
        assert_eq!(message.read_name(end - 4), end - 2);
        assert_eq!(message.read_name(end - 2), 0);
    }

    /// The response to a query, as a library reads it.
    fn answered_by(query: &Packet<'_>, reply: &Reply, check: impl FnOnce(&Packet<'_>)) {
        let mut message = Message::EMPTY;
        message.bytes.fill(0xee);
        message.fill(&query.build_bytes_vec().unwrap());
        assert!(message.head().unwrap().is_query());
        let end = message.read_name(Message::QUESTION);
        let end = message.after_question(end);
        let length = message.answer(end, reply);
        assert!(length <= RESPONSE_MAX);
        let bytes = &message.bytes[..length as usize];
        let padded = bytes.chunks(4).map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from(u32::from_ne_bytes(word))
        });
        assert_eq!(message.sum(), padded.sum());
        let response = Packet::parse(bytes).unwrap();
        assert_eq!(response.id(), query.id());
        let question = |packet: &Packet<'_>| {
            let [asked] = packet.questions.as_slice() else {
                panic!("one question");
            };
            (asked.qname.to_string(), asked.qtype, asked.qclass)
        };
        assert_eq!(question(&response), question(query));
        assert!(response.has_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_AVAILABLE));
        assert!(response.has_flags(PacketFlag::RECURSION_DESIRED));
        assert_eq!(response.opt().is_some(), query.opt().is_some());
        check(&response);
    }

    #[test]
    fn a_query_becomes_its_response() {
        let address = [0x2001_0db8_u32.to_be(), 0, 0, 9_u32.to_be()];
        let reply = |flags, kind| Reply {
            flags,
            kind,
            address,
        };
        let longest = [vec!["x".repeat(63); 3], vec!["x".repeat(61)]]
            .concat()
            .join(".");
        for name in ["x.example", longest.as_str()] {
            let mut query = asked(name, TYPE::AAAA);
            *query.opt_mut() = Some(OPT {
                opt_codes: vec![simple_dns::rdata::OPTCode {
                    code: 10,
                    data: b"a cookie"[..].into(),
                }],
                udp_packet_size: 4096,
                version: 0,
            });
            answered_by(&query, &reply(code::NO_NAME, 0), |response| {
                assert_eq!(response.rcode(), simple_dns::RCODE::NameError);
                assert!(response.answers.is_empty());
                assert!(response.opt().unwrap().opt_codes.is_empty());
            });
            answered_by(&query, &reply(code::NO_ERROR, record::AAAA), |response| {
                let [answer] = response.answers.as_slice() else {
                    panic!("one answer");
                };
                let expected = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
                assert_eq!(answer.name, named(name));
                assert_eq!(answer.rdata, RData::AAAA(AAAA::from(expected)));
                assert_eq!(answer.ttl, 0);
            });
        }
        let query = asked("x.example", TYPE::A);
        answered_by(&query, &reply(FLAG_TRUNCATED, record::AAAA), |response| {
            assert!(response.has_flags(PacketFlag::TRUNCATION));
            assert_eq!(response.rcode(), simple_dns::RCODE::NoError);
            assert!(response.answers.is_empty());
        });
        let mapped = Reply {
            address: mapped(u32::from_ne_bytes([10, 0, 0, 9])),
            ..reply(0, record::A)
        };
        answered_by(&query, &mapped, |response| {
            assert_eq!(response.answers[0].rdata, v4([10, 0, 0, 9]));
        });
    }

    #[test]
    fn a_pattern_is_the_beginning_of_the_keys_of_its_names() {
        let covers = |pattern: &str, name: &str| {
            let (key, bits) = key_of(pattern).unwrap();
            let bytes = asked(name, TYPE::A).build_bytes_vec().unwrap();
            let mut message = Message::EMPTY;
            message.fill(&bytes);
            assert_ne!(message.read_name(Message::QUESTION), 0);
            message.is_named(&(key, bits))
        };
        assert!(covers("api.example.com", "API.example.COM"));
        assert!(!covers("api.example.com", "x.api.example.com"));
        assert!(!covers("api.example.com", "example.com"));
        assert!(covers("*.Example.com", "api.example.com"));
        assert!(covers("*.example.com", "a.b.example.com"));
        assert!(!covers("*.example.com", "notexample.com"));
        assert!(!covers("*.example.com", "api.example.org"));
        assert!(!covers("*.example.com", "example.com"));
        assert!(covers("*", "anything.example") && covers("*", "."));
        assert_eq!(key_of("*").unwrap().1, 0);
        let (key, bits) = key_of("*.example.com").unwrap();
        assert_eq!((&key[..12], bits), (&b"moc\x03elpmaxe\x07"[..], 96));
        assert_eq!(key_of("example.com").unwrap(), (key, 104));
        assert_eq!(key_of(&"x".repeat(64)), None);
    }
}
