//! Mistakes on the command line: what is wrong, and what to type instead.

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Cli;
use crate::report::file::shell_line;
use crate::rule::{Rule, nearest};

/// Options that a subcommand does not have, and what to type instead.
const OPTIONS: &[(&str, &[&str], &str)] = &[
    (
        "run",
        &["--for", "--duration", "--timeout"],
        "a run ends when its command ends; limit the rule instead: -r 'tcp:5432 loss=30% for=30s'",
    ),
    (
        "inject",
        &["--events", "--report", "--allow-unfired"],
        "use `fault run`: fault run --report DIR -r RULE -- CMD",
    ),
    (
        "inject",
        &["--duration", "--timeout"],
        "give the duration with --for, such as --for 30s",
    ),
    (
        "inject",
        &["--scope", "--host"],
        "`fault inject` already acts on the whole host; --container, --pid, --cgroup and --netns narrow it",
    ),
    ("run", &["--host"], "give --scope host for the whole host"),
];

/// Options whose value is a number, and what to type for another value, which stands for `{}`.
const NUMBERS: &[(&str, &str)] = &[
    ("--pid", "give the number of a process: --pid $(pidof {})"),
    ("--seed", "a seed is a whole number, such as --seed 42"),
    (
        "--toxicity",
        "give a fraction from 0 to 1: --toxicity 0.5 is half of the connections",
    ),
];

/// Subcommands that run a command, with what comes before its `--`.
const RUNNERS: &[(&str, &str)] = &[
    ("run", "fault run -r 'tcp:5432 loss=30%' -- pytest"),
    ("explore", "fault explore -- pytest"),
    ("replay", "fault replay DIR -- pytest"),
];

/// The error and its help line, for a command line that can't be parsed.
#[must_use]
pub fn message(error: &clap::Error, arguments: &[String]) -> String {
    let rendered = error.render().to_string();
    let what = rendered.trim_start_matches("error: ");
    let what = what.split("\n\n").next().unwrap_or(what);
    let what: Vec<_> = what.split_whitespace().collect();
    let help = help(error, arguments)
        .or_else(|| similar(&rendered))
        .unwrap_or_else(|| match arguments.get(1) {
            Some(command) if error.kind() != ErrorKind::InvalidSubcommand => {
                format!("`fault {command} --help` lists the options")
            }
            _ => "`fault --help` lists the commands".to_owned(),
        });
    format!("fault: error: {}\nhelp: {help}", what.join(" "))
}

/// What to type instead.
fn help(error: &clap::Error, arguments: &[String]) -> Option<String> {
    let command = arguments.get(1)?;
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            if command == "add" {
                return added(&arguments[2..]);
            }
            if let Some(rule) = meant_rule(&arguments[1..]) {
                return Some(format!("fault run -r '{rule}' -- CMD"));
            }
            let all = Cli::command();
            let name = nearest(command, all.get_subcommands().map(clap::Command::get_name))?;
            Some(format!("did you mean `{name}`?"))
        }
        ErrorKind::MissingRequiredArgument => {
            let ContextValue::Strings(missing) = error.get(ContextKind::InvalidArg)? else {
                return None;
            };
            if let Some(options) = missing.iter().find(|one| one.contains("--")) {
                let options = options.replace(['<', '>'], "").replace('|', ", ");
                return Some(format!("give one of these as well: {options}"));
            }
            let (_, example) = RUNNERS.iter().find(|(name, _)| name == command)?;
            Some(format!("give the command after --: {example}"))
        }
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            let ContextValue::String(option) = error.get(ContextKind::InvalidArg)? else {
                return None;
            };
            let ContextValue::String(value) = error.get(ContextKind::InvalidValue)? else {
                return None;
            };
            let name = option.split(' ').next()?;
            let (_, help) = NUMBERS.iter().find(|(number, _)| *number == name)?;
            Some(help.replace("{}", value))
        }
        ErrorKind::UnknownArgument => {
            let ContextValue::String(wrong) = error.get(ContextKind::InvalidArg)? else {
                return None;
            };
            early(command, arguments)
                .or_else(|| option(command, wrong))
                .or_else(|| words(command, wrong, arguments))
        }
        _ => None,
    }
}

