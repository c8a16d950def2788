//! Observes connections and probes while the command of `fault run` runs, for expectations and reports.

use std::time::Instant;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use super::outcome::Failure;
use super::rules::RuleSet;
use super::subject::Subject;
use crate::inject::injection::PreparedInjection;
use crate::inject::names::LearnedAddresses;
use crate::plan::tables::CgroupScope;
use crate::report::expectations;
use crate::rule::scenario::{Probe, place_of_probe};
use crate::rule::{Protocol, ResolvedTarget, timeline::windows};
use crate::sys::clock::monotonic_ns;
use crate::sys::process::cgroup::{Cgroup, Hierarchy};
use crate::sys::process::user::Identity;
use crate::watch::history::History;
use crate::watch::probe::{self, Probing, Try};
use crate::watch::{Watch, WatchScope};

/// The targets and probes to observe.
pub struct WatchList<'a> {
    targets: Vec<(String, ResolvedTarget)>,
    probes: &'a [Probe],
    identity: Option<Identity>,
}

/// An observation in progress.
pub struct Observer<'a> {
    watch_list: WatchList<'a>,
    watch: Option<Watch>,
    probing: Option<Probing>,
}

/// The result of an observation.
pub struct Observed {
    /// The connections.
    pub history: History,
    /// The tries of each probe while the rules were applied.
    pub tries: Vec<Vec<Try>>,
}

impl<'a> WatchList<'a> {
    /// Collects what the scenario's expectations and a report need. Probes that are commands run as `identity`.
    ///
    /// # Errors
    /// An expectation that can't be checked.
    pub fn new(
        rules: &'a RuleSet,
        reported: bool,
        identity: Option<Identity>,
    ) -> Result<Self, Failure> {
        let mut targets = expectations::targets(&rules.expect, &rules.rules, &rules.targets)
            .map_err(Failure::usage)?;
        if reported {
            for (_, rule) in &rules.rules {
                let known = targets.iter().any(|(name, _)| *name == rule.name);
                let counted =
                    rule.target.protocol != Protocol::Udp && !rule.target.ports.is_empty();
                if !known && counted {
                    targets.push((rule.name.clone(), rule.target.clone()));
                }
            }
        }
        Ok(Self {
            targets,
            probes: &rules.expect.probe,
            identity,
        })
    }

    /// The host names of the targets, whose addresses have to be learned.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let targets = self.targets.iter();
        targets.filter_map(|(_, target)| target.name.clone())
    }

    /// Tries the probes before the run if a fault starts at once. (Otherwise they are tried in the time before it.)
    ///
    /// # Errors
    /// The first probe that fails.
    pub async fn before(&self, rules: &RuleSet) -> Result<()> {
        let at_once = rules.rules.iter().any(|(_, rule)| {
            windows(&rule.modifiers, u64::MAX)
                .next()
                .is_some_and(|(from, _)| from == 0)
        });
        if !at_once {
            return Ok(());
        }
        for (index, probe) in self.probes.iter().enumerate() {
            probe::hold(probe, self.identity.as_ref())
                .await
                .with_context(|| {
                    let place = rules.file.as_deref();
                    let place = place.map(|file| place_of_probe(file, index) + ": ");
                    format!(
                        "{}the probe `{}` fails without any fault, so the run was not started",
                        place.unwrap_or_default(),
                        probe::name(probe)
                    )
                })?;
        }
        Ok(())
    }

    /// Starts to watch the connections of a cgroup, a network namespace, or every process. Must be called before
    /// connections are redirected to a relay. `prepared` learns the addresses of [`WatchList::names`].
    ///
    /// # Errors
    /// A system call fails.
    pub fn watch(
        self,
        subject: &Subject,
        scope: Option<&CgroupScope>,
        prepared: &PreparedInjection,
    ) -> Result<Observer<'a>> {
        let watch = if self.targets.is_empty() {
            None
        } else {
            let learned = prepared.learned_addresses()?;
            Some(watch(subject, scope, &self.targets, learned.as_ref())?)
        };
        Ok(Observer {
            watch_list: self,
            watch,
            probing: None,
        })
    }
}

/// Watches the connections of a cgroup, a network namespace, or every process, to these targets. `learned` has the addresses of
/// their names.
///
/// # Errors
/// As [`Watch::start`].
pub(super) fn watch(
    subject: &Subject,
    scope: Option<&CgroupScope>,
    targets: &[(String, ResolvedTarget)],
    learned: Option<&LearnedAddresses>,
) -> Result<Watch> {
    let hierarchy = Hierarchy::find()?;
    let of_container;
    let (cgroup, netns) = if let Some(scope) = scope {
        (scope.path.as_path(), 0)
    } else if let Some(namespace) = &subject.namespace {
        of_container = match &subject.container {
            Some(container) => own_cgroup(&hierarchy, container.pid)?,
            None => None,
        };
        match &of_container {
            Some(cgroup) => (cgroup.path(), 0),
            None => (hierarchy.path(), namespace.cookie()?),
        }
    } else {
        (hierarchy.path(), 0)
    };
    Watch::start(WatchScope { cgroup, netns }, targets, learned)
}

/// The cgroup of a container, unless fault itself is in it.
fn own_cgroup(hierarchy: &Hierarchy, pid: i32) -> Result<Option<Cgroup>> {
    let cgroup = hierarchy.of(Pid::from_raw(pid))?;
    let ours = hierarchy.of(Pid::this())?;
    Ok((!ours.path().starts_with(cgroup.path())).then_some(cgroup))
}

impl Observer<'_> {
    /// Starts to try the probes, once the rules are applied.
    pub fn probe(&mut self, started: Instant) {
        let WatchList {
            probes, identity, ..
        } = &self.watch_list;
        if !probes.is_empty() {
            self.probing = Some(Probing::start(probes, identity.as_ref(), started));
        }
    }

    /// Ends the observation.
    ///
    /// # Errors
    /// Events were lost.
    pub fn finish(&mut self, epoch_ns: u64) -> Result<Observed> {
        let tries = self.probing.take().map(Probing::finish).unwrap_or_default();
        let end_ns = monotonic_ns();
        let history = match self.watch.take() {
            Some(watch) => watch.finish(epoch_ns, end_ns)?,
            None => History {
                length_ns: end_ns.saturating_sub(epoch_ns),
                targets: Vec::new(),
            },
        };
        Ok(Observed { history, tries })
    }

    /// Tries the probes once all rules are removed.
    pub async fn after_removal(&self) -> Vec<Option<Try>> {
        let mut after_removal = Vec::new();
        for probe in self.watch_list.probes {
            let held = probe::hold(probe, self.watch_list.identity.as_ref()).await;
            after_removal.push(Some(Try {
                at_ns: u64::MAX,
                complaint: held.err().map(|error| format!("{error:#}")),
            }));
        }
        after_removal
    }
}
