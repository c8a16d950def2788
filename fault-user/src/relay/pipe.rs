//! Kernel pipes that carry bytes from socket to socket without a copy through user space, as `splice(2)`
//! does it. A thread keeps a few empty ones; a connection has one only while bytes are on their way.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};

/// Asked of the kernel for each pipe, in bytes; it gives less to a user who has many.
const CAPACITY: usize = 1 << 20;
/// How many empty pipes a thread keeps.
const KEPT: usize = 32;

thread_local! {
    static EMPTY: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe and how many bytes lie in it.
pub(crate) struct Pipe {
    ends: Option<Ends>,
    held: usize,
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

impl Pipe {
    /// An empty pipe, from this thread's store or new.
    ///
    /// # Errors
    ///
    /// When the kernel has no more descriptors or pipe memory.
    pub(crate) fn take() -> io::Result<Self> {
        let ends = EMPTY.with_borrow_mut(Vec::pop);
        let ends = match ends {
            Some(ends) => ends,
            None => new_ends()?,
        };
        Ok(Self {
            ends: Some(ends),
            held: 0,
        })
    }

    /// Bytes that are in the pipe.
    pub(crate) const fn held(&self) -> usize {
        self.held
    }

    fn ends(&self) -> &Ends {
        self.ends.as_ref().expect("only drop takes the ends")
    }

    /// Moves what `source` has into the pipe: 0 bytes at its end.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is nothing (call it on an empty pipe only: a full one says the same), or
    /// what the socket says.
    pub(crate) fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let count = splice(source, None, &self.ends().write, None, CAPACITY, flags())?;
        self.held += count;
        Ok(count)
    }

    /// Moves the pipe's bytes to `sink`.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the socket takes no more, or what the socket says.
    pub(crate) fn drain(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let count = splice(&self.ends().read, None, sink, None, self.held, flags())?;
        self.held -= count;
        Ok(count)
    }

    /// Takes the pipe's bytes into memory.
    ///
    /// # Errors
    ///
    /// What `read(2)` says; reading bytes that are known to be there does not fail in practice.
    pub(crate) fn read_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.held];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += nix::unistd::read(&self.ends().read, &mut bytes[filled..])?;
        }
        self.held = 0;
        Ok(bytes)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.held > 0 {
            return;
        }
        if let Some(ends) = self.ends.take() {
            // When the thread's store is gone or full the pipe is simply closed.
            let kept = EMPTY.try_with(|empty| {
                let mut empty = empty.borrow_mut();
                if empty.len() < KEPT {
                    empty.push(ends);
                }
            });
            if kept.is_err() {
                log::trace!("the thread ends: its pipes are closed");
            }
        }
    }
}

fn new_ends() -> io::Result<Ends> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let capacity = i32::try_from(CAPACITY).map_err(io::Error::other)?;
    // A user who has many pipes gets small ones, which still work: the failure is no error.
    if let Err(error) = fcntl(&write, FcntlArg::F_SETPIPE_SZ(capacity)) {
        log::debug!("pipe {} keeps its default size: {error}", write.as_raw_fd());
    }
    Ok(Ends { read, write })
}
