//! DNS over TCP: a packet rule that answers queries answers them here as the programs in the kernel do over UDP.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fault_common::abi::{FlowRule, Followed, RuleEntry, RuleState, RuleStats, direction, fault};
use fault_common::decide::{Plain, Sample, Verdict, judge, open};
use fault_common::dns::{FLAG_TRUNCATED, Message, NameKey, Reply, key_of};
use fault_common::packet::{Packet, kind};

use super::protocol::{RequestFailure, RequestFrame};

/// Bytes of the length before each message (RFC 1035, section 4.2.2).
const LENGTH_BYTES: usize = 2;
/// Bytes of the headers of IPv4 and UDP before a query.
const HEADERS_BYTES: u32 = 28;

/// A packet rule that answers queries, and what it did to those over TCP, which clones share.
#[derive(Clone, Debug)]
pub struct Queries(Arc<QueryRule>);

#[derive(Debug)]
struct QueryRule {
    /// The names that are asked for: see [`key_of`].
    pattern: (NameKey, u32),
    /// The rule as the programs have it: an entry, or one for each arm of a mix.
    entries: Vec<RuleEntry>,
    totals: Mutex<Totals>,
}

#[derive(Debug)]
struct Totals {
    /// By the entries.
    states: Vec<RuleState>,
    stats: RuleStats,
    unread: u64,
}

impl PartialEq for Queries {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Queries {
    /// Queries for a name or a pattern of [`key_of`], answered as these entries of one rule say. Nothing where none of them
    /// answers over TCP; a truncated answer is for UDP.
    #[must_use]
    pub fn answered(question: &str, entries: impl IntoIterator<Item = RuleEntry>) -> Option<Self> {
        let answers = |entry: &RuleEntry| {
            let flags = Reply::of(&entry.arguments).flags;
            entry.fault == fault::ANSWER && flags & FLAG_TRUNCATED == 0
        };
        let entries: Vec<_> = entries.into_iter().filter(answers).collect();
        if entries.is_empty() {
            return None;
        }
        Some(Self(Arc::new(QueryRule {
            pattern: key_of(question)?,
            totals: Mutex::new(Totals {
                states: vec![RuleState::default(); entries.len()],
                stats: RuleStats::default(),
                unread: 0,
            }),
            entries,
        })))
    }

    /// What the rule did, and the connections that it matched. A query counts as the datagram that it would come in.
    #[must_use]
    pub fn totals(&self) -> (RuleStats, u64) {
        let totals = self.totals_now();
        // All arms of a mix match the same queries.
        let connections = totals.states.first().map_or(0, |state| state.connections);
        (totals.stats, connections)
    }

    /// Messages that could not be read, for whichever name they are: malformed ones, and those with several questions.
    #[must_use]
    pub fn unread(&self) -> u64 {
        self.totals_now().unread
    }

    fn totals_now(&self) -> MutexGuard<'_, Totals> {
        self.0.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a query of a connection is answered, of which the rule remembers `flows`; nothing where it passes.
    fn judge(&self, flows: &mut [FlowRule], query: &Packet, size: u32) -> Option<Reply> {
        let mut totals = self.totals_now();
        let Totals { states, stats, .. } = &mut *totals;
        stats.seen_packets += 1;
        stats.seen_segments += 1;
        stats.seen_bytes += u64::from(size);
        let sample = Sample {
            now_ns: 0,
            size,
            direction: direction::TO_SERVER,
        };
        let mut reply = None;
        for ((entry, flow), state) in self.0.entries.iter().zip(flows).zip(states) {
            if flow.uid == 0 {
                open::<Plain>(entry, state, flow);
            }
            let (mut followed, mut verdict) = (Followed::NONE, Verdict::default());
            let fired = judge::<Plain>(
                entry,
                &sample,
                query,
                &mut followed,
                flow,
                state,
                &mut verdict,
            );
            if fired.is_some() {
                // At most one arm of a mix does.
                reply = Some(Reply::of(&entry.arguments));
            }
        }
        if reply.is_some() {
            stats.hit_packets += 1;
            stats.hit_segments += 1;
            stats.hit_bytes += u64::from(size);
        }
        reply
    }
}

/// Reads the queries of one connection.
pub(super) struct QueryReader {
    queries: Queries,
    /// What the rule remembers of the connection, by its entries.
    flows: Vec<FlowRule>,
}

impl QueryReader {
    pub(super) fn new(queries: Queries) -> Self {
        Self {
            flows: vec![FlowRule::default(); queries.0.entries.len()],
            queries,
        }
    }

