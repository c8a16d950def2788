//! A session: one run from its plan to its summary. Shared by `run`, `inject` and `replay`.
//!
//! [`Loaded`] holds the attached programs without rules; a [`Session`] has its rules applied. Dropping a session
//! restores everything.

pub mod control;
pub mod files;
pub mod follow;
pub mod inject;
pub mod live;
pub mod machine;
pub mod observe;
pub mod options;
pub mod outcome;
pub mod rules;
pub mod run;
pub mod signals;
pub mod standing;
pub mod subject;
pub mod totals;
pub mod tree;
pub mod windows;

use std::time::Duration;

use anyhow::{Context as _, Result};
use fault_common::abi::Counter;
use nix::unistd::Uid;

use self::control::{ControlEvent, ControlSocket};
use self::follow::{ContainerEvent, Follower, Relocation};
use self::machine::ThisMachine;
use self::observe::{Observer, WatchList};
use self::options::SessionOptions;
use self::outcome::Failure;
use self::rules::RuleSet;
use self::signals::EndSignals;
use self::subject::Subject;
use self::windows::Windows;
use crate::inject::injection::{Hits, Injection, InjectionOptions, PreparedInjection};
use crate::inject::records::DecisionEvents;
use crate::plan::mechanism::{Mechanism, choose};
use crate::plan::tables::CgroupScope;
use crate::plan::{Plan, guard_host};
use crate::relay::Cut;
use crate::report::fold::Folded;
use crate::report::summary::{self, Audience};
use crate::rule::Layer;
use crate::steer::Steering;
use crate::sys::preflight::{Need, preflight};
use crate::sys::process::caller;
use crate::sys::process::capabilities::Capability;
use crate::tell::tell;

/// Checks the requirements before anything is changed. Without root, restarts the program with sudo.
///
/// # Errors
/// The unmet requirements, one line each.
pub fn require(needs: &[Need]) -> Result<()> {
    if !Uid::effective().is_root() && preflight(needs).is_err() {
        caller::go_through_sudo();
    }
    Ok(preflight(needs)?)
}

/// Rejects rules for the whole host that would cut SSH or the control API, unless `options` allow them.
///
/// # Errors
/// The first such rule.
pub fn guard(rules: &RuleSet, options: &SessionOptions) -> Result<(), Failure> {
    if options.force {
        return Ok(());
    }
    guard_host(&rules.rules, None).map_err(Failure::usage)
}

/// Chooses the mechanism that holds packets: the one in `options`, or one that this machine supports. May turn rules
/// into stream rules.
///
/// # Errors
/// As [`choose`].
pub fn choose_mechanism(rules: &mut RuleSet, options: &SessionOptions) -> Result<Mechanism> {
    choose(options.mechanism, &mut rules.rules, &ThisMachine)
}

/// Plans a rule set.
///
/// # Errors
/// A rule is unsupported, or no seed can be drawn.
pub fn plan(
    rules: &RuleSet,
    scope: Option<&CgroupScope>,
    mechanism: Mechanism,
    seed: u64,
) -> Result<Plan, Failure> {
    let mut plan = Plan::new(&rules.rules, seed, scope, rules.length_ns).map_err(Failure::usage)?;
    plan.hold_by(mechanism);
    Ok(plan)
}

/// Creates a runtime with one thread.
///
/// # Errors
/// A system call fails.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// Warns of host names without an address, and of those in exclusions, whose later addresses are not learned.
fn warn_of_names(plan: &Plan) {
    for name in plan.unknown_names() {
        tell!(
            "fault: warning: {name} has no address yet: its rules match from the first DNS response that has one"
        );
    }
    for rule in &plan.rules {
        for name in &rule.resolved.fixed_names {
            tell!(
                "fault: warning: `{}` uses the addresses that {name} has now, not later ones",
                rule.text
            );
        }
    }
}

/// Attached programs whose rules are not applied yet.
pub struct Loaded<'a> {
    options: &'a SessionOptions,
    rules: &'a RuleSet,
    injection_options: InjectionOptions,
    plan: Plan,
    scope: Option<CgroupScope>,
    // Declared first: the programs are dropped before the subject.
    prepared: PreparedInjection,
    /// The traffic that the rules apply to.
    pub subject: Subject,
}

impl<'a> Loaded<'a> {
    /// Loads and attaches the programs of a plan.
    ///
    /// # Errors
    /// A system call fails; then nothing is changed.
    pub fn load(
        options: &'a SessionOptions,
        rules: &'a RuleSet,
        mut subject: Subject,
        scope: Option<CgroupScope>,
        mut plan: Plan,
        injection_options: InjectionOptions,
    ) -> Result<Self> {
        if injection_options.live {
            // The relay's rules are not replaced together with those of the programs.
            plan.leave_tcp();
        }
        subject.leave_tcp_if_need_be(options, &mut plan, scope.as_ref());
        let mut prepared = subject.load(&plan, options, &injection_options)?;
        if let Some(scope) = &scope {
            prepared.watch(scope)?;
        }
        subject.adopt(&mut prepared)?;
        warn_of_names(&plan);
        Ok(Self {
            options,
            rules,
            injection_options,
            plan,
            scope,
            prepared,
            subject,
        })
    }

