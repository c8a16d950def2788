//! Watches what a cgroup's processes do with their targets: when they connect, whether that succeeds, when something
//! comes back. This is what expectations are judged by: the application's own view, behind every fault.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_sk_fullsock,
    bpf_skb_load_bytes, bpf_sock_ops_cb_flags_set, bpf_tcp_sock,
};
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockOpsContext};
use fault_common::abi::{Counter, STEERS, Watched, Witness, steered, witness};
use fault_common::flow::{Address, mapped};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP};

use crate::maps::{NETNS, SERVICES, STEER_PORTS, WATCHED, WITNESSES, count};
use crate::steer::{concerns, is_the_relays, names_of};

/// What every program here returns: everything goes on as if nobody watched.
const GO_ON: i32 = 1;
const SOCK_STREAM: u32 = 1;
const AF_INET: u32 = 2;
/// Operations of a `sock_ops` program.
const ACTIVE_ESTABLISHED: u32 = 4;
const PASSIVE_ESTABLISHED: u32 = 5;
const STATE: u32 = 10;
/// `BPF_SOCK_OPS_STATE_CB_FLAG`: call again when the state changes.
const STATE_FLAG: i32 = 1 << 2;
/// States of TCP in which both ends can send, or this one can.
const ESTABLISHED: u32 = 1;
const CLOSE_WAIT: u32 = 8;
/// States of TCP in which the process is done with a connection.
const FIN_WAIT1: u32 = 4;
const CLOSE: u32 = 7;
const LAST_ACK: u32 = 9;
/// Data of one connection is told once in such a time.
const PAUSE_NS: u64 = 1_000_000;
/// Odd, so that no two sets of targets become the same: 2^64 by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// connect(2) over IPv4. Attached before the hooks that lead connections elsewhere.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs; so below.
    let address = mapped(unsafe { (*ctx.sock_addr).user_ip4 });
    dialled(ctx, &address)
}

/// [`connect4`] over IPv6.
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
    dialled(ctx, &address)
}

#[inline(always)]
fn dialled(ctx: &SockAddrContext, address: &Address) -> i32 {
    let port = unsafe {
        if (*ctx.sock_addr).type_ != SOCK_STREAM || is_the_relays(ctx) {
            return GO_ON;
        }
        u16::from_be((*ctx.sock_addr).user_port as u16)
    };
    let targets = targets(steered::TCP, port, address);
    if targets != 0 && !is_elsewhere(ctx) {
        // SAFETY: the helper has no preconditions; so below.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        begin(cookie, targets);
        tell(cookie, targets, witness::CONNECT);
    }
    GO_ON
}

/// Whether this happens in another network namespace than the one that is watched, if it is but one.
#[inline(always)]
fn is_elsewhere(ctx: &impl EbpfContext) -> bool {
    // SAFETY: the helper has no preconditions.
    NETNS.load() != 0 && unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != NETNS.load()
}

/// The targets that a service belongs to, as bits; `protocol` is one of [`steered`].
#[inline(always)]
fn targets(protocol: u32, port: u16, address: &Address) -> u64 {
    let Some(&of_port) = STEER_PORTS.get(u32::from(port)) else {
        return 0;
    };
    if of_port == 0 {
        // Policy: nearly every packet and connection ends here.
        return 0;
    }
    let names = names_of(address);
    let (mut left, mut found) = (of_port, 0);
    for count in 0..STEERS {
        if left == 0 || count >= SERVICES.load() {
            break;
        }
        let index = left.trailing_zeros();
        left &= left - 1;
        if concerns(index, address, names, protocol) {
            found |= 1 << (index & 63);
        }
    }
    found
}

#[inline(always)]
fn begin(cookie: u64, targets: u64) {
    let fresh = Watched {
        targets,
        ..Watched::default()
    };
    if WATCHED.insert(cookie, fresh, 0).is_err() {
        count(Counter::FlowTableFull);
    }
}

