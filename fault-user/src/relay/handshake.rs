//! Clients whose SYN is held at the relay's listener until the relay knows what their server answers, and what they
//! are told then: the SYN is sent once more, and let in, or an error is sent in the server's name.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use super::packets::{Pair, add, fold};

/// Bytes of a header of TCP without options.
const LEAST: usize = 20;
const RESET_AND_ACK: u8 = 0x14;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
/// Hops that a packet may make.
const HOPS: u8 = 64;

/// What a relay is told about clients that connect to it.
#[derive(Debug)]
pub enum ClientEvent {
    /// A client wants to connect; or wants it still, having got no answer.
    Syn(HeldSyn),
    /// A client has given up, or knows that it is refused.
    Gone(Pair),
}

/// What a TCP relay listens at.
#[derive(Debug)]
pub struct TcpInlet {
    /// Where clients connect.
    pub listener: std::net::TcpListener,
    /// What becomes of its clients' SYNs; none where the kernel lets them in at once.
    pub handshakes: Option<mpsc::UnboundedReceiver<ClientEvent>>,
}

/// Lets every SYN of a connection in from now on, for when the one that is sent again gets lost.
pub type StopHolding = Arc<dyn Fn(Pair) -> io::Result<()> + Send + Sync>;

/// A SYN that is held.
#[derive(Clone)]
pub struct HeldSyn {
    /// Who connects to what.
    pub pair: Pair,
    /// Its header of TCP.
    pub header: Vec<u8>,
    /// How the client is answered.
    pub sockets: Arc<RawSockets>,
    /// See there.
    pub stop_holding: StopHolding,
}

impl fmt::Debug for HeldSyn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SYN of {:?}", self.pair)
    }
}

/// Sockets for packets in the names of servers and clients, over IPv4 and IPv6.
#[derive(Debug)]
pub struct RawSockets {
    v4: Socket,
    v6: Option<Socket>,
}

impl RawSockets {
    /// Opens them; `prepare` gives each the relay's mark.
    ///
    /// # Errors
    /// No rights (`CAP_NET_RAW`).
    pub fn open(prepare: impl Fn(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<Self> {
        let open = |domain| -> io::Result<Socket> {
            // Of this protocol it receives nothing, and headers are given with what is sent.
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            prepare(socket.as_fd())?;
            Ok(socket)
        };
        let v6 = match open(Domain::IPV6) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            opened => Some(opened?),
        };
        Ok(Self {
            v4: open(Domain::IPV4)?,
            v6,
        })
    }

    /// Sends what `protocol` carries from one address to another.
    fn send(&self, from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> io::Result<()> {
        let none = MsgFlags::empty();
        let packet = packet(from, to, protocol, body)?;
        match (to, &self.v6) {
            (IpAddr::V4(to), _) => {
                let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
                sendto(self.v4.as_raw_fd(), &packet, &to, none)?;
            }
            (IpAddr::V6(to), Some(socket)) => {
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0));
                sendto(socket.as_raw_fd(), &packet, &to, none)?;
            }
            (IpAddr::V6(_), None) => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(())
    }
}

/// Whether the client's kernel takes notice of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It does, or there was nothing to tell.
    Certain,
    /// Not while the client is inside connect(2) without waiting.
    Doubtful,
}

/// How a client learns that it can't be connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// By a reset.
    Reset,
    /// By an ICMP error: its type and code, over IPv4 and over IPv6.
    Unreachable([[u8; 2]; 2]),
    /// By nothing: it waits as long as it means to.
    Silence,
}

impl Refusal {
    /// What makes the client's connect(2) fail as the relay's did.
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENETUNREACH) => Self::Unreachable([[3, 0], [1, 0]]),
            Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => Self::Unreachable([[3, 1], [1, 3]]),
            Some(libc::ENOPROTOOPT) => Self::Unreachable([[3, 2], [1, 3]]),
            Some(libc::EACCES | libc::EPERM) => Self::Unreachable([[3, 13], [1, 1]]),
            Some(libc::ETIMEDOUT) => Self::Silence,
            _ => Self::Reset,
        }
    }
}

impl HeldSyn {
    /// The initial sequence number: another connection of the same ends has another.
    ///
    /// # Errors
    /// The header is cut off.
    pub fn sequence(&self) -> io::Result<u32> {
        let sequence = self.header.get(4..8).and_then(|bytes| bytes.first_chunk());
        Ok(u32::from_be_bytes(
            *sequence.ok_or(io::ErrorKind::InvalidData)?,
        ))
    }

    /// Lets the client connect: the SYN is sent once more, with the relay's mark.
    ///
    /// # Errors
    /// The kernel does not send it.
    pub fn admit(&self) -> io::Result<()> {
        let Pair { client, local } = self.pair;
        let syn = segment(client.ip(), local.ip(), &self.header)?;
        self.sockets.send(client.ip(), local.ip(), TCP, &syn)
    }

