//! What a client asks for in its first bytes: the TLS `ClientHello`, or the head of an HTTP/1 request.
//!
//! They are peeked at while they lie in the socket, and read by the lanes later. Nothing of them is changed, and no
//! certificate is needed.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use nix::libc;
use tls_parser::{
    TlsExtension, TlsMessage, TlsMessageHandshake, TlsRecordType, parse_tls_extension,
    parse_tls_message_handshake, parse_tls_raw_record,
};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::socket::{has_peer_ended, set, unread};
use super::trouble::Trouble;
use crate::rule::{Asked, NamePattern};

/// The longest greeting that is read, in bytes, with the headers of its records.
const LONGEST: usize = 17 * 1024;
/// How long a client may take from the first byte of its greeting to the last one.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// The most headers of an HTTP request.
const HEADERS: usize = 128;
/// A handshake message's type and length.
const HANDSHAKE_HEADER: usize = 4;
/// What an HTTP/1 request begins with.
const METHODS: &[&str] = &[
    "GET ",
    "HEAD ",
    "POST ",
    "PUT ",
    "DELETE ",
    "CONNECT ",
    "OPTIONS ",
    "TRACE ",
    "PATCH ",
    "QUERY ",
    "PROPFIND ",
    "PROPPATCH ",
    "MKCOL ",
    "COPY ",
    "MOVE ",
    "LOCK ",
    "UNLOCK ",
    "REPORT ",
    "SEARCH ",
    "PURGE ",
];

/// What a client has asked for; names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// The server's name (SNI). With ECH that is the outer one.
    sni: Option<String>,
    /// The protocols that are offered.
    alpn: Vec<String>,
    /// The HTTP host without its port.
    host: Option<String>,
}

/// How far a client's greeting is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Greeted {
    /// No toxic needs it.
    #[default]
    Unread,
    /// It has not come.
    Awaited,
    /// This is it; nothing in it where the client speaks another protocol, or waits for the server to speak.
    Known(Greeting),
}

/// How much of a greeting has come.
#[derive(Debug)]
pub(crate) enum Progress {
    /// No byte.
    Nothing,
    /// Its beginning.
    Part,
    /// All of it.
    Whole(Greeting),
    /// The client has reset the connection.
    Reset,
}

/// Which connections a toxic acts on, by what their clients ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GreetingFilter {
    /// What they must ask for.
    pub asked: Asked,
    /// The name of the server. The toxic does not act on clients that ask for another one; it acts on those that ask for
    /// none.
    pub server: Option<NamePattern>,
}

impl GreetingFilter {
    /// Whether it selects every connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it selects connections by what their clients must ask for.
    pub(crate) fn is_demanding(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Whether it selects a connection, as far as is known.
    pub(crate) fn selects(&self, greeted: &Greeted) -> bool {
        match greeted {
            _ if self.is_empty() => true,
            Greeted::Awaited => false,
            Greeted::Unread => self.asked.is_empty(),
            Greeted::Known(greeting) => self.fits(greeting),
        }
    }

    fn fits(&self, greeting: &Greeting) -> bool {
        let Greeting { sni, alpn, host } = greeting;
        let is = |pattern: &Option<NamePattern>, name: &Option<String>| match (pattern, name) {
            (None, _) => true,
            (Some(pattern), Some(name)) => pattern.fits(name),
            (Some(_), None) => false,
        };
        let Asked {
            sni: asked_sni,
            host: asked_host,
            alpn: asked_alpn,
        } = &self.asked;
        let name = sni.as_ref().or(host.as_ref());
        is(asked_sni, sni)
            && is(asked_host, host)
            && asked_alpn.as_ref().is_none_or(|asked| alpn.contains(asked))
            && self.server.as_ref().is_none_or(|server| {
                name.is_none_or(|name| is_address(name) || server.is_same_host(name))
            })
    }
}

/// Whether a client asks for an address instead of a name.
fn is_address(host: &str) -> bool {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host).parse::<IpAddr>().is_ok()
}

/// When a greeting that begins to come now must be there.
pub(crate) fn due() -> Instant {
    Instant::now() + TIME_LIMIT
}

/// Warns that the rest of a greeting has not come in time.
pub(crate) fn tell_overdue(trouble: &Trouble) {
    trouble.tell(
        "greeting is late",
        format_args!(
            "a client sent the beginning of a TLS ClientHello or of an HTTP request and not its end within {} s: \
             rules with a host name, `sni`, `host` or `alpn` take it for another protocol",
            TIME_LIMIT.as_secs()
        ),
    );
}

