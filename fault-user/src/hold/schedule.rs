//! Computes the release times of held packets: delays, rates, slots and order. Uses neither a clock nor packets, only
//! times.

use std::collections::{HashMap, VecDeque};

use fault_common::abi::{Hold, hold_flag};
use fault_common::random::mix;

use crate::plan::shapers::{RateShaper, Shapers, Slots};

/// Nanoseconds per second.
const SECOND_NS: u128 = 1_000_000_000;
/// Above this number of ordered connections, idle ones are removed.
const ORDERED: usize = 65_536;

/// The state of a rate: a virtual clock with the time when the wire is free again. Source: Zhang, "Virtual clock: a new
/// traffic control algorithm for packet switching networks", SIGCOMM 1990.
struct Wire {
    rate: RateShaper,
    free_ns: u64,
    /// For each waiting packet the time when it will have been sent, and its number of wire packets.
    waiting: VecDeque<(u64, u16)>,
    waiting_packets: u64,
}

impl Wire {
    fn new(rate: RateShaper) -> Self {
        Self {
            rate,
            free_ns: 0,
            waiting: VecDeque::new(),
            waiting_packets: 0,
        }
    }

    /// The time when a packet that arrives at `now_ns` has been sent; `None` if the queue is full.
    fn send(&mut self, now_ns: u64, bytes: u32, segments: u16) -> Option<u64> {
        while let Some(&(sent_ns, packets)) = self.waiting.front()
            && sent_ns <= now_ns
        {
            self.waiting.pop_front();
            self.waiting_packets -= u64::from(packets);
        }
        if self.waiting_packets >= u64::from(self.rate.limit_packets) {
            return None;
        }
        let burst_ns = self.time_ns(self.rate.burst_bytes);
        let size_ns = self.time_ns(self.wire_bytes(bytes, segments));
        self.free_ns = self.free_ns.max(now_ns.saturating_sub(burst_ns)) + size_ns;
        if self.free_ns > now_ns {
            self.waiting.push_back((self.free_ns, segments.max(1)));
            self.waiting_packets += u64::from(segments.max(1));
        }
        Some(self.free_ns.max(now_ns))
    }

    fn time_ns(&self, bytes: u64) -> u64 {
        let time = u128::from(bytes) * 8 * SECOND_NS / u128::from(self.rate.bits_per_second.max(1));
        u64::try_from(time).unwrap_or(u64::MAX)
    }

    /// Bytes on the link, including its overhead; cells as in tc-netem(8).
    fn wire_bytes(&self, bytes: u32, segments: u16) -> u64 {
        let segments = i64::from(segments.max(1));
        let rate = &self.rate;
        let total = i64::from(bytes) + segments * i64::from(rate.overhead_bytes);
        let total = if rate.cell_bytes == 0 {
            total
        } else {
            let cell = i64::from(rate.cell_bytes);
            let each = (total / segments).max(0);
            let cells = (each + cell - 1) / cell;
            segments * cells * (cell + i64::from(rate.cell_overhead_bytes))
        };
        u64::try_from(total).unwrap_or(0)
    }
}

/// The state of slots: packets that arrive during a slot are released at its end.
struct Medium {
    slots: Slots,
    drawn: u64,
    end_ns: u64,
    packets: u64,
    bytes: u64,
}

impl Medium {
    fn new(slots: Slots, to_client: bool) -> Self {
        Self {
            slots,
            // Each direction draws its own lengths.
            drawn: u64::from(to_client) << 63,
            end_ns: 0,
            packets: 0,
            bytes: 0,
        }
    }

    fn send(&mut self, now_ns: u64, bytes: u32, segments: u16) -> u64 {
        if now_ns > self.end_ns {
            self.next(now_ns);
        }
        let (packets, bytes) = (u64::from(segments.max(1)), u64::from(bytes));
        let full =
            self.packets + packets > self.slots.packets || self.bytes + bytes > self.slots.bytes;
        // A packet that is larger than any slot gets a slot of its own.
        if full && self.packets != 0 {
            self.next(self.end_ns);
        }
        self.packets += packets;
        self.bytes += bytes;
        self.end_ns
    }

    fn next(&mut self, from_ns: u64) {
        self.drawn += 1;
        let draw = mix(self.slots.key ^ self.drawn) >> 32;
        let range = self.slots.max_ns - self.slots.min_ns;
        let spread = (u128::from(draw) * (u128::from(range) + 1)) >> 32;
        self.end_ns = from_ns + self.slots.min_ns + u64::try_from(spread).unwrap_or(range);
        (self.packets, self.bytes) = (0, 0);
    }
}

