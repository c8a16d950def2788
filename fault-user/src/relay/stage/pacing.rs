//! Stages that hold bytes back: latency, bandwidth, slicer, slow close.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Chunk, End, Place, Pop, Queue, ROOM, Rest, Stage};
use crate::relay::budget::Pieces;
use crate::relay::fault::{
    Bandwidth, Fault, Latency, Slicer, SlowClose, microseconds, milliseconds,
};
use crate::relay::random::Draws;
use crate::relay::toxic::Shared;

/// What one direction of one connection may have in flight in a `latency`, in bytes. A stream that is
/// faster than this per latency is slowed down to it.
const IN_FLIGHT: usize = 64 << 20;

/// One chunk, or the end, on its way through a `latency`.
struct Flight {
    /// The draw that places it within the jitter, 0 to 1.
    unit: f64,
    due: Instant,
    at: Instant,
    load: Result<Chunk, End>,
}

/// Shifts the stream in time, and does not slow it.
pub(super) struct LatencyStage {
    latency: Duration,
    jitter: Duration,
    draws: Draws,
    flights: VecDeque<Flight>,
    bytes: usize,
    pieces: Pieces,
    last_due: Option<Instant>,
    ended: bool,
    shared: Arc<Shared>,
}

impl LatencyStage {
    pub(super) fn new(attributes: &Latency, place: &Place) -> Self {
        Self {
            latency: milliseconds(attributes.latency),
            jitter: milliseconds(attributes.jitter),
            draws: Draws::new(place.key),
            flights: VecDeque::new(),
            bytes: 0,
            pieces: Pieces::default(),
            last_due: None,
            ended: false,
            shared: Arc::clone(&place.shared),
        }
    }

    fn due(&self, at: Instant, unit: f64) -> Instant {
        let spread = self.jitter.mul_f64(unit * 2.0);
        let delay = (self.latency + spread).saturating_sub(self.jitter);
        let due = at + delay;
        self.last_due.map_or(due, |last| due.max(last))
    }

    fn add(&mut self, at: Instant, load: Result<Chunk, End>) {
        let unit = if self.jitter.is_zero() {
            0.5
        } else {
            self.draws.unit()
        };
        let due = self.due(at, unit);
        self.last_due = Some(due);
        self.flights.push_back(Flight {
            unit,
            due,
            at,
            load,
        });
    }
}

impl Stage for LatencyStage {
    fn room(&self, now: Instant) -> usize {
        // A chunk that is due and still here says that the reader is slow: then the writer must be too.
        let blocked = self.flights.front().is_some_and(|flight| flight.due <= now);
        if blocked || self.ended {
            0
        } else {
            IN_FLIGHT.saturating_sub(self.bytes + self.pieces.cost())
        }
    }

    fn push(&mut self, chunk: Chunk) {
        self.shared.counters.hit();
        self.bytes += chunk.data.len();
        self.pieces.add();
        self.add(chunk.at, Ok(chunk));
    }

    fn end(&mut self, end: End, at: Instant) {
        self.ended = true;
        self.add(at, Err(end));
    }

    fn pop(&mut self, now: Instant) -> Pop {
        match self.flights.front() {
            None => return Pop::Wait(None),
            Some(flight) if flight.due > now => return Pop::Wait(Some(flight.due)),
            Some(_) => {}
        }
        let Some(flight) = self.flights.pop_front() else {
            return Pop::Wait(None);
        };
        match flight.load {
            // The time at which it should have left, so that several latencies add up exactly.
            Ok(chunk) => {
                self.bytes -= chunk.data.len();
                self.pieces.remove();
                Pop::Chunk(Chunk {
                    data: chunk.data,
                    at: flight.due,
                })
            }
            Err(end) => Pop::End(end, flight.due),
        }
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Latency(attributes) = fault {
            self.latency = milliseconds(attributes.latency);
            self.jitter = milliseconds(attributes.jitter);
            self.last_due = None;
            for index in 0..self.flights.len() {
                let due = self.due(self.flights[index].at, self.flights[index].unit);
                self.last_due = Some(due);
                self.flights[index].due = due;
            }
        }
    }

    fn take(self: Box<Self>) -> Rest {
        let mut rest = Rest::default();
        for flight in self.flights {
            match flight.load {
                Ok(chunk) => rest.chunks.push_back(chunk),
                Err(end) => rest.end = Some((end, flight.at)),
            }
        }
        rest
    }

    fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The most that a `bandwidth` catches up with when its timer came late: so much of the rate leaves at
/// once. Only a link that had bytes waiting all the time has something to catch up with.
const CATCH_UP: Duration = Duration::from_secs(1);

/// What a `bandwidth` keeps of datagrams that come faster, in bytes; what comes beyond it is dropped.
const QUEUED_DATAGRAMS: usize = 256 * 1024;

/// The longest time that a link takes for anything: ten years.
const LONGEST_S: f64 = 10.0 * 365.0 * 24.0 * 3600.0;

/// Sends bytes at a rate: a quantum of them leaves when a link of that rate would have carried it.
pub(super) struct BandwidthStage {
    /// Bytes per second.
    rate: f64,
    is_shared: bool,
    is_datagram: bool,
    queue: Queue,
    free_at: Instant,
    /// The link waited for bytes when there were none: it has nothing to catch up with.
    was_idle: bool,
    /// The next quantum and when it has been carried.
    booked: Option<(usize, Instant)>,
    shared: Arc<Shared>,
}

impl BandwidthStage {
    pub(super) fn new(attributes: &Bandwidth, place: &Place) -> Self {
        Self {
            rate: attributes.rate.bytes_per_second(),
            is_shared: attributes.shared,
            is_datagram: place.is_datagram,
            queue: Queue::default(),
            free_at: place.now,
            was_idle: true,
            booked: None,
            shared: Arc::clone(&place.shared),
        }
    }

