//! The screen of `fault top`: three panes (instances, rules, targets), each of which scrolls and has a selected row.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize as _};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table};

use super::pane::{Move, Pane};
use super::source::{RuleId, Shown, Source};
use crate::report::summary::human_bytes;
use crate::session::control::{RuleLine, Snapshot, TargetLine};

/// The number of rates kept for each target.
const HISTORY: usize = 24;

/// The most lines of instances that are shown at once.
const INSTANCES: u16 = 6;

/// The bars of a sparkline, from lowest to highest.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The help.
const HELP: [&str; 14] = [
    "tab         next pane: instances, rules, targets",
    "↑ ↓ k j     select a row",
    "pgup pgdn   ten rows up or down",
    "home end    first or last row",
    "space       turn the selected rule off or on",
    "s           sort the pane by the next column",
    "?           show or close this help",
    "q esc ^C    quit",
    "",
    "hits        packets, connections or requests that a rule hit",
    "matched     packets that a rule matched (connections of a stream rule)",
    "conns       connections that it matched",
    "open        connections that are open now",
    "A rule that is off stays off until it is turned on or its instance ends.",
];

/// The throughput of a target.
#[derive(Default)]
struct Flow {
    bytes: u64,
    /// Bytes per second between refreshes, the oldest first.
    rates: VecDeque<u64>,
}

/// What a rule is known by from one refresh to the next.
type RuleKey = (Source, RuleId);
/// The same for a target.
type TargetKey = (Source, String);

/// The pane that keys apply to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Focus {
    Instances,
    #[default]
    Rules,
    Targets,
}

/// The order of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum RuleOrder {
    /// As they apply.
    #[default]
    Given,
    Name,
    Hits,
    Matched,
    Connections,
}

/// The order of targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TargetOrder {
    /// As in the rules.
    #[default]
    Given,
    Name,
    Throughput,
    Open,
    Connections,
}

/// The state of the screen.
#[derive(Default)]
pub struct Screen {
    all: Vec<Shown>,
    flows: HashMap<TargetKey, Flow>,
    looked: Option<Instant>,
    focus: Focus,
    instances: Pane<Source>,
    rules: Pane<RuleKey>,
    targets: Pane<TargetKey>,
    rule_order: RuleOrder,
    target_order: TargetOrder,
    has_help: bool,
    /// The message of the last key.
    pub told: Option<String>,
}

