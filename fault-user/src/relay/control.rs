//! What others see of a connection, and how they have it end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;

use super::attributes::CloseMode;
use super::toxic::{Toxic, ToxicSet};

/// How long a connection that is to end in order is left to peers that are silent: both may still send.
pub(crate) const SILENCE: Duration = Duration::from_millis(100);

/// How a relay's connections come to their end while what is on its way still arrives.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// When it began.
    pub since: Instant,
    /// When all that is left is reset.
    pub until: Instant,
    /// When those are reset whose peers have both not ended: they may go on talking for ever.
    pub open_until: Instant,
    /// Until when connections that their toxics let nothing pass of are kept: a toxic is to change.
    pub change_until: Instant,
    /// How long bytes may be on their way to the relay.
    pub transit: Duration,
}

impl Drain {
    /// One that begins now and takes so long at most, whatever the peers do. No toxic changes meanwhile.
    #[must_use]
    pub fn within(time: Duration) -> Self {
        let since = Instant::now();
        Self {
            since,
            until: since + time,
            open_until: since + time,
            change_until: since,
            transit: Duration::ZERO,
        }
    }

    /// Until when peers that have been silent from its beginning may still send.
    pub(crate) fn quiet_until(&self) -> Instant {
        self.since + SILENCE + self.transit
    }
}

/// What was lost at the end of relays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Connections that were reset while they were open; with UDP, clients whose datagrams were dropped.
    pub connections: u64,
    /// Bytes of them that were on their way, as far as they are known.
    pub bytes: u64,
}

impl std::iter::Sum for Cut {
    fn sum<I: Iterator<Item = Self>>(cuts: I) -> Self {
        cuts.fold(Self::default(), |sum, cut| Self {
            connections: sum.connections + cut.connections,
            bytes: sum.bytes + cut.bytes,
        })
    }
}

const RUN: u8 = 0;

const CLOSE_FIN: u8 = 1;

const CLOSE_RST: u8 = 2;

/// What others see of a connection and tell it.
#[derive(Debug)]
pub(crate) struct ConnectionControl {
    /// The ordinal in its relay, from 1.
    pub(crate) ordinal: u64,
    pub(crate) client: SocketAddr,
    pub(crate) opened: Instant,
    pub(crate) closed: AtomicBool,
    command: AtomicU8,
    /// The version of the toxics that it acts by.
    seen: AtomicU64,
    /// It is at work this moment.
    is_busy: AtomicBool,
    drain: Mutex<Option<Drain>>,
    waker: AtomicWaker,
}

impl ConnectionControl {
    pub(crate) fn new(ordinal: u64, client: SocketAddr) -> Self {
        Self {
            ordinal,
            client,
            opened: Instant::now(),
            closed: AtomicBool::new(false),
            command: AtomicU8::new(RUN),
            // Before its first look it can't act by anything old.
            seen: AtomicU64::new(u64::MAX),
            is_busy: AtomicBool::new(false),
            drain: Mutex::default(),
            waker: AtomicWaker::new(),
        }
    }

    /// Has the connection closed by its task.
    pub(crate) fn close(&self, mode: CloseMode) {
        let command = match mode {
            CloseMode::Fin => CLOSE_FIN,
            CloseMode::Rst => CLOSE_RST,
        };
        self.command.store(command, Ordering::Release);
        self.waker.wake();
    }

    /// Has the connection end once nothing of it is on its way any more.
    pub(crate) fn drain(&self, drain: Drain) {
        *self.drain.lock().unwrap_or_else(PoisonError::into_inner) = Some(drain);
        self.waker.wake();
    }

    /// Whether and how it is to end.
    pub(crate) fn drains(&self) -> Option<Drain> {
        *self.drain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its task begins or ends a turn. A turn begins with a look at the toxics.
    pub(crate) fn set_busy(&self, is_busy: bool) {
        self.is_busy.store(is_busy, Ordering::SeqCst);
    }

    /// Whether it is in the midst of a turn.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy.load(Ordering::SeqCst)
    }

    /// Has the connection look at the toxics again.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// Declares that it acts by the newest toxics from now on, and returns them with their version. What is
    /// declared is visible before the version is read again: a change either meets the declaration, and
    /// waits for the next one, or is part of this one.
    pub(crate) fn declare(&self, toxics: &ToxicSet) -> (u64, Arc<Vec<Arc<Toxic>>>) {
        loop {
            let (version, newest) = toxics.snapshot();
            self.seen.store(version, Ordering::SeqCst);
            if toxics.version() == version {
                return (version, newest);
            }
        }
    }

    /// Whether it acts by this version or a later one.
    pub(crate) fn acts_by(&self, version: u64) -> bool {
        self.closed.load(Ordering::Acquire) || self.seen.load(Ordering::SeqCst) >= version
    }

    pub(crate) fn commanded(&self) -> Option<CloseMode> {
        match self.command.load(Ordering::Acquire) {
            CLOSE_FIN => Some(CloseMode::Fin),
            CLOSE_RST => Some(CloseMode::Rst),
            _ => None,
        }
    }

    /// Ready when the connection is told to close; wakes for that and for changes of toxics.
    pub(crate) fn poll_told_to_close(&self, context: &Context<'_>) -> Poll<CloseMode> {
        self.waker.register(context.waker());
        self.commanded().map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits until the connection is told to close.
    pub(crate) async fn told_to_close(&self) -> CloseMode {
        std::future::poll_fn(|context| self.poll_told_to_close(context)).await
    }
}
