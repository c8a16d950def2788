//! What a toxic does to one direction of one connection: a state machine without sockets or clocks.
//!
//! A chunk is pushed in with the time at which it arrived, and popped out when it may go on. Time only comes in as an
//! argument, so that a test can be exact.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use bytes::Bytes;

use super::attributes::{CloseMode, FaultHelp};
use super::budget::PIECE_COST;
use super::decisions::Notes;
use super::handling::Handling;
use super::packets::Carrier;
use super::shared::ToxicShared;
use super::trouble::Trouble;
use crate::rule;

/// What the file of a stage needs.
mod prelude {
    pub(super) use std::sync::Arc;
    pub(super) use std::time::{Duration, Instant};

    pub(super) use anyhow::Result;

    pub(super) use super::{
        Chunk, ChunkQueue, Pop, Queued, ROOM, Rest, Stage, StageContext, StreamEnd, StreamFault,
    };
    pub(super) use crate::relay::attributes::{
        CloseMode, ErrorProtocol, FaultHelp, Probability, attributes, is_default, milliseconds,
        one_or_many, whole, whole_milliseconds,
    };
    pub(super) use crate::relay::decisions::Notes;
    pub(super) use crate::relay::random::Draws;
    pub(super) use crate::relay::shared::ToxicShared;
    pub(super) use crate::rule;
}

/// Says that a [`Queued`] stage has what it holds in its field `queue`.
macro_rules! held {
    () => {
        fn queue(&mut self) -> &mut ChunkQueue {
            &mut self.queue
        }

        fn queued(&self) -> &ChunkQueue {
            &self.queue
        }
    };
}

macro_rules! modules {
    ($($(#[$cfg:meta])* $module:ident $_fault:ident $_name:literal,)*) => {
        $($(#[$cfg])* pub(crate) mod $module;)*
    };
}
each_stage!(modules);

/// What a stage that holds nothing on purpose takes in before the next one has taken it off.
pub(crate) const ROOM: usize = 64 * 1024;
/// Bytes and when they arrived at the stage that has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) data: Bytes,
    pub(crate) at: Instant,
    /// The packet that it came in, where the relay works on packets: what goes on keeps its headers.
    pub(crate) carrier: Option<Carrier>,
}

impl Chunk {
    pub(crate) const fn new(data: Bytes, at: Instant) -> Self {
        Self {
            data,
            at,
            carrier: None,
        }
    }
}

/// What comes after the last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// The end of this direction: the other one goes on.
    Fin,
    /// The end of the connection.
    Close(CloseMode),
    /// The end of the connection once the bytes before it have been received by the server's host.
    Abort(CloseMode),
}

/// What a stage gives when it is asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pop {
    /// Bytes that go on.
    Chunk(Chunk),
    /// The same, and the toxic's other connections must look at what it has come to.
    Last(Chunk),
    /// The end goes on, and when it did so.
    End(StreamEnd, Instant),
    /// An answer in the other end's name.
    Reply(Bytes),
    /// The connection ends now, whatever else is on its way.
    Now(CloseMode),
    /// Nothing until more comes in, or until this time.
    Wait(Option<Instant>),
}

/// What a stage held when it was taken away.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    pub(crate) chunks: VecDeque<Chunk>,
    pub(crate) end: Option<(StreamEnd, Instant)>,
    /// The connection must be closed, because bytes of it are lost.
    pub(crate) close: bool,
}

/// One toxic on one direction of one connection.
pub(crate) trait Stage: Send + Sync {
    /// How many bytes it would take in now.
    fn room(&self, now: Instant) -> usize;
    /// Takes a chunk in; also beyond its room, when the stage before it was taken away.
    fn push(&mut self, chunk: Chunk);
    /// Takes the end in: no chunk follows.
    fn end(&mut self, end: StreamEnd, at: Instant);
    /// Gives what may go on.
    fn pop(&mut self, now: Instant) -> Pop;
    /// What its own timer says, also while nothing can go on; only stages that end connections have one.
    fn expired(&mut self, _now: Instant) -> Pop {
        Pop::Wait(None)
    }
    /// Is told that it had room and nothing came: its source is idle.
    fn starved(&mut self) {}
    /// Changes the attributes.
    fn update(&mut self, fault: &dyn StreamFault, now: Instant);
    /// Gives everything back.
    fn take(self: Box<Self>) -> Rest;
    /// Whether nothing is held.
    fn is_empty(&self) -> bool;
    /// How many bytes are held.
    fn bytes(&self) -> usize;
}

