//! What a killed instance leaves, and how the next one takes it away.
//!
//! Most of what `fault` does goes with its process: TCX, XDP, cgroup and `sk_lookup` links, tap
//! devices, open maps. The rest is found again in five ways:
//!
//! - tc filters by their mark, which names the owner ([`super::clsact`]);
//! - links by name: `fault-<pid>` and anything that is no digit behind it;
//! - qdiscs at the root of an interface by their handle ([`super::qdisc::HANDLE`]);
//! - cgroups by name, `fault-<pid>-<n>`, and by the lock on their directory
//!   ([`crate::process::cgroup`]);
//! - everything else (sysctls, qdiscs, moved processes) by a **journal**.
//!
//! # The journal
//! `/run/fault/<pid>.json` (`<pid>-1.json` where there is one already), one JSON value a line: first a [`Header`], then an [`Entry`] for each
//! change, written *before* the change is made. A torn last line is a change that was not made. The
//! owner holds a `flock` on the file from before it has its name until it ends, so a journal that
//! can be locked is a dead instance's, whatever has become of its process number.
//!
//! Undoing is safe at any time: each step looks first whether the thing is still as `fault` left
//! it, and leaves it alone if not.
use super::clsact;
use super::interfaces::{self, Interface};
use super::netlink::Netlink;
use super::qdisc;
use crate::process::cgroup::{self, Hierarchy, Leftovers, NAME_PREFIX};
use crate::process::proc::ProcessId;
use crate::tell::tell;
use anyhow::{Context, Result, bail};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

/// Where journals are kept: a folder that only root can read, gone after a reboot.
pub const STATE_FOLDER: &str = "/run/fault";

/// The version of the journal's form.
const VERSION: u32 = 1;

/// The first line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The form of what follows.
    pub version: u32,
    /// Who made the changes.
    pub owner: ProcessId,
}

/// A change with the network namespace that it was made in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The inode of the network namespace (`/proc/thread-self/ns/net`).
    pub netns: u64,
    /// What was changed.
    #[serde(flatten)]
    pub change: Change,
}

/// Something that outlives its maker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// A file below `/proc/sys`.
    Sysctl {
        /// Relative to `/proc/sys`: `net/ipv4/conf/lo/accept_local`.
        name: String,
        /// What it was, without the newline.
        before: String,
        /// What it is set to.
        after: String,
    },
    /// A clsact qdisc that was not there before.
    Clsact {
        /// On this interface.
        interface_index: u32,
    },
    /// tc filters of ours.
    Filters {
        /// On this interface.
        interface_index: u32,
    },
    /// A qdisc of ours. What was there before it is not put back: the kernel puts its default there.
    Qdisc {
        /// On this interface.
        interface_index: u32,
        /// What it is attached to, `0xFFFF_FFFF` for the root.
        parent: u32,
        /// Its own handle: choose one that nobody else would.
        handle: u32,
        /// `fq`, `netem`, `prio`…
        kind: String,
    },
    /// A link of ours that stays without us (a veth pair, by one end).
    Link {
        /// Its name, which starts with `fault-`.
        name: String,
    },
    /// A process that was moved into a cgroup of ours.
    Moved {
        /// Which.
        process: ProcessId,
        /// The directory of the cgroup that it came from.
        from: PathBuf,
    },
}

/// The journal of this process.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    owner: ProcessId,
    entries: Vec<Entry>,
    healed: bool,
}

