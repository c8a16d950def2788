//! Leads a client's new connections to the relay, and lets the client believe that they go where it meant them to.

use core::ptr::{null_mut, read_volatile};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sk_lookup_tcp, bpf_sk_release,
    bpf_sk_storage_delete, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext};
use fault_common::abi::{
    Destination, Handshake, Known, Original, STEERS, admitted, alias, steered,
};
use fault_common::flow::{Address, MAPPED_PREFIX, mapped};
use fault_common::packet::PROTOCOL_TCP;

use crate::maps::{
    ADMITTED, HANDSHAKES, HostKey, LISTENERS, NETNS, ORIGINALS, OWN_SERVERS, PROMPTS, RELAY_MARK,
    RELAY_PORTS, SERVED, SERVICES, STEER_HOSTS, STEER_LEARNED, STEER_PORTS, STEER_TABLE,
};
use crate::scope::{CREATE, LISTEN, tuple};
use crate::{counting, handshake};

/// The verdict that lets a system call go on.
const GO_ON: i32 = 1;
const SOCK_STREAM: u32 = 1;
const AF_INET: u32 = 2;
/// `BPF_SOCK_OPS_TCP_CONNECT_CB`: the connection is about to be opened, and has its own port already.
const TCP_CONNECT_CB: u32 = 3;
/// `BPF_SOCK_OPS_STATE_CB`: a connection's or listener's state changes.
const STATE_CB: u32 = 10;
/// `BPF_SOCK_OPS_TCP_LISTEN_CB`: a socket has begun to listen.
const TCP_LISTEN_CB: u32 = 11;
/// `BPF_SOCK_OPS_STATE_CB_FLAG`: call again when the state changes.
const STATE_FLAG: i32 = 1 << 2;
/// States of TCP.
const SYN_SENT: u32 = 2;
const CLOSE: u32 = 7;
/// 127.0.0.1 in network byte order.
const LOOPBACK_V4: u32 = u32::from_ne_bytes([127, 0, 0, 1]);
/// The last word of `::1` in network byte order.
const LOOPBACK_V6: u32 = u32::from_ne_bytes([0, 0, 0, 1]);

/// connect(2) of an IPv4 socket.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs; so below.
    let address = mapped(unsafe { (*ctx.sock_addr).user_ip4 });
    if let Some(steer) = wanted(ctx, &address) {
        unsafe {
            (*ctx.sock_addr).user_ip4 = steer.address4;
            (*ctx.sock_addr).user_port = u32::from(steer.port4.to_be());
        }
    }
    GO_ON
}

/// connect(2) of an IPv6 socket, which may go to an IPv4 address.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) -> i32 {
    let address = unsafe {
        [
            (*ctx.sock_addr).user_ip6[0],
            (*ctx.sock_addr).user_ip6[1],
            (*ctx.sock_addr).user_ip6[2],
            (*ctx.sock_addr).user_ip6[3],
        ]
    };
    if let Some(steer) = wanted(ctx, &address) {
        // A relay without a listener of IPv6 is reached by IPv4, where the socket may use both.
        let is_v4 = is_v4(&address) || steer.port6 == 0;
        let (last, port) = if is_v4 {
            (steer.address4, steer.port4)
        } else {
            (LOOPBACK_V6, steer.port6)
        };
        if port != 0 {
            unsafe {
                (*ctx.sock_addr).user_ip6[0] = 0;
                (*ctx.sock_addr).user_ip6[1] = 0;
                (*ctx.sock_addr).user_ip6[2] = if is_v4 { MAPPED_PREFIX } else { 0 };
                (*ctx.sock_addr).user_ip6[3] = last;
                (*ctx.sock_addr).user_port = u32::from(port.to_be());
            }
        }
    }
    GO_ON
}

#[inline(always)]
const fn is_v4(address: &Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED_PREFIX
}

/// Where a client's connection or datagram is sent instead.
struct Redirect {
    /// In network byte order.
    address4: u32,
    /// In host byte order; 0 where the relay is not to be reached by that version of IP.
    port4: u16,
    port6: u16,
}

