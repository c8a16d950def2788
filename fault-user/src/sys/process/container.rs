//! Containers by name or id: Docker, Podman, containerd. No client program is needed; what the runtimes
//! keep in their state folders, or answer on their socket, is read.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::sys::process::proc::is_running;

/// Fewest characters of an id that stand for it, as in Docker.
const ID_PREFIX_MIN: usize = 3;
/// How long a runtime's socket may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most that a runtime may answer.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// A running container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its name; empty where the runtime has none.
    pub name: String,
    /// Its first process, as seen from here; 0 when it is not running.
    pub pid: i32,
    /// The runtime that keeps it.
    pub runtime: &'static str,
}

/// Where runtimes keep their state.
#[derive(Clone, Debug)]
pub struct RuntimePaths {
    /// Docker's socket.
    pub docker_socket: PathBuf,
    /// Podman's list of containers.
    pub podman_list: PathBuf,
    /// The folder in which Podman keeps a running container's process number.
    pub podman_run: PathBuf,
    /// The folder of containerd's running tasks.
    pub containerd_tasks: PathBuf,
    /// Whether process numbers here are those that runtimes write down: this is no PID namespace of a container's.
    pub hosts_processes: bool,
}

impl Default for RuntimePaths {
    fn default() -> Self {
        Self {
            docker_socket: "/run/docker.sock".into(),
            podman_list: "/var/lib/containers/storage/overlay-containers/containers.json".into(),
            podman_run: "/run/containers/storage/overlay-containers".into(),
            containerd_tasks: "/run/containerd/io.containerd.runtime.v2.task".into(),
            hosts_processes: sees_the_hosts_processes(),
        }
    }
}

/// Finds the one running container of that name, or whose id begins so.
///
/// # Errors
/// None, several, a stopped one, or a runtime whose socket may not be read.
pub fn find(places: &RuntimePaths, wanted: &str) -> Result<Container> {
    let mut refused = None;
    let mut all = Vec::new();
    for list in [docker, podman, containerd] {
        match list(places) {
            Ok(found) => all.extend(found),
            Err(error) => refused = Some(error),
        }
    }
    let exact: Vec<_> = all
        .iter()
        .filter(|one| one.name == wanted || one.id == wanted)
        .collect();
    let matching: Vec<_> = if exact.is_empty() && wanted.len() >= ID_PREFIX_MIN {
        all.iter()
            .filter(|one| one.id.starts_with(wanted))
            .collect()
    } else {
        exact
    };
    match matching.as_slice() {
        [one] if one.pid > 0 => Ok((*one).clone()),
        [one] if places.hosts_processes => bail!(
            "the container `{wanted}` ({}) is not running: start it first",
            one.runtime
        ),
        [one] => bail!(
            "the container `{wanted}` ({}) is not running, or its processes are not visible from this container: \
             share the host's process ids with --pid host (hostPID in Kubernetes)",
            one.runtime
        ),
        [] => {
            if let Some(error) = refused {
                return Err(error.context(format!("no container `{wanted}` found")));
            }
            bail!("no container `{wanted}`: {}", known(&all))
        }
        several => {
            let ids: Vec<_> = several
                .iter()
                .map(|one| format!("{} {}", one.runtime, short(&one.id)))
                .collect();
            bail!(
                "several containers are named `{wanted}`: give the id of one ({})",
                ids.join(", ")
            )
        }
    }
}

/// The names of all running containers, or their short ids where they have none. A runtime that can't be asked has
/// none: this is for completions, which only make suggestions.
#[must_use]
pub fn running(places: &RuntimePaths) -> Vec<String> {
    let mut all = Vec::new();
    for list in [docker, podman, containerd] {
        match list(places) {
            Ok(found) => all.extend(found),
            Err(error) => log::debug!("{error:#}"),
        }
    }
    names(&all).map(str::to_owned).collect()
}

