//! `report.json`: the results of a run, and the data needed to replay it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::fold::RuleName;
use super::record::Recorded;
use crate::inject::injection::Hits;
use crate::watch::history::History;
use crate::watch::probe::Try;

/// The version of the file format.
const VERSION: u32 = 2;
/// The name of the file.
pub const REPORT: &str = "report.json";
/// The name of the file with the decisions that fired, one JSON object per line.
pub const DECISIONS: &str = "decisions.jsonl";

/// A run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunReport {
    /// The version of the file format.
    pub version: u32,
    /// The version of fault.
    pub fault: String,
    /// The random seed.
    pub seed: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// The command line for a run with the same rules and random draws. (`fault replay` makes the same decisions.)
    pub again: Vec<String>,
    /// Whether the rules applied to the whole host, not only to the command.
    pub host: bool,
    /// The start in seconds since 1970.
    pub started_unix_s: u64,
    /// The length in milliseconds.
    pub length_ms: u64,
    /// The command's exit code.
    pub command_exit: u8,
    /// The exit code of `fault`.
    pub exit: u8,
    /// Whether the run accepts that a rule never fires (`--allow-unfired`).
    pub allow_unfired: bool,
    /// The names of targets, as rules use them.
    pub targets: BTreeMap<String, String>,
    /// The rules.
    pub rules: Vec<RuleReport>,
    /// The expectations and their results.
    pub expectations: Vec<Expectation>,
    /// The probes and their tries.
    pub probes: Vec<ProbeReport>,
    /// Samples over time.
    pub samples: Vec<CounterSample>,
    /// The traffic of the targets, at the times of the samples.
    #[serde(default)]
    pub traffic: Vec<TargetTraffic>,
    /// Connects to the targets.
    #[serde(default)]
    pub connects: Vec<ConnectReport>,
    /// The number of decisions missing from [`DECISIONS`], because they came faster than they could be written.
    #[serde(default)]
    pub decisions_lost: u64,
}

/// The traffic of a target in both directions, with or without a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetTraffic {
    /// The target's name.
    pub target: String,
    /// Bytes since the start, one figure for each sample.
    pub bytes: Vec<u64>,
}

/// A rule of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleReport {
    /// As it is written.
    pub rule: String,
    /// The rule that it was drawn from by `random`, without times; `None` for a written rule.
    pub drawn_from: Option<String>,
    /// Its target.
    pub target: String,
    /// The mechanism.
    pub mechanism: String,
    /// Whether it fired.
    pub fired: bool,
    /// Whether the run accepts that it never fired: with `--allow-unfired`, and for drawn faults if any rule fired.
    pub accepted: bool,
    /// The number of matched connections.
    pub connections: u64,
    /// Packets that matched by target, direction and scope (connections for a stream rule).
    pub seen: Amount,
    /// Packets that it hit (number of hits for a stream rule).
    pub hit: Amount,
    /// The rule's windows in milliseconds since the start: from, to. Windows that are closer to each other than
    /// 1/10,000 of the run, or than a millisecond, are merged.
    pub windows_ms: Vec<(u64, u64)>,
}

/// Packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amount {
    /// Packets as the kernel passes them, including super-packets.
    pub packets: u64,
    /// Wire packets.
    pub segments: u64,
    /// Bytes on the wire.
    pub bytes: u64,
}

/// An expectation and its result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// Its field in the scenario, such as `max_connects`.
    pub kind: String,
    /// Its target; `None` for `exit` and `probe`.
    pub target: Option<String>,
    /// What was expected. It is the same in every run of the scenario.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// Whether it was met.
    pub holds: bool,
    /// The limit: a number of connects, connections or hits, an exit code, or a time in microseconds. `None` for
    /// `probe`.
    pub limit: Option<u64>,
    /// The measured figure, in the unit of `limit`; for `probe` the number of tries. `None` if there was none.
    pub measured: Option<u64>,
    /// When it broke, in milliseconds since the start; `None` if it was met.
    pub broke_ms: Option<u64>,
}

impl Expectation {
    /// The expectation and the result in one line.
    #[must_use]
    pub fn text(&self) -> String {
        format!("expect {}: {}", self.expected, self.found)
    }
}

/// A probe and its tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeReport {
    /// Its name.
    pub name: String,
    /// The tries while the rules were applied, ordered by time. The last one may be later, after all rules were removed.
    pub tries: Vec<TryReport>,
}

/// One try of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TryReport {
    /// Its start in milliseconds since the start of the run.
    pub at_ms: u64,
    /// Why it failed; `None` if it held.
    pub complaint: Option<String>,
}

impl TryReport {
    /// Converts a try of a run of `length_ms`. One after the end counts as at the end.
    #[must_use]
    pub fn of(one: &Try, length_ms: u64) -> Self {
        const MS_NS: u64 = 1_000_000;
        Self {
            at_ms: (one.at_ns / MS_NS).min(length_ms),
            complaint: one.complaint.clone(),
        }
    }
}

