//! Stages that take chunks as datagrams: loss, duplicate, reorder.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Chunk, End, Place, Pop, Queue, ROOM, Rest, Stage};
use crate::relay::fault::{Duplicate, Fault, Reorder, milliseconds};
use crate::relay::random::Draws;
use crate::relay::toxic::{Datagrams, Shared};

/// Has another stage act on some; the others pass it by.
pub(super) struct PickedStage {
    stage: Box<dyn Stage>,
    datagrams: Datagrams,
    /// Those of this client in this direction.
    count: u64,
    /// What may go on.
    ready: Queue,
    /// What else the stage gave.
    told: Option<Pop>,
    shared: Arc<Shared>,
}

impl PickedStage {
    pub(super) fn new(stage: Box<dyn Stage>, datagrams: Datagrams, place: &Place) -> Self {
        Self {
            stage,
            datagrams,
            count: 0,
            ready: Queue::default(),
            told: None,
            shared: Arc::clone(&place.shared),
        }
    }

    fn next(&mut self) -> u64 {
        if self.datagrams.count_all {
            return self.shared.datagrams.fetch_add(1, Ordering::Relaxed) + 1;
        }
        self.count += 1;
        self.count
    }
}

impl Stage for PickedStage {
    fn room(&self, now: Instant) -> usize {
        self.stage.room(now).min(self.ready.room(ROOM))
    }