#[inline(always)]
fn tell(cookie: u64, targets: u64, kind: u64) {
    let seen = Witness {
        // SAFETY: see above.
        time_ns: unsafe { bpf_ktime_get_ns() },
        cookie,
        targets,
        kind,
    };
    if WITNESSES.output::<Witness>(&seen, 0).is_err() {
        count(Counter::EventLost);
    }
}

/// What becomes of a cgroup's connections.
#[inline(always)]
pub fn state(ctx: &SockOpsContext) -> u32 {
    // SAFETY: see above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    match ctx.op() {
        ACTIVE_ESTABLISHED => established(ctx, cookie),
        PASSIVE_ESTABLISHED => {
            let port = ctx.local_port() as u16;
            let targets = if ctx.family() == AF_INET {
                accepted4(ctx, port)
            } else {
                accepted6(ctx, port)
            };
            if targets != 0 && !is_elsewhere(ctx) {
                begin(cookie, targets);
                tell(cookie, targets, witness::ACCEPTED);
                established(ctx, cookie);
            }
        }
        STATE => changed(cookie, ctx.arg(0), ctx.arg(1)),
        _ => {}
    }
    1
}

/// Apart from [`accepted6`], because the verifier wants every field of the context read from where it always is.
#[inline(never)]
fn accepted4(ctx: &SockOpsContext, port: u16) -> u64 {
    targets(steered::TCP, port, &mapped(ctx.local_ip4()))
}

#[inline(never)]
fn accepted6(ctx: &SockOpsContext, port: u16) -> u64 {
    // Volatile, or LLVM would copy the array by a pointer of its own into the context.
    // SAFETY: the context is valid for as long as the program runs.
    let word = |at: usize| unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).local_ip6[at]) };
    let address = [word(0), word(1), word(2), word(3)];
    targets(steered::TCP, port, &address)
}

#[inline(always)]
fn established(ctx: &SockOpsContext, cookie: u64) {
    let Some(watched) = WATCHED.get_ptr(cookie) else {
        return;
    };
    // SAFETY: a map value lives until the program ends; the helper has no preconditions.
    let (targets, status) = unsafe {
        (
            (*watched).targets,
            bpf_sock_ops_cb_flags_set(ctx.ops, STATE_FLAG),
        )
    };
    if status < 0 {
        // Policy: its end will not be told; that is counted like an event lost.
        count(Counter::EventLost);
    }
    tell(cookie, targets, witness::ESTABLISHED);
}

#[inline(always)]
fn changed(cookie: u64, before: u32, now: u32) {
    if now != FIN_WAIT1 && now != LAST_ACK && now != CLOSE {
        return;
    }
    let Some(watched) = WATCHED.get_ptr_mut(cookie) else {
        return;
    };
    // SAFETY: as above; a race could at worst tell the end twice.
    let (targets, told) = unsafe {
        let told = (*watched).closed;
        (*watched).closed = 1;
        ((*watched).targets, told)
    };
    if told == 0 {
        let was_open = before == ESTABLISHED || before == CLOSE_WAIT;
        let kind = if was_open && now == CLOSE {
            witness::RESET
        } else {
            witness::CLOSED
        };
        tell(cookie, targets, kind);
    }
    if now == CLOSE {
        // It may have gone already, to make room.
        let _gone = WATCHED.remove(cookie);
    }
}

/// A connection is being opened: its failure is to be told too.
#[inline(always)]
pub fn opening(ctx: &SockOpsContext) {
    const TCP_CONNECT: u32 = 3;
    // SAFETY: see above.
    unsafe {
        if ctx.op() == TCP_CONNECT
            && WATCHED
                .get_ptr(bpf_get_socket_cookie(ctx.as_ptr()))
                .is_some()
            && bpf_sock_ops_cb_flags_set(ctx.ops, STATE_FLAG) < 0
        {
            count(Counter::EventLost);
        }
    }
}

