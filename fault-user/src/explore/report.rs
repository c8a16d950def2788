//! What `--report` writes: `report.json` for programs, `junit.xml` for CI, `report.html` for people.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use super::again::Again;
use super::attempt::{Attempt, Measured};
use super::cell::{Cell, Standing};
use super::coverage::unreached;
use super::dependency::{Dependency, Found};
use super::experimenter::{Cells, Explored, Stop};
use super::faults::{Experiment, kinds_of_pair};
use super::matrix;
use super::shrink::{MinimalFault, Smallest};
use super::verdict::{ExperimentVerdict, Observation, RunEnd};
use crate::report::chart::SIZES;
use crate::report::file::{shell_line, versions};
use crate::report::html::page;
use crate::report::junit::{Case, suite};
use crate::report::summary::counted;
use crate::report::timeline::{Row, Span, of_rows};
use crate::rule::{Rule, windows};
use crate::watch::history::Connect;

/// The version of the file's form.
const VERSION: u32 = 1;

/// What an exploration found; docs/explore.schema.json describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExploreReport {
    version: u32,
    fault: String,
    kernel: String,
    seed: u64,
    command: Vec<String>,
    /// Of a run without faults.
    baseline_ms: u64,
    timeout_ms: u64,
    length_ms: u64,
    /// Of the experiments alone, in the last session.
    experiments_ms: u64,
    dependencies: Vec<DependencyReport>,
    out_of_reach: Vec<String>,
    /// The dependencies and connections that no experiment reached, and why.
    #[serde(default)]
    unreached: Vec<String>,
    not_run: Vec<LeftOut>,
    /// Why it ended early, if it did.
    stopped: Option<String>,
    /// Last, so that the file can grow.
    cells: Vec<CellReport>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct DependencyReport {
    target: String,
    kind: String,
    name: Option<String>,
    addresses: Vec<String>,
    port: u16,
    connects: u64,
    requests: u64,
    to_server_bytes: u64,
    to_client_bytes: u64,
    first_ms: u64,
    connect_us: Option<u64>,
    answer_us: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct CellReport {
    target: String,
    fault: String,
    verdict: ExperimentVerdict,
    /// What a second run with the same seed came to, where that was something else.
    differs: Option<ExperimentVerdict>,
    is_failure: bool,
    /// How it compares with `--accept`.
    standing: Standing,
    symbol: String,
    summary: String,
    rules: Vec<String>,
    took_ms: u64,
    exit_code: Option<u8>,
    signal: Option<i32>,
    hits: u64,
    /// The connections that were hit, by their ordinals for the rule.
    #[serde(default)]
    reached: BTreeSet<u32>,
    connects: Vec<u64>,
    /// What it connected to, and does not without faults.
    #[serde(default)]
    others: Vec<String>,
    waited_for: Vec<String>,
    /// Why a service was not well in time when the fault was over.
    unrecovered: Option<String>,
    /// Why `--check` failed.
    broken: Option<String>,
    /// So many times the usual connects.
    storm: Option<u64>,
    /// So many retries without growing back-off.
    #[serde(default)]
    retries: Option<u64>,
    /// The largest magnitude that was survived.
    #[serde(default)]
    survives_ms: Option<u64>,
    smallest: Option<SmallestReport>,
    /// The connections of the run to each dependency.
    #[serde(default)]
    timeline: Vec<TimelineReport>,
    /// Whether an interruption, or the end of the budget, came before the smallest fault was found.
    unfinished: bool,
    reproduce: String,
    output: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SmallestReport {
    rules: Vec<String>,
    /// Of a single fault.
    #[serde(flatten)]
    whole: PartReport,
    /// Of the faults of a pair.
    #[serde(default)]
    parts: Vec<PartOfPair>,
}

/// What is left of one fault.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct PartReport {
    from_ms: Option<u64>,
    connection: Option<u64>,
    one_packet: bool,
    /// So many packets are enough.
    #[serde(default)]
    packets: Option<u64>,
    /// So many connections are enough together.
    #[serde(default)]
    connections: Option<u64>,
    /// Whether so many of each connection are needed.
    #[serde(default)]
    of_each: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct PartOfPair {
    /// Target and name of the fault.
    of: String,
    #[serde(flatten)]
    part: PartReport,
}

impl SmallestReport {
    fn new(smallest: &Smallest) -> Self {
        let of_pair = smallest.parts.iter().filter_map(|part| {
            Some(PartOfPair {
                of: part.of.clone()?,
                part: PartReport::new(part),
            })
        });
        let mut single = smallest.parts.iter().filter(|part| part.of.is_none());
        Self {
            rules: smallest.rules.clone(),
            whole: single.next().map(PartReport::new).unwrap_or_default(),
            parts: of_pair.collect(),
        }
    }

    fn restored(&self) -> Smallest {
        let of_pair = self.parts.iter();
        let mut parts: Vec<_> = of_pair
            .map(|one| one.part.restored(Some(&one.of)))
            .collect();
        if parts.is_empty() {
            parts.push(self.whole.restored(None));
        }
        Smallest {
            rules: self.rules.clone(),
            parts,
        }
    }
}

impl PartReport {
    fn new(part: &MinimalFault) -> Self {
        Self {
            from_ms: part.from_ms,
            connection: part.connection,
            one_packet: part.packets == Some(1),
            packets: part.packets,
            connections: part.connections,
            of_each: part.of_each,
        }
    }

    fn restored(&self, of: Option<&String>) -> MinimalFault {
        MinimalFault {
            of: of.cloned(),
            from_ms: self.from_ms,
            connection: self.connection,
            // Older reports have no number.
            packets: self.packets.or(self.one_packet.then_some(1)),
            connections: self.connections,
            of_each: self.of_each,
        }
    }
}

/// What the connections to one dependency did in a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct TimelineReport {
    target: String,
    connects: Vec<ConnectionReport>,
    /// Further ones that are not listed.
    left_out: usize,
}

/// One connection. Times are in microseconds since the start of the run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct ConnectionReport {
    at_us: u64,
    established_us: Option<u64>,
    /// When it first received something.
    received_us: Option<u64>,
    closed_us: Option<u64>,
    reset: bool,
}

