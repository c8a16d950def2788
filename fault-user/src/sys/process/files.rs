//! Files that a user names for `fault` to write. A symbolic link in their path may have been planted by somebody with fewer
//! rights, CMD included, so none is followed. Under sudo they are written with the rights of the user who called it.
use crate::sys::process::capabilities::Capability;
use crate::sys::process::rights::keep_only;
use crate::sys::process::user::Identity;
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat, renameat2,
};
use nix::libc;
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, setfsgid, setfsuid, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

/// A folder that files are written to; it stays the same one when its path changes.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder.
    ///
    /// # Errors
    /// There is none, it may not be looked into, or a symbolic link leads to it.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = open(path, OFlag::O_DIRECTORY).map_err(|errno| unopened(path, errno))?;
        let path = path.to_owned();
        Ok(Self { fd, path })
    }

    /// Opens a folder, and makes what is missing of it.
    ///
    /// # Errors
    /// It can't be made, or a symbolic link leads to it.
    pub fn make(path: &Path) -> Result<Self> {
        if let Err(Errno::ENOENT) = open(path, OFlag::O_DIRECTORY) {
            let (folder, name) = split(path)?;
            let parent = Self::make(&folder)?;
            match mkdirat(&parent.fd, &*name, Mode::from_bits_truncate(0o777)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => bail!("can't create {}: {}", path.display(), errno.desc()),
            }
        }
        Self::open(path)
    }

    /// A path that leads to a file in this very folder, whatever becomes of the folder's own.
    #[must_use]
    pub fn inside(&self, name: &OsStr) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd())).join(name)
    }

    /// Makes a file anew, or opens a pipe or a device of that name.
    ///
    /// # Errors
    /// It can't be made, or is a symbolic link or a folder.
    pub fn create(&self, name: &OsStr) -> Result<File> {
        let file = self.created(name);
        file.map_err(|errno| unopened(&self.path.join(name), errno))
    }

    fn created(&self, name: &OsStr) -> nix::Result<File> {
        let made = |flags| {
            let how = OpenHow::new()
                .flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC | flags)
                .mode(if flags.contains(OFlag::O_CREAT) {
                    Mode::from_bits_truncate(0o666)
                } else {
                    Mode::empty()
                })
                .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
            openat2(&self.fd, name, how)
        };
        let fresh = OFlag::O_CREAT | OFlag::O_EXCL;
        let file = match made(fresh) {
            Err(Errno::EEXIST) if self.has_regular(name) => {
                // Another name of the same file is somebody's own, and stays as it is.
                unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)?;
                made(fresh)
            }
            Err(Errno::EEXIST) => made(OFlag::empty()),
            other => other,
        };
        file.map(File::from)
    }

    /// Puts a file with this content in the place of what has this name: a reader finds the one or the other. What is a
    /// pipe or a device is written to instead.
    ///
    /// # Errors
    /// It can't be written; then the file that was there stays.
    pub fn replace(&self, name: &OsStr, content: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let failed = |why: &dyn std::fmt::Display| anyhow!("can't write {}: {why}", path.display());
        let unwritten = |error: std::io::Error| match error.raw_os_error() {
            Some(number) => failed(&Errno::from_raw(number).desc()),
            None => failed(&error),
        };
        if !self.has_regular(name) && self.inside(name).symlink_metadata().is_ok() {
            return self.create(name)?.write_all(content).map_err(unwritten);
        }
        let part = part_of(name);
        let written = self.create(&part)?.write_all(content);
        let put = written.map_err(unwritten).and_then(|()| {
            renameat(&self.fd, &*part, &self.fd, name).map_err(|errno| failed(&errno.desc()))
        });
        if put.is_err() {
            self.remove(&part)?;
        }
        put
    }

    /// Removes what an earlier [`Folder::replace`] or [`Growing`] of this name left behind when its process was killed.
    ///
    /// # Errors
    /// It may not be removed.
    pub fn tidy(&self, name: &OsStr) -> Result<()> {
        let part = part_of(name);
        if self.has_regular(&part) {
            self.remove(&part)?;
        }
        Ok(())
    }

    /// Whether it has a file of this name.
    #[must_use]
    pub fn has_regular(&self, name: &OsStr) -> bool {
        std::fs::symlink_metadata(self.inside(name)).is_ok_and(|file| file.is_file())
    }

    /// Removes a file.
    ///
    /// # Errors
    /// There is none, or it may not be removed.
    pub fn remove(&self, name: &OsStr) -> Result<()> {
        unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir).with_context(|| {
            let path = self.path.join(name);
            format!("can't remove {}", path.display())
        })
    }
}

