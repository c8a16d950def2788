//! How a run ends: exit codes, and why it could not be done.

use std::fmt;

use crate::sys::process::capabilities::Capability;
use crate::sys::process::command::StartError;
use crate::sys::process::rights;
use crate::tell::ReaderGone;

/// Exit codes: those of the documentation.
pub mod exit {
    /// Everything went well.
    pub const SUCCESS: u8 = 0;
    /// Something that was asked for is not so: nothing works here, or leftovers could not be removed.
    pub const FAILURE: u8 = 1;
    /// The arguments, a rule or a file are wrong.
    pub const USAGE: u8 = 2;
    /// CMD succeeded, but a rule never fired.
    pub const UNFIRED: u8 = 120;
    /// CMD succeeded, but an expectation failed.
    pub const EXPECTATION: u8 = 121;
    /// `fault` could not set up what was asked for.
    pub const SETUP: u8 = 125;
}

/// Why a subcommand ended without doing what was asked.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// One line, or a rule with a caret under what is wrong with it.
    pub error: anyhow::Error,
}

impl Failure {
    /// Whether it is only that nobody reads the output any more, which is no failure.
    #[must_use]
    pub fn is_reader_gone(&self) -> bool {
        self.error.is::<ReaderGone>()
    }

    /// The arguments are wrong.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: exit::USAGE,
            error: error.into(),
        }
    }
}

/// Whatever is not said otherwise went wrong while setting up; a command that can't be started has
/// exit codes of its own.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let code = error
            .downcast_ref()
            .map_or(exit::SETUP, StartError::exit_code);
        Self { code, error }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line: what spans several, such as the kernel's verifier log, is for -v. A rule with a caret under it is
        // all there is, and stays as it is.
        let mut causes = self.error.chain().map(ToString::to_string);
        f.write_str(&causes.next().unwrap_or_default())?;
        causes
            .filter(|cause| !cause.contains('\n'))
            .try_for_each(|cause| write!(f, ": {cause}"))
    }
}

/// What a subcommand gives: an exit code.
pub type Outcome = Result<u8, Failure>;

/// Gives up all rights but these, now that everything is set up.
pub fn give_up(keep: &[Capability]) {
    if let Err(error) = rights::keep_only(keep) {
        log::warn!("fault keeps capabilities that it does not need: {error:#}");
    }
}
