//! Counts open connections for `fault top`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use netlink_packet_sock_diag::inet::StateFlags;

use crate::rule::{Protocol, ResolvedTarget};
use crate::steer::reconnect::{SocketEnd, SocketScope, is_aimed, list};
use crate::sys::net::netlink::Netlink;
use crate::sys::process::netns::NetworkNamespace;

/// The sockets and targets to count.
pub struct Sockets {
    netlink: Netlink,
    cgroup: Option<PathBuf>,
    targets: Vec<(String, ResolvedTarget)>,
}

impl Sockets {
    /// Counts the connections of a cgroup and its descendants (default: all), in another network namespace (default:
    /// this one).
    ///
    /// # Errors
    /// The kernel does not list sockets.
    pub fn new(cgroup: Option<PathBuf>, namespace: Option<&NetworkNamespace>) -> Result<Self> {
        let netlink = match namespace {
            Some(namespace) => namespace.enter(Netlink::sock_diag),
            None => Netlink::sock_diag(),
        }?;
        Ok(Self {
            netlink,
            cgroup,
            targets: Vec::new(),
        })
    }

    /// Sets the targets to count, each once.
    pub fn look_at<'a>(&mut self, targets: impl Iterator<Item = (&'a str, &'a ResolvedTarget)>) {
        self.targets.clear();
        for (name, target) in targets {
            let is_known = self.targets.iter().any(|(known, _)| known == name);
            let is_tcp = matches!(target.protocol, Protocol::Tcp | Protocol::Any);
            if is_tcp && !target.ports.is_empty() && !is_known {
                self.targets.push((name.to_owned(), target.clone()));
            }
        }
    }

    /// The number of open connections to each target, without those that are redirected to the relay.
    ///
    /// # Errors
    /// They can't be listed, or the cgroup no longer exists.
    pub fn count(&mut self) -> Result<Vec<(&str, u64)>> {
        if self.targets.is_empty() {
            return Ok(Vec::new());
        }
        let ends = list(
            &mut self.netlink,
            &(StateFlags::ESTABLISHED | StateFlags::CLOSE_WAIT),
        )?;
        let scope = self.cgroup.as_deref().map(SocketScope::of).transpose()?;
        let (ours, others): (Vec<&SocketEnd>, Vec<&SocketEnd>) =
            ends.iter().partition(|end| end.ours);
        let own: Vec<&SocketEnd> = others
            .into_iter()
            .filter(|end| scope.as_ref().is_none_or(|scope| scope.has(end)))
            .collect();
        let relayed: HashSet<_> = ours.iter().map(|end| (end.remote, end.local)).collect();
        Ok(self
            .targets
            .iter()
            .map(|(name, target)| (name.as_str(), open(target, &own, &relayed)))
            .collect())
    }
}

/// Counts connections with an end in `own`. A connection with both ends in it counts once; `relayed` are ends whose
/// peer is the relay.
fn open(
    target: &ResolvedTarget,
    own: &[&SocketEnd],
    relayed: &HashSet<(SocketAddr, SocketAddr)>,
) -> u64 {
    let clients: HashSet<_> = own
        .iter()
        .filter(|end| is_aimed(target, end.remote))
        .map(|end| (end.local, end.remote))
        .collect();
    let servers = own.iter().filter(|end| {
        let known = clients.contains(&(end.remote, end.local));
        is_aimed(target, end.local) && !known && !relayed.contains(&(end.local, end.remote))
    });
    (clients.len() + servers.count()) as u64
}
