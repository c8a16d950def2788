//! Access to a socket buffer: what aya's safe wrapper does not offer, in one place.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{
    bpf_check_mtu, bpf_clone_redirect, bpf_get_hash_recalc, bpf_l3_csum_replace,
    bpf_l4_csum_replace, bpf_redirect, bpf_set_hash, bpf_skb_adjust_room, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_get_tunnel_key, bpf_skb_load_bytes,
    bpf_skb_set_tstamp, bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push,
};
use aya_ebpf::programs::TcContext;
use fault_common::abi::INSTANCES_REMEMBERED;
use fault_common::flow::end;
use fault_common::packet::{ETHERTYPE_SERVICE_VLAN, Load, PROTOCOL_UDP, Packet};

use crate::flows;
use crate::frame::{Frame, JUDGED, Near, PacketEnds};
use crate::maps::{
    ASKS_DEVICE, DOCKER_PORTS, INSTANCE, NETNS_MARK, NETNS_TAG, STAMPS, Scratch, TCX, XDP,
};
use crate::scope;

/// The next program or filter decides: `TCX_NEXT` and `TC_ACT_UNSPEC` are the same.
pub const NEXT: i32 = -1;
/// The bits of `tc_index` that stand for instances.
const REMEMBERED: u32 = (1 << INSTANCES_REMEMBERED) - 1;
/// Words of the packet's control buffer in which instances leave notes for when it passes the same hook again. First,
/// which hook that is: elsewhere these words are somebody else's.
const NOTE_HOOK: usize = 0;
/// Two words: the instances that have judged it.
const NOTE_JUDGES: usize = 1;
/// What it is on its way for: 0, [`DEPARTING`] or [`PART`].
const NOTE_WAY: usize = 3;
/// It is on its way to the qdisc that is to hold it.
const DEPARTING: u32 = 1 << 16;
/// It is to be divided, or a part of what has been.
const PART: u32 = 1 << 15;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_STOLEN: i32 = 4;
/// Values of `pkt_type`: to everyone on the link, and a copy of what this host sends to a group that it is in itself.
const PACKET_BROADCAST: u32 = 1;
const PACKET_LOOPBACK: u32 = 5;
/// The loopback device has this index in every network namespace.
const LOOPBACK_IFINDEX: u32 = 1;
const BPF_F_INGRESS: u64 = 1;
const BPF_F_RECOMPUTE_CSUM: u64 = 1;
const BPF_F_MARK_MANGLED_0: u64 = 1 << 5;
const BPF_ADJ_ROOM_MAC: u32 = 1;

/// A socket buffer at the egress or ingress hook of a device whose link layer header has `LINK` bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Skb<const EGRESS: bool, const LINK: u32>(*mut __sk_buff);

/// A socket buffer for what does not depend on hook and device.
pub type Any = Skb<true, 0>;

impl<const EGRESS: bool, const LINK: u32> Load for Skb<EGRESS, LINK> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: any bytes are a value.
        unsafe { self.load_any(offset) }
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: as above.
        unsafe { self.load_any(offset) }
    }
}

impl<const EGRESS: bool, const LINK: u32> PacketEnds for Skb<EGRESS, LINK> {
    #[inline(always)]
    fn ends(&self) -> u32 {
        if !EGRESS {
            end::RECEIVER
        } else if self.is_loopback() {
            // Only there both ends are local to a packet on its way out.
            end::SENDER | end::RECEIVER
        } else {
            end::SENDER
        }
    }

    #[inline(always)]
    fn ask(&self, _scratch: *mut Scratch, ends: u32) {
        scope::fault_ask(self.0, ends);
    }

    #[inline(always)]
    fn find_service(&self) {
        flows::fault_find_service(self.0, self.ends());
    }
}

