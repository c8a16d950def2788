//! The journal: what this process has changed and a later one may have to undo.
//!
//! `/run/fault/<pid>.json` (`<pid>-1.json` where there is one already), one JSON value a line: first a
//! [`Header`], then an [`Entry`] for each change, written *before* the change is made. A torn last line is a change that was not made. The
//! owner holds a `flock` on the file until it ends, so a journal that
//! can be locked is a dead instance's, whatever has become of its process number.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::sys::process::proc::ProcessId;
use crate::tell::tell;
use crate::undo::change::{SystemChange, Entry, Undoing, undo_entries};
use crate::undo::instance::{Share, current_netns};
use crate::undo::leftover::{Fate, Leftover};

/// Where journals are kept: a folder that only root can read, gone after a reboot.
pub const STATE_FOLDER: &str = "/run/fault";

/// The version of the journal's form.
pub(super) const VERSION: u32 = 1;

/// The first line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The form of what follows.
    pub version: u32,
    /// Who made the changes.
    pub owner: ProcessId,
}

/// The journal of this process.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    entries: Vec<(Entry, Undoing)>,
    is_undone: bool,
}

impl Journal {
    /// Starts the journal of this process in [`STATE_FOLDER`]. First it undoes what dead ones there tell of.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub fn create() -> Result<Self> {
        Self::create_in(Path::new(STATE_FOLDER))
    }

    /// Like [`Self::create`], in another folder.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_in(folder: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("can't make {} (run as root)", folder.display()))?;
        let owner = ProcessId::own()?;
        undo_dead(folder)?;
        let (file, path) = new_file(folder, owner.pid)?;
        let mut journal = Self {
            file,
            path,
            entries: Vec::new(),
            is_undone: false,
        };
        let version = VERSION;
        journal.append(&Header { version, owner })?;
        Ok(journal)
    }

    /// Notes a change in the calling thread's network namespace. Call it *before* making it.
    ///
    /// # Errors
    /// When it can't be written; then don't make the change.
    pub fn record(&mut self, change: SystemChange) -> Result<()> {
        self.record_share(change, None)
    }

    /// [`Self::record`] of something that others may need too: it is undone by the last who holds a share.
    ///
    /// # Errors
    /// As [`Self::record`].
    pub fn record_share(&mut self, change: SystemChange, share: Option<Share>) -> Result<()> {
        let netns = current_netns()?;
        let entry = Entry { netns, change };
        self.append(&entry)?;
        self.entries.push((entry, Undoing::Own(share)));
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut bytes = serde_json::to_vec(line).context("can't write a journal line")?;
        bytes.push(b'\n');
        // One write, so that a line is there or torn, but never mixed with another.
        self.file
            .write_all(&bytes)
            .with_context(|| format!("can't write {}", self.path.display()))
    }

    /// Undoes everything, last change first, and removes the journal. Dropping it does the same.
    /// Returns what could not be undone; then the journal stays for `fault clean`.
    #[must_use = "what could not be undone must be told"]
    pub fn undo(mut self) -> Vec<Leftover> {
        self.undo_all()
    }

    fn undo_all(&mut self) -> Vec<Leftover> {
        self.is_undone = true;
        let mut report = Vec::new();
        undo_entries(self.entries.drain(..), &mut report);
        report.retain(|leftover| matches!(leftover.fate, Fate::Kept(_)));
        if report.is_empty()
            && let Err(error) = fs::remove_file(&self.path)
        {
            report.push(Leftover::kept(
                "journal",
                self.path.display().to_string(),
                &error.into(),
            ));
        }
        report
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.is_undone {
            return;
        }
        for leftover in self.undo_all() {
            tell!("fault: {leftover}; `fault clean` tries again");
        }
    }
}

/// The number in `<pid>.json` or `<pid>-<n>.json`.
pub(super) fn journal_owner(path: &Path) -> Option<i32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json")?;
    let pid = name.split_once('-').map_or(name, |(pid, _)| pid);
    pid.parse().ok()
}

/// Makes the next journal of a process; each has changes of its own. Containers that share the folder may have processes
/// of the same number.
fn new_file(folder: &Path, pid: i32) -> Result<(Flock<File>, PathBuf)> {
    const JOURNALS_MAX: u32 = 1024;
    for number in 0..JOURNALS_MAX {
        let path = folder.join(match number {
            0 => format!("{pid}.json"),
            _ => format!("{pid}-{number}.json"),
        });
        let mut options = OpenOptions::new();
        let file = match options
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("can't make {}", path.display()));
            }
        };
        // Until it is locked it looks like a dead instance's, and somebody may have taken it away.
        if let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && is_at(&file, &path)
        {
            return Ok((file, path));
        }
    }
    bail!(
        "{} has {JOURNALS_MAX} journals of process {pid} already: run `fault clean`",
        folder.display()
    )
}

