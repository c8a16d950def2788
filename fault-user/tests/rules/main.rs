//! The language of rules, as people write it: text, files, printing, its documentation. Nothing here needs root.

#[path = "../support/mod.rs"]
mod support;

mod docs;
mod golden;
mod resolve;
mod roundtrip;
mod scenario;
mod text;
