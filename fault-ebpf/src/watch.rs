//! Watches what a cgroup's processes do with their targets: when they connect, whether that succeeds, when something
//! comes back. This is what expectations are judged by: the application's own view, behind every fault.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{
    bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_sk_fullsock, bpf_skb_load_bytes,
    bpf_sock_ops_cb_flags_set, bpf_tcp_sock,
};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockOpsContext};
use fault_common::abi::{Counter, STEERS, Watched, Witness, witness};
use fault_common::flow::{Address, mapped};
use fault_common::packet::PROTOCOL_TCP;

use crate::maps::{HostKey, STEER_HOSTS, STEER_PORTS, STEER_TABLE, WATCHED, WITNESSES, count};
use crate::steer::is_the_relays;

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
/// States of TCP in which the process is done with a connection.
const FIN_WAIT1: u32 = 4;
const CLOSE: u32 = 7;
const LAST_ACK: u32 = 9;
/// Data of one connection is told once in such a time.
const PAUSE_NS: u64 = 1_000_000;

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
    let targets = targets(port, address);
    if targets != 0 {
        // SAFETY: the helper has no preconditions; so below.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        begin(cookie, targets);
        tell(cookie, targets, witness::CONNECT);
    }
    GO_ON
}

/// The targets that a service belongs to, as bits.
#[inline(always)]
fn targets(port: u16, address: &Address) -> u64 {
    let Some(&candidates) = STEER_PORTS.get(u32::from(port)) else {
        return 0;
    };
    let (mut left, mut found) = (candidates, 0);
    for _ in 0..STEERS {
        if left == 0 {
            break;
        }
        let index = left.trailing_zeros();
        left &= left - 1;
        let Some(entry) = STEER_TABLE.get(index) else {
            break;
        };
        let key = Key::new(
            32 + 128,
            HostKey {
                generation: index,
                address: *address,
            },
        );
        if entry.any_host != 0 || STEER_HOSTS.get(&key).is_some() {
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
            if targets != 0 {
                begin(cookie, targets);
                tell(cookie, targets, witness::ACCEPTED);
                established(ctx, cookie);
            }
        }
        STATE => changed(cookie, ctx.arg(1)),
        _ => {}
    }
    1
}

/// Apart from [`accepted6`], because the verifier wants every field of the context read from where it always is.
#[inline(never)]
fn accepted4(ctx: &SockOpsContext, port: u16) -> u64 {
    targets(port, &mapped(ctx.local_ip4()))
}

#[inline(never)]
fn accepted6(ctx: &SockOpsContext, port: u16) -> u64 {
    // Volatile, or LLVM would copy the array by a pointer of its own into the context.
    // SAFETY: the context is valid for as long as the program runs.
    let word = |at: usize| unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).local_ip6[at]) };
    targets(port, &[word(0), word(1), word(2), word(3)])
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
fn changed(cookie: u64, now: u32) {
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
        tell(cookie, targets, witness::CLOSED);
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
    // SAFETY: see above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(watched) = WATCHED.get_ptr_mut(cookie) else {
        return GO_ON;
    };
    let Some(sequence) = data(ctx) else {
        return GO_ON;
    };
    if EGRESS && !is_new(ctx, sequence) {
        // Policy: what TCP sends again is not the application's doing.
        return GO_ON;
    }
    // SAFETY: a map value lives until the program ends; a race could at worst tell twice.
    unsafe {
        let last = if EGRESS {
            &mut (*watched).sent_ns
        } else {
            &mut (*watched).received_ns
        };
        let now = bpf_ktime_get_ns();
        if now - *last >= PAUSE_NS {
            *last = now;
            let kind = if EGRESS {
                witness::SENT
            } else {
                witness::RECEIVED
            };
            tell(cookie, (*watched).targets, kind);
        }
    }
    GO_ON
}

/// The sequence number of a TCP segment with data.
#[inline(always)]
fn data(ctx: &SkBuffContext) -> Option<u32> {
    let [first] = load::<1>(ctx, 0)?;
    let (protocol, start) = if first >> 4 == 4 {
        (load::<1>(ctx, 9)?[0], u32::from(first & 0xf) * 4)
    } else {
        (load::<1>(ctx, 6)?[0], 40)
    };
    if protocol != PROTOCOL_TCP {
        return None;
    }
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
