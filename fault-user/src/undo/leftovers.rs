//! Finds and removes the leftovers of killed instances.
//!
//! Most resources of `fault` disappear with its process: TCX, XDP, cgroup and `sk_lookup` links, tap devices, open
//! maps. The others are found in five ways:
//!
//! - tc filters by their mark, which has the owner's number ([`crate::sys::net::clsact`]);
//! - links by name: `fault-<number>` and anything that is no digit behind it;
//! - qdiscs at the root of an interface by their handle ([`crate::sys::net::qdisc::HANDLE`]), if no instance holds a
//!   share;
//! - cgroups by name, `fault-<pid>-<n>`, and by the lock on their directory
//!   ([`crate::sys::process::cgroup`]);
//! - everything else (sysctls, qdiscs, moved processes) by a **journal** ([`super::journal`]).
//!
//! Undoing is safe at any time: each step first checks whether the resource is still as `fault` left it, and otherwise
//! leaves it alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use super::instance;
use super::leftover::{Fate, Leftover};
use crate::sys::net::clsact;
use crate::sys::net::interfaces;
use crate::sys::net::interfaces::Interface;
use crate::sys::net::own_links::{link_owner, remove_link};
use crate::sys::net::qdisc;
use crate::sys::process::cgroup;
use crate::sys::process::cgroup::{Hierarchy, Leftovers};
use crate::undo::change::qdisc_share;
use crate::undo::instance::Instance;
use crate::undo::journal::{Dead, STATE_FOLDER, journal_owner};

/// The places to search for leftovers. Filters and links are always searched in the calling thread's network namespace.
#[derive(Debug, Clone)]
pub struct LeftoverPlaces {
    /// The folder of the journals.
    pub state_folder: PathBuf,
    /// The cgroups; `None` without cgroup2.
    pub hierarchy: Option<Hierarchy>,
}

impl LeftoverPlaces {
    /// The default places of this machine.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self {
            state_folder: STATE_FOLDER.into(),
            // Without cgroup2 there are no cgroups of fault.
            hierarchy: Hierarchy::find().ok(),
        }
    }
}

/// Lists the leftovers of dead instances, without changing anything.
///
/// # Errors
/// A place can't be read.
pub fn find(places: &LeftoverPlaces) -> Result<Vec<Leftover>> {
    sweep(places, false)
}

/// Removes the leftovers of dead instances. This is safe at any time: resources of running instances and of other
/// programs are not touched.
///
/// # Errors
/// A place can't be read. What was found but can't be removed is in the list.
pub fn clean(places: &LeftoverPlaces) -> Result<Vec<Leftover>> {
    sweep(places, true)
}

fn sweep(places: &LeftoverPlaces, remove: bool) -> Result<Vec<Leftover>> {
    let mut report = Vec::new();
    let all = interfaces::list()?;
    let dead = dead_journals(&places.state_folder)?;
    for interface in &all {
        sweep_filters(interface, remove, &mut report)?;
    }
    // After the filters, because a clsact qdisc is only removed when it is empty; before the cgroups, because processes
    // are moved back to their own.
    for dead in &dead {
        if remove {
            dead.undo(&mut report);
        } else {
            report.extend(dead.entries.iter().map(|entry| {
                Leftover::new(entry.change.kind(), entry.change.describe(), Fate::Found)
            }));
        }
    }
    for interface in &all {
        sweep_root(interface, remove, &mut report)?;
        sweep_link(interface, remove, &mut report);
    }
    if let Some(hierarchy) = &places.hierarchy {
        sweep_cgroups(hierarchy.path(), remove, &mut report)?;
    }
    Ok(report)
}

/// Removes fault's qdisc at the root of an interface, if no instance holds a share of it.
fn sweep_root(interface: &Interface, remove: bool, report: &mut Vec<Leftover>) -> Result<()> {
    let lock = instance::lock()?;
    let Some(root) = qdisc::root_of(interface.index)?.filter(|root| root.handle == qdisc::HANDLE)
    else {
        return Ok(());
    };
    if instance::holders(&lock, &qdisc_share(interface.index))?.is_empty() {
        let what = format!("{} on {}", root.kind, interface.name);
        report.push(settle("qdisc", what, remove, || {
            clsact::remove_qdisc(interface.index, root.parent, root.handle, &root.kind).map(drop)
        }));
    }
    Ok(())
}