    fn push(&mut self, chunk: Chunk) {
        let number = self.next();
        if self.datagrams.picked.has(number) {
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

    fn end(&mut self, end: End, at: Instant) {
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

    fn update(&mut self, fault: &Fault, now: Instant) {
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
        self.ready.bytes + self.stage.bytes()
    }
}

/// Drops some.
pub(super) struct LossStage {
    chances: Chances,
    /// The last one was dropped.
    has_lost: bool,
    draws: Draws,
    queue: Queue,
    shared: Arc<Shared>,
}

impl LossStage {
    pub(super) fn new(fault: &Fault, place: &Place) -> Self {
        Self {
            chances: Chances::of(fault),
            has_lost: false,
            draws: Draws::new(place.key),
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

/// How likely a chunk is dropped.
struct Chances {
    otherwise: f64,
    after_a_loss: f64,
}

impl Chances {
    fn of(fault: &Fault) -> Self {
        let (otherwise, more) = match fault {
            Fault::Loss(attributes) => (attributes.probability.0, 0.0),
            Fault::PacketLoss(attributes) => (
                attributes.loss_rate.clamp(0.0, 1.0),
                attributes.correlation.clamp(0.0, 1.0),
            ),
            _ => (0.0, 0.0),
        };
        Self {
            otherwise,
            after_a_loss: otherwise + more,
        }
    }
}

impl Stage for LossStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        let chance = if self.has_lost {
            self.chances.after_a_loss
        } else {
            self.chances.otherwise
        };
        self.has_lost = self.draws.unit() < chance;
        if self.has_lost {
            self.shared.counters.hit();
        } else {
            self.queue.push(chunk);
        }
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        if let Some(chunk) = self.queue.pop() {
            return Pop::Chunk(chunk);
        }
        let end = self.queue.pop_end();
        end.map_or(Pop::Wait(None), |(end, at)| Pop::End(end, at))
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        self.chances = Chances::of(fault);
    }

    fn take(self: Box<Self>) -> Rest {
        self.queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn bytes(&self) -> usize {
        self.queue.bytes
    }
}

/// Sends some twice.
pub(super) struct DuplicateStage {
    probability: f64,
    draws: Draws,
    queue: Queue,
    shared: Arc<Shared>,
}

impl DuplicateStage {
    pub(super) fn new(attributes: &Duplicate, place: &Place) -> Self {
        Self {
            probability: attributes.probability.0,
            draws: Draws::new(place.key),
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for DuplicateStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        if self.draws.unit() < self.probability {
            self.shared.counters.hit();
            self.queue.push(chunk.clone());
        }
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.queue.pop().map_or(Pop::Wait(None), Pop::Chunk)
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Duplicate(attributes) = fault {
            self.probability = attributes.probability.0;
        }
    }

    fn take(self: Box<Self>) -> Rest {
        self.queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn bytes(&self) -> usize {
        self.queue.bytes
    }
}

/// How long a held datagram waits when the toxic does not say, in milliseconds.
const DEFAULT_WAIT_MS: i64 = 100;

/// One that is held back, until so many have passed it or its time is over.
struct Held {
    chunk: Chunk,
    to_pass: u64,
    due: Instant,
}

/// Holds some back until others have overtaken them.
pub(super) struct ReorderStage {
    attributes: Reorder,
    draws: Draws,
    held: VecDeque<Held>,
    queue: Queue,
    shared: Arc<Shared>,
}

impl ReorderStage {
    pub(super) fn new(attributes: &Reorder, place: &Place) -> Self {
        Self {
            attributes: attributes.clone(),
            draws: Draws::new(place.key),
            held: VecDeque::new(),
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }

    /// Lets those go that have been overtaken often enough.
    fn release(&mut self, passed: u64) {
        for held in &mut self.held {
            held.to_pass = held.to_pass.saturating_sub(passed);
        }
        while let Some(held) = self.held.pop_front_if(|held| held.to_pass == 0) {
            self.queue.push(held.chunk);
        }
    }
}

impl Stage for ReorderStage {
    fn room(&self, _now: Instant) -> usize {
        if self.held.len() > 1024 {
            0
        } else {
            self.queue.room(ROOM)
        }
    }

    fn push(&mut self, chunk: Chunk) {
        if self.draws.unit() < self.attributes.probability.0 {
            self.shared.counters.hit();
            let wait = if self.attributes.max_wait > 0 {
                self.attributes.max_wait
            } else {
                DEFAULT_WAIT_MS
            };
            let to_pass = self.attributes.gap.max(1).unsigned_abs();
            let due = chunk.at + milliseconds(wait);
            self.held.push_back(Held {
                chunk,
                to_pass,
                due,
            });
            return;
        }
        self.queue.push(chunk);
        self.release(1);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.release(u64::MAX);
        self.queue.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some(chunk) = self.queue.pop() {
            return Pop::Chunk(chunk);
        }
        match self.held.front() {
            Some(held) if held.due > now => Pop::Wait(Some(held.due)),
            Some(_) => self
                .held
                .pop_front()
                .map_or(Pop::Wait(None), |held| Pop::Chunk(held.chunk)),
            None => Pop::Wait(None),
        }
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Reorder(attributes) = fault {
            self.attributes = attributes.clone();
        }
    }

    fn take(mut self: Box<Self>) -> Rest {
        self.release(u64::MAX);
        self.queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.held.is_empty()
    }

    fn bytes(&self) -> usize {
        let held = self.held.iter().map(|held| held.chunk.data.len());
        self.queue.bytes + held.sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::fault::{CorruptData, CorruptMode, Latency};
    use crate::relay::stage::build;
    use crate::relay::toxic::Picked;
    use bytes::Bytes;

    fn picked(fault: &Fault, numbers: Picked) -> (PickedStage, Instant) {
        let now = Instant::now();
        let place = Place {
            key: 1,
            opened: now,
            now,
            is_new: true,
            is_datagram: true,
            shared: Arc::default(),
            trouble: Arc::default(),
        };
        let datagrams = Datagrams {
            picked: numbers,
            count_all: false,
        };
        let stage = build(fault, &place).expect("a stage");
        (PickedStage::new(stage, datagrams, &place), now)
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
            stage.push(Chunk { data, at });
        }
    }

    #[test]
    fn what_is_not_held_stays_in_order() {
        let fault = Fault::CorruptData(CorruptData {
            mode: CorruptMode::Zero,
            probability: None,
            offset: None,
        });
        let every_second = Picked {
            step: 2,
            ..Picked::ALL
        };
        let (mut stage, now) = picked(&fault, every_second);
        push(&mut stage, now, 1..=5);
        assert_eq!(drain(&mut stage, now), [1, 0, 3, 0, 5]);
        assert!(stage.is_empty());
    }

    #[test]
    fn what_is_held_is_overtaken() {
        let fault = Fault::Latency(Latency {
            latency: 10,
            jitter: 0,
        });
        let second = Picked {
            first: 2,
            last: 2,
            ..Picked::ALL
        };
        let (mut stage, now) = picked(&fault, second);
        push(&mut stage, now, 1..=3);
        assert_eq!(drain(&mut stage, now), [1, 3]);
        assert!(!stage.is_empty());
        assert_eq!(drain(&mut stage, now + milliseconds(10)), [2]);
    }
}
