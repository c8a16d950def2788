//! Information about processes from `/proc`.
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::{fs, io};

/// A process that can't be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ProcessId {
    /// Its number in the PID namespace of `/proc`.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

impl ProcessId {
    /// This very process.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn own() -> Result<Self> {
        Self::of(Pid::this())?.context("/proc has no entry for this process: mount /proc")
    }

    /// The process that has this number now; `None` when there is none.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn of(pid: Pid) -> Result<Option<Self>> {
        Ok(stat(pid)?.map(|stat| Self {
            pid: pid.as_raw(),
            start_ticks: stat.start_ticks,
        }))
    }

    /// Whether it is still there (a zombie is), and is not a later process of the same number.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn is_alive(&self) -> Result<bool> {
        Ok(Self::of(Pid::from_raw(self.pid))?.as_ref() == Some(self))
    }
}

/// The fields of `/proc/PID/stat` that are used here.
struct Stat {
    parent: i32,
    start_ticks: u64,
    /// It has ended, with all its threads, and waits to be reaped.
    is_zombie: bool,
}

/// `None` when the process is gone.
fn stat(pid: Pid) -> Result<Option<Stat>> {
    let path = format!("/proc/{pid}/stat");
    let text = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("can't read {path}")),
    };
    parse_stat(&text)
        .map(Some)
        .with_context(|| format!("{path} does not have the format of proc(5)"))
}

/// The name in parentheses may hold spaces and parentheses itself, so fields count from the last
/// one: state is field 3, the parent 4, the number of threads 20, the start 22.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, after_name) = text.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let threads: u32 = fields.get(17)?.parse().ok()?;
    Some(Stat {
        // A first thread that has ended stays as a zombie while others run.
        is_zombie: *fields.first()? == "Z" && threads <= 1,
        parent: fields.get(1)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// A descriptor of a process, readable when it has ended (Linux 5.3); closed on exec.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn open_pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two integers and returns a new descriptor that nobody else owns.
    unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0);
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EOVERFLOW)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Whether a process is there and runs: no zombie.
pub(crate) fn is_running(pid: i32) -> bool {
    stat(Pid::from_raw(pid)).is_ok_and(|stat| stat.is_some_and(|stat| !stat.is_zombie))
}

/// Reading anything of a process that has just ended gives one of these.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::ENOENT | nix::libc::ESRCH)
    )
}

/// `root` and everything below it, parents before their children.
///
/// A process whose parent has ended belongs to the nearest reaper, and so no longer to the tree.
/// Zombies are left out: they do nothing any more.
///
/// # Errors
/// When there is no process `root`, or `/proc` can't be read.
pub fn tree(root: Pid) -> Result<Vec<ProcessId>> {
    let mut children: HashMap<i32, Vec<ProcessId>> = HashMap::new();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("can't read /proc: mount it")? {
        let name = entry.context("can't read /proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(stat) = stat(Pid::from_raw(pid))?.filter(|stat| !stat.is_zombie) else {
            continue;
        };
        let process = ProcessId {
            pid,
            start_ticks: stat.start_ticks,
        };
        if pid == root.as_raw() {
            found.push(process);
        } else {
            children.entry(stat.parent).or_default().push(process);
        }
    }
    if found.is_empty() {
        anyhow::bail!("there is no process {root}");
    }
    let mut next = 0;
    while let Some(process) = found.get(next) {
        found.extend(children.remove(&process.pid).unwrap_or_default());
        next += 1;
    }
    Ok(found)
}

/// The inodes of every socket that one of these processes has open. A process that ends meanwhile
/// has none.
///
/// # Errors
/// When a process's descriptors can't be read (not its owner, and no `CAP_SYS_PTRACE`).
pub fn socket_inodes(processes: &[ProcessId]) -> Result<HashSet<u64>> {
    let mut inodes = HashSet::new();
    for process in processes {
        let sockets = open_sockets(process.pid).with_context(|| {
            let pid = process.pid;
            format!("can't read /proc/{pid}/fd: run as root or as that process's user")
        })?;
        inodes.extend(sockets.iter().map(|socket| socket.inode));
    }
    Ok(inodes)
}

