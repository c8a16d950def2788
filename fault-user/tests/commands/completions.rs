//! Completions in real shells: of the command after `--`, of rules and toxics, of containers and interfaces.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::place::wait_for;
use crate::support::terminal::Terminal;

/// A folder with a `fault` that knows two containers and an interface, and prints the arguments that it gets otherwise;
/// and with a command of a name that nothing else has.
fn programs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let real = env!("CARGO_BIN_EXE_fault");
    let script = format!(
        r#"#!/bin/sh
case "$*" in
"completions --names containers"*) printf 'db-main\nweb\n' ;;
"completions --names interfaces"*) printf 'veth-unique\n' ;;
completions*) exec {real} "$@" ;;
*) printf 'got'; printf '<%s>' "$@"; echo ;;
esac
"#
    );
    for (name, text) in [("fault", script.as_str()), ("quite-unique", "#!/bin/sh\n")] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(folder.path().join("unique-file"), "").unwrap();
    folder
}

fn is_installed(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if found.is_err() {
        eprintln!("skipped: {program} is not installed");
    }
    found.is_ok()
}

fn path_with(folder: &Path) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", folder.display())
}

/// A shell on a terminal of its own.
struct Shell(Terminal);

impl Shell {
    fn start(words: &[&str], folder: &Path) -> Self {
        let mut shell = Command::new(words[0]);
        shell
            .args(&words[1..])
            .env("PATH", path_with(folder))
            .env("TERM", "dumb")
            .env("HOME", folder)
            .current_dir(folder);
        Self(Terminal::start(&mut shell, 200))
    }

    fn types(&mut self, text: &str) {
        self.0.types(text);
    }

    fn shows(&self, what: &str) {
        let shown = || self.0.shown().replace('\r', "");
        wait_for(|| shown().contains(what), what);
    }

    /// Types a line in which a tab completes a word; `fault` then gets these words.
    fn completes(&mut self, line: &str, words: &[&str]) {
        self.becomes(&format!("{line}\t"), words);
    }

    /// Types a line that has tabs of its own.
    fn becomes(&mut self, line: &str, words: &[&str]) {
        self.types(&format!("{line}\n"));
        self.shows(&format!("got<{}>", words.join("><")));
    }

    fn completes_everything(&mut self) {
        let container = ["inject", "--container", "db-main"];
        self.completes("fault inject --container d", &container);
        let interface = ["run", "-i", "veth-unique"];
        self.completes("fault run -i veth", &interface);
        self.completes(
            "fault run -r x -- quite-un",
            &["run", "-r", "x", "--", "quite-unique"],
        );
        let file = ["run", "--", "quite-unique", "unique-file"];
        self.completes("fault run -- quite-unique unique-f", &file);
        self.completes("fault inject --allow-u", &["inject", "--allow-unfired"]);
        self.becomes(
            "fault run -r 'tcp:543\t lat\t5ms dir=to-c\t' -- x",
            &["run", "-r", "tcp:5432 latency=5ms dir=to-client", "--", "x"],
        );
        self.becomes(
            "fault add rule 'tcp:80 reject=icmp-h\t'",
            &["add", "rule", "tcp:80 reject=icmp-host"],
        );
        self.becomes(
            "fault inject --rule '* profile=lt\t'",
            &["inject", "--rule", "* profile=lte"],
        );
        self.becomes(
            "fault add toxic redis laten\tjit\t5",
            &["add", "toxic", "redis", "latency", "jitter=5"],
        );
    }
}

#[test]
fn bash_completes_commands_rules_and_names() {
    if !is_installed("bash") {
        return;
    }
    let folder = programs();
    let package = "/usr/share/bash-completion/bash_completion";
    for more in ["true", package] {
        if more == package && !Path::new(package).exists() {
            eprintln!("skipped: bash-completion is not installed");
            continue;
        }
        let mut shell = Shell::start(&["bash", "--norc", "--noprofile", "-i"], folder.path());
        let load = if more == package {
            format!(". {package}")
        } else {
            more.to_owned()
        };
        shell.types(&format!(
            "{load}; eval \"$(fault completions bash)\"; echo rea''dy\n"
        ));
        shell.shows("ready\n");
        shell.completes_everything();
        shell.completes(
            "fault inject --container=d",
            &["inject", "--container=db-main"],
        );
    }
}

#[test]
fn zsh_completes_commands_rules_and_names() {
    if !is_installed("zsh") {
        return;
    }
    let folder = programs();
    let mut shell = Shell::start(&["zsh", "-f", "-i"], folder.path());
    shell.types(
        "autoload -Uz compinit && compinit -u -D && eval \"$(fault completions zsh)\"; echo rea''dy\n",
    );
    shell.shows("ready\n");
    shell.completes_everything();
}

#[test]
fn fish_completes_commands_rules_and_names() {
    if !is_installed("fish") {
        return;
    }
    let folder = programs();
    let offered = |line: &str| {
        let script = format!("fault completions fish | source; complete -C '{line}'");
        let output = Command::new("fish")
            .args(["--no-config", "-c", &script])
            .env("PATH", path_with(folder.path()))
            .env("HOME", folder.path())
            .current_dir(folder.path())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let words = text
            .lines()
            .map(|line| line.split('\t').next().unwrap_or_default());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(offered("fault inject --container "), ["db-main", "web"]);
    assert_eq!(offered("fault run -i v"), ["veth-unique"]);
    assert_eq!(offered("fault run -r x -- quite-un"), ["quite-unique"]);
    assert_eq!(
        offered("fault run -- quite-unique unique-f"),
        ["unique-file"]
    );
    assert_eq!(offered("fault inject --allow-u"), ["--allow-unfired"]);
    assert_eq!(offered("fault check -r \"tcp:543"), ["tcp:5432"]);
    assert_eq!(
        offered("fault add rule \"tcp:80 lat"),
        ["tcp:80 latency=", "tcp:80 latency=200ms"]
    );
    assert_eq!(
        offered("fault run --rule \"* profile=lt"),
        ["* profile=lte"]
    );
    assert_eq!(offered("fault add toxic redis laten"), ["latency"]);
    assert_eq!(offered("fault add toxic redis latency jit"), ["jitter="]);
    let commands = offered("fault run -- ");
    assert!(
        commands.iter().any(|word| word == "quite-unique"),
        "{commands:?}"
    );
}

#[test]
fn names_are_listed_for_completions() {
    let output = Command::new(env!("CARGO_BIN_EXE_fault"))
        .args(["completions", "--names", "interfaces"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().any(|name| name == "lo"), "{text}");
}
