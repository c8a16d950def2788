//! The traffic that rules apply to: that of a cgroup, a network namespace or a container.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use fault_common::abi::STEERS;
use nix::unistd::Pid;

use super::options::SessionOptions;
use super::rules::RuleSet;
use super::tree::ProcessTree as Tree;
use crate::inject::injection::{Injection, InjectionOptions, PreparedInjection};
use crate::inject::injector::Marker;
use crate::inject::preparation::prepare_noting;
use crate::inject::services::Room;
use crate::plan::Plan;
use crate::plan::tables::CgroupScope;
use crate::relay::Decisions;
use crate::relay::exchange::Exchange;
use crate::steer::{Redirection, Steering, SteeringScope};
use crate::sys::net::interfaces::Selection;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::cgroup::{Cgroup, Hierarchy};
use crate::sys::process::container::{self, Container, RuntimePaths};
use crate::sys::process::netns::{NetworkNamespace, netns_cookie};
use crate::sys::process::proc;
use crate::tell::tell;
use crate::undo::journal::Journal;
use crate::watch::open::Sockets;

/// The traffic that rules apply to, located on this machine.
#[derive(Debug)]
pub struct Subject {
    /// A cgroup in this network namespace.
    pub group: Option<Group>,
    /// Another network namespace.
    pub namespace: Option<NetworkNamespace>,
    /// The container that both belong to.
    pub container: Option<Container>,
    /// The journal, until [`Subject::load`] takes it.
    journal: Option<Journal>,
}

impl Subject {
    /// Locates the traffic that `options` select.
    ///
    /// # Errors
    /// No such container, namespace, process or cgroup.
    pub fn find(options: &SessionOptions) -> Result<Self> {
        let container = options.container.as_deref();
        let container = container.map(|name| container::find(&RuntimePaths::default(), name));
        Self::of(options, container.transpose()?)
    }

    /// The same, for a container that is already located.
    ///
    /// # Errors
    /// As [`Subject::find`].
    pub fn of(options: &SessionOptions, container: Option<Container>) -> Result<Self> {
        let namespace = if let Some(netns) = &options.netns {
            Some(NetworkNamespace::open(netns)?)
        } else if let Some(container) = &container {
            Some(NetworkNamespace::of_process(container.pid)?)
        } else if let Some(pid) = options.pid {
            Some(namespace_of_tree(pid)?)
        } else if let Some(cgroup) = &options.cgroup {
            namespace_of_cgroup(cgroup)?
        } else {
            None
        };
        let namespace = match namespace {
            Some(namespace) if !namespace.is_own()? => Some(namespace),
            _ => None,
        };
        let mut journal = None;
        let is_whole = namespace.is_some() && options.pid.is_none() && options.cgroup.is_none();
        let group = if is_whole {
            None
        } else {
            Group::find(options, container.as_ref(), &mut journal)?
        };
        Ok(Self {
            group,
            namespace,
            container,
            journal,
        })
    }

    /// The scope of the cgroup.
    #[must_use]
    pub fn scope(&self) -> Option<CgroupScope> {
        self.group.as_ref().map(|group| group.scope.clone())
    }

    /// Loads and attaches the programs for a plan.
    ///
    /// # Errors
    /// As [`prepare_noting`], or the namespace can't be entered.
    pub fn load(
        &mut self,
        plan: &Plan,
        options: &SessionOptions,
        injection_options: &InjectionOptions,
    ) -> Result<PreparedInjection> {
        let journal = self.journal.take();
        let work = || prepare_noting(plan, &options.interfaces()?, injection_options, journal);
        let prepared = match &self.namespace {
            Some(namespace) => namespace.enter(work),
            None => work(),
        }?;
        for note in prepared.notes() {
            tell!("fault: {note}");
        }
        Ok(prepared)
    }

    /// Marks the sockets that are already open in the cgroup as its own.
    ///
    /// # Errors
    /// Its processes can't be listed.
    pub fn adopt(&self, prepared: &mut PreparedInjection) -> Result<()> {
        match &self.group {
            Some(group) => prepared.adopt(&group.cgroup, &group.scope),
            None => Ok(()),
        }
    }
}

