//! A socket of the UDP relay's to which clients send, and how they are answered.
//!
//! Where the kernel gives it datagrams that were sent to a service, the answers must come from that service's address and
//! port, which the server's own socket has. They go out through a raw socket, which may name any port as its own; the
//! kernel adds the IP header and divides what is too large.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Bytes of a UDP header.
const HEADER: usize = 8;
/// UDP's number.
const PROTOCOL: u8 = 17;

/// A socket of a UDP relay's.
#[derive(Debug)]
pub struct Inlet {
    socket: std::net::UdpSocket,
    answers: Option<OwnedFd>,
}

impl Inlet {
    /// Clients send to this socket, and are answered from it.
    #[must_use]
    pub const fn own(socket: std::net::UdpSocket) -> Self {
        Self {
            socket,
            answers: None,
        }
    }

    /// The kernel gives this socket what clients send to other addresses here, and they are answered from those.
    ///
    /// # Errors
    /// No rights for a raw socket (`CAP_NET_RAW`).
    pub fn of_services(socket: std::net::UdpSocket) -> io::Result<Self> {
        let is_v4 = socket.local_addr()?.is_ipv4();
        let domain = if is_v4 {
            setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
            Domain::IPV4
        } else {
            setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
            Domain::IPV6
        };
        let answers = Socket::new(domain, Type::RAW, Some(Protocol::UDP))?;
        take_nothing(&answers)?;
        answers.set_nonblocking(true)?;
        Ok(Self {
            socket,
            answers: Some(answers.into()),
        })
    }

    /// The socket itself.
    #[must_use]
    pub const fn socket(&self) -> &std::net::UdpSocket {
        &self.socket
    }

    /// A second handle to the same sockets.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn try_clone(&self) -> io::Result<Self> {
        let answers = self.answers.as_ref().map(OwnedFd::try_clone);
        Ok(Self {
            socket: self.socket.try_clone()?,
            answers: answers.transpose()?,
        })
    }

    /// Has the calling worker watch it.
    pub(crate) fn watched(self) -> io::Result<Watched> {
        Ok(Watched {
            local: self.socket.local_addr()?,
            socket: UdpSocket::from_std(self.socket)?,
            answers: self.answers,
        })
    }
}

/// A raw socket gets a copy of all that comes in: of this one nothing is wanted.
fn take_nothing(socket: &Socket) -> io::Result<()> {
    // The program of one instruction that returns 0 (`BPF_RET | BPF_K`): the packet is not taken.
    let mut instruction = libc::sock_filter {
        code: 6,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: &raw mut instruction,
    };
    // SAFETY: the kernel copies the program, which outlives the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            u32::try_from(size_of_val(&program)).unwrap_or(0),
        )
    };
    nix::errno::Errno::result(status)?;
    Ok(())
}

/// An [`Inlet`] that a worker watches.
pub(crate) struct Watched {
    socket: UdpSocket,
    local: SocketAddr,
    answers: Option<OwnedFd>,
}

/// Who sent something, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The client.
    pub client: SocketAddr,
    /// The address that it sent to.
    pub local: SocketAddr,
}

impl Watched {
    /// Waits for a datagram.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Pair)> {
        if self.answers.is_none() {
            let (size, client) = self.socket.recv_from(buffer).await?;
            let local = self.local;
            return Ok((size, Pair { client, local }));
        }
        let receive = || receive_from(&self.socket, buffer);
        self.socket.async_io(Interest::READABLE, receive).await
    }

    /// Answers a client, from whom it meant.
    pub(crate) fn try_answer(&self, data: &[u8], pair: Pair) -> io::Result<usize> {
        match &self.answers {
            None => self.socket.try_send_to(data, pair.client),
            Some(answers) => send_as(answers, data, pair),
        }
    }
}