impl Journal {
    /// Starts the journal of this process in [`STATE_FOLDER`].
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
        let path = free_path(folder, owner.pid)?;
        let draft = folder.join(format!(".{}.new", owner.pid));
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&draft)
            .with_context(|| format!("can't make {}", draft.display()))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("can't lock {}", draft.display()))?;
        file.set_len(0)
            .with_context(|| format!("can't write {}", draft.display()))?;
        let mut journal = Self {
            file,
            path,
            owner,
            entries: Vec::new(),
            healed: true,
        };
        let version = VERSION;
        journal.append(&Header { version, owner })?;
        // Without replacing one, whoever made it.
        fs::hard_link(&draft, &journal.path)
            .with_context(|| format!("can't make {}", journal.path.display()))?;
        fs::remove_file(&draft).with_context(|| format!("can't remove {}", draft.display()))?;
        journal.healed = false;
        Ok(journal)
    }

    /// Notes a change in the calling thread's network namespace. Call it *before* making it.
    ///
    /// # Errors
    /// When it can't be written; then don't make the change.
    pub fn record(&mut self, change: Change) -> Result<()> {
        let netns = current_netns()?;
        let entry = Entry { netns, change };
        self.append(&entry)?;
        self.entries.push(entry);
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
    pub fn heal(mut self) -> Vec<Leftover> {
        self.undo_all()
    }

    fn undo_all(&mut self) -> Vec<Leftover> {
        self.healed = true;
        let mut report = Vec::new();
        undo_entries(self.owner.pid, &self.entries, &mut report);
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
        if self.healed {
            return;
        }
        for leftover in self.undo_all() {
            tell!("fault: {leftover}; `fault clean` tries again");
        }
    }
}

/// What has become of something that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It is there; nothing was done ([`find`]).
    Found,
    /// It is gone, or is as it was before.
    Removed,
    /// It could not be removed: why.
    Kept(String),
}

/// One thing that a dead instance had left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// `filter`, `link`, `cgroup`, `sysctl`, `qdisc`, `process`, `journal`.
    pub kind: &'static str,
    /// Which one, for people.
    pub what: String,
    /// What was done about it.
    pub fate: Fate,
}

impl Leftover {
    fn new(kind: &'static str, what: String, fate: Fate) -> Self {
        Self { kind, what, fate }
    }

    fn kept(kind: &'static str, what: String, error: &anyhow::Error) -> Self {
        Self::new(kind, what, Fate::Kept(format!("{error:#}")))
    }
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: ", self.kind, self.what)?;
        match &self.fate {
            Fate::Found => f.write_str("left by an instance that is gone"),
            Fate::Removed => f.write_str("removed"),
            Fate::Kept(why) => write!(f, "not removed: {why}"),
        }
    }
}

/// Where leftovers are looked for; filters and links always in the calling thread's network
/// namespace.
#[derive(Debug, Clone)]
pub struct Places {
    /// The folder of the journals.
    pub state_folder: PathBuf,
    /// The cgroups; `None` where there is no cgroup2.
    pub hierarchy: Option<Hierarchy>,
}

impl Places {
    /// This machine's.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self {
            state_folder: STATE_FOLDER.into(),
            // No cgroup2, no cgroups of ours.
            hierarchy: Hierarchy::find().ok(),
        }
    }
}

/// Lists what dead instances have left, and changes nothing.
///
/// # Errors
/// When a place can't be read at all.
pub fn find(places: &Places) -> Result<Vec<Leftover>> {
    sweep(places, false)
}

/// Removes what dead instances have left. Safe at any time: what a live instance owns is not
/// touched, and neither is anything that `fault` did not make.
///
/// # Errors
/// When a place can't be read at all. What was found but can't be removed is in the list.
pub fn clean(places: &Places) -> Result<Vec<Leftover>> {
    sweep(places, true)
}

fn sweep(places: &Places, remove: bool) -> Result<Vec<Leftover>> {
    let mut report = Vec::new();
    let all = interfaces::list()?;
    // Before the journals, since a qdisc is in its owner's before it is there.
    let roots = our_roots(&all)?;
    let owners = Owners::read(&places.state_folder)?;
    for interface in &all {
        sweep_filters(interface, &owners, remove, &mut report)?;
    }
    // After the filters, since a clsact qdisc goes only when it is empty; before the cgroups, since
    // processes go back to where they came from.
    for dead in &owners.dead {
        if remove {
            dead.undo(&mut report);
        } else {
            report.extend(dead.entries.iter().map(|entry| {
                Leftover::new(entry.change.kind(), entry.change.describe(), Fate::Found)
            }));
        }
    }
    for (interface, root) in roots {
        if !owners.tell_of_qdisc(interface.index)? {
            let what = format!("{} on {}", root.kind, interface.name);
            report.push(settle("qdisc", what, remove, || {
                clsact::remove_qdisc(interface.index, root.parent, root.handle, &root.kind)
                    .map(drop)
            }));
        }
    }
    for interface in &all {
        sweep_link(interface, &owners, remove, &mut report);
    }
    if let Some(hierarchy) = &places.hierarchy {
        sweep_cgroups(hierarchy.path(), remove, &mut report)?;
    }
    Ok(report)
}

