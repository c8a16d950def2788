//! `junit.xml`: what CI systems show as tests. For a run: the command, each rule (whether it fired) and each expectation.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::expectations::EXIT;
use super::file::{RuleReport, RunReport, shell_line};
use super::fold::{Folded, fold};

/// One test of the suite.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Why it failed, if it did.
    pub failure: Option<String>,
    /// Why it does not count, if it does not.
    pub skipped: Option<String>,
    /// How long it took, in milliseconds.
    pub length_ms: u64,
}

/// The whole file of a run.
///
/// # Errors
/// None: it is written to memory.
pub fn render(report: &RunReport) -> Result<Vec<u8>> {
    suite(&cases(report), report.length_ms)
}

/// The whole file of some tests, which took `length_ms` milliseconds together.
///
/// # Errors
/// Never: it is written to memory.
pub fn suite(cases: &[Case], length_ms: u64) -> Result<Vec<u8>> {
    let failures = cases.iter().filter(|case| case.failure.is_some()).count();
    let skipped = cases.iter().filter(|case| case.skipped.is_some()).count();
    let seconds_of_all = seconds(length_ms);
    let mut writer = Writer::new_with_indent(
        b"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_vec(),
        b' ',
        2,
    );
    writer
        .create_element("testsuite")
        .with_attribute(("name", "fault"))
        .with_attribute(("tests", cases.len().to_string().as_str()))
        .with_attribute(("failures", failures.to_string().as_str()))
        .with_attribute(("skipped", skipped.to_string().as_str()))
        .with_attribute(("time", seconds_of_all.as_str()))
        .write_inner_content(|writer| {
            for case in cases {
                let element = writer
                    .create_element("testcase")
                    .with_attribute(("classname", "fault"))
                    .with_attribute(("name", case.name.as_str()))
                    .with_attribute(("time", seconds(case.length_ms).as_str()));
                match (&case.failure, &case.skipped) {
                    (None, None) => element.write_empty()?,
                    (Some(why), _) => element.write_inner_content(|writer| {
                        writer
                            .create_element("failure")
                            .with_attribute(("message", why.as_str()))
                            .write_text_content(BytesText::new(why))?;
                        Ok(())
                    })?,
                    (None, Some(why)) => element.write_inner_content(|writer| {
                        let skipped = writer.create_element("skipped");
                        skipped
                            .with_attribute(("message", why.as_str()))
                            .write_empty()?;
                        Ok(())
                    })?,
                };
            }
            Ok(())
        })
        .context("writing junit.xml")?;
    Ok(writer.into_inner())
}

/// The tests of a run. Their names are the same in every run of the same command and rules: what was measured, and which
/// faults were drawn, is not part of them.
fn cases(report: &RunReport) -> Vec<Case> {
    let code = report.command_exit;
    let expected = report
        .expectations
        .iter()
        .any(|expectation| expectation.holds && expectation.kind == EXIT);
    let command = Case {
        name: shell_line(&report.command),
        failure: (code != 0 && !expected).then(|| format!("the command ended with {code}")),
        length_ms: report.length_ms,
        ..Case::default()
    };
    let folded = fold(report.rules.iter().map(RuleReport::name));
    let rules = folded.iter().map(|line| rule_case(line, &report.rules));
    let expectations = report.expectations.iter().map(|expectation| Case {
        name: format!("expect {}", expectation.expected),
        failure: (!expectation.holds).then(|| expectation.text()),
        length_ms: expectation.broke_ms.unwrap_or(report.length_ms),
        ..Case::default()
    });
    let mut cases: Vec<Case> = std::iter::once(command)
        .chain(rules)
        .chain(expectations)
        .collect();
    number_equal_names(&mut cases);
    cases
}

/// The test of a rule, or of all faults that were drawn from one. It takes as long as they were active.
fn rule_case(line: &Folded, rules: &[RuleReport]) -> Case {
    let members = || line.members.iter().map(|index| &rules[*index]);
    let has_fired = members().any(|rule| rule.fired);
    let failed = members().any(RuleReport::failed);
    let drawn = if line.is_drawn { " (drawn)" } else { "" };
    Case {
        name: format!("the rule fires: {}{drawn}", line.rule),
        failure: failed.then(|| "the rule never fired, so the run did not test it".to_owned()),
        skipped: (!failed && !has_fired)
            .then(|| "the rule never fired, which is accepted".to_owned()),
        length_ms: members().map(RuleReport::active_ms).sum(),
    }
}

/// CI systems tell tests apart by their names.
fn number_equal_names(cases: &mut [Case]) {
    let mut counts: HashMap<String, u32> = HashMap::new();
    for case in cases {
        let count = counts.entry(case.name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            case.name = format!("{} ({count})", case.name);
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}
