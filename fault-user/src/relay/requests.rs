//! The stage of `error`, `transient` and `abort`: what the relay says in the server's name, or hides of what the server
//! says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use regex::bytes::Regex;

use super::attributes::{CloseMode, ErrorProtocol};
use super::decisions::Notes;
use super::handling::{Handling, RequestRule};
use super::postgres::{Answers, Client};
use super::protocol::{self, RequestFailure, RequestFrame};
use super::queries::QueryReader;
use super::random::{Draws, fold};
use super::shared::ToxicShared;
use super::stage::{Chunk, Pop, ROOM, Rest, Stage, StageContext, StreamEnd, StreamFault};
use super::trouble::Trouble;

/// Looks at what a client sends.
#[expect(
    clippy::struct_excessive_bools,
    reason = "what is done with the rest of a request does not depend on how the connection ends"
)]
pub(crate) struct RequestStage {
    handling: Handling,
    selection: Option<Regex>,
    postgres: Option<Client>,
    queries: Option<QueryReader>,
    /// The key of its draws.
    key: u64,
    /// Selected requests so far.
    selected: u64,
    /// Bytes that have come.
    arrived: u64,
    buffer: BytesMut,
    /// Bytes of the request or login that are still to come.
    rest: u64,
    /// Whether those go to the server.
    rest_passes: bool,
    /// What to say once they have come.
    reply: Option<Bytes>,
    /// Nothing is looked at any more.
    is_over: bool,
    /// The connection was reset instead of an answer.
    is_reset: bool,
    /// The connection can't be read: it passes.
    is_unreadable: bool,
    /// The server has got the end of the connection.
    has_ended: bool,
    ready: VecDeque<Pop>,
    at: Instant,
    shared: Arc<ToxicShared>,
    notes: Notes,
    trouble: Arc<Trouble>,
}

impl RequestStage {
    /// The stage that handles requests in this way.
    pub(super) fn new(handling: Handling, place: &StageContext) -> Self {
        Self {
            selection: handling.selection(),
            postgres: client(&handling),
            queries: handling.queries.clone().map(QueryReader::new),
            handling,
            key: place.key,
            selected: 0,
            arrived: 0,
            buffer: BytesMut::new(),
            rest: 0,
            rest_passes: false,
            reply: None,
            is_over: false,
            is_reset: false,
            is_unreadable: false,
            has_ended: false,
            ready: VecDeque::new(),
            at: place.now,
            shared: Arc::clone(&place.shared),
            notes: place.notes.clone(),
            trouble: Arc::clone(&place.trouble),
        }
    }

    /// Whether the next request is answered here.
    fn claims(&mut self) -> bool {
        self.selected += 1;
        match self.handling.rule {
            RequestRule::Always => true,
            RequestRule::Abort(_) => false,
            RequestRule::First {
                count,
                per_connection: true,
            } => self.selected <= count,
            // Which connections have the first requests is chance. Those that are repeated end by `is_used_up`.
            RequestRule::First {
                count,
                per_connection: false,
            } => {
                self.notes.recorded_places().is_some()
                    || self.shared.requests.fetch_add(1, Ordering::Relaxed) < count
            }
        }
    }

    /// Whether every request that is to be answered has been, by this connection or others.
    fn is_used_up(&self) -> bool {
        match self.handling.rule {
            RequestRule::Always | RequestRule::Abort(_) => false,
            RequestRule::First {
                count,
                per_connection: true,
            } => self.selected >= count,
            RequestRule::First {
                count,
                per_connection: false,
            } => match self.notes.recorded_places() {
                Some(places) => places.last().is_none_or(|last| self.selected >= *last),
                None => self.shared.requests.load(Ordering::Relaxed) >= count,
            },
        }
    }

    fn pass(&mut self, data: BytesMut) {
        if !data.is_empty() {
            self.ready
                .push_back(Pop::Chunk(Chunk::new(data.freeze(), self.at)));
        }
    }

