//! Control groups of version 2: their mount, and a cgroup for CMD.
//!
//! A BPF program knows the sender of a packet by the id of its cgroup, which is the inode of the
//! cgroup's directory, and by the ids of that cgroup's ancestors. So a fresh cgroup marks exactly
//! the processes that were started in it and all their descendants.
//!
//! The owner of a cgroup holds a `flock` on its directory. The kernel lets go of it when the owner
//! ends, however it ends, so [`crate::undo::leftovers`] can tell a live instance's cgroup from a
//! dead one's, across PID namespaces and reused process numbers.
use crate::sys::process::proc::is_gone;
use crate::tell::tell;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, SYSFS_MAGIC, statfs};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The prefix of the names of fault's cgroups: `fault-<pid>-<n>`.
pub const NAME_PREFIX: &str = "fault-";

/// Killed processes must end within this time. One in uninterruptible sleep (a dead NFS server) may never end.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of times that a growing list of processes is read again.
pub(crate) const ROUNDS_MAX: usize = 1000;

/// The inode of the initial cgroup namespace (`PROC_CGROUP_INIT_INO` in `linux/proc_ns.h`).
const INITIAL_NAMESPACE_INODE: u64 = 0xEFFF_FFFB;

/// A mounted cgroup2 file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
    /// The directory of the hierarchy that is seen at `mount`, relative to the root of our cgroup
    /// namespace; it can start with `/..`.
    root: PathBuf,
    writable: bool,
}

impl Hierarchy {
    /// Finds the cgroup2 mount, wherever it is: `/sys/fs/cgroup` (unified),
    /// `/sys/fs/cgroup/unified` (hybrid), anywhere else. A writable one wins, then one that shows
    /// the whole hierarchy.
    ///
    /// # Errors
    /// When there is none.
    pub fn find() -> Result<Self> {
        let text = fs::read_to_string("/proc/thread-self/mountinfo")
            .context("can't read /proc/thread-self/mountinfo: mount /proc")?;
        parse_mountinfo(&text)
            .into_iter()
            // Another mount on top of it may hide it.
            .filter(|found| {
                statfs(&found.mount).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
            })
            .max_by_key(|found| (found.writable, found.root == Path::new("/")))
            .context(
                "no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup, or in a container \
                 -v /sys/fs/cgroup:/sys/fs/cgroup",
            )
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Whether new cgroups can be made at all: the mount is not read-only.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The cgroup in `path`: a directory below the mount, or what `/proc/PID/cgroup` and systemd
    /// call it (`/system.slice/nginx.service`).
    ///
    /// # Errors
    /// When neither is a cgroup of version 2, or its depth can't be told (see [`Cgroup::level`]).
    pub fn open(&self, path: &Path) -> Result<Cgroup> {
        let absolute = fs::canonicalize(path).ok().filter(|path| is_cgroup2(path));
        let mount = fs::canonicalize(&self.mount)
            .with_context(|| format!("can't open {}", self.mount.display()))?;
        match absolute {
            Some(path) if path.starts_with(&mount) => self.at(path),
            Some(path) => bail!(
                "{} is on another cgroup2 mount than {}: give its path below the latter",
                path.display(),
                mount.display()
            ),
            None => {
                let below = self.mount.join(path.strip_prefix("/").unwrap_or(path));
                match fs::canonicalize(&below) {
                    Ok(path) if path.starts_with(&mount) && is_cgroup2(&path) => self.at(path),
                    _ => bail!(
                        "`{}` is not a cgroup of version 2: name a directory below {} (systemd-cgls \
                         and /proc/PID/cgroup show them)",
                        path.display(),
                        mount.display()
                    ),
                }
            }
        }
    }

    /// The cgroup that a process is in.
    ///
    /// # Errors
    /// When there is no such process, or its cgroup is outside of what is mounted here.
    pub fn of(&self, pid: Pid) -> Result<Cgroup> {
        let file = format!("/proc/{pid}/cgroup");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if is_gone(&error) => bail!("there is no process {pid}"),
            Err(error) => return Err(error).with_context(|| format!("can't read {file}")),
        };
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .with_context(|| format!("process {pid} is in no cgroup of version 2"))?;
        let below = below_root(Path::new(path), &self.root).with_context(|| {
            format!(
                "the cgroup {path} of process {pid} is not visible from here: give this container the host's cgroups \
                 (--cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup)"
            )
        })?;
        // Component by component: joining an empty path would add a slash at the end.
        self.at(self.mount.join(below).components().collect())
    }

