//! CMD: found, started inside its cgroup as the right user, waited for, and its exit code.
//!
//! - **Descriptors**: 0, 1, 2 and whatever the caller handed down pass through; everything that
//!   `fault` opens is closed on exec.
//! - **Death of `fault`**: CMD does not die with it (no `PR_SET_PDEATHSIG`). After a `kill -9` the programs disappear
//!   with their links, or let everything through once the lease has expired. CMD keeps running without faults; its exit
//!   code is lost. A parent-death signal would also hit when the *thread* that started CMD ends, which a tokio runtime
//!   is free to let happen.
//! - **Its process is made early** ([`PreparedCommand::begin`]): the kernel takes 10 to 20 ms to move a process into a cgroup, which
//!   pass while programs are loaded. It waits in front of exec, and ends there when `fault` gives up or dies.
//! - **What CMD leaves running** when it ends lives on, in the parent cgroup
//!   ([`Leftovers::Release`](super::cgroup::Leftovers)).
use super::open_files;
use crate::sys::process::cgroup::CommandCgroup;
use crate::sys::process::signals::Forwarder;
use crate::sys::process::user::{Identity, SUDO_VARIABLES};
use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_int};
use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use tokio::process::Child;

/// Where a program is looked for when there is no PATH (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The exec-error pipe of [`Command`] carries one integer, so what went wrong *before* exec is told
/// from exec's own errors by adding one of these to the error number.
const CGROUP_FAILED: i32 = 10_000;
const USER_FAILED: i32 = 20_000;
/// `fault` gave up before CMD was started.
const GIVEN_UP: i32 = 30_000;
/// Likewise the answer of the probe: the index of the path that can be executed.
const FOUND: i32 = 1_000_000;

/// Why CMD could not be started.
#[derive(Debug)]
pub enum StartError {
    /// No such program: exit code 127.
    NotFound(String),
    /// The program is there but can't be executed: exit code 126.
    NotExecutable(String),
    /// `fault` could not set up what CMD needs: exit code 125.
    Setup(anyhow::Error),
}

