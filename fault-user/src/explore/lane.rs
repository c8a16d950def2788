//! Runs a command under one rule set after the other. The programs are loaded and attached once, with rules that match
//! nothing; a rule set is put in their place for each run.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use fault_common::abi::STEERS;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::attempt::Runner;
use super::capture::Capture;
use super::dependency::{Dependency, Sighting, is_own};
use super::names::HostNames;
use super::service::{Kept, RunningService};
use super::verdict::{Observation, RunEnd, retries_without_backoff};
use crate::inject::endpoints::{EndpointUse, Endpoints};
use crate::inject::injection::{Hits, InjectionOptions};
use crate::inject::records::DecisionEvents;
use crate::plan::mechanism::Mechanism;
use crate::relay::{DecisionLog, Decisions, StreamDecision};
use crate::report::record::Decision;
use crate::rule::Protocol;
use crate::session::live::LiveSession;
use crate::session::options::SessionOptions;
use crate::session::outcome::Failure;
use crate::session::rules::RuleSet;
use crate::session::signals::EndSignals;
use crate::session::subject::{Subject, scope_of};
use crate::session::{Loaded, choose_mechanism, plan};
use crate::sys::clock::monotonic_ns;
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::sys::process::command::{CommandSpec, Ended, PreparedCommand, Running};
use crate::sys::process::proc::ProcessId;
use crate::sys::process::sockets::{self, OpenSocket, TcpState};
use crate::sys::process::user::Identity;
use crate::tell::tell;
use crate::watch::history::{Connect, History};

/// A rule that all packets match and that never acts: the programs tell whose each connection is.
const EVERYTHING: &str = "* drop after=1000000000000";
/// Between two looks whether a service is well again.
const PAUSE: Duration = Duration::from_millis(100);
/// How much of the end of the output is kept, in bytes.
const OUTPUT_MAX: u64 = 16 << 10;

/// The commands that are run, and as whom.
#[derive(Debug)]
pub struct Commands {
    /// What is explored.
    pub main: PreparedCommand,
    /// Done before each run.
    pub before: Option<PreparedCommand>,
    /// Done after each run.
    pub after: Option<PreparedCommand>,
    /// Must succeed after each run.
    pub check: Option<PreparedCommand>,
}

impl Commands {
    /// A line for the shell, ready to be run.
    ///
    /// # Errors
    /// There is no shell.
    pub fn shell(
        line: &str,
        identity: Option<Identity>,
        environment: Vec<(OsString, OsString)>,
    ) -> Result<PreparedCommand> {
        let words = ["/bin/sh", "-c", line].map(OsString::from).to_vec();
        Ok(CommandSpec::new(words, identity)?
            .with_environment(environment)
            .resolve()?)
    }
}

/// Where the command runs, and the programs around it. Dropping it takes everything back.
pub struct ExperimentLane<'a> {
    commands: &'a Commands,
    /// The longest that a command beside the explored one may take.
    patience: Duration,
    /// What is counted for each run.
    dependencies: Vec<Dependency>,
    /// What is used without faults, dependency or not.
    usual: Vec<EndpointUse>,
    /// What the rules decide about packets.
    events: DecisionEvents,
    /// What they decide about connections.
    log: Arc<DecisionLog>,
    ends: EndSignals,
    session: LiveSession<'a>,
    cgroup: CommandCgroup,
    /// Whose traffic the rules apply to in the command's place.
    service: Option<RunningService>,
    /// Of `--before`, `--after` and `--check`, which no rule concerns.
    beside: CommandCgroup,
}

/// A rule that never acts. It has the programs and the delay line ready for all others.
pub struct IdleRule {
    rules: RuleSet,
    mechanism: Mechanism,
    seed: u64,
}

impl IdleRule {
    /// Chooses what holds packets.
    ///
    /// # Errors
    /// The machine has nothing to hold packets with.
    pub fn new(options: &SessionOptions, seed: u64) -> Result<Self> {
        let mut rules = RuleSet::of(&["udp:9 delay=1ms first=1 dir=to-client".to_owned()])?;
        let mechanism = choose_mechanism(&mut rules, options)?;
        Ok(Self {
            rules,
            mechanism,
            seed,
        })
    }
}

