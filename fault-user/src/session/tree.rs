//! Selects a running process and its descendants (`--pid`).
//!
//! If the process's cgroup holds only its tree, that cgroup is used and nothing is changed. Otherwise, or if it is
//! another instance's, the tree is moved into a new cgroup, and back at the end.
use crate::sys::process::cgroup::{
    Cgroup, CommandCgroup, Hierarchy, Leftovers, ROUNDS_MAX, is_instances, kept_part, move_process,
};
use crate::sys::process::proc;
use crate::sys::process::proc::ProcessId;
use crate::sys::process::sockets;
use crate::sys::process::sockets::OpenSocket;
use crate::tell::tell;
use crate::undo::change::SystemChange;
use crate::undo::journal::Journal;
use anyhow::{Result, bail};
use nix::unistd::Pid;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// A process tree that has a cgroup of its own.
#[derive(Debug)]
pub struct ProcessTree {
    cgroup: Cgroup,
    moved: Option<Moved>,
    sockets: Vec<OpenSocket>,
}

/// A tree that was moved into a cgroup of fault.
#[derive(Debug)]
struct Moved {
    fresh: CommandCgroup,
    /// The original cgroup of each process.
    origins: HashMap<ProcessId, PathBuf>,
    /// The original cgroup of the root process; children forked since go there.
    origin: PathBuf,
}

impl ProcessTree {
    /// Selects `pid` and its descendants. `fault` itself is never included, even if that process started it. Each move
    /// is recorded in `journal` before it is made.
    ///
    /// If possible a moved tree stays below its own cgroup, which preserves its limits on memory and CPU.
    ///
    /// # Errors
    /// There is no such process, no cgroup can be created, a process can't be moved, or the tree grows faster than it
    /// can be moved. Moved processes are moved back.
    pub fn at(hierarchy: &Hierarchy, pid: Pid, journal: &mut Journal) -> Result<Self> {
        if pid == Pid::this() {
            bail!("process {pid} is fault itself: give another one");
        }
        let home = hierarchy.of(pid)?;
        let tree = others(pid)?;
        if is_own(&home, &tree)? {
            let sockets = sockets::of_processes(&tree)?;
            return Ok(Self {
                cgroup: home,
                moved: None,
                sockets,
            });
        }
        let fresh = CommandCgroup::create_for(hierarchy, pid, Leftovers::Release)?;
        let mut moved = Moved {
            fresh,
            origins: HashMap::new(),
            origin: home.path().to_owned(),
        };
        moved.fill(hierarchy, pid, journal)?;
        Ok(Self {
            cgroup: moved.fresh.cgroup().clone(),
            moved: Some(moved),
            sockets: sockets::of_processes(&others(pid)?)?,
        })
    }

    /// The cgroup of the rules' scope.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Whether the tree was moved into a cgroup of fault.
    #[must_use]
    pub fn is_moved(&self) -> bool {
        self.moved.is_some()
    }

    /// The sockets that the tree had open when it was selected. Those of a moved tree still belong to their original
    /// cgroup, so the rules identify them by address.
    #[must_use]
    pub fn sockets(&self) -> &[OpenSocket] {
        &self.sockets
    }
}

impl Moved {
    /// Moves the tree into the cgroup, repeatedly until no process is left outside.
    fn fill(&mut self, hierarchy: &Hierarchy, pid: Pid, journal: &mut Journal) -> Result<()> {
        let target = self.fresh.cgroup().path().to_owned();
        for _ in 0..ROUNDS_MAX {
            let inside: HashSet<Pid> = self.fresh.cgroup().processes()?.into_iter().collect();
            let mut outside = others(pid)?;
            outside.retain(|process| !inside.contains(&Pid::from_raw(process.pid)));
            if outside.is_empty() {
                return Ok(());
            }
            for process in outside {
                self.take(hierarchy, process, &target, journal)?;
            }
        }
        bail!("the processes below {pid} fork faster than they can be moved")
    }

    /// Moves one process into the cgroup, unless it has ended.
    fn take(
        &mut self,
        hierarchy: &Hierarchy,
        process: ProcessId,
        target: &Path,
        journal: &mut Journal,
    ) -> Result<()> {
        let pid = Pid::from_raw(process.pid);
        let from = match hierarchy.of(pid) {
            Ok(cgroup) => cgroup.path().to_owned(),
            Err(_) if !process.is_alive()? => return Ok(()),
            Err(error) => return Err(error),
        };
        journal.record(SystemChange::Moved {
            process,
            from: from.clone(),
        })?;
        if move_process(pid, target)? {
            self.origins.insert(process, from);
        }
        Ok(())
    }

    /// Moves the remaining processes back. Dropping the cgroup releases those that this misses.
    fn empty(&self) -> Result<()> {
        for pid in self.fresh.own_processes()? {
            let origin = ProcessId::of(pid)?.and_then(|process| self.origins.get(&process));
            let origin = kept_part(origin.unwrap_or(&self.origin))?;
            if origin.exists() {
                move_process(pid, origin)?;
            }
        }
        Ok(())
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        if let Err(error) = self.empty() {
            tell!("fault: warning: {error:#}; run `fault clean` to try again");
        }
    }
}

/// The tree of `pid` without this process.
fn others(pid: Pid) -> Result<Vec<ProcessId>> {
    let mut tree = proc::tree(pid)?;
    tree.retain(|process| process.pid != Pid::this().as_raw());
    Ok(tree)
}

/// Whether the cgroup, with its descendants, holds exactly these processes, and nobody is going to remove it.
fn is_own(home: &Cgroup, tree: &[ProcessId]) -> Result<bool> {
    let tree: HashSet<i32> = tree.iter().map(|process| process.pid).collect();
    let inside: HashSet<i32> = home.processes()?.into_iter().map(Pid::as_raw).collect();
    Ok(home.level() > 0 && !is_instances(home.path()) && inside == tree)
}
