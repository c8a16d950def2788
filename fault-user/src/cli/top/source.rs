//! The sources of the figures: instances with a control socket, and the daemon.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::http::Method;
use serde_json::{Value, json};

use crate::cli::client::{ClientArgs, call, escaped};
use crate::session::control::{NAME, Rejection, Request, RuleLine, Snapshot, Switch, TargetLine};

/// An instance must answer within this time.
const PATIENCE: Duration = Duration::from_secs(2);

/// A source of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A `fault run` or `fault inject`, by its process.
    Process(u32),
    /// The daemon.
    Daemon,
}

/// What a rule is known by while the figures are refreshed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RuleId {
    /// A rule of an instance: its index, and its text, for it may be replaced.
    Rule(usize, String),
    /// A toxic of the daemon.
    Toxic {
        /// Its proxy.
        proxy: String,
        /// Its name.
        name: String,
    },
    /// A packet rule of the daemon: its number, and its text.
    Packet(u64, String),
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(_, text) | Self::Packet(_, text) => write!(f, "`{text}`"),
            Self::Toxic { proxy, name } => write!(f, "the toxic `{name}` of `{proxy}`"),
        }
    }
}

/// The figures of a source.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The source.
    pub source: Source,
    /// Its figures.
    pub snapshot: Snapshot,
    /// What each of its rules is known by.
    pub ids: Vec<RuleId>,
}

impl Shown {
    /// The figures of an instance.
    #[must_use]
    pub fn of_process(pid: u32, snapshot: Snapshot) -> Self {
        let rules = snapshot.rules.iter().enumerate();
        let ids = rules.map(|(index, rule)| RuleId::Rule(index, rule.rule.clone()));
        Self {
            source: Source::Process(pid),
            ids: ids.collect(),
            snapshot,
        }
    }
}

/// All sources.
pub struct Sources {
    daemon: ClientArgs,
    only: Option<u32>,
    /// The toxicities of toxics that were turned off here, by proxy and name.
    before: Mutex<HashMap<(String, String), Value>>,
}

