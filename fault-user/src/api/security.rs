//! Access control of the API. Requests of browsers are rejected. Beyond loopback clients need the token, unless the
//! daemon is open. Privileged features need a privileged client.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use crate::sys::process::proc::open_sockets;
use crate::sys::process::sockets;

/// The requirements of a listener.
#[derive(Clone, Debug)]
pub enum Guard {
    /// The Unix socket: its file mode restricts clients, and its requests have no meaningful Host.
    Socket,
    /// Every request must carry this token.
    Token(Arc<str>),
    /// A loopback address: every user of this host.
    Loopback,
    /// Everyone who can connect, as with Toxiproxy.
    Open,
}

/// The sender of a request.
#[derive(Clone, Copy, Debug)]
pub enum Caller {
    /// A client of the Unix socket or with the token, which may use all privileges of the daemon.
    Trusted,
    /// A process on this host, by the ends of its connection: trusted when it runs as root or as the daemon's user.
    Local(Option<ConnectionEnds>),
    /// Anyone, as the daemon is open.
    Anyone,
}

impl Caller {
    /// Checks that the caller may use the privileged feature `what` (a plural).
    ///
    /// # Errors
    /// 403 for everyone but a trusted caller.
    pub(crate) fn require(self, what: &str) -> Result<(), ApiError> {
        let why = match self {
            Self::Trusted => return Ok(()),
            Self::Local(ends) if ends.is_some_and(ConnectionEnds::is_trusted) => return Ok(()),
            Self::Local(_) => format!(
                "{what} are only for root and the daemon's own user: use its Unix socket (--socket), a token (--token), or \
                 run the client as one of them"
            ),
            Self::Anyone => {
                format!("{what} are unavailable in open mode: start the daemon without --open")
            }
        };
        Err(ApiError::new(StatusCode::FORBIDDEN, why))
    }

    /// Checks that the caller may use this port for a proxy. Open mode allows every port, as Toxiproxy does.
    ///
    /// # Errors
    /// 403 for a privileged port (`net.ipv4.ip_unprivileged_port_start`) and a caller that is not trusted.
    pub(crate) fn require_port(self, port: u16) -> Result<(), ApiError> {
        if matches!(self, Self::Local(_)) && port != 0 && port < unprivileged_port_start() {
            return self.require("privileged ports");
        }
        Ok(())
    }
}

/// The first unprivileged port.
fn unprivileged_port_start() -> u16 {
    const DEFAULT: u16 = 1024;
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT)
}

/// The two ends of a TCP connection to the API.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionEnds {
    /// The client's address.
    pub client: SocketAddr,
    /// The API's address.
    pub server: SocketAddr,
}

impl ConnectionEnds {
    fn is_trusted(self) -> bool {
        self.is_owners().unwrap_or_else(|error| {
            log::warn!("the user of an API client is unknown: {error:#}");
            false
        })
    }

    /// Whether the client is a process on this host that runs as root or as the daemon's user. A connection of the daemon
    /// itself is not: a proxy to the API must not lend its rights to its clients.
    fn is_owners(self) -> anyhow::Result<bool> {
        if !self.client.ip().to_canonical().is_loopback() {
            return Ok(false);
        }
        let Some(owner) = sockets::owner(self.client, self.server)? else {
            return Ok(false);
        };
        if owner.uid != 0 && owner.uid != nix::unistd::geteuid().as_raw() {
            return Ok(false);
        }
        let own = open_sockets(std::process::id().cast_signed())?;
        Ok(!own.iter().any(|socket| socket.inode == owner.inode))
    }
}

impl Guard {
    fn caller(&self, request: &Request) -> Caller {
        match self {
            Self::Open => Caller::Anyone,
            Self::Socket | Self::Token(_) => Caller::Trusted,
            Self::Loopback => Caller::Local(request.extensions().get().copied()),
        }
    }
}

/// Rejects forbidden requests, and adds the [`Caller`] to the others.
pub(crate) async fn check(
    State(guard): State<Guard>,
    mut request: Request,
    next: Next,
) -> Response {
    if let Some(error) = refusal(&guard, request.headers(), request.uri().host()) {
        return error;
    }
    let caller = guard.caller(&request);
    request.extensions_mut().insert(caller);
    next.run(request).await
}

