//! Real servers, clients, containers and test frameworks, and what is told of them in the documentation.

#[path = "../support/mod.rs"]
mod support;

mod conformance;
mod containers;
mod kubernetes;
mod servers;
mod stories;
mod toxiproxy_clients;
