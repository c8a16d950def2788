//! What the stages of one toxic share over all connections.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How often a toxic has acted.
#[derive(Debug, Default)]
pub struct ToxicCounters {
    /// Connections that it was put on.
    pub connections: AtomicU64,
    /// Chunks, datagrams, requests or ends that it did something to.
    pub hits: AtomicU64,
}

impl ToxicCounters {
    pub(crate) fn hit(&self) {
        self.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts connections that it closed when it was added.
    pub(crate) fn closed(&self, connections: u64) {
        self.connections.fetch_add(connections, Ordering::Relaxed);
        self.hits.fetch_add(connections, Ordering::Relaxed);
    }
}

/// What a toxic has in common over all connections and all its changes.
#[derive(Debug)]
pub(crate) struct ToxicShared {
    pub(crate) counters: ToxicCounters,
    /// When it was added.
    pub(crate) added: Instant,
    /// When the shared link of `bandwidth` is free again.
    pub(crate) link_free_at: Mutex<Instant>,
    /// Bytes that the shared `limit_data` has let through.
    pub(crate) bytes: AtomicU64,
    /// How often those have been used up: each time all connections of then are closed.
    pub(crate) closings: AtomicU64,
    /// Requests that `transient` has answered.
    pub(crate) requests: AtomicU64,
    /// Datagrams of all clients.
    pub(crate) datagrams: AtomicU64,
}

impl Default for ToxicShared {
    fn default() -> Self {
        Self {
            counters: ToxicCounters::default(),
            added: Instant::now(),
            link_free_at: Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
            closings: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            datagrams: AtomicU64::new(0),
        }
    }
}
