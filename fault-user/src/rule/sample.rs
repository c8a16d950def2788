//! `hosts=1/3`: a share of the hosts that a rule is aimed at, chosen by the seed.

use std::fmt;
use std::net::IpAddr;

use fault_common::random::mix;

use super::error::{Piece, RuleError};
use super::target::Cidr;
use super::{ResolvedRule, Rule, units};

/// The most addresses that hosts are chosen from.
const MOST_HOSTS: usize = 4096;

/// A share of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostShare {
    /// So many,
    picked: u32,
    /// of so many.
    of: u32,
}

impl HostShare {
    /// Reads `N/M`.
    pub(super) fn read(piece: Piece<'_>) -> Result<Self, RuleError> {
        let expected = "how many of how many hosts, such as `1/3`";
        let Some((picked, of)) = piece.split_once(&['/']) else {
            let error = piece.error(format!("`{}` is no share of hosts", piece.text()));
            return Err(error.expected(expected));
        };
        let number = |piece: Piece<'_>| {
            let count = units::count(piece)?;
            u32::try_from(count).map_err(|_| piece.error("this number is too large"))
        };
        let share = Self {
            picked: number(picked)?,
            of: number(of)?,
        };
        if share.picked == 0 || share.picked >= share.of {
            let error = piece.error("this share is none of the hosts, or all of them");
            return Err(error.expected(expected));
        }
        Ok(share)
    }

    /// So many of `count` hosts: rounded, but at least one and not all.
    fn of(self, count: usize) -> usize {
        let (picked, of) = (self.picked as usize, self.of as usize);
        ((count * picked * 2 + of) / (of * 2)).clamp(1, count.max(2) - 1)
    }
}

impl fmt::Display for HostShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.picked, self.of)
    }
}

impl ResolvedRule {
    /// The rule `rule`, which this one is, limited to its share of hosts. Rules with the same share of the same hosts get
    /// the same ones.
    ///
    /// # Errors
    /// There is no choice: one host, or more than can be counted.
    pub fn sampled(mut self, rule: &Rule, seed: u64) -> Result<Self, RuleError> {
        let Some(share) = self.modifiers.hosts else {
            return Ok(self);
        };
        let text = rule.to_string();
        let place = Piece::whole(&text).slice(0..rule.target.to_string().len());
        let mut hosts = addresses(&self.target.hosts).ok_or_else(|| {
            place
                .error(format!(
                    "`hosts` chooses from {MOST_HOSTS} hosts at most, and these are more"
                ))
                .expected("a host name or a network in the target, such as `tcp:10.0.0.0/24:80`")
        })?;
        if hosts.len() < 2 {
            return Err(place
                .error("`hosts` has nothing to choose from: this is one host")
                .expected("a name with several addresses, a network, or no `hosts`"));
        }
        let count = share.of(hosts.len());
        hosts.sort_by_cached_key(|host| rank(seed, *host));
        hosts.truncate(count);
        hosts.sort_unstable();
        self.target.hosts = hosts.into_iter().map(Cidr::host).collect();
        Ok(self)
    }
}

/// Every address of these networks; nothing where there are too many, or any address is meant.
fn addresses(networks: &[Cidr]) -> Option<Vec<IpAddr>> {
    let mut all = Vec::new();
    for network in networks {
        let width = if network.address().is_ipv4() { 32 } else { 128 };
        let bits = u32::from(width - network.prefix());
        let count = 1_usize
            .checked_shl(bits)
            .filter(|count| all.len() + count <= MOST_HOSTS)?;
        let first = network.address();
        all.extend((0..count).map(|nth| nth_after(first, nth)));
    }
    (!all.is_empty()).then_some(all)
}

/// An address so many behind another one; both lie in a network of at most [`MOST_HOSTS`].
fn nth_after(first: IpAddr, nth: usize) -> IpAddr {
    match first {
        IpAddr::V4(first) => {
            let bits = u128::from(first.to_bits()) | nth as u128;
            std::net::Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX)).into()
        }
        IpAddr::V6(first) => std::net::Ipv6Addr::from_bits(first.to_bits() | nth as u128).into(),
    }
}

/// What an address is sorted by: a number that the seed draws for it.
fn rank(seed: u64, host: IpAddr) -> u64 {
    let bits = match host {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    let (high, low) = ((bits >> 64) as u64, bits as u64);
    mix(mix(mix(seed) ^ high) ^ low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Targets;

    fn sampled(text: &str, seed: u64) -> Result<Vec<String>, RuleError> {
        let rule: Rule = text.parse()?;
        let mut names = |_: &str| Ok((1..=6).map(|n| IpAddr::from([10, 0, 0, n])).collect());
        let resolved = rule.resolve(&Targets::new(), &mut names)?;
        let hosts = resolved.sampled(&rule, seed)?.target.hosts;
        Ok(hosts.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_seed_chooses_and_stays_with_its_choice() {
        let of = |text: &str, seed| sampled(text, seed).expect(text);
        let first = of("tcp:db.example:80 loss=5% hosts=1/3", 7);
        assert_eq!(first.len(), 2);
        assert_eq!(
            first,
            of("tcp:db.example:80 latency=1s hosts=1/3", 7),
            "whatever is done"
        );
        let more = of("tcp:db.example:80 loss=5% hosts=2/3", 7);
        assert!(
            first.iter().all(|host| more.contains(host)),
            "{first:?} {more:?}"
        );
        let others: std::collections::BTreeSet<_> = (0..50)
            .map(|seed| of("tcp:db.example:80 loss=5% hosts=1/3", seed))
            .collect();
        assert!(others.len() > 8, "{others:?}");
    }

    #[test]
    fn every_host_has_the_same_chance() {
        let mut chosen = std::collections::BTreeMap::<String, u32>::new();
        for seed in 0..3000 {
            for host in sampled("tcp:[fd00::8/126]:80 drop hosts=1/2", seed).expect("4 hosts") {
                *chosen.entry(host).or_default() += 1;
            }
        }
        assert_eq!(chosen.len(), 4);
        assert!(
            chosen.values().all(|count| (1350..1650).contains(count)),
            "{chosen:?}"
        );
    }

    #[test]
    fn networks_are_counted_without_their_exclusions() {
        let count = |text: &str| sampled(text, 1).expect(text).len();
        assert_eq!(count("tcp:10.0.0.0/24:80 drop hosts=1/4"), 64);
        assert_eq!(count("10.0.0.0/30,!10.0.0.1 drop hosts=1/3"), 1);
        assert_eq!(count("10.0.0.0/31 drop hosts=1/100"), 1);
        assert_eq!(count("10.0.0.0/31 drop hosts=99/100"), 1);
        let chosen = sampled("10.0.0.0/30,!10.0.0.1 drop hosts=2/3", 1).unwrap();
        assert!(!chosen.contains(&"10.0.0.1".to_owned()), "{chosen:?}");
    }

    #[test]
    fn where_there_is_no_choice_is_an_error() {
        for (text, expected) in [
            ("tcp:80 drop hosts=1/3", "4096 hosts at most"),
            ("10.0.0.0/8 drop hosts=1/3", "4096 hosts at most"),
            ("[fd00::]/64 drop hosts=1/3", "4096 hosts at most"),
            ("10.0.0.1 drop hosts=1/3", "this is one host"),
            (
                "tcp:db.example:80 drop hosts=3/3",
                "none of the hosts, or all",
            ),
            (
                "tcp:db.example:80 drop hosts=0/3",
                "none of the hosts, or all",
            ),
            ("tcp:db.example:80 drop hosts=30%", "no share of hosts"),
        ] {
            let error = sampled(text, 1).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
