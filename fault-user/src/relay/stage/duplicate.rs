//! `duplicate`: some datagrams come twice.

use super::prelude::*;

attributes! {
    /// Sends datagrams twice.
    Duplicate {
        /// The share that is sent twice.
        probability: Probability,
    }
}

impl StreamFault for Duplicate {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`probability`",
            tcp: None,
            udp: Some("per datagram"),
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(DuplicateStage {
            probability: self.probability.0,
            draws: Draws::new(place.key),
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// Sends some twice.
struct DuplicateStage {
    probability: f64,
    draws: Draws,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl Queued for DuplicateStage {
    held!();

    fn accept(&mut self, chunk: Chunk) {
        if self.draws.unit() < self.probability {
            self.shared.counters.hit();
            self.queue.push(chunk.clone());
        }
        self.queue.push(chunk);
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Duplicate>() {
            self.probability = attributes.probability.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_share_of_datagrams_comes_twice() {
        let mut bench = Bench::datagrams("duplicate", &json!({ "probability": 0.3 }));
        for _ in 0..1000 {
            bench.push(0, "a");
        }
        let arrived = bench.pop(0).matches('a').count();
        assert!((1250..=1350).contains(&arrived), "{arrived} of 1000 at 30%");
        assert_eq!(bench.hits(), arrived as u64 - 1000);
    }
}
