//! The links of an instance, which have the names `fault-<number>` and optionally a letter.

use anyhow::{Context as _, Result};
use fault_common::abi::INSTANCES_MAX;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use nix::errno::Errno;

use super::interfaces::{self, Interface};
use super::netlink::Netlink;
use crate::sys::process::cgroup::NAME_PREFIX;

/// What the links of an instance are called, and perhaps a letter behind it.
#[must_use]
pub fn link_name(number: u32) -> String {
    format!("{NAME_PREFIX}{number}")
}

/// The number of the instance that a link of ours belongs to: see [`link_name`].
#[must_use]
pub fn link_owner(interface: &Interface) -> Option<u32> {
    if !matches!(
        interface.kind.as_deref(),
        Some("ifb" | "tun" | "veth" | "macvlan")
    ) {
        return None;
    }
    let rest = interface.name.strip_prefix(NAME_PREFIX)?;
    let digits = rest.find(|character: char| !character.is_ascii_digit());
    let number = rest[..digits.unwrap_or(rest.len())].parse().ok()?;
    (number < INSTANCES_MAX).then_some(number)
}

/// Removes the links that a dead instance has left whose number the caller has now.
///
/// # Errors
/// The kernel refuses.
pub fn remove_stale(number: u32) -> Result<()> {
    for link in interfaces::list()? {
        if link_owner(&link) == Some(number) && link.kind.as_deref() == Some("veth") {
            remove_link(&link)?;
        }
    }
    Ok(())
}

/// Removes a link; `false`: it was gone already.
///
/// # Errors
/// The kernel does not let it.
pub fn remove_link(interface: &Interface) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.header.index = interface.index;
    let request = RouteNetlinkMessage::DelLink(message);
    match Netlink::route()?.change(request, 0) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("can't remove {}", interface.name)),
    }
}
