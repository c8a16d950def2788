//! `--pid` for real: which cgroup, moving a tree and back, its sockets; and `fault clean`.
//!
//! Needs root and a writable cgroup2; says so and skips where there is none.

use crate::support::place::{enter_fresh, hierarchy, ip};
use fault_user::session::tree::ProcessTree;
use fault_user::sys::net::interfaces;
use fault_user::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers, move_process};
use fault_user::sys::process::command::CommandSpec;
use fault_user::sys::process::proc::ProcessId;
use fault_user::sys::process::sockets;
use fault_user::sys::process::sockets::{TcpState, Transport};
use fault_user::undo::change::SystemChange;
use fault_user::undo::instance::Instance;
use fault_user::undo::journal::Journal;
use fault_user::undo::leftover::{Fate, Leftover};
use fault_user::undo::leftovers::{LeftoverPlaces, clean, find};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// A shell with a child of its own.
struct Tree {
    shell: Child,
    child: Pid,
}

impl Tree {
    fn start() -> Self {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 1000 >/dev/null & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(shell.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        let child = Pid::from_raw(line.trim().parse().unwrap());
        Self { shell, child }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.shell.id().cast_signed())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        kill(self.child, Signal::SIGKILL).unwrap();
        self.shell.wait().unwrap();
    }
}

/// A folder for journals and a cgroup for the test's own processes, both removed at the end.
struct Place {
    hierarchy: Hierarchy,
    state: TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        Some(Self {
            hierarchy: hierarchy()?,
            state: TempDir::new().unwrap(),
        })
    }

    fn journal(&self) -> Journal {
        Journal::create_in(self.state.path()).unwrap()
    }

    /// Without the machine's cgroups: other tests make and break theirs at the same time.
    fn places(&self) -> LeftoverPlaces {
        LeftoverPlaces {
            state_folder: self.state.path().to_owned(),
            hierarchy: None,
        }
    }

    fn path_of(&self, pid: Pid) -> PathBuf {
        self.hierarchy.of(pid).unwrap().path().to_owned()
    }
}

#[test]
fn a_tree_that_shares_its_cgroup_is_moved_and_moved_back() {
    let Some(place) = Place::new() else { return };
    let before = place.path_of(Pid::this());
    let apart = Folder::create(before.join(format!("test-apart-{}", Pid::this())));
    let tree = Tree::start();
    assert!(move_process(tree.child, &apart.0).unwrap());
    let mut journal = place.journal();
    let aim = ProcessTree::at(&place.hierarchy, tree.pid(), &mut journal).unwrap();
    assert!(aim.is_moved());
    let fresh = aim.cgroup().path().to_owned();
    for pid in [tree.pid(), tree.child] {
        assert_eq!(place.hierarchy.of(pid).unwrap(), *aim.cgroup());
    }
    assert_eq!(place.path_of(Pid::this()), before, "fault itself stays");
    drop(aim);
    assert!(!fresh.exists());
    assert_eq!(place.path_of(tree.pid()), before);
    assert_eq!(place.path_of(tree.child), apart.0);
    assert!(move_process(tree.child, &before).unwrap());
    assert_eq!(journal.undo(), []);
    assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
}

#[test]
fn a_tree_with_a_cgroup_of_its_own_stays_in_it() {
    let Some(place) = Place::new() else { return };
    let before = place.path_of(Pid::this());
    let folder = Folder::create(before.join(format!("test-own-{}", Pid::this())));
    let own = place.hierarchy.open(&folder.0).unwrap();
    let tree = Tree::start();
    for pid in [tree.pid(), tree.child] {
        assert!(move_process(pid, own.path()).unwrap());
    }
    let mut journal = place.journal();
    let aim = ProcessTree::at(&place.hierarchy, tree.pid(), &mut journal).unwrap();
    assert!(!aim.is_moved());
    assert_eq!(*aim.cgroup(), own);
    drop(aim);
    // A stranger in there: it is no longer only the tree's.
    let stranger = Tree::start();
    assert!(move_process(stranger.child, own.path()).unwrap());
    let aim = ProcessTree::at(&place.hierarchy, tree.pid(), &mut journal).unwrap();
    assert!(aim.is_moved());
    assert_eq!(aim.cgroup().level(), own.level() + 1);
    assert_eq!(place.path_of(stranger.child), own.path());
    drop(aim);
    assert_eq!(place.path_of(tree.child), own.path());
    drop(journal);
}

