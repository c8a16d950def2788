//! `packet_loss`: Toxiproxy's loss of chunks, and the stage of `loss`.

use super::prelude::*;

attributes! {
    /// Loses chunks of a stream or datagrams, as Toxiproxy does: what is lost of a stream is missing in it.
    PacketLoss {
        /// The share that is lost; below 0 acts as 0, above 1 as 1.
        loss_rate: f64,
        /// What the share is higher by after a loss.
        correlation: f64,
    }
}

impl StreamFault for PacketLoss {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`loss_rate` 0 to 1, `correlation` 0 to 1",
            tcp: Some(
                "each chunk is lost with this chance, after a loss with the sum of both; the client misses those bytes, as with Toxiproxy's toxic",
            ),
            udp: Some("the same per datagram"),
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(LossStage::new(self, place)))
    }
}

impl From<&PacketLoss> for Chances {
    fn from(loss: &PacketLoss) -> Self {
        Self::new(
            loss.loss_rate.clamp(0.0, 1.0),
            loss.correlation.clamp(0.0, 1.0),
        )
    }
}

/// How likely a chunk is dropped.
pub(super) struct Chances {
    otherwise: f64,
    after_a_loss: f64,
}

impl Chances {
    /// Chances of 0 to 1; after a loss it is higher by `more`.
    pub(super) fn new(otherwise: f64, more: f64) -> Self {
        Self {
            otherwise,
            after_a_loss: otherwise + more,
        }
    }
}

/// Drops some.
pub(super) struct LossStage {
    chances: Chances,
    /// The chances that its fault says.
    read: fn(&dyn StreamFault) -> Option<Chances>,
    /// The last one was dropped.
    has_lost: bool,
    draws: Draws,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl LossStage {
    pub(super) fn new<F: StreamFault>(fault: &F, place: &StageContext) -> Self
    where
        for<'a> Chances: From<&'a F>,
    {
        Self {
            chances: fault.into(),
            read: |fault| fault.of::<F>().map(Chances::from),
            has_lost: false,
            draws: Draws::new(place.key),
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }
    }
}

impl Queued for LossStage {
    held!();

    fn accept(&mut self, chunk: Chunk) {
        let chance = if self.has_lost {
            self.chances.after_a_loss
        } else {
            self.chances.otherwise
        };
        self.has_lost = self.draws.unit() < chance;
        if self.has_lost {
            self.shared.counters.hit();
        } else {
            self.queue.push(chunk);
        }
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(chances) = (self.read)(fault) {
            self.chances = chances;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_share_is_lost() {
        let mut bench = Bench::new("packet_loss", &json!({ "loss_rate": 0.3 }));
        for _ in 0..1000 {
            bench.push(0, "a");
        }
        let arrived = bench.pop(0).matches('a').count();
        assert!((650..=750).contains(&arrived), "{arrived} of 1000 at 30%");
        assert_eq!(bench.hits(), 1000 - arrived as u64);
    }

    #[test]
    fn a_loss_makes_the_next_one_likelier() {
        // The chain stays in "lost" with 0.9, and comes there with 0.1: half of all is lost.
        let mut bench = Bench::new(
            "packet_loss",
            &json!({ "loss_rate": 0.1, "correlation": 0.8 }),
        );
        for _ in 0..5000 {
            bench.push(0, "a");
        }
        let arrived = bench.pop(0).matches('a').count();
        assert!((2200..=2800).contains(&arrived), "{arrived} of 5000");
    }
}
