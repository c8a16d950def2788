//! Aiming at a process that runs already (`--pid`), with everything below it.
//!
//! Where the process's cgroup holds nothing but its tree, that cgroup is the aim and nothing is
//! changed. Otherwise the tree is moved into a fresh cgroup, and back at the end.
use crate::sys::process::cgroup::{
    Cgroup, CommandCgroup, Hierarchy, Leftovers, ROUNDS_MAX, move_process,
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

/// A process tree that can be told from all others by its cgroup.
#[derive(Debug)]
pub struct ProcessTree {
    cgroup: Cgroup,
    moved: Option<Moved>,
    sockets: Vec<OpenSocket>,
}

/// A tree in a cgroup of ours.
#[derive(Debug)]
struct Moved {
    fresh: CommandCgroup,
    /// Where each process came from.
    origins: HashMap<ProcessId, PathBuf>,
    /// Where the first one came from: the place for children that were born here.
    origin: PathBuf,
}

impl ProcessTree {
    /// Aims at `pid` and its descendants. `fault` itself is never among them, even when started by
    /// that process. `journal` learns of each move before it is made.
    ///
    /// A tree that is moved stays below its own cgroup where that is possible, so that limits on
    /// memory and CPU keep holding.
    ///
    /// # Errors
    /// When there is no such process, no cgroup can be made, a process can't be moved, or the tree
    /// grows faster than it can be moved. Whatever was moved is moved back.
    pub fn at(hierarchy: &Hierarchy, pid: Pid, journal: &mut Journal) -> Result<Self> {
        if pid == Pid::this() {
            bail!("process {pid} is fault itself: name another one");
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

    /// The cgroup that the rules' scope is made of.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Whether the tree was moved into a cgroup of ours.
    #[must_use]
    pub fn is_moved(&self) -> bool {
        self.moved.is_some()
    }

    /// The sockets that the tree had open when it was aimed at. Those of a moved tree still carry
    /// the cgroup that they were made in, so the rules must know them by their addresses.
    #[must_use]
    pub fn sockets(&self) -> &[OpenSocket] {
        &self.sockets
    }
}

impl Moved {
    /// Moves the tree in, again and again until no fork has added a process outside.
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

    /// Moves one process in, unless it has ended.
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

    /// Moves back what is still here; the cgroup's own end releases whatever that misses.
    fn empty(&self) -> Result<()> {
        for pid in self.fresh.cgroup().processes()? {
            let origin = ProcessId::of(pid)?.and_then(|process| self.origins.get(&process));
            let origin = origin.unwrap_or(&self.origin);
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
            tell!("fault: {error:#}; `fault clean` tries again");
        }
    }
}

/// The tree of `pid` without this very process.
fn others(pid: Pid) -> Result<Vec<ProcessId>> {
    let mut tree = proc::tree(pid)?;
    tree.retain(|process| process.pid != Pid::this().as_raw());
    Ok(tree)
}

/// Whether a cgroup other than the root, with those below it, holds these processes and no others.
fn is_own(home: &Cgroup, tree: &[ProcessId]) -> Result<bool> {
    let tree: HashSet<i32> = tree.iter().map(|process| process.pid).collect();
    let inside: HashSet<i32> = home.processes()?.into_iter().map(Pid::as_raw).collect();
    Ok(home.level() > 0 && inside == tree)
}
