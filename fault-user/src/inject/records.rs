//! Records that the programs put into a ring buffer.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use aya::{Ebpf, Pod};
use fault_common::abi::{Event, Trace};

/// A ring buffer of records of one type.
pub struct Records<T> {
    ring: RingBuf<MapData>,
    kind: PhantomData<T>,
}

/// The decisions that fired.
pub type DecisionEvents = Records<Event>;
/// What was done with packets that reached a rule's port.
pub type Traces = Records<Trace>;

impl<T: Pod> Records<T> {
    /// Takes the map of this name.
    pub(super) fn take(ebpf: &mut Ebpf, name: &str) -> Result<Self> {
        let map = ebpf
            .take_map(name)
            .with_context(|| format!("the eBPF object has no map {name}"))?;
        Ok(Self {
            ring: RingBuf::try_from(map)?,
            kind: PhantomData,
        })
    }

    /// Appends the records that have arrived to `records`.
    pub fn drain(&mut self, records: &mut Vec<T>) {
        while let Some(item) = self.ring.next() {
            records.extend(read::<T>(&item));
        }
    }

    /// Becomes readable when a record arrives.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// `None` for bytes of another size.
fn read<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: there are as many bytes as the type has, and any bit pattern is a value of it.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
