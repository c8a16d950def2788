//! Which scope (a cgroup that a rule is limited to) a connection belongs to.

use aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6;
use core::ptr::null_mut;

use aya_ebpf::bindings::{bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_lookup_udp,
    bpf_sk_release, bpf_sk_storage_get, bpf_skb_ancestor_cgroup_id,
};
use aya_ebpf::programs::SockContext;
use fault_common::abi::{SCOPE_LEVELS_MAX, ScopeKey, SetHeader};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet};

use crate::maps::{CONTROL, SCOPED, SCOPES, SETS, SOCKET_SCOPES};
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
    if SCOPED.load() == 0 {
        return [0, 0];
    }
    let sender = if EGRESS {
        let scope = first_scope(header, generation, |level| unsafe {
            bpf_skb_ancestor_cgroup_id(skb.raw(), level)
        });
        // The relay's sockets belong to a scope without being in its cgroup.
        if scope == 0 {
            sender_mark(skb, generation)
        } else {
            scope
        }
    } else {
        0
    };
    // Only on loopback can both ends be local to a packet on its way out.
    let receiver = if !EGRESS || skb.is_loopback() {
        receiver_scope(skb, packet, generation)
    } else {
        0
    };
    [sender, receiver]
}

/// The scope that the sending socket was marked with, or 0.
#[inline(always)]
fn sender_mark<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    generation: u32,
) -> u64 {
    // SAFETY: every pointer is looked at before it is used.
    unsafe {
        let socket = (*skb.raw()).__bindgen_anon_2.sk;
        if socket.is_null() {
            return 0;
        }
        let socket = bpf_sk_fullsock(socket);
        if socket.is_null() {
            return 0;
        }
        let stored = bpf_sk_storage_get(SOCKET_SCOPES.as_ptr(), socket.cast(), null_mut(), 0);
        if stored.is_null() {
            return 0;
        }
        known(*stored.cast::<u64>(), generation)
    }
}

/// A scope that rules still name, or 0.
#[inline(always)]
fn known(scope: u64, generation: u32) -> u64 {
    let key = ScopeKey {
        cgroup: scope,
        generation,
        padding: 0,
    };
    // SAFETY: the value is only compared with null.
    if scope != 0 && unsafe { SCOPES.get(key) }.is_some() {
        scope
    } else {
        0
    }
}

/// Remembers with a new socket which scope it was made in. A tc program at ingress can look a socket up,
/// but not its cgroup; sockets that a listener accepts inherit what is stored.
#[inline(always)]
pub fn store(ctx: &SockContext) -> Option<()> {
    let generation = CONTROL.get(0)?.generation & 1;
    let header = SETS.get(generation)?;
    let mut scope = first_scope(header, generation, |level| unsafe {
        bpf_get_current_ancestor_cgroup_id(level)
    });
    if scope != 0 {
        const CREATE: u64 = 1;
        // SAFETY: the socket is the context's own; the helper copies eight bytes.
        let stored = unsafe {
            bpf_sk_storage_get(
                SOCKET_SCOPES.as_ptr(),
                ctx.sock.cast(),
                (&raw mut scope).cast(),
                CREATE,
            )
        };
        if stored.is_null() {
            return None;
        }
    }
    Some(())
}

/// The deepest of the levels in use at which `ancestor` names a scope.
#[inline(always)]
fn first_scope(header: &SetHeader, generation: u32, ancestor: impl Fn(i32) -> u64) -> u64 {
    for index in 0..SCOPE_LEVELS_MAX {
        if index >= header.scope_level_count as usize {
            break;
        }
        let key = ancestor(i32::from(header.scope_levels[index]));
        if known(key, generation) != 0 {
            return key;
        }
    }
    0
}

#[inline(always)]
fn receiver_scope<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
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
    // SAFETY: the tuple is `size` bytes long; -1 is the device's own network namespace; the reference
    // to the socket is given back.
    unsafe {
        let (context, tuple) = (skb.raw().cast(), &raw mut tuple);
        let socket = if packet.protocol == PROTOCOL_TCP {
            bpf_sk_lookup_tcp(context, tuple, size as u32, u64::MAX, 0)
        } else {
            bpf_sk_lookup_udp(context, tuple, size as u32, u64::MAX, 0)
        };
        if socket.is_null() {
            return 0;
        }
        let stored = bpf_sk_storage_get(SOCKET_SCOPES.as_ptr(), socket.cast(), null_mut(), 0);
        let scope = if stored.is_null() {
            0
        } else {
            *stored.cast::<u64>()
        };
        bpf_sk_release(socket.cast());
        known(scope, generation)
    }
}
