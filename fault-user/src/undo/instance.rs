//! The instances of `fault` in one network namespace, and the settings that they share.
//!
//! Each instance has a **number**, which all its resources in the namespace carry: taps, filters, marks in packets.
//! Several instances may need the same setting. Each of them **holds a share** of it, and the last one restores it.
//! Numbers and shares are abstract Unix sockets. These belong to the network namespace, so that instances in containers
//! without a common PID namespace or `/run` see each other's. The kernel closes them when the process ends.

use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fault_common::abi::{INSTANCES_MAX, INSTANCES_REMEMBERED};

/// Prefix of all socket names.
const PREFIX: &str = "fault/";
/// An instance holds the lock at most this long, for a few system calls.
const LOCK_MAX: Duration = Duration::from_secs(10);
/// Interval for trying the lock.
const LOCK_POLL: Duration = Duration::from_millis(2);

/// The number of an instance, reserved until this is dropped. A process may have several.
#[derive(Debug)]
pub struct Instance {
    number: u32,
    netns: u64,
    _socket: UnixDatagram,
}

impl Instance {
    /// Takes a free number in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`INSTANCES_MAX`] instances are running there, or a socket can't be created.
    pub fn join() -> Result<Self> {
        let netns = current_netns()?;
        // Packets keep the marks of low numbers longest, even in other network namespaces. So each namespace starts
        // with another number.
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

    /// Takes this number unless a running instance has it. Resources with the number then belong to a dead instance.
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

    /// The marks of this instance in packets.
    #[must_use]
    pub fn marks(&self) -> Marks {
        // Namespaces get consecutive inode numbers, so existing ones differ in their low bits.
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

/// The programs' constants for marking packets that an instance has processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The instance's bit.
    pub instance: u64,
    /// The network namespace, 1 to 255.
    pub netns_mark: u32,
    /// The network namespace in 32 bits.
    pub netns_tag: u32,
}

impl Marks {
    /// Packets are not marked. For benchmarks that process one packet a million times.
    pub const NONE: Self = Self {
        instance: 0,
        netns_mark: 1,
        netns_tag: 1,
    };
}

/// Exclusive access to the shared settings of this network namespace, until it is dropped.
#[derive(Debug)]
pub struct Lock(
    #[expect(dead_code, reason = "held, so that nobody else has the name")] UnixDatagram,
);

/// Waits for the [`Lock`] of the calling thread's network namespace.
///
/// # Errors
/// Another instance holds it for too long, perhaps because it is stopped; or a socket can't be created.
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

/// A share of a setting, until it is dropped.
#[derive(Debug)]
pub struct SettingShare(#[expect(dead_code, reason = "held, so that others see it")] UnixDatagram);

/// Takes a share of `what`, with a value for other holders.
///
/// # Errors
/// A socket can't be created.
pub fn hold(_lock: &Lock, what: &str, told: &str) -> Result<SettingShare> {
    for number in 0.. {
        if let Some(socket) = bind(&format!("share/{what}/{number}/{told}"))? {
            return Ok(SettingShare(socket));
        }
    }
    bail!("too many instances share {what}")
}

/// The values of all holders of a share of `what`.
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

/// Binds a socket. `None` if the name is taken.
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
            // A process that another test starts keeps our sockets open until its exec.
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
