//! The frontend/backend protocol of `PostgreSQL`, version 3, as far as an error needs it.
//!
//! A statement that is to fail is not answered here: the server gets a statement in its place that can't but fail, and
//! its error is worded anew on the way back. So the server itself keeps the order of its answers, says whether a
//! transaction has failed, and skips what follows until Sync.

use std::collections::HashMap;
use std::time::Instant;

use bytes::{Buf as _, Bytes, BytesMut};

use super::attributes::CloseMode;
use super::protocol::{RequestFailure, RequestFrame, TEXT_MAX, beginning};
use super::random::fold_text;
use super::stage::{Chunk, ChunkQueue, Pop, ROOM, Rest, Stage, StreamEnd, StreamFault};
use crate::rule::servers::{Moment, PostgresError};

/// A message's type and length.
const HEADER: usize = 5;
/// The longest message of a login (`MAX_STARTUP_PACKET_LENGTH`).
const LONGEST_LOGIN: u32 = 10_000;
/// What asks for encryption by TLS and by GSSAPI, and to cancel.
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
/// The length of both; whatever is longer is something else.
const REQUEST_LENGTH: u64 = 8;
const CANCEL_REQUEST: u32 = 80_877_102;
/// The most prepared statements and portals whose texts are kept for a connection.
const NAMES_MAX: usize = 1024;
/// The types of messages that a client sends.
const FROM_CLIENT: &[u8] = b"BCDEFHPQSXcdfp";
/// The types of messages that a server sends.
const FROM_SERVER: &[u8] = b"123ACDEGHIKNRSTVWZcdnstv";
/// How the column begins that does not exist.
pub(crate) const TOKEN: &str = "injected_by_fault_";
/// Statements that begin or end a transaction.
const TRANSACTIONS: &[&str] = &[
    "ABORT",
    "BEGIN",
    "COMMIT",
    "END",
    "RELEASE",
    "ROLLBACK",
    "SAVEPOINT",
    "START",
];

/// What a name stands for: a prepared statement or a portal, as the messages Close and Describe have it.
type Name = (u8, Vec<u8>);

/// What a client has said so far.
pub(crate) struct Client {
    error: PostgresError,
    /// Statements that begin or end transactions may fail as well.
    takes_all: bool,
    texts: HashMap<Name, String>,
    /// The server skips what comes until Sync.
    skips: bool,
}

impl Client {
    /// A client whose statements may fail with this error; those that begin or end a transaction only where they are
    /// selected by what they say.
    pub(crate) fn new(error: PostgresError, is_selective: bool) -> Self {
        Self {
            error,
            takes_all: is_selective,
            texts: HashMap::new(),
            skips: false,
        }
    }

    /// The same client with another error.
    pub(crate) fn with_error_of(self, other: Self) -> Self {
        Self {
            error: other.error,
            takes_all: other.takes_all,
            ..self
        }
    }

    /// Is told that the request of the last frame fails.
    pub(crate) fn failed(&mut self, answer: &RequestFailure) {
        self.skips =
            matches!(answer, RequestFailure::Instead(bytes) if bytes.first() == Some(&b'P'));
    }

    /// Whether there were too many names to keep the texts of all.
    pub(crate) fn is_full(&self) -> bool {
        self.texts.len() >= NAMES_MAX
    }

    /// Reads the first message.
    pub(crate) fn frame(&mut self, data: &[u8]) -> RequestFrame {
        match data.first() {
            None => RequestFrame::Partial,
            Some(0) => self.login(data),
            Some(kind) if FROM_CLIENT.contains(kind) => self.message(data),
            Some(_) => RequestFrame::Foreign,
        }
    }

