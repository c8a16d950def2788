//! What the rules of a command line are aimed at: interfaces, and a cgroup or the whole host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use nix::unistd::Pid;

use crate::doctor::capabilities::Capability;
use crate::kernel::injection::{Front, Injection, Prepared, Wishes};
use crate::kernel::injector::Attachment;
use crate::kernel::interfaces::{self, Interface, Selection};
use crate::kernel::journal::Journal;
use crate::kernel::preparation::prepare_noting;
use crate::kernel::ruleset::Scope;
use crate::plan::Plan;
use crate::plan::mechanism::Mechanism;
use crate::process::cgroup::{Cgroup, Hierarchy};
use crate::process::container::{self, Container, Places};
use crate::process::netns::{NetworkNamespace, netns_cookie};
use crate::process::proc;
use crate::process::tree::Aim as Tree;
use crate::relay::Cut;
use crate::rule::{Layer, ResolvedRule, Rule};
use crate::steer::{Steering, Whose};
use crate::tell::tell;
use crate::watch::open::Sockets;

use super::Failure;
use super::inject::{Ends, parse_time};
use super::rules::Parsed;

/// Options that say whose traffic is touched.
#[derive(Debug, Args)]
pub struct Aim {
    /// Only traffic of this process and its descendants, in the network namespace of this process.
    #[arg(long, value_name = "PID", conflicts_with = "cgroup")]
    pid: Option<i32>,
    /// Only traffic of the processes in this cgroup (a directory of cgroup2).
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Only traffic of this container (Docker, Podman or containerd; by name or id).
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pid", "cgroup", "netns"])]
    pub container: Option<String>,
    /// Put the rules in force again whenever the container has been restarted.
    #[arg(long, requires = "container")]
    pub follow: bool,
    /// Only traffic in this network namespace (a path such as /proc/PID/ns/net, or a name of `ip netns`).
    #[arg(long, value_name = "NS", conflicts_with_all = ["pid", "cgroup"])]
    netns: Option<PathBuf>,
    /// Only this interface. Repeatable; default: lo and all that are up, those that appear later included.
    #[arg(long = "interface", short = 'i', value_name = "NAME")]
    interfaces: Vec<String>,
    /// How the programs are attached; default: tcx where the kernel has it.
    #[arg(long, value_name = "HOW")]
    attach: Option<Attach>,
    /// By what rules are carried out: `tc` or `xdp` for packets that arrive, `delay-line`, `fq` or `netem` for those that
    /// are held. Repeatable. Default: tc (xdp on hardware that was named and has it, if rules only lose packets), and the
    /// delay line, where a tap device can be had.
    #[arg(long, value_name = "WHAT")]
    mechanism: Vec<Choice>,
    /// How long data on its way through a stream rule may take to arrive when the rules end, e.g. 30s; what has not
    /// arrived by then is counted, and its connections are reset. Default: the rules' own delays and 10 s.
    #[arg(long, value_name = "TIME")]
    drain: Option<String>,
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

/// The values of `--mechanism`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The tc programs alone.
    Tc,
    /// The XDP program in front of them, native where the driver can, else generic. It loses packets; rules that do more
    /// stay with tc.
    Xdp,
    /// A thread of fault behind a tap device: on every kernel, beside any qdisc.
    DelayLine,
    /// fq qdiscs hold what is delayed or reordered; the delay line what has a rate or slots.
    Fq,
    /// netem qdiscs hold what has a constant delay; the delay line all else.
    Netem,
}

/// What the rules are put on: an aim that has been found.
#[derive(Debug)]
pub struct Place {
    /// A cgroup in this network namespace.
    pub aimed: Option<Aimed>,
    /// Another network namespace.
    pub namespace: Option<NetworkNamespace>,
    /// The container that both are from.
    pub container: Option<Container>,
    /// What has been noted so far, until [`Place::prepare`].
    journal: Option<Journal>,
}

impl Place {
    /// The kernel's view of the cgroup.
    #[must_use]
    pub fn scope(&self) -> Option<Scope> {
        self.aimed.as_ref().map(|aimed| aimed.scope.clone())
    }

    /// Loads and attaches the programs for a plan.
    ///
    /// # Errors
    /// As [`prepare_noting`], or the namespace can't be entered.
    pub fn prepare(&mut self, plan: &Plan, aim: &Aim, wishes: &Wishes) -> Result<Prepared> {
        let journal = self.journal.take();
        let work = || prepare_noting(plan, &aim.interfaces()?, wishes, journal);
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
        match &self.aimed {
            Some(aimed) => prepared.adopt(&aimed.cgroup, &aimed.scope),
            None => Ok(()),
        }
    }
}

