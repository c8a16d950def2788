//! What a rule picks by counting, and a stage of datagrams of which it picks some.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::decisions::Notes;
use super::shared::ToxicShared;
use super::stage::{Chunk, ChunkQueue, Pop, ROOM, Rest, Stage, StreamEnd, StreamFault};

/// Numbers from `first` to `last`, both included, of which every `step`-th is picked, beginning to count after `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// The smallest.
    pub first: u64,
    /// The largest.
    pub last: u64,
    /// 1 for all.
    pub step: u64,
    /// Multiples of `step` above this.
    pub base: u64,
}

impl Picked {
    /// Every number.
    pub const ALL: Self = Self {
        first: 0,
        last: u64::MAX,
        step: 1,
        base: 0,
    };

    /// Whether a number is among them.
    #[must_use]
    pub const fn has(&self, number: u64) -> bool {
        number >= self.first
            && number <= self.last
            && number.saturating_sub(self.base).is_multiple_of(self.step)
    }
}

/// Which datagrams a toxic acts on, by counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagrams {
    /// Their ordinals, from 1.
    pub picked: Picked,
    /// Over all clients, instead of each by itself.
    pub count_all: bool,
}

/// Has another stage act on some; the others pass it by.
pub(super) struct PickedStage {
    stage: Box<dyn Stage>,
    datagrams: Datagrams,
    /// Those of this client in this direction.
    count: u64,
    /// What may go on.
    ready: ChunkQueue,
    /// What else the stage gave.
    told: Option<Pop>,
    shared: Arc<ToxicShared>,
    notes: Notes,
}

impl PickedStage {
    /// What the stage itself decides is not kept.
    pub(super) fn new(
        stage: Box<dyn Stage>,
        datagrams: Datagrams,
        shared: &Arc<ToxicShared>,
        notes: Notes,
    ) -> Self {
        Self {
            stage,
            datagrams,
            count: 0,
            ready: ChunkQueue::default(),
            told: None,
            shared: Arc::clone(shared),
            notes,
        }
    }

    /// Whether the next datagram is picked.
    fn picks_next(&mut self) -> bool {
        self.count += 1;
        let picks = self.notes.repeats(self.count).unwrap_or_else(|| {
            let number = if self.datagrams.count_all {
                self.shared.datagrams.fetch_add(1, Ordering::Relaxed) + 1
            } else {
                self.count
            };
            self.datagrams.picked.has(number)
        });
        if picks {
            self.notes.note(self.count, None);
        }
        picks
    }
}

impl Stage for PickedStage {
    fn room(&self, now: Instant) -> usize {
        self.stage.room(now).min(self.ready.room(ROOM))
    }

    fn push(&mut self, chunk: Chunk) {
        if self.picks_next() {
            self.stage.push(chunk);
            return;
        }
        // What the stage does not hold stays ahead of it.
        while self.told.is_none() {
            match self.stage.pop(chunk.at) {
                Pop::Chunk(earlier) => self.ready.push(earlier),
                Pop::Wait(_) => break,
                other => self.told = Some(other),
            }
        }
        self.ready.push(chunk);
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
        self.stage.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some(chunk) = self.ready.pop() {
            return Pop::Chunk(chunk);
        }
        self.told.take().unwrap_or_else(|| self.stage.pop(now))
    }

    fn expired(&mut self, now: Instant) -> Pop {
        self.stage.expired(now)
    }

    fn starved(&mut self) {
        self.stage.starved();
    }

    fn update(&mut self, fault: &dyn StreamFault, now: Instant) {
        self.stage.update(fault, now);
    }

    fn take(self: Box<Self>) -> Rest {
        let mut rest = self.stage.take();
        let mut chunks = self.ready.into_rest().chunks;
        chunks.append(&mut rest.chunks);
        Rest { chunks, ..rest }
    }

    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.told.is_none() && self.stage.is_empty()
    }

    fn bytes(&self) -> usize {
        self.ready.bytes() + self.stage.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::decisions::tests::{noted, repeating};
    use crate::relay::fault::RelayFault;
    use crate::relay::fault::{CorruptData, Latency};
    use crate::relay::stage::StageContext;
    use crate::rule::CorruptDataMode;
    use bytes::Bytes;
    use std::time::Duration;

    fn picked(fault: &RelayFault, numbers: Picked, notes: Notes) -> (PickedStage, Instant) {
        let now = Instant::now();
        let place = StageContext {
            key: 1,
            opened: now,
            now,
            is_new: true,
            is_datagram: true,
            shared: Arc::default(),
            trouble: Arc::default(),
            notes: Notes::unkept(),
        };
        let datagrams = Datagrams {
            picked: numbers,
            count_all: true,
        };
        let stage = fault.stage(&place).expect("a stage");
        (
            PickedStage::new(stage, datagrams, &place.shared, notes),
            now,
        )
    }

    fn drain(stage: &mut PickedStage, now: Instant) -> Vec<u8> {
        let mut all = Vec::new();
        while let Pop::Chunk(chunk) = stage.pop(now) {
            all.push(chunk.data[0]);
        }
        all
    }

    fn push(stage: &mut PickedStage, at: Instant, numbers: std::ops::RangeInclusive<u8>) {
        for number in numbers {
            let data = Bytes::copy_from_slice(&[number]);
            stage.push(Chunk::new(data, at));
        }
    }

    #[test]
    fn what_is_not_held_stays_in_order() {
        let fault = RelayFault::CorruptData(CorruptData {
            mode: CorruptDataMode::Zero,
            probability: None,
            offset: None,
        });
        let every_second = Picked {
            step: 2,
            ..Picked::ALL
        };
        let (mut stage, now) = picked(&fault, every_second, Notes::unkept());
        push(&mut stage, now, 1..=5);
        assert_eq!(drain(&mut stage, now), [1, 0, 3, 0, 5]);
        assert!(stage.is_empty());
    }

    #[test]
    fn what_was_picked_of_a_client_is_picked_again() {
        let fault = RelayFault::CorruptData(CorruptData {
            mode: CorruptDataMode::Zero,
            probability: None,
            offset: None,
        });
        let (notes, log) = repeating(&[2, 5]);
        let (mut stage, now) = picked(&fault, Picked::ALL, notes);
        push(&mut stage, now, 1..=5);
        assert_eq!(drain(&mut stage, now), [1, 0, 3, 4, 0]);
        assert_eq!(noted(&log), [(Some(2), None), (Some(5), None)]);
    }

    #[test]
    fn what_is_held_is_overtaken() {
        let fault = RelayFault::Latency(Latency {
            latency: 10,
            jitter: 0,
        });
        let second = Picked {
            first: 2,
            last: 2,
            ..Picked::ALL
        };
        let (mut stage, now) = picked(&fault, second, Notes::unkept());
        push(&mut stage, now, 1..=3);
        assert_eq!(drain(&mut stage, now), [1, 3]);
        assert!(!stage.is_empty());
        assert_eq!(drain(&mut stage, now + Duration::from_millis(10)), [2]);
    }
}