/// The cgroup that a command runs in.
#[derive(Clone, Copy)]
enum LaneCgroup {
    /// That of the explored command.
    Main,
    /// That of the commands before and after it.
    Beside,
}

/// How a command ended, unless a signal for `fault` came first.
struct Ran {
    end: RunEnd,
    took: Duration,
    /// Remote ends, and how far the connections had come.
    waited_for: Vec<(SocketAddr, &'static str)>,
    left_behind: usize,
    output: String,
}

impl<'a> ExperimentLane<'a> {
    /// Loads and attaches the programs.
    ///
    /// # Errors
    /// The kernel refuses; then nothing has changed.
    pub async fn open(
        commands: &'a Commands,
        options: &'a SessionOptions,
        idle: &'a IdleRule,
        patience: Duration,
        recovery: Duration,
    ) -> Result<Self, Failure> {
        // Before anything is changed: what ends fault from here on takes everything back first.
        let ends = EndSignals::listen()?;
        let subject = Subject::find(options)?;
        let hierarchy = Hierarchy::find()?;
        let cgroup = CommandCgroup::create(&hierarchy, Leftovers::Kill)?;
        let beside = CommandCgroup::create(&hierarchy, Leftovers::Kill)?;
        let service = RunningService::of(options, &subject, recovery)?;
        let scope = match &service {
            Some(_) => subject.scope(),
            None => Some(scope_of(cgroup.cgroup())?),
        };
        let rules = &idle.rules;
        let plan = plan(rules, scope.as_ref(), idle.mechanism, idle.seed)?;
        let log = Arc::<DecisionLog>::default();
        let injection_options = InjectionOptions {
            live: true,
            divides: true,
            events: true,
            streams: Decisions {
                log: Some(Arc::clone(&log)),
                ..Decisions::default()
            },
            ..options.injection_options()
        };
        let mut loaded = Loaded::load(options, rules, subject, scope, plan, injection_options)?;
        loaded.count_endpoints();
        let events = loaded.take_events()?;
        Ok(Self {
            commands,
            patience,
            dependencies: Vec::new(),
            usual: Vec::new(),
            events,
            log,
            ends,
            session: loaded.start_live("fault explore".to_owned()).await?,
            cgroup,
            service,
            beside,
        })
    }

    /// The service that is explored, where it is not the command itself.
    #[must_use]
    pub fn service(&self) -> Option<&RunningService> {
        self.service.as_ref()
    }

    /// From now on connects to these are counted and watched in each run, and what is not `usual` is told. Where they
    /// can't be watched a warning says so.
    pub fn count(&mut self, dependencies: &[Dependency], usual: &[EndpointUse]) {
        self.dependencies = dependencies.to_vec();
        self.usual = usual.to_vec();
        let streams = dependencies.iter().filter(|one| is_stream(one));
        let watched: Vec<_> = streams.map(watching).take(STEERS as usize).collect();
        if watched.is_empty() {
            return;
        }
        let watched = RuleSet::of(&watched).and_then(|rules| self.session.watch(&rules));
        if let Err(error) = watched {
            tell!(
                "fault: warning: there are no timelines, and retries without back-off are not reported: {error:#}"
            );
        }
    }

    /// Adds the addresses that have been learned of the dependencies whose rules name a host.
    fn learn(&mut self) -> Result<()> {
        for learned in self.session.learned()? {
            let named = self.dependencies.iter_mut();
            for one in named.filter(|one| one.host() == Some(&learned.name)) {
                one.addresses.extend(&learned.addresses);
            }
        }
        Ok(())
    }

    /// The connections to each dependency since `epoch_ns`, and the retries without back-off among them.
    fn watched(&mut self, epoch_ns: u64) -> (Vec<Vec<Connect>>, Vec<u64>) {
        let history = match self.session.history(epoch_ns) {
            Ok(history) => history.unwrap_or_default(),
            Err(error) => {
                tell!("fault: warning: retries without back-off are not reported: {error:#}");
                History::default()
            }
        };
        let mut targets = history.targets.into_iter();
        let seen = self.dependencies.iter().map(|one| {
            let seen = is_stream(one).then(|| targets.next()).flatten();
            let seen = seen.unwrap_or_default();
            let retries = retries_without_backoff(&seen.pauses_in_vain_ns());
            (seen.connects, retries)
        });
        seen.unzip()
    }

