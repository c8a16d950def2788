//! The kernel programs at work: loaded, attached, given their rules, and read.
//!
//! Everything here belongs to this process: links, maps and the lease that keeps the programs acting
//! die with it.

pub mod connections;
pub mod distributions;
pub mod endpoints;
pub mod events;
mod follow;
mod idle;
pub mod injection;
pub mod injector;
pub mod names;
pub mod preparation;
pub mod reach;
pub mod services;
pub mod xdp;
