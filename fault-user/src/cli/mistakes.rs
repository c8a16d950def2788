//! Mistakes on the command line: what is wrong, and what to type instead.

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Cli;
use crate::report::file::shell_line;
use crate::rule::{Rule, catalog, nearest};

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
    (
        "run",
        &["-e", "--env"],
        "CMD inherits the environment: NAME=VALUE fault run …",
    ),
    (
        "run",
        &["-d", "--detach"],
        "`fault inject` acts without a command, until Ctrl-C or --for: fault inject -r RULE &",
    ),
    (
        "list",
        &["--host", "--addr"],
        "give the daemon's address with --url, such as --url http://127.0.0.1:8474",
    ),
    (
        "events",
        &["--json"],
        "the events are JSON already: fault events",
    ),
    (
        "explore",
        &["-r", "--rule"],
        "`fault explore` chooses the faults: leave -r out, or give rules of your own in a file with -f",
    ),
];

/// Options that neither `run` nor `inject` has, and what to type instead.
const TRAFFIC_OPTIONS: &[(&[&str], &str)] = &[
    (
        &["--dev", "--iface", "--device"],
        "give the interface with -i, such as -i eth0",
    ),
    (
        &["-p", "--port", "--dport", "--target-port"],
        "the port is a part of the rule: -r 'tcp:80 drop'",
    ),
    (
        &["-t"],
        "the target is a part of the rule: -r 'tcp:80 drop'",
    ),
    (
        &["--dry-run"],
        "`fault check` applies nothing: fault check -r RULE",
    ),
    (
        &["--pod", "--namespace", "--network"],
        "name the container with --container ID, or its network namespace with --netns /proc/PID/ns/net",
    ),
];

/// Subcommands of other tools, and what to type instead.
const COMMANDS: &[(&[&str], &str)] = &[
    (&["create"], "fault add proxy NAME LISTEN UPSTREAM"),
    (
        &["toxic"],
        "fault add toxic PROXY TYPE NAME=VALUE, or fault remove toxic PROXY NAME",
    ),
    (
        &["toggle", "disable"],
        "fault add toxic PROXY down, and to enable it again: fault remove toxic PROXY down_downstream",
    ),
    (&["inspect", "show", "get", "ls"], "fault list"),
    (
        &["delete", "del", "rm"],
        "fault remove proxy NAME, fault remove toxic PROXY NAME or fault remove rule NUMBER",
    ),
    (&["server", "serve"], "fault daemon"),
    (
        &["netem", "tc", "qdisc"],
        "fault inject -r '* delay=100ms' --for 5m; for a container with --container NAME",
    ),
    (&["iptables"], "fault inject -r 'tcp:80 drop'"),
    (
        &["kill", "stop", "pause", "down"],
        "press Ctrl-C where `fault inject` runs, or limit it: fault inject --for 30s -r RULE",
    ),
    (
        &["apply", "start", "up"],
        "fault inject -f FILE, or fault run -f FILE -- CMD",
    ),
    (&["status", "ps"], "fault top, or fault list for the daemon"),
    (&["logs"], "fault events"),
    (&["rules"], "fault help rules"),
    (&["validate", "lint", "test"], "fault check FILE"),
    (&["version"], "fault --version"),
];

/// Options whose value is a number, and what to type for another value, which stands for `{}`.
const NUMBERS: &[(&str, &str)] = &[
    ("--pid", "give the number of a process: --pid $(pidof {})"),
    ("--seed", "a seed is a whole number, such as --seed 42"),
    (
        "--toxicity",
        "give a fraction from 0 to 1: --toxicity 0.5 is half of the connections",
    ),
    (
        "--listen",
        "give an address and a port, such as --listen 127.0.0.1:8474",
    ),
    (
        "--port",
        "a port is a number from 1 to 65535, such as --port 8474",
    ),
    (
        "<ID>",
        "give the number that `fault list` shows, such as fault remove rule 1",
    ),
];

/// Subcommands that run a command, with what comes before its `--`.
const RUNNERS: &[(&str, &str)] = &[
    ("run", "fault run -r 'tcp:5432 loss=30%' -- pytest"),
    ("explore", "fault explore -- pytest"),
    ("replay", "fault replay DIR -- pytest"),
];

