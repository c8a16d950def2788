//! `substitute`: a regular expression over a stream, whatever chunks it comes in.
//!
//! Bytes go on at once unless they may be the beginning of a match. That is decided exactly: a lazy DFA of
//! the expression, started at each of the last bytes, says whether more bytes could still lead to a match.

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use regex::bytes::Regex;
use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::{Anchored, Input};

use super::prelude::*;

attributes! {
    /// Replaces what a regular expression matches, across chunk borders.
    Substitute {
        /// The expression (the `regex` crate's syntax, on bytes).
        regex: String,
        /// What is put in its place; `$1` and `$name` stand for groups.
        replacement: String,
        /// Milliseconds that the beginning of a possible match is held back; 0 means 50.
        #[serde(skip_serializing_if = "is_default")]
        max_wait: i64,
    }
}

impl StreamFault for Substitute {
    fn help(&self) -> FaultHelp {
        FaultHelp {
            attributes: "`regex`, `replacement` (`$1`), `max_wait` ms",
            tcp: Some("across chunk borders, see below"),
            udp: Some("in each datagram"),
        }
    }

    fn of_rule(rule: &rule::Fault) -> Result<Option<Self>> {
        let rule::Fault::Substitute(rule) = rule else {
            return Ok(None);
        };
        Ok(Some(Self {
            regex: rule.regex.clone(),
            replacement: rule.replacement.clone(),
            max_wait: 0,
        }))
    }

    fn check(&self) -> Result<(), String> {
        Regex::new(&self.regex)
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    fn keeps_length(&self) -> bool {
        false
    }

    fn stage(&self, place: &StageContext) -> Option<Box<dyn Stage>> {
        Some(Box::new(SubstituteStage {
            replacer: Replacer::new(self)?,
            max_wait: max_wait(self),
            held: BytesMut::new(),
            held_at: place.now,
            fresh: false,
            is_datagram: place.is_datagram,
            datagrams: ChunkQueue::default(),
            end: None,
            shared: Arc::clone(&place.shared),
        }))
    }
}

/// How far from the end of the known bytes a match may begin and still be waited for.
const WINDOW: usize = 4096;
/// How long the beginning of a possible match waits when the toxic does not say, in milliseconds.
const DEFAULT_WAIT_MS: i64 = 50;

/// An expression with what finds its matches and what foresees them.
pub(crate) struct Replacer {
    regex: Regex,
    replacement: Vec<u8>,
    /// None where the expression is too large for a DFA: then matches across chunk borders are missed.
    automaton: Option<(DFA, Cache)>,
}

impl Replacer {
    /// None for an invalid expression, which the check of the attributes has refused before.
    pub(crate) fn new(attributes: &Substitute) -> Option<Self> {
        let regex = Regex::new(&attributes.regex).ok()?;
        let dfa = DFA::builder()
            .configure(
                DFA::config()
                    .unicode_word_boundary(true)
                    .skip_cache_capacity_check(true),
            )
            .syntax(regex_automata::util::syntax::Config::new().utf8(false))
            .thompson(regex_automata::nfa::thompson::Config::new().utf8(false))
            .build(&attributes.regex);
        let automaton = dfa.ok().map(|dfa| {
            let cache = dfa.create_cache();
            (dfa, cache)
        });
        Some(Self {
            regex,
            replacement: attributes.replacement.clone().into_bytes(),
            automaton,
        })
    }

    /// Replaces what matches in `data`, up to the first byte that more bytes might make part of a match
    /// (the end with `is_final`): how many bytes are done, and what they became.
    pub(crate) fn replace(&mut self, data: &[u8], is_final: bool) -> (usize, BytesMut, bool) {
        let mut output = BytesMut::with_capacity(data.len());
        let mut done = 0;
        let mut found = false;
        loop {
            let open = if is_final {
                data.len()
            } else {
                self.open_match(data, done)
            };
            let next = self.regex.captures_at(data, done);
            let next =
                next.and_then(|captures| captures.get(0).map(|whole| (whole.range(), captures)));
            // An empty match replaces nothing here: there would be one between any two bytes.
            let Some((range, captures)) =
                next.filter(|(range, _)| range.start < open && !range.is_empty())
            else {
                output.extend_from_slice(&data[done..open]);
                return (open, output, found);
            };
            output.extend_from_slice(&data[done..range.start]);
            let mut expanded = Vec::new();
            captures.expand(&self.replacement, &mut expanded);
            output.extend_from_slice(&expanded);
            done = range.end;
            found = true;
        }
    }

