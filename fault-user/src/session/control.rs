//! What a running `fault run` or `fault inject` tells `fault top`, and lets it switch.
//!
//! It listens on an abstract Unix socket, which goes with the process and belongs to its network namespace; only its own
//! user and root are answered. Each line that comes is a [`Request`], each that goes a [`Snapshot`] or a [`Refusal`].

use std::collections::BTreeSet;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::inject::injection::{Hits, Injection};
use crate::plan::Plan;
use crate::steer::Steering;
use crate::tell::tell;

use super::rules::RuleSet;
use super::windows::Windows;
use crate::watch::open::Sockets;

/// What the socket's name begins with; the process's number follows.
pub const NAME: &str = "fault-top-";

/// The longest request.
const LINE_BYTES: u64 = 4096;

/// What is asked of an instance.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// A rule to switch before the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
}

/// A rule to switch.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Its place among the rules, from 0.
    pub rule: usize,
    /// Whether it is to act.
    pub on: bool,
}

/// How an instance stands.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Snapshot {
    /// What it is, such as `fault run -- pytest`.
    pub title: String,
    /// Where its randomness comes from.
    pub seed: Option<u64>,
    /// How long it has been in force, in milliseconds.
    pub elapsed_ms: u64,
    /// Its rules, or a daemon's toxics.
    pub rules: Vec<RuleLine>,
    /// Its targets, or a daemon's proxies.
    pub targets: Vec<TargetLine>,
}

/// A rule as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct RuleLine {
    /// The rule.
    pub rule: String,
    /// Whose traffic it concerns.
    pub target: String,
    /// What carries it.
    pub by: String,
    /// Whether it may act.
    pub on: bool,
    /// What it met: packets, or connections.
    pub seen: u64,
    /// What it did something to.
    pub hits: u64,
    /// Connections that it met.
    pub connections: u64,
}

/// A target as its rules see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct TargetLine {
    /// Its name.
    pub target: String,
    /// Bytes since the beginning, both ways.
    pub bytes: u64,
    /// Connections since the beginning.
    pub connections: u64,
    /// Connections that are open now, where that is known.
    pub open: Option<u64>,
}

/// Why a request is not answered.
#[derive(Debug, Deserialize, Serialize)]
pub struct Refusal {
    /// One line.
    pub error: String,
}

/// A request, and where the answer goes.
pub struct Asked {
    request: Request,
    answer: oneshot::Sender<String>,
}

/// The socket of this process.
pub struct Control {
    asked: mpsc::Receiver<Asked>,
    /// The places of the rules that are switched off.
    off: BTreeSet<usize>,
    windows: Windows,
    /// What tells how many connections are open, where that can be told.
    sockets: Option<Sockets>,
    title: String,
}

/// What there is to do.
pub enum Event {
    /// Someone asks.
    Asked(Asked),
    /// A rule comes or goes.
    WindowDue,
}

