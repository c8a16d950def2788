//! Network interfaces: what there is, and which of them a command's traffic can pass.
use crate::sys::net::netlink::{Netlink, attributes, header_u32, nested};
use crate::sys::version;
use anyhow::{Context, Result, bail};
use netlink_packet_core::{parse_string, parse_u32};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkMessage};

/// Bytes of `struct ifinfomsg`, which every link message starts with (linux/rtnetlink.h).
const HEADER_BYTES: usize = 16;

/// How alike (Jaro-Winkler, 0 to 1) a name must be to be offered as what was meant.
const NEAR_ENOUGH: f64 = 0.6;

/// A network interface of the calling thread's network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "what the kernel tells of it, each independent of the others"
)]
pub struct Interface {
    /// The index that the kernel knows it by, from 1.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// A second name that an administrator, or `fault` itself, wrote on it.
    pub alias: Option<String>,
    /// `IFF_UP`: it is switched on. A cable need not be there.
    pub up: bool,
    /// Whether its packets begin with an Ethernet header; those of a tun or `WireGuard` device do not.
    pub ethernet: bool,
    /// Whether held packets can continue there.
    pub can_hold: bool,
    /// `IFF_LOOPBACK`.
    pub loopback: bool,
    /// `veth`, `vlan`, `bridge`, `ifb`, `tun`, `bond`…; `None` for hardware and for `lo`.
    pub kind: Option<String>,
    /// The index of the bridge, bond or VRF that it is a port of.
    pub master: Option<u32>,
    /// What that master is: `bridge`, `bond`, `vrf`, `team`, `openvswitch`.
    pub master_kind: Option<String>,
    /// The index of the interface below (of a VLAN) or at the other end (of a veth), if it is in the same network
    /// namespace.
    pub link: Option<u32>,
    /// The index of the bridge that packets have come through when they arrive at this interface: its own for a bridge,
    /// that of the bridge below for a VLAN on one.
    pub bridge: Option<u32>,
    /// The largest packet in bytes, without the link header.
    pub mtu_bytes: u32,
    /// The largest segmentation-offload packet in bytes that the stack may hand it.
    pub gso_max_bytes: Option<u32>,
    /// The most segments in one such packet.
    pub gso_max_segments: Option<u32>,
}

impl Interface {
    /// Its packets are seen again on the bond or team that it is a port of, and are left to that one. A VRF sees no
    /// packet that comes in, and a bridge none that goes from port to port.
    #[must_use]
    pub fn is_slave(&self) -> bool {
        self.master.is_some() && !matches!(self.master_kind.as_deref(), Some("vrf" | "bridge"))
    }

    /// The index of the bridge that it is a port of.
    #[must_use]
    pub fn port_of(&self) -> Option<u32> {
        self.master
            .filter(|_| self.master_kind.as_deref() == Some("bridge"))
    }

    /// Whether it is still in the calling thread's network namespace, by this name: those of containers come and go.
    #[must_use]
    pub fn is_there(&self) -> bool {
        nix::net::if_::if_nametoindex(self.name.as_str()).is_ok_and(|index| index == self.index)
    }

    /// A device through which an instance of `fault` holds packets, or divides them: what passes there is judged elsewhere.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        let number = self.name.strip_prefix("fault-");
        number.is_some_and(|rest| {
            let digits = rest.trim_end_matches(['i', 'o', 'd', 'e', 'f']);
            !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
    }
}

/// Lists the interfaces of the calling thread's network namespace, by index.
///
/// # Errors
/// When the kernel refuses the list or answers what can't be read.
pub fn list() -> Result<Vec<Interface>> {
    list_by(&mut Netlink::route()?)
}

/// Lists the interfaces of the network namespace in which `netlink` was opened, by index.
///
/// # Errors
/// As [`list`].
pub fn list_by(netlink: &mut Netlink) -> Result<Vec<Interface>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut found = netlink
        .dump(&request, |payload| decode(payload).map(Some))
        .context("can't list the network interfaces")?;
    found.sort_by_key(|interface| interface.index);
    find_bridges(&mut found);
    Ok(found)
}

/// Notes for each interface the bridge that its packets come through. Whatever is below has the smaller index.
fn find_bridges(found: &mut [Interface]) {
    for at in 0..found.len() {
        let below = |index| {
            let lower = found.iter().find(|one| one.index == index);
            lower.and_then(|lower: &Interface| lower.bridge)
        };
        found[at].bridge = match found[at].kind.as_deref() {
            Some("bridge") => Some(found[at].index),
            Some("vlan" | "macvlan" | "macvtap" | "ipvlan") => found[at].link.and_then(below),
            _ => None,
        };
    }
}

