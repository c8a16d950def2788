//! Commands and their trees: cgroups, signals, adoption.

#[path = "../support/mod.rs"]
mod support;

mod command;
mod signals;
mod tree;
