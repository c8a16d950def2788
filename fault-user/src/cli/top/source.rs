//! The sources of the figures: instances with a control socket, and the daemon.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::http::Method;
use serde_json::{Value, json};

use crate::cli::client::{Target, call, escaped};
use crate::session::control::{NAME, Refusal, Request, RuleLine, Snapshot, Switch, TargetLine};

/// An instance must answer within this time.
const PATIENCE: Duration = Duration::from_secs(2);

/// A source of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A `fault run` or `fault inject`, by its process.
    Process(u32),
    /// The daemon.
    Daemon,
}

/// All sources.
pub struct Sources {
    daemon: Target,
    only: Option<u32>,
    /// The toxicities of toxics that were turned off here, by proxy and name.
    before: Mutex<HashMap<(String, String), Value>>,
}

impl Sources {
    /// Creates the sources: the daemon at this address, and all instances or one.
    pub fn new(daemon: Target, only: Option<u32>) -> Self {
        Self {
            daemon,
            only,
            before: Mutex::default(),
        }
    }

    /// Reads the figures of all sources. A source that has ended is left out.
    ///
    /// # Errors
    /// No source is left.
    pub fn look(&self) -> Result<Vec<(Source, Snapshot)>> {
        let mut all = Vec::new();
        for pid in instances()? {
            if self.only.is_none_or(|only| only == pid)
                && let Ok(snapshot) = ask(pid, Request::default())
            {
                all.push((Source::Process(pid), snapshot));
            }
        }
        if let Some(pid) = self.only {
            if all.is_empty() {
                bail!(
                    "process {pid} is not a `fault run` or `fault inject` of yours in this network namespace"
                );
            }
            return Ok(all);
        }
        match self.look_at_daemon() {
            Ok(snapshot) => all.push((Source::Daemon, snapshot)),
            Err(error) if all.is_empty() => {
                return Err(error.context(
                    "nothing to show: no `fault run` or `fault inject` of yours is running in this network namespace",
                ));
            }
            Err(_none) => {}
        }
        Ok(all)
    }

    /// Turns a rule off or on; rules are numbered as in the snapshot.
    ///
    /// # Errors
    /// The instance has ended or rejects the request.
    pub fn switch(&self, source: Source, rule: usize, on: bool) -> Result<()> {
        match source {
            Source::Process(pid) => {
                let switch = Some(Switch { rule, on });
                ask(pid, Request { switch }).map(drop)
            }
            Source::Daemon => self.switch_toxic(rule, on),
        }
    }

    fn look_at_daemon(&self) -> Result<Snapshot> {
        let proxies = call(&self.daemon, Method::GET, "/proxies", None)?;
        let stats = call(&self.daemon, Method::GET, "/v1/stats", None)?;
        Ok(of_daemon(&proxies, &stats))
    }

    /// A toxic with toxicity 0 is off. Only the instance of `fault top` that turned it off knows its former toxicity.
    fn switch_toxic(&self, rule: usize, on: bool) -> Result<()> {
        let proxies = call(&self.daemon, Method::GET, "/proxies", None)?;
        let (proxy, toxic) = toxics(&proxies)
            .nth(rule)
            .context("the daemon's toxics have changed")?;
        let name = toxic["name"].as_str().unwrap_or_default();
        let path = format!("/proxies/{}/toxics/{}", escaped(proxy), escaped(name));
        let key = (proxy.to_owned(), name.to_owned());
        let mut before = self
            .before
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let toxicity = if on {
            before.remove(&key).unwrap_or_else(|| json!(1.0))
        } else {
            before.insert(key, toxic["toxicity"].clone());
            json!(0.0)
        };
        let body = json!({"toxicity": toxicity, "attributes": toxic["attributes"]});
        call(&self.daemon, Method::POST, &path, Some(&body)).map(drop)
    }
}

