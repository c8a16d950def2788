//! Names whose addresses the programs learn from DNS: passes the names to the programs, and reads what was learned.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail, ensure};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use fault_common::abi::{Known, NAMES_MAX};
use fault_common::dns::{NameKey, key_of};

use crate::plan::tables::{NameClasses, RuleTables};
use crate::rule::ResolvedTarget;

/// A name that rules are aimed at, and what has been learned of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnedName {
    /// The name, or `*.` and a domain.
    pub name: String,
    /// How many DNS responses were about it.
    pub lookups: u64,
    /// The addresses that were learned, sorted.
    pub addresses: Vec<IpAddr>,
}

/// The addresses that the programs learn, for other programs that look them up too.
pub struct LearnedAddresses {
    numbered: Vec<String>,
    map: LearnedMap<MapData>,
}

/// Addresses and the names that each is known by.
pub type LearnedMap<T> = HashMap<T, [u8; 16], Known>;

impl LearnedAddresses {
    /// The bit of a target's name at each of its addresses; 0 for a target without a name.
    ///
    /// # Errors
    /// The name is not one of those whose addresses are learned.
    pub fn bit_of(&self, target: &ResolvedTarget) -> Result<u64> {
        let Some(name) = &target.name else {
            return Ok(0);
        };
        let mut names = self.numbered.iter();
        let number = names.position(|other| other == name);
        let number = number.with_context(|| format!("the addresses of {name} are not learned"))?;
        Ok(1 << number)
    }

    /// The addresses of a target's name so far, sorted; none for a target without a name.
    ///
    /// # Errors
    /// As [`LearnedAddresses::bit_of`], or the map can't be read.
    pub fn of(&self, target: &ResolvedTarget) -> Result<Vec<IpAddr>> {
        let bit = self.bit_of(target)?;
        let known = learned(&self.map)?.into_iter();
        Ok(known
            .filter(|(_, names)| names & bit != 0)
            .map(|(address, _)| address)
            .collect())
    }

    /// The map, as the value of a map of maps.
    #[must_use]
    pub const fn map(&self) -> &LearnedMap<MapData> {
        &self.map
    }
}

/// The names that the programs know, by their number. A name keeps its number, which its addresses are stored with, until
/// another name needs it.
#[derive(Debug, Default)]
pub(super) struct NumberedNames {
    /// The names; an empty one is being replaced.
    numbered: Vec<String>,
    /// Those of the rule set that was written last.
    applied: BTreeSet<String>,
}

impl NumberedNames {
    /// Writes the names of a rule set, which is not applied yet.
    ///
    /// # Errors
    /// More than [`NAMES_MAX`] names in this set and the one before it, a name that no host can have, or a map can't be
    /// written.
    pub(super) fn write(
        &mut self,
        ebpf: &mut Ebpf,
        tables: &RuleTables,
        generation: u32,
    ) -> Result<()> {
        let names = tables.named();
        self.add(ebpf, &names)?;
        self.applied = names;
        if tables.names.is_empty() {
            return Ok(());
        }
        let mut classes = [0_u32; NAMES_MAX];
        for NameClasses {
            name,
            host,
            question,
        } in &tables.names
        {
            let number = self.number(name).context("a name has no number")?;
            classes[number] = u32::from(*host) | u32::from(*question) << 16;
        }
        let mut entries: Array<_, u32> = map_mut(ebpf, "NAME_CLASSES")?.try_into()?;
        for (index, class) in (generation * NAMES..).zip(classes) {
            entries.set(index, class, 0)?;
        }
        Ok(())
    }

    /// The addresses of these names, which are learned once the rules are applied.
    ///
    /// # Errors
    /// As [`NumberedNames::write`].
    pub(super) fn share(
        &mut self,
        ebpf: &mut Ebpf,
        names: &BTreeSet<String>,
    ) -> Result<LearnedAddresses> {
        self.add(ebpf, names)?;
        let Map::HashMap(learned) = map(ebpf, "LEARNED")? else {
            bail!("the eBPF object's map LEARNED is not a hash map");
        };
        let descriptor = learned.fd().as_fd().try_clone_to_owned();
        Ok(LearnedAddresses {
            numbered: self.numbered.clone(),
            map: Map::HashMap(MapData::from_fd(descriptor.context("sharing a map")?)?)
                .try_into()?,
        })
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.numbered.iter().position(|other| other == name)
    }

    /// Gives numbers to the names that have none.
    fn add(&mut self, ebpf: &mut Ebpf, names: &BTreeSet<String>) -> Result<()> {
        let mut fresh: Vec<_> = names
            .iter()
            .filter(|name| self.number(name).is_none())
            .collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let room = NAMES_MAX - self.numbered.len();
        let replaced = self.free(names, fresh.len().saturating_sub(room))?;
        if !replaced.is_empty() {
            let old = self.patterns();
            for number in &replaced {
                self.numbered[*number].clear();
            }
            self.write_keys(ebpf, &old)?;
            forget(ebpf, &replaced)?;
        }
        for number in replaced {
            if let Some(name) = fresh.pop() {
                self.numbered[number].clone_from(name);
            }
        }
        self.numbered.extend(fresh.into_iter().cloned());
        self.write_keys(ebpf, &BTreeSet::new())
    }

    /// The numbers of `count` names that neither the applied set nor the next one has.
    fn free(&self, next: &BTreeSet<String>, count: usize) -> Result<Vec<usize>> {
        let numbered = self.numbered.iter().enumerate();
        let unused =
            numbered.filter(|(_, name)| !next.contains(*name) && !self.applied.contains(*name));
        let free: Vec<_> = unused.map(|(number, _)| number).take(count).collect();
        ensure!(
            free.len() == count,
            "the old and the new rules together are aimed at more than {NAMES_MAX} different names: use fewer"
        );
        Ok(free)
    }