/// A stage that keeps what it holds in a [`ChunkQueue`], and passes it on as it came where it says nothing else.
pub(crate) trait Queued: Send + Sync {
    /// Bytes of it are lost when it is taken away, so that the connection must be closed.
    const LOSES: bool = false;

    /// What it holds.
    fn queue(&mut self) -> &mut ChunkQueue;
    /// What it holds.
    fn queued(&self) -> &ChunkQueue;
    /// How many bytes it takes in while it is empty.
    fn takes(&self) -> usize {
        ROOM
    }
    /// See [`Stage::room`].
    fn takes_now(&self) -> usize {
        self.queued().room(self.takes())
    }
    /// See [`Stage::push`].
    fn accept(&mut self, chunk: Chunk) {
        self.queue().push(chunk);
    }
    /// See [`Stage::end`].
    fn accept_end(&mut self, end: StreamEnd, at: Instant) {
        self.queue().end(end, at);
    }
    /// See [`Stage::pop`].
    fn next(&mut self, _now: Instant) -> Pop {
        self.queue().pass()
    }
    /// See [`Stage::expired`].
    fn timer(&mut self, _now: Instant) -> Pop {
        Pop::Wait(None)
    }
    /// See [`Stage::starved`].
    fn source_is_idle(&mut self) {}
    /// See [`Stage::update`].
    fn change(&mut self, _fault: &dyn StreamFault, _now: Instant) {}
}

impl<T: Queued> Stage for T {
    fn room(&self, _now: Instant) -> usize {
        self.takes_now()
    }

    fn push(&mut self, chunk: Chunk) {
        self.accept(chunk);
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
        self.accept_end(end, at);
    }

    fn pop(&mut self, now: Instant) -> Pop {
        self.next(now)
    }

    fn expired(&mut self, now: Instant) -> Pop {
        self.timer(now)
    }

    fn starved(&mut self) {
        self.source_is_idle();
    }

    fn update(&mut self, fault: &dyn StreamFault, now: Instant) {
        self.change(fault, now);
    }

    fn take(mut self: Box<Self>) -> Rest {
        Rest {
            close: T::LOSES,
            ..std::mem::take(self.queue()).into_rest()
        }
    }

    fn is_empty(&self) -> bool {
        self.queued().is_empty()
    }

    fn bytes(&self) -> usize {
        self.queued().bytes
    }
}

/// Chunks in order, and the end behind them.
#[derive(Debug, Default)]
pub(crate) struct ChunkQueue {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    end: Option<(StreamEnd, Instant)>,
}

impl ChunkQueue {
    pub(crate) fn push(&mut self, chunk: Chunk) {
        self.bytes += chunk.data.len();
        self.chunks.push_back(chunk);
    }

    pub(crate) fn end(&mut self, end: StreamEnd, at: Instant) {
        self.end.get_or_insert((end, at));
    }

    pub(crate) fn room(&self, limit: usize) -> usize {
        if self.end.is_some() {
            return 0;
        }
        limit.saturating_sub(self.bytes + self.chunks.len() * PIECE_COST)
    }

    fn front(&self) -> Option<&Chunk> {
        self.chunks.front()
    }

    pub(crate) fn pop(&mut self) -> Option<Chunk> {
        let chunk = self.chunks.pop_front()?;
        self.bytes -= chunk.data.len();
        Some(chunk)
    }

    /// Takes up to `size` bytes off the first chunk.
    fn cut(&mut self, size: usize) -> Option<Chunk> {
        let front = self.chunks.front_mut()?;
        if front.data.len() <= size {
            return self.pop();
        }
        self.bytes -= size;
        Some(Chunk {
            data: front.data.split_to(size),
            at: front.at,
            carrier: None,
        })
    }

