//! CMD for real: its cgroup, its user, its exit code, what it leaves behind.
//!
//! Needs root and a writable cgroup2; says so and skips where there is none.

use crate::support::place::hierarchy;
use fault_user::sys::process::cgroup::{CommandCgroup, Finished, Hierarchy, Leftovers};
use fault_user::sys::process::command::{CommandSpec, Ended, PreparedCommand, Running, StartError};
use fault_user::sys::process::user::Identity;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Long enough for anything that works, short enough for a hang to be seen.
const LIMIT: Duration = Duration::from_secs(20);

fn fresh(leftovers: Leftovers) -> Option<(Hierarchy, CommandCgroup)> {
    let hierarchy = hierarchy()?;
    let cgroup = CommandCgroup::create(&hierarchy, leftovers).unwrap();
    Some((hierarchy, cgroup))
}

fn sh(script: &str, identity: Option<Identity>) -> PreparedCommand {
    let words = ["sh", "-c", script].map(OsString::from).to_vec();
    let spec = CommandSpec::new(words, identity).unwrap();
    spec.resolve().unwrap()
}

fn nobody() -> Identity {
    let user = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let sudo = |name: &str| match name {
        "SUDO_UID" => Some(user.uid.to_string().into()),
        "SUDO_GID" => Some(user.gid.to_string().into()),
        "SUDO_USER" => Some("nobody".into()),
        _ => None,
    };
    Identity::choose(None, sudo).unwrap().unwrap()
}

async fn end(running: &mut Running) -> Ended {
    let ended = tokio::time::timeout(LIMIT, running.wait()).await;
    ended.expect("it ends").unwrap()
}

/// A named pipe in a folder that everyone can write: what CMD says, without a sleep anywhere.
struct Channel {
    folder: TempDir,
}

impl Channel {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let channel = Self { folder };
        channel.fifo("pipe");
        channel
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        mkfifo(&path, Mode::empty()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        path.display().to_string()
    }

    fn path(&self) -> String {
        self.folder.path().join("pipe").display().to_string()
    }

    /// Everything that is written until the last writer closes.
    async fn read(&self) -> String {
        let path = self.path();
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            fs::File::open(path)?.read_to_string(&mut text)?;
            std::io::Result::Ok(text)
        });
        let text = tokio::time::timeout(LIMIT, read).await;
        text.expect("it writes").unwrap().unwrap()
    }

    async fn read_pid(&self) -> Pid {
        Pid::from_raw(self.read().await.trim().parse().unwrap())
    }
}

#[tokio::test]
async fn the_command_is_in_its_cgroup_from_its_first_instruction() {
    let Some((hierarchy, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let path = cgroup.cgroup().path().to_owned();
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with(&format!("fault-{}-", Pid::this())));
    let own = hierarchy.of(Pid::this()).unwrap();
    assert_eq!(cgroup.cgroup().level(), own.level() + 1);
    assert_eq!(hierarchy.open(&path).unwrap(), *cgroup.cgroup());

    let channel = Channel::new();
    let script = format!("cat /proc/self/cgroup > {}", channel.path());
    let mut running = sh(&script, None).spawn(Some(&cgroup)).unwrap();
    let said = channel.read().await;
    let line = said.lines().find_map(|line| line.strip_prefix("0::"));
    let seen = hierarchy.open(Path::new(line.unwrap())).unwrap();
    assert_eq!(seen.id(), cgroup.cgroup().id());
    assert_eq!(end(&mut running).await, Ended::Exited(0));
    assert_eq!(cgroup.finish().unwrap(), Finished::default());
    assert!(!path.exists());
}

#[tokio::test]
async fn exit_codes() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let cases = [
        ("true", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill $$", 143),
    ];
    for (script, code) in cases {
        let mut running = sh(script, None).spawn(Some(&cgroup)).unwrap();
        assert_eq!(end(&mut running).await.exit_code(), code, "{script}");
    }
}

#[tokio::test]
async fn a_program_that_cannot_run_is_found_out_before_anything_else() {
    if hierarchy().is_none() {
        return;
    }
    let folder = TempDir::new().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let program = folder.path().join("tool");
    // Written by another process: a child that a test beside this one starts now would keep the file open for writing.
    let written = Command::new("sh")
        .args(["-c", "printf '#!/bin/sh\\nexit 3\\n' > \"$0\""])
        .arg(&program)
        .status()
        .unwrap();
    assert!(written.success());
    let resolve = |identity| {
        let spec = CommandSpec::new(vec![program.clone().into()], identity);
        spec.unwrap().resolve()
    };
    assert!(matches!(resolve(None), Err(StartError::NotExecutable(_))));
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut running = resolve(None).unwrap().spawn(None).unwrap();
    assert_eq!(end(&mut running).await, Ended::Exited(3));
    // Root may pass through the folder; the user that it would run as may not.
    let error = resolve(Some(nobody())).unwrap_err();
    assert_eq!(error.exit_code(), 126);
    assert!(error.to_string().contains("as user nobody"), "{error}");
}

#[tokio::test]
async fn an_interpreter_that_is_not_there_is_127_and_nothing_stays() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let folder = TempDir::new().unwrap();
    let program = folder.path().join("tool");
    fs::write(&program, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let spec = CommandSpec::new(vec![program.into()], None).unwrap();
    let error = spec.resolve().unwrap().spawn(Some(&cgroup)).unwrap_err();
    assert_eq!(error.exit_code(), 127, "{error}");
    assert_eq!(cgroup.finish().unwrap(), Finished::default());
}

#[tokio::test]
async fn under_sudo_it_is_the_callers_and_has_no_capability() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    // A supplementary group that must not be handed down.
    nix::unistd::setgroups(&[nix::unistd::Gid::from_raw(0)]).unwrap();
    let channel = Channel::new();
    let script = format!(
        "{{ id -u; id -g; id -G; echo $HOME $USER $LOGNAME $SHELL; \
         grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status; }} > {}",
        channel.path()
    );
    let prepared = sh(&script, Some(nobody()));
    let mut running = prepared.spawn(Some(&cgroup)).unwrap();
    let said = channel.read().await;
    assert_eq!(end(&mut running).await, Ended::Exited(0));
    let user = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], user.uid.to_string());
    assert_eq!(lines[1], user.gid.to_string());
    assert!(lines[2].split(' ').all(|group| group != "0"), "{said}");
    let (home, shell) = (user.dir.display(), user.shell.display());
    assert_eq!(lines[3], format!("{home} nobody nobody {shell}"));
    assert_eq!(lines.len(), 8, "{said}");
    for line in &lines[4..] {
        assert!(line.ends_with("\t0000000000000000"), "{line}");
    }
}

