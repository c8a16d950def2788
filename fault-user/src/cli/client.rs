//! `fault list`, `add`, `remove`, `reset`, `stats`, `events`: a client of the daemon's API.

use anyhow::{Context, anyhow, bail};
use axum::body::Bytes;
use axum::http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::net::{TcpStream, UnixStream};

use crate::relay::RelayFault;
use crate::rule::units::parse_duration;
use crate::rule::{Rule, RuleError, catalog, nearest};
use crate::session::outcome::Failure;
use crate::tell;

/// The daemon to talk to.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// The daemon's API: http://HOST:PORT, HOST:PORT, or unix:PATH
    #[arg(
        long,
        value_name = "URL",
        env = "TOXIPROXY_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:8474"
    )]
    url: String,
    /// The daemon's token
    #[arg(
        long,
        value_name = "TOKEN",
        env = "FAULT_TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
}

/// Options of `fault list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    target: ClientArgs,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// Options of `fault stats`.
#[derive(Debug, clap::Args)]
pub struct StatsArgs {
    #[command(flatten)]
    target: ClientArgs,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// What to add.
#[derive(Debug, clap::Args)]
pub struct AddArgs {
    #[command(flatten)]
    target: ClientArgs,
    #[command(subcommand)]
    what: Add,
}

#[derive(Debug, clap::Subcommand)]
enum Add {
    /// Add a packet rule for all traffic of the daemon's host (the daemon needs root)
    Rule {
        /// TARGET FAULT[=ARGS] [MODIFIER…], e.g. 'tcp:5432 loss=30%'
        rule: String,
        /// Accept a rule that matches SSH or the control API
        #[arg(long)]
        force: bool,
    },
    /// Add a proxy
    Proxy {
        /// Its name
        name: String,
        /// Where it listens, HOST:PORT (udp:HOST:PORT for datagrams)
        listen: String,
        /// Where it connects to, HOST:PORT
        upstream: String,
        /// Add the proxy disabled
        #[arg(long)]
        disabled: bool,
    },
    /// Add a toxic to a proxy
    Toxic {
        /// The proxy's name
        proxy: String,
        /// The fault: latency, bandwidth, timeout, …
        kind: String,
        /// Its attributes, e.g. latency=200 (ms) or latency=200ms
        #[arg(value_name = "NAME=VALUE")]
        attributes: Vec<String>,
        /// Its name; default: the type and the stream, e.g. `latency_downstream`
        #[arg(long)]
        name: Option<String>,
        /// upstream (to the server) or downstream (to the client)
        #[arg(long, default_value = "downstream")]
        stream: String,
        /// The fraction of connections that it applies to, 0 to 1
        #[arg(long, default_value_t = 1.0)]
        toxicity: f64,
        #[command(flatten)]
        asked: AskedArgs,
    },
}

/// Which connections a toxic applies to, by what their clients ask for.
#[derive(Debug, clap::Args)]
struct AskedArgs {
    /// Only connections whose TLS client asks for this server, such as *.example.com
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// Only connections whose first HTTP/1 request is for this host
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// Only connections whose TLS client offers this protocol, such as h2
    #[arg(long, value_name = "PROTOCOL")]
    alpn: Option<String>,
}

/// What to remove.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    target: ClientArgs,
    #[command(subcommand)]
    what: Remove,
}

#[derive(Debug, clap::Subcommand)]
enum Remove {
    /// Remove a packet rule
    Rule {
        /// Its number, as `fault list` shows it
        id: u64,
    },
    /// Remove a proxy
    Proxy {
        /// Its name
        name: String,
    },
    /// Remove a toxic
    Toxic {
        /// The proxy's name
        proxy: String,
        /// The toxic's name
        name: String,
    },
}

