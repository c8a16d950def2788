//! The delay line: holds packets in user space, for kernels without fq and netem.
//!
//! The programs redirect a packet to a tap device of this process. [`mod@line`] reads it there, holds it for as long as
//! it is told ([`schedule`]) and writes it back, from where a program sends it on its way. The tap goes with the
//! process, and without a living process the programs redirect nothing.

pub mod exchange;
pub mod line;
pub mod qdiscs;
pub mod schedule;
pub mod spreads;
pub mod tap;
pub mod ways;