    /// The cgroup at a directory that is known to be below the mount.
    pub(crate) fn at(&self, path: PathBuf) -> Result<Cgroup> {
        let metadata = fs::metadata(&path)
            .with_context(|| format!("can't open the cgroup {}", path.display()))?;
        let mount = fs::canonicalize(&self.mount)
            .with_context(|| format!("can't open {}", self.mount.display()))?;
        let below = path
            .strip_prefix(&mount)
            .or_else(|_| path.strip_prefix(&self.mount))
            .with_context(|| format!("{} is not below {}", path.display(), mount.display()))?;
        Ok(Cgroup {
            id: metadata.ino(),
            level: self.root_level()? + depth(below),
            path,
        })
    }

    /// How deep the mount's own root is in the kernel's hierarchy.
    ///
    /// A cgroup namespace hides what is above its root, but not whether there is anything: only the
    /// kernel's own root has no `cgroup.type`.
    fn root_level(&self) -> Result<u32> {
        if !self.mount.join("cgroup.type").exists() {
            return Ok(0);
        }
        let namespace = fs::metadata("/proc/self/ns/cgroup")
            .context("can't read /proc/self/ns/cgroup: mount /proc")?;
        if namespace.ino() == INITIAL_NAMESPACE_INODE {
            return Ok(depth(&self.root));
        }
        bail!(
            "only a part of the cgroups is visible in this container: start it with --cgroupns=host and the host's \
             /sys/fs/cgroup"
        )
    }
}

/// Mounts the hierarchy where it belongs if nothing is mounted there, as under `ip netns exec`, which mounts a new sysfs.
/// Only this thread, the threads that it starts and its children see it, so nothing is left behind. To be called before
/// there are other threads.
///
/// # Errors
/// A system call fails, for want of `CAP_SYS_ADMIN` as a rule.
pub fn mount_if_hidden() -> Result<()> {
    let place = Path::new("/sys/fs/cgroup");
    let is_bare = statfs(place).is_ok_and(|stat| stat.filesystem_type() == SYSFS_MAGIC);
    if !is_bare || Hierarchy::find().is_ok() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("can't make a mount namespace")?;
    let (nothing, slave) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE);
    mount(nothing, "/", nothing, slave, nothing).context("can't keep mounts to this process")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let kind = Some("cgroup2");
    mount(kind, place, kind, flags, nothing)
        .with_context(|| format!("can't mount cgroup2 at {}", place.display()))
}

fn is_cgroup2(path: &Path) -> bool {
    path.is_dir() && statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// The number of names in a path.
fn depth(path: &Path) -> u32 {
    let names = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)));
    u32::try_from(names.count()).expect("a path holds fewer than 4 billion names")
}

/// `path` relative to `root`; both are relative to the root of the same cgroup namespace.
fn below_root<'a>(path: &'a Path, root: &Path) -> Option<&'a Path> {
    let below = path.strip_prefix(root).ok()?;
    // "/.." below "/" is above it.
    (!below.components().any(|part| part == Component::ParentDir)).then_some(below)
}

/// The cgroup2 mounts in `/proc/self/mountinfo` (proc(5)): `ID PARENT DEV ROOT MOUNT OPTIONS
/// [TAGS…] - TYPE SOURCE OPTIONS`.
fn parse_mountinfo(text: &str) -> Vec<Hierarchy> {
    text.lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mount: Vec<&str> = mount.split(' ').collect();
            let file_system: Vec<&str> = file_system.split(' ').collect();
            let is_writable = |options: &&str| options.split(',').all(|option| option != "ro");
            (file_system.first() == Some(&"cgroup2")).then_some(Hierarchy {
                root: unescape(mount.get(3)?),
                mount: unescape(mount.get(4)?),
                writable: mount.get(5).is_some_and(is_writable)
                    && file_system.get(2).is_none_or(is_writable),
            })
        })
        .collect()
}

