//! `lifetime`: a timer ends the connection, idle or not.

use super::prelude::*;
use crate::rule::LifetimeFrom;

attributes! {
    /// Closes the connection on a timer, idle or not.
    Lifetime {
        /// Milliseconds.
        #[serde(alias = "lifetime", alias = "timeout")]
        time: i64,
        /// Milliseconds to either side.
        #[serde(skip_serializing_if = "is_default")]
        jitter: i64,
        /// What starts the timer.
        #[serde(skip_serializing_if = "is_default")]
        from: LifetimeFrom,
        /// `fin` or `rst`.
        #[serde(skip_serializing_if = "is_default", alias = "how")]
        mode: CloseMode,
    }
}

impl StreamFault for Lifetime {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`time` ms, `jitter` ms, `from` `connect`/`first-data`, `mode`",
            tcp: Some(
                "a timer, which fires on an idle connection too; `first-data` is the first byte in the toxic's direction",
            ),
            udp: Some("the client is forgotten"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Lifetime(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            time: whole_milliseconds(rule.time_ns)?,
            jitter: whole_milliseconds(rule.jitter_ns)?,
            from: rule.from,
            mode: CloseMode::Fin,
        }))
    }

    fn canonical(&self, name: &str) -> Option<&'static str> {
        match name {
            "how" => Some("mode"),
            "lifetime" | "timeout" => Some("time"),
            _ => None,
        }
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        let stage = LifetimeStage {
            attributes: self.clone(),
            unit: Draws::new(place.key).unit(),
            opened: place.opened,
            first_data: None,
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
        };
        if self.jitter > 0 {
            place.notes.note_time(0, stage.time());
        }
        Some(Box::new(stage))
    }
}

/// Lets everything through until its time is over, then closes.
struct LifetimeStage {
    attributes: Lifetime,
    /// The draw that places the end within the jitter, 0 to 1.
    unit: f64,
    opened: Instant,
    first_data: Option<Instant>,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
}

impl LifetimeStage {
    /// From what starts the timer to its end.
    fn time(&self) -> Duration {
        let jitter = milliseconds(self.attributes.jitter);
        let time = milliseconds(self.attributes.time) + jitter.mul_f64(self.unit * 2.0);
        time.saturating_sub(jitter)
    }

    fn deadline(&self) -> Option<Instant> {
        let start = match self.attributes.from {
            LifetimeFrom::Connect => Some(self.opened),
            LifetimeFrom::FirstData => self.first_data,
        };
        start.map(|start| start + self.time())
    }
}

impl Queued for LifetimeStage {
    held!();

    fn accept(&mut self, chunk: Chunk) {
        self.first_data.get_or_insert(chunk.at);
        self.queue.push(chunk);
    }

    fn next(&mut self, now: Instant) -> Pop {
        match self.timer(now) {
            Pop::Wait(deadline) => match self.queue.pass() {
                Pop::Wait(_) => Pop::Wait(deadline),
                passed => passed,
            },
            expired => expired,
        }
    }

    fn timer(&mut self, now: Instant) -> Pop {
        match self.deadline() {
            Some(deadline) if deadline <= now => {
                self.shared.counters.hit();
                Pop::Now(self.attributes.mode)
            }
            deadline => Pop::Wait(deadline),
        }
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Lifetime>() {
            self.attributes = attributes.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn an_idle_connection_ends_too() {
        let mut bench = Bench::new("lifetime", &json!({ "time": 100, "mode": "rst" }));
        bench.push(0, "a");
        assert_eq!(bench.pop(0), "a @100");
        assert_eq!(bench.pop(100), "!rst");
        assert_eq!(bench.hits(), 1);
    }

    #[test]
    fn the_timer_may_start_with_the_first_data() {
        let mut bench = Bench::new("lifetime", &json!({ "time": 100, "from": "first-data" }));
        assert_eq!(bench.pop(1000), "");
        bench.push(1000, "a");
        assert_eq!(bench.pop(1000), "a @1100");
        assert_eq!(bench.pop(1100), "!fin");
    }

    #[test]
    fn a_jitter_stays_within_its_bounds() {
        let mut bench = Bench::new("lifetime", &json!({ "time": 100, "jitter": 50 }));
        let due = bench.pop(0);
        let due: u64 = due[1..].parse().expect("a time");
        assert!((50..=150).contains(&due), "{due}");
    }
}
