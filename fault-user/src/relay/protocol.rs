//! Just enough of each protocol to know where a request ends and how its server says that something failed.

use super::attributes::ErrorProtocol;
use super::random::Draws;
use crate::rule::servers::{MysqlError, redis_error};

/// What the error answers say of themselves.
const MESSAGE: &str = "injected by fault";
/// The longest head of a request that is looked at, in bytes.
const LONGEST_HEAD: usize = 64 * 1024;

/// What stands at the beginning of the bytes that a client sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RequestFrame {
    /// Not enough to tell.
    Partial,
    /// A request of this length in bytes (more may be on its way than is here), its error answer, and the beginning of
    /// what it says.
    Request {
        length: u64,
        answer: RequestFailure,
        text: String,
    },
    /// Bytes that are no request, such as a login: they must pass.
    Through { length: u64 },
    /// Bytes to which there is one answer only, whatever fails.
    Answered { length: u64, reply: Vec<u8> },
    /// It is not this protocol.
    Foreign,
}

/// What becomes of a request that fails.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RequestFailure {
    /// The client gets this; nothing when it expects none.
    Reply(Vec<u8>),
    /// The client gets this, and the server the end of the connection.
    Last(Vec<u8>),
    /// The server gets this in its place, and answers with an error.
    Instead(Vec<u8>),
}

impl RequestFailure {
    /// The status in an answer of HTTP.
    pub(crate) fn status(&self) -> Option<u64> {
        let (Self::Reply(text) | Self::Last(text)) = self else {
            return None;
        };
        let digits = text.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    }
}

/// How much of a request's text is looked at, in bytes.
pub(crate) const TEXT_MAX: usize = 1024;

/// The beginning of a text.
pub(crate) fn beginning(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(TEXT_MAX)]).into_owned()
}

/// A request that is answered.
fn request(length: u64, reply: Vec<u8>, text: &[u8]) -> RequestFrame {
    RequestFrame::Request {
        length,
        answer: RequestFailure::Reply(reply),
        text: beginning(text),
    }
}

/// Guesses the protocol from the first bytes of a client.
pub(crate) fn guess(data: &[u8]) -> ErrorProtocol {
    let line = data.split(|byte| *byte == b'\n').next().unwrap_or(data);
    let word: Vec<u8> = line
        .iter()
        .copied()
        .take_while(u8::is_ascii_alphabetic)
        .collect();
    let word = String::from_utf8_lossy(&word);
    let is_http = [&b" HTTP/1.1"[..], b" HTTP/1.0"]
        .iter()
        .any(|version| line.trim_ascii_end().ends_with(version));
    match (data.first(), &*word) {
        _ if is_http => ErrorProtocol::Http,
        (Some(b'*'), _) | (_, "PING" | "HELLO") => ErrorProtocol::Redis,
        (Some(0x80), _) => ErrorProtocol::Memcache,
        (_, "EHLO" | "HELO" | "LHLO" | "ehlo" | "helo" | "MAIL" | "mail") => ErrorProtocol::Smtp,
        (_, word) if MEMCACHE_COMMANDS.contains(&word) => ErrorProtocol::Memcache,
        _ if mysql_length(data).is_some_and(|length| length == data.len() as u64) => {
            ErrorProtocol::Mysql
        }
        _ => ErrorProtocol::Random,
    }
}

/// Whether a client's bytes begin a TLS handshake: a record of the type handshake (22) of SSL 3.0 to
/// TLS 1.3 with a `ClientHello` (1) inside (RFC 8446, sections 4 and 5.1).
pub(crate) fn is_tls(data: &[u8]) -> bool {
    matches!(data, [22, 3, 0..=4, _, _, 1, ..])
}

/// What an error says, where the toxic gives it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wording {
    /// HTTP statuses to choose from.
    pub(crate) status: Vec<u16>,
    /// The error in the protocol's own words.
    pub(crate) message: Option<String>,
    /// How many random bytes.
    pub(crate) size: Option<u64>,
}

impl Wording {
    fn message_or<'a>(&'a self, usual: &'a str) -> &'a str {
        self.message.as_deref().unwrap_or(usual)
    }
}

