//! Names whose addresses the programs learn from DNS: what they are told of these, and what they have learned.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context as _, Result, bail};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use fault_common::abi::{Known, NAMES_MAX};
use fault_common::dns::{NameKey, key_of};

use crate::plan::tables::{NameClasses, Tables};

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

/// The names that the programs know. Each keeps its place, by which addresses are remembered.
#[derive(Debug, Default)]
pub(super) struct Names(Vec<String>);

impl Names {
    /// Tells the programs the names of a rule set, which is not applied yet.
    ///
    /// # Errors
    /// More than [`NAMES_MAX`] names since the start, one that no host can have, or the kernel refuses.
    pub(super) fn write(
        &mut self,
        ebpf: &mut Ebpf,
        tables: &Tables,
        generation: u32,
    ) -> Result<()> {
        let mut classes = [0_u32; NAMES_MAX];
        let mut is_new = false;
        for NameClasses {
            name,
            host,
            question,
        } in &tables.names
        {
            let known = self.0.iter().position(|other| other == name);
            let place = known.unwrap_or(self.0.len());
            if place >= NAMES_MAX {
                bail!("rules can be aimed at {NAMES_MAX} different names: use fewer");
            }
            if known.is_none() {
                self.0.push(name.clone());
                is_new = true;
            }
            classes[place] = u32::from(*host) | u32::from(*question) << 16;
        }
        if tables.names.is_empty() {
            return Ok(());
        }
        let mut entries: Array<_, u32> = map_mut(ebpf, "NAME_CLASSES")?.try_into()?;
        for (index, class) in (generation * NAMES..).zip(classes) {
            entries.set(index, class, 0)?;
        }
        if is_new {
            self.write_keys(ebpf)?;
        }
        Ok(())
    }

    /// Tells the programs by which keys the names are found.
    fn write_keys(&self, ebpf: &mut Ebpf) -> Result<()> {
        let mut trie: LpmTrie<_, NameKey, u64> = map_mut(ebpf, "NAMES")?.try_into()?;
        for pattern in self.patterns() {
            let (key, bits) =
                key_of(&pattern).with_context(|| format!("`{pattern}` is too long for a name"))?;
            trie.insert(&Key::new(bits, key), self.names_of(&pattern), 0)?;
        }
        Ok(())
    }

    /// The names, and beside each `*.` and domain the domain alone, which is not one of its names.
    fn patterns(&self) -> BTreeSet<String> {
        let domains = self.0.iter().filter_map(|name| name.strip_prefix("*."));
        let domains = domains.map(str::to_owned);
        self.0.iter().cloned().chain(domains).collect()
    }

    /// The names that stand for all that a pattern stands for, as bits.
    fn names_of(&self, pattern: &str) -> u64 {
        let covers = |name: &String| {
            name == pattern
                || name
                    .strip_prefix('*')
                    .is_some_and(|domain| pattern.ends_with(domain))
        };
        let names = self.0.iter().enumerate();
        let covering = names.filter(|(_, name)| covers(name));
        covering.fold(0, |all, (place, _)| all | 1 << place)
    }

    /// What the programs have learned.
    ///
    /// # Errors
    /// The kernel refuses to read a map.
    pub(super) fn read(&self, ebpf: &Ebpf) -> Result<Vec<LearnedName>> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let lookups: PerCpuArray<_, u64> = map(ebpf, "LOOKUPS")?.try_into()?;
        let addresses = learned(ebpf)?;
        let mut names = Vec::with_capacity(self.0.len());
        for (place, name) in (0_u32..).zip(&self.0) {
            let known = addresses
                .iter()
                .filter(|(_, names)| names >> place & 1 != 0);
            names.push(LearnedName {
                name: name.clone(),
                lookups: lookups.get(&place, 0)?.iter().sum(),
                addresses: known.map(|(address, _)| *address).collect(),
            });
        }
        Ok(names)
    }
}

/// The addresses that were learned, sorted, each with the names that it is known by.
fn learned(ebpf: &Ebpf) -> Result<Vec<(IpAddr, u64)>> {
    let entries: HashMap<&MapData, [u8; 16], Known> = map(ebpf, "LEARNED")?.try_into()?;
    let mut learned = Vec::new();
    for entry in &entries {
        let (address, known) = entry?;
        learned.push((Ipv6Addr::from(address).to_canonical(), known.mask()));
    }
    learned.sort_unstable();
    Ok(learned)
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
        let names = Names(names.map(str::to_owned).to_vec());
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