    fn login(&self, data: &[u8]) -> RequestFrame {
        let (Some(length), Some(code)) = (number(data, 0), number(data, 4)) else {
            return RequestFrame::Partial;
        };
        if !(8..=LONGEST_LOGIN).contains(&length) {
            return RequestFrame::Foreign;
        }
        let length = u64::from(length);
        match code {
            SSL_REQUEST | GSS_REQUEST if length == REQUEST_LENGTH => RequestFrame::Answered {
                length,
                reply: b"N".to_vec(),
            },
            CANCEL_REQUEST => RequestFrame::Through { length },
            _ if code >> 16 != 3 => RequestFrame::Foreign,
            _ if self.error.moment == Moment::Login => RequestFrame::Request {
                length,
                answer: RequestFailure::Last(error_response(&self.error)),
                text: String::new(),
            },
            _ => RequestFrame::Through { length },
        }
    }

    fn message(&mut self, data: &[u8]) -> RequestFrame {
        let Some(length) = message_length(data) else {
            return RequestFrame::Partial;
        };
        if length < HEADER as u64 {
            return RequestFrame::Foreign;
        }
        let here = usize::try_from(length).unwrap_or(usize::MAX);
        if data.len() < here.min(HEADER + 2 * TEXT_MAX) && b"QPBEC".contains(&data[0]) {
            return RequestFrame::Partial;
        }
        let body = &data[HEADER..here.min(data.len())];
        let failing = match data[0] {
            b'S' => {
                self.skips = false;
                None
            }
            _ if self.skips || self.error.moment == Moment::Login => None,
            b'Q' => Some((beginning(c_string(body).0), query(&self.instead_of(body)))),
            b'E' => {
                let text = self.text(b'P', c_string(body).0);
                Some((text, parse(&self.token(), &self.failing_statement())))
            }
            _ => {
                self.remember(data[0], body);
                None
            }
        };
        match failing {
            Some((text, instead)) if self.may_fail(&text) => RequestFrame::Request {
                length,
                answer: RequestFailure::Instead(instead),
                text,
            },
            _ => RequestFrame::Through { length },
        }
    }

    /// Whether a statement may fail; one that another rule has put in the place of the client's does so anyway.
    fn may_fail(&self, text: &str) -> bool {
        (self.takes_all || !is_transaction(text)) && !text.contains(TOKEN)
    }

    /// Keeps what names stand for.
    fn remember(&mut self, kind: u8, body: &[u8]) {
        let (first, rest) = c_string(body);
        match kind {
            b'P' => self.name(b'S', first, beginning(c_string(rest).0)),
            b'B' => {
                let text = self.text(b'S', c_string(rest).0);
                self.name(b'P', first, text);
            }
            b'C' => {
                if let Some((kind, name)) = first.split_first() {
                    self.texts.remove(&(*kind, name.to_vec()));
                }
            }
            _ => {}
        }
    }

    fn name(&mut self, kind: u8, name: &[u8], text: String) {
        let name = (kind, name.to_vec());
        if !self.is_full() || self.texts.contains_key(&name) {
            self.texts.insert(name, text);
        }
    }

    /// The text behind a name; empty where it is not known.
    fn text(&self, kind: u8, name: &[u8]) -> String {
        let text = self.texts.get(&(kind, name.to_vec()));
        text.cloned().unwrap_or_default()
    }

    /// What fails in the place of a simple query. A transaction that fails at its end has ended.
    fn instead_of(&self, body: &[u8]) -> String {
        let text = beginning(c_string(body).0);
        let failing = self.failing_statement();
        match first_word(&text).as_str() {
            "COMMIT" | "END" => format!("ROLLBACK; {failing}"),
            _ => failing,
        }
    }

    /// A statement that is sound but names a column that does not exist: in a transaction that has failed already the
    /// server says so instead.
    fn failing_statement(&self) -> String {
        format!("SELECT \"{}\"", self.token())
    }

    fn token(&self) -> String {
        token(&self.error)
    }
}

/// What the server's error says by which it is known to be meant for this one.
fn token(error: &PostgresError) -> String {
    let key = fold_text(0, &error.text) & 0xffff_ffff;
    format!("{TOKEN}{}_{key:08x}", error.state)
}