    /// Takes everything back.
    ///
    /// # Errors
    /// Something can't be taken back.
    pub fn close(self) -> Result<()> {
        self.session.restore()?;
        self.cgroup.finish()?;
        self.beside.finish()?;
        Ok(())
    }

    /// Runs the command under these rules and looks at what it talks to. Nothing when it was interrupted.
    ///
    /// # Errors
    /// As [`Runner::run`], or packets can't be looked at.
    pub async fn observe(
        &mut self,
        rules: &[String],
        limit: Duration,
    ) -> Result<Option<(Observation, Sighting)>> {
        let mut sighting = Sighting::default();
        let seen = self.attempt(rules, limit, Some(&mut sighting)).await?;
        Ok(seen.map(|seen| (seen, sighting)))
    }

    /// Runs the command once, with what comes before and after it. Its conversations are looked at where there is a
    /// `sighting` to be filled in.
    async fn attempt(
        &mut self,
        rules: &[String],
        limit: Duration,
        sighting: Option<&mut Sighting>,
    ) -> Result<Option<Observation>> {
        let commands = self.commands;
        let before = self.session.endpoints()?;
        if self
            .must("--before", commands.before.as_ref())
            .await?
            .is_none()
        {
            return Ok(None);
        }
        if !self.await_recovery().await? {
            return Ok(None);
        }
        let watch = sighting.is_some().then(|| self.watch()).transpose()?;
        let begun_ns = monotonic_ns();
        // Of what was left of the last run.
        self.decisions();
        let main = match sighting {
            Some(_) => {
                let rules = [rules, &[EVERYTHING.to_owned()]].concat();
                self.main(&rules, limit).await?
            }
            None => self.main(rules, limit).await?,
        };
        let conversations = watch
            .map(|(capture, kept)| Ok::<_, anyhow::Error>((capture.finish()?, kept)))
            .transpose()?;
        let Some((ran, hits)) = main else {
            return Ok(None);
        };
        let is_fault = !rules.is_empty();
        self.learn()?;
        let (watched, retries) = self.watched(begun_ns);
        let (decisions, streams) = self.decisions();
        let Some(unrecovered) = self.recovers(is_fault).await? else {
            return Ok(None);
        };
        let after = self.session.endpoints()?;
        let used = since(&before, &after);
        let Some(check) = self.beside(commands.check.as_ref()).await? else {
            return Ok(None);
        };
        if self
            .must("--after", commands.after.as_ref())
            .await?
            .is_none()
        {
            return Ok(None);
        }
        let connects = self.dependencies.iter().map(|one| connects(one, &used));
        let connects = connects.collect();
        let others = self.others(&used);
        if let (Some(sighting), Some((mut flows, kept))) = (sighting, conversations) {
            if let Some(own) = self.session.own_flows()? {
                flows.retain(|flow| own.contains(&flow.key));
            }
            let mut names = HostNames::default();
            for lookup in flows.iter().flat_map(|flow| &flow.lookups) {
                names.learn(lookup);
            }
            *sighting = Sighting {
                endpoints: used,
                unix: after.unix - before.unix,
                flows,
                names,
                kept: Vec::new(),
            };
            kept.complete(sighting);
        }
        Ok(Some(Observation {
            end: ran.end,
            took: ran.took,
            hits: hits.iter().map(|hits| hits.stats.hit_packets).sum(),
            connects,
            reached: reached(&hits, &decisions),
            decisions,
            streams,
            retries,
            watched,
            others,
            output: ran.output,
            waited_for: in_words(&ran.waited_for, &self.dependencies, rules),
            unrecovered,
            broken: (check.end != RunEnd::Exited(0)).then(|| check.why()),
            left_behind: ran.left_behind,
        }))
    }