#[tokio::test]
async fn it_inherits_no_descriptor_of_ours() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let channel = Channel::new();
    let script = format!("ls -l /proc/$$/fd > {}", channel.path());
    let mut running = sh(&script, None).spawn(Some(&cgroup)).unwrap();
    let said = channel.read().await;
    assert_eq!(end(&mut running).await, Ended::Exited(0));
    assert!(said.contains(" 2 -> "), "{said}");
    for ours in ["cgroup", "pidfd", "eventpoll", "eventfd", "fault-"] {
        assert!(!said.contains(ours), "{ours}: {said}");
    }
}

#[tokio::test]
async fn what_it_leaves_running_lives_on_in_the_parent_cgroup() {
    let Some((hierarchy, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let path = cgroup.cgroup().path().to_owned();
    let parent = hierarchy.of(Pid::this()).unwrap();
    let channel = Channel::new();
    let script = format!(
        "sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > {}",
        channel.path()
    );
    let mut running = sh(&script, None).spawn(Some(&cgroup)).unwrap();
    let orphan = KillOnDrop(channel.read_pid().await);
    assert_eq!(end(&mut running).await, Ended::Exited(0));
    assert_eq!(cgroup.cgroup().processes().unwrap(), [orphan.0]);
    let released = vec![orphan.0];
    let expected = Finished {
        released,
        kept: None,
    };
    assert_eq!(cgroup.finish().unwrap(), expected);
    assert!(!path.exists());
    assert_eq!(hierarchy.of(orphan.0).unwrap(), parent);
}

#[tokio::test]
async fn dropped_with_kill_takes_everything_with_it_even_a_fork_storm() {
    let Some((_, cgroup)) = fresh(Leftovers::Kill) else {
        return;
    };
    let path = cgroup.cgroup().path().to_owned();
    let channel = Channel::new();
    // Each one starts the next and ends: by the time a list is read, it is out of date. Should the
    // test fail, it ends with the channel.
    let script = format!(
        "storm() {{ test -e {0} && (storm) & }}; (storm) & sleep 1000 & echo up > {0}; wait",
        channel.path()
    );
    let mut running = sh(&script, None).spawn(Some(&cgroup)).unwrap();
    assert_eq!(channel.read().await, "up\n");
    drop(cgroup);
    assert!(!path.exists());
    let killed = Ended::Signalled(Signal::SIGKILL as i32);
    assert_eq!(end(&mut running).await, killed);
}

#[tokio::test]
async fn a_cgroup_that_the_command_made_inside_goes_too_unless_it_is_in_use() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let path = cgroup.cgroup().path().to_owned();
    fs::create_dir(path.join("empty")).unwrap();
    fs::create_dir(path.join("used")).unwrap();
    let channel = Channel::new();
    let script = format!(
        "echo 0 > {}/used/cgroup.procs; sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > {}",
        path.display(),
        channel.path()
    );
    let mut running = sh(&script, None).spawn(Some(&cgroup)).unwrap();
    let orphan = KillOnDrop(channel.read_pid().await);
    end(&mut running).await;
    let finished = cgroup.finish().unwrap();
    assert_eq!(finished.kept.as_deref(), Some(path.as_path()));
    assert!(path.join("used").exists() && !path.join("empty").exists());
    drop(orphan);
    let events = path.join("used/cgroup.events");
    let is_empty = || {
        let text = fs::read_to_string(&events).unwrap();
        text.contains("populated 0")
    };
    wait_until(is_empty);
    fs::remove_dir(path.join("used")).unwrap();
    fs::remove_dir(&path).unwrap();
}

#[test]
fn odd_paths_are_no_cgroups() {
    let Some(hierarchy) = hierarchy() else { return };
    for path in ["/no/such/cgroup", "/etc", "/proc", "../../etc"] {
        assert!(hierarchy.open(Path::new(path)).is_err(), "{path}");
    }
    let root = hierarchy.open(hierarchy.path()).unwrap();
    assert_eq!(root.level(), 0);
    assert_eq!(hierarchy.open(Path::new("/")).unwrap(), root);
    assert!(hierarchy.of(Pid::from_raw(i32::MAX)).is_err());
}

struct KillOnDrop(Pid);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGKILL).expect("it is still there");
    }
}

