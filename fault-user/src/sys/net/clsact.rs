//! The tc hooks of kernels before 6.6: a `clsact` qdisc and BPF filters on it, by netlink.
//!
//! Unlike TCX links these outlive a killed process. Those of fault therefore have a unique mark: [`PRIORITY`], a
//! program name that starts with [`PROGRAM_PREFIX`], and as handle the number of the instance that owns them, and 1.
//! Filters without the full mark belong to other programs and are never touched.
use crate::sys::net::netlink::{Netlink, attributes, header_u32, nested};
use anyhow::{Context, Result, bail};
use fault_common::abi::INSTANCES_MAX;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, parse_string, parse_u32};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage,
    TcOption,
};
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The priority (`pref`) of every filter of ours. Others take lower numbers, and so run before it,
/// unless they ask for a higher one.
pub const PRIORITY: u16 = 0xFA17;

/// What the names of all our programs start with.
pub const PROGRAM_PREFIX: &str = "fault_";

/// Bytes of `struct tcmsg`, which every tc message starts with (`linux/rtnetlink.h`).
pub(super) const HEADER_BYTES: usize = 20;

/// `ETH_P_ALL`: every ethertype.
const ALL_PROTOCOLS: u16 = 3;

/// Where the clsact qdisc is attached, and its handle, `ffff:` (`linux/pkt_sched.h`).
const CLSACT_HANDLE: TcHandle = TcHandle {
    major: u16::MAX,
    minor: 0,
};

/// Attribute numbers of `linux/rtnetlink.h` and `linux/pkt_cls.h`.
mod attribute {
    pub const KIND: u16 = 1;
    pub const OPTIONS: u16 = 2;
    /// Inside `OPTIONS` of a BPF filter.
    pub const BPF_NAME: u16 = 7;
    /// Inside `OPTIONS` of a BPF filter.
    pub const BPF_ID: u16 = 11;
}

/// A tc hook of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TcHook {
    /// Packets that arrive at the interface.
    Ingress,
    /// Packets that leave through the interface.
    Egress,
}

impl TcHook {
    /// The class of the clsact qdisc that stands for it.
    fn parent(self) -> TcHandle {
        TcHandle {
            major: u16::MAX,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// A queueing discipline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qdisc {
    /// The interface that it is on.
    pub interface_index: u32,
    /// `clsact`, `ingress`, `fq`, `netem`, `noqueue`…
    pub kind: String,
    /// Its own handle, the major number in the upper half.
    pub handle: u32,
    /// What it is attached to, with `0xFFFF_FFFF` for the interface's root.
    pub parent: u32,
}

/// A filter on a clsact qdisc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcFilter {
    /// The interface that it is on.
    pub interface_index: u32,
    /// Which way.
    pub direction: TcHook,
    /// Lower ones run first.
    pub priority: u16,
    /// The ethertype that it is for, in network byte order as the kernel has it.
    protocol_be: u16,
    /// Distinguishes filters of one priority.
    pub handle: u32,
    /// `bpf`, `flower`, `u32`…
    pub kind: String,
    /// The name that was given with a BPF program.
    pub program_name: Option<String>,
    /// The kernel's id of a BPF program.
    pub program_id: Option<u32>,
}

impl TcFilter {
    /// It carries the whole mark of `fault`, whichever instance it is of.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.kind == "bpf"
            && self.priority == PRIORITY
            && self.handle != 0
            && self
                .program_name
                .as_ref()
                .is_some_and(|name| name.starts_with(PROGRAM_PREFIX))
    }

    /// The number of the instance that owns it, if it is ours.
    #[must_use]
    pub fn owner(&self) -> Option<u32> {
        let owner = self.handle.checked_sub(1)?;
        (self.is_ours() && owner < INSTANCES_MAX).then_some(owner)
    }
}

/// The qdiscs of one interface.
///
/// # Errors
/// When the kernel refuses the list or answers what can't be read.
pub fn qdiscs(interface_index: u32) -> Result<Vec<Qdisc>> {
    let mut found = all_qdiscs()?;
    found.retain(|qdisc| qdisc.interface_index == interface_index);
    Ok(found)
}

/// Those of all interfaces: the kernel lists no fewer.
fn all_qdiscs() -> Result<Vec<Qdisc>> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(message(0, |_| {})?);
    Netlink::route()?
        .dump(&request, |payload| decode_qdisc(payload).map(Some))
        .context("can't list the qdiscs")
}

fn decode_qdisc(payload: &[u8]) -> Result<Qdisc> {
    let mut kind = String::new();
    for (number, value) in attributes(payload, HEADER_BYTES)? {
        if number == attribute::KIND {
            kind = parse_string(value)?;
        }
    }
    Ok(Qdisc {
        interface_index: header_u32(payload, 4)?,
        kind,
        handle: header_u32(payload, 8)?,
        parent: header_u32(payload, 12)?,
    })
}

