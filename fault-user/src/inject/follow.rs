//! Applies rules to interfaces that appear later, such as containers' veths, bridges and VPNs, and releases those that
//! disappear.
//!
//! A thread in the rules' network namespace keeps the capabilities to attach programs, which the main thread drops. The
//! kernel notifies it of changes, and it then lists the interfaces.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::inject::reach::InterfaceSet;
use crate::sys::net::interfaces::Selection;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::rights::be_helper;
use crate::tell::tell;

/// `RTMGRP_LINK`: the multicast group for changes of interfaces.
const LINKS: u32 = 1;

/// The watching thread. Dropping this ends it.
pub(super) struct InterfaceWatcher {
    selection: Selection,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl InterfaceWatcher {
    /// Starts the thread in the caller's network namespace.
    ///
    /// # Errors
    /// A system call fails.
    pub fn watch(selection: Selection, reach: Arc<Mutex<InterfaceSet>>) -> Result<Self> {
        let news = listen().context("can't watch for new network interfaces")?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let (woken, wanted) = (Arc::clone(&wake), selection.clone());
        let settled = Arc::new(Barrier::new(2));
        let reached = Arc::clone(&settled);
        let thread = std::thread::Builder::new()
            .name("interfaces".to_owned())
            .spawn(move || {
                be_helper(&[Capability::Bpf, Capability::NetAdmin, Capability::Perfmon]);
                reached.wait();
                if let Err(error) = serve(&news, &woken, &wanted, &reach) {
                    tell!("fault: warning: rules are no longer applied to new network interfaces: {error:#}");
                }
            })
            .context("starting the thread that watches network interfaces")?;
        // The thread drops its unneeded capabilities before the rules are applied.
        settled.wait();
        Ok(Self {
            selection,
            wake,
            thread: Some(thread),
        })
    }

    /// The interfaces that rules are applied to.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }
}

impl Drop for InterfaceWatcher {
    fn drop(&mut self) {
        let woken = self.wake.write(1);
        if let Some(thread) = self.thread.take()
            && (woken.is_err() || thread.join().is_err())
        {
            tell!("fault: warning: the thread that watches network interfaces panicked");
        }
    }
}

fn listen() -> std::io::Result<Socket> {
    let mut news = Socket::new(NETLINK_ROUTE)?;
    news.bind(&SocketAddr::new(0, LINKS))?;
    news.set_non_blocking(true)?;
    Ok(news)
}

fn serve(
    news: &Socket,
    wake: &EventFd,
    selection: &Selection,
    reach: &Mutex<InterfaceSet>,
) -> Result<()> {
    // SAFETY: the socket lives longer than this does.
    let fd = unsafe { BorrowedFd::borrow_raw(news.as_raw_fd()) };
    loop {
        // Also before the first wait: an interface may have appeared between the first listing and the socket's
        // creation.
        reach
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .meet(selection)?;
        let mut both = [fd, wake.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut both, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for changes of interfaces"),
        }
        if both[1].any() == Some(true) {
            return Ok(());
        }
        take_all(news)?;
    }
}

/// Drains all notifications. Lost ones (`ENOBUFS`) count as a notification as well.
fn take_all(news: &Socket) -> Result<()> {
    loop {
        match news.recv_from_full() {
            Ok(_) => {}
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => return Ok(()),
                Some(Errno::ENOBUFS | Errno::EINTR) => {}
                _ => return Err(error).context("reading changes of interfaces"),
            },
        }
    }
}
