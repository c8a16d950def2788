//! The XDP program in front of the tc program at ingress: which rules it supports, and its attachment.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use fault_common::abi::action;
use nix::errno::Errno;

use crate::plan::needs::Needs;
use crate::plan::tables::PacketRule;
use crate::sys::bpf::link;

/// The mode of an XDP program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Run by the driver, before a socket buffer exists.
    Native,
    /// Run by the network stack, for drivers without XDP.
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

/// An XDP program attached to an interface until this is dropped or the process ends.
#[derive(Debug)]
pub struct XdpLink {
    /// Its mode.
    pub mode: Mode,
    _link: OwnedFd,
}

impl XdpLink {
    /// Attaches a loaded program to an interface (Linux 5.9).
    ///
    /// # Errors
    /// `EBUSY` if another program is attached, `EOPNOTSUPP` and others if the driver does not support it.
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

/// Checks that XDP supports these rules.
///
/// # Errors
/// The reason why not, to be printed after "XDP is not used: ".
pub fn suits(rules: &[PacketRule]) -> Result<(), &'static str> {
    if rules.is_empty() {
        return Err("there is no packet rule");
    }
    if rules.iter().any(|rule| rule.scope.is_some()) {
        return Err("the rules are limited to a cgroup, which XDP can't match");
    }
    if rules.iter().any(|rule| rule.question.is_some()) {
        return Err("it does not read DNS, and a rule is aimed at queries");
    }
    let losing = 1 << action::DROP | 1 << action::DROP_CHECKSUM;
    if Needs::of(rules).actions & !losing != 0 {
        return Err("XDP can only drop packets, and a rule does more");
    }
    Ok(())
}