fn refusal(guard: &Guard, headers: &HeaderMap, target_host: Option<&str>) -> Option<Response> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &axum::http::HeaderValue| value.to_str().ok())
    };
    let forbid =
        |message: &str| Some(ApiError::new(StatusCode::FORBIDDEN, message).into_response());
    if text(header::USER_AGENT).is_some_and(|agent| agent.starts_with("Mozilla/")) {
        return Some((StatusCode::FORBIDDEN, "User agent not allowed\n").into_response());
    }
    if headers.contains_key(header::ORIGIN) {
        return forbid("requests from web pages are not allowed (they carry an Origin header)");
    }
    match guard {
        Guard::Socket | Guard::Open => None,
        Guard::Token(token) => {
            let given = text(header::AUTHORIZATION).and_then(given_token);
            if given.is_some_and(|given| is_equal(given.as_bytes(), token.as_bytes())) {
                return None;
            }
            let message = "the token is missing or wrong: send Authorization: Bearer TOKEN";
            // Java's client sends a password only to who asks for one.
            let challenge = [(header::WWW_AUTHENTICATE, "Basic realm=\"fault\"")];
            let error = ApiError::new(StatusCode::UNAUTHORIZED, message);
            Some((challenge, error).into_response())
        }
        Guard::Loopback => {
            let host = headers.get(header::HOST).map(|host| host.to_str());
            match host.or(target_host.map(Ok)) {
                None => None,
                Some(Ok(host)) if is_local(host) => None,
                Some(_) => forbid("the Host header must be localhost or an IP address"),
            }
        }
    }
}

/// The token of a Bearer authorization, or the password of a Basic one, which clients send for
/// `http://any:TOKEN@host`.
fn given_token(authorization: &str) -> Option<String> {
    let (scheme, rest) = authorization.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    let decoded = scheme
        .eq_ignore_ascii_case("basic")
        .then(|| decode_base64(rest.trim()))??;
    let text = String::from_utf8(decoded).ok()?;
    text.split_once(':')
        .map(|(_, password)| password.to_owned())
}

/// Base64 of RFC 4648, section 4.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

/// Compares in constant time.
fn is_equal(left: &[u8], right: &[u8]) -> bool {
    let difference = left
        .iter()
        .zip(right)
        .fold(left.len() ^ right.len(), |sum, (left, right)| {
            sum | usize::from(left ^ right)
        });
    difference == 0
}

/// Whether a Host header names no domain: a web page can make a domain point here, but not an address.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(guard: &Guard, headers: &[(&'static str, &'static str)]) -> Option<u16> {
        let headers = headers
            .iter()
            .map(|(name, value)| {
                (
                    name.parse().expect("a name"),
                    value.parse().expect("a value"),
                )
            })
            .collect();
        refusal(guard, &headers, None).map(|response| response.status().as_u16())
    }

    #[test]
    fn browsers_and_rebound_names_are_refused() {
        let guard = Guard::Loopback;
        assert_eq!(status(&guard, &[]), None);
        assert_eq!(
            status(
                &guard,
                &[
                    ("host", "localhost:8474"),
                    ("user-agent", "Go-http-client/1.1")
                ]
            ),
            None
        );
        assert_eq!(status(&guard, &[("host", "[::1]:8474")]), None);
        assert_eq!(status(&guard, &[("user-agent", "Mozilla/5.0")]), Some(403));
        assert_eq!(status(&guard, &[("host", "evil.example:8474")]), Some(403));
        assert_eq!(
            status(
                &guard,
                &[("host", "localhost"), ("origin", "http://evil.example")]
            ),
            Some(403)
        );
        assert_eq!(
            status(&guard, &[("host", "localhost"), ("origin", "null")]),
            Some(403)
        );
    }

    #[test]
    fn a_token_is_asked_for_and_lets_any_name_in() {
        let guard = Guard::Token("secret".into());
        assert_eq!(status(&guard, &[("host", "localhost")]), Some(401));
        assert_eq!(
            status(&guard, &[("authorization", "Bearer wrong!")]),
            Some(401)
        );
        assert_eq!(
            status(
                &guard,
                &[("host", "toxi"), ("authorization", "Bearer secret")]
            ),
            None
        );
        assert_eq!(
            status(
                &guard,
                &[
                    ("host", "toxi"),
                    ("authorization", "Basic YW55OnNlY3JldA==")
                ]
            ),
            None
        );
        assert_eq!(
            status(
                &guard,
                &[
                    ("authorization", "Bearer secret"),
                    ("user-agent", "Mozilla/5")
                ]
            ),
            Some(403)
        );
    }

    #[test]
    fn an_open_api_takes_any_name_but_no_web_page() {
        let host = ("host", "toxiproxy:8474");
        assert_eq!(status(&Guard::Open, &[host]), None);
        assert_eq!(status(&Guard::Loopback, &[host]), Some(403));
        let origin = ("origin", "http://evil.example");
        assert_eq!(status(&Guard::Open, &[host, origin]), Some(403));
    }

    #[test]
    fn privileged_ports_are_not_for_every_local_user() {
        let first = unprivileged_port_start();
        if first > 1 {
            assert!(Caller::Local(None).require_port(first - 1).is_err());
            assert!(Caller::Trusted.require_port(first - 1).is_ok());
            assert!(Caller::Anyone.require_port(first - 1).is_ok());
        }
        assert!(Caller::Local(None).require_port(first).is_ok());
        assert!(Caller::Local(None).require_port(0).is_ok());
    }
}
