//! Whose traffic it is: a cgroup, a network namespace, a container.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;

use super::options::Options;
use super::tree::Aim as Tree;
use crate::inject::injection::{Injection, Prepared, Wishes};
use crate::inject::preparation::prepare_noting;
use crate::plan::Plan;
use crate::plan::tables::Scope;
use crate::steer::Steering;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::{Cgroup, Hierarchy};
use crate::sys::process::container::Container;
use crate::sys::process::netns::{NetworkNamespace, netns_cookie};
use crate::sys::process::proc;
use crate::tell::tell;
use crate::undo::journal::Journal;

/// Whose traffic the rules are about, found on this machine.
#[derive(Debug)]
pub struct Subject {
    /// A cgroup in this network namespace.
    pub group: Option<Group>,
    /// Another network namespace.
    pub namespace: Option<NetworkNamespace>,
    /// The container that both are from.
    pub container: Option<Container>,
    /// What has been noted so far, until [`Subject::load`].
    pub(super) journal: Option<Journal>,
}

impl Subject {
    /// The kernel's view of the cgroup.
    #[must_use]
    pub fn scope(&self) -> Option<Scope> {
        self.group.as_ref().map(|group| group.scope.clone())
    }

    /// Loads and attaches the programs for a plan.
    ///
    /// # Errors
    /// As [`prepare_noting`], or the namespace can't be entered.
    pub fn load(&mut self, plan: &Plan, options: &Options, wishes: &Wishes) -> Result<Prepared> {
        let journal = self.journal.take();
        let work = || prepare_noting(plan, &options.interfaces()?, wishes, journal);
        let prepared = match &self.namespace {
            Some(namespace) => namespace.enter(work),
            None => work(),
        }?;
        for note in prepared.notes() {
            tell!("fault: {note}");
        }
        Ok(prepared)
    }

    /// Lets the sockets that are open in the cgroup already be known as its own.
    ///
    /// # Errors
    /// Its processes can't be listed.
    pub fn adopt(&self, prepared: &mut Prepared) -> Result<()> {
        match &self.group {
            Some(group) => prepared.adopt(&group.cgroup, &group.scope),
            None => Ok(()),
        }
    }
}

impl Subject {
    /// Counts from now on what the processes that rules are about connect to, for [`Injection::endpoints`]. Without it the
    /// rules act all the same.
    pub fn count_endpoints(&self, scope: Option<&Scope>, prepared: &mut Prepared) {
        if let Err(error) = self.try_to_count_endpoints(scope, prepared) {
            log::info!("a rule that never matches will not tell what was used instead: {error:#}");
        }
    }

    fn try_to_count_endpoints(&self, scope: Option<&Scope>, prepared: &mut Prepared) -> Result<()> {
        let here = match &self.namespace {
            Some(namespace) => namespace.enter(|| Ok(netns_cookie()))?,
            None => netns_cookie(),
        };
        match scope {
            Some(scope) => prepared.count_endpoints(&scope.path, here, false),
            None => prepared.count_endpoints(Hierarchy::find()?.path(), here, true),
        }
    }

    /// Whom the rules are about, for a message.
    #[must_use]
    pub fn who(&self, scope: Option<&Scope>) -> &'static str {
        match (&self.group, &self.container, &self.namespace, scope) {
            (_, Some(_), ..) => "the container",
            (Some(_), ..) => "the processes aimed at",
            (_, _, Some(_), _) => "the processes in the network namespace",
            (.., Some(_)) => "the command",
            (.., None) => "the processes on this host",
        }
    }

    /// The capabilities that are still needed when all is set up: to read the figures, to undo what is noted, to go
    /// with a container, and to relay.
    #[must_use]
    pub fn rights(
        &self,
        options: &Options,
        injection: &Injection,
        steering: Option<&Steering>,
    ) -> Vec<Capability> {
        let mut rights = vec![Capability::Bpf];
        if injection.has_notes() || options.follow {
            rights.push(Capability::NetAdmin);
        }
        if (injection.has_notes() && self.namespace.is_some()) || options.follow {
            rights.extend([Capability::SysAdmin, Capability::SysPtrace]);
        }
        if options.follow {
            rights.push(Capability::Perfmon);
        }
        // Processes that go back to cgroups which may be a user's; runtimes' files.
        let moved = self
            .group
            .as_ref()
            .and_then(|group| group.tree.as_ref())
            .is_some_and(Tree::is_moved);
        if moved || options.follow {
            rights.push(Capability::DacOverride);
        }
        if let Some(steering) = steering {
            rights.push(Capability::NetAdmin);
            if steering.reaches_for_sockets() {
                rights.extend([Capability::SysPtrace, Capability::DacOverride]);
            }
        }
        rights
    }
}

/// A scope that exists, and what must be given back for it.
#[derive(Debug)]
pub struct Group {
    /// The kernel's view of it.
    pub scope: Scope,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The process tree, when one was aimed at; dropping it moves the processes back.
    pub tree: Option<Tree>,
}

/// The kernel's view of a cgroup.
///
/// # Errors
/// A depth that no kernel has.
pub fn scope_of(cgroup: &Cgroup) -> Result<Scope> {
    Ok(Scope {
        cgroup: cgroup.id(),
        level: u8::try_from(cgroup.level()).context("the cgroup lies too deep")?,
        path: cgroup.path().to_owned(),
    })
}

/// The network namespace of a process. Descendants in others are told of.
pub(super) fn namespace_of_tree(pid: i32) -> Result<NetworkNamespace> {
    let aim = || format!("aiming at process {pid}");
    let own = NetworkNamespace::of_process(pid).with_context(aim)?;
    let tree = proc::tree(Pid::from_raw(pid)).with_context(aim)?;
    let elsewhere = tree
        .iter()
        .filter(|process| NetworkNamespace::of_process(process.pid).is_ok_and(|other| other != own))
        .count();
    if elsewhere != 0 {
        tell!(
            "fault: warning: {elsewhere} of the processes below {pid} are in other network namespaces, where the rules do not apply"
        );
    }
    Ok(own)
}

/// The network namespace that the processes of a cgroup are in, if there are any.
pub(super) fn namespace_of_cgroup(cgroup: &Path) -> Result<Option<NetworkNamespace>> {
    let mut found: Option<NetworkNamespace> = None;
    for pid in Hierarchy::find()?.open(cgroup)?.processes()? {
        let Ok(namespace) = NetworkNamespace::of_process(pid.as_raw()) else {
            // It has ended, or may not be looked into.
            continue;
        };
        ensure!(
            found.as_ref().is_none_or(|one| *one == namespace),
            "the processes of {} are in several network namespaces: name one of them with --pid",
            cgroup.display()
        );
        found = Some(namespace);
    }
    Ok(found)
}
