//! The instances of `fault` in one network namespace, and what they share.
//!
//! Each has a **number**, and everything that is the namespace's carries it: taps, filters, marks in packets. Some
//! settings several need at once: whoever needs one **holds a share** of it, and the last to let go puts it back.
//! Both are abstract Unix sockets. These belong to the network namespace, so instances in containers that have neither
//! process numbers nor `/run` in common see each other's; and the kernel closes them with the process, however it ends.

use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fault_common::abi::{INSTANCES_MAX, INSTANCES_REMEMBERED};

/// What the names of all our sockets start with.
const PREFIX: &str = "fault/";
/// How long another instance may hold the lock: it makes a few system calls meanwhile.
const LOCK_MAX: Duration = Duration::from_secs(10);
/// How often the lock is tried.
const LOCK_POLL: Duration = Duration::from_millis(2);

/// The number of an instance, its own for as long as this lives. A process may have several.
#[derive(Debug)]
pub struct Instance {
    number: u32,
    netns: u64,
    _socket: UnixDatagram,
}

impl Instance {
    /// Takes a number that is free in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`INSTANCES_MAX`] are running there, or the kernel refuses a socket.
    pub fn join() -> Result<Self> {
        let netns = current_netns()?;
        // Packets remember the first ones for longest, also into another network namespace: there others come first.
        let turn = u32::try_from(netns / u64::from(MARKS) % u64::from(INSTANCES_REMEMBERED))?;
        let first = (0..INSTANCES_REMEMBERED).map(|n| (n + turn) % INSTANCES_REMEMBERED);
        for number in first.chain(INSTANCES_REMEMBERED..INSTANCES_MAX) {
            if let Some(instance) = Self::claim(number)? {
                return Ok(instance);
            }
        }
        bail!(
            "{INSTANCES_MAX} instances of fault are running in this network namespace, the most that are possible: \
             end one first"
        )
    }

    /// Takes this number, unless a living instance has it. What carries it then is a dead one's.
    ///
    /// # Errors
    /// As [`Instance::join`].
    pub fn claim(number: u32) -> Result<Option<Self>> {
        let netns = current_netns()?;
        let socket = bind(&format!("instance/{number}"))?;
        Ok(socket.map(|socket| Self {
            number,
            netns,
            _socket: socket,
        }))
    }

    /// Below [`INSTANCES_MAX`].
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What this instance leaves in packets.
    #[must_use]
    pub fn marks(&self) -> Marks {
        // Inode numbers of namespaces are given out densely: those that live differ in their low bits.
        let mark = u32::try_from(self.netns % u64::from(MARKS)).unwrap_or(0) + 1;
        let tag = (self.netns.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        Marks {
            instance: 1 << self.number,
            netns_mark: mark,
            netns_tag: tag,
        }
    }
}

/// Values of the mark of a network namespace.
const MARKS: u32 = 255;

/// Constants of the programs by which a packet tells who has judged it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The instance's own bit.
    pub instance: u64,
    /// The network namespace, 1 to 255.
    pub netns_mark: u32,
    /// The same in 32 bits.
    pub netns_tag: u32,
}

impl Marks {
    /// A packet does not remember that it has been judged: for benchmarks that judge one a million times.
    pub const NONE: Self = Self {
        instance: 0,
        netns_mark: 1,
        netns_tag: 1,
    };
}

/// Lets nobody else look at or change what is shared in this network namespace, for as long as it lives.
#[derive(Debug)]
pub struct Lock(
    #[expect(dead_code, reason = "held, so that nobody else has the name")] UnixDatagram,
);

/// Waits for the [`Lock`] of the calling thread's network namespace.
///
/// # Errors
/// Another instance holds it for longer than it can need, stopped perhaps; or the kernel refuses a socket.
pub fn lock() -> Result<Lock> {
    let end = Instant::now() + LOCK_MAX;
    loop {
        if let Some(socket) = bind("lock")? {
            return Ok(Lock(socket));
        }
        if Instant::now() >= end {
            bail!(
                "another instance of fault is stopped in the middle of changing a shared setting: continue or end it"
            );
        }
        std::thread::sleep(LOCK_POLL);
    }
}

/// A part in something shared, until it is dropped.
#[derive(Debug)]
pub struct Share(#[expect(dead_code, reason = "held, so that others see it")] UnixDatagram);

/// Holds a share of `what`, with what others who want one must know.
///
/// # Errors
/// The kernel refuses a socket.
pub fn hold(_lock: &Lock, what: &str, told: &str) -> Result<Share> {
    for number in 0.. {
        if let Some(socket) = bind(&format!("share/{what}/{number}/{told}"))? {
            return Ok(Share(socket));
        }
    }
    bail!("too many instances share {what}")
}

/// What those told who hold a share of `what`.
///
/// # Errors
/// `/proc` is not mounted.
pub fn holders(_lock: &Lock, what: &str) -> Result<Vec<String>> {
    let path = "/proc/thread-self/net/unix";
    let all =
        fs::read_to_string(path).with_context(|| format!("can't read {path}: mount /proc"))?;
    let start = format!("@{PREFIX}share/{what}/");
    let names = all.lines().filter_map(|line| line.split_once(&start));
    Ok(names
        .filter_map(|(_, rest)| rest.split_once('/'))
        .map(|(_, told)| told.to_owned())
        .collect())
}

/// `None`: the name is taken.
fn bind(name: &str) -> Result<Option<UnixDatagram>> {
    let address = SocketAddr::from_abstract_name(format!("{PREFIX}{name}"))?;
    match UnixDatagram::bind_addr(&address) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error).context("can't create a Unix socket"),
    }
}

/// The inode of the calling thread's network namespace.
pub(super) fn current_netns() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    let metadata = fs::metadata(path).with_context(|| format!("can't read {path}: mount /proc"))?;
    Ok(metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net::netlink::in_own_netns;

    #[test]
    fn a_number_is_one_instances_until_it_ends() {
        in_own_netns(|| {
            let all: Vec<_> = (0..INSTANCES_MAX)
                .map(|_| Instance::join().unwrap())
                .collect();
            let bits = all.iter().fold(0, |bits, one| bits | one.marks().instance);
            assert_eq!(bits, u64::MAX);
            let error = Instance::join().unwrap_err().to_string();
            assert!(error.contains("64 instances"), "{error}");
            let number = all[5].number();
            assert!(Instance::claim(number).unwrap().is_none());
            drop(all);
            // A process that another test starts has our sockets until it has begun.
            let end = Instant::now() + LOCK_MAX;
            while Instance::claim(number).unwrap().is_none() {
                assert!(Instant::now() < end, "the number is not free again");
                std::thread::sleep(LOCK_POLL);
            }
            // Those of another network namespace are others.
            let here = Instance::join().unwrap();
            let tag = here.marks().netns_tag;
            in_own_netns(move || assert_ne!(Instance::join().unwrap().marks().netns_tag, tag));
        });
    }

    #[test]
    fn shares_are_seen_until_they_are_dropped() {
        in_own_netns(|| {
            let lock = lock().unwrap();
            assert!(holders(&lock, "a").unwrap().is_empty());
            let shares = [("a", "0"), ("a", "0"), ("ab", "1")]
                .map(|(what, told)| hold(&lock, what, told).unwrap());
            assert_eq!(holders(&lock, "a").unwrap(), ["0", "0"]);
            assert_eq!(holders(&lock, "ab").unwrap(), ["1"]);
            drop(shares);
            assert!(holders(&lock, "a").unwrap().is_empty());
        });
    }
}
