//! `fault top`.

mod pane;
mod source;
mod view;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::client::ClientArgs;
use super::{Failure, Outcome, exit, print_json};
use crate::rule::units::parse_duration;

use pane::{Move, PAGE};
use source::Sources;
use view::Screen;

/// What follows the options in `fault top --help`.
const AFTER: &str = "\
Keys:
  tab        next pane: instances, rules, targets
  up, down   select a row (also k, j, pgup, pgdn, home, end)
  space      turn the selected rule off or on
  s          sort the pane by the next column
  ?          show the keys and the columns
  q          quit

Exit codes:
  0    you quit, or the figures were printed (--json)
  2    an argument is wrong, or there is no terminal
  125  nothing to show: no instance is left, and no daemon answers

Examples:
  fault top
  fault top --pid 4242
  fault top --json";

/// The arguments of `fault top`.
#[derive(Debug, Args)]
#[command(after_long_help = AFTER)]
pub struct TopArgs {
    #[command(flatten)]
    daemon: ClientArgs,
    /// Only the instance with this process id.
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// The refresh interval, e.g. 500ms.
    #[arg(long, value_name = "DURATION", default_value = "500ms")]
    every: String,
    /// Print the figures once, as JSON.
    #[arg(long)]
    json: bool,
}

impl TopArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// There is nothing to show, or no terminal.
    pub fn execute(self) -> Outcome {
        let every = parse_duration(&self.every)
            .map(Duration::from_nanos)
            .map_err(|error| Failure::usage(anyhow::anyhow!("--every: {}", error.one_line())))?;
        let sources = Sources::new(self.daemon, self.pid);
        let all = sources.look()?;
        if self.json {
            let all: Vec<_> = all.into_iter().map(|one| one.snapshot).collect();
            print_json(&all)?;
            return Ok(exit::SUCCESS);
        }
        if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
            return Err(Failure::usage(anyhow::anyhow!(
                "`fault top` needs a terminal: use --json without one"
            )));
        }
        let mut terminal = ratatui::try_init()?;
        let shown = show(
            &mut terminal,
            &sources,
            every.max(Duration::from_millis(50)),
        );
        ratatui::try_restore()?;
        shown?;
        Ok(exit::SUCCESS)
    }
}

/// Shows the figures until the user quits or no instance is left.
fn show(
    terminal: &mut ratatui::DefaultTerminal,
    sources: &Sources,
    every: Duration,
) -> anyhow::Result<()> {
    let mut screen = Screen::default();
    loop {
        screen.take(sources.look()?, Instant::now());
        let next = Instant::now() + every;
        loop {
            terminal.draw(|frame| screen.draw(frame))?;
            if !event::poll(next.saturating_duration_since(Instant::now()))? {
                break;
            }
            let Some(key) = pressed(&event::read()?) else {
                continue;
            };
            // Any other key closes the help first.
            if key != Key::Help && screen.close_help() {
                continue;
            }
            match key {
                Key::Quit => return Ok(()),
                Key::Go(to) => screen.go(to),
                Key::NextPane => screen.next_pane(),
                Key::Sort => screen.sort(),
                Key::Help => screen.toggle_help(),
                Key::Switch => {
                    screen.told = switch(&screen, sources).err();
                    break;
                }
            }
        }
    }
}

/// Turns the selected rule off or on.
///
/// # Errors
/// One line for the user.
fn switch(screen: &Screen, sources: &Sources) -> Result<(), String> {
    let ((source, rule), on) = screen.selected()?;
    sources
        .switch(source, &rule, !on)
        .map_err(|error| format!("{error:#}"))
}

/// What a key does.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Quit,
    Go(Move),
    NextPane,
    Sort,
    Help,
    Switch,
}

fn pressed(event: &Event) -> Option<Key> {
    let Event::Key(key) = event else {
        return None;
    };
    if key.kind == KeyEventKind::Release {
        return None;
    }
    Some(match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Up | KeyCode::Char('k') => Key::Go(Move::By(-1)),
        KeyCode::Down | KeyCode::Char('j') => Key::Go(Move::By(1)),
        KeyCode::PageUp => Key::Go(Move::By(-PAGE)),
        KeyCode::PageDown => Key::Go(Move::By(PAGE)),
        KeyCode::Home | KeyCode::Char('g') => Key::Go(Move::First),
        KeyCode::End | KeyCode::Char('G') => Key::Go(Move::Last),
        KeyCode::Tab => Key::NextPane,
        KeyCode::Char('s') => Key::Sort,
        KeyCode::Char('?' | 'h') => Key::Help,
        KeyCode::Char(' ') | KeyCode::Enter => Key::Switch,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::crossterm::event::KeyEvent;

    #[test]
    fn keys() {
        let key = |code, modifiers| pressed(&Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(
            key(KeyCode::Char('c'), KeyModifiers::CONTROL),
            Some(Key::Quit)
        );
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
        assert_eq!(
            key(KeyCode::Char(' '), KeyModifiers::NONE),
            Some(Key::Switch)
        );
        assert_eq!(
            key(KeyCode::Char('j'), KeyModifiers::NONE),
            Some(Key::Go(Move::By(1)))
        );
        assert_eq!(key(KeyCode::Char('?'), KeyModifiers::NONE), Some(Key::Help));
        assert_eq!(pressed(&Event::Resize(80, 24)), None);
    }
}
