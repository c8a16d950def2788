//! `slicer`: the stream is cut into pieces.

use super::prelude::*;
use crate::relay::attributes::microseconds;

attributes! {
    /// Cuts the stream into pieces.
    Slicer {
        /// Bytes; 0 cuts nothing.
        average_size: i64,
        /// Bytes to either side of the average.
        size_variation: i64,
        /// Microseconds between two pieces.
        delay: i64,
    }
}

impl StreamFault for Slicer {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`average_size` B, `size_variation` B, `delay` µs",
            tcp: Some("pieces of that size, a pause after each; size 0 cuts nothing"),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Slicer(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            average_size: whole(rule.average_size_bytes),
            size_variation: whole(rule.size_variation_bytes),
            delay: whole(rule.delay_ns / 1000),
        }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(SlicerStage {
            attributes: self.clone(),
            draws: Draws::new(place.key),
            passed: 0,
            left: 0,
            queue: ChunkQueue::default(),
            next_at: None,
            shared: Arc::clone(&place.shared),
            notes: place.notes.clone(),
        }))
    }
}

/// Cuts the stream into pieces, with a pause after each. Where the cuts are depends on the draws alone, not on what was
/// read at a time.
struct SlicerStage {
    attributes: Slicer,
    draws: Draws,
    /// Bytes that went on.
    passed: u64,
    /// Bytes to the next cut; 0 right behind one.
    left: usize,
    queue: ChunkQueue,
    next_at: Option<Instant>,
    shared: Arc<ToxicShared>,
    notes: Notes,
}

impl SlicerStage {
    /// The size of the next piece.
    fn piece(&mut self) -> usize {
        let average = self.attributes.average_size.max(0).unsigned_abs();
        if average == 0 {
            return usize::MAX;
        }
        // A piece has at least one byte, so the variation can't be larger than the average.
        let variation = self.attributes.size_variation.max(0).unsigned_abs();
        let variation = variation.min(average);
        let spread = variation.saturating_mul(2).saturating_add(1);
        let size = (average - variation + self.draws.below(spread)).max(1);
        if variation > 0 {
            self.notes.note(self.passed, Some(size));
        }
        usize::try_from(size).unwrap_or(usize::MAX)
    }
}

impl Queued for SlicerStage {
    held!();

    fn next(&mut self, now: Instant) -> Pop {
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at);
        }
        if self.queue.front().is_none() {
            return Pop::Wait(None);
        }
        if let Some(at) = self.next_at.filter(|at| *at > now) {
            return Pop::Wait(Some(at));
        }
        if self.left == 0 {
            self.left = self.piece();
        }
        self.next_at = Some(now + microseconds(self.attributes.delay));
        self.shared.counters.hit();
        let Some(chunk) = self.queue.cut(self.left) else {
            return Pop::Wait(None);
        };
        self.left -= chunk.data.len();
        self.passed += chunk.data.len() as u64;
        Pop::Chunk(Chunk { at: now, ..chunk })
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Slicer>() {
            self.attributes = attributes.clone();
            self.next_at = None;
            self.left = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::decisions::tests::{noted, repeating};
    use crate::relay::stage::testing::Bench;

    #[test]
    fn pieces_have_the_size_and_a_pause_between_them() {
        let mut bench = Bench::new("slicer", &json!({ "average_size": 2, "delay": 5000 }));
        bench.push(0, "abcde");
        bench.fin(0);
        assert_eq!(bench.pop(0), "ab @5");
        assert_eq!(bench.pop(5), "cd @10");
        assert_eq!(bench.pop(10), "e +fin");
        assert_eq!(bench.hits(), 3);
    }

    #[test]
    fn sizes_vary_within_their_bounds() {
        let mut bench = Bench::new("slicer", &json!({ "average_size": 5, "size_variation": 3 }));
        bench.push(0, &"x".repeat(2000));
        let sizes = bench.pop(0);
        let mut sizes: Vec<_> = sizes.split(' ').map(str::len).collect();
        sizes.pop();
        assert!(sizes.iter().all(|size| (2..=8).contains(size)), "{sizes:?}");
        assert!(sizes.contains(&2) && sizes.contains(&8), "{sizes:?}");
    }

    #[test]
    fn the_cuts_do_not_depend_on_what_is_read_at_a_time() {
        let attributes = json!({ "average_size": 50, "size_variation": 40 });
        let drawn = |read: usize| {
            let (notes, log) = repeating(&[]);
            let mut bench = Bench::noting("slicer", &attributes, notes);
            for _ in (0..6000).step_by(read) {
                bench.push(0, &"x".repeat(read));
                bench.pop(0);
            }
            noted(&log)
        };
        let whole = drawn(6000);
        assert!(whole.len() > 60, "{whole:?}");
        assert_eq!(drawn(40), whole);
    }

    #[test]
    fn size_0_cuts_nothing() {
        let mut bench = Bench::new("slicer", &json!({}));
        bench.push(0, "abc");
        assert_eq!(bench.pop(0), "abc");
    }
}
