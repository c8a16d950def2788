//! Messages for people on standard error, and data for programs on standard output.
//!
//! A terminal or a reader may go away at any time. `eprintln!` and `println!` panic then, which would lose CMD's exit
//! code and the report. So they are not used (clippy checks this).

use std::env;
use std::fmt::{self, Arguments};
use std::io::{self, ErrorKind, IsTerminal, Write as _};

use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, SigmaskHow};

/// Prints a line on standard error like `eprintln!`, but ignores write errors.
macro_rules! tell {
    ($($what:tt)*) => { $crate::tell::line(format_args!($($what)*)) };
}
pub(crate) use tell;

/// Prints a line on standard error. Write errors are ignored: there is no one left to report them to.
pub fn line(what: Arguments<'_>) {
    // A single write per line, so that lines of several processes do not get mixed.
    let text = format!("{what}\n");
    drop(io::stderr().write_all(painted(&text, has_color(&io::stderr())).as_bytes()));
}

/// The first words of lines that are coloured, and their colours (SGR parameters).
const COLORS: [(&str, &str, &str); 3] = [
    ("fault: ", "error:", "1;31"),
    ("fault: ", "warning:", "1;33"),
    ("", "help:", "1;36"),
];

/// Colours the first words of lines.
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

/// Whether a stream is a terminal that supports colours, and `NO_COLOR` (<https://no-color.org>) is unset or empty.
pub(crate) fn has_color(stream: &impl IsTerminal) -> bool {
    let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
    stream.is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// When [`show_steps`] was called, if it was.
static STEPS_SINCE: OnceLock<Instant> = OnceLock::new();

/// From now on prints how long each step of starting and ending takes (`-v`).
pub fn show_steps() {
    STEPS_SINCE.get_or_init(Instant::now);
}

/// A step of starting or ending. Its time is printed when it is dropped.
#[must_use]
pub(crate) struct TimedStep {
    what: String,
    since: Instant,
    began: Instant,
}

/// Begins a step; `None` unless times are printed.
pub(crate) fn step(what: Arguments<'_>) -> Option<TimedStep> {
    let since = *STEPS_SINCE.get()?;
    Some(TimedStep {
        what: what.to_string(),
        since,
        began: Instant::now(),
    })
}

impl Drop for TimedStep {
    fn drop(&mut self) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        tell!(
            "fault: at {:.1} ms: {} took {:.1} ms",
            ms(self.since.elapsed()),
            self.what,
            ms(self.began.elapsed())
        );
    }
}

/// Interval between progress messages.
const SILENCE: Duration = Duration::from_secs(2);

/// Prints a progress message every two seconds, until it is dropped.
#[derive(Debug)]
pub(crate) struct Patience {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Patience {
    /// Starts the timer. If no thread can be started, no messages are printed.
    pub(crate) fn start(what: &'static str) -> Self {
        let (done, is_done) = mpsc::channel();
        // The new thread inherits this mask, so that other threads get the signals.
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
        // A panic would only lose its messages.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Writes a part of a line on a terminal. Write errors are ignored.
pub(crate) fn live(what: Arguments<'_>) {
    let mut terminal = io::stdout();
    drop(write!(terminal, "{what}").and_then(|()| terminal.flush()));
}

/// The reader of the standard output has gone, as `head` does. This ends the work without a failure.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the standard output has gone")
    }
}

impl std::error::Error for ReaderGone {}

/// Writes data to standard output.
///
/// # Errors
/// `ReaderGone`, or standard output can't be written to, such as a full disk.
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