/// The qdiscs at the roots of interfaces that have our handle.
fn our_roots(all: &[Interface]) -> Result<Vec<(&Interface, clsact::Qdisc)>> {
    let mut roots = Vec::new();
    for interface in all {
        let root = qdisc::root_of(interface.index)?;
        roots.extend(
            root.filter(|root| root.handle == qdisc::HANDLE)
                .map(|root| (interface, root)),
        );
    }
    Ok(roots)
}

/// Removes the filters on an interface whose owner is gone.
fn sweep_filters(
    interface: &Interface,
    owners: &Owners,
    remove: bool,
    report: &mut Vec<Leftover>,
) -> Result<()> {
    let filters = match clsact::filters(interface.index) {
        Ok(filters) => filters,
        // The interface has gone meanwhile, and its filters with it.
        Err(error) if has_errno(&error, Errno::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    for filter in filters {
        let Some(owner) = filter.owner() else {
            continue;
        };
        if owners.is_live(owner)? {
            continue;
        }
        let name = filter.program_name.as_deref().unwrap_or_default();
        let direction = filter.direction;
        let what = format!(
            "{name} on {} {direction:?} of process {owner}",
            interface.name
        );
        report.push(settle("filter", what, remove, || {
            clsact::remove(&filter).map(drop)
        }));
    }
    Ok(())
}

/// Removes an interface that is ours by its name if its owner is gone.
fn sweep_link(interface: &Interface, owners: &Owners, remove: bool, report: &mut Vec<Leftover>) {
    let Some(owner) = link_owner(interface) else {
        return;
    };
    match owners.is_live(owner) {
        Ok(true) => {}
        Ok(false) => report.push(settle("link", interface.name.clone(), remove, || {
            remove_link(interface).map(drop)
        })),
        Err(error) => report.push(Leftover::kept("link", interface.name.clone(), &error)),
    }
}

fn settle(
    kind: &'static str,
    what: String,
    remove: bool,
    removal: impl FnOnce() -> Result<()>,
) -> Leftover {
    if !remove {
        return Leftover::new(kind, what, Fate::Found);
    }
    match removal() {
        Ok(()) => Leftover::new(kind, what, Fate::Removed),
        Err(error) => Leftover::kept(kind, what, &error),
    }
}

/// The process that a link of ours belongs to: `fault-<pid>`, and no digit behind it.
fn link_owner(interface: &Interface) -> Option<i32> {
    if !matches!(interface.kind.as_deref(), Some("ifb" | "tun" | "veth")) {
        return None;
    }
    let rest = interface.name.strip_prefix(NAME_PREFIX)?;
    let digits = rest.find(|character: char| !character.is_ascii_digit());
    rest[..digits.unwrap_or(rest.len())].parse().ok()
}

/// `false`: it was gone already.
fn remove_link(interface: &Interface) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.header.index = interface.index;
    let request = RouteNetlinkMessage::DelLink(message);
    match Netlink::route()?.change(request, 0) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("can't remove {}", interface.name)),
    }
}