/// The state of all rules that hold packets.
pub struct HoldSchedule {
    wires: HashMap<(u16, bool), Wire>,
    media: HashMap<(u16, bool), Medium>,
    /// The release time of the last packet in each connection and direction.
    ordered: HashMap<u64, u64>,
    /// At this number idle entries are removed.
    ordered_next: usize,
}

impl HoldSchedule {
    /// Creates a schedule with free wires.
    #[must_use]
    pub fn new(shapers: &Shapers) -> Self {
        let mut schedule = Self {
            wires: HashMap::new(),
            media: HashMap::new(),
            ordered: HashMap::new(),
            ordered_next: ORDERED,
        };
        schedule.reshape(shapers);
        schedule
    }

    /// Uses these rates and slots. Unchanged ones keep their state; the others start with a free wire.
    pub fn reshape(&mut self, shapers: &Shapers) {
        let mut before = std::mem::take(&mut self.wires);
        self.wires = both_ways(&shapers.rates, |way, rate| {
            let same = before.remove(&way).filter(|wire| wire.rate == rate);
            same.unwrap_or_else(|| Wire::new(rate))
        });
        let mut before = std::mem::take(&mut self.media);
        self.media = both_ways(&shapers.slots, |way, slots| {
            let same = before.remove(&way).filter(|medium| medium.slots == slots);
            same.unwrap_or_else(|| Medium::new(slots, way.1))
        });
    }

    /// The release time of a packet; `None` if the queue of its rate is full.
    pub fn release_ns(&mut self, hold: &Hold) -> Option<u64> {
        let mut release_ns = hold.now_ns;
        let to_client = hold.flags & hold_flag::TO_CLIENT != 0;
        if let Some(wire) = named(hold.rate, to_client, &mut self.wires) {
            release_ns = wire.send(release_ns, hold.bytes, hold.segments)?;
        }
        release_ns += hold.delay_ns;
        if let Some(medium) = named(hold.slot, to_client, &mut self.media) {
            release_ns = medium.send(release_ns, hold.bytes, hold.segments);
        }
        if hold.flow != 0 {
            if self.ordered.len() >= self.ordered_next {
                let now_ns = hold.now_ns;
                self.ordered.retain(|_, last_ns| *last_ns > now_ns);
                // Otherwise every packet would scan all entries.
                self.ordered_next = ORDERED.max(2 * self.ordered.len());
            }
            let last_ns = self.ordered.entry(hold.flow).or_insert(0);
            release_ns = release_ns.max(*last_ns);
            *last_ns = release_ns;
        }
        Some(release_ns)
    }
}

/// One for each rule state and direction.
fn both_ways<T: Copy, W>(
    all: &HashMap<u16, T>,
    mut make: impl FnMut((u16, bool), T) -> W,
) -> HashMap<(u16, bool), W> {
    let one = |(&state, &given): (&u16, &T)| {
        [(state, false), (state, true)].map(|way| (way, make(way, given)))
    };
    all.iter().flat_map(one).collect()
}

