//! Work inside another network namespace.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// A network namespace that is not (or may not be) the caller's.
#[derive(Debug)]
pub struct NetworkNamespace {
    file: File,
    path: PathBuf,
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
        let file = File::open(&path).with_context(|| {
            format!(
                "no network namespace `{}`: give a path such as /proc/PID/ns/net, or a name that `ip netns` lists",
                name.display()
            )
        })?;
        Ok(Self { file, path })
    }

    /// The namespace of a process.
    ///
    /// # Errors
    /// No such process, or no rights to look.
    pub fn of_process(pid: i32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let file = File::open(&path).with_context(|| {
            format!("can't open the network namespace of process {pid} (needs CAP_SYS_PTRACE)")
        })?;
        Ok(Self { file, path })
    }

    /// Whether this is the namespace that the caller is in.
    ///
    /// # Errors
    /// `/proc` can't be read.
    pub fn is_own(&self) -> Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let own = std::fs::metadata("/proc/thread-self/ns/net")
            .context("reading /proc/thread-self/ns/net")?;
        let this = self.file.metadata()?;
        Ok((own.dev(), own.ino()) == (this.dev(), this.ino()))
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
            let inside = scope.spawn(|| {
                self.join()?;
                work()
            });
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
