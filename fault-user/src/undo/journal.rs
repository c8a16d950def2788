//! The journal of changes that outlive this process, for a later instance to undo.
//!
//! The file is `/run/fault/<pid>.json` (or `<pid>-1.json` if that exists), with one JSON value per line: a [`Header`],
//! then a [`JournalEntry`] for each change, written *before* the change is made. A truncated last line is a change that was
//! not made. The owner holds a `flock` on the file until it ends. So a journal that can be locked belongs to a dead
//! instance, even if its process id was reused.

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
use crate::undo::change::{JournalEntry, SystemChange, Undoing, undo_entries};
use crate::undo::instance::{SettingShare, current_netns};
use crate::undo::leftover::{Fate, Leftover};

/// The folder of journals. Only root can read it, and a reboot clears it.
pub const STATE_FOLDER: &str = "/run/fault";

/// The version of the journal's format.
pub(super) const VERSION: u32 = 1;

/// The first line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The version of the format.
    pub version: u32,
    /// The process that made the changes.
    pub owner: ProcessId,
}

/// The journal of this process.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    entries: Vec<(JournalEntry, Undoing)>,
    is_undone: bool,
}

impl Journal {
    /// Starts the journal of this process in [`STATE_FOLDER`], after undoing the journals of dead instances there.
    ///
    /// # Errors
    /// The folder can't be written to.
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
            .with_context(|| format!("can't create {} (run as root)", folder.display()))?;
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

    /// Records a change in the calling thread's network namespace. Must be called *before* making the change.
    ///
    /// # Errors
    /// The journal can't be written to; then the change must not be made.
    pub fn record(&mut self, change: SystemChange) -> Result<()> {
        self.record_share(change, None)
    }

    /// As [`Self::record`], for a setting that instances share: the last holder undoes it.
    ///
    /// # Errors
    /// As [`Self::record`].
    pub fn record_share(
        &mut self,
        change: SystemChange,
        share: Option<SettingShare>,
    ) -> Result<()> {
        let netns = current_netns()?;
        let entry = JournalEntry { netns, change };
        self.append(&entry)?;
        self.entries.push((entry, Undoing::Own(share)));
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut bytes = serde_json::to_vec(line).context("can't write a journal line")?;
        bytes.push(b'\n');
        // A single write: a line may be truncated, but never mixed with another.
        self.file
            .write_all(&bytes)
            .with_context(|| format!("can't write {}", self.path.display()))
    }

    /// Undoes everything, last change first, and removes the journal. Dropping it does the same.
    /// Returns what could not be undone; then the journal stays for `fault clean`.
    #[must_use = "report the changes that could not be undone"]
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
            tell!("fault: warning: {leftover}; run `fault clean` to try again");
        }
    }
}

/// The number in `<pid>.json` or `<pid>-<n>.json`.
pub(super) fn journal_owner(path: &Path) -> Option<i32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json")?;
    let pid = name.split_once('-').map_or(name, |(pid, _)| pid);
    pid.parse().ok()
}

/// Creates the next journal of a process. Containers that share the folder may have processes with the same id.
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
                return Err(error).with_context(|| format!("can't create {}", path.display()));
            }
        };
        // Until it is locked it looks like that of a dead instance, and another instance may have removed it.
        if let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && is_at(&file, &path)
        {
            return Ok((file, path));
        }
    }
    bail!(
        "{} already has {JOURNALS_MAX} journals of process {pid}: run `fault clean`",
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

/// Undoes the journals of dead instances. Changes that can't be undone stay for `fault clean`, which reports the
/// reason.
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

/// The journal of a dead instance, locked against concurrent undoing.
pub(super) struct Dead {
    path: PathBuf,
    pub(super) entries: Vec<JournalEntry>,
    /// Why the journal can't be read.
    broken: Option<String>,
    _lock: Flock<File>,
}

impl Dead {
    /// Opens and locks a journal. `None` if it does not exist or its owner is running.
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
            // Another instance has just undone it.
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
            let why = Fate::Kept(format!("{why}: inspect it, then delete it"));
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

/// Parses a journal. A truncated last line is a change that was not made.
pub(super) fn parse(text: &str) -> Result<Vec<JournalEntry>> {
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
        .map(|line| serde_json::from_str(line).context("a journal line is malformed"))
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

    fn entry() -> JournalEntry {
        JournalEntry {
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
