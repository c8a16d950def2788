//! `drop`: datagrams are dropped.

use super::discard::DiscardStage;
use super::prelude::*;

attributes! {
    /// Datagrams are dropped.
    Drop {}
}

impl StreamFault for Drop {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: None,
            udp: Some("dropped"),
        }
    }

    fn keeps_length(&self) -> bool {
        false
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(DiscardStage::new(place)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn datagrams_vanish() {
        let mut bench = Bench::datagrams("drop", &json!({}));
        bench.push(0, "abc");
        assert_eq!(bench.pop(0), "");
        assert_eq!(bench.hits(), 1);
    }
}
