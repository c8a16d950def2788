//! The table of datagrams that come in fragments: see [`fault_common::fragment`].

use aya_ebpf::helpers::bpf_ktime_get_ns;
use fault_common::fragment::{Place, datagram_of, keep, meet};

use crate::maps::{DATAGRAMS, SCRATCH};

/// Looks the fragment in the scratch up, and gives its [`Place`]. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_meet_fragment() -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return Place::Orphan as u32;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let key = datagram_of(&scratch.packet);
    // SAFETY: another CPU may write to the entry: then a fragment came at the same time as its first one, and what is read
    // of that one may be incomplete, so that a rule does nothing to this fragment.
    let known = unsafe { DATAGRAMS.get(key) };
    // SAFETY: the helper has no preconditions.
    let time_ns = unsafe { bpf_ktime_get_ns() };
    meet(known, time_ns, &mut scratch.packet, &mut scratch.datagram) as u32
}

/// Keeps what is known of the datagram of the fragment in the scratch, in a [state](fault_common::abi::datagram). A global
/// function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_keep_fragment(state: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let packet = &scratch.packet;
    keep(&mut scratch.datagram, packet, state as u8);
    let datagram = &scratch.datagram;
    // Policy: a datagram that can't be entered is one that is not known, and its later fragments are counted.
    u32::from(DATAGRAMS.insert(datagram_of(packet), datagram, 0).is_ok())
}
