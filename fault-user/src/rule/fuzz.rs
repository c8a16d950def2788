//! The entry of a fuzzer.

use super::Rule;
use super::scenario::{Format, Scenario};

/// Reads the bytes as a rule and as a scenario in each format, and whatever is read must print as what
/// is read as the same again. Errors must draw.
///
/// # Panics
/// Where one of that does not hold, which is what a fuzzer looks for.
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match text.parse::<Rule>() {
        Ok(rule) => round_trip(&rule),
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.one_line().is_empty());
        }
    }
    if let Ok(rule) = serde_json::from_str::<Rule>(text) {
        round_trip(&rule);
    }
    for format in [Format::Json, Format::Yaml, Format::Toml] {
        match Scenario::read(text, format, "fuzz") {
            Ok(scenario) => {
                scenario.rules.iter().for_each(round_trip);
                let json = serde_json::to_string(&scenario).expect("a scenario is JSON");
                let back =
                    Scenario::read(&json, Format::Json, "fuzz").expect("what is written is read");
                assert_eq!(back, scenario, "{json}");
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// The rule as text and as object is read as the same rule.
fn round_trip(rule: &Rule) {
    let text = rule.to_string();
    assert_eq!(text.parse().as_ref(), Ok(rule), "{text}");
    let object = rule.to_object();
    let back: Rule =
        serde_json::from_value(object.clone()).expect("an object that was printed is read");
    assert_eq!(back, *rule, "{object}");
    assert_eq!(rule.check(), Ok(()), "{text}");
}
