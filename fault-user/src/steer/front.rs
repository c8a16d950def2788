//! The transparent proxies of the daemon: a relay in front of each service.
//!
//! Neither the service nor its clients are reconfigured. Connections to the service, from every local process and from
//! outside, are redirected to the relay. The relay's own connections reach the service.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use fault_common::abi::{STEERS, steered};
use socket2::{Domain, Socket, Type};

use super::hooks::{HookScope, SteeringHooks};
use super::prepare;
use super::relays::listener;
use crate::inject::services::{Room, ServiceEntry, relay_mark};
use crate::plan::tables::Network;
use crate::relay::{Engine, Prepare, TcpInlet};
use crate::rule::PortRange;
use crate::sys::preflight::{Need, preflight};
use crate::sys::process::cgroup::Hierarchy;

/// The hooks of this host, shared by all transparent proxies.
pub struct TransparentProxies {
    state: Mutex<State>,
}

struct State {
    hooks: SteeringHooks,
    /// Bit mask of the service indexes in use.
    taken: u64,
}

/// A service with a relay in front of it. Dropping this ends the redirection.
pub struct ProxiedService {
    front: Arc<TransparentProxies>,
    index: u32,
    ports: [PortRange; 1],
    service: Mutex<ServiceEntry>,
    is_v4: bool,
    /// A bound socket that does not listen: connections are redirected to it while the proxy is disabled.
    nobody: Socket,
}

impl TransparentProxies {
    /// Attaches the hooks; nothing is redirected yet.
    ///
    /// # Errors
    /// No cgroup2, missing privileges, or a kernel before 5.14.
    pub fn open(engine: &Engine) -> Result<Arc<Self>> {
        preflight(&[Need::Programs])?;
        let reach = HookScope {
            all_cgroups: true,
            all_servers: true,
        };
        let (hooks, _originals, events) =
            SteeringHooks::attach(Hierarchy::find()?.path(), reach, Room::LATER)?;
        events.follow(engine);
        Ok(Arc::new(Self {
            state: Mutex::new(State { hooks, taken: 0 }),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Redirects connections to a service; they are refused until [`ProxiedService::listen`].
    ///
    /// # Errors
    /// No address, an address without a host, or too many proxies.
    pub fn take(self: &Arc<Self>, addresses: &[SocketAddr]) -> Result<ProxiedService> {
        let Some(first) = addresses.first() else {
            bail!("the service has no address");
        };
        ensure!(
            first.port() != 0 && addresses.iter().all(|one| !one.ip().is_unspecified()),
            "a transparent proxy needs the address of its service: a host and a port"
        );
        let is_v4 = addresses.iter().any(SocketAddr::is_ipv4);
        let nobody = nobody(is_v4)?;
        let hosts = addresses
            .iter()
            .map(|one| Network::new(one.ip(), if one.is_ipv4() { 32 } else { 128 }))
            .collect();
        let mut service = ServiceEntry {
            steer: fault_common::abi::Steer::default(),
            hosts,
        };
        service.lead_to(is_v4, port_of(&nobody)?);
        service.steer.refused = 1;
        service.steer.protocols = steered::TCP;
        let mut state = self.state();
        let index = (!state.taken).trailing_zeros();
        ensure!(
            index < STEERS,
            "there are already {STEERS} transparent proxies, the most that are possible: remove one"
        );
        state.hooks.table().set(index, &service)?;
        state.taken |= 1 << index;
        let port = PortRange {
            first: first.port(),
            last: first.port(),
        };
        state.hooks.switch(index, &[port], true);
        drop(state);
        Ok(ProxiedService {
            front: Arc::clone(self),
            index,
            ports: [port],
            service: Mutex::new(service),
            is_v4,
            nobody,
        })
    }
}

impl ServiceEntry {
    fn lead_to(&mut self, is_v4: bool, port: u16) {
        if is_v4 {
            self.steer.port4 = port;
        } else {
            self.steer.port6 = port;
        }
    }
}

fn nobody(is_v4: bool) -> io::Result<Socket> {
    let domain = if is_v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    let address: SocketAddr = if is_v4 {
        (Ipv4Addr::LOCALHOST, 0).into()
    } else {
        (Ipv6Addr::LOCALHOST, 0).into()
    };
    socket.bind(&address.into())?;
    Ok(socket)
}

fn port_of(socket: &Socket) -> io::Result<u16> {
    let address = socket.local_addr()?.as_socket();
    address
        .map(|address| address.port())
        .ok_or_else(|| io::Error::other("a socket without a port"))
}

impl ProxiedService {
    /// Opens a listener for the relay and redirects connections to it.
    ///
    /// # Errors
    /// A system call fails.
    pub fn listen(&self) -> io::Result<TcpInlet> {
        let listener = listener(if self.is_v4 {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        })?;
        let port = listener.local_addr()?.port();
        let mut state = self.front.state();
        state
            .hooks
            .listen(self.index, &listener)
            .map_err(io::Error::other)?;
        let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        service.lead_to(self.is_v4, port);
        service.steer.refused = 0;
        let inlet = state.hooks.handshakes().hold(listener)?;
        state.hooks.table().lead(self.index, service.steer);
        Ok(inlet)
    }

    /// Refuses new connections from now on.
    ///
    /// # Errors
    /// A system call fails.
    pub fn refuse(&self) -> io::Result<()> {
        let port = port_of(&self.nobody)?;
        let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        service.lead_to(self.is_v4, port);
        service.steer.refused = 1;
        self.front
            .state()
            .hooks
            .table()
            .lead(self.index, service.steer);
        Ok(())
    }

    /// Prepares the relay's own sockets to bypass the redirection.
    #[must_use]
    pub fn prepare() -> Prepare {
        prepare(relay_mark(), None, None)
    }
}

impl Drop for ProxiedService {
    fn drop(&mut self) {
        let service = self
            .service
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let mut state = self.front.state();
        state.hooks.switch(self.index, &self.ports, false);
        state.hooks.table().clear(self.index, service);
        state.taken &= !(1 << self.index);
    }
}