impl<const EGRESS: bool, const LINK: u32> Frame for Skb<EGRESS, LINK> {
    const LINK: u32 = LINK;

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid for as long as the program runs; so below.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        u16::from_be(unsafe { (*self.0).protocol } as u16)
    }

    #[inline(always)]
    fn glance<const N: usize>(&self) -> Option<Near> {
        let (data, end) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        let at = data + LINK as usize;
        if at + N > end {
            return None;
        }
        // SAFETY: the bytes lie between the two bounds that the kernel gives.
        Some(unsafe { Near::new(at as *const u8) })
    }

    #[inline(always)]
    fn segments(&self, packet: &Packet) -> u32 {
        let (segments, size) = unsafe { ((*self.0).gso_segs, (*self.0).gso_size) };
        if size == 0 {
            1
        } else if segments == 0 {
            // A forwarded super-packet of a dubious source comes without the count.
            packet.payload_length().div_ceil(size).max(1)
        } else {
            segments
        }
    }

    #[inline(always)]
    fn segment_size(&self, packet: &Packet) -> u32 {
        let size = unsafe { (*self.0).gso_size };
        let headers = packet.payload_offset - packet.network_offset;
        if size == 0 {
            packet.length()
        } else {
            headers + size
        }
    }

    #[inline(always)]
    fn renew(&self) {
        flows::fault_renew(self.0, self.ends());
    }

    #[inline(always)]
    fn insert(&self) {
        flows::fault_insert(self.0, self.ends());
    }
}

