//! Makes idle connections notice the start of a `down`.
//!
//! The rule resets a connection when one of its packets passes, but an idle connection sends none. When the window of
//! such a rule opens, or the rule is added or turned on within it, one end of each connection to the target is therefore
//! made to send a window probe. The kernel sends one when a socket leaves repair mode (`TCP_REPAIR`). For other
//! connections this is an ordinary packet.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fault_common::abi::{RuleEntry, fault};
use fault_common::decide::in_window;
use nix::errno::Errno;

use crate::plan::tables::{Network, PacketRule};
use crate::sys::clock::monotonic_ns;
use crate::sys::net::netlink::Netlink;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::proc::take_sockets;
use crate::sys::process::rights::be_helper_beside_others;
use crate::sys::process::sockets::set_tcp;
use crate::sys::process::sockets::{TcpState, Transport, list_by};
use crate::tell::tell;

/// The thread that waits for windows to open. Dropping this ends it.
#[derive(Default)]
pub(super) struct Idle {
    /// A socket of the rules' network namespace, until the thread takes it.
    netlink: Option<Netlink>,
    started: Option<Started>,
}

struct Started {
    /// Sends new rules to the thread.
    rules: Sender<Vec<PacketRule>>,
    thread: JoinHandle<()>,
}

impl Idle {
    /// Prepares the thread for the caller's network namespace, if these rules need it or later ones may.
    ///
    /// # Errors
    /// A netlink socket can't be opened.
    pub(super) fn prepare(rules: &[PacketRule], live: bool) -> Result<Self> {
        let needed = live || !outages(rules).is_empty();
        Ok(Self {
            netlink: needed.then(Netlink::sock_diag).transpose()?,
            started: None,
        })
    }

    /// Uses these rules from now on. Their time starts at `epoch_ns`.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(super) fn follow(&mut self, rules: &[PacketRule], epoch_ns: u64) -> Result<()> {
        let rules = outages(rules);
        if let Some(started) = &self.started {
            return started
                .rules
                .send(rules)
                .context("the thread that resets idle connections has ended");
        }
        if !rules.is_empty()
            && let Some(netlink) = self.netlink.take()
        {
            let clock = Clock {
                netlink,
                rules,
                added: HashSet::new(),
                epoch_ns,
                done_ns: None,
            };
            self.started = Some(start(clock)?);
        }
        Ok(())
    }
}

