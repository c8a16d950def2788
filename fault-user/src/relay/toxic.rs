//! Toxics: a fault with a name, a direction and a toxicity, and the ordered set that a relay has of them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::attributes::{StreamDirection, Transport};
use super::decisions::{Decisions, Notes};
use super::fault::RelayFault;
use super::greeting::{Greeted, GreetingFilter};
use super::picked::{Datagrams, Picked};
use super::random;
use super::shared::ToxicShared;

/// What a user says of a toxic.
#[derive(Clone, Debug, PartialEq)]
pub struct ToxicConfig {
    /// Unique in its relay, over both directions.
    pub name: String,
    /// Where it acts.
    pub direction: StreamDirection,
    /// The direction as the user wrote it, to be shown again.
    pub stream: String,
    /// The share of connections that it acts on; drawn once per connection, 0 to 1.
    pub toxicity: f64,
    /// Of which connections that share is, by their ordinals.
    pub connections: Picked,
    /// And by what their clients ask for.
    pub filter: GreetingFilter,
    /// Of their datagrams; nothing for all.
    pub datagrams: Option<Datagrams>,
    /// What it does.
    pub fault: RelayFault,
    /// What becomes of its decisions.
    pub decisions: Decisions,
}

/// Why a toxic was not added, changed or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToxicError {
    /// There is one with that name.
    Exists,
    /// There is none with that name.
    NotFound,
    /// The fault does not work on the relay's transport.
    Unfit {
        /// The fault's name.
        kind: &'static str,
    },
}

impl fmt::Display for ToxicError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists => formatter.write_str("toxic already exists"),
            Self::NotFound => formatter.write_str("toxic not found"),
            Self::Unfit { kind } => {
                write!(formatter, "{kind} does not work on this proxy's transport")
            }
        }
    }
}

impl std::error::Error for ToxicError {}

/// One version of a toxic.
#[derive(Debug)]
pub(crate) struct Toxic {
    /// Tells a toxic from another of the same name that came before it.
    pub(crate) id: u64,
    /// Grows with each change.
    pub(crate) revision: u64,
    pub(crate) config: ToxicConfig,
    pub(crate) shared: Arc<ToxicShared>,
}

impl Toxic {
    /// What the toxic does to a connection, given the relay's key, the connection's ordinal and what its client asks for;
    /// and which of a mix's faults that is, from 1, or 0.
    pub(crate) fn on_connection(
        &self,
        relay_key: u64,
        connection: u64,
        greeted: &Greeted,
    ) -> Option<(usize, &RelayFault)> {
        let ToxicConfig {
            filter, decisions, ..
        } = &self.config;
        if !filter.selects(greeted) {
            return None;
        }
        let draw = || self.draw(relay_key, connection);
        let arm = decisions.arm(connection, self.config.direction, draw)?;
        let fault = match &self.config.fault {
            RelayFault::Mix(mix) => &mix.faults.get(arm.checked_sub(1)?)?.fault,
            fault => fault,
        };
        Some((arm, fault))
    }

    /// Which of a mix's faults the toxic does to a connection, or 0 where it is no mix; nothing where it does nothing.
    fn draw(&self, relay_key: u64, connection: u64) -> Option<usize> {
        let key = self.pair_key(relay_key, connection);
        if !self.config.connections.has(connection)
            || random::unit(random::fold(key, 1)) >= self.config.toxicity
        {
            return None;
        }
        match &self.config.fault {
            RelayFault::Mix(mix) => mix.choose(random::unit(random::fold(key, 2))),
            _ => Some(0),
        }
    }

    /// Keeps what it decides about a connection on which this fault acts.
    pub(crate) fn notes(&self, connection: u64, (arm, fault): (usize, &RelayFault)) -> Notes {
        Notes {
            decisions: self.config.decisions.clone(),
            connection,
            direction: self.config.direction,
            action: fault.kind(),
            arm,
        }
    }

    /// The key of the draws that decide whether and how the toxic acts on this connection. Toxics whose names are the
    /// same up to an `@`, one for each direction, decide as one.
    fn pair_key(&self, relay_key: u64, connection: u64) -> u64 {
        match self.config.name.split_once('@') {
            Some((name, _)) => random::fold(random::fold_text(relay_key, name), connection),
            None => self.key(relay_key, connection),
        }
    }

    /// The key of everything that is drawn for this toxic on this connection.
    pub(crate) fn key(&self, relay_key: u64, connection: u64) -> u64 {
        let key = random::fold(random::fold_text(relay_key, &self.config.name), connection);
        random::fold(key, self.config.direction.index() as u64)
    }
}

#[derive(Debug, Default)]
struct State {
    toxics: Arc<Vec<Arc<Toxic>>>,
    next_id: u64,
}

/// The toxics of a relay, in the order of adding. Connections read it lock-free while nothing changes.
#[derive(Debug, Default)]
pub(crate) struct ToxicSet {
    version: AtomicU64,
    state: RwLock<State>,
    /// A toxic needs to know what clients ask for, or may be added.
    reads_greetings: AtomicBool,
}

impl ToxicSet {
    /// Grows with each change of the set.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }

    /// Has what new clients ask for read, for toxics that are added later.
    pub(crate) fn read_greetings(&self) {
        self.reads_greetings.store(true, Ordering::SeqCst);
    }