/// Prints the proxies with their toxics, and the packet rules.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request.
pub fn list(args: &ListArgs) -> anyhow::Result<()> {
    let proxies = call(&args.target, Method::GET, "/proxies", None)?;
    let rules = call(&args.target, Method::GET, "/v1/rules", None)?;
    if args.json {
        let all = json!({"proxies": proxies, "rules": rules});
        return tell::data(&format!("{all:#}\n"));
    }
    let mut text = String::new();
    for proxy in proxies.as_object().into_iter().flat_map(Map::values) {
        let state = if proxy["enabled"] == true {
            ""
        } else {
            " (disabled)"
        };
        line(
            &mut text,
            format_args!(
                "{}  {} -> {}{state}",
                plain(&proxy["name"]),
                plain(&proxy["listen"]),
                plain(&proxy["upstream"])
            ),
        );
        for toxic in proxy["toxics"].as_array().into_iter().flatten() {
            let asked = ["sni", "host", "alpn"].map(|key| match toxic[key].as_str() {
                Some(value) => format!("{key}={value} "),
                None => String::new(),
            });
            line(
                &mut text,
                format_args!(
                    "  {}  {} {} toxicity={} {}{}",
                    plain(&toxic["name"]),
                    plain(&toxic["stream"]),
                    plain(&toxic["type"]),
                    toxic["toxicity"],
                    asked.concat(),
                    toxic["attributes"]
                ),
            );
        }
    }
    for rule in rules.as_array().into_iter().flatten() {
        line(
            &mut text,
            format_args!(
                "rule {}  {}  hits={} of {} packets, by {}",
                rule["id"],
                plain(&rule["rule"]),
                rule["hits"],
                rule["seen"],
                plain(&rule["mechanism"])
            ),
        );
    }
    tell::data(&text)
}

/// Adds a rule, a proxy or a toxic and prints it as JSON.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request, or an attribute is not NAME=VALUE.
pub fn add(args: &AddArgs) -> Result<(), Failure> {
    let (path, body) = match &args.what {
        Add::Rule { rule, force } => {
            // Here a mistake can be pointed at.
            rule.parse::<Rule>().map_err(Failure::usage)?;
            (format!("/v1/rules?force={force}"), json!(rule))
        }
        Add::Proxy {
            name,
            listen,
            upstream,
            disabled,
        } => {
            for address in [listen, upstream] {
                if address.parse::<u16>().is_ok() {
                    return Err(Failure::usage(anyhow!(
                        "`{address}` has no host\nhelp: give HOST:PORT, such as 127.0.0.1:{address}"
                    )));
                }
            }
            let body =
                json!({"name": name, "listen": listen, "upstream": upstream, "enabled": !disabled});
            ("/proxies".to_owned(), body)
        }
        Add::Toxic {
            proxy,
            kind,
            attributes,
            name,
            stream,
            toxicity,
            asked: AskedArgs { sni, host, alpn },
        } => {
            let fault = known_kind(kind)?;
            let attributes = attributes
                .iter()
                .map(|text| attribute(text, fault.as_ref()))
                .collect::<anyhow::Result<Map<_, _>>>()?;
            let body = json!({
                "name": name, "type": kind, "stream": stream, "toxicity": toxicity,
                "sni": sni, "host": host, "alpn": alpn, "attributes": attributes,
            });
            (format!("/proxies/{}/toxics", escaped(proxy)), body)
        }
    };
    let added = call(&args.target, Method::POST, &path, Some(&body))
        .map_err(|error| explained(args, error))?;
    Ok(tell::data(&format!("{added:#}\n"))?)
}

/// The stream fault of a toxic type; `None` for a packet fault, whose attributes the daemon validates.
fn known_kind(kind: &str) -> anyhow::Result<Option<RelayFault>> {
    let fault = RelayFault::of_kind(kind);
    if fault.is_some() || catalog::spec(kind).is_some() {
        return Ok(fault);
    }
    bail!(
        "unknown toxic type `{kind}`{}: {}",
        did_you_mean(kind, RelayFault::KINDS),
        RelayFault::KINDS.join(", ")
    )
}

/// The nearest name, as a question.
fn did_you_mean(wrong: &str, names: &[&str]) -> String {
    let nearest = nearest(wrong, names.iter().copied());
    nearest.map_or_else(String::new, |name| format!(", did you mean `{name}`?"))
}

