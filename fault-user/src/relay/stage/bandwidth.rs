//! `bandwidth`: bytes are sent at a rate.

use std::sync::PoisonError;

use super::prelude::*;
use crate::relay::attributes::BitRate;

attributes! {
    /// Paces the stream.
    Bandwidth {
        /// Kilobytes (1000 bytes) per second, also fractions; 0 lets nothing through.
        rate: BitRate,
        /// All connections share the rate instead of having it each.
        #[serde(skip_serializing_if = "is_default")]
        shared: bool,
    }
}

impl StreamFault for Bandwidth {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`rate` KB/s (1000 bytes; fractions too, `0.5`), `shared`",
            tcp: Some(
                "per connection, or with `shared: true` for all together; 0 lets nothing through and reads nothing. Late timers are compensated; an idle link accumulates no credit",
            ),
            udp: Some("whole datagrams; above 256 KiB waiting they are dropped"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Bandwidth(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            rate: BitRate::of_bits(rule.bits_per_second),
            shared: rule.shared,
        }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(BandwidthStage {
            rate: self.rate.bytes_per_second(),
            is_shared: self.shared,
            is_datagram: place.is_datagram,
            queue: ChunkQueue::default(),
            free_at: place.now,
            was_idle: true,
            booked: None,
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// The most that a `bandwidth` catches up with when its timer came late: so much of the rate leaves at
/// once. Only a link that had bytes waiting all the time has something to catch up with.
const CATCH_UP: Duration = Duration::from_secs(1);

/// What a `bandwidth` keeps of datagrams that come faster, in bytes; what comes beyond it is dropped.
const QUEUED_DATAGRAMS: usize = 256 * 1024;

/// The longest time that a link takes for anything: ten years.
const LONGEST_S: f64 = 10.0 * 365.0 * 24.0 * 3600.0;

/// Sends bytes at a rate: a quantum of them leaves when a link of that rate would have carried it.
struct BandwidthStage {
    /// Bytes per second.
    rate: f64,
    is_shared: bool,
    is_datagram: bool,
    queue: ChunkQueue,
    free_at: Instant,
    /// The link waited for bytes when there were none: it has nothing to catch up with.
    was_idle: bool,
    /// The next quantum and when it has been carried.
    booked: Option<(usize, Instant)>,
    shared: Arc<ToxicShared>,
}

impl BandwidthStage {
    /// Bytes that leave at once: what the rate carries in 10 ms.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "it is clamped to 1 to ROOM before"
    )]
    fn quantum(&self) -> usize {
        if self.is_datagram {
            return usize::MAX;
        }
        (self.rate / 100.0).clamp(1.0, ROOM as f64) as usize
    }

    fn book(&mut self, now: Instant) -> Option<(usize, Instant)> {
        let front = self.queue.front()?;
        let size = front.data.len().min(self.quantum());
        let earliest = if std::mem::take(&mut self.was_idle) {
            front.at
        } else {
            now.checked_sub(CATCH_UP).unwrap_or(now)
        };
        let carries = carry_time(size, self.rate);
        let finish = if self.is_shared {
            let mut free_at = self
                .shared
                .link_free_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(earliest) + carries;
            *free_at
        } else {
            self.free_at = self.free_at.max(earliest) + carries;
            self.free_at
        };
        self.booked = Some((size, finish));
        self.booked
    }
}

/// How long a link takes for so many bytes.
#[expect(
    clippy::cast_precision_loss,
    reason = "a quantum has far fewer than 2^52 bytes"
)]
fn carry_time(size: usize, rate: f64) -> Duration {
    Duration::from_secs_f64((size as f64 / rate).min(LONGEST_S))
}

impl Queued for BandwidthStage {
    held!();

    fn takes(&self) -> usize {
        // At a rate of 0 nothing is read, so that the sender feels it.
        match (self.rate > 0.0, self.is_datagram) {
            (false, _) => 0,
            (_, true) => QUEUED_DATAGRAMS,
            (_, false) => ROOM.min(self.quantum().max(1024) * 4),
        }
    }

    fn source_is_idle(&mut self) {
        self.was_idle |= self.queue.is_empty();
    }

    fn next(&mut self, now: Instant) -> Pop {
        if let Some((end, at)) = self.queue.pop_end() {
            return Pop::End(end, at.max(self.free_at));
        }
        if self.rate <= 0.0 {
            return Pop::Wait(None);
        }
        let Some((size, finish)) = self.booked.or_else(|| self.book(now)) else {
            return Pop::Wait(None);
        };
        if finish > now {
            return Pop::Wait(Some(finish));
        }
        self.booked = None;
        self.shared.counters.hit();
        self.queue.cut(size).map_or(Pop::Wait(None), |chunk| {
            Pop::Chunk(Chunk {
                at: finish,
                ..chunk
            })
        })
    }

    fn change(&mut self, fault: &dyn StreamFault, now: Instant) {
        if let Some(attributes) = fault.of::<Bandwidth>() {
            self.rate = attributes.rate.bytes_per_second();
            self.is_shared = attributes.shared;
            // What a slow rate had booked for the far future must not hold a faster one up, and what
            // it has left to catch up with is not the new rate's.
            self.booked = None;
            self.was_idle = false;
            self.free_at = now;
            *self
                .shared
                .link_free_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn bytes_leave_when_a_link_of_the_rate_has_carried_them() {
        let mut bench = Bench::new("bandwidth", &json!({ "rate": 1 }));
        bench.push(0, &"x".repeat(20));
        assert_eq!(bench.pop(0), "@10", "ten bytes take 10 ms at 1 KB/s");
        assert_eq!(bench.pop(10), "xxxxxxxxxx @20");
        assert_eq!(bench.pop(20), "xxxxxxxxxx");
        assert_eq!(bench.hits(), 2);
    }

    #[test]
    fn a_rate_of_0_reads_nothing() {
        let mut bench = Bench::new("bandwidth", &json!({ "rate": 0 }));
        assert_eq!(bench.room(0), 0);
        bench.push(0, "a");
        assert_eq!(bench.pop(1_000_000), "");
        assert_eq!(bench.take(), ("a".to_owned(), false));
    }

    #[test]
    fn a_datagram_is_carried_whole() {
        let mut bench = Bench::datagrams("bandwidth", &json!({ "rate": 1 }));
        bench.push(0, &"x".repeat(20));
        assert_eq!(bench.pop(19), "@20");
        assert_eq!(bench.pop(20), "x".repeat(20));
    }
}
