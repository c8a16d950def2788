//! `fault check`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::rules::RuleArgs;
use super::{Failure, Outcome, exit, print_json};
use crate::plan::Plan;
use crate::report::expectations;
use crate::rule::scenario::Expect;
use crate::rule::{Fault, Rule, timeline};
use crate::session::rules::RuleSet;
use crate::tell;

/// Columns of the timeline where the terminal's width is unknown.
const WIDTH: usize = 100;

/// At most this many windows are listed for each rule.
const MOST_WINDOWS: usize = 1000;

/// What follows the options in `fault check --help`.
const AFTER: &str = "\
Exit codes:
  0  the rules are right
  2  the first mistake is printed, with its place

Examples:
  fault check scenario.yaml
  fault check -r 'tcp:5432 down at=2s for=5s'
  fault check --json scenario.yaml
  fault check --seed 7 --random length=2s..10s,total=1h -r 'tcp:3306 down'

`fault help rules` explains the rules.";

/// The arguments of `fault check`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct CheckArgs {
    #[command(flatten)]
    rules: RuleArgs,
    /// The scenario file (.json, .yaml, .toml).
    #[arg(value_name = "FILE", conflicts_with = "file")]
    scenario: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl CheckArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// The first mistake in the rules.
    pub fn execute(self) -> Outcome {
        let parsed = match &self.scenario {
            Some(path) => self.rules.parse_with(Some(path))?,
            None => self.rules.parse()?,
        };
        expectations::targets(&parsed.expect, &parsed.rules, &parsed.targets)
            .map_err(Failure::usage)?;
        let seed = parsed.seed.unwrap_or(0);
        let plan =
            Plan::new(&parsed.rules, seed, None, parsed.length_ns).map_err(Failure::usage)?;
        let rules: Vec<_> = parsed.rules.iter().map(|(rule, _)| rule.clone()).collect();
        let horizon = parsed
            .length_ns
            .unwrap_or_else(|| timeline::horizon_ns(&rules));
        for (rule, _) in &parsed.rules {
            if let (Fault::Close(_), 0) = (&rule.fault, rule.modifiers.at_ns) {
                tell::line(format_args!(
                    "fault: warning: `{rule}` acts at the start, when no connection is redirected yet: give it `at=TIME`, \
                     and its target another stream rule such as `latency=1ms`"
                ));
            }
        }
        if self.json {
            print_json(&Checked::new(&parsed, &plan, horizon))?;
            return Ok(exit::SUCCESS);
        }
        let folded = parsed.folded(&plan);
        let lines: Vec<Vec<&Rule>> = folded
            .iter()
            .map(|line| line.members.iter().map(|index| &rules[*index]).collect())
            .collect();
        let picture = timeline::picture(&lines, horizon, width());
        let carried = folded.iter().map(|line| {
            let index = line.members[0];
            let (planned, rule) = (&plan.rules[index], &rules[index]);
            let hosts = rule.modifiers.hosts.map_or_else(String::new, |_| {
                let hosts = planned.resolved.hosts.iter().map(ToString::to_string);
                format!(", on {}", hosts.collect::<Vec<_>>().join(", "))
            });
            format!("{line}  by {}{hosts}\n", planned.mechanism(None))
        });
        tell::data(&format!("{picture}\n{}", carried.collect::<String>()))?;
        Ok(exit::SUCCESS)
    }
}

/// The result as JSON.
#[derive(Serialize)]
struct Checked<'a> {
    /// The seed, if one was given.
    seed: Option<u64>,
    /// How long the timeline is, in milliseconds.
    length_ms: u64,
    rules: Vec<CheckedRule<'a>>,
    expect: &'a Expect,
}

/// A rule in the result.
#[derive(Serialize)]
struct CheckedRule<'a> {
    rule: &'a str,
    /// The rule that it was drawn from by `random`.
    #[serde(skip_serializing_if = "Option::is_none")]
    drawn_from: Option<String>,
    target: &'a str,
    /// The mechanism on this machine.
    mechanism: String,
    /// The rule's windows in milliseconds: from, to.
    windows_ms: Vec<(u64, u64)>,
}

impl<'a> Checked<'a> {
    fn new(parsed: &'a RuleSet, plan: &'a Plan, horizon_ns: u64) -> Self {
        const MS_NS: u64 = 1_000_000;
        let rules = plan.rules.iter().zip(&parsed.rules).enumerate();
        let rules = rules.map(|(index, (rule, (_, resolved)))| CheckedRule {
            rule: &rule.text,
            drawn_from: parsed.drawn_from(index),
            target: &rule.target,
            mechanism: rule.mechanism(None),
            windows_ms: timeline::windows(&resolved.modifiers, horizon_ns)
                .take(MOST_WINDOWS)
                .map(|(from, to)| (from / MS_NS, to / MS_NS))
                .collect(),
        });
        Self {
            seed: parsed.seed,
            length_ms: horizon_ns / MS_NS,
            rules: rules.collect(),
            expect: &parsed.expect,
        }
    }
}

fn width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .unwrap_or(WIDTH)
}