    /// The first position from `from` on at which a match may begin that the bytes known so far don't decide.
    fn open_match(&mut self, data: &[u8], from: usize) -> usize {
        let Some((dfa, cache)) = &mut self.automaton else {
            return data.len();
        };
        let first = from.max(data.len().saturating_sub(WINDOW));
        (first..data.len())
            .find(|start| is_open(dfa, cache, data, *start).unwrap_or(false))
            .unwrap_or(data.len())
    }
}

/// Whether a match from `start` is still possible or could still grow; None when the DFA gives up.
fn is_open(dfa: &DFA, cache: &mut Cache, data: &[u8], start: usize) -> Option<bool> {
    let input = Input::new(data).range(start..).anchored(Anchored::Yes);
    let mut state = dfa.start_state_forward(cache, &input).ok()?;
    for byte in &data[start..] {
        state = dfa.next_state(cache, state, *byte).ok()?;
        if state.is_dead() || state.is_quit() {
            return Some(false);
        }
    }
    can_go_on(dfa, cache, state)
}

/// Whether a byte after this state leads on. A match is reported one byte late, so a match state counts
/// only if a further byte leads on from it as well.
fn can_go_on(dfa: &DFA, cache: &mut Cache, state: LazyStateID) -> Option<bool> {
    let mut seen = HashSet::new();
    for byte in 0..=u8::MAX {
        let next = dfa.next_state(cache, state, byte).ok()?;
        if next.is_dead() || next.is_quit() || !seen.insert(next) {
            continue;
        }
        if !next.is_match() {
            return Some(true);
        }
        for byte in 0..=u8::MAX {
            let after = dfa.next_state(cache, next, byte).ok()?;
            if !after.is_dead() && !after.is_quit() {
                return Some(true);
            }
        }
    }
    Some(false)
}

/// Replaces matches in one direction of a connection.
struct SubstituteStage {
    replacer: Replacer,
    max_wait: Duration,
    held: BytesMut,
    /// When the oldest of the held bytes arrived.
    held_at: Instant,
    /// The held bytes have not been looked at since the last came.
    fresh: bool,
    /// Each chunk is looked at for itself.
    is_datagram: bool,
    /// Datagrams that have been looked at.
    datagrams: ChunkQueue,
    end: Option<(StreamEnd, Instant)>,
    shared: Arc<ToxicShared>,
}

impl SubstituteStage {
    fn replace(&mut self, is_final: bool, now: Instant) -> Option<Bytes> {
        let (done, output, found) = self.replacer.replace(&self.held, is_final);
        let _replaced = self.held.split_to(done);
        self.held_at = now;
        if found {
            self.shared.counters.hit();
        }
        (!output.is_empty()).then(|| output.freeze())
    }
}

fn max_wait(attributes: &Substitute) -> Duration {
    milliseconds(if attributes.max_wait > 0 {
        attributes.max_wait
    } else {
        DEFAULT_WAIT_MS
    })
}

impl Stage for SubstituteStage {
    fn room(&self, _now: Instant) -> usize {
        if self.end.is_some() || self.fresh {
            0
        } else {
            self.datagrams.room(ROOM)
        }
    }

    fn push(&mut self, chunk: Chunk) {
        if self.is_datagram {
            let (_, output, found) = self.replacer.replace(&chunk.data, true);
            if found {
                self.shared.counters.hit();
            }
            self.datagrams.push(Chunk {
                data: if found { output.freeze() } else { chunk.data },
                ..chunk
            });
            return;
        }
        if self.held.is_empty() {
            self.held_at = chunk.at;
        }
        self.held.extend_from_slice(&chunk.data);
        self.fresh = true;
    }

    fn end(&mut self, end: StreamEnd, at: Instant) {
        self.end = Some((end, at));
    }

    fn pop(&mut self, now: Instant) -> Pop {
        if let Some(chunk) = self.datagrams.pop() {
            return Pop::Chunk(chunk);
        }
        let due = self.held_at + self.max_wait;
        let is_final = self.end.is_some() || due <= now || self.held.len() > ROOM * 2;
        if !self.held.is_empty() && (self.fresh || is_final) {
            self.fresh = false;
            if let Some(data) = self.replace(is_final, now) {
                return Pop::Chunk(Chunk::new(data, now));
            }
        }
        match self.end.take() {
            Some((end, at)) => Pop::End(end, at),
            None => Pop::Wait((!self.held.is_empty()).then_some(self.held_at + self.max_wait)),
        }
    }