    /// The next chunk, or the end.
    pub(crate) fn pass(&mut self) -> Pop {
        if let Some(chunk) = self.pop() {
            return Pop::Chunk(chunk);
        }
        let end = self.pop_end();
        end.map_or(Pop::Wait(None), |(end, at)| Pop::End(end, at))
    }

    /// The end, once all chunks are gone.
    fn pop_end(&mut self) -> Option<(StreamEnd, Instant)> {
        if self.chunks.is_empty() {
            self.end.take()
        } else {
            None
        }
    }

    /// How many bytes are held.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.end.is_none()
    }

    fn clear(&mut self) {
        self.chunks.clear();
        self.bytes = 0;
    }

    pub(crate) fn into_rest(self) -> Rest {
        Rest {
            chunks: self.chunks,
            end: self.end,
            close: false,
        }
    }
}

/// What is left of a toxic that was taken away: what it held goes on as fast as the next stage takes it.
pub(super) struct PassStage(ChunkQueue);

impl From<Rest> for PassStage {
    fn from(rest: Rest) -> Self {
        Self(ChunkQueue {
            bytes: rest.chunks.iter().map(|chunk| chunk.data.len()).sum(),
            chunks: rest.chunks,
            end: rest.end,
        })
    }
}

impl Queued for PassStage {
    fn queue(&mut self) -> &mut ChunkQueue {
        &mut self.0
    }

    fn queued(&self) -> &ChunkQueue {
        &self.0
    }
}

/// A fault, by its attributes. The defaults are right for most faults.
pub(crate) trait StreamFault: Any {
    /// What it does, and on which transports it has a meaning.
    fn help(&self) -> FaultHelp;

    /// The attributes for a rule's fault; nothing where that is another one.
    ///
    /// # Errors
    /// What is finer than the attributes' units.
    fn of_rule(_rule: &rule::Fault) -> Result<Option<Self>>
    where
        Self: Sized,
    {
        Ok(None)
    }

    /// The attribute that an alias in lower case stands for.
    fn canonical(&self, _alias: &str) -> Option<&'static str> {
        None
    }

    /// Says what is wrong with the values.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Whether it acts on the proxy as a whole, which the relay then does.
    fn is_proxy_wide(&self) -> bool {
        false
    }

    /// What it does with requests, where it looks at them.
    fn handling(&self) -> Option<Handling> {
        None
    }

    /// Whether as many bytes come out as go in, until the end.
    fn keeps_length(&self) -> bool {
        self.handling().is_none()
    }

    /// What carries it out on one direction of one connection; nothing where the relay does, or where it looks at
    /// requests.
    fn stage(&self, _place: &StageContext) -> Option<Box<dyn Stage>> {
        None
    }
}

impl dyn StreamFault {
    /// The fault as one of this type, if it is one.
    pub(crate) fn of<T: StreamFault>(&self) -> Option<&T> {
        let fault: &dyn Any = self;
        fault.downcast_ref()
    }
}

/// What a stage is told about where it stands.
#[derive(Clone)]
pub(crate) struct StageContext {
    /// The key of its draws.
    pub(crate) key: u64,
    /// When the connection was accepted.
    pub(crate) opened: Instant,
    pub(crate) now: Instant,
    /// The connection was opened when the toxic was there.
    pub(crate) is_new: bool,
    /// Chunks are datagrams, which are neither cut nor joined.
    pub(crate) is_datagram: bool,
    pub(crate) shared: Arc<ToxicShared>,
    pub(crate) trouble: Arc<Trouble>,
    pub(crate) notes: Notes,
}

/// Stages alone, on a clock that is only what a test says.
#[cfg(test)]
pub(crate) mod testing {
    use std::time::Duration;

    use serde_json::Value;

    use super::*;
    use crate::relay::fault::RelayFault;

