//! A user service on `MySQL` and Redis, as Gherkin features.

#[path = "../../../examples/mysql-redis-cucumber/fault_steps.rs"]
mod fault_steps;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Instant;

use cucumber::{World, given, then, writer::Stats as _};
use serde_json::Value;

use super::{Killed, python, story};
use crate::support::place::{PATIENCE, enter_fresh, wait_for};
use crate::support::servers::Server;
use fault_steps::{Faulty, Network, duration, with_fault_steps};

const SERVICE: (&str, u16) = ("127.0.0.1", 8000);

/// A scenario's world.
#[derive(Debug, World)]
#[world(init = Self::new)]
struct Users {
    network: Network,
}

impl Users {
    fn new() -> Self {
        Self {
            network: Network::by(env!("CARGO_BIN_EXE_fault")),
        }
    }
}

impl Faulty for Users {
    fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    async fn works(&mut self, name: &str) -> bool {
        assert_eq!(name, "the service", "only the service is asked");
        mode() == "read-write"
    }
}

/// The status and the body of an answer.
fn http(method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(SERVICE).expect("the service listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .expect("the service answers in time");
    let status = answer.split(' ').nth(1).and_then(|text| text.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (
        status.expect("a status"),
        serde_json::from_str(body).expect("JSON"),
    )
}

fn mode() -> String {
    let (_, health) = http("GET", "/health", "");
    health["mode"].as_str().unwrap().to_owned()
}

fn rename(user: u32, name: &str) -> u16 {
    http("PUT", &format!("/users/{user}"), name).0
}

/// Waits until readers get the name from the cache: the replica follows the primary a moment later.
fn settles(user: u32, name: &str) {
    wait_for(
        || {
            let (_, answer) = http("GET", &format!("/users/{user}"), "");
            answer["name"] == name && answer["source"] == "cache"
        },
        name,
    );
}

#[given(expr = "user {int} is {string}")]
#[then(expr = "user {int} becomes {string}")]
fn user_becomes(_world: &mut Users, user: u32, name: String) {
    // A Redis replica may still be on its way back from the scenario before.
    wait_for(|| rename(user, &name) == 200, "a write");
    settles(user, &name);
}

#[then(regex = r#"^user (\d+) becomes "(.+)" after (.+) at the least$"#)]
fn user_becomes_late(world: &mut Users, user: u32, name: String, least: String) {
    let start = Instant::now();
    assert_eq!(rename(user, &name), 200);
    assert!(start.elapsed() >= duration(&least), "{:?}", start.elapsed());
    user_becomes(world, user, name);
}

#[then(regex = r#"^user (\d+) reads "(.+)" from the (cache|database)$"#)]
fn user_reads(_world: &mut Users, user: u32, name: String, source: String) {
    let (status, answer) = http("GET", &format!("/users/{user}"), "");
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        (&answer["name"], &answer["source"]),
        (&name.into(), &source.into())
    );
}

#[given(expr = "renaming user {int} is answered with {int}")]
#[then(expr = "renaming user {int} is answered with {int}")]
fn renaming(_world: &mut Users, user: u32, status: u16) {
    assert_eq!(rename(user, "Nobody"), status);
}

#[then(expr = "user {int} is answered with {int}")]
fn reading(_world: &mut Users, user: u32, status: u16) {
    assert_eq!(http("GET", &format!("/users/{user}"), "").0, status);
}

#[then("the service is read-only")]
fn read_only(_world: &mut Users) {
    assert_eq!(mode(), "read-only");
}

/// `MariaDB` with an empty folder, which lets everyone in.
fn mysql(folder: &std::path::Path) -> Killed {
    let data = folder.join("mysql");
    let made = Command::new("mariadb-install-db")
        .args(["--no-defaults", "--user=mysql", "--skip-test-db"])
        .arg(format!("--datadir={}", data.display()))
        .stdout(Stdio::null())
        .status();
    assert!(
        made.expect("mariadb-server (cargo xtask setup --for test)")
            .success()
    );
    let child = Command::new("mariadbd")
        .args(["--no-defaults", "--user=mysql", "--bind-address=127.0.0.1"])
        .args(["--port=3306", "--skip-grant-tables", "--skip-name-resolve"])
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--socket={}", data.join("socket").display()))
        .stderr(Stdio::null())
        .spawn()
        .expect("mariadbd");
    wait_for(
        || TcpStream::connect(("127.0.0.1", 3306)).is_ok(),
        "MariaDB",
    );
    Killed(child)
}

fn replica(folder: &std::path::Path) -> Killed {
    let child = Command::new("redis-server")
        .args(["--port", "6380", "--save", "", "--repl-timeout", "5"])
        .args(["--replicaof", "127.0.0.1", "6379", "--dir"])
        .arg(folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server");
    wait_for(
        || TcpStream::connect(("127.0.0.1", 6380)).is_ok(),
        "the replica",
    );
    Killed(child)
}

#[test]
fn a_user_service_outlives_its_stores() {
    use std::os::unix::fs::PermissionsExt as _;
    enter_fresh();
    let folder = tempfile::tempdir().unwrap();
    // MariaDB runs as a user of its own.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let _mysql = mysql(folder.path());
    let _primary = Server::redis(6379, None);
    let _replica = replica(folder.path());
    let service = python("mysql-redis-cucumber")
        .args(["service.py", "8000"])
        .spawn();
    let _service = Killed(service.expect("python3"));
    wait_for(|| TcpStream::connect(SERVICE).is_ok(), "the service");

    // All in this thread, which is in the namespace.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let results = runtime.block_on(
        with_fault_steps(Users::cucumber())
            .max_concurrent_scenarios(1)
            .fail_on_skipped()
            .with_default_cli()
            .run(story("mysql-redis-cucumber").join("users.feature")),
    );
    assert!(!results.execution_has_failed(), "what failed is told above");
    assert_eq!(results.scenarios_stats().total(), 7);
}
