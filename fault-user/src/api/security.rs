//! Who may use the API: nobody whom a browser sends, and beyond loopback only those with the token.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

/// What a listener asks of its clients.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// The token that every request must carry.
    pub token: Option<Arc<str>>,
    /// The Unix socket: its file mode says who may, and its requests have no meaningful Host.
    pub is_socket: bool,
}

/// Refuses what must not pass.
pub(crate) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match refusal(&guard, request.headers(), request.uri().host()) {
        Some(error) => error,
        None => next.run(request).await,
    }
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
    if let Some(token) = &guard.token {
        let given = text(header::AUTHORIZATION).and_then(given_token);
        if given.is_none_or(|given| !is_equal(given.as_bytes(), token.as_bytes())) {
            let message = "the token is missing or wrong: send Authorization: Bearer TOKEN";
            return Some(ApiError::new(StatusCode::UNAUTHORIZED, message).into_response());
        }
        return None;
    }
    if guard.is_socket {
        return None;
    }
    match headers
        .get(header::HOST)
        .map(|host| host.to_str())
        .or(target_host.map(Ok))
    {
        None => None,
        Some(Ok(host)) if is_local(host) => None,
        Some(_) => forbid("the Host header must be localhost or an IP address"),
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

/// Compares without telling by the time it takes where the first difference is.
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
        let guard = Guard::default();
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
        let guard = Guard {
            token: Some("secret".into()),
            is_socket: false,
        };
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
}