/// The help for options in front of their subcommand.
fn early(first: &str, arguments: &[String]) -> Option<String> {
    let all = Cli::command();
    let is_command = |word: &String| all.find_subcommand(word).is_some();
    let arguments = arguments.get(1..)?;
    let at = arguments.iter().position(is_command)?;
    let (options, rest) = arguments.split_at(at);
    first.starts_with('-').then(|| {
        let words = [&rest[..1], options, &rest[1..]].concat();
        format!(
            "put the options after the subcommand: fault {}",
            shell_line(&words)
        )
    })
}

/// The help for `fault add` with neither `rule` nor `proxy` nor `toxic`.
fn added(words: &[String]) -> Option<String> {
    if let Some(rule) = meant_rule(words) {
        return Some(format!("fault add rule '{rule}'"));
    }
    let [proxy, fault, ..] = words else {
        return None;
    };
    let kind = fault.split('=').next()?;
    let known = crate::relay::Fault::of_kind(kind).is_some();
    let attributes = words[1..].iter().filter(|word| word.contains('='));
    let attributes: Vec<_> = attributes.map(String::as_str).collect();
    known.then(|| format!("fault add toxic {proxy} {kind} {}", attributes.join(" ")))
}

/// The rule at the start of the words, as it is meant.
fn meant_rule(words: &[String]) -> Option<String> {
    leading_rule(words).map(|(rule, _)| rule).or_else(|| {
        let error = words.join(" ").parse::<Rule>().err()?;
        error
            .suggestion
            .filter(|meant| meant.parse::<Rule>().is_ok())
    })
}

fn option(command: &str, wrong: &str) -> Option<String> {
    let name = wrong.split('=').next().unwrap_or(wrong);
    let mut rows = OPTIONS.iter();
    let (_, _, help) = rows.find(|(of, names, _)| *of == command && names.contains(&name))?;
    Some((*help).to_owned())
}

/// The help for unexpected words: a rule without quotes or without -r, or a command without `--`.
fn words(command: &str, wrong: &str, arguments: &[String]) -> Option<String> {
    if wrong.starts_with('-') {
        return None;
    }
    // Not the program's own name, nor the subcommand's.
    let mut after = arguments.iter().enumerate().skip(2);
    let (at, _) = after.find(|(_, argument)| *argument == wrong)?;
    if command == "add" {
        let rule = meant_rule(arguments.get(3..)?)?;
        return Some(format!("quote the rule: fault add rule '{rule}'"));
    }
    if command == "inject" && arguments[at - 1] == "--" {
        return Some(format!(
            "`fault inject` runs no command: fault run {}",
            shell_line(&arguments[2..])
        ));
    }
    let is_rule = |at: usize| matches!(arguments[at].as_str(), "-r" | "--rule");
    let start = if at >= 2 && is_rule(at - 2) {
        at - 1
    } else {
        at
    };
    let end = arguments.iter().position(|argument| argument == "--");
    let free = &arguments[start..end.unwrap_or(arguments.len()).max(start)];
    let (quoted, rest) = match leading_rule(free) {
        Some((rule, rest)) => (format!("-r '{rule}'"), rest),
        None => (String::new(), &arguments[at..free.len() + start]),
    };
    let is_command =
        RUNNERS.iter().any(|(name, _)| *name == command) && end.is_none() && !rest.is_empty();
    match (quoted.as_str(), is_command) {
        ("", false) => None,
        ("", true) => Some(format!("put -- before the command: -- {}", rest.join(" "))),
        (_, false) => Some(format!("quote the rule and put -r before it: {quoted}")),
        (_, true) => Some(format!(
            "quote the rule and put -- before the command: {quoted} -- {}",
            rest.join(" ")
        )),
    }
}

/// The longest rule at the start of the words, and the remaining words.
fn leading_rule(words: &[String]) -> Option<(String, &[String])> {
    (1..=words.len()).rev().find_map(|count| {
        let text = words[..count].join(" ");
        let (_, rest) = words.split_at(count);
        text.parse::<Rule>().is_ok().then_some((text, rest))
    })
}