/// Reads the first request.
pub(crate) fn frame(
    protocol: ErrorProtocol,
    data: &[u8],
    wording: &Wording,
    draws: &mut Draws,
) -> RequestFrame {
    if data.is_empty() {
        return RequestFrame::Partial;
    }
    let frame = match protocol {
        ErrorProtocol::Http => http(data, wording, draws),
        ErrorProtocol::Redis => redis(data, wording),
        ErrorProtocol::Mysql => mysql(data, wording),
        ErrorProtocol::Memcache if data[0] == 0x80 => memcache_binary(data, wording),
        ErrorProtocol::Memcache => memcache(data, wording),
        ErrorProtocol::Smtp => smtp(data, wording),
        ErrorProtocol::None => request(data.len() as u64, Vec::new(), b""),
        // Its frames depend on what came before.
        ErrorProtocol::Postgres => RequestFrame::Foreign,
        ErrorProtocol::Auto | ErrorProtocol::Random => random(data, wording, draws),
    };
    match frame {
        // What never ends is not this protocol: it gets the error all the same.
        RequestFrame::Partial if data.len() > LONGEST_HEAD => random(data, wording, draws),
        frame => frame,
    }
}

fn random(data: &[u8], wording: &Wording, draws: &mut Draws) -> RequestFrame {
    let size = wording.size.unwrap_or_else(|| 16 + draws.below(112));
    let reply = (0..size)
        .map(|_| u8::try_from(draws.below(256)).unwrap_or(0))
        .collect();
    request(data.len() as u64, reply, b"")
}

/// The length of the first line with its line feed.
fn line_length(data: &[u8]) -> Option<usize> {
    data.iter()
        .position(|byte| *byte == b'\n')
        .map(|position| position + 1)
}

fn http(data: &[u8], wording: &Wording, draws: &mut Draws) -> RequestFrame {
    let status = wording.status.as_slice();
    let Some(head_end) = data.windows(4).position(|window| window == b"\r\n\r\n") else {
        return RequestFrame::Partial;
    };
    let head = String::from_utf8_lossy(&data[..head_end]);
    let header = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.trim()
                .eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    };
    let head_length = head_end + 4;
    // A client that asks first has not sent the body, and does not after an error.
    let asks_first =
        header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue"));
    let is_chunked = header("transfer-encoding")
        .is_some_and(|value| value.to_ascii_lowercase().contains("chunked"));
    let body_length = if asks_first {
        0
    } else if is_chunked {
        match chunked_length(&data[head_length..]) {
            Some(length) => length,
            None => return RequestFrame::Partial,
        }
    } else {
        header("content-length")
            .and_then(|value| value.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let default = [500, 502, 503, 504];
    let choices = if status.is_empty() {
        &default[..]
    } else {
        status
    };
    let choice = usize::try_from(draws.below(choices.len() as u64)).unwrap_or(0);
    let reply = http_reply(choices[choice], head.starts_with("HEAD "), asks_first);
    let line = head.lines().next().unwrap_or_default();
    request(head_length as u64 + body_length, reply, line.as_bytes())
}

/// The length of a chunked body, once all of it is here.
fn chunked_length(body: &[u8]) -> Option<u64> {
    let mut at = 0;
    loop {
        let line = line_length(body.get(at..)?)?;
        let size = String::from_utf8_lossy(&body[at..at + line]);
        let size = usize::from_str_radix(size.split(';').next().unwrap_or("").trim(), 16).ok()?;
        at += line;
        if size == 0 {
            // The trailers end with an empty line.
            loop {
                let line = line_length(body.get(at..)?)?;
                at += line;
                if line <= 2 {
                    return Some(at as u64);
                }
            }
        }
        at = at.checked_add(size)?.checked_add(2)?;
    }
}

fn http_reply(status: u16, is_head: bool, closes: bool) -> Vec<u8> {
    let reason = axum::http::StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason());
    let body = format!("{status} {MESSAGE}\n");
    let has_body = status != 204 && status != 304;
    let mut reply = format!("HTTP/1.1 {status} {}\r\n", reason.unwrap_or("Error"));
    if has_body {
        reply.push_str("Content-Type: text/plain\r\nContent-Length: ");
        reply.push_str(&body.len().to_string());
        reply.push_str("\r\n");
    }
    if closes {
        reply += "Connection: close\r\n";
    }
    reply += "\r\n";
    if has_body && !is_head {
        reply += &body;
    }
    reply.into_bytes()
}

