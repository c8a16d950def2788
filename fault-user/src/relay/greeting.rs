//! What a client asks for in its first bytes: the TLS `ClientHello`, or the head of an HTTP/1 request.
//!
//! They are looked at while they lie in the socket, and read by the lanes later. Nothing of them is changed, and no
//! certificate is needed.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use tls_parser::{
    TlsExtension, TlsMessage, TlsMessageHandshake, TlsRecordType, parse_tls_extension,
    parse_tls_message_handshake, parse_tls_raw_record,
};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::lane::has_peer_ended;
use super::trouble::Trouble;
use crate::rule::{Asked, NamePattern};

/// The longest greeting that is looked at, in bytes, with the headers of its records.
const LONGEST: usize = 17 * 1024;
/// The most headers of an HTTP request.
const HEADERS: usize = 128;
/// A handshake message's type and length.
const HANDSHAKE_HEADER: usize = 4;
/// What an HTTP/1 request begins with.
const METHODS: &[&str] = &[
    "GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "CONNECT ", "OPTIONS ", "TRACE ", "PATCH ",
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
    /// Nobody looks at it.
    #[default]
    Unread,
    /// It has not come.
    Awaited,
    /// This is it; nothing in it where the client speaks another protocol, or waits for the server to speak.
    Known(Greeting),
}

/// Which connections a toxic acts on, by what their clients ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// What they must ask for.
    pub asked: Asked,
    /// The name of the server. Clients that ask for another one are not meant; those that ask for none are.
    pub server: Option<NamePattern>,
}

impl Filter {
    /// Whether every connection is meant.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a connection is meant, as far as is known.
    pub(crate) fn lets(&self, greeted: &Greeted) -> bool {
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
            && self
                .server
                .as_ref()
                .is_none_or(|server| name.is_none_or(|name| server.fits(name)))
    }
}

/// Waits for a client's greeting, or for its server to speak first.
pub(crate) fn poll(
    client: &Arc<TcpStream>,
    server: &TcpStream,
    trouble: &Trouble,
    context: &mut Context<'_>,
) -> Poll<Greeting> {
    // A server that speaks first has no client that begins with a greeting. If both have spoken the client's counts.
    let is_servers_turn = server.poll_read_ready(context).is_ready();
    let mut bytes = vec![0; LONGEST];
    loop {
        if client.poll_read_ready(context).is_pending() {
            return if is_servers_turn {
                Poll::Ready(Greeting::default())
            } else {
                Poll::Pending
            };
        }
        let looked = client.try_io(Interest::READABLE, || look(client, &mut bytes, trouble));
        match looked {
            Ok(greeting) => return Poll::Ready(greeting),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Whoever reads it is told.
            Err(_reset) => return Poll::Ready(Greeting::default()),
        }
    }
}

/// Looks at what lies in a client's socket.
///
/// # Errors
/// `WouldBlock` where more must come.
fn look(client: &Arc<TcpStream>, bytes: &mut [u8], trouble: &Trouble) -> io::Result<Greeting> {
    use std::os::fd::AsRawFd as _;
    let flags = nix::sys::socket::MsgFlags::MSG_PEEK;
    let count = nix::sys::socket::recv(client.as_raw_fd(), bytes, flags)?;
    let greeting = read(&bytes[..count]);
    let is_all = count == 0 || has_peer_ended(client);
    match greeting {
        Some(greeting) => Ok(greeting),
        None if count == bytes.len() => {
            trouble.tell(
                "greeting",
                "the first bytes of a client are too long to be looked at for names (16 KiB): rules with `sni`, \
                 `host` or `alpn` do not act on its connection",
            );
            Ok(Greeting::default())
        }
        None if is_all => Ok(Greeting::default()),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// The greeting that bytes begin with: an empty one if they are of another protocol, nothing if more must come.
pub(crate) fn read(bytes: &[u8]) -> Option<Greeting> {
    match bytes {
        [] => None,
        [22, 3, ..] | [22] => hello(bytes),
        _ => request(bytes),
    }
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
    if !METHODS.iter().any(|method| begins(&method)) {
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
    let host = headers.find(|header| header.name.eq_ignore_ascii_case("host"));
    Some(Greeting {
        host: host.and_then(|host| host_name(without_port(host.value))),
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
        for partial in ["G", "GET", "GET / HTTP/1.1\r\nHost: a.exam", "DELETE /"] {
            assert_eq!(host(partial), None, "{partial}");
        }
        for other in [
            "hello",
            "PING\r\n",
            "GETTING",
            "GET \0",
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
    fn a_filter_lets_what_asks_for_all_of_it() {
        let pattern = |text: &str| NamePattern::of_name(text);
        let known = |bytes: &[u8]| Greeted::Known(read(bytes).expect("whole"));
        let tls = known(HELLO);
        let http = known(b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n");
        let silent = Greeted::Known(Greeting::default());
        let lets = |filter: &Filter| {
            [&tls, &http, &silent, &Greeted::Awaited, &Greeted::Unread]
                .map(|greeted| filter.lets(greeted))
        };
        let asked = |asked| Filter {
            asked,
            server: None,
        };
        assert_eq!(lets(&Filter::default()), [true; 5]);
        let sni = |text| Asked {
            sni: pattern(text),
            ..Asked::default()
        };
        assert_eq!(
            lets(&asked(sni("*.example.com"))),
            [true, false, false, false, false]
        );
        assert_eq!(lets(&asked(sni("www.example.com"))), [false; 5]);
        let host = Asked {
            host: pattern("*.example.com"),
            ..Asked::default()
        };
        assert_eq!(lets(&asked(host)), [false, true, false, false, false]);
        let h3 = Asked {
            alpn: Some("h3".to_owned()),
            ..sni("*")
        };
        assert_eq!(lets(&asked(h3)), [false; 5]);
        let h2 = Asked {
            alpn: Some("h2".to_owned()),
            ..sni("*")
        };
        assert_eq!(lets(&asked(h2)), [true, false, false, false, false]);
        // A rule for a host: whoever asks for another one is not meant.
        let server = Filter {
            asked: Asked::default(),
            server: pattern("api.example.com"),
        };
        assert_eq!(lets(&server), [true, false, true, false, true]);
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
