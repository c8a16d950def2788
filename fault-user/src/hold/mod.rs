//! What holds packets: the delay line, or qdiscs in its place.
//!
//! The programs redirect a packet to a tap device of this process. [`mod@line`] reads it there, holds it for as long as
//! it is told ([`schedule`]) and writes it back, from where a program sends it on its way. The tap goes with the
//! process, and without a living process the programs redirect nothing.

pub mod line;
pub mod qdiscs;
pub mod schedule;
pub mod ways;