fn redis(data: &[u8], wording: &Wording) -> RequestFrame {
    let error = wording.message_or(MESSAGE);
    let error = redis_error(error).unwrap_or_else(|_unknown| error.to_owned());
    let reply = format!("-{error}\r\n").into_bytes();
    let Some(mut at) = line_length(data) else {
        return RequestFrame::Partial;
    };
    let mut text = data[..at].trim_ascii().to_vec();
    if data[0] == b'*' {
        text.clear();
        let count = number(&data[1..at]).unwrap_or(0);
        for _ in 0..count {
            let Some(line) = data.get(at..).and_then(line_length) else {
                return RequestFrame::Partial;
            };
            let size = number(data.get(at + 1..at + line).unwrap_or(&[])).unwrap_or(0);
            at += line;
            let Some(word) = usize::try_from(size)
                .ok()
                .and_then(|size| data.get(at..at.checked_add(size + 2)?))
            else {
                return RequestFrame::Partial;
            };
            at += word.len();
            if text.len() < TEXT_MAX {
                text.extend_from_slice(&word[..word.len() - 2]);
                text.push(b' ');
            }
        }
    }
    request(at as u64, reply, text.trim_ascii_end())
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// The length of the first `MySQL` packet with its header.
fn mysql_length(data: &[u8]) -> Option<u64> {
    let header = data.get(..4)?;
    Some(u64::from(u32::from_le_bytes([header[0], header[1], header[2], 0])) + 4)
}

fn mysql(data: &[u8], wording: &Wording) -> RequestFrame {
    let (Some(length), Some(command)) = (mysql_length(data), data.get(4)) else {
        return RequestFrame::Partial;
    };
    // A sequence number other than 0 belongs to a login or to the data of a command. COM_QUIT,
    // COM_STMT_SEND_LONG_DATA and COM_STMT_CLOSE are not answered.
    if data[3] != 0 || [0x01, 0x18, 0x19].contains(command) {
        return RequestFrame::Through { length };
    }
    // COM_QUERY and COM_STMT_PREPARE have a text. A client that may send attributes of a query says first that it has none.
    let text = if [0x03, 0x16].contains(command) {
        let end = usize::try_from(length).unwrap_or(usize::MAX);
        if data.len() < end.min(5 + TEXT_MAX) {
            return RequestFrame::Partial;
        }
        let text = &data[5..end.min(data.len()).max(5)];
        text.strip_prefix(&[0, 1]).unwrap_or(text)
    } else {
        b""
    };
    let error = wording.message_or(MESSAGE);
    let Ok(error) = MysqlError::meant_by(error).or_else(|_unknown| MysqlError::meant_by(MESSAGE))
    else {
        return RequestFrame::Foreign;
    };
    // ERR_Packet: 0xff, the code, '#' and the SQLSTATE, the text.
    let mut payload = vec![0xff];
    payload.extend_from_slice(&error.code.to_le_bytes());
    payload.extend_from_slice(format!("#{}{}", error.state, error.text).as_bytes());
    // A message has at most a few hundred bytes.
    let [low, high] = u16::try_from(payload.len())
        .unwrap_or(u16::MAX)
        .to_le_bytes();
    let mut reply = vec![low, high, 0, 1];
    reply.extend_from_slice(&payload);
    request(length, reply, text)
}

const MEMCACHE_COMMANDS: &[&str] = &[
    "get",
    "gets",
    "gat",
    "gats",
    "set",
    "add",
    "replace",
    "append",
    "prepend",
    "cas",
    "delete",
    "incr",
    "decr",
    "touch",
    "stats",
    "version",
    "verbosity",
    "mg",
    "ms",
    "md",
    "ma",
    "mn",
    "me",
];

fn memcache(data: &[u8], wording: &Wording) -> RequestFrame {
    let Some(line) = line_length(data) else {
        return RequestFrame::Partial;
    };
    let text = String::from_utf8_lossy(&data[..line]);
    let words: Vec<&str> = text.split_whitespace().collect();
    let size = match words.first().copied() {
        Some("set" | "add" | "replace" | "append" | "prepend" | "cas") => words.get(4),
        Some("ms") => words.get(2),
        Some("quit") => {
            return RequestFrame::Through {
                length: line as u64,
            };
        }
        _ => None,
    };
    let block = size
        .and_then(|size| size.parse::<u32>().ok())
        .map_or(0, |size| u64::from(size) + 2);
    let is_silent = words.last() == Some(&"noreply");
    let reply = if is_silent {
        Vec::new()
    } else {
        format!("SERVER_ERROR {}\r\n", wording.message_or(MESSAGE)).into_bytes()
    };
    request(line as u64 + block, reply, data[..line].trim_ascii())
}

fn memcache_binary(data: &[u8], wording: &Wording) -> RequestFrame {
    let Some(header) = data.get(..24) else {
        return RequestFrame::Partial;
    };
    let body = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    let message = wording.message_or(MESSAGE);
    let [high, low] = u16::try_from(message.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes();
    // Magic 0x81 (response), the opcode, no key and extras, status 0x0084 (internal error), the body's
    // length, the request's opaque, no CAS.
    let mut reply = vec![0x81, header[1], 0, 0, 0, 0, 0x00, 0x84, 0, 0, high, low];
    reply.extend_from_slice(&header[12..16]);
    reply.extend_from_slice(&[0; 8]);
    reply.extend_from_slice(message.as_bytes());
    request(u64::from(body) + 24, reply, b"")
}

fn smtp(data: &[u8], wording: &Wording) -> RequestFrame {
    let Some(line) = line_length(data) else {
        return RequestFrame::Partial;
    };
    let length = line as u64;
    if data[..line].trim_ascii().eq_ignore_ascii_case(b"QUIT") {
        return RequestFrame::Through { length };
    }
    let usual = format!("451 4.3.0 Requested action aborted: {MESSAGE}");
    let reply = format!("{}\r\n", wording.message_or(&usual)).into_bytes();
    request(length, reply, data[..line].trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(protocol: ErrorProtocol, data: &[u8]) -> (u64, String) {
        let wording = Wording {
            status: vec![503],
            ..Wording::default()
        };
        worded(protocol, data, &wording)
    }

    fn worded(protocol: ErrorProtocol, data: &[u8], wording: &Wording) -> (u64, String) {
        match frame(protocol, data, wording, &mut Draws::new(1)) {
            RequestFrame::Request {
                length,
                answer: RequestFailure::Reply(reply),
                ..
            } => (length, String::from_utf8_lossy(&reply).into_owned()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_protocol_knows_where_a_request_ends() {
        let cases: &[(ErrorProtocol, &[u8], u64)] = &[
            (ErrorProtocol::Http, b"GET / HTTP/1.1\r\n\r\nGET /", 18),
            (
                ErrorProtocol::Http,
                b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nabcdeX",
                43,
            ),
            (
                ErrorProtocol::Http,
                b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nX",
                60,
            ),
            (
                ErrorProtocol::Redis,
                b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1",
                20,
            ),
            (ErrorProtocol::Redis, b"PING\r\nPING\r\n", 6),
            (ErrorProtocol::Mysql, b"\x05\x00\x00\x00\x03abcdX", 9),
            (ErrorProtocol::Memcache, b"set k 0 0 3\r\nabc\r\nget", 18),
            (ErrorProtocol::Memcache, b"get k\r\nget", 7),
            (ErrorProtocol::Smtp, b"EHLO me\r\nMAIL", 9),
        ];
        for (protocol, data, length) in cases {
            assert_eq!(
                request(*protocol, data).0,
                *length,
                "{protocol:?} {:?}",
                String::from_utf8_lossy(data)
            );
        }
    }

    #[test]
    fn each_protocol_is_guessed_from_its_first_bytes() {
        assert_eq!(guess(b"GET / HTTP/1.1\r\n"), ErrorProtocol::Http);
        assert_eq!(guess(b"*1\r\n$4\r\nPING\r\n"), ErrorProtocol::Redis);
        assert_eq!(guess(b"get key\r\n"), ErrorProtocol::Memcache);
        assert_eq!(guess(b"EHLO host\r\n"), ErrorProtocol::Smtp);
        assert_eq!(guess(b"\x05\x00\x00\x01\x03abcd"), ErrorProtocol::Mysql);
        assert_eq!(guess(b"hello world"), ErrorProtocol::Random);
    }

    #[test]
    fn a_tls_handshake_is_known_by_its_client_hello() {
        assert!(is_tls(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"));
        for other in [
            &b"\x16\x03\x01\x02\x00"[..],
            b"\x16\x03\x09\x02\x00\x01",
            b"\x16\x00\x00\x00\x03\x01select",
            b"GET / HTTP/1.1\r\n",
        ] {
            assert!(!is_tls(other), "{other:?}");
        }
    }

    #[test]
    fn what_is_no_command_passes() {
        let frame =
            |protocol, data: &[u8]| frame(protocol, data, &Wording::default(), &mut Draws::new(1));
        assert_eq!(
            frame(ErrorProtocol::Mysql, b"\x05\x00\x00\x01login"),
            RequestFrame::Through { length: 9 }
        );
        assert_eq!(
            frame(ErrorProtocol::Smtp, b"quit\r\n"),
            RequestFrame::Through { length: 6 }
        );
        assert_eq!(
            frame(ErrorProtocol::Http, b"GET / HTTP/1.1\r\n"),
            RequestFrame::Partial
        );
        assert_eq!(
            frame(ErrorProtocol::Redis, b"*1\r\n$4\r\nPI"),
            RequestFrame::Partial
        );
    }

    #[test]
    fn an_error_says_what_it_is_told_to() {
        let said = |protocol, data: &[u8], message: &str| {
            let wording = Wording {
                message: Some(message.to_owned()),
                size: Some(5),
                ..Wording::default()
            };
            worded(protocol, data, &wording).1
        };
        let redis = said(ErrorProtocol::Redis, b"PING\r\n", "LOADING wait");
        assert_eq!(redis, "-LOADING wait\r\n");
        let smtp = said(ErrorProtocol::Smtp, b"MAIL\r\n", "421 later");
        assert_eq!(smtp, "421 later\r\n");
        let memcache = said(ErrorProtocol::Memcache, b"get k\r\n", "full");
        assert_eq!(memcache, "SERVER_ERROR full\r\n");
        let long = "x".repeat(300);
        let mysql = said(ErrorProtocol::Mysql, b"\x01\x00\x00\x00\x03", &long);
        assert!(mysql.ends_with(&format!("#HY000{long}")), "{mysql}");
        let wording = Wording {
            size: Some(5),
            ..Wording::default()
        };
        match frame(ErrorProtocol::Random, b"x", &wording, &mut Draws::new(1)) {
            RequestFrame::Request {
                answer: RequestFailure::Reply(reply),
                ..
            } => assert_eq!(reply.len(), 5),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(data in proptest::collection::vec(any::<u8>(), 0..200), which in 0..7_usize) {
            let protocol = [
                ErrorProtocol::Auto, ErrorProtocol::Http, ErrorProtocol::Redis, ErrorProtocol::Mysql, ErrorProtocol::Memcache, ErrorProtocol::Smtp,
                ErrorProtocol::Random,
            ][which];
            guess(&data);
            match frame(protocol, &data, &Wording::default(), &mut Draws::new(1)) {
                RequestFrame::Partial | RequestFrame::Foreign => {}
                RequestFrame::Answered { length, .. } | RequestFrame::Request { length, .. } | RequestFrame::Through { length } => prop_assert!(length > 0),
            }
        }
    }
}
