//! The screen of `fault top`.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize as _};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

use super::source::Source;
use crate::report::summary::human_bytes;
use crate::session::control::Snapshot;

/// The number of rates kept for each target.
const HISTORY: usize = 24;

/// The bars of a sparkline, from lowest to highest.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The throughput of a target.
#[derive(Default)]
struct Flow {
    bytes: u64,
    /// Bytes per second between refreshes, the oldest first.
    rates: VecDeque<u64>,
}

/// The state of the screen.
#[derive(Default)]
pub struct Screen {
    all: Vec<(Source, Snapshot)>,
    flows: HashMap<(String, String), Flow>,
    looked: Option<Instant>,
    /// The selected row in the table of rules.
    row: usize,
    /// The error of the last key.
    pub told: Option<String>,
}

impl Screen {
    /// Updates the figures.
    pub fn take(&mut self, all: Vec<(Source, Snapshot)>, now: Instant) {
        let elapsed = self.looked.map(|looked| now - looked);
        let mut flows = HashMap::new();
        for (source, snapshot) in &all {
            for target in &snapshot.targets {
                let key = (format!("{source:?}"), target.target.clone());
                let before = self.flows.remove(&key);
                let mut flow = before.unwrap_or_default();
                if let Some(elapsed) = elapsed {
                    let bytes = u128::from(target.bytes.saturating_sub(flow.bytes));
                    let rate = bytes * 1000 / elapsed.as_millis().max(1);
                    flow.rates
                        .push_back(u64::try_from(rate).unwrap_or(u64::MAX));
                }
                while flow.rates.len() > HISTORY {
                    flow.rates.pop_front();
                }
                flow.bytes = target.bytes;
                flows.insert(key, flow);
            }
        }
        self.flows = flows;
        self.all = all;
        self.looked = Some(now);
        self.row = self.row.min(self.rows().saturating_sub(1));
    }

    fn rows(&self) -> usize {
        self.all.iter().map(|(_, one)| one.rules.len()).sum()
    }

    /// Moves the selection.
    pub fn select(&mut self, by: isize) {
        let last = self.rows().saturating_sub(1);
        self.row = self.row.saturating_add_signed(by).min(last);
    }

    /// The selected rule: its source, its number there, and whether it is on.
    pub fn selected(&self) -> Option<(Source, usize, bool)> {
        let mut rules = self.all.iter().flat_map(|(source, one)| {
            let rules = one.rules.iter().enumerate();
            rules.map(|(place, rule)| (*source, place, rule.on))
        });
        rules.nth(self.row)
    }

    /// Draws the screen.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let head = u16::try_from(self.all.len()).unwrap_or(u16::MAX).min(6);
        let targets: usize = self.all.iter().map(|(_, one)| one.targets.len()).sum();
        let targets = u16::try_from(targets).unwrap_or(u16::MAX);
        let areas = Layout::vertical([
            Constraint::Length(head),
            Constraint::Min(3),
            Constraint::Length(targets.saturating_add(2).min(frame.area().height / 2)),
            Constraint::Length(1),
        ])
        .split(frame.area());
        let heads: Vec<Line<'_>> = self.all.iter().map(|(_, one)| head_of(one)).collect();
        frame.render_widget(Paragraph::new(heads), areas[0]);
        self.draw_rules(frame, areas[1]);
        self.draw_targets(frame, areas[2]);
        let foot = self.told.as_ref().map_or_else(
            || Line::from(" ↑↓ select   space off/on   q quit").dim(),
            |told| Line::from(format!(" {told}")).bold().red(),
        );
        frame.render_widget(foot, areas[3]);
    }

    fn draw_rules(&self, frame: &mut Frame<'_>, area: Rect) {
        let rules = self.all.iter().flat_map(|(_, one)| &one.rules);
        let rows = rules.map(|rule| {
            let state = if rule.on { "on" } else { "OFF" };
            let row = Row::new([
                Cell::from(state),
                Cell::from(rule.rule.as_str()),
                Cell::from(Line::from(rule.hits.to_string()).right_aligned()),
                Cell::from(Line::from(rule.seen.to_string()).right_aligned()),
                Cell::from(Line::from(rule.connections.to_string()).right_aligned()),
                Cell::from(rule.by.as_str()),
            ]);
            if rule.on { row } else { row.dim() }
        });
        let widths = [
            Constraint::Length(3),
            Constraint::Fill(2),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(7),
            Constraint::Fill(1),
        ];
        let table = Table::new(rows, widths)
            .header(headed(["", "rule", "hits", "matched", "conns", "by"], 2..5))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        let mut state = TableState::default().with_selected((self.rows() > 0).then_some(self.row));
        frame.render_stateful_widget(table, area, &mut state);
    }

    fn draw_targets(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.all.iter().flat_map(|(source, one)| {
            one.targets.iter().map(move |target| {
                let key = (format!("{source:?}"), target.target.clone());
                let rates = self.flows.get(&key).map(|flow| &flow.rates);
                let now = rates.and_then(|rates| rates.back()).copied().unwrap_or(0);
                let open = target.open.map_or("-".to_owned(), |open| open.to_string());
                Row::new([
                    Cell::from(target.target.as_str()),
                    Cell::from(Line::from(format!("{}/s", human_bytes(now))).right_aligned()),
                    Cell::from(rates.map(chart).unwrap_or_default()),
                    Cell::from(Line::from(open).right_aligned()),
                    Cell::from(Line::from(target.connections.to_string()).right_aligned()),
                ])
            })
        });
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(12),
            Constraint::Length(u16::try_from(HISTORY).unwrap_or(0)),
            Constraint::Length(7),
            Constraint::Length(7),
        ];
        let names = ["target", "throughput", "", "open", "conns"];
        let table = Table::new(rows, widths).header(headed(names, 1..5));
        frame.render_widget(table, area);
    }
}

