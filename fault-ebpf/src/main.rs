//! The eBPF programs of `fault`: parse, match, act. What to do is decided in `fault-common`.
//!
//! Policy of every program: whatever goes wrong, the packet passes and a counter says why.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "the kernel hands narrow values over in wide fields, and takes them back so"
)]
#![expect(
    clippy::needless_pass_by_value,
    missing_docs,
    reason = "the functions that aya's macros make of the entry points"
)]
#![expect(
    clippy::inline_always,
    clippy::trivially_copy_pass_by_ref,
    reason = "a call is a subprogram of its own to the kernel's verifier, with its own stack"
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a copy would not fit the stack"
)]

mod act;
mod answer;
mod classify;
mod counting;
mod dns;
mod endpoints;
mod flows;
mod fragments;
mod frame;
mod group;
mod handshake;
mod hold;
mod maps;
mod scope;
mod skb;
mod split;
mod steer;
mod trace;
mod watch;
mod xdp;

use aya_ebpf::macros::{
    cgroup_skb, cgroup_sock, cgroup_sock_addr, classifier, sk_lookup, sock_ops, socket_filter, xdp,
};
use aya_ebpf::programs::{
    SkBuffContext, SkLookupContext, SockAddrContext, SockContext, SockOpsContext, TcContext,
    XdpContext,
};
use fault_common::abi::{ABI_VERSION, Counter};

use crate::counting::{Fetch, InKernel, NoFetch};
use crate::skb::Skb;

/// Read by the loader before anything else.
#[unsafe(no_mangle)]
#[unsafe(link_section = "fault_abi")]
static FAULT_ABI: u32 = ABI_VERSION;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";

/// Egress of a device with Ethernet headers.
#[classifier]
pub fn fault_egress(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<Fetch>, true, 14>(Skb::new(&ctx))
}

/// Ingress of a device with Ethernet headers.
#[classifier]
pub fn fault_ingress(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<Fetch>, false, 14>(Skb::new(&ctx))
}

/// Egress of a device without a link layer header: a tun, `WireGuard`.
#[classifier]
pub fn fault_egress_l3(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<Fetch>, true, 0>(Skb::new(&ctx))
}

/// Ingress of a device without a link layer header.
#[classifier]
pub fn fault_ingress_l3(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<Fetch>, false, 0>(Skb::new(&ctx))
}

/// [`fault_egress`] for kernels before 5.12, which have no atomic fetch-and-add.
#[classifier]
pub fn fault_egress_old(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<NoFetch>, true, 14>(Skb::new(&ctx))
}

/// [`fault_ingress`] for kernels before 5.12.
#[classifier]
pub fn fault_ingress_old(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<NoFetch>, false, 14>(Skb::new(&ctx))
}

/// [`fault_egress_l3`] for kernels before 5.12.
#[classifier]
pub fn fault_egress_l3_old(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<NoFetch>, true, 0>(Skb::new(&ctx))
}

/// [`fault_ingress_l3`] for kernels before 5.12.
#[classifier]
pub fn fault_ingress_l3_old(ctx: TcContext) -> i32 {
    classify::handle::<InKernel<NoFetch>, false, 0>(Skb::new(&ctx))
}

/// In front of [`fault_ingress`], where rules only lose packets.
#[xdp]
pub fn fault_xdp(ctx: XdpContext) -> u32 {
    xdp::handle::<InKernel<Fetch>>(xdp::Raw::new(&ctx))
}

/// What sockets of a cgroup are given that rules are limited to.
#[cgroup_skb(ingress)]
pub fn fault_receive(ctx: SkBuffContext) -> i32 {
    group::handle::<InKernel<Fetch>>(Skb::of(ctx.skb.skb))
}

/// [`fault_receive`] for kernels before 5.12.
#[cgroup_skb(ingress)]
pub fn fault_receive_old(ctx: SkBuffContext) -> i32 {
    group::handle::<InKernel<NoFetch>>(Skb::of(ctx.skb.skb))
}

/// Ingress of the delay line's tap, and of the far end of a detour: packets that have been held long enough.
#[classifier]
pub fn fault_release(ctx: TcContext) -> i32 {
    hold::release(Skb::new(&ctx))
}

/// Egress of the near end of the detour that packets make which an fq qdisc holds on their way in.
#[classifier]
pub fn fault_detour(ctx: TcContext) -> i32 {
    hold::pass_detour(Skb::new(&ctx))
}

