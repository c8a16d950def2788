//! What is said to people, and data for programs.
//!
//! A terminal can be closed and a reader can go away at any time. `eprintln!` and `println!` panic then, which would cost
//! CMD its exit code and CI its report; so nothing here uses them (clippy watches).

use std::fmt::{self, Arguments};
use std::io::{self, ErrorKind, Write as _};

use anyhow::{Context as _, Result};

/// Says a line on standard error, as `eprintln!` does; nobody need be there to read it.
macro_rules! tell {
    ($($what:tt)*) => { $crate::tell::line(format_args!($($what)*)) };
}
pub(crate) use tell;

/// A line on standard error. It is lost when nobody reads it any more: the work goes on, and there is nobody to be told.
pub fn line(what: Arguments<'_>) {
    // One write for one line, so that those of several processes do not get mixed.
    drop(io::stderr().write_all(format!("{what}\n").as_bytes()));
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
        f.write_str("nobody reads the standard output any more")
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
