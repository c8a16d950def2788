//! Whose a packet is: which scope (a cgroup that a rule is limited to) the sockets at its ends belong to.
//!
//! A socket belongs to the cgroup that it was made in, however it has been passed on since. `cgroup/sock_create`
//! notes that with the socket, because a tc program can look a socket up, but not its cgroup; sockets that a listener
//! accepts inherit what is noted. What the kernel makes for a socket is known by its cgroup as soon as it sends.

use aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6;
use core::ffi::c_void;
use core::ptr::null_mut;

use aya_ebpf::bindings::{
    __sk_buff, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4,
};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_lookup_tcp,
    bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get, bpf_skb_ancestor_cgroup_id,
    bpf_skc_to_mptcp_sock,
};
use aya_ebpf::programs::SockContext;
use fault_common::abi::{Counter, Owner, SCOPE_LEVELS_MAX, ScopeKey, SetHeader, protocol};
use fault_common::flow::{Address, FlowKey, end};
use fault_common::packet::{PROTOCOL_UDP, Packet};

use crate::maps::{
    CONTROL, ECHOES, Echo, FLOWS, MPTCP, SCOPED, SCOPES, SCRATCH, SETS, SOCKET_SCOPES, Scratch,
    concerns, count, is_tcp,
};
use crate::skb::{Any, Skb};

/// `BPF_SK_STORAGE_GET_F_CREATE`.
pub const CREATE: u64 = 1;
/// `BPF_TCP_LISTEN`.
pub const LISTEN: u32 = 10;

/// Asks the sockets at `ends` of the packet in the scratch whose it is. A global function: see
/// `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_ask(skb: *mut __sk_buff, ends: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; the caller holds no reference to it meanwhile.
    let scratch = unsafe { &mut *scratch };
    let generation = scratch.sight.generation & 1;
    if SCOPED.load() != 0
        && let Some(header) = SETS.get(generation)
    {
        ask(Skb::of(skb), scratch, header, generation, ends);
    }
    0
}

/// Only on its way out a packet is with the socket that sends it, and `ends` has the sender then.
#[inline(always)]
fn ask(skb: Any, scratch: &mut Scratch, header: &SetHeader, generation: u32, ends: u32) {
    let (packet, key, told) = (&scratch.packet, &scratch.key, &mut scratch.told);
    told.asked = ends;
    if ends & end::SENDER != 0 && holder(skb, header, generation, &mut told.owners[0]) {
        told.found |= end::SENDER;
        if concerns(protocol::ICMP) && packet.is_echo_request() {
            note_echo(packet, key, &told.owners[0]);
        }
    }
    if concerns(protocol::UDP) && skb.is_group(packet) {
        // Who receives it is known where it is received: see `group`.
        if ends & end::SENDER == 0
            && skb.is_looped_back()
            && looked_up(skb, packet, end::SENDER, generation, &mut told.owners[0])
        {
            told.found |= end::SENDER;
        }
    } else if ends & end::RECEIVER != 0
        && receiver(skb, packet, key, generation, &mut told.owners[1])
    {
        told.found |= end::RECEIVER;
    }
}

/// Whose the socket is that the packet is with, which on its way out is the sender's; false where there is none.
#[inline(always)]
pub fn holder<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    header: &SetHeader,
    generation: u32,
    owner: &mut Owner,
) -> bool {
    // SAFETY: every pointer is looked at before it is used.
    unsafe {
        let socket = (*skb.raw()).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let socket = bpf_sk_fullsock(socket);
        if socket.is_null() {
            return false;
        }
        if noted(socket, generation, owner) {
            return true;
        }
        let scope = first_scope(header, generation, |level| {
            bpf_skb_ancestor_cgroup_id(skb.raw(), level)
        });
        if scope != 0 {
            *owner = Owner {
                scope,
                socket: bpf_get_socket_cookie(skb.raw().cast()),
            };
            // What it receives is its own from now on. Without memory for that only what it sends is.
            bpf_sk_storage_get(
                SOCKET_SCOPES.as_ptr(),
                socket.cast(),
                core::ptr::from_mut(owner).cast(),
                CREATE,
            );
        }
        true
    }
}

/// Whose a socket is by what is noted with it, or with the MPTCP connection that it is a subflow of.
///
/// # Safety
/// `socket` is not null, and held.
#[inline(always)]
unsafe fn noted(socket: *mut bpf_sock, generation: u32, owner: &mut Owner) -> bool {
    // SAFETY: every pointer is looked at before it is used.
    unsafe {
        if read(socket.cast(), generation, owner) {
            return true;
        }
        if MPTCP.load() == 0 {
            return false;
        }
        let connection = bpf_skc_to_mptcp_sock(socket.cast());
        !connection.is_null() && read(connection.cast(), generation, owner)
    }
}

/// # Safety
/// `socket` is not null, and held.
#[inline(always)]
unsafe fn read(socket: *mut c_void, generation: u32, owner: &mut Owner) -> bool {
    // SAFETY: the pointer is looked at before it is used.
    unsafe {
        let stored = bpf_sk_storage_get(SOCKET_SCOPES.as_ptr(), socket, null_mut(), 0);
        let stored = stored.cast::<Owner>();
        if stored.is_null() || !is_known((*stored).scope, generation) {
            return false;
        }
        *owner = *stored;
        true
    }
}

/// Whether rules still name a scope.
#[inline(always)]
fn is_known(scope: u64, generation: u32) -> bool {
    let key = ScopeKey {
        cgroup: scope,
        generation,
        padding: 0,
    };
    // SAFETY: the value is only compared with null.
    scope != 0 && unsafe { SCOPES.get(key) }.is_some()
}

