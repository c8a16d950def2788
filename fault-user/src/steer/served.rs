//! Servers of a cgroup. Connections to them are redirected, except for the relay's own.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use fault_common::abi::Destination;
use socket2::SockRef;

use super::originals::destination;
use crate::inject::services;
use crate::relay::bind;
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::bpf::object::mapped;
use crate::tell::tell;

/// The addresses on which the servers listen.
#[derive(Clone)]
pub struct Served(Arc<Mutex<Maps>>);

struct Maps {
    listeners: HashMap<MapData, Destination, u64>,
    /// Two halves: see the map.
    relay_ports: MappedArray<u64>,
}

const PORTS: usize = 1 << 16;

/// A socket of the relay that the programs recognize by its port.
pub struct Approach {
    served: Served,
    /// Its index in the map.
    place: usize,
}

impl Served {
    /// Maps the programs' maps into memory.
    ///
    /// # Errors
    /// A map is missing or can't be mapped.
    pub fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let listeners = ebpf
            .take_map("SERVED")
            .context("the eBPF object has no map SERVED")?;
        Ok(Self(Arc::new(Mutex::new(Maps {
            listeners: listeners.try_into()?,
            relay_ports: mapped(ebpf, "RELAY_PORTS", 2 << 16)?,
        }))))
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a server that already listens.
    ///
    /// # Errors
    /// There are too many servers.
    pub fn add(&self, listener: SocketAddr) -> Result<()> {
        let key = destination(listener);
        let listeners = &mut self.maps().listeners;
        let count = match listeners.get(&key, 0) {
            Ok(count) => count,
            Err(MapError::KeyNotFound) => 0,
            Err(error) => return Err(error).context("looking up a server"),
        };
        listeners
            .insert(key, count + 1, 0)
            .context("adding a server")
    }

    /// Whether connections to this address are redirected to the relay.
    fn has(&self, server: SocketAddr) -> io::Result<bool> {
        let port = server.port();
        let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let maps = self.maps();
        for address in [server, any, any_v4] {
            match maps.listeners.get(&destination(address), 0) {
                Ok(0) | Err(MapError::KeyNotFound) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }

    /// Lets a socket of the relay bypass the redirection: its connection from one address (port 0: any) to another
    /// reaches the server. This holds until the returned value is dropped. Returns `None` for a server that is not
    /// redirected.
    ///
    /// # Errors
    /// No port is free, or this one is not.
    pub fn approach(
        &self,
        socket: BorrowedFd<'_>,
        source: SocketAddr,
        server: SocketAddr,
    ) -> io::Result<Option<Approach>> {
        if !self.has(server)? {
            return Ok(None);
        }
        let socket = SockRef::from(&socket);
        // Ports of connections that have just ended may be reused.
        socket.set_reuse_address(true)?;
        bind(&socket, source)?;
        let own = socket.local_addr()?.as_socket();
        let place = own.map_or(0, |own| usize::from(own.port()));
        self.count(place, 1);
        Ok(Some(Approach {
            served: self.clone(),
            place,
        }))
    }

    /// Records an IPv4 port of the relay, and the index of its listener.
    pub fn show_listener(&self, port: u16, listener: u32) {
        let place = PORTS + usize::from(port);
        self.maps().relay_ports.set(place, u64::from(listener) + 1);
    }

    fn count(&self, place: usize, change: i64) {
        let ports = &mut self.maps().relay_ports;
        let count = ports.get(place).saturating_add_signed(change);
        ports.set(place, count);
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        // The programs can't report this.
        if self.listeners.keys().count() >= services::SERVERS as usize {
            tell!(
                "fault: warning: the command listened on more than {} addresses and ports: connections to the others \
                 bypassed the relay",
                services::SERVERS
            );
        }
    }
}

impl Drop for Approach {
    fn drop(&mut self) {
        self.served.count(self.place, -1);
    }
}
