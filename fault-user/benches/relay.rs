//! The relay against direct loopback, `HAProxy` in TCP mode with `splice-auto`, nginx stream, and Toxiproxy where
//! `toxiproxy-server` is in `PATH`, all in one run.
//!
//! Prints one JSON object a line, as `cargo xtask bench` reads them. Proxies that are not installed or do not start are
//! left out, and said so (`cargo xtask setup --for bench` installs the first two).

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::measure;

const BULK: Duration = Duration::from_millis(1500);
const CONNECTING: Duration = Duration::from_millis(1500);
const ROUNDS: usize = 3;
const PINGS: usize = 4000;

/// A proxy process that is ended with the value.
struct Proxy {
    name: &'static str,
    child: Child,
    address: SocketAddr,
    api: Option<SocketAddr>,
    folder: PathBuf,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let ended = self.child.try_wait().expect("it is our child");
        if ended.is_some() {
            std::fs::remove_dir_all(&self.folder).expect("the folder is ours");
            return;
        }
        // SIGTERM, so that nginx takes its workers with it.
        let stopped = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits")),
            nix::sys::signal::Signal::SIGTERM,
        );
        stopped.expect("a child that has not been waited for can be signalled");
        self.child.wait().expect("a child can be waited for");
        std::fs::remove_dir_all(&self.folder).expect("the folder is ours");
    }
}

/// Answers `E` with an echo, `B` with bytes without end.
fn start_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("accept");
            thread::spawn(move || serve(stream));
        }
    });
    address
}

fn serve(mut stream: TcpStream) {
    stream.set_nodelay(true).expect("a TCP socket");
    let mut buffer = vec![b'x'; 256 * 1024];
    let Ok(count @ 1..) = stream.read(&mut buffer) else {
        return;
    };
    if buffer[0] == b'B' {
        while stream.write_all(&buffer).is_ok() {}
        return;
    }
    if stream.write_all(&buffer[..count]).is_err() {
        return;
    }
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the proxy listens");
    stream.set_nodelay(true).expect("a TCP socket");
    stream
}

/// Bytes per second of one connection.
fn bulk(address: SocketAddr) -> f64 {
    let mut stream = connect(address);
    stream.write_all(b"B").expect("write");
    let mut buffer = vec![0; 256 * 1024];
    stream.read_exact(&mut buffer).expect("read");
    let (start, mut total) = (Instant::now(), 0_u32);
    let mut rest = 0;
    while start.elapsed() < BULK {
        rest += stream.read(&mut buffer).expect("read");
        total += u32::try_from(rest / 1024).expect("small");
        rest %= 1024;
    }
    f64::from(total) * 1024.0 / start.elapsed().as_secs_f64()
}

/// New connections per second, each with one round trip, from two threads.
fn connections(address: SocketAddr) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut count = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    let mut stream = connect(address);
                    stream.write_all(b"E").expect("write");
                    let mut byte = [0];
                    stream.read_exact(&mut byte).expect("read");
                    // A reset leaves no TIME_WAIT behind, which would use up the ports.
                    socket2::SockRef::from(&stream)
                        .set_linger(Some(Duration::ZERO))
                        .expect("a TCP socket");
                    count += 1;
                }
                count
            })
        })
        .collect();
    thread::sleep(CONNECTING);
    stop.store(true, Ordering::Relaxed);
    let total: u32 = clients
        .into_iter()
        .map(|client| client.join().expect("no panic"))
        .sum();
    f64::from(total) / CONNECTING.as_secs_f64()
}

