//! Stages that end a connection: timeout, reset, data limit, close on data, lifetime.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Chunk, End, Place, Pop, Queue, ROOM, Rest, Stage};
use crate::relay::fault::{
    CloseMode, CloseOnData, Fault, Lifetime, LifetimeStart, LimitData, ResetPeer, Timeout,
    milliseconds,
};
use crate::relay::random::Draws;
use crate::relay::toxic::Shared;

/// Throws data away until its time is over, then closes.
pub(super) struct TimeoutStage {
    deadline: Option<Instant>,
    end: Option<(End, Instant)>,
    shared: Arc<Shared>,
}

impl TimeoutStage {
    pub(super) fn new(attributes: &Timeout, place: &Place) -> Self {
        Self {
            deadline: deadline(attributes, place.now),
            end: None,
            shared: Arc::clone(&place.shared),
        }
    }
}

fn deadline(attributes: &Timeout, now: Instant) -> Option<Instant> {
    (attributes.timeout > 0).then(|| now + milliseconds(attributes.timeout))
}

impl Stage for TimeoutStage {
    fn room(&self, _now: Instant) -> usize {
        ROOM
    }

    fn push(&mut self, _chunk: Chunk) {
        self.shared.counters.hit();
    }

    fn end(&mut self, end: End, at: Instant) {
        self.end = Some((end, at));
    }

    fn pop(&mut self, now: Instant) -> Pop {
        match self.end.take() {
            Some((end, at)) => Pop::End(end, at),
            None => self.expired(now),
        }
    }

    fn expired(&mut self, now: Instant) -> Pop {
        match self.deadline {
            Some(deadline) if deadline <= now => {
                self.shared.counters.hit();
                Pop::Now(CloseMode::Fin)
            }
            deadline => Pop::Wait(deadline),
        }
    }

    fn update(&mut self, fault: &Fault, now: Instant) {
        if let Fault::Timeout(attributes) = fault {
            self.deadline = deadline(attributes, now);
        }
    }

    fn take(self: Box<Self>) -> Rest {
        // What it threw away can't be brought back, so the connection must not go on.
        Rest {
            chunks: VecDeque::new(),
            end: self.end,
            close: true,
        }
    }

    fn is_empty(&self) -> bool {
        self.end.is_none()
    }

    fn bytes(&self) -> usize {
        0
    }
}

/// How long a `reset_peer` whose time is over waits for data on a new connection. A reset at once
/// would meet a connect(2) that has not returned yet, and the request would not reach the server.
const FIRST_DATA: Duration = Duration::from_millis(250);

/// Holds data until its time is over, then resets.
pub(super) struct ResetPeerStage {
    timeout: Duration,
    since: Instant,
    /// The connection was opened while the toxic was there.
    is_new: bool,
    queue: Queue,
    shared: Arc<Shared>,
}

impl ResetPeerStage {
    pub(super) fn new(attributes: &ResetPeer, place: &Place) -> Self {
        Self {
            timeout: milliseconds(attributes.timeout),
            since: place.now,
            is_new: place.is_new,
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }

    /// When it resets: on a new connection not before the first data has come, as in Toxiproxy, or is
    /// overdue.
    fn due(&self) -> Instant {
        let due = self.since + self.timeout;
        match self.queue.front() {
            _ if !self.is_new => due,
            Some(first) => due.max(first.at),
            None => due.max(self.since + FIRST_DATA),
        }
    }
}

impl Stage for ResetPeerStage {
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
        self.expired(now)
    }

    fn expired(&mut self, now: Instant) -> Pop {
        let due = self.due();
        if due > now {
            return Pop::Wait(Some(due));
        }
        self.shared.counters.hit();
        Pop::Now(CloseMode::Rst)
    }

