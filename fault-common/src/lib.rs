//! The pure decisions of `fault`.
//!
//! Everything here is a function of its arguments: no clock, no source of randomness, no map, no
//! allocation. The kernel programs (`fault-ebpf`) and the host tests compile the very same code, so
//! that a test of the host is a test of what the kernel decides.
//!
//! * [`packet`] reads headers and never trusts a length in them;
//! * [`flow`] names a connection the same way from both of its ends;
//! * [`fragment`] has the later fragments of a datagram follow the first one;
//! * [`matching`] narrows thousands of rules down to those that concern a packet;
//! * [`decide`] says what one rule does to one packet;
//! * [`dns`] reads DNS messages;
//! * [`explain`] finds out again why it did so, from what a program told of it;
//! * [`random`] is the only source of chance: a pure function of the seed and of ordinals;
//! * [`reply`] builds the RSTs and ICMP errors that refusals answer with;
//! * [`abi`] is the layout of every BPF map value, with the version that the loader checks.
#![no_std]
#![deny(missing_docs)]
#![expect(
    clippy::inline_always,
    reason = "a call is a subprogram of its own to the kernel's verifier, with its own stack"
)]

pub mod abi;
pub mod decide;
pub mod delay;
pub mod dns;
pub mod explain;
pub mod flow;
pub mod fragment;
pub mod matching;
pub mod packet;
pub mod random;
pub mod reply;
