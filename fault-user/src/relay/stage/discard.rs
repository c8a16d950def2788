//! `discard`: everything is read and discarded.

use super::prelude::*;

attributes! {
    /// Everything is read and discarded.
    Discard {}
}

impl StreamFault for Discard {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some("read and discarded; the end passes"),
            udp: Some("discarded"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        Ok(matches!(rule, rule::Fault::Discard(_)).then_some(Self {}))
    }

    fn keeps_length(&self) -> bool {
        false
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(DiscardStage::new(place)))
    }
}

/// Reads everything and keeps nothing but the end.
pub(super) struct DiscardStage {
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl DiscardStage {
    pub(super) fn new(place: &StageContext) -> Self {
        Self {
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Queued for DiscardStage {
    held!();

    fn takes_now(&self) -> usize {
        ROOM
    }

    fn accept(&mut self, _chunk: Chunk) {
        self.shared.counters.hit();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn only_the_end_arrives() {
        let mut bench = Bench::new("discard", &json!({}));
        bench.push(0, "abc");
        bench.fin(0);
        assert_eq!(bench.pop(0), "+fin");
        assert_eq!(bench.hits(), 1);
        assert!(bench.room(0) > 0);
    }
}
