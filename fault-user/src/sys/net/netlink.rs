//! A blocking netlink socket: one request, its answer or its list.
//!
//! Dumps hand out raw payloads rather than the typed messages of `netlink-packet-route`: a kernel
//! newer than that crate, or a foreign qdisc with statistics that it doesn't know, must not be
//! able to stop `fault`. Only the few attributes that are needed get decoded, by [`attributes`].
//!
//! A socket belongs to the network namespace of the thread that opened it.
use anyhow::{Context, Result, bail};
use netlink_packet_core::{
    NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols};
use std::io;

/// How often a list that changed while it was read is read again before giving up.
const DUMP_TRIES: usize = 16;

/// A netlink socket with a sequence counter.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket for links, qdiscs and filters in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses the socket.
    pub fn route() -> Result<Self> {
        Self::open(protocols::NETLINK_ROUTE).context("can't open a netlink route socket")
    }

    /// Opens a socket for listing sockets in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses the socket (no `CONFIG_INET_DIAG`).
    pub fn sock_diag() -> Result<Self> {
        Self::open(protocols::NETLINK_SOCK_DIAG).context("can't open a netlink sock_diag socket")
    }

    fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a change and waits for the kernel's answer. `flags` come on top of
    /// `NLM_F_REQUEST | NLM_F_ACK`.
    ///
    /// # Errors
    /// The kernel's own error number as an [`io::Error`].
    pub fn change<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for packet in Packets(&bytes) {
                let packet = packet?;
                if packet.sequence_number() == self.sequence && packet.message_type() == NLMSG_ERROR
                {
                    return error_code(&packet);
                }
            }
        }
    }

    /// Asks for one thing, and keeps what `read` makes of the answer's payload; nothing when there is no such thing.
    ///
    /// # Errors
    /// The kernel's error or `read`'s.
    pub fn get<M: NetlinkSerializable, T>(
        &mut self,
        message: M,
        read: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<Option<T>> {
        self.send(message, NLM_F_REQUEST)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for packet in Packets(&bytes) {
                let packet = packet?;
                if packet.sequence_number() != self.sequence {
                    continue;
                }
                if packet.message_type() != NLMSG_ERROR {
                    return read(packet.payload()).map(Some);
                }
                return match error_code(&packet) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
                    _ => Ok(None),
                };
            }
        }
    }

    /// Lists: calls `each` with the payload of every entry and keeps what it makes of it.
    ///
    /// # Errors
    /// The kernel's error, `each`'s error, or a list that changes faster than it can be read.
    pub fn dump<M, T>(
        &mut self,
        message: &M,
        mut each: impl FnMut(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>>
    where
        M: NetlinkSerializable + Clone,
    {
        for _ in 0..DUMP_TRIES {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if let Some(found) = self.read_dump(&mut each)? {
                return Ok(found);
            }
        }
        bail!("the kernel's list kept changing while it was read: try again")
    }

    /// `None`: the list changed while it was read, so it may have holes.
    fn read_dump<T>(
        &mut self,
        each: &mut impl FnMut(&[u8]) -> Result<Option<T>>,
    ) -> Result<Option<Vec<T>>> {
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for packet in Packets(&bytes) {
                let packet = packet?;
                if packet.sequence_number() != self.sequence {
                    continue;
                }
                interrupted |= packet.flags() & NLM_F_DUMP_INTR != 0;
                match packet.message_type() {
                    NLMSG_DONE => {
                        // An error in the middle of a list comes with its end.
                        if !packet.payload().is_empty() {
                            error_code(&packet)?;
                        }
                        return Ok((!interrupted).then_some(found));
                    }
                    NLMSG_ERROR => {
                        error_code(&packet)?;
                        return Ok(Some(found));
                    }
                    _ => found.extend(each(packet.payload())?),
                }
            }
        }
    }

    fn send<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        let sent = self.socket.send(&bytes, 0)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::Error::other(
                "the kernel accepted only a part of a netlink request",
            ))
        }
    }
}

/// The error number at the start of an `NLMSG_ERROR` payload; 0 is an acknowledgement.
fn error_code(packet: &NetlinkBuffer<&[u8]>) -> io::Result<()> {
    let code = packet
        .payload()
        .first_chunk::<4>()
        .map(|bytes| i32::from_ne_bytes(*bytes))
        .ok_or_else(|| io::Error::other("a netlink error without an error number"))?;
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(-code))
    }
}

/// The netlink messages in one datagram.
struct Packets<'a>(&'a [u8]);

impl<'a> Iterator for Packets<'a> {
    type Item = io::Result<NetlinkBuffer<&'a [u8]>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match NetlinkBuffer::new_checked(self.0) {
            Ok(packet) => {
                // Messages start at multiples of four bytes; the last one may lack the padding.
                let length = (packet.length() as usize).next_multiple_of(4);
                self.0 = self.0.get(length..).unwrap_or_default();
                Some(Ok(packet))
            }
            Err(error) => {
                self.0 = &[];
                Some(Err(io::Error::other(format!(
                    "a malformed netlink answer: {error}"
                ))))
            }
        }
    }
}

/// The attributes (type without its flag bits, value) behind a fixed header of `header_bytes`.
///
/// # Errors
/// When the payload is shorter than its header or an attribute claims more bytes than there are.
pub fn attributes(payload: &[u8], header_bytes: usize) -> Result<Vec<(u16, &[u8])>> {
    let rest = payload
        .get(header_bytes..)
        .context("a netlink answer shorter than its header")?;
    nested(rest)
}

/// The attributes inside an attribute's value.
///
/// # Errors
/// When an attribute claims more bytes than there are.
pub fn nested(value: &[u8]) -> Result<Vec<(u16, &[u8])>> {
    NlasIterator::new(value)
        .map(|attribute| {
            let attribute = attribute.context("a malformed netlink attribute")?;
            let (kind, end) = (attribute.kind(), usize::from(attribute.length()));
            Ok((kind, &attribute.into_inner()[NLA_HEADER_SIZE..end]))
        })
        .collect()
}

/// An integer of native byte order at `offset` in a fixed header.
///
/// # Errors
/// When the payload ends before it.
pub fn header_u32(payload: &[u8], offset: usize) -> Result<u32> {
    payload
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<4>())
        .map(|bytes| u32::from_ne_bytes(*bytes))
        .context("a netlink answer shorter than its header")
}

/// Runs a test in a network namespace of its own, which ends with it. Skipped without root.
#[cfg(test)]
pub(crate) fn in_own_netns(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