/// mountinfo writes a space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut path = field.to_owned();
    for (code, character) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        path = path.replace(code, character);
    }
    PathBuf::from(path)
}

/// One cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
    id: u64,
    level: u32,
}

impl Cgroup {
    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `bpf_skb_cgroup_id` and `bpf_sk_cgroup_id` return for it.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its depth, as `bpf_skb_ancestor_cgroup_id` counts: the root is 0.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Every process in it and in the cgroups below it. A process of a PID namespace that is not
    /// below ours has the number 0.
    ///
    /// # Errors
    /// When the lists can't be read.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        members_of(&subtree(&self.path)?)
    }
}

/// Whether a directory's name is that of an instance's cgroup: `fault-<pid>-<n>`.
#[must_use]
pub fn is_instances(folder: &Path) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    folder
        .file_name()
        .and_then(|name| name.to_str()?.strip_prefix(NAME_PREFIX)?.split_once('-'))
        .is_some_and(|(pid, number)| is_number(pid) && is_number(number))
}

/// Whether a running instance holds this cgroup of an instance.
fn is_held(folder: &Path) -> Result<bool> {
    Ok(folder.exists() && lock(folder)?.is_none())
}

/// Whether the innermost cgroup of an instance that a directory is, or is in, belongs to an instance that has ended.
///
/// # Errors
/// It can't be opened.
pub fn is_abandoned(folder: &Path) -> Result<bool> {
    match folder.ancestors().find(|folder| is_instances(folder)) {
        Some(innermost) => Ok(!is_held(innermost)?),
        None => Ok(false),
    }
}

/// The cgroup where a process that comes from `folder` belongs: `folder` itself, or, of a cgroup of an instance that
/// has ended, the one around it.
///
/// # Errors
/// It can't be opened.
pub fn kept_part(mut folder: &Path) -> Result<&Path> {
    while is_instances(folder) && !is_held(folder)? {
        folder = folder.parent().context("the root cgroup is not ours")?;
    }
    Ok(folder)
}

/// The processes of one cgroup directory, without those below it; none when it is gone.
pub(crate) fn members(folder: &Path) -> Result<Vec<Pid>> {
    let file = folder.join("cgroup.procs");
    match fs::read_to_string(&file) {
        Ok(text) => text
            .lines()
            .map(|line| line.parse().map(Pid::from_raw))
            .collect::<Result<_, _>>()
            .with_context(|| format!("{} does not contain process ids", file.display())),
        // ENODEV: it was removed after it was opened.
        Err(error) if is_gone(&error) || error.raw_os_error() == Some(nix::libc::ENODEV) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error).with_context(|| format!("can't read {}", file.display())),
    }
}

/// The processes of several cgroup directories.
fn members_of(folders: &[PathBuf]) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for folder in folders {
        found.extend(members(folder)?);
    }
    Ok(found)
}

/// A cgroup directory and all below it, each before those inside it.
fn subtree(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(folder) = found.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("can't read {}", folder.display()));
            }
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("can't read {}", folder.display()))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// A cgroup directory and all below it, without those that other running instances have made in it.
fn own_subtree(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = subtree(folder)?;
    let mut others = Vec::new();
    for inner in found.iter().skip(1) {
        if is_instances(inner) && is_held(inner)? {
            others.push(inner.clone());
        }
    }
    found.retain(|inner| !others.iter().any(|other| inner.starts_with(other)));
    Ok(found)
}

/// Moves a process with all its threads into a cgroup. `false`: it had ended.
///
/// # Errors
/// When the kernel refuses: no permission, or the cgroup is gone or takes no processes.
pub fn move_process(pid: Pid, folder: &Path) -> Result<bool> {
    let file = folder.join("cgroup.procs");
    let moved = OpenOptions::new()
        .write(true)
        .open(&file)
        .and_then(|mut file| file.write_all(pid.to_string().as_bytes()));
    match moved {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(false),
        Err(error) => {
            Err(error).with_context(|| format!("can't move process {pid} to {}", folder.display()))
        }
    }
}

/// What happens to the remaining processes when the cgroup is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftovers {
    /// They keep running, in the parent cgroup.
    Release,
    /// They are killed.
    Kill,
}

