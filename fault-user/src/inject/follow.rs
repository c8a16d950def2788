//! Interfaces that come and go while rules are in force: containers' veths, bridges, VPNs.
//!
//! A thread stays in the network namespace of the rules and keeps the rights to attach programs, which the first thread
//! gives up. The kernel tells it that something has changed; what, it looks up.

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

/// `RTMGRP_LINK`: the group of sockets that are told of changes of interfaces.
const LINKS: u32 = 1;

/// The thread, until this is dropped.
pub(super) struct InterfaceWatcher {
    selection: Selection,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl InterfaceWatcher {
    /// Starts it in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(selection: Selection, reach: Arc<Mutex<InterfaceSet>>) -> Result<Self> {
        let news = listen().context("can't be told of new network interfaces")?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let (woken, wanted) = (Arc::clone(&wake), selection.clone());
        let settled = Arc::new(Barrier::new(2));
        let reached = Arc::clone(&settled);
        let thread = std::thread::Builder::new()
            .name("newcomers".to_owned())
            .spawn(move || {
                be_helper(&[Capability::Bpf, Capability::NetAdmin, Capability::Perfmon]);
                reached.wait();
                if let Err(error) = serve(&news, &woken, &wanted, &reach) {
                    tell!("fault: new network interfaces are left alone from here on: {error:#}");
                }
            })
            .context("starting the thread that meets new network interfaces")?;
        // No thread has more rights than it needs when the rules are in force.
        settled.wait();
        Ok(Self {
            selection,
            wake,
            thread: Some(thread),
        })
    }

    /// Which interfaces are wanted.
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
            tell!("fault: the thread that meets new network interfaces did not end well");
        }
    }
}

fn listen() -> std::io::Result<Socket> {
    let mut news = Socket::new(NETLINK_ROUTE)?;
    news.bind(&SocketAddr::new(0, LINKS))?;
    news.set_non_blocking(true)?;
    Ok(news)
}

fn serve(news: &Socket, wake: &EventFd, selection: &Selection, reach: &Mutex<InterfaceSet>) -> Result<()> {
    // SAFETY: the socket lives longer than this does.
    let fd = unsafe { BorrowedFd::borrow_raw(news.as_raw_fd()) };
    loop {
        // Before it waits for the first time too: something may have come between the first list and the socket.
        reach
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .meet(selection)?;
        let mut both = [fd, wake.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut both, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for news of interfaces"),
        }
        if both[1].any() == Some(true) {
            return Ok(());
        }
        take_all(news)?;
    }
}

/// Takes all news at once. Some that were lost (`ENOBUFS`) are news as well.
fn take_all(news: &Socket) -> Result<()> {
    loop {
        match news.recv_from_full() {
            Ok(_) => {}
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => return Ok(()),
                Some(Errno::ENOBUFS | Errno::EINTR) => {}
                _ => return Err(error).context("reading news of interfaces"),
            },
        }
    }
}