    fn update(&mut self, fault: &dyn StreamFault, _now: Instant) {
        if let Some(attributes) = fault.of::<Substitute>() {
            self.max_wait = max_wait(attributes);
            self.fresh = !self.held.is_empty();
            if let Some(replacer) = Replacer::new(attributes) {
                self.replacer = replacer;
            }
        }
    }

    fn take(self: Box<Self>) -> Rest {
        let mut queue = self.datagrams;
        if !self.held.is_empty() {
            queue.push(Chunk::new(self.held.freeze(), self.held_at));
        }
        queue.end = self.end;
        queue.into_rest()
    }

    fn is_empty(&self) -> bool {
        self.held.is_empty() && self.end.is_none() && self.datagrams.is_empty()
    }

    fn bytes(&self) -> usize {
        self.held.len() + self.datagrams.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(regex: &str, replacement: &str, chunks: &[&str]) -> (Vec<String>, String) {
        let attributes = Substitute {
            regex: regex.to_owned(),
            replacement: replacement.to_owned(),
            max_wait: 0,
        };
        let mut replacer = Replacer::new(&attributes).expect("a valid expression");
        let mut held = Vec::new();
        let mut pieces = Vec::new();
        for chunk in chunks {
            held.extend_from_slice(chunk.as_bytes());
            let (done, output, _) = replacer.replace(&held, false);
            held.drain(..done);
            pieces.push(String::from_utf8_lossy(&output).into_owned());
        }
        let (_, last, _) = replacer.replace(&held, true);
        (pieces, String::from_utf8_lossy(&last).into_owned())
    }

    #[test]
    fn only_the_beginning_of_a_match_is_held() {
        let (pieces, last) = through("secret", "XXX", &["a sec", "ret b", " nothing", " s"]);
        assert_eq!(pieces, ["a ", "XXX b", " nothing", " "]);
        assert_eq!(last, "s");
    }

    #[test]
    fn a_whole_match_at_the_end_does_not_wait() {
        let (pieces, last) = through("secret", "XXX", &["secret"]);
        assert_eq!(pieces, ["XXX"]);
        assert_eq!(last, "");
    }

    #[test]
    fn a_match_that_could_grow_waits() {
        let (pieces, last) = through("[0-9]+", "<$0>", &["a1", "2b", "3"]);
        assert_eq!(pieces, ["a", "<12>b", ""]);
        assert_eq!(last, "<3>");
    }

    #[test]
    fn an_earlier_possible_match_wins_over_a_later_one() {
        let (pieces, last) = through("abcd|c", "_", &["abc", "d c", "x"]);
        assert_eq!(pieces, ["", "_ _", "x"]);
        assert_eq!(last, "");
    }

    #[test]
    fn cutting_the_input_changes_nothing() {
        let text = "GET /a1b22 HTTP/1.1\r\nHost: secret.secrets\r\n\r\nsecsecret";
        let whole = Regex::new("secrets?|[0-9]+")
            .expect("valid")
            .replace_all(text.as_bytes(), &b"<$0>"[..]);
        for size in 1..text.len() {
            let chunks: Vec<&str> = text
                .as_bytes()
                .chunks(size)
                .map(|c| std::str::from_utf8(c).expect("ASCII"))
                .collect();
            let (pieces, last) = through("secrets?|[0-9]+", "<$0>", &chunks);
            assert_eq!(
                (pieces.concat() + &last).as_bytes(),
                &*whole,
                "cut by {size}"
            );
        }
    }

    #[test]
    fn the_beginning_of_a_match_waits_no_longer_than_it_may() {
        let attributes = serde_json::json!({ "regex": "secret", "replacement": "-" });
        let mut bench = crate::relay::stage::testing::Bench::new("substitute", &attributes);
        bench.push(0, "a sec");
        assert_eq!(bench.pop(0), "a  @50");
        assert_eq!(bench.pop(50), "sec");
        bench.push(60, "a sec");
        assert_eq!(bench.pop(60), "a  @110");
        bench.push(70, "ret");
        assert_eq!(bench.pop(70), "-");
        assert_eq!(bench.hits(), 1);
    }
}
