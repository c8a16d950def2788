//! `GET /metrics`: Prometheus text with Toxiproxy's metrics and those of fault.

use std::fmt::Write;
use std::io;
use std::time::Duration;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::unistd::{SysconfVar, sysconf};

use super::proxies::Proxies;
use crate::relay::{RelayStats, StreamDirection};
use crate::session::standing::RuleStatus;

struct Series {
    labels: String,
    stats: RelayStats,
}

/// Escapes a label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// All current metrics, with those of `rules` as listed by the API.
#[must_use]
pub fn render(proxies: &Proxies, rules: &[RuleStatus]) -> String {
    let all = series(proxies);
    let mut text = String::new();
    bytes(
        &mut text,
        "toxiproxy_proxy_received_bytes_total",
        "Bytes that the proxy has read.",
        &all,
        |stats| stats.received_bytes,
    );
    bytes(
        &mut text,
        "toxiproxy_proxy_sent_bytes_total",
        "Bytes that the proxy has written.",
        &all,
        |stats| stats.sent_bytes,
    );
    plain(
        &mut text,
        "fault_proxy_connections_open",
        "gauge",
        "Open connections or UDP clients.",
        &all,
        |stats| stats.open as u64,
    );
    plain(
        &mut text,
        "fault_proxy_connections_total",
        "counter",
        "Accepted connections or UDP clients.",
        &all,
        |stats| stats.accepted,
    );
    plain(
        &mut text,
        "fault_proxy_upstream_failures_total",
        "counter",
        "Connections whose upstream could not be reached.",
        &all,
        |stats| stats.refused,
    );
    toxics(
        &mut text,
        "fault_toxic_connections_total",
        "Connections that a toxic was applied to.",
        &all,
        |toxic| toxic.connections,
    );
    toxics(
        &mut text,
        "fault_toxic_hits_total",
        "Chunks, datagrams, requests or ends that a toxic acted on.",
        &all,
        |toxic| toxic.hits,
    );
    packet_rules(&mut text, rules);
    text
}

fn series(proxies: &Proxies) -> Vec<Series> {
    proxies
        .all()
        .iter()
        .map(|proxy| {
            let (listen, upstream) = proxy.addresses();
            let labels = format!(
                "listener=\"{}\",proxy=\"{}\",upstream=\"{}\"",
                escaped(&listen),
                escaped(proxy.relay().name()),
                escaped(&upstream)
            );
            Series {
                labels,
                stats: proxy.relay().stats(),
            }
        })
        .collect()
}

fn packet_rules(text: &mut String, rules: &[RuleStatus]) {
    type Figure = fn(&RuleStatus) -> u64;
    let figures: [(_, _, Figure); 2] = [
        (
            "fault_rule_seen_packets_total",
            "Packets that a rule matched.",
            |rule| rule.seen,
        ),
        (
            "fault_rule_hit_packets_total",
            "Packets that a rule hit.",
            |rule| rule.hits,
        ),
    ];
    for (name, help, figure) in figures {
        head(text, name, "counter", help);
        for rule in rules {
            let shown = escaped(&rule.rule);
            let (id, value) = (rule.id, figure(rule));
            line(
                text,
                format_args!("{name}{{id=\"{id}\",rule=\"{shown}\"}} {value}"),
            );
        }
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    line(text, format_args!("# HELP {name} {help}"));
    line(text, format_args!("# TYPE {name} {kind}"));
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("writing to a string does not fail");
}

fn bytes(
    text: &mut String,
    name: &str,
    help: &str,
    all: &[Series],
    of: impl Fn(&RelayStats) -> [u64; 2],
) {
    head(text, name, "counter", help);
    for series in all {
        for direction in StreamDirection::ALL {
            let value = of(&series.stats)[direction as usize];
            line(
                text,
                format_args!(
                    "{name}{{direction=\"{}\",{}}} {value}",
                    direction.name(),
                    series.labels
                ),
            );
        }
    }
}

fn plain(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    all: &[Series],
    of: impl Fn(&RelayStats) -> u64,
) {
    head(text, name, kind, help);
    for series in all {
        line(
            text,
            format_args!("{name}{{{}}} {}", series.labels, of(&series.stats)),
        );
    }
}

fn toxics(
    text: &mut String,
    name: &str,
    help: &str,
    all: &[Series],
    of: impl Fn(&crate::relay::ToxicStats) -> u64,
) {
    head(text, name, "counter", help);
    for series in all {
        for toxic in &series.stats.toxics {
            line(
                text,
                format_args!(
                    "{name}{{direction=\"{}\",{},toxic=\"{}\",type=\"{}\"}} {}",
                    toxic.stream,
                    series.labels,
                    escaped(&toxic.name),
                    toxic.kind,
                    of(toxic)
                ),
            );
        }
    }
}

/// Adds the resource usage of this process, under the names of Prometheus's clients.
///
/// # Errors
/// `/proc` can't be read.
pub fn process(text: &mut String) -> io::Result<()> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let cpu = [usage.user_time(), usage.system_time()]
        .map(|time| Duration::from_micros(time.num_microseconds().unsigned_abs()));
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let page_bytes = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or_default();
    let mut memory = pages
        .split_whitespace()
        .map(|pages| pages.parse::<i64>().unwrap_or_default() * page_bytes);
    let open_files = std::fs::read_dir("/proc/self/fd")?.count();
    let (max_files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let figures = [
        (
            "process_cpu_seconds_total",
            "counter",
            "CPU time, of user and system.",
            (cpu[0] + cpu[1]).as_secs_f64().to_string(),
        ),
        (
            "process_virtual_memory_bytes",
            "gauge",
            "Virtual memory.",
            memory.next().unwrap_or_default().to_string(),
        ),
        (
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory.",
            memory.next().unwrap_or_default().to_string(),
        ),
        (
            "process_open_fds",
            "gauge",
            "Open file descriptors.",
            open_files.to_string(),
        ),
        (
            "process_max_fds",
            "gauge",
            "The limit of open file descriptors.",
            max_files.to_string(),
        ),
    ];
    for (name, kind, help, value) in figures {
        head(text, name, kind, help);
        line(text, format_args!("{name} {value}"));
    }
    Ok(())
}