/// The processes that remained when a cgroup was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Finished {
    /// Processes that keep running in the parent cgroup.
    pub released: Vec<Pid>,
    /// The cgroup, if it could not be removed because processes run in a cgroup created inside it. `fault clean`
    /// removes it once they have ended.
    pub kept: Option<PathBuf>,
}

/// A cgroup of fault, removed when this is dropped.
#[derive(Debug)]
pub struct CommandCgroup {
    cgroup: Cgroup,
    leftovers: Leftovers,
    /// Held until this is dropped: see the module's documentation.
    _lock: Flock<File>,
    finished: bool,
}

impl CommandCgroup {
    /// Whether a capability is needed to remove it: root can't write to the hierarchy's root or to a cgroup delegated
    /// to a user without one.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        let parent = self.cgroup.path.parent();
        let parent = parent.and_then(|parent| fs::metadata(parent).ok());
        parent.is_none_or(|parent| {
            parent.uid() != nix::unistd::Uid::effective().as_raw() || parent.mode() & 0o200 == 0
        })
    }

    /// Creates a cgroup `fault-<pid>-<n>`. If permitted it is below the caller's own cgroup, so that a delegated
    /// subtree and its limits still apply; otherwise below the root.
    ///
    /// # Errors
    /// When the mount is read-only or neither place can be written.
    pub fn create(hierarchy: &Hierarchy, leftovers: Leftovers) -> Result<Self> {
        Self::create_for(hierarchy, Pid::this(), leftovers)
    }

    /// Like [`Self::create`], below the cgroup of another process.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_for(hierarchy: &Hierarchy, pid: Pid, leftovers: Leftovers) -> Result<Self> {
        if !hierarchy.writable {
            bail!(
                "cgroup2 at {0} is mounted read-only: mount -o remount,rw {0} (in a container: run \
                 it with --privileged)",
                hierarchy.mount.display()
            );
        }
        // A process outside of what is mounted here (another container's) leaves the root.
        let own = hierarchy.of(pid).map(|own| own.path);
        let root = hierarchy.mount.clone();
        let mut refused = None;
        for parent in own.into_iter().chain([root]) {
            match create_below(hierarchy, &parent, leftovers) {
                Ok(made) => return Ok(made),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.unwrap_or_else(|| anyhow::anyhow!("no cgroup to create the command's below")))
            .context("can't create a cgroup for the command (run as root, or --scope host)")
    }

    /// The cgroup: its id and level are what the rules' scope is made of.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Every process in it and in the cgroups below it, without those in cgroups of other running instances.
    ///
    /// # Errors
    /// When the lists can't be read.
    pub fn own_processes(&self) -> Result<Vec<Pid>> {
        members_of(&own_subtree(&self.cgroup.path)?)
    }

    /// `cgroup.procs`, open for writing: whoever writes `0` to it moves itself in.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn entrance(&self) -> Result<File> {
        let file = self.cgroup.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&file)
            .with_context(|| format!("can't open {}", file.display()))
    }

    /// Kills every process in it, and tells how many there were. It can be used again.
    ///
    /// # Errors
    /// When the processes can't be listed or killed, or don't end.
    pub fn empty(&self) -> Result<usize> {
        let present = self.cgroup.processes()?.len();
        if present != 0 {
            kill_all(&self.cgroup.path)?;
        }
        Ok(present)
    }

    /// Empties and removes it, and returns the remaining processes. Dropping it does the same silently.
    ///
    /// # Errors
    /// When processes can't be moved or killed, or the kernel keeps the directory.
    pub fn finish(mut self) -> Result<Finished> {
        self.finished = true;
        give_up(&self.cgroup.path, self.leftovers)
    }
}

impl Drop for CommandCgroup {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = give_up(&self.cgroup.path, self.leftovers) {
            tell!("fault: warning: {error:#}; run `fault clean` to remove it");
        }
    }
}