    /// Whether what new clients ask for is read.
    pub(crate) fn reads_greetings(&self) -> bool {
        self.reads_greetings.load(Ordering::SeqCst)
    }

    /// Whether a toxic selects connections by what their clients must ask for.
    pub(crate) fn are_demanding(&self) -> bool {
        let (_, toxics) = self.snapshot();
        toxics
            .iter()
            .any(|toxic| toxic.config.filter.is_demanding())
    }

    /// The toxics as they are, and the version that this is.
    pub(crate) fn snapshot(&self) -> (u64, Arc<Vec<Arc<Toxic>>>) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        (self.version(), Arc::clone(&state.toxics))
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<Arc<Toxic>>, &mut u64) -> Result<T, ToxicError>,
    ) -> Result<T, ToxicError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut toxics = state.toxics.as_ref().clone();
        let changed = change(&mut toxics, &mut state.next_id)?;
        state.toxics = Arc::new(toxics);
        self.version.fetch_add(1, Ordering::SeqCst);
        Ok(changed)
    }

    pub(crate) fn add(&self, config: ToxicConfig, transport: Transport) -> Result<(), ToxicError> {
        if !config.fault.acts_on(transport) {
            return Err(ToxicError::Unfit {
                kind: config.fault.kind(),
            });
        }
        let is_filtered = !config.filter.is_empty();
        self.change(|toxics, next_id| {
            if toxics.iter().any(|toxic| toxic.config.name == config.name) {
                return Err(ToxicError::Exists);
            }
            *next_id += 1;
            toxics.push(Arc::new(Toxic {
                id: *next_id,
                revision: 0,
                config,
                shared: Arc::default(),
            }));
            if is_filtered {
                self.read_greetings();
            }
            Ok(())
        })
    }

    pub(crate) fn update(
        &self,
        name: &str,
        fault: Option<RelayFault>,
        toxicity: Option<f64>,
    ) -> Result<ToxicConfig, ToxicError> {
        self.change(|toxics, _| {
            let toxic = toxics
                .iter_mut()
                .find(|toxic| toxic.config.name == name)
                .ok_or(ToxicError::NotFound)?;
            let mut config = toxic.config.clone();
            config.fault = fault.unwrap_or(config.fault);
            config.toxicity = toxicity.unwrap_or(config.toxicity);
            *toxic = Arc::new(Toxic {
                id: toxic.id,
                revision: toxic.revision + 1,
                config: config.clone(),
                shared: Arc::clone(&toxic.shared),
            });
            Ok(config)
        })
    }

    pub(crate) fn remove(&self, name: &str) -> Result<ToxicConfig, ToxicError> {
        self.change(|toxics, _| {
            let index = toxics
                .iter()
                .position(|toxic| toxic.config.name == name)
                .ok_or(ToxicError::NotFound)?;
            Ok(toxics.remove(index).config.clone())
        })
    }

    pub(crate) fn clear(&self) {
        let cleared = self.change(|toxics, _| {
            toxics.clear();
            Ok(())
        });
        debug_assert!(cleared.is_ok(), "clearing has no way to fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::fault::Latency;

    fn config(name: &str, toxicity: f64) -> ToxicConfig {
        ToxicConfig {
            name: name.to_owned(),
            direction: StreamDirection::Downstream,
            stream: "downstream".to_owned(),
            toxicity,
            connections: Picked::ALL,
            filter: GreetingFilter::default(),
            datagrams: None,
            fault: RelayFault::Latency(Latency::default()),
            decisions: Decisions::default(),
        }
    }

    #[test]
    fn toxicity_is_drawn_per_connection_and_does_not_change_with_other_toxics() {
        let set = ToxicSet::default();
        set.add(config("a", 0.3), Transport::Tcp).expect("new");
        let hit = |set: &ToxicSet| -> Vec<u64> {
            let (_, toxics) = set.snapshot();
            (1..=1000)
                .filter(|ordinal| {
                    toxics[0]
                        .on_connection(7, *ordinal, &Greeted::Unread)
                        .is_some()
                })
                .collect()
        };
        let before = hit(&set);
        assert!(
            (250..350).contains(&before.len()),
            "{} of 1000 at 30%",
            before.len()
        );
        set.add(config("b", 0.5), Transport::Tcp).expect("new");
        assert_eq!(hit(&set), before);
        set.update("a", None, Some(0.6)).expect("there");
        let after = hit(&set);
        assert!(
            before.iter().all(|ordinal| after.contains(ordinal)),
            "a higher toxicity only adds connections"
        );
    }

    #[test]
    fn numbers_are_picked_from_where_counting_begins() {
        let picked = Picked {
            first: 4,
            last: 9,
            step: 2,
            base: 3,
        };
        let all: Vec<u64> = (1..=12).filter(|number| picked.has(*number)).collect();
        assert_eq!(all, [5, 7, 9]);
        assert!((1..=12).all(|number| Picked::ALL.has(number)));
    }

    #[test]
    fn names_are_unique_and_versions_grow() {
        let set = ToxicSet::default();
        set.add(config("a", 1.0), Transport::Tcp).expect("new");
        let version = set.version();
        assert_eq!(
            set.add(config("a", 1.0), Transport::Tcp),
            Err(ToxicError::Exists)
        );
        assert_eq!(set.version(), version, "a failed change is none");
        assert_eq!(set.remove("b"), Err(ToxicError::NotFound));
        set.remove("a").expect("there");
        assert!(set.version() > version);
    }
}