    fn update(&mut self, fault: &Fault, now: Instant) {
        if let Fault::ResetPeer(attributes) = fault {
            self.timeout = milliseconds(attributes.timeout);
            self.since = now;
            self.is_new = false;
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

/// Lets so many bytes through, then closes.
#[expect(
    clippy::struct_excessive_bools,
    reason = "three say what was asked for, and one what has happened"
)]
pub(super) struct LimitDataStage {
    limit: u64,
    is_shared: bool,
    /// When the shared bytes are used up they are there again, for connections to come.
    is_repeated: bool,
    is_datagram: bool,
    /// Bytes of this connection.
    passed: u64,
    /// How often the shared bytes had been used up when the connection began.
    closings: u64,
    queue: Queue,
    closed: bool,
    shared: Arc<Shared>,
}

impl LimitDataStage {
    pub(super) fn new(attributes: &LimitData, place: &Place) -> Self {
        let mut stage = Self {
            limit: 0,
            is_shared: false,
            is_repeated: false,
            is_datagram: place.is_datagram,
            passed: 0,
            closings: place.shared.closings.load(Ordering::Relaxed),
            queue: Queue::default(),
            closed: false,
            shared: Arc::clone(&place.shared),
        };
        stage.set(attributes);
        stage
    }

    fn set(&mut self, attributes: &LimitData) {
        self.limit = attributes.bytes.max(0).unsigned_abs();
        self.is_shared = attributes.shared || attributes.every;
        self.is_repeated = attributes.every;
    }

    /// Bytes that count against the limit.
    fn counted(&self) -> u64 {
        if self.is_shared {
            self.shared.bytes.load(Ordering::Relaxed)
        } else {
            self.passed
        }
    }

    /// Whether the limit is reached: one that this connection was part of, or could have been.
    fn is_used_up(&self) -> bool {
        let others =
            self.is_shared && self.shared.closings.load(Ordering::Relaxed) != self.closings;
        others || self.passed > 0 && self.counted() >= self.limit
    }

    /// Takes up to `wanted` bytes off what remains; a datagram is taken whole or not at all. The second
    /// is whether the shared limit is reached by that.
    fn claim(&mut self, wanted: u64) -> (u64, bool) {
        let (limit, is_datagram) = (self.limit, self.is_datagram);
        let grant = |passed: u64| {
            let remaining = limit.saturating_sub(passed);
            if is_datagram && wanted > remaining {
                0
            } else {
                wanted.min(remaining)
            }
        };
        if !self.is_shared {
            let granted = grant(self.passed);
            self.passed += granted;
            return (granted, false);
        }
        let (mut granted, mut reached) = (0, false);
        let is_repeated = self.is_repeated;
        self.shared
            .bytes
            .update(Ordering::Relaxed, Ordering::Relaxed, |passed| {
                granted = grant(passed);
                reached = granted > 0 && passed + granted >= limit;
                if reached && is_repeated {
                    0
                } else {
                    passed + granted
                }
            });
        self.passed += granted;
        if reached {
            self.shared.closings.fetch_add(1, Ordering::Relaxed);
        }
        (granted, reached)
    }

    /// Datagrams beyond the limit are dropped: there is no connection to close.
    fn pop_datagram(&mut self) -> Pop {
        while let Some(chunk) = self.queue.pop() {
            let size = chunk.data.len() as u64;
            if size > 0 && self.claim(size).0 == size {
                return Pop::Chunk(chunk);
            }
            self.shared.counters.hit();
        }
        Pop::Wait(None)
    }

    fn close(&mut self, at: Instant) -> Pop {
        self.closed = true;
        self.queue.clear();
        self.shared.counters.hit();
        Pop::End(End::Close(CloseMode::Fin), at)
    }
}

impl Stage for LimitDataStage {
    fn room(&self, _now: Instant) -> usize {
        if self.closed {
            return 0;
        }
        if self.is_datagram {
            return self.queue.room(ROOM);
        }
        // One byte must be readable at the end of the allowance: it is what closes the connection.
        let remaining = self.limit.saturating_sub(self.counted());
        let remaining = usize::try_from(remaining).unwrap_or(ROOM).max(1);
        self.queue
            .room(ROOM)
            .min(remaining.saturating_sub(self.queue.bytes))
    }

