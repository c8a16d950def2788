//! Stages that only make sense on datagrams: loss, duplicate, reorder.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Chunk, End, Place, Pop, Queue, ROOM, Rest, Stage};
use crate::relay::fault::{Duplicate, Fault, Loss, Reorder, milliseconds};
use crate::relay::random::Draws;
use crate::relay::toxic::{Datagrams, Shared};

/// Has another stage act on some; the others pass it by.
pub(super) struct PickedStage {
    stage: Box<dyn Stage>,
    datagrams: Datagrams,
    /// Those of this client in this direction.
    count: u64,
    passing: Queue,
    shared: Arc<Shared>,
}

impl PickedStage {
    pub(super) fn new(stage: Box<dyn Stage>, datagrams: Datagrams, place: &Place) -> Self {
        Self {
            stage,
            datagrams,
            count: 0,
            passing: Queue::default(),
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
        self.stage.room(now).min(self.passing.room(ROOM))
    }

    fn push(&mut self, chunk: Chunk) {
        let number = self.next();
        if self.datagrams.picked.has(number) {
            self.stage.push(chunk);
        } else {
            self.passing.push(chunk);
        }
    }

    fn end(&mut self, end: End, at: Instant) {
        self.stage.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        match self.passing.pop() {
            Some(chunk) => Pop::Chunk(chunk),
            None => self.stage.pop(now),
        }
    }

    fn expired(&mut self, now: Instant) -> Pop {
        self.stage.expired(now)
    }

    fn update(&mut self, fault: &Fault, now: Instant) {
        self.stage.update(fault, now);
    }

    fn take(self: Box<Self>) -> Rest {
        let mut rest = self.stage.take();
        rest.chunks.extend(self.passing.into_rest().chunks);
        rest
    }

    fn is_empty(&self) -> bool {
        self.passing.is_empty() && self.stage.is_empty()
    }
}

/// Drops some.
pub(super) struct LossStage {
    probability: f64,
    draws: Draws,
    queue: Queue,
    shared: Arc<Shared>,
}

impl LossStage {
    pub(super) fn new(attributes: &Loss, place: &Place) -> Self {
        Self {
            probability: attributes.probability.0,
            draws: Draws::new(place.key),
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for LossStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        if self.draws.unit() < self.probability {
            self.shared.counters.hit();
        } else {
            self.queue.push(chunk);
        }
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.queue.pop().map_or(Pop::Wait(None), Pop::Chunk)
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Loss(attributes) = fault {
            self.probability = attributes.probability.0;
        }
    }

    fn take(self: Box<Self>) -> Rest {
        self.queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty()
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
}
