//! The XDP program in front of the tc program at ingress: what it can do, and where it is held.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use fault_common::abi::action;
use nix::errno::Errno;

use crate::plan::needs::Needs;
use crate::plan::tables::PacketRule;
use crate::sys::bpf::link;

/// How an XDP program is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By the driver, before there is a socket buffer.
    Native,
    /// By the network stack, where the driver can't.
    Generic,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// An XDP program at an interface, for as long as this lives and no longer than the process.
#[derive(Debug)]
pub struct XdpLink {
    /// How it is run there.
    pub mode: Mode,
    _link: OwnedFd,
}

impl XdpLink {
    /// Holds a loaded program at an interface (Linux 5.9).
    ///
    /// # Errors
    /// `EBUSY` when another program is there, `EOPNOTSUPP` and others when the driver can't.
    pub fn attach(program: BorrowedFd<'_>, interface: u32, mode: Mode) -> Result<Self, Errno> {
        const BPF_XDP: u32 = 37;
        const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
        const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
        let flags = match mode {
            Mode::Native => XDP_FLAGS_DRV_MODE,
            Mode::Generic => XDP_FLAGS_SKB_MODE,
        };
        Ok(Self {
            mode,
            _link: link::create(program, interface, BPF_XDP, flags)?,
        })
    }
}

/// Whether XDP can carry out these rules; the first reason why not.
///
/// # Errors
/// What stands against it, to be read after "XDP is not used: ".
pub fn suits(rules: &[PacketRule]) -> Result<(), &'static str> {
    if rules.is_empty() {
        return Err("no rule is about packets");
    }
    if rules.iter().any(|rule| rule.scope.is_some()) {
        return Err("it can't tell whose packets it sees, and the rules are limited to a cgroup");
    }
    if rules.iter().any(|rule| rule.question.is_some()) {
        return Err("it does not read DNS, and a rule is aimed at queries");
    }
    let losing = 1 << action::DROP | 1 << action::DROP_CHECKSUM;
    if Needs::of(rules).actions & !losing != 0 {
        return Err("it can only lose packets, and a rule does more than that");
    }
    Ok(())
}