/// Attribute numbers of `linux/if_link.h`.
mod attribute {
    pub const NAME: u16 = 3;
    pub const MTU: u16 = 4;
    pub const LINK: u16 = 5;
    pub const MASTER: u16 = 10;
    pub const LINKINFO: u16 = 18;
    pub const ALIAS: u16 = 20;
    pub const LINK_NETNSID: u16 = 37;
    pub const GSO_MAX_SEGMENTS: u16 = 40;
    pub const GSO_MAX_BYTES: u16 = 41;
    /// Inside `LINKINFO`.
    pub const KIND: u16 = 1;
    /// Inside `LINKINFO`: the kind of the master.
    pub const SLAVE_KIND: u16 = 4;
}

/// The link message's hardware type.
fn hardware(payload: &[u8]) -> Result<u16> {
    // `struct ifinfomsg`: family, padding, then the hardware type.
    let word = header_u32(payload, 0)?.to_ne_bytes();
    Ok(u16::from_ne_bytes([word[2], word[3]]))
}

/// Whether the hardware type is Ethernet or loopback, which have the same header.
fn is_ethernet(hardware: u16) -> bool {
    matches!(
        hardware,
        nix::libc::ARPHRD_ETHER | nix::libc::ARPHRD_LOOPBACK
    )
}

/// Whether the kernel takes the Ethernet header away from what is redirected to a device that wants none
/// (`dev_is_mac_header_xmit`), and what the packet loses in user space is not needed there: `IPsec`'s policies want to know
/// how it was decrypted, and an ifb where it came from.
fn can_hold(hardware: u16, kind: Option<&str>) -> bool {
    use nix::libc::{
        ARPHRD_IPGRE, ARPHRD_NONE, ARPHRD_PPP, ARPHRD_SIT, ARPHRD_TUNNEL, ARPHRD_TUNNEL6,
    };
    const ARPHRD_IP6GRE: u16 = 823;
    let has_place = match hardware {
        ARPHRD_TUNNEL | ARPHRD_TUNNEL6 | ARPHRD_SIT | ARPHRD_IPGRE | ARPHRD_NONE => true,
        ARPHRD_PPP | ARPHRD_IP6GRE => version::at_least(6, 6),
        other => is_ethernet(other),
    };
    has_place && !matches!(kind, Some("xfrm" | "vti" | "vti6" | "ifb"))
}