impl RuleReport {
    /// The rule, or the one that it was drawn from.
    #[must_use]
    pub fn name(&self) -> RuleName<'_> {
        match &self.drawn_from {
            Some(rule) => RuleName::Drawn(rule),
            None => RuleName::Written(&self.rule),
        }
    }

    /// Whether the run failed because this rule never fired, or would have.
    #[must_use]
    pub fn failed(&self) -> bool {
        !self.fired && !self.accepted
    }

    /// The time in its windows, in milliseconds.
    #[must_use]
    pub fn active_ms(&self) -> u64 {
        let windows = self.windows_ms.iter();
        windows.map(|(from, to)| to.saturating_sub(*from)).sum()
    }
}

/// One connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectReport {
    /// The target's name.
    pub target: String,
    /// The start in microseconds since the start of the run.
    pub at_us: u64,
    /// The time until connect(2) completed, successfully or not, in microseconds; `None` if it never did.
    pub connect_us: Option<u64>,
    /// The time to first byte in microseconds: from the client's first data (from the end of the handshake if the
    /// server speaks first) until the server's first data. `None` if the server sent nothing.
    pub first_byte_us: Option<u64>,
    /// Whether it succeeded.
    pub connected: bool,
    /// The time of a reset while it was open, in microseconds since the start.
    #[serde(default)]
    pub reset_us: Option<u64>,
}

/// The connects of all targets, ordered by time.
#[must_use]
pub fn connects(history: &History) -> Vec<ConnectReport> {
    const US_NS: u64 = 1000;
    let mut all: Vec<_> = history
        .targets
        .iter()
        .flat_map(|seen| {
            seen.connects.iter().map(|connect| ConnectReport {
                target: seen.name.clone(),
                at_us: connect.at_ns / US_NS,
                connect_us: connect.answered_ns().map(|ns| ns / US_NS),
                first_byte_us: connect.first_byte_ns().map(|ns| ns / US_NS),
                connected: connect.established_ns.is_some(),
                reset_us: connect
                    .closed_ns
                    .filter(|_| connect.is_reset)
                    .map(|ns| ns / US_NS),
            })
        })
        .collect();
    all.sort_by_key(|connect| connect.at_us);
    all
}

/// The counters of all rules at one time, since the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CounterSample {
    /// Milliseconds since the start.
    pub at_ms: u64,
    /// Matched bytes of each rule.
    pub seen_bytes: Vec<u64>,
    /// Hits of each rule.
    pub hits: Vec<u64>,
    /// Connections of each rule.
    pub connections: Vec<u64>,
}

impl CounterSample {
    /// Takes a sample.
    #[must_use]
    pub fn of(at_ms: u64, hits: &[Hits]) -> Self {
        Self {
            at_ms,
            seen_bytes: hits.iter().map(|hits| hits.stats.seen_bytes).collect(),
            hits: hits.iter().map(|hits| hits.stats.hit_packets).collect(),
            connections: hits.iter().map(|hits| hits.connections).collect(),
        }
    }
}

/// The version of a file, which may have another format otherwise.
#[derive(Deserialize)]
struct Format {
    version: u32,
}

/// The versions of fault, the kernel and the format, for [`RunReport::fault`], [`RunReport::kernel`] and [`RunReport::version`].
#[must_use]
pub fn versions() -> (u32, String, String) {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    (
        VERSION,
        env!("CARGO_PKG_VERSION").to_owned(),
        kernel.trim().to_owned(),
    )
}

/// Quotes words for a shell.
#[must_use]
pub fn shell_line(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    let quoted: Vec<_> = words
        .iter()
        .map(|word| {
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

/// The current time in seconds since 1970.
#[must_use]
pub fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl RunReport {
    /// Whether the run succeeded.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.exit == 0
    }

    /// Reads a report: its folder, or the file in it.
    ///
    /// # Errors
    /// The file does not exist or is not a report.
    pub fn read(path: &Path) -> Result<Self> {
        let file = file_in(path, REPORT);
        let text = fs::read(&file).with_context(|| format!("can't read {}", file.display()))?;
        let no_report = || format!("{} is not a report of `fault run --report`", file.display());
        let Format { version } = serde_json::from_slice(&text).with_context(no_report)?;
        if version != VERSION {
            bail!(
                "{} is a report of format {version}, but this version of fault reads format {VERSION}: run the \
                 command again with --report",
                file.display()
            );
        }
        serde_json::from_slice(&text).with_context(no_report)
    }
}

/// The decisions of a report, in their original order.
///
/// # Errors
/// The file does not exist, or a line is not a decision.
pub fn decisions(report: &Path) -> Result<Vec<Recorded>> {
    let file = file_in(report, DECISIONS);
    let text =
        fs::read_to_string(&file).with_context(|| format!("can't read {}", file.display()))?;
    text.lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("{}:{}: not a decision", file.display(), number + 1))
        })
        .collect()
}

/// A file of the report at `path`, which is its folder or a file in it.
fn file_in(path: &Path, name: &str) -> PathBuf {
    let is_file = path.is_file();
    let folder = path.parent().filter(|_| is_file).unwrap_or(path);
    folder.join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        let words = ["sh", "-c", "echo it's", "", "tcp:80", "a=b"].map(str::to_owned);
        assert_eq!(shell_line(&words), r"sh -c 'echo it'\''s' '' tcp:80 a=b");
    }
}
