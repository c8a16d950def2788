//! Where a relay connects to.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::attributes::CloseMode;
use super::handshake::pair;
use super::socket::set;

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
/// Prepares a socket before it connects from one address (port 0: any) to another: a mark, and where something is returned
/// the source address. What is returned is kept until it has connected, or for datagrams as long as the socket.
pub type Prepare = Arc<
    dyn Fn(BorrowedFd<'_>, SocketAddr, SocketAddr) -> io::Result<Option<Box<dyn Send>>>
        + Send
        + Sync,
>;

/// Is told what a server answered: true when it accepted before connect(2) returned.
pub type Answered = Arc<dyn Fn(SocketAddr, bool) + Send + Sync>;

/// The server of a relay.
#[derive(Clone)]
pub enum UpstreamTarget {
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
    pub target: UpstreamTarget,
    /// What is done to the socket before.
    pub prepare: Option<Prepare>,
    /// Who is to know what servers answer.
    pub answered: Option<Answered>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            UpstreamTarget::Name(name) => write!(formatter, "Upstream({name})"),
            UpstreamTarget::Hook(_) => formatter.write_str("Upstream(hook)"),
            UpstreamTarget::OriginalDestination => {
                formatter.write_str("Upstream(original destination)")
            }
        }
    }
}

impl Upstream {
    /// A server by `host:port`.
    pub fn name(name: impl Into<String>) -> Self {
        Self {
            target: UpstreamTarget::Name(name.into()),
            prepare: None,
            answered: None,
        }
    }

    /// The addresses to try, in order.
    ///
    /// # Errors
    ///
    /// When the name has none or the hook fails.
    pub(crate) async fn resolve(
        &self,
        accepted: impl Fn() -> io::Result<Accepted>,
    ) -> io::Result<Vec<SocketAddr>> {
        match &self.target {
            UpstreamTarget::Name(name) => match name.parse() {
                Ok(address) => Ok(vec![address]),
                Err(_not_literal) => resolve_name(name).await,
            },
            UpstreamTarget::Hook(hook) => hook(accepted()?).map(|address| vec![address]),
            UpstreamTarget::OriginalDestination => Ok(vec![accepted()?.local]),
        }
    }

    /// How the client is told that its server can't be reached. One that dialled the relay's own address has connected to what it
    /// asked for: it gets an orderly end, as from Toxiproxy, since a reset can overtake the return of its connect(2) and make that
    /// fail. One that dialled the server gets what is nearest to a refusal.
    pub(crate) const fn unreachable(&self) -> CloseMode {
        match (&self.target, &self.prepare) {
            (UpstreamTarget::Name(_), None) => CloseMode::Fin,
            _ => CloseMode::Rst,
        }
    }

    /// Connects to the first address that answers. A server that the client dialled itself sees the client's own port,
    /// where that can be.
    ///
    /// # Errors
    ///
    /// What the last address said.
    pub(crate) async fn connect(
        &self,
        accepted: impl Fn() -> io::Result<Accepted>,
    ) -> io::Result<TcpStream> {
        let client = match &self.prepare {
            Some(_) => {
                let Accepted { client, local } = accepted()?;
                Some(pair(client, local).client)
            }
            None => None,
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the upstream has no address");
        for address in self.resolve(&accepted).await? {
            match self.connect_to(address, client).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(
        &self,
        server: SocketAddr,
        client: Option<SocketAddr>,
    ) -> io::Result<TcpStream> {
        let Some(client) = client else {
            return self.connect_from(None, server).await;
        };
        let source = source(client, server)?;
        if source.port() != 0 {
            match self.connect_from(Some(source), server).await {
                // Another connection has these ends, or the port is not for the relay.
                Err(error) if is_about_source(&error) => {}
                connected => return connected,
            }
        }
        let any_port = SocketAddr::new(source.ip(), 0);
        self.connect_from(Some(any_port), server).await
    }

    async fn connect_from(
        &self,
        source: Option<SocketAddr>,
        server: SocketAddr,
    ) -> io::Result<TcpStream> {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(server), kind, Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        // An urgent byte comes in its place.
        socket.set_out_of_band_inline(true)?;
        let kept = match (&self.prepare, source) {
            (Some(prepare), Some(source)) => {
                let kept = prepare(socket.as_fd(), source, server)?;
                if kept.is_none() {
                    come_from(&socket, source)?;
                }
                kept
            }
            _ => None,
        };
        let begun = begin_to_connect(&socket, server);
        if let Some(answered) = &self.answered
            && !begun.as_ref().is_err_and(is_about_source)
        {
            answered(server, matches!(begun, Ok(Begun::Connected)));
        }
        let connected = match begun? {
            Begun::Connected => Ok(socket.into()),
            Begun::Connecting => finish_connecting(socket).await,
        };
        drop(kept);
        connected
    }
}

/// Where a connection to a server comes from, so that the server sees what it would see without the relay. To an address of
/// this host it comes from one of this host: by that the hook for clients from outside knows what does not come from outside; it
/// would lead the relay to itself. The port is that of a client which was redirected on this host, else 0.
fn source(client: SocketAddr, server: SocketAddr) -> io::Result<SocketAddr> {
    let (from, to) = (client.ip(), server.ip().to_canonical());
    let is_redirected = from.is_loopback() && from.is_ipv4() == to.is_ipv4();
    let ip = if to.is_loopback() && is_redirected {
        from
    } else if is_own(to)? {
        server.ip()
    } else if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    // From the server's own port it would be connected to itself.
    let has_own_port = is_redirected && client.port() != server.port();
    Ok(SocketAddr::new(
        ip,
        if has_own_port { client.port() } else { 0 },
    ))
}

fn is_about_source(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable
            | io::ErrorKind::AddrInUse
            | io::ErrorKind::PermissionDenied
    )
}

/// Has a socket connect from an address; one of port 0 is what it comes from by itself, or gets a port when it connects: one
/// serves for many servers.
fn come_from(socket: &Socket, source: SocketAddr) -> io::Result<()> {
    if source.port() != 0 {
        return bind(socket, source);
    }
    let ip = source.ip().to_canonical();
    if ip.is_unspecified() || ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST {
        return Ok(());
    }
    set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    socket.bind(&source.into())
}

/// Binds a socket that is to connect. It shares its port with a client's socket.
pub(crate) fn bind(socket: &Socket, source: SocketAddr) -> io::Result<()> {
    const REPAIR: libc::c_int = 1;
    const NO_REPAIR: libc::c_int = -1;
    let shares = source.port() != 0;
    if shares {
        // So connections are restored whose ports are in use: only both ends together have to be unique.
        set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR)?;
    }
    let bound = socket.bind(&source.into());
    if shares {
        set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, NO_REPAIR)?;
        // The client may bind its port once more.
        socket.set_reuse_address(true)?;
    }
    bound
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
    SockRef::from(&stream).set_linger(None)?;
    stream.into_std()
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
