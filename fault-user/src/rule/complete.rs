//! What may come next in a rule that is being typed, for the completions of shells. Everything comes from the tables
//! that the parser reads, and only what makes a rule is offered.

use super::catalog::{self, FAULTS, MIX};
use super::dictionary;
use super::modifier::{self, MODIFIERS};
use super::profile::PROFILES;
use super::spec::{Param, Spec, ValueKind};
use super::text::reads_rule;

/// A way to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The rule with its last word completed.
    pub text: String,
    /// What that word does.
    pub help: String,
}

/// The ways to complete the last word of a rule, in the order of the tables.
#[must_use]
pub fn candidates(rule: &str) -> Vec<Candidate> {
    let start = rule.rfind(char::is_whitespace).map_or(0, |at| at + 1);
    let (before, last) = rule.split_at(start);
    let words: Vec<_> = before.split_whitespace().collect();
    let all = match (words.as_slice(), last.split_once('=')) {
        ([], _) => targets(),
        ([_], Some((name, _))) => arguments(name),
        ([_], None) => faults(),
        ([_, "mix", ..], None) => arms(),
        (_, Some((key, _))) => values(key),
        (_, None) => modifiers(),
    };
    let is_first = words.is_empty();
    let fits = |(word, whole, _): &Offer| {
        word.starts_with(last) && (is_first || reads_rule(&format!("{before}{whole}")))
    };
    let offers = all.into_iter().filter(fits);
    let candidate = |(word, _, help): Offer| Candidate {
        text: format!("{before}{word}"),
        help,
    };
    offers.map(candidate).collect()
}

/// A word to offer, one like it that makes a rule, and what it does.
type Offer = (String, String, String);

/// A word that is complete.
fn whole(word: String, help: &str) -> Offer {
    (word.clone(), word, help.to_owned())
}

/// A word that takes a value: as far as it is certain, and with a value.
fn with_example(example: &str, help: &str) -> Vec<Offer> {
    let offer = |word: &str| (word.to_owned(), example.to_owned(), help.to_owned());
    match example.split_once('=') {
        Some((name, _)) => vec![offer(&format!("{name}=")), offer(example)],
        None => vec![offer(example)],
    }
}

fn targets() -> Vec<Offer> {
    let kinds = [
        ("*", "all traffic"),
        ("tcp:", "a port of TCP"),
        ("udp:", "a port of UDP"),
        ("icmp", "ICMP"),
        ("dns", "all DNS queries"),
        ("dns:", "DNS queries for a name"),
    ];
    let kinds = kinds.map(|(word, help)| whole(word.to_owned(), help));
    let services = dictionary::ports().map(|(name, port)| whole(port.to_owned(), name));
    kinds.into_iter().chain(services).collect()
}

fn faults() -> Vec<Offer> {
    let offer = |spec: &Spec| match example(spec) {
        Some(example) => with_example(&example, spec.help),
        None => vec![whole(spec.name.to_owned(), spec.help)],
    };
    let mix = (
        MIX.name.to_owned(),
        format!("{} 10%:drop", MIX.name),
        MIX.help.to_owned(),
    );
    FAULTS.iter().flat_map(offer).chain([mix]).collect()
}

/// The fault with an argument, where it needs one.
fn example(spec: &Spec) -> Option<String> {
    let by_kind = || {
        let param = spec.params.first()?;
        let value = match param.kind {
            ValueKind::Probability => "10%",
            ValueKind::Duration => "200ms",
            ValueKind::Size => "64KiB",
            ValueKind::Rate => "10mbit",
            ValueKind::Count => "3",
            _ => return None,
        };
        Some(format!("{}={value}", spec.name))
    };
    let known = dictionary::look_up(dictionary::EXAMPLES, spec.name).map(str::to_owned);
    known.or_else(|| {
        let is_alone = spec.name.parse::<super::Fault>().is_ok();
        if is_alone { None } else { by_kind() }
    })
}

/// The arguments of a fault that are words.
fn arguments(name: &str) -> Vec<Offer> {
    let Some(spec) = catalog::spec(name) else {
        return Vec::new();
    };
    let words = spec.params.iter().flat_map(|param| words(spec, param));
    let mut all: Vec<_> = words.collect();
    let is_new = |text: &String| all.iter().all(|(word, ..)| word != text);
    let example = example(spec).filter(is_new);
    all.extend(example.map(|text| whole(text, spec.help)));
    all
}

