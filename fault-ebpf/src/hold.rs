//! Hands packets to whatever holds them.
//!
//! The **delay line** holds any packet.
//! A packet goes to the delay line through its tap device, with an 802.1ad tag in front that holds a ticket: the index
//! of what the delay line is told about it. It comes back through the same device with another tag, which says where it
//! goes on. A tag costs no room in the packet, so super-packets stay whole.
//!
//! **fq** at the root of the interface holds packets with a departure time. Those that come in make a detour through a
//! veth pair, whose near end has an fq, and go on from its far end. It keeps packets of one hash in order behind the first that waits, so packets with another delay get another
//! hash. What waits there is a copy, without its socket: the kernel lets a socket send little more while what it sent
//! before is still on this side of the wire.
//!
//! **netem** holds packets by class: one class of a prio qdisc for each delay, chosen by the packet's priority. Unlike
//! the mark nobody routes by that.

use fault_common::abi::{Counter, Hold, PLACES, QDISC_MAJOR, WAITING_MAX, hold_flag, holder, line};
use fault_common::decide::{Counting, holding};
use fault_common::dns::DockerPorts;
use fault_common::packet::{PROTOCOL_UDP, Packet};
use fault_common::random::mix;

use crate::answer::{TCP_CHECKSUM, UDP_CHECKSUM};
use crate::maps::{
    DEPARTURE, DETOUR, DOCKER_PORTS, HOLDER, HOLDS, LEAVES, LINE, ORDERS, RELEASED, RELEASES,
    Scratch, TAP, WAYS, count,
};
use crate::skb::{NEXT, Skb};

/// Gives the packet to what holds packets here.
#[inline(always)]
pub fn hold<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
    delay_ns: u64,
) -> Result<i32, ()> {
    if skb.has_tunnel_key() {
        return Err(());
    }
    let verdict = &scratch.verdict;
    let in_qdisc = verdict.rate | verdict.slot | verdict.relay == 0;
    if HOLDER.load() == holder::FQ && in_qdisc {
        return into_fq(skb, scratch, delay_ns);
    }
    if HOLDER.load() == holder::NETEM
        && in_qdisc
        && verdict.flow == 0
        // SAFETY: the value is copied at once, and never changes.
        && let Some(&class) = unsafe { LEAVES.get(delay_ns) }
    {
        return into_netem(skb, scratch, class);
    }
    into_delay_line::<C, EGRESS, LINK>(skb, scratch, delay_ns)
}

/// Lets a packet that [`hold`] has sent on its way to a qdisc go on there. False for any other packet.
#[inline(always)]
pub fn departs<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> bool {
    if HOLDER.load() == holder::DELAY_LINE {
        return false;
    }
    if skb.is_departing() {
        depart(skb);
        return true;
    }
    if HOLDER.load() == holder::NETEM
        && skb.is_judged()
        && skb.priority() >> 16 == QDISC_MAJOR.into()
    {
        // It has been held at another interface, and is not to be held at this one again.
        skb.set_priority(0);
    }
    false
}

#[inline(always)]
fn depart<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) {
    skb.set_judged();
    if HOLDER.load() == holder::FQ
        && let Some(&time_ns) = DEPARTURE.get(0)
    {
        skb.set_departure(time_ns);
    }
}

/// Gives a packet its departure time that begins its detour.
#[inline(always)]
pub fn pass_detour(skb: Skb<true, 14>) -> i32 {
    if let (Some(_), Some(&time_ns)) = (skb.detour(), DEPARTURE.get(0)) {
        skb.set_departure(time_ns);
    }
    NEXT
}

/// Sends a packet that comes in to the device whose qdisc holds it.
#[inline(always)]
fn make_detour<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    twice: bool,
) -> Result<i32, ()> {
    let number = way_of(skb)?;
    skb.push_link_header()?;
    skb.set_detour(number);
    if twice && skb.clone_to(DETOUR.load()).is_err() {
        skb.set_judged();
        return Err(());
    }
    Ok(Skb::<EGRESS, LINK>::redirect(DETOUR.load(), 0))
}

#[inline(never)]
fn into_fq<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
    delay_ns: u64,
) -> Result<i32, ()> {
    let departure = DEPARTURE.get_ptr_mut(0).ok_or(())?;
    let mut time_ns = scratch.sight.now_ns + delay_ns;
    let flow = scratch.verdict.flow;
    if flow == 0 {
        skb.set_hash(mix(u64::from(skb.hash()) ^ (delay_ns << 1)) as u32);
    } else {
        // SAFETY: the value is copied at once; another CPU's may be missed, as on a wire with two ends.
        if let Some(&last_ns) = unsafe { ORDERS.get(flow) }
            && last_ns > time_ns
        {
            time_ns = last_ns;
        }
        // Policy: without room for its order a packet is not held.
        ORDERS.insert(flow, time_ns, 0).map_err(|_| ())?;
        skb.set_hash(flow as u32);
    }
    // SAFETY: this CPU's own entry; the copies pass `depart` before the next packet is looked at.
    unsafe { *departure = time_ns };
    let twice = scratch.verdict.duplicate;
    if !EGRESS {
        return make_detour(skb, twice);
    }
    skb.set_departing();
    let sent = skb.clone_onward();
    let sent = if twice && sent.is_ok() {
        skb.clone_onward()
    } else {
        sent
    };
    skb.set_judged();
    sent.map(|()| Skb::<EGRESS, LINK>::vanish())
}