#[test]
fn of_two_instances_on_one_tree_either_may_end_first() {
    let Some(place) = Place::new() else { return };
    let _alone = alone();
    let before = place.path_of(Pid::this());
    let tree = Tree::start();
    let mut journals = [place.journal(), place.journal()];
    for first_ends_first in [true, false] {
        let [one, other] = &mut journals;
        let first = ProcessTree::at(&place.hierarchy, tree.pid(), one).unwrap();
        let second = ProcessTree::at(&place.hierarchy, tree.pid(), other).unwrap();
        let [outer, inner] = [&first, &second].map(|tree| tree.cgroup().path().to_owned());
        assert!(inner.starts_with(&outer) && inner != outer);
        let stays = if first_ends_first {
            drop(first);
            clean(&place.places()).unwrap();
            second
        } else {
            drop(second);
            first
        };
        for pid in [tree.pid(), tree.child] {
            assert_eq!(place.path_of(pid), stays.cgroup().path());
        }
        drop(stays);
        for pid in [tree.pid(), tree.child] {
            assert_eq!(place.path_of(pid), before);
        }
        assert!(!outer.exists());
    }
    for journal in journals {
        assert_eq!(journal.undo(), []);
    }
    assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
}

#[test]
fn fault_itself_and_missing_processes_are_rejected_as_targets() {
    let Some(place) = Place::new() else { return };
    let mut journal = place.journal();
    for pid in [Pid::from_raw(i32::MAX), Pid::this()] {
        assert!(ProcessTree::at(&place.hierarchy, pid, &mut journal).is_err());
    }
}

/// What looks like a dead instance's cgroup is cleaned by whichever test comes first.
static DEAD_CGROUPS: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    DEAD_CGROUPS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn clean_puts_a_dead_instances_tree_back() {
    let Some(place) = Place::new() else { return };
    let _alone = alone();
    let tree = Tree::start();
    let before = place.path_of(tree.pid());
    // As a dead instance leaves it: the cgroup without its lock, the journal without its owner.
    let dead = dead_pid();
    let folder = Folder::create(before.join(format!("fault-{dead}-0")));
    let process = ProcessId::of(tree.pid()).unwrap().unwrap();
    assert!(move_process(tree.pid(), &folder.0).unwrap());
    let elsewhere = Folder::create(before.join(format!("test-{}", tree.pid())));
    let moved = SystemChange::Moved {
        process,
        from: elsewhere.0.clone(),
    };
    leave_journal(&place, dead, &moved);
    let report = clean(&place.places()).unwrap();
    assert_eq!(place.path_of(tree.pid()), elsewhere.0);
    assert!(
        report.iter().all(|left| left.fate == Fate::Removed),
        "{report:?}"
    );
    assert_eq!(report.len(), 2, "{report:?}");
    assert_eq!(find(&place.places()).unwrap(), []);
    assert!(move_process(tree.pid(), &before).unwrap());
}

/// The journal of a process that is gone, with one change.
fn leave_journal(place: &Place, dead: u32, change: &SystemChange) {
    let netns =
        std::os::unix::fs::MetadataExt::ino(&fs::metadata("/proc/thread-self/ns/net").unwrap());
    let mut entry = serde_json::to_value(change).unwrap();
    entry["netns"] = netns.into();
    let text = format!(
        "{{\"version\":1,\"owner\":{{\"pid\":{dead},\"start_ticks\":1}}}}\n{entry}\n{{\"torn"
    );
    fs::write(place.state.path().join(format!("{dead}.json")), text).unwrap();
}

/// A cgroup that a failing test doesn't leave behind.
struct Folder(PathBuf);

impl Folder {
    fn create(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Gone already where the test is that it goes.
        if self.0.exists() {
            fs::remove_dir(&self.0).unwrap();
        }
    }
}

