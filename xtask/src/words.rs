//! Words that the code and its documentation do not use, with what stands in their place.

use std::{fs, process::Command};

use anyhow::{Result, bail};

use crate::workspace::{output, root};

/// What is not written, and what is written instead.
const WORDS: [(&str, &str); 22] = [
    ("hurt", "inject a fault, delay, drop"),
    ("hurts", "injects a fault, delays, drops"),
    ("heal", "remove a rule, restore"),
    ("heals", "removes a rule, restores"),
    ("healed", "removed, restored"),
    ("in force", "applied, active"),
    ("newcomer", "interface that appears"),
    ("newcomers", "interfaces that appear"),
    ("met again", "appears again"),
    ("lost on top", "dropped"),
    ("judged as one", "treated as one packet"),
    ("wish", "option, request"),
    ("wishes", "options, requests"),
    ("refused in one line", "rejected with an error"),
    ("is led", "is redirected to the relay"),
    ("are led", "are redirected to the relay"),
    ("was led", "was redirected to the relay"),
    ("be led", "be redirected to the relay"),
    ("led to the relay", "redirected to the relay"),
    ("go straight", "bypass the relay"),
    ("goes straight", "bypasses the relay"),
    ("went straight", "bypassed the relay"),
];

/// Endings of the files that people write.
const TEXTS: [&str; 13] = [
    "rs", "md", "toml", "yml", "yaml", "py", "js", "mjs", "ts", "sh", "feature", "c", "run",
];

/// Reads every file that git knows, or that is new to it.
///
/// # Errors
/// A file in which one of the words stands, or git can't list them.
pub fn check() -> Result<()> {
    let listed = output(Command::new("git").current_dir(root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    let mut complaints = Vec::new();
    for name in listed.lines().filter(|name| is_text(name)) {
        // A file that has just been removed is listed until that is committed.
        let path = root().join(name);
        if !path.exists() || name == file!() {
            continue;
        }
        for (line, word, instead) in found(&fs::read_to_string(path)?) {
            complaints.push(format!("{name}:{line}: `{word}`: write {instead}"));
        }
    }
    if !complaints.is_empty() {
        bail!("words:\n{}", complaints.join("\n"));
    }
    Ok(())
}

fn is_text(name: &str) -> bool {
    let ending = name.rsplit(['.', '/']).next();
    ending.is_some_and(|ending| TEXTS.contains(&ending))
}

/// The words in a text: the line's number, the word, and what is written instead.
fn found(text: &str) -> Vec<(usize, &'static str, &'static str)> {
    let mut all = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.to_lowercase();
        for (word, instead) in WORDS {
            if has(&line, word) {
                all.push((number, word, instead));
            }
        }
    }
    all
}

/// Whether a word stands in a line by itself, or between underscores.
fn has(line: &str, word: &str) -> bool {
    let is_letter = |letter: Option<char>| letter.is_some_and(char::is_alphanumeric);
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        !is_letter(before.chars().next_back()) && !is_letter(after.chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_by_themselves_only() {
        let words = |text: &str| -> Vec<_> { found(text).into_iter().map(|one| one.1).collect() };
        assert_eq!(
            words("/// What Hurts it.\nfn heal_all()"),
            ["hurts", "heal"]
        );
        assert_eq!(found("fine\nThe set in force.")[0].0, 2);
        assert!(words("healthy; in forced order; wishlist; churted").is_empty());
    }
}