impl Sources {
    /// Creates the sources: the daemon at this address, and all instances or one.
    pub fn new(daemon: ClientArgs, only: Option<u32>) -> Self {
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
    pub fn look(&self) -> Result<Vec<Shown>> {
        let mut all = Vec::new();
        for pid in instances()? {
            if self.only.is_none_or(|only| only == pid)
                && let Ok(snapshot) = ask(pid, &Request::default())
            {
                all.push(Shown::of_process(pid, snapshot));
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
            Ok(shown) => all.push(shown),
            Err(error) if all.is_empty() => {
                bail!(
                    "nothing to show: no `fault run` or `fault inject` of yours runs in this network namespace, and {error}"
                );
            }
            Err(_none) => {}
        }
        Ok(all)
    }

    /// Turns a rule off or on.
    ///
    /// # Errors
    /// The instance has ended, the rule has gone, it can't be turned off, or the request is rejected.
    pub fn switch(&self, source: Source, rule: &RuleId, on: bool) -> Result<()> {
        match (source, rule) {
            (Source::Process(pid), RuleId::Rule(index, text)) => {
                let switch = Switch {
                    rule: *index,
                    text: Some(text.clone()),
                    on,
                };
                let switch = Some(switch);
                ask(pid, &Request { switch }).map(drop)
            }
            (Source::Daemon, RuleId::Toxic { proxy, name }) => self.switch_toxic(proxy, name, on),
            (_, RuleId::Packet(number, _)) => bail!(
                "a packet rule of the daemon can't be turned off: remove it by `fault remove rule {number}`"
            ),
            (source, rule) => bail!("{source:?} has no rule {rule}"),
        }
    }

    fn look_at_daemon(&self) -> Result<Shown> {
        let get = |path| call(&self.daemon, Method::GET, path, None);
        Ok(of_daemon(
            &get("/proxies")?,
            &get("/v1/stats")?,
            &get("/v1/rules")?,
        ))
    }

    /// A toxic with toxicity 0 is off. Only the instance of `fault top` that turned it off knows its former toxicity.
    fn switch_toxic(&self, proxy: &str, name: &str, on: bool) -> Result<()> {
        let proxies = call(&self.daemon, Method::GET, "/proxies", None)?;
        let mut all = toxics(&proxies);
        let found = all.find(|(its_proxy, toxic)| *its_proxy == proxy && toxic["name"] == name);
        let (_, toxic) = found.with_context(|| {
            format!("the toxic `{name}` of `{proxy}` has gone meanwhile: nothing was changed")
        })?;
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
fn ask(pid: u32, request: &Request) -> Result<Snapshot> {
    let address = SocketAddr::from_abstract_name(format!("{NAME}{pid}"))?;
    let stream =
        UnixStream::connect_addr(&address).with_context(|| format!("process {pid} has ended"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    (&stream).write_all(text.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(&stream)
        .read_line(&mut answer)
        .with_context(|| format!("process {pid} does not answer"))?;
    if let Ok(refusal) = serde_json::from_str::<Rejection>(&answer) {
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

/// Converts a daemon's toxics, packet rules and proxies to rules and targets.
fn of_daemon(proxies: &Value, stats: &Value, packet_rules: &Value) -> Shown {
    let packet_rules = packet_rules.as_array().map_or(&[][..], Vec::as_slice);
    let (mut ids, mut rules) = (Vec::new(), Vec::new());
    for (proxy, toxic) in toxics(proxies) {
        let name = toxic["name"].as_str().unwrap_or_default();
        // A packet fault on a transparent proxy is a packet rule, which has its figures.
        let label = format!("{name} of {proxy}");
        let packet = packet_rules
            .iter()
            .find(|rule| rule["toxic"] == label.as_str());
        rules.push(match packet {
            Some(rule) => RuleLine {
                rule: toxic_text(proxy, toxic),
                on: is_on(toxic),
                target: proxy.to_owned(),
                ..of_packet_rule(rule)
            },
            None => of_toxic(proxy, toxic, &stats[proxy]),
        });
        ids.push(RuleId::Toxic {
            proxy: proxy.to_owned(),
            name: name.to_owned(),
        });
    }
    for rule in packet_rules.iter().filter(|rule| rule["toxic"].is_null()) {
        let line = of_packet_rule(rule);
        ids.push(RuleId::Packet(count(&rule["id"]), line.rule.clone()));
        rules.push(line);
    }
    let targets = stats.as_object().into_iter().flatten();
    let targets = targets.map(|(name, proxy)| TargetLine {
        target: name.clone(),
        bytes: count(&proxy["sent_bytes"][0]) + count(&proxy["sent_bytes"][1]),
        connections: count(&proxy["accepted"]),
        open: Some(count(&proxy["open"])),
    });
    Shown {
        source: Source::Daemon,
        snapshot: Snapshot {
            title: "fault daemon".to_owned(),
            seed: None,
            elapsed_ms: 0,
            rules,
            targets: targets.collect(),
        },
        ids,
    }
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn is_on(toxic: &Value) -> bool {
    toxic["toxicity"].as_f64().unwrap_or(1.0) > 0.0
}

fn toxic_text(proxy: &str, toxic: &Value) -> String {
    let [kind, stream] = ["type", "stream"].map(|key| toxic[key].as_str().unwrap_or_default());
    format!("{proxy} {kind} ({stream})")
}

/// A toxic of the relay, with the figures of its proxy.
fn of_toxic(proxy: &str, toxic: &Value, stats: &Value) -> RuleLine {
    let mut figures = stats["toxics"].as_array().into_iter().flatten();
    let figures = figures.find(|one| one["name"] == toxic["name"]);
    let figures = figures.unwrap_or(&Value::Null);
    RuleLine {
        rule: toxic_text(proxy, toxic),
        target: proxy.to_owned(),
        by: "proxy".to_owned(),
        on: is_on(toxic),
        seen: count(&figures["connections"]),
        hits: count(&figures["hits"]),
        connections: count(&figures["connections"]),
    }
}

/// A packet rule of the daemon, which is always on.
fn of_packet_rule(rule: &Value) -> RuleLine {
    let text = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
    let written = text("rule");
    RuleLine {
        target: written.split(' ').next().unwrap_or_default().to_owned(),
        rule: written,
        by: text("mechanism"),
        on: true,
        seen: count(&rule["seen"]),
        hits: count(&rule["hits"]),
        connections: count(&rule["connections"]),
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
        let rules = json!([
            {"id": 3, "rule": "udp:53 drop", "mechanism": "tc (tcx)", "seen": 8, "hits": 6, "connections": 2},
        ]);
        let snapshot = of_daemon(&proxies, &stats, &rules).snapshot;
        let shown: Vec<_> = snapshot
            .rules
            .iter()
            .map(|rule| (rule.rule.as_str(), rule.on, rule.hits))
            .collect();
        assert_eq!(
            shown,
            [
                ("db latency (downstream)", true, 9),
                ("db timeout (upstream)", false, 0),
                ("udp:53 drop", true, 6)
            ]
        );
        let target = &snapshot.targets[0];
        assert_eq!(
            (target.bytes, target.connections, target.open),
            (30, 7, Some(2))
        );
    }

    #[test]
    fn a_packet_toxic_has_the_figures_of_its_rule() {
        let toxic = json!({"name": "lossy", "type": "loss", "stream": "downstream", "toxicity": 1});
        let proxies = json!({"db": {"toxics": [toxic]}});
        let stats = json!({"db": {"toxics": []}});
        let rule = json!({
            "id": 1, "rule": "tcp:1 loss=5%", "toxic": "lossy of db", "mechanism": "tc", "seen": 9, "hits": 4
        });
        let shown = of_daemon(&proxies, &stats, &json!([rule]));
        let [line] = &shown.snapshot.rules[..] else {
            panic!("one line: {shown:?}");
        };
        assert_eq!(
            (line.rule.as_str(), line.hits, line.seen),
            ("db loss (downstream)", 4, 9)
        );
        assert_eq!(line.by, "tc");
    }
}