impl ConnectionReport {
    fn new(connect: &Connect) -> Self {
        let us = |ns: u64| ns / 1000;
        Self {
            at_us: us(connect.at_ns),
            established_us: connect.established_ns.map(us),
            received_us: connect.received_ns.map(us),
            closed_us: connect.closed_ns.map(us),
            reset: connect.is_reset,
        }
    }

    /// The connection in a picture of a run that took so long.
    fn span(&self, length_us: u64) -> Span {
        let ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
        let end_us = self.closed_us.unwrap_or(length_us).max(self.at_us);
        let (class, what) = match (self.established_us, self.received_us, self.closed_us) {
            (None, _, Some(_)) => ("bad", "was not established"),
            (None, _, None) => ("bad", "was still connecting"),
            (Some(_), ..) if self.reset => ("bad", "was reset"),
            (Some(_), None, _) => ("odd", "received nothing"),
            (Some(_), Some(_), None) => ("good", "received data, and was open at the end"),
            (Some(_), Some(_), Some(_)) => ("good", "received data"),
        };
        Span {
            from_ms: ms(self.at_us),
            to_ms: ms(end_us),
            class,
            title: format!(
                "{:.1} ms to {:.1} ms: it {what}",
                ms(self.at_us),
                ms(end_us)
            ),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct LeftOut {
    target: String,
    fault: String,
}

/// Milliseconds, as files have them.
fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What a report is about, whatever the experiments come to.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// What the command talks to.
    pub found: &'a Found,
    /// The runs without faults.
    pub measured: &'a Measured<'a>,
    /// How a cell is done again.
    pub again: &'a Again,
    /// When the first run without faults began.
    pub begun: Instant,
    /// When the first experiment began.
    pub started: Instant,
}

impl About<'_> {
    /// The file as it is while it grows, in front of the first cell that is done and behind the last one. What is done
    /// of an earlier report stays in it.
    ///
    /// # Errors
    /// Never: it is written to memory.
    pub fn growing(&self, earlier: Option<&ExploreReport>) -> Result<(Vec<u8>, Vec<u8>)> {
        const TAIL: &[u8] = b"]}";
        let none = [].iter();
        let mut report = self.report(
            none,
            [].iter(),
            Some("it is still running, or was killed".to_owned()),
        );
        let known = earlier.map_or(&[][..], |earlier| &earlier.cells);
        let known = known.iter().filter(|cell| !cell.unfinished);
        report.cells = known.cloned().collect();
        let mut head = serde_json::to_vec(&report)?;
        head.truncate(head.len() - TAIL.len());
        if !report.cells.is_empty() {
            head.push(b',');
        }
        head.push(b'\n');
        Ok((head, [b"\n", TAIL].concat()))
    }

    /// A cell in the file.
    ///
    /// # Errors
    /// Never: it is written to memory.
    pub fn item(&self, cell: &Cell) -> Result<Vec<u8>> {
        let cell = CellReport::new(&self.found.dependencies, cell, self.again);
        Ok(serde_json::to_vec(&cell)?)
    }

    /// The report in the end. If it ended early, what an earlier report has beyond that stays in it.
    #[must_use]
    pub fn whole(&self, explored: &Explored, earlier: Option<&ExploreReport>) -> ExploreReport {
        let stopped = explored.stopped.as_ref().map(|stop| match stop {
            Stop::Interrupted => "interrupted".to_owned(),
            Stop::Error(error) => format!("{error:#}"),
        });
        let mut report = self.report(explored.cells.iter(), explored.left_out.iter(), stopped);
        report.unreached = unreached(self.found, explored);
        let is_whole = explored.stopped.is_none() && explored.left_out.is_empty();
        let known = earlier.filter(|_| !is_whole).into_iter();
        for one in known.flat_map(|earlier| &earlier.cells) {
            let mut cells = report.cells.iter();
            if !cells.any(|cell| (&cell.target, &cell.fault) == (&one.target, &one.fault)) {
                report.cells.push(one.clone());
            }
        }
        report
    }

    fn report<'a>(
        &self,
        cells: impl Iterator<Item = &'a Cell>,
        left_out: impl Iterator<Item = &'a Experiment>,
        stopped: Option<String>,
    ) -> ExploreReport {
        let (_, fault, kernel) = versions();
        let dependencies = &self.found.dependencies;
        let left_out = left_out.map(|one| LeftOut {
            target: one.target(dependencies).to_owned(),
            fault: one.name().to_owned(),
        });
        ExploreReport {
            version: VERSION,
            fault,
            kernel,
            seed: self.again.seed,
            command: self.again.command.clone(),
            baseline_ms: ms(self.measured.baseline),
            timeout_ms: ms(self.measured.limit),
            length_ms: ms(self.begun.elapsed()),
            experiments_ms: ms(self.started.elapsed()),
            dependencies: dependencies.iter().map(DependencyReport::new).collect(),
            out_of_reach: self.found.out_of_reach.clone(),
            unreached: Vec::new(),
            not_run: left_out.collect(),
            stopped,
            cells: cells
                .map(|one| CellReport::new(dependencies, one, self.again))
                .collect(),
        }
    }
}

