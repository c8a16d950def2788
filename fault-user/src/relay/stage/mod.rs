//! What a toxic does to one direction of one connection: a state machine without sockets or clocks.
//!
//! A chunk is pushed in with the time at which it arrived, and popped out when it may go on. A
//! [`Pipeline`] is a row of them. Time only comes in as an argument, so that a test can be exact.

mod content;
mod datagram;
mod ending;
mod pacing;
mod reply;
mod substitute;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::fault::{CloseMode, Fault};
use super::toxic::{Direction, Shared, Toxic};

/// What a stage that holds nothing on purpose takes in before the next one has taken it off.
pub(crate) const ROOM: usize = 64 * 1024;
/// What one chunk costs beside its bytes, so that a flood of tiny ones is bounded too.
const CHUNK_COST: usize = 96;

/// Bytes and when they arrived at the stage that has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) data: Bytes,
    pub(crate) at: Instant,
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
    pub(crate) chunks: Vec<Chunk>,
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
    /// Changes the attributes.
    fn update(&mut self, fault: &Fault, now: Instant);
    /// Gives everything back.
    fn take(self: Box<Self>) -> Rest;
    /// Whether nothing is held.
    fn is_empty(&self) -> bool;
}

/// Chunks in order, and the end behind them.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    end: Option<(End, Instant)>,
}

impl Queue {
    fn push(&mut self, chunk: Chunk) {
        self.bytes += chunk.data.len();
        self.chunks.push_back(chunk);
    }

    fn end(&mut self, end: End, at: Instant) {
        self.end.get_or_insert((end, at));
    }

    fn room(&self, limit: usize) -> usize {
        if self.end.is_some() {
            return 0;
        }
        limit.saturating_sub(self.bytes + self.chunks.len() * CHUNK_COST)
    }

    fn front(&self) -> Option<&Chunk> {
        self.chunks.front()
    }

    fn pop(&mut self) -> Option<Chunk> {
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
        })
    }

    /// The end, once all chunks are gone.
    fn pop_end(&mut self) -> Option<(End, Instant)> {
        if self.chunks.is_empty() {
            self.end.take()
        } else {
            None
        }
    }

    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.end.is_none()
    }

    fn clear(&mut self) {
        self.chunks.clear();
        self.bytes = 0;
    }

    fn into_rest(self) -> Rest {
        Rest {
            chunks: self.chunks.into(),
            end: self.end,
            close: false,
        }
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
    /// Chunks are datagrams, which are neither cut nor joined.
    pub(crate) is_datagram: bool,
    pub(crate) shared: Arc<Shared>,
}

fn build(fault: &Fault, place: &Place) -> Option<Box<dyn Stage>> {
    Some(match fault {
        Fault::Latency(a) => Box::new(pacing::LatencyStage::new(a, place)),
        Fault::Bandwidth(a) => Box::new(pacing::BandwidthStage::new(a, place)),
        Fault::Slicer(a) => Box::new(pacing::SlicerStage::new(a, place)),
        Fault::SlowClose(a) => Box::new(pacing::SlowCloseStage::new(a, place)),
        Fault::Timeout(a) => Box::new(ending::TimeoutStage::new(a, place)),
        Fault::ResetPeer(a) => Box::new(ending::ResetPeerStage::new(a, place)),
        Fault::LimitData(a) => Box::new(ending::LimitDataStage::new(a, place)),
        Fault::CloseOnData(a) => Box::new(ending::CloseOnDataStage::new(a, place)),
        Fault::Lifetime(a) => Box::new(ending::LifetimeStage::new(a, place)),
        Fault::Stall(_) => Box::new(content::StallStage::new(place)),
        Fault::Discard(_) | Fault::Drop(_) => Box::new(content::DiscardStage::new(place)),
        Fault::CorruptData(a) => Box::new(content::CorruptStage::new(a, place)),
        Fault::Coalesce(a) => Box::new(content::CoalesceStage::new(a, place)),
        Fault::Substitute(a) => Box::new(substitute::SubstituteStage::new(a, place)?),
        Fault::Error(_) | Fault::Transient(_) | Fault::Abort(_) => {
            Box::new(reply::ReplyStage::new(fault, place)?)
        }
        Fault::Noop(_) | Fault::Down(_) | Fault::NoAccept(_) | Fault::Close(_) | Fault::Mix(_) => {
            return None;
        }
        Fault::Loss(_) | Fault::PacketLoss(_) => Box::new(datagram::LossStage::new(fault, place)),
        Fault::Duplicate(a) => Box::new(datagram::DuplicateStage::new(a, place)),
        Fault::Reorder(a) => Box::new(datagram::ReorderStage::new(a, place)),
    })
}