fn dead_pid() -> u32 {
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

#[test]
fn clean_removes_a_dead_instances_cgroups_and_no_live_ones() {
    let Some(place) = Place::new() else { return };
    let _alone = alone();
    let live = CommandCgroup::create(&place.hierarchy, Leftovers::Release).unwrap();
    let parent = live.cgroup().path().parent().unwrap();
    let dead = Folder::create(parent.join(format!("fault-{}-0", dead_pid())));
    let foreign = Folder::create(parent.join(format!("fault-like-{}", Pid::this())));
    let tree = Tree::start();
    assert!(move_process(tree.child, &dead.0).unwrap());
    let places = LeftoverPlaces {
        hierarchy: Some(place.hierarchy.clone()),
        ..place.places()
    };
    let is_found = |path: &PathBuf| {
        let all = find(&places).unwrap();
        all.iter()
            .any(|left| left.what == path.display().to_string())
    };
    assert!(is_found(&dead.0));
    assert!(!is_found(&foreign.0) && !is_found(&live.cgroup().path().to_owned()));
    clean(&places).unwrap();
    assert!(!dead.0.exists() && foreign.0.exists() && live.cgroup().path().exists());
    assert_eq!(place.path_of(tree.child), parent, "its process lives on");
}

/// Set for [`stand_in`]: the folder of its journal.
const STATE: &str = "FAULT_TEST_STATE";

/// Not a test of its own: an instance with a journal, a cgroup and a command, to be killed.
#[tokio::test]
async fn stand_in() {
    let Some(state) = std::env::var_os(STATE) else {
        return;
    };
    let mut journal = Journal::create_in(state.as_ref()).unwrap();
    let link = SystemChange::Link {
        name: "fault-5".to_owned(),
    };
    journal.record(link).unwrap();
    let hierarchy = Hierarchy::find().unwrap();
    let cgroup = CommandCgroup::create(&hierarchy, Leftovers::Release).unwrap();
    let words = ["sh", "-c", "echo pid $$; exec sleep 1000"];
    let spec = CommandSpec::new(words.map(Into::into).to_vec(), None).unwrap();
    let mut running = spec.resolve().unwrap().spawn(Some(&cgroup)).unwrap();
    running.wait().await.unwrap();
}

#[test]
fn after_kill_9_clean_leaves_nothing_but_the_running_command() {
    let Some(place) = Place::new() else { return };
    let _alone = alone();
    let stand_in = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "tree::stand_in",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(STATE, place.state.path())
        .stdout(Stdio::piped())
        .spawn();
    let mut stand_in = KillOnDrop(stand_in.unwrap());
    let said = BufReader::new(stand_in.0.stdout.take().unwrap());
    let mut lines = said.lines().map(|line| line.unwrap());
    let pid = lines.find_map(|line| line.split_once("pid ")?.1.parse().ok());
    let command = Pid::from_raw(pid.expect("the command says its number"));
    let survivor = Survivor(command);
    let folder = place.path_of(command);
    let places = LeftoverPlaces {
        hierarchy: Some(place.hierarchy.clone()),
        ..place.places()
    };
    let is_ours = |all: &[Leftover]| {
        let folder = folder.display().to_string();
        all.iter()
            .any(|left| left.what == folder || left.kind == "journal")
    };
    assert!(!is_ours(&clean(&places).unwrap()), "it lives");
    stand_in.0.kill().unwrap();
    stand_in.0.wait().unwrap();
    assert!(is_ours(&clean(&places).unwrap()), "it is dead");
    assert!(!folder.exists());
    assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
    assert_eq!(place.path_of(command), folder.parent().unwrap());
    drop(survivor);
}

/// A process that a failing test doesn't leave behind.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A process that must be there at the end of the test.
struct Survivor(Pid);

impl Drop for Survivor {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGKILL).expect("the command goes on");
    }
}

/// Set for [`aims_at_its_parent`]: the folder of its journal.
const AIM: &str = "FAULT_TEST_AIM";

/// Not a test of its own: an instance whose aim is the shell that started it.
#[test]
fn aims_at_its_parent() {
    let Some(state) = std::env::var_os(AIM) else {
        return;
    };
    let hierarchy = Hierarchy::find().unwrap();
    let own = hierarchy.of(Pid::this()).unwrap();
    let mut journal = Journal::create_in(state.as_ref()).unwrap();
    let aim = ProcessTree::at(&hierarchy, Pid::parent(), &mut journal).unwrap();
    assert!(aim.is_moved());
    assert_eq!(hierarchy.of(Pid::parent()).unwrap(), *aim.cgroup());
    assert_eq!(hierarchy.of(Pid::this()).unwrap(), own);
}

