//! What a run is asked for besides its rules.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use super::outcome::Failure;
use super::rules::RuleSet;
use super::signals::Ends;
use super::subject::{Group, Subject, namespace_of_cgroup, namespace_of_tree, scope_of};
use super::tree::Aim as Tree;
use crate::inject::injection::{Prepared, Wishes};
use crate::inject::injector::Attachment;
use crate::inject::reach::Front;
use crate::plan::Plan;
use crate::plan::mechanism::Mechanism;
use crate::plan::tables::Scope;
use crate::relay::Cut;
use crate::rule::{Fault, ResolvedRule, Rule};
use crate::steer::{Steering, Whose};
use crate::sys::net::interfaces::{self, Interface, Selection};
use crate::sys::process::cgroup::Hierarchy;
use crate::sys::process::container::{self, Container, Places};
use crate::sys::process::netns::NetworkNamespace;
use crate::tell::tell;
use crate::undo::journal::Journal;
use crate::watch::open::Sockets;

/// Whose traffic is touched, where, and by what means.
#[derive(Debug)]
pub struct Options {
    /// Only traffic of this process and its descendants.
    pub pid: Option<i32>,
    /// Only traffic of the processes in this cgroup.
    pub cgroup: Option<PathBuf>,
    /// Only traffic of this container, by its name or id.
    pub container: Option<String>,
    /// Whether the rules are applied again when the container is back.
    pub follow: bool,
    /// Only traffic in this network namespace.
    pub netns: Option<PathBuf>,
    /// Which interfaces the rules are put on, those that appear later included.
    pub selection: Selection,
    /// The attachment that was asked for.
    pub attachment: Option<Attachment>,
    /// What judges packets that arrive.
    pub front: Front,
    /// What was asked to hold packets.
    pub mechanism: Option<Mechanism>,
    /// How long data may take to arrive when the rules end; nothing leaves it to the rules.
    pub drain: Option<Duration>,
    /// Whether rules may reach port 22 and the control API on the whole host.
    pub force: bool,
}

impl Options {
    /// How the programs are put on interfaces.
    #[must_use]
    pub fn wishes(&self) -> Wishes {
        Wishes {
            attachment: self.attachment,
            front: self.front,
            newcomers: Some(self.selection.clone()),
            ..Wishes::default()
        }
    }

