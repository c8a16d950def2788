//! The stage of `error`, `transient` and `abort`: what the relay says in the server's name, or hides of what the server
//! says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::fault::{CloseMode, Fault, Protocol};
use super::protocol::{self, Frame, Wording};
use super::random::Draws;
use super::stage::{Chunk, End, Place, Pop, ROOM, Rest, Stage};
use super::toxic::Shared;
use super::trouble::Trouble;

/// What is done with requests.
pub(crate) struct Handling {
    /// The fault's name.
    pub(crate) fault: &'static str,
    /// Which requests, and what becomes of them.
    pub(crate) rule: Rule,
    /// Their protocol.
    pub(crate) protocol: Protocol,
    /// What is answered.
    pub(crate) wording: Wording,
}

/// What is done with a request.
pub(crate) enum Rule {
    /// Each is answered.
    Always,
    /// The first so many are answered, by all connections together or by each.
    First { count: u64, per_connection: bool },
    /// The first reaches the server, its answer does not reach the client.
    Abort(CloseMode),
}

/// Looks at what a client sends.
#[expect(
    clippy::struct_excessive_bools,
    reason = "what is done with the rest of a request does not depend on how the connection ends"
)]
pub(crate) struct RequestStage {
    handling: Handling,
    draws: Draws,
    answered: u64,
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
    /// The connection is encrypted: it passes.
    is_encrypted: bool,
    ready: VecDeque<Pop>,
    at: Instant,
    shared: Arc<Shared>,
    trouble: Arc<Trouble>,
}

impl RequestStage {
    /// The stage that handles requests in this way.
    pub(super) fn new(handling: Handling, place: &Place) -> Self {
        Self {
            handling,
            draws: Draws::new(place.key),
            answered: 0,
            buffer: BytesMut::new(),
            rest: 0,
            rest_passes: false,
            reply: None,
            is_over: false,
            is_reset: false,
            is_encrypted: false,
            ready: VecDeque::new(),
            at: place.now,
            shared: Arc::clone(&place.shared),
            trouble: Arc::clone(&place.trouble),
        }
    }

    /// Whether the next request is answered here.
    fn claims(&mut self) -> bool {
        match self.handling.rule {
            Rule::Always => true,
            Rule::Abort(_) => false,
            Rule::First {
                count,
                per_connection: true,
            } => {
                self.answered += 1;
                self.answered <= count
            }
            Rule::First {
                count,
                per_connection: false,
            } => self.shared.requests.fetch_add(1, Ordering::Relaxed) < count,
        }
    }

    /// Whether every request that is to be answered has been, by this connection or others.
    fn is_used_up(&self) -> bool {
        match self.handling.rule {
            Rule::Always | Rule::Abort(_) => false,
            Rule::First {
                count,
                per_connection: true,
            } => self.answered >= count,
            Rule::First {
                count,
                per_connection: false,
            } => self.shared.requests.load(Ordering::Relaxed) >= count,
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
            && let Rule::Abort(mode) = self.handling.rule
        {
            self.ready.push_back(Pop::End(End::Abort(mode), self.at));
        }
    }

    fn look(&mut self) {
        while !self.buffer.is_empty() {
            if self.rest > 0 {
                self.continue_rest();
                continue;
            }
            if self.is_encrypted || self.is_over || self.is_used_up() {
                let data = self.buffer.split();
                // After the request that is aborted nothing more goes to the server.
                if self.is_encrypted || !self.has_aborted() {
                    self.pass(data);
                }
                return;
            }
            if self.reads_requests() && protocol::is_tls(&self.buffer) {
                self.is_encrypted = true;
                self.trouble.tell(
                    "tls",
                    format_args!(
                        "`{}` can't read TLS: encrypted connections pass; use it behind what \
                         decrypts them, or a fault that does not look at requests",
                        self.handling.fault
                    ),
                );
                continue;
            }
            let protocol = match self.handling.protocol {
                Protocol::Auto => protocol::guess(&self.buffer),
                protocol => protocol,
            };
            match protocol::frame(
                protocol,
                &self.buffer,
                &self.handling.wording,
                &mut self.draws,
            ) {
                Frame::Partial => return,
                Frame::Through { length } => {
                    self.rest = length;
                    self.rest_passes = true;
                }
                Frame::Request { length, reply } => self.request(length, reply),
            }
        }
    }

    /// Whether the connection ends by a request that it has seen.
    fn has_aborted(&self) -> bool {
        self.is_reset || self.is_over && matches!(self.handling.rule, Rule::Abort(_))
    }

    /// Whether what it does depends on what the requests say.
    const fn reads_requests(&self) -> bool {
        !matches!(self.handling.protocol, Protocol::Random | Protocol::None)
    }

    fn request(&mut self, length: u64, reply: Vec<u8>) {
        if self.claims() {
            self.shared.counters.hit();
            if self.handling.protocol == Protocol::None {
                // The server, which has not seen the request, is not to blame: it gets an orderly end.
                let end = End::Abort(CloseMode::Rst);
                self.ready.push_back(Pop::End(end, self.at));
                self.buffer.clear();
                self.is_over = true;
                self.is_reset = true;
                return;
            }
            self.rest = length;
            self.rest_passes = false;
            self.reply = Some(reply.into());
            return;
        }
        self.is_over = true;
        if matches!(self.handling.rule, Rule::Abort(_)) {
            self.shared.counters.hit();
            self.rest = length;
            self.rest_passes = true;
        }
    }
}

impl Stage for RequestStage {
    fn room(&self, _now: Instant) -> usize {
        if self.ready.len() > 64 { 0 } else { ROOM }
    }

    fn push(&mut self, chunk: Chunk) {
        self.at = chunk.at;
        self.buffer.extend_from_slice(&chunk.data);
        self.look();
    }

    fn end(&mut self, end: End, at: Instant) {
        let data = self.buffer.split();
        // Half a request is the server's to judge.
        self.pass(data);
        self.ready.push_back(Pop::End(end, at));
    }

    fn pop(&mut self, _now: Instant) -> Pop {
        self.ready.pop_front().unwrap_or(Pop::Wait(None))
    }

    fn update(&mut self, fault: &Fault, _now: Instant) {
        if let Some(handling) = fault.handling() {
            self.handling = handling;
            self.is_over &= matches!(self.handling.rule, Rule::Abort(_));
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
