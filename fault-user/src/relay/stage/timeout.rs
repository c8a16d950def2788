//! `timeout`: silence, then an end.

use super::prelude::*;

attributes! {
    /// Throws the data away, then closes the connection.
    Timeout {
        /// Milliseconds until the close; 0 never closes.
        timeout: i64,
    }
}

impl StreamFault for Timeout {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`timeout` ms",
            tcp: Some("data is discarded, then the connection is closed; 0 never closes"),
            udp: Some("the client is forgotten when the time is over"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Timeout(rule) = rule else {
            return Ok(None);
        };
        let timeout = whole_milliseconds(rule.timeout_ns)?;
        Ok(Some(Self { timeout }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(TimeoutStage {
            deadline: self.deadline(place.now),
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }))
    }
}

impl Timeout {
    fn deadline(&self, now: Instant) -> Option<Instant> {
        (self.timeout > 0).then(|| now + milliseconds(self.timeout))
    }
}

/// Throws data away until its time is over, then closes.
struct TimeoutStage {
    deadline: Option<Instant>,
    /// The end: data is never kept.
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl Queued for TimeoutStage {
    /// What it threw away can't be brought back, so the connection must not go on without it.
    const LOSES: bool = true;

    held!();

    fn takes_now(&self) -> usize {
        ROOM
    }

    fn accept(&mut self, _chunk: Chunk) {
        self.shared.counters.hit();
    }

    fn next(&mut self, now: Instant) -> Pop {
        match self.queue.pop_end() {
            Some((end, at)) => Pop::End(end, at),
            None => self.timer(now),
        }
    }

    fn timer(&mut self, now: Instant) -> Pop {
        match self.deadline {
            Some(deadline) if deadline <= now => {
                self.shared.counters.hit();
                Pop::Now(CloseMode::Fin)
            }
            deadline => Pop::Wait(deadline),
        }
    }

    fn change(&mut self, fault: &dyn StreamFault, now: Instant) {
        if let Some(attributes) = fault.of::<Timeout>() {
            self.deadline = attributes.deadline(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn data_vanishes_until_the_connection_is_closed() {
        let mut bench = Bench::new("timeout", &json!({ "timeout": 100 }));
        bench.push(0, "a");
        assert_eq!(bench.pop(99), "@100");
        assert_eq!(bench.pop(100), "!fin");
        assert_eq!(
            bench.take(),
            (String::new(), true),
            "what is lost can't go on"
        );
    }

    #[test]
    fn a_timeout_of_0_never_closes() {
        let mut bench = Bench::new("timeout", &json!({}));
        bench.push(0, "a");
        assert_eq!(bench.pop(1_000_000), "");
        bench.fin(1_000_000);
        assert_eq!(bench.pop(1_000_000), "+fin");
    }
}
