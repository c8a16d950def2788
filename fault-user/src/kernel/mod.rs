//! The kernel half: loads the programs, attaches them, writes rules, reads what they did.
//!
//! Everything here belongs to this process: links, maps and the lease that keeps the programs acting
//! die with it.

pub mod cgroup_link;
pub mod change;
pub mod clock;
pub mod clsact;
pub mod connections;
pub mod endpoints;
pub mod events;
mod grace;
mod idle;
pub mod injection;
pub mod injector;
pub mod instance;
pub mod interfaces;
pub mod journal;
pub(crate) mod lease;
pub mod leftovers;
pub mod link;
pub mod mapped;
pub mod needs;
pub mod netlink;
mod newcomers;
pub mod object;
pub mod preparation;
pub mod qdisc;
mod reach;
pub mod ruleset;
pub mod services;
pub mod verifier;
pub mod version;
pub mod xdp;
