//! Changes that outlive the process, and how each is undone. A change is only undone if everything is still as `fault`
//! left it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::instance;
use crate::sys::net::clsact;
use crate::sys::net::interfaces;
use crate::sys::net::own_links::{link_owner, remove_link, remove_stale};
use crate::sys::process::cgroup;
use crate::sys::process::cgroup::Hierarchy;
use crate::sys::process::proc::ProcessId;
use crate::undo::instance::{Instance, SettingShare, current_netns};
use crate::undo::leftover::{Fate, Leftover};

/// A change that outlives the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum SystemChange {
    /// A file below `/proc/sys`.
    Sysctl {
        /// Relative to `/proc/sys`: `net/ipv4/conf/lo/accept_local`.
        name: String,
        /// The old value, without the newline.
        before: String,
        /// The new value.
        after: String,
    },
    /// A clsact qdisc that did not exist before.
    Clsact {
        /// On this interface.
        interface_index: u32,
    },
    /// tc filters of fault.
    Filters {
        /// On this interface.
        interface_index: u32,
        /// [`Instance::number`] of the owner.
        #[serde(default)]
        number: u32,
    },
    /// A qdisc of fault. The qdisc before it is not restored explicitly: the kernel restores its default.
    Qdisc {
        /// On this interface.
        interface_index: u32,
        /// Its parent, `0xFFFF_FFFF` for the root.
        parent: u32,
        /// Its handle, unlikely to be used by others.
        handle: u32,
        /// `fq`, `netem`, `prio`…
        kind: String,
    },
    /// A link of fault that outlives the process (one end of a veth pair).
    Link {
        /// Its name, which starts with `fault-`.
        name: String,
    },
    /// A process that was moved into a cgroup of fault.
    Moved {
        /// The process.
        process: ProcessId,
        /// The directory of its original cgroup.
        from: PathBuf,
    },
}

/// A change and its network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// The inode of the network namespace (`/proc/thread-self/ns/net`).
    pub netns: u64,
    /// The change.
    #[serde(flatten)]
    pub change: SystemChange,
}

/// The caller that undoes a change.
#[derive(Debug)]
pub(super) enum Undoing {
    /// The instance that made it, releasing its share if it holds one.
    Own(Option<SettingShare>),
    /// Another instance, after the owner's death.
    Dead,
}

/// Undoes changes in reverse order.
pub(super) fn undo_entries(
    entries: impl DoubleEndedIterator<Item = (JournalEntry, Undoing)>,
    report: &mut Vec<Leftover>,
) {
    for (entry, undoing) in entries.rev() {
        let undone = if entry.change.is_in_netns() {
            in_netns(entry.netns, || entry.change.undo(undoing))
        } else {
            entry.change.undo(undoing)
        };
        let (kind, what) = (entry.change.kind(), entry.change.describe());
        match undone {
            Ok(true) => report.push(Leftover::new(kind, what, Fate::Removed)),
            Ok(false) => {}
            Err(error) => report.push(Leftover::kept(kind, what, &error)),
        }
    }
}

impl SystemChange {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Sysctl { .. } => "sysctl",
            Self::Clsact { .. } | Self::Qdisc { .. } => "qdisc",
            Self::Filters { .. } => "filter",
            Self::Link { .. } => "link",
            Self::Moved { .. } => "process",
        }
    }

    pub(super) fn describe(&self) -> String {
        match self {
            Self::Sysctl { name, before, .. } => format!("{name} (was {before})"),
            Self::Clsact { interface_index } => format!("clsact on interface {interface_index}"),
            Self::Filters {
                interface_index, ..
            } => format!("on interface {interface_index}"),
            Self::Qdisc {
                interface_index,
                kind,
                ..
            } => format!("{kind} on interface {interface_index}"),
            Self::Link { name } => name.clone(),
            Self::Moved { process, from } => format!("{} from {}", process.pid, from.display()),
        }
    }

    /// Whether the change can only be undone in its network namespace.
    fn is_in_netns(&self) -> bool {
        match self {
            Self::Sysctl { name, .. } => name.starts_with("net/"),
            Self::Moved { .. } => false,
            _ => true,
        }
    }

    /// The name of the share, for changes that instances share.
    #[must_use]
    pub fn shared(&self) -> Option<String> {
        match self {
            Self::Sysctl { name, .. } => Some(name.clone()),
            Self::Clsact { interface_index } => Some(format!("clsact/{interface_index}")),
            Self::Qdisc {
                interface_index, ..
            } => Some(qdisc_share(*interface_index)),
            _ => None,
        }
    }

    /// Undoes the change. Returns `false` if there was nothing to undo, or others still need it.
    fn undo(&self, undoing: Undoing) -> Result<bool> {
        let is_dead = matches!(undoing, Undoing::Dead);
        let Some(what) = self.shared() else {
            return self.undo_alone(is_dead);
        };
        let lock = instance::lock()?;
        if let Undoing::Own(share) = undoing {
            drop(share);
        }
        let holders = instance::holders(&lock, &what)?;
        if holders.is_empty() {
            return self.undo_alone(is_dead);
        }
        // Who has found it changed already does not know what it was.
        if is_dead
            && let Self::Sysctl { before, .. } = self
            && !holders.contains(before)
        {
            bail!("another instance needs it: run `fault clean` after its end");
        }
        Ok(false)
    }

    /// [`Self::undo`] when no other instance needs it.
    fn undo_alone(&self, is_dead: bool) -> Result<bool> {
        match self {
            Self::Sysctl {
                name,
                before,
                after,
            } => undo_sysctl(name, before, after),
            Self::Clsact { interface_index } => clsact::remove_if_unused(*interface_index),
            Self::Filters {
                interface_index,
                number,
            } => {
                let mut filters = clsact::filters(*interface_index)?.into_iter();
                if !filters.any(|filter| filter.owner() == Some(*number)) {
                    return Ok(false);
                }
                undo_by_number(*number, is_dead, || {
                    Ok(clsact::remove_of(*interface_index, *number)? > 0)
                })
            }
            Self::Qdisc {
                interface_index,
                parent,
                handle,
                kind,
            } => clsact::remove_qdisc(*interface_index, *parent, *handle, kind),
            Self::Link { name } => {
                let all = interfaces::list()?;
                let found = all.iter().find(|interface| interface.name == *name);
                match found.and_then(|link| Some((link, link_owner(link)?))) {
                    Some((link, number)) => undo_by_number(number, is_dead, || remove_link(link)),
                    None => Ok(false),
                }
            }
            Self::Moved { process, from } => undo_move(*process, from),
        }
    }
}

