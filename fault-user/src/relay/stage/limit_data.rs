//! `limit_data`: so many bytes and no more.

use std::sync::atomic::Ordering;

use super::prelude::*;

attributes! {
    /// Lets exactly so many bytes through, then closes the connection.
    LimitData {
        /// Bytes.
        bytes: i64,
        /// All connections share the bytes instead of having them each; at the limit all are closed.
        #[serde(skip_serializing_if = "is_default")]
        shared: bool,
        /// Once the shared bytes are used up counting begins anew: every so many bytes all
        /// connections are closed.
        #[serde(skip_serializing_if = "is_default")]
        every: bool,
    }
}

impl StreamFault for LimitData {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`bytes`, `shared`, `every`",
            tcp: Some(
                "exactly this many bytes, then the connection is closed; the count survives an update. `shared`: all connections together; when the limit is reached all are closed. `every`: the same, and counting begins anew",
            ),
            udp: Some("datagrams beyond are dropped, smaller ones may still fit"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::LimitData(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            bytes: whole(rule.bytes),
            shared: rule.shared,
            every: false,
        }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        // What is shared is used up by whichever connections are faster: each is repeated by itself.
        let limit = match place.notes.recorded_places() {
            Some(places) if self.is_shared() && !place.is_datagram => Self {
                bytes: places.last().map_or(i64::MAX, |at| whole(*at)),
                ..Self::default()
            },
            _ => self.clone(),
        };
        Some(Box::new(LimitDataStage {
            limit,
            is_datagram: place.is_datagram,
            passed: 0,
            closings: place.shared.closings.load(Ordering::Relaxed),
            queue: ChunkQueue::default(),
            closed: false,
            shared: Arc::clone(&place.shared),
            notes: place.notes.clone(),
        }))
    }
}

impl LimitData {
    fn limit(&self) -> u64 {
        self.bytes.max(0).unsigned_abs()
    }

    const fn is_shared(&self) -> bool {
        self.shared || self.every
    }
}

/// Lets so many bytes through, then closes.
struct LimitDataStage {
    limit: LimitData,
    is_datagram: bool,
    /// Bytes of this connection.
    passed: u64,
    /// How often the shared bytes had been used up when the connection began.
    closings: u64,
    queue: ChunkQueue,
    closed: bool,
    shared: Arc<ToxicShared>,
    notes: Notes,
}

impl LimitDataStage {
    /// Bytes that count against the limit.
    fn counted(&self) -> u64 {
        if self.limit.is_shared() {
            self.shared.bytes.load(Ordering::Relaxed)
        } else {
            self.passed
        }
    }

    /// Whether the limit is reached: one that this connection was part of, or could have been.
    fn is_used_up(&self) -> bool {
        let others =
            self.limit.is_shared() && self.shared.closings.load(Ordering::Relaxed) != self.closings;
        others || self.passed > 0 && self.counted() >= self.limit.limit()
    }

    /// Takes up to `wanted` bytes off what remains; a datagram is taken whole or not at all. The second
    /// is whether the shared limit is reached by that.
    fn claim(&mut self, wanted: u64) -> (u64, bool) {
        let (limit, is_datagram) = (self.limit.limit(), self.is_datagram);
        let grant = |passed: u64| {
            let remaining = limit.saturating_sub(passed);
            if is_datagram && wanted > remaining {
                0
            } else {
                wanted.min(remaining)
            }
        };
        if !self.limit.is_shared() {
            let granted = grant(self.passed);
            self.passed += granted;
            return (granted, false);
        }
        let (mut granted, mut reached) = (0, false);
        let is_repeated = self.limit.every;
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
        self.notes.note(self.passed, None);
        Pop::End(StreamEnd::Close(CloseMode::Fin), at)
    }
}

impl Queued for LimitDataStage {
    held!();

    fn takes_now(&self) -> usize {
        if self.closed {
            return 0;
        }
        let room = self.queue.room(ROOM);
        if self.is_datagram {
            return room;
        }
        // One byte must be readable at the end of the allowance: it is what closes the connection.
        let remaining = self.limit.limit().saturating_sub(self.counted());
        let remaining = usize::try_from(remaining).unwrap_or(ROOM).max(1);
        room.min(remaining.saturating_sub(self.queue.bytes))
    }

    fn accept(&mut self, chunk: Chunk) {
        if !self.closed {
            self.queue.push(chunk);
        }
    }

    fn accept_end(&mut self, end: StreamEnd, at: Instant) {
        if !self.closed {
            self.queue.end(end, at);
        }
    }

    fn next(&mut self, now: Instant) -> Pop {
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

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<LimitData>() {
            self.limit = attributes.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::decisions::tests::{noted, repeating};
    use crate::relay::stage::testing::Bench;

    #[test]
    fn exactly_so_many_bytes_pass() {
        let mut bench = Bench::new("limit_data", &json!({ "bytes": 5 }));
        bench.push(0, "abc");
        assert_eq!(bench.pop(0), "abc");
        assert_eq!(bench.room(0), 2);
        bench.push(0, "defg");
        assert_eq!(bench.pop(0), "de +close-fin");
        assert_eq!(bench.room(0), 0);
        assert_eq!(bench.hits(), 1);
    }

    #[test]
    fn who_reaches_a_shared_limit_tells_the_others() {
        let mut bench = Bench::new("limit_data", &json!({ "bytes": 3, "shared": true }));
        bench.push(0, "abc");
        assert_eq!(bench.pop(0), "abc| +close-fin");
    }

    #[test]
    fn a_shared_limit_is_repeated_connection_by_connection() {
        let attributes = json!({ "bytes": 3, "shared": true });
        let (notes, log) = repeating(&[5]);
        let mut bench = Bench::noting("limit_data", &attributes, notes);
        bench.push(0, "abcdefgh");
        assert_eq!(bench.pop(0), "abcde +close-fin");
        assert_eq!(noted(&log), [(Some(5), None)]);
        let (notes, _) = repeating(&[]);
        let mut bench = Bench::noting("limit_data", &attributes, notes);
        bench.push(0, "abcdefgh");
        assert_eq!(bench.pop(0), "abcdefgh", "it was not closed");
    }

    #[test]
    fn a_datagram_passes_whole_or_not_at_all() {
        let mut bench = Bench::datagrams("limit_data", &json!({ "bytes": 5 }));
        bench.push(0, "abc");
        bench.push(0, "def");
        bench.push(0, "gh");
        assert_eq!(bench.pop(0), "abc gh");
        assert_eq!(bench.hits(), 1);
    }
}