#[test]
fn an_instance_below_its_target_process_does_not_affect_itself() {
    let Some(place) = Place::new() else { return };
    // A command behind it keeps the shell from becoming the program.
    let script = "\"$0\" --exact tree::aims_at_its_parent --nocapture; exit $?";
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(AIM, place.state.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
}

/// In a network namespace of its own: sysctls, an ifb device and sockets of a dead instance.
fn in_own_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        enter_fresh();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

const SYSCTL: &str = "net/ipv4/conf/lo/accept_local";

fn sysctl() -> String {
    let text = fs::read_to_string(format!("/proc/sys/{SYSCTL}")).unwrap();
    text.trim().to_owned()
}

fn sysctl_change() -> SystemChange {
    SystemChange::Sysctl {
        name: SYSCTL.into(),
        before: "0".into(),
        after: "1".into(),
    }
}

#[test]
fn a_dead_instances_sysctl_is_put_back_unless_it_was_changed_since() {
    let Some(place) = Place::new() else { return };
    in_own_netns(move || {
        let path = format!("/proc/sys/{SYSCTL}");
        for (now, after_clean) in [("1", "0"), ("0", "0"), ("2", "2")] {
            fs::write(&path, now).unwrap();
            leave_journal(&place, dead_pid(), &sysctl_change());
            clean(&place.places()).unwrap();
            assert_eq!(sysctl(), after_clean, "it was {now}");
            assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
        }
    });
}

#[test]
fn clean_from_another_namespace_undoes_the_change_where_it_was_made() {
    let Some(place) = Place::new() else { return };
    let outside = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let outer = sysctl();
    in_own_netns(move || {
        fs::write(format!("/proc/sys/{SYSCTL}"), "1").unwrap();
        leave_journal(&place, dead_pid(), &sysctl_change());
        // Something must keep the namespace for it to be found, as a container's process does.
        let keeper = Tree::start();
        let places = place.places();
        let cleaner = std::thread::spawn(move || {
            nix::sched::setns(outside, CloneFlags::CLONE_NEWNET).unwrap();
            clean(&places).unwrap()
        });
        let report = cleaner.join().unwrap();
        assert_eq!(report.len(), 2, "{report:?}");
        assert_eq!(sysctl(), "0");
        drop(keeper);
    });
    assert_eq!(sysctl(), outer);
}

#[test]
fn a_live_instances_journal_is_left_to_the_instance() {
    let Some(place) = Place::new() else { return };
    in_own_netns(move || {
        let mut journal = place.journal();
        // A second one of the same process has a file of its own, and is left alone too.
        let second = Journal::create_in(place.state.path()).unwrap();
        assert_eq!(clean(&place.places()).unwrap(), []);
        assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 2);
        drop(second);
        journal.record(sysctl_change()).unwrap();
        fs::write(format!("/proc/sys/{SYSCTL}"), "1").unwrap();
        // flock belongs to the open file, so this very process can stand in for another one.
        assert_eq!(clean(&place.places()).unwrap(), []);
        assert_eq!(sysctl(), "1");
        drop(journal);
        assert_eq!(sysctl(), "0");
        assert_eq!(fs::read_dir(place.state.path()).unwrap().count(), 0);
    });
}

#[test]
fn links_of_the_dead_go_by_name_and_kind() {
    let Some(place) = Place::new() else { return };
    in_own_netns(move || {
        let (living, dead) = (Instance::join().unwrap(), Instance::join().unwrap());
        let (live, number) = (living.number(), dead.number());
        drop(dead);
        let dead = number;
        for (name, kind) in [
            (format!("fault-{dead}"), "ifb"),
            (format!("fault-{live}"), "ifb"),
            ("fault-x".to_owned(), "ifb"),
            (format!("fault-{dead}b"), "bridge"),
        ] {
            ip(&format!("link add {name} type {kind}"));
        }
        let report = clean(&place.places()).unwrap();
        assert_eq!(report.len(), 1, "{report:?}");
        let left: Vec<String> = interfaces::list()
            .unwrap()
            .into_iter()
            .map(|interface| interface.name)
            .collect();
        let expected = [
            format!("fault-{live}"),
            "fault-x".into(),
            format!("fault-{dead}b"),
        ];
        for name in &expected {
            assert!(left.contains(name), "{left:?}");
        }
        assert!(!left.contains(&format!("fault-{dead}")), "{left:?}");
    });
}

