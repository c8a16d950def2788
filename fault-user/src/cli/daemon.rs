//! `fault daemon`: the control API and its proxies.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::builder::{BoolishValueParser, FalseyValueParser};
use tokio::net::{TcpListener, UnixListener};

use crate::api::{self, Caller, Events, Guard, Proxies, VERSION, tell_hits};
use crate::relay::Engine;
use crate::sys::process::capabilities::Capability;
use crate::sys::process::files;
use crate::sys::process::files::Folder;
use crate::sys::process::rights;
use crate::tell::{self, tell};

use crate::session::outcome::give_up;
use crate::session::signals::EndSignals;

/// What follows the options in `fault daemon --help`.
const AFTER: &str = "\
Exit codes:
  0    it was interrupted; everything is removed
  2    an argument is wrong
  125  it could not start: an address is taken, or the file of --config is wrong

Examples:
  fault daemon
  fault daemon --config toxiproxy.json
  sudo fault daemon --socket /run/fault.sock
  FAULT_TOKEN=secret fault daemon --listen 0.0.0.0:8474

`fault add`, `list`, `remove` and `stats` are its clients.";

/// The arguments of `fault daemon`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = AFTER)]
pub struct Args {
    /// A JSON file with an array of proxies, as for toxiproxy-server; toxics may be included
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the API; one beyond loopback needs --token or --open
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["host", "port"])]
    listen: Option<SocketAddr>,
    /// The host of --listen, as in toxiproxy-server
    #[arg(long, default_value = "localhost")]
    host: String,
    /// The port of --listen, as in toxiproxy-server
    #[arg(long, default_value_t = 8474)]
    port: u16,
    /// Serve the API on a Unix socket (mode 0600) as well
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The token that every request must carry (Authorization: Bearer TOKEN)
    #[arg(
        long,
        value_name = "TOKEN",
        env = "FAULT_TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
    /// Let everyone who can connect use the API, as toxiproxy-server does; packet rules and transparent proxies are
    /// rejected
    #[arg(long, env = "FAULT_OPEN", value_parser = FalseyValueParser::new(), conflicts_with = "token")]
    open: bool,
    /// The random seed; default: drawn and printed
    #[arg(long, value_name = "N", value_parser = parse_seed, allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Number of threads for connections; default: one per CPU
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Seconds after which a silent UDP client is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    udp_idle: u64,
    /// Accepted for compatibility with toxiproxy-server: /metrics always includes the proxies
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    proxy_metrics: Option<bool>,
    /// Add this process to /metrics: CPU time, memory, open files
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    runtime_metrics: Option<bool>,
    /// Prints the version in toxiproxy-server's format
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    toxiproxy_version: Option<bool>,
}

/// Capabilities that the daemon keeps: low ports, and programs for transparent proxies, which are loaded with the first
/// such proxy.
const RIGHTS: [Capability; 5] = [
    Capability::NetBindService,
    Capability::Bpf,
    Capability::Perfmon,
    Capability::NetAdmin,
    Capability::NetRaw,
];

impl Args {
    /// The capabilities that the daemon keeps: in open mode only the one for low ports.
    fn rights(&self) -> &'static [Capability] {
        if self.open { &RIGHTS[..1] } else { &RIGHTS }
    }

    /// The token, if one is set. An empty one counts as unset.
    fn token(&self) -> Option<&str> {
        self.token.as_deref().filter(|token| !token.is_empty())
    }

    fn guard(&self) -> Guard {
        match self.token() {
            Some(token) => Guard::Token(Arc::from(token)),
            None if self.open => Guard::Open,
            None => Guard::Loopback,
        }
    }

    /// The caller that the config file and the Unix socket count as.
    fn owner(&self) -> Caller {
        if self.open {
            Caller::Anyone
        } else {
            Caller::Trusted
        }
    }
}

/// Parses a seed; it may be negative, as in toxiproxy-server.
fn parse_seed(text: &str) -> Result<u64, std::num::ParseIntError> {
    text.parse()
        .or_else(|error| text.parse().map(i64::cast_unsigned).map_err(|_| error))
}

/// Runs until SIGINT, SIGTERM or SIGHUP.
///
/// # Errors
///
/// The daemon can't start: an address is in use, or the config file is invalid.
pub fn run(args: &Args) -> anyhow::Result<()> {
    EndSignals::heed()?;
    if args.toxiproxy_version == Some(true) {
        return tell::data(&format!("toxiproxy-server version {VERSION}\n"));
    }
    let seed = match args.seed {
        Some(seed) => seed,
        None => draw_seed().context("can't draw a seed: give one with --seed")?,
    };
    let mut rights = args.rights().to_vec();
    if args.config.is_some() || args.socket.is_some() {
        // They may lie in a user's folder. The relay's threads keep less.
        rights.push(Capability::DacOverride);
    }
    // Its threads give up their rights themselves.
    let engine = match args.threads {
        Some(threads) => Engine::start(threads),
        None => Engine::start_per_cpu(),
    };
    let engine = engine.context("can't start the relay's threads")?;
    give_up(&rights);
    let listener = listen(args)?;
    let port = listener.local_addr()?.port();
    let udp_idle = Duration::from_secs(args.udp_idle);
    let proxies = Proxies::new(engine, seed, udp_idle, Events::default(), Some(port))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args, seed, Arc::new(proxies), listener))
}

