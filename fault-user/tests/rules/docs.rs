//! docs/rules.md is complete, and its examples are what it says they are. The rules and links of all pages are right.

use std::fs;
use std::path::{Path, PathBuf};

use fault_user::relay;
use fault_user::rule::scenario::Format;
use fault_user::rule::{MODIFIERS, Rule, Scenario, catalog, reference};
use regex::Regex;

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

/// README.md and the pages of the book, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = vec![path("../README.md")];
    for entry in fs::read_dir(path("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            paths.push(path);
        }
    }
    assert!(paths.len() >= 15, "{paths:?}");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    paths.into_iter().map(read).collect()
}

/// The anchors of a page's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let slug = |heading: &str| {
        let title = heading.trim_start_matches('#').trim().to_lowercase();
        let is_kept = |letter: &char| letter.is_alphanumeric() || " -_".contains(*letter);
        title.replace(' ', "-").chars().filter(is_kept).collect()
    };
    headings.map(slug).collect()
}

#[test]
fn every_page_is_in_the_book() {
    let summary = fs::read_to_string(path("SUMMARY.md")).unwrap();
    for (page, _) in &pages()[1..] {
        let name = page.file_name().unwrap().to_str().unwrap();
        let is_listed = name == "SUMMARY.md" || summary.contains(&format!("]({name})"));
        assert!(is_listed, "docs/SUMMARY.md lacks {name}");
    }
}

/// A page of the book links to nothing beside it: that is not there in the book.
#[test]
fn every_link_leads_somewhere() {
    let link = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    for (page, text) in pages() {
        let folder = page.parent().unwrap();
        for found in link.captures_iter(&text) {
            let target = &found[1];
            if target.starts_with("http") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() {
                page.clone()
            } else {
                folder.join(file)
            };
            let place = format!("{}: {target}", page.display());
            assert!(file.exists(), "{place}");
            assert!(!target.starts_with(".."), "{place}");
            if !anchor.is_empty() {
                let anchors = anchors(&fs::read_to_string(&file).unwrap());
                assert!(anchors.contains(&anchor.to_owned()), "{place}");
            }
        }
    }
}

#[test]
fn rules_in_commands_and_tables_are_read() {
    let in_command = Regex::new(r"-r '([^'…]+)'").unwrap();
    let in_table = Regex::new("`([^`…]+ [^`…]+)`").unwrap();
    let mut count = 0;
    let mut read = |page: &Path, text: &str| {
        text.parse::<Rule>()
            .unwrap_or_else(|error| panic!("{}: {error}", page.display()));
        count += 1;
    };
    for (page, text) in pages() {
        for found in in_command.captures_iter(&text) {
            read(&page, &found[1]);
        }
    }
    let (page, readme) = pages().swap_remove(0);
    let table = readme.split("| rule | what happens |").nth(1).unwrap();
    for row in table.lines().skip(2).take_while(|row| !row.is_empty()) {
        let cell = row.split(" | ").next().unwrap();
        for found in in_table.captures_iter(cell) {
            read(&page, &found[1]);
        }
    }
    assert!(count >= 50, "only {count} rules");
}

#[test]
fn the_readme_names_this_version() {
    let (_, readme) = pages().swap_remove(0);
    let version = env!("CARGO_PKG_VERSION");
    let package = format!("/v{version}/fault_{version}_amd64.deb");
    assert!(readme.contains(&package), "{package}");
    let rust = format!("Rust {} or newer", env!("CARGO_PKG_RUST_VERSION"));
    assert!(readme.contains(&rust), "{rust}");
}
