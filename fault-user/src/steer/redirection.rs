//! The programs that redirect the connections of a scope to relays, kept from one [`Steering`] to the next.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};

use super::handshakes::HandshakeEvents;
use super::hooks::{HookScope, SteeringHooks};
use super::originals::Originals;
use super::reconnect;
use super::relays::{Maker, prepare};
use super::{Steering, WORKERS};
use crate::inject::injector::Marker;
use crate::inject::names::LearnedAddresses;
use crate::inject::services::{Room, ServiceEntry, relay_mark};
use crate::plan::stream::RelayRule;
use crate::relay::exchange::Exchange;
use crate::relay::{Decisions, Engine};
use crate::sys::process::netns::NetworkNamespace;

/// Selects the connections and datagrams that are redirected.
pub struct SteeringScope<'a> {
    /// Processes in this cgroup.
    pub cgroup: &'a Path,
    /// The cgroup is the root.
    pub all_cgroups: bool,
    /// The network namespace, if it is not the caller's. The relay's sockets are opened in it.
    pub namespace: Option<&'a NetworkNamespace>,
    /// Marks the relay's sockets, so that packet rules count them as the command's. With a marker, outside clients are
    /// redirected only on connections to the cgroup's servers; without one, on connections to all servers.
    pub marker: Option<Marker>,
    /// The source of datagrams; `None` without UDP rules.
    pub exchange: Option<Arc<Exchange>>,
}

/// Programs that redirect the connections of a scope to relays. Only one [`Steering`] at a time uses them.
pub struct Redirection {
    /// The cgroup whose connections are redirected; `None` for every process of the network namespace.
    pub(super) scope: Option<PathBuf>,
    pub(super) engine: Arc<Engine>,
    hooks: Arc<Mutex<SteeringHooks>>,
    originals: Originals,
    marker: Option<Marker>,
    exchange: Option<Arc<Exchange>>,
    /// How many services the programs have room for.
    services_max: u32,
}

/// The services that the programs know; they are removed when this is dropped.
pub(super) struct Registered {
    hooks: Arc<Mutex<SteeringHooks>>,
    services: Vec<ServiceEntry>,
}

impl Redirection {
    /// Loads and attaches the programs, with room for the services of all targets. Nothing is redirected yet.
    ///
    /// # Errors
    /// The kernel does not support the hooks (Linux 5.8).
    pub fn open(whose: SteeringScope<'_>, room: Room) -> Result<Self> {
        let engine = Engine::start_in(WORKERS, whose.namespace).context("starting the relay")?;
        let all_servers = whose.marker.is_none();
        let reach = HookScope {
            all_cgroups: whose.all_cgroups,
            all_servers,
        };
        let attach = || attach(whose.cgroup, reach, room);
        let (hooks, originals, events) = match whose.namespace {
            Some(namespace) => namespace.enter(attach)?,
            None => attach()?,
        };
        events.follow(&engine);
        Ok(Self {
            scope: (!all_servers).then(|| whose.cgroup.to_owned()),
            engine,
            hooks: Arc::new(Mutex::new(hooks)),
            originals,
            marker: whose.marker,
            exchange: whose.exchange,
            services_max: room.services,
        })
    }

    /// Redirects connections and datagrams to relays that apply `rules`, each given with its index among all rules.
    /// Rules without a start time are applied on return. `draws` is the seed, and what becomes of the decisions. `namespace` is that of the scope; `learned` has the addresses of
    /// the names that rules are aimed at.
    ///
    /// # Errors
    /// A rule is unsupported, or a system call fails.
    pub async fn steer(
        &self,
        rules: &[(usize, &RelayRule)],
        draws: (u64, &Decisions),
        namespace: Option<&NetworkNamespace>,
        learned: Option<LearnedAddresses>,
    ) -> Result<Steering> {
        Steering::begin(self, rules, draws, namespace, learned).await
    }

    pub(super) fn hooks(&self) -> MutexGuard<'_, SteeringHooks> {
        lock(&self.hooks)
    }

    /// Makes services known to the programs, which do not match them yet.
    pub(super) fn register(
        &self,
        services: Vec<ServiceEntry>,
        learned: Option<&LearnedAddresses>,
    ) -> Result<Registered> {
        ensure!(
            services.len() <= self.services_max as usize,
            "stream faults support at most {} targets at once: use fewer",
            self.services_max
        );
        let registered = Registered {
            hooks: Arc::clone(&self.hooks),
            services,
        };
        registered
            .hooks()
            .table()
            .fill(&registered.services, learned)?;
        Ok(registered)
    }

    /// What relays are made of.
    pub(super) fn maker(&self, seed: u64) -> Maker<'_> {
        let hooks = self.hooks();
        // Of all servers of the namespace none is registered.
        let served = self.scope.is_some().then(|| hooks.served().clone());
        Maker {
            engine: &self.engine,
            seed,
            originals: &self.originals,
            handshakes: hooks.handshakes().clone(),
            prepare: prepare(relay_mark(), self.marker.clone(), served),
            prompts: hooks.prompts().clone(),
            exchange: self.exchange.as_ref(),
        }
    }
}

impl Registered {
    pub(super) fn hooks(&self) -> MutexGuard<'_, SteeringHooks> {
        lock(&self.hooks)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut hooks = lock(&self.hooks);
        for (index, service) in (0..).zip(&self.services) {
            hooks.table().clear(index, service);
        }
    }
}

fn lock(hooks: &Mutex<SteeringHooks>) -> MutexGuard<'_, SteeringHooks> {
    hooks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Attaches the hooks, and shows them the servers that listen already.
fn attach(
    cgroup: &Path,
    reach: HookScope,
    room: Room,
) -> Result<(SteeringHooks, Originals, HandshakeEvents)> {
    let attached = SteeringHooks::attach(cgroup, reach, room)?;
    if !reach.all_servers {
        for listener in reconnect::listeners(cgroup)? {
            attached.0.served().add(listener)?;
        }
    }
    Ok(attached)
}