impl ExploreReport {
    /// Reads an earlier `report.json`.
    ///
    /// # Errors
    /// It can't be read, or is something else: one line.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = std::fs::read(path).with_context(|| format!("can't read {name}"))?;
        let report: Self = serde_json::from_slice(&text)
            .map_err(|error| anyhow!("{name} is no report of `fault explore`: {error}"))?;
        ensure!(
            report.version == VERSION,
            "{name} has version {}, and this fault reads version {VERSION}: start again with --report",
            report.version
        );
        Ok(report)
    }

    /// What all randomness came from.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Checks that it is about a command.
    ///
    /// # Errors
    /// It is about another one: one line.
    pub fn check_command(&self, command: &[String]) -> Result<()> {
        ensure!(
            self.command == command,
            "the report is about another command, `{}`: start again with --report",
            shell_line(&self.command)
        );
        Ok(())
    }

    /// Checks that it is about what is explored. `own` are the experiments of the file of rules.
    ///
    /// # Errors
    /// A dependency is gone: one line.
    pub fn check_targets(&self, dependencies: &[Dependency], own: &[Experiment]) -> Result<()> {
        // What is used only under a fault is found again by running under it.
        let singles = self.cells.iter().filter(|cell| !cell.is_pair());
        for cell in singles {
            let mut targets = own.iter().map(|one| one.target(dependencies));
            ensure!(
                dependencies.iter().any(|one| one.target == cell.target)
                    || targets.any(|target| target == cell.target),
                "the command no longer talks to `{}`: start again with --report",
                cell.target
            );
        }
        Ok(())
    }

    /// The cells that are known already, by the number of their experiments.
    #[must_use]
    pub fn known(&self, dependencies: &[Dependency], experiments: &[Experiment]) -> Cells {
        let all = experiments.iter().enumerate();
        let known = all.filter_map(|(number, experiment)| {
            let (target, fault) = (experiment.target(dependencies), experiment.name());
            let mut cells = self.cells.iter();
            let cell = cells.find(|cell| cell.target == target && cell.fault == fault)?;
            (!cell.unfinished).then(|| (number, cell.restored(experiment)))
        });
        known.collect()
    }

    /// `report.json`.
    ///
    /// # Errors
    /// Never: it is written to memory.
    pub fn json(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// `junit.xml`: one test for each cell, named by its target and fault.
    ///
    /// # Errors
    /// Never: it is written to memory.
    pub fn junit(&self) -> Result<Vec<u8>> {
        let cases = self.cells.iter().map(|cell| Case {
            name: format!("{} {}", cell.target, cell.fault),
            failure: cell
                .standing
                .fails()
                .then(|| format!("{}\n{}\n{}", cell.summary, cell.output, cell.reproduce)),
            length_ms: cell.took_ms,
            ..Case::default()
        });
        suite(&cases.collect::<Vec<_>>(), self.length_ms)
    }

    /// `report.html`.
    #[must_use]
    pub fn html(&self) -> String {
        let failures = self.failures();
        let mark = if failures == 0 { "✓" } else { "✗" };
        let title = format!("{mark} fault explore: {}", shell_line(&self.command));
        page(&title, &self.body())
    }

    fn failures(&self) -> usize {
        let cells = self.cells.iter();
        cells.filter(|cell| cell.standing.fails()).count()
    }

    fn body(&self) -> Markup {
        let failures = self.failures();
        html! {
            h1 {
                @if failures == 0 { span.badge.good { "survived" } } @else { span.badge.bad { (counted(failures, "failure")) } }
                code { (shell_line(&self.command)) }
            }
            p.dim {
                (counted(self.cells.len(), "experiment")) " · seed " (self.seed) " · " (self.baseline_ms) " ms without faults · "
                "fault " (self.fault) " · Linux " (self.kernel)
            }
            @if let Some(why) = &self.stopped { p.bad { "Ended early: " (why) } }
            @if !self.not_run.is_empty() { p.bad { "Not run: " (counted(self.not_run.len(), "experiment")) } }
            h2 { "Matrix" }
            div.scroll { (self.matrix()) }
            @if self.cells.iter().any(CellReport::is_pair) {
                p {
                    "Pairs of faults: "
                    (self.cells.iter().filter(|cell| cell.is_pair() && cell.verdict.is_success()).count()) " of "
                    (self.cells.iter().filter(|cell| cell.is_pair()).count()) " survived"
                }
            }
            @for (number, cell) in self.cells.iter().enumerate().filter(|(_, cell)| cell.is_below()) {
                p { (cell.link(number)) " " code { (cell.target) " " (cell.fault) } }
            }
            p.dim { (matrix::LEGEND) }
            h2 { "Dependencies" }
            div.scroll { (self.dependencies()) }
            @for line in &self.unreached { p.dim { (line) } }
            @for line in &self.out_of_reach { p.dim { "Out of reach: " (line) } }
            h2 { "Experiments" }
            p.dim {
                "Each line shows when a rule acted, or the connections to a service: blue ones received data, orange \
                 ones nothing, and red ones were refused, reset or not established."
            }
            @for (number, cell) in self.cells.iter().enumerate() { (cell.details(number)) }
        }
    }

    fn matrix(&self) -> Markup {
        let faults = matrix::FAULT_NAMES;
        let has = |fault: &&&str| self.cells.iter().any(|cell| cell.fault == **fault);
        let columns: Vec<&str> = faults.iter().filter(has).copied().collect();
        let place = |target: &str, fault: &str| {
            let is_it = |cell: &CellReport| cell.target == target && cell.fault == fault;
            self.cells.iter().position(is_it)
        };
        html! {
            table {
                tr { th {} @for fault in &columns { th { (fault) } } }
                @for one in &self.dependencies {
                    tr {
                        td { (one.kind) " " code { (one.target) } }
                        @for fault in &columns {
                            td {
                                @if let Some(number) = place(&one.target, fault) {
                                    (self.cells[number].link(number))
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn dependencies(&self) -> Markup {
        html! {
            table {
                tr {
                    th { "service" } th { "name" } th.n { "connects" } th.n { "requests" } th.n { "bytes out" }
                    th.n { "bytes in" } th.n { "first use" }
                }
                @for one in &self.dependencies {
                    tr {
                        td { (one.kind) " " code { (one.target) } }
                        td { @if let Some(name) = &one.name { (name) } }
                        td.n { (one.connects) } td.n { (one.requests) } td.n { (one.to_server_bytes) }
                        td.n { (one.to_client_bytes) } td.n { (one.first_ms) " ms" }
                    }
                }
            }
        }
    }
}

impl DependencyReport {
    fn new(one: &Dependency) -> Self {
        let usage = &one.usage;
        Self {
            target: one.target.clone(),
            kind: one.kind.to_string(),
            name: one.name.clone(),
            addresses: one.addresses.iter().map(ToString::to_string).collect(),
            port: one.port,
            connects: one.connections,
            requests: usage.turns,
            to_server_bytes: usage.to_server_bytes,
            to_client_bytes: usage.to_client_bytes,
            first_ms: ms(usage.first),
            connect_us: usage.connect.map(us),
            answer_us: usage.answer.map(us),
        }
    }
}

impl CellReport {
    fn new(dependencies: &[Dependency], cell: &Cell, again: &Again) -> Self {
        let (experiment, run) = (&cell.experiment, &cell.first.seen);
        Self {
            target: experiment.target(dependencies).to_owned(),
            fault: experiment.name().to_owned(),
            verdict: cell.first.verdict,
            differs: cell.differs,
            is_failure: cell.is_failure(),
            standing: cell.standing,
            symbol: cell.symbol().to_owned(),
            summary: matrix::happened(dependencies, cell),
            rules: experiment.rules.clone(),
            took_ms: ms(run.took),
            exit_code: match run.end {
                RunEnd::Exited(code) => Some(code),
                _ => None,
            },
            signal: match run.end {
                RunEnd::Signalled(signal) => Some(signal),
                _ => None,
            },
            hits: run.hits,
            reached: run.reached.clone(),
            connects: run.connects.clone(),
            others: run.others.clone(),
            waited_for: run.waited_for.clone(),
            unrecovered: run.unrecovered.clone(),
            broken: run.broken.clone(),
            storm: cell.storm,
            retries: cell.retries,
            survives_ms: cell.survives_ms,
            smallest: cell.smallest.as_ref().map(SmallestReport::new),
            timeline: timeline(dependencies, &run.watched),
            unfinished: cell.is_unfinished,
            reproduce: again.line(cell),
            output: run.output.clone(),
        }
    }

    /// When the fault acted, and the connections: a line for each.
    fn rows(&self) -> Vec<Row> {
        let length_us = self.took_ms.saturating_mul(1000);
        let faults = self.rules.iter().map(|text| {
            let rule = text.parse::<Rule>();
            let windows = rule.iter().flat_map(|rule| {
                let windows = windows(&rule.modifiers, length_us.saturating_mul(1000));
                windows.take(MOST).collect::<Vec<_>>()
            });
            let ms = |ns: u64| Duration::from_nanos(ns).as_secs_f64() * 1e3;
            let spans = windows.map(|(from, to)| Span {
                from_ms: ms(from),
                to_ms: ms(to),
                class: "bar",
                title: format!("{text}: {:.0} ms to {:.0} ms", ms(from), ms(to)),
            });
            Row {
                name: text.clone(),
                spans: spans.collect(),
            }
        });
        let connections = self.timeline.iter().map(|one| Row {
            name: match one.left_out {
                0 => one.target.clone(),
                more => format!("{} (and {more} later ones)", one.target),
            },
            spans: one.connects.iter().map(|one| one.span(length_us)).collect(),
        });
        faults.chain(connections).collect()
    }

    /// The cell that this is about.
    fn restored(&self, experiment: &Experiment) -> Cell {
        let end = match (self.exit_code, self.signal) {
            (Some(code), _) => RunEnd::Exited(code),
            (None, Some(signal)) => RunEnd::Signalled(signal),
            (None, None) => RunEnd::TimedOut,
        };
        let seen = Observation {
            end,
            took: Duration::from_millis(self.took_ms),
            hits: self.hits,
            connects: self.connects.clone(),
            others: self.others.clone(),
            decisions: Vec::new(),
            streams: Vec::new(),
            reached: self.reached.clone(),
            retries: Vec::new(),
            watched: self.watched(),
            output: self.output.clone(),
            waited_for: self.waited_for.clone(),
            unrecovered: self.unrecovered.clone(),
            broken: self.broken.clone(),
            left_behind: 0,
        };
        Cell {
            experiment: Experiment {
                rules: self.rules.clone(),
                ..experiment.clone()
            },
            first: Attempt {
                verdict: self.verdict,
                seen,
            },
            differs: self.differs,
            smallest: self.smallest.as_ref().map(SmallestReport::restored),
            survives_ms: self.survives_ms,
            is_unfinished: self.unfinished,
            storm: self.storm,
            retries: self.retries,
            standing: Standing::Well,
        }
    }

    /// The connections, as far as the file has them.
    fn watched(&self) -> Vec<Vec<Connect>> {
        let ns = |us: u64| us.saturating_mul(1000);
        let connect = |one: &ConnectionReport| Connect {
            at_ns: ns(one.at_us),
            established_ns: one.established_us.map(ns),
            received_ns: one.received_us.map(ns),
            closed_ns: one.closed_us.map(ns),
            is_reset: one.reset,
            is_incoming: false,
            sent_ns: None,
        };
        let timeline = self.timeline.iter();
        timeline
            .map(|one| one.connects.iter().map(connect).collect())
            .collect()
    }

    /// Whether it is of two faults.
    fn is_pair(&self) -> bool {
        kinds_of_pair(&self.fault).is_some()
    }

    /// Whether it is shown below the matrix: a rule of the user's own, or a pair that was not survived.
    fn is_below(&self) -> bool {
        let is_plain = self.is_pair() && matches!(self.symbol.as_str(), "✓" | "·");
        !matrix::FAULT_NAMES.contains(&self.fault.as_str()) && !is_plain
    }

    fn class(&self) -> &'static str {
        match self.symbol.as_str() {
            "✓" => "good",
            "·" => "dim",
            _ if self.standing.fails() => "bad",
            _ if self.is_failure => "dim",
            _ => "",
        }
    }

    fn link(&self, number: usize) -> Markup {
        html! {
            a class=(self.class()) href={ "#cell-" (number) } title=(self.summary) { (self.symbol) }
        }
    }

    fn details(&self, number: usize) -> Markup {
        html! {
            details id={ "cell-" (number) } open[self.standing.fails()] {
                summary { span class=(self.class()) { (self.symbol) } " " (self.summary) }
                @let rows = self.rows();
                @for size in SIZES { (of_rows(&rows, self.took_ms, size)) }
                p { "The command wrote:" }
                pre { (if self.output.is_empty() { "(nothing)" } else { &self.output }) }
                p { "Again:" }
                pre { (self.reproduce) }
            }
        }
    }
}

/// So many connections, or windows of a fault, are in a line at most.
const MOST: usize = 200;

/// The connections of a run to each dependency. Of a storm only the first ones are listed.
fn timeline(dependencies: &[Dependency], watched: &[Vec<Connect>]) -> Vec<TimelineReport> {
    let all = dependencies.iter().zip(watched);
    let timeline = all.map(|(one, connects)| TimelineReport {
        target: one.target.clone(),
        connects: connects
            .iter()
            .take(MOST)
            .map(ConnectionReport::new)
            .collect(),
        left_out: connects.len().saturating_sub(MOST),
    });
    timeline.collect()
}

#[cfg(test)]
mod tests {
    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::cell_of;
    use super::super::faults::{FaultKind, experiment, experiments};
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::tests::seen;
    use super::*;

    fn report() -> ExploreReport {
        let found = Found {
            dependencies: vec![example(ApplicationProtocol::Redis, 6379)],
            out_of_reach: vec!["Unix sockets".to_owned()],
        };
        let limit = Duration::from_secs(10);
        let cell = |fault, end, verdict| {
            let experiment = experiment(0, &found.dependencies[0], fault, limit);
            cell_of(experiment.unwrap(), verdict, seen(end, 77))
        };
        let mut hung = cell(FaultKind::Silent, RunEnd::TimedOut, ExperimentVerdict::Hung);
        hung.standing = Standing::New;
        hung.first.seen.watched = vec![vec![Connect {
            at_ns: 3_000_000,
            established_ns: None,
            closed_ns: None,
            is_reset: false,
            is_incoming: false,
            sent_ns: None,
            received_ns: None,
        }]];
        hung.first.seen.output = "<waiting & waiting>".to_owned();
        hung.smallest = Some(Smallest {
            rules: hung.experiment.rules.clone(),
            parts: vec![MinimalFault {
                of: Some("tcp:6379 silent".to_owned()),
                packets: Some(2),
                ..MinimalFault::default()
            }],
        });
        let explored = Explored {
            cells: vec![
                cell(
                    FaultKind::Refused,
                    RunEnd::Exited(0),
                    ExperimentVerdict::Survived,
                ),
                hung,
            ],
            left_out: Vec::new(),
            stopped: None,
        };
        let measured = Measured {
            dependencies: &found.dependencies,
            baseline: Duration::from_millis(40),
            limit,
        };
        let about = About {
            found: &found,
            measured: &measured,
            again: &Again {
                command: vec!["./app".to_owned()],
                seed: 7,
                ..Again::default()
            },
            begun: Instant::now(),
            started: Instant::now(),
        };
        about.whole(&explored, None)
    }

    #[test]
    fn the_schema_describes_the_report() {
        let schema = include_str!("../../../docs/explore.schema.json");
        let schema = serde_json::from_str(schema).expect("the schema is JSON");
        let schema = jsonschema::validator_for(&schema).expect("it is a schema");
        let json = serde_json::from_slice(&report().json().unwrap()).unwrap();
        let errors: Vec<_> = schema
            .iter_errors(&json)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{errors:?}");
    }

    #[test]
    fn what_is_known_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        std::fs::write(&path, report().json().unwrap()).unwrap();
        let read = ExploreReport::read(&path).unwrap();
        read.check_command(&["./app".to_owned()]).unwrap();
        let error = read.check_command(&["./other".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("another command, `./app`"));
        let dependencies = [example(ApplicationProtocol::Redis, 6379)];
        let faults = [FaultKind::Refused, FaultKind::Outage, FaultKind::Silent];
        let limit = Duration::from_secs(10);
        let all = experiments(&[(0, &dependencies[0])], &faults, limit);
        read.check_targets(&dependencies, &[]).unwrap();
        let known = read.known(&dependencies, &all);
        let verdicts: Vec<_> = known.iter().map(|(n, cell)| (*n, cell.verdict())).collect();
        let expected = [(0, "survived".to_owned()), (2, "hung".to_owned())];
        assert_eq!(verdicts, expected);
        assert_eq!(known[&2].first.seen.output, "<waiting & waiting>");
        let error = read.check_targets(&[example(ApplicationProtocol::Redis, 1)], &[]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no longer talks to `tcp:6379`"), "{error}");
        std::fs::write(&path, "{}").unwrap();
        let error = ExploreReport::read(&path).unwrap_err().to_string();
        assert!(error.contains("is no report of `fault explore`"), "{error}");
    }

    #[test]
    fn the_smallest_fault_of_a_report_is_told_as_before() {
        let old = r#"{"rules": ["tcp:1 reject first=1"], "from_ms": null, "connection": 2, "one_packet": true}"#;
        let old: SmallestReport = serde_json::from_str(old).unwrap();
        let words = "connection 2 is enough, one packet is enough";
        assert_eq!(old.restored().in_words(), words);
        let part = |of: &str, packets| MinimalFault {
            of: Some(of.to_owned()),
            packets,
            ..MinimalFault::default()
        };
        let pair = Smallest {
            rules: vec!["tcp:1 reject".to_owned()],
            parts: vec![part("tcp:1 refused", Some(1)), part("tcp:2 loss", Some(3))],
        };
        let written = serde_json::to_string(&SmallestReport::new(&pair)).unwrap();
        let read: SmallestReport = serde_json::from_str(&written).unwrap();
        assert_eq!(read.restored(), pair);
    }

    #[test]
    fn a_cell_is_a_test_with_a_stable_name() {
        let junit = String::from_utf8(report().junit().unwrap()).unwrap();
        for part in [
            "tests=\"2\" failures=\"1\"",
            "name=\"tcp:6379 refused\" time=\"0.077\"/>",
            "name=\"tcp:6379 silent\"",
            "&lt;waiting &amp; waiting&gt;",
        ] {
            assert!(junit.contains(part), "`{part}` is not in {junit}");
        }
    }

    #[test]
    fn the_page_links_each_cell_to_what_happened() {
        let page = report().html();
        for part in [
            "href=\"#cell-1\"",
            "id=\"cell-1\" open",
            "3.0 ms to 77.0 ms: it was still connecting",
            "tcp:6379 blackhole: 0 ms to 77 ms",
            "&lt;waiting &amp; waiting&gt;",
            "sudo fault run --seed 7 -r &#39;tcp:6379 blackhole&#39; -- ./app",
        ] {
            let found = page.contains(part) || page.contains(&part.replace("&#39;", "'"));
            assert!(found, "`{part}` is not in {page}");
        }
    }
}