/// Egress of the far end of the device that divides super-packets: their wire packets.
#[classifier]
pub fn fault_divided(ctx: TcContext) -> i32 {
    split::send_back(Skb::new(&ctx))
}

/// Sockets made in a cgroup that rules are limited to.
#[cgroup_sock(sock_create)]
pub fn fault_socket(ctx: SockContext) -> i32 {
    if scope::store(&ctx).is_none() {
        // Policy: the socket is made all the same; packets that it sends tell its scope later.
        maps::count(Counter::Internal);
    }
    1
}

/// connect(2) over IPv4 in a cgroup whose connections are redirected to the relay.
#[cgroup_sock_addr(connect4)]
pub fn fault_connect4(ctx: SockAddrContext) -> i32 {
    steer::connect4(&ctx)
}

/// connect(2) over IPv6.
#[cgroup_sock_addr(connect6)]
pub fn fault_connect6(ctx: SockAddrContext) -> i32 {
    steer::connect6(&ctx)
}

/// getpeername(2) over IPv4.
#[cgroup_sock_addr(getpeername4)]
pub fn fault_peer4(ctx: SockAddrContext) -> i32 {
    steer::peer4(&ctx)
}

/// getpeername(2) over IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn fault_peer6(ctx: SockAddrContext) -> i32 {
    steer::peer6(&ctx)
}

/// New connections to services of this network namespace, before the kernel looks for who listens.
#[sk_lookup]
pub fn fault_lookup(ctx: SkLookupContext) -> u32 {
    steer::lookup(&ctx)
}

/// Connections that are being opened in such a cgroup.
#[sock_ops]
pub fn fault_opening(ctx: SockOpsContext) -> u32 {
    steer::opening(&ctx)
}

/// connect(2) over IPv4, or sendto(2) to where the socket is not connected, in a cgroup whose endpoints are counted.
#[cgroup_sock_addr(connect4)]
pub fn fault_dial4(ctx: SockAddrContext) -> i32 {
    endpoints::dial4(&ctx)
}

/// connect(2) over IPv6.
#[cgroup_sock_addr(connect6)]
pub fn fault_dial6(ctx: SockAddrContext) -> i32 {
    endpoints::dial6(&ctx)
}

/// sendto(2) over IPv4 by a socket that is not connected.
#[cgroup_sock_addr(sendmsg4)]
pub fn fault_dial_send4(ctx: SockAddrContext) -> i32 {
    endpoints::dial4(&ctx)
}

/// sendto(2) over IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn fault_dial_send6(ctx: SockAddrContext) -> i32 {
    endpoints::dial6(&ctx)
}

/// bind(2) over IPv4, once it has succeeded.
#[cgroup_sock(post_bind4)]
pub fn fault_bound4(ctx: SockContext) -> i32 {
    endpoints::bound4(&ctx)
}

/// bind(2) over IPv6.
#[cgroup_sock(post_bind6)]
pub fn fault_bound6(ctx: SockContext) -> i32 {
    endpoints::bound6(&ctx)
}

/// What comes in at a listener of the relay's: SYNs are held.
#[socket_filter]
pub fn fault_admit(ctx: SkBuffContext) -> i64 {
    handshake::admit(&ctx)
}

/// connect(2) over IPv4 in a cgroup that is watched.
#[cgroup_sock_addr(connect4)]
pub fn fault_watch4(ctx: SockAddrContext) -> i32 {
    watch::connect4(&ctx)
}

/// connect(2) over IPv6 in such a cgroup.
#[cgroup_sock_addr(connect6)]
pub fn fault_watch6(ctx: SockAddrContext) -> i32 {
    watch::connect6(&ctx)
}

/// Connections of such a cgroup.
#[sock_ops]
pub fn fault_watch_state(ctx: SockOpsContext) -> u32 {
    watch::opening(&ctx);
    watch::state(&ctx)
}

/// What sockets of such a cgroup send.
#[cgroup_skb(egress)]
pub fn fault_watch_sent(ctx: SkBuffContext) -> i32 {
    watch::packet::<true>(&ctx)
}

/// What they receive.
#[cgroup_skb(ingress)]
pub fn fault_watch_received(ctx: SkBuffContext) -> i32 {
    watch::packet::<false>(&ctx)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No panic survives optimisation; the verifier refuses an endless loop if one ever does.
    loop {}
}
