//! The recorded connections of the targets, and the queries of expectations.
//!
//! Times are in nanoseconds since the rules were applied.

use std::collections::HashMap;

use fault_common::abi::{Witness, witness};

/// All records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The length of the recording.
    pub length_ns: u64,
    /// The records of each target, in the given order.
    pub targets: Vec<Seen>,
}

/// The records of one target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Connects, in the order of their start.
    pub connects: Vec<Connect>,
    /// Times at which the application sent data; at most one per millisecond and connection.
    pub sent_ns: Vec<u64>,
    /// Times at which it received data; likewise.
    pub received_ns: Vec<u64>,
}

/// A connect(2) over TCP (or an incoming connection if the command is the server).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// The start of the connect.
    pub at_ns: u64,
    /// The end of the handshake.
    pub established_ns: Option<u64>,
    /// The time at which it was closed by the application, refused or reset.
    pub closed_ns: Option<u64>,
    /// Whether it was reset while it was open.
    pub is_reset: bool,
    /// Whether it came in: the command is the server.
    pub is_incoming: bool,
    /// The time at which the application first sent data.
    pub sent_ns: Option<u64>,
    /// The time at which it first received data.
    pub received_ns: Option<u64>,
}

impl Connect {
    /// The time until connect(2) completed, successfully or not.
    #[must_use]
    pub fn answered_ns(&self) -> Option<u64> {
        let answer = self.established_ns.or(self.closed_ns)?;
        Some(answer - self.at_ns)
    }

    /// The time to first byte: from the client's first data until the server's first data. It counts from the end of
    /// the handshake where the server speaks first. `None` if the server sent nothing.
    #[must_use]
    pub fn first_byte_ns(&self) -> Option<u64> {
        let (request, answer) = if self.is_incoming {
            (self.received_ns, self.sent_ns)
        } else {
            (self.sent_ns, self.received_ns)
        };
        let answer = answer?;
        let start = request.filter(|at| *at <= answer).or(self.established_ns)?;
        Some(answer.saturating_sub(start))
    }
}

impl History {
    /// Sorts the programs' events. Times in `witnesses`, `epoch_ns` (when the rules were applied) and `end_ns` are of
    /// `CLOCK_MONOTONIC`.
    #[must_use]
    pub fn new(names: &[String], mut witnesses: Vec<Witness>, epoch_ns: u64, end_ns: u64) -> Self {
        // The buffer is ordered by reservation, not by time.
        witnesses.sort_by_key(|seen| seen.time_ns);
        let mut targets: Vec<Collector> = names.iter().map(|name| Collector::new(name)).collect();
        for seen in &witnesses {
            for (number, target) in targets.iter_mut().enumerate() {
                if seen.targets & (1 << number) != 0 {
                    target.take(seen, seen.time_ns.saturating_sub(epoch_ns));
                }
            }
        }
        Self {
            length_ns: end_ns.saturating_sub(epoch_ns),
            targets: targets.into_iter().map(Collector::finish).collect(),
        }
    }

    /// The records of a target.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<&Seen> {
        self.targets.iter().find(|seen| seen.name == name)
    }
}

/// Collects the records of one target.
struct Collector {
    seen: Seen,
    /// Incoming connections. If both ends of a connection are watched, the client's end counts.
    accepted: Vec<Connect>,
    /// The latest connect of each socket: whether it is incoming, and its index.
    latest: HashMap<u64, (bool, usize)>,
}

impl Collector {
    fn new(name: &str) -> Self {
        Self {
            seen: Seen {
                name: name.to_owned(),
                ..Seen::default()
            },
            accepted: Vec::new(),
            latest: HashMap::new(),
        }
    }