impl Screen {
    /// Updates the figures.
    pub fn take(&mut self, all: Vec<Shown>, now: Instant) {
        let elapsed = self.looked.map(|looked| now - looked);
        let mut flows = HashMap::new();
        for one in &all {
            for target in &one.snapshot.targets {
                let key = (one.source, target.target.clone());
                let mut flow = self.flows.remove(&key).unwrap_or_default();
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
        self.arrange();
    }

    /// Tells the panes their rows. What is selected stays selected, wherever it is now.
    fn arrange(&mut self) {
        let instances = self.all.iter().map(|one| one.source).collect();
        let rules = self.sorted_rules().into_iter().map(|(key, _)| key);
        let rules = rules.collect();
        let targets = self.sorted_targets().into_iter().map(|(key, _)| key);
        let targets = targets.collect();
        self.instances.arrange(instances);
        self.rules.arrange(rules);
        self.targets.arrange(targets);
    }

    fn sorted_rules(&self) -> Vec<(RuleKey, &RuleLine)> {
        let mut rules: Vec<_> = self
            .all
            .iter()
            .flat_map(|one| {
                let rules = one.ids.iter().zip(&one.snapshot.rules);
                rules.map(|(id, rule)| ((one.source, id.clone()), rule))
            })
            .collect();
        match self.rule_order {
            RuleOrder::Given => {}
            RuleOrder::Name => rules.sort_by(|(_, one), (_, other)| one.rule.cmp(&other.rule)),
            RuleOrder::Hits => rules.sort_by_key(|(_, rule)| Reverse(rule.hits)),
            RuleOrder::Matched => rules.sort_by_key(|(_, rule)| Reverse(rule.seen)),
            RuleOrder::Connections => rules.sort_by_key(|(_, rule)| Reverse(rule.connections)),
        }
        rules
    }

    fn sorted_targets(&self) -> Vec<(TargetKey, &TargetLine)> {
        let mut targets: Vec<_> = self
            .all
            .iter()
            .flat_map(|one| {
                let targets = one.snapshot.targets.iter();
                targets.map(|target| ((one.source, target.target.clone()), target))
            })
            .collect();
        match self.target_order {
            TargetOrder::Given => {}
            TargetOrder::Name => {
                targets.sort_by(|(_, one), (_, other)| one.target.cmp(&other.target));
            }
            TargetOrder::Throughput => targets.sort_by_key(|(key, _)| Reverse(self.rate(key))),
            TargetOrder::Open => targets.sort_by_key(|(_, target)| Reverse(target.open)),
            TargetOrder::Connections => {
                targets.sort_by_key(|(_, target)| Reverse(target.connections));
            }
        }
        targets
    }

    /// The latest throughput of a target, in bytes per second.
    fn rate(&self, key: &TargetKey) -> u64 {
        let flow = self.flows.get(key);
        flow.and_then(|flow| flow.rates.back())
            .copied()
            .unwrap_or(0)
    }

    /// Moves the selection of the focused pane.
    pub fn go(&mut self, to: Move) {
        self.told = None;
        match self.focus {
            Focus::Instances => self.instances.go(to),
            Focus::Rules => self.rules.go(to),
            Focus::Targets => self.targets.go(to),
        }
    }

    /// Focuses the next pane.
    pub fn next_pane(&mut self) {
        self.focus = match self.focus {
            Focus::Instances => Focus::Rules,
            Focus::Rules => Focus::Targets,
            Focus::Targets => Focus::Instances,
        };
    }

    /// Sorts the focused pane by the next column.
    pub fn sort(&mut self) {
        match self.focus {
            Focus::Instances => {}
            Focus::Rules => {
                self.rule_order = match self.rule_order {
                    RuleOrder::Given => RuleOrder::Hits,
                    RuleOrder::Hits => RuleOrder::Matched,
                    RuleOrder::Matched => RuleOrder::Connections,
                    RuleOrder::Connections => RuleOrder::Name,
                    RuleOrder::Name => RuleOrder::Given,
                };
            }
            Focus::Targets => {
                self.target_order = match self.target_order {
                    TargetOrder::Given => TargetOrder::Throughput,
                    TargetOrder::Throughput => TargetOrder::Open,
                    TargetOrder::Open => TargetOrder::Connections,
                    TargetOrder::Connections => TargetOrder::Name,
                    TargetOrder::Name => TargetOrder::Given,
                };
            }
        }
        self.arrange();
    }

    /// Shows or closes the help.
    pub fn toggle_help(&mut self) {
        self.has_help = !self.has_help;
    }

    /// Closes the help. Returns whether it was shown.
    pub fn close_help(&mut self) -> bool {
        std::mem::take(&mut self.has_help)
    }

    /// The selected rule, and whether it is on.
    ///
    /// # Errors
    /// One line: no rule is selected, or it has gone since.
    pub fn selected(&self) -> Result<(RuleKey, bool), String> {
        let key = self.rules.selected.as_ref().ok_or("there is no rule")?;
        let rules = self.sorted_rules();
        let found = rules.into_iter().find(|(other, _)| other == key);
        match found {
            Some((key, rule)) => Ok((key, rule.on)),
            None => Err(format!("{} has gone meanwhile: select another rule", key.1)),
        }
    }

    /// Draws the screen.
    pub fn draw(&mut self, frame: &mut Frame<'_>) {
        let count = |count: usize| u16::try_from(count).unwrap_or(u16::MAX);
        let targets: usize = self.all.iter().map(|one| one.snapshot.targets.len()).sum();
        let areas = Layout::vertical([
            Constraint::Length(count(self.all.len()).min(INSTANCES)),
            Constraint::Min(3),
            Constraint::Length(
                count(targets)
                    .saturating_add(2)
                    .min(frame.area().height / 2),
            ),
            Constraint::Length(1),
        ])
        .split(frame.area());
        self.draw_instances(frame, areas[0]);
        self.draw_rules(frame, areas[1]);
        self.draw_targets(frame, areas[2]);
        let foot = self.told.as_ref().map_or_else(
            || Line::from(" tab pane   ↑↓ select   space off/on   s sort   ? help   q quit").dim(),
            |told| Line::from(format!(" {told}")).bold().red(),
        );
        frame.render_widget(foot, areas[3]);
        if self.has_help {
            draw_help(frame);
        }
    }

    /// The style of the selected row of a pane.
    fn highlight(&self, pane: Focus) -> Style {
        Style::new().add_modifier(if pane == self.focus {
            Modifier::REVERSED
        } else {
            Modifier::BOLD
        })
    }

    fn draw_instances(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self
            .all
            .iter()
            .map(|one| Row::new([head_of(&one.snapshot)]));
        let table = Table::new(rows, [Constraint::Fill(1)])
            .row_highlight_style(self.highlight(Focus::Instances));
        frame.render_stateful_widget(table, area, &mut self.instances.state);
    }

    fn draw_rules(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.sorted_rules().into_iter().map(|(_, rule)| {
            let state = if rule.on { "on" } else { "OFF" };
            let row = Row::new([
                Cell::from(state),
                Cell::from(rule.rule.clone()),
                Cell::from(Line::from(rule.hits.to_string()).right_aligned()),
                Cell::from(Line::from(rule.seen.to_string()).right_aligned()),
                Cell::from(Line::from(rule.connections.to_string()).right_aligned()),
                Cell::from(rule.by.clone()),
            ]);
            if rule.on { row } else { row.dim() }
        });
        let rows: Vec<_> = rows.collect();
        let widths = [
            Constraint::Length(3),
            Constraint::Fill(2),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(7),
            Constraint::Fill(1),
        ];
        let sorted = match self.rule_order {
            RuleOrder::Given => None,
            RuleOrder::Name => Some(1),
            RuleOrder::Hits => Some(2),
            RuleOrder::Matched => Some(3),
            RuleOrder::Connections => Some(4),
        };
        let names = ["", "rule", "hits", "matched", "conns", "by"];
        let table = Table::new(rows, widths)
            .header(headed(names, 2..5, sorted))
            .row_highlight_style(self.highlight(Focus::Rules));
        frame.render_stateful_widget(table, area, &mut self.rules.state);
    }

    fn draw_targets(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.sorted_targets().into_iter().map(|(key, target)| {
            let rates = self.flows.get(&key).map(|flow| &flow.rates);
            let rate = format!("{}/s", human_bytes(self.rate(&key)));
            let open = target.open.map_or("-".to_owned(), |open| open.to_string());
            Row::new([
                Cell::from(target.target.clone()),
                Cell::from(Line::from(rate).right_aligned()),
                Cell::from(rates.map(chart).unwrap_or_default()),
                Cell::from(Line::from(open).right_aligned()),
                Cell::from(Line::from(target.connections.to_string()).right_aligned()),
            ])
        });
        let rows: Vec<_> = rows.collect();
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(12),
            Constraint::Length(u16::try_from(HISTORY).unwrap_or(0)),
            Constraint::Length(7),
            Constraint::Length(7),
        ];
        let sorted = match self.target_order {
            TargetOrder::Given => None,
            TargetOrder::Name => Some(0),
            TargetOrder::Throughput => Some(1),
            TargetOrder::Open => Some(3),
            TargetOrder::Connections => Some(4),
        };
        let names = ["target", "throughput", "", "open", "conns"];
        let table = Table::new(rows, widths)
            .header(headed(names, 1..5, sorted))
            .row_highlight_style(self.highlight(Focus::Targets));
        frame.render_stateful_widget(table, area, &mut self.targets.state);
    }
}

/// Draws the help over the middle of the screen.
fn draw_help(frame: &mut Frame<'_>) {
    let lines = HELP.map(|line| Line::from(format!(" {line} ")));
    let (wide, high) = (
        lines.iter().map(Line::width).max().unwrap_or(0),
        lines.len(),
    );
    let length = |length: usize| Constraint::Length(u16::try_from(length + 2).unwrap_or(u16::MAX));
    let area = frame.area().centered(length(wide), length(high));
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(" Keys and columns ");
    frame.render_widget(Paragraph::new(lines.to_vec()).block(block), area);
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

/// A table's header; the given columns are right-aligned, the sorted one is marked.
fn headed<const N: usize>(
    names: [&'static str; N],
    right: std::ops::Range<usize>,
    sorted: Option<usize>,
) -> Row<'static> {
    let cells = names.into_iter().enumerate().map(|(place, name)| {
        let line = if sorted == Some(place) {
            Line::from(format!("{name}▾"))
        } else {
            Line::from(name)
        };
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

    fn rule(rule: &str, on: bool, hits: u64) -> RuleLine {
        RuleLine {
            rule: rule.to_owned(),
            target: "redis".to_owned(),
            by: "tc (tcx)".to_owned(),
            on,
            seen: 40,
            hits,
            connections: 3,
        }
    }

    fn shown(bytes: u64, rules: Vec<RuleLine>) -> Vec<Shown> {
        let target = TargetLine {
            target: "redis".to_owned(),
            bytes,
            connections: 3,
            open: None,
        };
        let snapshot = Snapshot {
            title: "fault inject".to_owned(),
            seed: Some(7),
            elapsed_ms: 2500,
            rules,
            targets: vec![target],
        };
        vec![Shown::of_process(1, snapshot)]
    }

    fn two(bytes: u64) -> Vec<Shown> {
        let rules = vec![
            rule("redis loss=30%", true, 12),
            rule("redis down", false, 0),
        ];
        shown(bytes, rules)
    }

    fn lines_of(screen: &mut Screen, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(78, height)).unwrap();
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

    fn lines(screen: &mut Screen) -> Vec<String> {
        lines_of(screen, 9)
    }

    /// The selected rule's text, or the message.
    fn selected(screen: &Screen) -> String {
        match screen.selected() {
            Ok(((_, id), on)) => format!("{id} {on}"),
            Err(why) => why,
        }
    }

    #[test]
    fn rules_and_targets_are_shown() {
        let mut screen = Screen::default();
        let start = Instant::now();
        screen.take(two(0), start);
        screen.take(two(2048), start + Duration::from_secs(1));
        let shown = lines(&mut screen);
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
        assert_eq!(selected(&screen), "there is no rule");
        screen.take(two(0), Instant::now());
        assert_eq!(selected(&screen), "`redis loss=30%` true");
        screen.go(Move::By(5));
        assert_eq!(selected(&screen), "`redis down` false");
        screen.go(Move::By(-9));
        assert_eq!(selected(&screen), "`redis loss=30%` true");
    }

    #[test]
    fn the_selected_rule_stays_selected_wherever_it_is() {
        let mut screen = Screen::default();
        let rules = |second| vec![rule("a drop", true, 5), rule("b drop", true, second)];
        screen.take(shown(0, rules(1)), Instant::now());
        screen.sort();
        assert_eq!(selected(&screen), "`a drop` true");
        // The other rule takes its row.
        screen.take(shown(0, rules(9)), Instant::now());
        assert_eq!(selected(&screen), "`a drop` true");
        let shown_lines = lines(&mut screen);
        assert!(shown_lines[1].contains("hits▾"), "{shown_lines:?}");
        assert!(shown_lines[2].contains("b drop"), "{shown_lines:?}");
        assert_eq!(screen.rules.state.selected(), Some(1));
        // It has gone: nothing else is selected in its place before a key says so.
        screen.take(shown(0, vec![rule("b drop", true, 9)]), Instant::now());
        assert_eq!(
            selected(&screen),
            "`a drop` has gone meanwhile: select another rule"
        );
        assert_eq!(screen.rules.state.selected(), None);
        screen.go(Move::By(1));
        assert_eq!(selected(&screen), "`b drop` true");
    }

    #[test]
    fn every_pane_scrolls() {
        let mut screen = Screen::default();
        let many = (0..30).map(|number| rule(&format!("rule-{number} drop"), true, 0));
        let mut all: Vec<Shown> = (1..=9)
            .map(|pid| {
                let snapshot = Snapshot {
                    title: format!("fault run -- job-{pid}"),
                    ..Snapshot::default()
                };
                Shown::of_process(pid, snapshot)
            })
            .collect();
        all.extend(shown(0, many.collect()));
        let targets = &mut all[9].snapshot.targets;
        let target = targets[0].clone();
        targets.extend((0..30).map(|number| TargetLine {
            target: format!("service-{number}"),
            ..target.clone()
        }));
        screen.take(all, Instant::now());
        for (last, title) in [
            ("rule-29 drop", "rules"),
            ("service-29", "targets"),
            ("fault inject", "instances"),
        ] {
            assert!(
                !lines_of(&mut screen, 24).join("\n").contains(last),
                "{title}"
            );
            screen.go(Move::Last);
            assert!(
                lines_of(&mut screen, 24).join("\n").contains(last),
                "{title}"
            );
            screen.next_pane();
        }
    }

    #[test]
    fn help_is_shown_and_closed() {
        let mut screen = Screen::default();
        screen.take(two(0), Instant::now());
        screen.toggle_help();
        assert!(
            lines_of(&mut screen, 24)
                .join("\n")
                .contains("sort the pane")
        );
        assert!(screen.close_help() && !screen.close_help());
        assert!(
            !lines_of(&mut screen, 24)
                .join("\n")
                .contains("sort the pane")
        );
    }

    #[test]
    fn an_error_takes_the_place_of_the_keys() {
        let mut screen = Screen {
            told: Some("process 1 has ended".to_owned()),
            ..Screen::default()
        };
        assert!(lines(&mut screen)[8].contains("process 1 has ended"));
    }

    #[test]
    fn bars() {
        assert_eq!(chart(&VecDeque::from([0, 1, 50, 100])), " ▁▄█");
        assert_eq!(chart(&VecDeque::from([0, 0])), "  ");
    }
}