/// A file that grows before its last bytes, and is whole at any time: a reader, also after a crash, finds it with the last
/// text or without it. There are two copies, of which the one without the last text is completed and then takes the
/// other one's place, so that a text costs what it is long.
#[derive(Debug)]
pub struct Growing {
    folder: Arc<Folder>,
    name: OsString,
    tail: Vec<u8>,
    current: Copy,
    /// Nothing before the first text, and where the file system can't exchange files.
    spare: Option<Copy>,
}

/// One copy of a file that grows.
#[derive(Debug)]
struct Copy {
    file: File,
    /// Where the last bytes begin.
    end: u64,
    /// What is missing in front of them.
    missing: Vec<u8>,
}

impl Growing {
    /// Makes a file of these bytes in the place of what has this name, as [`Folder::replace`] does. Nothing where that is
    /// a pipe or a device, which can't grow.
    ///
    /// # Errors
    /// As [`Folder::replace`].
    pub fn begin(
        folder: Arc<Folder>,
        name: &OsStr,
        head: &[u8],
        tail: &[u8],
    ) -> Result<Option<Self>> {
        folder.replace(name, &[head, tail].concat())?;
        if !folder.has_regular(name) {
            return Ok(None);
        }
        let how = OpenHow::new()
            .flags(OFlag::O_RDWR | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let file = openat2(&folder.fd, name, how);
        let file = file.map_err(|errno| unopened(&folder.path.join(name), errno))?;
        Ok(Some(Self {
            name: name.to_owned(),
            tail: tail.to_vec(),
            current: Copy {
                file: file.into(),
                end: head.len().try_into()?,
                missing: Vec::new(),
            },
            spare: None,
            folder,
        }))
    }

    /// Adds a text in front of the last bytes.
    ///
    /// # Errors
    /// It can't be written; then the file stays as it was.
    pub fn add(&mut self, text: &[u8]) -> Result<()> {
        let added = self.add_by(&part_of(&self.name), text);
        if added.is_err() {
            self.folder.tidy(&self.name)?;
        }
        added.map_err(|errno| {
            let path = self.folder.path.join(&self.name);
            anyhow!("can't write {}: {}", path.display(), errno.desc())
        })
    }

    fn add_by(&mut self, part: &OsStr, text: &[u8]) -> nix::Result<()> {
        let mut next = match self.spare.take() {
            Some(spare) => spare,
            None => self.copied(part)?,
        };
        next.missing.extend_from_slice(text);
        let length = next.missing.len() as u64;
        next.missing.extend_from_slice(&self.tail);
        next.file
            .write_all_at(&next.missing, next.end)
            .map_err(errno_of)?;
        next.end += length;
        next.missing.clear();
        let (folder, name) = (&self.folder.fd, self.name.as_os_str());
        match renameat2(folder, part, folder, name, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => {
                let mut spare = std::mem::replace(&mut self.current, next);
                spare.missing.extend_from_slice(text);
                self.spare = Some(spare);
                Ok(())
            }
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                renameat(folder, part, folder, name)?;
                self.current = next;
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    /// Another copy of the file as it is.
    fn copied(&self, part: &OsStr) -> nix::Result<Copy> {
        let end = self.current.end;
        let mut text = vec![0; usize::try_from(end).map_err(|_| Errno::EFBIG)?];
        let read = self.current.file.read_exact_at(&mut text, 0);
        read.map_err(errno_of)?;
        let file = self.folder.created(part)?;
        file.write_all_at(&text, 0).map_err(errno_of)?;
        Ok(Copy {
            file,
            end,
            missing: Vec::new(),
        })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "`map_err` gives values")]
fn errno_of(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Opens a file to write behind its end; makes it where there is none.
///
/// # Errors
/// It can't be opened, or a symbolic link leads to it.
pub fn append(path: &Path) -> Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_APPEND | OFlag::O_CREAT)
        .mode(Mode::from_bits_truncate(0o666))
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let opened = openat2(AT_FDCWD, path, how);
    opened
        .map(File::from)
        .map_err(|errno| unopened(path, errno))
}

/// Makes a file anew at this path, as [`Folder::create`] does.
///
/// # Errors
/// As there.
pub fn create(path: &Path) -> Result<File> {
    let (folder, name) = split(path)?;
    Folder::open(&folder)?.create(&name)
}

/// Puts a file with this content at this path, as [`Folder::replace`] does.
///
/// # Errors
/// As there.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let (folder, name) = split(path)?;
    Folder::open(&folder)?.replace(&name, content)
}

/// Checks that [`replace`] may write there; changes nothing.
///
/// # Errors
/// As [`replace`].
pub fn check_replaceable(path: &Path) -> Result<()> {
    let (folder, name) = split(path)?;
    let folder = Folder::open(&folder)?;
    let part = part_of(&name);
    drop(folder.create(&part)?);
    folder.remove(&part)
}

/// The name of a file that is not complete yet.
fn part_of(name: &OsStr) -> OsString {
    let mut part = name.to_owned();
    part.push(".part");
    part
}

/// The folder that a path lies in, and its name there.
///
/// # Errors
/// The path names no file.
pub fn split(path: &Path) -> Result<(PathBuf, OsString)> {
    let name = path
        .file_name()
        .with_context(|| format!("{} is not a file name", path.display()))?;
    let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
    Ok((folder.unwrap_or(Path::new(".")).to_owned(), name.to_owned()))
}

fn open(path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | flags)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, path, how)
}

