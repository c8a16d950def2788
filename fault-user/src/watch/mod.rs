//! Records the connections of a cgroup's processes to targets: when they connect, whether that succeeds, and when data
//! arrives. Expectations and reports are based on these records.

pub mod history;
pub mod open;
pub mod probe;

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya::programs::{CgroupSkb, CgroupSockAddr, SockOps};
use fault_common::abi::{Counter, STEERS, Witness};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::inject::names::LearnedAddresses;
use crate::inject::services;
use crate::inject::services::{Room, ServiceEntry};
use crate::rule::{Protocol, ResolvedTarget};
use crate::sys::bpf::cgroup_link::{CgroupLink, Hook};
use crate::sys::bpf::object::{loaded, program};
use crate::sys::process::rights::be_helper;
use crate::tell::tell;
use history::History;

/// Interval in milliseconds at which the thread checks whether to end.
const PATIENCE_MS: u16 = 50;

/// A watched cgroup, until this is dropped or finished.
pub struct Watch {
    stop: Arc<AtomicBool>,
    collector: Option<JoinHandle<()>>,
    witnesses: Arc<Mutex<Witnesses>>,
    /// How much was lost of the records that were taken already.
    lost: u64,
    names: Vec<String>,
    ebpf: Ebpf,
    _links: Vec<CgroupLink>,
}

/// The programs' events.
struct Witnesses {
    ring: RingBuf<MapData>,
    seen: Vec<Witness>,
}

impl Witnesses {
    /// Reads those that have arrived.
    fn read(&mut self) {
        while let Some(item) = self.ring.next() {
            if let Ok(bytes) = <&[u8; size_of::<Witness>()]>::try_from(&*item) {
                // SAFETY: the programs write nothing else, and every bit pattern is one.
                let witness = unsafe { bytes.as_ptr().cast::<Witness>().read_unaligned() };
                self.seen.push(witness);
            }
        }
    }
}

/// Selects the sockets to watch.
#[derive(Clone, Copy, Debug)]
pub struct WatchScope<'a> {
    /// The processes of a cgroup.
    pub cgroup: &'a Path,
    /// Only in the network namespace with this cookie; 0 for any.
    pub netns: u64,
}