/// Subcommands about all that there is.
const OF_ALL: &[&str] = &["list", "stats", "events", "reset", "profiles"];

/// The start of the command line up to the command.
fn runner(command: &str, arguments: &[String]) -> Option<String> {
    let (_, example) = RUNNERS.iter().find(|(name, _)| *name == command)?;
    match (command, arguments.get(2)) {
        ("replay", Some(report)) if !report.starts_with('-') => {
            let words = ["fault", "replay", report].map(str::to_owned);
            Some(format!("{} -- CMD", shell_line(&words)))
        }
        _ => Some((*example).to_owned()),
    }
}

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
            if let Some((_, instead)) = COMMANDS
                .iter()
                .find(|(names, _)| names.contains(&command.as_str()))
            {
                return Some((*instead).to_owned());
            }
            if let ("remove", Some(name)) = (command.as_str(), arguments.get(2)) {
                return Some(format!("say what to remove: fault remove proxy {name}"));
            }
            let all = Cli::command();
            let name = nearest(command, all.get_subcommands().map(clap::Command::get_name))?;
            Some(format!("did you mean `{name}`?"))
        }
        ErrorKind::MissingRequiredArgument if command == "completions" => {
            Some("name the shell: fault completions bash".to_owned())
        }
        ErrorKind::MissingRequiredArgument => {
            let ContextValue::Strings(missing) = error.get(ContextKind::InvalidArg)? else {
                return None;
            };
            if let Some(options) = missing.iter().find(|one| one.contains("--")) {
                let options = options.replace(['<', '>'], "").replace('|', ", ");
                return Some(format!("give one of these as well: {options}"));
            }
            let example = runner(command, arguments)?;
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
            if value.is_empty() {
                return Some(format!(
                    "give a value behind it: {}",
                    option.replace(['<', '>'], "")
                ));
            }
            let (_, help) = NUMBERS.iter().find(|(number, _)| *number == name)?;
            Some(help.replace("{}", value))
        }
        ErrorKind::UnknownArgument => {
            let ContextValue::String(wrong) = error.get(ContextKind::InvalidArg)? else {
                return None;
            };
            early(command, arguments)
                .or_else(|| negative(wrong, arguments))
                .or_else(|| option(command, wrong, arguments))
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
    let names = crate::relay::RelayFault::of_kind(kind)?.attribute_names();
    let attributes = words[1..].iter().filter_map(|word| {
        let (name, value) = word.split_once('=')?;
        // `bandwidth=1000` is the first of its attributes, `rate`.
        let is_first = name == kind && !names.contains(&name);
        let name = names.first().filter(|_| is_first).unwrap_or(&name);
        Some(format!(" {name}={value}"))
    });
    let attributes: Vec<_> = attributes.collect();
    Some(format!(
        "fault add toxic {proxy} {kind}{}",
        attributes.concat()
    ))
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

/// The help for a negative number.
fn negative(wrong: &str, arguments: &[String]) -> Option<String> {
    let at = arguments
        .iter()
        .position(|word| word == wrong && word.starts_with('-'))?;
    let before = arguments[..at].last()?;
    let (_, help) = NUMBERS.iter().find(|(name, _)| name == before)?;
    Some((*help).to_owned())
}

fn option(command: &str, wrong: &str, arguments: &[String]) -> Option<String> {
    let name = wrong.split(['=', ' ']).next().unwrap_or(wrong);
    let mut rows = OPTIONS.iter();
    if let Some((_, _, help)) = rows.find(|(of, names, _)| *of == command && names.contains(&name))
    {
        return Some((*help).to_owned());
    }
    if command == "add" && wrong.starts_with('-') {
        let form = match arguments.get(2)?.as_str() {
            "proxy" => {
                "fault add proxy NAME LISTEN UPSTREAM, such as fault add proxy redis 127.0.0.1:26379 127.0.0.1:6379"
            }
            "toxic" => {
                "fault add toxic PROXY TYPE NAME=VALUE, such as fault add toxic redis latency latency=200"
            }
            _ => return None,
        };
        return Some(form.to_owned());
    }
    if !matches!(command, "run" | "inject") {
        return None;
    }
    let mut rows = TRAFFIC_OPTIONS.iter();
    if let Some((_, help)) = rows.find(|(names, _)| names.contains(&name)) {
        return Some((*help).to_owned());
    }
    let fault = name
        .strip_prefix("--")
        .filter(|name| catalog::spec(name).is_some())?;
    let mut words = arguments.iter().skip_while(|word| !word.starts_with(name));
    let value = words.next()?.split_once('=').map(|(_, value)| value);
    let value = value.or_else(|| words.next().map(String::as_str));
    let texts = value
        .map(|value| format!("{fault}={value}"))
        .into_iter()
        .chain([fault.to_owned()]);
    let rule = texts
        .map(|fault| format!("tcp:80 {fault}"))
        .find(|rule| rule.parse::<Rule>().is_ok());
    Some(format!(
        "faults are parts of a rule: -r '{}'",
        rule.unwrap_or_else(|| format!("tcp:80 {fault}"))
    ))
}

/// The help for unexpected words: a rule without quotes or without -r, or a command without `--`.
fn words(command: &str, wrong: &str, arguments: &[String]) -> Option<String> {
    if wrong.starts_with('-') {
        return None;
    }
    if OF_ALL.contains(&command) {
        return Some(format!(
            "`fault {command}` is about all, and takes no name: fault {command}"
        ));
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
            shell_line(&without_own("inject", "run", &arguments[2..]))
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

/// The words without the options that only this subcommand has, and not the `other`.
fn without_own(subcommand: &str, other: &str, words: &[String]) -> Vec<String> {
    let all = Cli::command();
    let find = |subcommand: &str, word: &str| {
        let name = word.strip_prefix("--")?.split('=').next()?;
        let mut options = all.find_subcommand(subcommand)?.get_arguments();
        options.find(|option| option.get_long() == Some(name))
    };
    let mut kept = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            kept.push(word.clone());
            kept.extend(words.cloned());
            break;
        }
        match find(subcommand, word).filter(|_| find(other, word).is_none()) {
            None => kept.push(word.clone()),
            Some(option) if option.get_action().takes_values() && !word.contains('=') => {
                words.next();
            }
            Some(_) => {}
        }
    }
    kept
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

    /// Words behind `fault`, and a part of what to type instead.
    const CASES: &[(&[&str], &str)] = &[
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
        (&["replay", "out"], "fault replay out -- CMD"),
        (&["replay"], "fault replay DIR -- pytest"),
        (
            &[
                "inject", "--watch", "--for", "3s", "-f", "a.yaml", "--", "true", "--for",
            ],
            "fault run -f a.yaml -- true --for",
        ),
        (
            &["inject", "--for=3s", "-r", "tcp:80 drop", "--", "true"],
            "fault run -r 'tcp:80 drop' -- true",
        ),
        (
            &["add", "redis", "bandwidth=1000"],
            "fault add toxic redis bandwidth rate=1000",
        ),
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
        (&["toxic", "add", "redis"], "fault add toxic PROXY TYPE"),
        (&["inspect", "redis"], "fault list"),
        (&["apply", "-f", "x"], "fault inject -f FILE"),
        (&["netem", "delay"], "--container NAME"),
        (&["remove", "redis"], "fault remove proxy redis"),
        (&["stats", "redis"], "takes no name: fault stats"),
        (&["completions"], "fault completions bash"),
        (
            &["add", "toxic", "redis", "-t", "latency"],
            "fault add toxic redis latency latency=200",
        ),
        (
            &["run", "--delay", "200ms", "--", "x"],
            "-r 'tcp:80 delay=200ms'",
        ),
        (&["run", "--loss=10%", "--", "x"], "-r 'tcp:80 loss=10%'"),
        (&["run", "--port", "80", "--", "x"], "-r 'tcp:80 drop'"),
        (&["inject", "--dry-run"], "fault check -r RULE"),
        (&["inject", "--pod", "web"], "--container ID"),
        (&["run", "--seed", "-1", "--", "x"], "whole number"),
        (&["inject", "--container"], "--container NAME"),
        (&["daemon", "--listen", "8474"], "--listen 127.0.0.1:8474"),
        (&["remove", "rule", "x"], "fault remove rule 1"),
        (&["doctor", "now"], "`fault doctor --help`"),
    ];

    #[test]
    fn a_mistake_is_told_with_what_to_type() {
        for (words, part) in CASES {
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