impl Place {
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
        match (&self.aimed, &self.container, &self.namespace, scope) {
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
        aim: &Aim,
        injection: &Injection,
        steering: Option<&Steering>,
    ) -> Vec<Capability> {
        let mut rights = vec![Capability::Bpf];
        if injection.has_notes() || aim.follow {
            rights.push(Capability::NetAdmin);
        }
        if (injection.has_notes() && self.namespace.is_some()) || aim.follow {
            rights.extend([Capability::SysAdmin, Capability::SysPtrace]);
        }
        if aim.follow {
            rights.push(Capability::Perfmon);
        }
        // Processes that go back to cgroups which may be a user's; runtimes' files.
        let moved = self
            .aimed
            .as_ref()
            .and_then(|aimed| aimed.tree.as_ref())
            .is_some_and(Tree::is_moved);
        if moved || aim.follow {
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

    /// Finds what is aimed at.
    ///
    /// # Errors
    /// No such container, namespace, process or cgroup.
    pub fn place(&self) -> Result<Place> {
        self.place_of(self.container()?)
    }

    /// The same, with the container that has been found.
    ///
    /// # Errors
    /// As [`Aim::place`].
    pub fn place_of(&self, container: Option<Container>) -> Result<Place> {
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
        let aimed = if is_whole {
            None
        } else {
            self.take(container.as_ref(), &mut journal)?
        };
        Ok(Place {
            aimed,
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
        place: &Place,
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
        let (cgroup, all_cgroups) = match (scope, &place.container) {
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
            namespace: place.namespace.as_ref(),
            // What the relay sends for the command is the command's to packet rules.
            marker: scope.map(|scope| prepared.marker(scope)).transpose()?,
            exchange: prepared.exchange(),
        };
        Steering::start(&rules, plan.seed, whose).await.map(Some)
    }

    /// How long data may take to arrive when the rules end.
    ///
    /// # Errors
    /// It is no time.
    pub fn drain(&self) -> Result<Option<Duration>, Failure> {
        let drain = self.drain.as_deref();
        drain.map(|text| parse_time("--drain", text)).transpose()
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
        let packets = rules
            .iter()
            .filter(|(_, rule)| rule.fault.layer() == Layer::Packet);
        let held_ns = packets.map(|(_, rule)| rule.fault.held_ns());
        let transit = Duration::from_nanos(held_ns.max().unwrap_or(0));
        let cut = steering.finish(self.drain()?, transit, ends.come()).await;
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
        place: &Place,
        scope: Option<&Scope>,
        parsed: &Parsed,
    ) -> Option<Sockets> {
        if self.follow {
            return None;
        }
        let cgroup = scope.map(|scope| scope.path.clone());
        match Sockets::new(cgroup, place.namespace.as_ref()) {
            Ok(mut sockets) => {
                sockets.look_at(parsed.named_targets());
                Some(sockets)
            }
            Err(error) => {
                log::warn!("`fault top` will not see how many connections are open: {error:#}");
                None
            }
        }
    }

    /// What was asked to hold packets; the last one counts.
    #[must_use]
    pub fn mechanism(&self) -> Option<Mechanism> {
        let mut wishes = self.mechanism.iter().rev();
        wishes.find_map(|wish| match wish {
            Choice::DelayLine => Some(Mechanism::DelayLine),
            Choice::Fq => Some(Mechanism::Fq),
            Choice::Netem => Some(Mechanism::Netem),
            Choice::Tc | Choice::Xdp => None,
        })
    }

    /// The attachment that was asked for.
    #[must_use]
    pub fn attachment(&self) -> Option<Attachment> {
        self.attach.map(|attach| match attach {
            Attach::Tcx => Attachment::Tcx,
            Attach::Clsact => Attachment::Clsact,
        })
    }

    /// What judges packets that arrive. Native XDP makes some drivers set their queues up anew, and a veth's peer
    /// send without segmentation offload, so it is only taken where the interface was named.
    #[must_use]
    pub fn front(&self) -> Front {
        let mut wishes = self.mechanism.iter().rev();
        let wish = wishes.find_map(|wish| match wish {
            Choice::Tc => Some(Front::Tc),
            Choice::Xdp => Some(Front::Xdp),
            _ => None,
        });
        wish.unwrap_or(if self.interfaces.is_empty() {
            Front::Tc
        } else {
            Front::NativeXdp
        })
    }

    /// The interfaces that rules are put on.
    ///
    /// # Errors
    /// An unknown one, with the nearest name.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        interfaces::select(&interfaces::list()?, &self.selection())
    }

    /// Which interfaces rules are put on, those that appear later included.
    #[must_use]
    pub fn selection(&self) -> Selection {
        if self.interfaces.is_empty() {
            Selection::Default
        } else {
            Selection::Names(self.interfaces.clone())
        }
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
    ) -> Result<Option<Aimed>> {
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
        if let Some(container) = container {
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

/// The network namespace of a process. Descendants in others are told of.
fn namespace_of_tree(pid: i32) -> Result<NetworkNamespace> {
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
fn namespace_of_cgroup(cgroup: &Path) -> Result<Option<NetworkNamespace>> {
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