/// Whether a socket is of TCP: datagrams are met on their way.
#[inline(always)]
fn is_stream(ctx: &SockAddrContext) -> bool {
    let (kind, protocol) = unsafe { ((*ctx.sock_addr).type_, (*ctx.sock_addr).protocol) };
    kind == SOCK_STREAM && protocol as u8 == PROTOCOL_TCP
}

/// Where a connection is redirected to, if it is; what it was meant for is remembered.
#[inline(always)]
fn wanted(ctx: &SockAddrContext, address: &Address) -> Option<Redirect> {
    let port = unsafe {
        if !is_stream(ctx) || is_the_relays(ctx) {
            return None;
        }
        u16::from_be((*ctx.sock_addr).user_port as u16)
    };
    // What an earlier connection of this socket was meant for. Most have none.
    // SAFETY: the socket is the context's own.
    let _none = unsafe { bpf_sk_storage_delete(ORIGINALS.as_ptr(), socket(ctx).cast()) };
    let candidates = *STEER_PORTS.get(u32::from(port))?;
    if candidates == 0 {
        // Policy: nearly every connection ends here.
        return None;
    }
    if !is_here(ctx) {
        // Policy: the relay is not there.
        return None;
    }
    let index = service(candidates, address, steered::TCP);
    let steer = *STEER_TABLE.get(index)?;
    if is_for_many(address) || needs_interface(address) {
        // Policy: the kernel refuses these at once.
        return None;
    }
    let server = Destination {
        address: dialled(address),
        port: u32::from(port),
    };
    if meets_itself(ctx, &server) {
        // Policy: there is no server.
        return None;
    }
    let mut original = Original {
        server,
        admitted: admitted::HELD,
        service: index,
    };
    if is_prompt(index, &server) && is_listened_at(ctx, &server) {
        original.admitted = admitted::AT_ONCE;
    }
    // SAFETY: the socket is the context's own; the helper copies the value.
    let stored = unsafe {
        bpf_sk_storage_get(
            ORIGINALS.as_ptr(),
            socket(ctx).cast(),
            (&raw mut original).cast(),
            CREATE,
        )
    };
    // Policy: without memory it bypasses the relay.
    (!stored.is_null()).then_some(Redirect {
        address4: alias(&server),
        port4: steer.port4,
        port6: steer.port6,
    })
}

/// Whether a client of this server, and of this entry of [`STEER_TABLE`], need not wait for the relay.
#[inline(always)]
fn is_prompt(index: u32, server: &Destination) -> bool {
    let (Some(prompt), Some(admitted)) = (PROMPTS.get(index), ADMITTED.get(index)) else {
        return false;
    };
    // SAFETY: the helper has no preconditions.
    prompt.admits(server, *admitted, unsafe { bpf_ktime_get_ns() })
}

/// Whether a socket of this network namespace listens at an address of this host.
#[inline(always)]
fn is_listened_at(ctx: &SockAddrContext, server: &Destination) -> bool {
    let address = &server.address;
    // From the address itself and port 0, so that [`may_be_led`] leaves it alone.
    let (mut tuple, size) = tuple(!is_v4(address), (address, 0), (address, server.port as u16));
    // SAFETY: the tuple is `size` bytes long; -1 is the socket's own network namespace. The reference to the socket is
    // given back.
    unsafe {
        let socket = bpf_sk_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size as u32, u64::MAX, 0);
        if socket.is_null() {
            return false;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state == LISTEN
    }
}

/// The address that a socket is connected to: the kernel takes none for this host's.
#[inline(always)]
const fn dialled(address: &Address) -> Address {
    match *address {
        [0, 0, 0, 0] => [0, 0, 0, LOOPBACK_V6],
        [0, 0, MAPPED_PREFIX, 0] => mapped(LOOPBACK_V4),
        address => address,
    }
}

