//! The places at which tc programs are attached, and how they are taken early.
//!
//! Attaching by TCX waits for a grace period of RCU (some milliseconds), and holds the kernel's lock of all network
//! interfaces meanwhile: several threads would wait one for the other. Therefore a program that lets everything pass
//! takes the places, in a thread of its own, while the maps are created and the programs are verified. To replace it
//! takes no grace period. Nor does a netlink filter, which does on a device of this process: both disappear with it.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};

use crate::sys::bpf::features::{self, attach_type, program_type};
use crate::sys::net::clsact::TcHook;
use crate::sys::net::interfaces::Interface;
use crate::tell::step;

/// The program at the delay line's tap and at the far end of the detour.
pub(super) const RELEASE: &str = "fault_release";

/// The program at the far end of the device that divides super-packets.
pub(super) const DIVIDED: &str = "fault_divided";

/// A hook of an interface, and the program for it.
#[derive(Clone, Debug)]
pub struct HookPoint {
    /// The interface.
    pub interface: Interface,
    /// The side of it.
    pub side: TcHook,
    /// The name of the program.
    pub program: &'static str,
}

impl HookPoint {
    /// Whether the interface is a device of this process, which disappears with it.
    pub(super) fn is_on_own_device(&self) -> bool {
        [RELEASE, DIVIDED].contains(&self.program)
    }
}

/// Attaches a program by TCX, in front of all others, until the returned link is closed.
///
/// # Errors
/// The interface has disappeared, or the kernel has no TCX.
pub(super) fn link(
    program: BorrowedFd<'_>,
    interface: &Interface,
    side: TcHook,
) -> std::io::Result<OwnedFd> {
    const BPF_F_BEFORE: u32 = 1 << 3;
    let hook = match side {
        TcHook::Egress => attach_type::TCX_EGRESS,
        TcHook::Ingress => attach_type::TCX_INGRESS,
    };
    features::link(program, interface.index, hook, BPF_F_BEFORE)
}

/// Links that hold places, one for each; `None` for an interface that has disappeared.
pub(super) type Links = Vec<Option<OwnedFd>>;

/// Places that are being taken. Dropping this gives them up.
pub(super) struct Reservation {
    thread: Option<JoinHandle<Result<Links>>>,
}

impl Reservation {
    /// Begins to take those of these places that are not on own devices, in the caller's network namespace.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(super) fn start(places: &[HookPoint]) -> Result<Self> {
        let others = places.iter().filter(|one| !one.is_on_own_device());
        let places: Vec<_> = others.cloned().collect();
        let thread = std::thread::Builder::new()
            .name("places".to_owned())
            .spawn(move || take(&places))
            .context("starting the thread that attaches to interfaces")?;
        Ok(Self {
            thread: Some(thread),
        })
    }

    /// Waits for the links.
    ///
    /// # Errors
    /// The kernel has no TCX, or a system call fails.
    pub(super) fn links(mut self) -> Result<Links> {
        let Some(thread) = self.thread.take() else {
            return Ok(Vec::new());
        };
        let links = thread.join();
        links.map_err(|_| anyhow!("the thread that attaches to interfaces panicked"))?
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Whoever drops this has failed already, and reports that.
            drop(thread.join());
        }
    }
}

fn take(places: &[HookPoint]) -> Result<Links> {
    /// `TCX_NEXT`.
    const NEXT: i32 = -1;
    let program = features::load(program_type::SCHED_CLS, 0, NEXT)
        .context("loading a program that lets everything pass")?;
    let take_one = |place: &HookPoint| {
        let HookPoint {
            interface, side, ..
        } = place;
        let _step = step(format_args!("attaching to {} ({side:?})", interface.name));
        let link = link(program.as_fd(), interface, *side)
            .with_context(|| format!("attaching to {}", interface.name));
        unless_vanished(interface, link)
    };
    places.iter().map(take_one).collect()
}

/// Ignores the error of an operation on an interface that has disappeared.
pub(super) fn unless_vanished<T>(interface: &Interface, done: Result<T>) -> Result<Option<T>> {
    match done {
        Err(error) if !interface.is_there() => {
            log::debug!("{} has disappeared: {error:#}", interface.name);
            Ok(None)
        }
        other => other.map(Some),
    }
}