    /// The cgroup that the rules are limited to.
    #[must_use]
    pub fn scope(&self) -> Option<&CgroupScope> {
        self.scope.as_ref()
    }

    /// The events of decisions that fire.
    ///
    /// # Errors
    /// Events were not requested.
    pub fn take_events(&mut self) -> Result<DecisionEvents> {
        self.prepared.take_events()
    }

    /// Starts to observe connections; before the rules are applied.
    ///
    /// # Errors
    /// A system call fails.
    pub fn watch<'b>(&self, list: WatchList<'b>) -> Result<Observer<'b>> {
        list.watch(&self.subject, self.scope(), &self.prepared)
    }

    /// Counts the endpoints that processes connect to, to explain rules that never match.
    pub fn count_endpoints(&mut self) {
        self.subject
            .count_endpoints(self.scope.as_ref(), &mut self.prepared);
    }

    /// Applies the rules. `title` is shown by `fault top`. With `have_windows`, rules are loaded around their windows.
    ///
    /// # Errors
    /// A system call fails.
    pub async fn start(mut self, title: String, have_windows: bool) -> Result<Session<'a>> {
        let scope = self.scope.as_ref();
        let steered = self
            .subject
            .steer(
                self.options,
                &self.plan,
                scope,
                &mut self.prepared,
                &self.injection_options.streams,
            )
            .await;
        let steering = match steered {
            Err(error) if self.plan.stream_rules().is_empty() => {
                tell!("fault: warning: DNS queries over TCP are not answered: {error:#}");
                self.plan.leave_tcp();
                None
            }
            steered => steered?,
        };
        let follower = Follower::of(self.options, &self.subject)?;
        let sockets = self.subject.sockets(self.options, scope, self.rules);
        let mut injection = self.prepared.start()?;
        let started = injection.started();
        let windows = if have_windows {
            self.rules.windows(started)
        } else {
            Windows::none(started)
        };
        let mut control = ControlSocket::open(title, windows, sockets);
        control.begin(&mut injection, &self.plan)?;
        Ok(Session {
            who: self.subject.who(scope),
            options: self.options,
            rules: self.rules,
            injection_options: self.injection_options,
            subject: self.subject,
            plan: self.plan,
            injection,
            steering,
            control,
            follower,
        })
    }
}

/// A task of a session.
pub enum Task {
    /// An event of the control socket or of the rules' windows.
    Control(ControlEvent),
    /// The container has ended or restarted.
    Container(ContainerEvent),
}

/// A session with its rules applied.
pub struct Session<'a> {
    options: &'a SessionOptions,
    rules: &'a RuleSet,
    injection_options: InjectionOptions,
    /// The applied plan.
    pub plan: Plan,
    // Fields are dropped in this order: the programs first, the subject last.
    /// The attached programs.
    pub injection: Injection,
    /// The redirection to the relay.
    pub steering: Option<Steering>,
    /// The traffic that the rules apply to.
    subject: Subject,
    /// A name for the subject in messages.
    who: &'static str,
    /// The control socket for `fault top`.
    pub control: ControlSocket,
    follower: Option<Follower>,
}