/// Whether an address means nothing without an interface: the relay's own socket would not know which. The client's
/// can't either unless it names one, which is not seen here.
#[inline(always)]
pub const fn needs_interface(address: &Address) -> bool {
    let [first, second, ..] = address[0].to_ne_bytes();
    first == 0xfe && second & 0xc0 == 0x80
}

/// Whether a socket is about to be connected to itself.
#[inline(always)]
fn meets_itself(ctx: &SockAddrContext, server: &Destination) -> bool {
    let socket = socket(ctx);
    // SAFETY: the kernel gives each such context a socket; the verifier sees to it that it is looked at first.
    unsafe {
        if socket.is_null() || (*socket).src_port != server.port {
            return false;
        }
        if is_v4(&server.address) {
            let own = (*socket).src_ip4;
            own == server.address[3] || (own == 0 && server.address[3] == LOOPBACK_V4)
        } else {
            let own = [
                (*socket).src_ip6[0],
                (*socket).src_ip6[1],
                (*socket).src_ip6[2],
                (*socket).src_ip6[3],
            ];
            own == server.address || (own == [0; 4] && server.address == [0, 0, 0, LOOPBACK_V6])
        }
    }
}

/// The relay's address for a server: different ones can be connected to from the same port.
#[inline(always)]
const fn alias(server: &Destination) -> u32 {
    // Odd constants spread what differs over the upper bits, of which 22 are used.
    let hash = (server.address[0]
        ^ server.address[1].rotate_left(7)
        ^ server.address[2].rotate_left(14)
        ^ server.address[3])
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(server.port.wrapping_mul(0x85eb_ca6b));
    let [first, second, third, _] = hash.to_be_bytes();
    u32::from_ne_bytes([127, alias::FIRST | first & !alias::MASK, second, third])
}

/// Whether the socket is in the relay's network namespace, as far as the kernel tells.
#[inline(always)]
fn is_here(ctx: &SockAddrContext) -> bool {
    // SAFETY: the helper has no preconditions.
    NETNS.load() == 0 || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == NETNS.load()
}