impl StartError {
    /// The exit code, as env(1) has them.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
            Self::Setup(_) => 125,
        }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(text) | Self::NotExecutable(text) => f.write_str(text),
            Self::Setup(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for StartError {}

/// What to run and as whom.
#[derive(Debug, Clone)]
pub struct CommandSpec {
    program: OsString,
    arguments: Vec<OsString>,
    identity: Option<Identity>,
    /// What the caller of sudo has in its environment and `fault` has not.
    environment: Vec<(OsString, OsString)>,
}

impl CommandSpec {
    /// `words` is CMD with its arguments; `identity` is from [`Identity::choose`].
    ///
    /// # Errors
    /// [`StartError::NotFound`] when there are no words.
    pub fn new(words: Vec<OsString>, identity: Option<Identity>) -> Result<Self, StartError> {
        let mut words = words.into_iter();
        let program = words.next().filter(|program| !program.is_empty());
        let program = program
            .ok_or_else(|| StartError::NotFound("no command to run: give one after --".into()))?;
        Ok(Self {
            program,
            arguments: words.collect(),
            identity,
            environment: Vec::new(),
        })
    }

    /// The command gets these variables, PATH among them, in the place of those that `fault` has.
    #[must_use]
    pub fn with_environment(mut self, environment: Vec<(OsString, OsString)>) -> Self {
        self.environment = environment;
        self
    }

    /// The folders in which the program is looked for.
    fn search_path(&self) -> Option<OsString> {
        let callers = self.environment.iter().find(|(name, _)| name == "PATH");
        callers.map_or_else(|| std::env::var_os("PATH"), |(_, path)| Some(path.clone()))
    }

    /// Finds the program as execvp(3) would, with the rights of the user that it will run as.
    /// Changes nothing.
    ///
    /// # Errors
    /// [`StartError::NotFound`] and [`StartError::NotExecutable`].
    pub fn resolve(self) -> Result<PreparedCommand, StartError> {
        let paths = candidates(&self.program, self.search_path())?;
        let answer = match &self.identity {
            None => probe(&paths),
            Some(identity) => probe_as(identity, &paths)?,
        };
        let found = usize::try_from(answer - FOUND).ok();
        let Some(path) = found.and_then(|index| paths.into_iter().nth(index)) else {
            return Err(self.explain(answer));
        };
        Ok(PreparedCommand {
            path: OsString::from_vec(path.into_bytes()),
            spec: self,
        })
    }

    /// What an error of exec means.
    fn explain(&self, errno: i32) -> StartError {
        let program = self.program.display();
        match errno {
            libc::ENOENT | libc::ENOTDIR if self.program.as_bytes().contains(&b'/') => {
                StartError::NotFound(format!(
                    "{program}: no such file, or its #! line names a program that does not \
                exist"
                ))
            }
            libc::ENOENT | libc::ENOTDIR => {
                let is_replaced =
                    std::env::var_os("SUDO_UID").is_some() && self.environment.is_empty();
                let path = self.search_path().unwrap_or_else(|| DEFAULT_PATH.into());
                StartError::NotFound(if is_replaced {
                    format!(
                        "{program}: command not found in {}, the PATH that sudo sets (secure_path): run `sudo env \
                         \"PATH=$PATH\" fault …`, or give the command's full path",
                        path.display()
                    )
                } else {
                    format!("{program}: command not found in PATH")
                })
            }
            _ => {
                let user = match &self.identity {
                    Some(identity) => format!(" as user {identity}"),
                    None => String::new(),
                };
                let reason = Errno::from_raw(errno).desc();
                StartError::NotExecutable(format!("{program}: can't be executed{user}: {reason}"))
            }
        }
    }
}

/// The paths to try, in order.
fn candidates(program: &OsStr, path: Option<OsString>) -> Result<Vec<CString>, StartError> {
    let to_c = |bytes: Vec<u8>| {
        CString::new(bytes)
            .map_err(|_| StartError::NotFound("the command's name contains a NUL byte".into()))
    };
    if program.as_bytes().contains(&b'/') {
        return Ok(vec![to_c(program.as_bytes().to_vec())?]);
    }
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    path.as_bytes()
        .split(|byte| *byte == b':')
        .map(|folder| {
            // An empty entry is the working directory.
            let folder = if folder.is_empty() { b"." } else { folder };
            to_c([folder, b"/", program.as_bytes()].concat())
        })
        .collect()
}

/// [`FOUND`] plus the index of the first path that can be executed, else the error number that
/// execvp would return. Allocates nothing, so that it can run between fork and exec.
fn probe(paths: &[CString]) -> i32 {
    let mut refused = libc::ENOENT;
    for (index, path) in (0..).zip(paths) {
        match can_execute(path) {
            0 => return FOUND + index,
            libc::ENOENT | libc::ENOTDIR => {}
            errno => refused = errno,
        }
    }
    refused
}

/// 0, or why not. Only regular files can be executed.
fn can_execute(path: &CString) -> c_int {
    // SAFETY: the path ends with a zero byte and stat is written before it is read.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::stat(path.as_ptr(), &raw mut stat) != 0 {
            return Errno::last_raw();
        }
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return libc::EACCES;
        }
        if libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) != 0 {
            return Errno::last_raw();
        }
    }
    0
}

/// [`probe`] in a child that has become that user; it never gets as far as exec.
fn probe_as(identity: &Identity, paths: &[CString]) -> Result<i32, StartError> {
    let user = identity.clone();
    let paths = paths.to_vec();
    let mut command = Command::new("/");
    // SAFETY: become_user and probe make system calls only, and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            become_user(&user)?;
            Err(io::Error::from_raw_os_error(probe(&paths)))
        });
    }
    let answer = match command.spawn() {
        Ok(_) => None,
        Err(error) => error.raw_os_error(),
    };
    match answer {
        Some(answer) if (USER_FAILED..FOUND).contains(&answer) => {
            Err(StartError::Setup(setup_error(answer, Some(identity))))
        }
        Some(answer) => Ok(answer),
        None => Err(StartError::Setup(anyhow::anyhow!(
            "can't fork to look for the command as user {identity}"
        ))),
    }
}