/// Whether the file still has this name.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(named)) => file.ino() == named.ino() && file.dev() == named.dev(),
        _ => false,
    }
}

/// Undoes what dead instances' journals tell of. What can't be undone stays for `fault clean`, which says why.
fn undo_dead(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("can't read {}", folder.display()))? {
        let path = entry?.path();
        if journal_owner(&path).is_some()
            && let Some(dead) = Dead::open(&path)?
        {
            dead.undo(&mut Vec::new());
        }
    }
    Ok(())
}

/// A dead instance's journal, locked so that nobody else undoes it at the same time.
pub(super) struct Dead {
    path: PathBuf,
    pub(super) entries: Vec<Entry>,
    /// Why the journal can't be read.
    broken: Option<String>,
    _lock: Flock<File>,
}

impl Dead {
    /// `None`: there is no such journal, or its owner lives.
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("can't read {} (run as root)", path.display()));
            }
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => {
                return Err(errno).with_context(|| format!("can't lock {}", path.display()));
            }
        };
        let text = fs::read_to_string(path);
        let text = match text {
            Ok(text) => text,
            // Somebody else has just undone it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("can't read {}", path.display()));
            }
        };
        let (entries, broken) = match parse(&text) {
            Ok(entries) => (entries, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        Ok(Some(Self {
            path: path.to_owned(),
            entries,
            broken,
            _lock: lock,
        }))
    }

    pub(super) fn undo(&self, report: &mut Vec<Leftover>) {
        let path = self.path.display().to_string();
        if let Some(why) = &self.broken {
            let why = Fate::Kept(format!("{why}: look into it, then delete it"));
            report.push(Leftover::new("journal", path, why));
            return;
        }
        let before = report.len();
        let entries = self.entries.iter().cloned();
        undo_entries(entries.map(|entry| (entry, Undoing::Dead)), report);
        let all_done = report[before..]
            .iter()
            .all(|leftover| !matches!(leftover.fate, Fate::Kept(_)));
        if !all_done {
            return;
        }
        report.push(match fs::remove_file(&self.path) {
            Ok(()) => Leftover::new("journal", path, Fate::Removed),
            Err(error) => Leftover::kept("journal", path, &error.into()),
        });
    }
}

/// Reads the lines of a journal; a torn last one is a change that was not made.
pub(super) fn parse(text: &str) -> Result<Vec<Entry>> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _torn)| whole);
    let mut lines = whole.lines();
    let Some(header) = lines.next() else {
        return Ok(Vec::new());
    };
    let header: Header = serde_json::from_str(header).context("not a journal of fault")?;
    if header.version != VERSION {
        bail!("a journal of another version of fault ({})", header.version);
    }
    lines
        .map(|line| serde_json::from_str(line).context("a journal line that can't be read"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap() + "\n"
    }

    fn header() -> Header {
        Header {
            version: VERSION,
            owner: ProcessId {
                pid: 1,
                start_ticks: 2,
            },
        }
    }

    fn entry() -> Entry {
        Entry {
            netns: 3,
            change: SystemChange::Sysctl {
                name: "net/ipv4/conf/lo/accept_local".into(),
                before: "0".into(),
                after: "1".into(),
            },
        }
    }

    #[test]
    fn a_journal_reads_as_it_was_written_and_a_torn_line_is_no_change() {
        let text = line(&header()) + &line(&entry()) + &line(&entry());
        assert_eq!(parse(&text).unwrap(), [entry(), entry()]);
        for cut in line(&header()).len()..text.len() {
            let whole = text[..cut].matches('\n').count() - 1;
            assert_eq!(parse(&text[..cut]).unwrap().len(), whole, "cut at {cut}");
        }
        assert_eq!(parse("").unwrap(), []);
        assert!(parse("{\"version\":9,\"owner\":{\"pid\":1,\"start_ticks\":1}}\n").is_err());
        assert!(parse("nonsense\n").is_err());
    }

    #[test]
    fn the_form_of_a_line_is_stable() {
        let expected = "{\"netns\":3,\"change\":\"sysctl\",\
                        \"name\":\"net/ipv4/conf/lo/accept_local\",\"before\":\"0\",\"after\":\"1\"}";
        assert_eq!(serde_json::to_string(&entry()).unwrap(), expected);
    }

    #[test]
    fn a_journal_is_known_by_its_name() {
        assert_eq!(journal_owner(Path::new("/x/12.json")), Some(12));
        assert_eq!(journal_owner(Path::new("/x/12-1.json")), Some(12));
        assert_eq!(journal_owner(Path::new("/x/.12.json.new")), None);
    }
}