/// The names of those that are running, or their short ids where they have none.
fn names(all: &[Container]) -> impl Iterator<Item = &str> {
    all.iter().filter(|one| one.pid > 0).map(|one| {
        if one.name.is_empty() {
            short(&one.id)
        } else {
            one.name.as_str()
        }
    })
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn known(all: &[Container]) -> String {
    let names: Vec<&str> = names(all).collect();
    let there = if names.is_empty() {
        "no Docker, Podman or containerd container is running here".to_owned()
    } else {
        format!("there are {}", names.join(", "))
    };
    format!(
        "{there} (containers of a rootless runtime are not found: give --pid with the container's process)"
    )
}

fn text(value: &Value, field: &str) -> String {
    value
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// Asks Docker's API. A machine without Docker has no containers of it.
fn docker(places: &RuntimePaths) -> Result<Vec<Container>> {
    let path = &places.docker_socket;
    if !path.exists() {
        return Ok(Vec::new());
    }
    let list = ask(path, "/containers/json?all=1").with_context(|| {
        format!(
            "can't query Docker on {} (run as root, or join the group docker)",
            path.display()
        )
    })?;
    let mut found = Vec::new();
    for entry in list.as_array().into_iter().flatten() {
        let id = text(entry, "Id");
        let names = entry.get("Names").and_then(Value::as_array);
        let name = names
            .and_then(|names| names.first())
            .and_then(Value::as_str)
            .unwrap_or_default();
        let pid = if text(entry, "State") == "running" {
            let detail = ask(path, &format!("/containers/{id}/json"))?;
            detail
                .pointer("/State/Pid")
                .and_then(Value::as_i64)
                .and_then(|pid| i32::try_from(pid).ok())
                .filter(|pid| places.is_process_of(*pid, &id))
                .unwrap_or(0)
        } else {
            0
        };
        found.push(Container {
            id,
            name: name.trim_start_matches('/').to_owned(),
            pid,
            runtime: "docker",
        });
    }
    Ok(found)
}

/// One GET over a Unix socket. HTTP/1.0, so that the answer ends where the connection does.
fn ask(socket: &Path, target: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // One write, so that the request is never seen in parts.
    let request = format!("GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    let end = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .context("no HTTP answer")?;
    let status = String::from_utf8_lossy(&answer[..end]);
    if status.split_whitespace().nth(1) != Some("200") {
        bail!("it answered {}", status.lines().next().unwrap_or_default());
    }
    Ok(serde_json::from_slice(&answer[end + 4..])?)
}

/// Reads the state of Podman's root containers.
fn podman(places: &RuntimePaths) -> Result<Vec<Container>> {
    let path = &places.podman_list;
    let list = match std::fs::read(path) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("can't read {} (run as root)", path.display()));
        }
    };
    let list: Value =
        serde_json::from_slice(&list).with_context(|| format!("reading {}", path.display()))?;
    let mut found = Vec::new();
    for entry in list.as_array().into_iter().flatten() {
        let id = text(entry, "id");
        let names = entry.get("names").and_then(Value::as_array);
        let name = names
            .and_then(|names| names.first())
            .and_then(Value::as_str)
            .unwrap_or_default();
        let pid = places.read_pid(&places.podman_run.join(&id).join("userdata/pidfile"), &id)?;
        found.push(Container {
            name: name.to_owned(),
            id,
            pid,
            runtime: "podman",
        });
    }
    Ok(found)
}

/// Reads the running tasks of containerd, of every namespace. A task that Docker started is known by Docker's
/// name already, and left out here.
fn containerd(places: &RuntimePaths) -> Result<Vec<Container>> {
    let mut found = Vec::new();
    let Ok(namespaces) = std::fs::read_dir(&places.containerd_tasks) else {
        return Ok(found);
    };
    for namespace in namespaces
        .flatten()
        .filter(|entry| entry.file_name() != "moby")
    {
        let Ok(tasks) = std::fs::read_dir(namespace.path()) else {
            continue;
        };
        for task in tasks.flatten() {
            let id = task.file_name().to_string_lossy().into_owned();
            found.push(Container {
                name: cri_name(&task.path().join("config.json")),
                pid: places.read_pid(&task.path().join("init.pid"), &id)?,
                id,
                runtime: "containerd",
            });
        }
    }
    Ok(found)
}

/// The name that Kubernetes gave a container: `POD/CONTAINER`.
fn cri_name(config: &Path) -> String {
    let Some(config) = std::fs::read(config)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
    else {
        return String::new();
    };
    let annotation = |name: &str| {
        config
            .get("annotations")
            .and_then(|all| all.get(name))
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let pod = annotation("io.kubernetes.cri.sandbox-name");
    let name = annotation("io.kubernetes.cri.container-name");
    if pod.is_empty() || name.is_empty() {
        name
    } else {
        format!("{pod}/{name}")
    }
}

impl RuntimePaths {
    /// The number in a pid file, or 0 when there is none or its process is gone.
    fn read_pid(&self, path: &Path, id: &str) -> Result<i32> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(error) => {
                return Err(error).with_context(|| format!("can't read {}", path.display()));
            }
        };
        let pid: i32 = text
            .trim()
            .parse()
            .with_context(|| format!("{} does not contain a number", path.display()))?;
        Ok(if self.is_process_of(pid, id) { pid } else { 0 })
    }

    /// Whether a process is there, and is what the runtime meant by its number. Inside of a container the same number
    /// may be another process's; there the cgroup, which runtimes name by the container's id, tells.
    fn is_process_of(&self, pid: i32, id: &str) -> bool {
        let is_meant = || {
            std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|cgroups| cgroups.contains(id))
        };
        is_running(pid) && (self.hosts_processes || is_meant())
    }
}

