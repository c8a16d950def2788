//! Signals for `fault` that are meant for CMD.
//!
//! CMD stays in the process group of `fault`, as with env(1), nice(1) or strace(1). So the shell's
//! job control works as if `fault` weren't there: CMD may read the terminal, Ctrl-Z stops both, `fg`
//! continues both, and a pipeline `fault run -- CMD | less` stays one job. A group of its own would
//! need the terminal handed over, and would take it away from the rest of that pipeline.
//!
//! The terminal sends Ctrl-C to the whole group, so CMD has it already and gets no second one (many
//! programs take a second one as "at once"). A signal that a process sent with kill(2) came to
//! `fault` alone and is passed on. `si_code` tells the two apart. When the terminal is closed the kernel sends SIGHUP to
//! the session's leader alone: where that is `fault`, with no shell around it, CMD gets it from here.
//!
//! The handler itself passes it on: `pidfd_send_signal` is a plain system call, it can't reach a
//! later process of the same number, and it works however busy the rest of `fault` is.
use crate::sys::process::proc::open_pidfd;
use anyhow::{Context, Result};
use nix::libc::{self, c_int, siginfo_t};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use signal_hook_registry::{SigId, register_sigaction, unregister};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// What is passed on. SIGUSR1 and SIGUSR2 too: they would end `fault`, and mean something to many
/// servers.
pub const FORWARDED: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// What the handlers share with the rest. `-1` and `0` stand for "none yet".
#[derive(Debug)]
struct Shared {
    pidfd: AtomicI32,
    /// Signals that came before CMD did: bit n is signal n.
    pending: AtomicU32,
    /// The last signal, wherever it came from.
    last: AtomicI32,
    /// `fault` leads its session.
    leads: bool,
}

impl Shared {
    /// Runs inside of a signal handler: system calls and atomics only.
    fn handle(&self, signal: c_int, info: &siginfo_t) {
        self.last.store(signal, Ordering::Relaxed);
        let pidfd = self.pidfd.load(Ordering::SeqCst);
        if pidfd < 0 {
            self.pending.fetch_or(1 << signal, Ordering::SeqCst);
        } else if info.si_code != libc::SI_KERNEL || (self.leads && signal == libc::SIGHUP) {
            send(pidfd, signal);
        }
    }
}

/// Passes signals on until it is dropped.
#[derive(Debug)]
pub struct Forwarder {
    shared: Arc<Shared>,
    handlers: Vec<SigId>,
    /// Closed after the handlers are gone.
    target: Option<OwnedFd>,
}

impl Forwarder {
    /// Takes over [`FORWARDED`]. From here on they don't end `fault`; until [`Self::target`] they
    /// are kept, a terminal's too: before its exec CMD can't have had it. (In the instant between
    /// exec and [`Self::target`] it has, and gets a second one.) Those that the caller had switched off (nohup(1), a shell's `&`) stay so.
    ///
    /// # Errors
    /// When the kernel refuses a handler.
    pub fn start() -> Result<Self> {
        let mut forwarder = Self {
            shared: Arc::new(Shared {
                pidfd: AtomicI32::new(-1),
                pending: AtomicU32::new(0),
                last: AtomicI32::new(0),
                leads: nix::unistd::getsid(None).is_ok_and(|leader| leader == Pid::this()),
            }),
            handlers: Vec::new(),
            target: None,
        };
        for signal in FORWARDED {
            let number = signal as c_int;
            if is_ignored(number)
                .with_context(|| format!("can't query the handling of {signal}"))?
            {
                continue;
            }
            let shared = Arc::clone(&forwarder.shared);
            // SAFETY: the closure makes one system call and touches atomics, which a signal
            // handler may do; the registry saves errno around it.
            let handler =
                unsafe { register_sigaction(number, move |info| shared.handle(number, info)) };
            let handler = handler.with_context(|| format!("can't handle {signal}"))?;
            forwarder.handlers.push(handler);
        }
        Ok(forwarder)
    }

    /// Names the process that gets them, and sends it what has come meanwhile.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn target(&mut self, pid: u32) -> Result<()> {
        let pidfd = open_pidfd(i32::try_from(pid)?)
            .with_context(|| format!("can't watch process {pid}"))?;
        self.shared.pidfd.store(pidfd.as_raw_fd(), Ordering::SeqCst);
        let pending = self.shared.pending.swap(0, Ordering::SeqCst);
        for signal in FORWARDED {
            if pending & (1 << signal as c_int) != 0 {
                send(pidfd.as_raw_fd(), signal as c_int);
            }
        }
        self.target = Some(pidfd);
        Ok(())
    }

    /// The last signal that came, from a terminal or a process.
    #[must_use]
    pub fn last(&self) -> Option<Signal> {
        Signal::try_from(self.shared.last.load(Ordering::Relaxed)).ok()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            unregister(handler);
        }
    }
}

/// Whether the caller has switched a signal off.
///
/// # Errors
/// There is no such signal.
pub fn is_ignored(signal: c_int) -> io::Result<bool> {
    // SAFETY: sigaction is a plain structure for which all zeros are valid, and a null pointer for
    // the new action only asks for the old one.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(old.sa_sigaction == libc::SIG_IGN)
    }
}

/// Has a signal do what it does to a program that does not handle it.
///
/// # Errors
/// There is no such signal.
pub fn reset(signal: c_int) -> io::Result<()> {
    // SAFETY: no handler is installed, so none can be missed.
    if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `pidfd_send_signal` (Linux 5.1). It can only fail when the process has ended, which its own wait
/// reports.
fn send(pidfd: RawFd, signal: c_int) {
    // SAFETY: integers and a null siginfo, which stands for what kill(2) would send.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd,
            signal,
            std::ptr::null::<siginfo_t>(),
            0,
        );
    }
}