impl Control {
    /// Listens. To be called in a runtime. Where that can't be, nobody can ask, and all else goes on.
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
            Err(error) => log::warn!("`fault top` will not see this instance: {error}"),
        }
        Self {
            asked,
            off: BTreeSet::new(),
            windows,
            sockets,
            title,
        }
    }

    /// The next thing to do.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            Some(asked) = self.asked.recv() => Event::Asked(asked),
            () = self.windows.wait() => Event::WindowDue,
            else => std::future::pending().await,
        }
    }

    /// Other rules are in force now, all of them.
    pub fn forget(&mut self, rules: &RuleSet) {
        self.off.clear();
        if let Some(sockets) = &mut self.sockets {
            sockets.look_at(rules.named_targets());
        }
    }

    /// Takes out the rules whose time has not come.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin(&mut self, injection: &mut Injection, plan: &Plan) -> Result<()> {
        if self.windows.are_some() {
            self.turn(injection, plan)?;
        }
        Ok(())
    }

    /// Lets rules come and go.
    fn turn(&mut self, injection: &mut Injection, plan: &Plan) -> Result<()> {
        let before = self.windows.resting.clone();
        let change = self.windows.look();
        if before != self.windows.resting {
            self.install(&self.off, injection, plan)?;
        }
        injection.retire(plan, &change.over)?;
        for line in change.told {
            tell!("fault: {line}");
        }
        Ok(())
    }

    /// Does it.
    ///
    /// # Errors
    /// The kernel refuses to let a rule come or go. Whoever asks is told of errors, and nobody else.
    pub async fn handle(
        &mut self,
        event: Event,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<()> {
        match event {
            Event::Asked(asked) => self.answer(asked, injection, plan, steering).await,
            Event::WindowDue => self.turn(injection, plan)?,
        }
        Ok(())
    }

    /// Puts all rules in force but those that are switched off or not near.
    fn install(&self, off: &BTreeSet<usize>, injection: &mut Injection, plan: &Plan) -> Result<()> {
        injection.leave_out(plan, &off.union(&self.windows.resting).copied().collect())
    }

    async fn answer(
        &mut self,
        asked: Asked,
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
            Err(error) => serde_json::to_string(&Refusal {
                error: format!("{error:#}"),
            }),
        };
        // Whoever has asked may be gone.
        let _gone = asked.answer.send(text.unwrap_or_default());
    }

    async fn switch(
        &mut self,
        Switch { rule, on }: Switch,
        injection: &mut Injection,
        plan: &Plan,
        steering: Option<&Steering>,
    ) -> Result<()> {
        let planned = plan.rules.get(rule).context("there is no such rule")?;
        let mut off = self.off.clone();
        if on {
            off.remove(&rule);
        } else {
            off.insert(rule);
        }
        match steering {
            Some(steering) if planned.stream.is_some() => steering.switch(rule, on).await?,
            _ => self.install(&off, injection, plan)?,
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
        let mut targets = targets(plan, &hits, steering);
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

/// What the rules have done, by packets and in the relay.
///
/// # Errors
/// The kernel's figures can't be read.
pub fn hits(injection: &Injection, plan: &Plan, steering: Option<&Steering>) -> Result<Vec<Hits>> {
    let mut hits = injection.hits(plan)?;
    if let Some(steering) = steering {
        steering.add_to(&mut hits);
    }
    Ok(hits)
}

/// What the rules of each target have seen, in the order of the rules. Several see the same packets: the one that saw most counts.
#[must_use]
pub fn targets(plan: &Plan, hits: &[Hits], steering: Option<&Steering>) -> Vec<TargetLine> {
    let redirected = steering.map(Steering::traffic).unwrap_or_default();
    let mut lines: Vec<TargetLine> = Vec::new();
    for (index, (rule, hits)) in plan.rules.iter().zip(hits).enumerate() {
        let place = lines.iter().position(|line| line.target == rule.target);
        let place = place.unwrap_or_else(|| {
            lines.push(TargetLine {
                target: rule.target.clone(),
                ..TargetLine::default()
            });
            lines.len() - 1
        });
        let line = &mut lines[place];
        line.connections = line.connections.max(hits.connections);
        line.bytes = line.bytes.max(hits.stats.seen_bytes);
        if let Some((_, traffic)) = redirected.iter().find(|(other, _)| *other == index) {
            line.bytes = line.bytes.max(traffic.bytes);
            line.open = line.open.max(Some(traffic.open));
        }
    }
    lines
}

fn listen() -> std::io::Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("{NAME}{}", std::process::id()))?;
    let listener = StdListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Answers one client until it goes.
async fn serve(stream: UnixStream, asked: mpsc::Sender<Asked>) {
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

/// Has a line answered; nothing when the instance ends meanwhile.
async fn ask(line: &str, asked: &mpsc::Sender<Asked>) -> Option<String> {
    let request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => {
            let error = format!("this is no request: {error}");
            return serde_json::to_string(&Refusal { error }).ok();
        }
    };
    let (answer, answered) = oneshot::channel();
    asked.send(Asked { request, answer }).await.ok()?;
    answered.await.ok()
}
