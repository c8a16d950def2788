//! The relay and Toxiproxy's API, by sockets on loopback.

#[path = "../support/mod.rs"]
mod support;

mod tcp;
mod toxiproxy_api;
mod udp;