impl Session<'_> {
    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &RuleSet {
        self.rules
    }

    /// Waits for the next task. Cancel safe.
    ///
    /// # Errors
    /// The container can't be watched.
    pub async fn next(&mut self) -> Result<Task> {
        tokio::select! {
            event = self.control.next() => Ok(Task::Control(event)),
            turn = Follower::next(&mut self.follower) => Ok(Task::Container(turn?)),
        }
    }

    /// Handles a task. Returns whether the session continues: it ends with its container, unless it follows it.
    ///
    /// # Errors
    /// A system call fails.
    pub async fn handle(&mut self, task: Task) -> Result<bool> {
        match task {
            Task::Control(event) => {
                let steering = self.steering.as_ref();
                self.control
                    .handle(event, &mut self.injection, &self.plan, steering)
                    .await?;
                Ok(true)
            }
            Task::Container(turn) => {
                let Some(follower) = &mut self.follower else {
                    return Ok(true);
                };
                follower.take(
                    turn,
                    Relocation {
                        options: self.options,
                        rules: self.rules,
                        off: &self.control.left_out(),
                        injection_options: &self.injection_options,
                        subject: &mut self.subject,
                        plan: &mut self.plan,
                        injection: &mut self.injection,
                    },
                );
                Ok(follower.follows)
            }
        }
    }

    /// The capabilities that the session still needs.
    #[must_use]
    pub fn rights(&self) -> Vec<Capability> {
        self.subject
            .rights(self.options, &self.injection, self.steering.as_ref())
    }

    /// The cgroup that the rules are limited to now, if it was selected.
    #[must_use]
    pub fn scope(&self) -> Option<CgroupScope> {
        self.subject.scope()
    }

    /// The hits of all rules.
    ///
    /// # Errors
    /// The kernel's counters can't be read.
    pub fn hits(&self) -> Result<Vec<Hits>> {
        control::hits(&self.injection, &self.plan, self.steering.as_ref())
    }

    /// Ends stream rules. Data in transit is delivered, or its connections are reset and counted in a message. Another
    /// signal resets all of them at once.
    ///
    /// # Errors
    /// Signals can't be handled.
    pub async fn drain(&self) -> Result<()> {
        let Some(steering) = &self.steering else {
            return Ok(());
        };
        let mut ends = EndSignals::listen()?;
        let packets = self
            .rules
            .rules
            .iter()
            .filter(|(_, rule)| rule.fault.layer() == Layer::Packet);
        let held_ns = packets.map(|(_, rule)| rule.fault.held_ns());
        let transit = Duration::from_nanos(held_ns.max().unwrap_or(0));
        let cut = steering
            .finish(self.options.drain, transit, ends.come())
            .await;
        if cut != Cut::default() {
            tell!(
                "fault: {} connections were still open and were reset; {} of their bytes were not delivered",
                cut.connections,
                cut.bytes
            );
        }
        Ok(())
    }

    /// Prints the summary. Returns the rules that should have fired but never did. A drawn fault may have no traffic, or
    /// start after the end: of all rules together at least one must have fired then.
    ///
    /// # Errors
    /// The kernel's counters can't be read.
    pub fn summarize(&self, hits: &[Hits]) -> Result<Vec<Unfired>> {
        let counters = self.counters()?;
        let folded = self.rules.folded(&self.plan);
        let table = summary::table(&self.plan, &folded, hits, &self.injection, &counters);
        tell!("{}", table.trim_end());
        let names = self.injection.learned()?;
        for shared in summary::shared_addresses(&self.plan, &names) {
            tell!("fault: warning: {shared}");
        }
        let endpoints = self.injection.endpoints()?;
        let audience = Audience {
            who: self.who,
            endpoints: endpoints.as_ref(),
            names: &names,
            failed: counters[Counter::ActionFailed as usize],
            has_bridge: self.injection.has_bridge(),
        };
        let has_fired = |index: &usize| hits[*index].stats.hit_packets != 0;
        let any_fired = (0..hits.len()).any(|index| has_fired(&index));
        let is_accepted = |line: &Folded| line.is_drawn && any_fired;
        let unfired = folded
            .into_iter()
            .filter(|line| !line.members.iter().any(has_fired) && !is_accepted(line));
        Ok(unfired
            .map(|line| Unfired {
                why: summary::why_unfired(&self.plan, hits, line.members[0], &audience),
                rule: line.to_string(),
                members: line.members,
            })
            .collect())
    }

    /// The programs' counters. What was lost of the decisions of stream rules counts as lost events.
    ///
    /// # Errors
    /// They can't be read.
    pub fn counters(&self) -> Result<Vec<u64>> {
        let mut counters = self.injection.counters()?;
        let log = self.injection_options.streams.log.as_ref();
        counters[Counter::EventLost as usize] += log.map_or(0, |log| log.lost());
        Ok(counters)
    }

    /// Stops the rules; their counters stay.
    pub fn rest(&mut self) {
        self.steering = None;
        self.injection.rest();
    }

    /// Restores everything.
    ///
    /// # Errors
    /// Something can't be restored.
    pub fn restore(self) -> Result<()> {
        drop(self.steering);
        self.injection.remove()?;
        drop(self.subject);
        Ok(())
    }
}

/// A rule that never fired, or all faults that were drawn from one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfired {
    /// The rule.
    pub rule: String,
    /// The most likely reason.
    pub why: String,
    /// The indexes of the rules.
    pub members: Vec<usize>,
}

/// Prints which rules never fired, and why. With `allowed`, that is accepted.
pub fn tell_unfired(unfired: &[Unfired], allowed: bool) {
    let accepted = if allowed { " (accepted)" } else { "" };
    for Unfired { rule, why, .. } in unfired {
        tell!("fault: the rule `{rule}` never fired{accepted}: {why}");
    }
}

/// Formats a number of rules.
#[must_use]
pub fn many(rules: usize) -> String {
    match rules {
        1 => "1 rule".to_owned(),
        rules => format!("{rules} rules"),
    }
}
