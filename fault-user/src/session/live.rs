//! A session whose rules, stream rules too, are replaced while the programs stay attached.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fault_common::flow::FlowKey;

use super::observe;
use super::outcome::Failure;
use super::rules::RuleSet;
use super::{Loaded, Session, Task, choose_mechanism, plan};
use crate::inject::endpoints::Endpoints;
use crate::inject::injection::Hits;
use crate::inject::injector::Marker;
use crate::inject::names::LearnedName;
use crate::inject::services::Room;
use crate::plan::PlannedRule;
use crate::plan::tables::CgroupScope;
use crate::relay::exchange::Exchange;
use crate::report::record::Decision;
use crate::steer::Redirection;
use crate::sys::clock::monotonic_ns;
use crate::watch::Watch;
use crate::watch::history::History;

/// A session that began with rules without streams, and takes any others.
pub struct LiveSession<'a> {
    session: Session<'a>,
    scope: Option<CgroupScope>,
    marker: Option<Marker>,
    exchange: Option<Arc<Exchange>>,
    /// Attached for the first stream rule, and kept.
    redirection: Option<Redirection>,
    /// What the sockets do, where that is watched.
    watch: Option<Watch>,
    /// The host names of the watched targets. Their addresses are learned under all rules.
    watched_names: BTreeSet<String>,
}

impl<'a> Loaded<'a> {
    /// As [`Loaded::start`], for rules that are replaced. The first ones must have no stream rules.
    ///
    /// # Errors
    /// A system call fails.
    pub async fn start_live(mut self, title: String) -> Result<LiveSession<'a>> {
        let scope = self.scope.clone();
        let marker = scope.as_ref().map(|scope| self.prepared.marker(scope));
        let marker = marker.transpose()?;
        let exchange = self.prepared.exchange();
        Ok(LiveSession {
            session: self.start(title, false).await?,
            scope,
            marker,
            exchange,
            redirection: None,
            watch: None,
            watched_names: BTreeSet::new(),
        })
    }
}

