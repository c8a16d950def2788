//! Probes: checks from outside that must hold before a fault and after it.
//!
//! A probe is not traffic of the command: rules that are limited to the command do not apply to it.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::rule::scenario::{Probe, ProbeCheck};
use crate::sys::process::user::Identity;

/// The result of one try of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Try {
    /// Its start, in nanoseconds since the rules were applied.
    pub at_ns: u64,
    /// The complaint, if it failed.
    pub complaint: Option<String>,
}

/// Probes that are tried repeatedly until this is dropped.
pub struct Probing {
    tries: Vec<Arc<Mutex<Vec<Try>>>>,
    tasks: Vec<JoinHandle<()>>,
}

/// The name of a probe in messages.
#[must_use]
pub fn name(probe: &Probe) -> String {
    if let Some(name) = &probe.name {
        return name.clone();
    }
    match &probe.check {
        ProbeCheck::Http { url, .. } => url.clone(),
        ProbeCheck::Tcp { address } => format!("tcp {address}"),
        ProbeCheck::Command { argv } => argv.join(" "),
    }
}

/// Tries a probe once. Commands run as `identity`, where it is given.
///
/// # Errors
/// The reason why it does not hold.
pub async fn hold(probe: &Probe, identity: Option<&Identity>) -> Result<()> {
    let limit = Duration::from_nanos(probe.timeout_ns);
    let check = async {
        match &probe.check {
            ProbeCheck::Http { url, status } => ask(url, *status).await,
            ProbeCheck::Tcp { address } => {
                TcpStream::connect(address)
                    .await
                    .with_context(|| format!("connecting to {address}"))?;
                Ok(())
            }
            ProbeCheck::Command { argv } => run(argv, identity).await,
        }
    };
    match tokio::time::timeout(limit, check).await {
        Ok(held) => held,
        Err(_) => bail!("no answer in {limit:?}"),
    }
}

async fn ask(url: &str, wanted: Option<u16>) -> Result<()> {
    let uri: Uri = url.parse().with_context(|| format!("`{url}`"))?;
    let authority = uri.authority().context("the URL has no host")?.clone();
    let port = authority.port_u16().unwrap_or(80);
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, port))
        .await
        .with_context(|| format!("connecting to {authority}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // The task ends with the stream. Only the answer matters.
    let driving = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header("host", authority.as_str())
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await;
    driving.abort();
    let status = answer.context("asking")?.status().as_u16();
    let right = wanted.map_or((200..400).contains(&status), |wanted| wanted == status);
    ensure!(right, "answered with status {status}");
    Ok(())
}

async fn run(argv: &[String], identity: Option<&Identity>) -> Result<()> {
    let (program, arguments) = argv.split_first().context("the command is empty")?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(identity) = identity {
        command
            .uid(identity.uid.as_raw())
            .gid(identity.gid.as_raw());
    }
    let status = command
        .status()
        .await
        .with_context(|| format!("running {program}"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

impl Probing {
    /// Tries each probe at its interval, from `started` on.
    #[must_use]
    pub fn start(probes: &[Probe], identity: Option<&Identity>, started: Instant) -> Self {
        let mut tries = Vec::new();
        let mut tasks = Vec::new();
        for probe in probes {
            let list = Arc::new(Mutex::new(Vec::new()));
            tries.push(Arc::clone(&list));
            let (probe, identity) = (probe.clone(), identity.cloned());
            tasks.push(tokio::spawn(async move {
                let mut ticks = tokio::time::interval(Duration::from_nanos(probe.interval_ns));
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    let at_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    let held = hold(&probe, identity.as_ref()).await;
                    list.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Try {
                            at_ns,
                            complaint: held.err().map(|error| format!("{error:#}")),
                        });
                }
            }));
        }
        Self { tries, tasks }
    }

    /// Ends the probes and returns all tries of each.
    #[must_use]
    pub fn finish(self) -> Vec<Vec<Try>> {
        self.tries
            .iter()
            .map(|tries| tries.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .collect()
    }
}

impl Drop for Probing {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
