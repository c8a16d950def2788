//! The row of stages that the toxics of a relay put on one direction of one connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::attributes::{CloseMode, StreamDirection};
use super::decisions::Notes;
use super::fault::RelayFault;
use super::greeting::Greeted;
use super::packets::Carrier;
use super::picked::PickedStage;
use super::requests::answers;
use super::stage::{Chunk, PassStage, Pop, ROOM, Stage, StageContext, StreamEnd};
use super::toxic::Toxic;
use super::trouble::Trouble;

/// Creates the stage of a fault for a direction that it [acts on](acts_on).
fn stage_on(
    fault: &RelayFault,
    direction: StreamDirection,
    place: &StageContext,
) -> Option<Box<dyn Stage>> {
    match fault.handling() {
        Some(handling) if direction == StreamDirection::Downstream => answers(&handling),
        _ => fault.stage(place),
    }
}

/// Whether a fault acts on this direction. Those that answer in the server's name read requests, and some read answers
/// too, whatever direction was asked for.
fn acts_on(fault: &RelayFault, asked: StreamDirection, direction: StreamDirection) -> bool {
    match fault.handling() {
        Some(handling) => direction == StreamDirection::Upstream || handling.reads_answers(),
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
pub(crate) struct PipelineOwner<'a> {
    pub(crate) direction: StreamDirection,
    /// The relay's key: its seed and name.
    pub(crate) relay_key: u64,
    /// The connection's ordinal in the relay, from 1.
    pub(crate) connection: u64,
    pub(crate) opened: Instant,
    /// What its client asks for.
    pub(crate) greeted: &'a Greeted,
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
    End(StreamEnd),
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
    /// Whether it has no stages.
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
    pub(crate) fn end(&mut self, end: StreamEnd, at: Instant, output: &mut Output) {
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

    fn end_at(&mut self, index: usize, end: StreamEnd, at: Instant, output: &mut Output) {
        if matches!(end, StreamEnd::Abort(_)) {
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
        owner: &PipelineOwner<'_>,
        now: Instant,
        output: &mut Output,
    ) {
        let wanted: Vec<(&Arc<Toxic>, (usize, &RelayFault))> = toxics
            .iter()
            .filter_map(|toxic| {
                let chosen =
                    toxic.on_connection(owner.relay_key, owner.connection, owner.greeted)?;
                let asked = toxic.config.direction;
                acts_on(chosen.1, asked, owner.direction).then_some((toxic, chosen))
            })
            .collect();
        self.retire(&wanted, output);
        for (toxic, chosen @ (_, fault)) in wanted {
            let known = self
                .slots
                .iter_mut()
                .find(|slot| slot.id == toxic.id && !slot.is_retired);
            if let Some(slot) = known {
                if slot.revision != toxic.revision {
                    slot.revision = toxic.revision;
                    slot.stage.update(fault.definition(), now);
                }
                continue;
            }
            let notes = toxic.notes(owner.connection, chosen);
            let datagrams = toxic.config.datagrams;
            let place = StageContext {
                key: toxic.key(owner.relay_key, owner.connection),
                opened: owner.opened,
                now,
                is_new: owner.opened >= toxic.shared.added,
                is_datagram: owner.is_datagram,
                shared: Arc::clone(&toxic.shared),
                trouble: Arc::clone(owner.trouble),
                notes: match datagrams {
                    Some(_) => Notes::unkept(),
                    None => notes.clone(),
                },
            };
            if let Some(stage) = stage_on(fault, owner.direction, &place) {
                // One that looks at answers too is on the connection once.
                if fault.handling().is_none() || owner.direction == StreamDirection::Upstream {
                    let connections = &toxic.shared.counters.connections;
                    connections.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    notes.begin();
                }
                let stage = match datagrams {
                    Some(datagrams) => {
                        Box::new(PickedStage::new(stage, datagrams, &place.shared, notes))
                    }
                    None => stage,
                };
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
    fn retire(&mut self, wanted: &[(&Arc<Toxic>, (usize, &RelayFault))], output: &mut Output) {
        let is_wanted = |slot: &Slot| {
            wanted
                .iter()
                .any(|(toxic, (_, fault))| toxic.id == slot.id && fault.kind() == slot.kind)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::attributes::{BitRate, Probability};
    use crate::relay::fault::{Bandwidth, Latency, Mix, MixShare, Slicer, Stall};
    use crate::relay::picked::Picked;
    use crate::relay::toxic::{ToxicConfig, ToxicSet};
    use crate::relay::{DecisionLog, Decisions, StreamDecision, StreamReplay, Transport};
    use proptest::prelude::*;
    use std::time::Duration;

    fn config(name: &str, fault: RelayFault) -> ToxicConfig {
        ToxicConfig {
            name: name.to_owned(),
            direction: StreamDirection::Upstream,
            stream: String::new(),
            toxicity: 1.0,
            connections: Picked::ALL,
            filter: crate::relay::GreetingFilter::default(),
            datagrams: None,
            fault,
            decisions: Decisions::default(),
        }
    }

    /// A pipeline on which time is only what a test says.
    struct PipelineBench {
        toxics: ToxicSet,
        pipeline: Pipeline,
        output: Output,
    }

    impl PipelineBench {
        fn new(faults: Vec<RelayFault>, now: Instant) -> Self {
            let toxics = ToxicSet::default();
            for (number, fault) in faults.into_iter().enumerate() {
                let config = config(&number.to_string(), fault);
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
            let owner = PipelineOwner {
                direction: StreamDirection::Upstream,
                relay_key: 1,
                connection: 1,
                opened: now,
                greeted: &Greeted::Unread,
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

    /// The number of the fault that each of a hundred connections gets, and what was decided.
    fn chosen(toxicity: f64, relay_key: u64, replay: Option<StreamReplay>) -> Chosen {
        let share = |fault| MixShare {
            share: Probability(0.5),
            fault,
        };
        let log = Arc::<DecisionLog>::default();
        let toxics = ToxicSet::default();
        let config = ToxicConfig {
            toxicity,
            direction: StreamDirection::Downstream,
            decisions: Decisions {
                log: Some(Arc::clone(&log)),
                replay: replay.map(Arc::new),
                rule: 1,
            },
            ..config(
                "0@downstream",
                RelayFault::Mix(Mix {
                    faults: vec![share(bandwidth(1.0)), share(RelayFault::Stall(Stall {}))],
                }),
            )
        };
        toxics.add(config, Transport::Tcp).expect("a new name");
        let now = Instant::now();
        let kinds = (1..=100).map(|connection| {
            let mut pipeline = Pipeline::default();
            for direction in StreamDirection::ALL {
                let owner = PipelineOwner {
                    direction,
                    relay_key,
                    connection,
                    opened: now,
                    greeted: &Greeted::Unread,
                    is_datagram: false,
                    trouble: &Arc::default(),
                };
                let toxics = toxics.snapshot().1;
                pipeline.reconcile(&toxics, &owner, now, &mut Output::default());
            }
            pipeline.slots.first().map(|slot| slot.kind)
        });
        let kinds = kinds.collect();
        let mut decisions = Vec::new();
        log.drain(&mut decisions);
        (kinds, decisions)
    }

    type Chosen = (Vec<Option<&'static str>>, Vec<StreamDecision>);

    #[test]
    fn recorded_connections_get_the_same_faults_whatever_would_be_drawn() {
        let (kinds, decisions) = chosen(0.5, 7, None);
        let count = |kind| kinds.iter().filter(|one| **one == kind).count();
        for kind in [None, Some("bandwidth"), Some("stall")] {
            assert!(count(kind) > 10, "{kind:?}: {kinds:?}");
        }
        assert_eq!(decisions.len(), 100 - count(None));
        assert_ne!(chosen(0.5, 8, None).0, kinds);
        let replay = decisions.iter().cloned().collect::<StreamReplay>();
        assert_eq!(replay.count(1), (decisions.len() as u64, 0));
        for toxicity in [0.0, 1.0] {
            let replay = decisions.iter().cloned().collect();
            assert_eq!(chosen(toxicity, 8, Some(replay)).0, kinds);
        }
    }

    fn bandwidth(rate: f64) -> RelayFault {
        RelayFault::Bandwidth(Bandwidth {
            rate: BitRate(rate),
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
            let mut bench = PipelineBench::new(vec![bandwidth(rate)], start);
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
        let mut bench = PipelineBench::new(vec![bandwidth(1000.0)], start);
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
        let mut bench = PipelineBench::new(vec![bandwidth(0.002)], start);
        let mut sent = 0;
        for second in 0..=10 {
            sent += bench.turn(&mut 1000, start + Duration::from_secs(second));
        }
        assert_eq!(sent, 20);
    }

    #[test]
    fn a_turn_moves_no_more_pieces_than_it_may() {
        let start = Instant::now();
        let slicer = RelayFault::Slicer(Slicer {
            average_size: 1,
            ..Slicer::default()
        });
        let latency = RelayFault::Latency(Latency {
            latency: 1000,
            jitter: 0,
        });
        let mut bench = PipelineBench::new(vec![slicer, latency], start);
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
        let latency = |latency| RelayFault::Latency(Latency { latency, jitter: 0 });
        let mut bench = PipelineBench::new(vec![latency(50), latency(1000)], start);
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
        bench.pipeline.end(StreamEnd::Fin, later, &mut bench.output);
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