/// The similar option that the parser suggests.
fn similar(rendered: &str) -> Option<String> {
    let (_, tip) = rendered.split_once("similar ")?;
    let name = tip.split('\'').nth(1)?;
    Some(format!("did you mean `{name}`?"))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn a_mistake_is_told_with_what_to_type() {
        let cases: &[(&[&str], &str)] = &[
            (
                &["run", "-r", "tcp:80 drop", "pytest", "-x"],
                "-- pytest -x",
            ),
            (&["run", "pytest"], "put -- before the command: -- pytest"),
            (
                &["inject", "-r", "tcp:80 drop", "--", "fault", "demo"],
                "fault run -r 'tcp:80 drop' -- fault demo",
            ),
            (
                &["-r", "* drop", "run", "--", "curl", "x"],
                "fault run -r '* drop' -- curl x",
            ),
            (&["run", "-r", "tcp:80 drop"], "-- pytest"),
            (
                &["run", "-r", "tcp:80", "loss=3%", "--", "pytest"],
                "-r 'tcp:80 loss=3%'",
            ),
            (
                &["run", "-r", "tcp:80", "loss=3%", "p=5%", "--", "pytest"],
                "-r 'tcp:80 loss=3% p=5%'",
            ),
            (
                &["run", "-r", "tcp:80", "drop", "pytest"],
                "-r 'tcp:80 drop' -- pytest",
            ),
            (&["run", "tcp:80 drop", "--", "pytest"], "-r 'tcp:80 drop'"),
            (&["inject", "-r", "tcp:80", "drop"], "-r 'tcp:80 drop'"),
            (&["inject", "tcp:80", "drop"], "-r 'tcp:80 drop'"),
            (&["tcp:80", "drop"], "fault run -r 'tcp:80 drop' -- CMD"),
            (
                &["run", "--for", "5s", "-r", "tcp:80 drop", "--", "x"],
                "for=30s",
            ),
            (
                &["run", "--for=5s", "-r", "tcp:80 drop", "--", "x"],
                "for=30s",
            ),
            (&["run", "--duration", "5s"], "for=30s"),
            (
                &["inject", "--events", "f", "-r", "tcp:80 drop"],
                "fault run --report DIR",
            ),
            (&["inject", "--report", "d"], "fault run --report DIR"),
            (&["inject", "--duration", "3s"], "--for 30s"),
            (&["run", "--ruel", "tcp:80 drop"], "did you mean `--rule`?"),
            (&["rnu"], "did you mean `run`?"),
            (&["explore", "python3", "x"], "-- python3 x"),
            (
                &["explore", "--recovery", "5s", "--", "x"],
                "one of these as well: --container NAME, --pid PID, --cgroup DIR",
            ),
            (&["replay", "out"], "fault replay DIR -- pytest"),
            (
                &["inject", "-r", "tcp:80 drop", "--", "true"],
                "fault run -r 'tcp:80 drop' -- true",
            ),
            (&["drop", "tcp:80"], "fault run -r 'tcp:80 drop' -- CMD"),
            (
                &["add", "redis", "latency=200"],
                "fault add toxic redis latency latency=200",
            ),
            (&["add", "tcp:80", "drop"], "fault add rule 'tcp:80 drop'"),
            (
                &["add", "rule", "tcp:80", "loss=3%"],
                "fault add rule 'tcp:80 loss=3%'",
            ),
            (&["--url", "x", "list"], "fault list --url x"),
            (
                &["inject", "--pid", "nginx", "-r", "tcp:80 drop"],
                "--pid $(pidof nginx)",
            ),
            (
                &["run", "--seed", "abc", "-r", "tcp:80 drop", "--", "x"],
                "whole number",
            ),
            (
                &["add", "toxic", "redis", "latency", "--toxicity", "50%"],
                "--toxicity 0.5",
            ),
            (&["doctor", "now"], "`fault doctor --help`"),
        ];
        for (words, part) in cases {
            let arguments: Vec<_> = ["fault"]
                .iter()
                .chain(*words)
                .map(|word| (*word).to_owned())
                .collect();
            let error = Cli::try_parse_from(&arguments).unwrap_err();
            let text = message(&error, &arguments);
            let (what, help) = text.split_once("\nhelp: ").unwrap();
            assert!(what.starts_with("fault: error: "), "{text}");
            assert!(help.contains(part), "{words:?}: {text}");
            assert!(
                !text.contains("Usage") && text.lines().count() == 2,
                "{text}"
            );
        }
    }
}
