//! A network namespace for a test, servers in it, and the `fault` binary.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

/// How long anything may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `ip` with these words.
pub fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status();
    assert!(done.expect("ip runs").success(), "ip {words}");
}

/// Moves this thread, and so all that it starts, into a fresh namespace with loopback up.
pub fn enter_fresh() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    ip("link set lo up");
}

/// A second namespace, joined to this one by a veth pair: 10.77.0.1 and `fd77::1` here, .2 there.
pub struct Peer {
    pub name: String,
}

impl Peer {
    pub fn joined() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("fault-test-{}-{number}", std::process::id());
        ip(&format!("netns add {name}"));
        let peer = Self { name };
        ip("link add va type veth peer name vb");
        ip(&format!("link set vb netns {}", peer.name));
        for words in [
            "addr add 10.77.0.1/24 dev va",
            "-6 addr add fd77::1/64 dev va nodad",
            "link set va up",
        ] {
            ip(words);
        }
        for words in [
            "link set lo up",
            "addr add 10.77.0.2/24 dev vb",
            "-6 addr add fd77::2/64 dev vb nodad",
            "link set vb up",
        ] {
            ip(&format!("-n {} {words}", peer.name));
        }
        peer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let done = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("the namespace {} was not removed", self.name);
        }
    }
}

/// A server that is killed with the test.
pub struct Server {
    child: Child,
    pub port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        if let Err(error) = self.child.kill() {
            eprintln!("killing a server: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for a server: {error}");
        }
    }
}

impl Server {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Redis in this namespace, or in a named one, ready on both versions of IP.
    pub fn redis(port: u16, namespace: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut words: Vec<String> = namespace
            .map(|name| ["ip", "netns", "exec", name].map(str::to_owned).to_vec())
            .unwrap_or_default();
        let port_text = port.to_string();
        let options = [
            "--port",
            &port_text,
            "--save",
            "",
            "--protected-mode",
            "no",
            "--bind",
            "*",
            "-::*",
        ];
        words.push("redis-server".to_owned());
        words.extend(options.map(str::to_owned));
        let child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server (cargo xtask setup --for test)");
        let host: IpAddr = if namespace.is_some() {
            [10, 77, 0, 2].into()
        } else {
            [127, 0, 0, 1].into()
        };
        wait_for(
            || TcpStream::connect((host, port)).is_ok(),
            "redis to listen",
        );
        Self {
            child,
            port,
            _folder: folder,
        }
    }

    /// `PostgreSQL` in this namespace, with a database of its own, ready for `psql -U postgres`.
    pub fn postgres(port: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let programs = postgres_programs();
        let own = Command::new("chown")
            .args(["postgres"])
            .arg(folder.path())
            .status();
        assert!(own.unwrap().success());
        let as_postgres = |program: &Path| {
            let mut command = Command::new("setpriv");
            command.args([
                "--reuid",
                "postgres",
                "--regid",
                "postgres",
                "--clear-groups",
            ]);
            command
                .arg(program)
                .current_dir("/")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command
        };
        let made = as_postgres(&programs.join("initdb"))
            .args(["--no-sync", "--auth=trust", "-D"])
            .arg(&data)
            .status();
        assert!(made.expect("setpriv").success(), "initdb");
        let child = as_postgres(&programs.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-F", "-p", &port.to_string(), "-k"])
            .arg(folder.path())
            .spawn()
            .unwrap();
        let server = Self {
            child,
            port,
            _folder: folder,
        };
        wait_for(|| psql(port, 5).status.success(), "PostgreSQL to answer");
        server
    }
}

/// Where Debian keeps the programs of `PostgreSQL`.
fn postgres_programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL (cargo xtask setup --for test)");
    versions
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .next()
        .expect("a version of PostgreSQL")
}

/// The words of a query, which gives up after so many seconds.
pub fn psql_words(port: u16) -> Vec<String> {
    format!("psql -h 127.0.0.1 -p {port} -U postgres -d postgres -tAc")
        .split(' ')
        .map(str::to_owned)
        .chain(["select 6 * 7".to_owned()])
        .collect()
}

pub fn psql(port: u16, seconds: u32) -> Output {
    Command::new("timeout")
        .arg(seconds.to_string())
        .args(psql_words(port))
        .stdin(Stdio::null())
        .output()
        .expect("psql")
}

/// Waits until something is so.
pub fn wait_for(mut is_so: impl FnMut() -> bool, what: &str) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The binary under test.
pub fn fault() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fault"));
    command
        .stdin(Stdio::null())
        .env_remove("SUDO_UID")
        .env_remove("SUDO_GID");
    command
}

/// `fault` with these words, split at spaces; `RULE` words are given whole.
pub fn run(rules: &[&str], options: &str, command: &[&str]) -> Output {
    let mut words: Vec<&str> = vec!["run"];
    for rule in rules {
        words.extend(["-r", rule]);
    }
    words.extend(options.split(' ').filter(|word| !word.is_empty()));
    words.push("--");
    words.extend(command);
    fault().args(&words).output().expect("fault runs")
}

/// Rules in force for as long as this lives.
pub struct Hurt {
    child: Child,
    input: Option<ChildStdin>,
}

impl Hurt {
    /// Puts rules in force with these options; CMD does nothing.
    pub fn begin(rules: &[&str], options: &str) -> Self {
        Self::begin_by(fault(), rules, options)
    }

    /// The same with `command` in the place of `fault`.
    pub fn begin_by(mut command: Command, rules: &[&str], options: &str) -> Self {
        command.arg("run");
        for rule in rules {
            command.args(["-r", rule]);
        }
        command.args(options.split(' ').filter(|word| !word.is_empty()));
        command.args(["--allow-unfired", "--", "sh", "-c", "echo ready; cat"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line != "ready\n" {
            let mut error = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut error)
                .unwrap();
            panic!("{rules:?} {options}: {error}");
        }
        Self { child, input }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Heals, and gives the summary.
    pub fn end(mut self) -> String {
        self.input = None;
        let mut summary = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut summary)
            .unwrap();
        assert!(self.child.wait().unwrap().success(), "{summary}");
        summary
    }
}

impl Drop for Hurt {
    fn drop(&mut self) {
        self.input = None;
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            // A test that failed; nothing must outlive it.
            if let Err(error) = self.child.kill() {
                eprintln!("killing fault: {error}");
            }
        }
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for fault: {error}");
        }
    }
}

/// A connection to Redis.
pub struct Redis(TcpStream);

impl Redis {
    pub fn connect(host: &str, port: u16) -> std::io::Result<Self> {
        let address = SocketAddr::new(host.parse().unwrap(), port);
        let stream = TcpStream::connect_timeout(&address, Duration::from_millis(800))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(800)))?;
        Ok(Self(stream))
    }

    /// What seven bytes answer a PING.
    pub fn ping(&mut self) -> std::io::Result<[u8; 7]> {
        let mut answer = [0; 7];
        self.0.write_all(b"PING\r\n")?;
        self.0.read_exact(&mut answer)?;
        Ok(answer)
    }

    /// Reads what has been asked for before, for as long as it takes.
    pub fn late(&mut self) -> [u8; 7] {
        let mut answer = [0; 7];
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        self.0
            .read_exact(&mut answer)
            .expect("the connection survives");
        answer
    }
}