impl<const EGRESS: bool, const LINK: u32> Skb<EGRESS, LINK> {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self(ctx.skb.skb)
    }

    /// # Safety
    /// Any bytes are a value of `T`.
    #[inline(always)]
    unsafe fn load_any<T>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes as many bytes as it is told, or fails.
        unsafe {
            let (to, length) = (value.as_mut_ptr().cast(), size_of::<T>() as u32);
            let status = bpf_skb_load_bytes(self.0.cast(), offset, to, length);
            if status == 0 {
                Some(value.assume_init())
            } else {
                None
            }
        }
    }

    /// The buffer of a program's context, whose hook and device do not matter.
    #[inline(always)]
    pub fn of(buffer: *mut __sk_buff) -> Self {
        Self(buffer)
    }

    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.0
    }

    /// Whether this instance has judged the packet, or made it.
    #[inline(always)]
    pub fn is_judged(&self) -> bool {
        (self.tc_index() != 0 && self.judges() & INSTANCE.load() != 0)
            || (!EGRESS && XDP.load() == 1 && self.came_judged())
    }

    /// The instances that have judged the packet, a bit each. At the hook where they did, whenever it passes there again,
    /// that is all of them; at another one it is the first [`INSTANCES_REMEMBERED`].
    #[inline(always)]
    pub fn judges(&self) -> u64 {
        self.judges_at(EGRESS)
    }

    #[inline(always)]
    fn judges_at(&self, egress: bool) -> u64 {
        let mut judges = self.remembered();
        if self.note(NOTE_HOOK) == hook(self.ifindex(), egress) {
            judges |=
                u64::from(self.note(NOTE_JUDGES)) | u64::from(self.note(NOTE_JUDGES + 1)) << 32;
        }
        judges
    }

    /// Has the packet say who has judged it. `tc_index` stays with it and its copies through forwarding, VLANs and
    /// bridges, and unlike the mark nobody routes or filters by it; it even stays when the packet goes to another network
    /// namespace, so it says of which it speaks. The notes hold for one hook.
    #[inline(always)]
    pub fn set_judges(&self, judges: u64, ifindex: u32, egress: bool) {
        self.set_tc_index(NETNS_MARK.load() << INSTANCES_REMEMBERED | judges as u32 & REMEMBERED);
        self.set_note(NOTE_HOOK, hook(ifindex, egress));
        self.set_note(NOTE_JUDGES, judges as u32);
        self.set_note(NOTE_JUDGES + 1, (judges >> 32) as u32);
        self.set_note(NOTE_WAY, 0);
    }

    /// Remembers that this instance has judged the packet.
    #[inline(always)]
    pub fn set_judged(&self) {
        self.set_judged_at(EGRESS);
    }

    /// [`Self::set_judged`] where the type does not tell the side.
    #[inline(always)]
    pub fn set_judged_at(&self, egress: bool) {
        self.set_judges(
            self.judges_at(egress) | INSTANCE.load(),
            self.ifindex(),
            egress,
        );
    }

    /// Whether this is a part of a super-packet that was met at this hook.
    #[inline(always)]
    pub fn is_part(&self, egress: bool) -> bool {
        self.way(egress) == PART
    }

    /// See [`Self::is_part`]. Nobody has judged its parts who has not judged the whole.
    #[inline(always)]
    pub fn set_part(&self) {
        self.set_judges(self.judges(), self.ifindex(), EGRESS);
        self.set_note(NOTE_WAY, PART);
    }

    /// Where the super-packet was met that this is a part of: the interface, and whether it arrived there. Nothing for
    /// any other packet.
    #[inline(always)]
    pub fn origin(&self) -> Option<(u32, bool)> {
        if self.tc_index() >> INSTANCES_REMEMBERED != NETNS_MARK.load()
            || self.note(NOTE_WAY) != PART
        {
            return None;
        }
        let hook = self.note(NOTE_HOOK) ^ NETNS_TAG.load();
        Some((hook >> 1, hook & 1 == 0))
    }

    /// What it is on its way for, when it passes this hook again.
    #[inline(always)]
    fn way(&self, egress: bool) -> u32 {
        if self.tc_index() != 0 && self.note(NOTE_HOOK) == hook(self.ifindex(), egress) {
            self.note(NOTE_WAY)
        } else {
            0
        }
    }

    #[inline(always)]
    fn note(&self, index: usize) -> u32 {
        unsafe { (*self.0).cb[index] }
    }

    #[inline(always)]
    fn set_note(&self, index: usize, note: u32) {
        unsafe { (*self.0).cb[index] = note };
    }

    /// Whether the XDP program in front has judged it. From here on the packet says so itself.
    #[inline(always)]
    fn came_judged(&self) -> bool {
        let (at, end) = unsafe { ((*self.0).data_meta as usize, (*self.0).data as usize) };
        if at + size_of::<u32>() > end {
            return false;
        }
        // SAFETY: the bytes lie between the two bounds that the kernel gives.
        let judged = unsafe { *(at as *const u32) } == JUDGED | NETNS_MARK.load();
        if judged {
            self.set_judged();
        }
        judged
    }

    /// Whether this instance has judged the packet at another hook, as far as the packet itself tells: see
    /// [`INSTANCES_REMEMBERED`].
    #[inline(always)]
    pub fn is_marked(&self) -> bool {
        self.remembered() & INSTANCE.load() != 0
    }

    #[inline(always)]
    fn remembered(&self) -> u64 {
        let index = self.tc_index();
        if index >> INSTANCES_REMEMBERED == NETNS_MARK.load() {
            u64::from(index & REMEMBERED)
        } else {
            0
        }
    }

    #[inline(always)]
    fn packet_type(&self) -> u32 {
        unsafe { (*self.0).pkt_type }
    }

    /// Whether the packet is a copy of what this host sends to a group that it is in itself.
    #[inline(always)]
    pub fn is_looped_back(&self) -> bool {
        self.packet_type() == PACKET_LOOPBACK
    }

    /// Whether every socket that wants the packet is given it, and not only one.
    #[inline(always)]
    pub fn is_group(&self, packet: &Packet) -> bool {
        packet.protocol == PROTOCOL_UDP
            && (packet.is_to_group()
                || self.packet_type() == PACKET_BROADCAST
                || self.is_looped_back())
    }

    /// Puts a link layer header in front of a packet that was looped back before it had one.
    #[inline(always)]
    pub fn complete(&self) -> Result<(), ()> {
        if EGRESS || LINK == 0 || !self.is_looped_back() {
            return Ok(());
        }
        let [first]: [u8; 1] = self.load(0).ok_or(())?;
        if !matches!(first >> 4, 4 | 6) {
            // Another instance has done so.
            return Ok(());
        }
        done(unsafe { bpf_skb_change_head(self.0, LINK, 0) })
    }

    /// 16 bits that stay with a packet and its copies.
    #[inline(always)]
    pub fn tc_index(&self) -> u32 {
        unsafe { (*self.0).tc_index }
    }

    #[inline(always)]
    pub fn set_tc_index(&self, index: u32) {
        unsafe { (*self.0).tc_index = index };
    }

    /// Whether this instance has sent the packet on its way to the qdisc that is to hold it.
    #[inline(always)]
    pub fn is_departing(&self) -> bool {
        self.way(EGRESS) == DEPARTING
    }

    /// See [`Self::is_departing`].
    #[inline(always)]
    pub fn set_departing(&self) {
        self.set_judged();
        self.set_note(NOTE_WAY, DEPARTING);
    }

    /// The number of the place where the packet goes on, when it makes a detour.
    #[inline(always)]
    pub fn detour(&self) -> Option<u32> {
        let index = self.tc_index();
        if index & 0xf000 == 0xc000 {
            Some(index & 0x0fff)
        } else {
            None
        }
    }

    /// See [`Self::detour`].
    #[inline(always)]
    pub fn set_detour(&self, number: u32) {
        self.set_tc_index(0xc000 | number & 0x0fff);
    }

    #[inline(always)]
    pub fn priority(&self) -> u32 {
        unsafe { (*self.0).priority }
    }

    #[inline(always)]
    pub fn set_priority(&self, priority: u32) {
        unsafe { (*self.0).priority = priority };
    }

    /// A number that the packets of a connection share, made of its addresses and ports.
    #[inline(always)]
    pub fn hash(&self) -> u32 {
        unsafe { bpf_get_hash_recalc(self.0) }
    }

    #[inline(always)]
    pub fn set_hash(&self, hash: u32) {
        // It never fails.
        unsafe { bpf_set_hash(self.0, hash) };
    }

    /// Sets the time (`CLOCK_MONOTONIC`) at which the packet is to depart.
    #[inline(always)]
    pub fn set_departure(&self, time_ns: u64) {
        const BPF_SKB_TSTAMP_DELIVERY_MONO: u32 = 1;
        if STAMPS.load() == 1 {
            // SAFETY: the helper takes numbers only.
            let status =
                unsafe { bpf_skb_set_tstamp(self.0, time_ns, BPF_SKB_TSTAMP_DELIVERY_MONO) };
            if status == 0 {
                return;
            }
        }
        unsafe { (*self.0).tstamp = time_ns };
    }

    /// Whether this network namespace has a device. True where the kernel can't be asked (before Linux 5.12).
    #[inline(always)]
    pub fn has_device(&self, ifindex: u32) -> bool {
        if ASKS_DEVICE.load() == 0 {
            return true;
        }
        let mut length = 0;
        // SAFETY: the helper writes a number. A super-packet is not too long for any device.
        unsafe { bpf_check_mtu(self.0.cast(), ifindex, &raw mut length, 0, 0) >= 0 }
    }

    /// Payload bytes of each segment of a super-packet; 0 for an ordinary packet.
    #[inline(always)]
    pub fn gso_size(&self) -> u32 {
        unsafe { (*self.0).gso_size }
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        unsafe { (*self.0).ifindex }
    }

    /// The interface that the packet was received by; 0 for what this host sends itself.
    #[inline(always)]
    pub fn ingress_ifindex(&self) -> u32 {
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        self.ifindex() == LOOPBACK_IFINDEX
    }

    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u32, bytes: &[u8; N]) -> Result<(), ()> {
        self.store_with(offset, bytes, 0)
    }

    /// Stores bytes that no checksum field has been adjusted for.
    #[inline(always)]
    pub fn store_summed<const N: usize>(&self, offset: u32, bytes: &[u8; N]) -> Result<(), ()> {
        self.store_with(offset, bytes, BPF_F_RECOMPUTE_CSUM)
    }

    #[inline(always)]
    fn store_with<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        flags: u64,
    ) -> Result<(), ()> {
        // SAFETY: `bytes` is N bytes long.
        let status =
            unsafe { bpf_skb_store_bytes(self.0, offset, bytes.as_ptr().cast(), N as u32, flags) };
        done(status)
    }

    /// Adjusts the IPv4 header checksum at `offset` for 16 bits that changed.
    #[inline(always)]
    pub fn replace_l3_sum(&self, offset: u32, from: u16, to: u16) -> Result<(), ()> {
        done(unsafe { bpf_l3_csum_replace(self.0, offset, from.into(), to.into(), 2) })
    }

    /// Adjusts the transport checksum at `offset` for 16 bits of the payload that changed, unless the
    /// device is going to compute it.
    #[inline(always)]
    pub fn replace_l4_sum(&self, offset: u32, from: u16, to: u16, udp: bool) -> Result<(), ()> {
        let flags = 2 | if udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        done(unsafe { bpf_l4_csum_replace(self.0, offset, from.into(), to.into(), flags) })
    }

    /// Copies `length` bytes from `offset` on to `to`.
    ///
    /// # Safety
    /// There is room for as many at `to`.
    #[inline(always)]
    pub unsafe fn load_raw(&self, offset: u32, to: *mut u8, length: u32) -> Result<(), ()> {
        done(unsafe { bpf_skb_load_bytes(self.0.cast(), offset, to.cast(), length) })
    }

    /// Overwrites `length` bytes from `offset` on, for which no checksum field has been adjusted.
    ///
    /// # Safety
    /// There are as many at `from`.
    #[inline(always)]
    pub unsafe fn store_raw_summed(
        &self,
        offset: u32,
        from: *const u8,
        length: u32,
    ) -> Result<(), ()> {
        let flags = BPF_F_RECOMPUTE_CSUM;
        done(unsafe { bpf_skb_store_bytes(self.0, offset, from.cast(), length, flags) })
    }

    /// Cuts off what is behind `length` bytes, or adds bytes up to there.
    #[inline(always)]
    pub fn resize(&self, length: u32) -> Result<(), ()> {
        done(unsafe { bpf_skb_change_tail(self.0, length, 0) })
    }

    /// Makes room between the link layer and the IP header.
    #[inline(always)]
    pub fn make_room(&self, bytes: u32) -> Result<(), ()> {
        done(unsafe { bpf_skb_adjust_room(self.0, bytes as i32, BPF_ADJ_ROOM_MAC, 0) })
    }

    /// Sends a copy the way this packet goes.
    #[inline(always)]
    pub fn clone_onward(&self) -> Result<(), ()> {
        let flags = if EGRESS { 0 } else { BPF_F_INGRESS };
        done(unsafe { bpf_clone_redirect(self.0, self.ifindex(), flags) })
    }

    /// Sends a copy out through another device.
    #[inline(always)]
    pub fn clone_to(&self, ifindex: u32) -> Result<(), ()> {
        done(unsafe { bpf_clone_redirect(self.0, ifindex, 0) })
    }

    /// Sends a copy back to where this packet came from, as an answer of ours.
    #[inline(always)]
    pub fn clone_back(&self) -> Result<(), ()> {
        let judges = self.judges();
        self.set_answer();
        let sent = unsafe { bpf_clone_redirect(self.0, self.ifindex(), self.back_flags()) };
        self.set_judges(judges, self.ifindex(), EGRESS);
        done(sent)
    }

    /// Marks an answer of ours, which nobody else has judged.
    #[inline(always)]
    fn set_answer(&self) {
        let egress = self.back_flags() != BPF_F_INGRESS;
        self.set_judges(INSTANCE.load(), self.ifindex(), egress);
    }

    /// On loopback both ways are the same, and only the way out keeps the route that 127.0.0.0/8 needs. It also keeps what
    /// connection tracking knows, which would send an answer about a translated query on to the server.
    #[inline(always)]
    fn goes_on(&self) -> bool {
        EGRESS && self.is_loopback() && DOCKER_PORTS.load() == 0
    }

    #[inline(always)]
    fn back_flags(&self) -> u64 {
        if EGRESS && !self.goes_on() {
            BPF_F_INGRESS
        } else {
            0
        }
    }

    /// Puts an Ethernet header in front of a packet without one, as devices that take such headers want it. The kernel
    /// takes it away again when the packet is redirected to a device without (`__bpf_redirect_no_mac`).
    #[inline(always)]
    pub fn push_link_header(&self) -> Result<(), ()> {
        const HEADER_BYTES: u32 = 14;
        const TYPE_AT: u32 = 12;
        if LINK != 0 {
            return Ok(());
        }
        let ethertype = self.ethertype().to_be_bytes();
        done(unsafe { bpf_skb_change_head(self.0, HEADER_BYTES, 0) })?;
        self.store(TYPE_AT, &ethertype)
    }

    /// Whether a tunnel device that serves several tunnels has noted with the packet which one it belongs to. That is
    /// lost when the packet leaves the kernel.
    #[inline(always)]
    pub fn has_tunnel_key(&self) -> bool {
        const EPROTO: core::ffi::c_long = -71;
        /// `struct bpf_tunnel_key` up to `tunnel_label`, which the kernel takes too.
        const KEY_BYTES: u32 = 24;
        let mut key = [0_u32; KEY_BYTES as usize / 4];
        // SAFETY: the helper writes as many bytes as it is told.
        let status =
            unsafe { bpf_skb_get_tunnel_key(self.0, key.as_mut_ptr().cast(), KEY_BYTES, 0) };
        // The latter when its ends are of IPv6.
        status == 0 || status == EPROTO
    }

    /// Puts an 802.1ad tag in front.
    #[inline(always)]
    pub fn push_tag(&self, tag: u16) -> Result<(), ()> {
        done(unsafe { bpf_skb_vlan_push(self.0, ETHERTYPE_SERVICE_VLAN.to_be(), tag) })
    }

    /// The tag in front, if there is one.
    #[inline(always)]
    pub fn tag(&self) -> Option<u16> {
        unsafe {
            if (*self.0).vlan_present == 0 {
                None
            } else {
                Some((*self.0).vlan_tci as u16)
            }
        }
    }

    #[inline(always)]
    pub fn pop_tag(&self) -> Result<(), ()> {
        done(unsafe { bpf_skb_vlan_pop(self.0) })
    }

    /// Makes the packet one that is for this host: what comes from the tap has the address of another device.
    #[inline(always)]
    pub fn set_for_this_host(&self) -> Result<(), ()> {
        const PACKET_HOST: u32 = 0;
        done(unsafe { bpf_skb_change_type(self.0, PACKET_HOST) })
    }

    /// The return value that sends this packet out through a device, or with flag 1 into it.
    #[inline(always)]
    pub fn redirect(ifindex: u32, flags: u64) -> i32 {
        unsafe { bpf_redirect(ifindex, flags) as i32 }
    }

    /// The return value that sends this packet back to where it came from, as an answer of ours.
    #[inline(always)]
    pub fn send_back(&self) -> i32 {
        self.set_answer();
        if self.goes_on() {
            return NEXT;
        }
        unsafe { bpf_redirect(self.ifindex(), self.back_flags()) as i32 }
    }

    /// The return value that makes this packet vanish without its sender being told.
    #[inline(always)]
    pub fn vanish() -> i32 {
        if !EGRESS {
            return TC_ACT_SHOT;
        }
        // TC_ACT_SHOT at egress is a drop that the sender's socket hears of. TCX takes no STOLEN there,
        // but a redirect to no device frees the packet quietly.
        if TCX.load() == 1 {
            unsafe { bpf_redirect(0, 0) as i32 }
        } else {
            TC_ACT_STOLEN
        }
    }
}

/// Stands for one hook of this network namespace.
#[inline(always)]
fn hook(ifindex: u32, egress: bool) -> u32 {
    NETNS_TAG.load() ^ (ifindex << 1 | u32::from(egress))
}

#[inline(always)]
fn done(status: core::ffi::c_long) -> Result<(), ()> {
    if status == 0 { Ok(()) } else { Err(()) }
}
