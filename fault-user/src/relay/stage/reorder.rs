//! `reorder`: some datagrams come late.

use std::collections::VecDeque;

use super::prelude::*;

attributes! {
    /// Lets later datagrams overtake.
    Reorder {
        /// The share that is held back.
        probability: Probability,
        /// How many datagrams overtake one that is held back; 0 means 1.
        gap: i64,
        /// Milliseconds after which a datagram that nothing overtook is sent on; 0 means 100.
        #[serde(skip_serializing_if = "is_default")]
        max_wait: i64,
    }
}

impl StreamFault for Reorder {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`probability`, `gap`, `max_wait` ms",
            tcp: None,
            udp: Some(
                "a datagram waits until `gap` (default 1) others have passed or `max_wait` (default 100) is over",
            ),
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(ReorderStage {
            attributes: self.clone(),
            draws: Draws::new(place.key),
            held: VecDeque::new(),
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }))
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
struct ReorderStage {
    attributes: Reorder,
    draws: Draws,
    held: VecDeque<Held>,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl ReorderStage {
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

    fn end(&mut self, end: StreamEnd, at: Instant) {
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

    fn update(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Reorder>() {
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
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn a_datagram_waits_until_others_have_passed() {
        let mut bench = Bench::datagrams("reorder", &json!({ "probability": 1, "gap": 2 }));
        bench.push(0, "a");
        bench.update(0, &json!({ "probability": 0 }));
        bench.push(1, "b");
        assert_eq!(bench.pop(1), "b @100");
        bench.push(2, "c");
        assert_eq!(bench.pop(2), "c a");
        assert_eq!(bench.hits(), 1);
    }

    #[test]
    fn a_datagram_that_nothing_overtakes_is_sent_on() {
        let mut bench = Bench::datagrams("reorder", &json!({ "probability": 1, "max_wait": 30 }));
        bench.push(0, "a");
        assert_eq!(bench.pop(29), "@30");
        assert_eq!(bench.pop(30), "a");
    }
}
