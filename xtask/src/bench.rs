//! `cargo xtask bench`: runs the benchmarks and compares what they measured with the goals.
//!
//! A benchmark is a program in `fault-user/benches` (`harness = false`) that prints one [`Measure`]
//! per line as JSON; other lines are passed on as they are.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    setup::{self, Need},
    workspace::{cargo, shown},
};

/// Measure what fault costs, and compare with the goals.
#[derive(clap::Args)]
pub struct Arguments {
    /// Print the measures as JSON lines instead of a table
    #[arg(long)]
    json: bool,
    /// Only these benchmarks, by the names of their files in fault-user/benches
    names: Vec<String>,
}

/// One figure of one benchmark.
#[derive(Deserialize)]
struct Measure {
    name: String,
    value: f64,
    unit: String,
    /// The same figure of what it is compared with, measured in the same run.
    reference: Option<f64>,
    /// `value / reference`.
    ratio: Option<f64>,
    /// What is to be reached, as text ("at most 60") or a bare number.
    goal: Option<Value>,
    ok: bool,
}

/// Runs the subcommand.
///
/// # Errors
/// Fails when a benchmark fails, measures nothing or misses its goal.
pub fn run(arguments: &Arguments) -> Result<()> {
    setup::require(&[Need::Bench])?;
    let measures = measure(arguments)?;
    if !arguments.json {
        print_table(&measures);
    }
    if measures.is_empty() {
        bail!("the benchmarks measured nothing");
    }
    let missed: Vec<_> = measures
        .iter()
        .filter(|m| !m.ok)
        .map(|m| m.name.as_str())
        .collect();
    if !missed.is_empty() {
        bail!("missed their goals: {}", missed.join(", "));
    }
    Ok(())
}

fn measure(arguments: &Arguments) -> Result<Vec<Measure>> {
    let mut command = cargo();
    command.args(["bench", "--locked", "--package=fault-user"]);
    if arguments.names.is_empty() {
        command.args(["--bench", "*"]);
    }
    for name in &arguments.names {
        command.args(["--bench", name]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start `{}`", shown(&command)))?;
    let lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
    let mut measures = Vec::new();
    for line in lines {
        let line = line.context("can't read what the benchmarks print")?;
        if line.starts_with('{') {
            let measure = serde_json::from_str(&line)
                .with_context(|| format!("a benchmark printed what is no measure: {line}"))?;
            measures.push(measure);
            if arguments.json {
                println!("{line}");
            }
        } else {
            eprintln!("{line}");
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(&command));
    }
    Ok(measures)
}

fn print_table(measures: &[Measure]) {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
    let mut rows =
        vec![["measure", "value", "unit", "reference", "ratio", "goal", ""].map(Into::into)];
    for measure in measures {
        rows.push([
            measure.name.clone(),
            short(measure.value),
            measure.unit.clone(),
            number(measure.reference),
            number(measure.ratio),
            match &measure.goal {
                None => "-".to_owned(),
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            },
            if measure.ok { "ok" } else { "MISSED" }.to_owned(),
        ]);
    }
    let widths: [usize; 7] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row: &[String; 7]| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    for row in rows {
        let cells: Vec<_> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

/// A number with about four digits that matter: 0.9713, 48.52, 1234567.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Measure, short};

    #[test]
    fn numbers_keep_the_digits_that_matter() {
        assert_eq!(
            [0.971_34, 48.516, 1_234_567.4].map(short),
            ["0.9713", "48.52", "1234567"]
        );
    }

    #[test]
    fn a_measure_may_leave_out_what_it_is_compared_with() {
        let line = r#"{"name":"n","value":1.5,"unit":"ns","goal":"at most 60","ok":true}"#;
        let measure: Measure = serde_json::from_str(line).expect("a measure");
        assert_eq!(
            (measure.value, measure.ratio, measure.ok),
            (1.5, None, true)
        );
    }
}
