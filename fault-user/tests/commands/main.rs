//! The subcommands of `fault`, as users call them.

#[path = "../support/mod.rs"]
mod support;

mod audience;
mod completions;
mod control_rules;
mod end_to_end;
mod expectations;
mod explore;
mod instances;
mod later_interfaces;
mod random;
mod replay;
mod rights;
mod top;
