//! A BPF array mapped into this process's memory.

use crate::tell::tell;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use anyhow::{Context as _, Result, ensure};
use aya::Pod;
use aya::maps::MapData;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array map created with `BPF_F_MMAPABLE` (Linux 5.5). Thousands of entries are written without system calls.
pub struct MappedArray<T: Pod> {
    base: NonNull<T>,
    entries: usize,
    bytes: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value alone, and moving it moves only the pointer.
unsafe impl<T: Pod + Send> Send for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// Maps an array of `entries` values of `T`.
    ///
    /// # Errors
    /// The map has other values, or can't be mapped.
    pub fn new(map: &MapData, entries: u32) -> Result<Self> {
        // Array maps round the size of values up to eight bytes; other sizes would give wrong offsets.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let info = map.info()?;
        ensure!(
            info.value_size() as usize == size_of::<T>() && info.max_entries() >= entries,
            "the eBPF object's maps are not the ones this binary was built for"
        );
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?
            .context("the page size is unknown")?;
        let length = (entries as usize * size_of::<T>()).next_multiple_of(usize::try_from(page)?);
        let bytes = NonZeroUsize::new(length).context("an array without entries")?;
        let flags = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                bytes,
                flags,
                MapFlags::MAP_SHARED,
                map.fd().as_fd(),
                0,
            )
        }
        .context("mapping a BPF array")?;
        Ok(Self {
            base: base.cast(),
            entries: entries as usize,
            bytes,
        })
    }

    /// Reads one entry.
    ///
    /// # Panics
    /// `index` is not below the number of entries.
    #[must_use]
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.entries, "index {index} of {}", self.entries);
        // SAFETY: within the mapping; volatile because the kernel writes it too.
        unsafe { self.base.add(index).read_volatile() }
    }

    /// Writes one entry. Programs may read it at the same time: change entries in use only by single words.
    ///
    /// # Panics
    /// `index` is not below the number of entries.
    pub fn set(&mut self, index: usize, value: T) {
        assert!(index < self.entries, "index {index} of {}", self.entries);
        // SAFETY: within the mapping; volatile because the kernel reads it too.
        unsafe { self.base.add(index).write_volatile(value) };
    }
}

impl<T: Pod> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, which nothing refers to any more.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.bytes.get()) } {
            tell!("fault: unmapping a BPF array: {error}");
        }
    }
}