/// The name of the share for fault's qdisc at the root of an interface.
pub(super) fn qdisc_share(interface_index: u32) -> String {
    format!("qdisc/{interface_index}")
}

/// Undoes what carries the number of a dead instance. A new instance with that number would have removed it ([`join`]).
/// So if the number is taken, a child of the dead instance still has its files open.
fn undo_by_number(number: u32, is_dead: bool, undo: impl FnOnce() -> Result<bool>) -> Result<bool> {
    if !is_dead {
        return undo();
    }
    let Some(_claim) = Instance::claim(number)? else {
        bail!("instance {number}, which owns it, is still ending: try again");
    };
    undo()
}

/// Restores the old value if the new one is still set.
fn undo_sysctl(name: &str, before: &str, after: &str) -> Result<bool> {
    let relative = Path::new(name);
    let is_plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !is_plain {
        bail!("`{name}` is not below /proc/sys");
    }
    let path = Path::new("/proc/sys").join(relative);
    let now = match fs::read_to_string(&path) {
        Ok(now) => now,
        // The interface has disappeared.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
    };
    if now.trim_end() != after || before == after {
        return Ok(false);
    }
    fs::write(&path, before).with_context(|| format!("can't write {}", path.display()))?;
    Ok(true)
}

/// Moves a process back if it is still in a cgroup of fault. If its original cgroup was removed, it stays until that
/// cgroup is removed, and then moves to the parent.
fn undo_move(process: ProcessId, from: &Path) -> Result<bool> {
    if !process.is_alive()? || !from.exists() {
        return Ok(false);
    }
    let pid = Pid::from_raw(process.pid);
    let Ok(hierarchy) = Hierarchy::find() else {
        return Ok(false);
    };
    if !cgroup::is_abandoned(hierarchy.of(pid)?.path())? {
        return Ok(false);
    }
    cgroup::move_process(pid, cgroup::kept_part(from)?)
}

/// Runs `undo` inside a network namespace. Returns `false` if the namespace no longer exists, and the change with it.
fn in_netns(inode: u64, undo: impl FnOnce() -> Result<bool> + Send) -> Result<bool> {
    if current_netns()? == inode {
        return undo();
    }
    let Some(namespace) = find_netns(inode)? else {
        return Ok(false);
    };
    // A separate thread, because returning to this one's namespace may be impossible.
    std::thread::scope(|scope| {
        let entered = std::thread::Builder::new().spawn_scoped(scope, move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .context("can't enter the network namespace (needs CAP_SYS_ADMIN)")?;
            undo()
        });
        entered
            .context("can't start a thread to enter the network namespace")?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Finds a network namespace by its inode, among those of processes, `ip netns` and Docker.
fn find_netns(inode: u64) -> Result<Option<File>> {
    let mut candidates = Vec::new();
    for process in fs::read_dir("/proc").context("can't list /proc")? {
        candidates.push(process.context("can't list /proc")?.path().join("ns/net"));
    }
    for folder in ["/run/netns", "/run/docker/netns"] {
        match fs::read_dir(folder) {
            Ok(kept) => candidates.extend(kept.flatten().map(|entry| entry.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("can't list {folder}")),
        }
    }
    // Skips processes that have ended.
    candidates.retain(|path| fs::metadata(path).is_ok_and(|found| found.ino() == inode));
    for path in candidates {
        match File::open(&path) {
            Ok(namespace) => return Ok(Some(namespace)),
            // The process has just ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("can't open {}", path.display()));
            }
        }
    }
    Ok(None)
}

/// Takes a number ([`Instance::join`]), and removes the links and filters of a dead instance with the same number,
/// which could not be distinguished from the new one's.
///
/// # Errors
/// As [`Instance::join`], or a system call fails.
pub fn join() -> Result<Instance> {
    let instance = Instance::join()?;
    clsact::remove_all_of(instance.number())?;
    remove_stale(instance.number())?;
    Ok(instance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_out_of_proc_sys_is_refused() {
        for name in ["../../etc/passwd", "/etc/passwd", "net/../../self/comm"] {
            assert!(undo_sysctl(name, "x", "y").is_err(), "{name}");
        }
    }
}