fn round_trips(address: SocketAddr, count: usize) -> Vec<Duration> {
    let mut stream = connect(address);
    let mut byte = *b"E";
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(&byte).expect("write");
            stream.read_exact(&mut byte).expect("read");
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("it is bound").port()
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("fault-bench-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    folder
}

/// Waits until a proxy that was started accepts connections; nothing where it doesn't.
fn once_it_listens(mut proxy: Proxy) -> Option<Proxy> {
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(proxy.address).is_err() {
        let ended = proxy.child.try_wait().expect("it is our child");
        if ended.is_some() || Instant::now() >= until {
            let reason = ended.map_or_else(
                || "it does not listen".to_owned(),
                |status| format!("it ended ({status})"),
            );
            eprintln!("{} is left out: {reason}", proxy.name);
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
    Some(proxy)
}

fn spawn(
    name: &'static str,
    program: &Path,
    arguments: &[&str],
    address: SocketAddr,
    folder: PathBuf,
) -> Option<Proxy> {
    let child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => Some(Proxy {
            name,
            child,
            address,
            api: None,
            folder,
        }),
        Err(error) => {
            eprintln!("{name} is left out: {error}");
            std::fs::remove_dir_all(&folder).expect("the folder is ours");
            None
        }
    }
}

fn start_haproxy(upstream: SocketAddr) -> Option<Proxy> {
    let folder = folder("haproxy");
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let config = folder.join("haproxy.cfg");
    let text = format!(
        "global\n maxconn 2000\ndefaults\n mode tcp\n option splice-auto\n timeout connect 5s\n timeout client 1m\n \
         timeout server 1m\nlisten l\n bind {address}\n server s {upstream}\n"
    );
    std::fs::write(&config, text).expect("the folder is writable");
    let config = config.to_str().expect("UTF-8").to_owned();
    let proxy = spawn(
        "haproxy",
        Path::new("/usr/sbin/haproxy"),
        &["-db", "-f", &config],
        address,
        folder,
    )?;
    once_it_listens(proxy)
}

fn start_nginx(upstream: SocketAddr) -> Option<Proxy> {
    let folder = folder("nginx");
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let config = folder.join("nginx.conf");
    let place = folder.display();
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nworker_processes auto;\npid {place}/pid;\n\
         error_log {place}/log;\nevents {{ worker_connections 4096; }}\n\
         stream {{ server {{ listen {address}; proxy_pass {upstream}; }} }}\n"
    );
    std::fs::write(&config, text).expect("the folder is writable");
    let config = config.to_str().expect("UTF-8").to_owned();
    let proxy = spawn(
        "nginx",
        Path::new("/usr/sbin/nginx"),
        &["-c", &config],
        address,
        folder,
    )?;
    once_it_listens(proxy)
}

fn start_toxiproxy(upstream: SocketAddr) -> Option<Proxy> {
    let (name, host) = ("toxiproxy", "127.0.0.1");
    let api = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let port = api.port().to_string();
    let program = Path::new("toxiproxy-server");
    let arguments = ["-host", host, "-port", &port];
    let proxy = once_it_listens(spawn(name, program, &arguments, api, folder(name))?)?;
    Some(with_proxy(proxy, upstream))
}

fn start_fault(upstream: SocketAddr) -> Proxy {
    let folder = folder("fault");
    let api = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let program = Path::new(env!("CARGO_BIN_EXE_fault"));
    let listen = api.to_string();
    let daemon = spawn(
        "fault",
        program,
        &["daemon", "--listen", &listen, "--seed", "1"],
        api,
        folder,
    )
    .expect("cargo has built it");
    with_proxy(once_it_listens(daemon).expect("it starts"), upstream)
}

/// Has a server with Toxiproxy's API listen for clients of `upstream`.
fn with_proxy(mut proxy: Proxy, upstream: SocketAddr) -> Proxy {
    let api = proxy.address;
    let body = format!(r#"{{"name":"p","listen":"127.0.0.1:0","upstream":"{upstream}"}}"#);
    let answer = request(api, "POST", "/proxies", &body);
    let listen = answer
        .split("\"listen\":\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next())
        .expect("an address");
    proxy.address = listen.parse().expect("an address");
    proxy.api = Some(api);
    proxy
}

fn request(api: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(api).expect("the API listens");
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    answer
}

/// A size of a process from /proc, in kB.
fn status(pid: u32, field: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text
        .lines()
        .find(|line| line.starts_with(field))
        .expect("a known field");
    line.split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("a number")
}

/// How late this machine wakes a thread that only sleeps, in milliseconds, sorted.
fn own_lateness(count: usize) -> Vec<f64> {
    let base = Duration::from_millis(20);
    let mut late: Vec<f64> = (0..count)
        .map(|_| {
            let start = Instant::now();
            thread::sleep(base);
            start.elapsed().saturating_sub(base).as_secs_f64() * 1e3
        })
        .collect();
    late.sort_unstable_by(f64::total_cmp);
    late
}

/// What toxics cost and how exact they are. `direct` is the rate of a connection without a proxy.
fn faults(proxy: &Proxy, direct: f64) {
    let api = proxy.api.expect("fault has an API");
    let toxics = "/proxies/p/toxics";
    request(
        api,
        "POST",
        toxics,
        r#"{"type":"latency","name":"l","attributes":{"latency":20}}"#,
    );
    let base = Duration::from_millis(20);
    let times = round_trips(proxy.address, 300);
    let own = own_lateness(300);
    for (part, what, goal) in [(50, "median", f64::INFINITY), (99, "p99", 1.5)] {
        let late = times[times.len() * part / 100].saturating_sub(base);
        let late = late.as_secs_f64() * 1e3;
        let text = if goal.is_finite() {
            format!("at most {goal}")
        } else {
            "shown only".to_owned()
        };
        measure(
            &format!("latency of 20 ms is late, {what} (beside a thread's own sleep)"),
            late,
            "ms",
            Some(own[own.len() * part / 100]),
            &text,
            late <= goal,
        );
    }
    let shifted = bulk(proxy.address);
    measure(
        "relay: bulk with 20 ms of latency, beside direct",
        shifted / 1e6,
        "MB/s",
        Some(direct / 1e6),
        "ratio at least 0.6",
        shifted / direct >= 0.6,
    );
    request(api, "DELETE", "/proxies/p/toxics/l", "");
    let start = Instant::now();
    for _ in 0..500 {
        request(api, "POST", toxics, r#"{"type":"latency","name":"l"}"#);
        request(api, "DELETE", "/proxies/p/toxics/l", "");
    }
    let changes = 1000.0 / start.elapsed().as_secs_f64();
    measure(
        "changes by the API, a connection each",
        changes,
        "1/s",
        None,
        "at least 1000",
        changes >= 1000.0,
    );
    idle(proxy);
}

/// The memory that connections take which nothing happens on.
fn idle(proxy: &Proxy) {
    let before = status(proxy.child.id(), "VmRSS");
    let mut idle: Vec<TcpStream> = (0..2000).map(|_| connect(proxy.address)).collect();
    for stream in &mut idle {
        stream.write_all(b"E").expect("write");
        stream.read_exact(&mut [0]).expect("read");
    }
    let each = (status(proxy.child.id(), "VmRSS") - before) / 2000.0;
    measure(
        "idle connection",
        each,
        "KiB",
        None,
        "at most 16",
        each <= 16.0,
    );
}

/// Prints the figures of each proxy beside those without one, and fault's connections beside `HAProxy`'s.
fn compare(names: &[&str], bulks: &[f64], rates: &[f64], trips: &[f64]) {
    for (index, name) in names.iter().enumerate().skip(1) {
        let is_own = *name == "fault";
        let (goal, least) = if is_own {
            ("ratio at least 0.9", 0.9)
        } else {
            ("shown only", 0.0)
        };
        measure(
            &format!("{name}: bulk, beside direct"),
            bulks[index] / 1e6,
            "MB/s",
            Some(bulks[0] / 1e6),
            goal,
            bulks[index] / bulks[0] >= least,
        );
        measure(
            &format!("{name}: connections, beside direct"),
            rates[index],
            "1/s",
            Some(rates[0]),
            "shown only",
            true,
        );
        measure(
            &format!("{name}: round trip, beside direct"),
            trips[index],
            "us",
            Some(trips[0]),
            "shown only",
            true,
        );
    }
    if let Some(haproxy) = names.iter().position(|name| *name == "haproxy") {
        measure(
            "fault: connections, beside haproxy",
            rates[1],
            "1/s",
            Some(rates[haproxy]),
            "ratio at least 1.2",
            rates[1] / rates[haproxy] >= 1.2,
        );
    }
}

fn main() {
    // Cargo passes --bench; a filter has no meaning here.
    let server = start_server();
    let fault = start_fault(server);
    let mut rows = vec![("direct", server), (fault.name, fault.address)];
    let others: Vec<Proxy> = [
        start_haproxy(server),
        start_nginx(server),
        start_toxiproxy(server),
    ]
    .into_iter()
    .flatten()
    .collect();
    rows.extend(others.iter().map(|proxy| (proxy.name, proxy.address)));
    // Round by round, so that what else the machine does hits all alike.
    let mut bulks = vec![Vec::new(); rows.len()];
    let mut rates = vec![Vec::new(); rows.len()];
    let mut trips = vec![Vec::new(); rows.len()];
    for _ in 0..ROUNDS {
        for (index, (_, address)) in rows.iter().enumerate() {
            bulks[index].push(bulk(*address));
            rates[index].push(connections(*address));
            trips[index].push(round_trips(*address, PINGS)[PINGS / 2].as_secs_f64() * 1e6);
        }
    }
    let medians = |all: Vec<Vec<f64>>| all.into_iter().map(median).collect::<Vec<_>>();
    let (bulks, rates, trips) = (medians(bulks), medians(rates), medians(trips));
    let names: Vec<_> = rows.iter().map(|(name, _)| *name).collect();
    compare(&names, &bulks, &rates, &trips);
    faults(&fault, bulks[0]);
}
