//! The memory in which all relays of this process hold what is on its way.
//!
//! Every buffer and every piece of one is counted. While they are more than [`LIMIT`], a direction of a
//! connection that holds something reads nothing more, so that its sender feels it.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What all connections together may hold, in bytes. Beyond it each may still hold one read.
const LIMIT: usize = 512 << 20;
/// What a piece costs beside its bytes: its place in a queue.
pub(crate) const PIECE_COST: usize = 96;

static HELD: AtomicUsize = AtomicUsize::new(0);

/// Whether a connection that holds something must not read more.
pub(crate) fn is_used_up() -> bool {
    HELD.load(Ordering::Relaxed) >= LIMIT
}

/// Memory that is counted for as long as this lives.
#[derive(Debug)]
pub(crate) struct Counted {
    bytes: usize,
}

impl Counted {
    pub(crate) fn new(bytes: usize) -> Self {
        HELD.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        HELD.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The pieces that a stage holds.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    count: usize,
}

impl Pieces {
    pub(crate) fn add(&mut self) {
        self.count += 1;
        HELD.fetch_add(PIECE_COST, Ordering::Relaxed);
    }

    pub(crate) fn remove(&mut self) {
        self.count -= 1;
        HELD.fetch_sub(PIECE_COST, Ordering::Relaxed);
    }

    /// Bytes that they cost.
    pub(crate) const fn cost(&self) -> usize {
        self.count * PIECE_COST
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        HELD.fetch_sub(self.cost(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_not_counted_any_more() {
        // Other tests of this process count as well: only what is far above them can be told.
        let large = Counted::new(LIMIT);
        assert!(is_used_up());
        drop(large);
        let mut pieces = Pieces::default();
        for _ in 0..LIMIT.div_ceil(PIECE_COST) {
            pieces.add();
        }
        pieces.remove();
        pieces.add();
        assert!(is_used_up());
        drop(pieces);
        assert!(!is_used_up());
    }
}