/// Warns that a client has named nothing in its first bytes, or its server has spoken first.
pub(crate) fn tell_nameless(trouble: &Trouble) {
    trouble.tell(
        "greeting has no name",
        "a connection began without a name, so rules with `sni`, `host` or `alpn` can't match it: a name is read from a \
         TLS ClientHello or an HTTP/1 request at its beginning (TLS that starts later, as with STARTTLS or \
         PostgreSQL, is not read)",
    );
}

/// Looks for a client's greeting. A server that speaks first has no client that begins with a greeting.
pub(crate) fn poll(
    client: &Arc<TcpStream>,
    server: &TcpStream,
    trouble: &Trouble,
    context: &mut Context<'_>,
) -> Progress {
    // If both have spoken the client's greeting counts.
    let has_server_spoken = server.poll_read_ready(context).is_ready();
    while client.poll_read_ready(context).is_ready() {
        match client.try_io(Interest::READABLE, || peek(client, trouble)) {
            Ok(greeting) => return Progress::Whole(greeting),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The kernel reports it once.
            Err(_reset) => return Progress::Reset,
        }
    }
    if has_server_spoken {
        make_readable(client);
        Progress::Whole(Greeting::default())
    } else if unread(client) > 0 {
        Progress::Part
    } else {
        Progress::Nothing
    }
}

/// Has the runtime report a socket as readable again: it takes one that was peeked at for empty until more comes.
pub(crate) fn make_readable(socket: &TcpStream) {
    // The kernel looks at once whether the new mark, which is the old one, is reached.
    if let Err(error) = set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1) {
        log::error!("SO_RCVLOWAT: {error}");
    }
}

/// Reads what lies in a client's socket, and leaves it there.
///
/// # Errors
/// `WouldBlock` where more must come.
fn peek(client: &TcpStream, trouble: &Trouble) -> io::Result<Greeting> {
    use std::os::fd::AsRawFd as _;
    let flags = nix::sys::socket::MsgFlags::MSG_PEEK;
    let mut bytes = vec![0; LONGEST];
    let count = nix::sys::socket::recv(client.as_raw_fd(), &mut bytes, flags)?;
    let greeting = read(&bytes[..count]);
    let is_all = count == 0 || has_peer_ended(client);
    match greeting {
        Some(greeting) => Ok(greeting),
        None if count == bytes.len() => {
            trouble.tell(
                "greeting",
                "a client's TLS ClientHello or the head of its HTTP request is longer than 16 KiB: rules with a host \
                 name, `sni`, `host` or `alpn` take it for another protocol",
            );
            Ok(Greeting::default())
        }
        None if is_all => Ok(Greeting::default()),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// The greeting that bytes begin with, or that follows a header of the PROXY protocol: an empty one if they are of another
/// protocol, nothing if more must come.
pub(crate) fn read(bytes: &[u8]) -> Option<Greeting> {
    match without_proxy_header(bytes)? {
        [] => None,
        bytes @ ([22, 3, ..] | [22]) => hello(bytes),
        bytes => request(bytes),
    }
}

/// What follows a header of the PROXY protocol (haproxy's proxy-protocol.txt, versions 1 and 2), or all bytes if there is
/// none; nothing if more of it must come.
fn without_proxy_header(bytes: &[u8]) -> Option<&[u8]> {
    const TEXT: &[u8] = b"PROXY ";
    /// With its CR LF.
    const LONGEST_TEXT: usize = 107;
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    /// Behind it come version and command, the family, and the length of the rest.
    const FIXED: usize = SIGNATURE.len() + 4;
    if bytes.starts_with(TEXT) {
        let line = &bytes[..bytes.len().min(LONGEST_TEXT)];
        return match line.windows(2).position(|two| two == b"\r\n") {
            Some(end) => Some(&bytes[end + 2..]),
            None if bytes.len() < LONGEST_TEXT => None,
            None => Some(bytes),
        };
    }
    if bytes.starts_with(SIGNATURE) {
        let length = bytes.get(FIXED - 2..FIXED)?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        return bytes.get(FIXED + length..);
    }
    let is_part = TEXT.starts_with(bytes) || SIGNATURE.starts_with(bytes);
    (bytes.is_empty() || !is_part).then_some(bytes)
}

/// A `ClientHello`, in one record or several.
fn hello(bytes: &[u8]) -> Option<Greeting> {
    let mut message = Vec::new();
    let mut rest = bytes;
    while !is_whole(&message) {
        let (after, record) = match parse_tls_raw_record(rest) {
            Ok(parsed) => parsed,
            Err(error) if error.is_incomplete() => return None,
            Err(_) => return Some(Greeting::default()),
        };
        if record.hdr.record_type != TlsRecordType::Handshake || record.data.is_empty() {
            return Some(Greeting::default());
        }
        message.extend_from_slice(record.data);
        rest = after;
    }
    Some(of_hello(&message).unwrap_or_default())
}

/// Whether a handshake message is there to its end, or is none of a client's greeting.
fn is_whole(message: &[u8]) -> bool {
    match message {
        [1, a, b, c, ..] => {
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            message.len() >= HANDSHAKE_HEADER + length
        }
        [] | [1] | [1, _] | [1, _, _] => false,
        _ => true,
    }
}

fn of_hello(message: &[u8]) -> Option<Greeting> {
    let (_, parsed) = parse_tls_message_handshake(message).ok()?;
    let TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello)) = parsed else {
        return None;
    };
    let mut greeting = Greeting::default();
    let mut rest = hello.ext.unwrap_or_default();
    // Each by itself, so that one which is not understood hides none of the others.
    while let [_, _, high, low, ..] = rest {
        let length = HANDSHAKE_HEADER + usize::from(u16::from_be_bytes([*high, *low]));
        let extension = rest.get(..length)?;
        rest = &rest[length..];
        match parse_tls_extension(extension) {
            Ok((_, TlsExtension::SNI(names))) => {
                greeting.sni = names.first().and_then(|(_, name)| host_name(name));
            }
            Ok((_, TlsExtension::ALPN(offered))) => {
                let offered = offered.iter();
                greeting.alpn = offered
                    .map(|protocol| String::from_utf8_lossy(protocol).into_owned())
                    .collect();
            }
            _ => {}
        }
    }
    Some(greeting)
}

