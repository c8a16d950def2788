//! What the eBPF programs and the delay line do to packets.

#[path = "../support/mod.rs"]
mod support;

mod dataplane;
mod delay;
mod live;
mod packet_lines;
mod qdisc;
mod super_packets;
mod traffic;
mod xdp;
