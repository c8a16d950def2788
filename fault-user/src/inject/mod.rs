//! Loads and attaches the kernel programs, applies rules to them and reads their counters.
//!
//! Links, maps and the lease belong to this process and disappear with it. Without the lease the programs stop acting.

pub mod connections;
pub mod distributions;
mod divider;
pub mod endpoints;
mod follow;
mod idle;
pub mod injection;
pub mod injector;
pub mod names;
mod places;
pub mod preparation;
pub mod reach;
pub mod records;
pub mod services;
mod trace;
mod tracer;
pub mod xdp;
