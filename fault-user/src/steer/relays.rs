//! The relays of one target: where they listen, and what they do to their own sockets.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context as _, Result};
use fault_common::abi::SLOTS;
use nix::errno::Errno;

use super::hooks::Originals;
use super::served::Served;
use crate::kernel::injector::Marker;
use crate::kernel::services::{Service, relay_mark};
use crate::relay::{Engine, Inlet, Listen, Prepare, Relay, Settings, Target, Transport, Upstream};
use crate::rule::ResolvedTarget;
use crate::tell::tell;

/// Where the relays of one target listen, on loopback: IPv4, and IPv6 where there is any.
pub struct Ends {
    /// For connections.
    pub streams: [Option<TcpListener>; 2],
    /// For datagrams: a socket for each server.
    datagrams: [Vec<UdpSocket>; 2],
    /// Their addresses.
    pub addresses: [Vec<SocketAddr>; 2],
    /// For datagrams from outside to services here.
    pub outside: [Option<Inlet>; 2],
}

/// What the relays of all targets have in common.
pub struct Maker<'a> {
    /// Carries them.
    pub engine: &'a Arc<Engine>,
    /// What they draw from.
    pub seed: u64,
    /// What was meant by what is led to them.
    pub originals: &'a Originals,
    /// What is done to the sockets that they open.
    pub prepare: Prepare,
}

impl Ends {
    /// Opens them, for connections, datagrams or both; `outside`: also for datagrams from outside.
    ///
    /// # Errors
    /// There is no loopback, or too many files are open.
    pub fn open(transports: &[Transport], outside: bool) -> Result<Self> {
        let mut ends = Self {
            streams: [None, None],
            datagrams: [Vec::new(), Vec::new()],
            addresses: [Vec::new(), Vec::new()],
            outside: [None, None],
        };
        for transport in transports {
            match transport {
                Transport::Tcp => {
                    let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                        .context("the relay can't listen on 127.0.0.1 (is lo up?)")?;
                    let v6 = unless_missing(TcpListener::bind((Ipv6Addr::LOCALHOST, 0)))
                        .context("the relay can't listen on ::1")?;
                    // What they accept inherits the mark: `reconnect` leaves it alone.
                    for listener in [Some(&v4), v6.as_ref()].into_iter().flatten() {
                        mark(listener.as_fd(), relay_mark())?;
                    }
                    ends.streams = [Some(v4), v6];
                }
                Transport::Udp => {
                    let v4 = sockets(Ipv4Addr::LOCALHOST.into())
                        .context("the relay can't listen on 127.0.0.1 (is lo up?)")?;
                    let has_v6 = unless_missing(UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)))
                        .context("the relay can't listen on ::1")?
                        .is_some();
                    ends.datagrams[0] = v4;
                    if has_v6 {
                        ends.datagrams[1] = sockets(Ipv6Addr::LOCALHOST.into())
                            .context("the relay can't listen on ::1")?;
                    }
                    if outside {
                        ends.outside = from_outside(has_v6)?;
                    }
                }
            }
        }
        for (sockets, addresses) in ends.datagrams.iter().zip(&mut ends.addresses) {
            for socket in sockets {
                // What it sends to clients is not led back.
                mark(socket.as_fd(), relay_mark())?;
                addresses.push(socket.local_addr()?);
            }
        }
        Ok(ends)
    }

    /// The target as the hooks know it.
    ///
    /// # Errors
    /// The kernel does not tell where a relay listens.
    pub fn service(&self, target: &ResolvedTarget) -> io::Result<Service> {
        let port = |listener: &Option<TcpListener>| match listener {
            Some(listener) => Ok(listener.local_addr()?.port()),
            None => io::Result::Ok(0),
        };
        let [v4, v6] = &self.streams;
        let mut service = Service::new(target, [port(v4)?, port(v6)?]);
        service.limit_to(v4.is_some(), !self.datagrams[0].is_empty());
        Ok(service)
    }

    /// Relays of target `number`, which the user knows as `title`; they do not listen yet. Their connections are
    /// numbered as one.
    ///
    /// # Errors
    /// The kernel refuses to share a socket.
    pub fn relays(
        &mut self,
        maker: &Maker<'_>,
        (number, title): (usize, &str),
    ) -> Result<Vec<Arc<Relay>>> {
        let mut relays = Vec::new();
        let ordinals = Arc::default();
        for listener in self.streams.iter().flatten() {
            let listener = listener.try_clone().context("starting the relay")?;
            let own = listener.local_addr()?;
            let originals = maker.originals.clone();
            let target = Target::Hook(Arc::new(move |accepted| originals.of(accepted, own)));
            let listen = Listen::TcpHook(Arc::new(move || listener.try_clone()));
            relays.push(maker.relay((number, title), listen, target, &ordinals));
        }
        let [v4, v6] = std::mem::take(&mut self.datagrams);
        if !v4.is_empty() {
            let own: HashSet<SocketAddr> = self.addresses.iter().flatten().copied().collect();
            let originals = maker.originals.clone();
            let target = Target::Hook(Arc::new(move |accepted| {
                if own.contains(&accepted.local) {
                    originals.server(accepted.local)
                } else {
                    Ok(accepted.local)
                }
            }));
            let mut inlets: Vec<Inlet> = v4.into_iter().chain(v6).map(Inlet::own).collect();
            for inlet in self.outside.iter().flatten() {
                inlets.push(inlet.try_clone().context("starting the relay")?);
            }
            let listen = Listen::UdpHook(Arc::new(move || {
                inlets.iter().map(Inlet::try_clone).collect()
            }));
            relays.push(maker.relay((number, title), listen, target, &ordinals));
        }
        Ok(relays)
    }
}