#[inline(never)]
fn into_netem<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
    class: u32,
) -> Result<i32, ()> {
    skb.set_priority(class);
    if !EGRESS {
        return make_detour(skb, scratch.verdict.duplicate);
    }
    if scratch.verdict.duplicate {
        skb.set_departing();
        let sent = skb.clone_onward();
        skb.set_judged();
        sent?;
    }
    Ok(NEXT)
}

/// Gives the packet to the delay line.
#[inline(never)]
fn into_delay_line<C: Counting, const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    scratch: &mut Scratch,
    delay_ns: u64,
) -> Result<i32, ()> {
    if TAP.load() == 0 {
        // There is no delay line where nothing was to need it.
        return Err(());
    }
    way_of(skb)?;
    let ticket = take_ticket::<C>(scratch.sight.now_ns)?;
    let told = HOLDS.get_ptr_mut(ticket as u32).ok_or(())?;
    let (sight, verdict) = (&scratch.sight, &scratch.verdict);
    let way = if EGRESS { 0 } else { hold_flag::INGRESS };
    let twice = if verdict.duplicate {
        hold_flag::TWICE
    } else {
        0
    };
    let from = if verdict.holding & holding::TO_CLIENT != 0 {
        hold_flag::TO_CLIENT
    } else {
        0
    };
    // SAFETY: as above; a ticket is given out again only after 65,536 others.
    unsafe {
        *told = Hold {
            now_ns: sight.now_ns,
            delay_ns,
            flow: verdict.flow,
            interface: skb.ifindex(),
            bytes: sight.bytes,
            rate: verdict.rate,
            slot: verdict.slot,
            flags: way | twice | from,
            segments: sight.segments as u16,
            relay: verdict.relay,
            padding: [0; 3],
            judges: skb.judges(),
        };
    }
    if DOCKER_PORTS.load() != 0 {
        rewrite_docker_port(skb, &scratch.packet)?;
    }
    skb.push_link_header()?;
    skb.push_tag(ticket as u16)?;
    Ok(Skb::<EGRESS, LINK>::redirect(TAP.load(), 0))
}

/// Has connection tracking take the packet for one of the same connection when it comes in on loopback again.
#[inline(always)]
fn rewrite_docker_port<const EGRESS: bool, const LINK: u32>(
    skb: Skb<EGRESS, LINK>,
    packet: &Packet,
) -> Result<(), ()> {
    let ports = DockerPorts::unpacked(DOCKER_PORTS.load());
    let Some((offset, from, to)) = ports.rewrite(packet) else {
        return Ok(());
    };
    let at = packet.transport_offset;
    let is_udp = packet.protocol == PROTOCOL_UDP;
    let sum = if is_udp { UDP_CHECKSUM } else { TCP_CHECKSUM };
    skb.replace_l4_sum(at + sum, from.to_be(), to.to_be(), is_udp)?;
    skb.store(at + offset, &to.to_be_bytes())
}

/// The number by which a packet that is received here goes on after it was held. An error where none can be held.
#[inline(always)]
fn way_of<const EGRESS: bool, const LINK: u32>(skb: Skb<EGRESS, LINK>) -> Result<u32, ()> {
    // SAFETY: the value is copied at once, and never changes.
    unsafe { WAYS.get(skb.ifindex()) }.copied().ok_or(())
}

/// The next ticket. An error where the delay line does not run, or is so far behind that its device would lose the packet.
#[inline(always)]
fn take_ticket<C: Counting>(now_ns: u64) -> Result<u64, ()> {
    // Each is looked at before the next is read: the verifier knows no value of an entry that may be missing.
    let alive_until = *LINE.get(line::ALIVE_UNTIL).ok_or(())?;
    if now_ns > alive_until {
        count(Counter::NotHeld);
        return Err(());
    }
    let taken = *LINE.get(line::TAKEN).ok_or(())?;
    let issued = LINE.get_ptr_mut(line::ISSUED).ok_or(())?;
    // SAFETY: a map value lives until the program ends.
    let issued = unsafe { &mut *issued };
    let waiting = issued.wrapping_sub(taken);
    if waiting > WAITING_MAX {
        return Err(());
    }
    Ok(C::next(issued) & 0xffff)
}

/// Sends a packet that has been held on its way, where it is not judged again.
#[inline(always)]
pub fn release(skb: Skb<false, 14>) -> i32 {
    let detour = skb.detour();
    let (number, judges) = if let Some(number) = detour {
        // Who has judged it is not known any more: nobody judges it again.
        (number, u64::MAX)
    } else {
        let told = skb.tag().and_then(|ticket| RELEASED.get(ticket.into()));
        let Some(told) = told else {
            // Policy: what the stack itself sends this way is nobody's.
            return NEXT;
        };
        (told.place as u32, told.judges)
    };
    let Some(&place) = RELEASES.get(number & (PLACES - 1)) else {
        return NEXT;
    };
    // A tag on the detour is the packet's own.
    if place == 0
        || (detour.is_none() && skb.pop_tag().is_err())
        || skb.set_for_this_host().is_err()
    {
        return NEXT;
    }
    let (interface, ingress) = ((place >> 1) as u32, place as u32 & 1);
    skb.set_judges(judges, interface, ingress == 0);
    Skb::<false, 14>::redirect(interface, ingress.into())
}