    /// What the rules that are applied have decided since the last call.
    fn decisions(&mut self) -> (Vec<Decision>, Vec<StreamDecision>) {
        let (mut events, mut streams) = (Vec::new(), Vec::new());
        self.events.drain(&mut events);
        self.log.drain(&mut streams);
        let decisions = events.into_iter().map(Decision::from);
        let numbered = decisions.filter_map(|decision| {
            let rule = self.session.place_of(&decision)?;
            Some(Decision { rule, ..decision })
        });
        (numbered.collect(), streams)
    }

    /// What was connected to, and is no dependency.
    fn others(&self, used: &[EndpointUse]) -> Vec<String> {
        let place = |one: &EndpointUse| (one.protocol, one.address, one.port, one.is_bound);
        let is_usual =
            |one: &&EndpointUse| self.usual.iter().any(|usual| place(usual) == place(one));
        let others = used
            .iter()
            .filter(|one| !one.is_bound && one.protocol == Protocol::Tcp);
        let is_known = |one: &&EndpointUse| {
            let remote = SocketAddr::new(one.address, one.port);
            self.dependencies.iter().any(|known| is_of(known, remote))
        };
        let others = others.filter(|one| !is_usual(one) && !is_known(one) && !is_own(one, used));
        others
            .map(|one| format!("tcp:{}", SocketAddr::new(one.address, one.port)))
            .collect()
    }

    /// Begins to look at packets, also at those of connections that a service has open.
    fn watch(&self) -> Result<(Capture, Kept)> {
        let Some(service) = &self.service else {
            return Ok((Capture::start(HashSet::new())?, Kept::default()));
        };
        let kept = service.kept()?;
        let open = kept.connections.iter();
        let open = open.map(|(_, client, server)| (*client, *server)).collect();
        let capture = service.inside(|| Capture::start(open))?;
        Ok((capture, kept))
    }

    /// Waits for a service that was not well after the last fault. Whether no interruption came.
    ///
    /// # Errors
    /// It is not well in time.
    async fn await_recovery(&mut self) -> Result<bool> {
        if !self.service.as_ref().is_some_and(|service| service.is_ill) {
            return Ok(true);
        }
        match self.recovers(true).await? {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(why)) => anyhow::bail!(
                "the service has not recovered from the last fault ({why}): restart it, and continue with --resume"
            ),
        }
    }

    /// Without rules, runs the command until it succeeds. Why it did not in time; nothing when it was interrupted.
    async fn recovers(&mut self, is_fault: bool) -> Result<Option<Option<String>>> {
        let service = self.service.as_ref().filter(|_| is_fault);
        let Some(service) = service else {
            return Ok(Some(None));
        };
        let deadline = Instant::now() + service.recovery;
        // Sockets that are made meanwhile are the service's for the rules to come, too.
        let applied = self.session.apply(RuleSet::of(&[EVERYTHING.to_owned()])?);
        applied.await.map_err(|failure| failure.error)?;
        let why = loop {
            let output = buffer()?;
            let commands = self.commands;
            let waiting = commands
                .main
                .begin_writing(Some(&self.cgroup), Some(&output))?;
            let limit = deadline
                .saturating_duration_since(Instant::now())
                .max(PAUSE);
            let ran = self
                .wait(waiting.go()?, LaneCgroup::Main, limit, &output)
                .await?;
            let Some(ran) = ran else {
                return Ok(None);
            };
            if ran.end == RunEnd::Exited(0) {
                break None;
            }
            if Instant::now() + PAUSE >= deadline {
                break Some(ran.why());
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = self.ends.come() => return Ok(None),
            }
        };
        if let Some(service) = &mut self.service {
            service.is_ill = why.is_some();
        }
        Ok(Some(why))
    }

    /// Runs the command under these rules.
    async fn main(
        &mut self,
        rules: &[String],
        limit: Duration,
    ) -> Result<Option<(Ran, Vec<Hits>)>> {
        let commands = self.commands;
        let output = buffer()?;
        let waiting = commands
            .main
            .begin_writing(Some(&self.cgroup), Some(&output))?;
        let applied = self.session.apply(RuleSet::of(rules)?).await;
        applied.map_err(|failure| failure.error)?;
        let running = waiting.go()?;
        let ran = self.wait(running, LaneCgroup::Main, limit, &output).await?;
        let hits = self.session.hits()?;
        self.session.stop_streams().await?;
        Ok(ran.map(|ran| (ran, hits)))
    }