fn create_below(
    hierarchy: &Hierarchy,
    parent: &Path,
    leftovers: Leftovers,
) -> Result<CommandCgroup> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    // Fails here, before anything is made, when levels can't be told.
    hierarchy.at(parent.to_owned())?;
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{NAME_PREFIX}{}-{number}", Pid::this()));
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error).context(format!("can't create {}", path.display())),
        }
        let held = hold(hierarchy, &path, leftovers);
        let Ok(Some(made)) = held else {
            // Between the two calls somebody's `fault clean` or `fault doctor` took it for a dead
            // one's, and may have removed it already. Or there is no descriptor to be had.
            match fs::remove_dir(&path) {
                Err(error) if !is_gone(&error) => {
                    return Err(error).context(format!("can't remove {}", path.display()));
                }
                _ => {}
            }
            held?;
            continue;
        };
        // Below a threaded cgroup a new one takes no processes.
        let kind = fs::read_to_string(made.cgroup.path.join("cgroup.type"))
            .context("can't read cgroup.type")?;
        if kind.trim() != "domain" {
            bail!("{} is a threaded cgroup", parent.display());
        }
        return Ok(made);
    }
}

/// Takes a fresh cgroup for this instance. `None` if another process has it, or it no longer exists.
fn hold(hierarchy: &Hierarchy, path: &Path, leftovers: Leftovers) -> Result<Option<CommandCgroup>> {
    let Some(lock) = lock(path)? else {
        return Ok(None);
    };
    Ok(Some(CommandCgroup {
        cgroup: hierarchy.at(path.to_owned())?,
        leftovers,
        _lock: lock,
        finished: false,
    }))
}

/// Takes a cgroup's lock. `None` if another process has it, or the cgroup no longer exists.
///
/// # Errors
/// When the directory can't be opened or locked for any other reason.
pub(crate) fn lock(path: &Path) -> Result<Option<Flock<File>>> {
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("can't open {}", path.display())),
    };
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) if path.exists() => Ok(Some(lock)),
        Ok(_) | Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno).with_context(|| format!("can't lock {}", path.display())),
    }
}

/// Empties a cgroup of ours and removes it.
pub(crate) fn give_up(folder: &Path, leftovers: Leftovers) -> Result<Finished> {
    let mut finished = Finished::default();
    // Where it is empty this takes no descriptor, of which there may be none.
    if fs::remove_dir(folder).is_ok() || !folder.exists() {
        remove_abandoned(folder.parent())?;
        return Ok(finished);
    }
    match leftovers {
        Leftovers::Release => finished.released = release(folder)?,
        Leftovers::Kill => kill_all(folder)?,
    }
    let mut folders = own_subtree(folder)?;
    folders.reverse();
    for inner in folders {
        match fs::remove_dir(&inner) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                finished.kept = Some(folder.to_owned());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("can't remove {}", inner.display()));
            }
        }
    }
    if finished.kept.is_none() {
        remove_abandoned(folder.parent())?;
    }
    Ok(finished)
}

/// Removes the cgroups of instances that ended before the one that was inside them.
fn remove_abandoned(mut around: Option<&Path>) -> Result<()> {
    while let Some(folder) = around.filter(|folder| is_instances(folder)) {
        let Some(_lock) = lock(folder)? else {
            return Ok(());
        };
        if fs::remove_dir(folder).is_err() {
            // There is something else in it: `fault clean` tells.
            return Ok(());
        }
        around = folder.parent();
    }
    Ok(())
}

/// Moves every process to the cgroup's parent, again and again until no fork has added one.
fn release(folder: &Path) -> Result<Vec<Pid>> {
    let parent = folder.parent().context("the root cgroup is not ours")?;
    let mut released = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let present = members(folder)?;
        if present.is_empty() {
            released.sort_unstable();
            released.dedup();
            return Ok(released);
        }
        for pid in present {
            // Writing 0 would move this very process.
            if pid.as_raw() == 0 {
                bail!(
                    "{} holds a process of another PID namespace: run `fault clean` there",
                    folder.display()
                );
            }
            if move_process(pid, parent)? {
                released.push(pid);
            }
        }
    }
    bail!(
        "the processes in {} fork faster than they can be moved",
        folder.display()
    )
}

