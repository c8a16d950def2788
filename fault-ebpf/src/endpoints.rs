//! Counts where the processes of a cgroup connect to, send datagrams to and bind sockets: what is told when a rule
//! never matched.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use fault_common::abi::{Endpoint, endpoint};
use fault_common::flow::{Address, mapped};

use crate::maps::{ENDPOINTS, ENDPOINTS_LEFT_OUT};
use crate::steer::is_the_relays;

/// What every program here returns: the call goes on as if nobody counted.
const GO_ON: i32 = 1;

/// connect(2) or sendto(2) over IPv4. Attached before the hooks that redirect to the relay.
#[inline(always)]
pub fn dial4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs; so below.
    let address = mapped(unsafe { (*ctx.sock_addr).user_ip4 });
    dial(ctx, address)
}

/// [`dial4`] over IPv6.
#[inline(always)]
pub fn dial6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as above.
    let address = unsafe {
        [
            (*ctx.sock_addr).user_ip6[0],
            (*ctx.sock_addr).user_ip6[1],
            (*ctx.sock_addr).user_ip6[2],
            (*ctx.sock_addr).user_ip6[3],
        ]
    };
    dial(ctx, address)
}

#[inline(always)]
fn dial(ctx: &SockAddrContext, address: Address) -> i32 {
    // SAFETY: as above.
    unsafe {
        if !is_the_relays(ctx) {
            let port = u16::from_be((*ctx.sock_addr).user_port as u16);
            note(
                ctx,
                endpoint::DIALLED,
                (*ctx.sock_addr).protocol,
                port,
                address,
            );
        }
    }
    GO_ON
}

/// bind(2) over IPv4.
#[inline(always)]
pub fn bound4(ctx: &SockContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        let socket = ctx.sock;
        let address = mapped((*socket).src_ip4);
        note(
            ctx,
            endpoint::BOUND,
            (*socket).protocol,
            (*socket).src_port as u16,
            address,
        );
    }
    GO_ON
}

/// bind(2) over IPv6.
#[inline(always)]
pub fn bound6(ctx: &SockContext) -> i32 {
    // Volatile, or LLVM would copy the array by a pointer of its own into the context.
    // SAFETY: as above.
    unsafe {
        let socket = ctx.sock;
        let word = |at: usize| core::ptr::read_volatile(&raw const (*socket).src_ip6[at]);
        let address = [word(0), word(1), word(2), word(3)];
        note(
            ctx,
            endpoint::BOUND,
            (*socket).protocol,
            (*socket).src_port as u16,
            address,
        );
    }
    GO_ON
}

#[inline(always)]
fn note(ctx: &impl EbpfContext, act: u8, protocol: u32, port: u16, address: Address) {
    let key = Endpoint {
        // SAFETY: the helper has no preconditions.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        address,
        port,
        protocol: protocol as u8,
        act,
        padding: 0,
    };
    let known = ENDPOINTS.get_ptr_mut(key).or_else(|| {
        // Policy: where there is no room for it, it is counted with the others.
        if ENDPOINTS.insert(key, 0, 0).is_err() {
            return ENDPOINTS_LEFT_OUT.get_ptr_mut(0);
        }
        ENDPOINTS.get_ptr_mut(key)
    });
    if let Some(count) = known {
        // SAFETY: a map value lives until the program ends; a race could at worst lose a count.
        unsafe { *count += 1 };
    }
}
