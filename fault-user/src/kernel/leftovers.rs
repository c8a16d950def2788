//! What a killed instance leaves, and how the next one takes it away.
//!
//! Most of what `fault` does goes with its process: TCX, XDP, cgroup and `sk_lookup` links, tap
//! devices, open maps. The rest is found again in five ways:
//!
//! - tc filters by their mark, which names the owner ([`super::clsact`]);
//! - links by name: `fault-<pid>` and anything that is no digit behind it;
//! - qdiscs at the root of an interface by their handle ([`super::qdisc::HANDLE`]);
//! - cgroups by name, `fault-<pid>-<n>`, and by the lock on their directory
//!   ([`crate::process::cgroup`]);
//! - everything else (sysctls, qdiscs, moved processes) by a **journal** ([`super::journal`]).
//!
//! Undoing is safe at any time: each step looks first whether the thing is still as `fault` left
//! it, and leaves it alone if not.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::unistd::Pid;
use serde::Serialize;

use super::change::{Change, current_netns, is_cgroup_name, link_owner, remove_link};
use super::clsact;
use super::interfaces::{self, Interface};
use super::journal::{Dead, Entry, STATE_FOLDER, journal_owner, parse};
use super::qdisc;
use crate::process::cgroup::{self, Hierarchy, Leftovers};
use crate::process::proc::ProcessId;

/// What has become of something that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It is there; nothing was done ([`find`]).
    Found,
    /// It is gone, or is as it was before.
    Removed,
    /// It could not be removed: why.
    Kept(String),
}

/// One thing that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// `filter`, `link`, `cgroup`, `sysctl`, `qdisc`, `process`, `journal`.
    pub kind: &'static str,
    /// Which one, for people.
    pub what: String,
    /// What was done about it.
    pub fate: Fate,
}

impl Leftover {
    pub(super) fn new(kind: &'static str, what: String, fate: Fate) -> Self {
        Self { kind, what, fate }
    }

    pub(super) fn kept(kind: &'static str, what: String, error: &anyhow::Error) -> Self {
        Self::new(kind, what, Fate::Kept(format!("{error:#}")))
    }
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: ", self.kind, self.what)?;
        match &self.fate {
            Fate::Found => f.write_str("left by an instance that is gone"),
            Fate::Removed => f.write_str("removed"),
            Fate::Kept(why) => write!(f, "not removed: {why}"),
        }
    }
}

/// Where leftovers are looked for; filters and links always in the calling thread's network
/// namespace.
#[derive(Debug, Clone)]
pub struct Places {
    /// The folder of the journals.
    pub state_folder: PathBuf,
    /// The cgroups; `None` where there is no cgroup2.
    pub hierarchy: Option<Hierarchy>,
}

impl Places {
    /// This machine's.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self {
            state_folder: STATE_FOLDER.into(),
            // No cgroup2, no cgroups of ours.
            hierarchy: Hierarchy::find().ok(),
        }
    }
}

/// Lists what dead instances have left, and changes nothing.
///
/// # Errors
/// When a place can't be read at all.
pub fn find(places: &Places) -> Result<Vec<Leftover>> {
    sweep(places, false)
}

/// Removes what dead instances have left. Safe at any time: what a live instance owns is not
/// touched, and neither is anything that `fault` did not make.
///
/// # Errors
/// When a place can't be read at all. What was found but can't be removed is in the list.
pub fn clean(places: &Places) -> Result<Vec<Leftover>> {
    sweep(places, true)
}

fn sweep(places: &Places, remove: bool) -> Result<Vec<Leftover>> {
    let mut report = Vec::new();
    let all = interfaces::list()?;
    // Before the journals, since a qdisc is in its owner's before it is there.
    let roots = our_roots(&all)?;
    let owners = Owners::read(&places.state_folder)?;
    for interface in &all {
        sweep_filters(interface, &owners, remove, &mut report)?;
    }
    // After the filters, since a clsact qdisc goes only when it is empty; before the cgroups, since
    // processes go back to where they came from.
    for dead in &owners.dead {
        if remove {
            dead.undo(&mut report);
        } else {
            report.extend(dead.entries.iter().map(|entry| {
                Leftover::new(entry.change.kind(), entry.change.describe(), Fate::Found)
            }));
        }
    }
    for (interface, root) in roots {
        if !owners.tell_of_qdisc(interface.index)? {
            let what = format!("{} on {}", root.kind, interface.name);
            report.push(settle("qdisc", what, remove, || {
                clsact::remove_qdisc(interface.index, root.parent, root.handle, &root.kind)
                    .map(drop)
            }));
        }
    }
    for interface in &all {
        sweep_link(interface, &owners, remove, &mut report);
    }
    if let Some(hierarchy) = &places.hierarchy {
        sweep_cgroups(hierarchy.path(), remove, &mut report)?;
    }
    Ok(report)
}