/// Removes the cgroups of ours below `folder` whose owner is gone; what runs in them lives on in
/// the cgroup above.
fn sweep_cgroups(folder: &Path, remove: bool, report: &mut Vec<Leftover>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("can't read {}", folder.display()));
        }
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("can't read {}", folder.display()))?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        // What is inside of a live one may be a nested instance's that has died.
        sweep_cgroups(&path, remove, report)?;
        if !entry.file_name().to_str().is_some_and(is_cgroup_name) {
            continue;
        }
        let Some(_lock) = cgroup::lock(&path)? else {
            continue;
        };
        report.push(settle("cgroup", path.display().to_string(), remove, || {
            let finished = cgroup::give_up(&path, Leftovers::Release)?;
            if finished.kept.is_some() {
                bail!("processes run in a cgroup that was made inside it");
            }
            Ok(())
        }));
    }
    Ok(())
}

/// `fault-<pid>-<n>`.
fn is_cgroup_name(name: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_prefix(NAME_PREFIX)
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(pid, number)| is_number(pid) && is_number(number))
}

/// Which instances live and which are gone, as their journals tell.
struct Owners {
    live: HashSet<i32>,
    dead: Vec<Dead>,
    /// What live ones have changed.
    entries: Vec<Entry>,
    /// Every live one's journal can be read.
    all_told: bool,
}

impl Owners {
    fn read(folder: &Path) -> Result<Self> {
        let mut owners = Self {
            live: HashSet::new(),
            dead: Vec::new(),
            entries: Vec::new(),
            all_told: true,
        };
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(owners),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("can't read {} (run with sudo)", folder.display()));
            }
        };
        for entry in entries {
            let path = entry
                .with_context(|| format!("can't read {}", folder.display()))?
                .path();
            let Some(pid) = journal_owner(&path) else {
                continue;
            };
            if let Some(dead) = Dead::open(&path)? {
                owners.dead.push(dead);
                continue;
            }
            owners.live.insert(pid);
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // It has ended just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("can't read {}", path.display()));
                }
            };
            match parse(&text) {
                Ok(entries) => owners.entries.extend(entries),
                Err(_another_version) => owners.all_told = false,
            }
        }
        Ok(owners)
    }

    /// Whether a journal tells of a qdisc of ours on this interface, or may do: rather leave a thing than break one.
    fn tell_of_qdisc(&self, interface: u32) -> Result<bool> {
        if !self.all_told {
            return Ok(true);
        }
        let here = current_netns()?;
        let of_dead = self.dead.iter().flat_map(|dead| &dead.entries);
        Ok(self.entries.iter().chain(of_dead).any(|entry| {
            matches!(entry.change, Change::Qdisc { interface_index, .. } if interface_index == interface)
                && entry.netns == here
        }))
    }

    /// Without a journal any process of that number counts: rather leave a thing than break one.
    fn is_live(&self, pid: i32) -> Result<bool> {
        if self.live.contains(&pid) {
            return Ok(true);
        }
        if self.dead.iter().any(|dead| dead.pid == pid) {
            return Ok(false);
        }
        Ok(ProcessId::of(Pid::from_raw(pid))?.is_some())
    }
}

/// The number in `<pid>.json` or `<pid>-<n>.json`.
fn journal_owner(path: &Path) -> Option<i32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json")?;
    let pid = name.split_once('-').map_or(name, |(pid, _)| pid);
    pid.parse().ok()
}

/// Where the next journal of a process goes; each has changes of its own.
fn free_path(folder: &Path, pid: i32) -> Result<PathBuf> {
    const JOURNALS_MAX: u32 = 8;
    for number in 0..JOURNALS_MAX {
        let path = folder.join(match number {
            0 => format!("{pid}.json"),
            _ => format!("{pid}-{number}.json"),
        });
        // A dead process of our number may have left one, and what it tells must be undone first.
        if let Some(dead) = Dead::open(&path)? {
            dead.undo(&mut Vec::new());
        }
        if !path.exists() {
            return Ok(path);
        }
    }
    bail!(
        "this process has {JOURNALS_MAX} journals in {} already: run `fault clean`",
        folder.display()
    )
}