    /// Runs a command beside the explored one; nothing when it was interrupted.
    async fn beside(&mut self, command: Option<&PreparedCommand>) -> Result<Option<Ran>> {
        let Some(command) = command else {
            let (end, took) = (RunEnd::Exited(0), Duration::ZERO);
            return Ok(Some(Ran {
                end,
                took,
                waited_for: Vec::new(),
                left_behind: 0,
                output: String::new(),
            }));
        };
        let output = buffer()?;
        let running = command
            .begin_writing(Some(&self.beside), Some(&output))?
            .go()?;
        self.wait(running, LaneCgroup::Beside, self.patience, &output)
            .await
    }

    /// Waits for a command, kills it at the limit, and whatever it has left behind. Nothing when a signal came.
    async fn wait(
        &mut self,
        mut running: Running,
        place: LaneCgroup,
        limit: Duration,
        output: &File,
    ) -> Result<Option<Ran>> {
        let cgroup = match place {
            LaneCgroup::Main => &self.cgroup,
            LaneCgroup::Beside => &self.beside,
        };
        let started = Instant::now();
        let ended = tokio::select! {
            ended = tokio::time::timeout(limit, running.wait()) => ended,
            () = self.ends.come() => {
                cgroup.empty()?;
                return Ok(None);
            }
            served = self.session.serve() => {
                cgroup.empty()?;
                return served.map(|()| None);
            }
        };
        let took = started.elapsed();
        let (end, waited_for) = match ended {
            Ok(ended) => match ended? {
                Ended::Exited(code) => (RunEnd::Exited(code), Vec::new()),
                Ended::Signalled(signal) => (RunEnd::Signalled(signal), Vec::new()),
            },
            Err(_) => (RunEnd::TimedOut, self.open_connections(cgroup)?),
        };
        let left_behind = cgroup.empty()?;
        if end == RunEnd::TimedOut {
            running.wait().await?;
        }
        // A signal for the command alone would have ended fault without it.
        if running.signals().last().is_some_and(ends_fault) {
            return Ok(None);
        }
        Ok(Some(Ran {
            left_behind: if end == RunEnd::TimedOut {
                0
            } else {
                left_behind
            },
            output: last_of(output)?,
            end,
            took,
            waited_for,
        }))
    }

    /// The connections that the command has open, or the service to its dependencies.
    fn open_connections(&self, cgroup: &CommandCgroup) -> Result<Vec<(SocketAddr, &'static str)>> {
        if let Some(service) = &self.service {
            let mut open = in_states(&service.sockets()?);
            open.retain(|(remote, _)| self.dependencies.iter().any(|one| is_of(one, *remote)));
            return Ok(open);
        }
        let mut processes = Vec::new();
        for pid in cgroup.cgroup().processes()? {
            processes.extend(ProcessId::of(pid)?);
        }
        Ok(in_states(&sockets::of_processes(&processes)?))
    }

    /// Runs what comes before or after; an error when that fails.
    async fn must(
        &mut self,
        option: &str,
        command: Option<&PreparedCommand>,
    ) -> Result<Option<()>> {
        let ran = self.beside(command).await?;
        match ran {
            Some(ran) if ran.end != RunEnd::Exited(0) => {
                anyhow::bail!("{option} failed: {}", ran.why())
            }
            ran => Ok(ran.map(|_| ())),
        }
    }
}

impl Runner for ExperimentLane<'_> {
    async fn run(&mut self, rules: &[String], limit: Duration) -> Result<Option<Observation>> {
        self.attempt(rules, limit, None).await
    }
}

impl Ran {
    /// Why it is no success.
    fn why(&self) -> String {
        let end = match self.end {
            RunEnd::Exited(code) => format!("exit code {code}"),
            RunEnd::Signalled(signal) => format!("signal {signal}"),
            RunEnd::TimedOut => "it took too long".to_owned(),
        };
        match self
            .output
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
        {
            Some(line) => format!("{end}: {}", line.trim()),
            None => end,
        }
    }
}

