//! Podman with a world of its own: its network namespace (and so the bridge and the firewall rules), its storage and
//! its state exist for one test only, and go with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::support::place::{PATIENCE, ip, wait_for};
use crate::support::watched::Watched;

/// What the tests' image is called.
const IMAGE: &str = "localhost/fault-test";
/// What servers serve.
pub const PAGE: &str = "well";

/// Podman, for the thread that it was started on and what that starts.
pub struct Engine {
    /// The cgroup that its containers are put in, of this test only.
    cgroup: String,
    /// The words that every call begins with: Debian's Podman may have been built for crun and systemd.
    words: [&'static str; 4],
}

impl Engine {
    /// `None`, said aloud, where there is no Podman.
    pub fn start() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        for program in ["podman", "runc", "busybox", "iptables"] {
            if find(program).is_none() {
                eprintln!("skipped: no {program} (cargo xtask setup --for test)");
                return None;
            }
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        enter_a_world_of_its_own();
        let engine = Self {
            cgroup: format!("fault-test-{}-{number}", std::process::id()),
            words: ["--runtime", "runc", "--cgroup-manager", "cgroupfs"],
        };
        engine.import();
        Some(engine)
    }

    /// Makes the image.
    fn import(&self) {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = pack(folder.path());
        self.podman(&["import", "--quiet", &archive.display().to_string(), IMAGE]);
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.args(self.words).args(words).stdin(Stdio::null());
        command
    }

    /// Runs `podman` with these words, and gives what it prints.
    pub fn podman(&self, words: &[&str]) -> String {
        let output = self.command(words).output().expect("podman");
        assert!(output.status.success(), "podman {words:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The words that start a container with these options and this command.
    fn start_words<'a>(&'a self, options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let mut words = vec![
            "run",
            "--cgroup-parent",
            &self.cgroup,
            "--ulimit",
            "nofile=1024:4096",
            "--ulimit",
            "nproc=1000:1000",
        ];
        words.extend(options);
        words.push(IMAGE);
        words.extend(command);
        words
    }

    /// A container in the background.
    pub fn container(&self, name: &str, options: &[&str], command: &[&str]) {
        let options = [&["--detach", "--name", name], options].concat();
        self.podman(&self.start_words(&options, command));
    }

    /// A server of [`PAGE`] on port 80 that answers.
    pub fn server(&self, name: &str, options: &[&str]) {
        self.container(name, options, &["httpd", "-f", "-p", "80", "-h", "/www"]);
        wait_for(|| self.fetch(name, "127.0.0.1"), "the server to answer");
    }

    /// One that does nothing by itself.
    pub fn idle(&self, name: &str, options: &[&str]) {
        self.container(name, options, &["sleep", "1000"]);
    }

    /// What this command does in a container of its own, to its end.
    pub fn once(&self, options: &[&str], command: &[&str]) -> Output {
        let options = [&["--rm"], options].concat();
        self.command(&self.start_words(&options, command))
            .output()
            .expect("podman")
    }

    /// A container in the foreground, followed until its standard error has this text.
    pub fn watched(&self, options: &[&str], command: &[&str], text: &str) -> Watched {
        let options = [&["--rm"], options].concat();
        Watched::start(
            &mut self.command(&self.start_words(&options, command)),
            text,
        )
    }

    /// The process of a container.
    pub fn pid(&self, name: &str) -> i32 {
        self.podman(&["inspect", "--format", "{{.State.Pid}}", name])
            .parse()
            .expect("a number")
    }

    /// The address of a bridged container.
    pub fn address(&self, name: &str) -> String {
        self.podman(&[
            "inspect",
            "--format",
            "{{.NetworkSettings.IPAddress}}",
            name,
        ])
    }

    /// Whether this container gets the page from that address, in a second.
    pub fn fetch(&self, from: &str, address: &str) -> bool {
        let url = format!("http://{address}/");
        let words = ["exec", from, "timeout", "1", "wget", "-q", "-O", "-", &url];
        let output = self.command(&words).output().expect("podman");
        output.status.success() && output.stdout == PAGE.as_bytes()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Its bridge, storage and state are this thread's own and go with it; processes and cgroups don't.
        for words in [
            &["rm", "--all", "--force", "--time", "0"][..],
            &["rmi", "--all", "--force"],
        ] {
            match self.command(words).output() {
                Ok(output) if output.status.success() => {}
                other => eprintln!("podman {words:?}: {other:?}"),
            }
        }
        remove_cgroups(&self.cgroup);
    }
}

/// Removes the cgroups of this name, in every hierarchy, with those below.
pub fn remove_cgroups(name: &str) {
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        remove_cgroup(&hierarchy.path().join(name));
    }
    remove_cgroup(&Path::new("/sys/fs/cgroup").join(name));
}

/// Packs the files of an image below a folder: busybox with a page, `fault` (also as `toxiproxy-server`), and the libraries that `fault` as cargo
/// builds it for tests wants. The archive.
pub fn pack(folder: &Path) -> PathBuf {
    let archive = folder.join("image.tar");
    if archive.exists() {
        return archive;
    }
    let root = &folder.join("image");
    std::fs::create_dir(root).expect("a folder");
    for name in ["proc", "sys", "dev", "tmp", "run", "etc", "bin", "www"] {
        std::fs::create_dir(root.join(name)).expect("a folder");
    }
    std::fs::write(root.join("www/index.html"), PAGE).expect("a page");
    let fault = Path::new(env!("CARGO_BIN_EXE_fault"));
    copy(
        &find("busybox").expect("looked for"),
        &root.join("bin/busybox"),
    );
    copy(fault, &root.join("bin/fault"));
    for applet in ["sh", "httpd", "wget", "sleep", "timeout", "cat", "grep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    std::os::unix::fs::symlink("fault", root.join("bin/toxiproxy-server")).expect("a link");
    for library in libraries(fault) {
        copy(
            &library,
            &root.join(library.strip_prefix("/").expect("absolute")),
        );
    }
    let packed = Command::new("tar")
        .arg("-C")
        .arg(root)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .status();
    assert!(packed.expect("tar").success(), "tar");
    archive
}

/// Removes a cgroup and those below it; what still has processes stays.
fn remove_cgroup(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let start = Instant::now();
    // Podman's monitor ends a moment after its container.
    while let Err(error) = std::fs::remove_dir(folder) {
        if start.elapsed() > PATIENCE {
            eprintln!("{}: {error}", folder.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Namespaces for this thread and what it starts: no interface but loopback, empty folders where Podman keeps things.
pub fn enter_a_world_of_its_own() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces (run as root)");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    for folder in ["/run", "/dev/shm", "/var/lib/containers", "/var/lib/cni"] {
        std::fs::create_dir_all(folder).expect("a folder");
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
    }
    std::fs::create_dir("/run/lock").expect("a folder");
    ip("link set lo up");
}

pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
    std::fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

/// The files that a program's loader loads, and the loader: what ldd(1) names by a path.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd");
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}
