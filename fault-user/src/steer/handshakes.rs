//! Holds SYNs at the relay's listeners and passes the programs' events about them to the relays.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use aya::programs::SocketFilter;
use fault_common::abi::{self, handshake};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::originals::{Originals, address};
use crate::inject::services::relay_mark;
use crate::relay::{ClientEvent, Engine, HeldSyn, RawSockets, StopHolding, TcpInlet, pair};
use crate::sys::bpf::object::{loaded, program};
use crate::sys::process::sockets::set_mark;
use crate::tell::tell;

/// Listeners at which SYNs are held.
#[derive(Clone)]
pub struct Handshakes(Arc<Shared>);

struct Shared {
    filter: OwnedFd,
    /// `None` without `CAP_NET_RAW`: no SYNs are held then.
    sockets: Option<Arc<RawSockets>>,
    stop_holding: StopHolding,
    relays: Mutex<HashMap<u64, Listening>>,
}

/// A relay that receives handshake events.
struct Listening {
    address: SocketAddr,
    events: UnboundedSender<ClientEvent>,
}

impl Handshakes {
    /// Loads the filter for this thread's network namespace. The caller must call [`HandshakeEvents::follow`] to process its
    /// events.
    ///
    /// # Errors
    /// A system call fails.
    pub fn load(ebpf: &mut Ebpf, originals: &Originals) -> Result<(Self, HandshakeEvents)> {
        const NAME: &str = "fault_admit";
        let ring = ebpf
            .take_map("HANDSHAKE_EVENTS")
            .context("the eBPF object has no map HANDSHAKE_EVENTS")?;
        let filter: &mut SocketFilter = program(ebpf, NAME)?;
        loaded(NAME, || filter.load())?;
        let filter = filter.fd()?.as_fd().try_clone_to_owned()?;
        let sockets = match RawSockets::open(|socket| set_mark(socket, relay_mark())) {
            Ok(sockets) => Some(Arc::new(sockets)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tell!(
                    "fault: warning: connections to closed ports are accepted and then reset: refusing them needs a \
                     raw socket (CAP_NET_RAW)"
                );
                None
            }
            Err(error) => return Err(error).context("opening raw sockets for handshakes"),
        };
        let originals = originals.clone();
        let shared = Arc::new(Shared {
            filter,
            sockets,
            stop_holding: Arc::new(move |pair| originals.stop_holding(pair)),
            relays: Mutex::default(),
        });
        let events = HandshakeEvents {
            ring: RingBuf::try_from(ring)?,
            shared: Arc::clone(&shared),
        };
        Ok((Self(shared), events))
    }

    /// Holds SYNs at a listener from now on, if raw sockets are available.
    ///
    /// # Errors
    /// The kernel rejects the filter.
    pub fn hold(&self, listener: TcpListener) -> io::Result<TcpInlet> {
        if self.0.sockets.is_none() {
            return Ok(TcpInlet {
                listener,
                handshakes: None,
            });
        }
        let (events, handshakes): (_, UnboundedReceiver<_>) = unbounded_channel();
        let listening = Listening {
            address: listener.local_addr()?,
            events,
        };
        let cookie = socket2::SockRef::from(&listener).cookie()?;
        let mut relays = self.0.relays();
        relays.retain(|_, relay| !relay.events.is_closed());
        relays.insert(cookie, listening);
        drop(relays);
        attach(&listener, &self.0.filter)?;
        Ok(TcpInlet {
            listener,
            handshakes: Some(handshakes),
        })
    }
}

fn attach(listener: &TcpListener, filter: &OwnedFd) -> io::Result<()> {
    let filter = filter.as_raw_fd();
    // SAFETY: the value is a descriptor, four bytes long.
    let status = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            (&raw const filter).cast(),
            4,
        )
    };
    Errno::result(status)?;
    Ok(())
}

impl Shared {
    fn relays(&self) -> MutexGuard<'_, HashMap<u64, Listening>> {
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_on(&self, event: &abi::HandshakeEvent) {
        let pair = pair(
            address(event.handshake.client),
            address(event.handshake.server),
        );
        let mut relays = self.relays();
        if let (handshake::SYN, Some(sockets)) = (event.kind, &self.sockets) {
            let length = usize::try_from(event.length).unwrap_or(0);
            let syn = HeldSyn {
                pair,
                header: event.header.iter().copied().take(length).collect(),
                sockets: Arc::clone(sockets),
                stop_holding: Arc::clone(&self.stop_holding),
            };
            if let Some(relay) = relays.get(&event.listener)
                && relay.events.send(ClientEvent::Syn(syn)).is_err()
            {
                // The relay has stopped listening.
                relays.remove(&event.listener);
            }
        } else {
            let is_theirs = |relay: &&Listening| {
                relay.address.port() == pair.local.port()
                    && relay.address.is_ipv4() == pair.local.is_ipv4()
            };
            for relay in relays.values().filter(is_theirs) {
                // A relay that has stopped has no waiting clients.
                let _stopped = relay.events.send(ClientEvent::Gone(pair));
            }
        }
    }
}

/// Handshake events of the programs.
pub struct HandshakeEvents {
    ring: RingBuf<MapData>,
    shared: Arc<Shared>,
}

impl HandshakeEvents {
    /// Passes the events to the relays, on one of their workers.
    pub fn follow(self, engine: &Engine) {
        engine.spawn_beside_handshakes(async move {
            if let Err(error) = self.run().await {
                log::error!("handshakes can't be delayed: {error}");
            }
        });
    }

    async fn run(self) -> io::Result<()> {
        let Self { mut ring, shared } = self;
        let readable = ring.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is the value's own, and open until the `AsyncFd` is dropped.
        let readable = unsafe { AsyncFd::register(readable) }.map_err(io::Error::from)?;
        loop {
            let mut guard = readable.readable().await?;
            while let Some(item) = ring.next() {
                if let Ok(bytes) = <&[u8; size_of::<abi::HandshakeEvent>()]>::try_from(&*item) {
                    // SAFETY: the programs write nothing else, and every bit pattern is one.
                    let event = unsafe {
                        bytes
                            .as_ptr()
                            .cast::<abi::HandshakeEvent>()
                            .read_unaligned()
                    };
                    shared.hand_on(&event);
                }
            }
            guard.clear_ready();
        }
    }
}
