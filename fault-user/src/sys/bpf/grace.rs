//! Waits for running programs.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::sys::bpf::link::{bpf, own};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// The start of `union bpf_attr` for creating a map.
#[repr(C)]
struct Create {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
    inner: u32,
}

/// The start of `union bpf_attr` for changing an entry.
#[repr(C)]
struct Update {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Waits until all programs that are running now have ended. An update of a map of maps guarantees this
/// (`maybe_wait_bpf_programs`). membarrier(2) does too, but not on kernels with `nohz_full`.
///
/// # Errors
/// The maps can't be created: no `CAP_BPF`.
pub fn wait_for_programs() -> Result<(), Errno> {
    let inner = create(BPF_MAP_TYPE_ARRAY, 0)?;
    let inner = inner.as_raw_fd().cast_unsigned();
    let outer = create(BPF_MAP_TYPE_ARRAY_OF_MAPS, inner)?;
    let key = 0_u32;
    let update = Update {
        map: outer.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: std::ptr::from_ref(&inner).addr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &update).map(drop)
}

fn create(kind: u32, inner: u32) -> Result<OwnedFd, Errno> {
    let map = bpf(
        BPF_MAP_CREATE,
        &Create {
            kind,
            key_bytes: 4,
            value_bytes: 4,
            entries: 1,
            flags: 0,
            inner,
        },
    )?;
    own(map)
}

#[cfg(test)]
mod tests {
    #[test]
    fn running_programs_are_waited_for() {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        super::wait_for_programs().unwrap();
    }
}