fn start(mut clock: Clock) -> Result<Started> {
    let (rules, changes) = channel();
    let thread = std::thread::Builder::new()
        .name("idle".to_owned())
        .spawn(move || {
            be_helper_beside_others(&[
                Capability::NetAdmin,
                Capability::SysPtrace,
                Capability::DacOverride,
            ]);
            loop {
                match changes.recv_timeout(clock.look()) {
                    Ok(rules) => clock.turn_to(rules),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        })
        .context("starting the thread that resets idle connections")?;
    Ok(Started { rules, thread })
}

impl Drop for Idle {
    fn drop(&mut self) {
        let Some(Started { rules, thread }) = self.started.take() else {
            return;
        };
        drop(rules);
        if thread.join().is_err() {
            tell!("fault: warning: the thread that resets idle connections panicked");
        }
    }
}

fn outages(rules: &[PacketRule]) -> Vec<PacketRule> {
    let down = rules.iter().filter(|rule| rule.entry.fault == fault::DOWN);
    down.cloned().collect()
}

struct Clock {
    netlink: Netlink,
    rules: Vec<PacketRule>,
    /// The [`RuleEntry::uid`] of those that were not there at the last look: their windows may have opened before.
    added: HashSet<u32>,
    epoch_ns: u64,
    /// Windows up to this time have been handled.
    done_ns: Option<u64>,
}

impl Clock {
    /// Uses these rules from now on.
    fn turn_to(&mut self, rules: Vec<PacketRule>) {
        let former = std::mem::replace(&mut self.rules, rules);
        let is_former = |uid: &u32| former.iter().any(|rule| rule.entry.uid == *uid);
        let uids = self.rules.iter().map(|rule| rule.entry.uid);
        self.added.extend(uids.filter(|uid| !is_former(uid)));
    }

    /// Wakes the connections of windows that have opened. Returns the time until the next one opens.
    fn look(&mut self) -> Duration {
        let now_ns = monotonic_ns().saturating_sub(self.epoch_ns);
        let from_ns = self
            .done_ns
            .replace(now_ns)
            .map_or(0, |done_ns| done_ns + 1);
        let next = |from_ns| move |rule: &&PacketRule| opening(&rule.entry, from_ns);
        let opened: Vec<_> = self
            .rules
            .iter()
            .filter(|rule| {
                let entry = &rule.entry;
                next(from_ns)(rule).is_some_and(|at_ns| at_ns <= now_ns)
                    || self.added.contains(&entry.uid) && in_window(entry, now_ns)
            })
            .collect();
        if !opened.is_empty()
            && let Err(error) = wake(&mut self.netlink, &opened)
        {
            tell!("fault: warning: idle connections are not reset: {error:#}");
        }
        self.added.clear();
        let next_ns = self
            .rules
            .iter()
            .filter_map(|rule| next(now_ns + 1)(&rule))
            .min();
        next_ns.map_or(Duration::from_hours(1), |next_ns| {
            let now_ns = monotonic_ns().saturating_sub(self.epoch_ns);
            Duration::from_nanos(next_ns.saturating_sub(now_ns))
        })
    }
}

/// The time at which a window of the rule opens, at or after `from_ns`.
fn opening(rule: &RuleEntry, from_ns: u64) -> Option<u64> {
    repetition(
        rule.period_ns,
        rule.length_ns,
        from_ns.saturating_sub(rule.at_ns),
    )
    .and_then(|since_ns| rule.at_ns.checked_add(since_ns))
}

/// The time at which a window with this period opens, at or after `from_ns`; windows end after `length_ns` (0: never).
fn repetition(period_ns: u64, length_ns: u64, from_ns: u64) -> Option<u64> {
    let at_ns = match from_ns {
        0 => 0,
        _ => from_ns.checked_next_multiple_of(period_ns)?,
    };
    (length_ns == 0 || at_ns < length_ns).then_some(at_ns)
}

/// Makes one end of each connection that the rules may match send a packet.
fn wake(netlink: &mut Netlink, rules: &[&PacketRule]) -> Result<()> {
    let is_meant = |address: SocketAddr| {
        let network = Network::new(address.ip(), if address.is_ipv4() { 32 } else { 128 });
        rules.iter().any(|rule| {
            let ports = &rule.ports;
            (ports.is_empty()
                || ports
                    .iter()
                    .any(|(a, b)| (*a..=*b).contains(&address.port())))
                && (rule.has_any_host() || rule.hosts.iter().any(|host| host.contains(&network)))
        })
    };
    let sockets = list_by(netlink, Transport::Tcp)?;
    let open = sockets.iter().filter(|one| {
        one.state == TcpState::Established
            && (is_meant(one.local) || one.remote.is_some_and(is_meant))
    });
    let wanted: HashMap<_, _> = open.map(|one| (one.inode, one.local)).collect();
    take_sockets(wanted, |pid, socket, local| {
        if let Err(error) = socket.and_then(|socket| Ok(probe(&socket)?)) {
            log::warn!("an idle connection of process {pid} at {local} is not reset: {error}");
        }
        Ok(())
    })
}

/// Makes a socket send a window probe.
fn probe(socket: &OwnedFd) -> Result<(), Errno> {
    set_tcp(socket, libc::TCP_REPAIR, 1)?;
    set_tcp(socket, libc::TCP_REPAIR, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_open_when_the_programs_open_them() {
        assert_eq!(repetition(0, 0, 0), Some(0));
        assert_eq!(repetition(0, 0, 1), None);
        assert_eq!(repetition(5, 0, 1), Some(5));
        assert_eq!(repetition(5, 0, 5), Some(5));
        assert_eq!(repetition(5, 0, 6), Some(10));
        assert_eq!(repetition(5, 10, 5), Some(5));
        assert_eq!(repetition(5, 10, 6), None);
    }
}