    fn take(&mut self, seen: &Witness, at_ns: u64) {
        match seen.kind {
            witness::CONNECT | witness::ACCEPTED => self.begin(seen, at_ns),
            witness::ESTABLISHED => {
                if let Some(connect) = self.connect(seen.cookie) {
                    connect.established_ns = Some(at_ns);
                }
            }
            witness::CLOSED | witness::RESET => {
                if let Some(connect) = self.connect(seen.cookie) {
                    connect.closed_ns.get_or_insert(at_ns);
                    connect.is_reset |= seen.kind == witness::RESET;
                }
            }
            witness::SENT => {
                self.seen.sent_ns.push(at_ns);
                if let Some(connect) = self.connect(seen.cookie) {
                    connect.sent_ns.get_or_insert(at_ns);
                }
            }
            witness::RECEIVED => {
                self.seen.received_ns.push(at_ns);
                if let Some(connect) = self.connect(seen.cookie) {
                    connect.received_ns.get_or_insert(at_ns);
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, seen: &Witness, at_ns: u64) {
        let came_in = seen.kind == witness::ACCEPTED;
        let list = if came_in {
            &mut self.accepted
        } else {
            &mut self.seen.connects
        };
        list.push(Connect {
            at_ns,
            established_ns: None,
            closed_ns: None,
            is_reset: false,
            is_incoming: came_in,
            sent_ns: None,
            received_ns: None,
        });
        self.latest.insert(seen.cookie, (came_in, list.len() - 1));
    }

    fn connect(&mut self, cookie: u64) -> Option<&mut Connect> {
        let &(came_in, place) = self.latest.get(&cookie)?;
        if came_in {
            self.accepted.get_mut(place)
        } else {
            self.seen.connects.get_mut(place)
        }
    }

    fn finish(mut self) -> Seen {
        if self.seen.connects.is_empty() {
            self.seen.connects = self.accepted;
        }
        self.seen
    }
}

impl Seen {
    /// The maximum number of connects that started within any period of `per_ns`.
    #[must_use]
    pub fn busiest(&self, per_ns: u64) -> u64 {
        let (mut first, mut most) = (0, 0);
        for (last, connect) in self.connects.iter().enumerate() {
            while connect.at_ns - self.connects[first].at_ns >= per_ns {
                first += 1;
            }
            most = most.max(last - first + 1);
        }
        most as u64
    }

    /// The longest row of connects in vain, each after the end of the one before: the pauses between them. In vain is a
    /// connect that received nothing.
    #[must_use]
    pub fn pauses_in_vain_ns(&self) -> Vec<u64> {
        let mut longest = Vec::new();
        let mut row = Vec::new();
        let mut last: Option<&Connect> = None;
        for connect in &self.connects {
            let is_in_vain = connect.received_ns.is_none() || connect.established_ns.is_none();
            let pause = last
                .and_then(|last| last.closed_ns)
                .and_then(|end| connect.at_ns.checked_sub(end));
            match (last, pause) {
                (Some(_), Some(pause)) if is_in_vain => row.push(pause),
                _ => row.clear(),
            }
            last = is_in_vain.then_some(connect);
            if row.len() > longest.len() {
                longest.clone_from(&row);
            }
        }
        longest
    }

    /// The start of the first connect that is more than `limit`.
    #[must_use]
    pub fn first_connect_above(&self, limit: u64) -> Option<u64> {
        let connect = self.connects.get(usize::try_from(limit).ok()?)?;
        Some(connect.at_ns)
    }

    /// The start of the first connect that makes more than `limit` within a period of `per_ns`.
    #[must_use]
    pub fn first_connect_above_rate(&self, limit: u64, per_ns: u64) -> Option<u64> {
        let before = usize::try_from(limit).ok()?;
        let last = self.connects.get(before..)?;
        let mut pairs = self.connects.iter().zip(last);
        let found = pairs.find(|(first, last)| last.at_ns - first.at_ns < per_ns);
        found.map(|(_, last)| last.at_ns)
    }

    /// The time from which more than `limit` connections were open at once.
    #[must_use]
    pub fn first_open_above(&self, limit: u64) -> Option<u64> {
        let mut counts = self.open_counts();
        let found = counts.find(|(_, open)| open.unsigned_abs() > limit)?;
        Some(found.0)
    }

    /// The maximum number of simultaneously open connections.
    #[must_use]
    pub fn most_open(&self) -> u64 {
        let counts = self.open_counts().map(|(_, open)| open);
        counts.max().unwrap_or(0).unsigned_abs()
    }

    /// The times at which the number of open connections changed, with the number from then on.
    fn open_counts(&self) -> impl Iterator<Item = (u64, i64)> {
        let mut changes: Vec<(u64, i64)> = Vec::new();
        for connect in &self.connects {
            if let Some(at) = connect.established_ns {
                changes.push((at, 1));
                if let Some(end) = connect.closed_ns {
                    changes.push((end, -1));
                }
            }
        }
        // At the same time, ends come before starts.
        changes.sort_unstable();
        changes.into_iter().scan(0, |open, (at_ns, change)| {
            *open += change;
            Some((at_ns, *open))
        })
    }

    /// The time at which it was certain that more than 1 of 100 connects took longer than `limit_ns`; an unanswered one
    /// counts until `end_ns`.
    #[must_use]
    pub fn p99_broke_ns(&self, limit_ns: u64, end_ns: u64) -> Option<u64> {
        let is_slow = |connect: &&Connect| {
            let took = connect.answered_ns();
            took.unwrap_or(end_ns.saturating_sub(connect.at_ns)) > limit_ns
        };
        let tolerated = self.connects.len() - (self.connects.len() * 99).div_ceil(100);
        let breaking = self.connects.iter().filter(is_slow).nth(tolerated)?;
        Some(breaking.at_ns.saturating_add(limit_ns))
    }

    /// The time within which 99 of 100 connects completed; an unanswered one counts until `end_ns`.
    #[must_use]
    pub fn p99_connect_ns(&self, end_ns: u64) -> Option<u64> {
        let mut times: Vec<u64> = self
            .connects
            .iter()
            .map(|connect| {
                connect
                    .answered_ns()
                    .unwrap_or(end_ns.saturating_sub(connect.at_ns))
            })
            .collect();
        times.sort_unstable();
        let rank = (times.len() * 99).div_ceil(100);
        times.get(rank.checked_sub(1)?).copied()
    }

    /// The time from `at_ns` until the first data was received.
    #[must_use]
    pub fn answered_after_ns(&self, at_ns: u64) -> Option<u64> {
        let next = self.received_ns.partition_point(|time| *time < at_ns);
        Some(self.received_ns.get(next)? - at_ns)
    }

    /// The first time in `from_ns..to_ns` at which the application connected or sent data.
    #[must_use]
    pub fn traffic_in(&self, from_ns: u64, to_ns: u64) -> Option<u64> {
        let connects = self.connects.iter().map(|connect| connect.at_ns);
        connects
            .chain(self.sent_ns.iter().copied())
            .filter(|time| (from_ns..to_ns).contains(time))
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(time_ns: u64, cookie: u64, kind: u64) -> Witness {
        Witness {
            time_ns,
            cookie,
            targets: 1,
            kind,
        }
    }

    fn history(witnesses: Vec<Witness>) -> Seen {
        History::new(&["db".to_owned()], witnesses, 100, 1100)
            .of("db")
            .expect("it is watched")
            .clone()
    }

    #[test]
    fn pauses_are_those_between_connects_in_vain() {
        let mut told_of = Vec::new();
        for (at, end, answer) in [
            (100, 101, None),
            (111, 112, None),
            (120, 150, Some(130)),
            (150, 160, None),
            (165, 166, None),
            (176, 177, None),
        ] {
            told_of.push(told(at, at, witness::CONNECT));
            told_of.push(told(at + 1, at, witness::ESTABLISHED));
            told_of.extend(answer.map(|time| told(time, at, witness::RECEIVED)));
            told_of.push(told(end, at, witness::CLOSED));
        }
        assert_eq!(history(told_of).pauses_in_vain_ns(), [5, 10]);
        // At once is no retry.
        let at_once = [100, 100, 100].into_iter().zip(1..);
        let at_once = at_once.flat_map(|(at, cookie)| {
            [
                told(at, cookie, witness::CONNECT),
                told(at + 50, cookie, witness::CLOSED),
            ]
        });
        assert!(history(at_once.collect()).pauses_in_vain_ns().is_empty());
    }

    #[test]
    fn connects_are_counted_in_a_sliding_window() {
        let seen = history(
            [100, 110, 120, 190, 205]
                .map(|time| told(time, time, witness::CONNECT))
                .to_vec(),
        );
        assert_eq!(
            seen.busiest(10),
            1,
            "a window ends before its length is over"
        );
        assert_eq!(seen.busiest(11), 2);
        assert_eq!(seen.busiest(100), 4);
        assert_eq!(seen.busiest(1000), 5);
        assert_eq!(seen.first_connect_above(3), Some(90));
        assert_eq!(seen.first_connect_above(5), None);
        assert_eq!(seen.first_connect_above_rate(2, 100), Some(20));
        assert_eq!(seen.first_connect_above_rate(1, 11), Some(10));
        assert_eq!(seen.first_connect_above_rate(3, 100), Some(90));
        assert_eq!(seen.first_connect_above_rate(4, 100), None);
    }

    #[test]
    fn what_is_open_at_once_is_open_for_the_application() {
        let seen = history(vec![
            told(100, 1, witness::CONNECT),
            told(110, 1, witness::ESTABLISHED),
            told(120, 2, witness::CONNECT),
            told(130, 2, witness::ESTABLISHED),
            told(140, 1, witness::CLOSED),
            told(140, 3, witness::CONNECT),
            told(150, 3, witness::ESTABLISHED),
            // Refused: never open.
            told(160, 4, witness::CONNECT),
            told(170, 4, witness::CLOSED),
        ]);
        assert_eq!(seen.most_open(), 2);
        assert_eq!(seen.first_open_above(1), Some(30));
        assert_eq!(seen.first_open_above(2), None);
        assert_eq!(seen.connects.len(), 4);
    }

    #[test]
    fn a_connect_that_is_never_answered_took_until_the_end() {
        let seen = history(vec![
            told(100, 1, witness::CONNECT),
            told(105, 1, witness::ESTABLISHED),
            told(200, 2, witness::CONNECT),
        ]);
        assert_eq!(seen.p99_connect_ns(1000), Some(900));
        assert_eq!(seen.p99_broke_ns(50, 1000), Some(150));
        assert_eq!(seen.p99_broke_ns(900, 1000), None);
        let mut quick: Vec<_> = (0..200)
            .flat_map(|n| {
                [
                    told(100 + n, n, witness::CONNECT),
                    told(107 + n, n, witness::ESTABLISHED),
                ]
            })
            .collect();
        quick.push(told(500, 999, witness::CONNECT));
        assert_eq!(history(quick).p99_connect_ns(1000), Some(7));
        assert_eq!(history(Vec::new()).p99_connect_ns(1000), None);
    }

    #[test]
    fn the_first_byte_is_timed_from_the_request() {
        let first_byte = |events: &[(u64, u64)]| {
            let events = events.iter().map(|(time, kind)| told(*time, 1, *kind));
            history(events.collect()).connects[0].first_byte_ns()
        };
        let open = [(100, witness::CONNECT), (110, witness::ESTABLISHED)];
        let with = |more: &[(u64, u64)]| first_byte(&[&open, more].concat());
        let (sent, received) = (witness::SENT, witness::RECEIVED);
        assert_eq!(
            with(&[(500, sent), (530, received), (900, received)]),
            Some(30)
        );
        assert_eq!(
            with(&[(115, received), (500, sent)]),
            Some(5),
            "the server speaks first"
        );
        assert_eq!(with(&[(500, sent)]), None);
        assert_eq!(first_byte(&[(100, witness::CONNECT)]), None);
        let served = [
            (100, witness::ACCEPTED),
            (100, witness::ESTABLISHED),
            (120, received),
            (160, sent),
        ];
        assert_eq!(first_byte(&served), Some(40), "of the command's own answer");
    }

    #[test]
    fn recovery_is_the_first_data_that_comes_back() {
        let seen = history(vec![
            told(150, 1, witness::RECEIVED),
            told(400, 1, witness::SENT),
            told(450, 1, witness::RECEIVED),
        ]);
        assert_eq!(seen.answered_after_ns(100), Some(250));
        assert_eq!(seen.answered_after_ns(351), None);
        assert_eq!(seen.traffic_in(0, 300), None);
        assert_eq!(seen.traffic_in(0, 301), Some(300));
    }

    #[test]
    fn both_ends_of_a_connection_count_once() {
        let seen = history(vec![
            told(100, 1, witness::CONNECT),
            told(101, 2, witness::ACCEPTED),
            told(101, 2, witness::ESTABLISHED),
            told(102, 1, witness::ESTABLISHED),
        ]);
        assert_eq!(seen.connects.len(), 1);
        let server = history(vec![
            told(101, 2, witness::ACCEPTED),
            told(101, 2, witness::ESTABLISHED),
        ]);
        assert_eq!(server.most_open(), 1);
    }
}
