//! `loss`: some datagrams are dropped.

use super::packet_loss::{Chances, LossStage};
use super::prelude::*;

attributes! {
    /// Loses datagrams.
    Loss {
        /// The share that is lost.
        probability: Probability,
    }
}

impl StreamFault for Loss {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`probability`",
            tcp: None,
            udp: Some("per datagram"),
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(LossStage::new(self, place)))
    }
}

impl From<&Loss> for Chances {
    fn from(loss: &Loss) -> Self {
        Self::new(loss.probability.0, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_share_of_datagrams_is_lost() {
        let mut bench = Bench::datagrams("loss", &json!({ "probability": "30%" }));
        for _ in 0..1000 {
            bench.push(0, "a");
        }
        let arrived = bench.pop(0).matches('a').count();
        assert!((650..=750).contains(&arrived), "{arrived} of 1000 at 30%");
        bench.update(0, &json!({ "probability": 1 }));
        bench.push(0, "a");
        assert_eq!(bench.pop(0), "");
    }
}