/// Removes the filters of dead instances on an interface.
fn sweep_filters(interface: &Interface, remove: bool, report: &mut Vec<Leftover>) -> Result<()> {
    let filters = match clsact::filters(interface.index) {
        Ok(filters) => filters,
        // The interface has disappeared, and its filters with it.
        Err(error) if has_errno(&error, Errno::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    for filter in filters {
        let Some(owner) = filter.owner() else {
            continue;
        };
        let Some(_claim) = Instance::claim(owner)? else {
            continue;
        };
        let name = filter.program_name.as_deref().unwrap_or_default();
        let direction = filter.direction;
        let what = format!(
            "{name} on {} {direction:?} of instance {owner}",
            interface.name
        );
        report.push(settle("filter", what, remove, || {
            clsact::remove(&filter).map(drop)
        }));
    }
    Ok(())
}

/// Removes an interface with a name of fault if its owner is dead.
fn sweep_link(interface: &Interface, remove: bool, report: &mut Vec<Leftover>) {
    let Some(owner) = link_owner(interface) else {
        return;
    };
    match Instance::claim(owner) {
        Ok(None) => {}
        Ok(Some(_claim)) => report.push(settle("link", interface.name.clone(), remove, || {
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

/// Removes fault's cgroups below `folder` whose owner is dead. Processes in them are moved to the parent cgroup.
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
        // A cgroup of a running instance may contain leftovers of a nested one.
        sweep_cgroups(&path, remove, report)?;
        if !cgroup::is_instances(&path) {
            continue;
        }
        let Some(_lock) = cgroup::lock(&path)? else {
            continue;
        };
        report.push(settle("cgroup", path.display().to_string(), remove, || {
            let finished = cgroup::give_up(&path, Leftovers::Release)?;
            if finished.kept.is_some() {
                bail!("processes run in a cgroup that was created inside it");
            }
            Ok(())
        }));
    }
    Ok(())
}

/// The journals of dead instances.
fn dead_journals(folder: &Path) -> Result<Vec<Dead>> {
    let mut dead = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(dead),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("can't read {} (run with sudo)", folder.display()));
        }
    };
    for entry in entries {
        let path = entry
            .with_context(|| format!("can't read {}", folder.display()))?
            .path();
        if journal_owner(&path).is_some() {
            dead.extend(Dead::open(&path)?);
        }
    }
    Ok(dead)
}

fn has_errno(error: &anyhow::Error, errno: Errno) -> bool {
    error
        .root_cause()
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.raw_os_error() == Some(errno as i32))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::sys::net::netlink::in_own_netns;
    use crate::sys::process::proc::ProcessId;
    use crate::undo::change::JournalEntry;
    use crate::undo::change::SystemChange;
    use crate::undo::instance::current_netns;
    use crate::undo::journal::{Header, VERSION};

    fn line(value: &impl serde::Serialize) -> String {
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
            let program = crate::sys::bpf::features::load(3, 0, -1).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let (living, dead) = (Instance::join().unwrap(), Instance::join().unwrap());
            let (alive, number) = (living.number(), dead.number());
            drop(dead);
            let dead = number;
            let owner = ProcessId {
                pid: dead_pid().cast_signed(),
                start_ticks: 1,
            };
            let netns = current_netns().unwrap();
            let clsact = SystemChange::Clsact {
                interface_index: lo,
            };
            let entry = JournalEntry {
                netns,
                change: clsact,
            };
            let version = VERSION;
            let journal = line(&Header { version, owner }) + &line(&entry);
            fs::write(folder.path().join(format!("{dead}.json")), journal).unwrap();
            let places = LeftoverPlaces {
                state_folder: folder.path().into(),
                hierarchy: None,
            };

            assert!(clsact::ensure(lo).unwrap() && !clsact::ensure(lo).unwrap());
            let direction = clsact::TcHook::Egress;
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
            assert_eq!(left[0].owner(), Some(alive));
            assert_eq!(find(&places).unwrap(), []);
            assert!(clsact::remove(&left[0]).unwrap() && !clsact::remove(&left[0]).unwrap());
            assert!(clsact::remove_if_unused(lo).unwrap());
            assert!(!clsact::remove_if_unused(lo).unwrap());
        });
    }

    #[test]
    fn a_qdisc_stays_while_somebody_holds_a_share() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            let folder = tempfile::tempdir().unwrap();
            let places = LeftoverPlaces {
                state_folder: folder.path().into(),
                hierarchy: None,
            };
            let lock = instance::lock().unwrap();
            let share = instance::hold(&lock, &qdisc_share(lo), "").unwrap();
            drop(lock);
            tc("qdisc add dev lo root handle fa17: pfifo");
            assert_eq!(clean(&places).unwrap(), []);
            assert!(qdisc::root_of(lo).unwrap().is_some());
            drop(share);
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