/// Whether an address is that of a multicast group or the local broadcast.
#[inline(always)]
const fn is_for_many(address: &Address) -> bool {
    if is_v4(address) {
        address[3].to_ne_bytes()[0] >= 224
    } else {
        address[0].to_ne_bytes()[0] == 0xff
    }
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// The relay's own connections to its servers carry a mark.
#[inline(always)]
pub unsafe fn is_the_relays(ctx: &SockAddrContext) -> bool {
    let socket = socket(ctx);
    !socket.is_null() && unsafe { (*socket).mark } == RELAY_MARK.load()
}

/// Gives a new connection to the relay: one from outside, or with [`OWN_SERVERS`] one to a server of the cgroup.
/// Those that clients of the cgroup open are redirected by the hooks of connect(2), and the relay's own ones bypass it.
#[inline(always)]
pub fn lookup(ctx: &SkLookupContext) -> u32 {
    /// What the verdicts are called in `enum sk_action`.
    const SK_DROP: u32 = 0;
    const SK_PASS: u32 = 1;
    // SAFETY: the context is valid for as long as the program runs; so below.
    let (protocol, family, port) = unsafe {
        (
            (*ctx.lookup).protocol,
            (*ctx.lookup).family,
            (*ctx.lookup).local_port,
        )
    };
    if family == AF_INET && is_alias(unsafe { (*ctx.lookup).local_ip4 }) {
        let place = RELAY_PORTS.get((1 << 16) + (port & 0xffff));
        if let Some(&place @ 1..) = place {
            let _given = LISTENERS.redirect_sk_lookup(ctx, place as u32 - 1, 0);
            return SK_PASS;
        }
    }
    let Some(&candidates) = STEER_PORTS.get(port & 0xffff) else {
        return SK_PASS;
    };
    if candidates == 0 {
        // Policy: nearly every connection ends here.
        return SK_PASS;
    }
    if protocol as u8 != PROTOCOL_TCP {
        // Policy: datagrams are met on their way.
        return SK_PASS;
    }
    let index = if family == AF_INET {
        lookup4(ctx, candidates)
    } else {
        lookup6(ctx, candidates)
    };
    let Some(steer) = STEER_TABLE.get(index) else {
        return SK_PASS;
    };
    if steer.refused != 0 {
        return SK_DROP;
    }
    let listener = index * 2 + u32::from(family != AF_INET);
    // Policy: where the relay has no listener of this kind the connection bypasses the relay.
    let _led = LISTENERS.redirect_sk_lookup(ctx, listener, 0);
    SK_PASS
}

/// Whether an address is one of those that [`alias`] makes.
#[inline(always)]
const fn is_alias(address: u32) -> bool {
    let [first, second, ..] = address.to_ne_bytes();
    first == 127 && second & alias::MASK == alias::FIRST
}

/// The service that a connection is for, or `STEERS` for none or one that bypasses the relay.
#[inline(never)]
fn lookup4(ctx: &SkLookupContext, candidates: u64) -> u32 {
    let (from, to) = unsafe { ((*ctx.lookup).remote_ip4, (*ctx.lookup).local_ip4) };
    // Nothing from outside comes from the server's own address, or to loopback.
    let is_local = from == to || to.to_ne_bytes()[0] == 127;
    let to = mapped(to);
    if !may_be_led(ctx, is_local) || (OWN_SERVERS.load() != 0 && !serves(ctx, &to, true)) {
        return STEERS;
    }
    service(candidates, &to, steered::TCP)
}

#[inline(never)]
fn lookup6(ctx: &SkLookupContext, candidates: u64) -> u32 {
    // Volatile, or LLVM would copy the arrays by a pointer of its own into the context.
    let from = |at: usize| unsafe { read_volatile(&raw const (*ctx.lookup).remote_ip6[at]) };
    let to = |at: usize| unsafe { read_volatile(&raw const (*ctx.lookup).local_ip6[at]) };
    let to = [to(0), to(1), to(2), to(3)];
    let is_local = [from(0), from(1), from(2), from(3)] == to;
    if !may_be_led(ctx, is_local) || (OWN_SERVERS.load() != 0 && !serves(ctx, &to, false)) {
        return STEERS;
    }
    service(candidates, &to, steered::TCP)
}

/// Whether neither the hooks of connect(2) have let the connection bypass the relay, nor is it the relay's own, nor do they only
/// ask who listens: from port 0.
#[inline(always)]
fn may_be_led(ctx: &SkLookupContext, is_local: bool) -> bool {
    if OWN_SERVERS.load() == 0 {
        return !is_local;
    }
    let port = unsafe { u16::from_be((*ctx.lookup).remote_port) };
    let relays = RELAY_PORTS.get(u32::from(port)).copied().unwrap_or(0);
    !is_local || (relays == 0 && port != 0)
}

/// Whether a server of the cgroup listens there: at this address, or at all of this version of IP or of both.
#[inline(always)]
fn serves(ctx: &SkLookupContext, address: &Address, v4: bool) -> bool {
    let port = unsafe { (*ctx.lookup).local_port };
    let is_there = |address: Address| {
        // SAFETY: the count is copied at once.
        unsafe { SERVED.get(Destination { address, port }) }.is_some_and(|count| *count != 0)
    };
    is_there(*address) || is_there([0; 4]) || (v4 && is_there(mapped(0)))
}

/// The first of the candidates that has this host and protocol; `STEERS` for none.
#[inline(always)]
fn service(candidates: u64, address: &Address, protocol: u32) -> u32 {
    let (mut left, names) = (candidates, names_of(address));
    for count in 0..STEERS {
        if left == 0 || count >= SERVICES.load() {
            break;
        }
        let index = left.trailing_zeros();
        left &= left - 1;
        if concerns(index, address, names, protocol) {
            return index;
        }
    }
    STEERS
}

/// The names that an address is known by, as bits.
#[inline(always)]
pub fn names_of(address: &Address) -> u64 {
    let Some(learned) = STEER_LEARNED.get(0) else {
        // Policy: no rule has a name, or its addresses at the start are all that is known.
        return 0;
    };
    // SAFETY: the value is copied at once; names are only added to it.
    unsafe { learned.get(address) }.map_or(0, Known::mask)
}

/// Whether entry `index` of [`STEER_TABLE`] is about this host, which has these names, and this one of [`steered`].
#[inline(always)]
pub fn concerns(index: u32, address: &Address, names: u64, protocol: u32) -> bool {
    let Some(steer) = STEER_TABLE.get(index) else {
        return false;
    };
    let key = Key::new(
        32 + 128,
        HostKey {
            generation: index,
            address: *address,
        },
    );
    steer.protocols & protocol != 0
        && (steer.any_host != 0 || steer.names & names != 0 || STEER_HOSTS.get(&key).is_some())
}

/// Tells the relay what a connection that is being opened was meant for, by the address that the relay sees; and where
/// servers listen.
#[inline(always)]
pub fn opening(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        TCP_CONNECT_CB => connecting(ctx),
        TCP_LISTEN_CB if OWN_SERVERS.load() != 0 => {
            // Policy: where it refuses, what comes to the port when the server is gone is given to the relay, which finds
            // nobody either.
            call_again(ctx);
            listening(ctx, 1);
        }
        STATE_CB if OWN_SERVERS.load() != 0 && ctx.arg(0) == LISTEN => listening(ctx, u64::MAX),
        STATE_CB if ctx.arg(0) == SYN_SENT && ctx.arg(1) == CLOSE => ended(ctx),
        _ => {}
    }
    1
}