    /// A stage and the time at which it began.
    pub(crate) struct Bench {
        pub(crate) stage: Box<dyn Stage>,
        pub(crate) start: Instant,
        shared: Arc<ToxicShared>,
        fault: RelayFault,
    }

    impl Bench {
        /// The stage of a toxic on a new connection.
        pub(crate) fn new(kind: &str, attributes: &Value) -> Self {
            Self::noting(kind, attributes, Notes::unkept())
        }

        /// The stage of a toxic on datagrams.
        pub(crate) fn datagrams(kind: &str, attributes: &Value) -> Self {
            Self::at(kind, attributes, (true, Notes::unkept()))
        }

        /// The stage of a toxic on a new connection whose decisions are kept.
        pub(crate) fn noting(kind: &str, attributes: &Value, notes: Notes) -> Self {
            Self::at(kind, attributes, (false, notes))
        }

        fn at(kind: &str, attributes: &Value, (is_datagram, notes): (bool, Notes)) -> Self {
            let fault = RelayFault::of_kind(kind).expect("a kind");
            let fault = fault.with_attributes(attributes).expect("valid attributes");
            let start = Instant::now();
            let shared = Arc::<ToxicShared>::default();
            let place = StageContext {
                key: 1,
                opened: start,
                now: start,
                is_new: true,
                is_datagram,
                shared: Arc::clone(&shared),
                trouble: Arc::default(),
                notes,
            };
            Self {
                stage: fault.stage(&place).expect("a stage"),
                start,
                shared,
                fault,
            }
        }

        fn time(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        /// Puts bytes in at so many milliseconds.
        pub(crate) fn push(&mut self, ms: u64, data: &str) {
            let data = Bytes::copy_from_slice(data.as_bytes());
            self.stage.push(Chunk::new(data, self.time(ms)));
        }

        /// Puts the end in.
        pub(crate) fn fin(&mut self, ms: u64) {
            self.stage.end(StreamEnd::Fin, self.time(ms));
        }

        /// Changes attributes.
        pub(crate) fn update(&mut self, ms: u64, attributes: &Value) {
            self.fault = self.fault.with_attributes(attributes).expect("valid");
            self.stage.update(self.fault.definition(), self.time(ms));
        }

        /// How many bytes it would take in.
        pub(crate) fn room(&self, ms: u64) -> usize {
            self.stage.room(self.time(ms))
        }

        /// What it gives, one after the other: bytes, `+fin`, `!rst` and the like; then for when it waits, if it does.
        pub(crate) fn pop(&mut self, ms: u64) -> String {
            let mut given = Vec::new();
            loop {
                given.push(match self.stage.pop(self.time(ms)) {
                    Pop::Chunk(chunk) => String::from_utf8_lossy(&chunk.data).into_owned(),
                    Pop::Last(chunk) => format!("{}|", String::from_utf8_lossy(&chunk.data)),
                    Pop::End(StreamEnd::Fin, _) => "+fin".to_owned(),
                    Pop::End(StreamEnd::Close(mode), _) => format!("+close-{mode}"),
                    Pop::End(StreamEnd::Abort(mode), _) => format!("+abort-{mode}"),
                    Pop::Reply(reply) => format!("<{}", String::from_utf8_lossy(&reply)),
                    Pop::Now(mode) => {
                        given.push(format!("!{mode}"));
                        break;
                    }
                    Pop::Wait(None) => break,
                    Pop::Wait(Some(until)) => {
                        given.push(format!("@{}", (until - self.start).as_millis()));
                        break;
                    }
                });
            }
            given.join(" ")
        }

        /// How often it has done something.
        pub(crate) fn hits(&self) -> u64 {
            let hits = &self.shared.counters.hits;
            hits.load(std::sync::atomic::Ordering::Relaxed)
        }

        /// What it gives back when it is taken away, and whether the connection must end.
        pub(crate) fn take(self) -> (String, bool) {
            let rest = self.stage.take();
            let data = rest.chunks.iter();
            let data: Vec<_> = data
                .map(|chunk| String::from_utf8_lossy(&chunk.data).into_owned())
                .collect();
            (data.concat(), rest.close)
        }
    }
}