/// The line of an instance.
fn head_of(one: &Snapshot) -> Line<'_> {
    let (whole, tenth) = (one.elapsed_ms / 1000, one.elapsed_ms % 1000 / 100);
    let text = match one.seed {
        Some(seed) => format!(" {}   {whole}.{tenth} s   seed {seed}", one.title),
        None => format!(" {}", one.title),
    };
    Line::from(text).bold()
}

/// A table's header; the given columns are right-aligned.
fn headed<const N: usize>(names: [&str; N], right: std::ops::Range<usize>) -> Row<'_> {
    let cells = names.into_iter().enumerate().map(|(place, name)| {
        let line = Line::from(name);
        Cell::from(if right.contains(&place) {
            line.right_aligned()
        } else {
            line
        })
    });
    Row::new(cells).underlined()
}

/// Rates as bars, scaled to the highest.
fn chart(rates: &VecDeque<u64>) -> String {
    let most = rates.iter().copied().max().unwrap_or(0).max(1);
    let top = (BARS.len() - 1) as u64;
    let bar = |rate: u64| {
        let height = u128::from(rate) * u128::from(top);
        let height = height.div_ceil(u128::from(most));
        BARS[usize::try_from(height).unwrap_or(0).min(BARS.len() - 1)]
    };
    rates.iter().map(|rate| bar(*rate)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::session::control::{RuleLine, TargetLine};

    fn snapshot(bytes: u64, on: bool) -> Vec<(Source, Snapshot)> {
        let rule = |rule: &str, on, hits| RuleLine {
            rule: rule.to_owned(),
            target: "redis".to_owned(),
            by: "tc (tcx)".to_owned(),
            on,
            seen: 40,
            hits,
            connections: 3,
        };
        let target = TargetLine {
            target: "redis".to_owned(),
            bytes,
            connections: 3,
            open: None,
        };
        let one = Snapshot {
            title: "fault inject".to_owned(),
            seed: Some(7),
            elapsed_ms: 2500,
            rules: vec![rule("redis loss=30%", true, 12), rule("redis down", on, 0)],
            targets: vec![target],
        };
        vec![(Source::Process(1), one)]
    }

    fn lines(screen: &Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(78, 9)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content().chunks(78);
        rows.map(|row| {
            row.iter()
                .map(ratatui::buffer::Cell::symbol)
                .collect::<String>()
        })
        .map(|line| line.trim_end().to_owned())
        .collect()
    }

    #[test]
    fn rules_and_targets_are_shown() {
        let mut screen = Screen::default();
        let start = Instant::now();
        screen.take(snapshot(0, false), start);
        screen.take(snapshot(2048, false), start + Duration::from_secs(1));
        let shown = lines(&screen);
        assert_eq!(shown[0], " fault inject   2.5 s   seed 7");
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&shown[1]), "rule hits matched conns by");
        assert_eq!(words(&shown[2]), "on redis loss=30% 12 40 3 tc (tcx)");
        assert_eq!(words(&shown[3]), "OFF redis down 0 40 3 tc (tcx)");
        assert!(
            shown
                .iter()
                .any(|line| words(line) == "redis 2.0 KiB/s █ - 3")
        );
        assert!(shown[8].contains("space off/on"));
    }

    #[test]
    fn the_selection_stays_among_the_rules() {
        let mut screen = Screen::default();
        assert_eq!(screen.selected(), None);
        screen.take(snapshot(0, false), Instant::now());
        assert_eq!(screen.selected(), Some((Source::Process(1), 0, true)));
        screen.select(5);
        assert_eq!(screen.selected(), Some((Source::Process(1), 1, false)));
        screen.select(-9);
        assert_eq!(screen.selected(), Some((Source::Process(1), 0, true)));
    }

    #[test]
    fn an_error_takes_the_place_of_the_keys() {
        let screen = Screen {
            told: Some("process 1 has ended".to_owned()),
            ..Screen::default()
        };
        assert!(lines(&screen)[8].contains("process 1 has ended"));
    }

    #[test]
    fn bars() {
        assert_eq!(chart(&VecDeque::from([0, 1, 50, 100])), " ▁▄█");
        assert_eq!(chart(&VecDeque::from([0, 0])), "  ");
    }
}
