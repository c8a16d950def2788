//! The original destinations of redirected connections.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use aya::Pod;
use aya::maps::{HashMap, MapData};
use fault_common::abi::{Destination, Handshake, Original, admitted, alias};

use crate::relay::{Accepted, Pair};
use crate::sys::net::ip_address;

/// A map of the programs, shared.
pub(super) type SharedMap<K, V> = Arc<Mutex<HashMap<MapData, K, V>>>;

/// Looks up the original destinations of redirected connections.
#[derive(Clone)]
pub struct Originals {
    /// The original destinations of connections that are being opened.
    pub(super) handshakes: SharedMap<Handshake, Original>,
}

impl Originals {
    /// The original destination of a connection that the listener at `relay` accepted, and whether its client was
    /// admitted at once.
    ///
    /// # Errors
    /// The connection was not redirected: a client connected to the relay directly.
    pub fn of(&self, accepted: Accepted, relay: SocketAddr) -> io::Result<(SocketAddr, bool)> {
        let local = accepted.local;
        if local.port() != relay.port() || !is_relays(local.ip()) {
            // It came from outside and was given to the relay with its original address.
            return Ok((local, false));
        }
        let original = Self::look_up(&self.handshakes, &handshake(accepted.client, local))?;
        let at_once = original.admitted == admitted::AT_ONCE;
        Ok((address(original.server), at_once))
    }

    /// Lets the SYNs of a connection pass from now on.
    ///
    /// # Errors
    /// A system call fails.
    pub fn stop_holding(&self, pair: Pair) -> io::Result<()> {
        let key = handshake(pair.client, pair.local);
        let mut handshakes = self
            .handshakes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut original = handshakes.get(&key, 0).unwrap_or_default();
        original.admitted = admitted::RELEASED;
        handshakes
            .insert(key, original, 0)
            .map_err(io::Error::other)
    }

    fn look_up<K: Pod, V: Pod>(known: &SharedMap<K, V>, key: &K) -> io::Result<V> {
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .get(key, 0)
            .map_err(|error| io::Error::other(format!("it was not redirected here: {error}")))
    }
}

/// Whether clients are redirected to this address: see [`alias`].
fn is_relays(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            first == 127 && second & alias::MASK == alias::FIRST
        }
        IpAddr::V6(v6) => v6.is_loopback(),
    }
}

/// Converts an address to the maps' format.
pub fn destination(of: SocketAddr) -> Destination {
    let bytes = match of.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Destination {
        address: [word(0), word(4), word(8), word(12)],
        port: u32::from(of.port()),
    }
}

/// Converts both ends of a connection to the maps' format.
fn handshake(client: SocketAddr, server: SocketAddr) -> Handshake {
    Handshake {
        client: destination(client),
        server: destination(server),
    }
}

/// Converts an address from the maps' format.
pub fn address(of: Destination) -> SocketAddr {
    let port = u16::try_from(of.port).unwrap_or(0);
    SocketAddr::new(ip_address(of.address), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_they_were() {
        for text in [
            "10.0.0.5:80",
            "[fd77::2]:5432",
            "[::1]:1",
            "127.0.0.1:65535",
        ] {
            let there: SocketAddr = text.parse().unwrap();
            assert_eq!(address(destination(there)), there);
        }
    }
}
