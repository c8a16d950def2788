//! `loss`: some datagrams vanish.

use super::packet_loss::{Chances, LossStage};
use super::{Place, Stage};
use crate::relay::fault::{Help, Probability, StreamFault, attributes};

attributes! {
    /// Loses datagrams.
    Loss {
        /// The share that is lost.
        probability: Probability,
    }
}

impl StreamFault for Loss {
    fn help(&self) -> Help {
        Help {
            attributes: "`probability`",
            tcp: None,
            udp: Some("per datagram"),
        }
    }

    fn stage(&self, place: &Place) -> Option<Box<dyn Stage>> {
        Some(Box::new(LossStage::new(self.into(), place)))
    }
}

impl From<&Loss> for Chances {
    fn from(loss: &Loss) -> Self {
        Self::new(loss.probability.0, 0.0)
    }
}