impl Subject {
    /// Leaves DNS queries over TCP alone if the relay can't be used for them: the plan's rules need it for nothing else.
    pub fn leave_tcp_if_need_be(
        &self,
        options: &SessionOptions,
        plan: &mut Plan,
        scope: Option<&CgroupScope>,
    ) {
        let knows_namespaces = || scope.is_some() || netns_cookie() != 0;
        let can_redirect = || {
            !options.follow
                && options.selection == Selection::Default
                && knows_namespaces()
                && Hierarchy::find().is_ok()
        };
        if plan.rules.iter().any(|rule| rule.over_tcp.is_some()) && !can_redirect() {
            plan.leave_tcp();
        }
    }

    /// Redirects the connections of a scope, or of a whole network namespace, to the relay if the plan has rules for it.
    ///
    /// # Errors
    /// The container is followed, there is no cgroup2, or a system call fails.
    pub async fn steer(
        &self,
        options: &SessionOptions,
        plan: &Plan,
        scope: Option<&CgroupScope>,
        prepared: &mut PreparedInjection,
        decisions: &Decisions,
    ) -> Result<Option<Steering>> {
        let rules = plan.relay_rules();
        let Some((_, first)) = rules.first() else {
            return Ok(None);
        };
        if options.follow {
            anyhow::bail!(
                "`{}` needs the relay, which can't follow a container: leave --follow out, or use packet faults such \
                 as `delay`",
                first.resolved.fault.name()
            );
        }
        // Packet rules count the relay's packets for the command as the command's.
        let marker = scope.map(|scope| prepared.marker(scope)).transpose()?;
        let room = Room {
            // Several rules may have one target.
            services: u32::try_from(rules.len())?.min(STEERS),
            hosts: rules
                .iter()
                .map(|(_, rule)| rule.resolved.target.hosts.len())
                .sum(),
        };
        let redirection = self.redirect(scope, marker, prepared.exchange(), room)?;
        let learned = prepared.learned_addresses()?;
        let namespace = self.namespace.as_ref();
        redirection
            .steer(&rules, (plan.seed, decisions), namespace, learned)
            .await
            .map(Some)
    }

    /// Attaches the programs that redirect the connections of a scope, or of a whole network namespace. `marker` is
    /// that of the scope.
    ///
    /// # Errors
    /// There is no cgroup2, or a system call fails.
    pub fn redirect(
        &self,
        scope: Option<&CgroupScope>,
        marker: Option<Marker>,
        exchange: Option<Arc<Exchange>>,
        room: Room,
    ) -> Result<Redirection> {
        let (cgroup, all_cgroups) = match (scope, &self.container) {
            (Some(scope), _) => (scope.path.clone(), false),
            (None, Some(container)) => {
                let own = Hierarchy::find()?.of(Pid::from_raw(container.pid))?;
                (own.path().to_owned(), own.level() == 0)
            }
            (None, None) => (Hierarchy::find()?.path().to_owned(), true),
        };
        let whose = SteeringScope {
            cgroup: &cgroup,
            all_cgroups,
            namespace: self.namespace.as_ref(),
            marker,
            exchange,
        };
        Redirection::open(whose, room)
    }

    /// Counts the open connections to the rules' targets. `None` for a container that is followed to other network
    /// namespaces, or without `CONFIG_INET_DIAG`.
    #[must_use]
    pub fn sockets(
        &self,
        options: &SessionOptions,
        scope: Option<&CgroupScope>,
        rules: &RuleSet,
    ) -> Option<Sockets> {
        if options.follow {
            return None;
        }
        let cgroup = scope.map(|scope| scope.path.clone());
        match Sockets::new(cgroup, self.namespace.as_ref()) {
            Ok(mut sockets) => {
                sockets.look_at(rules.named_targets());
                Some(sockets)
            }
            Err(error) => {
                log::warn!("`fault top` can't show the number of open connections: {error:#}");
                None
            }
        }
    }

    /// Counts the endpoints that the selected processes connect to, for [`Injection::endpoints`]. A failure does not
    /// affect the rules.
    pub fn count_endpoints(&self, scope: Option<&CgroupScope>, prepared: &mut PreparedInjection) {
        if let Err(error) = self.try_to_count_endpoints(scope, prepared) {
            log::info!(
                "for a rule that never matches, the summary can't show what was used instead: {error:#}"
            );
        }
    }