/// Becomes `identity` for good, without any capability. Runs between fork and exec: system calls
/// only. The bounding set stays, so that CMD can use sudo or ping as ever.
fn become_user(identity: &Identity) -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
    const VERSION: u32 = 0x2008_0522;
    let failed = || {
        let errno = Errno::last_raw();
        io::Error::from_raw_os_error(USER_FAILED + errno)
    };
    let (uid, gid) = (identity.uid.as_raw(), identity.gid.as_raw());
    // SAFETY: the pointers are to slices and arrays of the sizes given along.
    unsafe {
        let groups: *const libc::gid_t = identity.groups.as_ptr().cast();
        if libc::setgroups(identity.groups.len(), groups) != 0
            || libc::setresgid(gid, gid, gid) != 0
        {
            return Err(failed());
        }
        if uid == 0 {
            return Ok(());
        }
        // Ambient and inheritable capabilities survive a change of user, and exec.
        let all = libc::PR_CAP_AMBIENT_CLEAR_ALL;
        let header = [VERSION, 0];
        let none = [0u32; 6];
        if libc::prctl(libc::PR_CAP_AMBIENT, all, 0, 0, 0) != 0
            || libc::setresuid(uid, uid, uid) != 0
            || libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) != 0
        {
            return Err(failed());
        }
    }
    Ok(())
}

fn setup_error(code: i32, identity: Option<&Identity>) -> anyhow::Error {
    let (stage, errno) = match code {
        USER_FAILED.. => ("user", code - USER_FAILED),
        _ => ("cgroup", code - CGROUP_FAILED),
    };
    let reason = Errno::from_raw(errno).desc();
    match (stage, identity) {
        ("user", Some(identity)) => anyhow::anyhow!("can't become user {identity}: {reason}"),
        _ => anyhow::anyhow!("can't enter the command's cgroup: {reason} (run as root)"),
    }
}

/// A command that can be started, once everything around it is in place.
#[derive(Debug)]
pub struct PreparedCommand {
    path: OsString,
    spec: CommandSpec,
}

impl PreparedCommand {
    /// Whether it will run as another user than `fault`.
    #[must_use]
    pub fn is_another_users(&self) -> bool {
        self.spec.identity.is_some()
    }

    /// The file that will be executed.
    #[must_use]
    pub fn path(&self) -> &OsStr {
        &self.path
    }

    /// [`Self::begin`] and [`Waiting::go`] at once.
    ///
    /// # Errors
    /// As these.
    pub fn spawn(&self, cgroup: Option<&CommandCgroup>) -> Result<Running, StartError> {
        self.begin(cgroup)?.go()
    }

    /// Begins to make its process, which enters `cgroup` (`None` with `--scope host`), becomes the user's, and waits; keeps
    /// signals for it from now on. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`StartError::Setup`] when the cgroup has no way in, or there is no thread or pipe to be had.
    pub fn begin(&self, cgroup: Option<&CommandCgroup>) -> Result<Waiting<'_>, StartError> {
        self.begin_writing(cgroup, None)
    }

    /// As [`Self::begin`]. With an `output` its process writes to that file instead of the caller's terminal, and reads
    /// nothing.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_writing(
        &self,
        cgroup: Option<&CommandCgroup>,
        output: Option<&File>,
    ) -> Result<Waiting<'_>, StartError> {
        // What comes during the set-up is for the command, which it ends as soon as it is there.
        let forwarder = Forwarder::start().map_err(StartError::Setup)?;
        let entrance = cgroup
            .map(CommandCgroup::entrance)
            .transpose()
            .map_err(StartError::Setup)?;
        let mut command = Command::new(&self.path);
        command.arg0(&self.spec.program).args(&self.spec.arguments);
        if let Some(output) = output {
            let writer = || output.try_clone().context("no descriptor for the output");
            command.stdin(Stdio::null());
            command.stdout(writer().map_err(StartError::Setup)?);
            command.stderr(writer().map_err(StartError::Setup)?);
        }
        if let Some(identity) = &self.spec.identity {
            for name in SUDO_VARIABLES {
                command.env_remove(name);
            }
            command.envs(identity.variables());
        }
        for (name, value) in &self.spec.environment {
            command.env(name, value);
        }
        let identity = self.spec.identity.clone();
        let (inner, gate) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .context("can't create a pipe for the command")
            .map_err(StartError::Setup)?;
        let gate_fd = gate.as_raw_fd();
        // SAFETY: the closure makes system calls only, and allocates nothing; its descriptors are its own, but for the
        // gate, which stays open until the process is there: `Waiting` waits for that.
        unsafe {
            command.pre_exec(move || {
                // Only fault itself holds the gate: when it dies, the other end is closed.
                libc::close(gate_fd);
                // First the cgroup: its file is root's.
                entrance.as_ref().map_or(Ok(()), enter)?;
                open_files::restore()?;
                identity.as_ref().map_or(Ok(()), become_user)?;
                wait_at(&inner)
            });
        }
        let runtime = tokio::runtime::Handle::current();
        let starting = std::thread::Builder::new()
            .name("command".to_owned())
            .spawn(move || {
                let _inside = runtime.enter();
                tokio::process::Command::from(command).spawn()
            })
            .context("can't start the thread that starts the command")
            .map_err(StartError::Setup)?;
        Ok(Waiting {
            command: self,
            forwarder: Some(forwarder),
            gate: Some(gate),
            starting: Some(starting),
        })
    }

    fn spawn_error(&self, error: io::Error) -> StartError {
        match error.raw_os_error() {
            Some(code @ CGROUP_FAILED..GIVEN_UP) => {
                StartError::Setup(setup_error(code, self.spec.identity.as_ref()))
            }
            // Fork's own errors, which exec doesn't have.
            Some(libc::EAGAIN) | None => {
                StartError::Setup(anyhow::Error::new(error).context("can't start the command"))
            }
            Some(errno) => self.spec.explain(errno),
        }
    }
}

