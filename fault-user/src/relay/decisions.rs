//! What the toxics of a run's rules decide about connections: recorded, and repeated from a record.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::attributes::StreamDirection;
use crate::sys::clock::monotonic_ns;

/// How many decisions may wait to be taken off a [`DecisionLog`]. What was drawn for chunks takes half of that, so that
/// it does not displace which connections were hit.
const WAITING: usize = 16_384;

/// A decision of a stream rule about one direction of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamDecision {
    /// The rule's number among all rules, from 1.
    pub rule: u32,
    /// The connection's ordinal among those of the rule's target that passed through the relay, from 1; with UDP the
    /// client's.
    pub connection: u64,
    /// The direction that the fault acts on.
    pub direction: StreamDirection,
    /// The fault.
    pub action: Cow<'static, str>,
    /// Which of a mix's faults that is, from 1; otherwise 0 and omitted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub arm: usize,
    /// Where in this direction something was drawn or counted: a number of bytes, or the ordinal of a request or
    /// datagram, from 1. `None` for the decision that the fault acts on the connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
    /// What was drawn: a time in nanoseconds, a size in bytes, or a status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// The time in nanoseconds of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields so")]
const fn is_zero(arm: &usize) -> bool {
    *arm == 0
}

/// Decisions that wait to be taken. What comes while it is full is lost, and counted.
#[derive(Debug, Default)]
pub struct DecisionLog {
    waiting: Mutex<Vec<StreamDecision>>,
    lost: AtomicU64,
}

