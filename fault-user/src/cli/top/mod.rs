//! `fault top`.

mod source;
mod view;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::client::Target;
use super::{Failure, Outcome, exit, print_json};
use crate::rule::units::parse_duration;

use source::Sources;
use view::Screen;

/// Watch rules, hits, throughput and connections live; turn rules off and on.
///
/// Shows every `fault run` and `fault inject` of this user in this network namespace, and the daemon if one answers. A
/// rule that is turned off stays off until it is turned on again or its instance ends.
#[derive(Debug, Args)]
pub struct Top {
    #[command(flatten)]
    daemon: Target,
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

impl Top {
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
            let all: Vec<_> = all.into_iter().map(|(_, snapshot)| snapshot).collect();
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
            match pressed(&event::read()?) {
                Some(Key::Quit) => return Ok(()),
                Some(Key::Up) => screen.select(-1),
                Some(Key::Down) => screen.select(1),
                Some(Key::Switch) => {
                    if let Some((source, rule, on)) = screen.selected() {
                        screen.told = sources
                            .switch(source, rule, !on)
                            .err()
                            .map(|error| format!("{error:#}"));
                        break;
                    }
                }
                None => {}
            }
        }
    }
}

/// Handles a key.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Quit,
    Up,
    Down,
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
        KeyCode::Up | KeyCode::Char('k') => Key::Up,
        KeyCode::Down | KeyCode::Char('j') => Key::Down,
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
        assert_eq!(key(KeyCode::Char('j'), KeyModifiers::NONE), Some(Key::Down));
        assert_eq!(pressed(&Event::Resize(80, 24)), None);
    }
}
