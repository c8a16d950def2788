//! Processes: the command, its cgroup, its user, its namespaces, its sockets, and the capabilities of fault.
//!
//! The order of `fault run`: [`command::CommandSpec::resolve`] (can CMD be started at all?),
//! [`cgroup::CommandCgroup::create`] (whose id the rules need), the rules, and only then
//! [`command::PreparedCommand::spawn`]. CMD is in its cgroup before its first instruction.

pub mod caller;
pub mod capabilities;
pub mod cgroup;
pub mod command;
pub mod container;
pub mod files;
pub mod netns;
pub mod open_files;
pub mod proc;
pub mod rights;
pub mod signals;
pub mod sockets;
pub mod user;