    /// Handles what is left of a request whose beginning has been handled.
    fn continue_rest(&mut self) {
        let here = usize::try_from(self.rest)
            .unwrap_or(usize::MAX)
            .min(self.buffer.len());
        let data = self.buffer.split_to(here);
        self.rest -= here as u64;
        if self.rest_passes {
            self.pass(data);
        }
        if self.rest > 0 {
            return;
        }
        if let Some(reply) = self.reply.take().filter(|reply| !reply.is_empty()) {
            self.ready.push_back(Pop::Reply(reply));
        }
        if self.rest_passes
            && self.is_over
            && let RequestRule::Abort(mode) = self.handling.rule
        {
            self.ready
                .push_back(Pop::End(StreamEnd::Abort(mode), self.at));
        }
    }

    fn look(&mut self) {
        while !self.buffer.is_empty() {
            if self.rest > 0 {
                self.continue_rest();
                continue;
            }
            if self.is_unreadable || self.is_over || self.has_ended || self.is_used_up() {
                let data = self.buffer.split();
                // After the request that is aborted nothing more goes to the server.
                if self.is_unreadable || !self.has_aborted() && !self.has_ended {
                    self.pass(data);
                }
                return;
            }
            if self.reads_requests() && protocol::is_tls(&self.buffer) {
                self.give_up(
                    "tls",
                    "can't read TLS: encrypted connections pass; use it behind what decrypts them, or a fault that \
                     does not look at requests",
                );
                continue;
            }
            match self.frame() {
                RequestFrame::Partial => return,
                RequestFrame::Through { length } => self.let_through(length),
                RequestFrame::Answered { length, reply } => {
                    self.trouble.tell(
                        "no-tls",
                        format_args!(
                            "`{}` answers that the server has no TLS, to read what clients send: those that insist on \
                             TLS (sslmode=require) fail",
                            self.handling.fault
                        ),
                    );
                    self.answer(length, RequestFailure::Reply(reply));
                }
                RequestFrame::Request {
                    length,
                    answer,
                    text,
                } => self.request(length, answer, &text),
                RequestFrame::Foreign => self.give_up(
                    "foreign",
                    "does not understand a connection, which passes: it is encrypted or of another protocol",
                ),
            }
        }
    }

    /// What stands at the beginning of what is here.
    fn frame(&mut self) -> RequestFrame {
        if let Some(client) = &mut self.postgres {
            let frame = client.frame(&self.buffer);
            if self.selection.is_some() && client.is_full() {
                self.trouble.tell(
                    "statements",
                    "a connection has more prepared statements than `query` looks at (1024): the others pass",
                );
            }
            return frame;
        }
        if let Some(queries) = &mut self.queries {
            return queries.frame(&self.buffer);
        }
        let protocol = match self.handling.protocol {
            ErrorProtocol::Auto => protocol::guess(&self.buffer),
            protocol => protocol,
        };
        // What is drawn for a request depends on where it begins, not on how often it was looked at.
        let begins = self.arrived - self.buffer.len() as u64;
        protocol::frame(
            protocol,
            &self.buffer,
            &self.handling.wording,
            &mut Draws::new(fold(self.key, begins)),
        )
    }

    /// Lets the whole connection pass, and says why.
    fn give_up(&mut self, kind: &'static str, why: &str) {
        self.is_unreadable = true;
        let fault = self.handling.fault;
        self.trouble.tell(kind, format_args!("`{fault}` {why}"));
    }

    fn let_through(&mut self, length: u64) {
        self.rest = length;
        self.rest_passes = true;
    }

    /// Whether the connection ends by a request that it has seen.
    fn has_aborted(&self) -> bool {
        self.is_reset || self.is_over && matches!(self.handling.rule, RequestRule::Abort(_))
    }

    /// Whether what it does depends on what the requests say.
    const fn reads_requests(&self) -> bool {
        !matches!(
            self.handling.protocol,
            ErrorProtocol::Random | ErrorProtocol::None
        )
    }

    /// Whether a request is one that is looked for.
    fn selects(&self, text: &str) -> bool {
        let selection = self.selection.as_ref();
        selection.is_none_or(|selection| selection.is_match(text.trim_start().as_bytes()))
    }

