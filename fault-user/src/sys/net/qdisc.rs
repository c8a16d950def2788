//! The qdiscs that hold packets (fq, and netem below a prio qdisc), and the veth pair for incoming packets, by netlink.
//!
//! All of them outlive a killed process: the journal names them, and so do their handles, [`QDISC_MAJOR`], and the
//! names of the pair (`fault clean`).

use anyhow::{Context as _, Result, bail};
use fault_common::abi::{LEAVES, QDISC_MAJOR};
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle};
use nix::errno::Errno;

use crate::sys::net::clsact::{HEADER_BYTES, Qdisc, message, qdiscs, with_kind};
use crate::sys::net::netlink::{Netlink, attributes, header_u32, nested};

/// The parent of a qdisc at the root of an interface.
pub const ROOT: u32 = u32::MAX;
/// The handle of our qdisc at the root of an interface.
pub const HANDLE: u32 = (QDISC_MAJOR as u32) << 16;
/// Maximum number of packets in a qdisc; further packets are dropped and counted.
pub const LIMIT_PACKETS: u32 = 100_000;
/// Maximum time until a packet's departure: an hour. By default fq drops packets that would be held for more than 10 s.
const HORIZON_US: u32 = 3_600_000_000;

/// The number of the attribute with a qdisc's options (`linux/rtnetlink.h`).
const OPTIONS: u16 = 2;

/// The qdisc at the root of an interface; none where it is down.
///
/// # Errors
/// The kernel refuses the list.
pub fn root_of(interface_index: u32) -> Result<Option<Qdisc>> {
    let all = qdiscs(interface_index)?;
    Ok(all.into_iter().find(|qdisc| qdisc.parent == ROOT))
}

/// Adds an fq qdisc at the root of an interface with the kernel's default qdisc.
///
/// Its pacing is off: a socket that has used a pacing fq relies on it from then on.
///
/// # Errors
/// Another qdisc was added in the meantime, or the kernel has no fq.
pub fn add_fq(interface_index: u32) -> Result<()> {
    const PLIMIT: u16 = 1;
    const FLOW_PLIMIT: u16 = 2;
    const RATE_ENABLE: u16 = 5;
    const BUCKETS_LOG: u16 = 8;
    const ORPHAN_MASK: u16 = 10;
    const HORIZON: u16 = 14;
    let options = [
        (PLIMIT, LIMIT_PACKETS),
        (FLOW_PLIMIT, LIMIT_PACKETS),
        (RATE_ENABLE, 0),
        (BUCKETS_LOG, 12),
        (ORPHAN_MASK, u32::MAX),
        (HORIZON, HORIZON_US),
    ];
    let options = options.map(|(kind, value)| attribute(kind, &value.to_ne_bytes()));
    add(interface_index, ROOT, HANDLE, "fq", options.concat())
}

/// Adds a prio qdisc at the root, with a netem qdisc for each delay below it.
///
/// # Errors
/// As [`add_fq`], or more delays than [`LEAVES`].
pub fn add_netem(interface_index: u32, delays_ns: &[u64]) -> Result<()> {
    let bands = u32::try_from(delays_ns.len())? + 1;
    if bands > LEAVES + 1 {
        bail!("netem supports at most {LEAVES} different delays");
    }
    // `struct tc_prio_qopt`: bands, and the first of them for every priority that is not a class.
    let mut options = bands.max(2).to_ne_bytes().to_vec();
    options.extend([0; 16]);
    add(interface_index, ROOT, HANDLE, "prio", options)?;
    let limit = LIMIT_PACKETS.to_ne_bytes().to_vec();
    let below = |class: u32| HANDLE + (class << 16);
    add(interface_index, HANDLE + 1, below(1), "pfifo", limit)?;
    for (number, delay_ns) in (0..).zip(delays_ns) {
        let class = leaf(number);
        let options = netem_options(*delay_ns);
        let handle = below(class & 0xffff);
        add(interface_index, class, handle, "netem", options)?;
    }
    Ok(())
}

/// The class of the netem with this number, from 0: what the programs write into a packet's priority.
#[must_use]
pub fn leaf(number: u32) -> u32 {
    HANDLE + number + 2
}

