//! `corrupt_data`: bytes are changed on their way, never how many there are.

use bytes::Bytes;

use super::prelude::*;
use crate::relay::random::unit;
use crate::rule::{CorruptAt, CorruptDataMode};

attributes! {
    /// Changes bytes on their way; never how many there are.
    CorruptData {
        /// What becomes of a byte: one of its bits is inverted, it becomes 0, or another value at random.
        mode: CorruptDataMode,
        /// The share of bytes that are hit; without it and without `offset` every byte is.
        #[serde(skip_serializing_if = "Option::is_none")]
        probability: Option<Probability>,
        /// Hits the byte at this offset (from 0) of the stream or datagram, and no other.
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    }
}

impl StreamFault for CorruptData {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`mode` `flip`/`zero`/`random`; `probability` per byte, or `offset`",
            tcp: Some(
                "`flip` inverts one bit of a byte, `random` always gives another value. Neither given: every byte. `offset` counts from the beginning of the stream (from where the toxic came on)",
            ),
            udp: Some("`offset` counts in each datagram"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::CorruptData(rule) = rule else {
            return Ok(None);
        };
        let (probability, offset) = match rule.at {
            CorruptAt::Probability(ppm) => (Some(Probability::of_ppm(ppm)), None),
            CorruptAt::Offset(offset) => (None, Some(offset)),
        };
        Ok(Some(Self {
            mode: rule.mode,
            probability,
            offset,
        }))
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(CorruptStage {
            attributes: self.clone(),
            draws: Draws::new(place.key),
            passed: 0,
            is_datagram: place.is_datagram,
            queue: ChunkQueue::default(),
            shared: Arc::clone(&place.shared),
            notes: place.notes.clone(),
        }))
    }
}

/// Changes bytes. Whether a byte is hit depends on its offset in the stream, not on how it was cut into chunks.
struct CorruptStage {
    attributes: CorruptData,
    draws: Draws,
    /// Bytes that came before.
    passed: u64,
    is_datagram: bool,
    queue: ChunkQueue,
    shared: Arc<ToxicShared>,
    notes: Notes,
}

impl CorruptStage {
    /// The changed bytes and the index of the first that changed, if any changed; `first` is the ordinal of the first byte's
    /// draw, `offset` its offset.
    fn corrupt(&self, data: &[u8], first: u64, offset: u64) -> Option<(usize, Bytes)> {
        let mut changed: Option<(usize, Vec<u8>)> = None;
        let probability = self.attributes.probability.map_or(1.0, |share| share.0);
        let range = match self.attributes.offset {
            None => 0..data.len(),
            Some(wanted) => {
                let index = wanted.checked_sub(offset)?;
                let index = usize::try_from(index).ok();
                let index = index.filter(|index| *index < data.len())?;
                index..index + 1
            }
        };
        for index in range {
            let draw = self.draws.at((first + index as u64) * 2);
            if unit(draw) < probability {
                let kind = self.draws.at((first + index as u64) * 2 + 1);
                let (_, bytes) = changed.get_or_insert_with(|| (index, data.to_vec()));
                bytes[index] = corrupted(data[index], self.attributes.mode, kind);
            }
        }
        changed.map(|(index, bytes)| (index, Bytes::from(bytes)))
    }
}

fn corrupted(byte: u8, mode: CorruptDataMode, draw: u64) -> u8 {
    match mode {
        CorruptDataMode::Flip => byte ^ (1 << (draw & 7)),
        CorruptDataMode::Zero => 0,
        // Never the same value: a byte that is hit is changed.
        CorruptDataMode::Random => byte ^ u8::try_from(draw % 255 + 1).unwrap_or(1),
    }
}

impl Queued for CorruptStage {
    held!();

    fn next(&mut self, _now: Instant) -> Pop {
        let chunk = match self.queue.pass() {
            Pop::Chunk(chunk) => chunk,
            other => return other,
        };
        // An offset counts from the beginning of the stream or of each datagram.
        let offset = if self.is_datagram { 0 } else { self.passed };
        let changed = self.corrupt(&chunk.data, self.passed, offset);
        let at = self.passed;
        self.passed += chunk.data.len() as u64;
        let Some((index, data)) = changed else {
            return Pop::Chunk(chunk);
        };
        self.shared.counters.hit();
        self.notes.note(at + index as u64, None);
        Pop::Chunk(Chunk { data, ..chunk })
    }

    fn change(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<CorruptData>() {
            self.attributes = attributes.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::relay::stage::testing::Bench;

    #[test]
    fn each_byte_is_changed_and_none_is_lost() {
        for mode in ["flip", "zero", "random"] {
            let mut bench = Bench::new("corrupt_data", &json!({ "mode": mode }));
            bench.push(0, "abcdefgh");
            let changed = bench.stage.pop(bench.start);
            let crate::relay::stage::Pop::Chunk(chunk) = changed else {
                panic!("{mode}: {changed:?}");
            };
            assert_eq!(chunk.data.len(), 8);
            for (was, is) in b"abcdefgh".iter().zip(&chunk.data) {
                assert_ne!(was, is, "{mode}");
                assert!(mode != "flip" || (was ^ is).is_power_of_two());
                assert!(mode != "zero" || *is == 0);
            }
        }
    }

    #[test]
    fn an_offset_counts_in_the_stream_or_in_the_datagram() {
        let attributes = json!({ "mode": "zero", "offset": 4 });
        let mut bench = Bench::new("corrupt_data", &attributes);
        bench.push(0, "abc");
        bench.push(0, "defgh");
        assert_eq!(bench.pop(0), "abc d\0fgh");
        let mut bench = Bench::datagrams("corrupt_data", &attributes);
        bench.push(0, "abc");
        bench.push(0, "defgh");
        assert_eq!(bench.pop(0), "abc defg\0");
    }

    #[test]
    fn what_is_hit_does_not_depend_on_how_the_stream_is_cut() {
        let attributes = json!({ "mode": "zero", "probability": 0.3 });
        let text = "x".repeat(300);
        let mut whole = Bench::new("corrupt_data", &attributes);
        whole.push(0, &text);
        let mut cut = Bench::new("corrupt_data", &attributes);
        for _ in 0..100 {
            cut.push(0, "xxx");
        }
        let (whole, cut) = (whole.pop(0), cut.pop(0).replace(' ', ""));
        assert_eq!(whole, cut);
        let hit = whole.matches('\0').count();
        assert!((60..=120).contains(&hit), "{hit} of 300 at 30%");
    }
}