    /// Bytes that leave at once: what the rate carries in 10 ms.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "it is clamped to 1 to ROOM before"
    )]
    fn quantum(&self) -> usize {
        if self.is_datagram {
            return usize::MAX;
        }
        (self.rate / 100.0).clamp(1.0, ROOM as f64) as usize
    }

    fn book(&mut self, now: Instant) -> Option<(usize, Instant)> {
        let front = self.queue.front()?;
        let size = front.data.len().min(self.quantum());
        let earliest = if std::mem::take(&mut self.was_idle) {
            front.at
        } else {
            now.checked_sub(CATCH_UP).unwrap_or(now)
        };
        let carries = carry_time(size, self.rate);
        let finish = if self.is_shared {
            let mut free_at = self
                .shared
                .link_free_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(earliest) + carries;
            *free_at
        } else {
            self.free_at = self.free_at.max(earliest) + carries;
            self.free_at
        };
        self.booked = Some((size, finish));
        self.booked
    }
}

/// How long a link takes for so many bytes.
#[expect(
    clippy::cast_precision_loss,
    reason = "a quantum has far fewer than 2^52 bytes"
)]
fn carry_time(size: usize, rate: f64) -> Duration {
    Duration::from_secs_f64((size as f64 / rate).min(LONGEST_S))
}

impl Stage for BandwidthStage {
    fn room(&self, _now: Instant) -> usize {
        // At a rate of 0 nothing is read, so that the sender feels it.
        match (self.rate > 0.0, self.is_datagram) {
            (false, _) => 0,
            (_, true) => self.queue.room(QUEUED_DATAGRAMS),
            (_, false) => self.queue.room(ROOM.min(self.quantum().max(1024) * 4)),
        }
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn starved(&mut self) {
        self.was_idle |= self.queue.is_empty();
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at.max(self.free_at));
        }
        if self.rate <= 0.0 {
            return Pop::Wait(None);
        }
        let Some((size, finish)) = self.booked.or_else(|| self.book(now)) else {
            return Pop::Wait(None);
        };
        if finish > now {
            return Pop::Wait(Some(finish));
        }
        self.booked = None;
        self.shared.counters.hit();
        self.queue.cut(size).map_or(Pop::Wait(None), |chunk| {
            Pop::Chunk(Chunk {
                data: chunk.data,
                at: finish,
            })
        })
    }

    fn update(&mut self, fault: &Fault, now: Instant) {
        if let Fault::Bandwidth(attributes) = fault {
            self.rate = attributes.rate.bytes_per_second();
            self.is_shared = attributes.shared;
            // What a slow rate had booked for the far future must not hold a faster one up, and what
            // it has left to catch up with is not the new rate's.
            self.booked = None;
            self.was_idle = false;
            self.free_at = now;
            *self
                .shared
                .link_free_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = now;
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

/// Cuts the stream into pieces, with a pause after each.
pub(super) struct SlicerStage {
    attributes: Slicer,
    draws: Draws,
    queue: Queue,
    next_at: Option<Instant>,
    shared: Arc<Shared>,
}

impl SlicerStage {
    pub(super) fn new(attributes: &Slicer, place: &Place) -> Self {
        Self {
            attributes: attributes.clone(),
            draws: Draws::new(place.key),
            queue: Queue::default(),
            next_at: None,
            shared: Arc::clone(&place.shared),
        }
    }

    fn piece(&mut self) -> usize {
        let average = self.attributes.average_size.max(0).unsigned_abs();
        if average == 0 {
            return usize::MAX;
        }
        // A piece has at least one byte, so the variation can't be larger than the average.
        let variation = self
            .attributes
            .size_variation
            .max(0)
            .unsigned_abs()
            .min(average);
        let size = average - variation
            + self
                .draws
                .below(variation.saturating_mul(2).saturating_add(1));
        usize::try_from(size).unwrap_or(usize::MAX).max(1)
    }
}

impl Stage for SlicerStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at);
        }
        if self.queue.front().is_none() {
            return Pop::Wait(None);
        }
        if let Some(at) = self.next_at.filter(|at| *at > now) {
            return Pop::Wait(Some(at));
        }
        let size = self.piece();
        self.next_at = Some(now + microseconds(self.attributes.delay));
        self.shared.counters.hit();
        self.queue.cut(size).map_or(Pop::Wait(None), |chunk| {
            Pop::Chunk(Chunk {
                data: chunk.data,
                at: now,
            })
        })
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Slicer(attributes) = fault {
            self.attributes = attributes.clone();
            self.next_at = None;
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

/// Lets everything through, the end of the stream later.
pub(super) struct SlowCloseStage {
    delay: Duration,
    queue: Queue,
    counted: bool,
    shared: Arc<Shared>,
}

impl SlowCloseStage {
    pub(super) fn new(attributes: &SlowClose, place: &Place) -> Self {
        Self {
            delay: milliseconds(attributes.delay),
            queue: Queue::default(),
            counted: false,
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for SlowCloseStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some(chunk) = self.queue.pop() {
            return Pop::Chunk(chunk);
        }
        let due = match self.queue.end {
            None => return Pop::Wait(None),
            Some((End::Fin, at)) => at + self.delay,
            // A reset is no orderly end: it is not slowed.
            Some((End::Close(_) | End::Abort(_), at)) => at,
        };
        if due > now {
            return Pop::Wait(Some(due));
        }
        if !std::mem::replace(&mut self.counted, true) {
            self.shared.counters.hit();
        }
        self.queue
            .pop_end()
            .map_or(Pop::Wait(None), |(end, _)| Pop::End(end, due))
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::SlowClose(attributes) = fault {
            self.delay = milliseconds(attributes.delay);
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
