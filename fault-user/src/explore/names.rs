//! Names of addresses: from the DNS answers that were seen, and from `/etc/hosts`.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The most labels and pointers of a name that are followed.
const STEPS_MAX: usize = 64;

/// The names by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    by_address: HashMap<IpAddr, String>,
}

impl Names {
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

    /// Learns from a DNS answer (RFC 1035): its addresses have the name that was asked for. What is no answer is ignored.
    pub fn learn(&mut self, datagram: &[u8]) {
        let Some((name, addresses)) = answer(datagram) else {
            return;
        };
        for address in addresses {
            self.by_address.insert(address, name.clone());
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

/// The name of the question and the addresses of the answer.
fn answer(data: &[u8]) -> Option<(String, Vec<IpAddr>)> {
    let is_answer = data.get(2)? & 0x80 != 0;
    let (questions, answers) = (half(data, 4)?, half(data, 6)?);
    if !is_answer || questions != 1 {
        return None;
    }
    let (name, mut at) = name(data, 12)?;
    at += 4;
    let mut addresses = Vec::new();
    for _ in 0..answers {
        at = self::name(data, at)?.1;
        let (kind, length) = (half(data, at)?, usize::from(half(data, at + 8)?));
        let value = data.get(at + 10..at + 10 + length)?;
        match kind {
            1 => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
            28 => addresses.push(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
            _ => {}
        }
        at += 10 + length;
    }
    Some((name, addresses))
}

/// A name at `at`, and where what follows begins.
fn name(data: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut labels: Vec<String> = Vec::new();
    let mut end = None;
    for _ in 0..STEPS_MAX {
        let length = usize::from(*data.get(at)?);
        match length {
            0 => return Some((labels.join("."), end.unwrap_or(at + 1))),
            0xc0.. => {
                end.get_or_insert(at + 2);
                at = (length & 0x3f) << 8 | usize::from(*data.get(at + 1)?);
            }
            _ => {
                let label = data.get(at + 1..at + 1 + length)?;
                labels.push(String::from_utf8_lossy(label).to_lowercase());
                at += 1 + length;
            }
        }
    }
    None
}

fn half(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_files_name_addresses() {
        let names = Names::of_hosts("127.0.0.1 localhost me # x\n# 10.0.0.1 no\n::1 ip6 ip6-b\n");
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
        let mut names = Names::default();
        names.learn(&datagram());
        assert_eq!(names.of("10.0.0.5".parse().unwrap()), Some("db.internal"));
    }

    #[test]
    fn torn_answers_and_loops_name_nothing() {
        let whole = datagram();
        for length in 0..whole.len() {
            let mut names = Names::default();
            names.learn(&whole[..length]);
            assert_eq!(names, Names::default());
        }
        let mut names = Names::default();
        names.learn(&[0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 0xc0, 12]);
        assert_eq!(names, Names::default());
    }
}
