//! What is printed: the dependencies, the matrix, and three lines for each failure.

use std::collections::BTreeSet;
use std::time::Duration;

use super::cell::Cell;
use super::dependency::{Dependency, Found};
use super::faults::{Experiment, FAULTS, FaultKind};
use super::shrink::Smallest;
use super::verdict::RunEnd;
use crate::report::summary::{counted, human_bytes};
use crate::rule::units::show_duration;

/// What the symbols mean.
pub const LEGEND: &str = "✓ survived  s slow  ! retry storm  F failed  H hung  R no recovery  B broken  ? flaky  · not reached";

/// The names of all faults, in the order of columns.
pub const FAULT_NAMES: [&str; FAULTS.len()] = {
    let mut names = [""; FAULTS.len()];
    let mut place = 0;
    while place < names.len() {
        names[place] = FAULTS[place].1;
        place += 1;
    }
    names
};

/// How many of the last lines of a command's output are shown.
const LINES: usize = 3;

/// A time as people read it.
#[must_use]
pub fn seconds(time: Duration) -> String {
    match time.as_millis() {
        ms @ 0..1000 => format!("{ms} ms"),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// The dependencies with what they carried, and what is out of reach.
#[must_use]
pub fn dependencies(found: &Found) -> String {
    let mut text = String::new();
    for (number, one) in (1..).zip(&found.dependencies) {
        let usage = &one.usage;
        let mut parts = vec![
            counted(
                one.connections,
                if usage.connect.is_some() {
                    "connect"
                } else {
                    "call"
                },
            ),
            counted(usage.turns, "request"),
            format!("{} out", human_bytes(usage.to_server_bytes)),
            format!("{} in", human_bytes(usage.to_client_bytes)),
            format!("first after {}", seconds(usage.first)),
        ];
        let times = [("connects", usage.connect), ("answers", usage.answer)];
        for (what, time) in times {
            parts.extend(
                time.map(|time| format!("{what} within {:.1} ms", time.as_secs_f64() * 1e3)),
            );
        }
        text.extend([format!("  {number}. {one}: {}\n", parts.join(", "))]);
    }
    for line in &found.out_of_reach {
        text.extend([format!("  out of reach: {line}\n")]);
    }
    text
}

/// The list of experiments, for `--plan`.
#[must_use]
pub fn plan(dependencies: &[Dependency], experiments: &[Experiment]) -> String {
    let lines = experiments.iter().map(|experiment| {
        let (target, name) = (experiment.target(dependencies), experiment.name());
        format!("  {target} {name}: {}\n", experiment.rules.join(" + "))
    });
    lines.collect()
}

/// The matrix: a row for each dependency, a column for each fault that was tried.
#[must_use]
pub fn matrix(dependencies: &[Dependency], cells: &[Cell], has_color: bool) -> String {
    let (own, cells): (Vec<&Cell>, Vec<&Cell>) =
        cells.iter().partition(|cell| cell.experiment.own.is_some());
    let columns: BTreeSet<FaultKind> = cells.iter().map(|cell| cell.experiment.fault).collect();
    let rows: Vec<(usize, String)> = dependencies
        .iter()
        .enumerate()
        .filter(|(number, _)| {
            cells
                .iter()
                .any(|cell| cell.experiment.dependency == *number)
        })
        .map(|(number, one)| (number, one.label()))
        .collect();
    let width = rows.iter().map(|(_, name)| name.chars().count()).max();
    let width = width.unwrap_or(0);
    let mut text = format!("  {:width$}", "");
    for fault in &columns {
        text.extend([format!("  {fault}")]);
    }
    text.push('\n');
    for (number, name) in rows {
        text.extend([format!("  {name:width$}")]);
        for fault in &columns {
            let is_it = |cell: &&&Cell| {
                (cell.experiment.dependency, cell.experiment.fault) == (number, *fault)
            };
            let symbol = cells.iter().find(is_it).map_or(" ", |cell| cell.symbol());
            let space = " ".repeat(fault.name().len() - 1);
            text.extend([format!("  {}{space}", painted(symbol, has_color))]);
        }
        text = text.trim_end().to_owned() + "\n";
    }
    if columns.is_empty() {
        text.clear();
    }
    let (pairs, own): (Vec<&Cell>, Vec<&Cell>) = own
        .into_iter()
        .partition(|cell| !cell.experiment.parts.is_empty());
    let is_plain = |cell: &&&Cell| matches!(cell.symbol(), "✓" | "·");
    let survived = pairs.iter().filter(|cell| cell.first.verdict.is_success());
    let survived = survived.count();
    if !pairs.is_empty() {
        let all = pairs.len();
        text.extend([format!("  pairs of faults: {survived} of {all} survived\n")]);
    }
    let told = pairs.iter().filter(|cell| !is_plain(cell)).copied();
    for cell in own.into_iter().chain(told) {
        let symbol = painted(cell.symbol(), has_color);
        let (target, name) = (cell.experiment.target(dependencies), cell.experiment.name());
        text.extend([format!("  {symbol} {target} {name}\n")]);
    }
    format!("{text}  {LEGEND}\n")
}

fn painted(symbol: &str, has_color: bool) -> String {
    let color = match symbol {
        _ if !has_color => return symbol.to_owned(),
        "✓" => 32,
        "s" | "!" | "?" => 33,
        "·" | " " => return symbol.to_owned(),
        _ => 31,
    };
    format!("\x1b[{color}m{symbol}\x1b[0m")
}

/// What a cell came to, in one line.
#[must_use]
pub fn happened(dependencies: &[Dependency], cell: &Cell) -> String {
    let seen = &cell.first.seen;
    let end = match seen.end {
        RunEnd::Exited(0) => "exit code 0".to_owned(),
        RunEnd::Exited(code) => format!("exit code {code}"),
        RunEnd::Signalled(signal) => format!("ended by signal {signal}"),
        RunEnd::TimedOut => "killed".to_owned(),
    };
    let mut text = format!(
        "{} {}: {}, {end} after {}",
        cell.experiment.target(dependencies),
        cell.experiment.name(),
        cell.verdict(),
        seconds(seen.took)
    );
    text.push_str(cell.standing.words());
    if let Some(why) = &seen.broken {
        text.extend([format!("; the check failed: {why}")]);
    }
    if let Some(why) = &seen.unrecovered {
        text.extend([format!(
            "; it did not work again in time after the fault: {why}"
        )]);
    }
    if !seen.waited_for.is_empty() {
        text.extend([format!("; it waited for {}", seen.waited_for.join(", "))]);
    }
    if !seen.others.is_empty() {
        text.extend([format!("; it also connected to {}", seen.others.join(", "))]);
    }
    if let Some(ms) = cell.survives_ms {
        let time = show_duration(ms.saturating_mul(1_000_000));
        text.extend([format!("; it survives up to {time}")]);
    }
    if let Some(times) = cell.storm {
        text.extend([format!("; {times} times the usual connects")]);
    }
    if let Some(retries) = cell.retries {
        text.extend([format!("; {retries} retries without growing back-off")]);
    }
    let smallest = cell.smallest.as_ref().map(Smallest::in_words);
    if let Some(smallest) = smallest.filter(|words| !words.is_empty()) {
        text.extend([format!("; {smallest}")]);
    }
    if cell.is_unfinished {
        text.push_str("; the search for the smallest fault was cut short");
    }
    text
}

/// The last lines of the output, in one line.
#[must_use]
pub fn last_lines(output: &str) -> String {
    let lines: Vec<_> = output
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let first = lines.len().saturating_sub(LINES);
    match lines.len() {
        0 => "(it wrote nothing)".to_owned(),
        _ => lines[first..].join(" | "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::cell_of;
    use super::super::faults::{Own, experiment};
    use super::super::kind::ApplicationProtocol;
    use super::super::shrink::MinimalFault;
    use super::super::verdict::ExperimentVerdict;
    use super::super::verdict::tests::seen;
    use super::*;

    fn cell(number: usize, one: &Dependency, fault: FaultKind, verdict: ExperimentVerdict) -> Cell {
        let experiment = experiment(number, one, fault, Duration::from_secs(10));
        cell_of(experiment.unwrap(), verdict, seen(RunEnd::TimedOut, 10_020))
    }

    #[test]
    fn the_matrix_has_a_column_for_each_fault_that_was_tried() {
        let all = [
            example(ApplicationProtocol::Redis, 6379),
            example(ApplicationProtocol::Unknown, 80),
        ];
        let cells = [
            cell(0, &all[0], FaultKind::Refused, ExperimentVerdict::Survived),
            cell(1, &all[1], FaultKind::Refused, ExperimentVerdict::Failed),
            cell(1, &all[1], FaultKind::Slow, ExperimentVerdict::Hung),
        ];
        let text = matrix(&all, &cells, false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[..3],
            [
                "                  refused  slow",
                "  redis tcp:6379  ✓",
                "  unknown tcp:80  F        H"
            ],
            "{text}"
        );
        assert!(matrix(&all, &cells, true).contains("\x1b[31mH\x1b[0m"));
        let mut own = cells[1].clone();
        own.experiment.own = Some(Own {
            target: "tcp:80".to_owned(),
            name: "loss=5%".to_owned(),
        });
        assert!(matrix(&all, &[own], false).starts_with("  F tcp:80 loss=5%\n  ✓"));
    }

    #[test]
    fn a_failure_is_told_in_words() {
        let one = example(ApplicationProtocol::Redis, 6379);
        let mut cell = cell(0, &one, FaultKind::Silent, ExperimentVerdict::Hung);
        cell.first.seen.waited_for = vec!["tcp:6379 (connecting)".to_owned()];
        cell.smallest = Some(Smallest {
            rules: vec!["tcp:6379 blackhole conn=2".to_owned()],
            parts: vec![MinimalFault {
                connection: Some(2),
                ..MinimalFault::default()
            }],
        });
        assert_eq!(
            happened(std::slice::from_ref(&one), &cell),
            "tcp:6379 silent: hung, killed after 10.0 s; it waited for tcp:6379 (connecting); connection 2 is \
             enough"
        );
        let mut slow = super::tests::cell(0, &one, FaultKind::Slow, ExperimentVerdict::Survived);
        slow.survives_ms = Some(2500);
        let told = happened(std::slice::from_ref(&one), &slow);
        assert!(told.ends_with("; it survives up to 2.5s"), "{told}");
        assert_eq!(last_lines("a\nb\n\nc \nd\n"), "b | c | d");
    }
}