/// The qdiscs at the roots of interfaces that have our handle.
fn our_roots(all: &[Interface]) -> Result<Vec<(&Interface, clsact::Qdisc)>> {
    let mut roots = Vec::new();
    for interface in all {
        let root = qdisc::root_of(interface.index)?;
        roots.extend(
            root.filter(|root| root.handle == qdisc::HANDLE)
                .map(|root| (interface, root)),
        );
    }
    Ok(roots)
}

/// Removes the filters on an interface whose owner is gone.
fn sweep_filters(
    interface: &Interface,
    owners: &Owners,
    remove: bool,
    report: &mut Vec<Leftover>,
) -> Result<()> {
    let filters = match clsact::filters(interface.index) {
        Ok(filters) => filters,
        // The interface has gone meanwhile, and its filters with it.
        Err(error) if has_errno(&error, Errno::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    for filter in filters {
        let Some(owner) = filter.owner() else {
            continue;
        };
        if owners.is_live(owner)? {
            continue;
        }
        let name = filter.program_name.as_deref().unwrap_or_default();
        let direction = filter.direction;
        let what = format!(
            "{name} on {} {direction:?} of process {owner}",
            interface.name
        );
        report.push(settle("filter", what, remove, || {
            clsact::remove(&filter).map(drop)
        }));
    }
    Ok(())
}

/// Removes an interface that is ours by its name if its owner is gone.
fn sweep_link(interface: &Interface, owners: &Owners, remove: bool, report: &mut Vec<Leftover>) {
    let Some(owner) = link_owner(interface) else {
        return;
    };
    match owners.is_live(owner) {
        Ok(true) => {}
        Ok(false) => report.push(settle("link", interface.name.clone(), remove, || {
            remove_link(interface).map(drop)
        })),
        Err(error) => report.push(Leftover::kept("link", interface.name.clone(), &error)),
    }
}

fn settle(
    kind: &'static str,
    what: String,
    remove: bool,
    removal: impl FnOnce() -> Result<()>,
) -> Leftover {
    if !remove {
        return Leftover::new(kind, what, Fate::Found);
    }
    match removal() {
        Ok(()) => Leftover::new(kind, what, Fate::Removed),
        Err(error) => Leftover::kept(kind, what, &error),
    }
}

/// Removes the cgroups of ours below `folder` whose owner is gone; what runs in them lives on in
/// the cgroup above.
fn sweep_cgroups(folder: &Path, remove: bool, report: &mut Vec<Leftover>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("can't read {}", folder.display()));
        }
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("can't read {}", folder.display()))?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        // What is inside of a live one may be a nested instance's that has died.
        sweep_cgroups(&path, remove, report)?;
        if !entry.file_name().to_str().is_some_and(is_cgroup_name) {
            continue;
        }
        let Some(_lock) = cgroup::lock(&path)? else {
            continue;
        };
        report.push(settle("cgroup", path.display().to_string(), remove, || {
            let finished = cgroup::give_up(&path, Leftovers::Release)?;
            if finished.kept.is_some() {
                bail!("processes run in a cgroup that was made inside it");
            }
            Ok(())
        }));
    }
    Ok(())
}

/// Which instances live and which are gone, as their journals tell.
struct Owners {
    live: HashSet<i32>,
    dead: Vec<Dead>,
    /// What live ones have changed.
    entries: Vec<Entry>,
    /// Every live one's journal can be read.
    all_told: bool,
}

impl Owners {
    fn read(folder: &Path) -> Result<Self> {
        let mut owners = Self {
            live: HashSet::new(),
            dead: Vec::new(),
            entries: Vec::new(),
            all_told: true,
        };
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(owners),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("can't read {} (run with sudo)", folder.display()));
            }
        };
        for entry in entries {
            let path = entry
                .with_context(|| format!("can't read {}", folder.display()))?
                .path();
            let Some(pid) = journal_owner(&path) else {
                continue;
            };
            if let Some(dead) = Dead::open(&path)? {
                owners.dead.push(dead);
                continue;
            }
            owners.live.insert(pid);
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // It has ended just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("can't read {}", path.display()));
                }
            };
            match parse(&text) {
                Ok(entries) => owners.entries.extend(entries),
                Err(_another_version) => owners.all_told = false,
            }
        }
        Ok(owners)
    }

    /// Whether a journal tells of a qdisc of ours on this interface, or may do: rather leave a thing than break one.
    fn tell_of_qdisc(&self, interface: u32) -> Result<bool> {
        if !self.all_told {
            return Ok(true);
        }
        let here = current_netns()?;
        let of_dead = self.dead.iter().flat_map(|dead| &dead.entries);
        Ok(self.entries.iter().chain(of_dead).any(|entry| {
            matches!(entry.change, Change::Qdisc { interface_index, .. } if interface_index == interface)
                && entry.netns == here
        }))
    }

    /// Without a journal any process of that number counts: rather leave a thing than break one.
    fn is_live(&self, pid: i32) -> Result<bool> {
        if self.live.contains(&pid) {
            return Ok(true);
        }
        if self.dead.iter().any(|dead| dead.pid == pid) {
            return Ok(false);
        }
        Ok(ProcessId::of(Pid::from_raw(pid))?.is_some())
    }
}

