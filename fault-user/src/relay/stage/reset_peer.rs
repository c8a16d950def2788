//! `reset_peer`: a reset at both ends.

use super::prelude::*;

attributes! {
    /// Resets the connection at both ends; until then the data waits.
    ResetPeer {
        /// Milliseconds until the reset.
        timeout: i64,
    }
}

impl StreamFault for ResetPeer {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`timeout` ms",
            tcp: Some(
                "a reset at both ends, on idle connections and on those that were open before, too; until then data waits. On a new connection it waits for the first data in its direction (250 ms at most), so that connect succeeds and, downstream, the request arrives",
            ),
            udp: None,
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::ResetPeer(rule) = rule else {
            return Ok(None);
        };
        let timeout = whole_milliseconds(rule.timeout_ns)?;
        Ok(Some(Self { timeout }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(ResetPeerStage {
            timeout: milliseconds(self.timeout),
            since: place.now,
            is_new: place.is_new,
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// How long a `reset_peer` whose time is over waits for data on a new connection. A reset at once
/// would meet a connect(2) that has not returned yet, and the request would not reach the server.
const FIRST_DATA: Duration = Duration::from_millis(250);

/// Holds data until its time is over, then resets.
struct ResetPeerStage {
    timeout: Duration,
    since: Instant,
    /// The connection was opened while the toxic was there.
    is_new: bool,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl ResetPeerStage {
    /// When it resets: on a new connection not before the first data has come, as in Toxiproxy, or is
    /// overdue.
    fn due(&self) -> Instant {
        let due = self.since + self.timeout;
        match self.queue.front() {
            _ if !self.is_new => due,
            Some(first) => due.max(first.at),
            None => due.max(self.since + FIRST_DATA),
        }
    }
}

impl Queued for ResetPeerStage {
    held!();

    fn next(&mut self, now: Instant) -> Pop {
        self.timer(now)
    }

    fn timer(&mut self, now: Instant) -> Pop {
        let due = self.due();
        if due > now {
            return Pop::Wait(Some(due));
        }
        self.shared.counters.hit();
        Pop::Now(CloseMode::Rst)
    }

    fn change(&mut self, fault: &dyn StreamFault, now: Instant) {
        if let Some(attributes) = fault.of::<ResetPeer>() {
            self.timeout = milliseconds(attributes.timeout);
            self.since = now;
            self.is_new = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn data_waits_for_the_reset() {
        let mut bench = Bench::new("reset_peer", &json!({ "timeout": 100 }));
        bench.push(10, "a");
        assert_eq!(bench.pop(99), "@100");
        assert_eq!(bench.pop(100), "!rst");
        assert_eq!(bench.take(), ("a".to_owned(), false));
    }

    #[test]
    fn a_reset_at_once_waits_for_the_first_data_of_a_new_connection() {
        let mut bench = Bench::new("reset_peer", &json!({}));
        assert_eq!(bench.pop(0), "@250");
        bench.push(20, "a");
        assert_eq!(bench.pop(20), "!rst");
        let mut bench = Bench::new("reset_peer", &json!({}));
        assert_eq!(bench.pop(250), "!rst", "but not for ever");
        let mut bench = Bench::new("reset_peer", &json!({ "timeout": 1000 }));
        bench.update(5, &json!({ "timeout": 0 }));
        assert_eq!(bench.pop(5), "!rst", "nor on one that is known to be open");
    }
}