    fn request(&mut self, length: u64, answer: RequestFailure, text: &str) {
        if !self.selects(text) {
            self.let_through(length);
            return;
        }
        if self.claims() {
            self.shared.counters.hit();
            self.notes.note(self.selected, answer.status());
            if self.handling.protocol == ErrorProtocol::None {
                // The server, which has not seen the request, is not to blame: it gets an orderly end.
                let end = StreamEnd::Abort(CloseMode::Rst);
                self.ready.push_back(Pop::End(end, self.at));
                self.buffer.clear();
                self.is_over = true;
                self.is_reset = true;
                return;
            }
            if let Some(client) = &mut self.postgres {
                client.failed(&answer);
            }
            self.answer(length, answer);
            return;
        }
        self.is_over = true;
        if matches!(self.handling.rule, RequestRule::Abort(_)) {
            self.shared.counters.hit();
            self.notes.note(self.selected, None);
            self.let_through(length);
        }
    }

    /// Answers a request of which so many bytes do not go to the server.
    fn answer(&mut self, length: u64, answer: RequestFailure) {
        self.rest = length;
        self.rest_passes = false;
        match answer {
            RequestFailure::Reply(reply) => self.reply = Some(reply.into()),
            RequestFailure::Instead(other) => self.pass(BytesMut::from(&other[..])),
            RequestFailure::Last(reply) => {
                self.ready.push_back(Pop::Reply(reply.into()));
                self.ready.push_back(Pop::End(StreamEnd::Fin, self.at));
                self.has_ended = true;
            }
        }
    }
}

/// What carries a handling out on what the server answers.
pub(super) fn answers(handling: &Handling) -> Option<Box<dyn Stage>> {
    if !handling.reads_answers() {
        return None;
    }
    Some(Box::new(Answers::new(handling.postgres()?)))
}

/// What is known of a client that speaks to a `PostgreSQL` server.
fn client(handling: &Handling) -> Option<Client> {
    let error = handling
        .postgres()
        .filter(|_| handling.protocol == ErrorProtocol::Postgres)?;
    Some(Client::new(error, handling.query.is_some()))
}

impl Stage for RequestStage {
    fn room(&self, _now: Instant) -> usize {
        if self.ready.len() > 64 { 0 } else { ROOM }
    }

    fn push(&mut self, chunk: Chunk) {
        self.at = chunk.at;
        self.arrived += chunk.data.len() as u64;
        self.buffer.extend_from_slice(&chunk.data);
        self.look();
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
        let data = self.buffer.split();
        if self.has_ended {
            return;
        }
        // Half a request is the server's to judge.
        self.pass(data);
        self.ready.push_back(Pop::End(end, at));
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.ready.pop_front().unwrap_or(Pop::Wait(None))
    }

    fn update(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(handling) = fault.handling() {
            self.selection = handling.selection();
            self.postgres = match (self.postgres.take(), client(&handling)) {
                (Some(known), Some(changed)) => Some(known.with_error_of(changed)),
                (_, client) => client,
            };
            self.handling = handling;
            self.is_over &= matches!(self.handling.rule, RequestRule::Abort(_));
        }
    }

    fn take(mut self: Box<Self>) -> Rest {
        let mut rest = Rest::default();
        for pop in std::mem::take(&mut self.ready) {
            match pop {
                Pop::Chunk(chunk) => rest.chunks.push_back(chunk),
                Pop::End(end, at) => rest.end = Some((end, at)),
                Pop::Reply(_) | Pop::Last(_) | Pop::Now(_) | Pop::Wait(_) => {}
            }
        }
        if !self.buffer.is_empty() {
            rest.chunks
                .push_back(Chunk::new(self.buffer.freeze(), self.at));
        }
        rest
    }

    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.buffer.is_empty()
    }

    fn bytes(&self) -> usize {
        let ready = self.ready.iter().map(|pop| match pop {
            Pop::Chunk(chunk) => chunk.data.len(),
            _ => 0,
        });
        self.buffer.len() + ready.sum::<usize>()
    }
}