/// Where a fault acts: those that answer in the server's name look at requests, whatever was asked for.
const fn side(fault: &Fault, asked: Direction) -> Direction {
    match fault {
        Fault::Error(_) | Fault::Transient(_) | Fault::Abort(_) => Direction::Upstream,
        _ => asked,
    }
}

struct Slot {
    id: u64,
    revision: u64,
    kind: &'static str,
    stage: Box<dyn Stage>,
}

/// Which connection a pipeline belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    pub(crate) direction: Direction,
    /// The relay's key: its seed and name.
    pub(crate) relay_key: u64,
    /// The connection's ordinal in the relay, from 1.
    pub(crate) connection: u64,
    pub(crate) opened: Instant,
    /// Chunks are datagrams.
    pub(crate) is_datagram: bool,
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
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Data(Bytes),
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

    /// Whether no stage holds anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| slot.stage.is_empty())
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
            None => output.push(chunk.data),
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

    /// Moves everything on that may go on, and says when to look again.
    pub(crate) fn advance(&mut self, now: Instant, output: &mut Output) -> Option<Instant> {
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
                    let popped = if room {
                        stage.pop(now)
                    } else {
                        stage.expired(now)
                    };
                    match popped {
                        Pop::Chunk(chunk) => self.push_at(index + 1, chunk, output),
                        Pop::End(end, at) => self.end_at(index + 1, end, at, output),
                        Pop::Reply(reply) => output.replies.push(reply),
                        Pop::Now(mode) => {
                            output.now = Some(mode);
                            return None;
                        }
                        Pop::Wait(until) => {
                            deadline = [deadline, until].into_iter().flatten().min();
                            break;
                        }
                    }
                    progress = true;
                }
            }
            if !progress {
                return deadline;
            }
        }
    }

    /// Makes the stages fit the relay's toxics. Bytes in flight stay in order and none is lost.
    pub(crate) fn reconcile(
        &mut self,
        toxics: &[Arc<Toxic>],
        owner: &Owner,
        now: Instant,
        output: &mut Output,
    ) {
        let wanted: Vec<(&Arc<Toxic>, &Fault)> = toxics
            .iter()
            .filter_map(|toxic| {
                let fault = toxic.on_connection(owner.relay_key, owner.connection)?;
                (side(fault, toxic.config.direction) == owner.direction).then_some((toxic, fault))
            })
            .collect();
        self.retire(&wanted, output);
        for (toxic, fault) in wanted {
            let known = self.slots.iter_mut().find(|slot| slot.id == toxic.id);
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
                is_datagram: owner.is_datagram,
                shared: Arc::clone(&toxic.shared),
            };
            if let Some(stage) = build(fault, &place) {
                let stage = match toxic.config.datagrams {
                    Some(datagrams) => {
                        Box::new(datagram::PickedStage::new(stage, datagrams, &place))
                    }
                    None => stage,
                };
                toxic
                    .shared
                    .counters
                    .connections
                    .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let slot = Slot {
                    id: toxic.id,
                    revision: toxic.revision,
                    kind: fault.kind(),
                    stage,
                };
                // A toxic that comes to act later, by a higher toxicity, still has its place in the order.
                let index = self.slots.partition_point(|other| other.id < toxic.id);
                self.slots.insert(index, slot);
            }
        }
    }

    /// Takes away the stages of toxics that are gone, the last first: what they held goes to the next one.
    fn retire(&mut self, wanted: &[(&Arc<Toxic>, &Fault)], output: &mut Output) {
        for index in (0..self.slots.len()).rev() {
            let slot = &self.slots[index];
            if wanted
                .iter()
                .any(|(toxic, fault)| toxic.id == slot.id && fault.kind() == slot.kind)
            {
                continue;
            }
            let rest = self.slots.remove(index).stage.take();
            for chunk in rest.chunks {
                self.push_at(index, chunk, output);
            }
            if let Some((end, at)) = rest.end {
                self.end_at(index, end, at, output);
            }
            if rest.close {
                output.now = Some(CloseMode::Fin);
            }
        }
    }
}
