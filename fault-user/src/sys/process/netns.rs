//! Work inside another network namespace.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::sys::process::proc::is_gone;

/// `SO_NETNS_COOKIE` of Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A network namespace that is not (or may not be) the caller's.
#[derive(Debug)]
pub struct NetworkNamespace {
    file: File,
    path: PathBuf,
    identity: (u64, u64),
}

/// Two are equal when they are the same namespace, whatever they were opened by.
impl PartialEq for NetworkNamespace {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for NetworkNamespace {}

/// The identity of a namespace: its file's device and inode.
fn identity(file: &File) -> std::io::Result<(u64, u64)> {
    let status = file.metadata()?;
    Ok((status.dev(), status.ino()))
}

impl NetworkNamespace {
    /// Opens one by a path such as `/proc/1234/ns/net`, or by a name that `ip netns` knows.
    ///
    /// # Errors
    /// Nothing of that name, or no rights to look.
    pub fn open(name: &Path) -> Result<Self> {
        let path = if name.components().count() > 1 {
            name.to_owned()
        } else {
            Path::new("/run/netns").join(name)
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => bail!(
                "no network namespace `{}`: give a path such as /proc/PID/ns/net, or a name that `ip netns` lists",
                name.display()
            ),
            Err(error) => {
                let path = path.display();
                return Err(error).with_context(|| {
                    format!("can't open the network namespace {path} (needs CAP_SYS_PTRACE)")
                });
            }
        };
        let kind = nix::sys::statfs::fstatfs(&file).map(|stat| stat.filesystem_type());
        if kind != Ok(nix::sys::statfs::NSFS_MAGIC) {
            bail!(
                "{} is not a network namespace: give a path such as /proc/PID/ns/net",
                path.display()
            );
        }
        Self::new(file, path)
    }

    /// The namespace of a process.
    ///
    /// # Errors
    /// No such process, or no rights to look.
    pub fn of_process(pid: i32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        match File::open(&path) {
            Ok(file) => Self::new(file, path),
            Err(error) if is_gone(&error) => {
                bail!("there is no process {pid}")
            }
            Err(error) => Err(error).with_context(|| {
                format!("can't open the network namespace of process {pid} (needs CAP_SYS_PTRACE)")
            }),
        }
    }

    fn new(file: File, path: PathBuf) -> Result<Self> {
        let identity = identity(&file)?;
        Ok(Self {
            file,
            path,
            identity,
        })
    }

    /// Whether this is the namespace that the caller is in.
    ///
    /// # Errors
    /// `/proc` can't be read.
    pub fn is_own(&self) -> Result<bool> {
        let own =
            File::open("/proc/thread-self/ns/net").context("reading /proc/thread-self/ns/net")?;
        Ok(identity(&own)? == self.identity)
    }

    /// What programs in the kernel know it by.
    ///
    /// # Errors
    /// It can't be entered, or the kernel does not tell.
    pub fn cookie(&self) -> Result<u64> {
        let cookie = self.enter(|| Ok(netns_cookie()))?;
        ensure!(
            cookie != 0,
            "counting connections in another network namespace needs Linux 5.15: run fault inside it"
        );
        Ok(cookie)
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// The namespace can't be entered.
    pub fn join(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {} (needs CAP_SYS_ADMIN)", self.path.display()))
    }

    /// Runs `work` on a thread inside the namespace, and gives what it gives.
    ///
    /// # Errors
    /// The namespace can't be entered, or what `work` says.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = std::thread::Builder::new().spawn_scoped(scope, || {
                self.join()?;
                work()
            });
            let inside = inside.context("can't start a thread to enter a network namespace")?;
            match inside.join() {
                Ok(result) => result,
                Err(_) => bail!(anyhow!(
                    "the thread inside {} panicked",
                    self.path.display()
                )),
            }
        })
    }
}

/// The cookie of the network namespace that the caller is in; 0 where the kernel does not tell it.
#[must_use]
pub fn netns_cookie() -> u64 {
    let Ok(socket) = std::net::UdpSocket::bind(("0.0.0.0", 0)) else {
        return 0;
    };
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: eight bytes of room, and a length that says so.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status == 0 { cookie } else { 0 }
}
