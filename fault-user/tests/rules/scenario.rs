//! Scenario files: the same in each format, mistakes pointed at by line and column, the schema current.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::support::place::fault;
use fault_user::rule::Scenario;
use fault_user::rule::scenario::{Format, schema};

/// A folder of this crate or of the repository.
fn folder(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// The scenario of a text that must be right.
fn good(text: &str, format: Format) -> Scenario {
    Scenario::read(text, format, "file").unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The scenario of the specification.
const JSON: &str = r#"{ "seed": 42,
  "targets": { "mysql": "tcp:3306", "redis": { "port": 6379, "protocol": "tcp", "host": "10.0.0.5" } },
  "rules": [ "mysql down at=2s for=5s",
             { "target": "redis", "fault": { "delay": { "delay": "200ms", "jitter": "50ms" } }, "direction": "to-client",
               "probability": 0.2, "at": "3s", "for": "10s" } ],
  "expect": { "exit": 0, "fired": ["mysql"], "max_connects": { "mysql": 20 }, "recovers_within": { "mysql": "3s" } } }"#;

/// The same in YAML.
const YAML: &str = "
seed: 42
targets:
  mysql: tcp:3306
  redis: { port: 6379, protocol: tcp, host: 10.0.0.5 }
rules:
  - mysql down at=2s for=5s
  - target: redis
    fault:
      delay: { delay: 200ms, jitter: 50ms }
    direction: to-client
    probability: 20%
    at: 3s
    for: 10s
expect:
  exit: 0
  fired: [mysql]
  max_connects: { mysql: 20 }
  recovers_within: { mysql: 3s }
";

/// The same in TOML.
const TOML: &str = r#"
seed = 42
rules = [
  "mysql down at=2s for=5s",
  { target = "redis", fault = { delay = "200ms~50ms" }, direction = "to-client", probability = 0.2, at = "3s", for = "10s" },
]

[targets]
mysql = "tcp:3306"
redis = { port = 6379, protocol = "tcp", host = "10.0.0.5" }

[expect]
exit = 0
fired = ["mysql"]
max_connects = { mysql = 20 }
recovers_within = { mysql = "3s" }
"#;

#[test]
fn one_scenario_in_three_formats() {
    let json = good(JSON, Format::Json);
    assert_eq!(json, good(YAML, Format::Yaml));
    assert_eq!(json, good(TOML, Format::Toml));
    let rules: Vec<_> = json.rules.iter().map(ToString::to_string).collect();
    assert_eq!(
        rules,
        [
            "mysql down at=2s for=5s",
            "redis delay=200ms~50ms p=20% dir=to-client at=3s for=10s"
        ]
    );
}

#[test]
fn what_is_written_is_read_again() {
    let scenario = good(JSON, Format::Json);
    let json = serde_json::to_string_pretty(&scenario).unwrap();
    assert_eq!(good(&json, Format::Json), scenario);
    assert_eq!(
        good(&serde_saphyr::to_string(&scenario).unwrap(), Format::Yaml),
        scenario
    );
    assert_eq!(
        good(&toml::to_string(&scenario).unwrap(), Format::Toml),
        scenario
    );
}

/// Every file of a folder with one of these ends, sorted.
fn files(folder: &Path, ends: &[&str]) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            ends.iter()
                .any(|end| path.extension().is_some_and(|e| e == *end))
        })
        .collect();
    files.sort();
    files
}

/// What `fault check` makes of a scenario file.
fn check(path: &Path) -> Output {
    fault()
        .arg("check")
        .arg(path.file_name().unwrap())
        .current_dir(path.parent().unwrap())
        .output()
        .unwrap()
}

