//! Output for GitHub jobs: a table in the job's summary, and error lines.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use crate::sys::process::files::{Writer, append};
use crate::tell;
use anyhow::{Context as _, Result};

use super::file::{Report, shell_line};
use super::summary::human_bytes;

/// Whether this is a GitHub job with a summary file.
#[must_use]
pub fn is_told() -> bool {
    std::env::var_os("GITHUB_STEP_SUMMARY").is_some()
}

/// Appends to the file that `$GITHUB_STEP_SUMMARY` names, and prints `::error::` lines, where this is a job on GitHub.
///
/// # Errors
/// The file can't be written.
pub fn tell(report: &Report, writer: &Writer) -> Result<()> {
    let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY") else {
        return Ok(());
    };
    let table = table(report);
    writer.run(move || {
        let written = append(Path::new(&path))?.write_all(table.as_bytes());
        written.with_context(|| format!("can't write {}", path.display()))
    })?;
    for line in errors(report) {
        tell::data(&format!("::error::{line}\n"))?;
    }
    Ok(())
}

/// The table, as Markdown.
#[must_use]
pub fn table(report: &Report) -> String {
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
    for rule in &report.rules {
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "| `{}` | {} ({}) | {} | {} | {} | {} |",
            cell(&rule.rule),
            rule.seen.packets,
            human_bytes(rule.seen.bytes),
            rule.hit.packets,
            rule.connections,
            rule.mechanism,
            mark(rule.fired)
        );
    }
    for expectation in &report.expectations {
        let _ = writeln!(text, "\n{} {}", mark(expectation.holds), expectation.text);
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
pub fn errors(report: &Report) -> Vec<String> {
    let escaped = |text: String| {
        text.replace('%', "%25")
            .replace('\r', "%0D")
            .replace('\n', "%0A")
    };
    let rules = report
        .rules
        .iter()
        .filter(|rule| !rule.fired)
        .map(|rule| format!("fault: the rule `{}` never fired", rule.rule));
    let expectations = report
        .expectations
        .iter()
        .filter(|expectation| !expectation.holds)
        .map(|expectation| format!("fault: {}", expectation.text));
    rules.chain(expectations).map(escaped).collect()
}
