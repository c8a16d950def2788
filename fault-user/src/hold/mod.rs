//! The mechanisms that hold packets: the delay line and qdiscs.
//!
//! The programs redirect a packet to a tap device of this process. [`mod@line`] reads it there, holds it until its
//! release time ([`schedule`]) and writes it back; a program then forwards it. The tap device disappears with the
//! process. Without a running process the programs redirect nothing.

pub mod line;
pub mod qdiscs;
pub mod schedule;
pub mod ways;
