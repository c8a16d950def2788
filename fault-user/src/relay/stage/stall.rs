//! `stall`: nothing is read, nothing is lost.

use super::prelude::*;

attributes! {
    /// Nothing is read, nothing is lost.
    Stall {}
}

impl StreamFault for Stall {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "-",
            tcp: Some("nothing is read, the sender's window closes; it resumes without loss"),
            udp: Some("kept up to 4 MiB per direction, then dropped"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        Ok(matches!(rule, rule::Fault::Stall(_)).then_some(Self {}))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        // What it does is to read nothing, from now on: there is no later moment to count.
        place.shared.counters.hit();
        Some(Box::new(StallStage {
            is_datagram: place.is_datagram,
            queue: ChunkQueue::default(),
        }))
    }
}

/// What a stalled stream of datagrams keeps, in bytes; what comes beyond it is dropped.
const STALLED_DATAGRAMS: usize = 4 << 20;

/// Reads nothing and keeps what was on its way.
struct StallStage {
    is_datagram: bool,
    queue: ChunkQueue,
}

impl Queued for StallStage {
    held!();

    fn takes(&self) -> usize {
        // A stream waits in its sender, datagrams have nowhere else to wait.
        if self.is_datagram {
            STALLED_DATAGRAMS
        } else {
            0
        }
    }

    fn next(&mut self, _now: Instant) -> Pop {
        Pop::Wait(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn nothing_is_read_and_nothing_is_lost() {
        let mut bench = Bench::new("stall", &json!({}));
        assert_eq!(bench.room(0), 0);
        bench.push(0, "what was on its way");
        assert_eq!(bench.pop(1_000_000), "");
        assert_eq!(bench.take(), ("what was on its way".to_owned(), false));
        assert!(Bench::datagrams("stall", &json!({})).room(0) > 1 << 20);
    }
}
