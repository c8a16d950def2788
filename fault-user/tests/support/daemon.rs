//! A `fault daemon` in a process of its own, and a small HTTP client for it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

use super::place::{PATIENCE, fault};

const ANY_PORT: &str = "127.0.0.1:0";

pub struct Daemon {
    pub child: Child,
    pub api: SocketAddr,
    pub said: Arc<Mutex<String>>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, which is what some tests are about.
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }
}

impl Daemon {
    pub fn start() -> Self {
        Self::with(&["--seed", "42"])
    }

    /// A daemon without any capability.
    pub fn unprivileged() -> Self {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--bounding-set=-all", "--inh-caps=-all", "--"]);
        Self::by(setpriv.arg(env!("CARGO_BIN_EXE_fault")), ANY_PORT, &[])
    }

    /// One in a network namespace of its own, where Toxiproxy's address is free. The namespace goes with it.
    pub fn alone() -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--", "sh", "-c"]);
        unshare.args(["ip link set lo up && exec \"$@\"", "sh"]);
        let fault = env!("CARGO_BIN_EXE_fault");
        Self::by(unshare.arg(fault), "127.0.0.1:8474", &[])
    }

    /// Starts it on a free port and waits until it says where.
    pub fn with(arguments: &[&str]) -> Self {
        Self::by(&mut fault(), ANY_PORT, arguments)
    }

    /// One under the name of Toxiproxy's server, with its options.
    pub fn toxiproxy_server(arguments: &[&str]) -> Self {
        let mut command = fault();
        Self::say_where(command.arg0("toxiproxy-server").args(arguments))
    }

    fn by(command: &mut Command, listen: &str, arguments: &[&str]) -> Self {
        Self::say_where(command.args(["daemon", "--listen", listen]).args(arguments))
    }

    fn say_where(command: &mut Command) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .expect("cargo has built it");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        lines.read_line(&mut line).expect("it says something");
        let api = line
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split(',').next());
        let api = api
            .unwrap_or_else(|| panic!("no address in {line:?}"))
            .parse()
            .expect("an address");
        // What else it says must not fill the pipe.
        let said = Arc::new(Mutex::new(String::new()));
        let all = Arc::clone(&said);
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                eprintln!("{line}");
                all.lock().unwrap().extend([line.as_str(), "\n"]);
            }
        });
        Self { child, api, said }
    }

    /// What it has said so far, behind its first line.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The whole answer, with its head.
    pub fn answer(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.api).expect("the API listens");
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).expect("write");
        // A body that is refused may not be read to its end.
        let _sent = stream.write_all(body);
        let mut answer = Vec::new();
        let _complete = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The status and the body.
    pub fn raw(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        let answer = self.answer(method, path, headers, body);
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or_else(|| panic!("no status in {answer:?}"));
        let body = answer
            .split_once("\r\n\r\n")
            .map_or("", |(_, body)| body)
            .to_owned();
        (status, body)
    }

    pub fn call(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, body) = self.raw(method, path, "", body.as_bytes());
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// A proxy to this server; where it listens.
    pub fn proxy(&self, name: &str, upstream: SocketAddr) -> SocketAddr {
        let body = format!(r#"{{"name":"{name}","listen":"127.0.0.1:0","upstream":"{upstream}"}}"#);
        let (status, proxy) = self.call("POST", "/proxies", &body);
        assert_eq!(status, 201, "{proxy}");
        proxy["listen"]
            .as_str()
            .expect("a text")
            .parse()
            .expect("an address")
    }

    /// `fault` with these words as a client of this daemon: its exit code, and what it says.
    pub fn client(&self, words: &[&str]) -> (Option<i32>, String) {
        client(&format!("http://{}", self.api), words)
    }

    /// The events from now on.
    pub fn events(&self) -> Events {
        let mut stream = TcpStream::connect(self.api).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
            .write_all(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .expect("write");
        let mut events = Events {
            stream,
            text: String::new(),
        };
        events.until(": watching");
        events
    }
}

/// `fault` with these words as a client of the daemon at `url`: its exit code, and what it says.
pub fn client(url: &str, words: &[&str]) -> (Option<i32>, String) {
    let mut command = fault();
    let output = command.args(words).env("TOXIPROXY_URL", url).output();
    let output = output.expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    let code = output.status.code();
    (code, String::from_utf8_lossy(&text).into_owned())
}

/// A daemon's events as they come.
pub struct Events {
    stream: TcpStream,
    text: String,
}

impl Events {
    /// Waits until an event contains this text.
    pub fn until(&mut self, wanted: &str) {
        let mut buffer = [0; 4096];
        while !self.text.contains(wanted) {
            let count = self.stream.read(&mut buffer).expect("an event");
            self.text += &String::from_utf8_lossy(&buffer[..count]);
        }
    }
}
