//! The entries of fuzzers.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use bytes::Bytes;

use super::attributes::ErrorProtocol;
use super::decisions::Notes;
use super::greeting;
use super::handling::{Handling, RequestRule};
use super::postgres::{Answers, TOKEN};
use super::protocol::{self, Wording};
use super::queries::Queries;
use super::random::Draws;
use super::requests::RequestStage;
use super::stage::{Chunk, Pop, Stage, StageContext, StreamEnd, StreamFault as _};
use super::trouble::Trouble;
use crate::rule::servers::PostgresError;

/// Each kind of trouble is told once, and not once for each input.
static TROUBLE: LazyLock<Arc<Trouble>> = LazyLock::new(Arc::default);

const PROTOCOLS: [ErrorProtocol; 7] = [
    ErrorProtocol::Auto,
    ErrorProtocol::Http,
    ErrorProtocol::Redis,
    ErrorProtocol::Mysql,
    ErrorProtocol::Memcache,
    ErrorProtocol::Smtp,
    ErrorProtocol::Random,
];

/// Reads the bytes as what clients and servers say, cut in two where the first byte says.
///
/// # Panics
/// Where it depends on the cut what becomes of them, or bytes that are no request do not pass; which is what a fuzzer
/// looks for.
pub fn fuzz(data: &[u8]) {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    for protocol in PROTOCOLS {
        protocol::guess(data);
        protocol::frame(protocol, data, &Wording::default(), &mut Draws::new(1));
    }
    let (first, second) = data.split_at(data.len() * usize::from(*cut) / 256);
    let pieces = [first, second];
    for message in ["40001", "57P01", "53300"] {
        let whole = told(requests(message, None), &[data]);
        assert_eq!(whole, told(requests(message, None), &pieces), "{message}");
    }
    let (passed, replies) = told(requests("40001", Some("$a")), &pieces);
    // Each letter answers a request for encryption of 8 bytes.
    assert_eq!(passed.len() + 8 * replies.len(), data.len());
    let is_ours = data
        .windows(TOKEN.len())
        .any(|part| part == TOKEN.as_bytes());
    if !is_ours {
        let error = PostgresError::meant_by("40001").expect("an error");
        assert_eq!(told(Box::new(Answers::new(error)), &pieces).0, data);
    }
}

/// Reads the bytes as a client's greeting, and the part of them where the first byte says.
///
/// # Panics
/// Where what was enough to read is read otherwise with more bytes behind it; which is what a fuzzer looks for.
pub fn fuzz_greeting(data: &[u8]) {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let part = &data[..data.len() * usize::from(*cut) / 256];
    let whole = greeting::read(data);
    if let Some(greeting) = greeting::read(part) {
        assert_eq!(Some(greeting), whole);
    }
}

/// Reads the bytes as what a client says over TCP to a DNS server, cut in two where the first byte says, and byte by byte.
/// `rule` gives a packet rule that has done nothing yet.
///
/// # Panics
/// Where it depends on the cuts what becomes of them, or an answer is not as long as it says; which is what a fuzzer looks
/// for.
pub fn fuzz_queries(rule: impl Fn() -> Queries, data: &[u8]) {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let said = |pieces: &[&[u8]]| {
        let queries = rule();
        (asked(&queries, pieces), queries.totals(), queries.unread())
    };
    let whole = said(&[data]);
    let (first, second) = data.split_at(data.len() * usize::from(*cut) / 256);
    assert_eq!(whole, said(&[first, second]));
    assert_eq!(whole, said(&data.chunks(1).collect::<Vec<_>>()));
    let ((_, replies), (stats, _), _) = &whole;
    let (mut rest, mut count) = (replies.as_slice(), 0);
    while let Some((length, behind)) = rest.split_first_chunk() {
        rest = &behind[usize::from(u16::from_be_bytes(*length))..];
        count += 1;
    }
    assert_eq!((rest.len(), count), (0, stats.hit_packets));
}

/// What goes on of these pieces of what a client says to a DNS server, and what is answered.
pub(super) fn asked(queries: &Queries, pieces: &[&[u8]]) -> (Vec<u8>, Vec<u8>) {
    let handling = queries.handling().expect("it handles requests");
    told(stage(handling), pieces)
}

/// What a client of `PostgreSQL` says, with this error for the requests that are selected.
fn requests(message: &str, query: Option<&str>) -> Box<dyn Stage> {
    stage(Handling {
        fault: "error",
        rule: RequestRule::Always,
        protocol: ErrorProtocol::Postgres,
        wording: Wording {
            message: Some(message.to_owned()),
            ..Wording::default()
        },
        query: query.map(str::to_owned),
        queries: None,
    })
}

/// The stage that handles requests in this way.
fn stage(handling: Handling) -> Box<dyn Stage> {
    let now = Instant::now();
    let place = StageContext {
        key: 1,
        opened: now,
        now,
        is_new: true,
        is_datagram: false,
        shared: Arc::default(),
        trouble: Arc::clone(&TROUBLE),
        notes: Notes::unkept(),
    };
    Box::new(RequestStage::new(handling, &place))
}

/// What goes on of these pieces, and what is answered.
fn told(mut stage: Box<dyn Stage>, pieces: &[&[u8]]) -> (Vec<u8>, Vec<u8>) {
    let now = Instant::now();
    for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
        stage.push(Chunk::new(Bytes::copy_from_slice(piece), now));
    }
    stage.end(StreamEnd::Fin, now);
    let (mut passed, mut replies) = (Vec::new(), Vec::new());
    loop {
        match stage.pop(now) {
            Pop::Chunk(chunk) | Pop::Last(chunk) => passed.extend_from_slice(&chunk.data),
            Pop::Reply(reply) => replies.extend_from_slice(&reply),
            Pop::End(..) | Pop::Now(_) => {}
            Pop::Wait(_) => return (passed, replies),
        }
    }
}