/// `struct tc_netem_qopt` (delay in ticks, limit, loss, gap, duplication, jitter), and the delay in nanoseconds.
fn netem_options(delay_ns: u64) -> Vec<u8> {
    const LATENCY64: u16 = 10;
    let plain = [0, LIMIT_PACKETS, 0, 0, 0, 0].map(u32::to_ne_bytes);
    let mut options = plain.concat();
    options.extend(attribute(LATENCY64, &delay_ns.to_ne_bytes()));
    options
}

/// A netlink attribute; `value` is a multiple of four bytes long.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

fn add(interface_index: u32, parent: u32, handle: u32, kind: &str, options: Vec<u8>) -> Result<()> {
    let request = message(interface_index, |header| {
        header.parent = TcHandle::from(parent);
        header.handle = TcHandle::from(handle);
    })?;
    let mut request = with_kind(request, kind);
    let options = DefaultNla::new(OPTIONS, options);
    request.attributes.push(TcAttribute::Other(options));
    let request = RouteNetlinkMessage::NewQueueDiscipline(request);
    match Netlink::route()?.change(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {
            bail!("this kernel has no {kind} qdisc (modprobe sch_{kind}): leave --mechanism out")
        }
        Err(error) => Err(error).with_context(|| format!("can't add a {kind} qdisc")),
    }
}

/// The queue of one of fault's root qdiscs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QdiscQueue {
    /// Packets that are waiting in it.
    pub waiting: u32,
    /// Packets that it dropped.
    pub lost: u32,
}

/// The queues of our qdiscs, by interface, in the network namespace of the socket.
///
/// # Errors
/// The kernel refuses the list.
pub fn queues(netlink: &mut Netlink) -> Result<Vec<(u32, QdiscQueue)>> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(message(0, |_| {})?);
    netlink
        .dump(&request, |payload| {
            let ours = header_u32(payload, 8)? == HANDLE && header_u32(payload, 12)? == ROOT;
            Ok(if ours {
                Some((header_u32(payload, 4)?, decode_queue(payload)?))
            } else {
                None
            })
        })
        .context("can't list the qdiscs")
}

/// Reads `struct gnet_stats_queue`: packets that wait, their bytes, packets lost.
fn decode_queue(payload: &[u8]) -> Result<QdiscQueue> {
    const STATS2: u16 = 7;
    const STATS_QUEUE: u16 = 3;
    for (kind, value) in attributes(payload, HEADER_BYTES)? {
        if kind != STATS2 {
            continue;
        }
        for (kind, value) in nested(value)? {
            if kind == STATS_QUEUE {
                return Ok(QdiscQueue {
                    waiting: header_u32(value, 0)?,
                    lost: header_u32(value, 8)?,
                });
            }
        }
    }
    Ok(QdiscQueue::default())
}

/// Creates a veth pair and sets it up.
///
/// # Errors
/// The kernel has no veth, or refuses.
pub fn add_veth(near: &str, far: &str) -> Result<()> {
    let mut message = end(near);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end(far)))),
    ]));
    let request = RouteNetlinkMessage::NewLink(message);
    let mut netlink = Netlink::route()?;
    match netlink.change(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => bail!(
            "this kernel has no veth devices, which hold incoming packets (modprobe veth): leave --mechanism out"
        ),
        Err(error) => return Err(error).context("can't add a pair of veth devices"),
    }
    // An end can only be set up when the other one exists.
    for name in [near, far] {
        let mut message = end(name);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        netlink
            .change(RouteNetlinkMessage::NewLink(message), 0)
            .with_context(|| format!("can't set {name} up"))?;
    }
    Ok(())
}

/// One end of a pair.
fn end(name: &str) -> LinkMessage {
    /// Bytes of the largest packet.
    const MTU: u32 = 65_535;
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(MTU),
    ];
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netems_options_are_those_of_the_kernels_header() {
        let options = netem_options(5);
        assert_eq!(options.len(), 24 + 12);
        assert_eq!(options[24..28], [12, 0, 10, 0].map(u8::from_le));
        assert_eq!(options[28..], 5_u64.to_ne_bytes());
        assert_eq!(leaf(0), 0xfa17_0002);
    }
}
