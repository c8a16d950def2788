//! Servers on this host that answer at once. Their clients' SYNs are not held while that lasts, because it is known what
//! they would wait for: connect(2) takes no longer than without the relay.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use aya::Ebpf;
use fault_common::abi::{Prompt, STEERS};

use super::originals::destination;
use crate::relay::Answered;
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::bpf::object::mapped;
use crate::sys::clock::monotonic_ns;
use crate::sys::net::netlink::Netlink;
use crate::sys::process::sockets::{ListenerQueue, queue, room_at};

/// After this time without a look at the server's queue its clients' SYNs are held again.
const LASTS_NS: u64 = 100_000_000;
/// After a server has not answered at once, the relay does not count on any for so long.
const DISTRUST_NS: u64 = 1_000_000_000;
/// A queue with fewer places than this is left to clients whose SYNs are held: others may fill it meanwhile.
const PLACES_LEAST: u64 = 16;

/// The programs' maps.
#[derive(Clone)]
pub struct Prompts(Arc<Mutex<Maps>>);

struct Maps {
    prompts: MappedArray<Prompt>,
    admitted: MappedArray<u64>,
    /// Without it every SYN is held.
    netlink: Option<Netlink>,
}

/// What is known of the servers of one service.
pub struct PromptService {
    maps: Prompts,
    index: usize,
    /// The relay's own, at which clients wait.
    listeners: Vec<TcpListener>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How many of the clients that were admitted at once the relay has accepted.
    accepted: u64,
    /// How many could be admitted at once when a server's queue was looked at.
    granted: u64,
    distrusted_until_ns: u64,
}

impl Prompts {
    /// Maps the programs' maps into memory. The calling thread is in the network namespace of the programs.
    ///
    /// # Errors
    /// A map is missing or can't be mapped.
    pub fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let netlink = Netlink::sock_diag()
            .inspect_err(|error| log::info!("every client waits for its server: {error:#}"));
        Ok(Self(Arc::new(Mutex::new(Maps {
            prompts: mapped(ebpf, "PROMPTS", STEERS)?,
            admitted: mapped(ebpf, "ADMITTED", STEERS)?,
            netlink: netlink.ok(),
        }))))
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The servers of the service with this index, whose clients the relay accepts at these listeners.
    #[must_use]
    pub fn of_service(&self, index: usize, listeners: Vec<TcpListener>) -> Arc<PromptService> {
        Arc::new(PromptService {
            maps: self.clone(),
            index,
            listeners,
            state: Mutex::default(),
        })
    }
}

impl PromptService {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The relay is about to connect to the server of a client.
    pub fn begins(&self, is_admitted: bool) {
        let mut state = self.state();
        if is_admitted {
            state.accepted += 1;
            return;
        }
        // Whoever came before a client whose SYN was held has been accepted, or has been gone before.
        let admitted = self.maps.maps().admitted.get(self.index);
        if state.accepted != admitted {
            let waiting: u64 = self.queues().map(|queue| queue.length).sum();
            state.accepted = admitted.saturating_sub(waiting);
        }
    }

    fn queues(&self) -> impl Iterator<Item = ListenerQueue> {
        self.listeners.iter().map(queue)
    }

    /// Notes what servers answer to the relay.
    #[must_use]
    pub fn answered(self: &Arc<Self>) -> Answered {
        let own = Arc::clone(self);
        Arc::new(move |server, at_once| own.note(server, at_once))
    }

    fn note(&self, server: SocketAddr, at_once: bool) {
        let (mut state, now) = (self.state(), monotonic_ns());
        let mut maps = self.maps.maps();
        let (known, admitted) = (maps.prompts.get(self.index), maps.admitted.get(self.index));
        if !at_once {
            state.distrusted_until_ns = now + DISTRUST_NS;
            maps.prompts.set(self.index, Prompt::default());
            return;
        }
        let prompt = Prompt {
            server: destination(server),
            ..known
        };
        // Most come while that is known.
        let is_known = known.admits(&prompt.server, admitted, now + LASTS_NS / 2)
            && known.limit - admitted > state.granted / 2;
        // Only there is it certain that a listener at all addresses is the server.
        let is_here = server.ip().to_canonical().is_loopback();
        if is_known || !is_here || now < state.distrusted_until_ns {
            return;
        }
        // The programs see no other's limit with this server.
        maps.prompts.set(self.index, Prompt::default());
        let Some(netlink) = &mut maps.netlink else {
            return;
        };
        match room_at(netlink, server) {
            Ok(Some(places)) if u64::from(places) >= PLACES_LEAST => {
                // Those who are on their way have places too, and half of all are left to others.
                let own = self.queues().map(|queue| queue.limit).min();
                state.granted = u64::from(places).min(own.unwrap_or(0)) / 2;
                let limit = state.accepted.min(admitted) + state.granted;
                let prompt = Prompt { limit, ..prompt };
                maps.prompts.set(
                    self.index,
                    Prompt {
                        until_ns: 0,
                        ..prompt
                    },
                );
                let until_ns = now + LASTS_NS;
                maps.prompts.set(self.index, Prompt { until_ns, ..prompt });
            }
            Ok(_) => {}
            Err(error) => log::debug!("the queue of {server} is not known: {error:#}"),
        }
    }
}