impl DecisionLog {
    fn add(&self, decision: StreamDecision) {
        let most = if decision.at.is_some() {
            WAITING / 2
        } else {
            WAITING
        };
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < most {
            waiting.push(decision);
        } else {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Appends the decisions that have come since the last call to `decisions`.
    pub fn drain(&self, decisions: &mut Vec<StreamDecision>) {
        decisions.append(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// How many were lost so far.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Whose decisions they are: rule, connection, direction.
type Key = (u32, u64, StreamDirection);

/// What was decided about one direction of a connection.
#[derive(Debug, Default)]
struct Recorded {
    arm: usize,
    /// In order, each once.
    places: Vec<u64>,
    is_repeated: AtomicBool,
}

/// Recorded decisions, to be repeated.
#[derive(Debug, Default)]
pub struct StreamReplay(HashMap<Key, Recorded>);

impl FromIterator<StreamDecision> for StreamReplay {
    fn from_iter<I: IntoIterator<Item = StreamDecision>>(decisions: I) -> Self {
        let mut all = HashMap::<Key, Recorded>::new();
        for one in decisions {
            let key = (one.rule, one.connection, one.direction);
            let known = all.entry(key).or_default();
            known.arm = one.arm;
            known.places.extend(one.at);
        }
        for known in all.values_mut() {
            known.places.sort_unstable();
            known.places.dedup();
        }
        Self(all)
    }
}

impl StreamReplay {
    /// The connections (once for each direction) that a rule, numbered from 1, was recorded to act on, and on how many
    /// of these it has acted again.
    #[must_use]
    pub fn count(&self, rule: u32) -> (u64, u64) {
        let own = self.0.iter().filter(|((of, ..), _)| *of == rule);
        own.fold((0, 0), |(all, repeated), (_, one)| {
            let is_repeated = one.is_repeated.load(Ordering::Relaxed);
            (all + 1, repeated + u64::from(is_repeated))
        })
    }
}

/// What becomes of a toxic's decisions. By default they are drawn, and not recorded.
#[derive(Clone, Debug, Default)]
pub struct Decisions {
    /// Where they are recorded.
    pub log: Option<Arc<DecisionLog>>,
    /// What is repeated instead of drawing anew.
    pub replay: Option<Arc<StreamReplay>>,
    /// The number of the toxic's rule among all rules, from 1.
    pub rule: u32,
}

impl PartialEq for Decisions {
    fn eq(&self, other: &Self) -> bool {
        let log = |one: &Self| one.log.as_ref().map(Arc::as_ptr);
        let replay = |one: &Self| one.replay.as_ref().map(Arc::as_ptr);
        self.rule == other.rule && log(self) == log(other) && replay(self) == replay(other)
    }
}

impl Decisions {
    /// The same for the rule with this number, from 1.
    #[must_use]
    pub fn of_rule(&self, rule: u32) -> Self {
        Self {
            rule,
            ..self.clone()
        }
    }

    /// Which of a mix's faults acts on a connection, from 1, or 0 for a toxic that is no mix; nothing where it does not act.
    /// That is repeated, or else drawn.
    pub(super) fn arm(
        &self,
        connection: u64,
        direction: StreamDirection,
        draw: impl FnOnce() -> Option<usize>,
    ) -> Option<usize> {
        let Some(replay) = &self.replay else {
            return draw();
        };
        let known = replay.0.get(&(self.rule, connection, direction));
        known.map(|known| known.arm)
    }
}

/// The decisions of one toxic about one direction of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Notes {
    pub(super) decisions: Decisions,
    pub(super) connection: u64,
    pub(super) direction: StreamDirection,
    pub(super) action: &'static str,
    pub(super) arm: usize,
}

impl Notes {
    /// Of a toxic whose decisions nobody records or repeats.
    pub(super) fn unkept() -> Self {
        Self {
            decisions: Decisions::default(),
            connection: 1,
            direction: StreamDirection::Upstream,
            action: "",
            arm: 0,
        }
    }

    /// The toxic acts on the connection from now on.
    pub(super) fn begin(&self) {
        if let Some(known) = self.recorded() {
            known.is_repeated.store(true, Ordering::Relaxed);
        }
        self.add(None, None);
    }

    /// Something was drawn or counted at this place: see [`StreamDecision::at`] and [`StreamDecision::value`].
    pub(super) fn note(&self, at: u64, value: Option<u64>) {
        self.add(Some(at), value);
    }

    /// A time was drawn at this place.
    pub(super) fn note_time(&self, at: u64, time: Duration) {
        self.note(at, Some(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)));
    }

    /// The places that were recorded, in order; nothing where decisions are not repeated.
    pub(super) fn recorded_places(&self) -> Option<&[u64]> {
        self.decisions.replay.as_ref()?;
        Some(self.recorded().map_or(&[], |known| &known.places))
    }

    /// Whether something was recorded at this place; nothing where decisions are not repeated.
    pub(super) fn repeats(&self, at: u64) -> Option<bool> {
        let places = self.recorded_places()?;
        Some(places.binary_search(&at).is_ok())
    }

    fn recorded(&self) -> Option<&Recorded> {
        let key = (self.decisions.rule, self.connection, self.direction);
        self.decisions.replay.as_ref()?.0.get(&key)
    }

    fn add(&self, at: Option<u64>, value: Option<u64>) {
        let Some(log) = &self.decisions.log else {
            return;
        };
        log.add(StreamDecision {
            rule: self.decisions.rule,
            connection: self.connection,
            direction: self.direction,
            action: Cow::Borrowed(self.action),
            arm: self.arm,
            at,
            value,
            time_ns: monotonic_ns(),
        });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Notes of what was recorded at these places of the first connection, and where they are recorded again.
    pub(in crate::relay) fn repeating(places: &[u64]) -> (Notes, Arc<DecisionLog>) {
        let log = Arc::<DecisionLog>::default();
        let decision = |at| StreamDecision {
            rule: 1,
            connection: 1,
            direction: StreamDirection::Upstream,
            action: "noop".into(),
            arm: 0,
            at,
            value: None,
            time_ns: 0,
        };
        let places = places.iter().map(|at| decision(Some(*at)));
        let replay = places.chain([decision(None)]).collect();
        let mut notes = Notes::unkept();
        notes.decisions = Decisions {
            log: Some(Arc::clone(&log)),
            replay: Some(Arc::new(replay)),
            rule: 1,
        };
        (notes, log)
    }

    /// The places and values that were recorded since the last call.
    pub(in crate::relay) fn noted(log: &DecisionLog) -> Vec<(Option<u64>, Option<u64>)> {
        let mut all = Vec::new();
        log.drain(&mut all);
        all.into_iter().map(|one| (one.at, one.value)).collect()
    }

    #[test]
    fn what_comes_too_fast_is_counted_and_leaves_room_for_what_acts() {
        let (notes, log) = repeating(&[]);
        for at in 0..WAITING as u64 {
            notes.note(at, None);
        }
        assert_eq!(log.lost(), WAITING as u64 / 2);
        notes.begin();
        assert_eq!(log.lost(), WAITING as u64 / 2);
        assert_eq!(noted(&log).len(), WAITING / 2 + 1);
        notes.note(7, None);
        assert_eq!(noted(&log), [(Some(7), None)]);
    }

    #[test]
    fn a_line_of_the_file_is_read_again() {
        let decision = StreamDecision {
            rule: 3,
            connection: 7,
            direction: StreamDirection::Downstream,
            action: "latency".into(),
            arm: 2,
            at: Some(1200),
            value: Some(5),
            time_ns: 9,
        };
        let text = serde_json::to_string(&decision).unwrap();
        assert_eq!(
            text,
            r#"{"rule":3,"connection":7,"direction":"to-client","action":"latency","arm":2,"at":1200,"value":5,"time_ns":9}"#
        );
        assert_eq!(
            serde_json::from_str::<StreamDecision>(&text).unwrap(),
            decision
        );
    }
}