/// CMD's process, which waits for its exec. Dropping this ends it.
#[derive(Debug)]
pub struct Waiting<'a> {
    command: &'a PreparedCommand,
    forwarder: Option<Forwarder>,
    /// A byte lets the process continue; closing it makes the process end.
    gate: Option<OwnedFd>,
    starting: Option<JoinHandle<io::Result<Child>>>,
}

impl Waiting<'_> {
    /// Starts the command, and passes signals on to it.
    ///
    /// # Errors
    /// [`StartError::Setup`] when the cgroup or the user can't be entered; the other two when the
    /// program has changed since, or has a format or interpreter that the kernel can't run.
    pub fn go(mut self) -> Result<Running, StartError> {
        if let Some(gate) = self.gate.take() {
            match nix::unistd::write(&gate, b"1") {
                // It has ended early: how, the thread knows.
                Ok(_) | Err(Errno::EPIPE) => {}
                Err(error) => {
                    let error = anyhow::Error::new(error).context("can't start the command");
                    return Err(StartError::Setup(error));
                }
            }
        }
        let spawned = self.starting.take().map(JoinHandle::join);
        let child = spawned
            .and_then(Result::ok)
            .context("the thread that starts the command panicked")
            .map_err(StartError::Setup)?
            .map_err(|error| self.command.spawn_error(error))?;
        // tokio hasn't reaped it, so its number is still its own.
        let pid = child.id().context("the command has no process id");
        let pid = pid.map_err(StartError::Setup)?;
        let forwarder = self.forwarder.take().context("the command goes once");
        let mut forwarder = forwarder.map_err(StartError::Setup)?;
        forwarder.target(pid).map_err(StartError::Setup)?;
        Ok(Running {
            child,
            pid,
            forwarder,
        })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        drop(self.gate.take());
        // The process has left its cgroup when this returns; that it gave up is what was wanted.
        if self.starting.take().is_some_and(|one| one.join().is_err()) {
            log::error!("the thread that starts the command panicked");
        }
    }
}

/// Waits, between fork and exec, until `fault` has set up or has given up.
fn wait_at(gate: &OwnedFd) -> io::Result<()> {
    let mut byte = 0_u8;
    loop {
        // SAFETY: one byte into a variable of that size.
        let read = unsafe { libc::read(gate.as_raw_fd(), (&raw mut byte).cast(), 1) };
        match read {
            1 => return Ok(()),
            -1 if Errno::last_raw() == libc::EINTR => {}
            _ => return Err(io::Error::from_raw_os_error(GIVEN_UP)),
        }
    }
}