/// The head of an HTTP/1 request.
fn request(bytes: &[u8]) -> Option<Greeting> {
    let begins = |method: &&str| {
        let both = method.len().min(bytes.len());
        bytes[..both] == method.as_bytes()[..both]
    };
    if !METHODS.iter().any(begins) {
        return Some(Greeting::default());
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Some(Greeting::default()),
    }
    let mut headers = request.headers.iter();
    let header = headers.find(|header| header.name.eq_ignore_ascii_case("host"));
    // Old clients of proxies send no header with `CONNECT host:port`.
    let tunnel = || request.path.filter(|_| request.method == Some("CONNECT"));
    let host = header
        .map(|header| header.value)
        .or_else(|| tunnel().map(str::as_bytes));
    Some(Greeting {
        host: host.and_then(|host| host_name(without_port(host))),
        ..Greeting::default()
    })
}

/// A host without its port.
fn without_port(host: &[u8]) -> &[u8] {
    let host = host.trim_ascii();
    let port = host.iter().rposition(|byte| *byte == b':');
    match port {
        Some(at) if host[at + 1..].iter().all(u8::is_ascii_digit) => &host[..at],
        _ => host,
    }
}

/// A name in lower case, without a dot at its end.
fn host_name(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?.to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What Python 3.11 with OpenSSL 3.0 sends for `api.example.com`, with `h2` and `http/1.1`.
    const HELLO: &[u8] = include_bytes!("../../tests/clients/hello.bin");

    /// An extension.
    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).expect("short");
        [&kind.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
    }

    /// The extension that names a server.
    fn server_name(name: &str) -> Vec<u8> {
        let length = u16::try_from(name.len()).expect("short");
        let entry = [&[0], &length.to_be_bytes()[..], name.as_bytes()].concat();
        let list = u16::try_from(entry.len()).expect("short");
        extension(0, &[&list.to_be_bytes()[..], &entry].concat())
    }

    /// A `ClientHello` with these extensions, in records of this size.
    fn hello_of(extensions: &[Vec<u8>], record: usize) -> Vec<u8> {
        let extensions = extensions.concat();
        let length = u16::try_from(extensions.len()).expect("short");
        let mut body = [
            &[3, 3][..],
            &[7; 32],
            &[32],
            &[9; 32],
            &[0, 2, 0x13, 0x01],
            &[1, 0],
        ]
        .concat();
        body.extend_from_slice(&length.to_be_bytes());
        body.extend_from_slice(&extensions);
        let length = u32::try_from(body.len()).expect("short").to_be_bytes();
        let message = [&[1, length[1], length[2], length[3]], &body[..]].concat();
        let records = message.chunks(record).map(|part| {
            let length = u16::try_from(part.len()).expect("short").to_be_bytes();
            [&[22, 3, 1, length[0], length[1]], part].concat()
        });
        records.collect::<Vec<_>>().concat()
    }

    /// With GREASE, a key share of X25519MLKEM768 and one of X25519, and ECH: about 2 KiB.
    fn post_quantum(record: usize) -> Vec<u8> {
        let share = |group: u16, size: u16| {
            [
                &group.to_be_bytes()[..],
                &size.to_be_bytes(),
                &vec![5; usize::from(size)],
            ]
            .concat()
        };
        let shares = [share(0x0a0a, 1), share(0x11ec, 1216), share(0x001d, 32)].concat();
        let length = u16::try_from(shares.len()).expect("short").to_be_bytes();
        let extensions = [
            extension(0x2a2a, &[]),
            extension(51, &[&length[..], &shares].concat()),
            extension(0xfe0d, &[0; 250]),
            server_name("Public.Example.com"),
            extension(16, b"\x00\x03\x02h2"),
            extension(0x3a3a, &[0]),
        ];
        hello_of(&extensions, record)
    }

    fn named(sni: &str, alpn: &[&str]) -> Greeting {
        Greeting {
            sni: Some(sni.to_owned()),
            alpn: alpn.iter().map(|one| (*one).to_owned()).collect(),
            host: None,
        }
    }

    #[test]
    fn a_client_hello_says_its_server_and_protocols() {
        let expected = named("api.example.com", &["h2", "http/1.1"]);
        assert_eq!(read(HELLO), Some(expected));
        for end in 1..HELLO.len() {
            assert_eq!(read(&HELLO[..end]), None, "{end} bytes");
        }
    }

    #[test]
    fn large_ones_with_grease_and_ech_are_read_in_one_record_or_several() {
        let expected = named("public.example.com", &["h2"]);
        for record in [1, 100, 1400, 16_384] {
            let bytes = post_quantum(record);
            assert_eq!(read(&bytes), Some(expected.clone()), "records of {record}");
            assert_eq!(read(&bytes[..bytes.len() - 1]), None);
        }
        // An extension that is not understood hides none behind it.
        let broken = [extension(51, &[9, 9, 9]), server_name("a.example")];
        assert_eq!(
            read(&hello_of(&broken, 1000)),
            Some(named("a.example", &[]))
        );
        let none = hello_of(&[extension(43, &[2, 3, 4])], 1000);
        assert_eq!(read(&none), Some(Greeting::default()));
    }

    #[test]
    fn a_greeting_may_follow_a_header_of_the_proxy_protocol() {
        let expected = named("api.example.com", &["h2", "http/1.1"]);
        let text = b"PROXY TCP4 192.0.2.1 192.0.2.2 5 443\r\n";
        let local = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";
        let binary = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x7f\0\0\x01\x7f\0\0\x02\0\x05\x01\xbb";
        for header in [&text[..], local, binary] {
            let bytes = [header, HELLO].concat();
            assert_eq!(read(&bytes), Some(expected.clone()));
            for end in 1..bytes.len() {
                assert_eq!(read(&bytes[..end]), None, "{end} bytes");
            }
        }
        let endless = [b"PROXY TCP4 ", &[b'1'; 200][..]].concat();
        assert_eq!(read(&endless), Some(Greeting::default()));
    }

    #[test]
    fn an_http_request_says_its_host() {
        let host = |text: &str| read(text.as_bytes()).map(|greeting| greeting.host);
        let is = |text: &str, name: &str| {
            assert_eq!(host(text), Some(Some(name.to_owned())), "{text}");
        };
        is(
            "GET / HTTP/1.1\r\nHost: API.example.com\r\n\r\n",
            "api.example.com",
        );
        is(
            "POST /x HTTP/1.1\r\na: b\r\nhost:a.example:8080\r\n\r\nbody",
            "a.example",
        );
        is(
            "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n",
            "a.example",
        );
        is("CONNECT a.example:443 HTTP/1.0\r\n\r\n", "a.example");
        is("PROPFIND / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "[::1]");
        for partial in ["G", "GET", "GET / HTTP/1.1\r\nHost: a.exam", "DELETE /"] {
            assert_eq!(host(partial), None, "{partial}");
        }
        for other in [
            "hello",
            "PING\r\n",
            "GETTING",
            "GET \0",
            "GET key\r\n",
            "OPTIONS rtsp://a.example RTSP/1.0\r\n",
            "EHLO me\r\n",
            "PRI * HTTP/2.0\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
            "\0\0\0\x08\x04",
        ] {
            assert_eq!(host(other), Some(None), "{other:?}");
        }
    }

    #[test]
    fn what_is_no_hello_is_nothing() {
        let nothing = Some(Greeting::default());
        assert_eq!(
            read(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"),
            nothing,
            "a ServerHello"
        );
        assert_eq!(
            read(b"\x16\x03\x01\xff\xff\x01"),
            nothing,
            "too long a record"
        );
        assert_eq!(
            read(b"\x16\x03\x01\x00\x00\x16"),
            nothing,
            "an empty record"
        );
        assert_eq!(read(b"\x16select"), nothing);
        assert_eq!(read(b""), None);
    }

    #[test]
    fn a_filter_selects_who_asks_for_all_of_it() {
        let pattern = |text: &str| NamePattern::of_name(text);
        let known = |bytes: &[u8]| Greeted::Known(read(bytes).expect("whole"));
        let tls = known(HELLO);
        let http = known(b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n");
        let silent = Greeted::Known(Greeting::default());
        let selects = |filter: &GreetingFilter| {
            [&tls, &http, &silent, &Greeted::Awaited, &Greeted::Unread]
                .map(|greeted| filter.selects(greeted))
        };
        let asked = |asked| GreetingFilter {
            asked,
            server: None,
        };
        assert_eq!(selects(&GreetingFilter::default()), [true; 5]);
        let sni = |text| Asked {
            sni: pattern(text),
            ..Asked::default()
        };
        assert_eq!(
            selects(&asked(sni("*.example.com"))),
            [true, false, false, false, false]
        );
        assert_eq!(selects(&asked(sni("www.example.com"))), [false; 5]);
        let host = Asked {
            host: pattern("*.example.com"),
            ..Asked::default()
        };
        assert_eq!(selects(&asked(host)), [false, true, false, false, false]);
        let h3 = Asked {
            alpn: Some("h3".to_owned()),
            ..sni("*")
        };
        assert_eq!(selects(&asked(h3)), [false; 5]);
        let h2 = Asked {
            alpn: Some("h2".to_owned()),
            ..sni("*")
        };
        assert_eq!(selects(&asked(h2)), [true, false, false, false, false]);
    }

    #[test]
    fn a_rule_for_a_host_does_not_select_who_asks_for_another_one() {
        let selects = |server: &str, host: &str| {
            let filter = GreetingFilter {
                asked: Asked::default(),
                server: NamePattern::of_name(server),
            };
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            filter.selects(&Greeted::Known(read(request.as_bytes()).expect("whole")))
        };
        assert!(selects("api.example.com", "API.example.com:8080"));
        assert!(!selects("api.example.com", "www.example.com"));
        assert!(!selects("api.example.com", "api.example.org"));
        // Neither an address nor a name that the search list completes is another host.
        for host in ["10.0.0.5:80", "[::1]:80", "api.default", "api", ""] {
            assert!(selects("api.default.svc.cluster.local", host), "{host}");
        }
        assert!(selects("api.default", "api.default.svc.cluster.local"));
        assert!(!selects("api.default.svc.cluster.local", "api.de"));
        let filter = GreetingFilter {
            asked: Asked::default(),
            server: NamePattern::of_name("api.example.com"),
        };
        assert!(filter.selects(&Greeted::Known(Greeting::default())));
        assert!(filter.selects(&Greeted::Unread));
        assert!(!filter.selects(&Greeted::Awaited));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut data in proptest::collection::vec(any::<u8>(), 0..300), tls in any::<bool>()) {
            if tls {
                data.splice(0..0, [22, 3, 1]);
            }
            read(&data);
        }
    }
}