impl Watch {
    /// Starts to watch connections to these targets. Must be called before connections are redirected to a relay, so
    /// that the original destinations count. `learned` has the addresses of the targets' names.
    ///
    /// # Errors
    /// A target can't be watched, there are too many, or a system call fails.
    pub fn start(
        whose: WatchScope<'_>,
        targets: &[(String, ResolvedTarget)],
        learned: Option<&LearnedAddresses>,
    ) -> Result<Self> {
        ensure!(
            targets.len() <= STEERS as usize,
            "at most {STEERS} targets can be watched at once: use fewer"
        );
        for (name, target) in targets {
            ensure!(
                whose.netns == 0 || target.protocol != Protocol::Udp,
                "the kernel does not report the network namespace of datagrams: for `{name}` use --container, or run \
                 fault inside the namespace"
            );
        }
        let services: Vec<_> = targets
            .iter()
            .map(|(_, target)| ServiceEntry::new(target, [0, 0], learned))
            .collect::<Result<_>>()?;
        let room = Room {
            services: u32::try_from(services.len())?,
            hosts: ServiceEntry::hosts_of(&services),
        };
        let (mut ebpf, mut table) = services::load(room, whose.netns, false)?;
        table.fill(&services, learned)?;
        for (number, (_, target)) in (0..).zip(targets) {
            table.switch(number, &target.ports, true);
        }
        let ring = ebpf
            .take_map("WITNESSES")
            .context("the eBPF object has no map WITNESSES")?;
        let ring = RingBuf::try_from(ring)?;
        let readable = ring.as_fd().try_clone_to_owned()?;
        let witnesses = Arc::new(Mutex::new(Witnesses {
            ring,
            seen: Vec::new(),
        }));
        let links = attach(&mut ebpf, whose.cgroup).with_context(|| {
            if whose.netns == 0 {
                "watching sockets"
            } else {
                "watching the sockets of another network namespace (needs Linux 5.15)"
            }
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let (until, collected) = (Arc::clone(&stop), Arc::clone(&witnesses));
        let collector = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || {
                be_helper(&[]);
                collect(&collected, readable.as_fd(), &until);
            })
            .context("starting a thread")?;
        Ok(Self {
            stop,
            collector: Some(collector),
            witnesses,
            lost: 0,
            names: targets.iter().map(|(name, _)| name.clone()).collect(),
            ebpf,
            _links: links,
        })
    }

    /// Ends the watch and returns the records. Times count from `epoch_ns` of `CLOCK_MONOTONIC`.
    ///
    /// # Errors
    /// Events were lost, so the records are incomplete.
    pub fn finish(mut self, epoch_ns: u64, end_ns: u64) -> Result<History> {
        self.join()?;
        self.take(epoch_ns, end_ns)
    }

    /// Returns the records since the last call, or since the start. Times count from `epoch_ns` of `CLOCK_MONOTONIC`.
    ///
    /// # Errors
    /// Events were lost, so the records are incomplete.
    pub fn take(&mut self, epoch_ns: u64, end_ns: u64) -> Result<History> {
        let mut witnesses = locked(&self.witnesses);
        witnesses.read();
        let seen = std::mem::take(&mut witnesses.seen);
        drop(witnesses);
        let counts: PerCpuArray<&MapData, u64> = self
            .ebpf
            .map("COUNTS")
            .context("the eBPF object has no map COUNTS")?
            .try_into()?;
        let count = |counter: Counter| -> Result<u64> {
            Ok(counts.get(&(counter as u32), 0)?.iter().sum())
        };
        let (events, connections) = (count(Counter::EventLost)?, count(Counter::FlowTableFull)?);
        let before = std::mem::replace(&mut self.lost, events + connections);
        ensure!(
            self.lost == before,
            "{} events came faster than they were read, or their connections did not fit into the table: what the \
             sockets did is not known",
            self.lost - before
        );
        Ok(History::new(&self.names, seen, epoch_ns, end_ns))
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        match self.collector.take() {
            Some(collector) => collector
                .join()
                .map_err(|_| anyhow!("the watcher panicked")),
            None => Ok(()),
        }
    }
}

fn locked(witnesses: &Mutex<Witnesses>) -> MutexGuard<'_, Witnesses> {
    witnesses.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            tell!("fault: {error}");
        }
    }
}

fn collect(witnesses: &Mutex<Witnesses>, readable: BorrowedFd<'_>, stop: &AtomicBool) {
    loop {
        let last = stop.load(Ordering::Acquire);
        locked(witnesses).read();
        if last {
            return;
        }
        let mut waiting = [PollFd::new(readable, PollFlags::POLLIN)];
        // A signal also ends the wait.
        let _woken = poll(&mut waiting, PollTimeout::from(PATIENCE_MS));
    }
}

fn attach(ebpf: &mut Ebpf, cgroup: &Path) -> Result<Vec<CgroupLink>> {
    let mut links = Vec::new();
    // The program for ends comes first: otherwise the start of a connection could be recorded without its end.
    let state: &mut SockOps = program(ebpf, "fault_watch_state")?;
    loaded("fault_watch_state", || state.load())?;
    links.push(CgroupLink::attach(
        state.fd()?.as_fd(),
        cgroup,
        Hook::SocketOperations,
    )?);
    for (name, hook) in [
        ("fault_watch_sent", Hook::Egress),
        ("fault_watch_received", Hook::Ingress),
    ] {
        let packets: &mut CgroupSkb = program(ebpf, name)?;
        loaded(name, || packets.load())?;
        links.push(CgroupLink::attach(packets.fd()?.as_fd(), cgroup, hook)?);
    }
    for (name, hook) in [
        ("fault_watch4", Hook::Connect4),
        ("fault_watch6", Hook::Connect6),
    ] {
        let connect: &mut CgroupSockAddr = program(ebpf, name)?;
        loaded(name, || connect.load())?;
        links.push(CgroupLink::attach(connect.fd()?.as_fd(), cgroup, hook)?);
    }
    Ok(links)
}