#[test]
fn interfaces_are_listed_as_they_are() {
    if hierarchy().is_none() {
        return;
    }
    in_own_netns(|| {
        ip("link add br0 type bridge");
        ip("link add v0 mtu 9000 type veth peer name v1");
        ip("link set v0 master br0 up");
        ip("link set br0 alias the-bridge");
        ip("link set br0 up");
        let all = interfaces::list().unwrap();
        let find = |name: &str| all.iter().find(|found| found.name == name).unwrap();
        let (lo, br0, v0, v1) = (find("lo"), find("br0"), find("v0"), find("v1"));
        assert!(lo.loopback && lo.up && lo.mtu_bytes == 65536);
        assert_eq!(br0.kind.as_deref(), Some("bridge"));
        assert_eq!(br0.alias.as_deref(), Some("the-bridge"));
        assert_eq!((v0.kind.as_deref(), v0.mtu_bytes), (Some("veth"), 9000));
        assert_eq!((v0.master, v0.link), (Some(br0.index), Some(v1.index)));
        assert!(v0.port_of() == Some(br0.index) && !v0.is_slave() && !v1.up);
        assert_eq!((br0.bridge, v0.bridge), (Some(br0.index), None));
        assert!(v0.gso_max_bytes.is_some() && v0.gso_max_segments.is_some());
        let chosen = interfaces::select(&all, &interfaces::Selection::Default).unwrap();
        let names: Vec<&str> = chosen.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["lo", "br0", "v0"]);
    });
}

#[test]
fn the_sockets_of_a_process_are_found_with_addresses_and_states() {
    if hierarchy().is_none() {
        return;
    }
    in_own_netns(|| {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let dual = TcpListener::bind("[::]:0").unwrap();
        let mapped = TcpStream::connect(("127.0.0.1", dual.local_addr().unwrap().port())).unwrap();
        let (mapped_server, _) = dual.accept().unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(udp.local_addr().unwrap()).unwrap();

        let own = ProcessId::own().unwrap();
        let found = sockets::of_processes(&[own]).unwrap();
        let one = |local, protocol, remote| {
            let matching: Vec<_> = found
                .iter()
                .filter(|open| {
                    (open.local, open.protocol, open.remote) == (local, protocol, remote)
                })
                .collect();
            assert_eq!(
                matching.len(),
                1,
                "{local} {protocol:?} {remote:?} in {found:?}"
            );
            matching[0].state
        };
        let listening = listener.local_addr().unwrap();
        let calling = client.local_addr().unwrap();
        assert_eq!(one(listening, Transport::Tcp, None), TcpState::Listen);
        assert_eq!(
            one(calling, Transport::Tcp, Some(listening)),
            TcpState::Established
        );
        assert_eq!(
            one(listening, Transport::Tcp, Some(calling)),
            TcpState::Established
        );
        let mapped = mapped.local_addr().unwrap();
        let port = dual.local_addr().unwrap().port();
        // The server's side is an IPv6 socket, whose packets are IPv4.
        let local = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(
            one(local, Transport::Tcp, Some(mapped)),
            TcpState::Established
        );
        let (udp, connected) = (udp.local_addr().unwrap(), connected.local_addr().unwrap());
        assert_eq!(one(udp, Transport::Udp, None), TcpState::Close);
        assert_eq!(
            one(connected, Transport::Udp, Some(udp)),
            TcpState::Established
        );
        drop((server, mapped_server));
        // A process without any.
        let other = Tree::start();
        let other = ProcessId::of(other.child).unwrap().unwrap();
        assert_eq!(sockets::of_processes(&[other]).unwrap(), []);
    });
}