    /// Whether something smaller than the host was named.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.pid.is_some()
            || self.cgroup.is_some()
            || self.container.is_some()
            || self.netns.is_some()
    }

    /// Finds what is aimed at.
    ///
    /// # Errors
    /// No such container, namespace, process or cgroup.
    pub fn subject(&self) -> Result<Subject> {
        self.subject_of(self.container()?)
    }

    /// The same, with the container that has been found.
    ///
    /// # Errors
    /// As [`Options::subject`].
    pub fn subject_of(&self, container: Option<Container>) -> Result<Subject> {
        let namespace = if let Some(netns) = &self.netns {
            Some(NetworkNamespace::open(netns)?)
        } else if let Some(container) = &container {
            Some(NetworkNamespace::of_process(container.pid)?)
        } else if let Some(pid) = self.pid {
            Some(namespace_of_tree(pid)?)
        } else if let Some(cgroup) = &self.cgroup {
            namespace_of_cgroup(cgroup)?
        } else {
            None
        };
        let namespace = match namespace {
            Some(namespace) if !namespace.is_own()? => Some(namespace),
            _ => None,
        };
        let mut journal = None;
        let is_whole = namespace.is_some() && self.pid.is_none() && self.cgroup.is_none();
        let group = if is_whole {
            None
        } else {
            self.take(container.as_ref(), &mut journal)?
        };
        Ok(Subject {
            group,
            namespace,
            container,
            journal,
        })
    }

    fn container(&self) -> Result<Option<Container>> {
        self.container
            .as_deref()
            .map(|name| container::find(&Places::default(), name))
            .transpose()
    }

    /// Leads connections to the relay, when the plan has stream rules: those of a scope, or of a whole network namespace.
    ///
    /// # Errors
    /// A container is to be followed, there is no cgroup2, or the kernel refuses.
    pub async fn steer(
        &self,
        subject: &Subject,
        plan: &Plan,
        scope: Option<&Scope>,
        prepared: &mut Prepared,
    ) -> Result<Option<Steering>> {
        let rules = plan.stream_rules();
        let Some((_, first)) = rules.first() else {
            return Ok(None);
        };
        if self.follow {
            anyhow::bail!(
                "`{}` needs the relay, which can't follow a container: take --follow away, or use packet faults such as \
                 `delay`",
                first.fault.name()
            );
        }
        let (cgroup, all_cgroups) = match (scope, &subject.container) {
            (Some(scope), _) => (scope.path.clone(), false),
            (None, Some(container)) => {
                let own = Hierarchy::find()?.of(Pid::from_raw(container.pid))?;
                (own.path().to_owned(), own.level() == 0)
            }
            (None, None) => (Hierarchy::find()?.path().to_owned(), true),
        };
        let whose = Whose {
            cgroup: &cgroup,
            all_cgroups,
            namespace: subject.namespace.as_ref(),
            // What the relay sends for the command is the command's to packet rules.
            marker: scope.map(|scope| prepared.marker(scope)).transpose()?,
            exchange: prepared.exchange(),
        };
        Steering::start(&rules, plan.seed, whose).await.map(Some)
    }

    /// Ends stream rules: what is on its way arrives, or its connections are reset, and a line says how many. Another
    /// signal has all reset at once.
    ///
    /// # Errors
    /// Signals can't be listened for.
    pub async fn finish(
        &self,
        steering: &Steering,
        rules: &[(Rule, ResolvedRule)],
    ) -> Result<(), Failure> {
        let mut ends = Ends::listen()?;
        let held_ns = rules.iter().map(|(_, rule)| match rule.fault {
            Fault::Delay {
                delay_ns,
                jitter_ns,
                ..
            } => delay_ns.saturating_add(jitter_ns),
            _ => 0,
        });
        let transit = Duration::from_nanos(held_ns.max().unwrap_or(0));
        let cut = steering.finish(self.drain, transit, ends.come()).await;
        if cut != Cut::default() {
            tell!(
                "fault: {} connections were open at the end and were reset; {} bytes of them had not arrived",
                cut.connections,
                cut.bytes
            );
        }
        Ok(())
    }

    /// What tells how many connections are open to the targets of the rules. Nothing where that can't be told: of a
    /// container that is followed to other network namespaces, or without `CONFIG_INET_DIAG`.
    #[must_use]
    pub fn sockets(
        &self,
        subject: &Subject,
        scope: Option<&Scope>,
        rules: &RuleSet,
    ) -> Option<Sockets> {
        if self.follow {
            return None;
        }
        let cgroup = scope.map(|scope| scope.path.clone());
        match Sockets::new(cgroup, subject.namespace.as_ref()) {
            Ok(mut sockets) => {
                sockets.look_at(rules.named_targets());
                Some(sockets)
            }
            Err(error) => {
                log::warn!("`fault top` will not see how many connections are open: {error:#}");
                None
            }
        }
    }

    /// The interfaces that rules are put on.
    ///
    /// # Errors
    /// An unknown one, with the nearest name.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        interfaces::select(&interfaces::list()?, &self.selection)
    }

    /// Finds or makes the cgroup of `--pid`, `--cgroup`, or of a container that shares this network
    /// namespace.
    ///
    /// # Errors
    /// No such process or cgroup, no cgroup2, or no rights.
    fn take(
        &self,
        container: Option<&Container>,
        journal: &mut Option<Journal>,
    ) -> Result<Option<Group>> {
        if !self.is_given() {
            return Ok(None);
        }
        if let Some(path) = &self.cgroup {
            let cgroup = Hierarchy::find()?.open(path)?;
            return Ok(Some(Group {
                scope: scope_of(&cgroup)?,
                cgroup,
                tree: None,
            }));
        }
        let hierarchy = Hierarchy::find()?;
        if let Some(container) = container {
            let cgroup = hierarchy.of(Pid::from_raw(container.pid))?;
            return Ok(Some(Group {
                scope: scope_of(&cgroup)?,
                cgroup,
                tree: None,
            }));
        }
        let Some(pid) = self.pid else {
            return Ok(None);
        };
        let journal = journal.insert(Journal::create()?);
        let tree = Tree::at(&hierarchy, Pid::from_raw(pid), journal)
            .with_context(|| format!("aiming at process {pid}"))?;
        Ok(Some(Group {
            scope: scope_of(tree.cgroup())?,
            cgroup: tree.cgroup().clone(),
            tree: Some(tree),
        }))
    }
}