/// What `fault check` says to each file under tests/rules/scenarios/bad, `name.ext`, stands in `name.ext.error`.
#[test]
fn mistakes_are_pointed_at() {
    let all = files(
        &folder("tests/rules/scenarios/bad"),
        &["json", "yaml", "toml"],
    );
    assert!(all.len() >= 20, "{} bad scenarios", all.len());
    let mut wrong = Vec::new();
    for path in all {
        let output = check(&path);
        assert_eq!(output.status.code(), Some(2), "{}", path.display());
        assert_eq!(output.stdout, b"", "{}", path.display());
        let stderr_text = String::from_utf8(output.stderr).unwrap();
        let error = stderr_text
            .strip_prefix("fault: error: ")
            .expect(&stderr_text);
        let golden = PathBuf::from(format!("{}.error", path.display()));
        if std::env::var_os("FAULT_BLESS").is_some() {
            fs::write(&golden, error).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if error != expected {
            wrong.push(format!("  is:       {error}  expected: {expected}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "\n{}\n(FAULT_BLESS=1 writes what is)",
        wrong.join("\n")
    );
}

/// Each file under tests/rules/scenarios/good, by the schema, as it is written again, and by `fault check`.
#[test]
fn good_files_are_good() {
    let good = files(
        &folder("tests/rules/scenarios/good"),
        &["json", "yaml", "toml"],
    );
    assert!(good.len() >= 3, "{} good scenarios", good.len());
    let validator = jsonschema::validator_for(&schema()).unwrap();
    for path in good {
        let scenario = Scenario::load(&path).unwrap_or_else(|error| panic!("{error}"));
        let json = serde_json::to_value(&scenario).unwrap();
        assert!(
            validator.is_valid(&json),
            "{}: {:?}",
            path.display(),
            validator.iter_errors(&json).next()
        );
        let written = serde_json::from_value::<Scenario>(json).unwrap();
        assert_eq!(written, scenario, "{}", path.display());
        let output = check(&path);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}: {output:?}",
            path.display()
        );
        let picture = String::from_utf8(output.stdout).unwrap();
        assert!(picture.contains("  by "), "{}: {picture}", path.display());
        for rule in &scenario.rules {
            let carried = format!("\n{rule}  by ");
            assert!(picture.contains(&carried), "{rule}: {picture}");
        }
    }
}

#[test]
fn a_close_without_a_time_is_warned_of() {
    let told = |rule: &str| {
        let output = fault().args(["check", "-r", rule]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let warning = told("tcp:80 close");
    assert!(warning.contains("give it `at=TIME`"), "{warning}");
    assert_eq!(told("tcp:80 close at=1s"), "");
}

#[test]
fn the_schema_is_current() {
    let path = folder("../docs/scenario.schema.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&schema()).unwrap());
    if std::env::var_os("FAULT_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let shipped = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        shipped == text,
        "docs/scenario.schema.json is not what schema() gives (FAULT_BLESS=1 writes it)"
    );
}

#[test]
fn the_schema_knows_the_examples_and_refuses_unknown_fields() {
    let validator = jsonschema::validator_for(&schema()).unwrap();
    let valid = |text: &str| validator.is_valid(&serde_json::from_str(text).unwrap());
    assert!(valid(JSON));
    assert!(valid(
        r#"{ "rules": [{ "target": "tcp:80", "fault": "down", "match": ["syn"], "conn": [1, 3] }] }"#
    ));
    assert!(!valid(r#"{ "ruels": [] }"#));
    assert!(!valid(
        r#"{ "rules": [{ "target": "tcp:80", "fault": { "dely": "1s" } }] }"#
    ));
    assert!(!valid(
        r#"{ "rules": [{ "target": "tcp:80", "fault": { "delay": { "jiter": "1s" } } }] }"#
    ));
    assert!(!valid(r#"{ "rules": [{ "target": "tcp:80" }] }"#));
    assert!(!valid(r#"{ "targets": { "tcp": "tcp:80" } }"#));
    assert!(!valid(r#"{ "expect": { "exit": 256 } }"#));
}

#[test]
fn rules_that_only_touch_do_not_contradict() {
    for rules in [
        "[\"tcp:80 down at=2s for=5s\", \"tcp:80 blackhole at=7s for=5s\"]",
        "[\"tcp:80 blackhole dir=to-server\", \"tcp:80 drop dir=to-client\"]",
        "[\"tcp:80 down\", \"tcp:81 blackhole\", \"udp:80 blackhole\", \"icmp drop\"]",
        "[\"tcp:80 down p=50%\", \"tcp:80 blackhole\"]",
        "[\"10.0.0.1:80 down\", \"10.0.0.2:80 blackhole\"]",
        "[\"tcp:80 down\", \"tcp:80 down for=1s\"]",
    ] {
        good(&format!("{{ \"rules\": {rules} }}"), Format::Json);
    }
}

#[test]
fn texts_in_objects_need_no_quotes() {
    let text =
        r#"{ "rules": [{ "target": "tcp:80", "fault": { "error": { "redis": "\"a\" b" } } }] }"#;
    assert_eq!(
        good(text, Format::Json).rules[0].to_string(),
        r#"tcp:80 error=redis:"\"a\" b""#
    );
}

#[test]
fn files_by_name() {
    let load = |name: &str, text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        Scenario::load(&path).map_err(|error| error.error.one_line())
    };
    assert!(
        load("a.json", JSON).is_ok() && load("a.yml", YAML).is_ok() && load("a.toml", TOML).is_ok()
    );
    let error = load("a.txt", JSON).unwrap_err();
    assert_eq!(
        error,
        "the name says no format: expected .json, .yaml, .yml or .toml"
    );
    assert!(Scenario::load(Path::new("/nonexistent/a.json")).is_err());
    let rule = Scenario::load(Path::new("tcp:80 drop")).unwrap_err();
    assert!(rule.to_string().contains("-r 'tcp:80 drop'"), "{rule}");
}

/// `fault add rule` needs no daemon to find a mistake.
#[test]
fn a_mistake_in_a_rule_for_the_daemon_is_pointed_at() {
    let output = fault()
        .args(["add", "rule", "tcp:80 los=3%"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let picture = "\n  tcp:80 los=3%\n         ^^^\nhelp: expected ";
    assert!(text.contains(picture), "{text}");
    assert_eq!(output.status.code(), Some(2), "{text}");
}