/// A number in network order.
fn number(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at + 4)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// The length of the first message with its type, in bytes.
fn message_length(data: &[u8]) -> Option<u64> {
    Some(u64::from(number(data, 1)?) + 1)
}

/// The text up to the first zero, and what follows that.
fn c_string(data: &[u8]) -> (&[u8], &[u8]) {
    let end = data.iter().position(|byte| *byte == 0);
    let end = end.unwrap_or(data.len());
    (&data[..end], data.get(end + 1..).unwrap_or_default())
}

/// The first word of a statement in capitals.
fn first_word(statement: &str) -> String {
    let word = statement
        .trim_start()
        .split(|c: char| !c.is_ascii_alphabetic());
    word.take(1).collect::<String>().to_ascii_uppercase()
}

fn is_transaction(statement: &str) -> bool {
    TRANSACTIONS.contains(&first_word(statement).as_str())
}

/// A message: its type, its length, its body.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    // What is sent here is a few hundred bytes long.
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    let mut message = vec![kind];
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(body);
    message
}

fn query(text: &str) -> Vec<u8> {
    message(b'Q', format!("{text}\0").as_bytes())
}

fn parse(name: &str, text: &str) -> Vec<u8> {
    message(b'P', format!("{name}\0{text}\0\0\0").as_bytes())
}

fn error_response(error: &PostgresError) -> Vec<u8> {
    let severity = match error.moment {
        Moment::Statement => "ERROR",
        Moment::Login | Moment::Farewell => "FATAL",
    };
    let PostgresError { state, text, .. } = error;
    let fields = format!("S{severity}\0V{severity}\0C{state}\0M{text}\0\0");
    message(b'E', fields.as_bytes())
}

/// On the way to the client: errors of the statements that took the place of others are worded anew.
pub(crate) struct Answers {
    error: PostgresError,
    buffer: BytesMut,
    /// Bytes of a message that are still to come and pass.
    rest: u64,
    /// The login has begun: what comes are messages.
    has_begun: bool,
    /// It is not this protocol: it passes.
    is_foreign: bool,
    queue: ChunkQueue,
}

/// The longest error that is looked at, in bytes.
const LONGEST_ERROR: u64 = 64 * 1024;

impl Answers {
    /// Words errors as this one.
    pub(crate) fn new(error: PostgresError) -> Self {
        Self {
            error,
            buffer: BytesMut::new(),
            rest: 0,
            has_begun: false,
            is_foreign: false,
            queue: ChunkQueue::default(),
        }
    }

    fn pass(&mut self, length: u64, at: Instant) {
        let here = usize::try_from(length).unwrap_or(usize::MAX);
        let data = self.buffer.split_to(here.min(self.buffer.len()));
        self.rest = length - data.len() as u64;
        self.put(data.freeze(), at);
    }

    fn put(&mut self, data: Bytes, at: Instant) {
        if !data.is_empty() {
            self.queue.push(Chunk::new(data, at));
        }
    }

    /// Handles the messages that are here.
    fn look(&mut self, at: Instant) {
        while !self.buffer.is_empty() {
            if self.is_foreign {
                self.pass(self.buffer.len() as u64, at);
            } else if self.rest > 0 {
                self.pass(self.rest, at);
            } else if !self.message(at) {
                return;
            }
        }
    }

    /// Handles a message, once enough of it is here.
    fn message(&mut self, at: Instant) -> bool {
        let kind = self.buffer[0];
        if !FROM_SERVER.contains(&kind) {
            self.is_foreign = true;
            return true;
        }
        let Some(length) = message_length(&self.buffer) else {
            return false;
        };
        if length < HEADER as u64 {
            self.is_foreign = true;
            return true;
        }
        // What took the place of a COMMIT has rolled back before it failed.
        if kind == b'C' && self.buffer[HEADER..].starts_with(b"ROLLBACK\0") && self.is_ours(length)
        {
            self.buffer.advance(usize::try_from(length).unwrap_or(0));
            return true;
        }
        if kind != b'E' || length > LONGEST_ERROR {
            self.pass(length, at);
            return true;
        }
        if (self.buffer.len() as u64) < length {
            return false;
        }
        if self.is_ours(0) {
            self.buffer.advance(usize::try_from(length).unwrap_or(0));
            self.put(error_response(&self.error).into(), at);
            if self.error.moment == Moment::Farewell {
                self.buffer.clear();
                self.queue.end(StreamEnd::Close(CloseMode::Fin), at);
            }
            return true;
        }
        self.pass(length, at);
        true
    }

