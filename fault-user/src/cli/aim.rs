//! What the rules of a command line are aimed at: interfaces, and a cgroup or the whole host.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use nix::unistd::Pid;

use crate::kernel::injection::{Prepared, Wishes, prepare};
use crate::kernel::injector::Attachment;
use crate::kernel::interfaces::{self, Interface, Selection};
use crate::kernel::leftovers::Journal;
use crate::kernel::ruleset::Scope;
use crate::plan::Plan;
use crate::plan::mechanism::Mechanism;
use crate::process::cgroup::{Cgroup, Hierarchy};
use crate::process::container::{self, Container, Places};
use crate::process::netns::NetworkNamespace;
use crate::process::tree::Aim as Tree;
use crate::steer::Steering;

/// Options that say whose traffic is touched.
#[derive(Debug, Args)]
pub struct Aim {
    /// Only traffic of this process and its descendants.
    #[arg(long, value_name = "PID", conflicts_with = "cgroup")]
    pid: Option<i32>,
    /// Only traffic of the processes in this cgroup (a directory of cgroup2).
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Only traffic of this container (Docker, Podman or containerd; by name or id).
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pid", "cgroup", "netns"])]
    container: Option<String>,
    /// Only traffic in this network namespace (a path such as /proc/PID/ns/net, or a name of `ip netns`).
    #[arg(long, value_name = "NS", conflicts_with_all = ["pid", "cgroup"])]
    netns: Option<PathBuf>,
    /// Only this interface. Repeatable; default: lo and all that are up.
    #[arg(long = "interface", short = 'i', value_name = "NAME")]
    interfaces: Vec<String>,
    /// How the programs are attached; default: tcx where the kernel has it.
    #[arg(long, value_name = "HOW")]
    attach: Option<Attach>,
    /// What holds packets that are late; default: the delay line, where a tap device can be had.
    #[arg(long, value_name = "WHAT")]
    mechanism: Option<Mechanism>,
    /// Allow rules that reach port 22 or fault's control API on the whole host.
    #[arg(long)]
    pub force: bool,
}

/// The values of `--attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// TCX links (Linux 6.6): gone with the process.
    Tcx,
    /// A clsact qdisc and filters: gone after the lease of 3 s and `fault clean`.
    Clsact,
}

/// A scope that exists, and what must be given back for it.
#[derive(Debug)]
pub struct Aimed {
    /// The kernel's view of it.
    pub scope: Scope,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The process tree, when one was aimed at; dropping it moves the processes back.
    pub tree: Option<Tree>,
}

impl Aim {
    /// Whether something smaller than the host was named.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.pid.is_some()
            || self.cgroup.is_some()
            || self.container.is_some()
            || self.netns.is_some()
    }

    /// The network namespace in which to work, when it is not this one.
    ///
    /// # Errors
    /// No such container or namespace.
    pub fn elsewhere(&self) -> Result<Option<NetworkNamespace>> {
        let namespace = if let Some(netns) = &self.netns {
            NetworkNamespace::open(netns)?
        } else if let Some(container) = self.container()? {
            NetworkNamespace::of_process(container.pid)?
        } else {
            return Ok(None);
        };
        Ok(if namespace.is_own()? {
            None
        } else {
            Some(namespace)
        })
    }

    fn container(&self) -> Result<Option<Container>> {
        self.container
            .as_deref()
            .map(|name| container::find(&Places::default(), name))
            .transpose()
    }

    /// Leads connections to the relay, when the plan has stream rules: those of a scope, or of the whole host.
    ///
    /// # Errors
    /// Another network namespace is aimed at, there is no cgroup2, or the kernel refuses.
    pub async fn steer(
        &self,
        plan: &Plan,
        scope: Option<&Scope>,
        prepared: &mut Prepared,
    ) -> Result<Option<Steering>> {
        let rules = plan.stream_rules();
        let Some((_, first)) = rules.first() else {
            return Ok(None);
        };
        if self.elsewhere()?.is_some() {
            anyhow::bail!(
                "`{}` needs the relay, which can't be put into another network namespace: run fault in there, or use packet \
                 faults such as `delay`",
                first.fault.name()
            );
        }
        let root;
        let cgroup = if let Some(scope) = scope {
            &scope.path
        } else {
            root = Hierarchy::find()?;
            root.path()
        };
        // What the relay sends for the command is the command's to packet rules.
        let marker = scope.map(|scope| prepared.marker(scope)).transpose()?;
        Steering::start(&rules, plan.seed, cgroup, marker)
            .await
            .map(Some)
    }

    /// The mechanism that was asked for.
    #[must_use]
    pub fn mechanism(&self) -> Option<Mechanism> {
        self.mechanism
    }

    /// The attachment that was asked for.
    #[must_use]
    pub fn attachment(&self) -> Option<Attachment> {
        self.attach.map(|attach| match attach {
            Attach::Tcx => Attachment::Tcx,
            Attach::Clsact => Attachment::Clsact,
        })
    }

    /// The interfaces that rules are put on.
    ///
    /// # Errors
    /// An unknown one, with the nearest name.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        let selection = if self.interfaces.is_empty() {
            Selection::Default
        } else {
            Selection::Names(self.interfaces.clone())
        };
        interfaces::select(&interfaces::list()?, &selection)
    }

    /// Finds or makes the cgroup of `--pid`, `--cgroup`, or of a container that shares this network
    /// namespace.
    ///
    /// # Errors
    /// No such process or cgroup, no cgroup2, or no rights.
    pub fn take(&self, journal: &mut Option<Journal>) -> Result<Option<Aimed>> {
        if !self.is_given() {
            return Ok(None);
        }
        if let Some(path) = &self.cgroup {
            let cgroup = Hierarchy::find()?.open(path)?;
            return Ok(Some(Aimed {
                scope: scope_of(&cgroup)?,
                cgroup,
                tree: None,
            }));
        }
        let hierarchy = Hierarchy::find()?;
        if let Some(container) = self.container()? {
            let cgroup = hierarchy.of(Pid::from_raw(container.pid))?;
            return Ok(Some(Aimed {
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
        Ok(Some(Aimed {
            scope: scope_of(tree.cgroup())?,
            cgroup: tree.cgroup().clone(),
            tree: Some(tree),
        }))
    }
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

/// Loads and attaches the programs for a plan, in another network namespace where one is aimed at.
///
/// # Errors
/// As [`prepare`], or the namespace can't be entered.
pub fn prepare_in(
    namespace: Option<&NetworkNamespace>,
    plan: &Plan,
    aim: &Aim,
    wishes: &Wishes,
) -> Result<Prepared> {
    let work = || prepare(plan, &aim.interfaces()?, wishes);
    match namespace {
        Some(namespace) => namespace.enter(work),
        None => work(),
    }
}
