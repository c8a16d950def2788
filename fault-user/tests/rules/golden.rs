//! The corpus of rules: what is right with its canonical text, what is wrong with its picture.
//!
//! `FAULT_BLESS=1` writes what is; the difference is then for a human to judge.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use fault_user::rule::Rule;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// A file of the corpus.
fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/rules")
        .join(name)
}

/// Compares a file of the corpus with what it should be, or writes it.
fn compare(name: &str, is: &str) {
    let path = corpus(name);
    if std::env::var_os("FAULT_BLESS").is_some() {
        fs::write(&path, is).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    for (nth, (is, expected)) in is.lines().zip(expected.lines()).enumerate() {
        assert_eq!(is, expected, "{name}:{}", nth + 1);
    }
    assert_eq!(is.lines().count(), expected.lines().count(), "{name}");
}

/// good.txt: a rule, and where its canonical text differs that behind ` => `.
#[test]
fn good_rules() {
    let text = fs::read_to_string(corpus("good.txt")).unwrap();
    let mut out = String::new();
    for line in text.lines() {
        let rule_text = line.split(" => ").next().unwrap();
        if rule_text.is_empty() || rule_text.starts_with('#') {
            out = out + line + "\n";
            continue;
        }
        let rule: Rule = rule_text.parse().unwrap_or_else(|error| panic!("{error}"));
        let canonical = rule.to_string();
        assert_eq!(canonical.parse().as_ref(), Ok(&rule), "{canonical}");
        assert_eq!(
            serde_json::from_value::<Rule>(rule.to_object()).unwrap(),
            rule,
            "{canonical}"
        );
        let arrow = if canonical == rule_text {
            String::new()
        } else {
            format!(" => {canonical}")
        };
        writeln!(out, "{rule_text}{arrow}").unwrap();
    }
    compare("good.txt", &out);
}

/// bad.txt: blocks of a rule behind `> `, its picture and its one line.
#[test]
fn bad_rules() {
    let text = fs::read_to_string(corpus("bad.txt")).unwrap();
    let mut out = String::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with('>') || line.starts_with('#'))
    {
        if line.starts_with('#') {
            write!(out, "{line}\n\n").unwrap();
            continue;
        }
        let rule = line.strip_prefix("> ").unwrap_or("");
        let error = match rule.parse::<Rule>() {
            Ok(rule) => panic!("`{rule}` is a valid rule"),
            Err(error) => error,
        };
        write!(out, "{line}\n{error}\n= {}\n\n", error.one_line()).unwrap();
    }
    compare("bad.txt", out.trim_end());
}

/// Every text that the fuzzer starts from.
fn seeds() -> Vec<String> {
    let mut seeds: Vec<String> = ["good.txt", "bad.txt"]
        .iter()
        .flat_map(|name| {
            let text = fs::read_to_string(corpus(name)).unwrap();
            text.lines()
                .map(|line| line.trim_start_matches("> ").to_owned())
                .collect::<Vec<_>>()
        })
        .filter(|line| !line.is_empty())
        .collect();
    for folder in ["scenarios/good", "scenarios/bad"] {
        for entry in fs::read_dir(corpus(folder)).unwrap() {
            seeds.push(fs::read_to_string(entry.unwrap().path()).unwrap());
        }
    }
    seeds.sort();
    seeds
}

#[test]
fn the_corpus_itself() {
    for seed in seeds() {
        fault_user::rule::fuzz(seed.as_bytes());
    }
}

/// How many mutations are tried: `PROPTEST_CASES`, or 4,000.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").map_or(4_000, |cases| cases.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Pieces of the corpus cut, doubled, swapped and broken: never a panic, never a lossy text.
    #[test]
    fn mutations(
        a in select(seeds()),
        b in select(seeds()),
        cuts in prop::collection::vec(any::<Index>(), 4),
        noise in prop_oneof![Just(String::new()), "[-=:,.~%\"()\\[\\]/ 0-9]{1,3}", "\\PC{1,2}"],
    ) {
        let cut = |text: &str, at: &Index| (0..=at.index(text.len() + 1)).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        let (mut start, mut end) = (cut(&a, &cuts[0]), cut(&a, &cuts[1]));
        if start > end {
            std::mem::swap(&mut start, &mut end);
        }
        let (mut from, mut to) = (cut(&b, &cuts[2]), cut(&b, &cuts[3]));
        if from > to {
            std::mem::swap(&mut from, &mut to);
        }
        // Half of the time only a little of the second text goes in.
        if cuts[0].index(2) == 0 {
            to = (from..=to.min(from + 8)).rev().find(|i| b.is_char_boundary(*i)).unwrap_or(from);
            end = (start..=end.min(start + 4)).rev().find(|i| a.is_char_boundary(*i)).unwrap_or(start);
        }
        fault_user::rule::fuzz(format!("{}{noise}{}{}", &a[..start], &b[from..to], &a[end..]).as_bytes());
    }
}