/// A dead instance's journal, locked so that nobody else undoes it at the same time.
struct Dead {
    path: PathBuf,
    pid: i32,
    entries: Vec<Entry>,
    /// Why the journal can't be read.
    broken: Option<String>,
    _lock: Flock<File>,
}

impl Dead {
    /// `None`: there is no such journal, or its owner lives.
    fn open(path: &Path) -> Result<Option<Self>> {
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
            pid: journal_owner(path).context("a journal has its owner's number as its name")?,
            entries,
            broken,
            _lock: lock,
        }))
    }

    fn undo(&self, report: &mut Vec<Leftover>) {
        let path = self.path.display().to_string();
        if let Some(why) = &self.broken {
            let why = Fate::Kept(format!("{why}: look into it, then delete it"));
            report.push(Leftover::new("journal", path, why));
            return;
        }
        let before = report.len();
        undo_entries(self.pid, &self.entries, report);
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
fn parse(text: &str) -> Result<Vec<Entry>> {
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

/// Undoes changes of the process `owner`, the last one first.
fn undo_entries(owner: i32, entries: &[Entry], report: &mut Vec<Leftover>) {
    for entry in entries.iter().rev() {
        let undone = if entry.change.is_in_netns() {
            in_netns(entry.netns, || entry.change.undo(owner))
        } else {
            entry.change.undo(owner)
        };
        let (kind, what) = (entry.change.kind(), entry.change.describe());
        match undone {
            Ok(true) => report.push(Leftover::new(kind, what, Fate::Removed)),
            Ok(false) => {}
            Err(error) => report.push(Leftover::kept(kind, what, &error)),
        }
    }
}

impl Change {
    fn kind(&self) -> &'static str {
        match self {
            Self::Sysctl { .. } => "sysctl",
            Self::Clsact { .. } | Self::Qdisc { .. } => "qdisc",
            Self::Filters { .. } => "filter",
            Self::Link { .. } => "link",
            Self::Moved { .. } => "process",
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Sysctl { name, before, .. } => format!("{name} (was {before})"),
            Self::Clsact { interface_index } => format!("clsact on interface {interface_index}"),
            Self::Filters { interface_index } => format!("on interface {interface_index}"),
            Self::Qdisc {
                interface_index,
                kind,
                ..
            } => format!("{kind} on interface {interface_index}"),
            Self::Link { name } => name.clone(),
            Self::Moved { process, from } => format!("{} from {}", process.pid, from.display()),
        }
    }

    /// It happened in one network namespace and can be undone only there.
    fn is_in_netns(&self) -> bool {
        match self {
            Self::Sysctl { name, .. } => name.starts_with("net/"),
            Self::Moved { .. } => false,
            _ => true,
        }
    }

    /// `false`: there was nothing to undo any more.
    fn undo(&self, owner: i32) -> Result<bool> {
        match self {
            Self::Sysctl {
                name,
                before,
                after,
            } => undo_sysctl(name, before, after),
            Self::Clsact { interface_index } => clsact::remove_if_unused(*interface_index),
            Self::Filters { interface_index } => {
                let removed = clsact::remove_of(*interface_index, owner)?;
                Ok(removed > 0)
            }
            Self::Qdisc {
                interface_index,
                parent,
                handle,
                kind,
            } => clsact::remove_qdisc(*interface_index, *parent, *handle, kind),
            Self::Link { name } => {
                let all = interfaces::list()?;
                let found = all.iter().find(|interface| interface.name == *name);
                match found {
                    Some(interface) if link_owner(interface).is_some() => remove_link(interface),
                    _ => Ok(false),
                }
            }
            Self::Moved { process, from } => undo_move(*process, from),
        }
    }
}

/// Writes the old value back if the new one is still there.
fn undo_sysctl(name: &str, before: &str, after: &str) -> Result<bool> {
    let relative = Path::new(name);
    let is_plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !is_plain {
        bail!("`{name}` is not below /proc/sys");
    }
    let path = Path::new("/proc/sys").join(relative);
    let now = match fs::read_to_string(&path) {
        Ok(now) => now,
        // Its interface is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
    };
    if now.trim_end() != after || before == after {
        return Ok(false);
    }
    fs::write(&path, before).with_context(|| format!("can't write {}", path.display()))?;
    Ok(true)
}

/// Moves a process back, if it is still in a cgroup of ours. Where its own cgroup is gone, it stays
/// until ours goes, and then ends up above.
fn undo_move(process: ProcessId, from: &Path) -> Result<bool> {
    if !process.is_alive()? || !from.exists() {
        return Ok(false);
    }
    let pid = Pid::from_raw(process.pid);
    let Ok(hierarchy) = Hierarchy::find() else {
        return Ok(false);
    };
    let now = hierarchy.of(pid)?;
    let is_in_ours = now
        .path()
        .iter()
        .any(|name| name.to_str().is_some_and(is_cgroup_name));
    if !is_in_ours {
        return Ok(false);
    }
    cgroup::move_process(pid, from)
}

/// The inode of the calling thread's network namespace.
fn current_netns() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    let metadata = fs::metadata(path).with_context(|| format!("can't read {path}: mount /proc"))?;
    Ok(metadata.ino())
}

