//! A service that runs already, whose traffic faults apply to while a command exercises it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use super::dependency::Sighting;
use super::flows::Conversation;
use crate::inject::endpoints::EndpointUse;
use crate::rule::Protocol;
use crate::session::options::SessionOptions;
use crate::session::subject::Subject;
use crate::sys::process::cgroup::{Cgroup, Hierarchy};
use crate::sys::process::netns::NetworkNamespace;
use crate::sys::process::proc::ProcessId;
use crate::sys::process::sockets::{self, OpenSocket, TcpState};

/// A running service.
pub struct RunningService {
    /// Where its processes are.
    cgroup: Cgroup,
    /// Its network namespace, where that is another one.
    namespace: Option<NetworkNamespace>,
    /// Within which time it must be well again when a fault is over.
    pub recovery: Duration,
    /// Whether it was not after the last one.
    pub is_ill: bool,
}

/// What a service has open before it is exercised.
#[derive(Debug, Default)]
pub struct Kept {
    /// Its connections to others: its own end and the other one.
    pub connections: Vec<(Protocol, SocketAddr, SocketAddr)>,
    /// Where it listens.
    listens: Vec<(Protocol, SocketAddr)>,
}

impl RunningService {
    /// The service that the options are about; nothing where they are about none.
    ///
    /// # Errors
    /// It is gone, or there is no cgroup2.
    pub fn of(
        options: &SessionOptions,
        subject: &Subject,
        recovery: Duration,
    ) -> Result<Option<Self>> {
        if !options.is_given() {
            return Ok(None);
        }
        let cgroup = match (&subject.group, &subject.container, options.pid) {
            (Some(group), ..) => group.cgroup.clone(),
            (None, Some(container), _) => Hierarchy::find()?.of(Pid::from_raw(container.pid))?,
            (None, None, Some(pid)) => Hierarchy::find()?.of(Pid::from_raw(pid))?,
            (None, None, None) => {
                let path = options.cgroup.as_deref().context("there is no service")?;
                Hierarchy::find()?.open(path)?
            }
        };
        let pid = match (&subject.container, options.pid) {
            (Some(container), _) => Some(container.pid),
            (None, pid) => pid.or_else(|| first_of(&cgroup)),
        };
        let namespace = match (&subject.namespace, pid) {
            (Some(_), Some(pid)) => Some(NetworkNamespace::of_process(pid)?),
            _ => None,
        };
        Ok(Some(Self {
            cgroup,
            namespace,
            recovery,
            is_ill: false,
        }))
    }

    /// Does something in its network namespace.
    ///
    /// # Errors
    /// The namespace can't be entered, or what is done fails.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.namespace {
            Some(namespace) => namespace.enter(work),
            None => work(),
        }
    }

    /// What it has open.
    ///
    /// # Errors
    /// Its processes or sockets can't be listed.
    pub fn kept(&self) -> Result<Kept> {
        let open = self.sockets()?;
        let listens = open.iter().filter(|one| one.state == TcpState::Listen);
        let listens: Vec<_> = listens.map(|one| (protocol(one), one.local)).collect();
        let is_served = |one: &OpenSocket| {
            let mut listens = listens.iter();
            listens.any(|(of, at)| (*of, at.port()) == (protocol(one), one.local.port()))
        };
        let own = open.iter().filter(|one| !is_served(one));
        let own = own.filter(|one| one.state == TcpState::Established);
        Ok(Kept {
            connections: own
                .filter_map(|one| Some((protocol(one), one.local, one.remote?)))
                .collect(),
            listens,
        })
    }

    /// Its TCP and UDP sockets.
    ///
    /// # Errors
    /// As [`Self::kept`].
    pub fn sockets(&self) -> Result<Vec<OpenSocket>> {
        let mut processes = Vec::new();
        for pid in self.cgroup.processes()? {
            processes.extend(ProcessId::of(pid)?);
        }
        self.inside(|| sockets::of_processes(&processes))
    }

    /// Its hosts file.
    #[must_use]
    pub fn hosts(&self) -> Option<String> {
        let path = format!("/proc/{}/root/etc/hosts", first_of(&self.cgroup)?);
        // Names are told where they are known.
        std::fs::read_to_string(path).ok()
    }
}

/// A process in a cgroup; nothing where there is none.
fn first_of(cgroup: &Cgroup) -> Option<i32> {
    let processes = cgroup.processes().ok()?;
    processes.first().map(|pid| pid.as_raw())
}

fn protocol(socket: &OpenSocket) -> Protocol {
    match socket.protocol {
        sockets::Transport::Tcp => Protocol::Tcp,
        sockets::Transport::Udp => Protocol::Udp,
    }
}

impl Kept {
    /// Adds what was open before to what was opened since.
    pub fn complete(&self, seen: &mut Sighting) {
        let endpoint = |protocol, at: SocketAddr, is_bound| EndpointUse {
            protocol,
            address: at.ip(),
            port: at.port(),
            is_bound,
            is_elsewhere: false,
            times: 1,
        };
        for (protocol, at) in &self.listens {
            seen.endpoints.push(endpoint(*protocol, *at, true));
        }
        for (protocol, _, server) in &self.connections {
            let is_it = |flow: &Conversation| (flow.protocol, flow.server) == (*protocol, *server);
            let is_known = |one: &EndpointUse| {
                let same: (Protocol, IpAddr, u16) = (one.protocol, one.address, one.port);
                !one.is_bound && same == (*protocol, server.ip(), server.port())
            };
            if !seen.flows.iter().any(is_it) {
                continue;
            }
            if !seen.endpoints.iter().any(is_known) {
                seen.endpoints.push(endpoint(*protocol, *server, false));
            }
            seen.kept.push(*server);
        }
    }
}