fn unopened(path: &Path, errno: Errno) -> anyhow::Error {
    let path = path.display();
    match errno {
        Errno::ELOOP => anyhow!(
            "{path} contains a symbolic link, which fault does not follow: give the path without it (realpath prints \
             it)"
        ),
        errno => anyhow!("can't write {path}: {}", errno.desc()),
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread that writes files with the rights of the user who called sudo, or else those of the process.
#[derive(Debug)]
pub struct Writer {
    works: mpsc::Sender<Work>,
    /// Whose rights it has, if not the process's.
    user: Option<String>,
}

impl Writer {
    /// Starts it. What the calling thread may do now, root's writer may do later.
    ///
    /// # Errors
    /// There is no thread for it, or it can't have the user's rights.
    pub fn start() -> Result<Self> {
        let caller = Identity::choose(None, |name| std::env::var_os(name))?;
        let user = caller.as_ref().map(ToString::to_string);
        let (works, queue) = mpsc::channel::<Work>();
        let (told, ready) = mpsc::channel();
        // It ends with the sender.
        std::thread::Builder::new()
            .name("files".to_owned())
            .spawn(move || {
                let has_begun = begin(caller.as_ref());
                let is_ready = has_begun.is_ok();
                if told.send(has_begun).is_ok() && is_ready {
                    for work in queue {
                        work();
                    }
                }
            })
            .context("starting the thread that writes files")?;
        ready
            .recv()
            .context("the thread that writes files has ended")?
            .context("taking the rights of the user who called sudo")?;
        Ok(Self { works, user })
    }

    /// Has the thread do this, and waits for it.
    ///
    /// # Errors
    /// What the work gives.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (done, result) = mpsc::channel();
        let gone = "the thread that writes files has ended";
        self.works
            .send(Box::new(move || {
                // Whoever asked waits for it.
                drop(done.send(work()));
            }))
            .map_err(|_| anyhow!(gone))?;
        let result = result.recv().context(gone)?;
        result.map_err(|error| match &self.user {
            Some(user) => anyhow!("{error:#} (written as {user}, who called sudo)"),
            None => error,
        })
    }
}

/// Takes the rights of a user for the calling thread alone, and gives up all others.
fn begin(user: Option<&Identity>) -> Result<()> {
    SigSet::all().thread_block()?;
    let Some(user) = user else {
        return keep_only(&[Capability::DacOverride]);
    };
    let groups: Vec<libc::gid_t> = user.groups.iter().map(|group| group.as_raw()).collect();
    // SAFETY: as many groups as said, which outlive the call. The C library's function would change all threads.
    let set = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    Errno::result(set).context("setting the groups")?;
    setfsgid(user.gid);
    setfsuid(user.uid);
    // They tell the old ones only; -1 changes nothing.
    let is_set = setfsuid((-1_i32).cast_unsigned().into()) == user.uid;
    if !is_set {
        bail!("setting the user to {user}");
    }
    keep_only(&[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_is_never_followed() {
        let folder = tempfile::tempdir().unwrap();
        // The temporary folder itself may be named by a link.
        let root = fs::canonicalize(folder.path()).unwrap();
        let secret = root.join("secret");
        fs::write(&secret, "as it was").unwrap();
        fs::create_dir(root.join("there")).unwrap();
        symlink(&secret, root.join("there/link")).unwrap();
        symlink(root.join("there"), root.join("way")).unwrap();
        let there = Folder::open(&root.join("there")).unwrap();
        let refused = [
            there.create(OsStr::new("link")).map(drop),
            create(&root.join("way/new")).map(drop),
            append(&root.join("there/link")).map(drop),
            Folder::make(&root.join("way/a/b")).map(drop),
        ];
        for one in refused {
            let error = format!("{:#}", one.unwrap_err());
            assert!(error.contains("symbolic link"), "{error}");
        }
        assert_eq!(fs::read_to_string(&secret).unwrap(), "as it was");
        assert!(!root.join("there/new").exists());
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(folder.path()).unwrap().join("file");
        check_replaceable(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        for text in ["one", "two"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // What may be read by somebody meanwhile stays a pipe.
        let pipe = fs::canonicalize(folder.path()).unwrap().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::from_bits_truncate(0o600)).unwrap();
        let reader = {
            let pipe = pipe.clone();
            std::thread::spawn(move || fs::read_to_string(pipe).unwrap())
        };
        replace(&pipe, b"three").unwrap();
        assert_eq!(reader.join().unwrap(), "three");
        let missing = folder.path().join("none/file");
        let error = check_replaceable(&missing).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_file_grows_and_is_whole_after_each_text() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let path = root.join("list");
        let open = || Arc::new(Folder::open(&root).unwrap());
        let begun = Growing::begin(open(), OsStr::new("list"), b"[0", b"]").unwrap();
        let mut growing = begun.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[0]");
        let mut expected = "[0".to_owned();
        for number in 1..9 {
            let text = format!(",{number}");
            growing.add(text.as_bytes()).unwrap();
            expected += &text;
            assert_eq!(fs::read_to_string(&path).unwrap(), expected.clone() + "]");
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 2, "and a spare one");
        replace(&path, b"all").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "all");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
        nix::unistd::mkfifo(&root.join("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
        let pipe = root.join("pipe");
        let reader = std::thread::spawn(move || fs::read_to_string(pipe).unwrap());
        let piped = Growing::begin(open(), OsStr::new("pipe"), b"[", b"]").unwrap();
        assert!(piped.is_none());
        assert_eq!(reader.join().unwrap(), "[]");
    }

    #[test]
    fn a_file_is_made_anew_where_the_folder_was() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let other = root.join("other");
        fs::write(&other, "as it was").unwrap();
        let made = Folder::make(&root.join("a/b")).unwrap();
        fs::hard_link(&other, root.join("a/b/report")).unwrap();
        fs::rename(root.join("a/b"), root.join("moved")).unwrap();
        let mut file = made.create(OsStr::new("report")).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(
            fs::read_to_string(root.join("moved/report")).unwrap(),
            "new"
        );
        assert_eq!(fs::read_to_string(other).unwrap(), "as it was");
    }
}
