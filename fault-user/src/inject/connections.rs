//! The connection table: its size, and the removal of its entries.
//!
//! The programs only add connections. While there is room, an ended connection stays, because its last packets may be
//! retransmitted. When the table fills up, a thread removes ended connections, and then those that have been idle for
//! long. The latter are counted: if such a connection continues, the rules treat it as new.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use fault_common::abi::{Counter, Flow, FlowRule, FlowRuleKey, RuleState, state_of};
use fault_common::flow::FlowKey;
use fault_common::packet::PROTOCOL_TCP;
use nix::unistd::Pid;

use crate::sys::clock::monotonic_ns;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::Hierarchy;
use crate::sys::process::rights::be_helper;
use crate::tell::tell;

/// Maximum number of entries.
const CONNECTIONS_MAX: u32 = 1 << 19;
/// Minimum number of entries, however little memory there is.
const CONNECTIONS_MIN: u32 = 1 << 12;
/// Kernel memory per connection in bytes: its entry, and its share of the table's buckets.
const CONNECTION_BYTES: u64 = 512 + 32;
/// The table may take one part in this many of the memory.
const MEMORY_SHARE: u64 = 8;

/// Interval for checking whether room is needed, and the unit of [`Flow::touched`].
const ROUND: Duration = Duration::from_millis(500);

/// An ended connection is kept for this many rounds: 2 s.
const ENDED_ROUNDS: u32 = 4;
/// The same of a flow without a connection's end: UDP, ICMP and others; 30 s.
const DATAGRAMS_ROUNDS: u32 = 60;
/// The same of a TCP connection whose end has not been seen: 10 min.
const IDLE_ROUNDS: u32 = 1200;
/// The departure time of a packet that must keep its order is kept for 1 s after it.
const DEPARTED_NS: u64 = 1_000_000_000;

/// The size of the connection table: it takes an eighth of the memory that this process may use, and has at most
/// 524,288 entries.
#[must_use]
pub fn capacity() -> u32 {
    capacity_for(memory_bytes())
}

fn capacity_for(memory_bytes: u64) -> u32 {
    let fitting = memory_bytes / MEMORY_SHARE / CONNECTION_BYTES;
    u32::try_from(fitting)
        .unwrap_or(CONNECTIONS_MAX)
        .clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
}