/// A packet of a cgroup's socket: one with data is told, but not more often than it is of use.
#[inline(always)]
pub fn packet<const EGRESS: bool>(ctx: &SkBuffContext) -> i32 {
    let Some(header) = header(ctx) else {
        return GO_ON;
    };
    // SAFETY: see above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if header.protocol == PROTOCOL_UDP {
        datagram::<EGRESS>(ctx, &header, cookie);
    } else if header.protocol == PROTOCOL_TCP
        && let Some(watched) = WATCHED.get_ptr_mut(cookie)
        && let Some(sequence) = data(ctx, header.end)
    {
        // Policy: what TCP sends again is not the application's doing.
        if !EGRESS || is_new(ctx, sequence) {
            traffic::<EGRESS>(watched, cookie);
        }
    }
    GO_ON
}

/// Tells that there was data, unless that has just been told.
#[inline(always)]
fn traffic<const EGRESS: bool>(watched: *mut Watched, cookie: u64) {
    // SAFETY: a map value lives until the program ends; a race could at worst tell twice.
    unsafe {
        let (last, kind) = if EGRESS {
            (&mut (*watched).sent_ns, witness::SENT)
        } else {
            (&mut (*watched).received_ns, witness::RECEIVED)
        };
        let now = bpf_ktime_get_ns();
        if now - *last >= PAUSE_NS {
            *last = now;
            tell(cookie, (*watched).targets, kind);
        }
    }
}

/// A datagram. Its socket may have several peers, so that each packet's addresses are looked up.
#[inline(always)]
fn datagram<const EGRESS: bool>(ctx: &SkBuffContext, header: &Header, cookie: u64) {
    let Some([s0, s1, d0, d1]) = load::<4>(ctx, header.end) else {
        return;
    };
    // Either end may be the service.
    let targets = targets(steered::UDP, u16::from_be_bytes([d0, d1]), &header.to)
        | targets(steered::UDP, u16::from_be_bytes([s0, s1]), &header.from);
    if targets == 0 {
        return;
    }
    let key = cookie ^ targets.wrapping_mul(SPREAD);
    if WATCHED.get_ptr(key).is_none() {
        begin(key, targets);
    }
    if let Some(watched) = WATCHED.get_ptr_mut(key) {
        traffic::<EGRESS>(watched, key);
    }
}

/// What is of interest in an IP header.
struct Header {
    protocol: u8,
    from: Address,
    to: Address,
    /// Where it ends.
    end: u32,
}

#[inline(always)]
fn header(ctx: &SkBuffContext) -> Option<Header> {
    let [first] = load::<1>(ctx, 0)?;
    if first >> 4 == 4 {
        let bytes = load::<20>(ctx, 0)?;
        return Some(Header {
            protocol: bytes[9],
            from: mapped(word(&bytes, 12)),
            to: mapped(word(&bytes, 16)),
            end: u32::from(first & 0xf) * 4,
        });
    }
    let bytes = load::<40>(ctx, 0)?;
    let address = |at: usize| {
        [
            word(&bytes, at),
            word(&bytes, at + 4),
            word(&bytes, at + 8),
            word(&bytes, at + 12),
        ]
    };
    Some(Header {
        protocol: bytes[6],
        from: address(8),
        to: address(24),
        end: 40,
    })
}

/// Four bytes as they are.
#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The sequence number of a TCP segment with data.
#[inline(always)]
fn data(ctx: &SkBuffContext, start: u32) -> Option<u32> {
    let header = load::<16>(ctx, start)?;
    let payload = start + u32::from(header[12] >> 4) * 4;
    if ctx.len() <= payload {
        return None;
    }
    Some(u32::from_be_bytes([
        header[4], header[5], header[6], header[7],
    ]))
}

#[inline(always)]
fn load<const N: usize>(ctx: &SkBuffContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: there is room for N bytes.
    let status =
        unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    (status == 0).then_some(bytes)
}

/// Whether a segment on its way out carries what has not been sent before.
#[inline(always)]
fn is_new(ctx: &SkBuffContext, sequence: u32) -> bool {
    // SAFETY: every pointer is looked at before it is used.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let socket = bpf_sk_fullsock(socket);
        if socket.is_null() {
            return false;
        }
        let tcp = bpf_tcp_sock(socket);
        !tcp.is_null() && (sequence.wrapping_sub((*tcp).snd_nxt) as i32) >= 0
    }
}