/// Nothing where this machine, or this network namespace, has no IPv6; any other reason is an error.
fn unless_missing<T>(bound: io::Result<T>) -> io::Result<Option<T>> {
    match bound {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => Ok(None),
            _ => Err(error),
        },
    }
}

fn sockets(host: IpAddr) -> io::Result<Vec<UdpSocket>> {
    (0..SLOTS).map(|_| UdpSocket::bind((host, 0))).collect()
}

/// Sockets for datagrams from outside; none, which is told, where answers can't be sent in the services' names.
fn from_outside(has_v6: bool) -> Result<[Option<Inlet>; 2]> {
    let open = |host: IpAddr| {
        let socket = UdpSocket::bind((host, 0))?;
        Inlet::of_services(socket)
    };
    let v4 = match open(Ipv4Addr::LOCALHOST.into()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tell!(
                "fault: UDP clients from outside go straight: to answer them takes a raw socket (CAP_NET_RAW)"
            );
            return Ok([None, None]);
        }
        opened => opened.context("opening a raw socket for answers to clients from outside")?,
    };
    let v6 = has_v6.then(|| open(Ipv6Addr::LOCALHOST.into())).transpose();
    let v6 = v6.context("opening a raw socket for answers over IPv6")?;
    Ok([Some(v4), v6])
}

impl Maker<'_> {
    fn relay(
        &self,
        (number, title): (usize, &str),
        listen: Listen,
        target: Target,
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
            },
            udp_idle: Settings::UDP_IDLE,
            ordinals: Arc::clone(ordinals),
        };
        Relay::new(self.engine, settings)
    }
}

/// Marks a socket of the relay for the hooks, and for the packet programs, and has it reach servers whose connections are
/// given to the relay.
pub fn prepare(number: u32, marker: Option<Marker>, served: Option<Served>) -> Prepare {
    Arc::new(move |socket, server: SocketAddr| {
        mark(socket, number)?;
        if let Some(marker) = &marker {
            marker(socket)?;
        }
        let approach = match &served {
            Some(served) => served.approach(socket, server)?,
            None => None,
        };
        Ok(approach.map(|approach| Box::new(approach) as Box<dyn Send>))
    })
}

fn mark(socket: BorrowedFd<'_>, number: u32) -> io::Result<()> {
    // SAFETY: the value is four bytes long.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            (&raw const number).cast(),
            4,
        )
    };
    Errno::result(status)?;
    Ok(())
}

/// How many connections wait to be accepted; 0 where the kernel does not tell.
pub fn backlog(listener: &TcpListener) -> u64 {
    // SAFETY: all zeros is a value of this structure of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = u32::try_from(size_of_val(&info)).unwrap_or(0);
    // SAFETY: room for the structure, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    // Of a listening socket the kernel reports the length of the queue in this field.
    if status == 0 {
        info.tcpi_unacked.into()
    } else {
        0
    }
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