fn has_errno(error: &anyhow::Error, errno: Errno) -> bool {
    error
        .root_cause()
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.raw_os_error() == Some(errno as i32))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use nix::fcntl::{Flock, FlockArg};

    use super::super::journal::{Header, VERSION};
    use super::super::netlink::in_own_netns;
    use super::*;

    fn line(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap() + "\n"
    }

    /// A number that no process has.
    fn dead_pid() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn a_dead_owners_filters_and_clsact_go_and_all_others_stay() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            let program = crate::doctor::bpf::load(3, 0, -1).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let (dead, alive) = (dead_pid(), std::process::id());
            let owner = ProcessId {
                pid: dead.cast_signed(),
                start_ticks: 1,
            };
            let netns = current_netns().unwrap();
            let clsact = Change::Clsact {
                interface_index: lo,
            };
            let entry = Entry {
                netns,
                change: clsact,
            };
            let version = VERSION;
            let journal = line(&Header { version, owner }) + &line(&entry);
            fs::write(folder.path().join(format!("{dead}.json")), journal).unwrap();
            let places = Places {
                state_folder: folder.path().into(),
                hierarchy: None,
            };

            assert!(clsact::ensure(lo).unwrap() && !clsact::ensure(lo).unwrap());
            let direction = clsact::Direction::Egress;
            for owner in [dead, alive] {
                clsact::attach(lo, direction, program.as_fd(), "fault_egress", owner).unwrap();
            }
            let found = find(&places).unwrap();
            assert_eq!(found.len(), 2, "{found:?}");
            assert!(found.iter().all(|leftover| leftover.fate == Fate::Found));
            assert_eq!(
                clsact::filters(lo).unwrap().len(),
                2,
                "find changes nothing"
            );

            // The live one's filter keeps the clsact qdisc in place.
            clean(&places).unwrap();
            let left = clsact::filters(lo).unwrap();
            assert_eq!(left.len(), 1);
            assert_eq!(left[0].owner(), Some(alive.cast_signed()));
            assert_eq!(find(&places).unwrap(), []);
            assert!(clsact::remove(&left[0]).unwrap() && !clsact::remove(&left[0]).unwrap());
            assert!(clsact::remove_if_unused(lo).unwrap());
            assert!(!clsact::remove_if_unused(lo).unwrap());
        });
    }

    #[test]
    fn a_qdisc_stays_while_an_instance_of_another_version_lives() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            let folder = tempfile::tempdir().unwrap();
            let journal = folder.path().join(format!("{}.json", std::process::id()));
            let places = Places {
                state_folder: folder.path().into(),
                hierarchy: None,
            };
            fs::write(&journal, "{\"version\":9}\n").unwrap();
            let file = File::open(&journal).unwrap();
            let alive = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
            tc("qdisc add dev lo root handle fa17: pfifo");
            assert_eq!(clean(&places).unwrap(), []);
            assert!(qdisc::root_of(lo).unwrap().is_some());
            drop(alive);
            fs::remove_file(journal).unwrap();
            assert_eq!(clean(&places).unwrap().len(), 1);
            assert_eq!(qdisc::root_of(lo).unwrap(), None);
        });
    }

    #[test]
    fn a_clsact_with_a_foreign_filter_stays_and_a_foreign_ingress_is_an_error() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            clsact::ensure(lo).unwrap();
            // A classic BPF program of one instruction: present in every kernel that has cls_bpf.
            tc("filter add dev lo ingress pref 7 bpf bytecode 1,6_0_0_0 classid 1:1");
            assert!(!clsact::remove_if_unused(lo).unwrap());
            let foreign = clsact::filters(lo).unwrap();
            assert_eq!((foreign.len(), foreign[0].owner()), (1, None));
            tc("filter del dev lo ingress pref 7");
            assert!(clsact::remove_if_unused(lo).unwrap());
            tc("qdisc add dev lo ingress");
            let error = clsact::ensure(lo).unwrap_err();
            assert!(error.to_string().contains("ingress qdisc"), "{error}");
            assert!(!clsact::remove_if_unused(lo).unwrap());
        });
    }

    fn tc(arguments: &str) {
        let status = std::process::Command::new("tc")
            .args(arguments.split(' ').map(|word| word.replace('_', " ")))
            .status()
            .unwrap();
        assert!(status.success(), "tc {arguments}");
    }
}
