//! Answers the plan's questions about this machine.

use crate::plan::mechanism::Machine;
use crate::sys::net::tap::Tap;
use crate::sys::probe;
use crate::sys::process::cgroup::Hierarchy;

/// The machine that this process runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThisMachine;

impl Machine for ThisMachine {
    fn has_tap(&self) -> bool {
        Tap::is_possible()
    }

    fn has_qdiscs(&self, kinds: &[&str]) -> bool {
        probe::has_qdiscs(kinds)
    }

    fn has_cgroups(&self) -> bool {
        Hierarchy::find().is_ok()
    }
}
