//! Output for GitHub jobs: a table in the job's summary, and error lines.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use crate::sys::process::caller;
use crate::sys::process::files::{Writer, append};
use crate::tell;
use anyhow::{Context as _, Result};

use super::file::{RuleReport, RunReport, shell_line};
use super::fold::fold;
use super::summary::human_bytes;

/// The file for the summary of this job on GitHub, which sudo hides from `fault`. `None` elsewhere.
#[must_use]
pub fn summary_file() -> Option<PathBuf> {
    caller::variable("GITHUB_STEP_SUMMARY").map(PathBuf::from)
}

/// Appends to [`summary_file`], and prints `::error::` lines.
///
/// # Errors
/// The file can't be written.
pub fn tell(report: &RunReport, path: PathBuf, writer: &Writer) -> Result<()> {
    let table = table(report);
    writer.run(move || {
        let written = append(&path)?.write_all(table.as_bytes());
        written.with_context(|| format!("can't write {}", path.display()))
    })?;
    for line in errors(report) {
        tell::data(&format!("::error::{line}\n"))?;
    }
    Ok(())
}

/// The table, as Markdown.
#[must_use]
pub fn table(report: &RunReport) -> String {
    let mark = |good: bool| if good { "✅" } else { "❌" };
    let mut text = format!(
        "### fault: `{}` {}\n\nSeed {}, {}.{} s, exit code {}.\n\n| rule | matched | hit | connections | by | \
         |\n|---|---|---|---|---|---|\n",
        cell(&shell_line(&report.command)),
        mark(report.is_good()),
        report.seed,
        report.length_ms / 1000,
        report.length_ms % 1000 / 100,
        report.exit,
    );
    for line in fold(report.rules.iter().map(RuleReport::name)) {
        let members = || line.members.iter().map(|index| &report.rules[*index]);
        let sum = |figure: fn(&RuleReport) -> u64| members().map(figure).sum::<u64>();
        let (failed, fired) = (
            members().any(RuleReport::failed),
            members().any(|rule| rule.fired),
        );
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "| `{}` | {} ({}) | {} | {} | {} | {} |",
            cell(&line.to_string()),
            sum(|rule| rule.seen.packets),
            human_bytes(sum(|rule| rule.seen.bytes)),
            sum(|rule| rule.hit.packets),
            sum(|rule| rule.connections),
            members().next().map_or("", |rule| &rule.mechanism),
            if failed || fired {
                mark(!failed)
            } else {
                "never fired (accepted)"
            }
        );
    }
    for expectation in &report.expectations {
        let _ = writeln!(text, "\n{} {}", mark(expectation.holds), expectation.text());
    }
    let _ = writeln!(text, "\nAgain: `{}`\n", cell(&shell_line(&report.again)));
    text
}

/// A text for a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '`'], " ")
}

/// The errors, one line each, escaped for GitHub.
#[must_use]
pub fn errors(report: &RunReport) -> Vec<String> {
    let escaped = |text: String| {
        text.replace('%', "%25")
            .replace('\r', "%0D")
            .replace('\n', "%0A")
    };
    let folded = fold(report.rules.iter().map(RuleReport::name));
    let rules = folded
        .into_iter()
        .filter(|line| {
            let mut members = line.members.iter();
            members.any(|index| report.rules[*index].failed())
        })
        .map(|line| format!("fault: the rule `{line}` never fired"));
    let expectations = report
        .expectations
        .iter()
        .filter(|expectation| !expectation.holds)
        .map(|expectation| format!("fault: {}", expectation.text()));
    rules.chain(expectations).map(escaped).collect()
}
