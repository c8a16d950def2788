//! Which scope (a cgroup that a rule is limited to) a connection belongs to.

use aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6;
use aya_ebpf::bindings::{bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4};
use aya_ebpf::helpers::{
    bpf_sk_ancestor_cgroup_id, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
    bpf_skb_ancestor_cgroup_id,
};
use fault_common::abi::{SCOPE_LEVELS_MAX, ScopeKey, SetHeader};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet};

use crate::maps::SCOPES;
use crate::skb::Skb;

/// Finds the scopes of a connection's two ends: of the socket that sends the packet, known at egress
/// only, and of the local socket that is going to receive it.
#[inline(always)]
pub fn find<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    header: &SetHeader,
    generation: u32,
) -> [u64; 2] {
    let sender = if EGRESS {
        first_scope(header, generation, |level| unsafe {
            bpf_skb_ancestor_cgroup_id(skb.raw(), level)
        })
    } else {
        0
    };
    // Only on loopback can both ends be local to a packet on its way out.
    let receiver = if !EGRESS || skb.is_loopback() {
        receiver_scope(skb, packet, header, generation)
    } else {
        0
    };
    [sender, receiver]
}

/// The deepest of the levels in use at which `ancestor` names a scope.
#[inline(always)]
fn first_scope(header: &SetHeader, generation: u32, ancestor: impl Fn(i32) -> u64) -> u64 {
    for index in 0..SCOPE_LEVELS_MAX {
        if index >= header.scope_level_count as usize {
            break;
        }
        let key = ScopeKey {
            cgroup: ancestor(i32::from(header.scope_levels[index])),
            generation,
            padding: 0,
        };
        // SAFETY: the value is only compared with null.
        if key.cgroup != 0 && unsafe { SCOPES.get(&key) }.is_some() {
            return key.cgroup;
        }
    }
    0
}

#[inline(always)]
fn receiver_scope<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
    header: &SetHeader,
    generation: u32,
) -> u64 {
    if packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP {
        return 0;
    }
    // SAFETY: all zeroes is a tuple.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = if packet.ipv6 {
        tuple.__bindgen_anon_1.ipv6 = Tuple6 {
            saddr: packet.source,
            daddr: packet.destination,
            sport: packet.source_port.to_be(),
            dport: packet.destination_port.to_be(),
        };
        size_of::<Tuple6>()
    } else {
        tuple.__bindgen_anon_1.ipv4 = Tuple4 {
            saddr: packet.source[3],
            daddr: packet.destination[3],
            sport: packet.source_port.to_be(),
            dport: packet.destination_port.to_be(),
        };
        size_of::<Tuple4>()
    };
    let lookup = if packet.protocol == PROTOCOL_TCP {
        bpf_sk_lookup_tcp
    } else {
        bpf_sk_lookup_udp
    };
    // SAFETY: the tuple is `size` bytes long; -1 is the device's own network namespace; the reference
    // to the socket is given back.
    unsafe {
        let socket = lookup(skb.raw().cast(), &raw mut tuple, size as u32, u64::MAX, 0);
        if socket.is_null() {
            return 0;
        }
        let scope = first_scope(header, generation, |level| {
            bpf_sk_ancestor_cgroup_id(socket.cast(), level)
        });
        bpf_sk_release(socket.cast());
        scope
    }
}