fn words(spec: &Spec, param: &Param) -> Vec<Offer> {
    let offer = |word: &str, help: &str| whole(format!("{}={word}", spec.name), help);
    match param.kind {
        ValueKind::Word(words) => words.iter().map(|word| offer(word, param.help)).collect(),
        ValueKind::Text if spec.name == "profile" => PROFILES
            .iter()
            .map(|profile| offer(profile.name, profile.title))
            .collect(),
        _ => Vec::new(),
    }
}

/// The arms that a mix may have.
fn arms() -> Vec<Offer> {
    let arm = |spec: &Spec| {
        let fault = example(spec).unwrap_or_else(|| spec.name.to_owned());
        whole(format!("10%:{fault}"), spec.help)
    };
    FAULTS.iter().map(arm).chain(modifiers()).collect()
}

fn modifiers() -> Vec<Offer> {
    let offer = |spec: &modifier::ModifierSpec| {
        let word = match spec.value {
            "" => spec.key.to_owned(),
            value => format!("{}={value}", spec.key),
        };
        with_example(&word, spec.help)
    };
    MODIFIERS.iter().flat_map(offer).collect()
}

/// The values of a modifier.
fn values(key: &str) -> Vec<Offer> {
    let Some(spec) = modifier::modifier(key) else {
        return Vec::new();
    };
    let offer = |value: &str| whole(format!("{key}={value}"), spec.help);
    let words = modifier::words(key);
    match words.as_slice() {
        [] => vec![offer(spec.value)],
        words => words.iter().map(|word| offer(word)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Rule;

    fn offered(rule: &str) -> Vec<String> {
        let all = candidates(rule).into_iter();
        all.map(|candidate| candidate.text).collect()
    }

    #[test]
    fn each_part_of_a_rule_is_completed() {
        assert_eq!(offered("tcp:543"), ["tcp:5432"]);
        assert_eq!(
            offered("tcp:5432 lat"),
            ["tcp:5432 latency=", "tcp:5432 latency=200ms"]
        );
        assert_eq!(offered("tcp:80 reject=icmp-h"), ["tcp:80 reject=icmp-host"]);
        assert_eq!(offered("* profile=l"), ["* profile=lte"]);
        assert_eq!(
            offered("tcp:80 drop dir=to"),
            ["tcp:80 drop dir=to-server", "tcp:80 drop dir=to-client"]
        );
        assert_eq!(
            offered("tcp:80 drop pe"),
            Vec::<String>::new(),
            "a period alone is no rule"
        );
        assert_eq!(
            offered("tcp:80 drop at=1s pe"),
            Vec::<String>::new(),
            "nor is it here"
        );
        let periods = offered("tcp:80 drop for=5s pe");
        assert_eq!(
            periods,
            [
                "tcp:80 drop for=5s period=",
                "tcp:80 drop for=5s period=30s"
            ]
        );
        assert_eq!(
            offered("tcp:80 mix 5%:drop 10%:rej"),
            ["tcp:80 mix 5%:drop 10%:reject"]
        );
        assert!(offered("nonsense:: x y=").is_empty());
    }

    #[test]
    fn only_what_the_target_allows_is_offered() {
        assert_eq!(offered("dns nx"), ["dns nxdomain"]);
        assert!(offered("tcp:80 nx").is_empty());
        assert!(offered("udp:53 reset_p").is_empty());
        assert_eq!(offered("tcp:53 reset_p"), ["tcp:53 reset_peer"]);
    }

    #[test]
    fn every_fault_is_offered_for_some_target_and_makes_a_rule() {
        let offered: Vec<_> = ["tcp:80 ", "dns "].into_iter().flat_map(offered).collect();
        for name in catalog::names() {
            let is_it = |text: &&String| {
                let fault = text.split(' ').nth(1).unwrap_or_default();
                fault.split('=').next() == Some(name) && !fault.ends_with('=')
            };
            let text = offered.iter().find(is_it);
            let text = text.unwrap_or_else(|| panic!("`{name}` is never offered"));
            assert!(name == "mix" || text.parse::<Rule>().is_ok(), "{text}");
        }
    }
}
