//! A program whose messages a test waits for.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::{Child, ChildStderr, Command, Stdio};

use fault_user::session::control::NAME;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::place::fault;

/// A program whose standard error is read as it comes. Ended when this is dropped.
pub struct Watched {
    pub child: Child,
    /// `None` after reading has stopped.
    lines: Option<BufReader<ChildStderr>>,
    /// Its standard error so far.
    pub stderr_text: String,
}

impl Watched {
    /// Starts it, and waits until it prints `text`.
    pub fn start(command: &mut Command, text: &str) -> Self {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = child.stderr.take().map(BufReader::new);
        let mut watched = Self {
            child,
            lines,
            stderr_text: String::new(),
        };
        watched.until(text);
        watched
    }

    /// `fault inject` with its rules applied.
    pub fn inject(words: &[&str]) -> Self {
        Self::start(fault().arg("inject").args(words), "press Ctrl-C")
    }

    /// Waits until it prints `text`, from now on.
    pub fn until(&mut self, text: &str) {
        let before = self.stderr_text.len();
        let lines = self.lines.as_mut().expect("it is read");
        while !self.stderr_text[before..].contains(text) {
            let read = lines.read_line(&mut self.stderr_text).expect("text");
            assert_ne!(read, 0, "no `{text}`: {}", self.stderr_text);
        }
    }

    /// Closes its standard error.
    pub fn stop_reading(&mut self) {
        self.lines = None;
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        if let Err(error) = kill(pid, signal) {
            eprintln!("{signal} to {pid}: {error}");
        }
    }

    /// Ends it, if it has not ended by itself. Returns its exit code and its standard error.
    pub fn end(mut self) -> (Option<i32>, String) {
        self.signal(Signal::SIGTERM);
        self.finish()
    }

    /// Waits for its end.
    pub fn finish(&mut self) -> (Option<i32>, String) {
        if let Some(lines) = &mut self.lines {
            lines.read_to_string(&mut self.stderr_text).expect("text");
        }
        let status = self.child.wait().expect("it ends");
        (status.code(), std::mem::take(&mut self.stderr_text))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            // The test has failed. The program restores everything when it ends.
            self.signal(Signal::SIGTERM);
            if let Err(error) = self.child.wait() {
                eprintln!("waiting: {error}");
            }
        }
    }
}

/// Turns the first rule of an instance off or on, as `fault top` does. Returns what it shows then.
pub fn switch(pid: u32, on: bool) -> serde_json::Value {
    let address = SocketAddr::from_abstract_name(format!("{NAME}{pid}")).unwrap();
    let mut control = UnixStream::connect_addr(&address).unwrap();
    let request = serde_json::json!({ "switch": { "rule": 0, "on": on } });
    writeln!(control, "{request}").unwrap();
    let mut line = String::new();
    BufReader::new(control).read_line(&mut line).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(shown["rules"][0]["on"], on, "{shown}");
    shown
}
