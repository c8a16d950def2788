//! The control socket, on which a running `fault run` or `fault inject` serves `fault top`.
//!
//! It is an abstract Unix socket: it disappears with the process and belongs to its network namespace. Only the
//! process's own user and root get answers. Each line received is a [`Request`], each line sent a [`Snapshot`] or a
//! [`Rejection`].

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::inject::injection::{Hits, Injection};
use crate::plan::Plan;
use crate::steer::Steering;
use crate::tell::tell;

use super::rules::RuleSet;
pub use super::totals::TargetLine;
use super::totals::TargetTotals;
use super::windows::Windows;
use crate::watch::open::Sockets;

/// Prefix of the socket's name; the process id follows.
pub const NAME: &str = "fault-top-";

/// Maximum length of a request.
const LINE_BYTES: u64 = 4096;

/// A request to an instance.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// A rule to turn off or on before the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
}

/// A rule to turn off or on.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// The index of the rule, from 0.
    pub rule: usize,
    /// The rule that must be there: rules may have been replaced since the client looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Whether to turn it on.
    pub on: bool,
}

/// The state of an instance.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Snapshot {
    /// Its command line, such as `fault run -- pytest`.
    pub title: String,
    /// Its random seed.
    pub seed: Option<u64>,
    /// Time since the rules were applied, in milliseconds.
    pub elapsed_ms: u64,
    /// Its rules, or a daemon's toxics.
    pub rules: Vec<RuleLine>,
    /// Its targets, or a daemon's proxies.
    pub targets: Vec<TargetLine>,
}

/// The state of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct RuleLine {
    /// The rule.
    pub rule: String,
    /// The rule's target.
    pub target: String,
    /// The mechanism.
    pub by: String,
    /// Whether it is turned on.
    pub on: bool,
    /// The number of matched packets, or connections for a stream rule.
    pub seen: u64,
    /// The number of hits.
    pub hits: u64,
    /// The number of matched connections.
    pub connections: u64,
}

/// The reason for rejecting a request.
#[derive(Debug, Deserialize, Serialize)]
pub struct Rejection {
    /// One line.
    pub error: String,
}

/// A request and the channel for its answer.
pub struct PendingRequest {
    request: Request,
    answer: oneshot::Sender<String>,
}

/// The control socket of this process.
pub struct ControlSocket {
    asked: mpsc::Receiver<PendingRequest>,
    /// The indexes of the rules that are turned off.
    off: BTreeSet<usize>,
    windows: Windows,
    /// Counts open connections, if available.
    sockets: Option<Sockets>,
    title: String,
    /// The traffic of the targets.
    totals: TargetTotals,
}

/// An event to handle.
pub enum ControlEvent {
    /// A client sent a request.
    Asked(PendingRequest),
    /// The window of a rule opens or closes soon.
    WindowDue,
}

