//! What is said to people, and data for programs.
//!
//! A terminal can be closed and a reader can go away at any time. `eprintln!` and `println!` panic then, which would cost
//! CMD its exit code and CI its report; so nothing here uses them (clippy watches).

use std::env;
use std::fmt::{self, Arguments};
use std::io::{self, ErrorKind, IsTerminal as _, Write as _};

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, SigmaskHow};

/// Says a line on standard error, as `eprintln!` does; nobody need be there to read it.
macro_rules! tell {
    ($($what:tt)*) => { $crate::tell::line(format_args!($($what)*)) };
}
pub(crate) use tell;

/// A line on standard error. It is lost when nobody reads it any more: the work goes on, and there is nobody to be told.
pub fn line(what: Arguments<'_>) {
    // One write for one line, so that those of several processes do not get mixed.
    let text = format!("{what}\n");
    drop(io::stderr().write_all(painted(&text, has_color()).as_bytes()));
}

/// The words that are painted where a line begins with them, and their colours (SGR parameters).
const COLORS: [(&str, &str, &str); 3] = [
    ("fault: ", "error:", "1;31"),
    ("fault: ", "warning:", "1;33"),
    ("", "help:", "1;36"),
];

/// The text with its first words in colour.
pub(crate) fn painted(text: &str, has_color: bool) -> String {
    if !has_color {
        return text.to_owned();
    }
    let paint = |line: &str| {
        let found = COLORS.iter().find_map(|(before, word, color)| {
            let rest = line.strip_prefix(before)?.strip_prefix(word)?;
            Some(format!("{before}\x1b[{color}m{word}\x1b[0m{rest}"))
        });
        found.unwrap_or_else(|| line.to_owned())
    };
    text.split_inclusive('\n').map(paint).collect()
}

/// Whether standard error shows colours: it is a terminal that can, and `NO_COLOR` is unset or empty.
pub(crate) fn has_color() -> bool {
    let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stderr().is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// How long nothing may be said.
const SILENCE: Duration = Duration::from_secs(2);

/// Says what is being done every two seconds, until it is dropped.
#[derive(Debug)]
pub(crate) struct Patience {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Patience {
    /// Begins to wait. Without a thread to be had nothing is said.
    pub(crate) fn start(what: &'static str) -> Self {
        let (done, is_done) = mpsc::channel();
        // Signals are for the other threads; a thread inherits the mask.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let thread = thread::Builder::new().spawn(move || {
            let started = Instant::now();
            while is_done.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                tell!("fault: {what} ({} s)", started.elapsed().as_secs());
            }
        });
        if let Ok(before) = before
            && let Err(error) = before.thread_set_mask()
        {
            log::warn!("signals may be lost: {error}");
        }
        Self {
            done: Some(done),
            thread: thread.ok(),
        }
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        self.done = None;
        // It panics at nothing; and when it did, only its lines are missing.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// A piece of a line on a terminal, for as long as somebody looks.
pub(crate) fn live(what: Arguments<'_>) {
    let mut terminal = io::stdout();
    drop(write!(terminal, "{what}").and_then(|()| terminal.flush()));
}

/// Whoever read the standard output has seen enough, as `head` has: the end of the work, and no failure.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the standard output has gone")
    }
}

impl std::error::Error for ReaderGone {}

/// Data for whoever reads standard output.
///
/// # Errors
/// `ReaderGone`, or standard output takes nothing: a full disk.
pub fn data(text: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("can't write to the standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::painted;

    #[test]
    fn only_the_first_words_of_a_line_are_painted() {
        let text = "fault: error: no help: here\nhelp: say so\nfault: seed 7\n";
        assert_eq!(painted(text, false), text);
        assert_eq!(
            painted(text, true),
            "fault: \x1b[1;31merror:\x1b[0m no help: here\n\x1b[1;36mhelp:\x1b[0m say so\nfault: seed 7\n"
        );
        assert!(painted("fault: warning: x", true).contains("1;33mwarning:"));
    }
}