    fn try_to_count_endpoints(
        &self,
        scope: Option<&CgroupScope>,
        prepared: &mut PreparedInjection,
    ) -> Result<()> {
        let here = match &self.namespace {
            Some(namespace) => namespace.enter(|| Ok(netns_cookie()))?,
            None => netns_cookie(),
        };
        match scope {
            Some(scope) => prepared.count_endpoints(&scope.path, here, false),
            None => prepared.count_endpoints(Hierarchy::find()?.path(), here, true),
        }
    }

    /// A name for the selected processes in messages.
    #[must_use]
    pub fn who(&self, scope: Option<&CgroupScope>) -> &'static str {
        match (&self.group, &self.container, &self.namespace, scope) {
            (_, Some(_), ..) => "the container",
            (Some(_), ..) => "the selected processes",
            (_, _, Some(_), _) => "the processes in the network namespace",
            (.., Some(_)) => "the command",
            (.., None) => "the processes on this host",
        }
    }

    /// The capabilities needed after the setup: to read counters, to undo the journal, to follow a container, and for
    /// the relay.
    #[must_use]
    pub fn rights(
        &self,
        options: &SessionOptions,
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
        // For moving processes back to cgroups that may belong to a user, and for reading files of container runtimes.
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

/// A scope, and the resources that must be released with it.
#[derive(Debug)]
pub struct Group {
    /// The scope.
    pub scope: CgroupScope,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The process tree of `--pid`; dropping it moves the processes back.
    pub tree: Option<Tree>,
}

impl Group {
    /// Finds or creates the cgroup of `--pid`, `--cgroup`, or of a container that shares this network namespace.
    ///
    /// # Errors
    /// No such process or cgroup, no cgroup2, or missing privileges.
    pub fn find(
        options: &SessionOptions,
        container: Option<&Container>,
        journal: &mut Option<Journal>,
    ) -> Result<Option<Self>> {
        if !options.is_given() {
            return Ok(None);
        }
        if let Some(path) = &options.cgroup {
            let cgroup = Hierarchy::find()?.open(path)?;
            return Ok(Some(Self {
                scope: scope_of(&cgroup)?,
                cgroup,
                tree: None,
            }));
        }
        let hierarchy = Hierarchy::find()?;
        if let Some(container) = container {
            let cgroup = hierarchy.of(Pid::from_raw(container.pid))?;
            return Ok(Some(Self {
                scope: scope_of(&cgroup)?,
                cgroup,
                tree: None,
            }));
        }
        let Some(pid) = options.pid else {
            return Ok(None);
        };
        let journal = journal.insert(Journal::create()?);
        let tree = Tree::at(&hierarchy, Pid::from_raw(pid), journal)
            .with_context(|| format!("attaching to process {pid}"))?;
        Ok(Some(Self {
            scope: scope_of(tree.cgroup())?,
            cgroup: tree.cgroup().clone(),
            tree: Some(tree),
        }))
    }
}

/// The scope of a cgroup.
///
/// # Errors
/// The cgroup is nested too deep.
pub fn scope_of(cgroup: &Cgroup) -> Result<CgroupScope> {
    Ok(CgroupScope {
        cgroup: cgroup.id(),
        level: u8::try_from(cgroup.level()).context("the cgroup is nested too deep")?,
        path: cgroup.path().to_owned(),
    })
}

/// The network namespace of a process. Warns about descendants in other namespaces.
fn namespace_of_tree(pid: i32) -> Result<NetworkNamespace> {
    let aim = || format!("attaching to process {pid}");
    let own = NetworkNamespace::of_process(pid).with_context(aim)?;
    let tree = proc::tree(Pid::from_raw(pid)).with_context(aim)?;
    let elsewhere = tree
        .iter()
        .filter(|process| NetworkNamespace::of_process(process.pid).is_ok_and(|other| other != own))
        .count();
    if elsewhere != 0 {
        tell!(
            "fault: warning: {elsewhere} descendants of process {pid} are in other network namespaces, where the \
             rules do not apply"
        );
    }
    Ok(own)
}

/// The network namespace of the processes in a cgroup, if there are any.
fn namespace_of_cgroup(cgroup: &Path) -> Result<Option<NetworkNamespace>> {
    let mut found: Option<NetworkNamespace> = None;
    for pid in Hierarchy::find()?.open(cgroup)?.processes()? {
        let Ok(namespace) = NetworkNamespace::of_process(pid.as_raw()) else {
            // It has ended or can't be inspected.
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
