//! The device that divides super-packets: a macvlan that takes none, on top of another device.
//!
//! Whatever is sent out through the macvlan is divided by the stack there and then, and its wire packets are sent out
//! through the device below, where the programs take them and send them back to where the super-packet came from. All that
//! happens within one call, and neither device touches what the kernel has noted with a packet: its socket, route,
//! connection tracking and mark stay with it. (A veth pair alone would drop route and tracking, and queue the packets.)
//!
//! The device below is a tap that nobody reads from: both disappear when this process ends. Where there is no
//! `/dev/net/tun`, as in many containers, it is one end of a veth pair, which the journal names.

use anyhow::{Context as _, Result};

use crate::sys::net::interfaces::{self, Interface};
use crate::sys::net::macvlan::add_macvlan;
use crate::sys::net::own_links::{link_name, remove_link};
use crate::sys::net::qdisc::add_veth;
use crate::sys::net::tap::{Tap, be_quiet};
use crate::undo::change::SystemChange;

/// The device. Without a veth pair the kernel removes it when this is dropped or the process ends.
pub(super) struct Divider {
    index: u32,
    far: Interface,
    /// Holds the devices.
    _tap: Option<Tap>,
}

impl Divider {
    /// Creates the device of the instance with this number in the calling thread's network namespace, and sets it up.
    /// `record` is called with a change that outlives the process before it is made.
    ///
    /// # Errors
    /// The kernel has no macvlan, neither tap nor veth devices can be made, or privileges are missing.
    pub(super) fn create(
        number: u32,
        record: impl FnOnce(SystemChange) -> Result<()>,
    ) -> Result<Self> {
        let names = ["d", "e", "f"].map(|end| format!("{}{end}", link_name(number)));
        let [_, far_name, _] = &names;
        let created = Self::create_as(&names, record);
        if created.is_err()
            && let Some(pair) = (interfaces::list()?.iter())
                .find(|one| one.name == *far_name && one.kind.as_deref() == Some("veth"))
        {
            remove_link(pair)?;
        }
        created
    }

    fn create_as(
        [name, far_name, end_name]: &[String; 3],
        record: impl FnOnce(SystemChange) -> Result<()>,
    ) -> Result<Self> {
        let tap = match Tap::create(far_name, "dividing super-packets") {
            Ok(tap) => Some(tap),
            Err(error) => {
                let name = far_name.clone();
                record(SystemChange::Link { name })?;
                add_veth(far_name, end_name).with_context(|| format!("{error:#}"))?;
                be_quiet(far_name);
                be_quiet(end_name);
                None
            }
        };
        add_macvlan(name, nix::net::if_::if_nametoindex(far_name.as_str())?)?;
        let all = interfaces::list()?;
        let find = |name: &str| {
            let found = all.iter().find(|one| one.name == name);
            found.context("the device has disappeared")
        };
        Ok(Self {
            index: find(name)?.index,
            far: find(far_name)?.clone(),
            _tap: tap,
        })
    }

    /// The index of the device that super-packets are sent out through.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// The device that their wire packets leave through.
    pub(super) fn far(&self) -> &Interface {
        &self.far
    }
}