async fn serve(
    args: &Args,
    seed: u64,
    proxies: Arc<Proxies>,
    listener: std::net::TcpListener,
) -> anyhow::Result<()> {
    // Before anything can be stopped half-way.
    let mut ends = EndSignals::listen()?;
    let listener = TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    let mut socket = args.socket.as_deref().map(Socket::bind).transpose()?;
    if let Some(config) = &args.config {
        populate(&proxies, config, args.owner()).await?;
    }
    let has_runtime_metrics = args.runtime_metrics == Some(true);
    let router = |guard| api::router(Arc::clone(&proxies), guard, has_runtime_metrics);
    tokio::spawn(api::serve_tcp(listener, router(args.guard())));
    if let Some(bound) = socket.as_mut().and_then(|socket| socket.bound.take()) {
        let guard = if args.open {
            Guard::Open
        } else {
            Guard::Socket
        };
        tokio::spawn(api::serve_unix(bound, router(guard)));
    } else {
        give_up(args.rights());
    }
    // It reads what comes from the network from here on.
    if let Err(error) = rights::confine(args.socket.as_deref()) {
        log::warn!("fault keeps capabilities that it does not need: {error:#}");
    }
    tokio::spawn(tell_hits(
        Arc::clone(proxies.rules()),
        proxies.events().clone(),
    ));
    let open = match args.guard() {
        Guard::Open => ", open to everyone (packet rules and transparent proxies are unavailable)",
        _ => "",
    };
    tell!("fault daemon: API on http://{address}{open}, seed {seed}");
    ends.come().await;
    proxies.stop().await;
    socket.map_or(Ok(()), Socket::remove)
}

fn listen(args: &Args) -> anyhow::Result<std::net::TcpListener> {
    let address = match args.listen {
        Some(address) => address,
        None => resolve(&args.host, args.port)?,
    };
    if !is_loopback(address.ip()) && args.token().is_none() && !args.open {
        bail!(
            "the API on {address} would be reachable from the network: give --token, listen on 127.0.0.1, or let \
             everyone use it with --open"
        );
    }
    let listener = bind(address).with_context(|| format!("the API can't listen on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// 0.0.0.0 includes the IPv6 addresses where IPv6 is available, as in toxiproxy-server.
fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    if address.ip() == IpAddr::from([0; 4])
        && let Ok(listener) = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, address.port()))
    {
        return Ok(listener);
    }
    std::net::TcpListener::bind(address)
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Resolved without tokio, whose thread would keep capabilities that are dropped here.
fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Ok((Ipv6Addr::UNSPECIFIED, port).into());
    }
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("--host {host} can't be resolved"))?
        .collect();
    let first = addresses
        .iter()
        .find(|address| address.is_ipv4())
        .or(addresses.first());
    first
        .copied()
        .with_context(|| format!("--host {host} has no address"))
}

/// The API's Unix socket.
struct Socket {
    folder: Folder,
    name: OsString,
    bound: Option<UnixListener>,
}

impl Socket {
    /// Binds it with its final permissions, and through no symbolic link.
    fn bind(path: &Path) -> anyhow::Result<Self> {
        let (folder, name) = files::split(path)?;
        let folder = Folder::open(&folder)?;
        let inside = folder.inside(&name);
        remove_stale(&inside).with_context(|| format!("--socket {}", path.display()))?;
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&inside);
        nix::sys::stat::umask(mask);
        let bound = bound.with_context(|| format!("the API can't listen on {}", path.display()))?;
        Ok(Self {
            folder,
            name,
            bound: Some(bound),
        })
    }

    fn remove(self) -> anyhow::Result<()> {
        self.folder.remove(&self.name)
    }
}

/// Removes a stale socket.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("it exists and is not a socket: choose another path")
        }
        Ok(_) => {}
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another daemon listens on it: stop that daemon or choose another path");
    }
    std::fs::remove_file(path).context("can't remove the stale socket")
}

async fn populate(proxies: &Proxies, path: &Path, caller: Caller) -> anyhow::Result<()> {
    let config =
        std::fs::read(path).with_context(|| format!("can't read the config {}", path.display()))?;
    match proxies.populate(&config, caller).await.1 {
        None => Ok(()),
        Some(error) => bail!("config {}: {error}", path.display()),
    }
}

fn draw_seed() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