    /// Whether the message at this place is the error of a statement that took the place of another.
    fn is_ours(&self, at: u64) -> bool {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let Some(message) = self
            .buffer
            .get(at..)
            .filter(|rest| rest.first() == Some(&b'E'))
        else {
            return false;
        };
        let length = message_length(message).unwrap_or(0);
        let end = usize::try_from(length).unwrap_or(usize::MAX);
        let token = token(&self.error);
        let body = message.get(HEADER..end.min(message.len()));
        body.is_some_and(|body| {
            body.windows(token.len())
                .any(|window| window == token.as_bytes())
        })
    }
}

impl Stage for Answers {
    fn room(&self, _now: Instant) -> usize {
        self.queue.room(ROOM)
    }

    fn push(&mut self, chunk: Chunk) {
        // The answer to the request for encryption is a letter without a length.
        let is_letter = matches!(&chunk.data[..], b"N" | b"S" | b"G");
        if !self.has_begun && self.buffer.is_empty() && is_letter {
            self.queue.push(chunk);
            return;
        }
        self.has_begun = true;
        self.buffer.extend_from_slice(&chunk.data);
        self.look(chunk.at);
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
        self.is_foreign = true;
        self.look(at);
        self.queue.end(end, at);
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.queue.pass()
    }

    fn update(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(error) = fault.handling().and_then(|handling| handling.postgres()) {
            self.error = error;
        }
    }

    fn take(mut self: Box<Self>) -> Rest {
        self.is_foreign = true;
        self.look(Instant::now());
        self.queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.buffer.is_empty()
    }

