//! `latency`: the stream is shifted in time, and not slowed.

use std::collections::VecDeque;

use super::prelude::*;
use crate::relay::budget::Pieces;
use crate::relay::random::unit;

attributes! {
    /// Holds every chunk for `latency` ± a uniform `jitter` from its arrival; the order is kept.
    Latency {
        /// Milliseconds.
        latency: i64,
        /// Milliseconds to either side.
        jitter: i64,
    }
}

impl StreamFault for Latency {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`latency` ms, `jitter` ms",
            tcp: Some(
                "each chunk leaves `latency` ± a uniform `jitter` after it came, in order: the stream is shifted, not slowed. The end of the stream is shifted too. Up to 64 MiB per direction are in flight",
            ),
            udp: Some("the same, in order"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Latency(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            latency: whole_milliseconds(rule.latency_ns)?,
            jitter: whole_milliseconds(rule.jitter_ns)?,
        }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(LatencyStage {
            latency: milliseconds(self.latency),
            jitter: milliseconds(self.jitter),
            draws: Draws::new(place.key),
            passed: 0,
            flights: VecDeque::new(),
            bytes: 0,
            pieces: Pieces::default(),
            last_due: None,
            ended: false,
            shared: Arc::clone(&place.shared),
            notes: place.notes.clone(),
        }))
    }
}

/// What one direction of one connection may have in flight in a `latency`, in bytes. A stream that is
/// faster than this per latency is slowed down to it.
const IN_FLIGHT: usize = 64 << 20;

/// One chunk, or the end, on its way through a `latency`.
struct Flight {
    /// The draw that places it within the jitter, 0 to 1.
    unit: f64,
    due: Instant,
    at: Instant,
    load: Result<Chunk, StreamEnd>,
}

/// Shifts the stream in time, and does not slow it.
struct LatencyStage {
    latency: Duration,
    jitter: Duration,
    draws: Draws,
    /// Bytes that came before.
    passed: u64,
    flights: VecDeque<Flight>,
    bytes: usize,
    pieces: Pieces,
    last_due: Option<Instant>,
    ended: bool,
    shared: Arc<ToxicShared>,
    notes: Notes,
}

impl LatencyStage {
    fn delay(&self, unit: f64) -> Duration {
        let spread = self.jitter.mul_f64(unit * 2.0);
        (self.latency + spread).saturating_sub(self.jitter)
    }

    fn due(&self, at: Instant, unit: f64) -> Instant {
        let due = at + self.delay(unit);
        self.last_due.map_or(due, |last| due.max(last))
    }

    /// The draw depends on where in the stream the chunk begins, not on how many chunks came before.
    fn add(&mut self, at: Instant, load: Result<Chunk, StreamEnd>) {
        let unit = if self.jitter.is_zero() {
            0.5
        } else {
            let unit = unit(self.draws.at(self.passed));
            self.notes.note_time(self.passed, self.delay(unit));
            unit
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
        let size = chunk.data.len();
        self.bytes += size;
        self.pieces.add();
        self.add(chunk.at, Ok(chunk));
        self.passed += size as u64;
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
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
                    at: flight.due,
                    ..chunk
                })
            }
            Err(end) => Pop::End(end, flight.due),
        }
    }

    fn update(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Latency>() {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::decisions::tests::{noted, repeating};
    use crate::relay::stage::testing::Bench;

    #[test]
    fn every_chunk_and_the_end_are_late_by_the_latency() {
        let mut bench = Bench::new("latency", &json!({ "latency": 100 }));
        bench.push(0, "a");
        bench.push(30, "b");
        bench.fin(40);
        assert_eq!(bench.pop(99), "@100");
        assert_eq!(bench.pop(100), "a @130");
        assert_eq!(bench.pop(140), "b +fin");
        assert_eq!(bench.hits(), 2);
    }

    #[test]
    fn a_jitter_keeps_the_order_and_its_bounds() {
        let mut bench = Bench::new("latency", &json!({ "latency": 100, "jitter": 50 }));
        let text: Vec<_> = (b'a'..=b'z').map(|c| char::from(c).to_string()).collect();
        for letter in &text {
            bench.push(0, letter);
        }
        assert!(bench.pop(49).starts_with('@'));
        assert_eq!(bench.pop(150), text.join(" "));
    }

    #[test]
    fn a_jitter_depends_on_where_in_the_stream_a_chunk_begins() {
        let attributes = json!({ "latency": 1000, "jitter": 900 });
        let drawn = |chunks: &[&str]| {
            let (notes, log) = repeating(&[]);
            let mut bench = Bench::noting("latency", &attributes, notes);
            for chunk in chunks {
                bench.push(0, chunk);
            }
            noted(&log)
        };
        let (whole, cut) = (drawn(&["abc", "d"]), drawn(&["ab", "c", "d"]));
        assert_eq!([whole[0], whole[1]], [cut[0], cut[2]]);
        assert_ne!(cut[0].1, cut[1].1);
        assert_eq!(cut[1].0, Some(2));
    }

    #[test]
    fn an_update_moves_what_is_on_its_way() {
        let mut bench = Bench::new("latency", &json!({ "latency": 1000 }));
        bench.push(0, "a");
        bench.update(10, &json!({ "latency": 20 }));
        assert_eq!(bench.pop(20), "a");
    }
}