/// The memory of this machine, or the limit of this process's cgroups.
fn memory_bytes() -> u64 {
    let machine = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
    // The limit of a container with cgroups of version 1.
    let old = limit_in(Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    let own = Hierarchy::find()
        .and_then(|hierarchy| Ok((hierarchy.of(Pid::this())?, hierarchy)))
        .ok()
        .and_then(|(cgroup, hierarchy)| {
            cgroup
                .path()
                .ancestors()
                .take_while(|folder| folder.starts_with(hierarchy.path()))
                .filter_map(|folder| limit_in(&folder.join("memory.max")))
                .min()
        });
    [old, own].into_iter().flatten().fold(machine, u64::min)
}

/// Reads a number of bytes from a file; `None` if it does not exist or contains `max`.
fn limit_in(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The thread that removes entries.
pub struct Connections {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stopped: Mutex<bool>,
    stop: Condvar,
    /// The number of removed connections that had not ended.
    forgotten: AtomicU64,
}

impl Connections {
    /// Starts the thread. It shares the maps with the programs.
    ///
    /// # Errors
    /// The object has another version, or the thread can't be started.
    pub fn look_after(ebpf: &mut Ebpf) -> Result<Self> {
        let mut keeper = Keeper::new(ebpf)?;
        let shared = Arc::new(Shared::default());
        let kept = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("connections".to_owned())
            .spawn(move || {
                be_helper(&[Capability::Bpf]);
                keeper.run(&kept);
            })
            .context("starting the thread that cleans the connection table")?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The number of removed connections that had not ended.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.shared.forgotten.load(Ordering::Relaxed)
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        *self
            .shared
            .stopped
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stop.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tell!("fault: warning: the thread that cleans the connection table panicked");
        }
    }
}

/// The state of the thread.
struct Keeper {
    flows: HashMap<MapData, FlowKey, Flow>,
    flow_rules: HashMap<MapData, FlowRuleKey, FlowRule>,
    counts: PerCpuArray<MapData, u64>,
    round: Array<MapData, u32>,
    /// Only present when fq holds packets.
    orders: Option<HashMap<MapData, u64, u64>>,
    states: Array<MapData, RuleState>,
    /// The number of removed entries, of connections and of rules.
    removed: [u64; 2],
    /// The capacities of both maps.
    capacity: [u64; 2],
}

impl Keeper {
    fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let flows = copy(ebpf, "FLOWS")?;
        let flow_rules = copy(ebpf, "FLOW_RULES")?;
        let room = |map: &MapData| Ok::<_, anyhow::Error>(u64::from(map.info()?.max_entries()));
        let capacity = [room(&flows)?, room(&flow_rules)?];
        let orders = copy(ebpf, "ORDERS")?;
        let orders = if room(&orders)? > 1 {
            Some(Map::HashMap(orders).try_into()?)
        } else {
            None
        };
        Ok(Self {
            flows: Map::HashMap(flows).try_into()?,
            flow_rules: Map::HashMap(flow_rules).try_into()?,
            counts: Map::PerCpuArray(copy(ebpf, "COUNTS")?).try_into()?,
            round: Map::Array(copy(ebpf, "ROUND")?).try_into()?,
            orders,
            states: Map::Array(copy(ebpf, "RULE_STATES")?).try_into()?,
            removed: [0, 0],
            capacity,
        })
    }

    /// Checks every [`ROUND`] whether room is needed. After scanning the table it waits for ten times the duration of
    /// the scan.
    fn run(&mut self, shared: &Shared) {
        let start = Instant::now();
        let mut due = start;
        let mut stopped = shared
            .stopped
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while !*stopped {
            stopped = shared
                .stop
                .wait_timeout(stopped, ROUND)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if *stopped {
                return;
            }
            let began = Instant::now();
            let looked = self.begin_round(start).and_then(|round| {
                if began >= due {
                    self.make_room(round, &shared.forgotten)?;
                    due = Instant::now() + 10 * began.elapsed();
                }
                Ok(())
            });
            if let Err(error) = looked {
                tell!("fault: warning: the connection table can't be read: {error:#}");
                return;
            }
        }
    }

    /// Passes the number of the current half second to the programs and returns it.
    fn begin_round(&mut self, start: Instant) -> Result<u32> {
        let round = start.elapsed().as_millis() / ROUND.as_millis();
        let round = u32::try_from(round).context("the run has lasted too long")?;
        self.round.set(0, round, 0)?;
        Ok(round)
    }

    fn make_room(&mut self, round: u32, forgotten: &AtomicU64) -> Result<()> {
        let entries = self.entries()?;
        let is_filling = |table: usize| 4 * entries[table] >= 3 * self.capacity[table];
        let (flows, rules) = (is_filling(0), self.capacity[1] > 1 && is_filling(1));
        if flows {
            let ended = self.remove_flows(|_, flow| has_ended(flow, round))?;
            if 8 * (entries[0] - ended) >= 7 * self.capacity[0] {
                let idle = self.remove_flows(|key, flow| is_idle(key, flow, round))?;
                forgotten.fetch_add(idle, Ordering::Relaxed);
            }
        }
        if rules {
            self.remove_flow_rules()?;
        }
        self.remove_departed()
    }

    /// Removes the departure times of packets that fq has released. (One that is added in the microseconds between the
    /// lookup and the removal is lost too.)
    fn remove_departed(&mut self) -> Result<()> {
        let Some(orders) = &mut self.orders else {
            return Ok(());
        };
        let now_ns = monotonic_ns();
        let mut departed = Vec::new();
        for entry in orders.iter() {
            let (flow, last_ns) = entry?;
            if last_ns + DEPARTED_NS < now_ns {
                departed.push(flow);
            }
        }
        for flow in departed {
            orders.remove(&flow)?;
        }
        Ok(())
    }

    /// The number of entries of connections, and of the rules' further entries.
    fn entries(&self) -> Result<[u64; 2]> {
        let mut entries = [0; 2];
        for (table, counter) in [Counter::FlowEntered, Counter::FlowRuleEntered]
            .into_iter()
            .enumerate()
        {
            let made: u64 = self.counts.get(&(counter as u32), 0)?.iter().sum();
            entries[table] = made.saturating_sub(self.removed[table]);
        }
        Ok(entries)
    }

    /// Removes the connections that `goes` selects. Returns their number.
    fn remove_flows(&mut self, goes: impl Fn(&FlowKey, &Flow) -> bool) -> Result<u64> {
        let mut going = Vec::new();
        for entry in &self.flows {
            let (key, flow) = entry?;
            if goes(&key, &flow) {
                going.push(key);
            }
        }
        let mut gone = 0;
        for key in going {
            // A connection that has continued in the meantime stays.
            if self.flows.get(&key, 0).is_ok_and(|flow| goes(&key, &flow)) {
                self.flows.remove(&key)?;
                gone += 1;
            }
        }
        self.removed[0] += gone;
        Ok(gone)
    }

    /// Removes the state of rules for connections or rules that no longer exist.
    fn remove_flow_rules(&mut self) -> Result<()> {
        let mut going = Vec::new();
        for key in self.flow_rules.keys() {
            let key = key?;
            let has_flow = self
                .flows
                .get(&key.flow, 0)
                .is_ok_and(|flow| flow.birth == key.birth);
            let has_rule = self
                .states
                .get(&state_of(key.uid), 0)
                .is_ok_and(|state| state.uid == key.uid);
            if !has_flow || !has_rule {
                going.push(key);
            }
        }
        for key in going {
            self.flow_rules.remove(&key)?;
            self.removed[1] += 1;
        }
        Ok(())
    }
}

/// Duplicates the handle of a map.
fn copy(ebpf: &Ebpf, name: &str) -> Result<MapData> {
    let map = ebpf
        .map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    let (Map::HashMap(data) | Map::PerCpuArray(data) | Map::Array(data)) = map else {
        return Err(anyhow!("the eBPF object's map {name} has another type"));
    };
    Ok(MapData::from_fd(data.fd().as_fd().try_clone_to_owned()?)?)
}

/// Whether a connection was closed by both ends, or reset, and its last packet was long ago.
fn has_ended(flow: &Flow, round: u32) -> bool {
    flow.ended == [1, 1] && round.wrapping_sub(flow.touched) >= ENDED_ROUNDS
}

/// Whether a connection has been idle for so long that others take precedence.
fn is_idle(key: &FlowKey, flow: &Flow, round: u32) -> bool {
    let patience = if key.protocol & 0xff == u32::from(PROTOCOL_TCP) {
        IDLE_ROUNDS
    } else {
        DATAGRAMS_ROUNDS
    };
    round.wrapping_sub(flow.touched) >= patience
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_large_as_the_memory_allows() {
        const GIB: u64 = 1 << 30;
        assert_eq!(capacity_for(64 * GIB), CONNECTIONS_MAX);
        assert!(capacity_for(2 * GIB) > 262_144, "a small machine");
        assert!((10_000..20_000).contains(&capacity_for(GIB / 16)));
        assert_eq!(capacity_for(0), CONNECTIONS_MIN);
        assert!(capacity() >= CONNECTIONS_MIN);
    }
}