    fn push(&mut self, chunk: Chunk) {
        if !self.closed {
            self.queue.push(chunk);
        }
    }

    fn end(&mut self, end: End, at: Instant) {
        if !self.closed {
            self.queue.end(end, at);
        }
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if self.is_datagram {
            return self.pop_datagram();
        }
        if self.closed {
            return Pop::Wait(None);
        }
        if self.is_used_up() {
            return self.close(now);
        }
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at);
        }
        let Some(size) = self.queue.front().map(|chunk| chunk.data.len()) else {
            return Pop::Wait(None);
        };
        let (granted, reached) = self.claim(size as u64);
        let chunk = match usize::try_from(granted) {
            Ok(granted) if granted > 0 => self.queue.cut(granted),
            _ => return self.close(now),
        };
        match chunk {
            Some(chunk) if reached => Pop::Last(chunk),
            Some(chunk) => Pop::Chunk(chunk),
            None => Pop::Wait(None),
        }
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::LimitData(attributes) = fault {
            self.set(attributes);
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

/// Closes on the first byte.
pub(super) struct CloseOnDataStage {
    mode: CloseMode,
    is_datagram: bool,
    queue: Queue,
    fired: bool,
    shared: Arc<Shared>,
}

impl CloseOnDataStage {
    pub(super) fn new(attributes: &CloseOnData, place: &Place) -> Self {
        Self {
            mode: attributes.mode,
            is_datagram: place.is_datagram,
            queue: Queue::default(),
            fired: false,
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Stage for CloseOnDataStage {
    fn room(&self, _now: Instant) -> usize {
        if self.fired { 0 } else { self.queue.room(ROOM) }
    }

    fn push(&mut self, chunk: Chunk) {
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        if self.fired {
            return Pop::Wait(None);
        }
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at);
        }
        let Some(chunk) = self.queue.pop() else {
            return Pop::Wait(None);
        };
        self.fired = true;
        self.queue.clear();
        self.shared.counters.hit();
        if self.is_datagram {
            return Pop::Now(self.mode);
        }
        Pop::End(End::Close(self.mode), chunk.at)
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::CloseOnData(attributes) = fault {
            self.mode = attributes.mode;
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

/// Lets everything through until its time is over, then closes.
pub(super) struct LifetimeStage {
    attributes: Lifetime,
    /// The draw that places the end within the jitter, 0 to 1.
    unit: f64,
    opened: Instant,
    first_data: Option<Instant>,
    queue: Queue,
    shared: Arc<Shared>,
}

impl LifetimeStage {
    pub(super) fn new(attributes: &Lifetime, place: &Place) -> Self {
        Self {
            attributes: attributes.clone(),
            unit: Draws::new(place.key).unit(),
            opened: place.opened,
            first_data: None,
            queue: Queue::default(),
            shared: Arc::clone(&place.shared),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let start = match self.attributes.from {
            LifetimeStart::Connect => Some(self.opened),
            LifetimeStart::FirstData => self.first_data,
        };
        let jitter = milliseconds(self.attributes.jitter);
        let time: Duration = milliseconds(self.attributes.time) + jitter.mul_f64(self.unit * 2.0);
        start.map(|start| start + time.saturating_sub(jitter))
    }
}

impl Stage for LifetimeStage {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        self.first_data.get_or_insert(chunk.at);
        self.queue.push(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.queue.end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        let expired = self.expired(now);
        if matches!(expired, Pop::Now(_)) {
            return expired;
        }
        if let Some(chunk) = self.queue.pop() {
            return Pop::Chunk(chunk);
        }
        self.queue
            .pop_end()
            .map_or(expired, |(end, at)| Pop::End(end, at))
    }

    fn expired(&mut self, now: Instant) -> Pop {
        match self.deadline() {
            Some(deadline) if deadline <= now => {
                self.shared.counters.hit();
                Pop::Now(self.attributes.mode)
            }
            deadline => Pop::Wait(deadline),
        }
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Fault::Lifetime(attributes) = fault {
            self.attributes = attributes.clone();
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