/// Parses NAME=VALUE. The value is JSON if it parses as JSON, otherwise a string. A time may have a unit.
fn attribute(text: &str, fault: Option<&RelayFault>) -> anyhow::Result<(String, Value)> {
    let (name, value) = text
        .split_once('=')
        .with_context(|| format!("{text:?} is not an attribute: expected NAME=VALUE"))?;
    let read = || serde_json::from_str(value).unwrap_or_else(|_not_json| json!(value));
    let Some(fault) = fault else {
        return Ok((name.to_owned(), read()));
    };
    let names = fault.attribute_names();
    let lower = name.to_ascii_lowercase();
    let known = fault.canonical(&lower);
    if !names.contains(&known) {
        bail!(
            "{} has no attribute `{name}`{}: it has {}",
            fault.kind(),
            did_you_mean(name, names),
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            }
        );
    }
    let read = match (read(), unit_of(fault, known)) {
        (Value::String(text), Some((unit, unit_ns))) => time(known, &text, unit, unit_ns)?,
        (other, _) => other,
    };
    Ok((known.to_owned(), read))
}

/// The unit of an attribute that is a time: its name, and its nanoseconds.
fn unit_of(fault: &RelayFault, attribute: &str) -> Option<(&'static str, u64)> {
    match (fault, attribute) {
        (RelayFault::Slicer(_), "delay") => Some(("microseconds", 1_000)),
        (_, "latency" | "jitter" | "delay" | "timeout" | "time" | "max_wait") => {
            Some(("milliseconds", 1_000_000))
        }
        _ => None,
    }
}

/// Converts a time with a unit to the number that the API expects.
fn time(name: &str, text: &str, unit: &str, unit_ns: u64) -> anyhow::Result<Value> {
    match parse_duration(text) {
        Ok(ns) if ns.is_multiple_of(unit_ns) => Ok(json!(ns / unit_ns)),
        _ => bail!("{name}={text}: expected whole {unit}, such as 200, or a time such as 200ms"),
    }
}

/// Adds the names of the proxies to the error about an unknown proxy, and what to do about a toxic's name that is taken.
fn explained(AddArgs { target, what }: &AddArgs, error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    if let Add::Toxic {
        name,
        kind,
        stream,
        proxy,
        ..
    } = what
        && text.ends_with("toxic already exists")
    {
        let name = name.clone().unwrap_or_else(|| format!("{kind}_{stream}"));
        return anyhow!(
            "{text}: {proxy} has {name}\nhelp: give the new one another name with --name, or remove the old one: fault remove \
             toxic {proxy} {name}"
        );
    }
    if !text.ends_with("proxy not found") {
        return error;
    }
    let names = match call(target, Method::GET, "/proxies", None) {
        Ok(Value::Object(proxies)) if !proxies.is_empty() => {
            let names: Vec<_> = proxies.keys().map(String::as_str).collect();
            names.join(", ")
        }
        _ => "none".to_owned(),
    };
    anyhow!("{error:#}; the daemon's proxies: {names}")
}

/// Removes a rule, a proxy or a toxic.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request.
pub fn remove(args: &RemoveArgs) -> anyhow::Result<()> {
    let path = match &args.what {
        Remove::Rule { id } => format!("/v1/rules/{id}"),
        Remove::Proxy { name } => format!("/proxies/{}", escaped(name)),
        Remove::Toxic { proxy, name } => {
            format!("/proxies/{}/toxics/{}", escaped(proxy), escaped(name))
        }
    };
    call(&args.target, Method::DELETE, &path, None).map(|_| ())
}

/// Enables every proxy, removes every toxic and every rule.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request.
pub fn reset(target: &ClientArgs) -> anyhow::Result<()> {
    call(target, Method::POST, "/reset", None).map(|_| ())
}

/// Prints the traffic of the proxies.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request.
pub fn stats(args: &StatsArgs) -> anyhow::Result<()> {
    let stats = call(&args.target, Method::GET, "/v1/stats", None)?;
    if args.json {
        return tell::data(&format!("{stats:#}\n"));
    }
    let mut text = String::new();
    for (name, proxy) in stats.as_object().into_iter().flatten() {
        line(
            &mut text,
            format_args!(
                "{name}  open={} accepted={} refused={} upstream={}B downstream={}B",
                proxy["open"],
                proxy["accepted"],
                proxy["refused"],
                proxy["sent_bytes"][0],
                proxy["sent_bytes"][1]
            ),
        );
        for toxic in proxy["toxics"].as_array().into_iter().flatten() {
            line(
                &mut text,
                format_args!(
                    "  {}  {} {} connections={} hits={}",
                    plain(&toxic["name"]),
                    plain(&toxic["stream"]),
                    plain(&toxic["type"]),
                    toxic["connections"],
                    toxic["hits"]
                ),
            );
        }
    }
    tell::data(&text)
}