/// Has the kernel tell when the socket's state changes.
#[inline(always)]
fn call_again(ctx: &SockOpsContext) {
    let flags = unsafe { (*ctx.ops).bpf_sock_ops_cb_flags } as i32;
    // SAFETY: the helper has no preconditions.
    let _status = unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, flags | STATE_FLAG) };
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(mut original) = opened_for(ctx) else {
        return;
    };
    if original.admitted == admitted::AT_ONCE
        && let Some(count) = ADMITTED.get_ptr_mut(original.service)
    {
        // SAFETY: the pointer is to eight aligned bytes of the map.
        counting::add(unsafe { &mut *count }, 1);
    } else {
        original.admitted = admitted::HELD;
    }
    // Policy: where it refuses, the relay learns late of a client that has given up.
    call_again(ctx);
    let handshake = handshake_of(ctx);
    // Policy: when that is not possible the relay does not know the connection, and refuses it.
    let _noted = HANDSHAKES.insert(handshake, original, 0);
}

/// A connection that was being opened has failed.
#[inline(always)]
fn ended(ctx: &SockOpsContext) {
    if opened_for(ctx).is_some() {
        handshake::tell_gone(handshake_of(ctx));
    }
}

/// What a connection was meant for, if it is redirected.
#[inline(always)]
fn opened_for(ctx: &SockOpsContext) -> Option<Original> {
    // SAFETY: the context is valid for as long as the program runs; what the helper gives is looked at before it is used.
    unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        let stored = bpf_sk_storage_get(ORIGINALS.as_ptr(), socket.cast(), null_mut(), 0);
        (!stored.is_null()).then(|| *stored.cast::<Original>())
    }
}

#[inline(always)]
fn handshake_of(ctx: &SockOpsContext) -> Handshake {
    let mut handshake = Handshake {
        client: Destination {
            port: ctx.local_port(),
            ..Destination::default()
        },
        server: Destination {
            port: u32::from_be(ctx.remote_port()),
            ..Destination::default()
        },
    };
    if ctx.family() == AF_INET {
        ends4(ctx, &mut handshake);
    } else {
        ends6(ctx, &mut handshake);
    }
    handshake
}

/// A socket listens, or (`change` of -1) no longer.
#[inline(always)]
fn listening(ctx: &SockOpsContext, change: u64) {
    if ctx.family() == AF_INET {
        listening4(ctx, change);
    } else {
        listening6(ctx, change);
    }
}

