//! `fault demo`: its own client and server on loopback, before, during and after faults.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;

use super::{Failure, Outcome, exit};
use crate::inject::injection::InjectionOptions;
use crate::inject::preparation::prepare;
use crate::plan::Plan;
use crate::rule::{Rule, SystemResolver, Targets};
use crate::sys::net::interfaces::{Selection, list, select};
use crate::sys::preflight::{Need, preflight};
use crate::tell;

/// Requests in each phase.
const REQUESTS: usize = 60;
/// A request that takes longer than this counts as lost.
const PATIENCE: Duration = Duration::from_secs(3);
/// A fixed seed makes every demo the same.
const SEED: u64 = 42;

/// Demonstrate a fault: a client and a server before, during and after it.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The fault to demonstrate, without a target.
    #[arg(long, default_value = "loss=30%")]
    fault: String,
}

impl DemoArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// Missing privileges, or a fault that is unsupported here.
    pub fn execute(self) -> Outcome {
        preflight(&[Need::Programs])?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .context("starting the server of the demo")?;
        let address = listener.local_addr()?;
        std::thread::Builder::new()
            .name("demo-server".to_owned())
            .spawn(move || serve(&listener))
            .context("starting the server of the demo")?;
        let rule: Rule = format!("tcp:{} {}", address.port(), self.fault)
            .parse()
            .map_err(Failure::usage)?;
        let plan = plan_of(rule)?;
        tell::data(&format!(
            "An echo server on {address} and its client; {REQUESTS} requests in each phase.\n\n"
        ))?;
        let before = measure(address)?;
        show("before", &before)?;
        let during = measure_with_rule(&plan, address)?;
        show(&self.fault, &during)?;
        let after = measure(address)?;
        show("restored", &after)?;
        if after.iter().any(Option::is_none) {
            return Err(anyhow!("requests still fail after the rule was removed").into());
        }
        tell::data(&format!(
            "\nTo do the same to a program of yours:\n  sudo fault run -r 'tcp:PORT {}' -- CMD\n",
            self.fault
        ))?;
        Ok(exit::SUCCESS)
    }
}

fn plan_of(rule: Rule) -> Result<Plan, Failure> {
    let resolved = rule
        .resolve(&Targets::new(), &mut SystemResolver)
        .map_err(Failure::usage)?;
    let plan = Plan::new(&[(rule, resolved)], SEED, None, None).map_err(Failure::usage)?;
    if let Some((_, stream)) = plan.stream_rules().first() {
        return Err(Failure::usage(anyhow!(
            "`{}` is a stream fault; the demo takes packet faults, such as loss=30% or delay=50ms",
            stream.resolved.fault.name()
        )));
    }
    Ok(plan)
}

/// Measures with the rule applied, then removes it.
fn measure_with_rule(plan: &Plan, address: SocketAddr) -> Result<Vec<Option<Duration>>> {
    let loopback = select(&list()?, &Selection::Names(vec!["lo".to_owned()]))?;
    let injection = prepare(plan, &loopback, &InjectionOptions::default())?.start()?;
    let times = measure(address);
    injection.remove()?;
    times
}

/// The time of each request; `None` for one that failed.
fn measure(address: SocketAddr) -> Result<Vec<Option<Duration>>> {
    let mut times = Vec::with_capacity(REQUESTS);
    let mut connection = None;
    for _ in 0..REQUESTS {
        let start = Instant::now();
        let done = request(&mut connection, address);
        let time = match done {
            Ok(()) => Some(start.elapsed()),
            Err(error) if is_network(error.kind()) => {
                connection = None;
                None
            }
            Err(error) => return Err(error).context("the demo's request"),
        };
        times.push(time);
        // A server that is gone would make every further request wait its whole patience.
        if times.iter().filter(|time| time.is_none()).count() >= 3 {
            break;
        }
    }
    Ok(times)
}

fn request(connection: &mut Option<TcpStream>, address: SocketAddr) -> std::io::Result<()> {
    let stream = if let Some(stream) = connection {
        stream
    } else {
        let fresh = TcpStream::connect_timeout(&address, PATIENCE)?;
        fresh.set_nodelay(true)?;
        fresh.set_read_timeout(Some(PATIENCE))?;
        connection.insert(fresh)
    };
    let mut answer = [0; 5];
    stream.write_all(b"hello")?;
    stream.read_exact(&mut answer)
}

fn is_network(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::TimedOut
            | ErrorKind::WouldBlock
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
    )
}

/// Serves each client on a thread of its own until the process ends.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else {
            continue;
        };
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                if stream.write_all(&bytes[..count]).is_err() {
                    return;
                }
            }
        });
    }
}

/// One bar per request, on a logarithmic scale from 50 us to the time limit.
fn show(title: &str, times: &[Option<Duration>]) -> Result<()> {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let picture: String = times
        .iter()
        .map(|time| match time {
            None => '✗',
            Some(time) => {
                let decades = (time.as_secs_f64() / 50e-6).max(1.0).log10();
                // 50 us to 3 s are almost five decades; a bar is never outside of the array.
                let bar = BARS
                    .iter()
                    .enumerate()
                    .take_while(|(n, _)| f64::from(u8::try_from(*n).unwrap_or(7)) * 0.6 <= decades);
                bar.last().map_or(BARS[0], |(_, bar)| *bar)
            }
        })
        .collect();
    let mut sorted: Vec<Duration> = times.iter().flatten().copied().collect();
    sorted.sort_unstable();
    let failed = times.len() - sorted.len();
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    let slowest = sorted.last().copied().unwrap_or_default();
    tell::data(&format!(
        "{title:>10}  {picture}\n{:>10}  median {:.2} ms, slowest {:.1} ms, {failed} failed\n",
        "",
        median.as_secs_f64() * 1e3,
        slowest.as_secs_f64() * 1e3
    ))
}