/// The filters on an interface's clsact (or ingress) qdisc, in both directions; none without one.
///
/// # Errors
/// When the kernel refuses the list or answers what can't be read.
pub fn filters(interface_index: u32) -> Result<Vec<TcFilter>> {
    let mut netlink = Netlink::route()?;
    let mut found = Vec::new();
    for direction in [TcHook::Ingress, TcHook::Egress] {
        let request = message(interface_index, |header| header.parent = direction.parent())?;
        let request = RouteNetlinkMessage::GetTrafficFilter(request);
        let listed = netlink.dump(&request, |payload| decode_filter(direction, payload));
        found.extend(listed.context("can't list the tc filters")?);
    }
    Ok(found)
}

/// `None` for the entry that stands for a whole priority.
fn decode_filter(direction: TcHook, payload: &[u8]) -> Result<Option<TcFilter>> {
    // The upper half is the priority, the lower the protocol (TC_H_MAKE in tc's own sources).
    let info = TcHandle::from(header_u32(payload, 16)?);
    let mut filter = TcFilter {
        interface_index: header_u32(payload, 4)?,
        direction,
        priority: info.major,
        protocol_be: info.minor,
        handle: header_u32(payload, 8)?,
        kind: String::new(),
        program_name: None,
        program_id: None,
    };
    for (number, value) in attributes(payload, HEADER_BYTES)? {
        match number {
            attribute::KIND => filter.kind = parse_string(value)?,
            attribute::OPTIONS if filter.kind == "bpf" => {
                for (number, value) in nested(value)? {
                    match number {
                        attribute::BPF_NAME => filter.program_name = Some(parse_string(value)?),
                        attribute::BPF_ID => filter.program_id = Some(parse_u32(value)?),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok((filter.handle != 0).then_some(filter))
}

/// Whether an interface has a clsact qdisc.
///
/// # Errors
/// When the kernel refuses the list.
pub fn is_there(interface_index: u32) -> Result<bool> {
    let present = qdiscs(interface_index)?;
    Ok(present.iter().any(|qdisc| qdisc.kind == "clsact"))
}

/// Makes sure that an interface has a clsact qdisc. `true`: it had none and has one now.
///
/// The caller records that first ([`crate::undo::change::SystemChange::Clsact`]), so that it can be taken
/// away again, by [`remove_if_unused`], however this process ends.
///
/// # Errors
/// When the kernel has no clsact, or an `ingress` qdisc takes its place.
pub fn ensure(interface_index: u32) -> Result<bool> {
    if is_there(interface_index)? {
        return Ok(false);
    }
    let present = qdiscs(interface_index)?;
    if present.iter().any(|qdisc| qdisc.kind == "ingress") {
        bail!(
            "interface {interface_index} has an ingress qdisc, which excludes clsact: remove it (tc qdisc del dev \
             NAME ingress) or use another interface"
        );
    }
    let request = message(interface_index, |header| {
        header.parent = TcHandle::CLSACT;
        header.handle = CLSACT_HANDLE;
    })?;
    let request = RouteNetlinkMessage::NewQueueDiscipline(with_kind(request, "clsact"));
    match Netlink::route()?.change(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(true),
        // Another program has just added it.
        Err(error) if is(&error, Errno::EEXIST) => Ok(false),
        Err(error) if is(&error, Errno::ENOENT) => {
            bail!("this kernel has no clsact qdisc: modprobe sch_ingress (CONFIG_NET_SCH_INGRESS)")
        }
        Err(error) => Err(error).context("can't add a clsact qdisc"),
    }
}

/// Attaches a program of type `BPF_PROG_TYPE_SCHED_CLS` with our whole mark, in direct-action mode.
/// The interface needs a clsact qdisc ([`ensure`]). `name` must start with [`PROGRAM_PREFIX`]. What a dead instance of the
/// same number has left there goes.
///
/// # Errors
/// When the name is not ours, or the kernel refuses (no `cls_bpf`).
pub fn attach(
    interface_index: u32,
    direction: TcHook,
    program: BorrowedFd<'_>,
    name: &str,
    owner: u32,
) -> Result<()> {
    if !name.starts_with(PROGRAM_PREFIX) || owner >= INSTANCES_MAX {
        bail!("a filter without our mark could never be found again");
    }
    let stale = filters(interface_index)?.into_iter();
    for filter in stale.filter(|one| one.direction == direction && one.owner() == Some(owner)) {
        remove(&filter)?;
    }
    let mut request = message(interface_index, |header| {
        header.parent = direction.parent();
        header.handle = (owner + 1).into();
        header.info = TcHandle {
            major: PRIORITY,
            minor: ALL_PROTOCOLS.to_be(),
        }
        .into();
    })?;
    request = with_kind(request, TcFilterBpf::KIND);
    let program = program.as_raw_fd().cast_unsigned();
    let options = [
        TcFilterBpfOption::ProgFd(program),
        TcFilterBpfOption::ProgName(name.to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let options = options.map(TcOption::Bpf).to_vec();
    request.attributes.push(TcAttribute::Options(options));
    Netlink::route()?
        .change(
            RouteNetlinkMessage::NewTrafficFilter(request),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .context("can't add a tc filter (modprobe cls_bpf; CONFIG_NET_CLS_BPF)")
}

/// Removes one filter of ours. `false`: it was gone already.
///
/// # Errors
/// When it is not ours, or the kernel refuses.
pub fn remove(filter: &TcFilter) -> Result<bool> {
    if !filter.is_ours() {
        bail!("a filter of somebody else's is not to be removed");
    }
    let request = message(filter.interface_index, |header| {
        header.parent = filter.direction.parent();
        header.handle = filter.handle.into();
        header.info = TcHandle {
            major: filter.priority,
            minor: filter.protocol_be,
        }
        .into();
    })?;
    let request = RouteNetlinkMessage::DelTrafficFilter(with_kind(request, &filter.kind));
    match Netlink::route()?.change(request, 0) {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error).context("can't remove a tc filter"),
    }
}

/// Removes every filter on an interface that belongs to the instance `owner`, and says how many.
///
/// # Errors
/// When the filters can't be listed or removed.
pub fn remove_of(interface_index: u32, owner: u32) -> Result<usize> {
    let mut removed = 0;
    for filter in filters(interface_index)? {
        if filter.owner() == Some(owner) && remove(&filter)? {
            removed += 1;
        }
    }
    Ok(removed)
}

/// [`remove_of`] on every interface of the calling thread's network namespace.
///
/// # Errors
/// As [`remove_of`].
pub fn remove_all_of(owner: u32) -> Result<()> {
    let qdiscs = all_qdiscs()?.into_iter();
    for qdisc in qdiscs.filter(|qdisc| qdisc.kind == "clsact") {
        match remove_of(qdisc.interface_index, owner) {
            // With its interface, meanwhile.
            Err(error) if error.root_cause().downcast_ref().is_some_and(is_gone) => {}
            removed => drop(removed?),
        }
    }
    Ok(())
}

/// Removes a clsact qdisc that [`ensure`] made, unless there is a filter on it, of whomever.
/// `true`: it is removed now. (The kernel has no "remove if empty": a filter that is added in the
/// microseconds between the look and the removal goes with it.)
///
/// # Errors
/// When its filters can't be listed, or the kernel refuses.
pub fn remove_if_unused(interface_index: u32) -> Result<bool> {
    if !is_there(interface_index)? || !filters(interface_index)?.is_empty() {
        return Ok(false);
    }
    remove_qdisc(
        interface_index,
        TcHandle::CLSACT.into(),
        CLSACT_HANDLE.into(),
        "clsact",
    )
}

/// Removes the qdisc of exactly this handle and kind at this parent. `false`: it is not there.
///
/// # Errors
/// When the qdiscs can't be listed, or the kernel refuses.
pub fn remove_qdisc(interface_index: u32, parent: u32, handle: u32, kind: &str) -> Result<bool> {
    let wanted = Qdisc {
        interface_index,
        kind: kind.to_owned(),
        handle,
        parent,
    };
    if !qdiscs(interface_index)?.contains(&wanted) {
        return Ok(false);
    }
    let request = message(interface_index, |header| {
        header.parent = parent.into();
        header.handle = handle.into();
    })?;
    let request = RouteNetlinkMessage::DelQueueDiscipline(with_kind(request, kind));
    match Netlink::route()?.change(request, 0) {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("can't remove a {kind} qdisc")),
    }
}

pub(super) fn message(interface_index: u32, fill: impl FnOnce(&mut TcHeader)) -> Result<TcMessage> {
    let mut header = TcHeader {
        index: i32::try_from(interface_index).context("an impossible interface index")?,
        ..TcHeader::default()
    };
    fill(&mut header);
    Ok(TcMessage::from_parts(header, Vec::new()))
}

pub(super) fn with_kind(mut message: TcMessage, kind: &str) -> TcMessage {
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    message
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

/// It was removed by another program or with its interface.
fn is_gone(error: &io::Error) -> bool {
    is(error, Errno::ENOENT) || is(error, Errno::ENODEV) || is(error, Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(priority: u16, handle: u32, kind: &str, name: Option<&str>) -> TcFilter {
        TcFilter {
            interface_index: 1,
            direction: TcHook::Egress,
            priority,
            protocol_be: 0x0300,
            handle,
            kind: kind.to_owned(),
            program_name: name.map(str::to_owned),
            program_id: None,
        }
    }

    #[test]
    fn a_filter_is_ours_only_by_the_whole_mark() {
        let ours = filter(PRIORITY, 8, "bpf", Some("fault_egress"));
        assert_eq!(ours.owner(), Some(7));
        for other in [
            filter(1, 8, "bpf", Some("fault_egress")),
            filter(PRIORITY, 0, "bpf", Some("fault_egress")),
            filter(PRIORITY, 8, "u32", Some("fault_egress")),
            filter(PRIORITY, 8, "bpf", Some("cil_to_netdev")),
            filter(PRIORITY, 8, "bpf", None),
        ] {
            assert_eq!(other.owner(), None, "{other:?}");
            assert!(remove(&other).is_err());
        }
    }

    #[test]
    fn truncated_answers_are_errors_and_no_panic() {
        for length in 0..HEADER_BYTES {
            assert!(decode_qdisc(&vec![1; length]).is_err());
            assert!(decode_filter(TcHook::Ingress, &vec![1; length]).is_err());
        }
    }
}
