//! Whether what a scenario expects has come true.

use anyhow::{Result, bail};

use crate::kernel::injection::Hits;
use crate::plan::Plan;
use crate::process::command::Ended;
use crate::rule::scenario::Expect;

/// Refuses expectations that this version can't check: an expectation that nobody looks at is worse than
/// none.
///
/// # Errors
/// The first one, by its field.
pub fn supported(expect: &Expect) -> Result<()> {
    let unchecked = [
        ("max_connects", !expect.max_connects.is_empty()),
        ("connect_rate", !expect.connect_rate.is_empty()),
        ("recovers_within", !expect.recovers_within.is_empty()),
        ("max_open", !expect.max_open.is_empty()),
        ("no_traffic_while", !expect.no_traffic_while.is_empty()),
        ("p99_connect", !expect.p99_connect.is_empty()),
        ("probe", !expect.probe.is_empty()),
    ];
    if let Some((field, _)) = unchecked.iter().find(|(_, given)| *given) {
        bail!("`expect.{field}` can't be checked by this version of fault: `exit` and `fired` can");
    }
    Ok(())
}

/// An expectation and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it came true.
    pub holds: bool,
    /// What was expected and what was found, in one line.
    pub text: String,
}

/// Checks every expectation.
#[must_use]
pub fn verdicts(expect: &Expect, plan: &Plan, hits: &[Hits], ended: Ended) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    if let Some(code) = expect.exit {
        verdicts.push(Verdict {
            holds: ended.exit_code() == code,
            text: format!(
                "expect exit {code}: the command ended with {}",
                ended.exit_code()
            ),
        });
    }
    for target in &expect.fired {
        let fired: u64 = plan
            .rules
            .iter()
            .zip(hits)
            .filter(|(rule, _)| rule.target == *target)
            .map(|(_, hits)| hits.stats.hit_packets)
            .sum();
        verdicts.push(Verdict {
            holds: fired > 0,
            text: format!("expect {target} fired: {fired} packets hit"),
        });
    }
    verdicts
}
