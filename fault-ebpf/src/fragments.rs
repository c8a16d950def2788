//! The tables of datagrams that come in fragments: see [`fault_common::fragment`].

use aya_ebpf::helpers::bpf_ktime_get_ns;
use fault_common::abi::{Counter, Followed};
use fault_common::fragment::{FollowedKey, FragmentKind, datagram_of, keep, meet};
use fault_common::packet::Packet;

use crate::maps::{DATAGRAMS, FOLLOWED, SCRATCH, Scratch, count};

/// Whether the packet is a fragment that the tables hold something of: the first one of its datagram, or one that follows it.
#[inline(always)]
pub fn is_tracked(packet: &Packet) -> bool {
    packet.is_fragment && (packet.follows || packet.fragment == 0)
}

/// Looks the fragment in the scratch up, and gives its [`FragmentKind`]. A global function: see `fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_meet_fragment() -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return FragmentKind::Orphan as u32;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    scratch.followed_key = FollowedKey {
        datagram: datagram_of(&scratch.packet),
        uid: 0,
    };
    scratch.rules = 0;
    // SAFETY: another CPU may write to the entry: then a fragment came at the same time as its first one, and what is read
    // of that one may be incomplete, so that a rule does nothing to this fragment.
    let known = unsafe { DATAGRAMS.get(&scratch.followed_key.datagram) };
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
    keep(&mut scratch.datagram, &scratch.packet, state as u8);
    scratch.datagram.rules = scratch.datagram.rules.max(scratch.rules);
    let key = &scratch.followed_key.datagram;
    // Policy: a datagram that can't be entered is one that is not known, and its later fragments are counted.
    u32::from(DATAGRAMS.insert(key, &scratch.datagram, 0).is_ok())
}

/// Looks up what a rule made of the datagram of the fragment in the scratch.
#[inline(never)]
pub fn recall(scratch: &mut Scratch, uid: u32) {
    scratch.followed_key.uid = uid;
    // SAFETY: the value is copied at once; see `fault_meet_fragment` on other CPUs.
    scratch.followed = if let Some(known) = unsafe { FOLLOWED.get(&scratch.followed_key) } {
        *known
    } else {
        if scratch.packet.follows && scratch.rules < scratch.datagram.rules {
            // Policy: the rule judges it as a packet of its own.
            count(Counter::Fragment);
        }
        Followed::NONE
    };
    scratch.rules += 1;
}

/// Keeps what the rule at hand made of the datagram.
#[inline(never)]
pub fn remember(scratch: &Scratch) {
    if FOLLOWED
        .insert(&scratch.followed_key, &scratch.followed, 0)
        .is_err()
    {
        count(Counter::Fragment);
    }
}
