//! Holds a client's SYN at the relay's listener until the relay knows what the server answers, and tells the relay of it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_skb_load_bytes, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::SkBuffContext;
use fault_common::abi::{
    Destination, Handshake, HandshakeEvent, TCP_HEADER_MAX, admitted, handshake,
};
use fault_common::flow::mapped;

use crate::maps::{HANDSHAKE_EVENTS, HANDSHAKES, RELAY_MARK};
use crate::steer::needs_interface;

/// The whole segment reaches the listener.
const KEEP: i64 = u32::MAX as i64;
/// It is dropped, and nobody is told.
const HOLD: i64 = 0;
/// `BPF_HDR_START_NET`: offsets are from the IP header.
const FROM_NETWORK_HEADER: u32 = 1;
/// Where a header of TCP tells its length, and its flags.
const LENGTH_OFFSET: u32 = 12;
const FLAGS_OFFSET: u32 = 13;
/// FIN, SYN, RST and ACK; and SYN alone.
const FLAGS: u8 = 0x17;
const SYN: u8 = 0x02;
/// Bytes of a header of TCP without options.
const LEAST: usize = 20;

/// What a listener of the relay's gets. A SYN that the relay has sent again itself carries its mark.
#[inline(always)]
pub fn admit(ctx: &SkBuffContext) -> i64 {
    let skb = ctx.skb.skb;
    let Some([flags]) = transport::<1>(skb, FLAGS_OFFSET) else {
        return KEEP;
    };
    // SAFETY: the context is valid for as long as the program runs.
    if flags & FLAGS != SYN || unsafe { (*skb).mark } == RELAY_MARK.load() {
        return KEEP;
    }
    let Some(handshake) = identify(skb) else {
        // Policy: what can't be told to the relay is accepted at once.
        return KEEP;
    };
    if needs_interface(&handshake.client.address) {
        // Policy: such a SYN can't be sent again over loopback.
        return KEEP;
    }
    // SAFETY: the value is copied at once.
    if unsafe { HANDSHAKES.get(handshake) }
        .is_some_and(|original| original.admitted != admitted::HELD)
    {
        return KEEP;
    }
    tell_syn(ctx, handshake);
    // Policy: where there is no room to tell of it, the client's next one is told.
    HOLD
}

#[inline(always)]
fn transport<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: there is room for as many bytes as are asked for.
    let status =
        unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    (status == 0).then_some(bytes)
}

#[inline(always)]
fn network<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: as above.
    let status = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            FROM_NETWORK_HEADER,
        )
    };
    (status == 0).then_some(bytes)
}

/// Both ends of a segment.
#[inline(always)]
fn identify(skb: *mut __sk_buff) -> Option<Handshake> {
    let [s0, s1, d0, d1] = transport::<4>(skb, 0)?;
    let [version] = network::<1>(skb, 0)?;
    let (client, server) = if version >> 4 == 4 {
        let source = u32::from_ne_bytes(network(skb, 12)?);
        let destination = u32::from_ne_bytes(network(skb, 16)?);
        (mapped(source), mapped(destination))
    } else {
        let word = |offset: u32| Some(u32::from_ne_bytes(network(skb, offset)?));
        (
            [word(8)?, word(12)?, word(16)?, word(20)?],
            [word(24)?, word(28)?, word(32)?, word(36)?],
        )
    };
    Some(Handshake {
        client: Destination {
            address: client,
            port: u32::from(u16::from_be_bytes([s0, s1])),
        },
        server: Destination {
            address: server,
            port: u32::from(u16::from_be_bytes([d0, d1])),
        },
    })
}

#[inline(always)]
fn tell_syn(ctx: &SkBuffContext, handshake: Handshake) {
    let skb = ctx.skb.skb;
    let mut event = HandshakeEvent {
        // SAFETY: the helper has no preconditions.
        listener: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        handshake,
        kind: handshake::SYN,
        length: LEAST as u32,
        header: [0; TCP_HEADER_MAX],
        padding: 0,
    };
    let (Some(fixed), Some([length])) = (
        transport::<LEAST>(skb, 0),
        transport::<1>(skb, LENGTH_OFFSET),
    ) else {
        return;
    };
    event.header[..LEAST].copy_from_slice(&fixed);
    let length = u32::from(length >> 4) * 4;
    for word in LEAST / 4..TCP_HEADER_MAX / 4 {
        let offset = word as u32 * 4;
        if offset < length
            && let Some(options) = transport::<4>(skb, offset)
        {
            event.header[word * 4..word * 4 + 4].copy_from_slice(&options);
            event.length = offset + 4;
        }
    }
    // It fails where there is no room: see above.
    let _told = HANDSHAKE_EVENTS.output::<HandshakeEvent>(&event, 0);
}

/// The client of a connection that is being opened is gone.
#[inline(always)]
pub fn tell_gone(handshake: Handshake) {
    let event = HandshakeEvent {
        listener: 0,
        handshake,
        kind: handshake::GONE,
        length: 0,
        header: [0; TCP_HEADER_MAX],
        padding: 0,
    };
    // Policy: where there is no room the relay learns of it when the client does not answer.
    let _told = HANDSHAKE_EVENTS.output::<HandshakeEvent>(&event, 0);
}
