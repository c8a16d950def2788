//! Numbers for the interfaces and directions in which held packets continue.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, Result};
use fault_common::abi::PLACES;

/// The numbers of interfaces, each for outward (false) and inward packets.
pub type WayNumbers = Arc<RwLock<HashMap<(u32, bool), u16>>>;

/// The number of an interface and direction, if it has one.
#[must_use]
pub fn number_of(places: &WayNumbers, way: (u32, bool)) -> Option<u16> {
    let places = places.read().unwrap_or_else(PoisonError::into_inner);
    places.get(&way).copied()
}

/// The allocated and the free numbers.
pub struct Ways {
    places: WayNumbers,
    /// The number that has been free longest is allocated next, because packets may still be held for the previous
    /// owner.
    free: VecDeque<u16>,
}

impl Default for Ways {
    fn default() -> Self {
        Self {
            places: WayNumbers::default(),
            free: (1..u16::try_from(PLACES).unwrap_or(u16::MAX)).collect(),
        }
    }
}

impl Ways {
    /// The allocated numbers, shared with other threads.
    #[must_use]
    pub fn places(&self) -> WayNumbers {
        Arc::clone(&self.places)
    }

    /// Allocates numbers for both directions of an interface.
    ///
    /// # Errors
    /// No number is free.
    pub fn open(&mut self, interface_index: u32) -> Result<[(u16, bool); 2]> {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = |inwards| {
            let number = self.free.pop_front().with_context(|| {
                format!(
                    "packets can be held on {} interfaces at most",
                    PLACES / 2 - 1
                )
            })?;
            places.insert((interface_index, inwards), number);
            Ok((number, inwards))
        };
        let outwards = next(false);
        outwards.and_then(|one| Ok([one, next(true)?]))
    }

    /// Frees the numbers of an interface.
    pub fn close(&mut self, interface_index: u32) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        for inwards in [false, true] {
            self.free.extend(places.remove(&(interface_index, inwards)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_comes_again_last() {
        let mut ways = Ways::default();
        let first = ways.open(7).unwrap();
        assert_eq!(first, [(1, false), (2, true)]);
        ways.close(7);
        assert_eq!(number_of(&ways.places(), (7, false)), None);
        let rounds = (PLACES - 2) / 2;
        for interface in 0..rounds {
            let numbers = ways.open(interface).unwrap();
            assert!(
                numbers.iter().all(|one| !first.contains(one)),
                "{numbers:?}"
            );
        }
        ways.open(rounds).unwrap_err();
    }
}