/// The instances of this network namespace, by their processes, in order.
fn instances() -> Result<Vec<u32>> {
    let table = std::fs::read_to_string("/proc/net/unix").context("reading /proc/net/unix")?;
    let mut pids: Vec<u32> = table
        .lines()
        .filter_map(|line| line.rsplit(' ').next()?.strip_prefix('@'))
        .filter_map(|name| name.strip_prefix(NAME)?.parse().ok())
        .collect();
    pids.sort_unstable();
    // A connection's end has the listener's name.
    pids.dedup();
    Ok(pids)
}

/// Sends a request to an instance.
fn ask(pid: u32, request: Request) -> Result<Snapshot> {
    let address = SocketAddr::from_abstract_name(format!("{NAME}{pid}"))?;
    let stream =
        UnixStream::connect_addr(&address).with_context(|| format!("process {pid} has ended"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = serde_json::to_string(&request)?;
    text.push('\n');
    (&stream).write_all(text.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(&stream)
        .read_line(&mut answer)
        .with_context(|| format!("process {pid} does not answer"))?;
    if let Ok(refusal) = serde_json::from_str::<Refusal>(&answer) {
        bail!("process {pid} rejected the request: {}", refusal.error);
    }
    serde_json::from_str(&answer)
        .with_context(|| format!("process {pid} answers only to its own user and to root"))
}

/// Lists every toxic with its proxy's name.
fn toxics(proxies: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let proxies = proxies.as_object().into_iter().flatten();
    proxies.flat_map(|(name, proxy)| {
        let toxics = proxy["toxics"].as_array().into_iter().flatten();
        toxics.map(|toxic| (name.as_str(), toxic))
    })
}

/// Converts a daemon's toxics and proxies to rules and targets.
fn of_daemon(proxies: &Value, stats: &Value) -> Snapshot {
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let rules = toxics(proxies).map(|(proxy, toxic)| {
        let did = stats[proxy]["toxics"].as_array().into_iter().flatten();
        let did = did.clone().find(|one| one["name"] == toxic["name"]);
        let did = did.unwrap_or(&Value::Null);
        let words = ["type", "stream"].map(|key| toxic[key].as_str().unwrap_or_default());
        RuleLine {
            rule: format!("{proxy} {} ({})", words[0], words[1]),
            target: proxy.to_owned(),
            by: "proxy".to_owned(),
            on: toxic["toxicity"].as_f64().unwrap_or(1.0) > 0.0,
            seen: count(&did["connections"]),
            hits: count(&did["hits"]),
            connections: count(&did["connections"]),
        }
    });
    let targets = stats.as_object().into_iter().flatten();
    let targets = targets.map(|(name, proxy)| TargetLine {
        target: name.clone(),
        bytes: count(&proxy["sent_bytes"][0]) + count(&proxy["sent_bytes"][1]),
        connections: count(&proxy["accepted"]),
        open: Some(count(&proxy["open"])),
    });
    Snapshot {
        title: "fault daemon".to_owned(),
        seed: None,
        elapsed_ms: 0,
        rules: rules.collect(),
        targets: targets.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_toxics_are_rules() {
        let proxies = json!({"db": {"toxics": [
            {"name": "slow", "type": "latency", "stream": "downstream", "toxicity": 0.5, "attributes": {}},
            {"name": "gone", "type": "timeout", "stream": "upstream", "toxicity": 0, "attributes": {}},
        ]}});
        let stats = json!({"db": {"open": 2, "accepted": 7, "sent_bytes": [10, 20], "toxics": [
            {"name": "slow", "connections": 3, "hits": 9},
        ]}});
        let snapshot = of_daemon(&proxies, &stats);
        let shown: Vec<_> = snapshot
            .rules
            .iter()
            .map(|rule| (rule.rule.as_str(), rule.on, rule.hits))
            .collect();
        assert_eq!(
            shown,
            [
                ("db latency (downstream)", true, 9),
                ("db timeout (upstream)", false, 0)
            ]
        );
        let target = &snapshot.targets[0];
        assert_eq!(
            (target.bytes, target.connections, target.open),
            (30, 7, Some(2))
        );
    }
}