impl ControlSocket {
    /// Starts listening. Must be called within a runtime. A failure only disables `fault top`.
    #[must_use]
    pub fn open(title: String, windows: Windows, sockets: Option<Sockets>) -> Self {
        let (sender, asked) = mpsc::channel(1);
        match listen() {
            Ok(listener) => {
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(serve(stream, sender.clone()));
                    }
                });
            }
            // Another session of this process has it.
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                log::info!("`fault top` shows another session");
            }
            Err(error) => log::warn!("`fault top` can't show this instance: {error}"),
        }
        Self {
            asked,
            off: BTreeSet::new(),
            windows,
            sockets,
            title,
            totals: TargetTotals::default(),
        }
    }

    /// Waits for the next event.
    pub async fn next(&mut self) -> ControlEvent {
        tokio::select! {
            Some(asked) = self.asked.recv() => ControlEvent::Asked(asked),
            () = self.windows.wait() => ControlEvent::WindowDue,
            else => std::future::pending().await,
        }
    }

    /// Resets the state after the rules were replaced by those of `plan`: all rules are on.
    pub fn forget(&mut self, rules: &RuleSet, plan: &Plan, hits: &[Hits]) {
        self.off.clear();
        self.totals.restart(plan, hits);
        if let Some(sockets) = &mut self.sockets {
            sockets.look_at(rules.named_targets());
        }
    }

    /// Leaves out the rules whose windows are not near.
    ///
    /// # Errors
    /// A system call fails.
    pub fn begin(&mut self, injection: &mut Injection, plan: &Plan) -> Result<()> {
        if self.windows.are_some() {
            self.turn(injection, plan, None)?;
        }
        Ok(())
    }

    /// The traffic of each target since the start, in the order of the rules. The figures never fall.
    pub fn targets(
        &mut self,
        plan: &Plan,
        hits: &[Hits],
        steering: Option<&Steering>,
    ) -> Vec<TargetLine> {
        self.totals.take(plan, hits, steering)
    }

    /// Loads and unloads rules as their windows open and close.
    fn turn(
        &mut self,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<()> {
        let before = self.windows.resting.clone();
        let change = self.windows.look();
        if before != self.windows.resting {
            // From here on other rules count the targets' traffic.
            self.totals
                .take(plan, &hits(injection, plan, steering)?, steering);
            self.install(&self.off, injection, plan)?;
        }
        injection.retire(plan, &change.over)?;
        for line in change.told {
            tell!("fault: {line}");
        }
        Ok(())
    }

    /// Handles an event.
    ///
    /// # Errors
    /// A rule can't be loaded or unloaded. Errors of a request are only reported to its client.
    pub async fn handle(
        &mut self,
        event: ControlEvent,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<()> {
        match event {
            ControlEvent::Asked(asked) => self.answer(asked, injection, plan, steering).await,
            ControlEvent::WindowDue => self.turn(injection, plan, steering)?,
        }
        Ok(())
    }

    /// The indexes of the rules that are turned off or whose windows are not near.
    #[must_use]
    pub fn left_out(&self) -> BTreeSet<usize> {
        &self.off | &self.windows.resting
    }

    /// Applies all rules except those that are turned off or whose windows are not near.
    fn install(&self, off: &BTreeSet<usize>, injection: &mut Injection, plan: &Plan) -> Result<()> {
        injection.leave_out(plan, &(off | &self.windows.resting))
    }

    async fn answer(
        &mut self,
        asked: PendingRequest,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) {
        let mut done = Ok(());
        if let Some(switch) = asked.request.switch {
            done = self.switch(switch, injection, plan, steering).await;
        }
        let answer = done.and_then(|()| self.snapshot(injection, plan, steering));
        let text = match answer {
            Ok(snapshot) => serde_json::to_string(&snapshot),
            Err(error) => serde_json::to_string(&Rejection {
                error: format!("{error:#}"),
            }),
        };
        // The client may have disconnected.
        let _gone = asked.answer.send(text.unwrap_or_default());
    }

    async fn switch(
        &mut self,
        Switch { rule, text, on }: Switch,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<()> {
        let planned = plan.rules.get(rule).context("there is no such rule")?;
        if let Some(text) = text.filter(|text| *text != planned.text) {
            bail!("the rule `{text}` has gone meanwhile: nothing was changed");
        }
        let mut off = self.off.clone();
        if on {
            off.remove(&rule);
        } else {
            off.insert(rule);
        }
        if let Some(steering) = steering {
            steering.switch(rule, on).await?;
        }
        if planned.stream.is_none() {
            self.install(&off, injection, plan)?;
        }
        self.off = off;
        Ok(())
    }

    fn snapshot(
        &mut self,
        injection: &Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<Snapshot> {
        let hits = hits(injection, plan, steering)?;
        let by = injection.hooks().to_string();
        let rules = plan.rules.iter().zip(&hits).enumerate();
        let rules = rules.map(|(index, (rule, hits))| RuleLine {
            rule: rule.text.clone(),
            target: rule.target.clone(),
            by: rule.mechanism(Some(by.clone())),
            on: !self.off.contains(&index),
            seen: hits.stats.seen_packets,
            hits: hits.stats.hit_packets,
            connections: hits.connections,
        });
        let rules: Vec<_> = rules.collect();
        let mut targets = self.totals.take(plan, &hits, steering);
        if let Some(sockets) = &mut self.sockets {
            for (name, count) in sockets.count()? {
                for line in targets.iter_mut().filter(|line| line.target == name) {
                    line.open = Some(line.open.unwrap_or(0) + count);
                }
            }
        }
        let elapsed_ms = injection.started().elapsed().as_millis();
        Ok(Snapshot {
            title: self.title.clone(),
            seed: Some(plan.seed),
            elapsed_ms: u64::try_from(elapsed_ms).unwrap_or(u64::MAX),
            rules,
            targets,
        })
    }
}

/// The hits of all rules, of packets and in the relay.
///
/// # Errors
/// The kernel's counters can't be read.
pub fn hits(injection: &Injection, plan: &Plan, steering: Option<&Steering>) -> Result<Vec<Hits>> {
    let mut hits = injection.hits(plan)?;
    if let Some(steering) = steering {
        steering.add_to(&mut hits);
    }
    Ok(hits)
}

fn listen() -> std::io::Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("{NAME}{}", std::process::id()))?;
    let listener = StdListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Serves one client until it disconnects.
async fn serve(stream: UnixStream, asked: mpsc::Sender<PendingRequest>) {
    let allowed = stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw());
    if !allowed {
        return;
    }
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    loop {
        line.clear();
        let read = (&mut reader).take(LINE_BYTES).read_line(&mut line).await;
        if !matches!(read, Ok(1..)) {
            return;
        }
        let Some(mut text) = ask(&line, &asked).await else {
            return;
        };
        text.push('\n');
        if writer.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Answers one line. Returns `None` if the instance ends in the meantime.
async fn ask(line: &str, asked: &mpsc::Sender<PendingRequest>) -> Option<String> {
    let request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => {
            let error = format!("invalid request: {error}");
            return serde_json::to_string(&Rejection { error }).ok();
        }
    };
    let (answer, answered) = oneshot::channel();
    asked.send(PendingRequest { request, answer }).await.ok()?;
    answered.await.ok()
}
