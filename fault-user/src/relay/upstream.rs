//! Where a relay connects to.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use tokio::net::{TcpSocket, TcpStream};

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
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_nodelay(true)?;
        // An urgent byte stays in the stream instead of being left behind.
        socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
        let _kept = match &self.prepare {
            Some(prepare) => prepare(socket.as_fd(), address)?,
            None => None,
        };
        socket.connect(address).await
    }
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
