//! A macvlan that takes no super-packets.

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, MacVlanMode,
};
use nix::errno::Errno;

use super::netlink::Netlink;
use super::tap::be_quiet;

/// Bytes of the smallest packet that is divided although the kernel does not know how many segments it has: super-packets
/// of virtual machines. The kernel takes no less than the longest header.
const UNKNOWN_BYTES: u32 = 1024;

/// Creates a macvlan on another device, which takes no packet of more than one segment, and sets it up. It disappears with
/// the other device.
///
/// # Errors
/// The kernel has no macvlan, or refuses.
pub fn add_macvlan(name: &str, lower_index: u32) -> Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Link(lower_index),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::MacVlan),
            LinkInfo::Data(InfoData::MacVlan(vec![InfoMacVlan::Mode(
                MacVlanMode::Private,
            )])),
        ]),
    ];
    let mut netlink = Netlink::route()?;
    let request = RouteNetlinkMessage::NewLink(message);
    match netlink.change(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
            bail!("this kernel has no macvlan devices (modprobe macvlan)")
        }
        Err(error) => return Err(error).context("can't add a macvlan device"),
    }
    be_quiet(name);
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    // It has taken over the lower device's limits as it was created.
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::GsoMaxSegs(1),
        LinkAttribute::GsoMaxSize(UNKNOWN_BYTES),
    ];
    netlink
        .change(RouteNetlinkMessage::NewLink(message), 0)
        .with_context(|| format!("can't set {name} up"))
}
