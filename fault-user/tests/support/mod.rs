//! Helpers shared by the tests. Each test program compiles all of them.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod daemon;
pub mod dns;
pub mod echo;
pub mod late;
pub mod packages;
pub mod place;
pub mod relay;
pub mod servers;
pub mod terminal;
pub mod watched;
