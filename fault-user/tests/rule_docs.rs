//! docs/rules.md is complete, and its examples are what it says they are.

use std::fs;
use std::path::{Path, PathBuf};

use fault_user::relay;
use fault_user::rule::scenario::Format;
use fault_user::rule::{MODIFIERS, Rule, Scenario, catalog, reference};

/// A file of the documentation.
fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(file)
}

/// The reference.
fn text() -> String {
    fs::read_to_string(path("rules.md")).unwrap()
}

/// The code blocks of a language, with the line of their fence.
fn blocks(language: &str) -> Vec<(usize, String)> {
    let text = text();
    let mut blocks: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (nth, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            open = !open && line == format!("```{language}");
            if open {
                blocks.push((nth + 1, String::new()));
            }
        } else if open && let Some((_, block)) = blocks.last_mut() {
            *block += line;
            block.push('\n');
        }
    }
    blocks
}

#[test]
fn rules_are_read() {
    let mut count = 0;
    for (line, block) in blocks("rule") {
        for text in block.lines().filter(|text| !text.starts_with('#')) {
            if let Err(error) = text.parse::<Rule>() {
                panic!("docs/rules.md, the block at line {line}:\n{error}");
            }
            count += 1;
        }
    }
    assert!(count >= 25, "only {count} rules");
}

#[test]
fn equal_spellings_are_equal() {
    let (_, block) = blocks("rule")
        .into_iter()
        .find(|(_, block)| block.contains("jitter="))
        .unwrap();
    let rules: Vec<Rule> = block.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(rules.len(), 2);
    assert_eq!(rules[0], rules[1]);
}

#[test]
fn scenarios_are_read() {
    for (language, format) in [("json", Format::Json), ("yaml", Format::Yaml)] {
        let blocks = blocks(language);
        assert!(!blocks.is_empty());
        for (line, block) in blocks {
            Scenario::read(
                &block,
                format,
                &format!("docs/rules.md, the block at line {line}"),
            )
            .unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

/// Compares a table with what stands at its place in a file, or writes it there.
fn table_stands_in(file: &str, name: &str, table: &str) {
    let text = fs::read_to_string(path(file)).unwrap();
    let begin = format!("<!-- {name} -->\n");
    let start = text.find(&begin).expect("the place of a table") + begin.len();
    let end = start + text[start..].find("<!-- end -->").expect("its end");
    if std::env::var_os("FAULT_BLESS").is_some() {
        fs::write(path(file), [&text[..start], table, &text[end..]].concat()).unwrap();
    } else {
        assert_eq!(
            &text[start..end],
            table,
            "docs/{file}, {name} (FAULT_BLESS=1 writes what is)"
        );
    }
}

#[test]
fn the_tables_of_faults_are_what_the_faults_say() {
    for (name, table) in reference::tables() {
        table_stands_in("rules.md", name, &table);
    }
    table_stands_in("relay.md", "stream faults", &relay::fault::reference());
}

#[test]
fn nothing_is_missing() {
    let text = text();
    let mut missing = Vec::new();
    for spec in catalog::FAULTS {
        if !text
            .lines()
            .any(|line| line.starts_with(&format!("| `{}`", spec.name)))
        {
            missing.push(format!("the row of {}", spec.name));
        }
        for param in spec.params {
            if !text.contains(param.text) || !text.contains(param.name) {
                missing.push(format!("{} of {}", param.text, spec.name));
            }
        }
    }
    for modifier in MODIFIERS {
        if !text
            .lines()
            .any(|line| line.starts_with(&format!("| `{}", modifier.key)))
            || !text.contains(modifier.name)
        {
            missing.push(format!("modifier {}", modifier.key));
        }
    }
    assert!(
        missing.is_empty(),
        "docs/rules.md lacks {}",
        missing.join(", ")
    );
}