/// A socket that a process has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketDescriptor {
    /// Its descriptor there.
    pub number: RawFd,
    /// Its unique inode.
    pub inode: u64,
}

/// Hands duplicates of the sockets with these inodes to `act`, with the process that each was found at, and with what is
/// told of it here. Processes that may not be looked into are left out.
///
/// # Errors
/// Processes or their descriptors can't be listed, or what `act` says.
pub fn take_sockets<T, S: BuildHasher>(
    mut wanted: HashMap<u64, T, S>,
    mut act: impl FnMut(i32, io::Result<OwnedFd>, T) -> Result<()>,
) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    for process in fs::read_dir("/proc").context("listing processes")? {
        let name = process.context("listing processes")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let sockets = match open_sockets(pid) {
            Ok(sockets) => sockets,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("listing the sockets of process {pid}"));
            }
        };
        for socket in sockets {
            // Another process may have the same socket.
            if let Some(told) = wanted.remove(&socket.inode) {
                let taken =
                    open_pidfd(pid).and_then(|process| take_descriptor(&process, socket.number));
                act(pid, taken.map_err(io::Error::from), told)?;
            }
        }
    }
    Ok(())
}

/// The sockets that a process has open. One that ends meanwhile has none.
///
/// # Errors
/// `PermissionDenied` without being its owner and without `CAP_SYS_PTRACE`; too many files are open here.
pub fn open_sockets(pid: i32) -> io::Result<Vec<SocketDescriptor>> {
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut sockets = Vec::new();
    for entry in entries {
        // A descriptor may be closed, and the process may end, between the two system calls.
        let looked = entry.and_then(|entry| Ok((fs::read_link(entry.path())?, entry.file_name())));
        let (link, number) = match looked {
            Ok(looked) => looked,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        let inode = link.to_str().and_then(socket_inode);
        let number = number.to_str().and_then(|number| number.parse().ok());
        if let (Some(inode), Some(number)) = (inode, number) {
            sockets.push(SocketDescriptor { number, inode });
        }
    }
    Ok(sockets)
}

/// A second descriptor of what a process has open as `number` (Linux 5.6); closed on exec.
///
/// # Errors
/// `ESRCH` when the process has ended, `EBADF` when it has closed it, `EPERM` when it may not be looked into.
pub fn take_descriptor(process: &OwnedFd, number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes three integers and returns a new descriptor that nobody else owns.
    unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0);
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EOVERFLOW)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The number in `socket:[12345]`.
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_shifts_no_field() {
        let text = "12 (a) S) Z 7 12 12 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let stat = parse_stat(text).expect("it is well formed");
        assert_eq!((stat.parent, stat.start_ticks), (7, 4242));
        assert!(stat.is_zombie);
        let threads = parse_stat(&text.replace(" 1 0 4242", " 2 0 4242")).unwrap();
        assert!(!threads.is_zombie);
        assert!(parse_stat("12 (a) S 1").is_none());
        assert!(parse_stat("").is_none());
    }

    #[test]
    fn this_process_is_alive_and_one_started_earlier_with_its_number_is_not() {
        let own = ProcessId::own().unwrap();
        assert!(own.is_alive().unwrap());
        let earlier = ProcessId {
            start_ticks: own.start_ticks - 1,
            ..own
        };
        assert!(!earlier.is_alive().unwrap());
    }

    #[test]
    fn a_child_is_in_the_tree_and_its_parent_comes_first() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let found = tree(Pid::this()).unwrap();
        assert_eq!(found[0], ProcessId::own().unwrap());
        let number = i32::try_from(child.id()).unwrap();
        assert!(found[1..].iter().any(|process| process.pid == number));
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn only_sockets_have_a_socket_inode() {
        assert_eq!(socket_inode("socket:[4711]"), Some(4711));
        assert_eq!(socket_inode("pipe:[4711]"), None);
        assert_eq!(socket_inode("socket:[]"), None);
    }
}
