//! What the connections of a relay share.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::libc;
use tokio::sync::Notify;

use super::attributes::CloseMode;
use super::control::{ConnectionControl, Cut, Drain};
use super::openings::Openings;
use super::toxic::ToxicSet;
use super::trouble::Trouble;
use super::upstream::{Upstream, UpstreamTarget};

/// What a relay has carried.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// Bytes read from the source, by direction.
    pub(crate) received: [AtomicU64; 2],
    /// Bytes written to the sink, by direction.
    pub(crate) sent: [AtomicU64; 2],
    pub(crate) accepted: AtomicU64,
    /// Connections that could not be opened, by the reason.
    pub(crate) failures: Mutex<BTreeMap<String, u64>>,
    /// Connections that were reset at the end, and the bytes that were lost by that.
    cut: [AtomicU64; 2],
}

impl Stats {
    /// What was lost at the end.
    pub(crate) fn cut(&self) -> Cut {
        let [connections, bytes] = self
            .cut
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed));
        Cut { connections, bytes }
    }
}

/// What the relay itself lacked, and what to do about it.
fn lack(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            Some("the relay has too many open files: raise the hard limit (ulimit -Hn)")
        }
        Some(libc::EADDRNOTAVAIL) => {
            Some("the relay has no local port left: widen net.ipv4.ip_local_port_range")
        }
        _ => None,
    }
}

/// What the connections of a relay share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) toxics: Arc<ToxicSet>,
    /// Everything that is drawn here is drawn under this key.
    pub(crate) key: u64,
    pub(crate) stats: Arc<Stats>,
    pub(crate) upstream: Upstream,
    /// Counts accepted connections over restarts, so that their ordinals go on.
    pub(crate) ordinals: Arc<AtomicU64>,
    pub(crate) open: Mutex<BTreeMap<u64, Arc<ConnectionControl>>>,
    /// Those that are being opened while their clients' SYNs are held.
    pub(crate) openings: Mutex<Openings>,
    /// How connections end that are opened from now on, if the relay comes to its end.
    pub(crate) drain: Mutex<Option<Drain>>,
    /// Tells that a connection was opened or closed.
    pub(crate) changed: Arc<Notify>,
    pub(crate) trouble: Arc<Trouble>,
}

impl Inner {
    /// Has every connection look at its stages.
    pub(crate) fn wake_all(&self) {
        for control in self.controls() {
            control.wake();
        }
    }

    /// Counts a connection that could not be opened, and tells at once what the relay itself lacked.
    pub(crate) fn count_failure(&self, error: &io::Error) {
        let reason = match (lack(error), error.raw_os_error()) {
            (Some(lack), _) => {
                self.trouble.tell(lack, lack);
                lack.to_owned()
            }
            (None, Some(number)) => Errno::from_raw(number).desc().to_lowercase(),
            (None, None) => error.to_string(),
        };
        let failures = self.stats.failures.lock();
        *failures
            .unwrap_or_else(PoisonError::into_inner)
            .entry(reason)
            .or_default() += 1;
    }

    /// The server of a connection could not be reached: counted, and told of a proxy whose clients do
    /// not see why.
    pub(crate) fn failed(&self, error: &io::Error) {
        self.count_failure(error);
        match &self.upstream.target {
            UpstreamTarget::Name(_) if lack(error).is_some() => {}
            UpstreamTarget::Name(name) => {
                let what = format_args!("can't reach its upstream {name}: {error}");
                self.trouble.tell("upstream", what);
            }
            UpstreamTarget::Hook(_) | UpstreamTarget::OriginalDestination => {
                log::info!("upstream: {error}");
            }
        }
    }

    /// Counts a connection that is reset at the end.
    pub(crate) fn count_cut(&self, bytes: usize) {
        let [connections, lost] = &self.stats.cut;
        connections.fetch_add(1, Ordering::Relaxed);
        lost.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Has every connection end once nothing of it is on its way any more.
    pub(crate) fn drain(&self, drain: Drain) {
        *self.drain.lock().unwrap_or_else(PoisonError::into_inner) = Some(drain);
        for control in self.controls() {
            control.drain(drain);
        }
    }

    pub(crate) fn controls(&self) -> Vec<Arc<ConnectionControl>> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    pub(crate) fn register(&self, client: SocketAddr) -> Arc<ConnectionControl> {
        let ordinal = self.ordinals.fetch_add(1, Ordering::Relaxed) + 1;
        let control = Arc::new(ConnectionControl::new(ordinal, client));
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.insert(ordinal, Arc::clone(&control));
        }
        // After it can be found: a drain that begins meanwhile reaches it one way or the other.
        let drain = *self.drain.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(drain) = drain {
            control.drain(drain);
        }
        self.stats.accepted.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_waiters();
        control
    }

    pub(crate) fn unregister(&self, control: &ConnectionControl) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&control.ordinal);
        control.closed.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(crate) fn openings(&self) -> MutexGuard<'_, Openings> {
        self.openings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes which clients' SYNs are held.
    pub(crate) fn change_openings<T>(&self, change: impl FnOnce(&mut Openings) -> T) -> T {
        let changed = change(&mut self.openings());
        self.changed.notify_waiters();
        changed
    }

    /// Whether clients wait for the relay to reach their servers.
    pub(crate) fn holds_clients(&self) -> bool {
        !self.openings().held.is_empty()
    }

    /// Closes up to `count` connections, the oldest first, and waits until it has happened.
    pub(crate) async fn close(&self, count: usize, mode: CloseMode) -> usize {
        let closing: Vec<_> = self.controls().into_iter().take(count).collect();
        for control in &closing {
            control.close(mode);
        }
        self.wait_until(|| {
            closing
                .iter()
                .all(|control| control.closed.load(Ordering::Acquire))
        })
        .await;
        closing.len()
    }

    /// Waits until a condition on the connections holds.
    pub(crate) async fn wait_until(&self, mut holds: impl FnMut() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Only a waiter that is enabled before the look can't miss a change after it.
            changed.as_mut().enable();
            if holds() {
                return;
            }
            changed.await;
        }
    }
}
