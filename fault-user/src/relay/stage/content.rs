//! Stages that keep, drop, change or join bytes: stall, discard, corrupt, coalesce.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::{Chunk, End, Place, Pop, Queue, ROOM, Rest, Stage};
use crate::relay::fault::{Coalesce, CorruptData, CorruptMode, Fault, milliseconds};
use crate::relay::random::{Draws, unit};
use crate::relay::toxic::Shared;

/// Reads nothing and keeps what was on its way.
pub(super) struct StallStage {
    /// What it takes in: a stream waits in its sender, datagrams have nowhere else to wait.
    room: usize,
    queue: Queue,
}

/// What a stalled stream of datagrams keeps, in bytes; what comes beyond it is dropped.
const STALLED_DATAGRAMS: usize = 4 << 20;

impl StallStage {
    pub(super) fn new(place: &Place) -> Self {
        // What it does is to read nothing, from now on: there is no later moment to count.
        place.shared.counters.hit();
        Self {
            room: if place.is_datagram {
                STALLED_DATAGRAMS
            } else {
                0
            },
            queue: Queue::default(),
        }
    }
}

impl Stage for StallStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(self.room)
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        Pop::Wait(None)
    }

    fn update(&mut self, _fault: &Fault, _now: Instant) {}

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

/// Reads everything and keeps nothing but the end.
pub(super) struct DiscardStage {
    end: Option<(End, Instant)>,
    shared: Arc<Shared>,
}

impl DiscardStage {
    pub(super) fn new(place: &Place) -> Self {
        Self {
            end: None,
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for DiscardStage {
    fn room(&self, _now: Instant) -> usize {
        ROOM
    }

    fn push(&mut self, _chunk: Chunk) {
        self.shared.counters.hit();
    }

    fn end(&mut self, end: End, at: Instant) {
        self.end = Some((end, at));
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.end
            .take()
            .map_or(Pop::Wait(None), |(end, at)| Pop::End(end, at))
    }

    fn update(&mut self, _fault: &Fault, _now: Instant) {}

    fn take(self: Box<Self>) -> Rest {
        Rest {
            end: self.end,
            ..Rest::default()
        }
    }

    fn is_empty(&self) -> bool {
        self.end.is_none()
    }

    fn bytes(&self) -> usize {
        0
    }
}

/// Changes bytes. Whether a byte is hit depends on its offset in the stream, not on how it was cut into chunks.
pub(super) struct CorruptStage {
    corruption: Corruption,
    /// Bytes that came before.
    passed: u64,
    is_datagram: bool,
    queue: Queue,
    shared: Arc<Shared>,
}

/// The decisions of `corrupt_data`.
struct Corruption {
    attributes: CorruptData,
    draws: Draws,
}

impl Corruption {
    const fn new(attributes: CorruptData, key: u64) -> Self {
        Self {
            attributes,
            draws: Draws::new(key),
        }
    }

    /// The changed bytes, if any changed; `first` is the ordinal of the first byte's draw, `offset` its offset.
    fn apply(&self, data: &[u8], first: u64, offset: u64) -> Option<Bytes> {
        let mut changed: Option<Vec<u8>> = None;
        let probability = match (self.attributes.probability, self.attributes.offset) {
            (Some(probability), _) => probability.0,
            (None, _) => 1.0,
        };
        let range = match self.attributes.offset {
            None => 0..data.len(),
            Some(wanted) => {
                let index = wanted
                    .checked_sub(offset)
                    .and_then(|index| usize::try_from(index).ok());
                let index = index.filter(|index| *index < data.len())?;
                index..index + 1
            }
        };
        for index in range {
            let draw = self.draws.at((first + index as u64) * 2);
            if unit(draw) < probability {
                let kind = self.draws.at((first + index as u64) * 2 + 1);
                let bytes = changed.get_or_insert_with(|| data.to_vec());
                bytes[index] = corrupted(data[index], self.attributes.mode, kind);
            }
        }
        changed.map(Bytes::from)
    }
}

fn corrupted(byte: u8, mode: CorruptMode, draw: u64) -> u8 {
    match mode {
        CorruptMode::Flip => byte ^ (1 << (draw & 7)),
        CorruptMode::Zero => 0,
        // Never the same value: a byte that is hit is changed.
        CorruptMode::Random => byte ^ u8::try_from(draw % 255 + 1).unwrap_or(1),
    }
}

impl CorruptStage {
    pub(super) fn new(attributes: &CorruptData, place: &Place) -> Self {
        Self {
            corruption: Corruption::new(attributes.clone(), place.key),
            passed: 0,
            is_datagram: place.is_datagram,
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for CorruptStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        let Some(chunk) = self.queue.pop() else {
            return self
                .queue
                .pop_end()
                .map_or(Pop::Wait(None), |(end, at)| Pop::End(end, at));
        };
        // An offset counts from the beginning of the stream or of each datagram.
        let offset = if self.is_datagram { 0 } else { self.passed };
        let changed = self.corruption.apply(&chunk.data, self.passed, offset);
        self.passed += chunk.data.len() as u64;
        if changed.is_some() {
            self.shared.counters.hit();
        }
        Pop::Chunk(Chunk {
            data: changed.unwrap_or(chunk.data),
            at: chunk.at,
        })
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::CorruptData(attributes) = fault {
            self.corruption.attributes = attributes.clone();
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

/// The most that a `coalesce` collects, in bytes.
const COALESCE_LIMIT: usize = 16 << 20;

/// Collects bytes until there are enough, the first has waited long enough, or the stream ends.
pub(super) struct CoalesceStage {
    min_bytes: usize,
    max_wait: Duration,
    queue: Queue,
    shared: Arc<Shared>,
}

impl CoalesceStage {
    pub(super) fn new(attributes: &Coalesce, place: &Place) -> Self {
        Self {
            min_bytes: min_bytes(attributes),
            max_wait: milliseconds(attributes.max_wait),
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }

    fn join(&mut self, at: Instant) -> Chunk {
        let mut joined = BytesMut::with_capacity(self.queue.bytes);
        while let Some(chunk) = self.queue.pop() {
            joined.extend_from_slice(&chunk.data);
        }
        self.shared.counters.hit();
        Chunk {
            data: joined.freeze(),
            at,
        }
    }
}

fn min_bytes(attributes: &Coalesce) -> usize {
    usize::try_from(attributes.min_bytes.max(0))
        .unwrap_or(COALESCE_LIMIT)
        .min(COALESCE_LIMIT)
}

impl Stage for CoalesceStage {
    fn room(&self, _now: Instant) -> usize {
        // Many tiny chunks must fit as well: the bytes alone are counted.
        if self.queue.end.is_some() {
            0
        } else {
            self.min_bytes.max(ROOM).saturating_sub(self.queue.bytes)
        }
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        let Some(first) = self.queue.front() else {
            return self
                .queue
                .pop_end()
                .map_or(Pop::Wait(None), |(end, at)| Pop::End(end, at));
        };
        let due = (!self.max_wait.is_zero()).then(|| first.at + self.max_wait);
        let enough = self.queue.bytes >= self.min_bytes || self.queue.end.is_some();
        if enough || due.is_some_and(|due| due <= now) {
            return Pop::Chunk(self.join(now));
        }
        Pop::Wait(due)
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Coalesce(attributes) = fault {
            self.min_bytes = min_bytes(attributes);
            self.max_wait = milliseconds(attributes.max_wait);
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
