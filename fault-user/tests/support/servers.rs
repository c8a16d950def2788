//! Real servers, each in a process of its own.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::place::{PATIENCE, wait_for};

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

/// Writes a certificate with its key.
pub fn certify(certificate: &Path) {
    let public = certificate.with_extension("public");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-nodes", "-subj"])
        .args(["/CN=localhost", "-keyout"])
        .args([certificate, Path::new("-out"), &public])
        .output()
        .expect("openssl");
    let told = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{told}");
    let public = std::fs::read(public).unwrap();
    let both = std::fs::OpenOptions::new().append(true).open(certificate);
    both.unwrap().write_all(&public).unwrap();
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

    /// HTTP/2 and HTTP/1.1 with TLS, for any name.
    pub fn https(port: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let certificate = folder.path().join("certificate.pem");
        certify(&certificate);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/https.js");
        let child = Command::new("node")
            .args([script, &port.to_string()])
            .arg(certificate)
            .spawn()
            .expect("nodejs (cargo xtask setup --for test)");
        wait_for(
            || TcpStream::connect(("127.0.0.1", port)).is_ok(),
            "node to listen",
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

/// A connection to Redis.
pub struct Redis(TcpStream);

impl Redis {
    pub fn connect(host: &str, port: u16) -> std::io::Result<Self> {
        Self::connect_within(PATIENCE, host, port)
    }

    /// A connection that is not waited for if it is not there at once, and neither are its answers: for those that may not come.
    pub fn hasty(host: &str, port: u16) -> std::io::Result<Self> {
        Self::connect_within(Duration::from_millis(800), host, port)
    }

    fn connect_within(limit: Duration, host: &str, port: u16) -> std::io::Result<Self> {
        let address = SocketAddr::new(host.parse().unwrap(), port);
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
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
