//! The user-space half of `fault`: the command line, the daemon, the relay, and the loader of the
//! kernel programs.
#![cfg_attr(
    not(test),
    deny(
        clippy::print_stdout,
        clippy::print_stderr,
        reason = "`tell` does not panic"
    )
)]

pub mod api;
pub mod cli;
pub mod doctor;
pub mod kernel;
pub mod plan;
pub mod process;
pub mod relay;
pub mod report;
pub mod rule;
pub mod shaping;
pub mod steer;
pub mod tell;
pub mod watch;
