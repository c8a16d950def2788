//! What a toxic does to one direction of one connection: a state machine without sockets or clocks.
//!
//! A chunk is pushed in with the time at which it arrived, and popped out when it may go on. A
//! [`Pipeline`] is a row of them. Time only comes in as an argument, so that a test can be exact.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::budget::PIECE_COST;
use super::fault::{CloseMode, Fault};
use super::packets::Carrier;
use super::picked::PickedStage;
use super::toxic::{Direction, Shared, Toxic};
use super::trouble::Trouble;

/// What the file of a stage needs.
mod prelude {
    pub(super) use std::sync::Arc;
    pub(super) use std::time::{Duration, Instant};

    pub(super) use anyhow::Result;

    pub(super) use super::{Chunk, End, Place, Pop, Queue, Queued, ROOM, Rest, Stage};
    pub(super) use crate::relay::fault::{
        CloseMode, Fault, Help, Probability, Protocol, StreamFault, attributes, is_default,
        milliseconds, one_or_many, whole, whole_milliseconds,
    };
    pub(super) use crate::relay::random::Draws;
    pub(super) use crate::relay::toxic::Shared;
    pub(super) use crate::rule;
}

/// Says that a [`Queued`] stage has what it holds in its field `queue`.
macro_rules! held {
    () => {
        fn queue(&mut self) -> &mut Queue {
            &mut self.queue
        }

        fn queued(&self) -> &Queue {
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
pub(crate) enum End {
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
    End(End, Instant),
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
    pub(crate) end: Option<(End, Instant)>,
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
    fn end(&mut self, end: End, at: Instant);
    /// Gives what may go on.
    fn pop(&mut self, now: Instant) -> Pop;
    /// What its own timer says, also while nothing can go on; only stages that end connections have one.
    fn expired(&mut self, _now: Instant) -> Pop {
        Pop::Wait(None)
    }
    /// Is told that it had room and nothing came: its source is idle.
    fn starved(&mut self) {}
    /// Changes the attributes.
    fn update(&mut self, fault: &Fault, now: Instant);
    /// Gives everything back.
    fn take(self: Box<Self>) -> Rest;
    /// Whether nothing is held.
    fn is_empty(&self) -> bool;
    /// How many bytes are held.
    fn bytes(&self) -> usize;
}

/// A stage that keeps what it holds in a [`Queue`], and passes it on as it came where it says nothing else.
pub(crate) trait Queued: Send + Sync {
    /// Bytes of it are lost when it is taken away, so that the connection must be closed.
    const LOSES: bool = false;

    /// What it holds.
    fn queue(&mut self) -> &mut Queue;
    /// What it holds.
    fn queued(&self) -> &Queue;
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
    fn accept_end(&mut self, end: End, at: Instant) {
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
    fn change(&mut self, _fault: &Fault, _now: Instant) {}
}

impl<T: Queued> Stage for T {
    fn room(&self, _now: Instant) -> usize {
        self.takes_now()
    }

    fn push(&mut self, chunk: Chunk) {
        self.accept(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
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

    fn update(&mut self, fault: &Fault, now: Instant) {
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
pub(crate) struct Queue {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    end: Option<(End, Instant)>,
}

impl Queue {
    pub(crate) fn push(&mut self, chunk: Chunk) {
        self.bytes += chunk.data.len();
        self.chunks.push_back(chunk);
    }

    pub(crate) fn end(&mut self, end: End, at: Instant) {
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
    fn pop_end(&mut self) -> Option<(End, Instant)> {
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
struct PassStage(Queue);

impl From<Rest> for PassStage {
    fn from(rest: Rest) -> Self {
        Self(Queue {
            bytes: rest.chunks.iter().map(|chunk| chunk.data.len()).sum(),
            chunks: rest.chunks,
            end: rest.end,
        })
    }
}

impl Queued for PassStage {
    fn queue(&mut self) -> &mut Queue {
        &mut self.0
    }

    fn queued(&self) -> &Queue {
        &self.0
    }
}

/// What a stage is told about where it stands.
#[derive(Clone)]
pub(crate) struct Place {
    /// The key of its draws.
    pub(crate) key: u64,
    /// When the connection was accepted.
    pub(crate) opened: Instant,
    pub(crate) now: Instant,
    /// The connection was opened when the toxic was there.
    pub(crate) is_new: bool,
    /// Chunks are datagrams, which are neither cut nor joined.
    pub(crate) is_datagram: bool,
    pub(crate) shared: Arc<Shared>,
    pub(crate) trouble: Arc<Trouble>,
}

/// Creates the stage of a fault for a direction that it [acts on](acts_on).
fn stage_on(fault: &Fault, direction: Direction, place: &Place) -> Option<Box<dyn Stage>> {
    match fault.handling() {
        Some(handling) if direction == Direction::Downstream => handling.answers(),
        _ => fault.stage(place),
    }
}

/// Whether a fault acts on this direction. Those that answer in the server's name read requests, and some read answers
/// too, whatever direction was asked for.
fn acts_on(fault: &Fault, asked: Direction, direction: Direction) -> bool {
    match fault.handling() {
        Some(handling) => direction == Direction::Upstream || handling.reads_answers(),
        None => asked == direction,
    }
}

struct Slot {
    id: u64,
    revision: u64,
    kind: &'static str,
    /// As many bytes come out as go in.
    keeps_length: bool,
    stage: Box<dyn Stage>,
    /// Its toxic is gone: it goes with the last byte that it holds.
    is_retired: bool,
}

/// Which connection a pipeline belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) direction: Direction,
    /// The relay's key: its seed and name.
    pub(crate) relay_key: u64,
    /// The connection's ordinal in the relay, from 1.
    pub(crate) connection: u64,
    pub(crate) opened: Instant,
    /// Chunks are datagrams.
    pub(crate) is_datagram: bool,
    pub(crate) trouble: &'a Arc<Trouble>,
}

/// What came out of a pipeline.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) items: VecDeque<Item>,
    /// Bytes in `items`.
    pub(crate) bytes: usize,
    /// Answers for the other direction.
    pub(crate) replies: Vec<Bytes>,
    /// The connection ends now.
    pub(crate) now: Option<CloseMode>,
    /// An abort is on its way: nothing must go in the other direction any more.
    pub(crate) aborting: bool,
    /// The relay's other connections must look at their stages.
    pub(crate) concerns_others: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Data(Bytes),
    /// A datagram in the headers of the packet that it came in.
    Packet(Bytes, Carrier),
    End(End),
}

impl Output {
    /// How much a socket that takes nothing may leave here.
    const LIMIT: usize = 64 * 1024;

    fn has_room(&self) -> bool {
        self.bytes < Self::LIMIT && self.items.len() < 1024
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        self.bytes += data.len();
        self.items.push_back(Item::Data(data));
    }

    fn push_packet(&mut self, data: Bytes, carrier: Carrier) {
        self.bytes += data.len();
        self.items.push_back(Item::Packet(data, carrier));
    }
}

/// The stages of one direction of one connection, in the order in which the toxics were added.
#[derive(Default)]
pub(crate) struct Pipeline {
    slots: Vec<Slot>,
}

impl Pipeline {
    /// Whether every byte goes straight through.
    pub(crate) const fn is_bare(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether as many bytes come out as go in, until the end.
    pub(crate) fn keeps_length(&self) -> bool {
        self.slots.iter().all(|slot| slot.keeps_length)
    }

    /// Whether no stage holds anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| slot.stage.is_empty())
    }

    /// How many bytes the stages hold.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.iter().map(|slot| slot.stage.bytes()).sum()
    }

    /// Tells the stages that all has gone on that can: those that hold nothing wait for their source.
    pub(crate) fn starved(&mut self) {
        for slot in &mut self.slots {
            slot.stage.starved();
        }
    }

    /// How many bytes may be read for it now.
    pub(crate) fn room(&self, now: Instant) -> usize {
        self.slots.first().map_or(ROOM, |slot| slot.stage.room(now))
    }

    /// Puts bytes in at the front.
    pub(crate) fn push(&mut self, chunk: Chunk, output: &mut Output) {
        self.push_at(0, chunk, output);
    }

    /// Puts the end in at the front.
    pub(crate) fn end(&mut self, end: End, at: Instant, output: &mut Output) {
        self.end_at(0, end, at, output);
    }

    fn push_at(&mut self, index: usize, chunk: Chunk, output: &mut Output) {
        match self.slots.get_mut(index) {
            Some(slot) => slot.stage.push(chunk),
            None => match chunk.carrier {
                Some(carrier) => output.push_packet(chunk.data, carrier),
                None => output.push(chunk.data),
            },
        }
    }

    fn end_at(&mut self, index: usize, end: End, at: Instant, output: &mut Output) {
        if matches!(end, End::Abort(_)) {
            output.aborting = true;
        }
        match self.slots.get_mut(index) {
            Some(slot) => slot.stage.end(end, at),
            None => output.items.push_back(Item::End(end)),
        }
    }

    /// Moves on what may go on, and says when to look again; at most `budget` pieces, which are taken
    /// off it. When that is used up there may be more.
    pub(crate) fn advance(
        &mut self,
        now: Instant,
        output: &mut Output,
        budget: &mut usize,
    ) -> Option<Instant> {
        loop {
            let mut deadline: Option<Instant> = None;
            let mut progress = false;
            for index in (0..self.slots.len()).rev() {
                loop {
                    let room = match self.slots.get(index + 1) {
                        Some(next) => next.stage.room(now) > 0,
                        None => output.has_room(),
                    };
                    let stage = &mut self.slots[index].stage;
                    let popped = if room && *budget > 0 {
                        stage.pop(now)
                    } else {
                        stage.expired(now)
                    };
                    match popped {
                        Pop::Wait(until) => {
                            deadline = [deadline, until].into_iter().flatten().min();
                            break;
                        }
                        Pop::Now(mode) => {
                            output.now = Some(mode);
                            return None;
                        }
                        popped => self.pass_on(index + 1, popped, output),
                    }
                    *budget = budget.saturating_sub(1);
                    progress = true;
                }
            }
            if !progress || *budget == 0 {
                self.slots
                    .retain(|slot| !slot.is_retired || !slot.stage.is_empty());
                return deadline;
            }
        }
    }

    /// Gives what came out of a stage to the next one.
    fn pass_on(&mut self, next: usize, popped: Pop, output: &mut Output) {
        match popped {
            Pop::Chunk(chunk) => self.push_at(next, chunk, output),
            Pop::Last(chunk) => {
                output.concerns_others = true;
                self.push_at(next, chunk, output);
            }
            Pop::End(end, at) => self.end_at(next, end, at, output),
            Pop::Reply(reply) => output.replies.push(reply),
            Pop::Now(_) | Pop::Wait(_) => {}
        }
    }

    /// Makes the stages fit the relay's toxics. Bytes in flight stay in order and none is lost.
    pub(crate) fn reconcile(
        &mut self,
        toxics: &[Arc<Toxic>],
        owner: &Owner<'_>,
        now: Instant,
        output: &mut Output,
    ) {
        let wanted: Vec<(&Arc<Toxic>, &Fault)> = toxics
            .iter()
            .filter_map(|toxic| {
                let fault = toxic.on_connection(owner.relay_key, owner.connection)?;
                let asked = toxic.config.direction;
                acts_on(fault, asked, owner.direction).then_some((toxic, fault))
            })
            .collect();
        self.retire(&wanted, output);
        for (toxic, fault) in wanted {
            let known = self
                .slots
                .iter_mut()
                .find(|slot| slot.id == toxic.id && !slot.is_retired);
            if let Some(slot) = known {
                if slot.revision != toxic.revision {
                    slot.revision = toxic.revision;
                    slot.stage.update(fault, now);
                }
                continue;
            }
            let place = Place {
                key: toxic.key(owner.relay_key, owner.connection),
                opened: owner.opened,
                now,
                is_new: owner.opened >= toxic.shared.added,
                is_datagram: owner.is_datagram,
                shared: Arc::clone(&toxic.shared),
                trouble: Arc::clone(owner.trouble),
            };
            if let Some(stage) = stage_on(fault, owner.direction, &place) {
                let stage = match toxic.config.datagrams {
                    Some(datagrams) => Box::new(PickedStage::new(stage, datagrams, &place)),
                    None => stage,
                };
                // One that looks at answers too is on the connection once.
                if fault.handling().is_none() || owner.direction == Direction::Upstream {
                    let connections = &toxic.shared.counters.connections;
                    connections.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                let slot = Slot {
                    id: toxic.id,
                    revision: toxic.revision,
                    kind: fault.kind(),
                    keeps_length: fault.keeps_length(),
                    stage,
                    is_retired: false,
                };
                // A toxic that comes to act later, by a higher toxicity, still has its place in the order.
                // It stands before what is left of its past: those bytes came earlier.
                let index = self.slots.partition_point(|other| other.id < toxic.id);
                self.slots.insert(index, slot);
            }
        }
    }

    /// Takes away the stages of toxics that are gone; what they held goes on.
    fn retire(&mut self, wanted: &[(&Arc<Toxic>, &Fault)], output: &mut Output) {
        let is_wanted = |slot: &Slot| {
            wanted
                .iter()
                .any(|(toxic, fault)| toxic.id == slot.id && fault.kind() == slot.kind)
        };
        for slot in std::mem::take(&mut self.slots) {
            if slot.is_retired || is_wanted(&slot) {
                self.slots.push(slot);
                continue;
            }
            let rest = slot.stage.take();
            if rest.close {
                output.now = Some(CloseMode::Fin);
            }
            let left = PassStage::from(rest);
            if !left.is_empty() {
                self.slots.push(Slot {
                    stage: Box::new(left),
                    is_retired: true,
                    ..slot
                });
            }
        }
    }
}

/// Stages alone, on a clock that is only what a test says.
#[cfg(test)]
pub(crate) mod testing {
    use std::time::Duration;

    use serde_json::Value;

    use super::*;

    /// A stage and the time at which it began.
    pub(crate) struct Bench {
        pub(crate) stage: Box<dyn Stage>,
        pub(crate) start: Instant,
        shared: Arc<Shared>,
        fault: Fault,
    }

    impl Bench {
        /// The stage of a toxic on a new connection.
        pub(crate) fn new(kind: &str, attributes: &Value) -> Self {
            Self::at(kind, attributes, false)
        }

        /// The stage of a toxic on datagrams.
        pub(crate) fn datagrams(kind: &str, attributes: &Value) -> Self {
            Self::at(kind, attributes, true)
        }

        fn at(kind: &str, attributes: &Value, is_datagram: bool) -> Self {
            let fault = Fault::of_kind(kind).expect("a kind");
            let fault = fault.with_attributes(attributes).expect("valid attributes");
            let start = Instant::now();
            let shared = Arc::<Shared>::default();
            let place = Place {
                key: 1,
                opened: start,
                now: start,
                is_new: true,
                is_datagram,
                shared: Arc::clone(&shared),
                trouble: Arc::default(),
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
            self.stage.end(End::Fin, self.time(ms));
        }

        /// Changes attributes.
        pub(crate) fn update(&mut self, ms: u64, attributes: &Value) {
            self.fault = self.fault.with_attributes(attributes).expect("valid");
            self.stage.update(&self.fault, self.time(ms));
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
                    Pop::End(End::Fin, _) => "+fin".to_owned(),
                    Pop::End(End::Close(mode), _) => format!("+close-{mode}"),
                    Pop::End(End::Abort(mode), _) => format!("+abort-{mode}"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::Transport;
    use crate::relay::fault::{Bandwidth, Latency, Rate, Slicer};
    use crate::relay::toxic::{Picked, ToxicConfig, ToxicSet};
    use proptest::prelude::*;
    use std::time::Duration;

    /// A pipeline on which time is only what a test says.
    struct Bench {
        toxics: ToxicSet,
        pipeline: Pipeline,
        output: Output,
    }

    impl Bench {
        fn new(faults: Vec<Fault>, now: Instant) -> Self {
            let toxics = ToxicSet::default();
            for (number, fault) in faults.into_iter().enumerate() {
                let config = ToxicConfig {
                    name: number.to_string(),
                    direction: Direction::Upstream,
                    stream: String::new(),
                    toxicity: 1.0,
                    connections: Picked::ALL,
                    datagrams: None,
                    fault,
                };
                toxics.add(config, Transport::Tcp).expect("a new name");
            }
            let mut bench = Self {
                toxics,
                pipeline: Pipeline::default(),
                output: Output::default(),
            };
            bench.reconcile(now);
            bench
        }

        fn reconcile(&mut self, now: Instant) {
            let owner = Owner {
                direction: Direction::Upstream,
                relay_key: 1,
                connection: 1,
                opened: now,
                is_datagram: false,
                trouble: &Arc::default(),
            };
            let toxics = self.toxics.snapshot().1;
            self.pipeline
                .reconcile(&toxics, &owner, now, &mut self.output);
        }

        fn push(&mut self, size: usize, at: Instant) {
            let data = Bytes::from(vec![0; size]);
            self.pipeline.push(Chunk::new(data, at), &mut self.output);
        }

        /// What a lane does whose source has so many bytes ready and whose sink takes everything.
        fn turn(&mut self, ready: &mut usize, now: Instant) -> usize {
            let mut sent = 0;
            loop {
                let mut pieces = usize::MAX;
                self.pipeline.advance(now, &mut self.output, &mut pieces);
                let took = std::mem::take(&mut self.output.bytes);
                self.output.items.clear();
                sent += took;
                let read = self.pipeline.room(now).min(*ready).min(ROOM);
                if read > 0 {
                    *ready -= read;
                    self.push(read, now);
                } else if took == 0 {
                    self.pipeline.starved();
                    return sent;
                }
            }
        }
    }

    fn bandwidth(rate: f64) -> Fault {
        Fault::Bandwidth(Bandwidth {
            rate: Rate(rate),
            shared: false,
        })
    }

    proptest! {
        #[test]
        fn late_timers_do_not_lower_a_rate(
            rate in 0.5_f64..2_000.0,
            late_ms in proptest::collection::vec(0_u64..400, 20..60),
        ) {
            let start = Instant::now();
            let mut bench = Bench::new(vec![bandwidth(rate)], start);
            let mut now = start;
            let mut sent = bench.turn(&mut usize::MAX.clone(), now);
            for late in late_ms {
                now += Duration::from_millis(late);
                sent += bench.turn(&mut usize::MAX.clone(), now);
            }
            let due = (now - start).as_secs_f64() * rate * 1000.0;
            let spare = (due * 0.02).max(rate * 10.0).max(1.0) + 1.0;
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let off = (sent as f64 - due).abs();
            prop_assert!(off <= spare, "{sent} of {due} at {rate} KB/s");
        }
    }

    #[test]
    fn an_idle_link_saves_nothing_up() {
        let start = Instant::now();
        let mut bench = Bench::new(vec![bandwidth(1000.0)], start);
        bench.turn(&mut 20_000, start);
        assert_eq!(
            bench.turn(&mut 0, start + Duration::from_millis(20)),
            20_000
        );
        let later = start + Duration::from_secs(10);
        let mut ready = 100_000;
        assert_eq!(bench.turn(&mut ready, later), 0, "nothing has been carried");
        let sent = bench.turn(&mut ready, later + Duration::from_millis(50));
        assert!((40_000..=50_000).contains(&sent), "{sent} in 50 ms");
    }

    #[test]
    fn a_rate_below_a_byte_in_a_quantum_is_kept() {
        let start = Instant::now();
        let mut bench = Bench::new(vec![bandwidth(0.002)], start);
        let mut sent = 0;
        for second in 0..=10 {
            sent += bench.turn(&mut 1000, start + Duration::from_secs(second));
        }
        assert_eq!(sent, 20);
    }

    #[test]
    fn a_turn_moves_no_more_pieces_than_it_may() {
        let start = Instant::now();
        let slicer = Fault::Slicer(Slicer {
            average_size: 1,
            ..Slicer::default()
        });
        let latency = Fault::Latency(Latency {
            latency: 1000,
            jitter: 0,
        });
        let mut bench = Bench::new(vec![slicer, latency], start);
        bench.push(50_000, start);
        for turn in 1..=10 {
            let mut pieces = 256;
            bench
                .pipeline
                .advance(start, &mut bench.output, &mut pieces);
            assert_eq!(pieces, 0);
            let moved = bench.pipeline.slots[1].stage.bytes();
            assert_eq!(moved, turn * 256);
        }
        // What a toxic held that is taken away goes on bit by bit, too.
        bench.toxics.remove("1").expect("it is there");
        bench.reconcile(start);
        assert!(bench.output.items.is_empty());
        assert_eq!(bench.pipeline.bytes(), 50_000);
        let mut pieces = 256;
        bench
            .pipeline
            .advance(start, &mut bench.output, &mut pieces);
        assert_eq!(bench.output.items.len(), 256);
    }

    #[test]
    fn what_is_left_of_a_toxic_stays_in_order_and_vanishes() {
        let start = Instant::now();
        let latency = |latency| Fault::Latency(Latency { latency, jitter: 0 });
        let mut bench = Bench::new(vec![latency(50), latency(1000)], start);
        bench.push(1, start);
        let mut pieces = usize::MAX;
        let later = start + Duration::from_millis(50);
        bench
            .pipeline
            .advance(later, &mut bench.output, &mut pieces);
        bench.push(2, later);
        bench.toxics.clear();
        bench.reconcile(later);
        bench.push(3, later);
        bench.pipeline.end(End::Fin, later, &mut bench.output);
        bench
            .pipeline
            .advance(later, &mut bench.output, &mut pieces);
        let sizes: Vec<usize> = bench
            .output
            .items
            .iter()
            .map(|item| match item {
                Item::Data(data) | Item::Packet(data, _) => data.len(),
                Item::End(_) => 0,
            })
            .collect();
        assert_eq!(sizes, [1, 2, 3, 0]);
        assert!(bench.pipeline.is_bare());
    }
}
