//! Names of addresses: from the DNS responses that the command got, and from `/etc/hosts`.

use std::collections::HashMap;
use std::net::IpAddr;

use fault_common::dns::{self, KEY_AT, Message, NAME_BYTES};

use crate::sys::net::ip_address;

/// The names by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostNames {
    by_address: HashMap<IpAddr, String>,
}

impl HostNames {
    /// Those of a hosts file (hosts(5)). The first name of an address counts.
    #[must_use]
    pub fn of_hosts(text: &str) -> Self {
        let mut names = Self::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
            if let (Some(address), Some(name)) = (address, words.next()) {
                let known = names.by_address.entry(address);
                known.or_insert_with(|| name.to_owned());
            }
        }
        names
    }

    /// Learns from a response: its addresses have the name that was asked for.
    pub fn learn(&mut self, lookup: &Lookup) {
        for address in &lookup.addresses {
            self.by_address.insert(*address, lookup.name.clone());
        }
    }

    /// Adds others, which count where both have a name.
    pub fn add(&mut self, others: Self) {
        self.by_address.extend(others.by_address);
    }

    /// The name of an address.
    #[must_use]
    pub fn of(&self, address: IpAddr) -> Option<&str> {
        self.by_address.get(&address).map(String::as_str)
    }
}

/// A response to a DNS query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The name that was asked for, in lower case.
    pub name: String,
    /// The addresses in the answer, whatever aliases lead to them.
    pub addresses: Vec<IpAddr>,
    /// Whether the name exists and has a record of the type that was asked for.
    pub is_found: bool,
}

impl Lookup {
    /// Reads a datagram. Nothing where it is no response to a query for a host's name, or malformed.
    #[must_use]
    pub fn read(datagram: &[u8]) -> Option<Self> {
        let mut message = Box::new(Message::EMPTY);
        message.fill(datagram);
        let head = message.head().filter(dns::Head::is_response)?;
        let end = message.read_name(Message::QUESTION);
        let name = (end != 0).then(|| name_of(message.key()))??;
        let mut at = message.after_question(end);
        let mut addresses = Vec::new();
        for _ in 0..head.answers {
            let end = message.read_name(at);
            if at == 0 || end == 0 {
                return None;
            }
            let record = message.record(end)?;
            addresses.extend(record.address.map(ip_address));
            at = record.next;
        }
        Some(Self {
            name,
            addresses,
            is_found: head.answers != 0 && u16::from(datagram[3] & 0xf) == dns::code::NO_ERROR,
        })
    }
}

/// The name that a key stands for; nothing where it is none of a host.
fn name_of(key: &[u8; KEY_AT + NAME_BYTES]) -> Option<String> {
    let reversed = key[KEY_AT..].split(|byte| *byte == 0).next()?;
    let wire: Vec<u8> = reversed.iter().rev().copied().collect();
    let mut labels = Vec::new();
    let mut rest = wire.as_slice();
    while let Some((size, more)) = rest.split_first() {
        let (label, more) = more.split_at_checked((*size).into())?;
        let label = std::str::from_utf8(label).ok()?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        labels.push(label.chars().all(is_plain).then_some(label)?);
        rest = more;
    }
    (!labels.is_empty()).then(|| labels.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_files_name_addresses() {
        let names =
            HostNames::of_hosts("127.0.0.1 localhost me # x\n# 10.0.0.1 no\n::1 ip6 ip6-b\n");
        assert_eq!(names.of("127.0.0.1".parse().unwrap()), Some("localhost"));
        assert_eq!(names.of("::1".parse().unwrap()), Some("ip6"));
        assert_eq!(names.of("10.0.0.1".parse().unwrap()), None);
    }

    /// `db.internal` is an alias (CNAME) of something that has an address.
    fn datagram() -> Vec<u8> {
        let mut data = vec![0, 7, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0];
        data.extend(b"\x02Db\x08internal\0\0\x01\0\x01");
        data.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4]);
        data.extend(b"\x01a\xc0\x0f");
        data.extend([0xc0, 41, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 0, 0, 5]);
        data
    }

    #[test]
    fn an_answer_names_its_addresses_by_what_was_asked() {
        let lookup = Lookup::read(&datagram()).unwrap();
        assert!(lookup.is_found);
        let mut names = HostNames::default();
        names.learn(&lookup);
        assert_eq!(names.of("10.0.0.5".parse().unwrap()), Some("db.internal"));
    }

    #[test]
    fn a_name_that_does_not_exist_is_not_found() {
        let mut data = datagram();
        data[3] |= 3;
        assert!(!Lookup::read(&data).unwrap().is_found);
        data.truncate(12 + 17);
        data[7] = 0;
        let lookup = Lookup::read(&data).unwrap();
        assert_eq!(
            (lookup.name.as_str(), lookup.is_found),
            ("db.internal", false)
        );
    }

    #[test]
    fn what_is_no_answer_or_malformed_names_nothing() {
        let whole = datagram();
        for length in 0..whole.len() {
            assert_eq!(Lookup::read(&whole[..length]), None);
        }
        let change = |at: usize, byte: u8| {
            let mut data = datagram();
            data[at] = byte;
            Lookup::read(&data)
        };
        assert_eq!(change(2, 1), None, "a query");
        assert_eq!(change(2, 0xa9), None, "another operation");
        assert_eq!(change(5, 2), None, "two questions");
        assert_eq!(change(13, b' '), None, "no name of a host");
        assert_eq!(change(13, 0), None, "nor this");
        assert_eq!(change(30, 40), None, "a pointer that leads forward");
        assert_eq!(
            change(12, 0x42),
            None,
            "a kind of label that does not exist"
        );
        let looping = [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 0xc0, 12];
        assert_eq!(Lookup::read(&looping), None);
    }
}