/// Looks up the entry of a rule state, counted from 1, and a direction.
fn named<T>(state: u16, to_client: bool, all: &mut HashMap<(u16, bool), T>) -> Option<&mut T> {
    all.get_mut(&(state.checked_sub(1)?, to_client))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn hold(now_ns: u64, bytes: u32) -> Hold {
        Hold {
            now_ns,
            bytes,
            segments: 1,
            ..Hold::default()
        }
    }

    fn rate(bits_per_second: u64, burst_bytes: u64, limit_packets: u32) -> HoldSchedule {
        let rate = RateShaper {
            bits_per_second,
            burst_bytes,
            overhead_bytes: 0,
            cell_bytes: 0,
            cell_overhead_bytes: 0,
            limit_packets,
        };
        HoldSchedule::new(&Shapers {
            rates: HashMap::from([(0, rate)]),
            ..Shapers::default()
        })
    }

    #[test]
    fn a_rate_sends_one_packet_after_the_other() {
        // 1,000 bytes at 8 Mbit/s are 1 ms.
        let mut schedule = rate(8_000_000, 0, 3);
        let mut send = |now_ns| {
            schedule.release_ns(&Hold {
                rate: 1,
                ..hold(now_ns, 1000)
            })
        };
        assert_eq!(send(10 * MS), Some(11 * MS));
        assert_eq!(send(10 * MS), Some(12 * MS));
        assert_eq!(send(10 * MS), Some(13 * MS));
        assert_eq!(send(10 * MS), None, "three wait");
        assert_eq!(send(12 * MS), Some(14 * MS));
        assert_eq!(send(50 * MS), Some(51 * MS));
    }

    #[test]
    fn what_stays_goes_on_and_what_is_new_starts_afresh() {
        let rates = |of: &[(u16, u64)]| Shapers {
            rates: of
                .iter()
                .map(|&(state, bits_per_second)| {
                    let wire = rate(bits_per_second, 0, 100).wires.remove(&(0, false));
                    (state, wire.unwrap().rate)
                })
                .collect(),
            ..Shapers::default()
        };
        let mut schedule = HoldSchedule::new(&rates(&[(0, 8_000_000), (1, 8_000_000)]));
        let send = |schedule: &mut HoldSchedule, state: u16| {
            let hold = Hold {
                rate: state + 1,
                ..hold(0, 1000)
            };
            schedule.release_ns(&hold).unwrap() / MS
        };
        for state in [0, 1] {
            assert_eq!(send(&mut schedule, state), 1);
        }
        schedule.reshape(&rates(&[(0, 8_000_000), (1, 4_000_000), (2, 1_000_000)]));
        assert_eq!(send(&mut schedule, 0), 2, "behind the one before");
        assert_eq!(send(&mut schedule, 1), 2, "another rate, nothing waits");
        assert_eq!(send(&mut schedule, 2), 8, "a new rule");
        schedule.reshape(&rates(&[(2, 1_000_000)]));
        assert_eq!(send(&mut schedule, 0), 0, "nobody's any more");
        assert_eq!(send(&mut schedule, 2), 16);
    }

    #[test]
    fn a_burst_goes_at_once_and_no_more() {
        let mut schedule = rate(8_000_000, 2000, 100);
        let mut send = |now_ns| {
            schedule.release_ns(&Hold {
                rate: 1,
                ..hold(now_ns, 1000)
            })
        };
        let times: Vec<_> = (0..4).map(|_| send(100 * MS).unwrap() / MS).collect();
        assert_eq!(times, [100, 100, 101, 102]);
    }

    #[test]
    fn cells_round_packets_up() {
        let mut wire = Wire::new(RateShaper {
            bits_per_second: 1,
            burst_bytes: 0,
            overhead_bytes: 4,
            cell_bytes: 48,
            cell_overhead_bytes: 5,
            limit_packets: 1,
        });
        assert_eq!(wire.wire_bytes(44, 1), 53);
        assert_eq!(wire.wire_bytes(45, 1), 106);
        wire.rate.cell_bytes = 0;
        wire.rate.overhead_bytes = -14;
        assert_eq!(wire.wire_bytes(100, 2), 72);
    }

    #[test]
    fn slots_deliver_at_their_ends_and_so_many_at_most() {
        let slots = Slots {
            key: 1,
            min_ns: 10 * MS,
            max_ns: 10 * MS,
            packets: 2,
            bytes: u64::MAX,
        };
        let mut schedule = HoldSchedule::new(&Shapers {
            slots: HashMap::from([(4, slots)]),
            ..Shapers::default()
        });
        let mut send = |now_ns| {
            let hold = Hold {
                slot: 5,
                ..hold(now_ns, 100)
            };
            schedule.release_ns(&hold).unwrap() / MS
        };
        let times = [100, 101, 102, 103, 104].map(|ms| send(ms * MS));
        assert_eq!(times, [110, 110, 120, 120, 130]);
        assert_eq!(send(200 * MS), 210);
    }

    #[test]
    fn a_kept_order_is_never_overtaken() {
        let mut schedule = HoldSchedule::new(&Shapers::default());
        let mut send = |now_ns, delay_ns, flow| {
            let hold = Hold {
                delay_ns,
                flow,
                ..hold(now_ns, 100)
            };
            schedule.release_ns(&hold).unwrap()
        };
        assert_eq!(send(0, 50, 7), 50);
        assert_eq!(send(10, 10, 7), 50);
        assert_eq!(send(10, 10, 9), 20);
        assert_eq!(send(10, 10, 0), 20);
    }

    #[test]
    fn any_number_of_connections_is_kept_in_order() {
        let mut schedule = HoldSchedule::new(&Shapers::default());
        let connections = 4 * ORDERED as u64;
        for (now_ns, delay_ns) in [(0, 100 * MS), (MS, MS)] {
            for flow in 1..=connections {
                let hold = Hold {
                    flow,
                    delay_ns,
                    ..hold(now_ns, 100)
                };
                assert_eq!(schedule.release_ns(&hold), Some(100 * MS), "{flow}");
            }
        }
    }
}