/// Runs `undo` inside a network namespace. `false` when that is gone: so is what was changed in it.
fn in_netns(inode: u64, undo: impl FnOnce() -> Result<bool> + Send) -> Result<bool> {
    if current_netns()? == inode {
        return undo();
    }
    let Some(namespace) = find_netns(inode)? else {
        return Ok(false);
    };
    // A thread of its own, since there may be no way back into this one's namespace.
    std::thread::scope(|scope| {
        let entered = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .context("can't enter the network namespace (needs CAP_SYS_ADMIN)")?;
            undo()
        });
        entered
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Finds a network namespace by its inode: of a process, or one that `ip netns` or Docker keeps.
fn find_netns(inode: u64) -> Result<Option<File>> {
    let mut candidates = Vec::new();
    for process in fs::read_dir("/proc").context("can't list /proc")? {
        candidates.push(process.context("can't list /proc")?.path().join("ns/net"));
    }
    for folder in ["/run/netns", "/run/docker/netns"] {
        match fs::read_dir(folder) {
            Ok(kept) => candidates.extend(kept.flatten().map(|entry| entry.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("can't list {folder}")),
        }
    }
    // A process that has ended, or has no namespace any more, is not the one.
    candidates.retain(|path| fs::metadata(path).is_ok_and(|found| found.ino() == inode));
    for path in candidates {
        match File::open(&path) {
            Ok(namespace) => return Ok(Some(namespace)),
            // Its process has ended just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("can't open {}", path.display()));
            }
        }
    }
    Ok(None)
}

fn has_errno(error: &anyhow::Error, errno: Errno) -> bool {
    error
        .root_cause()
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.raw_os_error() == Some(errno as i32))
}