    /// Has the client's connect(2) fail as the relay's did.
    ///
    /// # Errors
    /// The kernel does not send it.
    pub fn refuse(&self, error: &io::Error) -> io::Result<Delivery> {
        let Pair { client, local } = self.pair;
        let (to, from) = (client.ip(), local.ip());
        match Refusal::of(error) {
            Refusal::Silence => Ok(Delivery::Certain),
            Refusal::Reset => {
                let reset = segment(from, to, &self.reset()?)?;
                self.sockets.send(from, to, TCP, &reset)?;
                Ok(Delivery::Certain)
            }
            Refusal::Unreachable([v4, v6]) => {
                let quoted = segment(to, from, &self.header)?;
                let quoted = packet(to, from, TCP, &quoted)?;
                if to.is_ipv4() {
                    let message = message(v4, 0, &quoted);
                    self.sockets.send(from, to, ICMP, &message)?;
                } else {
                    let length = u32::try_from(8 + quoted.len()).map_err(io::Error::other)?;
                    let message = message(v6, pseudo(from, to, ICMP_V6, length), &quoted);
                    self.sockets.send(from, to, ICMP_V6, &message)?;
                }
                Ok(Delivery::Doubtful)
            }
        }
    }

    /// The reset of a host where nobody listens (RFC 9293, 3.5.2).
    fn reset(&self) -> io::Result<[u8; LEAST]> {
        let sequence = self.sequence()?;
        let mut reset = [0; LEAST];
        reset[..2].copy_from_slice(&self.pair.local.port().to_be_bytes());
        reset[2..4].copy_from_slice(&self.pair.client.port().to_be_bytes());
        reset[8..12].copy_from_slice(&sequence.wrapping_add(1).to_be_bytes());
        reset[12] = 5 << 4;
        reset[13] = RESET_AND_ACK;
        Ok(reset)
    }
}

/// The sum of what IP adds to a checksum.
fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, length: u32) -> u32 {
    [from, to]
        .iter()
        .fold(length + u32::from(protocol), |sum, ip| match ip {
            IpAddr::V4(v4) => add(sum, &v4.octets()),
            IpAddr::V6(v6) => add(sum, &v6.octets()),
        })
}

/// A segment without data, with its checksum.
fn segment(from: IpAddr, to: IpAddr, header: &[u8]) -> io::Result<Vec<u8>> {
    let mut segment = header.to_vec();
    let length = u32::try_from(segment.len()).map_err(io::Error::other)?;
    segment
        .get_mut(16..18)
        .ok_or(io::ErrorKind::InvalidData)?
        .fill(0);
    let sum = add(pseudo(from, to, TCP, length), &segment);
    segment[16..18].copy_from_slice(&(!fold(sum)).to_be_bytes());
    Ok(segment)
}

/// An ICMP error about a packet; `sum` is of what IP adds to its checksum.
fn message([kind, code]: [u8; 2], sum: u32, about: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(about);
    let sum = !fold(add(sum, &message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// A packet of IP. The kernel fills in the checksum and identification of IPv4.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> io::Result<Vec<u8>> {
    let length = |header: usize| u16::try_from(header + body.len()).map_err(io::Error::other);
    let mut packet = Vec::with_capacity(40 + body.len());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend(length(20)?.to_be_bytes());
            packet.extend([0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length(0)?.to_be_bytes());
            packet.extend([protocol, HOPS]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    packet.extend_from_slice(body);
    Ok(packet)
}

/// The same client and server as plain addresses, without what mapping or a flow label adds.
#[must_use]
pub fn pair(client: SocketAddr, local: SocketAddr) -> Pair {
    let plain = |one: SocketAddr| SocketAddr::new(one.ip().to_canonical(), one.port());
    Pair {
        client: plain(client),
        local: plain(local),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SYN of port 4000 to port 80 with four bytes of options.
    const SYN: [u8; 24] = [
        0x0f, 0xa0, 0, 80, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 9, 9, 0, 0, 2,
        4, 5, 0xb4,
    ];

    #[test]
    fn segments_and_messages_check_out() {
        for (from, to) in [("10.1.2.3", "127.64.0.1"), ("fd00::1", "::1")] {
            let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let whole = segment(from, to, &SYN).unwrap();
            let length = u32::try_from(whole.len()).unwrap();
            assert_eq!(fold(add(pseudo(from, to, TCP, length), &whole)), 0xffff);
            let quoted = packet(from, to, TCP, &whole).unwrap();
            let sum = pseudo(from, to, ICMP_V6, u32::try_from(8 + quoted.len()).unwrap());
            let error = message([1, 0], sum, &quoted);
            assert_eq!(fold(add(sum, &error)), 0xffff);
            let error = message([3, 0], 0, &quoted);
            assert_eq!(fold(add(0, &error)), 0xffff);
        }
    }

    #[test]
    fn errors_come_as_they_are() {
        let of = |errno: i32| Refusal::of(&io::Error::from_raw_os_error(errno));
        assert_eq!(of(libc::ECONNREFUSED), Refusal::Reset);
        assert_eq!(of(libc::EMFILE), Refusal::Reset);
        assert_eq!(of(libc::ETIMEDOUT), Refusal::Silence);
        assert_eq!(
            of(libc::ENETUNREACH),
            Refusal::Unreachable([[3, 0], [1, 0]])
        );
        assert_eq!(
            of(libc::EHOSTUNREACH),
            Refusal::Unreachable([[3, 1], [1, 3]])
        );
    }
}
