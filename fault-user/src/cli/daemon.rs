//! `fault daemon`: the control API and its proxies.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::{TcpListener, UnixListener};

use crate::api::{self, Events, Guard, Proxies};
use crate::doctor::capabilities::Capability;
use crate::process::{open_files, rights};
use crate::relay::Engine;
use crate::tell::tell;

use super::inject::Ends;

/// Options of `fault daemon`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A JSON array of proxies (as for toxiproxy-server), with toxics inside if wanted
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the API listens; beyond loopback it needs --token
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["host", "port"])]
    listen: Option<SocketAddr>,
    /// The host of --listen, as toxiproxy-server takes it
    #[arg(long, default_value = "localhost")]
    host: String,
    /// The port of --listen, as toxiproxy-server takes it
    #[arg(long, default_value_t = 8474)]
    port: u16,
    /// Serves the API on a Unix socket (mode 0600) as well
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
    /// The seed of all randomness; drawn and printed when absent
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many threads carry connections; one per CPU when absent
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Seconds after which a silent UDP client is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    udp_idle: u64,
    /// Accepted for toxiproxy-server's sake: the metrics are always there
    #[arg(long, hide = true)]
    proxy_metrics: bool,
    /// Accepted for toxiproxy-server's sake: there is no Go runtime to measure
    #[arg(long, hide = true)]
    runtime_metrics: bool,
}

/// What is needed to the end: low ports, and programs for transparent proxies, which are loaded when the first one comes.
const RIGHTS: [Capability; 4] = [
    Capability::NetBindService,
    Capability::Bpf,
    Capability::Perfmon,
    Capability::NetAdmin,
];

/// Runs until SIGINT, SIGTERM or SIGHUP.
///
/// # Errors
///
/// When anything that was asked for can't be had: an address in use, a bad config file.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => draw_seed().context("can't draw a seed, give one with --seed")?,
    };
    open_files::raise();
    let mut rights = RIGHTS.to_vec();
    if args.config.is_some() || args.socket.is_some() {
        // They may lie in a user's folder. The relay's threads keep less.
        rights.push(Capability::DacOverride);
    }
    super::give_up(&rights);
    let engine = match args.threads {
        Some(threads) => Engine::start(threads),
        None => Engine::start_per_cpu(),
    };
    let engine = engine.context("can't start the relay's threads")?;
    let udp_idle = Duration::from_secs(args.udp_idle);
    let proxies = Arc::new(Proxies::new(engine, seed, udp_idle, Events::default())?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args, seed, proxies))
}

async fn serve(args: &Args, seed: u64, proxies: Arc<Proxies>) -> anyhow::Result<()> {
    // Before anything can be stopped half-way.
    let mut ends = Ends::listen()?;
    let listener = listen(args).await?;
    let address = listener.local_addr()?;
    let unix = args.socket.as_deref().map(bind_socket).transpose()?;
    if let Some(config) = &args.config {
        populate(&proxies, config).await?;
    }
    let token = args.token.as_deref().map(Arc::from);
    let tcp = api::router(
        Arc::clone(&proxies),
        Guard {
            token,
            is_socket: false,
        },
    );
    tokio::spawn(api::serve_tcp(listener, tcp));
    if let Some(unix) = unix {
        let router = api::router(
            Arc::clone(&proxies),
            Guard {
                token: None,
                is_socket: true,
            },
        );
        tokio::spawn(api::serve_unix(unix, router));
    }
    if args.socket.is_none() {
        super::give_up(&RIGHTS);
    }
    // It reads what comes from the network from here on.
    if let Err(error) = rights::confine(args.socket.as_deref()) {
        log::warn!("fault may do more than it needs to: {error:#}");
    }
    tokio::spawn(Arc::clone(proxies.rules()).tell(proxies.events().clone()));
    tell!("fault daemon: API on http://{address}, seed {seed}");
    ends.come().await;
    proxies.stop().await;
    if let Some(path) = &args.socket {
        std::fs::remove_file(path).with_context(|| format!("can't remove {}", path.display()))?;
    }
    Ok(())
}

async fn listen(args: &Args) -> anyhow::Result<TcpListener> {
    let address = match args.listen {
        Some(address) => address,
        None => resolve(&args.host, args.port)?,
    };
    if !is_loopback(address.ip()) && args.token.as_deref().is_none_or(str::is_empty) {
        bail!(
            "the API on {address} would be open to the network: give --token, or listen on 127.0.0.1"
        );
    }
    TcpListener::bind(address)
        .await
        .with_context(|| format!("the API can't listen on {address}"))
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Not by tokio, whose thread for it would keep rights that are given up here.
fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
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

/// Binds the socket so that nobody else can ever open it.
fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    remove_stale(path)?;
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    nix::sys::stat::umask(mask);
    bound.with_context(|| format!("the API can't listen on {}", path.display()))
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("can't look at {}", path.display()));
        }
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!(
                "{} exists and is no socket: choose another --socket",
                path.display()
            )
        }
        Ok(_) => {}
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!(
            "another daemon listens on {}: stop it or choose another --socket",
            path.display()
        );
    }
    std::fs::remove_file(path)
        .with_context(|| format!("can't remove the stale socket {}", path.display()))
}

async fn populate(proxies: &Proxies, path: &Path) -> anyhow::Result<()> {
    let config =
        std::fs::read(path).with_context(|| format!("can't read the config {}", path.display()))?;
    match proxies.populate(&config).await.1 {
        None => Ok(()),
        Some(error) => bail!("the config {}: {error}", path.display()),
    }
}

fn draw_seed() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