#[cfg(test)]
mod tests {
    use super::super::netlink::in_own_netns;
    use super::*;
    use std::os::fd::AsFd;

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
            change: Change::Sysctl {
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
    fn a_path_out_of_proc_sys_is_refused() {
        for name in ["../../etc/passwd", "/etc/passwd", "net/../../self/comm"] {
            assert!(undo_sysctl(name, "x", "y").is_err(), "{name}");
        }
    }

    #[test]
    fn only_names_of_our_form_are_ours() {
        assert!(is_cgroup_name("fault-12-0"));
        for other in [
            "fault-12",
            "fault--1",
            "fault-a-1",
            "fault-1-",
            "default-1-2",
            "fault-1-2-3",
        ] {
            assert!(!is_cgroup_name(other), "{other}");
        }
        assert_eq!(journal_owner(Path::new("/x/12.json")), Some(12));
        assert_eq!(journal_owner(Path::new("/x/12-1.json")), Some(12));
        assert_eq!(journal_owner(Path::new("/x/.12.json.new")), None);
    }

    /// A number that no process has.
    fn dead_pid() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn a_dead_owners_filters_and_clsact_go_and_all_others_stay() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            let program = crate::doctor::bpf::load(3, 0, -1).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let (dead, alive) = (dead_pid(), std::process::id());
            let owner = ProcessId {
                pid: dead.cast_signed(),
                start_ticks: 1,
            };
            let netns = current_netns().unwrap();
            let clsact = Change::Clsact {
                interface_index: lo,
            };
            let entry = Entry {
                netns,
                change: clsact,
            };
            let version = VERSION;
            let journal = line(&Header { version, owner }) + &line(&entry);
            fs::write(folder.path().join(format!("{dead}.json")), journal).unwrap();
            let places = Places {
                state_folder: folder.path().into(),
                hierarchy: None,
            };

            assert!(clsact::ensure(lo).unwrap() && !clsact::ensure(lo).unwrap());
            let direction = clsact::Direction::Egress;
            for owner in [dead, alive] {
                clsact::attach(lo, direction, program.as_fd(), "fault_egress", owner).unwrap();
            }
            let found = find(&places).unwrap();
            assert_eq!(found.len(), 2, "{found:?}");
            assert!(found.iter().all(|leftover| leftover.fate == Fate::Found));
            assert_eq!(
                clsact::filters(lo).unwrap().len(),
                2,
                "find changes nothing"
            );

            // The live one's filter keeps the clsact qdisc in place.
            clean(&places).unwrap();
            let left = clsact::filters(lo).unwrap();
            assert_eq!(left.len(), 1);
            assert_eq!(left[0].owner(), Some(alive.cast_signed()));
            assert_eq!(find(&places).unwrap(), []);
            assert!(clsact::remove(&left[0]).unwrap() && !clsact::remove(&left[0]).unwrap());
            assert!(clsact::remove_if_unused(lo).unwrap());
            assert!(!clsact::remove_if_unused(lo).unwrap());
        });
    }

    #[test]
    fn a_qdisc_stays_while_an_instance_of_another_version_lives() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            let folder = tempfile::tempdir().unwrap();
            let journal = folder.path().join(format!("{}.json", std::process::id()));
            let places = Places {
                state_folder: folder.path().into(),
                hierarchy: None,
            };
            fs::write(&journal, "{\"version\":9}\n").unwrap();
            let file = File::open(&journal).unwrap();
            let alive = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
            tc("qdisc add dev lo root handle fa17: pfifo");
            assert_eq!(clean(&places).unwrap(), []);
            assert!(qdisc::root_of(lo).unwrap().is_some());
            drop(alive);
            fs::remove_file(journal).unwrap();
            assert_eq!(clean(&places).unwrap().len(), 1);
            assert_eq!(qdisc::root_of(lo).unwrap(), None);
        });
    }

    #[test]
    fn a_clsact_with_a_foreign_filter_stays_and_a_foreign_ingress_is_an_error() {
        in_own_netns(|| {
            let lo = interfaces::list().unwrap()[0].index;
            clsact::ensure(lo).unwrap();
            // A classic BPF program of one instruction: present in every kernel that has cls_bpf.
            tc("filter add dev lo ingress pref 7 bpf bytecode 1,6_0_0_0 classid 1:1");
            assert!(!clsact::remove_if_unused(lo).unwrap());
            let foreign = clsact::filters(lo).unwrap();
            assert_eq!((foreign.len(), foreign[0].owner()), (1, None));
            tc("filter del dev lo ingress pref 7");
            assert!(clsact::remove_if_unused(lo).unwrap());
            tc("qdisc add dev lo ingress");
            let error = clsact::ensure(lo).unwrap_err();
            assert!(error.to_string().contains("ingress qdisc"), "{error}");
            assert!(!clsact::remove_if_unused(lo).unwrap());
        });
    }

    fn tc(arguments: &str) {
        let status = std::process::Command::new("tc")
            .args(arguments.split(' ').map(|word| word.replace('_', " ")))
            .status()
            .unwrap();
        assert!(status.success(), "tc {arguments}");
    }
}