/// Kills everything in the cgroup and below it, and waits until it is gone.
fn kill_all(folder: &Path) -> Result<()> {
    let path = folder.join("cgroup.events");
    let mut events = File::open(&path).with_context(|| format!("can't open {}", path.display()))?;
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        // Reading the file arms its poll, so the change can't slip in between.
        if !is_populated(&mut events)? {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!(
                "processes in {} can't be killed (uninterruptible sleep?)",
                folder.display()
            );
        }
        let all_at_once = kill_once(folder)?;
        // Without cgroup.kill a fork can outrun the list, so look again soon.
        let wait = if all_at_once {
            left
        } else {
            left.min(Duration::from_millis(10))
        };
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
            timeout,
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("can't wait for a cgroup to become empty"),
        }
    }
}

/// Sends SIGKILL to all: by `cgroup.kill` (Linux 5.14), which no fork escapes (`true`), else one by
/// one.
fn kill_once(folder: &Path) -> Result<bool> {
    match OpenOptions::new()
        .write(true)
        .open(folder.join("cgroup.kill"))
    {
        Ok(mut file) => {
            file.write_all(b"1")
                .with_context(|| format!("can't kill the processes in {}", folder.display()))?;
            return Ok(true);
        }
        Err(error) if is_gone(&error) => {}
        Err(error) => return Err(error).context("can't open cgroup.kill"),
    }
    for inner in subtree(folder)? {
        for pid in members(&inner)? {
            if pid.as_raw() == 0 {
                continue;
            }
            match kill(pid, Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno).with_context(|| format!("can't kill {pid}")),
            }
        }
    }
    Ok(false)
}

fn is_populated(events: &mut File) -> Result<bool> {
    let mut text = String::new();
    events
        .rewind()
        .and_then(|()| events.read_to_string(&mut text))
        .context("can't read cgroup.events")?;
    Ok(text.lines().any(|line| line == "populated 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
23 1 0:22 / /sys rw - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw
";

    fn only(text: &str) -> Hierarchy {
        let mut found = parse_mountinfo(text);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn hybrid_and_unified_mounts_are_found_and_v1_is_not() {
        let hybrid = only(HYBRID);
        assert_eq!(hybrid.mount, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(hybrid.root, Path::new("/"));
        assert!(hybrid.writable);
        let unified = only("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate");
        assert_eq!(unified.mount, Path::new("/sys/fs/cgroup"));
        assert_eq!(
            parse_mountinfo("40 31 0:37 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw"),
            []
        );
    }

    #[test]
    fn a_mount_is_read_only_by_its_own_options_or_by_the_file_systems() {
        assert!(!only("30 23 0:26 / /c ro,nosuid - cgroup2 cgroup rw").writable);
        assert!(!only("30 23 0:26 / /c rw - cgroup2 cgroup ro,nsdelegate").writable);
    }

    #[test]
    fn odd_names_and_torn_lines() {
        assert_eq!(
            only("30 23 0:26 /a\\040b /c\\134d rw - cgroup2 none rw"),
            Hierarchy {
                mount: "/c\\d".into(),
                root: "/a b".into(),
                writable: true
            }
        );
        assert_eq!(parse_mountinfo("30 23 - cgroup2"), []);
    }

    #[test]
    fn a_path_outside_of_the_mounted_part_is_refused() {
        let below = |path: &'static str, root: &str| below_root(Path::new(path), Path::new(root));
        assert_eq!(below("/a/b", "/"), Some(Path::new("a/b")));
        assert_eq!(below("/a/b", "/a"), Some(Path::new("b")));
        assert_eq!(below("/", "/"), Some(Path::new("")));
        assert_eq!(below("/b", "/a"), None);
        assert_eq!(below("/../x", "/"), None);
        assert_eq!(below("/../x/y", "/../x"), Some(Path::new("y")));
    }

    #[test]
    fn read_only_says_what_to_do() {
        let hierarchy = only("30 23 0:26 / /c ro - cgroup2 none rw");
        let error = CommandCgroup::create(&hierarchy, Leftovers::Kill).unwrap_err();
        assert!(
            error.to_string().contains("mount -o remount,rw /c"),
            "{error}"
        );
    }

    #[test]
    fn only_names_of_our_form_are_instances() {
        assert!(is_instances(Path::new("/c/fault-12-0")));
        for other in [
            "fault-12",
            "fault--1",
            "fault-a-1",
            "fault-1-",
            "default-1-2",
            "fault-1-2-3",
        ] {
            assert!(!is_instances(Path::new(other)), "{other}");
        }
    }
}
