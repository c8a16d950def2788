//! `close_on_data`: data ends the connection.

use super::prelude::*;

attributes! {
    /// Closes the connection when data comes; the data is not forwarded. A UDP client is forgotten.
    CloseOnData {
        /// `fin` or `rst`.
        #[serde(alias = "how")]
        mode: CloseMode,
    }
}

impl StreamFault for CloseOnData {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`mode` `fin`/`rst`",
            tcp: Some("the first byte closes the connection and is not forwarded"),
            udp: Some("the client is forgotten, the datagram is not forwarded"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::CloseOnData(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self { mode: rule.how }))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        (name == "how").then_some("mode")
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(CloseOnDataStage {
            mode: self.mode,
            is_datagram: place.is_datagram,
            queue: ChunkQueue::default(),
            fired: false,
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// Closes on the first byte.
struct CloseOnDataStage {
    mode: CloseMode,
    is_datagram: bool,
    queue: ChunkQueue,
    fired: bool,
    shared: Arc<ToxicShared>,
}

impl Queued for CloseOnDataStage {
    held!();

    fn takes(&self) -> usize {
        if self.fired { 0 } else { ROOM }
    }

    fn next(&mut self, _now: Instant) -> Pop {
        if self.fired {
            return Pop::Wait(None);
        }
        let chunk = match self.queue.pass() {
            Pop::Chunk(chunk) => chunk,
            other => return other,
        };
        self.fired = true;
        self.queue.clear();
        self.shared.counters.hit();
        if self.is_datagram {
            return Pop::Now(self.mode);
        }
        Pop::End(StreamEnd::Close(self.mode), chunk.at)
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<CloseOnData>() {
            self.mode = attributes.mode;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn the_first_byte_closes_and_is_not_forwarded() {
        let mut bench = Bench::new("close_on_data", &json!({ "mode": "rst" }));
        assert_eq!(bench.pop(1_000_000), "");
        bench.push(0, "a");
        bench.push(0, "b");
        assert_eq!(bench.pop(0), "+close-rst");
        assert_eq!((bench.room(0), bench.hits()), (0, 1));
    }

    #[test]
    fn a_client_of_datagrams_is_forgotten() {
        let mut bench = Bench::datagrams("close_on_data", &json!({}));
        bench.push(0, "a");
        assert_eq!(bench.pop(0), "!fin");
    }
}
