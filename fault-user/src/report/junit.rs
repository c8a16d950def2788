//! `junit.xml`: what CI systems show as tests. For a run: the command, each rule (whether it fired) and each expectation.

use anyhow::{Context as _, Result};
use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::file::{Report, shell_line};

/// One test of the suite.
pub struct Case {
    /// Its name.
    pub name: String,
    /// Why it failed, if it did.
    pub failure: Option<String>,
    /// How long it took, in milliseconds.
    pub length_ms: u64,
}

/// The whole file of a run.
///
/// # Errors
/// None: it is written to memory.
pub fn render(report: &Report) -> Result<Vec<u8>> {
    suite(&cases(report), report.length_ms)
}

/// The whole file of some tests, which took `length_ms` milliseconds together.
///
/// # Errors
/// Never: it is written to memory.
pub fn suite(cases: &[Case], length_ms: u64) -> Result<Vec<u8>> {
    let failures = cases.iter().filter(|case| case.failure.is_some()).count();
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
        .with_attribute(("time", seconds_of_all.as_str()))
        .write_inner_content(|writer| {
            for case in cases {
                let element = writer
                    .create_element("testcase")
                    .with_attribute(("classname", "fault"))
                    .with_attribute(("name", case.name.as_str()))
                    .with_attribute(("time", seconds(case.length_ms).as_str()));
                match &case.failure {
                    None => element.write_empty()?,
                    Some(why) => element.write_inner_content(|writer| {
                        writer
                            .create_element("failure")
                            .with_attribute(("message", why.as_str()))
                            .write_text_content(BytesText::new(why))?;
                        Ok(())
                    })?,
                };
            }
            Ok(())
        })
        .context("writing junit.xml")?;
    Ok(writer.into_inner())
}

fn cases(report: &Report) -> Vec<Case> {
    let (code, length_ms) = (report.command_exit, report.length_ms);
    let expected = report
        .expectations
        .iter()
        .any(|expectation| expectation.holds && expectation.text.starts_with("expect exit"));
    let command = Case {
        name: shell_line(&report.command),
        failure: (code != 0 && !expected).then(|| format!("the command ended with {code}")),
        length_ms,
    };
    let rules = report.rules.iter().map(|rule| Case {
        name: format!("the rule fires: {}", rule.rule),
        failure: (!rule.fired)
            .then(|| "the rule never fired, so the run did not test it".to_owned()),
        length_ms,
    });
    let expectations = report.expectations.iter().map(|expectation| Case {
        name: expectation.text.clone(),
        failure: (!expectation.holds).then(|| expectation.text.clone()),
        length_ms,
    });
    std::iter::once(command)
        .chain(rules)
        .chain(expectations)
        .collect()
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}