/// Decodes one link message into what [`Interface`] keeps of it.
fn decode(payload: &[u8]) -> Result<Interface> {
    let flags = header_u32(payload, 8)?;
    let hardware = hardware(payload)?;
    let mut interface = Interface {
        index: header_u32(payload, 4)?,
        name: String::new(),
        alias: None,
        up: flags & nix::libc::IFF_UP.cast_unsigned() != 0,
        ethernet: is_ethernet(hardware),
        can_hold: false,
        loopback: flags & nix::libc::IFF_LOOPBACK.cast_unsigned() != 0,
        kind: None,
        master: None,
        master_kind: None,
        link: None,
        bridge: None,
        mtu_bytes: 0,
        gso_max_bytes: None,
        gso_max_segments: None,
    };
    let mut link_is_elsewhere = false;
    for (kind, value) in attributes(payload, HEADER_BYTES)? {
        match kind {
            attribute::LINK_NETNSID => link_is_elsewhere = true,
            attribute::NAME => interface.name = parse_string(value)?,
            attribute::MTU => interface.mtu_bytes = parse_u32(value)?,
            attribute::LINK => interface.link = Some(parse_u32(value)?).filter(|link| *link != 0),
            attribute::MASTER => interface.master = Some(parse_u32(value)?),
            attribute::ALIAS => interface.alias = Some(parse_string(value)?),
            attribute::GSO_MAX_SEGMENTS => interface.gso_max_segments = Some(parse_u32(value)?),
            attribute::GSO_MAX_BYTES => interface.gso_max_bytes = Some(parse_u32(value)?),
            attribute::LINKINFO => {
                for (kind, value) in nested(value)? {
                    match kind {
                        attribute::KIND => interface.kind = Some(parse_string(value)?),
                        attribute::SLAVE_KIND => interface.master_kind = Some(parse_string(value)?),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if link_is_elsewhere {
        interface.link = None;
    }
    interface.can_hold = can_hold(hardware, interface.kind.as_deref());
    Ok(interface)
}

/// Which interfaces a rule set works on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Selection {
    /// Every interface that a command's traffic can pass: `lo` and all others that are up, except
    /// ports of a bond or team, whose packets the master sees.
    #[default]
    Default,
    /// These, by name, up or not, and the ports of those that are bridges.
    Names(Vec<String>),
}

/// Picks from `all` what `selection` asks for, each interface once.
///
/// # Errors
/// A name that no interface has (with the nearest that there is), an empty list of names, or no
/// usable interface at all.
pub fn select(all: &[Interface], selection: &Selection) -> Result<Vec<Interface>> {
    let chosen: Vec<Interface> = match selection {
        Selection::Default => wanted(all, selection).cloned().collect(),
        Selection::Names(names) => {
            for name in names {
                find(all, name)?;
            }
            wanted(all, selection).cloned().collect()
        }
    };
    if chosen.is_empty() {
        bail!(
            "no network interface is up: set one up (ip link set lo up) or name one with --interface"
        );
    }
    Ok(chosen)
}

/// Those of `all` that `selection` asks for, whether or not there are any.
pub fn wanted<'a>(
    all: &'a [Interface],
    selection: &'a Selection,
) -> impl Iterator<Item = &'a Interface> {
    let is_named = move |names: &[String], index| {
        all.iter()
            .any(|one| one.index == index && names.contains(&one.name))
    };
    all.iter().filter(move |interface| match selection {
        Selection::Default => {
            let is_used = interface.up && !interface.is_slave() && !interface.is_ours();
            interface.loopback || is_used
        }
        Selection::Names(names) => {
            names.contains(&interface.name)
                || interface
                    .port_of()
                    .is_some_and(|bridge| is_named(names, bridge))
        }
    })
}

fn find<'a>(all: &'a [Interface], name: &str) -> Result<&'a Interface> {
    if let Some(found) = all.iter().find(|interface| interface.name == name) {
        return Ok(found);
    }
    let nearest = all
        .iter()
        .map(|known| (strsim::jaro_winkler(&known.name, name), &known.name))
        .filter(|(likeness, _)| *likeness >= NEAR_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((_, nearest)) = nearest {
        bail!("no network interface `{name}` here: did you mean `{nearest}`?");
    }
    let names: Vec<&str> = all.iter().map(|known| known.name.as_str()).collect();
    bail!(
        "no network interface `{name}` here: there are {}",
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str, up: bool, master: Option<(u32, &str)>) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            alias: None,
            up,
            ethernet: true,
            can_hold: true,
            loopback: name == "lo",
            kind: (name == "br0").then(|| "bridge".to_owned()),
            master: master.map(|(index, _)| index),
            master_kind: master.map(|(_, kind)| kind.to_owned()),
            link: None,
            bridge: None,
            mtu_bytes: 1500,
            gso_max_bytes: None,
            gso_max_segments: None,
        }
    }

    fn machine() -> Vec<Interface> {
        vec![
            interface(1, "lo", false, None),
            interface(2, "eth0", true, None),
            interface(3, "eth1", true, Some((5, "bridge"))),
            interface(4, "eth2", false, None),
            interface(5, "br0", true, None),
            interface(6, "blue", true, Some((7, "vrf"))),
            interface(8, "eth8", true, Some((9, "bond"))),
        ]
    }

    fn names(selection: &Selection) -> Result<Vec<String>> {
        Ok(select(&machine(), selection)?
            .into_iter()
            .map(|interface| interface.name)
            .collect())
    }

    #[test]
    fn default_is_lo_and_whatever_is_up_and_no_port_of_a_bond() {
        assert_eq!(
            names(&Selection::Default).unwrap(),
            ["lo", "eth0", "eth1", "br0", "blue"]
        );
    }

    #[test]
    fn a_bridge_is_taken_with_its_ports() {
        let wanted = Selection::Names(vec!["br0".to_owned()]);
        assert_eq!(names(&wanted).unwrap(), ["eth1", "br0"]);
    }

    #[test]
    fn what_is_above_a_bridge_is_known() {
        let mut all = machine();
        let mut above = |index, kind: &str, link| {
            all.push(Interface {
                kind: Some(kind.to_owned()),
                link: Some(link),
                ..interface(index, "above", true, None)
            });
        };
        above(10, "vlan", 5);
        above(11, "macvlan", 10);
        above(12, "vlan", 2);
        above(13, "veth", 5);
        find_bridges(&mut all);
        let bridges: Vec<_> = all
            .iter()
            .filter_map(|one| one.bridge.map(|bridge| (one.index, bridge)))
            .collect();
        assert_eq!(bridges, [(5, 5), (10, 5), (11, 5)]);
    }

    #[test]
    fn a_named_interface_is_taken_once_though_down_or_a_port() {
        let wanted = ["eth2", "eth1", "eth2"].map(str::to_owned).to_vec();
        assert_eq!(names(&Selection::Names(wanted)).unwrap(), ["eth1", "eth2"]);
    }

    #[test]
    fn an_unknown_name_gets_the_nearest_or_the_list() {
        let near = names(&Selection::Names(vec!["eht0".to_owned()])).unwrap_err();
        assert_eq!(
            near.to_string(),
            "no network interface `eht0` here: did you mean `eth0`?"
        );
        let far = names(&Selection::Names(vec!["wlp3s0".to_owned()])).unwrap_err();
        assert_eq!(
            far.to_string(),
            "no network interface `wlp3s0` here: there are lo, eth0, eth1, eth2, br0, blue, eth8"
        );
    }

    #[test]
    fn no_names_is_an_error() {
        assert!(names(&Selection::Names(Vec::new())).is_err());
    }

    #[test]
    fn a_truncated_message_is_an_error_and_no_panic() {
        for length in 0..HEADER_BYTES {
            assert!(decode(&vec![0; length]).is_err());
        }
        let mut bad = vec![0; HEADER_BYTES];
        bad.extend([200, 0, 3, 0]);
        assert!(decode(&bad).is_err());
    }
}