    /// What stands at the beginning of what a client sent. A query that may be answered is waited for in full.
    pub(super) fn frame(&mut self, data: &[u8]) -> RequestFrame {
        let Some((length, rest)) = data.split_first_chunk::<LENGTH_BYTES>() else {
            return RequestFrame::Partial;
        };
        let bytes = u16::from_be_bytes(*length);
        let length = LENGTH_BYTES as u64 + u64::from(bytes);
        let here = &rest[..rest.len().min(bytes.into())];
        let is_whole = here.len() == usize::from(bytes);
        if !is_whole && here.len() < Message::QUESTION as usize {
            return RequestFrame::Partial;
        }
        let mut message = Message::EMPTY;
        message.fill(here);
        let head = message.head();
        if head.is_some_and(|head| !head.is_query()) {
            return RequestFrame::Through { length };
        }
        let end = match head.map_or(0, |_| message.read_name(Message::QUESTION)) {
            0 => 0,
            end => message.after_question(end),
        };
        if end != 0 && !message.is_named(&self.queries.0.pattern) {
            return RequestFrame::Through { length };
        }
        if head.is_some() && !is_whole {
            return RequestFrame::Partial;
        }
        if end == 0 {
            self.queries.totals_now().unread += 1;
            return RequestFrame::Through { length };
        }
        let query = Packet {
            kinds: kind::DATA,
            query_type: message.question_type(end),
            ..Packet::default()
        };
        let size = HEADERS_BYTES + u32::from(bytes);
        let Some(reply) = self.queries.judge(&mut self.flows, &query, size) else {
            return RequestFrame::Through { length };
        };
        let end = message.answer(end, &reply) as usize;
        let mut response = u16::try_from(end).unwrap_or(0).to_be_bytes().to_vec();
        response.extend_from_slice(&message.bytes[..end]);
        RequestFrame::Request {
            length,
            answer: RequestFailure::Reply(response),
            text: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simple_dns::{CLASS, Name, Packet as Dns, QCLASS, QTYPE, Question, RCODE, TYPE};

    use super::*;
    use crate::plan::testing::plan;
    use crate::relay::fuzz::{asked, fuzz_queries};

    /// What the only rule does.
    fn queries(rule: &str) -> Queries {
        plan(&[rule]).rules[0].queries().unwrap().clone()
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u16::try_from(message.len()).unwrap();
        [&length.to_be_bytes(), message].concat()
    }

    /// A message with this number that asks for the IPv4 addresses of names.
    fn query(number: u16, names: &[&'static str]) -> Vec<u8> {
        let mut message = Dns::new_query(number);
        let (kind, class) = (QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));
        let names = names.iter().map(|name| Name::new_unchecked(name));
        let questions = names.map(|name| Question::new(name, kind, class, false));
        message.questions = questions.collect();
        framed(&message.build_bytes_vec().unwrap())
    }

    /// The numbers and codes of responses.
    fn read(mut responses: &[u8]) -> Vec<(u16, RCODE)> {
        let mut read = Vec::new();
        while let Some((length, rest)) = responses.split_first_chunk() {
            let (message, rest) = rest.split_at(u16::from_be_bytes(*length).into());
            let message = Dns::parse(message).unwrap();
            read.push((message.id(), message.rcode()));
            responses = rest;
        }
        read
    }

    #[test]
    fn what_matches_is_answered_and_everything_else_passes() {
        let mut notify = query(5, &["a.test"]);
        notify[4] = 0x20;
        let malformed = framed(b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\x01\0\x01");
        let long = framed(&[&query(9, &["b.test"])[2..], &[0; 9]].concat());
        let others = [
            query(2, &["test"]),
            query(3, &["a.example"]),
            query(4, &["a.test", "a.test"]),
            notify,
            malformed,
            framed(&[]),
            framed(b"short"),
            framed(&query(8, &["a.tes"])[2..][..20]),
        ];
        let queries = queries("dns:*.test servfail");
        let messages = [&[query(1, &["A.Test"])], &others[..], &[long]];
        let (passed, replies) = asked(&queries, &[&messages.concat().concat()]);
        assert_eq!(passed, others.concat());
        let code = RCODE::ServerFailure;
        assert_eq!(read(&replies), [(1, code), (9, code)]);
        assert_eq!(queries.unread(), 5);
        let (stats, connections) = queries.totals();
        assert_eq!(
            (stats.seen_packets, stats.hit_packets, connections),
            (2, 2, 1)
        );
        assert_eq!(stats.hit_bytes, 2 * (28 + 24) + 9);
    }

    #[test]
    fn half_a_query_is_the_servers_to_judge() {
        let whole = query(1, &["a.test"]);
        for length in 0..whole.len() {
            let (passed, replies) = asked(&queries("dns nxdomain"), &[&whole[..length]]);
            assert_eq!(
                (passed.as_slice(), replies.as_slice()),
                (&whole[..length], &b""[..])
            );
        }
    }

    #[test]
    fn modifiers_select_queries() {
        let numbers = |rule: &str, connections: usize| {
            let queries = queries(rule);
            let all: Vec<_> = (1..=4)
                .flat_map(|number| query(number, &["a.test"]))
                .collect();
            let answered = (0..connections).flat_map(|_| read(&asked(&queries, &[&all]).1));
            answered.map(|(number, _)| number).collect::<Vec<_>>()
        };
        assert_eq!(numbers("dns nxdomain first=1", 2), [1, 1]);
        assert_eq!(
            numbers("dns nxdomain first=5 count=rule", 2),
            [1, 2, 3, 4, 1]
        );
        assert_eq!(numbers("dns nxdomain every=2", 1), [2, 4]);
        assert_eq!(numbers("dns nxdomain conn=2", 2), [1, 2, 3, 4]);
        assert_eq!(numbers("dns nxdomain type=AAAA", 1), [0; 0]);
        assert_eq!(numbers("dns nxdomain size=..51", 1), [0; 0]);
        assert_eq!(numbers("dns nxdomain size=52", 1).len(), 4);
        let some = numbers("dns nxdomain p=50%", 100).len();
        assert!((150..250).contains(&some), "{some} of 400");
        // The draw of a mix is the connection's.
        let some = numbers("dns mix 25%:nxdomain 25%:refused 25%:loss=100%", 100);
        assert_eq!(some.len() % 4, 0);
        assert!(
            (30..70).contains(&(some.len() / 4)),
            "{} of 100",
            some.len() / 4
        );
    }

    #[test]
    fn a_truncated_answer_is_none_over_tcp() {
        assert!(plan(&["dns truncated"]).rules[0].queries().is_none());
        assert!(plan(&["dns loss=5%"]).rules[0].queries().is_none());
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            messages in proptest::collection::vec(
                prop_oneof![
                    (any::<u16>(), prop_oneof![Just("a.test"), Just("b.other")])
                        .prop_map(|(number, name)| query(number, &[name])),
                    proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| framed(&bytes)),
                ],
                0..5,
            ),
            cut in any::<u8>(),
        ) {
            let bytes = [vec![cut], messages.concat()].concat();
            fuzz_queries(|| queries("dns:*.test nxdomain p=75%"), &bytes);
        }
    }
}
