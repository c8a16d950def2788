//! Connections that are being opened while their clients' SYNs are held.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::control::ConnectionControl;
use super::packets::Pair;

/// Connections that are being opened, by their ends.
#[derive(Debug, Default)]
pub(crate) struct Openings {
    pub(crate) held: HashMap<Pair, Opening>,
    accepted: LastAccepted,
}

/// A connection whose SYN is held, or was let in and is not accepted yet.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Its initial sequence number.
    sequence: u32,
    /// The task that has the server takes the client. Dropping the sender ends it.
    client: oneshot::Sender<AcceptedClient>,
}

/// Initial sequence numbers of the connections that were accepted last: a SYN that was sent a second time may be told of
/// after the connection was accepted.
#[derive(Debug, Default)]
struct LastAccepted {
    recent: HashMap<Pair, u32>,
    /// Those before.
    older: HashMap<Pair, u32>,
}

impl LastAccepted {
    /// As many as are accepted at most, and many more, before what was told earlier is read.
    const RECENT: usize = 8192;

    fn note(&mut self, pair: Pair, sequence: u32) {
        if self.recent.len() >= Self::RECENT {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(pair, sequence);
    }

    fn has(&self, pair: Pair, sequence: u32) -> bool {
        [&self.recent, &self.older]
            .iter()
            .any(|some| some.get(&pair) == Some(&sequence))
    }
}

impl Openings {
    /// Begins one unless it has begun already, or is over; another of the same ends is given up. Who is to take the client.
    pub(crate) fn begin(
        &mut self,
        pair: Pair,
        sequence: u32,
    ) -> Option<oneshot::Receiver<AcceptedClient>> {
        let is_known = |opening: &Opening| opening.sequence == sequence;
        if self.held.get(&pair).is_some_and(is_known) || self.accepted.has(pair, sequence) {
            return None;
        }
        let (sender, client) = oneshot::channel();
        let opening = Opening {
            sequence,
            client: sender,
        };
        self.held.insert(pair, opening);
        Some(client)
    }

    /// Takes the one that has been accepted.
    pub(crate) fn accept(&mut self, pair: Pair) -> Option<oneshot::Sender<AcceptedClient>> {
        let opening = self.held.remove(&pair)?;
        self.accepted.note(pair, opening.sequence);
        Some(opening.client)
    }

    /// Forgets one, but not a later one of the same ends.
    pub(crate) fn end(&mut self, pair: Pair, sequence: u32) {
        if let Entry::Occupied(opening) = self.held.entry(pair)
            && opening.get().sequence == sequence
        {
            opening.remove();
        }
    }
}

/// An accepted connection.
pub(crate) type AcceptedClient = (std::net::TcpStream, Arc<ConnectionControl>);