/// Prints events, one JSON object per line, until the daemon ends or the output is closed.
///
/// # Errors
///
/// The daemon can't be reached or rejects the request.
pub fn events(target: &ClientArgs) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut answer = send(target, Method::GET, "/v1/events", None).await?;
        let mut pending = String::new();
        while let Some(frame) = answer.frame().await {
            let Ok(frame) = frame else {
                bail!("the daemon has ended");
            };
            pending += &String::from_utf8_lossy(frame.data_ref().unwrap_or(&Bytes::new()));
            while let Some(end) = pending.find('\n') {
                let line: String = pending.drain(..=end).collect();
                if let Some(event) = line.strip_prefix("data: ") {
                    tell::data(event)?;
                }
            }
        }
        Ok(())
    })
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    use std::fmt::Write;
    writeln!(text, "{line}").expect("writing to a string does not fail");
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// Encodes a name as a path segment.
pub(super) fn escaped(name: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes()
        .map(|byte| {
            if keep(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Sends a request to the daemon and returns its answer; null for an empty one.
///
/// # Errors
/// The daemon can't be reached or rejects the request.
pub(super) fn call(
    target: &ClientArgs,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    runtime()?.block_on(async {
        let answer = send(target, method, path, body).await?;
        let bytes = answer
            .collect()
            .await
            .context("the daemon's answer is incomplete")?
            .to_bytes();
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes)
            .context("the daemon's answer is not JSON: is it a fault daemon?")
    })
}

/// A daemon's address without `http://` and credentials, and the password of these, which is the token:
/// `http://any:TOKEN@HOST:PORT`, as other clients have it.
fn split_password(url: &str) -> (&str, Option<&str>) {
    if url.starts_with("unix:") {
        return (url, None);
    }
    let url = url.strip_prefix("http://").unwrap_or(url);
    match url.rsplit_once('@') {
        Some((credentials, address)) => {
            (address, credentials.split_once(':').map(|(_, token)| token))
        }
        None => (url, None),
    }
}

/// Sends a request. An error status becomes an error with the daemon's message.
async fn send(
    target: &ClientArgs,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Incoming> {
    let (url, password) = split_password(target.url.trim_end_matches('/'));
    let unreached = |error: std::io::Error| {
        // The name of an error is enough, without its number.
        let why = error.to_string();
        let why = why.split(" (os error").next().unwrap_or_default();
        anyhow!(
            "no daemon answers at {url}: {why}\nhelp: start `fault daemon`, or give its address with --url or TOXIPROXY_URL"
        )
    };
    let (mut sender, host) = if let Some(path) = url.strip_prefix("unix:") {
        let stream = UnixStream::connect(path).await.map_err(unreached)?;
        (
            handshake(TokioIo::new(stream)).await?,
            "localhost".to_owned(),
        )
    } else {
        let stream = TcpStream::connect(url).await.map_err(unreached)?;
        (handshake(TokioIo::new(stream)).await?, url.to_owned())
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, host);
    if let Some(token) = target.token.as_deref().or(password) {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
    let answer = sender
        .send_request(request.body(Full::new(body))?)
        .await
        .context("the daemon does not answer")?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer.into_body());
    }
    let bytes = answer
        .into_body()
        .collect()
        .await
        .context("the daemon's answer is incomplete")?
        .to_bytes();
    let message = serde_json::from_slice::<Value>(&bytes)
        .ok()
        .and_then(|body| body["error"].as_str().map(str::to_owned));
    let message =
        message.unwrap_or_else(|| format!("{status} {}", String::from_utf8_lossy(&bytes).trim()));
    if message.contains("\nhelp: ") {
        bail!("the daemon rejected the request: {message}");
    }
    let error = RuleError::of_line(String::new(), &message);
    bail!("the daemon rejected the request: {error}")
}

async fn handshake<S>(stream: TokioIo<S>) -> anyhow::Result<http1::SendRequest<Full<Bytes>>>
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(stream)
        .await
        .context("the daemon does not answer with HTTP")?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            log::debug!("connection to the daemon: {error}");
        }
    });
    Ok(sender)
}
