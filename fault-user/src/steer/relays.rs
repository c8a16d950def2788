//! The relays of one target: their listeners and the setup of their own sockets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context as _, Result};
use fault_common::abi::steered;
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::handshakes::Handshakes;
use super::originals::Originals;
use super::prompt::{PromptService, Prompts};
use super::served::Served;
use crate::inject::injector::Marker;
use crate::inject::names::LearnedAddresses;
use crate::inject::services::{ServiceEntry, relay_mark};
use crate::relay::exchange::Exchange;
use crate::relay::{BACKLOG, Engine, Listen, Prepare, Relay, Settings, Upstream, UpstreamTarget};
use crate::rule::ResolvedTarget;
use crate::sys::process::sockets::set_mark;

/// The listeners of a target's relays on loopback: IPv4, and IPv6 if available.
pub struct RelayListeners {
    /// For connections.
    pub streams: [Option<TcpListener>; 2],
}

/// Settings shared by the relays of all targets.
pub struct Maker<'a> {
    /// Runs the relays.
    pub engine: &'a Arc<Engine>,
    /// The random seed.
    pub seed: u64,
    /// The original destinations of redirected connections.
    pub originals: &'a Originals,
    /// Holds SYNs at the listeners.
    pub handshakes: Handshakes,
    /// Prepares the sockets that the relays open.
    pub prepare: Prepare,
    /// Servers that answer at once.
    pub prompts: Prompts,
    /// The source of datagrams.
    pub exchange: Option<&'a Arc<Exchange>>,
}

impl RelayListeners {
    /// Opens the listeners; none for a target that is only for datagrams.
    ///
    /// # Errors
    /// Loopback is down, or too many files are open.
    pub fn open(has_streams: bool) -> Result<Self> {
        if !has_streams {
            return Ok(Self {
                streams: [None, None],
            });
        }
        let v4 = listener(Ipv4Addr::LOCALHOST.into())
            .context("the relay can't listen on 127.0.0.1 (is lo up?)")?;
        let v6 = unless_missing(listener(Ipv6Addr::LOCALHOST.into()))
            .context("the relay can't listen on ::1")?;
        // Accepted connections inherit the mark, so that `reconnect` ignores them.
        for listener in [Some(&v4), v6.as_ref()].into_iter().flatten() {
            set_mark(listener.as_fd(), relay_mark())?;
        }
        Ok(Self {
            streams: [Some(v4), v6],
        })
    }

    /// Converts the target for the hooks. `learned` has the addresses of its name, if it has one.
    ///
    /// # Errors
    /// The address of a listener can't be read, or the addresses of the name are not learned.
    pub fn service(
        &self,
        target: &ResolvedTarget,
        learned: Option<&LearnedAddresses>,
    ) -> Result<ServiceEntry> {
        let port = |listener: &Option<TcpListener>| match listener {
            Some(listener) => Ok(listener.local_addr()?.port()),
            None => io::Result::Ok(0),
        };
        let [v4, v6] = &self.streams;
        let mut service = ServiceEntry::new(target, [port(v4)?, port(v6)?], learned)?;
        service.steer.protocols = if v4.is_some() { steered::TCP } else { 0 };
        Ok(service)
    }

    /// Creates the relays of target `number`, with the name `title`; they do not listen yet. They share one numbering
    /// of connections. `packets` is the relay's number in the exchange for datagrams, if the target has any.
    ///
    /// # Errors
    /// A socket can't be duplicated, or there is no exchange.
    pub fn relays(
        &mut self,
        maker: &Maker<'_>,
        (number, title): (usize, &str),
        packets: Option<usize>,
    ) -> Result<Vec<Arc<Relay>>> {
        let mut relays = Vec::new();
        let ordinals = Arc::default();
        let listeners = self.streams.iter().flatten().map(TcpListener::try_clone);
        let listeners = listeners.collect::<io::Result<_>>();
        let prompt = maker
            .prompts
            .of_service(number, listeners.context("starting the relay")?);
        for listener in self.streams.iter().flatten() {
            let listener = listener.try_clone().context("starting the relay")?;
            let own = listener.local_addr()?;
            let originals = maker.originals.clone();
            let clients = Arc::clone(&prompt);
            let target = UpstreamTarget::Hook(Arc::new(move |accepted| {
                let (server, at_once) = originals.of(accepted, own)?;
                clients.begins(at_once);
                Ok(server)
            }));
            let handshakes = maker.handshakes.clone();
            let listen = Listen::TcpHook(Arc::new(move || handshakes.hold(listener.try_clone()?)));
            relays.push(maker.relay((number, title), listen, (target, &prompt), &ordinals));
        }
        if let Some(number) = packets {
            let exchange = maker
                .exchange
                .context("no tap device is open to take datagrams from")?;
            let listen = Listen::Packets(Arc::clone(exchange), number);
            relays.push(maker.relay(
                (number, title),
                listen,
                (UpstreamTarget::OriginalDestination, &prompt),
                &ordinals,
            ));
        }
        Ok(relays)
    }
}

/// Opens a listener for the relay with the longest possible queue.
///
/// # Errors
/// The address does not exist, or too many files are open.
pub fn listener(host: IpAddr) -> io::Result<TcpListener> {
    let address = SocketAddr::new(host, 0);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Returns `None` if this network namespace has no IPv6; any other failure is an error.
fn unless_missing<T>(bound: io::Result<T>) -> io::Result<Option<T>> {
    match bound {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => Ok(None),
            _ => Err(error),
        },
    }
}

impl Maker<'_> {
    fn relay(
        &self,
        (number, title): (usize, &str),
        listen: Listen,
        (target, prompt): (UpstreamTarget, &Arc<PromptService>),
        ordinals: &Arc<AtomicU64>,
    ) -> Arc<Relay> {
        let settings = Settings {
            name: format!("target {number}"),
            title: title.to_owned(),
            seed: self.seed,
            listen,
            upstream: Upstream {
                target,
                prepare: Some(Arc::clone(&self.prepare)),
                answered: Some(prompt.answered()),
            },
            udp_idle: Settings::UDP_IDLE,
            ordinals: Arc::clone(ordinals),
        };
        Relay::new(self.engine, settings)
    }
}

/// Marks a socket of the relay for the hooks and the packet programs, and lets it bypass the redirection of its server.
pub fn prepare(number: u32, marker: Option<Marker>, served: Option<Served>) -> Prepare {
    Arc::new(move |socket, source, server| {
        set_mark(socket, number)?;
        if let Some(marker) = &marker {
            marker(socket)?;
        }
        let approach = match &served {
            Some(served) => served.approach(socket, source, server)?,
            None => None,
        };
        Ok(approach.map(|approach| Box::new(approach) as Box<dyn Send>))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_ipv6_is_no_error_and_too_many_files_are() {
        let bound = |errno: Errno| unless_missing::<()>(Err(errno.into()));
        for missing in [Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL] {
            assert!(
                bound(missing).is_ok_and(|socket| socket.is_none()),
                "{missing}"
            );
        }
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::EADDRINUSE] {
            let error = bound(errno).expect_err("it must be told");
            assert_eq!(error.raw_os_error(), Some(errno as i32));
        }
    }
}
