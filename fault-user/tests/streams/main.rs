//! The relay in front of services that nobody reconfigured.

#[path = "../support/mod.rs"]
mod support;

mod steer;
mod transparent;