/// Notes with a new socket which scope it was made in.
#[inline(always)]
pub fn store(ctx: &SockContext) -> Option<()> {
    let generation = CONTROL.get(0)?.generation & 1;
    let header = SETS.get(generation)?;
    let scope = first_scope(header, generation, |level| unsafe {
        bpf_get_current_ancestor_cgroup_id(level)
    });
    if scope != 0 {
        // SAFETY: the socket is the context's own; the helper copies the owner.
        let stored = unsafe {
            let mut owner = Owner {
                scope,
                socket: bpf_get_socket_cookie(ctx.sock.cast()),
            };
            bpf_sk_storage_get(
                SOCKET_SCOPES.as_ptr(),
                ctx.sock.cast(),
                (&raw mut owner).cast(),
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
        if is_known(key, generation) {
            return key;
        }
    }
    0
}

/// Notes whose an echo request is. Nobody can look up the sockets that receive the answer: raw ones are all given it.
#[inline(always)]
fn note_echo(packet: &Packet, key: &FlowKey, owner: &Owner) {
    let echo = Echo {
        flow: *key,
        sequence: packet.sequence,
    };
    let noted = if owner.scope == 0 {
        // Someone else uses the identifier now.
        ECHOES.remove(echo)
    } else {
        ECHOES.insert(echo, owner, 0)
    };
    // Nothing to be removed; or, which the kernel's choice of whom to forget rules out, no room.
    noted.unwrap_or_default();
}

/// Whose the socket is that is going to receive the packet; false where there is none, or none that can be looked up.
#[inline(always)]
fn receiver(skb: Any, packet: &Packet, key: &FlowKey, generation: u32, owner: &mut Owner) -> bool {
    if concerns(protocol::ICMP) && packet.is_echo_reply() {
        let echo = Echo {
            flow: *key,
            sequence: packet.sequence,
        };
        // SAFETY: the value is copied at once.
        let Some(asked) = (unsafe { ECHOES.get(echo) }) else {
            // SAFETY: the value is read at once.
            if unsafe { FLOWS.get(key) }.is_some_and(|flow| flow.scopes != [0; 2]) {
                count(Counter::EchoForgotten);
            }
            return false;
        };
        *owner = *asked;
        return true;
    }
    if !packet.has_transport || (!is_tcp(packet) && packet.protocol != PROTOCOL_UDP) {
        return false;
    }
    looked_up(skb, packet, end::RECEIVER, generation, owner)
}

/// Whose the socket at one end of the packet is; false where there is none.
#[inline(always)]
fn looked_up(skb: Any, packet: &Packet, end: u32, generation: u32, owner: &mut Owner) -> bool {
    let port = if end == end::RECEIVER {
        packet.source_port
    } else {
        packet.destination_port
    };
    // SAFETY: the reference to the socket is given back.
    unsafe {
        let socket = look_up(skb.raw().cast(), packet, end, port);
        if socket.is_null() {
            return false;
        }
        noted(socket, generation, owner);
        bpf_sk_release(socket.cast());
        true
    }
}

/// Whether a TCP socket of this host listens at that end of the packet in the scratch. A global function: see
/// `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_listens(skb: *mut __sk_buff, end: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: see `Scratch`; nothing is written.
    let packet = unsafe { &(*scratch).packet };
    u32::from(listens(skb.cast(), packet, end))
}

/// Whether a TCP socket of this host listens at that end of a packet.
#[inline(always)]
pub fn listens(context: *mut c_void, packet: &Packet, end: u32) -> bool {
    // SAFETY: the reference to the socket is given back.
    unsafe {
        // No connection comes from port 0, so only a listener is found.
        let socket = look_up(context, packet, end, 0);
        if socket.is_null() {
            return false;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state == LISTEN
    }
}

/// The socket at one end of a packet, for what comes from `port` of the other end. It is held, unless it is null.
///
/// # Safety
/// `context` is the program's own.
#[inline(always)]
unsafe fn look_up(context: *mut c_void, packet: &Packet, end: u32, port: u16) -> *mut bpf_sock {
    let (remote, local, local_port) = if end == end::RECEIVER {
        (&packet.source, &packet.destination, packet.destination_port)
    } else {
        (&packet.destination, &packet.source, packet.source_port)
    };
    let (mut tuple, size) = tuple(packet.ipv6, (remote, port), (local, local_port));
    // SAFETY: the tuple is `size` bytes long; -1 is the device's own network namespace.
    unsafe {
        let tuple = &raw mut tuple;
        if is_tcp(packet) {
            bpf_sk_lookup_tcp(context, tuple, size as u32, u64::MAX, 0)
        } else {
            bpf_sk_lookup_udp(context, tuple, size as u32, u64::MAX, 0)
        }
    }
}

/// What the helpers that look sockets up take: both ends, with ports in host byte order, and its length.
#[inline(always)]
pub fn tuple(
    ipv6: bool,
    (remote, port): (&Address, u16),
    (local, local_port): (&Address, u16),
) -> (bpf_sock_tuple, usize) {
    // SAFETY: all zeroes is a tuple.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = if ipv6 {
        tuple.__bindgen_anon_1.ipv6 = Tuple6 {
            saddr: *remote,
            daddr: *local,
            sport: port.to_be(),
            dport: local_port.to_be(),
        };
        size_of::<Tuple6>()
    } else {
        tuple.__bindgen_anon_1.ipv4 = Tuple4 {
            saddr: remote[3],
            daddr: local[3],
            sport: port.to_be(),
            dport: local_port.to_be(),
        };
        size_of::<Tuple4>()
    };
    (tuple, size)
}