fn ends_fault(signal: nix::sys::signal::Signal) -> bool {
    use nix::sys::signal::Signal;
    matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP)
}

/// Whether it is used by connections, which are watched.
fn is_stream(dependency: &Dependency) -> bool {
    dependency.protocol == Protocol::Tcp
}

/// A rule that never acts, whose target is watched.
fn watching(dependency: &Dependency) -> String {
    EVERYTHING.replacen('*', &dependency.target, 1)
}

/// The ordinals of the connections that were hit. The relay does not record them: it begins with the first one.
fn reached(hits: &[Hits], decisions: &[Decision]) -> BTreeSet<u32> {
    let mut reached: BTreeSet<u32> = decisions.iter().map(|one| one.connection).collect();
    if reached.is_empty() {
        let counts = hits.iter();
        let counts = counts.map(|hits| hits.stats.hit_packets.min(hits.connections));
        let most = counts.max().unwrap_or(0);
        reached.extend(1..=u32::try_from(most).unwrap_or(u32::MAX));
    }
    reached
}

/// What was used between two looks.
fn since(before: &Endpoints, after: &Endpoints) -> Vec<EndpointUse> {
    let is_same = |a: &EndpointUse, b: &EndpointUse| {
        EndpointUse { times: 0, ..*a } == EndpointUse { times: 0, ..*b }
    };
    let used = after.known.iter().map(|one| {
        let known = before.known.iter().find(|other| is_same(one, other));
        let times = one.times - known.map_or(0, |other| other.times);
        EndpointUse { times, ..*one }
    });
    used.filter(|one| one.times != 0).collect()
}

/// How often a dependency was connected or sent to.
fn connects(dependency: &Dependency, used: &[EndpointUse]) -> u64 {
    let own = used.iter().filter(|one| {
        !one.is_bound
            && (one.protocol, one.port) == (dependency.protocol, dependency.port)
            && dependency.addresses.contains(&one.address)
    });
    own.map(|one| one.times).sum()
}

/// The remote ends of TCP connections, and how far these have come.
fn in_states(sockets: &[OpenSocket]) -> Vec<(SocketAddr, &'static str)> {
    let mut open = Vec::new();
    for socket in sockets {
        let state = match socket.state {
            TcpState::SynSent => "connecting",
            TcpState::Established => "connected",
            TcpState::CloseWait => "closed by the server",
            _ => continue,
        };
        if let Some(remote) = socket
            .remote
            .filter(|_| socket.protocol == sockets::Transport::Tcp)
        {
            open.push((remote, state));
        }
    }
    open
}

/// Whether a connection goes to a dependency.
fn is_of(dependency: &Dependency, remote: SocketAddr) -> bool {
    is_stream(dependency)
        && dependency.port == remote.port()
        && dependency.addresses.contains(&remote.ip())
}

/// Connections by the dependencies that they go to. What goes to none goes to the relay, for the target of the rules.
fn in_words(
    open: &[(SocketAddr, &'static str)],
    dependencies: &[Dependency],
    rules: &[String],
) -> Vec<String> {
    let lines = open.iter().map(|(remote, state)| {
        let known = dependencies.iter().find(|one| is_of(one, *remote));
        let target = match (known, rules.first()) {
            (Some(one), _) => one.target.clone(),
            (None, Some(rule)) if remote.ip().is_loopback() => {
                rule.split(' ').next().unwrap_or_default().to_owned()
            }
            (None, _) => format!("tcp:{remote}"),
        };
        format!("{target} ({state})")
    });
    let lines: BTreeSet<_> = lines.collect();
    lines.into_iter().collect()
}

/// A file in memory for what a command writes.
fn buffer() -> Result<File> {
    let file = memfd_create("fault-output", MFdFlags::MFD_CLOEXEC);
    file.map(File::from).context("no memory for the output")
}

/// The end of what was written.
fn last_of(mut output: &File) -> Result<String> {
    let length = output.metadata()?.len();
    output.seek(SeekFrom::Start(length.saturating_sub(OUTPUT_MAX)))?;
    let mut bytes = Vec::new();
    output.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
