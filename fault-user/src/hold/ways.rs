//! Where packets that are held go on, by number: interfaces come and go.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, Result};
use fault_common::abi::PLACES;

/// The numbers of interfaces, outwards (false) and inwards.
pub type WayNumbers = Arc<RwLock<HashMap<(u32, bool), u16>>>;

/// The number of one way, where there is one.
#[must_use]
pub fn number_of(places: &WayNumbers, way: (u32, bool)) -> Option<u16> {
    let places = places.read().unwrap_or_else(PoisonError::into_inner);
    places.get(&way).copied()
}

/// Numbers that are given out, and those that are free.
pub struct Ways {
    places: WayNumbers,
    /// The one that has been free for longest is given out next: packets may still be held for the last owner's.
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
    /// The numbers in use, to be looked up elsewhere.
    #[must_use]
    pub fn places(&self) -> WayNumbers {
        Arc::clone(&self.places)
    }

    /// Gives both ways of an interface a number.
    ///
    /// # Errors
    /// None is left.
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

    /// Takes the numbers of an interface back.
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
