//! Servers of a cgroup: connections to them are led, except for those that the relay opens itself.

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

/// Where they listen.
#[derive(Clone)]
pub struct Served(Arc<Mutex<Maps>>);

struct Maps {
    listeners: HashMap<MapData, Destination, u64>,
    /// In two parts: see the map.
    relay_ports: MappedArray<u64>,
}

const PORTS: usize = 1 << 16;

/// A socket of the relay's that the programs know by its port.
pub struct Approach {
    served: Served,
    /// Its place in the map.
    place: usize,
}

impl Served {
    /// The maps of the programs.
    ///
    /// # Errors
    /// There are none, or they can't be mapped.
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

    /// Enters a server that listens already.
    ///
    /// # Errors
    /// There are too many.
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

    /// Whether connections to this address are given to the relay.
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

    /// Has a socket of the relay's, which is to be connected from one address (port 0: any) to another, reach the server and not
    /// the relay. So it is until what is returned is dropped. Nothing for a server whose connections are not given to the relay.
    ///
    /// # Errors
    /// There is no port left, or not this one.
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
        // Ports of connections that have just ended are as good.
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

    /// A port that the relay listens at over IPv4, and the listener's place among all.
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
        // The programs can't tell.
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