/// Moves the calling process into the cgroup whose `cgroup.procs` this is.
fn enter(entrance: &File) -> io::Result<()> {
    // SAFETY: one byte from a constant.
    let written = unsafe { libc::write(entrance.as_raw_fd(), c"0".as_ptr().cast(), 1) };
    if written == 1 {
        return Ok(());
    }
    let errno = Errno::last_raw();
    Err(io::Error::from_raw_os_error(CGROUP_FAILED + errno))
}

/// CMD, running. Dropping this lets it run on, and ends the forwarding of signals. Later signals are ignored, so that
/// they can't interrupt the cleanup.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: u32,
    forwarder: Forwarder,
}

impl Running {
    /// CMD's process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The signals passed on so far.
    #[must_use]
    pub fn signals(&self) -> &Forwarder {
        &self.forwarder
    }

    /// Waits for CMD itself, not for what it started in the background. Safe to cancel and to call
    /// again.
    ///
    /// # Errors
    /// When the kernel has no exit status for it, because somebody else has taken it.
    pub async fn wait(&mut self) -> anyhow::Result<Ended> {
        let status = self
            .child
            .wait()
            .await
            .context("can't wait for the command")?;
        Ended::try_from(status)
    }
}

/// How CMD ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Exited(u8),
    /// By this signal.
    Signalled(i32),
}

impl Ended {
    /// CMD's own code, or 128 plus the signal, as shells count.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Signalled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }

    /// Exit code 0.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl TryFrom<ExitStatus> for Ended {
    type Error = anyhow::Error;

    fn try_from(status: ExitStatus) -> Result<Self, Self::Error> {
        match (status.code(), status.signal()) {
            // The kernel keeps eight bits of what was passed to exit.
            (Some(code), _) => Ok(Self::Exited(u8::try_from(code & 0xFF)?)),
            (None, Some(signal)) => Ok(Self::Signalled(signal)),
            (None, None) => anyhow::bail!("the command neither exited nor was killed: {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(program: &str) -> Result<PreparedCommand, StartError> {
        CommandSpec::new(vec![program.into()], None)?.resolve()
    }

    #[test]
    fn programs_are_looked_for_in_path_order() {
        let paths = candidates(OsStr::new("x"), Some("/a::/b".into())).unwrap();
        assert_eq!(
            paths,
            [c"/a/x".into(), c"./x".into(), CString::from(c"/b/x")]
        );
        let paths = candidates(OsStr::new("./x"), Some("/a".into())).unwrap();
        assert_eq!(paths, [CString::from(c"./x")]);
        let paths = candidates(OsStr::new("x"), None).unwrap();
        assert_eq!(paths, [c"/bin/x".into(), CString::from(c"/usr/bin/x")]);
    }

    #[test]
    fn missing_and_forbidden_programs_have_the_codes_of_env() {
        for (program, code) in [
            ("no-such-program", 127),
            ("/no/such", 127),
            ("/etc/passwd", 126),
            ("/", 126),
        ] {
            let error = resolve(program).unwrap_err();
            assert_eq!(error.exit_code(), code, "{program}: {error}");
        }
        assert_eq!(
            CommandSpec::new(Vec::new(), None).unwrap_err().exit_code(),
            127
        );
        assert_eq!(resolve("/bin/sh").unwrap().path(), "/bin/sh");
    }

    #[test]
    fn a_later_path_entry_wins_over_a_forbidden_earlier_one() {
        let paths = [
            c"/etc/passwd".into(),
            c"/no/such".into(),
            CString::from(c"/bin/sh"),
        ];
        assert_eq!(probe(&paths), FOUND + 2);
        assert_eq!(probe(&paths[..2]), libc::EACCES);
    }

    #[test]
    fn statuses_map_to_codes() {
        assert_eq!(
            Ended::try_from(ExitStatus::from_raw(7 << 8))
                .unwrap()
                .exit_code(),
            7
        );
        assert_eq!(
            Ended::try_from(ExitStatus::from_raw(9))
                .unwrap()
                .exit_code(),
            137
        );
        assert!(
            Ended::try_from(ExitStatus::from_raw(0))
                .unwrap()
                .is_success()
        );
        assert!(
            Ended::try_from(ExitStatus::from_raw(0x137f)).is_err(),
            "stopped is not ended"
        );
    }
}
