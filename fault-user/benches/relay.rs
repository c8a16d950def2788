//! The relay against direct loopback, `HAProxy` in TCP mode with `splice-auto`, and nginx stream, all in one run.
//!
//! `cargo bench -p fault-user --bench relay` prints a table of ratios. Proxies that are not installed are left
//! out, and said so (Debian: `apt-get install haproxy nginx libnginx-mod-stream`).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

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

fn await_port(address: SocketAddr) {
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < until, "nothing listens on {address}");
        thread::sleep(Duration::from_millis(10));
    }
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
            println!("{name} is left out: {error}");
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
    await_port(address);
    Some(proxy)
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
    await_port(address);
    Some(proxy)
}

fn start_fault(upstream: SocketAddr) -> Proxy {
    let folder = folder("fault");
    let api = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let program = Path::new(env!("CARGO_BIN_EXE_fault"));
    let listen = api.to_string();
    let mut proxy = spawn(
        "fault",
        program,
        &["daemon", "--listen", &listen, "--seed", "1"],
        api,
        folder,
    )
    .expect("cargo has built it");
    await_port(api);
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

fn faults(proxy: &Proxy, direct_bulk: f64) {
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
    let late =
        |part: usize| (times[times.len() * part / 100].saturating_sub(base)).as_secs_f64() * 1e3;
    println!(
        "latency of 20 ms: late by {:.2} ms (median), {:.2} ms (p99, goal: at most 1.5)",
        late(50),
        late(99)
    );
    let late = own_lateness(300);
    println!(
        "  a thread's own sleep of 20 ms here: late by {:.2} ms (median), {:.2} ms (p99)",
        late[150], late[297]
    );
    let shifted = bulk(proxy.address);
    println!(
        "throughput with 20 ms of latency: {:.2} of direct",
        shifted / direct_bulk
    );
    request(api, "DELETE", "/proxies/p/toxics/l", "");
    let start = Instant::now();
    for _ in 0..500 {
        request(api, "POST", toxics, r#"{"type":"latency","name":"l"}"#);
        request(api, "DELETE", "/proxies/p/toxics/l", "");
    }
    println!(
        "API changes, a connection each: {:.0} per second (goal: 1000)",
        1000.0 / start.elapsed().as_secs_f64()
    );
    let before = status(proxy.child.id(), "VmRSS");
    let mut idle: Vec<TcpStream> = (0..2000).map(|_| connect(proxy.address)).collect();
    for stream in &mut idle {
        stream.write_all(b"E").expect("write");
        stream.read_exact(&mut [0]).expect("read");
    }
    let after = status(proxy.child.id(), "VmRSS");
    println!(
        "idle connection: {:.1} KiB of the daemon's memory (goal: at most 16)",
        (after - before) / 2000.0
    );
    drop(idle);
}

fn main() {
    // Cargo passes --bench; a filter has no meaning here.
    let server = start_server();
    let fault = start_fault(server);
    let mut rows = vec![("direct", server), (fault.name, fault.address)];
    let others: Vec<Proxy> = [start_haproxy(server), start_nginx(server)]
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
    let (bulks, rates, trips): (Vec<f64>, Vec<f64>, Vec<f64>) = (
        bulks.into_iter().map(median).collect(),
        rates.into_iter().map(median).collect(),
        trips.into_iter().map(median).collect(),
    );
    println!(
        "{:8} {:>10} {:>8} {:>10} {:>8} {:>12} {:>10}",
        "", "bulk MB/s", "ratio", "conn/s", "ratio", "round trip us", "added us"
    );
    for (index, (name, _)) in rows.iter().enumerate() {
        println!(
            "{name:8} {:10.0} {:8.2} {:10.0} {:8.2} {:12.1} {:10.1}",
            bulks[index] / 1e6,
            bulks[index] / bulks[0],
            rates[index],
            rates[index] / rates[0],
            trips[index],
            trips[index] - trips[0]
        );
    }
    faults(&fault, bulks[0]);
}