#[inline(never)]
fn listening4(ctx: &SockOpsContext, change: u64) -> u32 {
    count_listener(mapped(ctx.local_ip4()), ctx.local_port(), change)
}

#[inline(never)]
fn listening6(ctx: &SockOpsContext, change: u64) -> u32 {
    count_listener(local6(ctx), ctx.local_port(), change)
}

#[inline(always)]
fn count_listener(address: Address, port: u32, change: u64) -> u32 {
    let own = Destination { address, port };
    if SERVED.get_ptr(own).is_none() {
        const NO_EXIST: u64 = 1;
        // Policy: without room the server's connections bypass the relay, and the daemon says so. Another CPU may have been faster.
        let _made = SERVED.insert(own, 0, NO_EXIST);
    }
    if let Some(count) = SERVED.get_ptr_mut(own) {
        // SAFETY: the pointer is to eight aligned bytes of the map.
        counting::add(unsafe { &mut *count }, change);
    }
    0
}

/// The addresses of IPv4. Apart from [`ends6`], because the verifier wants every field of the context read from where it
/// always is.
#[inline(never)]
fn ends4(ctx: &SockOpsContext, handshake: &mut Handshake) -> u32 {
    handshake.client.address = mapped(ctx.local_ip4());
    handshake.server.address = mapped(ctx.remote_ip4());
    0
}

#[inline(never)]
fn ends6(ctx: &SockOpsContext, handshake: &mut Handshake) -> u32 {
    // Volatile: see [`local6`].
    // SAFETY: the context is valid for as long as the program runs.
    let word = |at: usize| unsafe { read_volatile(&raw const (*ctx.ops).remote_ip6[at]) };
    handshake.client.address = local6(ctx);
    handshake.server.address = [word(0), word(1), word(2), word(3)];
    0
}

#[inline(always)]
fn local6(ctx: &SockOpsContext) -> Address {
    // Volatile, or LLVM would copy the array by a pointer of its own into the context.
    // SAFETY: the context is valid for as long as the program runs.
    let word = |at: usize| unsafe { read_volatile(&raw const (*ctx.ops).local_ip6[at]) };
    [word(0), word(1), word(2), word(3)]
}

/// getpeername(2): who was meant.
#[inline(always)]
pub fn peer4(ctx: &SockAddrContext) -> i32 {
    if let Some(original) = original(ctx) {
        show4(ctx, &original);
    }
    GO_ON
}

/// [`peer4`] of an IPv6 socket.
#[inline(always)]
pub fn peer6(ctx: &SockAddrContext) -> i32 {
    if let Some(original) = original(ctx) {
        show6(ctx, &original);
    }
    GO_ON
}

#[inline(always)]
fn show4(ctx: &SockAddrContext, original: &Destination) {
    unsafe {
        (*ctx.sock_addr).user_ip4 = original.address[3];
        (*ctx.sock_addr).user_port = u32::from((original.port as u16).to_be());
    }
}

#[inline(always)]
fn show6(ctx: &SockAddrContext, original: &Destination) {
    unsafe {
        (*ctx.sock_addr).user_ip6[0] = original.address[0];
        (*ctx.sock_addr).user_ip6[1] = original.address[1];
        (*ctx.sock_addr).user_ip6[2] = original.address[2];
        (*ctx.sock_addr).user_ip6[3] = original.address[3];
        (*ctx.sock_addr).user_port = u32::from((original.port as u16).to_be());
    }
}

/// What a connection of TCP was meant for.
#[inline(always)]
fn original(ctx: &SockAddrContext) -> Option<Destination> {
    if !is_stream(ctx) {
        return None;
    }
    // SAFETY: the socket is the context's own; what the helper gives is looked at before it is used.
    unsafe {
        let stored = bpf_sk_storage_get(ORIGINALS.as_ptr(), socket(ctx).cast(), null_mut(), 0);
        (!stored.is_null()).then(|| (*stored.cast::<Original>()).server)
    }
}