/// For what has no event to wait for across processes.
fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "it never happened");
        std::thread::yield_now();
    }
}

/// Its process is in the cgroup before it is let go, and leaves nothing when it never is.
#[tokio::test]
async fn a_command_that_waits_has_not_begun_and_can_be_given_up() {
    let Some((_, cgroup)) = fresh(Leftovers::Release) else {
        return;
    };
    let folder = TempDir::new().unwrap();
    let mark = folder.path().join("ran");
    let command = sh(&format!("touch {}", mark.display()), None);
    let waiting = command.begin(Some(&cgroup)).unwrap();
    let start = Instant::now();
    while cgroup.cgroup().processes().unwrap().is_empty() {
        assert!(start.elapsed() < LIMIT, "it does not enter its cgroup");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(waiting);
    assert_eq!(cgroup.cgroup().processes().unwrap(), []);
    assert!(!mark.exists());
    let mut running = command.begin(Some(&cgroup)).unwrap().go().unwrap();
    assert_eq!(end(&mut running).await, Ended::Exited(0));
    assert!(mark.exists());
    assert_eq!(cgroup.finish().unwrap(), Finished::default());
}

/// The real sudo, whose `secure_path` hides what only the caller's PATH has.
#[test]
fn sudo_keeps_the_callers_environment() {
    let has_sudo = Command::new("sudo").args(["-n", "true"]).output();
    if hierarchy().is_none() || !has_sudo.is_ok_and(|tried| tried.status.success()) {
        eprintln!("skipped: needs root, cgroup2 and sudo");
        return;
    }
    let folder = TempDir::new().unwrap();
    let tool = folder.path().join("only-here");
    fs::write(
        &tool,
        "#!/bin/sh\necho \"$MARK|$PATH|$PWD|$SUDO_USER\"\nexit 7\n",
    )
    .unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", folder.path().display());
    let run = |program: &str| {
        Command::new("sudo")
            .args(["-n", env!("CARGO_BIN_EXE_fault"), "run", "--allow-unfired"])
            .args(["-r", "tcp:1 drop", "--", program])
            .env("PATH", &path)
            .env("MARK", "kept")
            .current_dir(folder.path())
            .output()
            .unwrap()
    };
    let ended = run("only-here");
    let stderr_text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(7), "{stderr_text}");
    let here = fs::canonicalize(folder.path()).unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    let expected = format!("kept|{path}|{}|", here.display());
    assert!(said.starts_with(&expected), "{said} is not {expected}");
    let ended = run("nowhere");
    assert_eq!(ended.status.code(), Some(127));
    let stderr_text = String::from_utf8_lossy(&ended.stderr);
    assert!(
        stderr_text.contains("fault: error: nowhere: command not found in PATH"),
        "{stderr_text}"
    );
}

/// sudo that has gone, as behind `sudo nohup` or `sudo systemd-run`: its PATH is all that is known.
#[test]
fn a_path_replaced_by_sudo_is_reported() {
    let ended = Command::new(env!("CARGO_BIN_EXE_fault"))
        .args(["run", "-r", "tcp:1 drop", "--", "nowhere"])
        .env("SUDO_UID", "0")
        .env("PATH", "/usr/sbin:/usr/bin")
        .output()
        .unwrap();
    if ended.status.code() == Some(125) {
        eprintln!("skipped: needs root");
        return;
    }
    assert_eq!(ended.status.code(), Some(127));
    let stderr_text = String::from_utf8_lossy(&ended.stderr);
    let expected = "nowhere: command not found in /usr/sbin:/usr/bin, the PATH that sudo sets (secure_path): run \
    `sudo env \"PATH=$PATH\" fault …`";
    assert!(stderr_text.contains(expected), "{stderr_text}");
}
