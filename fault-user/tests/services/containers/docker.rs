//! Docker with a world of its own, and what people start Toxiproxy's image with: Testcontainers and compose files.

use std::process::{Child, Command, Stdio};

use super::engine::{PAGE, enter_a_world_of_its_own, find, pack, remove_cgroups};
use crate::support::packages::{PYTEST, has, install_pytest_fault, packages, pip, pytest, run};
use crate::support::place::wait_for;

/// `fault` as Toxiproxy's server.
const IMAGE: &str = "localhost/fault-toxiproxy:test";
/// Busybox with a page.
const SERVER: &str = "localhost/server:test";
/// Testcontainers for Python.
const TESTCONTAINERS: &str = "testcontainers==4.15.0";
const DRIVERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");

/// A Docker daemon of this test's own.
struct Docker {
    daemon: Child,
    cgroup: String,
    folder: tempfile::TempDir,
}

impl Docker {
    /// `None`, said aloud, where Docker can't run.
    fn start() -> Option<Self> {
        for program in [
            "dockerd",
            "docker",
            "containerd",
            "runc",
            "busybox",
            "iptables",
        ] {
            if find(program).is_none() {
                eprintln!("skipped: no {program} (cargo xtask setup --for test)");
                return None;
            }
        }
        enter_a_world_of_its_own();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("a namespace of our own");
        let folder = tempfile::tempdir().expect("a folder");
        let cgroup = format!("fault-docker-{}", std::process::id());
        let log = std::fs::File::create(folder.path().join("log")).expect("a file");
        let daemon = Command::new("dockerd")
            .args(["--storage-driver", "vfs", "--cgroup-parent", &cgroup])
            .args([
                "--host",
                "unix:///run/docker.sock",
                "--exec-root",
                "/run/docker",
            ])
            .args([
                "--pidfile",
                "/run/docker.pid",
                "--data-root",
                "/run/docker-data",
            ])
            .args(["--default-ulimit", "nofile=1024:4096"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("dockerd");
        let docker = Self {
            daemon,
            cgroup,
            folder,
        };
        let is_ready = || {
            docker
                .command(&["version"])
                .output()
                .is_ok_and(|one| one.status.success())
        };
        wait_for(is_ready, "Docker to answer");
        let server = r#"ENTRYPOINT ["/bin/toxiproxy-server"]"#;
        docker.import(
            IMAGE,
            &["--change", server, "--change", r#"CMD ["-host=0.0.0.0"]"#],
        );
        docker.import(SERVER, &["--change", "ENV PATH=/bin"]);
        Some(docker)
    }

    fn import(&self, image: &str, options: &[&str]) {
        let archive = pack(self.folder.path());
        let words = [
            &["import"],
            options,
            &[archive.to_str().expect("UTF-8"), image],
        ]
        .concat();
        run(&mut self.command(&words));
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(words);
        self.at_home(&mut command);
        command
    }

    /// Has a client of Docker's find this daemon, and no registry or image of its own.
    fn at_home(&self, command: &mut Command) {
        command
            .env("DOCKER_HOST", "unix:///run/docker.sock")
            .env("DOCKER_CONFIG", self.folder.path())
            .env("TESTCONTAINERS_RYUK_DISABLED", "true")
            .stdin(Stdio::null());
    }

    fn docker(&self, words: &[&str]) -> String {
        run(&mut self.command(words))
    }

    /// A config file with a proxy to the container `server`.
    fn config(&self) -> String {
        let path = self.folder.path().join("toxiproxy.json");
        let config =
            r#"[{"name":"web","listen":"0.0.0.0:8666","upstream":"server:80","enabled":true}]"#;
        std::fs::write(&path, config).expect("write");
        path.to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        for line in self.docker(&["ps", "--all", "--quiet"]).lines() {
            self.docker(&["rm", "--force", line]);
        }
        let daemon = nix::unistd::Pid::from_raw(self.daemon.id().cast_signed());
        nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGTERM).expect("it is our child");
        self.daemon.wait().expect("it is our child");
        remove_cgroups(&self.cgroup);
    }
}

#[test]
fn testcontainers_for_node_starts_it_as_toxiproxy() {
    if !has("node") || !has("npm") {
        return;
    }
    // Its own HTTP client wants Node 22: this one is for Node 18 and later.
    let packages_json = r#"{"dependencies":{"@testcontainers/toxiproxy":"12.1.0"},"overrides":{"undici":"6.21.3"}}"#;
    let write =
        format!("echo '{packages_json}' > package.json && npm install --no-audit --no-fund");
    let folder = packages(
        "testcontainers-node",
        "node_modules/testcontainers",
        Command::new("sh").args(["-c", &write]),
    );
    let Some(docker) = Docker::start() else {
        return;
    };
    let mut driver = Command::new("node");
    driver
        .arg(format!("{DRIVERS}/testcontainers.mjs"))
        .args([IMAGE, SERVER, PAGE]);
    docker.at_home(&mut driver);
    assert_eq!(run(driver.current_dir(folder)), "driven\n");
}

#[test]
fn testcontainers_for_python_starts_it_with_a_config() {
    if !has("python3") || !has("pip") {
        return;
    }
    let folder = packages(
        "testcontainers-python",
        "testcontainers",
        &mut pip(&[TESTCONTAINERS]),
    );
    let Some(docker) = Docker::start() else {
        return;
    };
    let mut driver = Command::new("python3");
    driver
        .arg(format!("{DRIVERS}/testcontainers.py"))
        .args([IMAGE, SERVER, PAGE, &docker.config()])
        .env("PYTHONPATH", folder);
    docker.at_home(&mut driver);
    assert_eq!(run(&mut driver), "driven\n");
}

#[test]
fn testcontainers_with_pytest_fault() {
    if !has("python3") || !has("pip") {
        return;
    }
    let wanted = [&PYTEST[..], &[TESTCONTAINERS]].concat();
    let folder = packages("testcontainers-pytest", "testcontainers", &mut pip(&wanted));
    install_pytest_fault(&folder);
    let Some(docker) = Docker::start() else {
        return;
    };
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/testcontainers");
    let mut tests = pytest(&folder);
    tests.env("WEB_IMAGE", SERVER).current_dir(example);
    docker.at_home(&mut tests);
    assert!(run(&mut tests).contains("3 passed"));
}

#[test]
fn as_in_a_compose_file_services_find_it_by_its_name() {
    let Some(docker) = Docker::start() else {
        return;
    };
    docker.docker(&["network", "create", "project"]);
    let start = |name: &str, options: &[&str], image: &[&str]| {
        let words = [
            &["run", "--detach", "--network", "project", "--name", name],
            options,
            image,
        ]
        .concat();
        docker.docker(&words)
    };
    start(
        "server",
        &[],
        &[SERVER, "httpd", "-f", "-p", "80", "-h", "/www"],
    );
    let volume = format!("{}:/config.json:ro", docker.config());
    let options = ["--volume", &volume, "--publish", "18474:8474"];
    start(
        "toxiproxy",
        &options,
        &[IMAGE, "-host=0.0.0.0", "-config=/config.json"],
    );
    let get = |url: &str| {
        let words = [
            "run",
            "--rm",
            "--network",
            "project",
            SERVER,
            "wget",
            "-q",
            "-O",
            "-",
            url,
        ];
        docker.command(&words).output().expect("docker")
    };
    wait_for(
        || get("http://toxiproxy:8474/version").status.success(),
        "the API by its name",
    );
    assert_eq!(get("http://toxiproxy:8666/").stdout, PAGE.as_bytes());
    // From the host, at the published port.
    let mut fault = super::fault();
    let list = run(fault
        .arg("list")
        .env("TOXIPROXY_URL", "http://127.0.0.1:18474"));
    assert!(list.contains("web  [::]:8666 -> server:80"), "{list}");
}
