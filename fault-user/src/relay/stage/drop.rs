//! `drop`: datagrams vanish.

use super::discard::DiscardStage;
use super::{Place, Stage};
use crate::relay::fault::{Help, StreamFault, attributes};

attributes! {
    /// Datagrams vanish.
    Drop {}
}

impl StreamFault for Drop {
    fn help(&self) -> Help {
        Help {
            attributes: "-",
            tcp: None,
            udp: Some("thrown away"),
        }
    }

    fn keeps_length(&self) -> bool {
        false
    }

    fn stage(&self, place: &Place) -> Option<Box<dyn Stage>> {
        Some(Box::new(DiscardStage::new(place)))
    }
}