impl LiveSession<'_> {
    /// Puts rules in the place of those that are applied. They begin anew, also those that are the same.
    ///
    /// # Errors
    /// A rule is unsupported, or a system call fails.
    pub async fn apply(&mut self, mut rules: RuleSet) -> Result<(), Failure> {
        self.stop_streams().await?;
        let session = &mut self.session;
        let mechanism = choose_mechanism(&mut rules, session.options)?;
        let seed = session.plan.seed;
        let mut next = plan(&rules, self.scope.as_ref(), mechanism, seed)?;
        let subject = &session.subject;
        subject.leave_tcp_if_need_be(session.options, &mut next, self.scope.as_ref());
        next.learn(self.watched_names.iter().cloned(), self.scope.as_ref());
        session.injection.replace_anew(&session.plan, &mut next)?;
        session.plan = next;
        let hits = session.injection.hits(&session.plan)?;
        session.control.forget(&rules, &session.plan, &hits);
        Ok(self.start_streams().await?)
    }

    async fn start_streams(&mut self) -> Result<()> {
        let rules = self.session.plan.relay_rules();
        if rules.is_empty() {
            return Ok(());
        }
        let subject = &self.session.subject;
        let redirection = if let Some(redirection) = self.redirection.take() {
            redirection
        } else {
            let marker = self.marker.clone();
            subject.redirect(
                self.scope.as_ref(),
                marker,
                self.exchange.clone(),
                Room::LATER,
            )?
        };
        let redirection = self.redirection.insert(redirection);
        let (seed, namespace) = (self.session.plan.seed, subject.namespace.as_ref());
        let learned = self.session.injection.learned_addresses()?;
        let draws = (seed, &self.session.injection_options.streams);
        let steering = redirection.steer(&rules, draws, namespace, learned).await?;
        self.session.steering = Some(steering);
        Ok(())
    }

    /// Ends the stream rules, and closes the connections that went through the relay.
    ///
    /// # Errors
    /// A relay can't be stopped.
    pub async fn stop_streams(&mut self) -> Result<()> {
        match self.session.steering.take() {
            Some(steering) => steering.stop().await,
            None => Ok(()),
        }
    }

    /// Serves `fault top` and follows the container, forever. Cancel safe between tasks.
    ///
    /// # Errors
    /// The container has ended, or a system call fails.
    pub async fn serve(&mut self) -> Result<()> {
        loop {
            let task: Task = self.session.next().await?;
            if !self.session.handle(task).await? {
                anyhow::bail!("the container has ended");
            }
        }
    }

    /// The hits of all rules.
    ///
    /// # Errors
    /// The kernel's counters can't be read.
    pub fn hits(&self) -> Result<Vec<Hits>> {
        self.session.hits()
    }

    /// The number of the rule that made a decision, counted from 1. Nothing for one that is not applied any more.
    #[must_use]
    pub fn place_of(&self, decision: &Decision) -> Option<u32> {
        let mut rules = (1..).zip(&self.session.plan.rules);
        let state = decision.rule.checked_sub(1)?;
        let is_its = |rule: &PlannedRule| rule.entries.iter().any(|one| one.entry.state == state);
        let found = rules.find(|(_, rule)| is_its(rule));
        found.map(|(place, _)| place)
    }

    /// The endpoints that were used so far.
    ///
    /// # Errors
    /// They can't be counted.
    pub fn endpoints(&self) -> Result<Endpoints> {
        let endpoints = self.session.injection.endpoints()?;
        endpoints.context(
            "what the command connects to can't be counted: it needs cgroup2 and Linux 5.8",
        )
    }

    /// From now on watches the connections to the targets of these rules, in place of those that were watched so far.
    /// There must be no stream rules.
    ///
    /// # Errors
    /// A target can't be watched, or a system call fails.
    pub fn watch(&mut self, rules: &RuleSet) -> Result<()> {
        // What redirects connections comes after what watches them.
        (self.watch, self.redirection) = (None, None);
        let targets: Vec<_> = rules
            .named_targets()
            .map(|(name, target)| (name.to_owned(), target.clone()))
            .collect();
        let names = targets.iter().filter_map(|(_, target)| target.name.clone());
        self.watched_names = names.collect();
        let Session {
            subject, injection, ..
        } = &self.session;
        let learned = injection.addresses_of(&self.watched_names)?;
        let scope = self.scope.as_ref();
        self.watch = Some(observe::watch(subject, scope, &targets, learned.as_ref())?);
        Ok(())
    }

    /// What has been learned so far about the host names of rules and watched targets.
    ///
    /// # Errors
    /// It can't be read.
    pub fn learned(&self) -> Result<Vec<LearnedName>> {
        self.session.injection.learned()
    }

    /// What the watched connections did since the last call. Times count from `epoch_ns` of `CLOCK_MONOTONIC`. Nothing
    /// where none are watched.
    ///
    /// # Errors
    /// Events were lost.
    pub fn history(&mut self, epoch_ns: u64) -> Result<Option<History>> {
        let watch = self.watch.as_mut();
        watch
            .map(|watch| watch.take(epoch_ns, monotonic_ns()))
            .transpose()
    }

    /// The connections of the scope, among those that a rule so far could concern by its ports. Nothing where the rules
    /// apply to a whole network namespace: then all are.
    ///
    /// # Errors
    /// They can't be read.
    pub fn own_flows(&self) -> Result<Option<HashSet<FlowKey>>> {
        let scope = self.scope.as_ref();
        scope
            .map(|_| self.session.injection.flows_in_scope())
            .transpose()
    }

    /// Restores everything.
    ///
    /// # Errors
    /// Something can't be restored.
    pub fn restore(self) -> Result<()> {
        drop((self.redirection, self.watch));
        self.session.restore()
    }
}