    /// Writes the keys by which the names are found, and removes those of `old` patterns that are no longer needed.
    fn write_keys(&self, ebpf: &mut Ebpf, old: &BTreeSet<String>) -> Result<()> {
        let mut trie: LpmTrie<_, NameKey, u64> = map_mut(ebpf, "NAMES")?.try_into()?;
        let key = |pattern: &str| -> Result<Key<NameKey>> {
            let (key, bits) =
                key_of(pattern).with_context(|| format!("`{pattern}` is too long for a name"))?;
            Ok(Key::new(bits, key))
        };
        let patterns = self.patterns();
        for pattern in old.difference(&patterns) {
            trie.remove(&key(pattern)?)?;
        }
        for pattern in patterns {
            trie.insert(&key(&pattern)?, self.names_of(&pattern), 0)?;
        }
        Ok(())
    }

    /// The names, and beside each `*.` and domain the domain alone, which is not one of its names.
    fn patterns(&self) -> BTreeSet<String> {
        let names = self.numbered.iter().filter(|name| !name.is_empty());
        let domains = names.clone().filter_map(|name| name.strip_prefix("*."));
        let domains = domains.map(str::to_owned);
        names.cloned().chain(domains).collect()
    }

    /// The names that stand for all that a pattern stands for, as bits.
    fn names_of(&self, pattern: &str) -> u64 {
        let covers = |name: &String| {
            name == pattern
                || name
                    .strip_prefix('*')
                    .is_some_and(|domain| pattern.ends_with(domain))
        };
        let names = self.numbered.iter().enumerate();
        let covering = names.filter(|(_, name)| covers(name));
        covering.fold(0, |all, (number, _)| all | 1 << number)
    }

    /// What the programs have learned.
    ///
    /// # Errors
    /// A map can't be read.
    pub(super) fn read(&self, ebpf: &Ebpf) -> Result<Vec<LearnedName>> {
        if self.numbered.is_empty() {
            return Ok(Vec::new());
        }
        let lookups: PerCpuArray<_, u64> = map(ebpf, "LOOKUPS")?.try_into()?;
        let addresses = learned(&map(ebpf, "LEARNED")?.try_into()?)?;
        let mut names = Vec::with_capacity(self.numbered.len());
        for (number, name) in (0_u32..).zip(&self.numbered) {
            let known = addresses
                .iter()
                .filter(|(_, names)| names >> number & 1 != 0);
            names.push(LearnedName {
                name: name.clone(),
                lookups: lookups.get(&number, 0)?.iter().sum(),
                addresses: known.map(|(address, _)| *address).collect(),
            });
        }
        Ok(names)
    }
}

/// The addresses that were learned, sorted, each with the names that it is known by.
fn learned(entries: &LearnedMap<impl Borrow<MapData>>) -> Result<Vec<(IpAddr, u64)>> {
    let mut learned = Vec::new();
    for entry in entries {
        let (address, known) = entry?;
        learned.push((Ipv6Addr::from(address).to_canonical(), known.mask()));
    }
    learned.sort_unstable();
    Ok(learned)
}

/// Removes the addresses and the count of lookups of names that are not looked for any more. A response that another
/// CPU reads meanwhile can lose an address that one of these names shares with another name.
fn forget(ebpf: &mut Ebpf, numbers: &[usize]) -> Result<()> {
    let mut entries: LearnedMap<&mut MapData> = map_mut(ebpf, "LEARNED")?.try_into()?;
    let learned: Vec<_> = entries.iter().collect::<Result<_, _>>()?;
    for (address, mut known) in learned {
        let before = known;
        for number in numbers {
            known.names[*number] = 0;
        }
        if known == Known::NOBODY {
            entries.remove(&address)?;
        } else if known != before {
            entries.insert(address, known, 0)?;
        }
    }
    let mut lookups: PerCpuArray<_, u64> = map_mut(ebpf, "LOOKUPS")?.try_into()?;
    for number in numbers {
        let none = PerCpuValues::try_from(vec![0; nr_cpus().map_err(|(_, error)| error)?])?;
        lookups.set(u32::try_from(*number)?, none, 0)?;
    }
    Ok(())
}

/// [`NAMES_MAX`], as an index of a map.
#[expect(clippy::cast_possible_truncation, reason = "it is 64")]
const NAMES: u32 = NAMES_MAX as u32;

fn map<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a aya::maps::Map> {
    ebpf.map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))
}

fn map_mut<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::maps::Map> {
    ebpf.map_mut(name)
        .with_context(|| format!("the eBPF object has no map {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_gives_all_names_that_cover_it() {
        let names = [
            "*.example.com",
            "api.example.com",
            "*.eu.example.com",
            "example.com",
        ];
        let names = NumberedNames {
            numbered: names.map(str::to_owned).to_vec(),
            applied: BTreeSet::new(),
        };
        let expected = [
            "*.eu.example.com",
            "*.example.com",
            "api.example.com",
            "eu.example.com",
            "example.com",
        ];
        assert!(names.patterns().iter().eq(expected));
        for (pattern, mask) in [
            ("*.eu.example.com", 0b101),
            ("*.example.com", 0b1),
            ("api.example.com", 0b11),
            ("eu.example.com", 0b1),
            ("example.com", 0b1000),
        ] {
            assert_eq!(names.names_of(pattern), mask, "{pattern}");
        }
    }
}
