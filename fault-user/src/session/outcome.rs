//! The outcome of a run: exit codes and failures.

use std::fmt;

use crate::sys::process::capabilities::Capability;
use crate::sys::process::command::StartError;
use crate::sys::process::rights;
use crate::tell::ReaderGone;

/// Exit codes, as documented.
pub mod exit {
    /// Success.
    pub const SUCCESS: u8 = 0;
    /// A check failed: nothing works here, or leftovers could not be removed.
    pub const FAILURE: u8 = 1;
    /// The arguments, a rule or a file are wrong.
    pub const USAGE: u8 = 2;
    /// CMD succeeded, but a rule never fired.
    pub const UNFIRED: u8 = 120;
    /// CMD succeeded, but an expectation failed.
    pub const EXPECTATION: u8 = 121;
    /// `fault` itself failed.
    pub const SETUP: u8 = 125;
}

/// The failure of a subcommand.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// One line, or a rule with a caret under the mistake.
    pub error: anyhow::Error,
}

impl Failure {
    /// Whether the cause is only that the reader of the standard output has gone, which is no failure.
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

/// Other errors count as setup errors. A command that can't be started has its own exit codes.
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
        // Only the first line of each cause: longer texts, such as the verifier's log, need -v. An error with a caret
        // under a rule is kept as it is.
        let mut causes = self.error.chain().map(ToString::to_string);
        f.write_str(&causes.next().unwrap_or_default())?;
        causes
            .filter(|cause| !cause.contains('\n'))
            .try_for_each(|cause| write!(f, ": {cause}"))
    }
}

/// The result of a subcommand: an exit code.
pub type Outcome = Result<u8, Failure>;

/// Drops all capabilities except these, after the setup.
pub fn give_up(keep: &[Capability]) {
    if let Err(error) = rights::keep_only(keep) {
        log::warn!("fault keeps capabilities that it does not need: {error:#}");
    }
}