/// Whether process numbers are the host's.
fn sees_the_hosts_processes() -> bool {
    /// `PROC_PID_INIT_INO` in `linux/proc_ns.h`.
    const INITIAL_NAMESPACE_INODE: u64 = 0xEFFF_FFFC;
    std::fs::metadata("/proc/self/ns/pid")
        .is_ok_and(|namespace| namespace.ino() == INITIAL_NAMESPACE_INODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places below a folder of the test's own, with nothing in them.
    fn places(folder: &Path) -> RuntimePaths {
        RuntimePaths {
            docker_socket: folder.join("docker.sock"),
            podman_list: folder.join("containers.json"),
            podman_run: folder.join("run"),
            containerd_tasks: folder.join("tasks"),
            hosts_processes: true,
        }
    }

    fn add_podman(places: &RuntimePaths, containers: &[(&str, &str, Option<u32>)]) {
        let list: Vec<_> = containers
            .iter()
            .map(|(id, name, _)| serde_json::json!({"id": id, "names": [name]}))
            .collect();
        std::fs::write(&places.podman_list, serde_json::to_vec(&list).unwrap()).unwrap();
        for (id, _, pid) in containers {
            let folder = places.podman_run.join(id).join("userdata");
            std::fs::create_dir_all(&folder).unwrap();
            if let Some(pid) = pid {
                std::fs::write(folder.join("pidfile"), pid.to_string()).unwrap();
            }
        }
    }

    #[test]
    fn podman_containers_are_found_by_name_and_id() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let own = std::process::id();
        add_podman(
            &places,
            &[
                ("0123456789abcdef", "db", Some(own)),
                ("fedcba9876543210", "web", None),
            ],
        );
        let db = find(&places, "db").unwrap();
        assert_eq!(
            (db.pid, db.runtime),
            (i32::try_from(own).unwrap(), "podman")
        );
        assert_eq!(find(&places, "01234").unwrap(), db);
        assert_eq!(running(&places), ["db"]);
        let stopped = find(&places, "web").unwrap_err().to_string();
        assert!(stopped.contains("is not running"), "{stopped}");
        let unknown = find(&places, "cache").unwrap_err().to_string();
        assert!(
            unknown.starts_with("no container `cache`: there are db (containers of a rootless"),
            "{unknown}"
        );
        // Two characters are too few to be an id.
        assert!(find(&places, "01").is_err());
    }

    #[test]
    fn a_process_of_the_same_number_is_not_taken_for_the_containers() {
        let folder = tempfile::tempdir().unwrap();
        let mut places = places(folder.path());
        places.hosts_processes = false;
        add_podman(&places, &[("0123456789", "db", Some(std::process::id()))]);
        let error = find(&places, "db").unwrap_err().to_string();
        assert!(error.contains("--pid host"), "{error}");
    }

    #[test]
    fn a_socket_that_may_not_be_asked_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        // Nobody listens: to connect(2) the same as a socket of somebody else's.
        drop(std::os::unix::net::UnixListener::bind(&places.docker_socket).unwrap());
        let error = format!("{:#}", find(&places, "db").unwrap_err());
        assert!(
            error.contains("can't query Docker on") && error.contains("join the group docker"),
            "{error}"
        );
    }

    #[test]
    fn a_name_in_two_runtimes_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let own = std::process::id();
        add_podman(&places, &[("aaaa", "same", Some(own))]);
        let task = places.containerd_tasks.join("k8s.io/bbbb");
        std::fs::create_dir_all(&task).unwrap();
        std::fs::write(task.join("init.pid"), own.to_string()).unwrap();
        let annotations =
            serde_json::json!({"annotations": {"io.kubernetes.cri.container-name": "same"}});
        std::fs::write(task.join("config.json"), annotations.to_string()).unwrap();
        let error = find(&places, "same").unwrap_err().to_string();
        assert!(error.contains("several"), "{error}");
        assert_eq!(find(&places, "bbbb").unwrap().runtime, "containerd");
    }

    #[test]
    fn docker_is_asked_on_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let listener = std::os::unix::net::UnixListener::bind(&places.docker_socket).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let server = std::thread::spawn(move || {
            for body in [
                r#"[{"Id":"d0c4e4","Names":["/app"],"State":"running"}]"#.to_owned(),
                format!(r#"{{"State":{{"Pid":{own}}}}}"#),
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 512];
                let read = stream.read(&mut request).unwrap();
                assert!(request[..read].starts_with(b"GET /containers/"));
                write!(stream, "HTTP/1.0 200 OK\r\n\r\n{body}").unwrap();
            }
        });
        let app = find(&places, "app").unwrap();
        server.join().unwrap();
        assert_eq!(
            (app.id.as_str(), app.pid, app.runtime),
            ("d0c4e4", own, "docker")
        );
    }

    #[test]
    fn nothing_at_all_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(&places(folder.path()), "db").unwrap_err().to_string();
        assert!(
            error.contains("no Docker, Podman or containerd container is running"),
            "{error}"
        );
    }
}