fn receive_from(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Pair)> {
    let mut space = nix::cmsg_space!(libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let client = message.address.as_ref().and_then(address);
    let local = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => {
            Some(SocketAddr::V4(SockaddrIn::from(to).into()))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(to) => {
            Some(SocketAddr::V6(SockaddrIn6::from(to).into()))
        }
        _ => None,
    });
    let pair = client.zip(local).ok_or_else(|| {
        io::Error::other("the kernel does not tell from where to where a datagram came")
    })?;
    let (client, local) = pair;
    Ok((message.bytes, Pair { client, local }))
}

fn address(of: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = of.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| of.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

/// Sends a datagram that says it comes from `pair.local`, which is an address of this host.
fn send_as(raw: &OwnedFd, data: &[u8], pair: Pair) -> io::Result<usize> {
    let header = header(data, pair)?;
    let parts = [IoSlice::new(&header), IoSlice::new(data)];
    let (flags, raw) = (MsgFlags::empty(), raw.as_raw_fd());
    let sent = match (pair.local.ip(), pair.client) {
        (IpAddr::V4(from), SocketAddr::V4(to)) => {
            let source = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(from.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&source)];
            let to = SockaddrIn::from(std::net::SocketAddrV4::new(*to.ip(), 0));
            sendmsg(raw, &parts, &control, flags, Some(&to))?
        }
        (IpAddr::V6(from), SocketAddr::V6(to)) => {
            let source = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: to.scope_id(),
            };
            let control = [ControlMessage::Ipv6PacketInfo(&source)];
            let to = std::net::SocketAddrV6::new(*to.ip(), 0, 0, to.scope_id());
            sendmsg(raw, &parts, &control, flags, Some(&SockaddrIn6::from(to)))?
        }
        _ => return Err(io::ErrorKind::AddrNotAvailable.into()),
    };
    Ok(sent.saturating_sub(HEADER))
}

/// The header of UDP (RFC 768) from the service to its client.
fn header(data: &[u8], pair: Pair) -> io::Result<[u8; HEADER]> {
    let length = u16::try_from(HEADER + data.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut header = [0; HEADER];
    header[0..2].copy_from_slice(&pair.local.port().to_be_bytes());
    header[2..4].copy_from_slice(&pair.client.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let mut sum = u32::from(length) + u32::from(PROTOCOL);
    for ip in [pair.local.ip(), pair.client.ip()] {
        sum = match ip {
            IpAddr::V4(v4) => add(sum, &Ipv4Addr::octets(&v4)),
            IpAddr::V6(v6) => add(sum, &Ipv6Addr::octets(&v6)),
        };
    }
    sum = add(add(sum, &header), data);
    let checksum = match !fold(sum) {
        // Zero would mean that there is none.
        0 => u16::MAX,
        sum => sum,
    };
    header[6..8].copy_from_slice(&checksum.to_be_bytes());
    Ok(header)
}

/// Adds 16-bit words in network byte order; at most 64 KiB do not overflow.
pub(crate) fn add(sum: u32, bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    words.fold(sum, |sum, word| {
        let low = word.get(1).copied().unwrap_or(0);
        sum + u32::from(u16::from_be_bytes([word[0], low]))
    })
}

/// The ones' complement sum (RFC 1071).
pub(crate) fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_check_out() {
        for (client, local) in [
            ("10.1.2.3:4000", "192.168.0.1:53"),
            ("[fd00::1]:9", "[fd00::2]:53"),
        ] {
            let pair = Pair {
                client: client.parse().unwrap(),
                local: local.parse().unwrap(),
            };
            let largest = vec![255; 65_527 - 20];
            for data in [&b""[..], b"odd", b"even", &largest] {
                let header = header(data, pair).unwrap();
                let pseudo = [pair.client.ip(), pair.local.ip()];
                let sum = pseudo.iter().fold(0, |sum, ip| match ip {
                    IpAddr::V4(v4) => add(sum, &v4.octets()),
                    IpAddr::V6(v6) => add(sum, &v6.octets()),
                });
                let length = u32::try_from(HEADER + data.len()).unwrap();
                let sum = add(add(sum + length + 17, &header), data);
                assert_eq!(fold(sum), 0xffff, "{client} {}", data.len());
            }
        }
    }
}
