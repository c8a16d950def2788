//! Events of decisions that fired.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use fault_common::abi::Event;

/// The ring buffer of events.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let map = ebpf
            .take_map("EVENTS")
            .context("the eBPF object has no map EVENTS")?;
        Ok(Self {
            ring: RingBuf::try_from(map)?,
        })
    }

    /// Appends the events that have arrived to `events`.
    pub fn drain(&mut self, events: &mut Vec<Event>) {
        while let Some(item) = self.ring.next() {
            if let Some(event) = read(&item) {
                events.push(event);
            }
        }
    }

    /// Becomes readable when an event arrives.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

fn read(bytes: &[u8]) -> Option<Event> {
    let bytes: &[u8; size_of::<Event>()] = bytes.try_into().ok()?;
    // SAFETY: the programs write nothing but events, and every bit pattern is one.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}
