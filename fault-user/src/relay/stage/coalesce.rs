//! `coalesce`: small chunks are collected into larger ones.

use bytes::BytesMut;

use super::prelude::*;

attributes! {
    /// Collects small chunks into larger ones.
    Coalesce {
        /// Bytes that must have come before they are sent on.
        #[serde(alias = "min", alias = "bytes")]
        min_bytes: i64,
        /// Milliseconds that the first byte waits at most; 0 waits for the bytes or the end.
        #[serde(alias = "wait")]
        max_wait: i64,
    }
}

impl StreamFault for Coalesce {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`min_bytes` (at most 16 MiB), `max_wait` ms",
            tcp: Some(
                "collects until there are enough, the first has waited so long (0: for ever), or the stream ends",
            ),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Coalesce(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            min_bytes: whole(rule.min_bytes),
            max_wait: whole_milliseconds(rule.max_wait_ns)?,
        }))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        match name {
            "min" | "bytes" => Some("min_bytes"),
            "wait" => Some("max_wait"),
            _ => None,
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(CoalesceStage {
            attributes: self.clone(),
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// The most that a `coalesce` collects, in bytes.
const COALESCE_LIMIT: usize = 16 << 20;

/// Collects bytes until there are enough, the first has waited long enough, or the stream ends.
struct CoalesceStage {
    attributes: Coalesce,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl CoalesceStage {
    fn min_bytes(&self) -> usize {
        usize::try_from(self.attributes.min_bytes.max(0))
            .unwrap_or(COALESCE_LIMIT)
            .min(COALESCE_LIMIT)
    }

    fn join(&mut self, at: Instant) -> Chunk {
        let mut joined = BytesMut::with_capacity(self.queue.bytes);
        while let Some(chunk) = self.queue.pop() {
            joined.extend_from_slice(&chunk.data);
        }
        self.shared.counters.hit();
        Chunk::new(joined.freeze(), at)
    }
}

impl Queued for CoalesceStage {
    held!();

    fn takes_now(&self) -> usize {
        // Many tiny chunks must fit as well: the bytes alone are counted.
        if self.queue.end.is_some() {
            0
        } else {
            self.min_bytes().max(ROOM).saturating_sub(self.queue.bytes)
        }
    }

    fn next(&mut self, now: Instant) -> Pop {
        let Some(first) = self.queue.front() else {
            return self.queue.pass();
        };
        let max_wait = milliseconds(self.attributes.max_wait);
        let due = (!max_wait.is_zero()).then(|| first.at + max_wait);
        let enough = self.queue.bytes >= self.min_bytes() || self.queue.end.is_some();
        if enough || due.is_some_and(|due| due <= now) {
            return Pop::Chunk(self.join(now));
        }
        Pop::Wait(due)
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Coalesce>() {
            self.attributes = attributes.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn chunks_are_joined_when_there_are_enough_bytes() {
        let mut bench = Bench::new("coalesce", &json!({ "min_bytes": 4, "max_wait": 100 }));
        bench.push(0, "ab");
        assert_eq!(bench.pop(0), "@100");
        bench.push(50, "cde");
        assert_eq!(bench.pop(50), "abcde");
        assert_eq!(bench.hits(), 1);
    }

    #[test]
    fn the_first_byte_waits_no_longer_than_it_may() {
        let mut bench = Bench::new("coalesce", &json!({ "min_bytes": 4, "max_wait": 100 }));
        bench.push(10, "ab");
        assert_eq!(bench.pop(110), "ab");
        let mut bench = Bench::new("coalesce", &json!({ "min_bytes": 4 }));
        bench.push(10, "ab");
        assert_eq!(bench.pop(1_000_000), "", "0 waits for ever");
        bench.fin(1_000_000);
        assert_eq!(bench.pop(1_000_000), "ab +fin");
    }
}
