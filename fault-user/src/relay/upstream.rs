//! Where a relay connects to.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use super::fault::CloseMode;

/// What is known of an accepted connection when its upstream is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to: the original destination where the connection was redirected.
    pub local: SocketAddr,
}

/// Names the server of a connection.
pub type Resolve = Arc<dyn Fn(Accepted) -> io::Result<SocketAddr> + Send + Sync>;
/// Prepares a socket before it connects to an address: a mark, a source address. What is returned is kept until it has
/// connected, or for datagrams as long as the socket.
pub type Prepare =
    Arc<dyn Fn(BorrowedFd<'_>, SocketAddr) -> io::Result<Option<Box<dyn Send>>> + Send + Sync>;

/// The server of a relay.
#[derive(Clone)]
pub enum Target {
    /// `host:port`; a name is resolved anew for each connection.
    Name(String),
    /// Asked for each connection.
    Hook(Resolve),
    /// The address that the client connected to.
    OriginalDestination,
}

/// The server of a relay and how its socket is made.
#[derive(Clone)]
pub struct Upstream {
    /// Where to.
    pub target: Target,
    /// What is done to the socket before.
    pub prepare: Option<Prepare>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Name(name) => write!(formatter, "Upstream({name})"),
            Target::Hook(_) => formatter.write_str("Upstream(hook)"),
            Target::OriginalDestination => formatter.write_str("Upstream(original destination)"),
        }
    }
}

impl Upstream {
    /// A server by `host:port`.
    pub fn name(name: impl Into<String>) -> Self {
        Self {
            target: Target::Name(name.into()),
            prepare: None,
        }
    }

    /// The addresses to try, in order.
    ///
    /// # Errors
    ///
    /// When the name has none or the hook fails.
    pub(crate) async fn resolve(
        &self,
        accepted: impl FnOnce() -> io::Result<Accepted>,
    ) -> io::Result<Vec<SocketAddr>> {
        match &self.target {
            Target::Name(name) => match name.parse() {
                Ok(address) => Ok(vec![address]),
                Err(_not_literal) => resolve_name(name).await,
            },
            Target::Hook(hook) => hook(accepted()?).map(|address| vec![address]),
            Target::OriginalDestination => Ok(vec![accepted()?.local]),
        }
    }

    /// How the client is told that its server can't be reached. One that dialled the relay's own address has connected to what it
    /// asked for: it gets an orderly end, as from Toxiproxy, since a reset can overtake the return of its connect(2) and make that
    /// fail. One that dialled the server gets what is nearest to a refusal.
    pub(crate) const fn unreachable(&self) -> CloseMode {
        match (&self.target, &self.prepare) {
            (Target::Name(_), None) => CloseMode::Fin,
            _ => CloseMode::Rst,
        }
    }

    /// Connects to the first address that answers.
    ///
    /// # Errors
    ///
    /// What the last address said.
    pub(crate) async fn connect(
        &self,
        accepted: impl FnOnce() -> io::Result<Accepted>,
    ) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the upstream has no address");
        for address in self.resolve(accepted).await? {
            match self.connect_to(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        // An urgent byte comes in its place.
        socket.set_out_of_band_inline(true)?;
        let kept = match &self.prepare {
            Some(prepare) => prepare(socket.as_fd(), address)?,
            None => None,
        };
        if self.prepare.is_some() && kept.is_none() {
            come_from_here(&socket, address)?;
        }
        match begin_to_connect(&socket, address)? {
            Begun::Connected => Ok(socket.into()),
            Begun::Connecting => finish_connecting(socket).await,
        }
    }
}

/// How far a connection has got.
enum Begun {
    Connected,
    Connecting,
}

/// Has a socket connect. A server on this host has answered on return.
fn begin_to_connect(socket: &Socket, address: SocketAddr) -> io::Result<Begun> {
    let address = address.into();
    for _ in 0..2 {
        match socket.connect(&address) {
            Ok(()) => return Ok(Begun::Connected),
            Err(error) => match error.raw_os_error() {
                Some(libc::EISCONN) => return Ok(Begun::Connected),
                Some(libc::EINPROGRESS | libc::EALREADY) => {}
                _ => return Err(error),
            },
        }
    }
    Ok(Begun::Connecting)
}

/// Waits until a socket has connected.
async fn finish_connecting(socket: Socket) -> io::Result<TcpStream> {
    // What gives up while it connects is a reset to a server that has accepted: nothing of the client has
    // been sent to it.
    socket.set_linger(Some(std::time::Duration::ZERO))?;
    let stream = tokio::net::TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    socket2::SockRef::from(&stream).set_linger(None)?;
    stream.into_std()
}

/// Has a socket that connects to an address of this host come from that address, as it does by itself for 127.0.0.1 and ::1. By that
/// the hook for clients from outside knows what does not come from outside; it would lead the relay to itself.
fn come_from_here(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let ip = address.ip().to_canonical();
    if ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST || !is_own(ip)? {
        return Ok(());
    }
    let late: libc::c_int = 1;
    // The port is chosen when it connects: one serves for many servers.
    // SAFETY: the value is four bytes long.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const late).cast(),
            4,
        )
    };
    nix::errno::Errno::result(status)?;
    let mut here = address;
    here.set_port(0);
    socket.bind(&here.into())
}

/// Whether this host has the address.
pub(crate) fn is_own(address: IpAddr) -> io::Result<bool> {
    if address.is_loopback() {
        return Ok(true);
    }
    let mut own = nix::ifaddrs::getifaddrs()?.filter_map(|interface| interface.address);
    Ok(own.any(|own| match address {
        IpAddr::V4(address) => own.as_sockaddr_in().is_some_and(|own| own.ip() == address),
        IpAddr::V6(address) => own.as_sockaddr_in6().is_some_and(|own| own.ip() == address),
    }))
}

/// Resolves `host:port`; an empty host is this one, as in Toxiproxy.
pub(crate) async fn resolve_name(name: &str) -> io::Result<Vec<SocketAddr>> {
    let name = if name.starts_with(':') {
        format!("localhost{name}")
    } else {
        name.to_owned()
    };
    Ok(tokio::net::lookup_host(name).await?.collect())
}
