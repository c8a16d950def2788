//! `slow_close`: the end of the stream comes later.

use super::prelude::*;

attributes! {
    /// Holds the end of the stream back.
    SlowClose {
        /// Milliseconds.
        delay: i64,
    }
}

impl StreamFault for SlowClose {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`delay` ms",
            tcp: Some("the FIN comes later; a reset does not"),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::SlowClose(rule) = rule else {
            return Ok(None);
        };
        let delay = whole_milliseconds(rule.delay_ns)?;
        Ok(Some(Self { delay }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(SlowCloseStage {
            delay: milliseconds(self.delay),
            queue: ChunkQueue::default(),
            counted: false,
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// Lets everything through, the end of the stream later.
struct SlowCloseStage {
    delay: Duration,
    queue: ChunkQueue,
    counted: bool,
    shared: Arc<ToxicShared>,
}

impl Queued for SlowCloseStage {
    held!();

    fn next(&mut self, now: Instant) -> Pop {
        if let Some(chunk) = self.queue.pop() {
            return Pop::Chunk(chunk);
        }
        let due = match self.queue.end {
            None => return Pop::Wait(None),
            Some((StreamEnd::Fin, at)) => at + self.delay,
            // A reset is no orderly end: it is not slowed.
            Some((StreamEnd::Close(_) | StreamEnd::Abort(_), at)) => at,
        };
        if due > now {
            return Pop::Wait(Some(due));
        }
        if !std::mem::replace(&mut self.counted, true) {
            self.shared.counters.hit();
        }
        self.queue
            .pop_end()
            .map_or(Pop::Wait(None), |(end, _)| Pop::End(end, due))
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<SlowClose>() {
            self.delay = milliseconds(attributes.delay);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn only_the_end_is_late() {
        let mut bench = Bench::new("slow_close", &json!({ "delay": 100 }));
        bench.push(0, "a");
        bench.fin(10);
        assert_eq!(bench.pop(10), "a @110");
        assert_eq!(bench.hits(), 0);
        assert_eq!(bench.pop(110), "+fin");
        assert_eq!(bench.hits(), 1);
    }
}
