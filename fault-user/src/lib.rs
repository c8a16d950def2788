//! The user-space half of `fault`: the command line, the daemon, the relay, and the loader of the
//! kernel programs.
//!
//! The modules are listed from the lowest to the highest: each imports only from those above it in this list.
//! ARCHITECTURE.md has the table that `cargo xtask check` reads.
#![warn(clippy::undocumented_unsafe_blocks)]
#![cfg_attr(
    not(test),
    deny(
        clippy::print_stdout,
        clippy::print_stderr,
        reason = "`tell` does not panic"
    )
)]

pub mod tell;

pub mod sys;

pub mod rule;

pub mod undo;

pub mod relay;

pub mod plan;

pub mod hold;

pub mod inject;

pub mod steer;

pub mod watch;

pub mod report;

pub mod session;

pub mod explore;

pub mod api;

pub mod doctor;

pub mod cli;
