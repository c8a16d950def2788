//! Markdown as text for a terminal: as much of it as docs/rules.md uses.

use regex::Regex;
use textwrap::{Options, core::display_width, fill};

/// Stands for a `|` inside a cell, and is as wide.
const BAR: &str = "\u{1c0}";

/// How far code and what belongs to an item is indented.
const INDENT: &str = "    ";

/// Renders Markdown for a terminal of so many columns. Tables that are wider become lists.
#[must_use]
pub fn of_markdown(markdown: &str, width: usize) -> String {
    let link = Regex::new(r"\[([^\]\n]+)\]\([^)\n]+\)").expect("a valid expression");
    let text = link
        .replace_all(markdown, "$1")
        .replace("\\|", BAR)
        .replace("**", "");
    let mut page = Page {
        width,
        ..Page::default()
    };
    text.lines().for_each(|line| page.read(line));
    page.end_block();
    page.text.replace(BAR, "|")
}

/// What has been rendered, and the block that is being read.
#[derive(Default)]
struct Page<'a> {
    width: usize,
    text: String,
    is_code: bool,
    paragraph: Vec<&'a str>,
    table: Vec<Vec<&'a str>>,
}

impl<'a> Page<'a> {
    fn read(&mut self, line: &'a str) {
        if line.starts_with("```") {
            self.end_block();
            self.is_code = !self.is_code;
        } else if self.is_code {
            self.print(&format!("{INDENT}{line}"));
        } else if self.paragraph.is_empty() && line.starts_with(INDENT) {
            self.print(line);
        } else if let Some(row) = line.strip_prefix('|') {
            let row = row.trim_end().trim_end_matches('|');
            self.table.push(row.split('|').map(str::trim).collect());
        } else if line.is_empty() {
            self.end_block();
            self.print("");
        } else if line.starts_with('#') {
            self.end_block();
            self.print(&line.trim_start_matches(['#', ' ']).to_uppercase());
        } else if !line.starts_with("<!--") {
            if mark(line) != 0 {
                self.end_block();
            }
            self.paragraph.push(line.trim());
        }
    }

    fn print(&mut self, line: &str) {
        self.text += line.trim_end();
        self.text.push('\n');
    }

    /// Prints the paragraph, the item or the table that ends here.
    fn end_block(&mut self) {
        let words = std::mem::take(&mut self.paragraph).join(" ");
        if !words.is_empty() {
            let inside = " ".repeat(mark(&words));
            let options = Options::new(self.width).subsequent_indent(&inside);
            self.print(&fill(&words, options));
        }
        let mut rows = std::mem::take(&mut self.table);
        if rows.len() > 2 {
            // The line between the head and the rows.
            rows.remove(1);
            let columns: Vec<usize> = (0..rows[0].len())
                .map(|nth| {
                    rows.iter()
                        .map(|row| cell_width(row, nth))
                        .max()
                        .unwrap_or(0)
                })
                .collect();
            if columns.iter().map(|width| width + 2).sum::<usize>() <= self.width {
                self.columns(&rows, &columns);
            } else {
                rows[1..].iter().for_each(|row| self.item(row));
            }
        }
    }

    fn columns(&mut self, rows: &[Vec<&str>], widths: &[usize]) {
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line += "  ";
                line += cell;
                line += &" ".repeat(width - display_width(cell));
            }
            self.print(&line);
        }
    }

    /// Prints a row as an item: its first cell, below it the last, which says what it is, and then those between.
    fn item(&mut self, row: &[&str]) {
        let [first, between @ .., last] = row else {
            return;
        };
        self.print(&format!("  {first}"));
        let options = Options::new(self.width)
            .initial_indent("      ")
            .subsequent_indent("        ");
        let cells = std::iter::once(last).chain(between);
        for line in cells.flat_map(|cell| cell.split("<br>")) {
            if !matches!(line, "" | "-") {
                self.print(&fill(line, &options));
            }
        }
    }
}

/// How long the mark is that makes a line an item, `- ` or `1. `, with its space; 0 where there is none.
fn mark(line: &str) -> usize {
    let digits = line.len() - line.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    match &line[digits..] {
        rest if digits == 0 && rest.starts_with("- ") => 2,
        rest if digits != 0 && rest.starts_with(". ") => digits + 2,
        _ => 0,
    }
}

fn cell_width(row: &[&str], nth: usize) -> usize {
    row.get(nth).map_or(0, |cell| display_width(cell))
}

#[cfg(test)]
mod tests {
    use super::of_markdown;

    #[test]
    fn narrow_tables_stay_and_wide_ones_become_lists() {
        let markdown = "# A title\n\nSome [words](x.md).\n\n| a | b |\n|---|---|\n| `x\\|y` | z |\n\n```rule\ntcp:80 drop\n```\n";
        let wide = "A TITLE\n\nSome words.\n\n  a      b\n  `x|y`  z\n\n    tcp:80 drop\n";
        assert_eq!(of_markdown(markdown, 80), wide);
        let narrow = of_markdown(markdown, 9);
        assert!(narrow.contains("\n  `x|y`\n      z\n"), "{narrow}");
        let four = "| name | one | two | what |\n|---|---|---|---|\n| n | 1 | 2 | w |\n";
        assert_eq!(of_markdown(four, 12), "  n\n      w\n      1\n      2\n");
    }

    #[test]
    fn numbered_items_and_indented_code_keep_their_lines() {
        let markdown = "1. first\n   and more\n2. second\n\n    code  as it is\n    more\n";
        let text = "1. first\n   and more\n2. second\n\n    code  as it is\n    more\n";
        assert_eq!(of_markdown(markdown, 11), text);
    }
}