    fn bytes(&self) -> usize {
        self.queue.bytes() + self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What psql 15 and pgbench 15 sent to a server of their version, and what it answered.
    const SSL: &[u8] = b"\x00\x00\x00\x08\x04\xd2\x16/";
    const STARTUP: &[u8] = b"\x00\x00\x00?\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00application_name\x00psql\x00\x00";
    const QUERY: &[u8] = b"Q\x00\x00\x00\rselect 1\x00";
    const PREPARE: &[u8] = b"P\x00\x00\x00\x14P_0\x00select 1;\x00\x00\x00S\x00\x00\x00\x04";
    const EXECUTE: &[u8] = b"B\x00\x00\x00\x11\x00P_0\x00\x00\x00\x00\x00\x00\x01\x00\x00D\x00\x00\x00\x06P\x00E\x00\x00\x00\t\x00\x00\x00\x00\x00S\x00\x00\x00\x04";
    const ROWS: &[u8] = b"T\x00\x00\x00!\x00\x01?column?\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x17\x00\x04\xff\xff\xff\xff\x00\x00D\x00\x00\x00\x0b\x00\x01\x00\x00\x00\x011C\x00\x00\x00\rSELECT 1\x00Z\x00\x00\x00\x05I";
    const ROLLED_BACK: &[u8] = b"C\x00\x00\x00\rROLLBACK\x00E\x00\x00\x00\x84SERROR\x00VERROR\x00C42703\x00Mcolumn \"injected_by_fault_40001_b2b2409b\" does not exist\x00P18\x00Fparse_relation.c\x00L3665\x00RerrorMissingColumn\x00\x00Z\x00\x00\x00\x05I";

    fn error(text: &str) -> PostgresError {
        PostgresError::meant_by(text).expect("an error")
    }

    /// The frames of what a client sends; a request that may fail does.
    fn frames(client: &mut Client, mut data: &[u8]) -> Vec<RequestFrame> {
        let mut frames = Vec::new();
        while !data.is_empty() {
            let frame = client.frame(data);
            let length = match &frame {
                RequestFrame::Request { length, answer, .. } => {
                    client.failed(answer);
                    *length
                }
                RequestFrame::Through { length } | RequestFrame::Answered { length, .. } => *length,
                RequestFrame::Partial | RequestFrame::Foreign => data.len() as u64,
            };
            data = &data[usize::try_from(length).expect("short")..];
            frames.push(frame);
        }
        frames
    }

    fn through(length: u64) -> RequestFrame {
        RequestFrame::Through { length }
    }

    fn instead(length: u64, bytes: &[u8], text: &str) -> RequestFrame {
        RequestFrame::Request {
            length,
            answer: RequestFailure::Instead(bytes.to_vec()),
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_request_for_tls_is_denied_and_the_login_passes() {
        let mut client = Client::new(error("40001"), false);
        let reply = b"N".to_vec();
        assert_eq!(
            client.frame(SSL),
            RequestFrame::Answered { length: 8, reply }
        );
        assert_eq!(client.frame(&SSL[..7]), RequestFrame::Partial);
        assert_eq!(client.frame(STARTUP), through(63));
        let cancel = b"\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01\x00\x00\x00\x02";
        assert_eq!(client.frame(cancel), through(16));
    }

    #[test]
    fn an_error_of_the_login_ends_it_and_lets_statements_pass() {
        let mut client = Client::new(error("53300"), false);
        let RequestFrame::Request {
            length: 63,
            answer: RequestFailure::Last(reply),
            ..
        } = client.frame(STARTUP)
        else {
            panic!("the login fails");
        };
        let expected = b"E\x00\x00\x00\x3fSFATAL\x00VFATAL\x00C53300\x00Msorry, too many clients already\x00\x00";
        assert_eq!(reply[5..], expected[5..]);
        assert_eq!(message_length(&reply), Some(reply.len() as u64));
        assert_eq!(client.frame(QUERY), through(14));
    }

    #[test]
    fn a_simple_query_is_replaced_by_one_that_fails() {
        let mut client = Client::new(error("40001"), false);
        let failing = query("SELECT \"injected_by_fault_40001_b2b2409b\"");
        assert_eq!(client.frame(QUERY), instead(14, &failing, "select 1"));
        assert_eq!(client.frame(&QUERY[..13]), RequestFrame::Partial);
        let length = failing.len() as u64;
        assert_eq!(client.frame(&failing), through(length), "another rule's");
    }

    #[test]
    fn transactions_fail_only_where_they_are_selected() {
        for statement in [
            "BEGIN",
            "commit",
            " end;",
            "ROLLBACK TO a",
            "START TRANSACTION",
        ] {
            let message = query(statement);
            let mut client = Client::new(error("40001"), false);
            let length = message.len() as u64;
            assert_eq!(client.frame(&message), through(length), "{statement}");
        }
        let mut client = Client::new(error("40001"), true);
        let commit = query("commit");
        let failing = query("ROLLBACK; SELECT \"injected_by_fault_40001_b2b2409b\"");
        assert_eq!(client.frame(&commit), instead(12, &failing, "commit"));
    }

    #[test]
    fn an_executed_statement_fails_and_the_rest_is_the_servers_to_skip() {
        let mut client = Client::new(error("40P01"), false);
        let token = token(&error("40P01"));
        let failing = parse(&token, &format!("SELECT \"{token}\""));
        assert_eq!(frames(&mut client, PREPARE), [through(21), through(5)]);
        let executed = [EXECUTE, EXECUTE].concat();
        let fails = || instead(10, &failing, "select 1;");
        let once = |last| [through(18), through(7), last, through(5)];
        let expected: Vec<_> = once(fails()).into_iter().chain(once(fails())).collect();
        assert_eq!(frames(&mut client, &executed), expected);
        // Without a Sync in between the second one is skipped by the server.
        let pipelined = [&EXECUTE[..EXECUTE.len() - 5], EXECUTE].concat();
        let found = frames(&mut client, &pipelined);
        assert_eq!(found[2], fails());
        assert_eq!(found[3..], once(through(10)));
    }

    #[test]
    fn what_is_closed_is_forgotten_and_names_are_bounded() {
        let mut client = Client::new(error("40001"), true);
        frames(&mut client, PREPARE);
        let close = message(b'C', b"SP_0\0");
        frames(&mut client, &close);
        let found = frames(&mut client, EXECUTE);
        assert!(matches!(&found[2], RequestFrame::Request { text, .. } if text.is_empty()));
        for number in 0..2000 {
            frames(&mut client, &parse(&number.to_string(), "select 1"));
        }
        assert!(client.is_full());
        assert_eq!(client.texts.len(), NAMES_MAX);
    }

    #[test]
    fn another_protocol_is_foreign() {
        let mut client = Client::new(error("40001"), false);
        for data in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x00\x00\x00\x01\x00\x03\x00\x00",
            b"\x00\x00\x00\x08\x00\x02\x00\x00",
            b"Q\x00\x00\x00\x03",
        ] {
            assert_eq!(client.frame(data), RequestFrame::Foreign, "{data:?}");
        }
    }

    /// What comes to the client of bytes that come in pieces of this size, and whether the connection ends.
    fn answered(text: &str, data: &[u8], size: usize) -> (Vec<u8>, bool) {
        let mut stage = Answers::new(error(text));
        let now = Instant::now();
        for piece in data.chunks(size) {
            stage.push(Chunk::new(Bytes::copy_from_slice(piece), now));
        }
        let mut received = Vec::new();
        loop {
            match stage.pop(now) {
                Pop::Chunk(chunk) => received.extend_from_slice(&chunk.data),
                Pop::End(..) => return (received, true),
                _ => return (received, false),
            }
        }
    }

    #[test]
    fn answers_pass_and_the_servers_error_is_worded_anew() {
        let ours = error_response(&error("40001"));
        let ready = b"Z\x00\x00\x00\x05I";
        let expected = [ROWS, &ours, ready].concat();
        for size in [1, 3, 4096] {
            assert_eq!(answered("40001", ROWS, size), (ROWS.to_vec(), false));
            let data = [ROWS, &ROLLED_BACK[14..]].concat();
            assert_eq!(answered("40001", &data, size), (expected.clone(), false));
            assert_eq!(answered("40P01", &data, size), (data, false), "not ours");
        }
        let expected = [&ours[..], ready].concat();
        assert_eq!(answered("40001", ROLLED_BACK, 4096), (expected, false));
    }

    #[test]
    fn a_farewell_is_the_last_thing() {
        let token = token(&error("57P01"));
        let failed = message(b'E', format!("SERROR\0Mcolumn \"{token}\"\0\0").as_bytes());
        let data = [&failed[..], b"Z\x00\x00\x00\x05I"].concat();
        let expected = error_response(&error("57P01"));
        assert_eq!(answered("57P01", &data, 4096), (expected, true));
    }

    #[test]
    fn letters_before_the_login_and_what_is_foreign_pass() {
        let data = [b"N", ROWS].concat();
        let mut stage = Answers::new(error("40001"));
        let now = Instant::now();
        stage.push(Chunk::new(Bytes::from_static(b"N"), now));
        assert!(matches!(stage.pop(now), Pop::Chunk(_)));
        stage.push(Chunk::new(Bytes::from_static(ROWS), now));
        assert_eq!(stage.buffer.len(), 0);
        assert_eq!(
            answered("40001", b"\x16\x03\x01anything", 1).0,
            b"\x16\x03\x01anything"
        );
        assert_eq!(answered("40001", &data[1..], 2).0, ROWS);
    }
}
